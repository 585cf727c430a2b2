"""Passages as rows of a table: which fields are taken, and what is wrong with a row."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from ragjax.data.fields import DEFAULT_FIELDS, found_field, missing_field, usual_fields
from ragjax.data.jsonl import DataError, check_encodable, id_field, string_field
from ragjax.data.tables.rows import Row

# Of a table without a header, as DPR and MS MARCO have it: ids, texts and, if there, titles.
_NAMELESS = {"id": "column1", "text": "column2", "title": "column3"}


class Passage(NamedTuple):
    """One unit of retrieval; the text is exactly as in the file."""

    id: str
    title: str  # "" if the file has none
    text: str
    source: str = ""  # where it is from, to be shown beside it: a file and page, an address


class _Names(NamedTuple):
    """The fields of a table that are read."""

    id: str  # "": there is none
    title: str
    text: str
    source: str


class PassageReader:
    """Reads passages from rows, from the fields that the first row has."""

    def __init__(self, given: Mapping[str, str], max_chars: int):
        """Takes the names of fields that the user gave, and the longest text."""
        self._given = given
        self._max_chars = max_chars
        self._names: _Names | None = None

    def read(self, row: Row, prefix: str) -> Passage:
        """Returns the passage of a row.

        Args:
            row: Of the table.
            prefix: Of the id, before the row's place, where there is no field of ids.

        Raises:
            DataError: A field is missing, of another type, or too long.
        """
        record = row.record
        if self._names is None:
            self._names = self._find(record)
        id_name, title_name, text_name, source_name = self._names
        text, title = record.get(text_name), record.get(title_name)
        id = record.get(id_name) if id_name else None
        # A string is what all rows have; the others go through checks that say what is wrong.
        if type(text) is not str or type(id) is not str or not id:
            id, text = self._checked(row, prefix)
        if len(text) > self._max_chars:
            raise DataError(
                f"the text has {len(text)} characters, above max_chars = {self._max_chars}; cut it "
                "into passages, or open the corpus with a larger max_chars"
            )
        if title is not None and type(title) is not str:
            title = string_field(record, title_name)
        return Passage(id, title or "", text, self._source(record, source_name))

    def encoded(self, passage: Passage) -> bytes:
        """Returns a passage as a line of JSON, in UTF-8; without the source where there is none.

        Raises:
            DataError: A lone surrogate, which is no UTF-8.
        """
        id, title, text, source = passage
        record = {"id": id, "title": title, "text": text}
        if source:
            record["source"] = source
        try:
            return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
        except TypeError as error:
            for name, value in zip(self._names or passage._fields, passage, strict=True):
                check_encodable(value, name)
            raise DataError(f"text that cannot be written: {error}") from error

    def notes(self, name: str) -> list[str]:
        """Returns a sentence on the fields taken, where they are neither BEIR's nor given."""
        names = self._names._asdict() if self._names else {}
        others = [
            f"the {ours} is read from {theirs!r}"
            for ours, theirs in names.items()
            if theirs not in ("", DEFAULT_FIELDS[ours], self._given.get(ours))
        ]
        if names and not names["id"]:
            others.append(
                "there is no field of ids, so passages are called by their place, which changes"
                " where rows before them are added or taken out; name a field with"
                " fields='id=NAME'"
            )
        return [f"{name}: {'; '.join(others)}"] if others else []

    def _find(self, record: Mapping[str, Any]) -> _Names:
        """Returns the fields that are taken.

        Raises:
            DataError: No field is the text, or several could be, or several the id.
        """
        found = {name: found_field(name, record, self._given) for name in _Names._fields}
        if list(record) in (list(_NAMELESS.values()), list(_NAMELESS.values())[:2]):
            found = found | _NAMELESS | dict(self._given)
        names = {name: found[name] or DEFAULT_FIELDS[name] for name in found}
        has_ids = found["id"] is not None or bool(usual_fields("id", record))
        if found["text"] is None or (has_ids and found["id"] is None):
            raise missing_field(record, {name: names[name] for name in ("id", "text")})
        return _Names(**names | ({} if has_ids else {"id": ""}))

    def _checked(self, row: Row, prefix: str) -> tuple[str, str]:
        """Returns id and text of a row that has no id, or a number, or a fault."""
        record, names = row.record, self._names or _Names("", "", "", "")
        if names.text not in record or (names.id and names.id not in record):
            wanted = {"id": names.id, "text": names.text}
            raise missing_field(record, {name: key for name, key in wanted.items() if key})
        text = string_field(record, names.text)
        if names.id:
            return id_field(record, names.id), text
        if there := usual_fields("id", record):
            raise DataError(f"an id in the field {there[0]!r}, which the first row does not have")
        return f"{prefix}{row.line}", text

    def _source(self, record: Mapping[str, Any], name: str) -> str:
        value = record.get(name)
        if "source" in self._given and value is not None:
            return string_field(record, name)
        if not isinstance(value, str):
            metadata = record.get("metadata")
            value = metadata.get("source") if isinstance(metadata, dict) else None
        if not isinstance(value, str):
            value = record.get("url")
        return value if isinstance(value, str) else ""
