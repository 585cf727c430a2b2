"""Every Python block of README and docs runs, with tiny models where it loads published ones."""

import dataclasses
import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import ROOT

import ragjax.models
import ragjax.runs
from ragjax.models import LMBatch, Tokens
from ragjax.models.testing import (
    tiny_encoder,
    tiny_language_model,
    write_tiny_cross_encoder,
    write_tiny_language_model,
)
from ragjax.runs import AdaptConfig
from ragjax.runs.options.files import from_dict
from ragjax.runs.program import parse_flags
from ragjax.training import RagBatch

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.rst"))]
NEEDS = {"export.rst": ("onnx", "onnxruntime")}
ELSEWHERE = {"refresh.rst"}  # tests/docs/test_refresh_page.py runs them


def blocks_of(page):
    text = page.read_text("utf-8")
    if page.suffix == ".md":
        return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found = re.findall(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", text, re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


@pytest.fixture
def here(request, tmp_path, monkeypatch, tiny_inputs, tiny_flags, tiny_run):
    """The working folder of a reader, whose published models are tiny ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").symlink_to(tiny_inputs["data"])
    (tmp_path / "runs").mkdir()
    for name in ("rag", "yesterday", "today"):
        (tmp_path / "runs" / name).symlink_to(tiny_run("train_rag").folder)
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "garden.md").write_text(
        "# Garden\n\nIt is for herbs. The lamp needs 14 watts.\n\n"
        "## Repairs\n\nThe warranty is two years. A pod is replaced after 28 days.\n"
    )
    if request.node.callspec.params["page"].name == "runs.rst":
        arrow = pytest.importorskip("pyarrow", reason="needs the [parquet] extra")
        parquet = pytest.importorskip("pyarrow.parquet", reason="needs the [parquet] extra")
        (tmp_path / "shards").mkdir()
        table = arrow.Table.from_pylist([{"docid": "d1", "text": "It is for herbs."}])
        parquet.write_table(table, tmp_path / "shards" / "part-1.parquet")
    options = parse_flags(AdaptConfig(), None, tiny_flags).options

    class Tiny:
        """`AdaptConfig` with tiny models and sizes for its defaults."""

        from_dict = staticmethod(lambda values: from_dict(options, values, "options"))

        def __new__(cls, **given):
            return dataclasses.replace(options, **given)

    lm, cross_encoder = tmp_path / "models" / "lm", tmp_path / "models" / "cross"
    write_tiny_language_model(lm)
    write_tiny_cross_encoder(cross_encoder)
    load_lm, load_cross = ragjax.models.load_language_model, ragjax.models.load_cross_encoder
    monkeypatch.setattr(ragjax.runs, "AdaptConfig", Tiny)
    monkeypatch.setattr(ragjax.models, "load_encoder", lambda source: tiny_encoder())
    monkeypatch.setattr(ragjax.models, "load_language_model", lambda source: load_lm(str(lm)))
    monkeypatch.setattr(
        ragjax.models, "load_cross_encoder", lambda source: load_cross(str(cross_encoder))
    )
    return tmp_path


@pytest.fixture
def names(rng):
    """What blocks take for granted: models, tokens and batches."""
    encoder, lm = tiny_encoder(), tiny_language_model()

    def ids(*shape):
        return jnp.asarray(rng.integers(4, 40, shape), jnp.int32)

    def real(ids):
        return jnp.ones(ids.shape, bool)

    queries, docs, contexts, answers = ids(2, 5), ids(2, 3, 6), ids(2, 3, 8), ids(2, 4)
    rag_batch = RagBatch(
        queries=Tokens(queries, real(queries)),
        docs=Tokens(docs, real(docs)),
        doc_ids=jnp.arange(6, dtype=jnp.int32).reshape(2, 3),
        doc_mask=jnp.ones((2, 3), bool),
        context_ids=contexts,
        context_mask=real(contexts),
        target_ids=answers,
        target_mask=real(answers),
    )
    rows = contexts[:, 0]
    return {
        "": {
            "encoder": encoder,
            "lm": lm,
            "key": jax.random.key(0),
            "tokens": Tokens(queries, real(queries)),
            "batch": LMBatch(rows, real(rows), answers, real(answers)),
            "trained": {"encoder": encoder.params, "lm": lm.params},
            "question": "what does the red cat like?",
            "text": "the red cat likes 7",
            "passages": ["the red cat likes 7", "the blue dog likes 1"],
            "context_ids": contexts,
            "context_mask": real(contexts),
            "doc_scores": jnp.zeros((2, 3)),
        },
        "end_to_end.rst": {"batch": rag_batch},
        "guides.rst": {  # models and a batch of the reader's own
            "encode": lambda params, tokens: jnp.take(params, tokens, axis=0).mean(-2),
            "token_log_probs": lambda params, batch: jax.nn.log_softmax(params[batch["docs"]])[
                ..., 0
            ],
            "params": {name: jnp.asarray(rng.normal(size=(40, 8)), jnp.float32)
                       for name in ("query", "doc", "lm")},
            "batch": {"queries": queries, "docs": docs, "answer_mask": jnp.ones((2, 6), bool)},
        },
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.name
)
def test_the_python_blocks_of_a_page_run(page, here, names):
    blocks = blocks_of(page)
    given = names[""] | names.get(page.name, {})
    if page.name in ELSEWHERE:
        return
    for package in NEEDS.get(page.name, ()):
        pytest.importorskip(package, reason="needs the [onnx] extra")
    for block in blocks:
        # A tiny model has three layers.
        block = block.replace('"train_layers": 4', '"train_layers": 1')
        exec(compile(block, page.name, "exec"), given)
    check = CHECKS.get(page.name)
    assert check is None or check(given)


def trains(given):
    metrics = given["result"].metrics
    return metrics["after"]["recall@5"]["value"] >= 0 and given["result"].report.exists()


def exported(given):
    files = {path.relative_to("export").as_posix() for path in Path("export").rglob("*.*")}
    expected = {"encoder/model.safetensors", "lm/model.safetensors", "gguf/model-Q8_0.gguf"}
    expected |= {"onnx/onnx/model.onnx", "onnx/onnx/model_qint8.onnx"}
    return expected <= files and not {"onnx/model.safetensors", "gguf/config.json"} & files


def taught(given):
    grads = [np.abs(leaf).max() for leaf in jax.tree.leaves(given["gradient"])]
    return len(grads) == 3 and min(grads) > 0 and given["reply"].sources


# What a page has come to, by the names that its blocks leave.
CHECKS = {
    "README.md": trains,
    "runs.rst": lambda given: trains(given) and given["scores"].shape == (2,),
    "guides.rst": lambda given: trains(given) and taught(given),
    "ask.rst": lambda given: len(given["reply"].sources) > 0,
    "evaluate.rst": lambda given: given["found"].exit_code == 0,
    "end_to_end.rst": lambda given: np.isfinite(given["value"]),
    "export.rst": exported,
    "generation.rst": lambda given: np.allclose(given["posterior"].sum(-1), 1, atol=1e-4),
    "models.rst": lambda given: given["embeddings"].shape == (2, 16),
}


def test_every_page_with_python_is_run_somewhere():
    with_python = {page.name for page in PAGES if blocks_of(page)}
    assert with_python >= {*CHECKS, *ELSEWHERE, "export.rst"}
