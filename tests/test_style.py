"""Size and shape of the code: short files and folders, few arguments, no circle of imports."""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ragjax"
SOURCES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Messages that end with the prefix of a name, which ends with a dot.
ENDINGS = ("rag.generator.",)
MOST_LINES, MOST_FILES, MOST_ARGUMENTS, MOST_FUNCTIONS_ABOVE = 400, 20, 8, 12


def parse(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text("utf-8"))


def imports(modules: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> what it imports of `modules` when it is loaded, not inside its functions."""

    def at_the_top(nodes: Iterable[ast.AST]) -> Iterable[str]:
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.Try | ast.With | ast.ClassDef):
                yield from at_the_top(node.body)

    found = {}
    for module, tree in modules.items():
        names = (
            name if name in modules else name.rpartition(".")[0] for name in at_the_top(tree.body)
        )
        found[module] = {name for name in names if name in modules} - {module}
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty if none do."""
    left = {module: set(targets) for module, targets in graph.items()}
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def test_no_module_imports_itself_through_others():
    assert circle(imports({module: parse(module) for module in SOURCES})) == []


def test_a_circle_is_found():
    sources = {"a": "from b import x", "b": "import c", "c": "import a", "d": "import a"}
    found = circle(imports({name: ast.parse(text) for name, text in sources.items()}))
    assert found == ["a", "b", "c", "d"]
    sources["c"] = "def f():\n    import a"
    assert circle(imports({name: ast.parse(text) for name, text in sources.items()})) == []


@pytest.mark.parametrize("module", SOURCES)
def test_a_file_is_short(module):
    lines = SOURCES[module].read_text("utf-8").splitlines()
    assert len(lines) <= MOST_LINES


def test_a_folder_holds_few_files():
    folders = {path.parent for path in SOURCES.values()}
    count = {f.name: len([p for p in f.glob("*.py") if p.name != "__init__.py"]) for f in folders}
    assert {name for name, files in count.items() if files > MOST_FILES} == set()


def test_few_functions_take_many_arguments():
    found = []
    for module in SOURCES:
        for node in ast.walk(parse(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                taken = [one for one in taken if one.arg not in ("self", "cls")]
                if len(taken) > MOST_ARGUMENTS:
                    found.append(f"{module}.{node.name}: {len(taken)}")
    assert len(found) <= MOST_FUNCTIONS_ABOVE, found


@pytest.mark.parametrize("module", SOURCES)
def test_error_messages_end_without_a_full_stop_and_docstrings_begin_with_a_verb_form(module):
    wrong = []
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            message = node.exc.args[0]
            last = message.values[-1] if isinstance(message, ast.JoinedStr) else message
            text = str(last.value) if isinstance(last, ast.Constant) else ""
            if text.endswith(".") and not text.endswith(ENDINGS):
                wrong.append(f"line {node.lineno}: {text!r}")
        elif isinstance(node, ast.FunctionDef):
            first = (ast.get_docstring(node) or "Returns").split()[0]
            if first in ("Return", "Raise", "Make", "Get", "Compute", "Read", "Write", "Load"):
                wrong.append(f"{node.name}: {first}")
    assert wrong == []
