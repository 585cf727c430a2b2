"""What is wrong, each in one sentence that says where and what to do."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LISTED = 1000  # of one check; the others are counted


class Problem(NamedTuple):
    """One thing that is wrong."""

    reason: str  # with the remedy; with the place where `file` is empty
    refused: bool  # True: a run ends with it; False: it goes on
    file: str = ""
    line: int = 0  # from 1, as the file counts: lines, or rows of a table

    def __str__(self) -> str:
        """Returns the sentence, with its place."""
        return f"{self.file}:{self.line}: {self.reason}" if self.file else self.reason


class Problems:
    """Collects problems, the first `LISTED` of them as they are.

    Attributes:
        listed: The first ones.
        count: All of them.
        refused: Those of them that end a run.
    """

    def __init__(self) -> None:
        """Starts without any."""
        self.listed: list[Problem] = []
        self.count = self.refused = 0

    def add(self, problem: Problem) -> None:
        """Takes one, unless it is the last one again."""
        if self.listed[-1:] == [problem]:
            return
        self.count += 1
        self.refused += problem.refused
        if len(self.listed) < LISTED:
            self.listed.append(problem)

    def refuse(self, error: Exception) -> None:
        """Takes what ends a run."""
        self.add(Problem(str(error), refused=True))

    def survive(self, sentence: str) -> None:
        """Takes what a run goes on with."""
        self.add(Problem(str(sentence), refused=False))

    def add_rejected(self, cache: Path, *, refused: bool) -> None:
        """Takes the bad rows that were skipped in reading.

        Args:
            cache: The folder that has the lists of them.
            refused: Whether a run would stop at the first.
        """
        for path in sorted(cache.rglob("rejected.jsonl")):
            for row in _rows(path):
                self.add(Problem(row["reason"], refused, row["file"], row["line"]))


def _rows(path: Path) -> Iterator[dict]:
    with path.open("rb") as file:
        yield from map(json.loads, file)
