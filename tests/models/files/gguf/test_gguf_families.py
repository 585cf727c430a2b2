"""GGUF files of each architecture, written as llama.cpp's converter does, against PyTorch."""

import dataclasses
import functools
import math

import gguf
import jax
import numpy as np
import pytest

from ragjax.models import LMBatch, load_language_model
from ragjax.models.decoder import model as decoder
from ragjax.models.decoder.huggingface import parse_huggingface_config
from ragjax.models.layers.rotary import FactorScaling, Llama3Scaling
from ragjax.models.testing.language_model import tiny_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}
SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# Architecture in the file, class of transformers, its fields. The wide heads are what transformers
# assumes of these two architectures instead of reading them from a file.
FAMILIES = {
    "llama": ("llama", "Llama", {"tie_word_embeddings": False}),
    "smollm2": ("llama", "Llama", {"tie_word_embeddings": True, "num_attention_heads": 2}),
    "llama with biases": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("llama", "Mistral", {"sliding_window": None}),
    "mistral window": ("llama", "Mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 128}),
    "gemma3": ("gemma3", "Gemma3Text", {"head_dim": 256, "sliding_window": 4}),
}
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "llama3": ("Llama", {**LLAMA3, "original_max_position_embeddings": 8192}),
    "factors": ("Llama", {**LLAMA3, "original_max_position_embeddings": 16}),
    "linear": ("Llama", {"factor": 4.0}),
    "yarn": ("Qwen2", {"factor": 4.0, "original_max_position_embeddings": 16}),
}


def vocabulary():
    """The 258 tokens of the tiny tokenizer and one merge."""
    vocab = tiny_tokenizer().get_vocab()
    return [*sorted(vocab, key=vocab.get), "ab"], ["a b"]


def make_torch_model(family, fields):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    sizes = SIZES | {"vocab_size": len(vocabulary()[0])} | fields
    if "num_attention_heads" in fields and "num_key_value_heads" not in fields:
        sizes["num_key_value_heads"] = 1
    settings = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(settings)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2 if "norm" in name or "bias" in name else 0.1)
    return model.eval()


def converted(architecture, model):
    """Names and values of the tensors as the converter writes them."""
    names = NAMES | (SANDWICH if architecture == "gemma3" else {})
    heads = {
        "attn_q.": model.config.num_attention_heads,
        "attn_k.": model.config.num_key_value_heads,
    }
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        for old, new in names.items():
            name = name.replace(old, new)
        if architecture == "gemma3" and "norm" in name:
            value = value + 1
        for part, count in heads.items():
            if architecture == "llama" and part in name:
                rows = value.reshape(count, 2, value.shape[0] // count // 2, -1)
                value = rows.swapaxes(1, 2).reshape(value.shape)
        yield name, value


def write_gguf(path, architecture, model, *, quantization="F32", factors=None):
    """Writes a torch model; returns nothing."""
    settings, (tokens, merges) = model.config, vocabulary()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny mistral" if "mistral" in settings.model_type else "tiny")
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    rope = settings.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    width = getattr(settings, "head_dim", None) or settings.hidden_size // (
        settings.num_attention_heads
    )
    if architecture == "llama":
        writer.add_rope_dimension_count(width)
    else:
        writer.add_key_length(width)
        writer.add_value_length(width)
    if window := getattr(settings, "sliding_window", None):
        writer.add_sliding_window(window)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(256)
    writer.add_pad_token_id(257)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
    kind = gguf.GGMLQuantizationType[quantization]
    for name, value in converted(architecture, model):
        if value.ndim == 1 or quantization == "F32":
            writer.add_tensor(name, value.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_batch(rng, slots=14):
    contexts, targets = rng.integers(0, 258, (2, slots)), rng.integers(0, 258, (2, 5))
    context_mask = np.arange(slots)[::-1][None] < np.array([[slots], [3]])
    return LMBatch(contexts, context_mask, targets, np.ones((2, 5), bool))


def torch_log_probs(model, batch):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    ids = np.concatenate([batch.context_ids, batch.target_ids], axis=1)
    mask = np.concatenate([batch.context_mask, batch.target_mask], axis=1)
    with torch.no_grad():
        scores = model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask).long(),
            position_ids=torch.tensor(np.maximum(mask.cumsum(axis=1) - 1, 0)),
        ).logits[:, batch.context_ids.shape[1] - 1 : -1]
        targets = torch.tensor(batch.target_ids)[..., None]
        return scores.log_softmax(-1).gather(-1, targets)[..., 0].numpy()


def read_with_transformers(path, model_class, config_class):
    """What `from_pretrained(..., gguf_file=...)` does, which asks for accelerate first."""
    utils = pytest.importorskip(
        "transformers.modeling_gguf_pytorch_utils", reason="needs the [parity] extra"
    )
    fields = utils.load_gguf_checkpoint(path)["config"]
    model = model_class(config_class(**fields)).eval()
    tensors = utils.load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the peer
def test_log_probs_equal_what_pytorch_reads(case, quantization, tmp_path, rng):
    architecture, family, fields = FAMILIES[case]
    original = make_torch_model(family, fields)
    write_gguf(tmp_path / "tiny.gguf", architecture, original, quantization=quantization)
    model = load_language_model(str(tmp_path / "tiny.gguf"))
    batch = make_batch(rng)
    found = np.asarray(jax.jit(model.token_log_probs)(model.params, batch))
    expected = torch_log_probs(original, batch)
    if quantization == "F32":
        np.testing.assert_allclose(found, expected, atol=1e-4)
        parsed = parse_huggingface_config(original.config.to_dict())
        # Without its window, Mistral is Llama; the file does not tell them apart.
        expected_type = "llama" if case == "mistral" else parsed.model_type
        assert model.config == dataclasses.replace(parsed, model_type=expected_type)
    else:
        assert 1e-5 < np.abs(found - expected).max() < 0.1
    if case in ("llama with biases", "mistral window"):
        return  # transformers reads neither from such files
    read = read_with_transformers(tmp_path / "tiny.gguf", type(original), type(original.config))
    np.testing.assert_allclose(found, torch_log_probs(read, batch), atol=1e-4)


def llama3_factors(rope, width):
    """What the converter writes for rope_type llama3."""
    factors = []
    for i in range(width // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * i / width)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - kept) / rope["factor"] + kept))
    return factors


@pytest.mark.slow
@pytest.mark.parametrize("case", ROPES)
def test_stretched_positions_equal_pytorch(case, tmp_path, rng):
    family, rope = ROPES[case]
    kind = "llama3" if case == "factors" else case
    theta = 500000.0 if case == "llama3" else 100.0
    rope = {"rope_type": kind, "rope_theta": theta, **rope}
    fields = {"rope_parameters": rope, "max_position_embeddings": 16384}
    original = make_torch_model(family, fields)
    factors = llama3_factors(rope, 8) if kind == "llama3" else None
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama" if family == "Llama" else "qwen2", original, factors=factors)
    model = load_language_model(str(path))
    if case == "factors":
        assert isinstance(model.config.rope_scaling, FactorScaling)
    else:
        assert model.config == parse_huggingface_config(original.config.to_dict())
    assert isinstance(model.config.rope_scaling, Llama3Scaling) == (case == "llama3")
    batch = make_batch(rng, slots=40)
    found = jax.jit(model.token_log_probs)(model.params, batch)
    np.testing.assert_allclose(found, torch_log_probs(original, batch), atol=1e-4)


@pytest.mark.slow
def test_gemma3_options_equal_pytorch(tmp_path, rng):
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    fields = {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 7,
        "sliding_window": 4,
        "rope_parameters": ropes,
    }
    original = make_torch_model("Gemma3Text", fields)
    write_gguf(tmp_path / "tiny.gguf", "gemma3", original)
    model = load_language_model(str(tmp_path / "tiny.gguf"))
    assert model.config == parse_huggingface_config(original.config.to_dict())
    assert model.config.sliding_layers == (True,) * 5 + (False, True)
    batch = make_batch(rng)
    found = jax.jit(functools.partial(decoder.token_log_probs, model.config))(model.params, batch)
    np.testing.assert_allclose(found, torch_log_probs(original, batch), atol=1e-4)
