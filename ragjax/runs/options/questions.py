"""Options of questions that are made from passages."""

from dataclasses import dataclass
from typing import Literal

from ragjax.runs.options.checks import Options, at_least, fraction, positive

# Passages that questions are written from where the data have no training questions, and where
# they have, but nothing tells the passages of the dev questions.
_PASSAGES, _MEASURED_PASSAGES = 240, 96


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig(Options):
    r"""Questions that the language model writes from passages, to train on like those of people.

    Attributes:
        passages: At most this many passages, those without a training question first; 0: none;
            negative: 240 where the data have no training questions; 96, to choose and to measure by
            alone, where nothing tells the passages of the dev questions; else none.
        per_passage: Questions written from each passage.
        task: What is made of a passage: questions that the language model has `written`; or,
            without it, one of its sentences (`inverse_cloze`) or its `title`, to find it by; or a
            sentence that the language model writes again from what is found by it (`statement`).
        template: What the language model goes on from, as text or as the name of a file that
            holds it: {passage} once and, if examples are to be shown, {examples} before it. Empty:
            `{examples}{passage}\n\nQuestion:`.
        temperature: Of the sampling.
        top_p: Tokens are drawn from the fewest that together have this probability.
        found: A written question is trained on if its passage is among this many that the
            un-adapted hybrid finds.
        teacher_weight: Weight of the language model's scores in the target of a written question;
            the rest is on its passage.
        file: Questions in place of written ones, from a `written.jsonl`, edited or not: JSON lines
            with `text`, `passage` (its id) and, if it is to be left out, `"kept": false`.
    """

    passages: int = -1
    per_passage: int = 3
    task: Literal["written", "inverse_cloze", "title", "statement"] = "written"
    template: str = ""
    temperature: float = 0.7
    top_p: float = 0.95
    found: int = 3
    teacher_weight: float = 0.0
    file: str = ""

    def count(self, given: int, *, measured: bool = True) -> int:
        """Returns how many passages questions are made from.

        Args:
            given: Training questions that the data have.
            measured: Whether anything tells the passages of the dev questions.
        """
        if self.passages >= 0:
            return self.passages
        return (0 if measured else _MEASURED_PASSAGES) if given else _PASSAGES

    @property
    def passage_share(self) -> float:
        """Share of the target of a written question that is on its passage."""
        return 0.0 if self.task == "statement" else 1 - self.teacher_weight

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range, or the fields at odds."""
        super().check()
        at_least(self, 1, "per_passage", "found")
        positive(self, "temperature", "top_p")
        fraction(self, "top_p", "teacher_weight")
        if self.template and "{passage}" not in self.template and "\n" in self.template:
            raise ValueError(f"template holds no {{passage}}: {self.template!r}")
        if self.file and (self.passages > 0 or self.task != "written"):
            raise ValueError(
                f"file={self.file} takes questions that are written already; leave passages and"
                " task out"
            )
