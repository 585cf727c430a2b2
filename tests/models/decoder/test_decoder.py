"""Llama: against PyTorch, against itself one token at a time, and what must not matter."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.models.decoder import model as decoder
from ragjax.models.decoder import packing
from ragjax.models.decoder.checkpoint import params_from_huggingface, params_to_huggingface
from ragjax.models.decoder.huggingface import parse_huggingface_config
from ragjax.models.decoder.packing import Suffix
from ragjax.models.inputs import LMBatch
from ragjax.models.testing.language_model import tiny_decoder_config, tiny_language_model
from ragjax.models.trainable import DECODER, join_layers, merge_trainable, split_trainable

CONTEXT_LENGTHS, TARGET_LENGTHS = (9, 4, 1), (3, 5, 1)


@pytest.fixture(scope="module")
def model():
    return tiny_language_model()


def make_batch(rng, *, context_slots=9, target_slots=5, vocab_size=258):
    """Rows of all lengths; the padded slots hold arbitrary tokens, which must not matter."""
    rows = len(CONTEXT_LENGTHS)
    contexts = rng.integers(0, vocab_size, (rows, context_slots)).astype(np.int32)
    targets = rng.integers(0, vocab_size, (rows, target_slots)).astype(np.int32)
    context_mask = np.arange(context_slots)[::-1][None] < np.array(CONTEXT_LENGTHS)[:, None]
    target_mask = np.arange(target_slots)[None] < np.array(TARGET_LENGTHS)[:, None]
    return LMBatch(contexts, context_mask, targets, target_mask)


def numpy_logits(config, params, ids):
    """The decoder written out for one sequence without padding, in float64: `[L, V]`."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    length, half = len(ids), config.head_dim // 2

    def norm(hidden, scale):
        return hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + config.rms_norm_eps) * scale

    def rotate(heads):
        turned = np.empty_like(heads)
        for position in range(length):
            for i in range(half):
                angle = position / config.rope_theta ** (i / half)
                pair = heads[position, :, i] + 1j * heads[position, :, i + half]
                pair = pair * np.exp(1j * angle)
                turned[position, :, i], turned[position, :, i + half] = pair.real, pair.imag
        return turned

    hidden = params["embed"]["embedding"][ids]
    for number in range(config.num_layers):
        layer = jax.tree.map(lambda leaf: leaf[number], params["layers"])  # noqa: B023  (called at once)
        normalised = norm(hidden, layer["attention_norm"]["scale"])
        queries, keys, values = (
            (normalised @ layer[name]["kernel"]).reshape(length, -1, config.head_dim)
            for name in ("query", "key", "value")
        )
        queries, keys = rotate(queries), rotate(keys)
        attended = np.zeros_like(queries)
        for head in range(config.num_heads):
            group = head * config.num_kv_heads // config.num_heads
            for slot in range(length):
                scores = keys[: slot + 1, group] @ queries[slot, head] / config.head_dim**0.5
                weights = np.exp(scores - scores.max())
                attended[slot, head] = weights / weights.sum() @ values[: slot + 1, group]
        hidden = hidden + attended.reshape(length, -1) @ layer["output"]["kernel"]
        normalised = norm(hidden, layer["feed_forward_norm"]["scale"])
        gate = normalised @ layer["gate"]["kernel"]
        gated = gate / (1 + np.exp(-gate)) * (normalised @ layer["up"]["kernel"])
        hidden = hidden + gated @ layer["down"]["kernel"]
    return norm(hidden, params["final_norm"]["scale"]) @ params["embed"]["embedding"].T


def numpy_log_probs(config, params, context, target):
    scores = numpy_logits(config, params, np.array([*context, *target]))[len(context) - 1 : -1]
    log_probs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return log_probs[np.arange(len(target)), target]


def expected_log_probs(model, batch):
    expected = np.zeros(batch.target_ids.shape)
    for row, length in enumerate(TARGET_LENGTHS):
        context = batch.context_ids[row][batch.context_mask[row]]
        target = batch.target_ids[row, :length]
        expected[row, :length] = numpy_log_probs(model.config, model.params, context, target)
    return expected


def score(model, batch, params=None):
    return jax.jit(model.token_log_probs)(model.params if params is None else params, batch)


def test_padding_on_both_sides_and_causality(model, rng):
    batch = make_batch(rng)
    found = score(model, batch)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected_log_probs(model, batch), atol=2e-5)
    assert not np.any(np.asarray(found)[~batch.target_mask])


@pytest.mark.slow
def test_chunked_unembedding_equals_whole(model, rng, monkeypatch):
    batch = make_batch(rng)

    def mean(params):
        return decoder.token_log_probs(model.config, params, batch).mean()

    whole, whole_gradient = jax.jit(jax.value_and_grad(mean))(model.params)
    # 15 target slots in chunks of 4 tokens, the last one partly padding.
    monkeypatch.setattr("ragjax.losses.chunked._BLOCK_ELEMENTS", 1)
    monkeypatch.setattr("ragjax.losses.chunked._SMALLEST_BLOCK", 4)
    jax.clear_caches()
    chunked, chunked_gradient = jax.jit(jax.value_and_grad(mean))(model.params)
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6), chunked_gradient, whole_gradient
    )


@pytest.mark.slow
def test_remat_changes_no_value_and_no_gradient(model, rng):
    batch = make_batch(rng)

    @functools.partial(jax.jit, static_argnames="remat")
    def mean_and_gradient(params, remat):
        def mean(params):
            return decoder.token_log_probs(model.config, params, batch, remat=remat).mean()

        return jax.value_and_grad(mean)(params)

    plain = mean_and_gradient(model.params, remat=False)
    remat = mean_and_gradient(model.params, remat=True)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), plain, remat)


def test_rows_without_context_have_finite_values_and_gradients(model, rng):
    batch = make_batch(rng)
    batch = batch._replace(context_mask=np.zeros_like(batch.context_mask))
    value, gradient = jax.jit(
        jax.value_and_grad(lambda params: model.token_log_probs(params, batch).sum())
    )(model.params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_layers_are_traced_once(model, rng):
    jaxpr = jax.make_jaxpr(functools.partial(decoder.token_log_probs, model.config))
    deep = tiny_decoder_config(num_layers=12)
    deep_params = jax.eval_shape(functools.partial(decoder.init_params, deep), jax.random.key(0))
    batch = make_batch(rng)
    shallow_size = len(str(jaxpr(model.params, batch)))
    deep_jaxpr = jax.make_jaxpr(functools.partial(decoder.token_log_probs, deep))
    assert len(str(deep_jaxpr(deep_params, batch))) < 1.05 * shallow_size


def test_bad_shapes_are_refused(model, rng):
    batch = make_batch(rng)
    with pytest.raises(ValueError, match=r"context_ids and context_mask.*\(3, 8\)"):
        decoder.token_log_probs(
            model.config, model.params, batch._replace(context_mask=batch.context_mask[:, 1:])
        )
    with pytest.raises(ValueError, match="as many contexts as targets.*3 and 2 rows"):
        short = batch._replace(target_ids=batch.target_ids[:2], target_mask=batch.target_mask[:2])
        decoder.token_log_probs(model.config, model.params, short)


# --- decoding -----------------------------------------------------------------------------------


def test_cached_steps_equal_a_full_forward_over_each_prefix(model, rng):
    batch = make_batch(rng)
    extra = rng.integers(0, 258, (3, 4)).astype(np.int32)
    prefill, step = jitted(model)
    state = prefill(model.params, batch.context_ids, batch.context_mask, cache_length=13)
    for length in range(5):
        for row in range(3):
            ids = [*batch.context_ids[row][batch.context_mask[row]], *extra[row, :length]]
            expected = numpy_logits(model.config, model.params, np.array(ids))[-1]
            np.testing.assert_allclose(state.logits[row], expected, atol=1e-4)
        if length < 4:
            state = step(model.params, state.cache, extra[:, length])


def jitted(model):
    prefill = jax.jit(model.decoder.prefill, static_argnames="cache_length")
    return prefill, jax.jit(model.decoder.decode_step)


@pytest.mark.parametrize("target_slots", [1, 5])
def test_scores_from_the_cache_equal_token_log_probs(model, rng, target_slots):
    batch = make_batch(rng, target_slots=target_slots)
    expected = score(model, batch)
    prefilled = jitted(model)[0](
        model.params, batch.context_ids, batch.context_mask, cache_length=11
    )
    found = jax.jit(model.decoder.score)(
        model.params, prefilled, batch.target_ids, batch.target_mask
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_cache_shorter_than_the_prompt_is_refused(model, rng):
    batch = make_batch(rng)
    with pytest.raises(ValueError, match="cache_length=8 is shorter than the prompts"):
        model.decoder.prefill(model.params, batch.context_ids, batch.context_mask, cache_length=8)


# --- packing ------------------------------------------------------------------------------------


def make_packed(rng):
    """Two rows: three suffixes behind one document; one suffix without context, one with."""

    def draw(size):
        return rng.integers(0, 258, size).tolist()

    documents = (draw(6), draw(3))
    suffixes = (
        [
            Suffix(draw(4), draw(2)),
            Suffix(draw(1), draw(3)),
            Suffix([5], []),
        ],
        [Suffix([], draw(3)), Suffix(draw(2), draw(1))],
    )
    rows = [
        packing.pack_row(document, parts, length=20, num_targets=6, pad_id=0)
        for document, parts in zip(documents, suffixes, strict=True)
    ]
    batch = packing.PackedBatch(*(np.stack(field) for field in zip(*rows, strict=True)))
    return batch, documents, suffixes


def test_several_documents_in_a_row_score_as_each_in_its_own(model, rng):
    batch, documents, suffixes = make_packed(rng)
    score = jax.jit(functools.partial(decoder.packed_token_log_probs, model.config))
    apart = np.asarray(score(model.params, batch))
    row = packing.pack_groups(
        list(zip(documents, suffixes, strict=True)), length=48, num_targets=16, pad_id=0
    )
    together = score(model.params, packing.PackedBatch(*(np.stack([field]) for field in row)))
    np.testing.assert_allclose(
        np.asarray(together)[row.target_mask[None]], apart[batch.target_mask], atol=1e-5
    )
    many = [([1], [Suffix([2], [3])] * packing.GROUP)]
    with pytest.raises(ValueError, match="1024 suffixes, at most 1022 fit"):
        packing.pack_groups(many, length=9999, num_targets=9999, pad_id=0)


def test_packed_scores_equal_separate_rows(model, rng):
    batch, documents, suffixes = make_packed(rng)
    found = jax.jit(functools.partial(decoder.packed_token_log_probs, model.config))(
        model.params, batch
    )
    for row, (document, parts) in enumerate(zip(documents, suffixes, strict=True)):
        expected = []
        for context, target in parts:
            before = [*document, *context]
            expected += numpy_log_probs(model.config, model.params, before, target).tolist()
        expected += [0.0] * (batch.target_ids.shape[1] - len(expected))
        np.testing.assert_allclose(found[row], expected, atol=2e-5)


def test_a_row_that_does_not_fit_is_refused():
    suffix = Suffix([1, 2], [3])
    with pytest.raises(ValueError, match="needs 5 slots and 1 scored tokens; .* 4 and 1"):
        packing.pack_row([7, 7], [suffix], length=4, num_targets=1, pad_id=0)
    with pytest.raises(ValueError, match="suffix 0 has a target but no token before it"):
        packing.pack_row([], [Suffix([], [3])], length=4, num_targets=1, pad_id=0)


# --- frozen layers ------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_layers", "embeddings"), [(None, True), (1, False), (0, False)])
def test_split_parts_compute_the_same_and_cover_everything(model, rng, num_layers, embeddings):
    trainable, frozen = split_trainable(model.params, DECODER, num_layers, embeddings=embeddings)
    merged = merge_trainable(trainable, frozen)
    batch = make_batch(rng)
    np.testing.assert_allclose(score(model, batch, merged), score(model, batch), atol=2e-5)
    joined = join_layers(merged)
    jax.tree.map(np.testing.assert_array_equal, joined, model.params)
    assert ("embed" in trainable) == embeddings


def test_prefill_accepts_split_layers(model, rng):
    batch = make_batch(rng)
    merged = merge_trainable(*split_trainable(model.params, DECODER, 1))
    prefill, step = jitted(model)

    def second_logits(params):
        state = prefill(params, batch.context_ids, batch.context_mask, cache_length=10)
        return step(params, state.cache, np.array([1, 2, 3], np.int32)).logits

    whole, parts = second_logits(model.params), second_logits(merged)
    np.testing.assert_allclose(parts, whole, atol=1e-4)


def test_frozen_lower_layers_cost_no_backward_work(rng, monkeypatch):
    config = tiny_decoder_config(num_layers=8)
    params = decoder.init_params(config, jax.random.key(0))
    batch = make_batch(rng)

    def scans(num_layers):
        trainable, frozen = split_trainable(params, DECODER, num_layers)

        def loss(trainable):
            merged = merge_trainable(trainable, frozen)
            return decoder.token_log_probs(config, merged, batch).sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss))(trainable)
        return [
            (equation.params["length"], equation.params["reverse"])
            for equation in jaxpr.jaxpr.eqns
            if equation.primitive.name == "scan"
        ]

    assert scans(2) == [(6, False), (2, False), (2, True)]
    assert scans(None) == [(8, False), (8, True)]


def test_the_number_of_learning_layers_is_checked(model):
    with pytest.raises(ValueError, match="num_layers must be between 0 and 3 .*got 4"):
        split_trainable(model.params, DECODER, 4)


# --- checkpoints and PyTorch --------------------------------------------------------------------


def test_names_of_a_checkpoint_round_trip(model):
    merged = merge_trainable(*split_trainable(model.params, DECODER, 2))
    tensors = params_to_huggingface(model.config, merged)
    assert tensors["model.layers.2.mlp.down_proj.weight"].shape == (32, 48)
    again = params_from_huggingface(model.config, tensors, source="memory")
    jax.tree.map(np.testing.assert_array_equal, again, model.params)


def test_stored_pytorch_log_probs():
    """The file, weights included, was made by data/make_llama_reference.py."""
    path = Path(__file__).parents[1] / "data" / "llama_reference.npz"
    with np.load(path, allow_pickle=False) as stored:
        arrays = dict(stored)
    config = parse_huggingface_config(json.loads(str(arrays.pop("config"))))
    fields = {name: arrays.pop(name) for name in LMBatch._fields}
    expected = arrays.pop("token_log_probs")
    params = params_from_huggingface(config, arrays, source=path)
    found = jax.jit(functools.partial(decoder.token_log_probs, config))(params, LMBatch(**fields))
    np.testing.assert_allclose(found, expected, atol=1e-4)
