"""The data of a run: documents and questions, after the caps of its options."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ragjax.data import (
    Dataset,
    Question,
    batch_rows,
    leaked_questions,
    read_beir,
    write_python_docs,
)
from ragjax.data.fields import parse_fields
from ragjax.runs.options.shared import RunConfig

Log = Callable[[str], None]
_SHOWN = 3  # ids in a note


def read_data(config: RunConfig, folder: Path, log: Log) -> Dataset:
    """Reads the data of a run; what is prepared from them goes to the sub-folder `data`."""
    options = config.data_options
    source = Path(config.data) if config.data else folder / "data" / "python-docs"
    if not config.data and not (source / "corpus.jsonl").is_file():
        write_python_docs(source)
    dataset = read_beir(
        source,
        cache=folder / "data" / "cache",
        fields=parse_fields(options.fields, flag="--data_options.fields"),
        on_bad_row=options.on_bad_row,
        dev_fraction=config.dev_fraction,
    )
    for note in dataset.notes:
        log(f"note: {note}")
    for split in ("dev", "test"):
        if leaked := leaked_questions(dataset, split=split):
            log(
                f"note: {len(leaked)} of the {len(dataset.questions[split])} {split} questions are"
                f" also asked in train: {', '.join(leaked[:_SHOWN])}"
                f"{', ...' if len(leaked) > _SHOWN else ''}"
            )
    return dataset


def choose_questions(config: RunConfig, dataset: Dataset) -> dict[str, tuple[Question, ...]]:
    """Returns the questions of a run by split, after its caps.

    Raises:
        ValueError: There are none to train on, or none to test on.
    """
    caps = config.data_options
    limits = {"train": caps.train_questions, "dev": caps.dev_questions, "test": caps.test_questions}
    chosen: dict[str, tuple[Question, ...]] = {}
    for split, limit in limits.items():
        known = dataset.questions.get(split, ())
        if split == "train":
            # p_LM(y|c∘x) of a question without an answer has no y to train on.
            known = tuple(question for question in known if question.answers)
        if not known and split != "dev":
            need = "answers and " if split == "train" else ""
            raise ValueError(
                f"{dataset.name}: no {split} questions with {need}relevance judgements; add"
                f" qrels/{split}.tsv and answers in queries.jsonl"
            )
        # A seeded order, so that a cap takes a fair sample and a larger cap a larger one.
        count = None if split == "test" and limit == 0 else limit
        chosen[split] = shuffled(known, config.seed)[:count]
    return chosen


def shuffled(questions: Sequence[Question], seed: int) -> tuple[Question, ...]:
    """Returns the questions in the order of a run with this seed."""
    if not questions:
        return ()
    order = batch_rows(seed, 0, num_examples=len(questions), batch_size=len(questions))
    return tuple(questions[row] for row in order)
