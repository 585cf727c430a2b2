"""The end-to-end stage of a run: both models trained through the likelihood of the answers."""

import functools
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np

from ragjax.data import batch_rows
from ragjax.index import Bm25Index
from ragjax.models.seq2seq.fusion import fusion_attention_mass, fusion_token_log_probs
from ragjax.runs.found import findable_in_training, source_rows
from ragjax.runs.indexes import Retriever
from ragjax.runs.models import chunk_tokens
from ragjax.runs.options.end_to_end import OF_ALL_DOCUMENTS, ObjectiveConfig, RagConfig
from ragjax.runs.teachers.target import SCORES
from ragjax.runs.train.batches import RagBatches
from ragjax.runs.train.live import open_retrieval
from ragjax.runs.train.retriever import OBJECTIVES
from ragjax.runs.train.stages import Stage, run_stage, stage_steps, tower_rates
from ragjax.runs.trainable import END_TO_END, SplitModels, Trained, split_models
from ragjax.runs.workspace import Workspace
from ragjax.training import end_to_end
from ragjax.training.ahead import AheadRetrieval
from ragjax.training.in_step import InStepRetrieval, failures_of, make_in_step_loss

_MARGINALS = {
    "sequence": end_to_end.sequence_term,
    "token": end_to_end.token_term,
    "emdr2": end_to_end.emdr2_term,
}
_DRAWN = {"gumbel": end_to_end.make_gumbel_term, "reinforce": end_to_end.make_reinforce_term}


def train_end_to_end(
    workspace: Workspace,
    config: RagConfig,
    bm25: Bm25Index,
    before: Retriever,
    tower_params: dict[str, Any],
) -> Trained:
    """Trains both models through the marginal likelihood of the answers.

    Args:
        workspace: Data and base models.
        config: Options of the run.
        bm25: Joins the dense index for hybrid candidates.
        before: The base retriever, whose embeddings are the first generation of the index.
        tower_params: Towers before training.

    Returns:
        Both models after training.
    """
    training, sharded = config.training, workspace.layout.num_devices > 1
    split = split_models(config, workspace.lm.family, workspace.lm.params, tower_params)
    questions = workspace.questions["train"]
    sources = None
    if training.same_source == "drop":
        sources = source_rows(workspace.dataset.corpus, questions)
    no_negatives = findable_in_training(workspace, sources).dropped
    batches = RagBatches(
        workspace,
        config,
        sources=no_negatives if sources or any(no_negatives) else None,
    )
    retrieval = open_retrieval(
        workspace,
        split.towers,
        before.store,
        k=training.documents,
        batch_size=training.batch_size,
        bm25=bm25 if training.candidates == "hybrid" else None,
        dense_weight=before.hybrid.dense_weight,
        sources=sources,
    )
    stage = end_to_end_stage(config, split, len(questions))
    loss = make_loss(workspace, config, split, sharded=sharded)
    if training.retrieval == "callback":
        host = InStepRetrieval(
            retrieval, batches.arrays, lambda step: batches.inputs(step, retrieval.rows_of(step))
        )
        loss = make_in_step_loss(
            loss, host, workspace.training_encodes()[0], merge_tower=split.towers.merge,
            axis_name=workspace.layout.rows_axis, divide=workspace.layout.divide,
        )  # fmt: skip
    else:
        host = AheadRetrieval(
            retrieval,
            batches.prepare,
            num_steps=stage.num_steps,
            # Re-ranking reads the live document encoder, whose buffers the step donates, so it
            # cannot overlap the step.
            overlap=training.overlap and config.refresh.mode != "rerank",
            max_lag=config.refresh.max_lag,
        )

    def describe_batch(step: int) -> str:
        rows = batch_rows(
            config.seed, step, num_examples=len(questions), batch_size=training.batch_size
        )
        return "questions " + ", ".join(questions[row].id for row in rows)

    with closing(host), failures_of(host):
        trained = run_stage(
            workspace, stage, split, loss, host.batch_at, host=host, describe_batch=describe_batch
        )
    return split.merged(trained)


def end_to_end_stage(config: RagConfig, split: SplitModels, num_questions: int) -> Stage:
    """Returns the length and the updates of the stage."""
    rates = tower_rates(config.retriever, split.towers.trainable)
    if config.trains_lm:
        rates["lm"] = config.language_model.learning_rate
    return Stage(
        name=END_TO_END,
        num_steps=stage_steps(config.training, num_questions),
        seed=config.seed,
        config=config.training,
        learning_rate=rates,
        accumulate=config.training.accumulate,
        weight=lambda batch: np.float32(1.0) * batch.queries.ids.shape[0],
    )


def make_loss(
    workspace: Workspace, config: RagConfig, split: SplitModels, *, sharded: bool
) -> Callable[..., Any]:
    """Returns the loss of a run for `make_train_step`."""
    encode_queries, encode = workspace.training_encodes()
    return end_to_end.make_rag_loss(
        encode,
        make_reader(workspace, config),
        make_terms(config.objective, fusion=config.language_model.reader == "fusion"),
        scale=workspace.scale,
        chunk_tokens=None if sharded and not workspace.layout.rows_axis else chunk_tokens(config),
        axis_name=workspace.layout.rows_axis,
        merge_tower=split.towers.merge,
        merge_lm=split.lm.merge,
        encode_queries=encode_queries,
    )


def make_terms(
    objective: ObjectiveConfig, *, fusion: bool
) -> dict[str, tuple[float, end_to_end.Term]]:
    """Returns the terms of the objective, name to (weight, term); those of weight 0 are left out.

    Args:
        objective: Weights and forms.
        fusion: The reader sees all documents at once.
    """
    lm_term = end_to_end.fused_lm_term if fusion else end_to_end.lm_term
    score, tau = SCORES[objective.target.score], objective.temperature
    divergence = OBJECTIVES[objective.direction]
    if objective.score == "attention":
        lsr_term = end_to_end.make_attention_term(tau, divergence)
    elif objective.score == "leave_one_out":
        lsr_term = end_to_end.make_leave_one_out_term(tau, divergence)
    else:
        lsr_term = end_to_end.make_lsr_term(score, tau, divergence)
    if objective.marginal in _DRAWN:
        marginal = _DRAWN[objective.marginal](score, objective.samples)
    else:
        marginal = _MARGINALS[objective.marginal]
    # p_R weighs the documents once for an answer, or once for each of its tokens.
    once = objective.marginal == "sequence"
    in_batch = float(objective.negatives == "batch")
    compared = objective.lsr_weight + objective.marginal_weight * once
    per_token = objective.marginal_weight * (not once)
    terms = {
        "marginal": (objective.marginal_weight, marginal),
        "lm": (objective.lm_weight, lm_term),
        "lsr": (objective.lsr_weight, lsr_term),
        "contrastive": (objective.contrastive_weight, end_to_end.contrastive_term),
        "negatives": (in_batch * compared, end_to_end.negatives_term),
        "token_negatives": (in_batch * per_token, end_to_end.token_negatives_term),
    }
    return {name: (weight, term) for name, (weight, term) in terms.items() if weight}


def make_reader(workspace: Workspace, config: RagConfig) -> end_to_end.LMReader:
    """Returns the language model's functions of a batch, computed in the dtype of the run.

    Raises:
        ValueError: A causal decoder cannot read all documents at once.
    """
    lm, options, objective = workspace.lm, config.language_model, config.objective
    token_log_probs = functools.partial(lm.family.token_log_probs, lm.config, remat=options.remat)
    separate = end_to_end.separate_reader(workspace.cast_lm(token_log_probs))
    if options.reader == "separate":
        return end_to_end.LMReader(separate)
    if not lm.family.has_encoder:
        raise ValueError(
            f"--language_model.reader fusion: {config.lm} is a causal decoder, which reads one"
            " document at a time; use an encoder-decoder (T5, BART), or reader separate"
        )
    fused = functools.partial(fusion_token_log_probs, lm.config, remat=options.remat)
    attention = functools.partial(fusion_attention_mass, lm.config)
    scored = objective.lsr_weight and objective.score not in OF_ALL_DOCUMENTS
    alone = objective.marginal_weight or scored
    return end_to_end.LMReader(
        separate if alone else None,
        end_to_end.fusion_reader(workspace.cast_lm(fused)),
        end_to_end.fusion_reader(workspace.cast_lm(attention)),
    )
