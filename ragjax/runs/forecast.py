"""What a run will cost, from the lengths of its texts and the measured speed of its models."""

import functools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ragjax.evaluation.systems import SYSTEMS
from ragjax.index import choose_index
from ragjax.models.inputs import LMBatch, Tokens
from ragjax.refresh import (
    RefreshForecast,
    RefreshWork,
    estimate_build_seconds,
    forecast_refresh,
)
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.options.end_to_end import RagConfig
from ragjax.runs.options.modes import MODES
from ragjax.runs.options.shared import LearningConfig, RunConfig
from ragjax.runs.teachers.batches import context_batches
from ragjax.runs.tokens import bucket_of, buckets
from ragjax.runs.train.batches import RagBatches
from ragjax.runs.train.stages import stage_steps
from ragjax.runs.trainable import split_lm, split_towers
from ragjax.runs.workspace import Workspace, tower_params

# A training step in forward passes. The encoder: one forward pass, one more for its chunks, and a
# backward pass that takes 3.4 (measured on two cores; 2 by arithmetic). The language model: the
# backward pass of the trained layers.
_ENCODER_FORWARD, _ENCODER_BACKWARD = 2.0, 3.4
_LM_BACKWARD = 2.0
# Share of a backward pass for the gradients of the weights, which adapters do without.
_ADAPTER_SHARE = 0.5
# Tokens are generated one at a time, which keeps the processor less busy than a prompt does.
_DECODE_TOKEN = 3.0
# Distinct prompts with documents per answered question and language model: systems often retrieve
# the same document first.
_PROMPTS = 2.0
# Template and question; and a language model's tokens for one of the encoder's.
_QUESTION_TOKENS = 28
_LM_TOKENS = 1.15
_COMPILE_SECONDS = 6.0
_COMPILED_SHAPES = 12
_CALIBRATION_ROWS = 8
# Copies of the trained parameters on disk: with the optimizer's two moments, in two checkpoints.
_CHECKPOINT_COPIES = 3 * 2
# Stages that a training step consists of.
_STEP_STAGES = ("reading", "teacher", "retriever")


class Work(NamedTuple):
    """Tokens that one stage puts through a model."""

    stage: str
    tokens: float
    rate: float  # tokens a second in a forward pass
    passes: float = 1.0  # forward passes that a token costs


class Cost(NamedTuple):
    """A forecast; seconds are for this machine, measured a moment ago."""

    documents: int  # encoded, all times together
    lm_forwards: int  # (document, question) prompts read by the language model
    seconds: dict[str, float]  # by stage
    bytes_on_disk: int
    free_bytes: int
    refresh: RefreshForecast | None  # of the index while the retriever trains; None: not refreshed

    def describe(self) -> str:
        """Returns a few lines for the user."""
        shown = {stage: s for stage, s in self.seconds.items() if s >= 1}
        lines = [
            "\n== forecast",
            f"{self.documents:,} documents to encode, {self.lm_forwards:,} prompts for the language"
            " model",
            f"about {_total(self.seconds, shown)}",
            f"about {self.bytes_on_disk / 2**20:,.0f} MiB on disk"
            f" ({self.free_bytes / 2**20:,.0f} MiB free)",
        ]
        if self.bytes_on_disk > self.free_bytes:
            lines.append("warning: the disk is too small for this run")
        if self.refresh is not None:
            lines.append(self.refresh.describe())
        return "\n".join(lines)


def estimate_cost(workspace: Workspace, config: AdaptConfig) -> Cost:
    """Measures both models on a few real texts and forecasts a dual run.

    Compiling for the measurement is not lost: the run uses the same shapes.
    """
    texts = _Texts(workspace, config)
    lm, retriever = config.language_model, config.retriever
    train = len(workspace.questions["train"])
    rounds = retriever.rounds if config.trains_retriever else 0
    pairs = train * retriever.candidates * rounds if retriever.objective != "dpr" else 0
    scored = pairs * texts.prompt
    if workspace.lm.family.packed_token_log_probs is not None:
        # Pairs are packed behind their documents: as many as so many random draws would touch.
        size = len(workspace.doc_tokens)
        touched = size * (1 - math.exp(-pairs / size))
        scored = touched * texts.document + pairs * texts.question
    rows = min(lm.questions, train) * lm.documents * lm.epochs if config.trains_lm else 0
    length = bucket_of(
        workspace.encoder, min(retriever.doc_tokens, int(workspace.doc_tokens.lengths.max()))
    )
    taught = train * (retriever.candidates * length + 32) * retriever.epochs * rounds
    return _cost(
        texts,
        [
            Work("language model", rows * texts.prompt, texts.lm_rate, texts.lm_passes),
            Work("teacher", scored, texts.lm_rate),
            Work("retriever", taught, texts.encoder_rate, texts.encoder_passes),
        ],
        encodings=1 + rounds,
        prompts=pairs + rows,
        steps=stage_steps(retriever, train),
    )


def estimate_rag_cost(workspace: Workspace, config: RagConfig) -> Cost:
    """Measures both models on a few real texts and forecasts an end-to-end run."""
    texts = _Texts(workspace, config)
    batches = RagBatches(workspace, config, lambda batch: batch)
    steps = stage_steps(config.training, len(workspace.questions["train"]))
    questions = steps * config.training.batch_size
    read = questions * (batches.num_retrieved + config.training.null_document)
    encoded = read + questions * bool(config.objective.contrastive_weight)
    documents = encoded * batches.doc_tokens
    scored = len(workspace.questions["dev"]) * config.evaluation.documents * 2
    return _cost(
        texts,
        [
            Work("reading", read * batches.context_tokens, texts.lm_rate, texts.lm_passes),
            Work("retriever", documents, texts.encoder_rate, texts.encoder_passes),
            Work("dev", scored * texts.prompt, texts.lm_rate),
        ],
        encodings=1 + config.trains_retriever,
        prompts=read + scored,
        steps=steps,
    )


def describe_evaluation(
    workspace: Workspace, split: str, systems: Sequence[str], *, encodings: int, distractors: int
) -> str:
    """Measures both models and returns how long an evaluation will take at most.

    Args:
        workspace: Data, models, options.
        split: Questions of the evaluation.
        systems: Names of the systems that are compared.
        encodings: Times that the corpus is encoded.
        distractors: Of a prompt that measures robustness; 0: it is not measured.
    """
    texts = _Texts(workspace, workspace.config)
    answered, read = texts.answered(split), texts.config.evaluation.documents
    closed_book = sum(SYSTEMS[name].documents is None for name in systems)
    # Documents of each answer to a question.
    answers = [0] * closed_book + [read] * (len(systems) - closed_book)
    if distractors:
        # Relevant passages alone, with distractors before and behind them, and distractors alone.
        answers += [0, read, read + distractors, read + distractors, distractors]
    prompts = answered * sum(map(texts.prompts_of, answers))
    work = [Work("encoding", texts.corpus, texts.encoder_rate, encodings)]
    if prompts:
        work.append(Work("answers", answered * sum(map(texts.answer, answers)), texts.lm_rate))
    return (
        f"\n== forecast\n{len(workspace.questions[split]):,} questions of {split},"
        f" {answered:,} of them answered; at most {prompts:,} prompts for the language model\n"
        f"at most about {_total(_seconds(work))}, less what is known already and what systems share"
    )


def duration(seconds: float) -> str:
    """Returns a span of time in the unit a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def describe_time(seconds: Mapping[str, float], started: float) -> str:
    """Returns a line on how long a call took, in all and by stage."""
    stages = ", ".join(f"{stage} {duration(s)}" for stage, s in seconds.items())
    return f"\ntook {duration(time.perf_counter() - started)} in this call ({stages})"


class _Texts:
    """Mean lengths of the texts of a run, and the speed of its models; measured when first read.

    Attributes:
        document: Tokens of a document in a prompt.
        question: Tokens of the rest of a prompt, the answer included.
        prompt: Tokens of a prompt with one document.
        lm_passes: A training step of the language model in forward passes.
        encoder_passes: A training step of the encoder in forward passes.
    """

    def __init__(self, workspace: Workspace, config: RunConfig) -> None:
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

    @functools.cached_property
    def encoder_rate(self) -> float:
        """Tokens encoded a second, from one batch in the length of most documents."""
        encoder = self.workspace.encoder
        length = bucket_of(encoder, int(np.median(self._lengths)))
        rows = max(1, self.config.encode_tokens // length)
        tokens, encode = Tokens(*_filled(rows, length, encoder.pad_id)), jax.jit(encoder.encode)
        return rows * length / _mean_seconds(lambda: encode(encoder.params, tokens))

    @functools.cached_property
    def lm_rate(self) -> float:
        """Tokens scored a second, from one batch of typical prompts."""
        workspace, lm, prompts = self.workspace, self.workspace.lm, self.workspace.prompts
        typical = min(self.config.prompt.document_tokens + 30, prompts.max_context_length)
        batch = context_batches(prompts, [typical] * _CALIBRATION_ROWS, self.config.score_tokens)[0]
        rows, length, targets = batch.batch_size, batch.length, prompts.max_target_length
        filler = LMBatch(*_filled(rows, length, lm.pad_id), *_filled(rows, targets, lm.pad_id))
        score, params = jax.jit(lm.token_log_probs), workspace.in_compute_dtype(lm.params)
        return rows * (length + targets) / _mean_seconds(lambda: score(params, filler))

    def answered(self, split: str) -> int:
        """Returns how many questions of a split the language model answers."""
        with_answer = sum(bool(question.answers) for question in self.workspace.questions[split])
        return min(with_answer, self.config.data_options.answer_questions)

    def prompts_of(self, documents: int) -> int:
        """Returns the prompts that an answer from so many documents takes."""
        return max(1, documents) if MODES[self.config.mode].apart else 1

    def answer(self, documents: int) -> float:
        """Returns the tokens that an answer from so many documents takes."""
        evaluation = self.config.evaluation
        written = evaluation.max_new_tokens * (evaluation.beams if documents else 1)
        prompt = self.question + _DECODE_TOKEN * written
        return documents * self.document + self.prompts_of(documents) * prompt


def _cost(
    texts: _Texts, training: Sequence[Work], *, encodings: int, prompts: float, steps: int
) -> Cost:
    """Adds to the work of training what every run has: the index, its refreshes, the evaluation."""
    workspace, config = texts.workspace, texts.config
    size, read = len(workspace.doc_tokens), config.evaluation.documents
    answered = texts.answered("test") * (1 + config.trains_lm)
    answer = _PROMPTS * texts.answer(read) + texts.answer(0)
    work = [
        Work("encoding", texts.corpus, texts.encoder_rate, encodings),
        *training,
        Work("evaluation", answered * answer, texts.lm_rate),
    ]
    seconds = _seconds(work) | {"compiling": _COMPILE_SECONDS * _COMPILED_SHAPES}
    disk = os.statvfs(workspace.folder)
    free_bytes = disk.f_bavail * disk.f_frsize
    refresh = None
    if config.refresh.mode in ("sync", "async"):
        step_seconds = sum(seconds.get(stage, 0.0) for stage in _STEP_STAGES) / steps
        refresh = _refreshes(texts, steps, step_seconds, free_bytes)
        if refresh.work.shared_device:
            every = max(refresh.work.steps_between or 1, refresh.fastest_steps)
            seconds["refreshes"] = steps / every * refresh.refresh_seconds
    index_bytes = size * workspace.encoder.embedding_size * 4 * encodings
    split = functools.partial(split_towers, config.retriever, seed=0)
    trained = (encodings - 1) * _trained_bytes(split, tower_params(workspace))
    if config.trains_lm:
        lm = workspace.lm
        split = functools.partial(split_lm, config.language_model, lm.family, seed=0)
        trained += _trained_bytes(split, lm.params)
    refreshes = refresh.bytes_on_disk if refresh else 0
    return Cost(
        documents=size * encodings,
        lm_forwards=int(prompts + answered * _PROMPTS * texts.prompts_of(read)),
        seconds=seconds,
        bytes_on_disk=index_bytes + trained * _CHECKPOINT_COPIES + refreshes,
        free_bytes=free_bytes,
        refresh=refresh,
    )


def _refreshes(texts: _Texts, steps: int, step_seconds: float, free_bytes: int) -> RefreshForecast:
    """Returns what keeping the index fresh costs."""
    workspace, config, size = texts.workspace, texts.config.refresh, len(texts.workspace.doc_tokens)
    dim = workspace.encoder.embedding_size
    kind = choose_index(size, dim).name if config.index == "auto" else config.index
    encoded = config.partial + (1 - config.partial) / config.full_every
    work = RefreshWork(
        documents=size,
        dim=dim,
        encode_documents_per_second=texts.encoder_rate * size / texts.corpus / encoded,
        build_seconds=estimate_build_seconds(size, dim, kind),
        step_seconds=step_seconds,
        steps_between=config.trigger.steps_between(steps),
        kept_generations=config.keep,
        bytes_per_value=4.0 if kind == "exact" else 8.5,
        parameter_bytes=_tree_bytes(workspace.encoder.params),
        shared_device=not (config.devices or config.workers),
        free_bytes=free_bytes,
    )
    return forecast_refresh(work)


def _backward(config: LearningConfig, num_layers: int, whole: float) -> float:
    """Returns a backward pass in forward passes, given that through all layers and weights."""
    depth = config.train_layers / num_layers if config.train_layers else 1.0
    return depth * (whole * (_ADAPTER_SHARE if config.lora_rank else 1.0) + config.remat)


def _trained_bytes(split: Callable[[Any], Any], params: Any) -> int:
    """Returns the bytes of the trainable parameters that `split` would return."""
    return _tree_bytes(jax.eval_shape(lambda params: split(params).trainable, params))


def _tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _filled(rows: int, length: int, pad_id: int) -> tuple[jax.Array, jax.Array]:
    """Returns token ids and their mask, all of it real."""
    return jnp.full((rows, length), pad_id, jnp.int32), jnp.ones((rows, length), bool)


def _mean_seconds(run: Callable[[], Any], repeats: int = 2) -> float:
    jax.block_until_ready(run())  # compiles
    started = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(run())
    return (time.perf_counter() - started) / repeats


def _seconds(work: Sequence[Work]) -> dict[str, float]:
    return {part.stage: part.tokens * part.passes / part.rate for part in work}


def _total(seconds: dict[str, float], shown: dict[str, float] | None = None) -> str:
    stages = seconds if shown is None else shown
    parts = ", ".join(f"{stage} {duration(s)}" for stage, s in stages.items())
    return f"{duration(sum(seconds.values()))} on this machine ({parts})"
