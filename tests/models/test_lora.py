import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.models import LMBatch, Tokens, lora
from ragjax.models.testing import tiny_encoder, tiny_language_model
from ragjax.models.trainable import DECODER, merge_trainable, split_trainable

ENCODER_LAYERS = ("attention_output", "intermediate", "key", "output", "query", "value")


@pytest.fixture(scope="module")
def encoder():
    made = tiny_encoder()
    return dataclasses.replace(made, encode=jax.jit(made.encode))


@pytest.fixture(scope="module")
def lm():
    made = tiny_language_model()
    return dataclasses.replace(made, token_log_probs=jax.jit(made.token_log_probs))


def texts(rng, encoder):
    mask = np.arange(7)[None, :] < np.array([7, 4, 1])[:, None]
    ids = rng.integers(4, encoder.config.vocab_size, (3, 7))
    return Tokens(jnp.asarray(ids, jnp.int32), jnp.asarray(mask))


def rows(rng):
    ids = rng.integers(0, 250, (3, 9))
    context_mask = np.arange(6)[None, :] >= np.array([0, 3, 5])[:, None]
    return LMBatch(
        jnp.asarray(ids[:, :6], jnp.int32),
        jnp.asarray(context_mask),
        jnp.asarray(ids[:, 6:], jnp.int32),
        jnp.ones((3, 3), bool),
    )


def trained(adapters, seed=1):
    """Adapters whose every matrix is random, as training would leave them."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return leaf if path[-1].key == "scale" else jnp.float32(rng.normal(size=leaf.shape) / 4)

    return jax.tree_util.tree_map_with_path(draw, adapters)


def init(params, **options):
    return lora.init_adapters(
        params, **{"rank": 2, "alpha": 6.0, "key": jax.random.key(0)} | options
    )


def test_adapters_begin_as_nothing(rng, encoder):
    adapters = init(encoder.params)
    tokens = texts(rng, encoder)
    np.testing.assert_allclose(
        encoder.encode(lora.attach(encoder.params, adapters), tokens),
        encoder.encode(encoder.params, tokens),
        atol=1e-6,
    )
    query = adapters["layers"]["query"]["lora"]
    assert query["down"].shape == (2, 16, 2) and query["up"].shape == (2, 2, 16)
    np.testing.assert_array_equal(query["scale"], [3.0, 3.0])
    assert float(jnp.abs(query["up"]).max()) == 0
    assert 0.15 < float(query["down"].std()) < 0.35  # 1 / sqrt(16)
    assert sorted(adapters["layers"]) == list(ENCODER_LAYERS) and list(adapters) == ["layers"]


def test_an_adapted_layer_is_the_formula(rng, encoder):
    """Folded by hand in numpy, the model computes the same."""
    params = encoder.params
    adapters = trained(init(params, targets=("query",)))
    part = {k: np.asarray(v, np.float64) for k, v in adapters["layers"]["query"]["lora"].items()}
    kernel = np.asarray(params["layers"]["query"]["kernel"], np.float64)
    kernel = kernel + np.einsum("nir,nro->nio", part["down"], part["up"]) * 3.0
    query = {**params["layers"]["query"], "kernel": jnp.float32(kernel)}
    by_hand = {**params, "layers": {**params["layers"], "query": query}}
    tokens = texts(rng, encoder)
    found = encoder.encode(lora.attach(params, adapters), tokens)
    np.testing.assert_allclose(found, encoder.encode(by_hand, tokens), atol=1e-6)
    assert np.abs(np.asarray(found - encoder.encode(params, tokens))).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [None, 2])
def test_merged_equals_attached_for_a_decoder(rng, lm, num_layers):
    trainable, frozen = split_trainable(lm.params, DECODER, num_layers)
    adapters = trained(init(trainable))
    attached = merge_trainable(lora.attach(trainable, adapters), frozen)
    batch = rows(rng)
    found = lm.token_log_probs(attached, batch)
    merged = lora.merge(attached)
    assert not any("lora" in str(p) for p, _ in jax.tree_util.tree_leaves_with_path(merged))
    np.testing.assert_allclose(found, lm.token_log_probs(merged, batch), rtol=1e-5)
    assert np.abs(np.asarray(found - lm.token_log_probs(lm.params, batch))).max() > 0.01


@pytest.mark.slow
def test_adapters_of_a_tuple_of_stacks_lie_in_a_tuple(rng, lm):
    trainable, frozen = split_trainable(lm.params, DECODER, 1)
    params = merge_trainable(trainable, frozen)
    adapters = trained(init(params))
    assert [stack["query"]["lora"]["down"].shape[0] for stack in adapters["layers"]] == [2, 1]
    attached = lora.attach(params, adapters)
    batch = rows(rng)
    np.testing.assert_allclose(
        lm.token_log_probs(attached, batch),
        lm.token_log_probs(lora.merge(attached), batch),
        rtol=1e-5,
    )
    first = init(params, targets=("layers/0/query",))
    assert list(first["layers"][0]) == ["query"] and not first["layers"][1]
    lm.token_log_probs(lora.attach(params, first), batch)


@pytest.mark.slow
def test_generation_takes_adapters(rng, lm):
    attached = lora.attach(lm.params, trained(init(lm.params)))
    batch = rows(rng)
    decoder = lm.decoder

    @jax.jit
    def score(params):
        prefilled = decoder.prefill(params, batch.context_ids, batch.context_mask, cache_length=12)
        return decoder.score(params, prefilled, batch.target_ids, batch.target_mask)

    found = score(attached)
    np.testing.assert_allclose(found, lm.token_log_probs(attached, batch), atol=1e-4)


def equations(jaxpr):
    """All equations of a jaxpr, also inside its scans and calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)
            elif hasattr(inner, "eqns"):
                yield from equations(inner)


def shapes_computed(jaxpr):
    return {value.aval.shape for equation in equations(jaxpr) for value in equation.outvars}


def test_no_gradient_of_a_full_kernel_is_ever_computed(rng, encoder):
    params, tokens = encoder.params, texts(rng, encoder)
    adapters = init(params)
    kernel = params["layers"]["intermediate"]["kernel"].shape  # [N, in, out]

    def shapes(function, argument):
        jaxpr = jax.make_jaxpr(jax.grad(lambda x: function(x).sum()))(argument)
        return shapes_computed(jaxpr.jaxpr)

    def with_adapters(adapters):
        return encoder.encode(lora.attach(params, adapters), tokens)

    forward = shapes_computed(jax.make_jaxpr(with_adapters)(adapters).jaxpr)
    assert not {kernel, kernel[1:]} & (shapes(with_adapters, adapters) - forward)
    # The same question finds them where the kernels themselves learn.
    assert kernel[1:] in shapes(lambda params: encoder.encode(params, tokens), params) - forward


@pytest.mark.slow
def test_the_gradient_is_that_of_the_formula(rng, encoder):
    params, tokens = encoder.params, texts(rng, encoder)
    adapters = trained(init(params))
    weights = jnp.float32(rng.normal(size=(3, 16)))

    def attached(adapters):
        return (encoder.encode(lora.attach(params, adapters), tokens) * weights).sum()

    def folded(adapters):
        return (encoder.encode(lora.merge(lora.attach(params, adapters)), tokens) * weights).sum()

    found, expected = (jax.jit(jax.grad(loss))(adapters) for loss in (attached, folded))
    for name in ENCODER_LAYERS:
        one, other = found["layers"][name]["lora"], expected["layers"][name]["lora"]
        np.testing.assert_allclose(one["down"], other["down"], atol=1e-5)
        np.testing.assert_allclose(one["up"], other["up"], atol=1e-5)
        np.testing.assert_array_equal(one["scale"], 0.0)  # a constant


def test_attaching_copies_nothing(encoder):
    attached = lora.attach(encoder.params, init(encoder.params))
    for name in ENCODER_LAYERS:
        assert attached["layers"][name]["kernel"] is encoder.params["layers"][name]["kernel"]
    assert "lora" not in encoder.params["layers"]["query"]


def test_merging_keeps_the_dtype_and_what_has_no_adapter(encoder):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), encoder.params)
    merged = lora.merge(lora.attach(params, trained(init(params, targets=("key",)))))
    assert merged["layers"]["key"]["kernel"].dtype == jnp.bfloat16
    assert merged["layers"]["query"]["kernel"] is params["layers"]["query"]["kernel"]


def test_another_choice_of_targets_draws_the_same_numbers(encoder):
    one, other = init(encoder.params), init(encoder.params, targets=("val*",))
    assert list(other["layers"]) == ["value"]
    jax.tree.map(np.testing.assert_array_equal, one["layers"]["value"], other["layers"]["value"])
    assert not np.array_equal(
        one["layers"]["value"]["lora"]["down"], one["layers"]["query"]["lora"]["down"]
    )


def test_what_cannot_be_adapted_is_said(encoder, lm):
    with pytest.raises(ValueError, match="'q_proj' fits no linear layer; there are layers/atten"):
        init(encoder.params, targets=("query", "q_proj"))
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        init(encoder.params, rank=0)
    with pytest.raises(ValueError, match="alpha must be greater than 0"):
        init(encoder.params, alpha=0.0)
    with pytest.raises(ValueError, match="layers/gate: the adapters are of other parameters"):
        lora.attach(encoder.params, init(lm.params, targets=("gate",)))
    norm = {**encoder.params["layers"]["output_norm"], "lora": {}}
    layers = {**encoder.params["layers"], "output_norm": norm}
    tokens = Tokens(jnp.ones((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    with pytest.raises(ValueError, match="layers/output_norm has a LoRA adapter, but it is a Lay"):
        encoder.encode({**encoder.params, "layers": layers}, tokens)
