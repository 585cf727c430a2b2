"""The stage that adds questions made from passages to those of the data."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ragjax.data import batch_rows
from ragjax.data.matching import words
from ragjax.index import Bm25Index, HybridQueries
from ragjax.runs.compare.results import show_first_numbers
from ragjax.runs.found import first_copies
from ragjax.runs.indexes import Retriever, build_towers
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.options.questions import QuestionsConfig
from ragjax.runs.workspace import FrozenLM, Workspace, tower_params
from ragjax.runs.written.file import NAME, SPLITS, Written, in_split, read_file, write_file
from ragjax.runs.written.pretext import inverse_cloze, own_titles
from ragjax.runs.written.rules import Rules, ends_asking, first_question
from ragjax.runs.written.writing import (
    NEUTRAL,
    Example,
    check_template,
    example_passage,
    write_drafts,
)

# A passage of fewer words says too little to ask about.
_FEWEST_WORDS = 12
# Where nobody has asked, this share of the passages is held out for dev, and as many for test.
_HELD_OUT = 0.2
# Fewer written questions to train on than these are replaced by another task.
_FEWEST_QUESTIONS = 24
# What is measured must not be what the un-adapted retriever finds anyway: of dev and test only
# those are left out whose passage is not even among so many.
_MEASURED_DEPTH = 50
_EXAMPLES = 3
_SHOWN = 3


class _Passages(NamedTuple):
    """Corpus rows that questions are made from, and the split that each is for."""

    rows: list[int]
    splits: list[str]


def check_questions(workspace: Workspace, config: QuestionsConfig) -> None:
    """Raises ValueError for a template or a file that cannot be used, before anything expensive."""
    if config.file:
        read_file(Path(config.file), workspace.dataset.corpus)
    elif config.task == "written" and count_passages(workspace, config):
        check_template(workspace, config)


def add_written(
    workspace: Workspace, config: AdaptConfig, bm25: Bm25Index, retriever: Retriever, lm: FrozenLM
) -> tuple[Workspace, Retriever]:
    """Adds questions made from passages to the training questions, and where nobody asks to others.

    Dev and test, where the data have none or nothing tells their passages, get questions from
    passages of their own. All questions
    lie in `written.jsonl` of the output folder afterwards, with the reason where one is not used.

    Args:
        workspace: Data and models.
        config: Options.
        bm25: The lexical index.
        retriever: The un-adapted retriever, which filters.
        lm: Writes.

    Returns:
        The workspace with the questions, and the retriever, whose weight is chosen anew where
        there was no dev split before.
    """
    options = config.questions
    if not options.file and not count_passages(workspace, options):
        return workspace, retriever
    lacking = _lacking(workspace)
    with workspace.timed("questions"):
        if options.file:
            written = _assign(workspace, read_file(Path(options.file), workspace.dataset.corpus))
        else:
            passages = choose_passages(workspace, options)
            written = (
                _write(workspace, config, passages, bm25, retriever, lm)
                if options.task == "written"
                else _TASKS[options.task](workspace, passages)
            )
        written = [
            one
            if one.reason or one.split in ("train", *lacking)
            else one._replace(reason=f"the {one.split} questions are enough to measure by")
            for one in written
        ]
        write_file(workspace.folder / NAME, written)
        _report(workspace, options, written)
        workspace = _joined(workspace, written, lacking)
        if workspace.questions["dev"] and "dev" in lacking:
            retriever = build_towers(workspace, bm25, tower_params(workspace), retriever.version)
            show_first_numbers(workspace, bm25, retriever)
    return workspace, retriever


def count_passages(workspace: Workspace, config: QuestionsConfig) -> int:
    """Returns how many passages questions are made from."""
    measured = not workspace.questions["dev"] or any(workspace.relevant_rows("dev"))
    return config.count(len(workspace.questions["train"]), measured=measured)


def _lacking(workspace: Workspace) -> list[str]:
    """Returns the splits to measure on where nobody has asked, or nothing tells the passages."""
    return [
        split
        for split in SPLITS[1:]
        if (workspace.questions[split] or not workspace.questions["train"])
        and not any(workspace.relevant_rows(split))
    ]


def _joined(workspace: Workspace, written: Sequence[Written], lacking: Sequence[str]) -> Workspace:
    """Returns the workspace with the questions that are used; raises ValueError if none."""
    questions = {
        split: known + in_split(written, split) if split in ("train", *lacking) else known
        for split, known in workspace.questions.items()
    }
    if not questions["train"]:
        count = len({one.passage for one in written})
        raise ValueError(
            f"none of the questions made from {count:,} passages is left to train on, as"
            f" {workspace.folder / NAME} says; add queries.jsonl, or let a larger language model"
            " write them (--lm)"
        )
    return dataclasses.replace(workspace, questions=questions)


def _write(
    workspace: Workspace,
    config: AdaptConfig,
    passages: _Passages,
    bm25: Bm25Index,
    retriever: Retriever,
    lm: FrozenLM,
) -> list[Written]:
    options, given = config.questions, workspace.questions["train"]
    # One that has learnt p(x|c) on the given questions goes on in their manner.
    learnt = config.language_model.question_weight > 0 and not workspace.is_base(lm)
    examples = () if learnt else _examples(workspace, retriever, options)
    drafts = write_drafts(workspace, lm, passages.rows, examples, options)
    marked = ends_asking(question.text for question in given)
    rules = Rules(bm25.content_words, _asked(workspace), marked=marked)
    written = [
        Written(f"written-{id}-{number}", text, id, split, rules.against(text))
        for row, split, group in zip(*passages, drafts, strict=True)
        for id in [workspace.dataset.corpus[row].id]
        for number, text in enumerate(first_question(draft.text) for draft in group)
    ]
    written = _filtered(workspace, options, retriever, written)
    if not given and len(in_split(written, "train")) < _FEWEST_QUESTIONS:
        chosen = [row for row, split in zip(*passages, strict=True) if split == "train"]
        workspace.note(
            f"{len(in_split(written, 'train'))} written questions are too few to train on: each"
            " passage is to be found by one of its sentences as well (inverse cloze)"
        )
        written += _cloze(workspace, _Passages(chosen, ["train"] * len(chosen)))
    return written


def choose_passages(workspace: Workspace, config: QuestionsConfig) -> _Passages:
    """Draws passages, those without a training question first, and assigns them to splits."""
    corpus, train = workspace.dataset.corpus, workspace.relevant_rows("train")
    asked, copies = frozenset[int]().union(*train), workspace.dataset.twins.copies
    order = batch_rows(
        workspace.config.seed, 0, num_examples=len(corpus), batch_size=len(corpus)
    ).tolist()
    rows: list[int] = []
    short, count = 0, count_passages(workspace, config)
    for row in sorted(order, key=lambda row: row in asked):  # stable
        if len(rows) == count:
            break
        if min(copies.get(row, (row,))) != row:
            continue
        if len(words(corpus[row].text)) < _FEWEST_WORDS:
            short += 1
        else:
            rows.append(row)
    if short:
        workspace.note(f"{short} passages of under {_FEWEST_WORDS} words are not asked about")
    lacking = _lacking(workspace)
    if workspace.questions["train"] and config.passages < 0:  # for measuring alone
        return _Passages(rows, [lacking[place % len(lacking)] for place in range(len(rows))])
    return _Passages(rows, _splits(workspace, len(rows)))


def _splits(workspace: Workspace, count: int) -> list[str]:
    """Returns a split for each of some passages in random order."""
    held = round(_HELD_OUT * count)
    out = [split for split in _lacking(workspace) for _ in range(held)]
    return [*["train"] * (count - len(out)), *out]


def _assign(workspace: Workspace, written: Sequence[Written]) -> list[Written]:
    """Gives those a split that have none, passage by passage."""
    passages = sorted({one.passage for one in written if not one.split})
    order = (
        batch_rows(workspace.config.seed, 0, num_examples=len(passages), batch_size=len(passages))
        if passages
        else []
    )
    splits = dict(
        zip([passages[place] for place in order], _splits(workspace, len(passages)), strict=True)
    )
    return [one if one.split else one._replace(split=splits[one.passage]) for one in written]


def _cloze(workspace: Workspace, passages: _Passages) -> list[Written]:
    corpus, seed = workspace.dataset.corpus, workspace.config.seed
    made = []
    for row, split in zip(*passages, strict=True):
        if (cloze := inverse_cloze(corpus[row].text, seed=(seed, row))) is not None:
            rest = "\n".join(filter(None, (corpus[row].title, cloze.rest)))
            id = corpus[row].id
            made.append(Written(f"cloze-{id}", cloze.sentence, id, split, rest=rest))
    return made


def _titles(workspace: Workspace, passages: _Passages) -> list[Written]:
    corpus = workspace.dataset.corpus
    titles = own_titles(corpus, passages.rows)
    made = []
    for row, split in zip(*passages, strict=True):
        if row in titles:
            id = corpus[row].id
            made.append(Written(f"title-{id}", titles[row], id, split, rest=corpus[row].text))
    return made


def _statements(workspace: Workspace, passages: _Passages) -> list[Written]:
    """Takes a sentence of each passage, which the language model scores by what is found by it."""
    return [
        one._replace(id=f"statement-{one.passage}", rest="") for one in _cloze(workspace, passages)
    ]


_TASKS: dict[str, Callable[[Workspace, _Passages], list[Written]]] = {
    "inverse_cloze": _cloze,
    "title": _titles,
    "statement": _statements,
}


def _examples(
    workspace: Workspace, retriever: Retriever, config: QuestionsConfig
) -> Sequence[Example]:
    """Returns what is shown to the language model: given questions, else such of no domain."""
    questions = workspace.questions["train"][:_EXAMPLES]
    if not questions:
        return () if config.template else NEUTRAL
    embeddings = workspace.encode_queries(retriever.query_params, questions)
    queries = HybridQueries(embeddings, [question.text for question in questions])
    best = retriever.hybrid.search(queries, 1).doc_ids[:, 0].tolist()
    relevant = workspace.relevant_rows("train")
    return [
        Example(example_passage(workspace, min(rows, default=row)), question.text)
        for question, rows, row in zip(questions, relevant, best, strict=False)
    ]


def _asked(workspace: Workspace) -> Iterator[str]:
    """Yields all questions that people have asked, those beyond the caps of the run too."""
    for questions in (*workspace.dataset.questions.values(), *workspace.questions.values()):
        yield from (question.text for question in questions)


def _filtered(
    workspace: Workspace, config: QuestionsConfig, retriever: Retriever, written: list[Written]
) -> list[Written]:
    """Leaves out the questions by which the un-adapted hybrid does not find their passage again.

    References:
        Alberti et al., "Synthetic QA Corpora Generation with Roundtrip Consistency", 2019; Dai et
        al., "Promptagator: Few-shot Dense Retrieval From 8 Examples", 2023, section 3.2.
    """
    asked = [one for one in written if not one.reason]
    if not asked:
        return written
    questions = [one.question() for one in asked]
    embeddings = workspace.encode_queries(retriever.query_params, questions)
    queries = HybridQueries(embeddings, [one.text for one in asked])
    depth = min(len(workspace.dataset.corpus), max(config.found, _MEASURED_DEPTH))
    found, reasons = retriever.hybrid.search(queries, depth), {}
    for one, docs in zip(asked, found.doc_ids, strict=True):
        rows = first_copies(workspace, frozenset({workspace.dataset.corpus.row_of(one.passage)}))
        copies = workspace.dataset.twins.copies
        own = [copy for row in rows for copy in copies.get(row, (row,))]
        least = config.found if one.split == "train" else _MEASURED_DEPTH
        if not np.isin(docs[:least], own).any():
            reasons[one.id] = f"its passage is not among the first {least}"
    return [one._replace(reason=one.reason or reasons.get(one.id, "")) for one in written]


def _report(workspace: Workspace, config: QuestionsConfig, written: Sequence[Written]) -> None:
    """Says how many questions were made and are used, why others are not, and shows a few."""
    kept = [one for one in written if not one.reason]
    counts = Counter(one.split for one in kept)
    used = ", ".join(f"{counts[split]:,} for {split}" for split in SPLITS if counts[split])
    source = (
        f"from {config.file}"
        if config.file
        else {
            "written": "written by the language model",
            "inverse_cloze": "that are a sentence of their passage",
            "title": "that are the title of their passage",
            "statement": "that are a sentence to be written again from what is found by it",
        }[config.task]
    )
    reasons = Counter(one.reason for one in written if one.reason)
    lost = "; ".join(f"{count:,}: {reason}" for reason, count in reasons.most_common())
    workspace.note(
        f"questions {source}: {len(written):,} of {len({one.passage for one in written}):,}"
        f" passages, {len(kept):,} used ({used or 'none'})"
        + (f"; not used: {lost}" if lost else "")
    )
    for one in kept[:: max(1, len(kept) // _SHOWN)][:_SHOWN]:
        workspace.log(f"  {one.text}  [{one.passage}]")
