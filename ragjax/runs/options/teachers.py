"""Which teachers set the target of the retriever, and with what weights."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ragjax.storage import nearest_name

AUTO_TEACHERS = ("auto",)


class TeacherWeights(NamedTuple):
    """Weights of the scores whose sum g(c) a target is made of.

    The first two are log-probabilities per token, in nats; the others are z-scored over the
    candidates of a question.
    """

    answer: float = 0.0  # log p_LM(y | c∘x) / T
    question: float = 0.0  # log p_LM(x | c) / T
    prior: float = 0.0  # of the retrieval that found the candidates
    file: float = 0.0  # of a file of scores
    reranker: float = 0.0  # logit of a cross-encoder

    @property
    def named(self) -> dict[str, float]:
        """The weights above 0 by name."""
        return {name: weight for name, weight in self._asdict().items() if weight}

    def __str__(self) -> str:
        """Returns them as a flag has them."""
        return " ".join(f"{name}={weight:g}" for name, weight in self.named.items())


class LsrTarget(NamedTuple):
    """Options of the target that teachers give the retriever.

    p_LSR = softmax(g / temperature) over a question's candidates, with g the weighted sum of what
    the teachers say, and `score` the form of the answer's log-probability in it.
    """

    score: str
    temperature: float
    weights: TeacherWeights = TeacherWeights(answer=1.0)


def parse_teachers(values: Sequence[str]) -> TeacherWeights | None:
    """Returns weights of the form `name=weight`, None for `auto`.

    Raises:
        ValueError: A name is unknown or there twice, or a weight is no number above 0.
    """
    if tuple(values) == AUTO_TEACHERS:
        return None
    weights: dict[str, float] = {}
    example = "give auto, or for example answer=1 question=1 prior=0.3"
    for value in values:
        name, equals, number = value.partition("=")
        if name not in TeacherWeights._fields:
            near = nearest_name(name, TeacherWeights._fields)
            hint = (
                f"did you mean {near}?" if near else f"known: {', '.join(TeacherWeights._fields)}"
            )
            raise ValueError(f"teachers {value!r}: there is no teacher {name!r}; {hint}")
        if name in weights:
            raise ValueError(f"teachers names {name} twice: {' '.join(values)}")
        try:
            weights[name] = float(number) if equals else 1.0
        except ValueError as error:
            raise ValueError(f"teachers {value!r}: {number!r} is no number; {example}") from error
        if not 0 < weights[name] < math.inf:
            raise ValueError(f"teachers {value!r}: a weight must be a number above 0; {example}")
    if not weights:
        raise ValueError(f"teachers names none; {example}")
    return TeacherWeights(**weights)
