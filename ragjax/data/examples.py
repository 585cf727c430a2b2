"""What a retrieval-augmented model is trained and judged on: questions, answers, qrels."""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ragjax.data.corpus import Corpus
from ragjax.data.jsonl import DataError
from ragjax.data.matching import refuse_string, tokenize
from ragjax.data.overlap import Twins, find_twins
from ragjax.data.truth import AnswerPassages

# What a user may have, each with what stands before it; what a data set has of it for train and dev
# is its `supervision`.
SUPERVISION = ("documents", "questions", "answers", "judgements")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A query with the answers that count as right.

    Attributes:
        id: As in queries.jsonl.
        text: As written; the readers take the white space around it off.
        answers: Accepted answers; empty where none are known.
        source: The document the question was written about (`metadata.doc`), if known.
        passage: Id of the passage that a language model wrote the question from, which is then
            its truth; None for one that a person asked.
        rest: What training reads of that passage in place of the whole, where the question is a
            part of it; "": the whole.
    """

    id: str
    text: str
    answers: tuple[str, ...] = ()
    source: str | None = None
    passage: str | None = None
    rest: str = ""

    def __post_init__(self):
        """Raises TypeError for answers that are one string."""
        refuse_string(self.answers, "answers")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A corpus with questions by split, and what is known of their passages.

    Attributes:
        name: The folder's name.
        corpus: The passages.
        questions: Split name ("train", "dev", "test", ...) to questions, in file order.
        qrels: Relevance judgements: split name to question id to passage id to grade, a number;
            above 0 is relevant. Every id exists, every judged question has at least one relevant
            passage. What counts as found is asked of `graded_rows`, which knows it without
            judgements too.
        notes: Sentences on what was skipped or dropped, to show to the user.
    """

    name: str
    corpus: Corpus
    questions: Mapping[str, tuple[Question, ...]]
    qrels: Mapping[str, Mapping[str, Mapping[str, float]]]
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def twins(self) -> Twins:
        """Passages that are copies of others, and questions that are passages."""
        questions = {q.id: q.text for split in self.questions.values() for q in split}
        return find_twins(self.corpus, questions.items())

    @property
    def supervision(self) -> str:
        """What there is to train and to choose by: one of `SUPERVISION`."""
        if self.qrels.keys() & {"train", "dev"}:
            return "judgements"
        train = self.questions.get("train", ())
        if any(question.answers for question in train):
            return "answers"
        return "questions" if train else "documents"

    def graded_rows(
        self, split: str, questions: Sequence[Question] | None = None
    ) -> list[dict[int, float]]:
        """Returns corpus row to grade for each question of a split, in the same order.

        The passage that a question was written from; else those that are judged; else those that
        hold an answer, see `AnswerPassages`; else none, where nothing is known.

        Args:
            split: Its name.
            questions: Of the split; None: all of them.

        Raises:
            DataError: The data has no such split.
        """
        if questions is None:
            if split not in self.questions:
                known = sorted(self.questions)
                raise DataError(f"{self.name} has no split {split!r}; it has {known}")
            questions = self.questions[split]
        judged, row_of = self.qrels.get(split, {}), self.corpus.row_of
        held = iter(self._answer_passages.rows(self._unjudged(split, questions)))
        graded: list[dict[int, float]] = []
        for question in questions:
            if question.passage is not None:
                graded.append({row_of(question.passage): 1})
            elif question.id in judged:
                graded.append({row_of(id): grade for id, grade in judged[question.id].items()})
            else:
                graded.append(dict.fromkeys(sorted(next(held)), 1))
        return graded

    def look_up(self, questions: Mapping[str, Sequence[Question]]) -> None:
        """Reads the passages once for what `graded_rows` tells of these questions, by split."""
        unjudged = [self._unjudged(split, asked) for split, asked in questions.items()]
        self._answer_passages.rows(sum(unjudged, []))

    def _unjudged(self, split: str, questions: Sequence[Question]) -> list[tuple[str, ...]]:
        """Returns the answers of those questions whose passages only their answers can tell."""
        judged = self.qrels.get(split, {})
        return [q.answers for q in questions if q.passage is None and q.id not in judged]

    def truth(self, split: str, questions: Sequence[Question]) -> str:
        """Returns by what most questions of a split know their passages, as `graded_rows` says.

        Args:
            split: Its name.
            questions: Of the split.

        Returns:
            "judgements", "answers", "written", or "none" where nothing is known of any.
        """
        judged = self.qrels.get(split, {})
        sources = Counter(
            "written"
            if question.passage is not None
            else ("judgements" if question.id in judged else "answers")
            for question, rows in zip(questions, self.graded_rows(split, questions), strict=True)
            if rows
        )
        return max(sources, key=sources.__getitem__, default="none")

    @functools.cached_property
    def _answer_passages(self) -> AnswerPassages:
        asked = [question.answers for split in self.questions.values() for question in split]
        return AnswerPassages(self.corpus, asked)


def hold_out(dataset: Dataset, *, split: str, into: str, fraction: float) -> Dataset:
    """Moves a fraction of a split's questions into a new split, chosen by a hash of their ids.

    The choice does not depend on file order or on any seed, so every run agrees on it. At least
    one question stays and, for a positive fraction, at least one moves.

    Args:
        dataset: Has `split` and lacks `into`.
        split: Where the questions come from.
        into: Name of the new split.
        fraction: Of the questions, in [0, 1); 0 returns the dataset unchanged.

    Raises:
        DataError: The fraction is out of range, or one question cannot be divided.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"dev_fraction must be in [0, 1), got {fraction}")
    questions = dataset.questions[split]
    if fraction == 0:
        return dataset
    if len(questions) < 2:
        raise DataError(
            f"{dataset.name}: the split {split} has {len(questions)} question, too few to hold "
            f"some out; add qrels/{into}.tsv, or set dev_fraction to 0"
        )
    count = min(max(round(fraction * len(questions)), 1), len(questions) - 1)
    by_hash = sorted(
        (question.id for question in questions),
        key=lambda id: hashlib.sha256(id.encode("utf-8")).digest(),
    )
    moved = frozenset(by_hash[:count])
    note = (
        f"there is no {into} split: {count} of the {len(questions)} {split} questions, chosen by a "
        f"hash of their ids, are held out as {into}"
    )
    judged = dataset.qrels.get(split, {})
    qrels = {
        split: {id: grades for id, grades in judged.items() if id not in moved},
        into: {id: grades for id, grades in judged.items() if id in moved},
    }
    return dataclasses.replace(
        dataset,
        questions={
            **dataset.questions,
            split: tuple(question for question in questions if question.id not in moved),
            into: tuple(question for question in questions if question.id in moved),
        },
        qrels={**dataset.qrels, **qrels} if judged else dataset.qrels,
        notes=(*dataset.notes, note),
    )


def leaked_questions(
    dataset: Dataset, *, split: str = "test", against: str = "train"
) -> tuple[str, ...]:
    """Returns the ids of a split's questions whose text is also asked in another split.

    Texts are compared without case, punctuation and Unicode form; symbols count ("C++", "C#").
    """
    seen = {_normalised(question.text) for question in dataset.questions.get(against, ())}
    return tuple(
        question.id
        for question in dataset.questions.get(split, ())
        if _normalised(question.text) in seen
    )


def _normalised(text: str) -> str:
    return " ".join(token.text for token in tokenize(text)) or text
