"""The end-to-end stage of a run: retrieval, loss, devices and the loop, put together."""

import functools
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ragjax.index import Bm25Index
from ragjax.models.seq2seq.fusion import fusion_attention_mass, fusion_token_log_probs
from ragjax.runs.indexes import Retriever, live_search, search_without_sources, source_rows
from ragjax.runs.options.end_to_end import ObjectiveConfig, RagConfig
from ragjax.runs.teacher import SCORES
from ragjax.runs.train.batches import RagBatches, total_steps
from ragjax.runs.train.live import open_retrieval
from ragjax.runs.trainable import (
    END_TO_END,
    SplitModels,
    Trained,
    split_models,
)
from ragjax.runs.workspace import Workspace, question_rows
from ragjax.training import end_to_end
from ragjax.training.ahead import AheadRetrieval
from ragjax.training.checkpoint import Checkpointer
from ragjax.training.loop import LoopConfig, run_steps
from ragjax.training.lsr import towers
from ragjax.training.optimizer import OptimizerConfig, make_optimizer
from ragjax.training.steps import TrainState, init_state, make_train_step


class Devices(NamedTuple):
    """Where a step runs: one device, or a mesh that shares the questions."""

    count: int
    place_batch: Callable[[Any], Any]
    replicate: Callable[[Any], Any]


def choose_devices(config: RagConfig) -> Devices:
    """Returns the devices of the training step: as many as divide the batch evenly.

    Raises:
        ValueError: More devices are asked for than there are.
    """
    local = jax.local_devices()
    spare = local[: len(local) - config.refresh.devices]
    asked = config.training.devices
    if not spare or asked > len(spare):
        raise ValueError(
            f"--training.devices {asked}: there are {len(local)} local devices, and"
            f" {config.refresh.devices} of them encode (--refresh.devices)"
        )
    batch = config.training.batch_size
    # Each part of an accumulated step is shared as well.
    part = batch // config.training.accumulate
    if asked and part % asked:
        raise ValueError(
            f"--training.devices {asked} does not divide the {part} questions of a part"
            " (batch_size / accumulate)"
        )
    count = asked or max(n for n in range(1, len(spare) + 1) if part % n == 0)
    if count == 1:
        return Devices(1, lambda batch: batch, lambda tree: tree)
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=spare[:count])
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return Devices(
        count,
        lambda batch: jax.device_put(batch, rows),
        lambda tree: jax.device_put(tree, everywhere),
    )


def train_end_to_end(
    workspace: Workspace,
    config: RagConfig,
    bm25: Bm25Index,
    before: Retriever,
    tower_params: dict[str, Any],
) -> Trained:
    """Trains both models through the marginal likelihood of the answers.

    Args:
        workspace: Data and un-adapted models.
        config: Options of the run.
        bm25: Lexical side of what is retrieved.
        before: The un-adapted retriever, whose embeddings are the first generation of the index.
        tower_params: Towers before training.

    Returns:
        Both models after training.
    """
    devices = choose_devices(config)
    if devices.count > 1:
        workspace.report(f"{devices.count} devices share each step")
    parts = split_models(config, workspace.lm.family, workspace.lm.params, tower_params)
    questions = workspace.questions["train"]
    sources = None
    if config.training.same_source == "drop":
        sources = source_rows(workspace.dataset.corpus, questions)
    batches = RagBatches(workspace, config, devices.place_batch, sources=sources)
    steps = total_steps(workspace, config)
    optimizer = _optimizer(config, parts, steps)
    step = make_train_step(
        make_loss(workspace, config, parts, sharded=devices.count > 1),
        optimizer,
        accumulate=config.training.accumulate,
        weight=lambda batch: np.float32(1.0) * batch.target_ids.shape[0],
    )
    hybrid = bm25 if config.training.candidates == "hybrid" else None
    search = live_search(workspace, hybrid, dense_weight=before.hybrid.dense_weight)
    if sources is not None:
        search = search_without_sources(search, sources, questions)
    retrieval = open_retrieval(
        workspace,
        search,
        split=lambda trainable: towers(parts.whole_towers(trainable), None),
        batch_size=config.training.batch_size,
        k=batches.num_retrieved,
        store=before.store,
    )
    host = AheadRetrieval(
        retrieval,
        batches.prepare,
        num_steps=steps,
        # What ranks again by the live document encoder cannot wait until its step has run.
        overlap=config.training.overlap and config.refresh.mode != "rerank",
    )
    frozen = devices.replicate(parts.frozen)

    def replicated(state: TrainState, batch: Any, frozen: Any) -> tuple[TrainState, dict]:
        return step(devices.replicate(state), batch, frozen)

    with closing(host):
        state = run_steps(
            LoopConfig(stage=END_TO_END, num_steps=steps, checkpoint_every=config.checkpoint_every),
            replicated,
            init_state(parts.trainable, optimizer, config.seed),
            host.batch_at,
            frozen=frozen,
            checkpointer=Checkpointer(workspace.folder / "checkpoints" / END_TO_END),
            log=workspace.metrics,
            stop=workspace.stop,
            info={"num_steps": steps},
            host=host,
            describe_batch=lambda step: "questions " + ", ".join(
                questions[row].id for row in _rows(workspace, config, step)
            ),
        )  # fmt: skip
    params = on_one_device(state.params)
    return Trained(parts.whole_towers(params), parts.whole_lm(params))


def make_loss(
    workspace: Workspace, config: RagConfig, parts: SplitModels, *, sharded: bool
) -> Callable[..., Any]:
    """Returns the loss of a run for `make_train_step`."""
    return end_to_end.make_rag_loss(
        workspace.training_encode(),
        make_reader(workspace, config),
        make_terms(config.objective, fusion=config.language_model.reader == "fusion"),
        scale=config.retriever.scale,
        chunk_tokens=None if sharded else 2048,
        merge_tower=parts.towers.merge,
        merge_lm=parts.merge_lm,
    )


def make_terms(
    objective: ObjectiveConfig, *, fusion: bool
) -> dict[str, tuple[float, end_to_end.Term]]:
    """Returns the terms of the objective, name to (weight, term); those of weight 0 are left out.

    Args:
        objective: Weights and forms.
        fusion: The reader sees all documents at once.
    """
    marginals = {
        "sequence": end_to_end.sequence_term,
        "token": end_to_end.token_term,
        "emdr2": end_to_end.emdr2_term,
    }
    distilled = (
        end_to_end.make_attention_term(objective.temperature)
        if objective.score == "attention"
        else end_to_end.make_lsr_term(SCORES[objective.score], objective.temperature)
    )
    compared = objective.marginal_weight + objective.lsr_weight
    terms = {
        "marginal": (objective.marginal_weight, marginals[objective.marginal]),
        "lm": (
            objective.lm_weight,
            end_to_end.fused_lm_term if fusion else end_to_end.lm_term,
        ),
        "lsr": (objective.lsr_weight, distilled),
        "contrastive": (objective.contrastive_weight, end_to_end.contrastive_term),
        "negatives": (
            compared if objective.negatives == "batch" else 0.0,
            end_to_end.negatives_term,
        ),
    }
    return {name: (weight, term) for name, (weight, term) in terms.items() if weight}


def make_reader(workspace: Workspace, config: RagConfig) -> end_to_end.LMReader:
    """Returns what the language model tells of a batch, computed in the dtype of the run.

    Raises:
        ValueError: A causal decoder was asked to read all documents at once.
    """
    lm, options, objective = workspace.lm, config.language_model, config.objective
    separate = end_to_end.separate_reader(
        _cast(
            workspace, functools.partial(lm.family.token_log_probs, lm.config, remat=options.remat)
        )
    )
    if options.reader == "separate":
        return end_to_end.LMReader(separate)
    if not lm.family.has_encoder:
        raise ValueError(
            f"--language_model.reader fusion: {config.lm} is a causal decoder, which reads one"
            " document at a time; use an encoder-decoder (T5, BART), or reader separate"
        )
    fused = functools.partial(fusion_token_log_probs, lm.config, remat=options.remat)
    attention = functools.partial(fusion_attention_mass, lm.config)
    alone = objective.marginal_weight or (objective.lsr_weight and objective.score != "attention")
    return end_to_end.LMReader(
        separate if alone else None,
        end_to_end.fusion_reader(_cast(workspace, fused)),
        end_to_end.fusion_reader(_cast(workspace, attention)),
    )


def on_one_device(tree: Any) -> Any:
    """Returns a tree whose arrays lie on the first device only."""
    return jax.device_put(tree, jax.local_devices()[0])


def _cast(workspace: Workspace, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda params, batch: function(workspace.in_compute_dtype(params), batch)


def _rows(workspace: Workspace, config: RagConfig, step: int) -> Any:
    count, batch_size = len(workspace.questions["train"]), config.training.batch_size
    return question_rows(workspace, 0, count, step, batch_size=batch_size)


def _optimizer(config: RagConfig, parts: SplitModels, steps: int) -> Any:
    training, retriever = config.training, config.retriever
    rates = {name: retriever.learning_rate for name in parts.trainable}
    if "doc" in rates and retriever.doc_learning_rate >= 0:
        rates["doc"] = retriever.doc_learning_rate
    if "lm" in rates:
        rates["lm"] = config.language_model.learning_rate
    options = OptimizerConfig(
        learning_rate=retriever.learning_rate,
        warmup_steps=int(training.warmup_fraction * steps),
        weight_decay=training.weight_decay,
        clip_norm=training.clip_norm,
    )
    return make_optimizer(options, total_steps=steps, learning_rates=rates)
