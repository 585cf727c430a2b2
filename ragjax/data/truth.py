"""What counts as found: judged passages, or those that hold an answer of the question.

Measured on biomedical articles, fairy tales, encyclopedia articles and web questions (75 to 500
questions of dev and test each). 78 to 88 % of the questions have passages by the rule of
`AnswerPassages`; 82 to 97 % of these are the judged one, which is among them for 98 to 100 % of the
questions. BM25's MRR@10 by them differs by at most .04 from that by judgements of the same
questions, and the difference between two settings of BM25 by at most .01. Answers in up to 20
passages cost precision (65 to 94 %). Keeping those that BM25 finds among its first 20 makes it the
judge of itself: MRR@10 is up to .13 higher. A least length of an answer changes nothing.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from ragjax.data.corpus import Corpus
from ragjax.data.matching import fold, rows_with_answers

# How each truth is called, after "measured by".
TRUTHS = {
    "judgements": "relevance judgements",
    "answers": "the few passages that hold an answer",
    "written": "the passage that each was written from",
    "none": "nothing: there are neither judgements nor answers that few passages hold",
}
# An answer that stands in more passages, or that more questions have ("yes"), tells nothing.
MAX_PASSAGES = 5
_SHOWN_PASSAGES = 20_000


class AnswerPassages:
    """Which passages tell that they answer a question: few of them hold its answer.

    Of the answers of a question the ones count that stand in the fewest passages, as whole words
    (`ragjax.data.matching.holds_answer`), but in no more than `MAX_PASSAGES`, and that no more than
    so many questions have.
    """

    def __init__(self, corpus: Corpus, asked: Iterable[Sequence[str]]) -> None:
        """Takes the passages and the answers of all questions of the data."""
        self._corpus = corpus
        self._askers = Counter(name for answers in asked for name in set(map(fold, answers)))
        self._holders: dict[str, list[int]] = {}

    def rows(self, answers: Sequence[Sequence[str]]) -> list[frozenset[int]]:
        """Returns the corpus rows of each question, none where its answers tell nothing.

        Args:
            answers: Of Q questions; what was not asked before is looked for in all passages.
        """
        self._look_for({answer for own in answers for answer in own} - self._holders.keys())
        return [self._rarest(own) for own in answers]

    def _look_for(self, new: set[str]) -> None:
        if not new:
            return
        size = len(self._corpus)
        passages = tqdm(
            self._corpus, total=size, desc="answers in passages", disable=size < _SHOWN_PASSAGES
        )
        self._holders |= rows_with_answers((passage.text for passage in passages), sorted(new))

    def _rarest(self, answers: Sequence[str]) -> frozenset[int]:
        telling = [
            holders
            for answer in answers
            if self._askers[fold(answer)] <= MAX_PASSAGES
            and 0 < len(holders := self._holders[answer]) <= MAX_PASSAGES
        ]
        fewest = min(map(len, telling), default=0)
        return frozenset(row for holders in telling if len(holders) == fewest for row in holders)
