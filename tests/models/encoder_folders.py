"""What the tests of encoders share: embedding a few texts, changing a file of settings."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from ragjax.models import Tokens


def tokenize(encoder, texts):
    rows = [encoder.tokenizer.encode(text).ids for text in texts]
    # Truncate as BERT does: keep the last token, the separator.
    limit = encoder.max_length
    rows = [row if len(row) <= limit else row[: limit - 1] + row[-1:] for row in rows]
    length = max(len(row) for row in rows)
    ids = np.full((len(rows), length), encoder.pad_id, np.int32)
    mask = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return Tokens(jnp.asarray(ids), jnp.asarray(mask))


def embed(encoder, texts):
    run = jax.jit(encoder.encode)
    return np.asarray(run(encoder.params, tokenize(encoder, texts)))


def edit_json(path, **fields):
    value = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(value | fields))
