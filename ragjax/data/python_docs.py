"""The default domain: the API documentation of the packages installed beside ragjax.

Docstrings are read at run time, one passage per object; the questions are shipped:

    write_python_docs(Path("python-docs"))   # a BEIR folder: corpus, queries, qrels
"""

import importlib
import inspect
import json
import logging
import re
import shutil
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ragjax.data.corpus import Passage
from ragjax.data.docstrings import clean_docstring, cut_text
from ragjax.data.matching import holds_answer
from ragjax.storage import new_folder, write_jsonl, write_text

MAX_WORDS = 120
MIN_WORDS = 14
MIN_PASSAGES = 2000
MAX_TITLE = 90

# Order matters: an object reached by several names keeps the first one.
_STDLIB = """
builtins itertools functools collections collections.abc pathlib re json os.path os shutil
subprocess datetime random statistics math string textwrap heapq bisect contextlib logging csv
argparse tempfile threading asyncio typing enum dataclasses hashlib base64 urllib.parse time copy
glob fnmatch operator inspect struct decimal fractions queue zipfile tarfile gzip sqlite3 uuid
secrets configparser traceback warnings weakref calendar concurrent.futures html io shlex timeit
""".split()
_JAX = """
jax jax.numpy jax.numpy.linalg jax.numpy.fft jax.nn jax.nn.initializers jax.random jax.tree
jax.tree_util jax.lax jax.scipy.special jax.scipy.linalg jax.scipy.stats jax.scipy.stats.norm
jax.scipy.signal jax.scipy.sparse.linalg jax.scipy.optimize jax.scipy.ndimage
jax.scipy.interpolate jax.scipy.integrate jax.scipy.cluster.vq jax.image jax.ops jax.debug
jax.profiler jax.sharding jax.dtypes jax.export jax.experimental.checkify
jax.experimental.multihost_utils jax.flatten_util
""".split()
_OPTAX = """
optax optax.losses optax.schedules optax.contrib optax.projections optax.tree optax.assignment
optax.transforms optax.perturbations
""".split()
_FLAX = "flax.nnx flax.struct flax.traverse_util flax.serialization".split()
_NUMPY = """
numpy numpy.linalg numpy.fft numpy.random numpy.polynomial numpy.polynomial.polynomial
numpy.lib.stride_tricks numpy.testing numpy.exceptions
""".split()
MODULES = tuple(_STDLIB + _JAX + _OPTAX + _FLAX + _NUMPY)
# jax.numpy documents what it shares with numpy, numpy.random.Generator the legacy functions.
_TWINS = {"numpy": "jax.numpy", "numpy.linalg": "jax.numpy.linalg", "numpy.fft": "jax.numpy.fft"}
# Their methods repeat those of str and set, or are rarely called by a user.
_CLASSES_ONLY = re.compile(r"(bytes|bytearray|frozenset|(asyncio|decimal|io|numpy\.testing)\..*)$")
_POINTER = re.compile(r"(refer to|see|alias of|equivalent to) [\w.]+( for .*)?\.?$", re.IGNORECASE)
_LEGACY = re.compile(r"numpy\.random\.(?!Generator|default_rng|SeedSequence|[A-Z])|.*RandomState")

_ID_PREFIX = "pydocs-"
_logger = logging.getLogger(__name__)


def read_python_docs() -> list[Passage]:
    """Reads one passage per documented object of the installed packages.

    Returns:
        At least `MIN_PASSAGES` passages with distinct ids and texts, in an order that depends on
        the installed versions only.

    Raises:
        ValueError: If too few docstrings are found, as under `python -OO`.
    """
    passages: list[Passage] = []
    texts: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in _objects():
            text = _passage_text(name, value)
            if len(text.split()) >= MIN_WORDS and text.lower() not in texts:
                texts.add(text.lower())
                passages.append(Passage(name, _title(name, value), text))
    if len(passages) < MIN_PASSAGES:
        raise ValueError(
            f"the installed packages have {len(passages)} docstrings of {MIN_WORDS} words or more,"
            f" expected at least {MIN_PASSAGES}: run Python without -OO, or take your own documents"
        )
    return passages


def read_questions() -> list[dict[str, Any]]:
    """Reads the shipped questions: `id`, `question`, `answers`, `doc` (gold id) and `split`."""
    shipped = resources.files("ragjax.data").joinpath("python_docs_questions.jsonl")
    lines = shipped.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def questions_without_gold(corpus: Sequence[Passage]) -> list[tuple[str, str]]:
    """Names the shipped questions that the installed versions cannot answer.

    Args:
        corpus: The passages read by `read_python_docs`.

    Returns:
        Pairs of a question id and the reason: its gold passage is missing, or contains none of
        its answers (after lower-casing and dropping articles, punctuation and extra space).
    """
    texts = {passage.id: passage.text for passage in corpus}
    missing = []
    for question in read_questions():
        text = texts.get(question["doc"])
        if text is None:
            missing.append((question["id"], f"no passage {question['doc']}"))
        elif not any(holds_answer(text, answer) for answer in question["answers"]):
            reason = f"{question['doc']} does not contain {' or '.join(question['answers'])!r}"
            missing.append((question["id"], reason))
    return missing


def write_python_docs(folder: Path | str) -> None:
    """Writes the default domain as a BEIR folder, complete or not at all.

    Questions whose gold passage the installed versions lack are left out and counted in the log.

    Args:
        folder: Where `corpus.jsonl`, `queries.jsonl` and `qrels/{train,test}.tsv` go; its parent
            is created, a folder written here before is replaced.

    Raises:
        ValueError: If `folder` holds anything else, or too few docstrings are found.
    """
    folder = Path(folder)
    if folder.exists() and not _is_replaceable(folder):
        raise ValueError(f"{folder} already holds other files: choose a new or an empty folder")
    corpus = read_python_docs()
    missing = dict(questions_without_gold(corpus))
    questions = [question for question in read_questions() if question["id"] not in missing]
    if missing:
        _logger.info("%d questions have no gold passage here and are left out", len(missing))
    with new_folder(folder) as scratch:
        _write_folder(scratch, corpus, questions)
        if folder.exists():
            shutil.rmtree(folder)


def _is_replaceable(folder: Path) -> bool:
    """Whether a folder is empty or holds this domain, told by the ids of its questions."""
    queries = folder / "queries.jsonl"
    if not queries.is_file():
        return folder.is_dir() and not any(folder.iterdir())
    with open(queries, encoding="utf-8", errors="replace") as file:
        return file.readline().startswith(f'{{"_id": "{_ID_PREFIX}')


def _write_folder(
    folder: Path, corpus: Sequence[Passage], questions: Sequence[Mapping[str, Any]]
) -> None:
    write_jsonl(
        folder / "corpus.jsonl", ({"_id": p.id, "title": p.title, "text": p.text} for p in corpus)
    )
    write_jsonl(folder / "queries.jsonl", (_query(row) for row in questions))
    (folder / "qrels").mkdir()
    for split in ("train", "test"):
        rows = [f"{row['id']}\t{row['doc']}\t1" for row in questions if row["split"] == split]
        text = "\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n"
        write_text(folder / "qrels" / f"{split}.tsv", text)


def _query(row: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {"answers": row["answers"], "doc": row["doc"], "split": row["split"]}
    return {"_id": row["id"], "text": row["question"], "metadata": metadata}


def _objects() -> Iterator[tuple[str, Any]]:
    """Yields every public object once, under the first of its names."""
    seen: set[int] = set()
    for module_name in MODULES:
        module = _import(module_name)
        if module is None:
            continue
        shared = set(vars(_import(_TWINS[module_name]) or module)) if module_name in _TWINS else ()
        classes = []
        for attribute, value in _public(module):
            name = f"{module_name}.{attribute}".removeprefix("builtins.")
            if attribute in shared or id(value) in seen or _LEGACY.match(name):
                continue
            seen.add(id(value))
            yield name, value
            if inspect.isclass(value) and not _CLASSES_ONLY.match(name):
                classes.append((name, value))
        for name, value in classes:
            yield from _methods(name, value)


def _import(name: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        # Some modules exist on some platforms or versions only.
        return None


def _public(module: types.ModuleType) -> list[tuple[str, Any]]:
    """Lists a module's own public callables, without touching its lazy or deprecated names."""
    members = vars(module)
    root = module.__name__.split(".")[0]
    exported = members.get("__all__")
    found = []
    for attribute in sorted(members if exported is None else set(exported) & set(members)):
        value = members[attribute]
        if attribute.startswith("_") or not callable(value):
            continue
        owner = (getattr(value, "__module__", None) or root).split(".")[0].lstrip("_")
        if exported is not None or owner == root:
            found.append((attribute, value))
    return found


def _methods(class_name: str, cls: type) -> Iterator[tuple[str, Any]]:
    for attribute, value in sorted(vars(cls).items()):
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        documented = inspect.isroutine(value) or isinstance(value, property)
        if not attribute.startswith("_") and documented:
            yield f"{class_name}.{attribute}", value


def _passage_text(name: str, value: Any) -> str:
    docstring = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    if not isinstance(docstring, str) or docstring == type(value).__doc__:
        return ""
    text = clean_docstring(docstring, name=name.rsplit(".", 1)[-1])
    if len(text.split()) < 2 * MIN_WORDS and _POINTER.search(text):
        return ""
    return cut_text(text, max_words=MAX_WORDS)


def _title(name: str, value: Any) -> str:
    """The qualified name with parameter names and short defaults, cut to `MAX_TITLE`."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return name
    shown = ""
    for parameter in parameters:
        word = str(parameter).split(parameter.name)[0] + parameter.name  # with its stars
        default = repr(parameter.default)
        if parameter.default is not parameter.empty and re.fullmatch(r"[\w'\".-]{1,12}", default):
            word += f"={default}"
        if parameter.name == "self":
            continue
        longer = f"{shown}, {word}" if shown else word
        if len(f"{name}({longer}, ...)") > MAX_TITLE:
            shown += ", ..." if shown else "..."
            break
        shown = longer
    return f"{name}({shown})"
