"""Answers of the language model over retrieved documents, each computed once.

Q requests, K documents each, L prompt slots.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ragjax.data import LengthBatch, Question, passage_text
from ragjax.generation import Limits, Prompts, score_and_generate
from ragjax.models.inputs import LMBatch
from ragjax.models.language_model import LanguageModel
from ragjax.models.seq2seq.fusion import fusion_decoder
from ragjax.runs.models import score_tokens
from ragjax.runs.options.modes import MODES
from ragjax.runs.teachers.batches import context_batches, pack_batch
from ragjax.runs.tokens import prompt_end_id
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.storage.processes import host
from ragjax.training.mesh import rows_multiple, spread_rows
from ragjax.training.score_cache import ResultCache, result_key

# Base models often begin an answer on a new line: without a first token the line break would end
# it, and the baselines would look worse than they are.
_MIN_NEW_TOKENS = 1
_LENGTH_MULTIPLE = 32  # of the lengths that prompts are padded to


class Request(NamedTuple):
    """A question with the documents to answer it from."""

    question: Question
    docs: tuple[int, ...]  # corpus rows, best first; none: closed book
    doc_scores: tuple[float, ...]  # logits of p_R of those documents


class ScoredAnswer(NamedTuple):
    """What the language model generates, and the NLL of the right answer."""

    prediction: str
    nll: float | None  # nats per token of the first right answer; None where there is none
    # Of the generated tokens, the one that ends the answer included; None: not recorded.
    log_prob: float | None = None  # nats
    num_tokens: int | None = None


def answer_requests(
    workspace: Workspace,
    model: FrozenLM,
    requests: Sequence[Request],
    cache: ResultCache[ScoredAnswer],
) -> list[ScoredAnswer]:
    """Answers each request; requests that read the same prompt are answered once.

    A request without documents is answered closed book, in every mode.

    Args:
        workspace: Data, prompts, options.
        model: The language model that answers.
        requests: Q requests.
        cache: Answers known already; new ones are added batch by batch. Answers that were kept
            without their probability are computed again.

    Returns:
        Q answers.
    """
    keys = [_key(workspace, model, request) for request in requests]
    unique = dict(zip(keys, requests, strict=True))  # in order of first mention
    apart = MODES[workspace.config.mode].apart
    # A prompt without documents is short: together with the others it would only add shapes.
    for has_docs in (False, True):
        chosen = {key: request for key, request in unique.items() if bool(request.docs) == has_docs}
        if chosen:
            plan = (_plan_apart if apart and has_docs else _plan_joined)(
                workspace, model, list(chosen.values())
            )
            _answer_missing(workspace, list(chosen), list(chosen.values()), plan, cache)
    answers = [cache.get(key) for key in keys]
    return [answer for answer in answers if answer is not None]


def answer_limits(lm: LanguageModel, max_new_tokens: int) -> Limits:
    """Returns limits that end answers at their end token and at every token with a line break."""
    vocabulary = lm.tokenizer.get_vocab(with_added_tokens=True).values()
    texts = lm.tokenizer.decode_batch([[index] for index in sorted(vocabulary)])
    breaks = [index for index, text in zip(sorted(vocabulary), texts, strict=True) if "\n" in text]
    end_id = prompt_end_id(lm)
    ends = lm.eos_ids if end_id is None else (*lm.eos_ids, end_id)
    return Limits(
        max_new_tokens=max_new_tokens,
        stop_ids=tuple(sorted({*ends, *breaks})),
        min_new_tokens=_MIN_NEW_TOKENS,
    )


def _key(workspace: Workspace, model: FrozenLM, request: Request) -> str:
    evaluation = workspace.config.evaluation
    corpus = workspace.dataset.corpus
    scores = [round(score, 6) for score in request.doc_scores]
    mode = MODES[workspace.config.mode]
    beams = [evaluation.beams] if mode.beams and request.docs else []
    name = workspace.config.mode + " and null" * (mode.fused and workspace.config.fuses_null)
    return result_key(
        model.fingerprint,
        repr(workspace.prompts.template),
        name if request.docs else "closed_book",
        [_MIN_NEW_TOKENS, evaluation.max_new_tokens, *beams],
        request.question.text,
        list(request.question.answers[:1]),
        [passage_text(corpus[row]) for row in request.docs],
        scores if mode.apart and not mode.fused else [],
    )


def _is_known(cache: ResultCache[ScoredAnswer], key: str) -> bool:
    answer = cache.get(key)
    return answer is not None and answer.log_prob is not None


def _targets(workspace: Workspace, requests: Sequence[Request]) -> list[list[int]]:
    return [
        workspace.prompts.target(request.question.answers[0]) if request.question.answers else []
        for request in requests
    ]


class _Plan(NamedTuple):
    """How requests are answered, batch by batch."""

    batches: list[LengthBatch]
    unit: str  # of the progress bar
    # batch -> the result of a function of `ragjax.generation`, and -log p of the right answers
    answer: Callable[[LengthBatch], tuple[Any, np.ndarray]]


def _answer_missing(
    workspace: Workspace,
    keys: Sequence[str],
    requests: Sequence[Request],
    plan: _Plan,
    cache: ResultCache[ScoredAnswer],
) -> None:
    """Adds the answers that the cache does not have."""
    lengths = list(map(len, _targets(workspace, requests)))
    with tqdm(total=len(requests), desc="answers", unit=plan.unit, file=sys.stderr) as progress:
        for batch in plan.batches:
            rows = batch.rows.tolist()
            if not all(_is_known(cache, keys[row]) for row in rows):
                generated, nlls = plan.answer(batch)
                chosen = [keys[row] for row in rows]
                _store(workspace, cache, chosen, generated, nlls, [lengths[row] for row in rows])
            progress.update(len(rows))
            workspace.stop.check()


def _plan_joined(workspace: Workspace, model: FrozenLM, requests: Sequence[Request]) -> _Plan:
    contexts = [
        workspace.prompts.context(r.question.text, workspace.documents.get(r.docs))
        for r in requests
    ]
    targets, tokens = _targets(workspace, requests), score_tokens(workspace.config)
    limits = answer_limits(workspace.lm, workspace.config.evaluation.max_new_tokens)

    def answer(batch: LengthBatch) -> tuple[Any, np.ndarray]:
        chosen = [targets[row] for row in batch.rows]
        packed = spread_rows(pack_batch(workspace.prompts, batch, contexts, chosen), model.params)
        result = score_and_generate(workspace.lm.decoder, model.params, packed, limits)
        return result.generated, -host(result.token_log_probs).sum(axis=1)

    batches = _even_batches(list(map(len, contexts)), tokens, rows_multiple(model.params))
    return _Plan(batches, " prompts", answer)


def _even_batches(lengths: Sequence[int], batch_tokens: int, devices: int) -> list[LengthBatch]:
    """Groups prompts into batches of two static shapes at most, of so many tokens a device, about.

    Compiling a shape in which answers are generated takes as long as answering several prompts. The
    lengths are the longest, and the one below it that leaves the fewest slots empty.
    """
    padded = np.array([-(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE for length in lengths])
    longest = int(padded.max())
    slots = {short: np.where(padded <= short, short, longest).sum() for short in set(padded)}
    split = min(sorted(slots), key=lambda short: slots[short])
    batches = []
    for length, rows in (
        (longest, np.flatnonzero(padded > split)),
        (split, np.flatnonzero(padded <= split)),
    ):
        if len(rows):
            count = -(-len(rows) // (max(1, batch_tokens // int(length)) * devices))
            size = -(-len(rows) // (count * devices)) * devices
            batches += [
                LengthBatch(rows[start : start + size], int(length), size)
                for start in range(0, len(rows), size)
            ]
    return batches


def _plan_apart(workspace: Workspace, model: FrozenLM, requests: Sequence[Request]) -> _Plan:
    evaluation, mode = workspace.config.evaluation, MODES[workspace.config.mode]
    options = {"beams": evaluation.beams} if mode.beams else {}
    contexts = [
        [workspace.prompts.context(r.question.text, workspace.documents.get([d])) for d in r.docs]
        for r in requests
    ]
    if mode.fused and workspace.config.fuses_null:
        for request, group in zip(requests, contexts, strict=True):
            group.append(workspace.prompts.context(request.question.text))
    count = max(map(len, contexts))
    targets = _targets(workspace, requests)
    limits = answer_limits(workspace.lm, workspace.config.evaluation.max_new_tokens)
    score = jax.jit(workspace.lm.token_log_probs)

    def answer(batch: LengthBatch) -> tuple[Any, np.ndarray]:
        packed, scores, mask = spread_rows(
            _pack_groups(workspace, batch, contexts, targets, requests, count), model.params
        )
        shape = (batch.batch_size, count, -1)
        if mode.fused:
            return _answer_fused(workspace.lm, model, packed, shape, limits)
        ids, ids_mask = (array.reshape(shape) for array in packed[:2])
        prompts = Prompts(ids, ids_mask, scores, mask)
        generated = mode.generate(workspace.lm.decoder, model.params, prompts, limits, **options)
        log_probs = score(model.params, packed).reshape(shape)
        token_mask = packed.target_mask.reshape(shape)[:, 0]
        nlls = mode.loss(scores, log_probs, doc_mask=mask, token_mask=token_mask)
        return generated, host(nlls)

    longest = [max(map(len, group)) for group in contexts]
    batches = _question_batches(workspace, longest, count, rows_multiple(model.params))
    return _Plan(batches, " questions", answer)


def _answer_fused(
    lm: LanguageModel, model: FrozenLM, packed: LMBatch, shape: tuple[int, ...], limits: Limits
) -> tuple[Any, np.ndarray]:
    """Lets the decoder attend to all documents of a question; padding is no document."""
    contexts = (array.reshape(shape) for array in packed[:2])
    targets = (array.reshape(shape)[:, 0] for array in packed[2:])
    decoder = fusion_decoder(lm.config)
    result = score_and_generate(decoder, model.params, LMBatch(*contexts, *targets), limits)
    return result.generated, -host(result.token_log_probs).sum(axis=1)


def _question_batches(
    workspace: Workspace, longest: Sequence[int], count: int, devices: int
) -> list[LengthBatch]:
    return [
        LengthBatch(batch.rows[start : start + size], batch.length, size)
        for batch in context_batches(
            workspace.prompts, longest, score_tokens(workspace.config), devices
        )
        for size in [max(1, batch.batch_size // devices // count) * devices]
        for start in range(0, len(batch.rows), size)
    ]


def _pack_groups(
    workspace: Workspace,
    batch: LengthBatch,
    contexts: Sequence[Sequence[Sequence[int]]],
    targets: Sequence[Sequence[int]],
    requests: Sequence[Request],
    count: int,
) -> tuple[LMBatch, jax.Array, jax.Array]:
    flat_contexts: list[Sequence[int]] = []
    flat_targets: list[Sequence[int]] = []
    scores = np.zeros((batch.batch_size, count), np.float32)
    mask = np.zeros((batch.batch_size, count), bool)
    for place in range(batch.batch_size):
        row = batch.rows[place] if place < len(batch.rows) else None
        group = [] if row is None else list(contexts[row])[:count]
        flat_contexts += group + [[]] * (count - len(group))
        flat_targets += [[] if row is None else targets[row]] * count
        mask[place, : len(group)] = True
        if row is not None:
            scores[place, : len(requests[row].docs)] = requests[row].doc_scores
    packed = workspace.prompts.pack(flat_contexts, flat_targets, context_length=batch.length)
    return LMBatch(*map(jnp.asarray, packed)), jnp.asarray(scores), jnp.asarray(mask)


def _store(
    workspace: Workspace,
    cache: ResultCache[ScoredAnswer],
    keys: Sequence[str],
    generated: Any,
    nlls: np.ndarray,
    lengths: Sequence[int],
) -> None:
    ids, ends = host(generated.ids), host(generated.lengths)
    log_probs = host(generated.log_probs).astype(np.float64)
    if ids.ndim == 3:  # several answers to each question, best first
        ids, ends, log_probs = ids[:, 0], ends[:, 0], log_probs[:, 0]
    texts = workspace.lm.tokenizer.decode_batch(
        [row[:end].tolist() for row, end in zip(ids, ends, strict=True)]
    )
    # What ends an answer is none of its tokens, but was generated unless the limit came first.
    counts = np.minimum(ends + 1, ids.shape[1]).tolist()
    answers = [
        ScoredAnswer(
            text.strip(), float(nll) / length if length else None, min(log_prob, 0.0), count
        )
        for text, nll, length, log_prob, count in zip(
            texts, nlls, lengths, log_probs.tolist(), counts, strict=False
        )
    ]
    cache.put(keys, answers[: len(keys)])
