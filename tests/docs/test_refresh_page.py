"""The page on refreshing the index says what the code says, and its examples work."""

import inspect
import re
import shlex
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
import yaml
from programs import ROOT, environment, load_script

from ragjax import refresh
from ragjax.refresh.gauges import Gauges, index_metrics
from ragjax.training.live import Freshness

EXAMPLE = ROOT / "docs" / "plain_jax_refresh.py"
PAGE = (ROOT / "docs" / "refresh.rst").read_text("utf-8")
MANIFEST = yaml.safe_load((ROOT / "docs" / "encode-job.yaml").read_text("utf-8"))
INDEX_NAMES = {"IndexSnapshot", "SearchResult", "make_jit_search", "JitSearchResult"}
# Runs the example and tells, step by step, whether the parameters of the step before are gone.
WATCH = """
import runpy, sys
import jax
from ragjax.refresh import Refresher

update, handed = Refresher.update, []
def watched(self, step, params):
    handed.append(params)
    return update(self, step, params)
Refresher.update = watched
runpy.run_path(sys.argv[1], run_name="__main__")
print("donated", *[params.is_deleted() for params in handed])
print("imported", *sys.modules)
"""


@pytest.mark.slow
def test_the_example_trains_while_its_index_is_rebuilt_with_nothing_but_refresh(tmp_path):
    assert len(EXAMPLE.read_text("utf-8").splitlines()) <= 40
    result = subprocess.run(
        [sys.executable, "-c", WATCH, str(EXAMPLE)],
        capture_output=True, text=True, check=True, timeout=120,
        env=environment() | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    *printed, donated, imported = result.stdout.splitlines()
    lines = [re.match(r"step (\d+) loss ([\d.]+) index (\d+) \((\d+) steps old\)", line)
             for line in printed]  # fmt: skip
    assert None not in lines, result.stdout
    steps, losses, versions, staleness = np.array([line.groups() for line in lines], float).T
    assert losses[-1] < 0.5 * losses[0]
    # The bound on the lag makes it refresh so often on the slowest machine.
    assert versions[0] == 0 and (np.diff(versions) >= 0).all() and versions[-1] >= 500 // 150
    assert staleness.max() <= 150 and (staleness[1:] < steps[1:]).any()
    assert donated.split()[1:] == ["True"] * 501
    modules = {name for name in imported.split() if name.startswith("ragjax.")}
    assert {name.split(".")[1] for name in modules} <= {
        "refresh",
        "index",
        "data",
        "models",
        "storage",
    }
    assert {name.split(".")[0] for name in imported.split()}.isdisjoint(
        {"flax", "optax", "orbax", "transformers", "torch", "scann"}
    )


def test_every_public_name_is_in_the_reference_once():
    documented = Counter(
        re.findall(r"^\.\. auto(?:function|class|exception|data):: (\w+)$", PAGE, re.MULTILINE)
    )
    public = re.findall(r"(\w+) as \1\b", Path(refresh.__file__).read_text("utf-8"))
    assert documented == Counter({*public, *INDEX_NAMES})


def section(title):
    """The lines below a heading, up to the next one."""
    found = re.search(
        rf"^{re.escape(title)}\n-+\n(.*?)(?=^[^\n]+\n-+$)", PAGE, re.MULTILINE | re.DOTALL
    )
    assert found, title
    return found[1]


def first_columns(title):
    """The codes in the first column of each row of a section's table, and the row's text."""
    rows = re.split(r"^   \* - ", section(title), flags=re.MULTILINE)[2:]  # without the heading
    assert rows, title
    return [(re.findall(r"`([^`]+)`", row.split("\n     - ")[0]), row) for row in rows]


def test_the_tables_have_the_states_the_modes_and_the_metrics():
    states = [name for names, _ in first_columns("One refresh") for name in names]
    assert states == [state.name for state in refresh.RefreshState]
    modes = [name for names, _ in first_columns("Ways to stay fresh") for name in names]
    assert modes == list(get_args(Freshness))
    figures = [name for names, _ in first_columns("Figures for the log") for name in names]
    source = inspect.getsource(index_metrics) + inspect.getsource(Gauges.metrics)
    assert figures == [f"index/{name}" for name in re.findall(r'^ +"(\w+)": ', source, re.M)]


def test_the_texts_of_the_triggers_are_read_as_the_table_says():
    for texts, row in first_columns("When"):
        cell = row.split("\n     - ")[1]
        for text in texts:
            trigger = refresh.parse_trigger(text, measure=lambda params, snapshot: 0.0)
            assert cell.strip() == f"`{type(trigger).__name__}`"


def test_every_test_that_the_page_names_exists():
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    tests = "".join(
        path.read_text("utf-8")
        for folder in ("refresh", "index", "runs")
        for path in (ROOT / "tests" / folder).rglob("test_*.py")
    )
    assert len(named) > 10
    assert [name for name in sorted(named) if f"def {name}(" not in tests] == []


def commands():
    """The flags of each command for `experiments/encode.py`, on the page and in its manifest."""
    found = re.findall(r"python experiments/encode\.py ([^\n\"]+)", PAGE)
    (container,) = MANIFEST["spec"]["template"]["spec"]["containers"]
    return [*map(shlex.split, found), container["command"][2:]]


@pytest.mark.parametrize("flags", commands(), ids=" ".join)
def test_each_command_has_flags_of_the_script(flags):
    script = load_script("experiments/encode.py")
    script._check(tyro.cli(script.Flags, args=flags))


def test_the_manifest_is_a_job_whose_pods_know_their_share():
    """As the API server checks it, where its schemas are installed; and as the script reads it."""
    spec = MANIFEST["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    pod = {variable["name"]: variable["value"] for variable in container["env"]}
    last = pod | {"JOB_COMPLETION_INDEX": str(spec["completions"] - 1)}
    assert (
        spec["completionMode"] == "Indexed" and spec["template"]["spec"]["restartPolicy"] == "Never"
    )
    assert refresh.find_share(environ=last) == (spec["completions"] - 1, spec["completions"])
    validate = pytest.importorskip("kubernetes_validate", reason="needs the [dev] extra")
    validate.validate(MANIFEST, validate.latest_version(), strict=True)


@pytest.fixture
def task():
    rng = np.random.default_rng(0)
    return refresh.EncodeTask(
        encode=lambda params, tokens: params["embed"][tokens.ids].sum(axis=1),
        documents=rng.integers(1, 20, size=(40, 6)).tolist(),
        pad_id=0,
        options=refresh.EncodeOptions(buckets=(8,), batch_tokens=128),
    )


def test_the_examples_of_the_page_run_one_after_the_other(task, tmp_path, capsys):
    blocks = re.findall(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", PAGE, re.MULTILINE)
    embed = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    params = {"embed": jnp.asarray(embed)}
    with refresh.Refresher(tmp_path / "refresh", task) as refresher:
        refresher.start(params)  # so that there is a generation to look at
    given = {
        "jax": jax, "folder": tmp_path / "refresh", "task": task, "params": params,
        "query_embeddings": embed[:5],
    }  # fmt: skip
    public = {name: value for name, value in vars(refresh).items() if not inspect.ismodule(value)}
    names = public | given
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(textwrap.dedent(block), "refresh.rst", "exec"), names)
    assert names["number"] == 0
    assert names["saved"]["pending"] is not None  # a refresh was under way at the checkpoint
    expected = np.asarray(task.encode(params, refresh.Tokens(np.array(task.documents), None)))
    best = (embed[:5] @ expected.T).argmax(axis=1)
    np.testing.assert_array_equal(np.asarray(names["doc_ids"])[:, 0], best)
    assert "1,000,000 documents" in capsys.readouterr().out
