"""The dependency table of the architecture, read from the source with ast."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ragjax"

# Subpackage -> the other subpackages it may import.
MAY_IMPORT = {
    "losses": set(),
    "storage": set(),
    "models": {"losses", "storage"},
    "data": {"storage"},
    "index": {"storage"},
    "refresh": {"index", "data", "storage"},
    "generation": {"models", "data", "storage"},
    "evaluation": {"data", "index", "generation", "storage"},
    "training": {"losses", "models", "data", "index", "refresh", "storage"},
    # Complete runs; only experiments and notebooks import it.
    "runs": {
        "losses",
        "storage",
        "models",
        "data",
        "index",
        "refresh",
        "generation",
        "evaluation",
        "training",
    },
}
# Top-level module -> the only subpackage that may import it.
OWNERS = {
    "faiss": "index",
    "pymilvus": "index",
    "scann": "index",
    "gguf": "models",
    "onnx": "models",
    "onnxruntime": "models",
    "transformers": "models",
    "tensorboardX": "runs",
    "trackio": "runs",
    "wandb": "runs",
    "_thread": "refresh",
    "concurrent": "refresh",
    "multiprocessing": "refresh",
    "ray": "refresh",
    "subprocess": "refresh",
    "threading": "refresh",
}
OWNERSHIP_EXCEPTIONS = {
    # `pip:NAME==VERSION` sources are fetched by pip, which has no Python interface.
    ("models/files/pip_packages.py", "subprocess"),
    ("storage/processes.py", "subprocess"),
    # A hostile document must not take the run with it.
    ("data/documents/worker.py", "subprocess"),
    # The next step's documents are retrieved in one thread while the device computes this one.
    ("training/ahead.py", "concurrent"),
    # Checkpoints are written while training goes on.
    ("training/checkpoint.py", "concurrent"),
    # A tracker that hangs must delay neither a step nor the end of the process.
    ("runs/tracking/behind.py", "threading"),
    # A lock alone: shards are opened by threads of refreshes, and CPython 3.11 needs it.
    ("index/store.py", "threading"),
    # One thread computes what a server is asked, another opens a newer generation meanwhile.
    ("runs/serve/batches.py", "concurrent"),
    ("runs/serve/service.py", "concurrent"),
}
# torch is a reference in tests; what runs the library is not part of it.
FORBIDDEN = {"torch", "experiments", "notebooks", "tests"}
# Calls that start a process without any of the modules above.
PROCESS_CALLS = {"fork", "forkpty", "popen", "posix_spawn", "posix_spawnp", "system"}

SOURCES = sorted(ROOT.rglob("*.py"))


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Full names of imported modules, also of calls such as `importlib.import_module("x")`.

    `from a import b` yields "a.b", since b may be a module; a relative import starts with a dot.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (f"{prefix}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            argument = node.args[0]
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield str(argument.value)


def violations(path: str, source: str) -> list[str]:
    """What the file at `path`, relative to the package, does against the architecture."""
    subpackage = path.split("/")[0] if "/" in path else ""
    tree = ast.parse(source)
    found = []
    for module in imported_modules(tree):
        top = module.split(".")[0]
        if module.startswith("."):
            found.append(f"relative import of {module}")
        elif top == "ragjax":
            target = (module.split(".") + [""])[1]
            if target != subpackage and target not in MAY_IMPORT.get(subpackage, set()):
                found.append(f"{subpackage or 'ragjax'} may not import {module}")
        elif top in FORBIDDEN:
            found.append(f"ragjax may not import {module}")
        elif OWNERS.get(top, subpackage) != subpackage and (path, top) not in OWNERSHIP_EXCEPTIONS:
            found.append(f"only {OWNERS[top]} may import {module}")
        elif subpackage == "losses" and top not in sys.stdlib_module_names | {"jax"}:
            found.append(f"losses import jax only, not {module}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in PROCESS_CALLS:
            if isinstance(node.value, ast.Name) and node.value.id == "os":
                found.append(f"os.{node.attr} starts a process")
    return found


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for path in SOURCES])
def test_file_keeps_to_the_architecture(path):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_every_subpackage_is_in_the_table():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == {"__init__.py", *MAY_IMPORT}


def test_every_exception_is_in_use():
    for path, module in OWNERSHIP_EXCEPTIONS:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert module in {name.split(".")[0] for name in imported_modules(tree)}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("losses/a.py", "from ragjax.models import decoder"),
        ("losses/a.py", "from ragjax import storage"),
        ("storage/a.py", "import ragjax.data"),
        ("losses/a.py", "import numpy as np"),
        ("models/a.py", "import ragjax.data"),
        ("data/a.py", "from ragjax import index"),
        ("index/a.py", "def f():\n    from ragjax.evaluation import ndcg"),
        ("training/a.py", "from ragjax.evaluation import ndcg"),
        ("refresh/a.py", "from ragjax.training import loop"),
        ("generation/a.py", "import importlib\nimportlib.import_module('ragjax.index')"),
        ("evaluation/a.py", "from ragjax.training.loop import run"),
        ("training/a.py", "from ragjax.generation import greedy"),
        ("unknown/a.py", "import ragjax.losses"),
        ("__init__.py", "from ragjax import losses"),
        ("training/a.py", "import ragjax"),
        ("training/a.py", "from . import loop"),
        ("training/a.py", "from ..losses import marginal"),
        ("training/a.py", "import torch.nn"),
        ("training/a.py", "from experiments import adapt"),
        ("training/a.py", "if False:\n    import scann"),
        ("data/a.py", "from transformers import AutoTokenizer"),
        ("data/a.py", "__import__('gguf')"),
        ("data/a.py", "import threading"),
        ("index/a.py", "from concurrent.futures import ThreadPoolExecutor"),
        ("training/a.py", "import multiprocessing.pool"),
        ("models/bert.py", "import subprocess"),
        ("models/files/pip_packages.py", "import threading"),
        ("training/a.py", "import os\nos.fork()"),
    ],
)
def test_a_violation_is_found(path, source):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("losses/a.py", "import math\nimport jax.numpy as jnp\nfrom ragjax.losses.b import c"),
        ("index/scann.py", "import scann"),
        (
            "refresh/a.py",
            "import threading\nfrom ragjax.index import base\nimport ragjax.data.corpus",
        ),
        ("training/a.py", "from ragjax import losses, models, data, index, refresh"),
        (
            "models/files/pip_packages.py",
            "import subprocess\nimport gguf\nfrom transformers import x",
        ),
    ],
)
def test_what_is_allowed_is_allowed(path, source):
    assert violations(path, source) == []


# The files that read relevance judgements; all others ask `graded_rows` what counts as found.
READ_JUDGEMENTS = {"data/beir.py", "data/examples.py"}


def reads_judgements(source: str) -> bool:
    """Whether a module reads the judgements of a data set, or their files."""
    tree = ast.parse(source)
    attributes = {
        node.attr
        for node in ast.walk(tree)
        # The option of that name is a path.
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) != "config"
    }
    return "qrels" in attributes or any(
        module.startswith("ragjax.data.qrels") for module in imported_modules(tree)
    )


def test_judgements_are_read_in_one_place():
    others = [*(ROOT.parent / "experiments").rglob("*.py"), *(ROOT.parent / "benchmarks").glob("*")]
    sources = {str(path.relative_to(ROOT)): path for path in SOURCES}
    sources |= {str(path): path for path in others if path.suffix == ".py"}
    found = {name for name, path in sources.items() if reads_judgements(path.read_text("utf-8"))}
    assert found == READ_JUDGEMENTS


def modules_loaded_by(statement: str) -> set[str]:
    script = (
        f"import sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    return set(result.stdout.split())


def test_importing_the_package_loads_nothing():
    assert modules_loaded_by("import ragjax") == {"ragjax"}


def test_importing_the_losses_loads_jax_and_nothing_heavier():
    loaded = modules_loaded_by("import ragjax.losses")
    assert "jax" in loaded
    heavy = (
        "flax", "optax", "orbax", "scann", "transformers", "tokenizers", "huggingface_hub",
        "gguf", "bm25s", "tyro", "torch", "tensorflow",
    )  # fmt: skip
    assert loaded.isdisjoint(heavy)
    others = {name for name in loaded if name.startswith("ragjax.")}
    assert all(name.startswith("ragjax.losses") for name in others)
