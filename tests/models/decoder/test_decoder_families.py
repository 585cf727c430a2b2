"""Every family of causal decoders: against PyTorch, cached, packed, in bfloat16, full size."""

import functools
import time

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.models.decoder import model as decoder
from ragjax.models.decoder import packing
from ragjax.models.decoder.checkpoint import params_from_huggingface, params_to_huggingface
from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.decoder.huggingface import format_huggingface_config, parse_huggingface_config
from ragjax.models.decoder.packing import Suffix
from ragjax.models.inputs import LMBatch
from ragjax.models.layers.stacks import cast_floats
from ragjax.models.layers.vocabulary import logits
from ragjax.models.testing.language_model import tiny_decoder_config, tiny_language_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
LARGER = SMALL | {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 3.0,
}
EXACT_YARN = {
    **YARN,
    "truncate": False,
    "beta_slow": 0.5,
    "attention_factor": 1.3,
}
FACTORS = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0],
    "original_max_position_embeddings": 64,
    "attention_factor": 1.0,
}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOW = {"use_sliding_window": True, "sliding_window": 4}
GEMMA = {"head_dim": 8, "sliding_window": 4, "rope_parameters": GEMMA_ROPE}
CASES = {
    "llama with biases": ("Llama", SMALL, {"attention_bias": True, "mlp_bias": True}),
    "llama own head width": ("Llama", SMALL, {"head_dim": 10, "hidden_act": "gelu_pytorch_tanh"}),
    "llama tied": ("Llama", LARGER, {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama linear": (
        "Llama",
        SMALL,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50.0}},
    ),
    "llama llama3": ("Llama", SMALL, {"rope_parameters": LLAMA3, "head_dim": 8}),
    "llama yarn": ("Llama", SMALL, {"rope_parameters": YARN, "head_dim": 16}),
    "llama factors": ("Llama", SMALL, {"rope_parameters": FACTORS, "head_dim": 8}),
    "mistral window": ("Mistral", SMALL, {"sliding_window": 4, "head_dim": 8}),
    "mistral": ("Mistral", LARGER, {"sliding_window": None}),
    "qwen2 tied": ("Qwen2", LARGER, {"tie_word_embeddings": True}),
    "qwen2 window": ("Qwen2", SMALL, {**WINDOW, "max_window_layers": 1}),
    "qwen3 yarn": ("Qwen3", SMALL, {"rope_parameters": EXACT_YARN, "head_dim": 16}),
    "qwen3 window": ("Qwen3", SMALL, {**WINDOW, "layer_types": KINDS, "attention_bias": True}),
    "qwen3 tied": ("Qwen3", LARGER, {"tie_word_embeddings": True, "head_dim": 8}),
    "gemma3": ("Gemma3Text", SMALL, {**GEMMA, "layer_types": KINDS, "query_pre_attn_scalar": 20}),
    "gemma3 with biases": (
        "Gemma3Text",
        LARGER,
        {**GEMMA, "tie_word_embeddings": False, "attention_bias": True},
    ),
}
# These differ from others in constants only, which no gradient depends on.
NO_GRADIENTS = ("llama linear", "llama llama3", "llama yarn", "llama factors", "mistral")


@functools.cache
def torch_model(case):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    family, sizes, changes = CASES[case]
    settings = getattr(transformers, f"{family}Config")(**(sizes | changes))
    return randomised(torch, language_class(transformers, family)(settings))


def language_class(transformers, family):
    return getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")


def randomised(torch, model):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2 if "norm" in name or "bias" in name else 0.3)
    return model.eval()


def make_batch(rng, vocab_size):
    """Left-padded contexts and right-padded targets; padded slots hold arbitrary tokens."""
    contexts = rng.integers(0, vocab_size, (3, 10)).astype(np.int32)
    targets = rng.integers(0, vocab_size, (3, 6)).astype(np.int32)
    context_mask = np.arange(10)[::-1][None] < np.array([[10], [5], [1]])
    target_mask = np.arange(6)[None] < np.array([[3], [6], [2]])
    return LMBatch(contexts, context_mask, targets, target_mask)


def torch_log_probs(model, batch):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    ids = np.concatenate([batch.context_ids, batch.target_ids], axis=1)
    mask = np.concatenate([batch.context_mask, batch.target_mask], axis=1)
    scores = model(
        input_ids=torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask).long(),
        position_ids=torch.tensor(np.maximum(mask.cumsum(axis=1) - 1, 0)),
    ).logits[:, batch.context_ids.shape[1] - 1 : -1]
    targets = torch.tensor(batch.target_ids).long()[..., None]
    log_probs = scores.log_softmax(-1).gather(-1, targets)[..., 0]
    return torch.where(torch.tensor(batch.target_mask), log_probs, torch.zeros(()))


def named_arrays(model):
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_log_probs_and_gradients_equal_pytorch(case, rng):
    reference = torch_model(case)
    config = parse_huggingface_config(reference.config.to_dict())
    params = params_from_huggingface(config, named_arrays(reference), source=case)
    batch = make_batch(rng, config.vocab_size)

    def score(params):
        log_probs = decoder.token_log_probs(config, params, batch)
        return log_probs.sum(), log_probs

    expected = torch_log_probs(reference, batch)
    if case in NO_GRADIENTS:
        found = jax.jit(score)(params)[1]
    else:
        (_, found), gradients = jax.jit(jax.value_and_grad(score, has_aux=True))(params)
        expected.sum().backward()
        compare_gradients(reference, params_to_huggingface(config, gradients))
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-4)


def compare_gradients(reference, gradients):
    by_name = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    assert gradients.keys() == by_name.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, np.abs(by_name[name]).max())
        np.testing.assert_allclose(gradient / scale, by_name[name] / scale, atol=1e-3, err_msg=name)
    reference.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_was_read(case, rng):
    reference = torch_model(case)
    tensors = named_arrays(reference)
    config = parse_huggingface_config(reference.config.to_dict())
    params = params_from_huggingface(config, tensors, source=case)
    written = params_to_huggingface(config, params)
    assert written.keys() == dict(reference.named_parameters()).keys()
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)
    settings = format_huggingface_config(config)
    assert parse_huggingface_config(settings) == config
    # transformers reads the written configuration as a model that computes the same.
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    read = type(reference.config)(**settings)
    again = type(reference)(read).eval()
    again.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    batch = make_batch(rng, config.vocab_size)
    with torch.no_grad():
        np.testing.assert_allclose(
            torch_log_probs(again, batch), torch_log_probs(reference, batch), atol=1e-5
        )


@pytest.mark.slow
def test_gemma3_beside_a_vision_tower():
    reference = torch_model("gemma3")
    text = reference.config.to_dict()
    tensors = named_arrays(reference)
    del tensors["lm_head.weight"]
    config = parse_huggingface_config(
        {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": True}
    )
    assert config == parse_huggingface_config(text)
    expected = params_from_huggingface(config, tensors, source="text")
    for prefix, vision in (("language_model.model.", ""), ("model.language_model.", "model.")):
        beside = {name.replace("model.", prefix, 1): value for name, value in tensors.items()}
        beside[f"{vision}vision_tower.vision_model.head.bias"] = np.ones(3, np.float32)
        beside[f"{vision}multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(3, np.float32)
        found = params_from_huggingface(config, beside, source=prefix)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(ValueError, match=r"unexpected tensor vision_tower\.x"):
        odd = {**tensors, "vision_tower.x": np.ones(3, np.float32)}
        params_from_huggingface(config, odd, source="text")
    with pytest.raises(ValueError, match="no field 'text_config'"):
        parse_huggingface_config({"model_type": "gemma3"})


def test_gemma3_files_leave_out_what_transformers_assumes():
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    # As the hub's files have it: the fields of before transformers 5, defaults left out.
    fields = {
        "hidden_size": 2560,
        "num_hidden_layers": 34,
        "intermediate_size": 10240,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    published = {"model_type": "gemma3", "text_config": {**fields, "model_type": "gemma3_text"}}
    config = parse_huggingface_config(published)
    assert config == parse_huggingface_config(transformers.Gemma3TextConfig(**fields).to_dict())
    assert (config.rope_theta, config.local_rope_theta) == (1e6, 1e4)
    assert [layer for layer in range(34) if not config.sliding_layers[layer]] == [5, 11, 17, 23, 29]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
        ({"is_causal": False}, "is_causal = False is not"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not"),
        ({"hidden_activation": "relu"}, "hidden_activation = 'relu' is not supported; silu and"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "scaled by 'dynamic'"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding layers scaled by 'linear' are not supported; default is",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": -1}},
            "beta_fast of the rotary scaling must be positive, got -1.0",
        ),
        ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ({"query_pre_attn_scalar": -1}, "query_scalar must be positive and a float32, got -1.0"),
    ],
)
def test_what_gemma3_does_not_compute_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_huggingface_config({"model_type": "gemma3_text"} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_bias": True}, "qkv_bias=True and output_bias=False do not occur in llama"),
        ({"sliding_window": 4}, "sliding_window=4 needs a layer that slides"),
        ({"sliding_window": 4, "sliding_layers": (True,) * 3}, "in llama no layer slides"),
        ({"sliding_layers": (False,) * 2}, "one flag for each of 3 layers, got 2"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; llama, mistral"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_decoder_config(**changes)


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
