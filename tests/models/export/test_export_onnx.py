"""ONNX files of encoders: what onnxruntime makes of them, and what is refused."""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.models import Tokens
from ragjax.models.encoder import build_encoder
from ragjax.models.export import export_encoder, onnx_file, plan_encoder
from ragjax.models.layers.head import Dense, Normalize, Truncate
from ragjax.models.testing import tiny_encoder
from ragjax.models.testing.encoder import random_params

TEXTS = ["A first text.", "a second, longer text of several words", "three", ""]


@pytest.fixture(autouse=True)
def needs_packages():
    pytest.importorskip("onnx", reason="needs the [onnx] extra")
    pytest.importorskip("onnxruntime", reason="needs the [onnx] extra")


def encoder_of(family="bert", pooling=None, steps=None, **sizes):
    """A tiny encoder whose biases and norms are random too, with another pooling and head."""
    tiny = tiny_encoder(1, family)
    config = dataclasses.replace(tiny.config, **sizes)
    params = random_params(tiny.family, config, 1, vary=True)
    rng, layers = np.random.default_rng(0), {}
    for step in steps or ():
        if isinstance(step, Dense):
            layer = {"kernel": rng.normal(0, 0.5, (step.inputs, step.outputs))}
            layer |= {"bias": rng.normal(0, 0.5, step.outputs)} if step.use_bias else {}
            layers[str(len(layers))] = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), layer)
    options = dataclasses.replace(
        tiny,
        pooling=pooling or tiny.pooling,
        steps=tiny.steps if steps is None else steps,
    )
    params = params | ({"projection": layers} if layers else {})
    return build_encoder(tiny.family, config, params, tiny.tokenizer, options)


def padded(encoder, texts=TEXTS, length=48):
    ids = np.full((len(texts), length), encoder.pad_id, np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        found = encoder.tokenizer.encode(text).ids if text else []  # a text without tokens
        ids[row, : len(found)], mask[row, : len(found)] = found, 1
    return ids, mask


def embed(encoder):
    ids, mask = padded(encoder)
    tokens = Tokens(jnp.asarray(ids, jnp.int32), jnp.asarray(mask, bool))
    return np.asarray(jax.jit(encoder.encode)(encoder.params, tokens))


def run(path, encoder, output="sentence_embedding", types=0):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids, mask = padded(encoder)
    given = {
        "input_ids": ids, "attention_mask": mask, "token_type_ids": np.full_like(ids, types),
    }  # fmt: skip
    wanted = [each.name for each in session.get_inputs()]
    return session.run([output], {name: given[name] for name in wanted})[0]


@pytest.mark.parametrize("family", ["bert", "roberta", "dpr"])
def test_onnxruntime_computes_the_same_embeddings(tmp_path, family, caplog):
    encoder = encoder_of(family)
    exported = export_encoder(encoder, tmp_path / "out", formats=["onnx", "onnx-int8"])
    assert [record.name for record in caplog.records] == ["ragjax.models.export.api"]  # a licence
    assert not (tmp_path / "out" / "model.safetensors").exists()
    # The bias of a DPR's projection, a dense layer there, makes something of a text without tokens.
    rows = 3 if family == "dpr" else 4
    expected = embed(encoder)[:rows]
    found = run(tmp_path / "out" / "onnx" / "model.onnx", encoder)[:rows]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    small = run(tmp_path / "out" / "onnx" / "model_qint8.onnx", encoder)[:rows]
    lengths = np.linalg.norm(small, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = ((small * expected).sum(1) / np.maximum(lengths, 1e-9))[:3]
    assert cosines.min() > 0.97 and np.abs(small - expected).max() > 1e-4
    assert exported.sizes["onnx/model_qint8.onnx"] == (
        (tmp_path / "out" / "onnx" / "model_qint8.onnx").stat().st_size
    )


@pytest.mark.parametrize(
    ("pooling", "steps"),
    [
        ("cls", ()),
        ("lasttoken", (Normalize(), Truncate(size=5))),
        ("weightedmean", (Normalize(),)),
        (
            "cls+mean",
            (
                Dense(inputs=32, outputs=9, use_bias=False, activation="Identity"),
                Dense(inputs=9, outputs=6, activation="GELU"),
                Truncate(size=4),
                Normalize(),
            ),
        ),
        ("max+mean_sqrt_len_tokens", (Dense(inputs=32, outputs=8, activation="Tanh"),)),
        ("mean", (Dense(inputs=16, outputs=8, activation="SiLU"),)),
        ("mean", (Dense(inputs=16, outputs=8, activation="ReLU"),)),
        ("mean", (Dense(inputs=16, outputs=8, activation="Sigmoid"),)),
    ],
)
def test_pooling_and_what_follows_are_inside(tmp_path, pooling, steps):
    encoder = encoder_of("bert", pooling, steps)
    export_encoder(encoder, tmp_path / "out", formats=["onnx"])
    found = run(tmp_path / "out" / "onnx" / "model.onnx", encoder)
    np.testing.assert_allclose(found, embed(encoder), atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_activations_are_those_of_the_layers(tmp_path, activation):
    encoder = encoder_of(activation=activation)
    export_encoder(encoder, tmp_path / "out", formats=["onnx"])
    found = run(tmp_path / "out" / "onnx" / "model.onnx", encoder)
    np.testing.assert_allclose(found, embed(encoder), atol=1e-5)


def test_types_of_tokens_are_taken_as_given(tmp_path):
    encoder = encoder_of()
    export_encoder(encoder, tmp_path / "out", formats=["onnx"])
    path = tmp_path / "out" / "onnx" / "model.onnx"
    assert np.abs(run(path, encoder) - run(path, encoder, types=1)).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "roberta", "dpr"])
def test_it_equals_the_sentence_transformers_folder_beside_it(tmp_path, family):
    package = pytest.importorskip("sentence_transformers", reason="needs the [parity] extra")
    encoder = encoder_of(family)
    export_encoder(encoder, tmp_path / "out", formats=["safetensors", "onnx"])
    model = package.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    path = tmp_path / "out" / "onnx" / "model.onnx"
    np.testing.assert_allclose(run(path, encoder)[:3], model.encode(TEXTS[:3]), atol=1e-5)
    hidden = run(path, encoder, "last_hidden_state")  # what its ONNX backend pools by itself
    there = model.encode(TEXTS[:3], output_value="token_embeddings")
    for row, tokens in enumerate(there):
        np.testing.assert_allclose(hidden[row, : len(tokens)], tokens, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_code_of_the_model_card_runs(tmp_path, family):
    encoder = encoder_of(family)
    export_encoder(encoder, tmp_path / "out", formats=["onnx"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- onnx" in card and "SentenceTransformer" not in card
    (code,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    names = {"texts": TEXTS[:3]}
    exec(code.replace("FOLDER", str(tmp_path / "out")), names)
    np.testing.assert_allclose(names["embeddings"], embed(encoder)[:3], atol=1e-5)
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert [module["name"] for module in modules] == ["0", "1", "2"]


@pytest.mark.parametrize("family", ["modernbert", "qwen3"])
def test_other_architectures_are_refused(tmp_path, family):
    with pytest.raises(ValueError, match="ONNX files are written of BERT, DPR, RoBERTa and their"):
        export_encoder(tiny_encoder(0, family), tmp_path / "out", formats=["onnx"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_MOST_BYTES", 1000, r"an ONNX file holds at most 2 GB, its parameters take 0\.0 GB"),
        ("_TOLERANCE", -1.0, "onnxruntime computes other embeddings"),
        ("_LEAST_COSINE", 1.1, "in int8 an embedding has a cosine of .* to its own in"),
    ],
)
def test_what_would_not_serve_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, name, value, message
):
    monkeypatch.setattr(onnx_file, name, value)
    with pytest.raises(ValueError, match=message):
        export_encoder(encoder_of(), tmp_path / "out", formats=["onnx", "onnx-int8"])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_back_differently_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file.OnnxModelFile, "write", lambda self, path: path.write_bytes(b"x"))
    with pytest.raises(OSError, match="model.onnx: reads back differently; nothing is published"):
        export_encoder(encoder_of(), tmp_path / "out", formats=["onnx"])
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_the_remedy_is_named_first(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'ragjax\[onnx\]'"):
        plan_encoder(tiny_encoder(), formats=["onnx"])


def test_a_language_models_format_is_refused(tmp_path):
    message = "formats gguf-f16: a text encoder is written as safetensors, onnx, onnx-int8"
    with pytest.raises(ValueError, match=message):
        export_encoder(tiny_encoder(), tmp_path / "out", formats=["onnx", "gguf-f16"])
