"""A language model writes questions from passages: few-shot, sampled, batched, resumable.

P passages, S questions each.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ragjax.data import passage_text
from ragjax.data.joining import DocumentIds
from ragjax.data.template import fill
from ragjax.generation import Prompts, Sampling, generate_sampled
from ragjax.runs.compare.answers import answer_limits
from ragjax.runs.models import score_tokens
from ragjax.runs.options.questions import QuestionsConfig
from ragjax.runs.teachers.batches import context_batches
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.storage.processes import host
from ragjax.training.mesh import rows_multiple, spread_rows
from ragjax.training.score_cache import ResultCache, result_key

# As in the prompts of answers, so that a language model which has learnt those goes on in kind.
_TEMPLATE = "{examples}{passage}\n\nQuestion:"
_MOST_TOKENS = 24  # of a written question
_EXAMPLE_TOKENS = 60  # of the passage of an example
_BETWEEN = "\n\n\n"  # of an example and what follows it
# The nucleus is looked for among so many tokens: sorting a whole vocabulary takes longer than the
# rest of a step on a CPU.
_TOP_K = 64


class Example(NamedTuple):
    """A passage and a question that was asked of it."""

    passage: str
    question: str


# Of no domain; each question names what it is about, as one that finds its passage must.
NEUTRAL = (
    Example(
        "The museum in the former railway station holds four thousand clocks, the oldest of which"
        " was made in Augsburg.",
        "How many clocks does the museum in the railway station hold?",
    ),
    Example(
        "Maya hid the letter under the stair, because her uncle was not to read it.",
        "Why did Maya hide the letter from her uncle?",
    ),
    Example(
        "Water in a closed pot boils at a higher temperature, so food in a pressure cooker is done"
        " sooner.",
        "What makes food cook faster in a pressure cooker?",
    ),
)


class Draft(NamedTuple):
    """What the language model has written."""

    text: str
    log_prob: float  # nats, of its tokens
    tokens: int


class Form(NamedTuple):
    """What stands around a passage."""

    head: str  # examples, and what the template has before the passage
    tail: str

    @classmethod
    def of(cls, template: str, examples: Sequence[Example]) -> "Form":
        """Fills a template but for its passage."""
        before, shows_examples, own = template.rpartition("{examples}")
        shown = "".join(
            f"{fill(own, passage=example.passage)} {example.question}{_BETWEEN}"
            for example in (examples if shows_examples else ())
        )
        head, _, tail = own.partition("{passage}")
        return cls(before + shown + head, tail)


def read_template(config: QuestionsConfig) -> str:
    """Returns the template of the options, from its file if it names one.

    Raises:
        ValueError: It has not exactly one {passage}, or its file cannot be read.
    """
    text, name = config.template or _TEMPLATE, "--questions.template"
    if "{passage}" not in text:
        name = f"{name} {text}"
        try:
            text = Path(text).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{name}: neither a text with {{passage}} nor a file that can be read ({error})"
            ) from error
        text = text.removesuffix("\n")
    if text.count("{passage}") != 1 or text.count("{examples}") > 1:
        raise ValueError(
            f"{name}: expected {{passage}} once and {{examples}} at most once, got {text!r}"
        )
    if text.find("{examples}") > text.find("{passage}"):
        raise ValueError(f"{name}: {{examples}} must stand before {{passage}}, got {text!r}")
    return text


def check_template(workspace: Workspace, config: QuestionsConfig) -> None:
    """Raises ValueError for a template that cannot be used, or leaves no room for a passage."""
    _context(workspace, workspace.prompts.joiner.literal(read_template(config)), (), 0)


def write_drafts(
    workspace: Workspace,
    lm: FrozenLM,
    rows: Sequence[int],
    examples: Sequence[Example],
    config: QuestionsConfig,
) -> list[list[Draft]]:
    """Lets the language model write questions from passages.

    Args:
        workspace: Data and prompts; drafts are kept in its folder, batch by batch.
        lm: Writes.
        rows: P corpus rows.
        examples: Shown before each passage, as many as there is room for.
        config: Template, sampling, questions a passage.

    Returns:
        P lists of S drafts.
    """
    template = workspace.prompts.joiner.literal(read_template(config))
    contexts = [_context(workspace, template, examples, row) for row in rows]
    passages = [passage_text(workspace.dataset.corpus[row]) for row in rows]
    sampling = Sampling(temperature=config.temperature, top_k=_TOP_K, top_p=config.top_p)
    told = [
        read_template(config),
        [tuple(example) for example in examples],
        config.temperature,
        config.top_p,
        config.per_passage,
        workspace.config.seed,
    ]
    keys = [
        result_key(lm.fingerprint, told, ids, passage)
        for ids, passage in zip(contexts, passages, strict=True)
    ]
    cache = ResultCache(workspace.folder / "questions" / "drafts.jsonl", Draft)
    names = [[f"{key}-{sample}" for sample in range(config.per_passage)] for key in keys]
    tokens, devices = score_tokens(workspace.config), rows_multiple(lm.params)
    batches = context_batches(workspace.prompts, list(map(len, contexts)), tokens, devices)
    with tqdm(total=len(rows), desc="questions", unit=" passages", file=sys.stderr) as progress:
        for batch in batches:
            chosen = [name for place in batch.rows for name in names[place]]
            if any(cache.get(name) is None for name in chosen):
                numbers = [rows[place] for place in batch.rows]
                ids = [contexts[place] for place in batch.rows]
                shape = (batch.batch_size, batch.length)
                drafts = _sample(workspace, lm, ids, numbers, shape, sampling, config.per_passage)
                cache.put(chosen, drafts)
            progress.update(len(batch.rows))
            workspace.stop.check()
    return [[draft for name in group if (draft := cache.get(name))] for group in names]


def _context(
    workspace: Workspace, template: str, examples: Sequence[Example], row: int
) -> list[int]:
    """Returns the prompt of a passage, with as many of the examples as it has room for."""
    prompts = workspace.prompts
    joiner = prompts.joiner
    room = prompts.max_length - _MOST_TOKENS
    (document,) = workspace.documents.get([row])
    while True:
        head, tail = Form.of(template, examples)
        ids = prompts.joined([head, document, tail])
        if (excess := len(ids) - room) <= 0:
            return ids
        if examples:
            examples = examples[:-1]
        elif excess >= len(document):
            raise ValueError(
                f"--questions.template: it takes {len(ids) - len(document)} of the {room} tokens"
                " that the language model has for template and passage; shorten it"
            )
        else:
            document = joiner.cut(document.text, len(document) - excess)


def _sample(
    workspace: Workspace,
    lm: FrozenLM,
    contexts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    shape: tuple[int, int],
    sampling: Sampling,
    samples: int,
) -> list[Draft]:
    """Draws S questions from each of a batch of prompts, by the number of the passage."""
    size, length = shape
    filler: list[list[int]] = [[]] * (size - len(contexts))
    packed = workspace.prompts.pack(
        [*contexts, *filler], [[]] * size, context_length=length, target_length=1
    )
    first = np.asarray([*numbers, *([0] * len(filler))], np.uint32)[:, None] * samples
    folds = (first + np.arange(samples, dtype=np.uint32)).reshape(-1)
    key = jax.random.key(workspace.config.seed)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(folds))
    generated = generate_sampled(
        workspace.lm.decoder,
        lm.params,
        spread_rows(
            Prompts(jnp.asarray(packed.context_ids), jnp.asarray(packed.context_mask)), lm.params
        ),
        answer_limits(workspace.lm, _MOST_TOKENS),
        key=keys,
        sampling=sampling,
        samples=samples,
    )
    lengths = host(generated.lengths)[: len(contexts) * samples].tolist()
    ids = [row[:end].tolist() for row, end in zip(host(generated.ids), lengths, strict=False)]
    texts = workspace.lm.tokenizer.decode_batch(ids)
    log_probs = host(generated.log_probs).astype(np.float64).tolist()
    return [
        Draft(" ".join(text.split()), log_prob, length)
        for text, log_prob, length in zip(texts, log_probs, lengths, strict=False)
    ]


def example_passage(workspace: Workspace, row: int) -> str:
    """Returns the beginning of a passage, for an example."""
    text = passage_text(workspace.dataset.corpus[row])
    document: DocumentIds = workspace.prompts.joiner.cut(text, _EXAMPLE_TOKENS)
    return document.text
