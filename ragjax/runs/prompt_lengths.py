"""Whether the prompts of a run fit into its language model, and how much of its texts is read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ragjax.data import DataError, Question
from ragjax.evaluation.records import QuestionRecord
from ragjax.runs.data import find_places
from ragjax.runs.options.modes import MODES
from ragjax.runs.workspace import Workspace

# Passages that are measured, spread over the corpus: counting all tokens of a large one takes long.
_MEASURED = 1000


class PromptFlags(NamedTuple):
    """What the options of prompts are called in a script; empty: it has none."""

    documents: str = "evaluation.documents"
    document_tokens: str = "prompt.document_tokens"
    answer_tokens: str = "prompt.answer_tokens"
    new_tokens: str = "evaluation.max_new_tokens"


OF_EVALUATION = PromptFlags("documents", "document_tokens", "", "max_new_tokens")


class Asked(NamedTuple):
    """Questions that the language model reads."""

    split: str
    questions: Sequence[Question]
    documents: int  # in one prompt
    flag: str = ""  # that says how many; empty: that of `PromptFlags`


def run_prompts(workspace: Workspace, *, dev: bool) -> list[Asked]:
    """Returns all prompts of a run: to train, to score, to answer and to explain.

    Args:
        workspace: Data and options.
        dev: Whether answers of dev questions are scored.
    """
    config, splits = workspace.config, ("train", "dev", "test") if dev else ("train", "test")
    size, learnt = len(workspace.dataset.corpus), config.documents_learnt
    read = 1 if MODES[config.mode].apart else config.evaluation.documents
    answered = [q for q in workspace.questions["test"] if q.answers]
    answered = answered[: config.data_options.answer_questions]
    return [
        *(
            # Where a retriever learns and is chosen, questions without an answer are scored too.
            Asked(split, [q for q in workspace.questions[split] if q.answers or split != "test"], 1)
            for split in splits
        ),
        Asked(
            "train",
            [q for q in workspace.questions["train"] if q.answers],
            min(learnt, size),
            "language_model.documents",
        ),
        Asked("test", answered, min(read, size)),
    ]


def check_prompts(
    workspace: Workspace, asked: Iterable[Asked], flags: PromptFlags | None = None
) -> None:
    """Checks that every prompt fits, and notes what will be cut; only texts are tokenised.

    Args:
        workspace: Data, models, options.
        asked: What the language model reads.
        flags: Names of the options in the script; None: those of a run.

    Raises:
        ValueError: A question leaves no room for its documents, or an answer is blank.
    """
    flags, asked = flags or PromptFlags(), list(asked)
    check_room(workspace, asked, flags)
    _note_cuts(workspace, asked, flags)


def check_room(workspace: Workspace, asked: Iterable[Asked], flags: PromptFlags) -> None:
    """Checks that every prompt fits; see `check_prompts`."""
    prompts, lm = workspace.prompts, workspace.lm
    shorten = (
        "--prompt.template or the question" if workspace.config.prompt.template else "the question"
    )
    too_long: dict[tuple[str, str], str] = {}
    for split, questions, documents, flag in asked:
        for question in questions:
            place = f"queries.jsonl: the {split} question {question.id!r}"
            try:
                _ = [prompts.target(answer) for answer in question.answers[:1]]
            except DataError as error:
                raise ValueError(f"{place}: {error}") from error
            for count in (0, documents):
                fixed = prompts.fixed_length(question.text, count)
                if prompts.max_context_length - fixed >= count:
                    continue
                what = f"has no room for {count} documents" if count > 1 else "is too long"
                too_long.setdefault(
                    (split, question.id),
                    f"{place}, {question.text[:60]!r}, {what}: with the template it takes {fixed}"
                    f" tokens of the {prompts.max_context_length} that are left for a prompt"
                    f" ({lm.source} reads {lm.max_length}, the answer takes"
                    f" {lm.max_length - prompts.max_context_length}); shorten {shorten} or leave"
                    f" it out, lower --{flag or flags.documents}, or give a model that reads more"
                    " with --lm",
                )
    if too_long:
        others = len(too_long) - 1
        raise ValueError(
            next(iter(too_long.values())) + (f" ({others} more do not fit)" if others else "")
        )


def note_cut_answers(
    workspace: Workspace,
    records: Mapping[str, Sequence[QuestionRecord]],
    flags: PromptFlags | None = None,
) -> None:
    """Notes how many of the generated answers ended because no more tokens were allowed."""
    limit, flags = workspace.config.evaluation.max_new_tokens, flags or PromptFlags()
    written = [r.prediction for rows in records.values() for r in rows if r.prediction]
    cut = sum(len(workspace.prompts.answer_ids(text)) >= limit for text in written)
    if cut:
        workspace.note(
            f"{_share(cut, len(written))} generated answers took all {limit} tokens that they may"
            f" take, and were perhaps cut{_flag(flags.new_tokens)}"
        )


def _note_cuts(workspace: Workspace, asked: Sequence[Asked], flags: PromptFlags) -> None:
    prompts, corpus = workspace.prompts, workspace.dataset.corpus
    rows = np.unique(np.linspace(0, len(corpus) - 1, _MEASURED).astype(int)).tolist()
    tokens, limit = prompts.template.max_document_tokens, workspace.config.evaluation.max_new_tokens
    texts = (prompts.passage_text(corpus[row]) for row in rows)
    cut = sum(not whole for _, whole in prompts.joiner.encode_texts(texts, tokens))
    which = "passages" if len(rows) == len(corpus) else "passages that were measured"
    if cut:
        ours = flags == PromptFlags() and find_places(workspace.config).documents
        shorter = "; --data_options.passage_tokens cuts documents smaller" if ours else ""
        workspace.note(
            f"{_share(cut, len(rows))} {which} are cut for the language model, which reads their"
            f" first {tokens} tokens{_flag(flags.document_tokens + shorter)}"
        )
    lengths = {
        (split, question.id): len(prompts.answer_ids(question.answers[0]))
        for split, questions, *_ in asked
        for question in questions
        if question.answers
    }
    most = prompts.template.max_answer_tokens
    _note_longer(
        workspace.note, list(lengths.values()), most,
        f"right answers are cut to {most} tokens where they are learnt or scored"
        f"{_flag(flags.answer_tokens)}",
    )  # fmt: skip
    _note_longer(
        workspace.note, [n for (split, _), n in lengths.items() if split != "train"], limit,
        f"right answers to evaluate on are longer than the {limit} tokens after which a generated"
        f" answer is cut{_flag(flags.new_tokens)}",
    )  # fmt: skip


def _note_longer(
    note: Callable[[str], None], lengths: Sequence[int], limit: int, sentence: str
) -> None:
    if longer := sum(length > limit for length in lengths):
        note(f"{_share(longer, len(lengths))} {sentence}")


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})"


def _flag(name: str) -> str:
    return f" (--{name})" if name else ""
