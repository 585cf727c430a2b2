"""What a run knows about a model of its own, for the model card of an export."""

from collections.abc import Mapping
from typing import Any

from ragjax.evaluation.systems import SYSTEMS
from ragjax.models.encoder import TextEncoder
from ragjax.models.export.card import Card, public
from ragjax.models.language_model import LanguageModel
from ragjax.runs.options.files import to_dict
from ragjax.runs.saved import FinishedRun, script_of

_RETRIEVAL = ("recall@1", "recall@5", "recall@20", "mrr@10", "ndcg@10", "answer@5")
_ANSWERS = ("exact_match", "f1", "answer_nll")


def run_card(
    run: FinishedRun,
    model: TextEncoder | LanguageModel,
    what: str,
    *,
    license: str | None,
    models: str = "adapted",
) -> Card:
    """Writes down what the run knows about a model, for its model card.

    Args:
        run: The run.
        model: The exported model.
        what: `encoder`, `query_encoder`, `doc_encoder` or `language_model`.
        license: Licence of the base model, where the user gave it.
        models: `shipped` or `adapted`, which of the run's models it is.
    """
    config, served = run.config, run.served
    is_lm = what == "language_model"
    unadapted = served is not None and (
        served.language_model == "base"
        if is_lm
        else models == "shipped" and served.retriever == "base"
    )
    caps = config.data_options
    data = (
        f"`{public(config.data or config.queries)}`"
        if config.data or config.queries
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
        program=script_of(run.config),
        metrics=metrics or None,
        columns=columns,
        metrics_note=_metrics_note(metrics),
        limitations=[
            *(["This is the un-adapted model: its adaptation did not help."] if unadapted else ()),
            *_limitations(model, what, evaluated=bool(metrics)),
        ],
    )


def _metrics_note(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return ""
    counts = sorted({row["n"] for row in metrics.values() if "n" in row})
    count = f" of {counts[0]:,} test questions of that data" if len(counts) == 1 else ""
    systems = "; ".join(
        f"{name.replace('_', ' ')}: {SYSTEMS[name].note}" for name in metrics if name in SYSTEMS
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
