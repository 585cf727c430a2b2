"""The data of a run: documents and questions, after the caps of its options."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ragjax.data import (
    Dataset,
    Question,
    batch_rows,
    leaked_questions,
    read_beir,
    write_python_docs,
)
from ragjax.data.documents.found import holds_documents
from ragjax.data.fields import parse_fields
from ragjax.data.folders import Cutting, prepared_documents
from ragjax.data.jsonl import DataError, Flaw, ReadProgress
from ragjax.data.overlap import near_copies
from ragjax.data.questions import holds_contexts, question_files, questions_among
from ragjax.data.truth import TRUTHS
from ragjax.runs.models import describe_encoders
from ragjax.runs.options.shared import RunConfig

Log = Callable[[str], None]
_SHOWN = 3  # ids in a note


def read_data(
    config: RunConfig, folder: Path, log: Log, *, progress: ReadProgress | None = None
) -> Dataset:
    """Reads the data of a run; what is prepared from them goes to the sub-folder `data`."""
    options, places = config.data_options, find_places(config)
    source, made_notes = data_set(config, folder / "data", log)
    dataset = read_beir(
        source,
        cache=folder / "data" / "cache",
        queries=places.queries,
        qrels=places.judged,
        fields=parse_fields(options.fields),
        on_bad_row=options.on_bad_row,
        on_unknown=options.on_unknown,
        dev_fraction=config.dev_fraction,
        supervision=options.supervision,
        progress=progress,
    )
    notes = [*made_notes, *dataset.notes, *map(Flaw, _leak_notes(dataset))]
    for note in notes:
        log(f"note: {note}")
    return dataclasses.replace(dataset, notes=tuple(notes))


class Places(NamedTuple):
    """Where the parts of the data of a run are; None: where the documents are, or nowhere."""

    documents: Path | None  # a folder of documents, or one of them; None: it is a data set
    queries: Path | None
    judged: Path | None


def find_places(config: RunConfig) -> Places:
    """Returns what the options name, and what stands beside documents.

    Raises:
        DataError: Several files beside documents could be the questions, or there are none that
            could be judged.
    """
    source = Path(config.data) if config.data else None
    queries = Path(config.queries) if config.queries else None
    judged = Path(config.qrels) if config.qrels else None
    if source is None or not holds_documents(source):
        return Places(None, queries, judged)
    if source.is_dir():
        # Folders of these names may have documents.
        files = (path for path in source.iterdir() if path.is_file())
        queries = queries or questions_among(files)
        beside = source / "qrels"
        judged = judged or (beside if queries and beside.is_dir() else None)
    if judged and not queries:
        raise DataError(
            f"{judged} judges questions, and beside the documents of {source} there are none; name"
            " them with queries=FILE"
        )
    return Places(source, queries, judged)


def data_set(config: RunConfig, folder: Path, log: Log) -> tuple[Path | None, tuple[str, ...]]:
    """Returns where the documents of a run are, and what there is to say of them.

    It is the data that the options name; or a data set is made in `folder` of the documents that
    they name, once for as long as these are the same; or, where they name nothing, of the installed
    Python packages. None: they stand beside the questions.

    Args:
        config: Options of the run.
        folder: For what is made.
        log: Shows one line to the user.
    """
    if not config.data:
        if config.queries and holds_contexts(question_files(Path(config.queries))):
            return None, ()
        if named := config.queries or config.qrels:
            raise DataError(
                f"{named} is about documents, and none are given; name them with data=FOLDER"
            )
        source = folder / "python-docs"
        if not (source / "corpus.jsonl").is_file():
            write_python_docs(source)
        return source, ()
    source, options, places = Path(config.data), config.data_options, find_places(config)
    if places.documents is None:
        return source, ()
    tokenizer = describe_encoders(config).doc.tokenizer
    cutting = Cutting(options.passage_tokens, options.passage_overlap, tokenizer)
    apart = [place for place in places if place and place != source]
    made, written = prepared_documents(source, folder, cutting, log=log, apart=apart)
    read = f"{source}: {written.passages:,} passages of {written.files:,} documents"
    return made, (read, *written.notes())


def choose_questions(
    config: RunConfig, dataset: Dataset, note: Log = lambda text: None
) -> dict[str, tuple[Question, ...]]:
    """Returns the questions of a run by split, after its caps.

    Args:
        config: Options of the run.
        dataset: All of them.
        note: Told what is left out of training, or trained on although dev or test ask it too.

    Returns:
        The splits; train is empty where there are documents only, and so is a test that has none.

    Raises:
        ValueError: There are none to train on but those that dev or test ask.
    """
    caps = config.data_options
    limits = {"train": caps.train_questions, "dev": caps.dev_questions, "test": caps.test_questions}
    leaked = {id for split in ("dev", "test") for id in _asked_in_train(dataset, split)}
    chosen: dict[str, tuple[Question, ...]] = {}
    for split, limit in limits.items():
        known = dataset.questions.get(split, ())
        if split == "train":
            known = _without_leaks(trained_on(dataset, note), leaked, caps.leaks, note)
        # A seeded order, so that a cap takes a fair sample and a larger cap a larger one.
        count = None if split == "test" and limit == 0 else limit
        chosen[split] = shuffled(known, config.seed)[:count]
    return chosen


def trained_on(dataset: Dataset, note: Log = lambda text: None) -> tuple[Question, ...]:
    """Returns the training questions with an answer, or all of them where none has one."""
    known = dataset.questions.get("train", ())
    answered = tuple(question for question in known if question.answers)
    if answered and len(answered) < len(known):
        note(
            f"{len(known) - len(answered)} of the {len(known)} training questions have no answer"
            " and are left out; --data_options.supervision questions trains on all of them"
        )
    return answered or known


def describe_supervision(dataset: Dataset, questions: Mapping[str, Sequence[Question]]) -> str:
    """Returns what a run trains on and by what it chooses and measures, in one sentence."""
    dataset.look_up(questions)
    train = questions["train"]
    with_answers = sum(bool(question.answers) for question in train)
    measured = [
        f"retrieval on {len(asked):,} {split} questions is measured by"
        f" {measured_by(dataset, split, asked)}"
        for split, asked in questions.items()
        if split != "train" and asked
    ]
    counts = f"{len(train):,} training questions, {with_answers:,} with answers"
    return "; ".join([f"supervision: {dataset.supervision} ({counts})", *measured])


def measured_by(dataset: Dataset, split: str, questions: Sequence[Question]) -> str:
    """Returns by what retrieval is measured on these questions, in words behind "measured by"."""
    known = sum(map(bool, dataset.graded_rows(split, questions)))
    name = TRUTHS[dataset.truth(split, questions)]
    share = f" (known for {known:,} of {len(questions):,})"
    return name + (share if 0 < known < len(questions) else "")


def require_answers(dataset: Dataset, questions: Sequence[Question], needed_by: str) -> None:
    """Raises ValueError where no training question has an answer to learn."""
    if not questions:
        raise ValueError(
            f"{dataset.name}: there are no training questions (supervision: {dataset.supervision});"
            " add queries.jsonl"
        )
    if any(question.answers for question in questions):
        return
    why = "".join(f" ({text})" for text in dataset.notes if "has answers in" in text)
    raise ValueError(
        f"{dataset.name}: no training question has an answer, which {needed_by} needs; add answers"
        f" to the questions, in a field `answers` or a column `answer`{why}"
    )


def note_shared_passages(
    dataset: Dataset, questions: Mapping[str, Sequence[Question]], note: Log
) -> None:
    """Tells which relevant passages of other splits are those of train, or almost the same.

    Args:
        dataset: Corpus and relevance judgements.
        questions: By split, as they are used.
        note: Told one sentence for each split that has any.
    """
    if not questions.get("train"):
        return
    corpus, train = dataset.corpus, _relevant(dataset, "train", questions["train"])
    for split, asked in questions.items():
        if split == "train" or not asked:
            continue
        rows = _relevant(dataset, split, asked)
        near = near_copies(corpus, rows - train, train)
        if same := rows & train:
            note(
                f"{len(same)} of the {len(rows)} relevant passages of the {split} questions are"
                " also relevant to training questions"
            )
        if near:
            pairs = [f"{corpus.id_of(row)} ~ {corpus.id_of(other)}" for row, other in near]
            note(
                f"{len(near)} of the {len(rows)} relevant passages of the {split} questions are"
                f" almost the same as one of a training question: {_listed(pairs)}"
            )


def shuffled(questions: Sequence[Question], seed: int) -> tuple[Question, ...]:
    """Returns the questions in the order of a run with this seed."""
    if not questions:
        return ()
    order = batch_rows(seed, 0, num_examples=len(questions), batch_size=len(questions))
    return tuple(questions[row] for row in order)


def _relevant(dataset: Dataset, split: str, questions: Sequence[Question]) -> set[int]:
    graded = dataset.graded_rows(split, questions)
    return {row for rows in graded for row, grade in rows.items() if grade > 0}


def _asked_in_train(dataset: Dataset, split: str) -> tuple[str, ...]:
    """Returns the ids of the training questions that a split asks too."""
    return leaked_questions(dataset, split="train", against=split)


def _leak_notes(dataset: Dataset) -> Iterator[str]:
    for split in ("dev", "test"):
        if leaked := leaked_questions(dataset, split=split):
            yield (
                f"{len(leaked)} of the {len(dataset.questions[split])} {split} questions are also"
                f" asked in train: {_listed(leaked)}"
            )


def _without_leaks(
    known: tuple[Question, ...], leaked: Collection[str], leaks: str, note: Log
) -> tuple[Question, ...]:
    """Returns the training questions that neither dev nor test asks, or all of them."""
    ids = [question.id for question in known if question.id in leaked]
    if not ids:
        return known
    asked = f"{len(ids)} of the {len(known)} training questions are also asked in dev or test"
    if leaks == "keep":
        note(f"{asked}, and trained on: {_listed(ids)}")
        return known
    kept = tuple(question for question in known if question.id not in leaked)
    if not kept:
        raise ValueError(
            f"{asked}, so none is left to train on; use other questions for testing, or train on"
            " these all the same with --data_options.leaks keep"
        )
    note(
        f"{asked}, and left out of training: {_listed(ids)}; --data_options.leaks keep trains on"
        " them"
    )
    return kept


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_SHOWN]) + (", ..." if len(ids) > _SHOWN else "")
