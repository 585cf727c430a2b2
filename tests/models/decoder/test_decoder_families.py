"""Every family of causal decoders against PyTorch: values, gradients, files, what is refused."""

import functools

import jax
import jax.extend.core
import numpy as np
import pytest
from decoder_reference import language_class, make_batch

from ragjax.models.decoder import model as decoder
from ragjax.models.decoder.checkpoint import params_from_huggingface, params_to_huggingface
from ragjax.models.decoder.huggingface import format_huggingface_config, parse_huggingface_config
from ragjax.models.testing.language_model import tiny_decoder_config

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


def randomised(torch, model):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2 if "norm" in name or "bias" in name else 0.3)
    return model.eval()


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
