"""How long the texts of a run are, and how fast its models read them on this machine."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ragjax.models.inputs import LMBatch, Tokens
from ragjax.models.layers.linear import rounds_on_cpu
from ragjax.runs.models import encode_tokens, score_tokens
from ragjax.runs.options.modes import MODES
from ragjax.runs.options.shared import LearningConfig, RunConfig
from ragjax.runs.teachers.batches import context_batches
from ragjax.runs.tokens import bucket_of, buckets
from ragjax.runs.workspace import Workspace

# A training step in forward passes. The encoder: one forward pass, one more for its chunks, and a
# backward pass that takes 3.4 (measured on two cores; 2 by arithmetic). The language model: the
# backward pass of the trained layers.
_ENCODER_FORWARD, _ENCODER_BACKWARD = 2.0, 3.4
_LM_BACKWARD = 2.0
# Speed of a forward pass whose products round their factors, over that in float32.
_ROUNDED_GAIN = 1.8
# Share of a backward pass for the gradients of the weights, which adapters do without.
_ADAPTER_SHARE = 0.5
# Tokens are generated one at a time, which keeps the processor less busy than a prompt does.
_DECODE_TOKEN = 3.0
# Of a written question, and of the examples before its passage.
_WRITTEN_TOKENS, _EXAMPLE_TOKENS = 18, 90
# Template and question; and a language model's tokens for one of the encoder's.
_QUESTION_TOKENS = 28
_LM_TOKENS = 1.15
_CALIBRATION_ROWS = 8


class Texts:
    """Mean lengths of the texts of a run, and the speed of its models; measured when first read.

    Attributes:
        document: Tokens of a document in a prompt.
        question: Tokens of the rest of a prompt, the answer included.
        prompt: Tokens of a prompt with one document.
        lm_passes: A training step of the language model in forward passes.
        encoder_passes: A training step of the encoder in forward passes.
    """

    def __init__(self, workspace: Workspace, config: RunConfig) -> None:
        """Counts the texts; speeds are measured when first read."""
        self.workspace, self.config = workspace, config
        self._lengths = workspace.doc_tokens.lengths
        self.document = min(config.prompt.document_tokens, float(self._lengths.mean()) * _LM_TOKENS)
        self.question = _QUESTION_TOKENS + config.prompt.answer_tokens
        self.prompt = self.document + self.question
        lm, encoder = workspace.lm.config.num_layers, workspace.encoder.config.num_layers
        self.lm_passes = 1 + config.trains_lm * _backward(config.language_model, lm, _LM_BACKWARD)
        self.encoder_passes = _ENCODER_FORWARD + config.trains_retriever * _backward(
            config.retriever, encoder, _ENCODER_BACKWARD
        )

    @functools.cached_property
    def corpus(self) -> int:
        """Tokens of all documents for the encoder, padding included."""
        padded = np.asarray(buckets(self.workspace.encoder))
        return int(padded[np.searchsorted(padded, self._lengths)].sum())

    def scored(self, pairs: int) -> float:
        """Returns the tokens of so many (question, document) pairs for the language model."""
        if self.workspace.lm.family.packed_token_log_probs is None:
            return pairs * self.prompt
        # Pairs are packed behind their documents: as many as so many random draws would touch.
        size = len(self._lengths)
        touched = size * (1 - math.exp(-pairs / size))
        return touched * self.document + pairs * self.question

    @functools.cached_property
    def encoder_rate(self) -> float:
        """Tokens encoded a second, from one batch in the length of most documents."""
        encoder = self.workspace.encoder
        length = bucket_of(encoder, int(np.median(self._lengths)))
        rows = max(1, encode_tokens(self.config) // length)
        tokens, encode = Tokens(*_filled(rows, length, encoder.pad_id)), jax.jit(encoder.encode)
        return rows * length / _mean_seconds(lambda: encode(encoder.params, tokens))

    @functools.cached_property
    def lm_rate(self) -> float:
        """Tokens scored a second, from one batch of typical prompts."""
        workspace, lm, prompts = self.workspace, self.workspace.lm, self.workspace.prompts
        typical = min(self.config.prompt.document_tokens + 30, prompts.max_context_length)
        tokens = score_tokens(self.config)
        batch = context_batches(prompts, [typical] * _CALIBRATION_ROWS, tokens)[0]
        rows, length, targets = batch.batch_size, batch.length, prompts.max_target_length
        filler = LMBatch(*_filled(rows, length, lm.pad_id), *_filled(rows, targets, lm.pad_id))
        score, params = jax.jit(lm.token_log_probs), workspace.in_compute_dtype(lm.params)
        return rows * (length + targets) / _mean_seconds(lambda: score(params, filler))

    def answered(self, split: str) -> int:
        """Returns how many questions of a split the language model answers."""
        with_answer = sum(bool(question.answers) for question in self.workspace.questions[split])
        return min(with_answer, self.config.data_options.answer_questions)

    def written(self, count: int) -> float:
        """Returns the tokens that so many questions written from a passage take."""
        return self.document + _EXAMPLE_TOKENS + _DECODE_TOKEN * count * _WRITTEN_TOKENS

    def prompts_of(self, documents: int) -> int:
        """Returns the prompts that an answer from so many documents takes."""
        return max(1, documents) if MODES[self.config.mode].apart else 1

    def answer(self, documents: int) -> float:
        """Returns the tokens that an answer from so many documents takes."""
        evaluation = self.config.evaluation
        written = evaluation.max_new_tokens * (evaluation.beams if documents else 1)
        prompt = self.question + _DECODE_TOKEN * written
        return documents * self.document + self.prompts_of(documents) * prompt


def _backward(config: LearningConfig, num_layers: int, whole: float) -> float:
    """Returns a backward pass in forward passes, given that through all layers and weights."""
    depth = config.train_layers / num_layers if config.train_layers else 1.0
    # Only forward passes gain from rounded factors.
    whole *= _ROUNDED_GAIN if rounds_on_cpu() else 1.0
    return depth * (whole * (_ADAPTER_SHARE if config.lora_rank else 1.0) + config.remat)


def _filled(rows: int, length: int, pad_id: int) -> tuple[jax.Array, jax.Array]:
    """Returns token ids and their mask, all of it real."""
    return jnp.full((rows, length), pad_id, jnp.int32), jnp.ones((rows, length), bool)


def _mean_seconds(run: Callable[[], Any], repeats: int = 2) -> float:
    jax.block_until_ready(run())  # compiles
    started = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(run())
    return (time.perf_counter() - started) / repeats
