"""Writes llama_reference.npz: a small random LlamaForCausalLM and what PyTorch computes with it.

Needs the [parity] extra. From the project's root:

    python tests/models/data/make_llama_reference.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT_LENGTHS, TARGET_LENGTHS = np.array([7, 3, 1]), np.array([2, 4, 1])

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=37,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=32,
    tie_word_embeddings=False,
    pad_token_id=None,
)
model = LlamaForCausalLM(config).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.5)

rng = np.random.default_rng(0)
context_ids = rng.integers(0, 37, (3, 7)).astype(np.int32)
target_ids = rng.integers(0, 37, (3, 4)).astype(np.int32)
context_mask = np.arange(7)[::-1][None] < CONTEXT_LENGTHS[:, None]
target_mask = np.arange(4)[None] < TARGET_LENGTHS[:, None]
expected = np.zeros((3, 4), np.float32)
for row in range(3):
    context = context_ids[row][context_mask[row]]
    target = target_ids[row][target_mask[row]]
    with torch.inference_mode():
        logits = model(torch.tensor(np.concatenate([context, target]))[None].long()).logits[0]
    log_probs = logits.log_softmax(-1)[len(context) - 1 : -1]
    expected[row, : len(target)] = log_probs.numpy()[np.arange(len(target)), target]

np.savez_compressed(
    Path(__file__).with_name("llama_reference.npz"),
    config=json.dumps(config.to_dict()),
    context_ids=context_ids,
    context_mask=context_mask,
    target_ids=target_ids,
    target_mask=target_mask,
    token_log_probs=expected,
    **{name: value.numpy() for name, value in model.state_dict().items()},
)
