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


# What writes to a file; methods of a path by their name alone.
WRITERS = {
    *("write_text", "write_bytes", "tofile", "save_file", "serialize"),
    *("np.save", "np.savez", "np.savetxt", "json.dump", "pickle.dump", "tokenizer.save"),
    *("shutil.copyfile", "shutil.copy", "shutil.copy2", "shutil.copytree", "shutil.copyfileobj"),
    *("_orbax().save", "os.mkfifo"),
}
NAMED = {"named_if_full", "whole_file", "replacing"}


def writes(call: ast.Call) -> bool:
    """Whether a call opens a file to write, by itself."""
    name = ast.unparse(call.func)
    if name.startswith("storage."):
        return False
    if name.rpartition(".")[2] == "open":
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        modes = [a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        flags = ast.unparse(call)
        return any(set(mode) <= set("rwxabt+") and set(mode) & set("wxa+") for mode in modes) or (
            name == "os.open" and any(flag in flags for flag in ("O_WRONLY", "O_RDWR", "O_CREAT"))
        )
    method = isinstance(call.func, ast.Attribute) and call.func.attr in WRITERS
    return (
        method
        or name in WRITERS - {"write_text", "write_bytes"}
        or name.endswith(tuple(f".{writer}" for writer in WRITERS if "." in writer))
    )


def unnamed_writes(tree: ast.AST, *, named: bool = False) -> Iterable[ast.Call]:
    """Calls that write where nothing names the file if the disk is full."""
    if isinstance(tree, ast.With):
        calls = [item.context_expr for item in tree.items]
        names = {ast.unparse(c.func).rpartition(".")[2] for c in calls if isinstance(c, ast.Call)}
        named = named or bool(names & NAMED)
    elif isinstance(tree, ast.Call) and writes(tree) and not named:
        yield tree
    for child in ast.iter_child_nodes(tree):
        yield from unnamed_writes(child, named=named)


@pytest.mark.parametrize("module", [name for name in SOURCES if ".storage" not in name])
def test_only_storage_writes_files_so_that_a_full_disk_is_named(module):
    found = unnamed_writes(parse(module))
    assert [f"line {call.lineno}: {ast.unparse(call)}" for call in found] == []


@pytest.mark.parametrize(
    "text",
    [
        "open(path, 'w')",
        "path.open(mode='ab')",
        "open(p, 'xb')",
        "open(p, 'r+b')",
        "np.save(path, array)",
        "path.write_text('x')",
        "os.open(path, os.O_WRONLY)",
        "self.tokenizer.save(path)",
        "save_file(tensors, path)",
    ],
)
def test_a_file_that_is_written_elsewhere_is_found(text):
    assert list(unnamed_writes(ast.parse(text)))
    assert not list(unnamed_writes(ast.parse(f"with named_if_full(path, 3):\n    {text}")))
    assert not list(
        unnamed_writes(ast.parse("open(path)\nopen(path, 'rb')\nwrite_text(path, 'x')"))
    )


@pytest.mark.parametrize("module", SOURCES)
def test_kinds_of_numbers_are_told_by_jax_which_knows_bfloat16(module):
    calls = [node for node in ast.walk(parse(module)) if isinstance(node, ast.Call)]
    assert "np.issubdtype" not in {ast.unparse(call.func) for call in calls}
