"""A reply as text for a terminal, and as one JSON object."""

import math
import textwrap
import unicodedata
from collections.abc import Callable
from typing import Any

from ragjax.data import Corpus, Passage
from ragjax.runs.ask.asker import Answer, Reply, Source
from ragjax.runs.ask.spans import Span

# Turns text and the name of its part into what the terminal shows.
Style = Callable[[str, str], str]

_CODES = {"answer": "1", "span": "1;30;43", "head": "36", "note": "33", "faint": "2"}
_WIDTH = 96
_TITLE_WIDTH = 40
# A change of the answer's log-prob below this many nats is none.
_NO_CHANGE = 0.005
# Of the private use area: they stand for the edges of the span while the text is wrapped.
_MARKS = "\ue000\ue001"


def plain(text: str, part: str) -> str:
    """Marks the span with brackets, and nothing else: for files, pipes and `NO_COLOR`."""
    return f"[[{text}]]" if part == "span" else text


def coloured(text: str, part: str) -> str:
    """Colours a part by its name, with ANSI codes; of each line, since a pager may split them."""
    code = _CODES[part]
    return "\n".join(f"\033[{code}m{line}\033[0m" for line in text.split("\n"))


def safe_text(text: str) -> str:
    """Returns a text without control characters: a document must not steer the terminal.

    Line breaks and tabs become spaces; characters that only set the direction of text stay within
    their line, since each is closed where the line ends.
    """
    kept = "".join(
        " " if character in "\n\r\t" else ("\ufffd" if _is_unsafe(character) else character)
        for character in text
    )
    opened = sum(character in "\u202a\u202b\u202d\u202e" for character in kept)
    isolated = sum(character in "\u2066\u2067\u2068" for character in kept)
    closed = sum(character == "\u202c" for character in kept)
    unisolated = sum(character == "\u2069" for character in kept)
    return kept + "\u202c" * max(0, opened - closed) + "\u2069" * max(0, isolated - unisolated)


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _MARKS


def format_reply(reply: Reply, *, style: Style, answer: bool = True) -> str:
    """Returns everything that is known about an answer, for people.

    Args:
        reply: The reply.
        style: `plain` or `coloured`.
        answer: With the answer itself; False where it has been shown.
    """
    parts = [style(safe_text(reply.answer) or "(nothing)", "answer")] if answer else []
    parts.append(style(_probability(reply), "faint"))
    parts += [style(f"note: {note}", "note") for note in reply.notes]
    if reply.sources:
        parts.append(style(verdict(reply), "head" if reply.grounded else "note"))
        parts += _relied_on(reply, style)
        parts += _others(reply, style)
    return "\n".join(parts)


def format_source(answer: Answer, corpus: Corpus, *, style: Style) -> str:
    """Returns the passage that an answer relies on in one line, empty where there is none."""
    if answer.relied_on is None:
        return ""
    passage = corpus[answer.docs[answer.relied_on]]
    label = safe_text(f"{passage.id}  {passage.title or ''}".strip()) + _place(passage)
    share = _share(float(answer.posterior[answer.relied_on]))
    how = f"posterior {share}" if answer.joint is None else "read with the others at once"
    return style(f"from {answer.relied_on + 1}. {label} ({how})", "head")


def verdict(reply: Reply) -> str:
    """Returns one sentence: does the answer rest on the documents?"""
    if not reply.sources:
        return "No document was read."
    if not reply.grounded:
        return (
            "I found nothing relevant: the answer does not rest on the documents"
            f" ({_nats(reply.utility)} against no document). The nearest passage:"
        )
    return f"The answer rests on the documents ({_nats(reply.utility)} against no document):"


def reply_as_json(reply: Reply) -> dict[str, Any]:
    """Returns a reply as plain values; offsets count characters of the passage's text or title."""
    best = None if reply.relied_on is None else reply.sources[reply.relied_on]
    return {
        "question": reply.question,
        "answer": reply.answer,
        "log_prob": _finite(reply.log_prob),
        "probability": math.exp(reply.log_prob),
        "num_tokens": reply.num_tokens,
        "no_document_log_prob": _finite(reply.no_doc_log_prob),
        "utility": _finite(reply.utility),
        "grounded": reply.grounded,
        "verdict": verdict(reply),
        "relied_on": None if best is None else best.id,
        "span": None if best is None else _span_as_json(best, reply.span),
        "documents": [_source_as_json(source) for source in reply.sources],
        "notes": list(reply.notes),
        "answer_seconds": round(reply.answer_seconds, 3),
        "seconds": round(reply.seconds, 3),
    }


def _probability(reply: Reply) -> str:
    each = math.exp(reply.log_prob / max(reply.num_tokens, 1))
    return (
        f"probability {_share(math.exp(reply.log_prob))} ({each:.2f} a token, {reply.num_tokens}"
        f" tokens); {reply.answer_seconds:.1f} s, explained after {reply.seconds:.1f} s"
    )


def _relied_on(reply: Reply, style: Style) -> list[str]:
    assert reply.relied_on is not None, "there are sources"
    source = reply.sources[reply.relied_on]
    title = safe_text(source.title)
    span = reply.span
    if span is not None and span.field == "title":
        title = _marked(source.title, span, style)
    head = style(f"{reply.relied_on + 1}. {safe_text(source.id)}", "head")
    figures = style(_figures(source), "faint")
    text = (
        _marked(source.text, span, style)
        if span is not None and span.field == "text"
        else _wrapped(safe_text(source.text))
    )
    named = (f"{head}  {title}" if title else head) + _place(source)
    lines = [named, f"   {figures}", text]
    if span is not None:
        lines.append(style(f"   {_how(span)}", "faint"))
    return lines


def _place(passage: Source | Passage) -> str:
    """Returns where a passage stands, if its id does not say it."""
    place = safe_text(passage.source)
    return f"  [{place}]" if place and not safe_text(passage.id).startswith(place) else ""


def _others(reply: Reply, style: Style) -> list[str]:
    rows = [
        f"  {place + 1:>2}. {_share(source.prior):>6} {_share(source.posterior):>9}"
        f" {_change(source.change):>11}  {_shortened(source)}"
        for place, source in enumerate(reply.sources)
        if place != reply.relied_on
    ]
    if not rows:
        return []
    return [style("      p_R(c)  p(c|x,y)  left out   other passages", "faint"), *rows]


def _figures(source: Source) -> str:
    posterior = "" if math.isnan(source.posterior) else f"posterior {_share(source.posterior)}, "
    return (
        f"p_R {_share(source.prior)}, {posterior}without it the answer's log-prob changes by"
        f" {_change(-source.change)} nats"
    )


def _marked(text: str, span: Span, style: Style) -> str:
    before, inside, after = text[: span.start], text[span.start : span.end], text[span.end :]
    # Wrapped with marks of no width in place of the style, whose codes are no text.
    start, end = _MARKS
    whole = _wrapped(f"{safe_text(before)}{start}{safe_text(inside)}{end}{safe_text(after)}")
    left, _, rest = whole.partition(start)
    middle, _, right = rest.partition(end)
    return left + style(middle, "span") + right


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="   ", subsequent_indent="   ")


def _how(span: Span) -> str:
    if span.method == "match":
        return "the marked words are the answer's"
    if span.method == "similar":
        return f"the marked words are like the answer's (F1 {span.score:.2f})"
    assert span.change is not None, "that is what was measured"
    return f"without the marked part the answer's log-prob changes by {_change(-span.change)} nats"


def _shortened(source: Source) -> str:
    label = safe_text(f"{source.id}  {source.title or source.text}")
    return label if len(label) <= _TITLE_WIDTH else label[: _TITLE_WIDTH - 1] + "\u2026"


def _share(probability: float) -> str:
    if math.isnan(probability):
        return "n/a"
    if 0 < probability < 0.01:
        return f"{probability:.0e}"
    return f"{probability:.2f}"


def _nats(value: float) -> str:
    return f"{_change(value)} nats"


def _change(value: float) -> str:
    return "0.00" if abs(value) < _NO_CHANGE else f"{value:+.2f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _source_as_json(source: Source) -> dict[str, Any]:
    return {
        "id": source.id,
        "title": source.title,
        "source": source.source,
        "text": source.text,
        "p_r": source.prior,
        "posterior": _finite(source.posterior),
        "left_out_change": _finite(-source.change),
        "log_prob": _finite(source.log_prob),
    }


def _span_as_json(source: Source, span: Span | None) -> dict[str, Any] | None:
    if span is None:
        return None
    whole = source.title if span.field == "title" else source.text
    return {
        "field": span.field,
        "start": span.start,
        "end": span.end,
        "text": whole[span.start : span.end],
        "method": span.method,
        "score": span.score,
        "left_out_change": None if span.change is None else _finite(-span.change),
    }
