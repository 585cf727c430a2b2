"""Every public function of the losses is documented in full, with an example that runs."""

import ast
import doctest
import importlib
import inspect
from pathlib import Path

import pytest

from ragjax import losses

FOLDER = Path(losses.__file__).parent
MODULES = sorted(f"ragjax.losses.{path.stem}" for path in FOLDER.glob("[!_]*.py"))
PRIVATE = sorted(f"ragjax.losses.{path.stem}" for path in FOLDER.glob("_[!_]*.py"))
FUNCTIONS = sorted(name for name, value in vars(losses).items() if inspect.isfunction(value))
SECTIONS = ["Args", "Returns", "Raises", "Gradients", "References", "Example"]


def can_raise(name: str) -> bool:
    """Whether the function raises, checks its arguments, or calls one of the losses that does."""
    called = set()
    for node in ast.walk(ast.parse(inspect.getsource(getattr(losses, name)))):
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Call):
            called.add(getattr(node.func, "attr", getattr(node.func, "id", "")))
    if called & {"Axes", "checked_docs", "checked_answers", "_checked_pair", "positive_scalar"}:
        return True
    return any(can_raise(other) for other in called & set(FUNCTIONS) - {name})


def sections_of(docstring: str) -> dict[str, str]:
    """The text under each heading of a Google docstring, in the order they come."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in docstring.splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            current = found.setdefault(line[:-1], [])
        elif line.startswith(" ") or not line:
            current.append(line)
    return {name: "\n".join(lines).strip() for name, lines in found.items()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_is_complete(name):
    docstring = inspect.getdoc(getattr(losses, name)) or ""
    summary, _, rest = docstring.partition("\n")
    assert summary.endswith(".") and not rest.split("\n")[0]
    sections = sections_of(docstring)
    wanted = [s for s in SECTIONS if s != "Raises" or s in sections or can_raise(name)]
    assert list(sections) == wanted
    assert all(sections.values())
    assert ">>>" in sections["Example"]
    for parameter in inspect.signature(getattr(losses, name)).parameters:
        assert f"{parameter}:" in sections["Args"]


@pytest.mark.parametrize("module", [*MODULES, *PRIVATE])
def test_examples_print_what_they_say(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.failed == 0
