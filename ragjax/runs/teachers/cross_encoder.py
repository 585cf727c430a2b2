"""Scores of (question, passage) pairs by a cross-encoder, which needs no answer.

Q questions, K documents each.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ragjax.data import (
    DEFAULT_BUCKETS,
    Question,
    buckets_up_to,
    encode_pairs,
    length_buckets,
    pad_right,
    passage_text,
)
from ragjax.index import SearchResult
from ragjax.models.cross_encoder import CrossEncoder
from ragjax.models.inputs import PairTokens
from ragjax.runs.workspace import Workspace
from ragjax.storage.processes import host
from ragjax.training.mesh import rows_multiple, spread_rows
from ragjax.training.score_cache import ResultCache, result_key

# Padded tokens of a batch.
_BATCH_TOKENS = 4096


class PairScore(NamedTuple):
    """What a cross-encoder says of a pair."""

    logit: float


def cross_scores(
    workspace: Workspace,
    model: CrossEncoder,
    questions: Sequence[Question],
    candidates: SearchResult,
    cache: ResultCache[PairScore],
    *,
    logits: Callable[..., jax.Array],
    quiet: bool = False,
) -> np.ndarray:
    """Returns the logits `[Q, K]` float32 of all candidates; 0 where masked.

    Args:
        workspace: Passages and stop flag.
        model: The cross-encoder.
        questions: Q questions.
        candidates: `[Q, K]` documents.
        cache: Known scores; new ones are added batch by batch.
        logits: `jax.jit(model.logits)`, compiled once for all calls.
        quiet: Show no progress.
    """
    text_of = functools.cache(lambda doc: passage_text(workspace.dataset.corpus[doc]))
    texts = {
        (q, k): (questions[q].text, text_of(int(candidates.doc_ids[q, k])))
        for q, k in np.argwhere(candidates.mask).tolist()
    }
    keys = {place: result_key(model.fingerprint, *pair) for place, pair in texts.items()}
    # Batches depend only on what was known before, so those of a resumed run are identical.
    new = [place for place in texts if not cache.was_known(keys[place])]
    ids, types = encode_pairs(model.tokenizer, [texts[place] for place in new])
    batches = length_buckets(
        list(map(len, ids)),
        batch_tokens=_BATCH_TOKENS,
        buckets=buckets_up_to(model.max_length, DEFAULT_BUCKETS),
        devices=rows_multiple(model.params),
    )
    with tqdm(
        total=len(new), desc="cross-encoder", unit=" pairs", file=sys.stderr, disable=quiet
    ) as progress:
        for batch in batches:
            chosen = [keys[new[row]] for row in batch.rows]
            if any(cache.get(key) is None for key in chosen):
                filler: list[list[int]] = [[]] * (batch.batch_size - len(batch.rows))
                rows = [ids[row] for row in batch.rows] + filler
                padded = pad_right(rows, length=batch.length, pad_id=model.pad_id)
                kinds = [types[row] for row in batch.rows] + filler
                typed = pad_right(kinds, length=batch.length, pad_id=0).ids if model.typed else None
                tokens = PairTokens(
                    jnp.asarray(padded.ids),
                    jnp.asarray(padded.mask),
                    None if typed is None else jnp.asarray(typed),
                )
                found = logits(model.params, spread_rows(tokens, model.params))
                found = host(found)[: len(chosen)]
                cache.put(chosen, [PairScore(float(logit)) for logit in found])
            progress.update(len(chosen))
            workspace.stop.check()
    scores = np.zeros(candidates.mask.shape, np.float32)
    for place, key in keys.items():
        score = cache.get(key)
        assert score is not None, "every pair was scored above"
        scores[place] = score.logit
    return scores
