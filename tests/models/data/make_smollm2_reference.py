"""Writes smollm2_reference.json: log-probabilities by PyTorch with SmolLM2-135M-Instruct.

Needs the [parity] extra. The weights come from the package's GGUF file through the gguf package,
independently of ragjax's loader. From the project's root, with the path of that file:

    python tests/models/data/make_smollm2_reference.py FILE.gguf

where FILE.gguf is what `ragjax.models.resolve_source(ragjax.models.DEFAULT_LM)` returns.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

CASES = [
    ("The capital of France is", " Paris."),
    ("Split a random key in jax with", " jax.random.split(key, 2)\n"),
    ("Im Jahr 1989 fiel die Mauer in", " Berlin, schöne Grüße 😀"),
    ("The virus spreads by droplets.\n\nQuestion: How does it spread?\nAnswer:", " droplets"),
]
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
HEADS = {"attn_q": 9, "attn_k": 3}


def read_weights(reader):
    weights = {}
    for tensor in reader.tensors:
        value = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if tensor.name == "token_embd.weight":
            weights["model.embed_tokens.weight"] = weights["lm_head.weight"] = value
        elif tensor.name == "output_norm.weight":
            weights["model.norm.weight"] = value
        else:
            _, layer, part, kind = tensor.name.split(".")
            if heads := HEADS.get(part):
                # llama.cpp interleaves the two halves of each head.
                halves = [value.reshape(heads, 64, -1)[:, start::2] for start in (0, 1)]
                value = np.concatenate(halves, axis=1).reshape(value.shape)
            weights[f"model.layers.{layer}.{NAMES[part]}.{kind}"] = value
    return {name: torch.tensor(value) for name, value in weights.items()}


def read_tokenizer(reader):
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    vocab = {token: place for place, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    return tokenizer


reader = gguf.GGUFReader(sys.argv[1])
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        pad_token_id=None,
    )
).eval()
model.load_state_dict(read_weights(reader))
tokenizer = read_tokenizer(reader)

cases = []
for context, target in CASES:
    context_ids, target_ids = tokenizer.encode(context).ids, tokenizer.encode(target).ids
    with torch.inference_mode():
        logits = model(torch.tensor([[*context_ids, *target_ids]])).logits[0]
    log_probs = logits.log_softmax(-1)[len(context_ids) - 1 : -1].numpy()
    cases.append(
        {
            "context": context,
            "target": target,
            "context_ids": context_ids,
            "target_ids": target_ids,
            "token_log_probs": [
                round(float(value), 6)
                for value in log_probs[np.arange(len(target_ids)), target_ids]
            ],
        }
    )
path = Path(__file__).with_name("smollm2_reference.json")
text = json.dumps({"made_with": f"torch {torch.__version__}", "cases": cases}, indent=1)
path.write_text(text + "\n", encoding="utf-8")
