"""Exported folders: what sentence-transformers and transformers make of them; what is refused."""

import dataclasses
import errno
import functools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import environment

from ragjax.models import Tokens, load_encoder
from ragjax.models.encoder import build_encoder
from ragjax.models.export import export_encoder, weights
from ragjax.models.layers.head import Dense, Normalize, Truncate
from ragjax.models.testing import tiny_encoder
from ragjax.models.testing.encoder import random_params

TEXTS = ["A first text.", "a second, longer text", "three"]
ENCODERS = ["bert", "dpr", "roberta", "modernbert", "qwen3"]


@functools.cache
def encoder_of(family):
    """A tiny encoder whose biases and norms are random too."""
    encoder = tiny_encoder(1, family)
    params = random_params(encoder.family, encoder.config, 1, vary=True)
    return dataclasses.replace(encoder, params=params, query_prefix="ask: ", doc_prefix="text: ")


def with_head(encoder, pooling, steps, *, seed=0):
    """The encoder with another pooling and random dense layers behind it."""
    rng = np.random.default_rng(seed)
    layers = {}
    for step in steps:
        if isinstance(step, Dense):
            layer = {"kernel": rng.normal(0, 0.5, (step.inputs, step.outputs))}
            layer |= {"bias": rng.normal(0, 0.5, step.outputs)} if step.use_bias else {}
            layers[str(len(layers))] = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), layer)
    return build_encoder(
        encoder.family,
        encoder.config,
        encoder.params | ({"projection": layers} if layers else {}),
        encoder.tokenizer,
        dataclasses.replace(
            encoder, pooling=pooling, steps=steps, query_prefix="ask: ", doc_prefix="text: "
        ),
    )


def embed(encoder, texts, *, prefix=""):
    rows = [encoder.tokenizer.encode(prefix + text).ids for text in texts]
    ids = np.full((len(rows), 40), encoder.pad_id, np.int32)  # one length: one compilation
    mask = np.zeros(ids.shape, bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, True
    tokens = Tokens(jnp.asarray(ids), jnp.asarray(mask))
    return np.asarray(jax.jit(encoder.encode)(encoder.params, tokens))


def sentence_transformer(folder):
    package = pytest.importorskip("sentence_transformers", reason="needs the [parity] extra")
    return package.SentenceTransformer(str(folder), device="cpu")


def assert_same_embeddings(encoder, folder):
    model = sentence_transformer(folder)
    for name, prefix in (("query", encoder.query_prefix), ("document", encoder.doc_prefix)):
        found = model.encode(TEXTS, prompt_name=name)
        np.testing.assert_allclose(found, embed(encoder, TEXTS, prefix=prefix), atol=1e-5)
    np.testing.assert_allclose(model.encode(TEXTS), embed(encoder, TEXTS), atol=1e-5)
    assert model.max_seq_length == encoder.max_length
    return model


def read(folder, name):
    return json.loads((folder / name).read_text("utf-8"))


# --- encoders ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ENCODERS)
def test_sentence_transformers_computes_the_same_embeddings(tmp_path, family):
    encoder = encoder_of(family)
    exported = export_encoder(encoder, tmp_path / "out")
    again = load_encoder(str(tmp_path / "out"))
    assert (again.query_prefix, again.doc_prefix) == ("ask: ", "text: ")
    assert again.normalized == encoder.normalized and again.max_length == encoder.max_length
    if family == "dpr":  # which becomes a BERT with a dense layer
        np.testing.assert_allclose(embed(again, TEXTS), embed(encoder, TEXTS), atol=1e-6)
    else:
        assert (again.config, again.steps) == (encoder.config, encoder.steps)
        jax.tree.map(np.testing.assert_array_equal, again.params, encoder.params)
    assert exported.sizes == {
        str(path.relative_to(tmp_path / "out")): path.stat().st_size
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert_same_embeddings(encoder, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pooling", "steps", "folders"),
    [
        ("lasttoken", (Normalize(), Truncate(size=5)), ["2_Normalize", "3_Dense"]),
        (
            "mean",
            (Dense(inputs=16, outputs=12, activation="Tanh"), Truncate(size=7), Normalize()),
            ["2_Dense", "3_Normalize"],
        ),
        (
            "cls+mean",
            (
                Dense(inputs=32, outputs=9, use_bias=False, activation="Identity"),
                Dense(inputs=9, outputs=4, activation="GELU"),
                Normalize(),
            ),
            ["2_Dense", "3_Dense", "4_Normalize"],
        ),
        ("max+mean_sqrt_len_tokens", (), []),
    ],
)
def test_pooling_projection_and_truncation_survive(tmp_path, pooling, steps, folders):
    encoder = with_head(encoder_of("bert"), pooling, steps)
    export_encoder(encoder, tmp_path / "out")
    modules = read(tmp_path / "out", "modules.json")
    assert [module["path"] for module in modules] == ["", "1_Pooling", *folders]
    model = assert_same_embeddings(encoder, tmp_path / "out")
    assert model.encode(TEXTS).shape[1] == encoder.embedding_size


def test_the_layout_is_the_one_that_old_readers_know(tmp_path):
    export_encoder(tiny_encoder(), tmp_path / "out")
    kinds = [module["type"] for module in read(tmp_path / "out", "modules.json")]
    assert kinds == [
        f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Normalize")
    ]
    assert read(tmp_path / "out", "1_Pooling/config.json") == {
        "word_embedding_dimension": 16,
        "pooling_mode_cls_token": False,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    assert read(tmp_path / "out", "sentence_bert_config.json") == {
        "max_seq_length": 64,
        "do_lower_case": False,
    }
    assert read(tmp_path / "out", "config_sentence_transformers.json") == {
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    config = read(tmp_path / "out", "config.json")
    assert config["architectures"] == ["BertModel"] and config["torch_dtype"] == "float32"
    tokenizer = read(tmp_path / "out", "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["pad_token"] == "[PAD]" and tokenizer["model_max_length"] == 64


@pytest.mark.slow
def test_transformers_loads_the_encoder_alone(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    import transformers

    encoder = encoder_of("bert")
    export_encoder(encoder, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert list(inputs) == ["input_ids", "token_type_ids", "attention_mask"]
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    found = torch.nn.functional.normalize(mean).numpy()
    np.testing.assert_allclose(found, embed(encoder, TEXTS), atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_folder_holds_the_rounded_values(tmp_path, dtype):
    encoder = encoder_of("bert")
    full = export_encoder(encoder, tmp_path / "full")
    half = export_encoder(encoder, tmp_path / "half", dtype=dtype)
    ratio = half.sizes["model.safetensors"] / full.sizes["model.safetensors"]
    assert 0.5 < ratio < 0.65  # the header stays
    again = load_encoder(str(tmp_path / "half"))
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), encoder.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, rounded)
    assert read(tmp_path / "half", "config.json")["torch_dtype"] == dtype


def test_other_parameters_are_exported_instead(tmp_path):
    encoder, trained = encoder_of("bert"), tiny_encoder(7).params
    export_encoder(encoder, tmp_path / "out", params=trained)
    jax.tree.map(np.testing.assert_array_equal, load_encoder(str(tmp_path / "out")).params, trained)
    with pytest.raises(ValueError, match=r"missing \['embeddings.*left over \['shared/embeddings"):
        export_encoder(encoder, tmp_path / "towers", params={"shared": trained})


# --- failures ------------------------------------------------------------------------------------


def nothing_in(folder):
    return [path.name for path in folder.iterdir()] == []


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"out is not empty \(it holds notes.txt\).*another folder"
    ):
        export_encoder(tiny_encoder(), tmp_path / "out")
    with pytest.raises(ValueError, match="notes.txt is a file; give a folder"):
        export_encoder(tiny_encoder(), tmp_path / "out" / "notes.txt")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export_encoder(tiny_encoder(), tmp_path / "empty" / "deep" / "down")
    (tmp_path / "empty2").mkdir()
    assert load_encoder(str(export_encoder(tiny_encoder(), tmp_path / "empty2").folder))


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        export_encoder(tiny_encoder(), tmp_path / "file" / "out")
    if os.geteuid() != 0:  # root writes everywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        with pytest.raises(PermissionError):
            export_encoder(tiny_encoder(), tmp_path / "locked" / "out")


def test_too_little_room_is_found_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="0 MB are to be written, 1 MB are free there"):
        export_encoder(tiny_encoder(), tmp_path / "out")
    assert nothing_in(tmp_path)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    write, written = weights._payload, []

    def full(tensor, dtype):
        written.append(tensor)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(tensor, dtype)

    monkeypatch.setattr(weights, "_payload", full)
    with pytest.raises(OSError, match="No space left"):
        export_encoder(tiny_encoder(), tmp_path / "out")
    assert nothing_in(tmp_path)


def test_values_that_cannot_be_served_are_refused(tmp_path):
    encoder = tiny_encoder()
    params = jax.tree.map(lambda leaf: leaf, encoder.params)
    table = params["embeddings"]["words"]["embedding"]
    for value in (np.nan, -np.inf):
        params["embeddings"]["words"]["embedding"] = table.at[3, 2].set(value)
        with pytest.raises(ValueError, match="word_embeddings.weight holds NaN or infinity"):
            export_encoder(encoder, tmp_path / "out", params=params)
    params["embeddings"]["words"]["embedding"] = table.at[3, 2].set(1e5)
    with pytest.raises(ValueError, match="word_embeddings.weight has values beyond .* float16"):
        export_encoder(encoder, tmp_path / "out", params=params, dtype="float16")
    assert nothing_in(tmp_path)
    export_encoder(encoder, tmp_path / "out", params=params, dtype="bfloat16")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"\x01" + bytes(data)[1:], r"reads back with 1 of \d+ values changed"),
        (lambda data: bytes(data)[:-4], "cannot be read back"),
        # What safetensors writes for a transposed array: its memory, in Fortran order.
        (lambda data: bytes(data)[::-1], "values changed"),
    ],
)
def test_a_file_that_reads_back_differently_is_not_published(tmp_path, monkeypatch, spoil, message):
    write, written = weights._payload, []

    def corrupt(tensor, dtype):
        written.append(tensor)
        data = write(tensor, dtype)
        return spoil(data) if len(written) == 8 else data

    monkeypatch.setattr(weights, "_payload", corrupt)
    with pytest.raises(OSError, match=message):
        export_encoder(encoder_of("bert"), tmp_path / "out")
    assert nothing_in(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "int8"}, "'int8' is not one of"), ({"max_shard_size": 0}, "at least 1 byte")],
)
def test_options_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_encoder(tiny_encoder(), tmp_path / "out", **options)


@pytest.mark.slow
def test_a_killed_export_leaves_no_folder(tmp_path):
    script = f"""
import os, signal
from ragjax.models.export import weights
from ragjax.models.export import export_encoder
from ragjax.models.testing import tiny_encoder
write, written = weights._payload, []
def payload(tensor, dtype):
    written.append(tensor)
    if len(written) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(tensor, dtype)
weights._payload = payload
export_encoder(tiny_encoder(), {str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment())
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.name.endswith(".partial")
    export_encoder(tiny_encoder(), tmp_path / "out")
    assert load_encoder(str(tmp_path / "out")).fingerprint == tiny_encoder().fingerprint
