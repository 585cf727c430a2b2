import subprocess
import sys

import pytest

from ragjax.storage import RunLock

HOLD = """
import sys, time
from ragjax.storage import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip() == "held"
    return process


def test_a_second_process_is_told_who_holds_the_folder_and_gets_it_when_that_one_is_killed(
    tmp_path,
):
    process = hold(tmp_path)
    try:
        with pytest.raises(ValueError, match=rf"locked by process {process.pid} on host .* since"):
            with RunLock(tmp_path):
                pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with RunLock(tmp_path):
        pass


def test_the_lock_is_free_after_the_block(tmp_path):
    for _ in range(2):
        with RunLock(tmp_path):
            pass


def test_the_same_process_is_told_that_it_holds_the_folder_itself(tmp_path):
    with RunLock(tmp_path), pytest.raises(ValueError, match="this one; end the call that holds it"):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


def test_what_this_process_holds_is_given_back_or_was_forgotten(tmp_path):
    returned = []
    first = RunLock(tmp_path, give_back=lambda: returned.append(first.__exit__()))
    first.__enter__()
    second = RunLock(f"{tmp_path}/../{tmp_path.name}").__enter__()
    assert returned == [None]
    first.__exit__()
    with pytest.raises(ValueError, match="this one"):
        RunLock(tmp_path).__enter__()
    del second
    with RunLock(tmp_path):
        pass
