"""GGUF files that are written here: read back, read by the gguf package, and what is refused."""

import dataclasses
import functools
import json
import logging

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ragjax.models import LMBatch, load_language_model, lora
from ragjax.models.export import export_language_model, plan_language_model
from ragjax.models.export.base import read_base
from ragjax.models.export.gguf_file import plan_gguf
from ragjax.models.files.gguf.file import read_gguf_file
from ragjax.models.files.gguf.tokenizer import BYTE_LEVEL
from ragjax.models.layers.rotary import (
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
    yarn_attention_factor,
)
from ragjax.models.testing import tiny_language_model
from ragjax.models.testing.language_model import tiny_decoder_config

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3"]
TEXTS = [
    "In 2024, 1234567 people don't pay $3.50.",
    "  naïve café e\u0301\n\n 日本語 😀",
    "abab cd",
]


def tiny(family):
    """The tiny model; of Gemma 3 with the scale of attention that its files mean."""
    lm = tiny_language_model(1, family)
    config = dataclasses.replace(lm.config, query_scalar=None)
    scored = functools.partial(lm.family.token_log_probs, config)
    return dataclasses.replace(lm, config=config, token_log_probs=scored)


def log_probs(lm):
    context, target = np.arange(2, 14)[None] % 250, np.arange(40, 52)[None]
    whole = np.ones_like(context, bool)
    batch = LMBatch(*map(jnp.asarray, (context, whole, target, whole)))
    return np.asarray(jax.jit(lm.token_log_probs)(lm.params, batch))


def with_config(lm, **changes):
    """The tiny model with other sizes and constants, its parameters drawn anew."""
    config = dataclasses.replace(lm.config, **changes)
    params = tiny_language_model(5).params
    if not config.tie_embeddings:
        params = {**params, "unembed": {"kernel": params["embed"]["embedding"].T * 0.5}}
    return dataclasses.replace(lm, config=config, params=params)


def exported(lm, folder, *formats):
    export_language_model(lm, folder, formats=formats)
    return {path.stem.removeprefix("model-"): path for path in folder.glob("*.gguf")}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_reads_back_as_its_rounding(tmp_path, family):
    lm = tiny(family)
    files = exported(lm, tmp_path / "out", "gguf-f16", "gguf-q8_0")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "model-F16.gguf", "model-Q8_0.gguf",
    ]  # fmt: skip
    expected = log_probs(lm)
    for kind, step in (("F16", 2.0**-11), ("Q8_0", 0.5 / 127 + 2.0**-11)):
        again = load_language_model(str(files[kind]))
        assert (again.bos_id, again.eos_ids, again.pad_id) == (lm.bos_id, lm.eos_ids, lm.pad_id)
        for text in TEXTS:
            assert again.tokenizer.encode(text).ids == lm.tokenizer.encode(text).ids

        def near(path, found, wanted, step=step):
            is_matrix = path[-1].key in ("kernel", "embedding")
            limit = step * np.abs(wanted).max() if is_matrix else 1e-6
            assert np.abs(found - wanted).max() <= limit, path
            assert not is_matrix or np.abs(found - wanted).max() > 0  # it was rounded

        jax.tree_util.tree_map_with_path(near, again.params, lm.params)
        gap = np.abs(log_probs(again) - expected).max()
        assert 0 < gap < (0.02 if kind == "F16" else 0.5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_gguf_package_reads_the_names_and_values_that_its_converter_writes(tmp_path, family):
    lm = tiny_language_model(1, family)
    path = exported(lm, tmp_path / "out", "gguf-f16")["F16"]
    reader = gguf.GGUFReader(path)
    there = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in reader.tensors}
    named = lm.family.save_params(lm.config, lm.params)
    heads, width = lm.config.num_heads, lm.config.head_dim
    query = named["model.layers.1.self_attn.q_proj.weight"]
    if family == "llama":  # whose entries i and i + D/2 of a head become neighbours
        query = query.reshape(heads, 2, width // 2, -1).swapaxes(1, 2).reshape(query.shape)
    np.testing.assert_array_equal(
        there["blk.1.attn_q.weight"], query.astype(np.float16).astype(np.float32)
    )
    np.testing.assert_array_equal(
        there["blk.2.ffn_norm.weight"], named["model.layers.2.post_attention_layernorm.weight"]
    )
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields[f"{family}.attention.head_count_kv"] == lm.config.num_kv_heads
    assert fields["general.file_type"] == 1 and fields["tokenizer.ggml.model"] == "gpt2"
    assert "general.license" not in fields


SCALINGS = {
    "linear": LinearScaling(factor=4.0),
    "llama3": Llama3Scaling(
        factor=32.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=8192
    ),
    "other llama3": Llama3Scaling(
        factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=16
    ),
    "factors": FactorScaling(factors=(1.0, 1.5, 2.0, 3.0)),
    "yarn": YarnScaling(
        factor=4.0, original_positions=16, attention_factor=yarn_attention_factor(4.0)
    ),
    "sharper yarn": YarnScaling(factor=4.0, original_positions=16, attention_factor=1.5),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_rotary_positions_come_back(tmp_path, name):
    lm = tiny_language_model(2)
    config = dataclasses.replace(lm.config, rope_scaling=SCALINGS[name], rope_theta=5e3)
    lm = dataclasses.replace(lm, config=config)
    again = load_language_model(str(exported(lm, tmp_path / "out", "gguf-f16")["F16"]))
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    plain = (1 / config.rope_theta**exponents).astype(np.float32)
    stretched = [
        model.config.rope_scaling.stretch(plain, config.rope_theta) for model in (again, lm)
    ]
    np.testing.assert_allclose(*stretched, rtol=1e-6)
    if isinstance(SCALINGS[name], YarnScaling):
        found = again.config.rope_scaling.attention_factor
        assert found == pytest.approx(SCALINGS[name].attention_factor, rel=1e-6)


def test_an_unembedding_of_its_own_is_written(tmp_path):
    lm = with_config(tiny_language_model(3), tie_embeddings=False)
    again = load_language_model(str(exported(lm, tmp_path / "out", "gguf-f16")["F16"]))
    assert not again.config.tie_embeddings
    np.testing.assert_allclose(
        again.params["unembed"]["kernel"], lm.params["unembed"]["kernel"], rtol=1e-3, atol=1e-7
    )


def test_adapters_are_merged(tmp_path):
    lm = tiny_language_model(1)
    adapters = lora.init_adapters(lm.params, rank=2, alpha=4.0, key=jax.random.key(0))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    params = lora.attach(lm.params, adapters)
    export_language_model(lm, tmp_path / "out", params=params, formats=["gguf-f16"])
    again = load_language_model(str(tmp_path / "out"))
    merged = lora.merge(params)["layers"]["query"]["kernel"]
    np.testing.assert_allclose(again.params["layers"]["query"]["kernel"], merged, rtol=1e-3)
    assert np.abs(merged - lm.params["layers"]["query"]["kernel"]).max() > 0.01


def test_a_gguf_file_is_handed_on_with_its_tokenizer_licence_and_template(tmp_path):
    lm = tiny_language_model(1)
    fields = {"chat_template": "{{ messages[0] }}", "license": "mit"}
    base = read_base(lm.source)._replace(**fields)
    path = tmp_path / "first.gguf"
    plan_gguf(lm, base, lm.params, kind="F16", license="mit").write(path)
    first = read_gguf_file(path)
    assert first.fields["tokenizer.chat_template"] == "{{ messages[0] }}"
    second = read_gguf_file(
        exported(load_language_model(str(path)), tmp_path / "out", "gguf-f16")["F16"]
    )
    assert second.fields == first.fields | {"general.name": "first"}
    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(np.asarray(second.tensors[name]), np.asarray(tensor))
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


# --- Tokenizers ---------------------------------------------------------------------------------


def with_tokenizer(tokenizer, **ids):
    size = tokenizer.get_vocab_size(with_added_tokens=True) + 3  # ids without a token
    lm = tiny_language_model(1)
    embedding = np.resize(np.asarray(lm.params["embed"]["embedding"]), (size, 32))
    return dataclasses.replace(
        lm,
        tokenizer=tokenizer,
        config=dataclasses.replace(lm.config, vocab_size=size),
        params={**lm.params, "embed": {"embedding": jnp.asarray(embedding)}},
        **{"bos_id": None, "eos_ids": (1,), "pad_id": 0, **ids},
    )


def byte_level(kind):
    """A byte-level BPE of this kind with merges that cross what other kinds cut."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("1", "2"), ("12", "3"), ("!", "!"), ("Ġ", "p"), ("'", "L")]
    tokens = [*alphabet, *map("".join, merges)]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=kind.whole_words))
    tokenizer.pre_tokenizer = kind.pre_tokenizer()
    if kind.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<s>"])
    tokenizer.add_tokens([AddedToken("<keep>", normalized=False)])
    return tokenizer


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_each_way_to_cut_a_text_is_recognised(tmp_path, name):
    tokenizer = byte_level(BYTE_LEVEL[name])
    end, begin = (tokenizer.token_to_id(token) for token in ("<|end|>", "<s>"))
    lm = with_tokenizer(tokenizer, bos_id=begin, eos_ids=(end,))
    path = exported(lm, tmp_path / "out", "gguf-f16")["F16"]
    fields = read_gguf_file(path).fields
    assert BYTE_LEVEL[fields["tokenizer.ggml.pre"]] is BYTE_LEVEL[name] or (
        str(BYTE_LEVEL[fields["tokenizer.ggml.pre"]].pre_tokenizer())
        == str(BYTE_LEVEL[name].pre_tokenizer())
    )
    again = load_language_model(str(path))
    for text in [*TEXTS, "a<keep>b<|end|>"]:
        assert again.tokenizer.encode(text).ids == tokenizer.encode(text).ids
    assert (again.bos_id, again.eos_ids, again.pad_id) == (begin, (end,), 0)
    assert fields["tokenizer.ggml.token_type"][-6:] == [3, 3, 4, 5, 5, 5]
    assert fields["tokenizer.ggml.tokens"][-1] == f"[PAD{lm.config.vocab_size - 1}]"


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_sentence_piece_tokenizer_comes_back(tmp_path, prefixed):
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz", "ab", "▁p", "▁pe", "op", "abab", "cd"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [("a", "b"), ("▁", "p"), ("▁p", "e"), ("o", "p"), ("ab", "ab"), ("c", "d")]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefixed else spaces
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    lm = with_tokenizer(tokenizer, bos_id=1, eos_ids=(2,))
    path = exported(lm, tmp_path / "out", "gguf-f16")["F16"]
    again, fields = load_language_model(str(path)), read_gguf_file(path).fields
    for text in [*TEXTS, "people opabab cd"]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert again.tokenizer.encode(text, add_special_tokens=False).ids == ids
    assert (again.bos_id, again.eos_ids) == (1, (2,))
    assert fields["tokenizer.ggml.add_space_prefix"] is prefixed
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]


def test_ends_beyond_those_that_have_a_field_are_named(tmp_path, caplog):
    tokenizer = byte_level(BYTE_LEVEL["smollm"])
    lm = with_tokenizer(tokenizer, eos_ids=(5, 6, 7))
    again = load_language_model(str(exported(lm, tmp_path / "out", "gguf-f16")["F16"]))
    assert again.eos_ids == (5, 6, 7)
    with caplog.at_level(logging.WARNING):
        plan_language_model(dataclasses.replace(lm, eos_ids=(5, 6, 7, 8)), formats=["gguf-f16"])
    assert "no field for these tokens that end an answer" in caplog.text


# --- Refused ------------------------------------------------------------------------------------


def whole_word_pieces():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    return with_tokenizer(tokenizer, eos_ids=(1,))


def odd_cut():
    tokenizer = byte_level(BYTE_LEVEL["smollm"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return with_tokenizer(tokenizer)


def with_kernel(value):
    lm = tiny_language_model(1)
    layers = lm.params["layers"]
    kernel = layers["query"]["kernel"].at[0, 0, 0].set(value)
    layers = {**layers, "query": {**layers["query"], "kernel": kernel}}
    return dataclasses.replace(lm, params={**lm.params, "layers": layers})


def untruncated_yarn():
    scaling = YarnScaling(factor=4.0, original_positions=512, attention_factor=1.2, truncate=False)
    return with_config(tiny_language_model(1), rope_scaling=scaling)


def sliding_qwen():
    lm = tiny_language_model(1, "qwen3")
    windows = {"sliding_window": 4, "sliding_layers": (True, False, True)}
    return dataclasses.replace(lm, config=dataclasses.replace(lm.config, **windows))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_language_model(1, "t5"), "GGUF files are written of causal decoders"),
        (whole_word_pieces, "a tokenizer of kind WordPiece is not written to GGUF"),
        (odd_cut, "cuts texts in a way that GGUF files have no name for; known are"),
        (
            lambda: with_kernel(np.nan),
            "nothing is written: blk.0.attn_q.weight holds NaN or infinity",
        ),
        (lambda: with_kernel(1e6), r"attn_q.weight has 1e\+06, beyond the range of F16"),
        (untruncated_yarn, "its metadata cannot say rope_scaling="),
        (lambda: tiny_language_model(1, "gemma3"), r"cannot say query_scalar=16\.0"),
        (sliding_qwen, "cannot be written as GGUF: .*does not say which layers slide"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        export_language_model(make(), tmp_path / "out", formats=["gguf-f16"])
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_is_not_the_one_of_the_gguf_file_is_refused(tmp_path):
    lm = with_tokenizer(byte_level(BYTE_LEVEL["smollm"]))
    path = exported(lm, tmp_path / "out", "gguf-f16")["F16"]
    other = dataclasses.replace(
        load_language_model(str(path)), tokenizer=byte_level(BYTE_LEVEL["falcon"])
    )
    with pytest.raises(ValueError, match="its tokenizer is another one than its GGUF file has"):
        plan_language_model(other, formats=["gguf-f16"])
    added = dataclasses.replace(load_language_model(str(path)), bos_id=3)
    with pytest.raises(ValueError, match="texts begin with token 3, a GGUF file would say None"):
        plan_language_model(added, formats=["gguf-f16"])


def test_biases_that_llama_cpp_does_not_read_are_refused(tmp_path):
    config = tiny_decoder_config(model_type="qwen3", qkv_bias=True, output_bias=True)
    lm = dataclasses.replace(tiny_language_model(1, "qwen3"), config=config)
    with pytest.raises(ValueError, match="llama.cpp has no qwen3 with biases"):
        export_language_model(lm, tmp_path / "out", formats=["gguf-f16"])


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (["onnx"], "formats onnx: a language model is written as safetensors, gguf-f16, gguf-q8_0"),
        ([], "formats none"),
    ],
)
def test_unknown_formats_are_refused(tmp_path, formats, message):
    with pytest.raises(ValueError, match=message):
        export_language_model(tiny_language_model(), tmp_path / "out", formats=formats)


def test_a_file_that_reads_back_differently_is_not_published(tmp_path, monkeypatch):
    lm = tiny_language_model(1)
    plan = plan_gguf(lm, read_base(lm.source), lm.params, kind="Q8_0", license=None)
    path = tmp_path / "model.gguf"
    plan.write(path)
    assert plan.check(path) == len(plan.slots) and path.stat().st_size == plan.size
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match="reads back differently; nothing is published"):
        plan.check(path)
    path.write_bytes(data[:-64])
    with pytest.raises(OSError, match="cannot be read back"):
        plan.check(path)
    monkeypatch.setattr(type(plan), "check", lambda self, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_language_model(lm, tmp_path / "out", formats=["gguf-q8_0"])
    assert [found.name for found in tmp_path.iterdir()] == ["model.gguf"]


def test_gguf_beside_safetensors_is_in_the_model_card_of_one_folder(tmp_path):
    lm = tiny_language_model(1)
    exported(lm, tmp_path / "out", "safetensors", "gguf-q8_0")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'Llama("FOLDER/model-Q8_0.gguf")' in card and "AutoModelForCausalLM" in card
    assert "library_name: transformers" in card and "- gguf" in card
    again = load_language_model(str(tmp_path / "out"))  # the safetensors
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
