"""p_R beside p_LSR: what the retriever and the language model think of the same candidates."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ragjax.evaluation.report.charts import share_bar
from ragjax.evaluation.report.html import excerpt, isolated, number
from ragjax.evaluation.report.questions import Lookup, source_note

# Key in a candidate, its column header.
_VIEWS = (
    ("target", "language model p<sub>LSR</sub>"),
    ("before", "p<sub>R</sub> before"),
    ("after", "p<sub>R</sub> after"),
    ("posterior", "posterior after"),
)


def explained_section(explained: Mapping[str, Any], lookup: Lookup) -> str:
    """Returns, for each chosen question, the distributions over its candidates as bars.

    Args:
        explained: `{"questions": [{"question", "answers", "candidates": [{"doc_id", "relevant",
            "target", "before", "after", "posterior"}]}], "settings": {...}}`; each of the last four
            sums to 1 over the candidates.
        lookup: Document id to its text.
    """
    boxes = "".join(_box(question, lookup) for question in explained["questions"])
    return f'<div class="boxes">{boxes}</div>'


def divergence(target: Sequence[float], other: Sequence[float]) -> float:
    """Returns KL(target || other) in nats; probabilities of 0 are taken as 1e-9.

    Args:
        target: K probabilities.
        other: K probabilities of the same candidates.
    """
    return math.fsum(
        p * (math.log(max(p, 1e-9)) - math.log(max(q, 1e-9)))
        for p, q in zip(target, other, strict=True)
        if p > 0
    )


def _box(question: Mapping[str, Any], lookup: Lookup) -> str:
    ordered = sorted(question["candidates"], key=lambda one: (-one["target"], one["doc_id"]))
    target, before, after = ([one[key] for one in ordered] for key in ("target", "before", "after"))
    distance = [divergence(target, other) for other in (before, after)]
    answers = question["answers"]
    named = ", ".join(map(isolated, answers)) or "none"
    columns = "".join(f'<th scope="col">{header}</th>' for _, header in _VIEWS)
    rows = "".join(_candidate(one, answers, lookup) for one in ordered)
    return (
        f'<article class="box"><h3>{isolated(question["question"])}</h3>'
        f'<p class="soft">Right answer: {named}. Distance of p<sub>R</sub> from the'
        f" language model's view, KL in nats: {number(distance[0])} \u2192 {number(distance[1])}."
        f'</p><table class="views"><thead><tr>{columns}</tr></thead>{rows}</table></article>'
    )


def _candidate(one: Mapping[str, Any], answers: Sequence[str], lookup: Lookup) -> str:
    passage = lookup(one["doc_id"])
    title = passage.title if passage and passage.title else one["doc_id"]
    badge = ' <span class="badge">\u2605 relevant</span>' if one["relevant"] else ""
    # Passages of one document often share its title: the text tells them apart.
    text = excerpt(passage.text, answers, length=110) if passage else ""
    cells = "".join(
        f"<td>{number(one[key], 2)}{share_bar(one[key], place, f'{key}: {number(one[key], 2)}')}"
        "</td>"
        for place, (key, _) in enumerate(_VIEWS)
    )
    return (
        f'<tbody><tr><th scope="rowgroup" colspan="{len(_VIEWS)}">'
        f'<span class="title">{isolated(title)}</span>{source_note(passage)}{badge}'
        f'<div dir="auto">{text}</div></th></tr><tr>{cells}</tr></tbody>'
    )
