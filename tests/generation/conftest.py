"""One tiny model, one set of prompts and one set of stop tokens: what is compiled is shared."""

from typing import Any, NamedTuple

import generation_reference as reference
import jax
import numpy as np
import pytest

from ragjax.generation import Limits, Prompts
from ragjax.models.testing.language_model import tiny_language_model


class Setting(NamedTuple):
    """What most tests of generation start from."""

    model: Any
    prompts: list[list[int]]  # 4
    ids: np.ndarray  # [4, L], left-padded
    mask: np.ndarray
    scores: np.ndarray  # [2, 2], of the prompts as two documents of two questions
    weights: np.ndarray  # their softmax
    stop_ids: tuple[int, ...]  # some answers end early, others do not
    next_token: Any  # (prompt, answer) -> [V] log-probabilities

    @property
    def rows(self):
        """One prompt an answer."""
        return Prompts(self.ids, self.mask)

    @property
    def by_doc(self):
        """Two questions with two documents each."""
        return Prompts(*reference.by_document((self.ids, self.mask)), self.scores)

    def limits(self, **changes):
        """Limits that some answers reach and others do not."""
        return Limits(**{"max_new_tokens": reference.NEW, "stop_ids": self.stop_ids, **changes})


def make_setting(family):
    """Builds a setting for one kind of tiny model."""
    rng = np.random.default_rng(0)
    model = tiny_language_model(family=family)
    prompts = reference.make_prompts(rng)
    ids, mask = reference.pad(prompts, rng)
    scorer = reference.Scorer(model)
    free = [
        reference.beam_reference(lambda answer, p=prompt: scorer(p, answer), beams=2)
        for prompt in prompts
    ]
    # The second choice of one row and the third token of another: neither ends everything.
    stop_ids = (free[0][1][2][0], free[1][0][2][2])
    scores = np.array([[0.3, -0.4], [1.0, 2.0]], np.float32)
    weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return Setting(model, prompts, ids, mask, scores, weights, stop_ids, scorer)


@pytest.fixture(scope="session")
def causal():
    """A decoder-only model."""
    return make_setting("llama")


@pytest.fixture(scope="session")
def seq2seq():
    """An encoder-decoder whose answers may begin with any token."""
    return make_setting("t5")


@pytest.fixture(autouse=True)
def strict_dtypes(request):
    """A project may let no dtypes mix; what the slow tests compare with does."""
    promotion = "standard" if request.node.get_closest_marker("slow") else "strict"
    with jax.numpy_dtype_promotion(promotion):
        yield
