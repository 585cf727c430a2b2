"""Reads what a finished run adapted: its encoder towers, its language model, its record."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ragjax.models.encoder import TextEncoder, load_encoder
from ragjax.models.export.card import Card
from ragjax.models.language_model import LanguageModel, load_language_model
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.options.end_to_end import PROGRAM, RagConfig
from ragjax.runs.options.files import from_dict, to_dict
from ragjax.runs.options.shared import RunConfig
from ragjax.runs.trainable import (
    END_TO_END,
    Trained,
    lm_parts,
    retriever_parts,
    split_models,
    whole_towers,
)
from ragjax.training.checkpoint import Checkpointer

_RETRIEVAL = ("recall@1", "recall@5", "recall@20", "mrr@10", "ndcg@10", "answer@5")
_ANSWERS = ("exact_match", "f1", "answer_nll")
SYSTEM_NOTES = {
    "closed_book": "the base language model without documents",
    "bm25": "documents by BM25",
    "before": "documents by the base encoder",
    "after": "documents by the adapted encoder",
    "hybrid": "documents by BM25 and the adapted encoder",
    "lm_half": "documents by the base encoder, read by the adapted language model",
    "closed_book_lm_half": "the adapted language model without documents",
    "hybrid_base_lm": "documents as hybrid, read by the base language model",
    "hybrid_before": "documents by BM25 and the base encoder",
}


class FinishedRun(NamedTuple):
    """A folder that `experiments/adapt.py` or `experiments/train_rag.py` made."""

    folder: Path
    config: RunConfig  # AdaptConfig or RagConfig
    metrics: Mapping[str, Any] | None  # by system; None: the run was not evaluated to its end


class Adapted(NamedTuple):
    """A model and what the run made of its parameters."""

    model: Any  # TextEncoder or LanguageModel, un-adapted
    params: Any


def open_run(folder: Path) -> FinishedRun:
    """Reads the options and results of a run.

    Raises:
        FileNotFoundError: There is no run.
        ValueError: Its `config.json` is not one of a run of this version.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no run there (no config.json); give the --output folder of a run of"
            " experiments/adapt.py or experiments/train_rag.py"
        )
    try:
        content = json.loads(path.read_text("utf-8"))
        values, program = content["config"], content.get("program")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the config of a run ({error})") from error
    if program not in (None, PROGRAM):
        raise ValueError(
            f"{folder} was made by {program}; give the --output folder of a run of"
            " experiments/adapt.py or experiments/train_rag.py"
        )
    config = from_dict(RagConfig() if program == PROGRAM else AdaptConfig(), values, path)
    return FinishedRun(folder, config, _read_metrics(folder))


def adapted_encoder(run: FinishedRun, tower: str) -> Adapted:
    """Loads the base encoder and what the run made of one of its towers.

    Args:
        run: The run; its retriever stage must have ended.
        tower: `query`, `doc`, or `encoder` where one tower serves both.

    Raises:
        ValueError: The run did not adapt an encoder, has two towers and none was chosen, or has
            not ended.
        OSError: The base encoder is not there any more.
    """
    config = run.config
    if not config.trains_retriever:
        raise ValueError(
            f"{run.folder}: this run adapted the language model only; export --what language_model"
        )
    shared = config.retriever.train == "shared"
    if tower == "encoder" and not shared:
        raise ValueError(
            f"{run.folder}: this run has two encoders (--retriever.train"
            f" {config.retriever.train}); export --what query_encoder and --what doc_encoder"
        )
    encoder = load_encoder(config.encoder, max_length=config.encoder_max_length or None)
    towers: dict[str, Any] = dict.fromkeys(config.retriever.tower_names, encoder.params)
    if isinstance(config, RagConfig):
        trained = _trained_end_to_end(run, config, load_language_model(config.lm), towers)
        return Adapted(encoder, trained.towers["shared" if shared else tower])
    assert isinstance(config, AdaptConfig), "there are two kinds of runs"
    # Adapters, and layers that learn on top of frozen ones, are relative to the round before.
    for number in range(config.retriever.rounds):
        seed = config.seed + number
        parts = retriever_parts(config.retriever, towers, seed=seed)
        trained = _restore(run, f"retriever-{number}", parts.trainable)
        towers = whole_towers(parts, trained)
    return Adapted(encoder, towers["shared" if shared else tower])


def adapted_language_model(run: FinishedRun) -> Adapted:
    """Loads the base language model and what the run made of it.

    Args:
        run: The run; its LM stage must have ended.

    Raises:
        ValueError: The run did not adapt a language model, or has not ended.
        OSError: The base model is not there any more.
    """
    config = run.config
    if not config.trains_lm:
        raise ValueError(
            f"{run.folder}: this run adapted the retriever only; export --what encoder,"
            " query_encoder or doc_encoder"
        )
    lm = load_language_model(config.lm)
    if isinstance(config, RagConfig):
        encoder = load_encoder(config.encoder, max_length=config.encoder_max_length or None)
        towers = dict.fromkeys(config.retriever.tower_names, encoder.params)
        return Adapted(lm, _trained_end_to_end(run, config, lm, towers).lm_params)
    parts = lm_parts(config.language_model, lm.family, lm.params, seed=config.seed)
    trained = _restore(run, "lm", parts.trainable)
    return Adapted(lm, parts.merge(trained, parts.frozen))


def _trained_end_to_end(
    run: FinishedRun, rag: RagConfig, lm: LanguageModel, towers: dict[str, Any]
) -> Trained:
    """Reads both models of an end-to-end run, which learnt together and were saved together."""
    parts = split_models(rag, lm.family, lm.params, towers)
    trained = _restore(run, END_TO_END, parts.trainable)
    return Trained(parts.whole_towers(trained), parts.whole_lm(trained))


def run_card(run: FinishedRun, adapted: Adapted, what: str, *, license: str | None) -> Card:
    """Writes down what the run knows about a model, for its model card.

    Args:
        run: The run.
        adapted: The exported model.
        what: `encoder`, `query_encoder`, `doc_encoder` or `language_model`.
        license: Licence of the base model, where the user gave it.
    """
    config = run.config
    is_lm = what == "language_model"
    caps = config.data_options
    data = (
        f"`{config.data}`"
        if config.data
        else "The API documentation of the Python packages that were installed beside ragjax, with"
        " the questions that ship with it"
    )
    columns = _ANSWERS if is_lm else _RETRIEVAL
    metrics = {
        name: row
        for name, row in (run.metrics or {}).items()
        if any(metric in row for metric in columns)
    }
    return Card(
        license=license,
        data=(
            f"{data}: at most {caps.train_questions:,} training questions (seed {config.seed}) and"
            " no test question. Nothing is recorded about the licence of the data."
        ),
        recipe=to_dict(config),
        program=_script(run),
        metrics=metrics or None,
        columns=columns,
        metrics_note=_metrics_note(metrics),
        limitations=_limitations(adapted.model, what, evaluated=bool(metrics)),
    )


def _read_metrics(folder: Path) -> dict[str, Any] | None:
    try:
        main = json.loads((folder / "metrics.json").read_text("utf-8"))
        others = json.loads((folder / "differences.json").read_text("utf-8"))["other_systems"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{folder}: metrics.json or differences.json is damaged ({error})"
        ) from error
    return {**main, **others}


def _script(run: FinishedRun) -> str:
    return f"experiments/{'train_rag' if isinstance(run.config, RagConfig) else 'adapt'}.py"


def _restore(run: FinishedRun, stage: str, template: Any) -> Any:
    folder = run.folder / "checkpoints" / stage
    notes: list[str] = []
    again = f"the same {_script(run)} command finishes the run"
    if not folder.is_dir():
        raise ValueError(f"{run.folder}: stage {stage} has not begun; {again}")
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), template)
    restored = Checkpointer(folder, report=notes.append).latest_good_params(abstract)
    if restored is None:
        raise ValueError(
            f"{run.folder}: stage {stage} has no whole checkpoint; {again}" + _listed(notes)
        )
    steps = restored.info["num_steps"]
    if restored.step != steps:
        raise ValueError(
            f"{run.folder}: stage {stage} is at step {restored.step} of {steps}; {again}"
            + _listed(notes)
        )
    return restored.state


def _listed(notes: Sequence[str]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""


def _metrics_note(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return ""
    counts = sorted({row["n"] for row in metrics.values() if "n" in row})
    count = f" of {counts[0]:,} test questions of that data" if len(counts) == 1 else ""
    systems = "; ".join(
        f"{name.replace('_', ' ')}: {SYSTEM_NOTES[name]}"
        for name in metrics
        if name in SYSTEM_NOTES
    )
    return f"Mean{count} [95 % bootstrap interval]. {systems[:1].upper()}{systems[1:]}."


def _limitations(model: TextEncoder | LanguageModel, what: str, *, evaluated: bool) -> list[str]:
    sentences = [
        "Adapted to one domain: what the table does not measure, other domains and languages"
        " among it, was not measured."
        if evaluated
        else "The run was not evaluated to its end: nothing was measured.",
        "Biases and unsafe outputs were not looked at; those of the base model are to be expected.",
        f"Texts are cut at {model.max_length:,} tokens."
        if what != "language_model"
        else f"Prompt and answer together have at most {model.max_length:,} tokens.",
    ]
    others = {"query_encoder": "documents", "doc_encoder": "queries"}
    if what in others:
        sentences.append(
            f"One of two encoders: {others[what]} are to be encoded with the other one of the same"
            " run."
        )
    return sentences
