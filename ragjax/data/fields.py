"""Names of the fields in a user's files, and the error when a row lacks one."""

from collections.abc import Iterable, Mapping

from ragjax.data.jsonl import DataError
from ragjax.storage import nearest_name

DEFAULT_FIELDS: Mapping[str, str] = {
    "id": "_id",
    "title": "title",
    "text": "text",
    "source": "source",
    "query_id": "_id",
    "query": "text",
    "answers": "answers",
}
# Taken where the default is missing and one of them is there; see `plain_name`.
COMMON_NAMES: Mapping[str, tuple[str, ...]] = {
    "id": ("_id", "id", "docid", "doc_id", "document_id", "pid", "passage_id", "chunk_id"),
    "title": ("title", "wikipedia_title", "page_title", "headline"),
    "text": (
        *("text", "contents", "content", "passage", "body", "document", "page_content"),
        *("passage_text", "paragraph", "chunk", "context"),
    ),
    "query_id": ("_id", "id", "qid", "query_id", "question_id"),
    "query": ("text", "question", "query", "input"),
}
# Other names of a split -> ours.
SPLITS = {
    **{name: name for name in ("train", "dev", "test")},
    **dict.fromkeys(("validation", "valid", "val", "development"), "dev"),
    "training": "train",
    "testing": "test",
}
# Names by which the header of a table is recognised, beside those above.
_OTHER_NAMES = ("answer", "answers", "source", "url", "split", "score", "corpus_id")


def plain_name(name: str) -> str:
    """Returns a name without case, and with "_" for what is neither letter nor digit."""
    return "".join(letter if letter.isalnum() else "_" for letter in name.strip().casefold())


KNOWN_NAMES = frozenset({*_OTHER_NAMES, *(one for names in COMMON_NAMES.values() for one in names)})


def usual_fields(name: str, record: Iterable[str]) -> list[str]:
    """Returns the fields of a row that are usual names of one of `DEFAULT_FIELDS`."""
    usual = COMMON_NAMES.get(name, ())
    return [field for field in record if plain_name(field) in usual]


def found_field(name: str, record: Iterable[str], given: Mapping[str, str]) -> str | None:
    """Returns the field of a file that has one of our names.

    Args:
        name: In `DEFAULT_FIELDS`.
        record: The fields of the file, or a row of it.
        given: The names that the user gave, which are never replaced.

    Returns:
        The name that was given, or the default if it is there, or else the only field of a usual
        other name; None if there is none, or if there are several.
    """
    if name in given:
        return given[name]
    fields = list(record)
    if DEFAULT_FIELDS[name] in fields:
        return DEFAULT_FIELDS[name]
    usual = usual_fields(name, fields)
    return usual[0] if len(usual) == 1 else None


def parse_fields(text: str) -> dict[str, str]:
    """Returns the names in text such as `id=docid,text=contents`.

    Args:
        text: Pairs of a name in `DEFAULT_FIELDS` and one in the user's files.

    Raises:
        ValueError: The text is of another form.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    for name, equals, value in pairs:
        if not (name.strip() and equals and value.strip()):
            raise ValueError(f"fields {text!r}: expected id=docid,text=contents")
    return {name.strip(): value.strip() for name, _, value in pairs}


def resolve_fields(fields: Mapping[str, str] | None) -> dict[str, str]:
    """Returns all field names: those given over the BEIR ones; see `check_fields`."""
    return {**DEFAULT_FIELDS, **check_fields(fields)}


def check_fields(fields: Mapping[str, str] | None) -> dict[str, str]:
    """Returns the field names that were given.

    Args:
        fields: From the names in `DEFAULT_FIELDS` to the names in the user's files.

    Raises:
        DataError: A name that is not in `DEFAULT_FIELDS`.
    """
    for name in fields or {}:
        if name not in DEFAULT_FIELDS:
            near = nearest_name(name, DEFAULT_FIELDS)
            hint = f"; did you mean {near!r}?" if near else ""
            raise DataError(
                f"fields: unknown name {name!r}, expected some of {', '.join(DEFAULT_FIELDS)}{hint}"
            )
    return dict(fields or {})


def missing_field(record: Mapping[str, object], expected: Mapping[str, str]) -> DataError:
    """Describes a row that lacks fields.

    Args:
        record: The row.
        expected: From our names to the names looked for; at least one is not in the row.

    Returns:
        An error with the keys found, and names as `parse_fields` reads them that would work.
    """
    absent = {name: key for name, key in expected.items() if key not in record}
    suggestion = ",".join(f"{name}={_guess(name, record)}" for name in absent)
    wanted = " and ".join(f"{key!r} (the {name})" for name, key in absent.items())
    found = ", ".join(repr(key) for key in list(record)[:10]) or "none"
    return DataError(
        f"no field {wanted}; fields found: {found}; name them with fields='{suggestion}'"
    )


def _guess(name: str, record: Mapping[str, object]) -> str:
    known = [key for key in COMMON_NAMES[name] if key in record]
    return known[0] if known else "NAME"
