import json
import os
import subprocess
import sys

import pytest

from ragjax.storage import compiled

PROGRAM = """
import json
import jax, numpy as np
from ragjax.storage import compiled_folder, keep_compiled
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: x - 1)(np.ones(3))  # what is compiled before does not decide
keep_compiled()
jax.jit(lambda x: (x @ x).sum())(np.ones((3, 3)))
print(json.dumps([str(compiled_folder()), hits.count("/jax/compilation_cache/cache_hits")]))
"""
# As a CPU does whose programs XLA refuses to read back.
REFUSAL = """
import os
import jax
from jax._src import compiler
def refuses(*args):
    if not jax.config.jax_compilation_cache_dir:
        return None, None
    os.write(2, b"E0000 cpu_aot_loader.cc: not supported on the host machine")
    raise ValueError("refused")
compiler.compilation_cache.get_executable_and_time = refuses
"""


def run(tmp_path, *, refused=False, **changes):
    """Returns the folder in which a process keeps programs, and how many it took from there."""
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"RAGJAX_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": "", **changes}
    program = (REFUSAL if refused else "") + PROGRAM
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    assert not done.stderr
    folder, hits = json.loads(done.stdout.splitlines()[-1])
    return folder, hits


def test_a_second_process_takes_what_the_first_one_compiled(tmp_path):
    folder, first = run(tmp_path)
    assert folder.startswith(str(tmp_path / "cache" / "compiled"))
    again, second = run(tmp_path)
    assert again == folder and first == 1 and second >= 1  # the probe of the first, nothing else
    names = [name for name in os.listdir(folder) if name.endswith("-cache")]
    assert any("lambda" in name for name in names)


def test_nothing_is_kept_where_xla_refuses_to_read_it_back(tmp_path):
    assert run(tmp_path, refused=True) == ("None", 0)
    assert run(tmp_path) == ("None", 0)  # found out once
    (folder,) = (tmp_path / "cache" / "compiled").iterdir()
    assert [path.name for path in folder.iterdir()] == ["reads-back"]


@pytest.mark.parametrize("kept", ["off", "elsewhere", "nowhere to write"])
def test_what_the_user_has_set_holds(tmp_path, kept):
    if kept == "off":
        assert run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="0")[0] == "None"
    elif kept == "elsewhere":
        elsewhere = str(tmp_path / "elsewhere")
        assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=elsewhere)[0] == elsewhere
    else:
        (tmp_path / "cache").write_text("a file")
        assert run(tmp_path)[0] == "None"
        return
    assert not (tmp_path / "cache").exists()


def test_what_was_used_longest_ago_makes_room(tmp_path, monkeypatch):
    for age, name in enumerate(["new", "used", "old"]):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "used", (1e9 + 5, 1e8))
    monkeypatch.setattr(compiled, "MOST_BYTES", 25)
    compiled._trim(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "used"]
