"""Every family of causal decoders against itself: cached, packed, in bfloat16; full sizes."""

import functools
import time

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_reference import language_class, make_batch

from ragjax.models.decoder import model as decoder
from ragjax.models.decoder import packing
from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.decoder.huggingface import parse_huggingface_config
from ragjax.models.decoder.packing import Suffix
from ragjax.models.inputs import LMBatch
from ragjax.models.layers.stacks import cast_floats
from ragjax.models.layers.vocabulary import logits
from ragjax.models.testing.language_model import tiny_language_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")


# --- against itself -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_language_model(family=request.param)


def full_logits(model, ids, mask):
    hidden, _ = decoder.run_layers(
        model.config,
        model.params,
        ids,
        positions=decoder.mask_positions(mask),
        allowed=decoder.causal(mask),
    )
    return logits(model.params, hidden)


@pytest.mark.slow
def test_cached_steps_equal_the_full_forward(model, rng):
    batch = make_batch(rng, 258)
    steps = 7  # each window of 6 slides past the prompt
    extra = rng.integers(0, 258, (3, steps)).astype(np.int32)
    ids = np.concatenate([batch.context_ids, extra], axis=1)
    mask = np.concatenate([batch.context_mask, np.ones_like(extra, bool)], axis=1)
    expected = jax.jit(functools.partial(full_logits, model))(ids, mask)
    prefill = jax.jit(model.decoder.prefill, static_argnames="cache_length")
    step = jax.jit(model.decoder.decode_step)
    state = prefill(model.params, batch.context_ids, batch.context_mask, cache_length=20)
    for place in range(steps + 1):
        np.testing.assert_allclose(state.logits, expected[:, 9 + place], atol=1e-4)
        if place < steps:
            state = step(model.params, state.cache, extra[:, place])


@pytest.mark.slow
def test_scores_from_the_cache_equal_token_log_probs(model, rng):
    batch = make_batch(rng, 258)
    expected = jax.jit(model.token_log_probs)(model.params, batch)

    @jax.jit
    def from_cache(params):
        read = model.decoder.prefill(params, batch.context_ids, batch.context_mask, cache_length=16)
        return model.decoder.score(params, read, batch.target_ids, batch.target_mask)

    np.testing.assert_allclose(from_cache(model.params), expected, atol=5e-5)


@pytest.mark.slow
def test_packed_scores_equal_separate_rows(model, rng):
    document = rng.integers(0, 258, 8).tolist()
    pairs = [Suffix(rng.integers(0, 258, 3).tolist(), rng.integers(0, 258, 4).tolist())]
    pairs += [Suffix(rng.integers(0, 258, 1).tolist(), rng.integers(0, 258, 4).tolist())]
    row = packing.pack_row(document, pairs, length=24, num_targets=8, pad_id=0)
    packed = packing.PackedBatch(*(np.stack([field]) for field in row))
    score = jax.jit(functools.partial(model.family.packed_token_log_probs, model.config))
    found = np.asarray(score(model.params, packed)).reshape(2, 4)
    contexts, masks = np.zeros((2, 11), np.int32), np.zeros((2, 11), bool)
    for place, pair in enumerate(pairs):
        context = [*document, *pair.context_ids]
        contexts[place, -len(context) :], masks[place, -len(context) :] = context, True
    targets = np.array([pair.target_ids for pair in pairs], np.int32)
    separate = LMBatch(contexts, masks, targets, np.ones_like(targets, bool))
    expected = jax.jit(model.token_log_probs)(model.params, separate)
    np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_window_hides_what_lies_before_it(family, rng):
    model = tiny_language_model(family=family)
    window = model.config.sliding_window
    one_layer = DecoderConfig(
        **{**vars(model.config), "num_layers": 1, "sliding_layers": (True,)}  # pyrefly: ignore  (untyped)
    )
    params = decoder.init_params(one_layer, jax.random.key(0))
    ids = rng.integers(0, 258, (1, 12)).astype(np.int32)
    other = ids.copy()
    other[0, 0] = (other[0, 0] + 1) % 258

    @jax.jit
    def hidden(ids):
        mask = jnp.ones(ids.shape, bool)
        positions = decoder.mask_positions(mask)
        allowed = decoder.causal(mask)
        return decoder.run_layers(one_layer, params, ids, positions=positions, allowed=allowed)[0]

    changed = np.abs(hidden(ids) - hidden(other)).max(axis=-1)[0] > 0
    assert changed.tolist() == [place < window for place in range(12)]


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


# Largest and mean error of a log-prob in nats: eight bits of mantissa, three layers whose branches
# are four times those of a fresh model.
BFLOAT16_ERRORS = (0.5, 0.1)


@pytest.mark.slow
def test_bfloat16_multiplies_in_bfloat16_and_normalises_in_float32(model, rng):
    batch = make_batch(rng, 258)
    half = cast_floats(model.params, jnp.bfloat16)
    score = functools.partial(decoder.token_log_probs, model.config)
    dtypes: dict[str, set[str]] = {}
    for equation in equations(jax.make_jaxpr(score)(half, batch).jaxpr):
        found = {str(operand.aval.dtype) for operand in equation.invars if operand.aval.shape}
        dtypes[equation.primitive.name] = dtypes.get(equation.primitive.name, set()) | found
    assert dtypes["dot_general"] == {"bfloat16"}
    for softmax_norm_or_angle in ("exp", "rsqrt", "cos", "sin"):
        assert dtypes[softmax_norm_or_angle] == {"float32"}
    found, expected = jax.jit(score)(half, batch), jax.jit(score)(model.params, batch)
    assert found.dtype == jnp.float32
    errors = np.abs(found - expected)[batch.target_mask]
    assert errors.max() < BFLOAT16_ERRORS[0] and errors.mean() < BFLOAT16_ERRORS[1]


# --- sizes --------------------------------------------------------------------------------------

FULL_SIZES = {
    "Llama 2 7B": ("Llama", {"num_attention_heads": 32}, 6_738_415_616),
    "Llama 3 70B": (
        "Llama",
        {
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "rope_theta": 500000.0,
        },
        70_553_706_496,
    ),
    "Qwen3 8B": (
        "Qwen3",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "max_position_embeddings": 40960,
            "rope_theta": 1e6,
        },
        8_190_735_360,
    ),
    "Gemma 3 27B": (
        "Gemma3Text",
        {
            "vocab_size": 262208,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 168,
            "sliding_window": 1024,
        },
        27_009_346_304,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZES)
def test_full_sizes_have_the_published_number_of_parameters(name):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    family, fields, published = FULL_SIZES[name]
    settings = getattr(transformers, f"{family}Config")(**fields)
    config = parse_huggingface_config(settings.to_dict())
    shapes = jax.eval_shape(functools.partial(decoder.init_params, config), jax.random.key(0))
    with torch.device("meta"):
        reference = language_class(transformers, family)(settings)
    found = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert found == sum(parameter.numel() for parameter in reference.parameters()) == published
    ids = jax.ShapeDtypeStruct((2, 4096), jnp.int32)
    mask = jax.ShapeDtypeStruct((2, 4096), bool)
    batch = LMBatch(ids, mask, ids, mask)
    scores = jax.eval_shape(functools.partial(decoder.token_log_probs, config), shapes, batch)
    assert (scores.shape, scores.dtype) == ((2, 4096), jnp.float32)


@pytest.mark.slow
def test_thirty_layers_compile_within_fifteen_seconds():
    config = DecoderConfig(  # SmolLM2 135M
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_positions=8192,
    )
    params = jax.eval_shape(functools.partial(decoder.init_params, config), jax.random.key(0))
    ids, mask = (jax.ShapeDtypeStruct((8, 128), kind) for kind in (jnp.int32, bool))
    batch = LMBatch(ids, mask, ids, mask)

    def loss(params, batch):
        return -decoder.token_log_probs(config, params, batch).mean()

    def train_step(params, batch):
        gradients = jax.grad(loss)(params, batch)
        return jax.tree.map(lambda leaf, gradient: leaf - 0.1 * gradient, params, gradients)

    for function in (loss, train_step):
        # Processor time of all threads: what other programs do does not count.
        start = time.process_time()
        jax.jit(function).lower(params, batch).compile()
        seconds = time.process_time() - start
        assert seconds < 15, f"{function.__name__}: {seconds:.1f} s"
