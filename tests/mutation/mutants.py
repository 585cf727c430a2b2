"""Finds what to break: every mask, guard, cast and stopped gradient of a package."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Calls dropped in favour of the one argument they guard or convert.
_UNWRAP = {
    "stop_gradient", "nan_to_num", "convert_element_type", "float32", "promote_types",
    "psum", "pmean", "pmax", "pvary", "pcast",
}  # fmt: skip
_SELECT = {"where", "select"}
_BOUND = {"maximum", "minimum", "max", "min"}
# Keyword arguments that are a mask or a cast.
_KEYWORDS = {"where", "dtype", "preferred_element_type"}
_CONSTANTS = {"nan", "inf"}
_COLLECTING = {"append", "extend", "update"}
_FILLS = {"zeros_like", "ones_like", "full_like", "zeros", "ones", "full"}


@dataclass(frozen=True)
class Mutant:
    """One change to one file."""

    key: str
    """`file::function::before -> after`; does not change when lines move."""
    path: str
    """Relative to the repository."""
    line: int
    before: str
    after: str
    """What changes, both on one line."""
    source: str
    """The whole file after the change."""


@dataclass(frozen=True)
class _Edit:
    node: ast.expr | ast.stmt
    replacement: str
    """Source text to put in the node's place."""
    start: int | None = None
    """Start of the text to replace, if not the node's own."""
    end: int | None = None


class _File:
    """A source file addressed by ast positions, which count UTF-8 bytes."""

    def __init__(self, source: str) -> None:
        self.data = source.encode()
        self.tree = ast.parse(source)
        self._lines = [0]
        for line in self.data.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    def span(self, node: Any) -> tuple[int, int]:
        start = self._lines[node.lineno - 1] + node.col_offset
        return start, self._lines[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.data[start:end].decode()

    def operand(self, node: ast.AST) -> str:
        """The node's text, fit to stand anywhere an expression may."""
        simple = isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Constant)
        return self.text(node) if simple else f"({self.text(node)})"

    def edited(self, edit: _Edit) -> str:
        start, end = self.span(edit.node)
        start = start if edit.start is None else edit.start
        end = end if edit.end is None else edit.end
        return (self.data[:start] + edit.replacement.encode() + self.data[end:]).decode()


def _name(node: ast.expr) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def _is_constant(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return _is_constant(node.operand)
    if isinstance(node, ast.Call):
        return _name(node.func) in _FILLS
    return isinstance(node, ast.Constant) or _name(node) in _CONSTANTS


def _informative(*nodes: ast.expr) -> list[ast.expr]:
    """Those that are not constants: what a selection or a bound acts on."""
    return [node for node in nodes if not _is_constant(node)]


def _raises(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Raise)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a node that compute: no annotations, messages or f-strings."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.JoinedStr):
                yield child


def _call_edits(file: _File, node: ast.Call, inside_cast: bool) -> Iterator[_Edit]:
    name, arguments = _name(node.func), node.args
    if name in _SELECT and len(arguments) == 3:
        for kept in _informative(*arguments[1:]):
            yield _Edit(node, file.operand(kept))
    elif name in _BOUND and len(arguments) == 2 and not node.keywords:
        for kept in _informative(*arguments):
            yield _Edit(node, file.operand(kept))
    elif name in ("clip", "astype") and isinstance(node.func, ast.Attribute):
        module = isinstance(node.func.value, ast.Name) and node.func.value.id in ("jnp", "lax")
        yield _Edit(node, file.operand(arguments[0] if module else node.func.value))
    elif name in _UNWRAP and arguments and not (name == "promote_types" and inside_cast):
        yield _Edit(node, file.operand(arguments[0]))
    elif name == "asarray" and len(arguments) == 2:
        yield _Edit(node, f"{file.text(node.func)}({file.text(arguments[0])})")
    for keyword in node.keywords:
        if keyword.arg in _KEYWORDS:
            start, end = file.span(keyword)
            # With the comma before it, or after it where it stands first.
            before = file.data[:start].rstrip()
            if before.endswith(b","):
                start = len(before) - 1
            else:
                after = file.data[end:]
                end += len(after) - len(after.lstrip().removeprefix(b","))
            yield _Edit(node, "", start, end)


def _edits(file: _File, node: ast.AST, inside_cast: bool = False) -> Iterator[_Edit]:
    """Every change to `node` and what it contains."""
    called = None
    if isinstance(node, ast.Call) and _name(node.func) in ("isinstance", "issubclass"):
        return  # `A | B` is a union of types there
    if isinstance(node, ast.Call):
        called = node.func
        yield from _call_edits(file, node, inside_cast)
        inside_cast = _name(node.func) == "astype"
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        yield _Edit(node, file.operand(node.left))
        yield _Edit(node, file.operand(node.right))
    elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        yield _Edit(node, "pass")
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        yield _Edit(node, file.operand(node.operand))
    elif isinstance(node, ast.If) and _raises(node):
        yield _Edit(node.test, "False")
        if isinstance(node.test, ast.BoolOp):
            for dropped in node.test.values:
                kept = [value for value in node.test.values if value is not dropped]
                joint = " and " if isinstance(node.test.op, ast.And) else " or "
                yield _Edit(node.test, joint.join(map(file.operand, kept)))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        if _name(node.value.func) not in _COLLECTING:
            yield _Edit(node, "pass")  # a call for its effect: a check
    for child in _children(node):
        if child is not called:
            yield from _edits(file, child, inside_cast)
        elif _name(child) != "stop_gradient":
            # The function itself is no expression to mutate, but what its attribute hangs on is.
            for part in _children(child):
                yield from _edits(file, part)
    if isinstance(node, ast.Attribute) and _name(node) == "stop_gradient":
        yield _Edit(node, "(lambda value: value)")  # handed over, such as to `tree.map`


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def mutants_of(source: str, path: str) -> list[Mutant]:
    """Lists the changes to one file.

    Args:
        source: its text.
        path: what to call it.

    Returns:
        The mutants in order of line, no two alike.
    """
    file = _File(source)
    found: dict[str, Mutant] = {}
    keys: dict[str, int] = {}
    for function, definition in functions(file.tree):
        for edit in _edits(file, definition):
            changed = file.edited(edit)
            if changed in found or changed == source:
                continue
            before, after = one_line(file.text(edit.node)), one_line(edit.replacement)
            if edit.start is not None:  # a keyword dropped from the call
                before, after = one_line(file.data[edit.start : edit.end].decode()), ""
            key = f"{path}::{function}::{before} -> {after}"
            keys[key] = keys.get(key, 0) + 1
            if keys[key] > 1:
                key += f" #{keys[key]}"
            found[changed] = Mutant(key, path, edit.node.lineno, before, after, changed)
    return sorted(found.values(), key=lambda mutant: mutant.line)


def discover(root: Path, package: str) -> list[Mutant]:
    """Lists the changes to every file of `root / package`, in order."""
    return [
        mutant
        for path in sorted((root / package).rglob("*.py"))
        for mutant in mutants_of(path.read_text("utf-8"), path.relative_to(root).as_posix())
    ]
