"""What the language model reads while it is trained, and how its prompts are packed into steps.

Q questions, K documents each, R rows of L slots, P scored tokens a row.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ragjax.data import PromptBuilder, Question, batch_rows, fill_rows, two_lengths
from ragjax.evaluation import answer_in_text
from ragjax.index import SearchResult
from ragjax.models.decoder.packing import Suffix, pack_row
from ragjax.models.inputs import LMBatch
from ragjax.runs.options.dual import LMConfig
from ragjax.runs.tokens import training_prompts
from ragjax.runs.train.stages import stage_steps
from ragjax.runs.workspace import Workspace
from ragjax.training.lm import WeightedRows

# Of the streams of random numbers of a run's seed.
_STREAM = 15
# Slots of a packed row where the prompts are shorter: several share one.
_SLOTS = 384
# Prompts that a step looks at to fill its rows, in batches.
_WINDOW = 3


class Reading(NamedTuple):
    """A question and the documents that are read before it."""

    question: int  # of the training questions
    docs: tuple[int, ...]  # corpus rows in the order of the prompt; none: closed book
    asked: bool = False  # its one document is useful: log p(x|c) is learnt


class Prompt(NamedTuple):
    """Token ids of a reading; the scored ones stand at the end."""

    context: list[int]
    target: list[int]
    weights: list[float]  # of the target's tokens

    @property
    def size(self) -> int:
        """Number of its tokens."""
        return len(self.context) + len(self.target)


class Steps(NamedTuple):
    """The batches of the stage."""

    num_steps: int
    batch_at: Callable[[int], Any]  # step -> what the loss of `make_lm_loss` takes


def readings(workspace: Workspace, config: LMConfig, candidates: SearchResult) -> list[Reading]:
    """Returns what an epoch of the stage reads, a pure function of the seed and its arguments.

    Questions without answers are read behind their useful document, those with answers as the
    options say, and those that a language model wrote not at all.

    Args:
        workspace: Data; its `relevant_rows` say which documents are useful.
        config: Options of the stage.
        candidates: `[Q, K]` documents of the training questions, best first.
    """
    draw = np.random.default_rng((workspace.config.seed, _STREAM))
    truths, questions = workspace.relevant_rows("train"), workspace.questions["train"]
    read: list[Reading] = []
    # A language model learns nothing from questions that it wrote itself.
    asked = [row for row, question in enumerate(questions) if question.passage is None]
    for row in asked[: config.questions]:
        found, truth = candidates.doc_ids[row][candidates.mask[row]].tolist(), truths[row]
        # Where no document is known to be useful, it is the best one.
        useful = next((doc for doc in found if doc in truth or not truth), None)
        if not questions[row].answers:
            read += [Reading(row, (useful,), True)] if useful is not None else []
            continue
        if config.read == "apart":
            prompts = [(doc,) for doc in found[: config.documents]]
        else:
            others = useless(workspace, questions[row], found, truth)
            prompts = [_together(config, found, useful, others, draw)]
        for docs in prompts:
            read.append(Reading(row, docs, config.question_weight > 0 and docs == (useful,)))
    return read


def useless(
    workspace: Workspace, question: Question, found: Sequence[int], truth: frozenset[int]
) -> list[int]:
    """Returns the documents that are known to be of no use to a question."""
    corpus = workspace.dataset.corpus
    return [
        doc
        for doc in found
        if truth and doc not in truth and not answer_in_text(corpus[doc].text, question.answers)
    ]


def _together(
    config: LMConfig,
    found: Sequence[int],
    useful: int | None,
    others: Sequence[int],
    draw: np.random.Generator,
) -> tuple[int, ...]:
    """Draws the documents of one prompt."""
    kind, count = draw.random(), int(draw.integers(1, config.documents, endpoint=True))
    if kind < config.distractors / 2:
        return ()
    docs = list(found[:count])
    if kind < config.distractors and others:
        docs = list(others[:count])
    elif count == 1 and useful is not None:
        docs = [useful]
    return tuple(docs[place] for place in draw.permutation(len(docs)))


def lm_steps(workspace: Workspace, config: LMConfig, read: Sequence[Reading]) -> Steps:
    """Returns the batches of the stage, of one static shape or two.

    A causal decoder reads several prompts in one row, as many as fit; `batch_size` of them a step
    on average. Of another family each prompt is a row, and a step has short ones or long ones.

    Args:
        workspace: Data, models, seed.
        config: Options of the stage.
        read: What an epoch reads, from `readings`.
    """
    builder = training_prompts(workspace.config.prompt, workspace.lm)
    questions, seed = workspace.questions["train"], workspace.config.seed
    prompts = [
        make_prompt(
            workspace, builder, questions[one.question], one.docs,
            question_weight=config.question_weight if one.asked else 0.0,
        )
        for one in read
    ]  # fmt: skip
    if workspace.lm.family.packed_token_log_probs is not None:
        order = [
            int(row)
            for epoch in range(config.epochs)
            for row in batch_rows(seed, epoch, num_examples=len(read), batch_size=len(read))
        ]
        packing = pack_prompts(
            prompts, order, batch_size=config.batch_size, parts=config.accumulate,
            devices=workspace.layout.num_devices,
        )  # fmt: skip
        pad_id = workspace.lm.pad_id
        return Steps(len(packing.batches), lambda step: packing.batch(step, prompts, pad_id))
    target_length = scored_length(builder, prompts)
    batches = two_lengths(
        [
            int(row)
            for step in range(stage_steps(config, len(prompts)))
            for row in batch_rows(
                seed, step, num_examples=len(prompts), batch_size=config.batch_size
            )
        ],
        [len(prompt.context) for prompt in prompts],
        batch_size=config.batch_size,
        beside=target_length,
    )

    def batch_at(step: int) -> LMBatch:
        chosen = [prompts[row] for row in batches[step].rows]
        return unpacked(builder, chosen, batches[step].length, target_length)

    return Steps(len(batches), batch_at)


def scored_length(builder: PromptBuilder, prompts: Sequence[Prompt]) -> int:
    """Returns what the targets of these prompts are padded to: a question may be the longest."""
    longest = -(-max(len(prompt.target) for prompt in prompts) // 16) * 16
    return max(builder.max_target_length, longest)


def unpacked(
    builder: PromptBuilder, prompts: Sequence[Prompt], length: int, target_length: int
) -> LMBatch:
    """Returns prompts as rows of their own, padded to these lengths."""
    packed = builder.pack(
        [prompt.context for prompt in prompts],
        [prompt.target for prompt in prompts],
        context_length=length,
        target_length=target_length,
    )
    return LMBatch(*map(jnp.asarray, packed))


def make_prompt(
    workspace: Workspace,
    builder: PromptBuilder,
    question: Question,
    docs: Sequence[int],
    *,
    question_weight: float = 0.0,
) -> Prompt:
    """Returns a prompt whose answer is scored, and with a weight its question, too.

    Args:
        workspace: Documents and the language model.
        builder: Of the language model's prompts.
        question: Without answers, the question alone is scored, behind the first document.
        docs: Corpus rows, in the order of the prompt.
        question_weight: Weight of log p(x|c) of a causal decoder, behind one document; above 0.
    """
    documents = workspace.documents.get(docs)
    if not question.answers:
        context, target = builder.question_reading(question.text, documents[0])
        return Prompt(context, target, [1.0] * len(target))
    context, target = builder.context(question.text, documents), builder.target(question.answers[0])
    if not question_weight or not builder.asks_after_document:
        return Prompt(context, target, [1.0] * len(target))
    start, end = builder.question_place(question.text, documents[0])
    weights = [question_weight] * (end - start) + [0.0] * (len(context) - end)
    return Prompt(context[:start], context[start:] + target, weights + [1.0] * len(target))


class Packing(NamedTuple):
    """Which prompts lie in which row of which batch, and the static shape of a batch."""

    batches: list[list[list[int]]]  # prompts by row, by batch
    rows: int  # of a batch; those beyond its own are empty
    length: int
    scored: int  # tokens of a row, at most

    def batch(self, number: int, prompts: Sequence[Prompt], pad_id: int) -> WeightedRows:
        """Returns the arrays of a batch."""
        packed = [
            pack_row(
                (), [Suffix(prompts[p].context, prompts[p].target) for p in row],
                length=self.length, num_targets=self.scored, pad_id=pad_id,
            )
            for row in self.batches[number] + [[]] * (self.rows - len(self.batches[number]))
        ]  # fmt: skip
        weights = np.zeros((self.rows, self.scored), np.float32)
        for place, row in enumerate(self.batches[number]):
            flat = [weight for p in row for weight in prompts[p].weights]
            weights[place, : len(flat)] = flat
        stacked = jax.tree.map(lambda *fields: jnp.asarray(np.stack(fields)), *packed)
        return WeightedRows(stacked, jnp.asarray(weights))


def pack_prompts(
    prompts: Sequence[Prompt],
    order: Sequence[int],
    *,
    batch_size: int,
    parts: int = 1,
    devices: int = 1,
) -> Packing:
    """Plans batches of one static shape, as full of prompts as their order allows.

    Args:
        prompts: All prompts.
        order: Which of them, in this order as far as they fit; one may come several times.
        batch_size: Prompts of a batch on average.
        parts: In which a batch is taken, of as many rows each.
        devices: That share the rows of each part: empty ones make them a multiple.
    """
    sizes = [prompt.size for prompt in prompts]
    batch = batch_size * sum(sizes) / len(sizes)
    length = -(-int(max(*sizes, min(_SLOTS, batch))) // 32) * 32
    rows = max(1, round(batch / length / parts)) * parts
    batches = fill_rows(order, sizes, rows=rows, length=length, window=_WINDOW * batch_size)
    scored = max(sum(len(prompts[p].target) for p in row) for step in batches for row in step)
    shared = -(-rows // (parts * devices)) * parts * devices
    return Packing(batches, shared, length, -(-scored // 8) * 8)
