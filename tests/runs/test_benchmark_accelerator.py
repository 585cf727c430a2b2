"""The benchmark of accelerators at its tiny sizes: every part, failures, and too little time."""

import importlib.util
import json
import math
import time

import jax
import pytest
from programs import load_script

from ragjax.training.mesh import make_layout

HAS_TORCH = importlib.util.find_spec("torch") is not None
BEFORE_AND_AFTER = {"before", "after"}
SIDES = {
    "encode": {"ragjax", "pytorch", "pytorch compiled"},
    "lsr_step": {"ragjax", "pytorch", "pytorch compiled"},
    "lm_step_lora": {"ragjax", "pytorch", "pytorch compiled"},
    "lm_step_top": {"ragjax", "pytorch", "pytorch compiled"},
    "rag_step_host": {"ragjax", "pytorch", "pytorch compiled"},
    "refresh": {"without", "during"},
    "rag_step_callback": {"ragjax"},
    "generation": {"ragjax", "pytorch", "pytorch compiled"},
    "search_small": {"ragjax", "pytorch"},
    "search_large": {"ragjax", "pytorch"},
    "checkpoints": {*BEFORE_AND_AFTER, "after_while_writing"},
    "compile_cache": BEFORE_AND_AFTER,
    "encoder_batches": BEFORE_AND_AFTER,
    "adapters": BEFORE_AND_AFTER,
}


@pytest.fixture
def script(monkeypatch):
    module = load_script("benchmarks/accelerator.py")
    monkeypatch.setattr(module, "visible_devices", lambda: jax.devices()[:1])
    return module


@pytest.fixture
def run(script, tmp_path):
    def run(*flags):
        path = tmp_path / "found.json"
        code = script.main([f"--output={path}", "--rounds=1", *flags])
        return code, json.loads(path.read_text("utf-8"))

    return run


def sides_of(content):
    return {
        part: {name: side for name, side in sides.items() if isinstance(side, dict)}
        for part, sides in content["parts"].items()
    }


def allowed_to_skip(part, side):
    if part == "compile_cache":  # on CPUs whose programs XLA refuses to read back
        return True
    return side == "pytorch compiled" or (side == "pytorch" and not HAS_TORCH)


def numbers_of(side):
    return {name: value for name, value in side.items() if isinstance(value, int | float)}


def check_side(part, name, side):
    if "skipped" in side:
        assert allowed_to_skip(part, name), side
        return
    assert side["seconds"] > 0
    for value in numbers_of(side).values():
        assert math.isfinite(value) and value >= 0
    rates = [value for key, value in side.items() if key.endswith("_per_second")]
    assert all(rate > 0 for rate in rates)
    assert rates or part == "compile_cache"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of PyTorch and transformers, which this only times
def test_every_part_is_measured(run, capsys):
    code, content = run("--minutes=100")
    assert code == 0
    found = sides_of(content)
    assert {part: set(sides) for part, sides in found.items()} == SIDES
    for part, sides in found.items():
        for name, side in sides.items():
            check_side(part, name, side)
    assert found["refresh"]["during"]["indexes_built"] > 0
    if HAS_TORCH:
        assert found["search_large"]["pytorch"]["same_documents"] == 1
    assert content["finished"] and content["sizes"] == "toy"
    assert content["device"]["platform"] == "cpu" and content["device"]["count"] == 1
    assert content["device"]["peak_flops_per_second"] is None  # and no utilisation is made up
    assert found["encode"]["ragjax"]["utilisation"] is None
    assert content["jax"] == jax.__version__ and "--minutes 100" in content["command"]
    printed = capsys.readouterr().out
    assert "tiny sizes" in printed
    assert len([line for line in printed.splitlines() if line.startswith("encode ")]) == 3


@pytest.mark.slow
def test_rows_and_vectors_are_divided_over_devices(script, run, monkeypatch):
    monkeypatch.setattr(script, "visible_devices", lambda: jax.devices()[:2])
    parts = ("lsr_step", "lm_step_lora", "rag_step_host", "search_small")
    code, content = run("--no-torch", "--fsdp=2", "--minutes=100", "--only", *parts)
    assert code == 0 and content["layout"] == "2 devices: data 1 x fsdp 2"
    found = sides_of(content)
    assert set(found) == set(parts)
    assert all(sides["ragjax"]["devices"] == 2 for sides in found.values())


def fake_parts(script, monkeypatch, *entries):
    made = [script.Entry(name, ("ragjax",), seconds, run) for name, seconds, run in entries]
    monkeypatch.setattr(script, "ENTRIES", made)


def quick(bench):
    return {"ragjax": bench.result(bench.timed(lambda: None), steps=1)}


def broken(bench):
    raise RuntimeError("out of memory")


def test_a_part_that_fails_is_reported_and_the_rest_go_on(script, run, monkeypatch, tmp_path):
    seen = []

    def looking(bench):
        seen.append(json.loads((tmp_path / "found.json").read_text("utf-8")))
        return quick(bench)

    fake_parts(script, monkeypatch, ("encode", 1, broken), ("generation", 1, looking))
    code, content = run()
    assert code == 1
    assert content["parts"]["encode"]["ragjax"] == {"failed": "RuntimeError: out of memory"}
    assert content["parts"]["generation"]["ragjax"]["seconds"] >= 0
    # The file is written after each part: a run that is killed has lost the part under way.
    assert "failed" in seen[0]["parts"]["encode"]["ragjax"] and not seen[0]["finished"]


def test_what_does_not_fit_into_the_time_is_skipped_and_says_so(run):
    code, content = run("--minutes=1e-9")
    assert code == 0 and content["finished"]
    found = sides_of(content)
    assert {part: set(sides) for part, sides in found.items()} == SIDES
    for sides in found.values():
        assert all("no time left" in side["skipped"] for side in sides.values())


def test_the_guess_follows_how_long_parts_take_here(script, run, monkeypatch):
    def slow(bench):
        time.sleep(0.3)
        return quick(bench)

    # Expected: 3 of 100 seconds in all sizes of a toy; the first takes three times its share.
    fake_parts(script, monkeypatch, ("encode", 3, slow), ("generation", 30, quick))
    _, content = run("--minutes=0.025")
    assert "takes about" in content["parts"]["generation"]["ragjax"]["skipped"]
    _, content = run("--minutes=0.5")
    assert "seconds" in content["parts"]["generation"]["ragjax"]


def test_what_is_not_asked_for_is_left_out(script, run, monkeypatch):
    fake_parts(script, monkeypatch, ("encode", 1, broken), ("generation", 1, quick))
    code, content = run("--only", "generation")
    assert code == 0 and set(content["parts"]) == {"generation"}
    assert "--only generation" in content["command"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "nothing"], "--only nothing: the parts are encode"),
        (["--minutes=0"], "--minutes must be more than 0"),
        (["--rounds=0"], "--rounds at least 1"),
    ],
)
def test_bad_flags_end_in_one_line(script, capsys, flags, words):
    assert script.main(flags) == 2
    assert words in capsys.readouterr().err


@pytest.fixture
def bench(script, tmp_path):
    layout = make_layout(jax.devices()[:1])
    return script.Bench(script.TOY, layout, tmp_path, chunk_tokens=0, rounds=1, peak=1e9)


def test_operations_count_the_adapters_that_are_there(script, bench):
    parts = load_script("benchmarks/accelerator.py").ENTRIES[0].run.__globals__
    adapters = bench.split("lora").trainable
    real = sum(leaf.size for leaf in jax.tree.leaves(adapters) if leaf.ndim == 3)
    assert parts["adapter_size"](bench) == real


def test_utilisation_is_the_share_of_all_devices(bench, script):
    timing = bench.timed(lambda: None)._replace(seconds=[2.0, 1.0, 4.0])
    found = bench.result(timing, flops=1e9, devices=2, tokens=10)
    assert found["seconds"] == 2 and found["tokens_per_second"] == 5
    assert found["utilisation"] == pytest.approx(0.25)


def test_vectors_are_not_drawn_where_they_do_not_fit(script, bench, monkeypatch):
    class Small:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 10_000, "bytes_in_use": 1000}

    monkeypatch.setattr(script.jax, "devices", lambda: [Small()])
    search = next(entry.run for entry in script.ENTRIES if entry.part == "search_large")
    with pytest.raises(script.Skipped, match="vectors need"):
        search(bench)
