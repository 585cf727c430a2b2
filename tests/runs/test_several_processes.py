"""Runs that several processes make together, two of four devices each."""

import json
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import FLAGS, RAG_FLAGS
from programs import environment
from refresh_tasks import file_bytes, make_params, make_task

from ragjax.index import EmbeddingStore
from ragjax.refresh import encode_corpus
from ragjax.runs import AdaptConfig, RagConfig
from ragjax.runs import models as run_models
from ragjax.storage import processes
from ragjax.training import mesh
from ragjax.training.checkpoint import Checkpointer

START = """
import sys
from programs import load_script
from ragjax.training import mesh
mesh._SMALLEST = 256  # tiny models are divided, too
sys.exit(load_script(sys.argv[1]).main(sys.argv[2:]))
"""
FAILING = f"""
from ragjax.storage import processes
import sys
import ragjax.runs
program = sys.modules["ragjax.runs.adapt"]  # the package has a function of this name

def fail(*_):
    if not processes.is_first():
        raise ValueError("of this one alone")

build = program.build_bm25
program.build_bm25 = lambda workspace: fail() or build(workspace)
{START}"""
ADAPT = (*FLAGS, "--retriever.batch_size=8", "--language_model.accumulate=2")
RAG = (
    *RAG_FLAGS,
    "--training.batch_size=8",
    "--training.epochs=8",
    "--refresh.mode=async",
    "--refresh.every=1",
)


@pytest.fixture
def start(tmp_path):
    """Starts a Python program in two processes of four devices, or in one of eight."""
    running = []

    def start(*command, count=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        started = []
        for number in range(count):
            told = {processes.ADDRESS: address, processes.COUNT: str(count)}
            world = environment(devices=8 // count) | told | {processes.NUMBER: str(number)}
            log = tmp_path / f"{len(running)}.log"
            with open(log, "w") as file:
                process = subprocess.Popen(
                    [sys.executable, "-c", *command], env=world, stdout=file, stderr=file
                )
            process.log = log
            started.append(process)
            running.append(process)
        return started

    yield start
    for process in running:
        process.kill()
        process.wait()


def ended(started, seconds=400):
    """Returns the exit codes and what was printed."""
    codes = [process.wait(seconds) for process in started]
    return codes, [process.log.read_text() for process in started]


def await_words(process):
    """Waits for the words that another process has for one that has ended."""
    deadline = time.monotonic() + 60
    while "a process of this run is lost: the same command" not in process.log.read_text():
        assert time.monotonic() < deadline, process.log.read_text()
        time.sleep(0.1)


@pytest.fixture
def flags(tiny_inputs):
    return [f"--{name}={value}" for name, value in tiny_inputs.items()]


def results(folder):
    """Returns the losses, and the metrics, of a run."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    metrics = jax.tree_util.tree_leaves_with_path(json.loads((folder / "metrics.json").read_text()))
    losses = {(row["stage"], row["step"]): row["loss"] for row in rows}
    return losses, {jax.tree_util.keystr(path): value for path, value in metrics}


def assert_same(folder, expected):
    for found, given in zip(results(folder), results(expected), strict=True):
        assert found == pytest.approx(given, rel=2e-5, abs=1e-4)


MEETING = """
import sys, jax, numpy as np
from pathlib import Path
from ragjax.storage import processes
from ragjax.training.checkpoint import Checkpointer
from ragjax.training import mesh
processes.start("auto")
mesh._SMALLEST = 8
here, folder = jax.process_index(), Path(sys.argv[1])
assert processes.several() and processes.is_first() == (here == 0)
assert processes.everyone(here, 7).tolist() == [[0, 7], [1, 7]]
assert processes.largest(3 * here) == 3
votes = processes.Votes()
assert votes(here) is None and votes(5).tolist() == [[0], [1]]
same = processes.SameInAll("things")
same.check(b"alike")
same.check(b"other" if here else b"one")
try:
    same.check(b"")
    raise SystemExit("nobody noticed")
except ValueError as error:
    assert "things of process 1 differ from those of process 0" in str(error)
def refuse():
    raise KeyError("no entry")
try:
    processes.first_alone(refuse)
except (KeyError, ValueError) as error:
    assert "no entry" in str(error) and isinstance(error, ValueError) == bool(here)
layout = mesh.make_layout(jax.devices(), fsdp=4)
assert len(layout.devices) == 4
given = {"kernel": np.arange(64.0, dtype=np.float32).reshape(8, 8), "bias": np.ones(3, np.float32)}
placed = layout.place(given)
assert not placed["kernel"].is_fully_replicated
np.testing.assert_array_equal(processes.host(placed["kernel"]), given["kernel"])
rows = mesh.spread_rows(given["kernel"], placed)
np.testing.assert_array_equal(processes.host(rows), given["kernel"])
with processes.folder_of_run(folder) as own:
    assert (own / "earlier.txt").read_text() == "text" and (own == folder) == (here == 0)
    (own / "written.txt").write_text(str(here))
    saver = Checkpointer(own / "checkpoints" / "stage")
    saver.save(1, placed, wait=False)
    saver.save(2, jax.tree.map(lambda leaf: leaf + 1, placed), {"seen": 2})
    back = saver.latest_good(placed)
    assert back.step == 2 and back.info == {"seen": 2}
    assert back.state["kernel"].sharding == placed["kernel"].sharding
    np.testing.assert_array_equal(processes.host(back.state["kernel"]), given["kernel"] + 1)
apart = folder / f"apart-{here}"  # as on hosts that do not share a disk
apart.mkdir()
(apart / "run.lock").write_text(f"of process {here}")
try:
    with processes.folder_of_run(apart):
        raise SystemExit("nobody noticed")
except ValueError as error:
    assert "process 1 cannot work there" in str(error)
    assert "give a folder that all hosts share" in str(error)
processes.leave(0, together=True)
"""


def test_processes_agree_and_save_what_one_reads(start, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "earlier.txt").write_text("text")
    (folder / "process-mining").mkdir()
    codes, said = ended(start(MEETING, str(folder)))
    assert codes == [0, 0], said
    assert (folder / "written.txt").read_text() == "0"
    assert [path.name for path in folder.glob("process-*")] == ["process-mining"]
    layout = mesh.make_layout(jax.devices()[:8], fsdp=2)
    template = layout.place(
        {"kernel": np.zeros((8, 8), np.float32), "bias": np.zeros(3, np.float32)}
    )
    back = Checkpointer(folder / "checkpoints" / "stage").latest_good(template)
    assert back.step == 2
    np.testing.assert_array_equal(back.state["kernel"], np.arange(64.0).reshape(8, 8) + 1)


VOTING = """
import sys, time, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ragjax.storage import processes
processes.start("auto")
here = jax.process_index()
mesh = jax.make_mesh((2, 4), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)
apart = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
gathered = NamedSharding(mesh, PartitionSpec(None, "fsdp"))

@jax.jit
def step(x):
    for _ in range(6):
        x = jax.lax.with_sharding_constraint(x + 1, gathered)
        x = jax.lax.with_sharding_constraint(x @ np.eye(512, dtype=np.float32), apart)
    return x

x = processes.put(np.zeros((64, 512), np.float32), apart)
votes, rng = processes.Votes(), np.random.default_rng(here)
for number in range(100):
    x = step(x)
    time.sleep(rng.uniform(0, 0.02))
    seen = votes(here, number)
    assert seen is None or seen.tolist() == [[0, number - 1], [1, number - 1]], seen
np.testing.assert_array_equal(processes.host(x), np.full((64, 512), 600))
processes.leave(0, together=True)
"""


def test_votes_do_not_disturb_a_step_that_is_running(start):
    codes, said = ended(start(VOTING))
    assert codes == [0, 0], said


SHARING = """
import sys, jax, numpy as np
from pathlib import Path
from refresh_tasks import DOCUMENTS, make_params, make_request, make_task
from ragjax.refresh import ThreadExecutor
from ragjax.storage import processes
processes.start("auto")
here, folder, read = jax.process_index(), Path(sys.argv[1]), []
task = make_task(tokenize=lambda documents: read.extend(documents) or documents)
executor = ThreadExecutor(jax.local_devices(), shared=folder / "shares")
for step in range(2):
    read.clear()
    request = make_request(folder / f"store-{step}-{here}", task, make_params(step), step=step)
    executor.encode(task, request)
    assert read == [d for shard in range(here, 24, 2) for d in DOCUMENTS[5 * shard:][:5]], read
    processes.meet()
processes.leave(0, together=True)
"""


def test_processes_divide_a_corpus_and_have_the_same_store(start, tmp_path):
    codes, said = ended(start(SHARING, str(tmp_path)))
    assert codes == [0, 0], said
    task = make_task()
    for step in range(2):
        first, second = (file_bytes(tmp_path / f"store-{step}-{here}") for here in range(2))
        store = EmbeddingStore.open(tmp_path / f"store-{step}-0")
        expected = encode_corpus(task, make_params(step))
        np.testing.assert_allclose(store.read(), expected, atol=1e-6)
        assert first == second
    assert len(list((tmp_path / "shares").iterdir())) == 1


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(start, flags, tmp_path):
    flags = [*flags, *ADAPT]
    together, alone = tmp_path / "together", tmp_path / "alone"
    script = ("experiments/adapt.py", *flags)
    codes, said = ended(start(START, *script, f"--output={together}", "--distributed=auto"))
    assert codes == [0, 0], said
    assert "8 devices: data 8 x fsdp 1" in said[0]
    assert "== evaluation" in said[0] and "==" not in said[1]
    codes, said = ended(start(START, *script, f"--output={alone}", count=1))
    assert codes == [0], said
    assert_same(together, alone)
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.iterdir()}


@pytest.mark.slow
def test_a_stop_and_a_kill_reach_all_processes_and_the_run_goes_on(start, flags, tmp_path):
    folder = tmp_path / "run"
    script = (START, "experiments/train_rag.py", *flags, *RAG)
    together = (*script, f"--output={folder}", "--distributed=auto")

    def until(steps, started):
        lines = folder / "metrics.jsonl"
        while not lines.exists() or lines.read_text().count("\n") < steps:
            assert all(process.poll() is None for process in started), ended(started)[1]
            time.sleep(0.1)

    started = start(*together, "--fsdp=4")
    until(2, started)
    started[1].terminate()
    codes, said = ended(started)
    assert codes == [143, 143], said
    assert "stopped by SIGTERM; the same command continues this run" in said[0]
    (step,) = [int(p.name) for p in (folder / "checkpoints/end_to_end").iterdir()][-1:]
    started = start(*together, "--fsdp=4")
    until(max(step, 2) + 2, started)
    started[1].kill()
    codes, said = ended(started)
    assert codes[1] == -9 and codes[0] in (5, -6)  # by its own error, or ended by JAX
    assert "resuming after step" in said[0]
    await_words(started[0])
    assert (folder / "process-1").exists()
    # On another mesh, by one process; what the lost one had written goes.
    codes, said = ended(start(*script, f"--output={folder}", "--fsdp=2", count=1))
    assert codes == [0], said
    assert "data 4 x fsdp 2" in said[0] and "end_to_end: resuming after step" in said[0]
    assert not (folder / "process-1").exists()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(8))
    assert rows[-1]["index/version"] >= 3


def test_an_error_of_one_process_ends_it_with_its_code_and_the_others_soon(start, flags, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "something.txt").write_text("of the user")
    script = (START, "experiments/adapt.py", *flags, *ADAPT, "--distributed=auto")
    codes, said = ended(start(*script, f"--output={folder}"))  # of process 0, and told to the other
    assert codes == [2, 2], said
    assert all("is not empty (something.txt)" in each for each in said)
    script = (FAILING, *script[1:])
    began = time.monotonic()
    started = start(*script, f"--output={tmp_path / 'other'}")
    codes, said = ended(started)
    assert codes[1] == 2 and "error: of this one alone" in said[1], said
    assert codes[0] in (5, -6)
    await_words(started[0])
    assert time.monotonic() - began < 200


@pytest.mark.parametrize(
    ("flag", "config"),
    [
        ("--devices", AdaptConfig(devices=4)),
        ("--parallel pmap", AdaptConfig(parallel="pmap")),
        ("--training.retrieval callback", {"training": {"retrieval": "callback"}}),
        ("--refresh.dispatch ray", {"refresh": {"dispatch": "ray"}}),
    ],
)
def test_what_one_process_does_alone_is_refused_of_several(monkeypatch, flag, config):
    devices = [SimpleNamespace(process_index=number // 4) for number in range(8)]
    monkeypatch.setattr(run_models, "visible_devices", lambda: devices)
    config = RagConfig.from_dict(config) if isinstance(config, dict) else config
    with pytest.raises(ValueError, match=f"^{flag} is for one process, and 2 make this run"):
        run_models.layout_of(config)


def test_a_number_of_processes_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv(processes.COUNT, "two")
    with pytest.raises(ValueError, match="^JAX_NUM_PROCESSES=two: expected a whole number"):
        processes.start("auto")
    monkeypatch.delenv(processes.COUNT)
    with pytest.raises(ValueError, match="distributed=auto: .*; start every process"):
        processes.start("auto")
