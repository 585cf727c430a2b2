"""The real trackers, without an account and a network: what each has of a run that was resumed."""

import contextlib
import importlib.util
import json
import sys
from collections.abc import Mapping

import pytest
from programs import load_script

from ragjax.runs import AdaptConfig, adapt
from ragjax.runs.program import parse_flags
from ragjax.runs.tracking import trackers
from ragjax.runs.tracking.trackers import TRACKING
from ragjax.training.loop import Interrupted, StopFlag

ALL = "tensorboard,wandb,trackio"
SECRET = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class StopOnceLogged(StopFlag):
    """Asks a run to stop once it has logged a step."""

    def __init__(self, folder):
        super().__init__()
        self._folder = folder

    def check(self):
        metrics = self._folder / "metrics.jsonl"
        if metrics.exists() and metrics.stat().st_size:
            self.signum = 15
        super().check()


def scalars(folder):
    """Tag and step to the values of TensorBoard's event files, and their texts."""
    from tensorboardX.proto.event_pb2 import Event

    found, texts = {}, ""
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    found[value.tag, event.step] = value.simple_value
                else:
                    texts += str(value)
    return found, texts


def wandb_records(folder):
    """The records of a run that W&B keeps on disk; see its leveldb log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data, place, part = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := -place % 2**15) < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""


@contextlib.contextmanager
def offline_trackers(folder):
    """Lets the real trackers write to a folder, without an account and a network."""
    import wandb

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("TRACKIO_DIR", str(folder))
        patch.setenv("HF_TOKEN", SECRET)
        patch.setattr(sys, "argv", ["adapt.py", f"--query_prefix={SECRET} "])
        for name in ("WANDB_API_KEY", "WANDB_PROJECT", "TRACKIO_PROJECT", "TRACKIO_SPACE_ID"):
            patch.delenv(name, raising=False)
        wandb.teardown()  # which has read the environment
        yield
        wandb.teardown()


@pytest.fixture(scope="module")
def tracked(tiny_run, tmp_path_factory):
    """The folder of a run that all trackers followed, stopped once and continued."""
    for package in ("tensorboardX", "wandb", "trackio"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("needs the tensorboard, wandb and trackio extras")
    assert "trackio" not in sys.modules  # it reads TRACKIO_DIR once
    folder = tmp_path_factory.mktemp("tracked") / "run"
    flags = [*tiny_run("lm-only").flags, f"--output={folder}", f"--log_to={ALL}"]
    config = parse_flags(AdaptConfig(), None, [*flags, f"--query_prefix={SECRET} "]).options
    said = []
    with offline_trackers(folder.parent / "trackio"):
        with pytest.raises(Interrupted):
            adapt(config, stop=StopOnceLogged(folder), log=said.append)
        assert rows(folder)
        adapt(config, log=said.append)
    assert not [line for line in said if "does not take" in line]
    return folder


def expected_steps(folder):
    return {
        (f"{row['stage']}/{name}", row["step"]): value
        for row in rows(folder)
        for name, value in row.items()
        if name not in ("stage", "step") and value is not None
    }


def expected_results(folder):
    metrics: Mapping = json.loads((folder / "metrics.json").read_text())
    return {
        f"result/{system}/{name}": cell["value"]
        for system, summary in metrics.items()
        for name, cell in summary.items()
        if name not in ("n", "applicable")
    }


def in_tensorboard(steps, results):
    """Both as TensorBoard has them: in float32, under names without @."""
    values = steps | {(name, 0): value for name, value in results.items()}
    return pytest.approx(
        {(name.replace("@", "_"), step): value for (name, step), value in values.items()}, rel=1e-6
    )


@pytest.mark.slow
def test_tensorboard_has_each_value_of_each_step_and_the_results(tracked):
    found, texts = scalars(tracked / "tensorboard")
    assert found == in_tensorboard(expected_steps(tracked), expected_results(tracked))
    assert len({step for _, step in found}) > 1 and ("result/served/f1", 0) in found
    assert "language_model" in texts and "*** " in texts and SECRET not in texts


@pytest.mark.slow
def test_wandb_goes_on_with_one_run_after_a_resume(tracked):
    id = json.loads((tracked / TRACKING).read_text())["id"]
    folders = sorted((tracked / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(id) for folder in folders)
    steps, summary = {}, {}
    for folder in folders:
        for record in wandb_records(folder):
            values = {
                item.key or item.nested_key[0]: json.loads(item.value_json)
                for item in [*record.history.item, *record.summary.update]
            }
            if record.WhichOneof("record_type") == "history":
                steps |= {
                    (name, values["lm/step"]): value
                    for name, value in values.items()
                    if name.startswith("lm/") and name != "lm/step"
                }
            summary |= values
            if record.WhichOneof("record_type") == "run":
                assert record.run.display_name == f"run-{id}"
                options = {one.key: one.value_json for one in record.run.config.update}
                assert json.loads(options["query_prefix"]) == "*** "
        assert SECRET.encode() not in next(folder.glob("*.wandb")).read_bytes()
    assert steps == expected_steps(tracked)
    results = expected_results(tracked)
    assert {name: summary[name] for name in results} == results


@pytest.mark.slow
def test_trackio_goes_on_with_one_run_after_a_resume(tracked):
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("ragjax")
    assert name == f"run-{json.loads((tracked / TRACKING).read_text())['id']}"
    found = {
        (key, row["step"]): value
        for row in SQLiteStorage.get_logs("ragjax", name)
        for key, value in row.items()
        if key not in ("step", "timestamp")
    }
    results = {(key, 0): value for key, value in expected_results(tracked).items()}
    assert found == expected_steps(tracked) | results
    assert SQLiteStorage.get_run_config("ragjax", name)["query_prefix"] == "*** "


@pytest.mark.slow
def test_wandb_that_does_not_answer_leaves_a_run_of_the_user_alone(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs the wandb extra")
    with offline_trackers(tmp_path):
        theirs, begin = wandb.init(dir=str(tmp_path)), wandb.init

        def down(*args, mode, **options):
            if mode is None:
                begin(*args, mode="offline", **options)  # holds the id
                raise wandb.errors.CommError("no route to host")
            return begin(*args, mode=mode, **options)

        monkeypatch.setattr(wandb, "init", down)
        run = trackers.Tracked(tmp_path, "run-1", "1", {})
        tracker = trackers.WeightsAndBiases(run, lambda note: None)
        tracker.write("lm", 0, {"loss": 0.5})
        tracker.close()
        theirs.log({"still": 1})
        assert wandb.run is theirs
        theirs.finish()


@pytest.mark.slow
def test_wandb_that_does_not_answer_or_knows_nobody_is_kept_for_later(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs the wandb extra")
    run = trackers.Tracked(tmp_path, "run-1", "1", {"a": 1})
    begin, modes, noted = wandb.init, [], []

    def down(*args, mode, **options):
        modes.append(mode)
        if mode is None:
            raise wandb.errors.CommError("no route to host")
        return begin(*args, mode=mode, **options)

    monkeypatch.setattr(wandb, "init", down)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for logged_in in (True, False):
        wandb.teardown()
        monkeypatch.setattr(wandb, "login", lambda answer=logged_in, **options: answer)
        tracker = trackers.WeightsAndBiases(run, noted.append)
        tracker.write("lm", 0, {"loss": 0.5})
        tracker.close()
    wandb.teardown()
    assert modes == [None, "offline", "offline"]
    later = f"; wandb sync {tmp_path / 'wandb' / 'offline-run-*'} sends it later"
    assert noted == [
        f"no route to host{later}",
        f"nobody is logged in: set WANDB_API_KEY, or wandb login{later}",
    ]
    folder = sorted((tmp_path / "wandb").glob("offline-run-*"))[-1]
    logged = [one for record in wandb_records(folder) for one in record.history.item]
    assert "0.5" in [one.value_json for one in logged]


@pytest.mark.slow
def test_an_evaluation_sends_its_results(tiny_inputs, tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the tensorboard extra")
    flags = [*(f"--{name}={value}" for name, value in tiny_inputs.items()), "--resamples=20"]
    flags += ["--systems", "bm25", "--max_questions=4", "--answer_questions=1", "--no-robustness"]
    flags += ["--max_new_tokens=2", "--log_to=tensorboard", f"--output={tmp_path / 'o'}"]
    assert load_script("experiments/evaluate.py").main(flags) == 0
    found, _ = scalars(tmp_path / "o" / "tensorboard")
    assert found == in_tensorboard({}, expected_results(tmp_path / "o"))
    assert ("result/bm25/recall_5", 0) in found
