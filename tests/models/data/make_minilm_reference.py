"""Writes minilm_reference.json: what sentence-transformers computes with MiniLM-L6-v2.

Needs the [parity] extra. From the project's root, with the folder of the model files:

    python tests/models/data/make_minilm_reference.py FOLDER

where FOLDER is what `ragjax.models.resolve_source(ragjax.models.DEFAULT_ENCODER)` returns.
"""

import json
import sys
from pathlib import Path

import numpy as np
import sentence_transformers
import torch

TEXTS = [
    "How do I split a random key in jax?",
    "numpy.linalg.svd returns the singular values in descending order.",
    "",
    "Ein Satz auf Deutsch mit Umlauten: schöne Grüße!",
    "word " * 400,  # longer than the 256 tokens the model reads
    "def scan(f, init, xs):\n    return init, xs",
]

model = sentence_transformers.SentenceTransformer(sys.argv[1], device="cpu")
model.eval()
with torch.inference_mode():
    embeddings = model.encode(TEXTS)
    pooled = [model[1](model[0](model.tokenize([text])))["sentence_embedding"] for text in TEXTS]
reference = {
    "made_with": f"sentence-transformers {sentence_transformers.__version__}, "
    f"torch {torch.__version__}",
    "texts": TEXTS,
    "first_16": [[float(f"{x:.8f}") for x in row[:16]] for row in embeddings],
    "pooled_norm": [float(f"{np.linalg.norm(row.numpy()):.6f}") for row in pooled],
}
path = Path(__file__).with_name("minilm_reference.json")
path.write_text(json.dumps(reference, indent=1) + "\n", encoding="utf-8")
