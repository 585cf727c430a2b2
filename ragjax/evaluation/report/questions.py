"""Questions won and lost: which ones changed most, and what was retrieved before and after."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ragjax.evaluation.report.html import details, excerpt, is_number, isolated, number, signed

# Passages shown of each side; a relevant one further down is shown as well.
_SHOWN_PASSAGES = 3
# Questions shown in each direction.
_SHOWN_QUESTIONS = 3


class PassageText(NamedTuple):
    """What is shown of a document."""

    title: str
    text: str


Lookup = Callable[[str], PassageText | None]


class Change(NamedTuple):
    """One question under two systems."""

    line: Mapping[str, Any]  # of predictions.jsonl
    rank_before: int | None  # of the first relevant passage, from 1; None: not among those listed
    rank_after: int | None
    passage_change: float | None  # difference of 1 / rank; None: nothing was retrieved
    answer_change: float | None  # difference of F1; None: not answered


class Selection(NamedTuple):
    """The questions that changed most in one respect, and how many changed at all."""

    won: list[Change]
    lost: list[Change]
    num_won: int
    num_lost: int
    num_same: int


def changes(
    lines: Sequence[Mapping[str, Any]],
    pair: tuple[str, str],
    gold: Mapping[str, Sequence[str]],
) -> list[Change]:
    """Returns what changed between the two systems for every question that both have.

    Args:
        lines: Lines of predictions.jsonl.
        pair: (system, baseline).
        gold: Question id to relevant document ids. For a question without them the difference of
            the metric "mrr@10" takes the place of that of 1 / rank.
    """
    found = []
    for line in lines:
        after, before = (_system(line, name) for name in pair)
        if after is None or before is None:
            continue
        relevant = gold.get(str(line.get("id")), ())
        ranks = [_rank(system, relevant) for system in (before, after)]
        retrieved = bool(before.get("doc_ids") and after.get("doc_ids"))
        passages = [
            _reciprocal(system, rank, relevant) if retrieved else None
            for system, rank in zip((before, after), ranks, strict=True)
        ]
        answers = [_metric(system, "f1") for system in (before, after)]
        found.append(
            Change(
                line=line,
                rank_before=ranks[0],
                rank_after=ranks[1],
                passage_change=_difference(passages[0], passages[1]),
                answer_change=_difference(answers[0], answers[1]),
            )
        )
    return found


def select(found: Sequence[Change], by: Callable[[Change], float | None], count: int) -> Selection:
    """Returns the `count` questions that gained most and those that lost most, ties by id."""
    known = [(value, one) for one in found if (value := by(one)) is not None]

    def order(item: tuple[float, Change]) -> tuple[float, str]:
        return (-abs(item[0]), str(item[1].line.get("id")))

    won = sorted((item for item in known if item[0] > 1e-9), key=order)
    lost = sorted((item for item in known if item[0] < -1e-9), key=order)
    return Selection(
        [one for _, one in won[:count]],
        [one for _, one in lost[:count]],
        len(won),
        len(lost),
        len(known) - len(won) - len(lost),
    )


def by_passage(change: Change) -> float | None:
    """Returns the change of 1 / rank of the first relevant passage."""
    return change.passage_change


def by_answer(change: Change) -> float | None:
    """Returns the change of F1."""
    return change.answer_change


def questions_section(
    lines: Sequence[Mapping[str, Any]],
    pair: tuple[str, str],
    gold: Mapping[str, Sequence[str]],
    lookup: Lookup,
) -> str:
    """Returns the questions won and lost by the rank of the relevant passage and by F1."""
    shown: set[str] = set()
    parts = []
    for what, selection in _selections(lines, pair, gold):
        total = selection.num_won + selection.num_lost + selection.num_same
        if not total:
            continue
        parts.append(
            f"<p><strong>By {what}</strong>: {selection.num_won:,} of {total:,} questions won,"
            f" {selection.num_lost:,} lost, {selection.num_same:,} the same.</p>"
        )
        for title, group in (("Won", selection.won), ("Lost", selection.lost)):
            fresh = [one for one in group if str(one.line.get("id")) not in shown]
            if fresh:
                parts.append(f"<h3>{title} by {what}</h3>")
            for one in fresh:
                shown.add(str(one.line.get("id")))
                # The first of all is open, so that one sees what the boxes hold.
                parts.append(_card(one, pair, gold, lookup, open=len(shown) == 1))
    return "".join(parts) or '<p class="soft">No question was given to both systems.</p>'


def shown_documents(
    lines: Sequence[Mapping[str, Any]],
    pair: tuple[str, str],
    gold: Mapping[str, Sequence[str]],
) -> list[str]:
    """Returns the ids of the documents that `questions_section` shows, to look up their texts."""
    docs: dict[str, None] = {}
    for _, selection in _selections(lines, pair, gold):
        for one in (*selection.won, *selection.lost):
            relevant = gold.get(str(one.line.get("id")), ())
            for name in pair:
                listed = _docs(_system(one.line, name) or {})
                docs |= dict.fromkeys(listed[place] for place in _places(listed, relevant))
    return list(docs)


def passage_card(
    passage: PassageText | None,
    doc_id: str,
    *,
    rank: int,
    score: Any,
    relevant: bool,
    answers: Sequence[str],
) -> str:
    """Returns one retrieved passage: rank, title, score, mark, and a part of its text."""
    title = passage.title if passage and passage.title else doc_id
    badge = '<span class="badge">\u2605 relevant</span>' if relevant else ""
    shown = f'<span class="score">score {number(score)}</span>' if is_number(score) else ""
    text = (
        f'<p dir="auto">{excerpt(passage.text, answers)}</p>'
        if passage
        else '<p class="soft">The text is not at hand.</p>'
    )
    return (
        f'<li class="passage{" gold" if relevant else ""}"><p class="meta">'
        f'<span class="rank">{rank}</span><span class="title">{isolated(title)}</span>{badge}'
        f"{shown}</p>{text}</li>"
    )


def _card(
    change: Change,
    pair: tuple[str, str],
    gold: Mapping[str, Sequence[str]],
    lookup: Lookup,
    *,
    open: bool,
) -> str:
    line = change.line
    answers = [str(answer) for answer in line.get("answers") or ()]
    relevant = frozenset(gold.get(str(line.get("id")), ()))
    chips = ""
    if relevant and change.passage_change is not None:
        ranks = f"{_rank_text(change.rank_before)} \u2192 {_rank_text(change.rank_after)}"
        chips += f'<span class="chip {_state(change.passage_change)}">rank {ranks}</span>'
    if change.answer_change is not None:
        chips += (
            f'<span class="chip {_state(change.answer_change)}">'
            f"F1 {signed(change.answer_change, 2)}</span>"
        )
    columns = "".join(
        f"<section><h4>{isolated(name)}</h4>{_passages(line, name, relevant, answers, lookup)}"
        "</section>"
        for name in (pair[1], pair[0])
    )
    body = _answers(line, pair, answers) + f'<div class="columns">{columns}</div>'
    return details(isolated(line.get("question", "")) + chips, body, open=open)


def _answers(line: Mapping[str, Any], pair: tuple[str, str], answers: Sequence[str]) -> str:
    rows = [("right answer", ", ".join(isolated(answer) for answer in answers) or "\N{EN DASH}")]
    for name in (pair[1], pair[0]):
        system = _system(line, name) or {}
        prediction = system.get("prediction")
        if prediction is not None:
            f1 = _metric(system, "f1")
            said = isolated(prediction) if str(prediction).strip() else "(nothing)"
            rows.append(
                (isolated(name), said + (f" (F1 {number(f1, 2)})" if f1 is not None else ""))
            )
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return f'<dl class="answers">{items}</dl>'


def _passages(
    line: Mapping[str, Any],
    name: str,
    relevant: frozenset[str],
    answers: Sequence[str],
    lookup: Lookup,
) -> str:
    system = _system(line, name) or {}
    docs = _docs(system)
    scores = list(system.get("doc_scores") or ())
    scores += [None] * (len(docs) - len(scores))
    places = _places(docs, relevant)
    cards = [
        passage_card(
            lookup(docs[place]), docs[place], rank=place + 1, score=scores[place],
            relevant=docs[place] in relevant, answers=answers,
        )
        for place in places
    ]  # fmt: skip
    if not cards:
        return '<p class="soft">Nothing was retrieved.</p>'
    note = ""
    if relevant and not relevant.intersection(docs):
        note = f'<p class="soft">No relevant passage among the first {len(docs)}.</p>'
    return f'<ol class="passages">{"".join(cards)}</ol>{note}'


def _system(line: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    systems = line.get("systems")
    system = systems.get(name) if isinstance(systems, Mapping) else None
    return system if isinstance(system, Mapping) else None


def _metric(system: Mapping[str, Any], name: str) -> float | None:
    metrics = system.get("metrics")
    value = metrics.get(name) if isinstance(metrics, Mapping) else None
    return float(value) if value is not None and is_number(value) else None


def _docs(system: Mapping[str, Any]) -> list[str]:
    return [str(doc) for doc in system.get("doc_ids") or ()]


def _places(docs: Sequence[str], relevant: Collection[str]) -> list[int]:
    """Returns the places in a list of documents that are shown: the first, and one relevant."""
    places = list(range(min(_SHOWN_PASSAGES, len(docs))))
    first = next((place for place, doc in enumerate(docs) if doc in relevant), None)
    return places if first is None or first in places else [*places, first]


def _selections(
    lines: Sequence[Mapping[str, Any]],
    pair: tuple[str, str],
    gold: Mapping[str, Sequence[str]],
) -> tuple[tuple[str, Selection], ...]:
    found = changes(lines, pair, gold)
    return (
        ("the first relevant passage", select(found, by_passage, _SHOWN_QUESTIONS)),
        ("the answer (F1)", select(found, by_answer, _SHOWN_QUESTIONS)),
    )


def _rank(system: Mapping[str, Any], relevant: Sequence[str]) -> int | None:
    return next((place for place, doc in enumerate(_docs(system), 1) if doc in relevant), None)


def _reciprocal(
    system: Mapping[str, Any], rank: int | None, relevant: Sequence[str]
) -> float | None:
    if not relevant:
        return _metric(system, "mrr@10")
    return 1 / rank if rank else 0.0


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _rank_text(rank: int | None) -> str:
    return "none" if rank is None else str(rank)


def _state(value: float) -> str:
    return "better" if value > 1e-9 else "worse" if value < -1e-9 else "undecided"
