"""Scores of (question, document) pairs by a frozen language model, and the LSR target."""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ragjax import losses
from ragjax.data import (
    LengthBatch,
    PromptBuilder,
    Question,
    buckets_up_to,
    length_buckets,
    passage_text,
)
from ragjax.index import SearchResult
from ragjax.models.decoder.packing import PackedBatch, Suffix, pack_row
from ragjax.models.inputs import LMBatch
from ragjax.models.language_model import LanguageModel
from ragjax.runs.options.shared import LsrTarget
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.training.score_cache import ResultCache, Score, result_key

# Lengths in tokens that prompts are padded to: a document of the default 140 and a question fall
# into a few of them.
_CONTEXT_BUCKETS = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 768, 1024, 1536, 2048)
# Slots of a row that packs several questions behind their document, at most.
_PACKED_SLOTS = 384
SCORES = {
    "prob": losses.prob,
    "prob_per_token": losses.prob_per_token,
    "log_prob": losses.log_prob,
    "log_prob_per_token": losses.log_prob_per_token,
}


class TeacherScores(NamedTuple):
    """Scores of each question's candidates."""

    log_probs: np.ndarray  # [Q, K] float32, log p_LM(y | c∘x), 0 where masked
    lengths: np.ndarray  # [Q] int32, answer tokens


def score_candidates(
    workspace: Workspace,
    lm: FrozenLM,
    questions: Sequence[Question],
    candidates: SearchResult,
    cache: ResultCache[Score],
) -> TeacherScores:
    """Scores every candidate by the log-probability of the question's first answer after it.

    Questions that share a document are packed behind it, so it is read once, where the language
    model's family can do that (a causal decoder); elsewhere each pair is a row. Packing depends
    only on scores cached before this round, so a resumed run builds identical batches.

    Args:
        workspace: Data, prompts, and the size of a batch (`score_tokens`).
        lm: The language model.
        questions: Q questions.
        candidates: `[Q, K]` documents.
        cache: Known scores; new ones are added batch by batch.

    Returns:
        Log-probabilities and lengths.
    """
    pairs, lengths = _pairs(workspace, lm, questions, candidates)
    new = [pair for pair in pairs if not cache.was_known(pair.key)]
    known = len(pairs) - sum(cache.get(pair.key) is None for pair in new)
    workspace.log(f"teacher: {len(pairs):,} (question, document) pairs, {known:,} in the cache")
    with tqdm(total=len(new), desc="teacher", unit=" pairs", file=sys.stderr) as progress:
        for batch in _batches(workspace, new):
            if any(cache.get(key) is None for key in batch.keys):
                cache.put(batch.keys, _scores(workspace.lm, lm.params, batch))
            progress.update(len(batch.keys))
            workspace.stop.check()
    return _collected(cache, pairs, lengths, candidates.mask.shape)


def score_step(
    workspace: Workspace,
    lm: FrozenLM,
    questions: Sequence[Question],
    candidates: SearchResult,
    cache: ResultCache[Score],
) -> TeacherScores:
    """Scores the candidates of one training step; see `score_candidates`.

    Known scores are never computed again and the new ones are written at once, so a run that is
    resumed within the step packs the same pairs into the same batches.
    """
    pairs, lengths = _pairs(workspace, lm, questions, candidates)
    keys: list[str] = []
    scores: list[Score] = []
    for batch in _batches(workspace, [pair for pair in pairs if cache.get(pair.key) is None]):
        keys += batch.keys
        scores += _scores(workspace.lm, lm.params, batch)
    if keys:
        cache.put(keys, scores)
    return _collected(cache, pairs, lengths, candidates.mask.shape)


def target_log_probs(
    target: LsrTarget, scores: TeacherScores, candidates: SearchResult
) -> np.ndarray:
    """Returns log p_LSR `[Q, K]` float32 of the candidates.

    log p_LSR = log_softmax((g + w · z) / τ), with g the score function and z the
    z-score of the candidates' retrieval scores (w = 0 gives the papers' target).
    """
    g = np.asarray(SCORES[target.score](scores.log_probs, scores.lengths))
    if target.prior_weight:
        g = g + np.float32(target.prior_weight) * _z_scores(candidates)
    return np.asarray(
        losses.lsr_target(g, temperature=target.temperature, doc_mask=candidates.mask), np.float32
    )


def context_batches(
    prompts: PromptBuilder, lengths: Sequence[int], batch_tokens: int
) -> list[LengthBatch]:
    """Groups prompts of similar length into batches of about `batch_tokens`, few static shapes."""
    # A packed row holds targets too, and so may be longer than any context.
    longest = max([prompts.max_context_length, *lengths])
    buckets = buckets_up_to(longest, _CONTEXT_BUCKETS)
    return length_buckets(lengths, batch_tokens=batch_tokens, buckets=buckets)


def pack_batch(
    prompts: PromptBuilder,
    batch: LengthBatch,
    contexts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> LMBatch:
    """Returns the rows of a batch in its static shape; padding rows are masked.

    Args:
        prompts: Pads the rows.
        batch: Which rows of `contexts`, and the shape.
        contexts: All contexts.
        targets: Targets of the batch's rows only.
    """
    filler: list[list[int]] = [[]] * (batch.batch_size - len(batch.rows))
    packed = prompts.pack(
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


class _Pair(NamedTuple):
    """A question and one of its candidates."""

    place: tuple[int, int]  # row and column of the candidates
    key: str  # of the cache
    doc: int  # corpus row
    context: list[int]
    target: list[int]


class _Batch(NamedTuple):
    """Pairs that are scored together."""

    groups: list[list[_Pair]]  # those behind one document, by row of the batch
    tokens: PackedBatch | LMBatch

    @property
    def keys(self) -> list[str]:
        """Keys of the pairs, in the order of their scores."""
        return [pair.key for group in self.groups for pair in group]


def _pairs(
    workspace: Workspace, lm: FrozenLM, questions: Sequence[Question], candidates: SearchResult
) -> tuple[list[_Pair], np.ndarray]:
    """Returns all pairs, and the tokens of each question's answer `[Q]`."""
    prompts, corpus = workspace.prompts, workspace.dataset.corpus
    template = repr(prompts.template)
    text_of = functools.cache(lambda doc: passage_text(corpus[doc]))
    targets = [prompts.target(question.answers[0]) for question in questions]
    pairs = []
    for q, k in np.argwhere(candidates.mask).tolist():
        question, doc = questions[q], int(candidates.doc_ids[q, k])
        key = result_key(lm.fingerprint, template, question.text, question.answers[0], text_of(doc))
        context = prompts.context(question.text, workspace.documents.get([doc]))
        pairs.append(_Pair((q, k), key, doc, context, targets[q]))
    return pairs, np.array([len(target) for target in targets], np.int32)


def _batches(workspace: Workspace, pairs: Sequence[_Pair]) -> Iterator[_Batch]:
    """Yields batches of few static shapes that hold every pair once."""
    if workspace.lm.family.packed_token_log_probs:
        yield from _packed_batches(workspace, pairs)
        return
    contexts, tokens = [pair.context for pair in pairs], workspace.config.score_tokens
    for batch in context_batches(workspace.prompts, list(map(len, contexts)), tokens):
        chosen = [pairs[row] for row in batch.rows]
        packed = pack_batch(workspace.prompts, batch, contexts, [pair.target for pair in chosen])
        yield _Batch([[pair] for pair in chosen], packed)


def _packed_batches(workspace: Workspace, pairs: Sequence[_Pair]) -> Iterator[_Batch]:
    """Yields batches whose rows are one document and the questions that share it."""
    groups = _groups(pairs)
    planned = context_batches(
        workspace.prompts, list(map(_packed_length, groups)), workspace.config.score_tokens
    )
    most: dict[int, int] = {}  # target tokens of a row, by length of the batch
    for batch in planned:
        tokens = max(sum(len(pair.target) for pair in groups[row]) for row in batch.rows)
        most[batch.length] = max(most.get(batch.length, 1), tokens)
    for batch in planned:
        num_targets = -(-most[batch.length] // 8) * 8
        chosen = [groups[row] for row in batch.rows]
        rows = [
            _packed_row(group, batch.length, num_targets, workspace.lm.pad_id) for group in chosen
        ]
        rows += [rows[0]] * (batch.batch_size - len(rows))  # their scores are not read
        yield _Batch(chosen, jax.tree.map(lambda *parts: np.stack(parts), *rows))


def _groups(pairs: Sequence[_Pair]) -> list[list[_Pair]]:
    """Splits the pairs of each document into rows of at most `_PACKED_SLOTS` tokens."""
    by_doc: dict[int, list[_Pair]] = {}
    for pair in pairs:
        by_doc.setdefault(pair.doc, []).append(pair)
    groups: list[list[_Pair]] = []
    for same_doc in by_doc.values():
        groups.append([])
        for pair in same_doc:
            if groups[-1] and _packed_length([*groups[-1], pair]) > _PACKED_SLOTS:
                groups.append([])
            groups[-1].append(pair)
    return groups


def _packed_row(group: Sequence[_Pair], length: int, num_targets: int, pad_id: int) -> PackedBatch:
    shared = _shared(group)
    return pack_row(
        group[0].context[:shared],
        [Suffix(pair.context[shared:], pair.target) for pair in group],
        length=length,
        num_targets=num_targets,
        pad_id=pad_id,
    )


def _packed_length(group: Sequence[_Pair]) -> int:
    shared = _shared(group)
    return shared + sum(len(pair.context) - shared + len(pair.target) for pair in group)


def _shared(group: Sequence[_Pair]) -> int:
    """Returns how many first tokens all contexts of a group share."""
    columns = zip(*(pair.context for pair in group), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    token_log_probs: Callable[..., jax.Array], config: Any, params: Any, batch: Any
) -> jax.Array:
    return token_log_probs(config, params, batch)


def _scores(lm: LanguageModel, params: Any, batch: _Batch) -> list[Score]:
    """Returns the score of each pair of a batch, row by row."""
    function = lm.family.packed_token_log_probs or lm.family.token_log_probs
    scores = []
    for group, row in zip(
        batch.groups, np.asarray(_score(function, lm.config, params, batch.tokens)), strict=False
    ):
        start = 0
        for length in (len(pair.target) for pair in group):
            scores.append(Score(float(row[start : start + length].sum()), length))
            start += length
    return scores


def _collected(
    cache: ResultCache[Score], pairs: Sequence[_Pair], lengths: np.ndarray, shape: tuple[int, ...]
) -> TeacherScores:
    """Returns the scores of all pairs, which are known by now."""
    log_probs = np.zeros(shape, np.float32)
    for pair in pairs:
        score = cache.get(pair.key)
        assert score is not None, "every pair was scored above"
        log_probs[pair.place] = score.log_prob
    return TeacherScores(log_probs, lengths)
