"""The examples of the page on models do what the page says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ragjax.models.files.safetensors import conversion_command

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.mark.slow
def test_models_of_ones_own_plug_in_without_subclassing():
    script = DOCS / "bring_your_own_model.py"
    assert "class " not in script.read_text().split('"""')[2]
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    steps = re.findall(r"loss (\S+), right document among 8: (\S+)", run.stdout)
    losses, hits = zip(*[(float(loss), float(hit)) for loss, hit in steps], strict=True)
    assert losses[0] > 5 and losses[-1] < 0.5
    assert hits[0] < 0.3 and hits[-1] > 0.9


def test_the_conversion_on_the_page_is_the_one_that_messages_name():
    page = (DOCS / "models.rst").read_text("utf-8")
    assert f"   $ {conversion_command('FOLDER')}\n" in page
