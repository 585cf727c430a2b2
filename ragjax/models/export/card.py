"""Writes the model card (README.md) of an exported model from what is known, and nothing else."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ragjax.models.export.base import BaseModel

UNKNOWN_LICENSE = "unknown"
_NO_DATA = "Nothing is recorded about the data."
_NO_RECIPE = "No recipe is recorded: the parameters are those that were given to the export."
_NO_METRICS = "This export comes with no measurement."


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the files of the model cannot say about it.

    Attributes:
        license: Licence id of the base model, over what its own files declare; None: theirs.
        data: Sentences on the training data; "" if nothing is known.
        recipe: Resolved options of the run, as JSON values; None if there was none.
        program: The script that the options are of.
        metrics: System → metric → {"value", "low", "high"}, as `metrics.json` of a run has it; None
            if nothing was measured.
        columns: The metrics shown, in order; empty: all.
        metrics_note: Sentences on what was measured, shown under the table.
        limitations: Sentences, one for each point.
    """

    license: str | None = None
    data: str = ""
    recipe: Mapping[str, Any] | None = None
    program: str = "experiments/adapt.py"
    metrics: Mapping[str, Mapping[str, Any]] | None = None
    columns: Sequence[str] = ()
    metrics_note: str = ""
    limitations: Sequence[str] = ()


class Use(NamedTuple):
    """How a kind of model is found and loaded."""

    library: str  # library_name of the header
    pipeline: str  # pipeline_tag of the header
    tags: tuple[str, ...]
    summary: str  # a sentence under the title
    examples: Mapping[str, str]  # library → Python code


def public(value: Any) -> Any:
    """Returns JSON values without the folders of this machine: absolute paths as their last part.

    A card is read where they mean nothing, and they may name a person or a project.
    """
    if isinstance(value, Mapping):
        return {key: public(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(inner) for inner in value]
    if isinstance(value, str) and (path := Path(value)).is_absolute():
        return path.name if path.parent.name else value
    return value


def chosen_license(card: Card, base: BaseModel) -> str:
    """Returns the licence that the card shows: as given, as declared, or "unknown"."""
    return card.license or base.license or UNKNOWN_LICENSE


def format_card(card: Card, base: BaseModel, use: Use, *, kind: str) -> str:
    """Writes the model card.

    Args:
        card: What the caller knows.
        base: What the base model's files say.
        use: How the exported model is used.
        kind: What it is, such as "a text encoder".

    Returns:
        Markdown with a YAML header.
    """
    sections = [
        f"# {base.source.rpartition('/')[2]}, {kind} exported from ragjax\n\n{use.summary}\n\n"
        f"Base model: `{public(base.source)}`. Licence: {_license_sentence(card, base)}",
        "## How to use it\n\n"
        + "\n\n".join(
            f"{library}:\n\n```python\n{code}\n```" for library, code in use.examples.items()
        ),
        f"## Data\n\n{card.data or _NO_DATA}",
        f"## Recipe\n\n{_recipe(card)}",
        f"## Metrics\n\n{_metrics(card)}",
        "## Limitations\n\n" + "\n".join(f"- {sentence}" for sentence in card.limitations)
        if card.limitations
        else "## Limitations\n\nNone are recorded, which does not mean that there are none.",
    ]
    return _header(card, base, use) + "\n\n".join(sections) + "\n"


def _header(card: Card, base: BaseModel, use: Use) -> str:
    fields: dict[str, Any] = {"license": chosen_license(card, base), "library_name": use.library}
    # The hub refuses a card whose base model is not an id on the hub; the text names any source.
    if base.hub_id:
        fields["base_model"] = base.hub_id
    fields |= {"pipeline_tag": use.pipeline, "tags": list(use.tags)}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n\n"


def _license_sentence(card: Card, base: BaseModel) -> str:
    if card.license:
        return f"{card.license}, as given at the export."
    if base.license:
        return f"{base.license}, as the base model declares."
    return "unknown; the base model's files do not name one, so look it up before any use."


def _recipe(card: Card) -> str:
    if card.recipe is None:
        return _NO_RECIPE
    text = json.dumps(public(card.recipe), indent=2, ensure_ascii=False)
    return f"`{card.program}` of ragjax, with these options:\n\n```json\n{text}\n```"


def _metrics(card: Card) -> str:
    if not card.metrics:
        return _NO_METRICS
    measured = {metric for row in card.metrics.values() for metric, cell in row.items()}
    columns = [metric for metric in card.columns if metric in measured] or sorted(
        metric
        for metric in measured
        if any(_is_cell(row.get(metric)) for row in card.metrics.values())
    )
    rows = [["system", *columns], ["---"] * (len(columns) + 1)]
    for system, row in card.metrics.items():
        if cells := [_cell(row.get(metric)) for metric in columns]:
            rows.append([system.replace("_", " "), *cells])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n{card.metrics_note}".rstrip()


def _is_cell(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value


def _cell(value: Any) -> str:
    if not _is_cell(value):
        return ""
    interval = ""
    if value.get("low") is not None and value.get("high") is not None:
        interval = f" [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value['value']:.3f}{interval}"
