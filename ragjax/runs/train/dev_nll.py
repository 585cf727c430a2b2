"""How likely the right answers to dev questions are, while the language model is trained.

Q dev questions, B batches.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from ragjax.data import Question
from ragjax.index import SearchResult
from ragjax.models.language_model import LanguageModel
from ragjax.runs.options.dual import LMConfig
from ragjax.runs.options.modes import MODES
from ragjax.runs.tokens import training_prompts
from ragjax.runs.train.reading import (
    Prompt,
    make_prompt,
    pack_prompts,
    scored_length,
    unpacked,
    useless,
)
from ragjax.runs.trainable import SplitModel
from ragjax.runs.workspace import Workspace
from ragjax.storage.processes import host
from ragjax.training.mesh import spread_rows

DEV_QUESTIONS = 12
"""Dev questions that are measured, at most: each costs a few forward passes."""
_BATCH = 8


class DevNll:
    """Measures -NLL per token of the right answers, for `BestStep`.

    Each question is read twice: behind the documents that are served, and behind one known to be of
    no use, which should do no harm; its figure is the mean of both. Questions without answers are
    themselves scored behind their best document.

    Attributes:
        count: Questions that are measured.
    """

    def __init__(
        self, workspace: Workspace, config: LMConfig, split: SplitModel, found: SearchResult
    ) -> None:
        """Prepares the prompts.

        Args:
            workspace: Data and models.
            config: Options of the stage.
            split: The language model's parameters before it.
            found: `[Q, K]` documents of the dev questions, best first.
        """
        self._workspace, self._split = workspace, split
        self._prompts: list[Prompt] = []
        self._owner: list[int] = []  # question of each prompt
        mode, evaluation = MODES[workspace.config.mode], workspace.config.evaluation
        served = 1 if mode.apart else evaluation.documents
        rows = _measured_rows(workspace.questions["dev"], found)
        builder = training_prompts(workspace.config.prompt, workspace.lm)
        truths = workspace.relevant_rows("dev")
        for place, row in enumerate(rows):
            question, docs = workspace.questions["dev"][row], found.doc_ids[row][found.mask[row]]
            read = [docs.tolist()[:served]]
            others = useless(workspace, question, docs.tolist(), truths[row])[:1]
            read += [others] if others and question.answers else []
            self._prompts += [make_prompt(workspace, builder, question, one) for one in read]
            self._owner += [place] * len(read)
        self.count = len(rows)

    def __call__(self, trainable: Any) -> NDArray[np.float64]:
        """Returns `[Q]` of the questions that are measured, higher is better."""
        sums = [-np.inf] * len(self._prompts)
        for rows, (batch, below) in zip(self._places, self._batches, strict=True):
            log_probs = self._score(trainable, self._split.frozen, batch, below)
            for values, prompts in zip(host(log_probs), rows, strict=False):
                start = 0
                for prompt in prompts:
                    count = len(self._prompts[prompt].target)
                    sums[prompt] = float(values[start : start + count].mean())
                    start += count
            self._workspace.stop.check()
        by_question: dict[int, list[float]] = {}
        for owner, value in zip(self._owner, sums, strict=True):
            by_question.setdefault(owner, []).append(value)
        means = [np.mean(by_question[owner]) for owner in sorted(by_question)]
        return np.array(means, np.float64)

    @functools.cached_property
    def _packing(self) -> Any:
        order = sorted(range(len(self._prompts)), key=lambda p: -self._prompts[p].size)
        devices = self._workspace.layout.num_devices
        return pack_prompts(self._prompts, order, batch_size=_BATCH, devices=devices)

    @functools.cached_property
    def _places(self) -> list[list[list[int]]]:
        """The prompts of each row of each batch."""
        if self._workspace.lm.family.packed_token_log_probs is not None:
            return self._packing.batches
        numbers = range(len(self._prompts))
        return [[[p] for p in numbers[s : s + _BATCH]] for s in numbers[::_BATCH]]

    @functools.cached_property
    def _batches(self) -> list[tuple[Any, Any]]:
        """The rows of each batch, and what the frozen layers make of them, computed once."""
        lm = self._workspace.lm
        if lm.family.packed_token_log_probs is None:
            builder = training_prompts(self._workspace.config.prompt, lm)
            length = -(-max(len(prompt.context) for prompt in self._prompts) // 32) * 32
            sizes = length, scored_length(builder, self._prompts)
            groups = [[self._prompts[row[0]] for row in rows] for rows in self._places]
            return [(self._spread(unpacked(builder, _filled(one), *sizes)), None) for one in groups]
        rows = [
            self._spread(self._packing.batch(number, self._prompts, lm.pad_id).rows)
            for number in range(len(self._packing.batches))
        ]
        params = self._split.merged(self._split.trainable)
        if lm.family.packed_states is None or not isinstance(params.get("layers"), tuple):
            return [(batch, None) for batch in rows]
        states = jax.jit(
            lambda params, batch: lm.family.packed_states(
                lm.config, self._workspace.in_compute_dtype(params), batch
            )
        )
        return [(batch, states(params, batch)) for batch in rows]

    def _spread(self, batch: Any) -> Any:
        return spread_rows(batch, self._split.frozen)

    @functools.cached_property
    def _score(self) -> Callable[..., jax.Array]:
        return jax.jit(functools.partial(_score, self._workspace, self._split))


def _score(
    workspace: Workspace, split: SplitModel, trainable: Any, frozen: Any, batch: Any, below: Any
) -> jax.Array:
    """Returns the log-probabilities of the targets of a batch."""
    lm: LanguageModel = workspace.lm
    merged = split.merge(trainable, frozen) if split.merge else frozen
    params = workspace.in_compute_dtype(merged)
    if lm.family.packed_token_log_probs is None:
        return lm.family.token_log_probs(lm.config, params, batch)
    given = {} if below is None else {"below": below}
    return lm.family.packed_token_log_probs(lm.config, params, batch, **given)


def _measured_rows(questions: tuple[Question, ...], found: SearchResult) -> list[int]:
    """Returns the dev questions that are measured: those with answers, where there are any."""
    there = [row for row in range(len(questions)) if found.mask[row].any()]
    answered = [row for row in there if questions[row].answers]
    return (answered or there)[:DEV_QUESTIONS]


def _filled(prompts: list[Prompt]) -> list[Prompt]:
    """Fills a batch, so that all have one shape; the scores of the copies are not read."""
    return prompts + prompts[:1] * (_BATCH - len(prompts))
