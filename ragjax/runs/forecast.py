"""What a run will cost, from the lengths of its texts and the measured speed of its models."""

import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ragjax.index import choose_index
from ragjax.models.inputs import LMBatch, Tokens
from ragjax.refresh import (
    RefreshForecast,
    estimate_build_seconds,
    forecast_refresh,
    parse_trigger,
)
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.options.end_to_end import RagConfig
from ragjax.runs.options.shared import LearningConfig
from ragjax.runs.teacher import context_batches
from ragjax.runs.train.batches import RagBatches, total_steps
from ragjax.runs.train.retriever import retriever_steps
from ragjax.runs.trainable import lm_parts, retriever_parts, split_models
from ragjax.runs.workspace import Workspace, tower_params

# Work of a training step in forward passes. The encoder: one forward, one again for its chunks and
# a backward that takes 3.4 (measured on two cores; 2 by arithmetic). The language model: the
# backward of the layers that are trained.
ENCODER_FORWARDS, ENCODER_BACKWARD = 2.0, 3.4
BACKWARD = 2.0
# Of a backward pass, the half that goes to the weights' own gradients, which adapters do without.
_ADAPTER_SHARE = 0.5
# Generated tokens are read one at a time, which keeps the processor less busy than a prompt does.
DECODE_TOKEN = 3.0
# Distinct prompts with documents that a question brings to the evaluation, for each of the two
# language models: systems often retrieve the same document first.
PROMPTS = 2.0
# Template and question; and a language model's tokens for one of the encoder's.
QUESTION_TOKENS = 28
LM_TOKENS = 1.15
COMPILE_SECONDS = 6.0
COMPILED_SHAPES = 12
_CALIBRATION_ROWS = 8


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
        total = sum(self.seconds.values())
        stages = ", ".join(f"{name} {duration(s)}" for name, s in self.seconds.items() if s >= 1)
        lines = [
            "\n== forecast",
            f"{self.documents:,} documents to encode, {self.lm_forwards:,} prompts for the language"
            " model",
            f"about {duration(total)} on this machine ({stages})",
            f"about {self.bytes_on_disk / 2**20:,.0f} MiB on disk"
            f" ({self.free_bytes / 2**20:,.0f} MiB free)",
        ]
        if self.bytes_on_disk > self.free_bytes:
            lines.append("warning: the disk is too small for this run")
        if self.refresh is not None:
            lines.append(self.refresh.describe())
        return "\n".join(lines)


def estimate_cost(workspace: Workspace, config: AdaptConfig) -> Cost:
    """Measures both models on a few real texts and forecasts the run.

    Compiling for the measurement is not lost: the run uses the same shapes.
    """
    encode_rate = encoder_rate(workspace)
    score_rate = lm_rate(workspace)
    lm, retriever, evaluation = config.language_model, config.retriever, config.evaluation
    train = len(workspace.questions["train"])
    answered = sum(bool(q.answers) for q in workspace.questions["test"])
    answered = min(answered, config.data_options.answer_questions)
    adapts_lm, adapts_retriever = config.trains_lm, config.trains_retriever

    doc_tokens = padded_tokens(workspace)
    mean_doc = float(np.mean([len(ids) for ids in workspace.doc_ids]))
    question = QUESTION_TOKENS + config.prompt.answer_tokens
    prompt = min(config.prompt.document_tokens, mean_doc * LM_TOKENS) + question
    rounds = retriever.rounds if adapts_retriever else 0
    taught = retriever.objective != "dpr"  # by the language model
    pairs = train * retriever.candidates * rounds if taught else 0
    lm_rows = min(lm.questions, train) * lm.documents * lm.epochs if adapts_lm else 0
    teacher_tokens = pairs * prompt
    if workspace.lm.family.packed_token_log_probs is not None:
        teacher_tokens = _packed_tokens(pairs, len(workspace.doc_ids), prompt - question, question)
    lm_backward = backward_forwards(lm, workspace.lm.config, BACKWARD)
    encoder_backward = backward_forwards(retriever, workspace.encoder.config, ENCODER_BACKWARD)
    answers = answered * PROMPTS * (1 + adapts_lm)
    decoded = DECODE_TOKEN * evaluation.max_new_tokens
    per_answer = prompt + (evaluation.documents - 1) * config.prompt.document_tokens + decoded
    closed_book = answered * (1 + adapts_lm) * (question + decoded)
    longest = min(retriever.doc_tokens, max(map(len, workspace.doc_ids)))
    lsr_length = next(bucket for bucket in workspace.buckets() if bucket >= longest)
    lsr_tokens = train * (retriever.candidates * lsr_length + 32) * retriever.epochs * rounds
    seconds = {
        "encoding": doc_tokens * (1 + rounds) / encode_rate,
        "language model": lm_rows * prompt * (1 + lm_backward) / score_rate,
        "teacher": teacher_tokens / score_rate,
        "retriever": lsr_tokens * (ENCODER_FORWARDS + encoder_backward) / encode_rate,
        "evaluation": (answers * per_answer + closed_book) / score_rate,
        "compiling": COMPILE_SECONDS * COMPILED_SHAPES,
    }
    disk = os.statvfs(workspace.folder)
    free_bytes = disk.f_bavail * disk.f_frsize
    refresh = None
    if adapts_retriever and config.refresh.mode in ("sync", "async"):
        steps = retriever_steps(retriever, train)
        step_seconds = (seconds["retriever"] + seconds["teacher"]) / steps
        rate = encode_rate * len(workspace.doc_ids) / doc_tokens
        refresh = forecast_refreshes(workspace, steps, step_seconds, rate, free_bytes)
        seconds["refreshes"] = refreshes(refresh, steps) * refresh.refresh_seconds
    index_bytes = len(workspace.doc_ids) * workspace.encoder.embedding_size * 4 * (1 + rounds)
    # What learns and the optimiser's two moments of it, in each of two checkpoints.
    trained_lm = _trained_lm_bytes(workspace) * 3 * 2 if adapts_lm else 0
    trained_towers = _trained_tower_bytes(workspace) * 3 * 2 * rounds
    refreshed = refresh.bytes_on_disk if refresh else 0
    return Cost(
        documents=len(workspace.doc_ids) * (1 + rounds),
        lm_forwards=int(pairs + lm_rows + answers),
        seconds=seconds,
        bytes_on_disk=int(index_bytes + trained_lm + trained_towers + refreshed),
        free_bytes=free_bytes,
        refresh=refresh,
    )


def backward_forwards(config: LearningConfig, sizes: Any, whole: float) -> float:
    """Returns the work of a backward pass in forward passes, given that of one through it all."""
    depth = config.train_layers / sizes.num_layers if config.train_layers else 1.0
    return depth * (whole * (_ADAPTER_SHARE if config.lora_rank else 1.0) + config.remat)


def _trained_lm_bytes(workspace: Workspace) -> int:
    lm, options = workspace.lm, workspace.config.language_model

    def trained(params: Any) -> Any:
        return lm_parts(options, lm.family, params, seed=0).trainable

    return tree_bytes(jax.eval_shape(trained, lm.params))


def _trained_tower_bytes(workspace: Workspace) -> int:
    def trained(towers: Any) -> Any:
        return retriever_parts(workspace.config.retriever, towers, seed=0).trainable

    return tree_bytes(jax.eval_shape(trained, tower_params(workspace)))


def forecast_refreshes(
    workspace: Workspace, steps: int, step_seconds: float, rate: float, free_bytes: int
) -> RefreshForecast:
    """Returns what keeping the index fresh costs; `rate` is in documents a second."""
    config, size = workspace.config.refresh, len(workspace.doc_ids)
    dim = workspace.encoder.embedding_size
    kind = choose_index(size, dim).name if config.index == "auto" else config.index
    # The drift trigger is never asked here, only for how often it fires: nobody can tell.
    trigger = parse_trigger(config.every, measure=lambda params, snapshot: 0.0)
    encoded = config.partial + (1 - config.partial) / config.full_every
    return forecast_refresh(
        documents=size,
        dim=dim,
        encode_documents_per_second=rate / encoded,
        build_seconds=estimate_build_seconds(size, dim, kind),
        step_seconds=step_seconds,
        steps_between=trigger.steps_between(steps),
        kept_generations=config.keep,
        bytes_per_value=4.0 if kind == "exact" else 8.5,
        parameter_bytes=tree_bytes(workspace.encoder.params),
        shared_device=not (config.devices or config.workers),
        free_bytes=free_bytes,
    )


def refreshes(forecast: RefreshForecast, steps: int) -> float:
    """Returns the refreshes of a run that take time from its training."""
    if not forecast.shared_device:
        return 0.0
    return steps / max(forecast.steps_between or 1, forecast.fastest_steps)


def _packed_tokens(pairs: int, documents: int, document: float, question: float) -> float:
    """Returns the tokens of pairs packed behind their documents.

    As many distinct documents are expected as `pairs` random draws would touch.
    """
    touched = documents * (1 - math.exp(-pairs / documents))
    return touched * document + pairs * question


def padded_tokens(workspace: Workspace) -> int:
    """Returns the tokens of the whole corpus for the encoder, padding included."""
    buckets = np.asarray(workspace.buckets())
    lengths = np.asarray([len(ids) for ids in workspace.doc_ids])
    return int(buckets[np.searchsorted(buckets, lengths)].sum())


def encoder_rate(workspace: Workspace) -> float:
    """Returns tokens encoded a second, from one batch in the length of most documents."""
    lengths = [len(ids) for ids in workspace.doc_ids]
    median = int(np.median(lengths))
    length = next(bucket for bucket in workspace.buckets() if bucket >= median)
    rows = max(1, min(64, workspace.config.encode_tokens // length))
    tokens = Tokens(
        jnp.full((rows, length), workspace.encoder.pad_id, jnp.int32),
        jnp.ones((rows, length), bool),
    )
    encode = jax.jit(workspace.encoder.encode)
    return rows * length / _best_seconds(lambda: encode(workspace.encoder.params, tokens))


def lm_rate(workspace: Workspace) -> float:
    """Returns tokens scored a second, from one batch of typical prompts."""
    longest = workspace.prompts.max_context_length
    typical = min(workspace.config.prompt.document_tokens + 30, longest)
    batch = context_batches(workspace, [typical] * _CALIBRATION_ROWS)[0]
    rows, targets = batch.batch_size, workspace.prompts.max_target_length
    filler = LMBatch(
        jnp.full((rows, batch.length), workspace.lm.pad_id, jnp.int32),
        jnp.ones((rows, batch.length), bool),
        jnp.full((rows, targets), workspace.lm.pad_id, jnp.int32),
        jnp.ones((rows, targets), bool),
    )
    score = jax.jit(workspace.lm.token_log_probs)
    params = workspace.in_compute_dtype(workspace.lm.params)
    seconds = _best_seconds(lambda: score(params, filler))
    return rows * (batch.length + targets) / seconds


def _best_seconds(run: Callable[[], Any]) -> float:
    jax.block_until_ready(run())  # compiles
    times = []
    for _ in range(2):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return float(np.mean(times))


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def duration(seconds: float) -> str:
    """Returns a span of time in the unit a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def estimate_rag_cost(workspace: Workspace, config: RagConfig) -> Cost:
    """Measures both models on a few real texts and forecasts the run; see `estimate_cost`."""
    encode_rate, score_rate = encoder_rate(workspace), lm_rate(workspace)
    training, evaluation = config.training, config.evaluation
    batches = RagBatches(workspace, config, lambda batch: batch)
    steps = total_steps(workspace, config)
    questions = steps * training.batch_size
    read = batches.num_retrieved + training.null_document
    encoded = read + bool(config.objective.contrastive_weight)
    learns, teaches = config.trains_lm, config.trains_retriever
    lm_work = 1 + learns * backward_forwards(config.language_model, workspace.lm.config, BACKWARD)
    encoder_work = ENCODER_FORWARDS + teaches * backward_forwards(
        config.retriever, workspace.encoder.config, ENCODER_BACKWARD
    )
    corpus = padded_tokens(workspace)
    dev = len(workspace.questions["dev"]) * evaluation.documents * 2
    answered = sum(bool(q.answers) for q in workspace.questions["test"])
    answered = min(answered, config.data_options.answer_questions)
    mean_doc = float(np.mean([len(ids) for ids in workspace.doc_ids])) * LM_TOKENS
    question = QUESTION_TOKENS + config.prompt.answer_tokens
    prompt = min(config.prompt.document_tokens, mean_doc) + question
    decoded = DECODE_TOKEN * evaluation.max_new_tokens
    alone = evaluation.mode != "concat"  # each document in a prompt of its own
    per_answer = evaluation.documents * (prompt + (decoded if alone else 0)) + (
        0 if alone else decoded
    )
    answers = answered * PROMPTS * (1 + learns)
    seconds = {
        "encoding": corpus * (1 + teaches) / encode_rate,
        "reading": questions * read * batches.context_tokens * lm_work / score_rate,
        "retriever": questions * encoded * batches.doc_tokens * encoder_work / encode_rate,
        "dev": dev * prompt / score_rate,
        "evaluation": (answers * per_answer + answered * (1 + learns) * (question + decoded))
        / score_rate,
        "compiling": COMPILE_SECONDS * COMPILED_SHAPES,
    }
    disk = os.statvfs(workspace.folder)
    free_bytes = disk.f_bavail * disk.f_frsize
    refresh = None
    if config.refresh.mode in ("sync", "async"):
        step_seconds = (seconds["reading"] + seconds["retriever"]) / steps
        rate = encode_rate * len(workspace.doc_ids) / corpus
        refresh = forecast_refreshes(workspace, steps, step_seconds, rate, free_bytes)
        seconds["refreshes"] = refreshes(refresh, steps) * refresh.refresh_seconds
    index_bytes = len(workspace.doc_ids) * workspace.encoder.embedding_size * 4 * (1 + teaches)
    towers = tower_params(workspace)
    trained = jax.eval_shape(
        lambda lm, towers: split_models(config, workspace.lm.family, lm, towers).trainable,
        workspace.lm.params,
        towers,
    )
    # What learns and the optimiser's two moments of it, in each of two checkpoints.
    checkpoints = tree_bytes(trained) * 3 * 2
    return Cost(
        documents=len(workspace.doc_ids) * (1 + teaches),
        lm_forwards=int(questions * read + dev + answers * evaluation.documents),
        seconds=seconds,
        bytes_on_disk=int(index_bytes + checkpoints + (refresh.bytes_on_disk if refresh else 0)),
        free_bytes=free_bytes,
        refresh=refresh,
    )
