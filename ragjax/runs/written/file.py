"""`written.jsonl`: the questions that were made from passages, to read, edit and pass again."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ragjax.data import Corpus, DataError, Question
from ragjax.data.jsonl import (
    RejectedRows,
    SourceFile,
    id_field,
    read_jsonl,
    require_path,
    string_field,
)
from ragjax.storage import sha256, write_jsonl

NAME = "written.jsonl"
SPLITS = ("train", "dev", "test")


class Written(NamedTuple):
    """A question that was made from a passage."""

    id: str
    text: str
    passage: str  # its id
    split: str  # "" where the file does not say it
    reason: str = ""  # why it is not used; "" if it is
    rest: str = ""  # the passage as training reads it, where that is less than all of it

    def question(self) -> Question:
        """Returns it as what people ask is read."""
        return Question(id=self.id, text=self.text, passage=self.passage, rest=self.rest)


def write_file(path: Path, written: Iterable[Written]) -> None:
    """Writes all of them, those that are not used with the reason."""
    rows = []
    for one in written:
        row = {"id": one.id, "text": one.text, "passage": one.passage, "split": one.split}
        row |= {"kept": not one.reason, "reason": one.reason}
        rows.append(row | ({"rest": one.rest} if one.rest else {}))
    write_jsonl(path, rows)


def read_file(path: Path, corpus: Corpus) -> list[Written]:
    """Reads the questions of a file that are to be used.

    Args:
        path: JSON lines with `text` and `passage`; `id`, `split`, `kept` and `rest` may be there.
        corpus: Has the passages.

    Raises:
        FileNotFoundError: There is no such file.
        DataError: A line is damaged, or names no passage of the corpus; or there is no question.
    """
    written = _read(path, corpus)
    if not written:
        raise DataError(f'{path}: no question that is to be used (each has "kept": false)')
    return written


def file_inputs(name: str) -> dict[str, dict[str, str]]:
    """Returns the digest of a file of questions, if one is named, as an input of a run."""
    return {"written questions": {"file": sha256(Path(name))}} if name else {}


def _read(path: Path, corpus: Corpus) -> list[Written]:
    written: list[Written] = []
    ids: set[str] = set()
    bad = RejectedRows(path, "stop")
    for row in read_jsonl(SourceFile(require_path(path)), bad):
        try:
            one = _parse(row.record, f"{path.stem}-{row.line}", corpus)
        except DataError as error:
            bad.add(path, row.line, str(error))
            continue
        if one.id in ids:
            bad.add(path, row.line, f"the id {one.id!r} stands there twice; make ids unique")
        ids.add(one.id)
        if not one.reason:
            written.append(one)
    return written


def _parse(record: dict, id: str, corpus: Corpus) -> Written:
    if missing := {"text", "passage"} - record.keys():
        raise DataError(
            f"no field {' and '.join(sorted(missing))}; expected text and passage, which is the id"
            " of a passage of corpus.jsonl"
        )
    passage, text = id_field(record, "passage"), string_field(record, "text").strip()
    if passage not in corpus:
        raise DataError(f"passage {passage!r} is no id of the corpus")
    if not text:
        raise DataError("text is empty")
    split = record.get("split") or ""
    if split not in ("", *SPLITS):
        raise DataError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    return Written(
        id=id_field(record, "id") if "id" in record else id,
        text=text,
        passage=passage,
        split=split,
        reason="" if record.get("kept", True) else "left out",
        rest=str(record.get("rest") or ""),
    )


def with_written(
    questions: Mapping[str, tuple[Question, ...]], folder: Path, corpus: Corpus
) -> dict[str, tuple[Question, ...]]:
    """Returns the questions of a run, with the written ones that it measures by.

    Those of train are added where nobody has asked.

    Args:
        questions: By split.
        folder: Of the run.
        corpus: Has the passages.
    """
    known = {split: questions.get(split, ()) for split in {**dict.fromkeys(SPLITS), **questions}}
    if not (folder / NAME).is_file():
        return dict(questions)
    written = _read(folder / NAME, corpus)
    return {
        split: asked if asked and split == "train" else asked + in_split(written, split)
        for split, asked in known.items()
    }


def in_split(written: Sequence[Written], split: str) -> tuple[Question, ...]:
    """Returns the questions of a split that are used."""
    return tuple(one.question() for one in written if one.split == split and not one.reason)
