"""A row of a table that is not JSON lines."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

_SHOWN = 10  # columns in a note


class TableRow(NamedTuple):
    """One row; as `JsonRow`, but its text is made only where it is asked for."""

    line: int  # from 1: the line where it begins in a text file, else its place among the rows
    record: dict[str, Any]  # by column

    @property
    def raw(self) -> bytes:
        """The row as JSON, for lists of bad rows."""
        return json.dumps(self.record, ensure_ascii=False, default=str).encode("utf-8", "replace")


def shown_columns(columns: Sequence[str]) -> str:
    """Returns the first names of columns, for a note or an error."""
    more = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
    return ", ".join(map(str, columns[:_SHOWN])) + more
