"""Files of questions as records with the names of BEIR, one a question, and their passages.

Kinds are told by content: any that `ragjax.data.tables` reads (JSON lines of BEIR, FlashRAG or
KILT, CSV, TSV, Parquet, a JSON array), among them rows with a `context` and DPR's training data
(`positive_ctxs`, `hard_negative_ctxs`), and SQuAD's JSON
(`{"data": [{"title", "paragraphs": [{"context", "qas"}]}]}`).
"""

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ragjax.data.fields import usual_fields
from ragjax.data.jsonl import (
    DataError,
    Line,
    RejectedRows,
    SourceFile,
    check_encodable,
    id_field,
    parse_object,
    string_field,
)
from ragjax.data.questions.json_items import MAX_ITEM_BYTES, array_items
from ragjax.data.tables import Row, TableFile

_SQUAD_KEY = "data"
_DPR_LISTS = {"positive_ctxs": True, "hard_negative_ctxs": False, "negative_ctxs": False}
_DPR_IDS = ("passage_id", "psg_id", "id")
_HEAD_BYTES = 1 << 20


class Context(NamedTuple):
    """A passage that stands beside a question in its file."""

    id: str
    title: str
    text: str
    relevant: bool
    named: bool  # True: the id is the file's own; False: it is made of title and text


class Record(NamedTuple):
    """A question as its file has it; SQuAD's under the names of BEIR."""

    line: int  # from 1, as the file counts
    where: str  # in the line, such as "data[3].paragraphs[0].qas[1]: "; "" for the whole
    fields: Mapping[str, Any] | None  # None: passages alone
    row: Row | Line  # as it was written
    contexts: tuple[Context, ...] = ()


class RecordFile:
    """A file of questions, whose kind is told by its first bytes.

    Attributes:
        path: The file.
        is_squad: Whether it is SQuAD's JSON, whose names are never others.
        has_cells: Whether it is CSV or TSV, whose cells are all text.
        notes: Sentences on how it was read, complete after its last record.
    """

    def __init__(self, path: Path) -> None:
        """Looks at the first bytes.

        Raises:
            FileNotFoundError: No such file; the message suggests the nearest name.
            DataError: A kind of file that is not read, UTF-16 text, or a damaged gzip file.
        """
        self.path = path
        self._table = TableFile(path, max_row_bytes=MAX_ITEM_BYTES)
        self.has_cells = self._table.kind == "delimited text"
        self.is_squad = False
        if self._table.kind == "JSON lines":
            head = next(SourceFile(path).chunks(_HEAD_BYTES), b"")
            self.is_squad = _has_list_of_data(head)

    @property
    def notes(self) -> list[str]:
        """Sentences on how the file was read."""
        return [f"{self.path}: SQuAD's JSON"] if self.is_squad else self._table.notes

    @property
    def holds_contexts(self) -> bool:
        """Whether passages stand beside the questions, by the first row."""
        if self.is_squad:
            return True
        first = next(TableFile(self.path).rows(_Unread(Path(), "skip")), None)
        return first is not None and _has_contexts(first.record)

    def records(self, rejected: RejectedRows) -> Iterator[Record]:
        """Yields the questions; what cannot be read goes to `rejected`.

        Raises:
            DataError: The file as a whole cannot be read, or a part where the policy is "stop".
            ImportError: A Parquet or Arrow file, without pyarrow.
        """
        if self.is_squad:
            yield from self._articles(rejected)
            return
        for row in self._table.rows(rejected):
            try:
                contexts = tuple(_contexts(row.record))
            except DataError as error:
                rejected.add(self.path, row.line, str(error), row.raw)
                continue
            yield Record(row.line, "", row.record, row, contexts)

    def _articles(self, rejected: RejectedRows) -> Iterator[Record]:
        for number, item in enumerate(array_items(SourceFile(self.path), _SQUAD_KEY)):
            place = _Place(self.path, item, f"{_SQUAD_KEY}[{number}]", rejected)
            with place.rejecting():
                if item.size > len(item.raw):
                    raise DataError(f"{item.size:,} bytes are too many for one article; cut it up")
                yield from _squad(parse_object(item.raw), place)


def holds_contexts(files: Iterable[Path]) -> bool:
    """Tells whether passages stand beside the questions of files."""
    return any(RecordFile(path).holds_contexts for path in files)


class _Unread(RejectedRows):
    """Lets bad rows pass, which are named where the file is read."""

    def add(self, source: Path, line: int, reason: str, raw: bytes = b"") -> None:
        """Does nothing."""


class _Place(NamedTuple):
    """An element of a list, or a part of it, for messages."""

    path: Path
    item: Line
    where: str
    rejected: RejectedRows

    def inside(self, name: str, number: int) -> "_Place":
        return self._replace(where=f"{self.where}.{name}[{number}]")

    def record(self, fields: dict[str, Any] | None, context: Context) -> Record:
        return Record(self.item.number, f"{self.where}: ", fields, self.item, (context,))

    @contextlib.contextmanager
    def rejecting(self) -> Iterator[None]:
        """Lets one bad part be skipped, or stop the reading, as the policy says."""
        try:
            yield
        except DataError as error:
            # Where the policy is to stop, a part inside has named itself.
            if str(error).startswith(f"{self.path}:"):
                raise
            self.rejected.add(self.path, self.item.number, f"{self.where}: {error}", self.item.raw)


def _squad(article: Mapping[str, Any], place: _Place) -> Iterator[Record]:
    title = string_field(article, "title") if article.get("title") is not None else ""
    for number, paragraph in enumerate(_objects(article, "paragraphs")):
        inner = place.inside("paragraphs", number)
        with inner.rejecting():
            context = _context(title, string_field(_with(paragraph, "context"), "context"))
            # A paragraph that nobody asks about is a passage all the same.
            yield inner.record(None, context)
            for count, qa in enumerate(_objects(paragraph, "qas")):
                asked = inner.inside("qas", count)
                with asked.rejecting():
                    # Version 2 asks some questions that their paragraph does not answer.
                    answered = qa.get("is_impossible") is not True
                    fields = {
                        **({"_id": qa["id"]} if "id" in qa else {}),
                        "text": _with(qa, "question")["question"],
                        "answers": _texts(qa) if answered else [],
                        "metadata": {"doc": title or None},
                    }
                    yield asked.record(fields, context._replace(relevant=answered))


def _texts(qa: Mapping[str, Any]) -> list[Any]:
    """Returns the different answers to a question of SQuAD's JSON."""
    answers = _objects(qa, "answers") if qa.get("answers") is not None else []
    return list(dict.fromkeys(string_field(_with(one, "text"), "text") for one in answers))


def _has_contexts(fields: Mapping[str, Any]) -> bool:
    # A field "context" alone may be the text of a passage.
    asks = any(field != "text" for field in usual_fields("query", fields))
    return (asks and "context" in fields) or not _DPR_LISTS.keys().isdisjoint(fields)


def _contexts(fields: Mapping[str, Any]) -> Iterator[Context]:
    """Yields the passages in a row: those of DPR, or the one in a field `context`."""
    for name, relevant in _DPR_LISTS.items():
        for number, passage in enumerate(_objects(fields, name) if fields.get(name) else ()):
            try:
                text = string_field(_with(passage, "text"), "text")
                title = string_field(passage, "title") if passage.get("title") is not None else ""
                key = next((key for key in _DPR_IDS if passage.get(key) is not None), None)
                context = _context(title, text, relevant=relevant)
                if key is not None:
                    context = context._replace(id=id_field(passage, key), named=True)
            except DataError as error:
                raise DataError(f"{name}[{number}]: {error}") from error
            yield context
    text, title = fields.get("context"), fields.get("title")
    if isinstance(text, str) and text.strip():
        check_encodable(text, "context")
        yield _context(title if isinstance(title, str) else "", text)


def _context(title: str, text: str, *, relevant: bool = True) -> Context:
    """Returns a passage whose id is made of its content, so that it stays when others come."""
    digest = hashlib.sha256(f"{title}\n{text}".encode()).hexdigest()[:16]
    return Context(f"context-{digest}", title, text, relevant, named=False)


def _objects(parent: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = _with(parent, key)[key]
    if not isinstance(value, list):
        raise DataError(f"{key} is a {type(value).__name__}; expected a list of objects")
    for number, one in enumerate(value):
        if not isinstance(one, dict):
            raise DataError(f"{key}[{number}] is a {type(one).__name__}; expected an object")
    return value


def _with(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if key not in record:
        found = ", ".join(map(repr, list(record)[:10])) or "none"
        raise DataError(f"no field {key!r}; fields found: {found}")
    return record


def _has_list_of_data(head: bytes) -> bool:
    """Tells whether an object has a list `data` itself, not in a value of it."""
    marks = re.finditer(rb'"data"\s*:\s*\[|"(?:[^"\\]++|\\.)*+"|[{}\[\]]', head, re.DOTALL)
    depth = 0
    for mark in (found.group() for found in marks):
        if mark.startswith(b'"'):
            if mark.endswith(b"["):
                if depth == 1:
                    return True
                depth += 1
            continue
        depth += 1 if mark in b"{[" else -1
        if depth == 0:
            return False
    return False
