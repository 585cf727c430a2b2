"""What a frozen language model says of (question, document) pairs: one reading, two scores.

A causal decoder reads document, question and answer one after the other, so that log p(x|c) of the
question x and log p(y|c∘x) of the answer y are sums over the tokens of one forward pass. Where the
template puts the question before the document, and with an encoder-decoder, the question is read
once more, behind the document alone.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ragjax.data import PromptBuilder, Question, passage_text
from ragjax.data.joining import DocumentIds
from ragjax.index import SearchResult
from ragjax.runs.models import score_tokens
from ragjax.runs.teachers.batches import Part, Row, RowBatch, row_batches, scored_batches
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.training.score_cache import ResultCache, Score, result_key

ANSWER, QUESTION = "answer", "question"


class TeacherScores(NamedTuple):
    """Scores of each question's candidates; 0 where masked, not wanted, or there is no answer."""

    log_probs: np.ndarray  # [Q, K] float32, log p_LM(y | c∘x)
    lengths: np.ndarray  # [Q] int32, answer tokens
    question_log_probs: np.ndarray  # [Q, K] float32, log p_LM(x | c)
    question_lengths: np.ndarray  # [Q] int32, question tokens


class Pair(NamedTuple):
    """A question, its answer, and a document; keys name their scores, None: not wanted."""

    question: str
    answer: str | None
    doc: int  # pairs of one document are packed behind it
    document: DocumentIds
    answer_key: str | None
    question_key: str | None


def score_candidates(
    workspace: Workspace,
    lm: FrozenLM,
    questions: Sequence[Question],
    candidates: SearchResult,
    cache: ResultCache[Score],
    *,
    wanted: Sequence[str] = (ANSWER,),
) -> TeacherScores:
    """Scores every candidate by the log-probabilities of the question and its first answer.

    Batches depend only on scores cached before this round, so a resumed run builds identical ones.

    Args:
        workspace: Data, prompts, and the size of a batch (`score_tokens`).
        lm: The language model.
        questions: Q questions; the question alone is scored of one without an answer.
        candidates: `[Q, K]` documents.
        cache: Known scores; new ones are added batch by batch.
        wanted: `answer`, `question` or both.

    Returns:
        Log-probabilities and lengths.
    """
    pairs = _pairs(workspace, lm, questions, candidates, wanted)
    unknown = [pair for pair in pairs.values() if not all(map(cache.was_known, _keys(pair)))]
    rows = pair_rows(workspace.prompts, unknown)
    new = [row for row in rows if not all(map(cache.was_known, row.keys))]
    known = sum(_known(cache, _keys(pair)) for pair in pairs.values())
    workspace.log(f"teacher: {len(pairs):,} (question, document) pairs, {known:,} in the cache")
    with tqdm(total=len(new), desc="teacher", unit=" pairs", file=sys.stderr) as progress:
        batches = row_batches(workspace.lm, workspace.prompts, new, _tokens(workspace))

        def missing() -> Iterator[RowBatch]:
            for batch in batches:
                if all(_known(cache, row.keys) for row in batch.rows):
                    progress.update(len(batch.rows))
                else:
                    yield batch

        for batch, scores in scored_batches(workspace.lm, lm.params, missing()):
            _put(cache, scores)
            progress.update(len(batch.rows))
            workspace.stop.check()
    return _collected(cache, pairs, candidates.mask.shape)


def score_step(
    workspace: Workspace,
    lm: FrozenLM,
    questions: Sequence[Question],
    candidates: SearchResult,
    cache: ResultCache[Score],
    *,
    wanted: Sequence[str] = (ANSWER,),
) -> TeacherScores:
    """Scores the candidates of one training step; see `score_candidates`.

    Known scores are never computed again and the new ones are written at once, so a run that is
    resumed within the step packs the same pairs into the same batches.
    """
    pairs = _pairs(workspace, lm, questions, candidates, wanted)
    unknown = [pair for pair in pairs.values() if not _known(cache, _keys(pair))]
    rows = pair_rows(workspace.prompts, unknown)
    new = [row for row in rows if not _known(cache, row.keys)]
    scores: dict[str, tuple[float, int]] = {}
    batches = row_batches(workspace.lm, workspace.prompts, new, _tokens(workspace))
    for _, found in scored_batches(workspace.lm, lm.params, batches):
        scores |= found
    if scores:
        _put(cache, scores)
    return _collected(cache, pairs, candidates.mask.shape)


def no_scores(shape: tuple[int, ...]) -> TeacherScores:
    """Returns the scores of `[Q, K]` candidates of which nothing is wanted."""
    zeros, none = np.zeros(shape, np.float32), np.zeros(shape[0], np.int32)
    return TeacherScores(zeros, none, zeros.copy(), none.copy())


def pair_rows(prompts: PromptBuilder, pairs: Iterable[Pair]) -> list[Row]:
    """Returns the rows in which pairs are read: one of each, or one of each score."""
    answers = functools.cache(prompts.target)
    rows: list[Row] = []
    for pair in pairs:
        question, document = pair.question, pair.document
        if pair.question_key is None or not prompts.asks_after_document:
            if pair.answer_key is not None:
                rows.append(_answer_row(prompts, pair, answers))
            if pair.question_key is not None:
                context, target = prompts.question_reading(question, document)
                parts = (Part(pair.question_key, 0, len(target)),)
                rows.append(Row(pair.doc, context, target, parts))
            continue
        context = prompts.context(question, [document])
        start, end = prompts.question_place(question, document)
        parts = (Part(pair.question_key, 0, end - start),)
        target = context[start:end]
        if pair.answer_key is not None and pair.answer is not None:
            target, answer = context[start:], answers(pair.answer)
            whole = len(target) + len(answer)
            parts += (Part(pair.answer_key, len(target), whole),)
            target += answer
        rows.append(Row(pair.doc, context[:start], target, parts))
    return rows


def _answer_row(prompts: PromptBuilder, pair: Pair, answers: Callable[[str], list[int]]) -> Row:
    assert pair.answer is not None and pair.answer_key is not None, "a key names an answer's score"
    target = answers(pair.answer)
    context = prompts.context(pair.question, [pair.document])
    return Row(pair.doc, context, target, (Part(pair.answer_key, 0, len(target)),))


def _tokens(workspace: Workspace) -> int:
    return score_tokens(workspace.config)


def _put(cache: ResultCache[Score], scores: dict[str, tuple[float, int]]) -> None:
    cache.put(list(scores), [Score(*score) for score in scores.values()])


def _known(cache: ResultCache[Score], keys: Sequence[str]) -> bool:
    return all(cache.get(key) is not None for key in keys)


def _keys(pair: Pair) -> list[str]:
    return [key for key in (pair.answer_key, pair.question_key) if key is not None]


def _pairs(
    workspace: Workspace,
    lm: FrozenLM,
    questions: Sequence[Question],
    candidates: SearchResult,
    wanted: Sequence[str],
) -> dict[tuple[int, int], Pair]:
    """Returns all pairs by row and column of the candidates."""
    template, corpus = repr(workspace.prompts.template), workspace.dataset.corpus
    text_of = functools.cache(lambda doc: passage_text(corpus[doc]))
    pairs = {}
    for q, k in np.argwhere(candidates.mask).tolist():
        question, doc = questions[q], int(candidates.doc_ids[q, k])
        answer = question.answers[0] if question.answers else None

        def key(what: str | None, question: str = question.text, doc: int = doc) -> str:
            return result_key(lm.fingerprint, template, question, what, text_of(doc))

        pairs[q, k] = Pair(
            question.text,
            answer,
            doc,
            workspace.documents.get([doc])[0],
            key(answer) if ANSWER in wanted and answer is not None else None,
            key(None) if QUESTION in wanted else None,
        )
    return pairs


def _collected(
    cache: ResultCache[Score], pairs: dict[tuple[int, int], Pair], shape: tuple[int, ...]
) -> TeacherScores:
    """Returns the scores of all pairs, which are known by now."""
    scores = no_scores(shape)
    for (q, k), pair in pairs.items():
        for key, log_probs, lengths in (
            (pair.answer_key, scores.log_probs, scores.lengths),
            (pair.question_key, scores.question_log_probs, scores.question_lengths),
        ):
            if key is not None:
                score = cache.get(key)
                assert score is not None, "every pair was scored above"
                log_probs[q, k], lengths[q] = score.log_prob, score.length
    return scores
