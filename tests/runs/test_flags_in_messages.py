"""Every flag that a message names is one of the script that shows it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import ROOT, load_script

from ragjax.runs import AdaptConfig, CompareConfig, EvaluateConfig, RagConfig, program

CONFIGS = {"adapt": AdaptConfig(), "train_rag": RagConfig(), "evaluate": EvaluateConfig()}
COMMON = {field for field in program.Flags.__dataclass_fields__ if field != "options"}
FLAGS = {name: program.flag_names(config) | COMMON for name, config in CONFIGS.items()} | {
    name: program.flag_names(load_script(f"experiments/{name}.py").Flags)
    for name in ("ask", "encode", "export", "serve", "verify_index")
}
FLAGS["adapt"] |= {"documents", "questions"}  # aliases
FLAGS["train_rag"] |= {"documents", "questions", "retrieval"}
FLAGS["evaluate"] |= {"questions"}
FLAGS["ask"] |= {"k"}
FLAGS["check"] = FLAGS["adapt"] - {"dry_run"} | {"json", "cost"}
FLAGS["evaluate"] |= program.flag_names(CompareConfig(compare=("A", "B")))
TRAINING, RUNS = ("adapt", "train_rag"), ("adapt", "train_rag", "evaluate")

# Who shows the messages of a module, or of a function in it; the longest beginning counts. Nobody:
# a library, whose messages name arguments.
SHOWN_BY = {
    "ragjax": (),
    "ragjax/runs": RUNS,
    "ragjax/runs/adapt": ("adapt",),
    "ragjax/runs/ask": ("ask", "serve"),
    "ragjax/runs/check": ("check",),
    "ragjax/runs/compare/pair": ("evaluate",),
    "ragjax/runs/compare/two_runs": ("evaluate",),
    "ragjax/runs/data/_without_leaks": TRAINING,
    "ragjax/runs/evaluate": ("evaluate",),
    "ragjax/runs/data": TRAINING,  # those that name a flag
    "ragjax/runs/forecast/_describe_answers": TRAINING,
    "ragjax/runs/found": ("train_rag",),  # those that name a flag
    "ragjax/runs/program": RUNS,
    "ragjax/runs/prompt_lengths/_note_cuts": TRAINING,
    "ragjax/runs/options/compare": ("evaluate",),
    "ragjax/runs/options/dual": ("adapt",),
    "ragjax/runs/options/end_to_end": ("train_rag",),
    "ragjax/runs/options/evaluate": ("evaluate",),
    "ragjax/runs/options/refresh": TRAINING,
    "ragjax/runs/options/shared/RunConfig": TRAINING,
    "ragjax/runs/models/layout_of": TRAINING,
    "ragjax/runs/models/rows_note": TRAINING,
    "ragjax/runs/models/scale_note": TRAINING,
    "ragjax/runs/saved": ("export",),
    "ragjax/runs/serve": ("serve",),
    "ragjax/runs/serve/page": None,  # CSS
    "ragjax/runs/teachers/files": ("adapt",),
    "ragjax/runs/train": TRAINING,
    "ragjax/runs/train/end_to_end": ("train_rag",),
    "ragjax/runs/train/language_model": ("adapt",),
    "ragjax/runs/train/retriever": ("adapt",),
    "ragjax/runs/train/statements": ("train_rag",),
    "ragjax/runs/train_rag": ("train_rag",),
    "ragjax/runs/workspace": TRAINING,
    "ragjax/runs/written": ("adapt",),
    "ragjax/evaluation/report/style": None,  # CSS
    "ragjax/models/files/pip_packages": None,  # the flags of pip
    **{f"experiments/{name}": (name,) for name in FLAGS},
}
# Of programs that are not ours, whose command stands in the message.
FOREIGN = re.compile(r"llama-gguf-split --merge|hf download [^`]*`| --revision \*$")
FLAG = re.compile(r"(?<![\w-])--((?:[a-z]|\*[.\w])[\w.*-]*)")
SCRIPT = re.compile(r"experiments/(\w+)\.py")


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields line and text of each string that is no docstring; `*` stands for what is put in."""
    inner = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for child in ast.walk(node)
        if child is not node
    }
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            inner.add(id(body[0].value))
    for node in ast.walk(tree):
        if id(node) in inner:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else "*" for p in node.values)
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def unknown_flags(text: str, shown_by: tuple[str, ...]) -> Iterator[str]:
    """Yields the flags of a message that a script which shows it does not have."""
    text = FOREIGN.sub("", text)
    for flag in FLAG.finditer(text):
        named = SCRIPT.findall(text[: flag.start()])
        for script in named[-1:] or shown_by or ("library",):
            names = FLAGS.get(script, set())
            full, last = flag.group(1).rstrip("."), flag.group(1).rpartition(".")[2]
            full = full.replace(".no_", ".")
            pattern = re.escape(full).replace(r"\*", r"[\w.]+")
            # What programs share names an option in full; see `in_own_flags`.
            if not any(re.fullmatch(pattern, name) for name in names) and last not in names:
                yield f"--{full} ({script})"


def wrong_flags(path: Path) -> Iterator[str]:
    module = path.relative_to(ROOT).with_suffix("").as_posix()
    for part in ast.parse(path.read_text("utf-8")).body:
        place = f"{module}/{getattr(part, 'name', '')}/"
        owner = max((name for name in SHOWN_BY if place.startswith(f"{name}/")), key=len)
        if (shown_by := SHOWN_BY[owner]) is not None and not is_docstring(part):
            for line, text in messages(part):
                for flag in unknown_flags(text, shown_by):
                    yield f"{module}.py:{line}: {flag}"


def is_docstring(part: ast.stmt) -> bool:
    return isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)


def test_messages_name_flags_of_the_script_that_shows_them_and_a_library_names_none():
    sources = [*(ROOT / "ragjax").rglob("*.py"), *(ROOT / "experiments").glob("*.py")]
    assert [wrong for path in sorted(sources) for wrong in wrong_flags(path)] == []


@pytest.mark.parametrize(
    "text,shown_by,wrong",
    [
        ("raise --max-chars", (), ["--max-chars (library)"]),
        ("name them with --fields *", ("adapt",), ["--fields (adapt)"]),
        ("--*.train_layers *: there are fewer", TRAINING, []),
        ("use --data_options.fields", ("evaluate",), []),
        ("give --data_options.train_questions", ("evaluate",), ["--data_options.train_questions"]),
        ("run experiments/verify_index.py --root x", (), []),
        ("add --language_model.no_train", ("train_rag",), []),
    ],
)
def test_the_check_finds_flags_that_a_script_does_not_have(text, shown_by, wrong):
    found = list(unknown_flags(text, shown_by))
    assert len(found) == len(wrong) and all(map(str.startswith, found, wrong))


@pytest.mark.parametrize(
    "script,message,shown",
    [
        ("evaluate", "raise --prompt.document_tokens", "raise --document_tokens"),
        ("adapt", "raise --prompt.document_tokens", "raise --prompt.document_tokens"),
        ("adapt", "with fields='id=a,text=b'", "with --data_options.fields='id=a,text=b'"),
        ("ask", "with fields='text=b'", "with --fields='text=b'"),
        ("train_rag", "go on with adopt_after=-1", "go on with --refresh.adopt_after=-1"),
        ("encode", "use --data_options.on_bad_row skip", "use --on_bad_row skip"),
    ],
)
def test_a_message_is_shown_in_the_flags_of_the_script(script, message, shown):
    assert program.in_own_flags(message, FLAGS[script]) == shown
