"""What pages show is what there is: commands, flags, extras, names and messages."""

import ast
import configparser
import functools
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import tyro
from programs import ROOT, load_script

from ragjax.runs import AdaptConfig, CompareConfig, EvaluateConfig, RagConfig
from ragjax.runs.check.program import CheckFlags
from ragjax.runs.program import Flags, flag_names, parse_flags

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted(DOCS.glob("*.rst"))]
CONFIGS = {"adapt": AdaptConfig(), "train_rag": RagConfig(), "evaluate": EvaluateConfig()}
COMPARISON = CompareConfig(compare=("RUN_A", "RUN_B"))  # evaluate.py --compare
SCRIPTS = ("ask", "encode", "export", "serve", "verify_index")
# In messages, `…` stands for what is put in.
HOLE = "…"


def commands(page):
    """Yields the commands of a page, one line each, as they are typed."""
    prompt = r"   +\$ " if page.suffix == ".rst" else "    (?=python|pip|uv )"
    text = page.read_text("utf-8").replace("\\\n", " ")
    for line in re.findall(rf"^{prompt}(.+)$", text, re.MULTILINE):
        wrapped = re.search(r'--wrap "(.*)"', line)
        yield wrapped[1] if wrapped else line


def programs_called():
    """Yields each call of a script: page, path of the script and its flags."""
    for page in PAGES:
        for command in commands(page):
            called = re.search(
                r"python (?:/ragjax/)?((?:experiments|benchmarks|docs)/\w+\.py)(.*)", command
            )
            if called:
                words = shlex.split(called[2], comments=True)
                ends = [words.index(word) for word in ("<", ">", "&&") if word in words]
                yield page.name, called[1], words[: min(ends, default=None)]


@pytest.mark.parametrize(
    ("page", "path", "flags"),
    [pytest.param(*call, id=" ".join([call[0], call[1], *call[2]])) for call in programs_called()],
)
def test_every_command_has_flags_of_the_script_with_values_that_fit(
    page, path, flags, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)  # where recipes are
    if path.startswith("docs/"):
        assert (ROOT / path).exists() and not flags
    elif path == "experiments/check.py":
        parse_flags(CONFIGS["adapt"], None, flags, CheckFlags)
    elif default := CONFIGS.get(Path(path).stem):
        parse_flags(COMPARISON if "--compare" in flags else default, None, flags)
    else:
        tyro.cli(load_script(path).Flags, args=flags)


def test_each_page_with_commands_is_looked_at():
    called = {(page, path) for page, path, _ in programs_called()}
    assert {page for page, _ in called} >= {"README.md", "guides.rst", "runs.rst", "refresh.rst"}
    assert {path for _, path in called} >= {f"experiments/{name}.py" for name in CONFIGS}
    calls = {(page, tuple(flags)) for page, _, flags in programs_called()}
    assert ("ask.rst", ("--run", "runs/rag", "--json")) in calls  # without `< questions.txt`
    assert ("refresh.rst", ("--run", "runs/adapt", "--output", "STORE")) in calls  # of `--wrap`


@functools.cache
def known_flags():
    """Names of the flags of all scripts of experiments/."""
    scripts = [load_script(f"experiments/{name}.py").Flags for name in SCRIPTS]
    names = {
        name for flags in (*CONFIGS.values(), COMPARISON, *scripts) for name in flag_names(flags)
    }
    common = {*Flags.__dataclass_fields__, *CheckFlags.__dataclass_fields__} - {"options"}
    return names | common | {"documents", "retrieval", "k", "help"}  # aliases


def own_words(name):
    """The text of a page without its commands and the names of what a reader comes from."""
    page = next(page for page in PAGES if page.stem == name).read_text("utf-8")
    page = page.replace("\\\n", " ")
    left = r"^ +\* - .*$" if name == "migration" else r"^$"
    return re.sub(rf"^ +\$ .*$|{left}", "", page, flags=re.MULTILINE)


# The others name flags of benchmarks and of cluster tools, too.
@pytest.mark.parametrize(
    "name", ["ask", "end_to_end", "evaluate", "export", "guides", "migration", "models", "runs"]
    + ["README", "serve", "troubleshooting"],
)  # fmt: skip
def test_flags_that_a_page_names_exist(name):
    words = own_words(name)
    named = {
        re.sub(r"\bno-", "", flag) for flag in re.findall(r"(?<![\w-])--([a-z][\w.-]*\w)", words)
    }
    assert named and sorted(named - known_flags()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_extras_that_a_page_names_exist(page):
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    text = page.read_text("utf-8")
    named = re.findall(r"(?:ragjax|[\"' ]\.)\[([a-z0-9,]+)\]", text)
    assert {extra for names in named for extra in names.split(",")} <= {
        *settings["options.extras_require"]
    }


def code_spans(text):
    return re.findall(r"`([^`]+)`", re.sub(r":\w+:`[^`]*`", "", text))  # without :doc:`...`


@pytest.mark.parametrize("page", ["guides", "migration", "troubleshooting"])
def test_names_of_ragjax_on_a_page_can_be_imported(page):
    spans = code_spans(own_words(page))
    named = {span for span in spans if re.fullmatch(r"ragjax(\.\w+)+", span)}
    assert named
    for name in named:
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last), name
    public = {*dir(importlib.import_module("ragjax.losses"))}
    public |= {*dir(importlib.import_module("ragjax.training"))}
    assert {span for span in spans if re.fullmatch(r"\w+_loss", span)} <= public


@pytest.mark.parametrize("title", ["sentence-transformers", "RAG of transformers"])
def test_names_of_the_libraries_that_readers_come_from_are_theirs(title):
    page = (DOCS / "migration.rst").read_text("utf-8")
    section = re.split(rf"^{title}\n-+\n", page, flags=re.MULTILINE)[1]
    rows = re.findall(r"^   \* - (.*)$", re.split(r"^-+\n", section, flags=re.M)[0], re.MULTILINE)
    names = {
        word
        for row in rows
        if not row.startswith("rag-end2end")  # which transformers no longer ships
        for span in code_spans(row)
        for word in re.findall(r"[A-Za-z]\w{3,}", span)
    }
    packages = ["transformers"] if "RAG" in title else ["sentence_transformers", "transformers"]
    sources = []
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is of the [parity] extra")
        (folder,) = importlib.util.find_spec(package).submodule_search_locations
        found = (
            ["models/rag/*.py", "training_args.py"] if package == "transformers" else ["**/*.py"]
        )
        sources += [path.read_text("utf-8") for glob in found for path in Path(folder).glob(glob)]
    text = "\n".join(sources)
    assert len(names) > 15
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", text)] == []


@functools.cache
def messages():
    """The strings of the library and its scripts, one a line, with `…` for what is put in."""
    found = []
    for path in [*(ROOT / "ragjax").rglob("*.py"), *(ROOT / "experiments").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else HOLE for p in node.values)
                found.append(re.sub(f"{HOLE}+", HOLE, "".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_message_of_the_page_on_troubles_is_one_of_the_code():
    page = (DOCS / "troubleshooting.rst").read_text("utf-8")
    blocks = re.findall(r"^\.\. code-block:: text\n\n((?:   .*\n)+)", page, re.MULTILINE)
    shown = [line.strip() for block in blocks for line in block.splitlines()]
    assert len(shown) > 30
    assert [line for line in shown if line.strip(f"{HOLE} ") not in messages()] == []
