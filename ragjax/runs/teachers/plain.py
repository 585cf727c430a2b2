"""Teachers on plain strings, for a trainer of one's own.

    from ragjax.models import load_language_model
    from ragjax.runs import LMTeacher

    teacher = LMTeacher(lm=load_language_model("FOLDER"))
    scores = teacher.scores("how long is the warranty?", "two years", passages)  # [K] float32
    loss = losses.pdist_loss(doc_scores, losses.lsr_target(scores, temperature=0.5))

K passages.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ragjax import losses
from ragjax.data import PromptBuilder, PromptTemplate
from ragjax.models.language_model import LanguageModel
from ragjax.runs.options.shared import PromptConfig
from ragjax.runs.options.teachers import TeacherWeights
from ragjax.runs.teachers.batches import row_batches, scored_batches
from ragjax.runs.teachers.reading import Pair, pair_rows
from ragjax.runs.teachers.target import SCORES
from ragjax.runs.tokens import make_prompts, prompts_of


class Teacher(Protocol):
    """Says how useful passages are for a question."""

    def scores(self, question: str, answer: str | None, passages: Sequence[str]) -> np.ndarray:
        """Returns `[K]` float32, higher is better; answer None: it is not known."""
        ...


@dataclass(frozen=True, kw_only=True)
class LMTeacher:
    """A language model that scores passages by a question and its answer, read after each of them.

    g(c) = answer · log p(y|c∘x) / T + question · log p(x|c) / T, in nats per token, T being the
    tokens of the answer y or of the question x. Without an answer, the question's score takes the
    weight of both.

    Attributes:
        lm: Any causal decoder or encoder-decoder.
        answer: Weight of the answer's score.
        question: Weight of the question's score.
        score: Form of the answer's score: `log_prob_per_token`, `log_prob`, `prob` or
            `prob_per_token`.
        template: The text around passages, questions and answers; None: what the language model was
            trained with, or a usual one.
        batch_tokens: Tokens in a batch, about.

    References:
        Lin et al., RA-DIT: Retrieval-Augmented Dual Instruction Tuning, 2023, section 2.4 (the
        answer); Sachan et al., Questions Are All You Need to Train a Dense Passage Retriever, 2022,
        section 2 (the question).
    """

    lm: LanguageModel
    answer: float = 1.0
    question: float = 1.0
    score: str = "log_prob_per_token"
    template: PromptTemplate | None = None
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        """Raises ValueError for a form of score that there is not, or weights that are no use."""
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {self.score!r}")
        if min(self.answer, self.question) < 0 or not self.answer + self.question > 0:
            raise ValueError(
                "answer and question must be weights of at least 0, one of them above it, got"
                f" {self.answer} and {self.question}"
            )

    def scores(self, question: str, answer: str | None, passages: Sequence[str]) -> np.ndarray:
        """Returns g of each passage, `[K]` float32.

        Args:
            question: Its text.
            answer: Its answer; None: not known.
            passages: K texts; each is cut to what the template allows.

        Raises:
            DataError: The answer is empty, or the question leaves no room for a passage.
        """
        weights = TeacherWeights(answer=self.answer, question=self.question)
        if answer is None:
            weights = TeacherWeights(question=self.answer + self.question)
        if not passages:
            return np.zeros(0, np.float32)
        joiner, most = self._prompts.joiner, self._prompts.template.max_document_tokens
        documents = [document for document, _ in joiner.encode_texts(passages, most)]
        pairs = [
            Pair(
                question,
                answer,
                row,
                document,
                f"answer {row}" if weights.answer else None,
                f"question {row}" if weights.question else None,
            )
            for row, document in enumerate(documents)
        ]
        found: dict[str, tuple[float, int]] = {}
        rows = pair_rows(self._prompts, pairs)
        batches = row_batches(self.lm, self._prompts, rows, self.batch_tokens)
        for _, scores in scored_batches(self.lm, self.lm.params, batches):
            found |= scores
        total = np.zeros(len(pairs), np.float32)
        for name, weight in weights.named.items():
            of_name = [found[f"{name} {row}"] for row in range(len(pairs))]
            log_probs = np.array([[log_prob] for log_prob, _ in of_name], np.float32)
            lengths = np.array([length for _, length in of_name], np.int32)
            form = SCORES[self.score] if name == "answer" else losses.log_prob_per_token
            total += np.float32(weight) * np.asarray(form(log_probs, lengths))[:, 0]
        return total

    @functools.cached_property
    def _prompts(self) -> PromptBuilder:
        if self.template is None:
            return make_prompts(PromptConfig(), self.lm)
        return prompts_of(self.lm, self.template)
