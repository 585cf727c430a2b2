"""The language model as teacher: scores of (question, document) pairs, and the LSR target."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ragjax.data import LengthBatch, Question, length_buckets, passage_text
from ragjax.index import SearchResult
from ragjax.losses import log_prob, log_prob_per_token, lsr_target, prob, prob_per_token
from ragjax.models.inputs import LMBatch
from ragjax.adaptation.config import RetrieverConfig
from ragjax.adaptation.workspace import Workspace
from ragjax.training.score_cache import ResultCache, Score, result_key

# Lengths in tokens that prompts are padded to: a document of the default 140 and a question fall
# into a few of them.
_CONTEXT_BUCKETS = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 768, 1024, 1536, 2048)
SCORES = {
    "prob": prob,
    "prob_per_token": prob_per_token,
    "log_prob": log_prob,
    "log_prob_per_token": log_prob_per_token,
}


class Teacher(NamedTuple):
    """A frozen language model: its parameters and what identifies them."""

    params: Any
    fingerprint: str


class TeacherScores(NamedTuple):
    """What the teacher thinks of each question's candidates."""

    log_probs: np.ndarray  # [Q, K] float32, log p_LM(y | c∘x), 0 where masked
    lengths: np.ndarray  # [Q] int32, answer tokens


def score_candidates(
    workspace: Workspace,
    teacher: Teacher,
    questions: Sequence[Question],
    candidates: SearchResult,
    cache: ResultCache[Score],
) -> TeacherScores:
    """Scores every candidate by the log-probability of the question's first answer after it.

    Pairs are grouped by length in an order that does not depend on what the cache holds, so a
    killed run that goes on computes the same numbers as one that was not.

    Args:
        workspace: Data, prompts, and the size of a batch (`score_tokens`).
        teacher: The frozen language model.
        questions: Q questions.
        candidates: `[Q, K]` documents.
        cache: Scores known already; new ones are added batch by batch.

    Returns:
        Log-probabilities and lengths.
    """
    pairs = [(int(q), int(k)) for q, k in np.argwhere(candidates.mask)]
    rows = [int(candidates.doc_ids[pair]) for pair in pairs]
    keys = _keys(workspace, teacher, questions, pairs, rows)
    known = {key: score for key in keys if (score := cache.get(key)) is not None}
    workspace.report(
        f"teacher: {len(pairs):,} (question, document) pairs, {len(known):,} of them in the cache"
    )
    targets = [workspace.prompts.target(question.answers[0]) for question in questions]
    contexts = [
        workspace.prompts.context(questions[q].text, workspace.documents.get([row]))
        for (q, _), row in zip(pairs, rows, strict=True)
    ]
    score = jax.jit(workspace.lm.token_log_probs)
    with tqdm(total=len(pairs), desc="teacher", unit=" pairs", file=sys.stderr) as progress:
        for batch in context_batches(workspace, [len(context) for context in contexts]):
            batch_keys = [keys[row] for row in batch.rows]
            if not all(key in known for key in batch_keys):
                packed = pack_batch(
                    workspace, batch, contexts, [targets[pairs[row][0]] for row in batch.rows]
                )
                sums = np.asarray(score(teacher.params, packed)).sum(axis=1)
                lengths = [len(targets[pairs[row][0]]) for row in batch.rows]
                scores = [Score(float(v), n) for v, n in zip(sums, lengths, strict=False)]
                cache.put(batch_keys, scores)
                known |= dict(zip(batch_keys, scores, strict=True))
            progress.update(len(batch.rows))
            workspace.stop.check()
    log_probs = np.zeros(candidates.mask.shape, np.float32)
    for pair, key in zip(pairs, keys, strict=True):
        log_probs[pair] = known[key].log_prob
    return TeacherScores(log_probs, np.array([len(target) for target in targets], np.int32))


def target_log_probs(
    config: RetrieverConfig, scores: TeacherScores, candidates: SearchResult
) -> np.ndarray:
    """Returns log p_LSR `[Q, K]` float32 of the candidates.

    log p_LSR = log_softmax((g + w · z) / τ), with g the score function of the config and z the
    z-score of the candidates' retrieval scores (w = 0 gives the papers' target).
    """
    g = np.asarray(SCORES[config.score](scores.log_probs, scores.lengths))
    if config.prior_weight:
        g = g + np.float32(config.prior_weight) * _z_scores(candidates)
    return np.asarray(
        lsr_target(g, temperature=config.temperature, doc_mask=candidates.mask), np.float32
    )


def context_batches(workspace: Workspace, lengths: Sequence[int]) -> list[LengthBatch]:
    """Groups prompts of similar length into batches of about `score_tokens`, few static shapes."""
    longest = workspace.prompts.max_context_length
    buckets = [length for length in _CONTEXT_BUCKETS if length < longest] + [longest]
    return length_buckets(lengths, batch_tokens=workspace.config.score_tokens, buckets=buckets)


def pack_batch(
    workspace: Workspace,
    batch: LengthBatch,
    contexts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> LMBatch:
    """Returns the rows of a batch in its static shape; rows to spare are masked.

    Args:
        workspace: Prompts.
        batch: Which rows of `contexts`, and the shape.
        contexts: All contexts.
        targets: Targets of the batch's rows only.
    """
    filler: list[list[int]] = [[]] * (batch.batch_size - len(batch.rows))
    packed = workspace.prompts.pack(
        [contexts[row] for row in batch.rows] + filler,
        [*targets, *filler],
        context_length=batch.length,
    )
    return LMBatch(*packed)  # pyrefly: ignore[bad-argument-type]  (jax takes numpy arrays)


def _z_scores(candidates: SearchResult) -> np.ndarray:
    scores = np.where(candidates.mask, candidates.scores, np.nan)
    with np.errstate(invalid="ignore"):
        spread = np.nanstd(scores, axis=1, keepdims=True)
        z = (scores - np.nanmean(scores, axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
    return np.nan_to_num(z).astype(np.float32)


def _keys(
    workspace: Workspace,
    teacher: Teacher,
    questions: Sequence[Question],
    pairs: Sequence[tuple[int, int]],
    rows: Sequence[int],
) -> list[str]:
    prompt = repr(workspace.prompts.template)
    texts: dict[int, str] = {}
    keys = []
    for (q, _), row in zip(pairs, rows, strict=True):
        if row not in texts:
            texts[row] = passage_text(workspace.dataset.corpus[row])
        question = questions[q]
        answer = question.answers[0]
        keys.append(result_key(teacher.fingerprint, prompt, question.text, answer, texts[row]))
    return keys
