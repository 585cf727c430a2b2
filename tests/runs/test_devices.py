"""Whole runs on several devices."""

import gc
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import FLAGS, LORA, RAG_FLAGS
from programs import load_script

from ragjax.runs import AdaptConfig, open_system
from ragjax.runs import models as run_models
from ragjax.runs.models import layout_of
from ragjax.runs.options.refresh import RefreshConfig
from ragjax.runs.workspace import Workspace
from ragjax.training import mesh


@pytest.fixture(autouse=True)
def eight_devices(all_devices, monkeypatch):
    monkeypatch.setattr(mesh, "_SMALLEST", 256)  # of tiny models, too


def held_by_device():
    """Returns the bytes of the buffers of live arrays on each device."""
    gc.collect()
    held = {device: {} for device in jax.devices()}
    for array in jax.live_arrays():
        if not array.is_deleted():
            for shard in array.addressable_shards:  # arrays as well, of the same buffers
                held[shard.device][shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return np.array([sum(buffers.values()) for buffers in held.values()])


@pytest.fixture
def by_stage(monkeypatch):
    """Bytes that each stage adds to each device while it computes."""
    found, timed = {}, Workspace.timed

    def watched(self, stage):
        found[stage] = held_by_device()
        return timed(self, stage)

    monkeypatch.setattr(Workspace, "timed", watched)
    return found


leaves = jax.tree_util.tree_leaves_with_path


def results(folder):
    """Returns the losses and the metrics of a run."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = [(row["stage"], row["step"], row["loss"]) for row in lines]
    metrics = json.loads((folder / "metrics.json").read_text())
    return losses, {jax.tree_util.keystr(path): value for path, value in leaves(metrics)}


def assert_same(folder, expected):
    (losses, metrics), (given_losses, given) = results(folder), results(expected)
    assert [row[:2] for row in losses] == [row[:2] for row in given_losses]
    np.testing.assert_allclose(
        [row[2] for row in losses], [row[2] for row in given_losses], rtol=2e-5, atol=2e-5
    )
    assert metrics.keys() == given.keys()
    for name, value in metrics.items():
        assert value == pytest.approx(given[name], abs=1e-4), name


RUNS = {
    "adapt": (*FLAGS, "--retriever.batch_size=8", "--language_model.accumulate=2"),
    "train_rag": (*RAG_FLAGS, "--training.batch_size=8", "--refresh.every=1"),
}


@pytest.fixture(scope="session")
def on_one_device(shared, tiny_inputs):
    """A function that returns the folder of a run of a program on one device."""

    def run(program):
        flags = [*(f"--{name}={value}" for name, value in tiny_inputs.items()), *RUNS[program]]

        def write(folder):
            script = load_script(f"experiments/{program}.py")
            assert script.main([*flags, f"--output={folder}", "--devices=1"]) == 0

        return shared(f"{program}-on-one", write), flags

    return run


@pytest.mark.slow
def test_adapters_are_kept_and_read_back_on_several_devices(tiny_inputs, tmp_path, capsys):
    run = tmp_path / "run"
    inputs = [f"--{name}={value}" for name, value in tiny_inputs.items()]
    flags = [*inputs, *FLAGS, *LORA, "--retriever.batch_size=8", f"--output={run}", "--fsdp=2"]
    assert load_script("experiments/adapt.py").main(flags) == 0
    assert "dev questions by the share of the trained weights" in capsys.readouterr().out
    small = ["--max_questions=4", "--answer_questions=2", "--resamples=20", "--no-robustness"]
    out = f"--output={tmp_path / 'evaluation'}"
    main = load_script("experiments/evaluate.py").main
    assert main([f"--run={run}", out, "--fsdp=2", *small]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "fsdp", "more"),
    [
        ("adapt", 4, ()),
        pytest.param("adapt", 1, (), marks=pytest.mark.slow),
        pytest.param("adapt", 8, (), marks=pytest.mark.slow),
        pytest.param("adapt", 1, ("--parallel=pmap",), marks=pytest.mark.slow),
        ("train_rag", 2, ()),
        pytest.param("train_rag", 1, (), marks=pytest.mark.slow),
        pytest.param("train_rag", 8, (), marks=pytest.mark.slow),
        pytest.param("train_rag", 1, ("--parallel=pmap",), marks=pytest.mark.slow),
    ],
)
def test_a_run_on_eight_devices_is_that_of_one(
    on_one_device, tmp_path, capsys, by_stage, program, fsdp, more
):
    expected, flags = on_one_device(program)
    before = held_by_device()
    main = load_script(f"experiments/{program}.py").main
    assert main([*flags, f"--output={tmp_path / 'run'}", f"--fsdp={fsdp}", *more]) == 0
    said = capsys.readouterr().out
    mesh_said = "data 8, of 8" if more else f"data {8 // fsdp} x fsdp {fsdp}"
    assert f"8 devices: {mesh_said}" in said
    assert_same(tmp_path / "run", expected)
    assert len(by_stage) >= 4
    for stage, held in by_stage.items():
        added = held - before
        assert added.min() > 0 and added[0] <= 1.25 * added.mean(), (stage, added)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["adapt", "train_rag"])
def test_a_run_that_is_stopped_goes_on_on_other_devices(on_one_device, tmp_path, program):
    expected, flags = on_one_device(program)
    main = load_script(f"experiments/{program}.py").main
    run = [*flags, f"--output={tmp_path / 'run'}"]
    stages = {"adapt": ("lm", "retriever-0"), "train_rag": ("end_to_end",)}[program]
    from ragjax.training import loop

    class Stopped(Exception):
        pass

    for stage, more in zip(stages, (["--fsdp=4"], ["--fsdp=2", "--devices=4"]), strict=False):
        saved = loop.Checkpointer.save

        def stops(self, step, *args, stage=stage, saved=saved, **kwargs):
            saved(self, step, *args, **kwargs)
            if self._folder.name.replace("-", "_") == stage.replace("-", "_") and step == 1:
                raise Stopped

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(loop.Checkpointer, "save", stops)
            main([*run, *more])
    assert main([*run, "--devices=1"]) == 0
    assert_same(tmp_path / "run", expected)


def test_an_answer_comes_from_a_model_in_parts(on_one_device, tmp_path):
    from ragjax.runs import Asker

    folder, _ = on_one_device("adapt")
    question = "what does the red cat like?"
    replies = [
        Asker(open_system(folder, devices=devices, log=lambda _: None)).ask(question)
        for devices in (1, 4)
    ]
    assert replies[0].answer == replies[1].answer
    assert replies[0].log_prob == pytest.approx(replies[1].log_prob, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"devices": 9}, "--devices 9: there are 8 devices, and 0 of them encode"),
        ({"devices": 6, "fsdp": 4}, "fsdp=4 does not divide the 6 devices"),
        (
            {"devices": 7, "refresh": RefreshConfig(mode="async", devices=2)},
            "there are 8 devices, and 2 of them encode",
        ),
    ],
)
def test_devices_that_are_not_there_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        layout_of(AdaptConfig(**changes))


def test_rows_that_do_not_go_round_are_said_and_refused_under_pmap(tiny_inputs, tmp_path, capsys):
    main = load_script("experiments/adapt.py").main
    given = [f"--{name}={value}" for name, value in tiny_inputs.items()]
    run = [*given, *FLAGS, f"--output={tmp_path / 'run'}", "--devices=3"]
    assert main([*run, "--dry_run"]) == 0
    assert (
        "note: --retriever.batch_size: 4 rows are no multiple of the 3" in capsys.readouterr().out
    )
    assert main([*run, "--parallel=pmap"]) == 2  # before anything is computed
    assert "3 devices, which --parallel pmap needs" in capsys.readouterr().err
    assert not (tmp_path / "run" / "index").exists()
    assert main([*run, "--retriever.batch_size=3", "--retriever.keyword_queries=2",
                 "--parallel=pmap"]) == 2  # fmt: skip
    assert "--retriever.keyword_queries: 2 rows" in capsys.readouterr().err


def test_parameters_are_divided_as_far_as_memory_asks(tmp_path, monkeypatch):
    class Device:
        process_index = 0

        def memory_stats(self):
            return {"bytes_limit": 2**30}

    for name, size in (("lm", 600), ("encoder", 60)):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "model.safetensors", "wb") as file:
            file.truncate(size * 2**20 // 8)
    config = AdaptConfig(lm=str(tmp_path / "lm"), encoder=str(tmp_path / "encoder"))
    devices = [Device()] * 8
    # (600 + 60) / 8 MiB of two bytes each, trained: 16 bytes a parameter, of 614 MiB a device.
    assert run_models._fewest_parts(config, devices) == 2
    assert run_models._fewest_parts(config, devices[:1]) == 1
    monkeypatch.setattr(Device, "memory_stats", lambda self: {"bytes_limit": 2**27})
    assert run_models._fewest_parts(config, devices) == 8
    monkeypatch.setattr(Device, "memory_stats", lambda self: None)
    assert run_models._fewest_parts(config, devices) == 1


@pytest.mark.parametrize(("platform", "tokens"), [("cpu", (1024, 4096)), ("gpu", (65_536, 16_384))])
def test_batches_suit_the_platform_unless_their_size_is_given(monkeypatch, platform, tokens):
    devices = [SimpleNamespace(platform=platform)]
    monkeypatch.setattr(run_models, "visible_devices", lambda: devices)
    config = AdaptConfig()
    assert (run_models.encode_tokens(config), run_models.score_tokens(config)) == tokens
    assert run_models.chunk_tokens(config) == 2 * tokens[0]
    config = AdaptConfig(encode_tokens=77, score_tokens=88)
    assert (run_models.encode_tokens(config), run_models.score_tokens(config)) == (77, 88)
