"""Reads the files that a run wrote, whatever became of them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class RunFiles:
    """Reads the files of a folder and remembers what could not be read.

    Attributes:
        problems: A sentence on each file that is damaged.
    """

    def __init__(self, folder: Path):
        """Names the folder."""
        self._folder = folder
        self.problems: list[str] = []

    def mapping(self, name: str) -> dict[str, Any]:
        """Returns the JSON object in a file; empty where there is none."""
        try:
            value = json.loads((self._folder / name).read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self.problems.append(f"{name} cannot be read: {error}")
            return {}
        if not isinstance(value, dict):
            self.problems.append(f"{name} holds no JSON object")
            return {}
        return value

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Returns the JSON objects of a file of lines; a torn last line is left out."""
        try:
            text = (self._folder / name).read_text("utf-8")
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            self.problems.append(f"{name} cannot be read: {error}")
            return []
        rows = list(self._rows(text.split("\n")))
        lost = sum(1 for line in text.split("\n")[:-1] if line.strip()) - len(rows)
        if lost > 0:
            self.problems.append(f"{name}: {lost} lines cannot be read")
        return rows

    def _rows(self, lines: Sequence[str]) -> Iterator[dict[str, Any]]:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row
