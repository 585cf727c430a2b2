"""The mutation script finds what it should, and tells a tested guard from an untested one."""

import ast
import json
from pathlib import Path

import mutants
import mutate_losses
import pytest

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = mutants.discover(ROOT, "ragjax/losses")

TOY = '''
"""Π: offsets count bytes."""
def tested(x: int | None) -> int:
    if x is None:
        raise ValueError("é" f"{1 | 2}")
    return x


def untested(x):
    if x < 0:
        raise ValueError("x")
    return x
'''
TOY_TEST = """
import pytest

from toy import guards


def test_guard():
    with pytest.raises(ValueError):
        guards.tested(None)
    assert guards.tested(1) == guards.untested(1) == 1
"""


def changes(source: str) -> set[str]:
    body = "\n".join(f"    {line}" for line in source.splitlines())
    found = mutants.mutants_of(f"def f(a, b, c):\n{body}\n", "a.py")
    return {f"{mutant.before} -> {mutant.after}" for mutant in found}


def test_every_mutant_compiles_and_differs():
    originals = {path: (ROOT / path).read_text("utf-8") for path in {m.path for m in MUTANTS}}
    for mutant in MUTANTS:
        compile(mutant.source, mutant.path, "exec")
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse(originals[mutant.path]))
    assert len(MUTANTS) >= 40
    assert len({mutant.key for mutant in MUTANTS}) == len(MUTANTS)


def test_every_equivalent_mutant_exists():
    assert set(mutate_losses.EQUIVALENT) <= {mutant.key for mutant in MUTANTS}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("return jnp.where(a, b, 0.0)", {"jnp.where(a, b, 0.0) -> b"}),
        ("return jnp.where(a, -jnp.inf, b)", {"jnp.where(a, -jnp.inf, b) -> b"}),
        ("return jnp.where(a, b, c)", {"jnp.where(a, b, c) -> b", "jnp.where(a, b, c) -> c"}),
        ("return (a & b).any()", {"a & b -> a", "a & b -> b"}),
        ("return ~(a > b)", {"~(a > b) -> (a > b)"}),
        ("x: int | None = a", set()),
        ("if a:\n    raise ValueError(b | c)", {"a -> False"}),
        ("if a or b:\n    raise E", {"a or b -> False", "a or b -> (a)", "a or b -> (b)"}),
        ("check(a)", {"check(a) -> pass"}),
        ("parts.append(a)", set()),
        ("return isinstance(a, int | float)", set()),
        ("return jnp.maximum(a, 1)", {"jnp.maximum(a, 1) -> a"}),
        ("return jnp.clip(a + b, 0, 1)", {"jnp.clip(a + b, 0, 1) -> (a + b)"}),
        ("return a.clip(0)", {"a.clip(0) -> a"}),
        (
            "return a.astype(jnp.promote_types(a.dtype, b))",
            {"a.astype(jnp.promote_types(a.dtype, b)) -> a"},
        ),
        ("return jnp.sum(a, where=b)", {", where=b -> "}),
        ("return lax.stop_gradient(a)", {"lax.stop_gradient(a) -> a"}),
        (
            "return tree.map(lax.stop_gradient, a)",
            {"lax.stop_gradient -> (lambda value: value)"},
        ),
    ],
)
def test_what_is_changed(source, expected):
    # One operand in brackets or not is the same change.
    assert {c.replace("(a)", "a").replace("(b)", "b") for c in changes(source)} == {
        c.replace("(a)", "a").replace("(b)", "b") for c in expected
    }


@pytest.mark.slow
def test_an_untested_guard_survives_and_the_run_continues(tmp_path, monkeypatch, capsys):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "__init__.py").write_text("")
    (tmp_path / "toy" / "guards.py").write_text(TOY)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_guards.py").write_text(TOY_TEST)
    output = tmp_path / "runs" / "mutants.jsonl"
    command = ["--root", str(tmp_path), "--package", "toy", "--tests", "tests", "--jobs", "1"]
    command += ["--output", str(output)]

    assert mutate_losses.main(command) == 1
    table = capsys.readouterr().out
    assert (
        "| toy/guards.py:4 | `x is None` → `False` | `tests/test_guards.py::test_guard` |" in table
    )
    assert "| toy/guards.py:10 | `x < 0` → `False` | **SURVIVED** |" in table
    assert "2 mutants: 1 killed, 1 SURVIVED, 0 equivalent." in table

    lines = output.read_text().splitlines()
    output.write_text(lines[0] + "\n" + lines[1][:20])  # cut while the second was being written
    monkeypatch.setitem(
        mutate_losses.EQUIVALENT, "toy/guards.py::untested::x < 0 -> False", "it is a toy"
    )
    monkeypatch.setattr(mutate_losses.Workplace, "run", None)  # nothing is left to run
    assert mutate_losses.main(command) == 0
    assert "equivalent: it is a toy" in capsys.readouterr().out
    assert json.loads(lines[0])["verdict"] == "killed"
