"""How an encoder computes and what is put around it: options, truncation, prefixes, DPR as BERT."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_folders import edit_json, embed, tokenize

from ragjax.models import Tokens, load_encoder
from ragjax.models.encoder import EncoderOptions, build_encoder, make_encode, with_options
from ragjax.models.export.dpr_as_bert import as_bert
from ragjax.models.layers.pooling import cls_pool
from ragjax.models.testing import tiny_encoder
from ragjax.models.testing.encoder import random_params
from ragjax.models.trainable import ENCODER, merge_trainable, split_trainable

TEXTS = ["a first text", "a second, longer text", "three"]
BGE = "Represent this sentence for searching relevant passages: "


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3"])
def test_rematerialisation_changes_nothing(family):
    encoder = tiny_encoder(family=family)
    tokens = tokenize(encoder, TEXTS)
    results = []
    for each in (encoder, with_options(encoder, remat=True)):
        gradient = jax.grad(lambda params, each=each: (each.encode(params, tokens) ** 3).sum())
        program = str(jax.make_jaxpr(each.encode)(encoder.params, tokens))
        # The name of the operation differs between versions of jax.
        is_kept = "checkpoint" not in program and "remat" not in program
        assert is_kept == (each is encoder)
        results.append(jax.jit(gradient)(encoder.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), *results)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dpr", "roberta", "modernbert", "qwen3"])
def test_bfloat16_computes_low_and_returns_float32(family):
    encoder = tiny_encoder(family=family)
    low = with_options(encoder, compute_dtype=jnp.bfloat16)
    tokens = tokenize(encoder, TEXTS)
    full, half = (np.asarray(jax.jit(e.encode)(e.params, tokens)) for e in (encoder, low))
    assert half.dtype == np.float32 and (half != full).any()
    assert np.corrcoef(half.ravel(), full.ravel())[0, 1] > 0.995
    assert low.fingerprint == encoder.fingerprint and low.params is encoder.params
    gradient = jax.eval_shape(
        jax.grad(lambda params: low.encode(params, tokens).sum()), encoder.params
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype("float32")}


def test_truncation_keeps_the_first_dimensions(tiny_folder):
    whole = embed(load_encoder(str(tiny_folder)), TEXTS)
    cut = load_encoder(str(tiny_folder), truncate_dim=5)
    assert (cut.embedding_size, cut.normalized) == (5, False)
    np.testing.assert_allclose(embed(cut, TEXTS), whole[:, :5], atol=1e-6)
    scaled = load_encoder(str(tiny_folder), truncate_dim=5, normalize=True)
    expected = whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(embed(scaled, TEXTS), expected, atol=1e-6)
    assert scaled.normalized
    assert len({each.fingerprint for each in (cut, scaled, load_encoder(str(tiny_folder)))}) == 3
    with pytest.raises(ValueError, match="truncate_dim 17 is not between 1 and 16"):
        load_encoder(str(tiny_folder), truncate_dim=17)


@pytest.mark.parametrize(("declared", "size"), [(6, 6), (40, 16), (None, 16)])
def test_a_declared_truncation_is_honoured(folder, declared, size, caplog):
    edit_json(folder / "config_sentence_transformers.json", truncate_dim=declared)
    with caplog.at_level(logging.INFO):
        assert load_encoder(str(folder)).embedding_size == size
    assert ("truncated to 6 dimensions after their normalisation" in caplog.text) == (declared == 6)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("intfloat/e5-small-v2", ("query: ", "passage: ")),
        ("BAAI/bge-small-en-v1.5", (BGE, "")),
        ("somebody/else", ("", "")),
    ],
)
def test_well_known_models_without_prompts_get_their_prefixes(folder, source, expected, caplog):
    edit_json(folder / "config.json", _name_or_path=source)
    with caplog.at_level(logging.INFO):
        encoder = load_encoder(str(folder))
    assert (encoder.query_prefix, encoder.doc_prefix) == expected
    assert ("the folder names no prompts" in caplog.text) == (expected != ("", ""))


def test_what_is_asked_or_declared_wins_over_the_table(folder):
    edit_json(folder / "config.json", _name_or_path="intfloat/e5-small-v2")
    asked = load_encoder(str(folder), query_prefix="Q", doc_prefix="")
    assert (asked.query_prefix, asked.doc_prefix) == ("Q", "")
    assert load_encoder(str(folder), query_prefix="Q").doc_prefix == "passage: "
    edit_json(folder / "config_sentence_transformers.json", prompts={"query": "", "document": ""})
    declared = load_encoder(str(folder))
    assert (declared.query_prefix, declared.doc_prefix) == ("", "")
    assert load_encoder(str(folder), query_prefix="Q").query_prefix == "Q"


@pytest.mark.parametrize("projected", [True, False])
def test_a_dpr_tower_becomes_a_bert_with_a_dense_layer(projected):
    encoder = tiny_encoder(family="dpr")
    if not projected:
        config = dataclasses.replace(encoder.config, projection_size=0)
        params = random_params(encoder.family, config, 1)
        options = EncoderOptions(pad_id=0, pooling="cls", max_length=9, source="x")
        encoder = build_encoder(
            encoder.family, config, params, encoder.tokenizer, options, normalized=True
        )
    plain = as_bert(encoder)
    assert plain.family.model_types == ("bert",) and ("projection" in plain.params) == projected
    np.testing.assert_allclose(embed(plain, TEXTS), embed(encoder, TEXTS), atol=1e-5)
    for field in ("embedding_size", "normalized", "max_length", "pooling"):
        assert getattr(plain, field) == getattr(encoder, field), field
    assert as_bert(plain) is plain


def test_a_projection_behind_another_pooling_cannot_be_moved():
    encoder = dataclasses.replace(tiny_encoder(family="dpr"), pooling="max")
    with pytest.raises(ValueError, match="pooling 'max' of projected hidden states"):
        as_bert(encoder)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "dpr", "roberta"])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("learning", [1, None])
def test_cls_pooling_computes_the_last_layer_for_the_first_token_only(family, remat, learning):
    base = tiny_encoder(family=family)
    rows = 40  # enough tokens to pay for taking the last layer off
    ids = np.random.default_rng(0).integers(4, 20, (rows, 8)).astype(np.int32)
    mask = np.arange(8)[None] < np.random.default_rng(1).integers(0, 9, (rows, 1))
    tokens = Tokens(jnp.asarray(ids), jnp.asarray(mask))
    short = make_encode(base.family, base.config, cls_pool, remat=remat)
    # Another function than `cls_pool` is given every token.
    whole = make_encode(base.family, base.config, lambda *arrays: cls_pool(*arrays))
    trainable, frozen = split_trainable(base.params, ENCODER, learning)

    def value_and_gradient(encode):
        def loss(trainable):
            embeddings = encode(merge_trainable(trainable, frozen), tokens)
            return jnp.cos(embeddings).sum(), embeddings

        return jax.jit(jax.grad(loss, has_aux=True))(trainable)

    pairs = zip(
        jax.tree.leaves(value_and_gradient(short)),
        jax.tree.leaves(value_and_gradient(whole)),
        strict=True,
    )
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, atol=2e-5)
    few = Tokens(tokens.ids[:1], tokens.mask[:1])
    np.testing.assert_allclose(short(base.params, few), whole(base.params, few), atol=1e-6)
