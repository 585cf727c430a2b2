"""Questions won and lost: which ones changed most, and what was retrieved before and after."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ragjax.evaluation.report.html import details, excerpt, isolated, number, signed, table

# Passages shown of each side; a relevant one further down is shown as well.
_SHOWN_PASSAGES = 3
# Questions shown in each direction.
_SHOWN_QUESTIONS = 3


class PassageText(NamedTuple):
    """Title and text of a document, and where it stands."""

    title: str
    text: str
    source: str = ""  # such as "manual.pdf, page 3"; "": nothing says


Lookup = Callable[[str], PassageText | None]
# By what flipped between two runs (`found`, `right`), then `lost` or `won`: the questions.
Flips = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]


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
        if not all(name in line["systems"] for name in pair):
            continue
        after, before = (line["systems"][name] for name in pair)
        relevant = gold.get(line["id"], ())
        retrieved = bool(before["doc_ids"] and after["doc_ids"])
        passages = [
            _reciprocal(system, relevant) if retrieved else None for system in (before, after)
        ]
        found.append(
            Change(
                line=line,
                rank_before=_rank(before, relevant),
                rank_after=_rank(after, relevant),
                passage_change=_difference(*passages),
                answer_change=_difference(*(s["metrics"].get("f1") for s in (before, after))),
            )
        )
    return found


def select(found: Sequence[Change], by: Callable[[Change], float | None], count: int) -> Selection:
    """Returns the `count` questions that gained most and those that lost most, ties by id."""
    known = [(value, one) for one in found if (value := by(one)) is not None]

    def order(item: tuple[float, Change]) -> tuple[float, str]:
        return (-abs(item[0]), item[1].line["id"])

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
            fresh = [one for one in group if one.line["id"] not in shown]
            if fresh:
                parts.append(f"<h3>{title} by {what}</h3>")
            for one in fresh:
                shown.add(one.line["id"])
                # The first of all is open, so that a reader sees what a box contains.
                parts.append(_card(one, pair, gold, lookup, open=len(shown) == 1))
    return "".join(parts) or '<p class="soft">No question was given to both systems.</p>'


def flips_section(flips: Flips) -> str:
    """Returns the questions that one of two runs got right and the other did not.

    Args:
        flips: As in compare.json.
    """
    titles = {"found": "A relevant passage among the first 5", "right": "A right answer"}
    parts = []
    for kind, title in titles.items():
        rows = [
            [isolated(one["id"]), word, isolated(one["question"]), *(_shown(one[s]) for s in "AB")]
            for word in ("lost", "won")
            for one in flips.get(kind, {}).get(word, ())
        ]
        if rows:
            caption = f"{title}: lost or won from A to B"
            parts.append(table(["id", "", "question", "A", "B"], rows, caption=caption))
    return "".join(parts)


def shown_documents(
    lines: Sequence[Mapping[str, Any]],
    pair: tuple[str, str],
    gold: Mapping[str, Sequence[str]],
) -> list[str]:
    """Returns the ids of the documents that `questions_section` shows, to look up their texts."""
    docs: dict[str, None] = {}
    for _, selection in _selections(lines, pair, gold):
        for one in (*selection.won, *selection.lost):
            relevant = gold.get(one.line["id"], ())
            for name in pair:
                listed = one.line["systems"][name]["doc_ids"]
                docs |= dict.fromkeys(listed[place] for place in _places(listed, relevant))
    return list(docs)


def _shown(outcome: str | Sequence[str] | None) -> str:
    """Returns an answer, or the ids of the passages found."""
    text = outcome if isinstance(outcome, str) else " ".join(outcome or ())
    return isolated(text)


def _card(
    change: Change,
    pair: tuple[str, str],
    gold: Mapping[str, Sequence[str]],
    lookup: Lookup,
    *,
    open: bool,
) -> str:
    line = change.line
    relevant = frozenset(gold.get(line["id"], ()))
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
        f"<section><h4>{isolated(name)}</h4>{_passages(line, name, relevant, lookup)}</section>"
        for name in (pair[1], pair[0])
    )
    body = _answers(line, pair) + f'<div class="columns">{columns}</div>'
    return details(isolated(line["question"]) + chips, body, open=open)


def _answers(line: Mapping[str, Any], pair: tuple[str, str]) -> str:
    rows = [("right answer", ", ".join(map(isolated, line["answers"])) or "\N{EN DASH}")]
    for name in (pair[1], pair[0]):
        system = line["systems"][name]
        prediction, f1 = system["prediction"], system["metrics"].get("f1")
        if prediction is not None:
            said = isolated(prediction) if prediction.strip() else "(nothing)"
            rows.append(
                (isolated(name), said + (f" (F1 {number(f1, 2)})" if f1 is not None else ""))
            )
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return f'<dl class="answers">{items}</dl>'


def _passages(line: Mapping[str, Any], name: str, relevant: frozenset[str], lookup: Lookup) -> str:
    system = line["systems"][name]
    docs = system["doc_ids"]
    if not docs:
        return '<p class="soft">Nothing was retrieved.</p>'
    cards = []
    for place in _places(docs, relevant):
        passage, is_gold = lookup(docs[place]), docs[place] in relevant
        title = passage.title if passage and passage.title else docs[place]
        text = (
            f'<p dir="auto">{excerpt(passage.text, line["answers"])}</p>'
            if passage
            else '<p class="soft">The text is not at hand.</p>'
        )
        cards.append(
            f'<li class="passage{" gold" if is_gold else ""}"><p class="meta">'
            f'<span class="rank">{place + 1}</span><span class="title">{isolated(title)}</span>'
            + source_note(passage)
            + ('<span class="badge">\u2605 relevant</span>' if is_gold else "")
            + f'<span class="score">score {number(system["doc_scores"][place])}</span></p>'
            f"{text}</li>"
        )
    note = ""
    if relevant and not relevant.intersection(docs):
        note = f'<p class="soft">No relevant passage among the first {len(docs)}.</p>'
    return f'<ol class="passages">{"".join(cards)}</ol>{note}'


def source_note(passage: PassageText | None) -> str:
    """Returns where a passage stands, behind its title; "" if nothing says."""
    if passage is None or not passage.source:
        return ""
    return f' <span class="soft">{isolated(passage.source)}</span>'


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
    return next((rank for rank, doc in enumerate(system["doc_ids"], 1) if doc in relevant), None)


def _reciprocal(system: Mapping[str, Any], relevant: Sequence[str]) -> float | None:
    if not relevant:
        return system["metrics"].get("mrr@10")
    rank = _rank(system, relevant)
    return 1 / rank if rank else 0.0


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _rank_text(rank: int | None) -> str:
    return "none" if rank is None else str(rank)


def _state(value: float) -> str:
    return "better" if value > 1e-9 else "worse" if value < -1e-9 else "undecided"
