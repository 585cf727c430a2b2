"""Options of the data of a run."""

from dataclasses import dataclass
from typing import Literal

from ragjax.data.fields import parse_fields, resolve_fields
from ragjax.data.folders import FEWEST_TOKENS, TOKENS
from ragjax.index.words import check_language
from ragjax.runs.options.checks import Options, at_least


@dataclass(frozen=True, kw_only=True)
class DataConfig(Options):
    """Corpus and questions.

    Attributes:
        supervision: What is trained on and chosen by, of what the data have: `documents` only,
            `questions` too, `answers` too, or `judgements` (qrels) too. `auto`: all of it. What
            lies above is not read for train and dev; test questions are measured by all there is.
        fields: Names of the fields in the files where they differ from BEIR's, for example
            `id=docid,text=contents`.
        passage_tokens: Of a folder of documents: tokens of a passage, at most, as the encoder of
            documents counts them, without title and special tokens.
        passage_overlap: Tokens at the end of a passage that the next one begins with, at most.
        on_bad_row: What to do with a line that cannot be read: `stop`, or `skip` it, count it and
            keep it in `rejected.jsonl`.
        on_unknown: What to do where more than 1 % of a qrels file name questions or passages that
            the data do not have: `stop`, or `skip` those rows. Rows that name what `on_bad_row`
            skipped are skipped with it.
        language: Language of the passages, whose stems and stop words BM25 uses: `auto` chooses it
            by their commonest words, `none` takes words as they are written; or a name that
            Snowball has, such as `english` or `german`. Scripts without spaces need none.
        leaks: Training questions that dev or test ask too, in the same words: `drop` leaves them
            out of training, `keep` trains on them; they are named in either case.
        train_questions: At most this many training questions (the first of a seeded shuffle).
        dev_questions: At most this many dev questions, for the choices of a run and nothing else:
            the weight of the hybrid, what is kept of a training, and what is shipped.
        test_questions: At most this many test questions for retrieval metrics; 0 means all.
        answer_questions: At most this many of them are also answered by the language model.
    """

    supervision: Literal["auto", "documents", "questions", "answers", "judgements"] = "auto"
    fields: str = ""
    passage_tokens: int = TOKENS
    passage_overlap: int = 0
    on_bad_row: Literal["stop", "skip"] = "stop"
    on_unknown: Literal["stop", "skip"] = "stop"
    language: str = "auto"
    leaks: Literal["drop", "keep"] = "drop"
    train_questions: int = 240
    dev_questions: int = 200
    test_questions: int = 0
    answer_questions: int = 20

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().check()
        at_least(self, 1, "train_questions", "answer_questions")
        at_least(self, 0, "dev_questions", "test_questions", "passage_overlap")
        at_least(self, FEWEST_TOKENS, "passage_tokens")
        if self.passage_overlap > self.passage_tokens // 2:
            raise ValueError(
                f"passage_overlap must be at most half of passage_tokens={self.passage_tokens}, got"
                f" {self.passage_overlap}"
            )
        check_language(self.language)
        resolve_fields(parse_fields(self.fields))
