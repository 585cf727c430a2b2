"""The documentation names everything that is public, and its example works."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ragjax import losses

DOCS = Path(__file__).resolve().parents[2] / "docs"
TRAINER = DOCS / "plain_jax_trainer.py"


def public_names() -> set[str]:
    """What `ragjax.losses` re-exports as `name as name`."""
    return set(re.findall(r"(\w+) as \1\b", Path(losses.__file__).read_text("utf-8")))


def test_every_public_name_is_in_the_reference_once():
    page = (DOCS / "losses.rst").read_text("utf-8")
    documented = Counter(re.findall(r"^\.\. auto(?:function|class):: (\w+)$", page, re.MULTILINE))
    assert documented == Counter(public_names())


def test_every_module_level_name_is_re_exported():
    # A public function that `__init__` forgets would be missing from the reference too.
    for path in Path(losses.__file__).parent.glob("[!_]*.py"):
        source = path.read_text("utf-8")
        assert set(re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", source, re.MULTILINE)) <= (
            public_names()
        ), path.name


def test_every_test_that_the_table_of_transforms_names_exists():
    named = re.findall(r"`(test_\w+)`", (DOCS / "transforms.rst").read_text("utf-8"))
    tests = [path.read_text("utf-8") for path in (DOCS.parent / "tests" / "losses").glob("*.py")]
    assert named
    assert [name for name in named if not any(f"def {name}(" in text for text in tests)] == []


def test_plain_jax_trainer_learns_with_nothing_but_jax_and_the_losses():
    assert len(TRAINER.read_text("utf-8").splitlines()) <= 30
    script = (
        f"import runpy, sys; runpy.run_path({str(TRAINER)!r}, run_name='__main__'); "
        "print('imported', *sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    *steps, imported = result.stdout.splitlines()
    values = [float(line.split()[-1]) for line in steps]
    assert values[-1] < 0.1 * values[0]
    assert values == sorted(values, reverse=True)
    modules = imported.split()[1:]
    ours = {name for name in modules if name.startswith("ragjax.")}
    assert ours and all(name.startswith("ragjax.losses") for name in ours)
    assert {name.split(".")[0] for name in modules}.isdisjoint(
        {"flax", "optax", "orbax", "transformers", "torch"}
    )


@pytest.mark.slow
def test_documentation_builds_without_warnings_and_draws_every_formula(tmp_path):
    pytest.importorskip("sphinx", reason="needs the [docs] extra")
    pytest.importorskip("furo", reason="needs the [docs] extra")
    pytest.importorskip("latex2mathml", reason="needs the [docs] extra")
    subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
        + ["-d", str(tmp_path / "doctrees"), str(DOCS), str(tmp_path / "html")],
        check=True,
    )
    page = (tmp_path / "html" / "losses.html").read_text("utf-8")
    sources = Path(losses.__file__).parent.glob("*.py")
    formulas = sum(path.read_text("utf-8").count(".. math::") for path in sources)
    assert page.count('display="block"') >= formulas > 0
    assert ".. math::" not in page
    for built in (tmp_path / "html").glob("*.html"):  # readable offline
        assert not re.search(
            r"<(?:script|link)[^>]*(?:src|href)=\"https?:", built.read_text("utf-8")
        )
