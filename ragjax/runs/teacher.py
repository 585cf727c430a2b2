"""The language model as teacher: scores of (question, document) pairs, and the LSR target."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ragjax.data import LengthBatch, Question, buckets_up_to, length_buckets, passage_text
from ragjax.index import SearchResult
from ragjax.losses import (
    log_prob,
    log_prob_per_token,
    lsr_target,
    prob,
    prob_per_token,
)
from ragjax.models.decoder.packing import PackedBatch, Suffix, pack_row
from ragjax.models.inputs import LMBatch
from ragjax.runs.options.shared import LsrTarget
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.training.score_cache import ResultCache, Score, result_key

# Lengths in tokens that prompts are padded to: a document of the default 140 and a question fall
# into a few of them.
_CONTEXT_BUCKETS = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 768, 1024, 1536, 2048)
# Slots of a row that packs several questions behind their document, at most.
_PACKED_SLOTS = 384
SCORES = {
    "prob": prob,
    "prob_per_token": prob_per_token,
    "log_prob": log_prob,
    "log_prob_per_token": log_prob_per_token,
}


class TeacherScores(NamedTuple):
    """What the teacher thinks of each question's candidates."""

    log_probs: np.ndarray  # [Q, K] float32, log p_LM(y | c∘x), 0 where masked
    lengths: np.ndarray  # [Q] int32, answer tokens


def score_candidates(
    workspace: Workspace,
    teacher: FrozenLM,
    questions: Sequence[Question],
    candidates: SearchResult,
    cache: ResultCache[Score],
) -> TeacherScores:
    """Scores every candidate by the log-probability of the question's first answer after it.

    Questions that share a document are packed behind it, so it is read once, where the language
    model's family can do that (a causal decoder); elsewhere each pair is a row. What is packed
    with what depends on what earlier rounds knew, never on how far a killed run came: continuing
    it gives the same numbers.

    Args:
        workspace: Data, prompts, and the size of a batch (`score_tokens`).
        teacher: The frozen language model.
        questions: Q questions.
        candidates: `[Q, K]` documents.
        cache: Scores known already; new ones are added batch by batch.

    Returns:
        Log-probabilities and lengths.
    """
    work = _Work(workspace, teacher, questions, candidates)
    new = [row for row, key in enumerate(work.keys) if not cache.was_known(key)]
    known = len(work.keys) - sum(cache.get(work.keys[row]) is None for row in new)
    workspace.report(
        f"teacher: {len(work.keys):,} (question, document) pairs, {known:,} in the cache"
    )
    with tqdm(total=len(new), desc="teacher", unit=" pairs", file=sys.stderr) as progress:
        for batch in work.packer.batches(new):
            keys = work.keys_of(batch)
            if any(cache.get(key) is None for key in keys):
                cache.put(keys, work.compute(batch))
            progress.update(len(keys))
            workspace.stop.check()
    return work.collect(cache)


def score_step(
    workspace: Workspace,
    teacher: FrozenLM,
    questions: Sequence[Question],
    candidates: SearchResult,
    cache: ResultCache[Score],
) -> TeacherScores:
    """Scores the candidates of one training step; see `score_candidates`.

    Known scores are never computed again and the new ones are written at once, so a run that is
    continued within the step packs the same pairs into the same batches.
    """
    work = _Work(workspace, teacher, questions, candidates)
    unknown = [row for row, key in enumerate(work.keys) if cache.get(key) is None]
    keys: list[str] = []
    scores: list[Score] = []
    for batch in work.packer.batches(unknown):
        keys += work.keys_of(batch)
        scores += work.compute(batch)
    if keys:
        cache.put(keys, scores)
    return work.collect(cache)


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
        lsr_target(g, temperature=target.temperature, doc_mask=candidates.mask), np.float32
    )


def context_batches(workspace: Workspace, lengths: Sequence[int]) -> list[LengthBatch]:
    """Groups prompts of similar length into batches of about `score_tokens`, few static shapes."""
    # A packed row holds targets too, and so may be longer than any context.
    longest = max([workspace.prompts.max_context_length, *lengths])
    buckets = buckets_up_to(longest, _CONTEXT_BUCKETS)
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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    token_log_probs: Callable[..., jax.Array], config: Any, params: Any, batch: Any
) -> jax.Array:
    return token_log_probs(config, params, batch)


class _Work:
    """The (question, document) pairs of some candidates and how they are scored."""

    def __init__(
        self,
        workspace: Workspace,
        teacher: FrozenLM,
        questions: Sequence[Question],
        candidates: SearchResult,
    ):
        self._workspace, self._teacher, self._mask = workspace, teacher, candidates.mask
        self._pairs = [(int(q), int(k)) for q, k in np.argwhere(candidates.mask)]
        docs = [int(candidates.doc_ids[pair]) for pair in self._pairs]
        self.keys = _keys(workspace, teacher, questions, self._pairs, docs)
        self._targets = [workspace.prompts.target(question.answers[0]) for question in questions]
        contexts = [
            workspace.prompts.context(questions[q].text, workspace.documents.get([doc]))
            for (q, _), doc in zip(self._pairs, docs, strict=True)
        ]
        targets = [self._targets[q] for q, _ in self._pairs]
        family = workspace.lm.family
        packed = family.packed_token_log_probs
        self._token_log_probs = packed or family.token_log_probs
        make_packer = _Packer if packed else _Rows
        self.packer = make_packer(workspace, docs, contexts, targets)

    def keys_of(self, batch: "_PackedGroups") -> list[str]:
        """Returns the keys of the pairs of a batch, in the order of their scores."""
        return [self.keys[row] for group in batch.groups for row in group]

    def compute(self, batch: "_PackedGroups") -> list[Score]:
        """Runs the language model over a batch."""
        config = self._workspace.lm.config
        log_probs = _score(self._token_log_probs, config, self._teacher.params, batch.packed)
        return list(self.packer.scores(batch, np.asarray(log_probs)))

    def collect(self, cache: ResultCache[Score]) -> TeacherScores:
        """Reads the scores of all pairs, which are known by now."""
        log_probs = np.zeros(self._mask.shape, np.float32)
        for pair, key in zip(self._pairs, self.keys, strict=True):
            log_probs[pair] = _found(cache, key).log_prob
        lengths = np.array([len(target) for target in self._targets], np.int32)
        return TeacherScores(log_probs, lengths)


class _PackedGroups(NamedTuple):
    groups: list[list[int]]  # pairs behind one document, by row of the batch
    packed: PackedBatch | LMBatch


class _Packer:
    """Lays pairs out in rows of one document and the questions that share it."""

    def __init__(
        self,
        workspace: Workspace,
        docs: Sequence[int],
        contexts: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
    ):
        self._workspace, self._docs = workspace, docs
        self._contexts, self._targets = contexts, targets

    def batches(self, pairs: Sequence[int]) -> Iterator[_PackedGroups]:
        """Yields batches of few static shapes that hold every pair once."""
        groups = self._groups(pairs)
        lengths = [self._used(group) for group in groups]
        planned = context_batches(self._workspace, lengths)
        scored = [sum(len(self._targets[pair]) for pair in group) for group in groups]
        most: dict[int, int] = {}
        for batch in planned:
            here = max(scored[row] for row in batch.rows)
            most[batch.length] = max(most.get(batch.length, 1), here)
        for batch in planned:
            num_targets = -(-most[batch.length] // 8) * 8
            chosen = [groups[row] for row in batch.rows]
            rows = [self._row(group, batch.length, num_targets) for group in chosen]
            rows += [rows[0]] * (batch.batch_size - len(rows))  # their scores are not read
            yield _PackedGroups(chosen, jax.tree.map(lambda *parts: np.stack(parts), *rows))

    def scores(self, batch: _PackedGroups, log_probs: np.ndarray) -> Iterator[Score]:
        """Yields the score of each pair of a batch, row by row."""
        for group, row in zip(batch.groups, log_probs, strict=False):
            start = 0
            for pair in group:
                length = len(self._targets[pair])
                yield Score(float(row[start : start + length].sum()), length)
                start += length

    def _groups(self, pairs: Sequence[int]) -> list[list[int]]:
        """Splits the pairs of each document into rows of at most `_PACKED_SLOTS` tokens."""
        by_doc: dict[int, list[int]] = {}
        for pair in pairs:
            by_doc.setdefault(self._docs[pair], []).append(pair)
        groups: list[list[int]] = []
        for same_doc in by_doc.values():
            group: list[int] = []
            for pair in same_doc:
                if group and self._used([*group, pair]) > _PACKED_SLOTS:
                    groups.append(group)
                    group = []
                group.append(pair)
            groups.append(group)
        return groups

    def _shared(self, group: Sequence[int]) -> int:
        """Returns how many first tokens all contexts of a group share."""
        columns = zip(*(self._contexts[pair] for pair in group), strict=False)
        shared = 0
        for column in columns:
            if any(token != column[0] for token in column):
                break
            shared += 1
        return shared

    def _used(self, group: Sequence[int]) -> int:
        shared = self._shared(group)
        return shared + sum(
            len(self._contexts[pair]) - shared + len(self._targets[pair]) for pair in group
        )

    def _row(self, group: Sequence[int], length: int, num_targets: int) -> PackedBatch:
        shared = self._shared(group)
        suffixes = [Suffix(self._contexts[pair][shared:], self._targets[pair]) for pair in group]
        return pack_row(
            self._contexts[group[0]][:shared],
            suffixes,
            length=length,
            num_targets=num_targets,
            pad_id=self._workspace.lm.pad_id,
        )


class _Rows(_Packer):
    """Lays each pair out in a row of its own."""

    def batches(self, pairs: Sequence[int]) -> Iterator[_PackedGroups]:
        """Yields batches of few static shapes that hold every pair once."""
        contexts = [self._contexts[pair] for pair in pairs]
        for batch in context_batches(self._workspace, [len(context) for context in contexts]):
            chosen = [pairs[row] for row in batch.rows]
            targets = [self._targets[pair] for pair in chosen]
            packed = pack_batch(self._workspace, batch, contexts, targets)
            yield _PackedGroups([[pair] for pair in chosen], packed)


def _found(cache: ResultCache[Score], key: str) -> Score:
    score = cache.get(key)
    assert score is not None, "every pair was scored above"
    return score


def _keys(
    workspace: Workspace,
    teacher: FrozenLM,
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
