"""The examples of the pages on comparing runs, in CI, and on tracking."""

import re
from pathlib import Path

import pytest
import yaml

from ragjax.runs import CompareConfig, EvaluateConfig
from ragjax.runs.program import parse_flags

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page, language):
    """The code blocks of a page in a language."""
    pattern = rf"^\.\. code-block:: {language}\n\n((?:   .*\n|\n)+)"
    found = re.findall(pattern, (DOCS / page).read_text("utf-8"), re.MULTILINE)
    return [re.sub(r"^   ", "", block, flags=re.MULTILINE) for block in found]


def parsed(command):
    """The options of a command of experiments/evaluate.py."""
    flags = command.split("experiments/evaluate.py ")[1].split()
    default = CompareConfig(compare=("A", "B")) if "--compare" in flags else EvaluateConfig()
    return parse_flags(default, None, flags).options


def test_the_example_for_ci_evaluates_and_compares_what_it_evaluated():
    (block,) = blocks("evaluate.rst", "yaml")
    commands = [step["run"] for step in yaml.safe_load(block)["steps"] if "run" in step]
    evaluation, comparison = map(parsed, commands[1:])
    assert comparison.compare == ("accepted", evaluation.output)
    assert comparison.metric == ("recall@5", "f1") and comparison.max_loss == 0.02
    uploads = [step["with"] for step in yaml.safe_load(block)["steps"] if "with" in step]
    assert uploads[0]["path"] == comparison.output


def test_a_tracker_of_ones_own_gets_what_is_logged(tmp_path, monkeypatch, capsys):
    (block,) = (text for text in blocks("runs.rst", "python") if "followers" in text)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert capsys.readouterr().out == "lm 0 0.5\n"
    assert '"loss": 0.5' in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_each_tracker_has_an_extra_and_a_line_on_the_page(name):
    setup = (DOCS.parent / "setup.cfg").read_text("utf-8")
    assert re.search(rf"^{name} = ", setup, re.MULTILINE)
    assert f"   * - `{name}`\n" in (DOCS / "runs.rst").read_text("utf-8")
