"""HTML from untrusted text: escaping, numbers, tables, excerpts and the page around them.

Every function returns HTML; whatever comes from a corpus, a question or a model passes through
`escape` exactly once. A page needs nothing but itself: no script, and a Content-Security-Policy
that allows its one style sheet by hash and nothing else.
"""

import base64
import hashlib
import html
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from ragjax.data.matching import find_answer, refuse_string
from ragjax.evaluation.report.style import STYLE

# What HTML forbids or no font can draw: control characters, lone surrogates, noncharacters.
_UNSHOWABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
_ZERO_WIDTH_JOINER = "\u200d"
# How far an excerpt's edge moves to fall between two words.
_EDGE = 24


def escape(text: Any) -> str:
    """Returns text for HTML content or a quoted attribute.

    Args:
        text: Any value; its `str` is shown.

    Returns:
        The text with `& < > " '` escaped, and U+FFFD for what HTML cannot hold.
    """
    shown = str(text).replace("\r\n", "\n").replace("\r", "\n")
    return html.escape(_UNSHOWABLE.sub("\ufffd", shown), quote=True)


def isolated(text: Any) -> str:
    """Returns text in a `<bdi>`, so that its direction does not leak into what stands around."""
    return f'<bdi dir="auto">{escape(text)}</bdi>'


def is_number(value: Any) -> bool:
    """Returns whether a value of a JSON file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """Formats a number as `.564`, `7.448` or `-.010` with a true minus; "-" for anything else."""
    if not is_number(value):
        return "\N{EN DASH}"
    text = f"{abs(value):.{digits}f}"
    if text.startswith("0.") and digits:
        text = text[1:]
    negative = value < 0 and float(f"{value:.{digits}f}") != 0
    return ("\N{MINUS SIGN}" if negative else "") + text


def signed(value: Any, digits: int = 3) -> str:
    """Formats a difference: as `number`, with a plus where it is positive."""
    text = number(value, digits)
    unsigned = not is_number(value) or text.startswith("\N{MINUS SIGN}")
    return text if unsigned or float(text) == 0 else "+" + text


def interval(value: Any, low: Any, high: Any) -> str:
    """Formats a difference with its interval: `+.144 [+.108, +.182]`."""
    return f"{signed(value)} [{signed(low)}, {signed(high)}]"


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str, name: str = ""
) -> str:
    """Returns a table that scrolls inside its own box; the first cell of a row is its header.

    Args:
        headers: HTML of the column headers.
        rows: HTML of the cells.
        caption: Text that says what the table shows.
        name: Class of the table.
    """
    head = "".join(f'<th scope="col">{cell}</th>' for cell in headers)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    label = escape(caption)
    # The caption stands outside, where it does not scroll away; the box takes the focus, so that
    # it can be scrolled with the keyboard too.
    return (
        f'<p class="caption">{label}</p>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
        f'<table class="{name}" aria-label="{label}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details(summary: str, body: str, *, open: bool = False, name: str = "") -> str:
    """Returns a box that opens on demand, without a script."""
    return (
        f'<details class="{name}"{" open" if open else ""}><summary>{summary}</summary>'
        f"{body}</details>"
    )


def excerpt(text: str, answers: Sequence[str], *, length: int = 320) -> str:
    """Returns a part of a text with the answers in it marked.

    Args:
        text: A passage.
        answers: Acceptable answers, searched for as whole words in any case.
        length: Characters kept, about; the part around the first answer, else the beginning.

    Returns:
        HTML; an ellipsis stands for what was left out.
    """
    found = _occurrences(text, answers)
    start = 0
    if found and found[0][1] > length:
        start = max(0, found[0][0] - length // 3)
    start = _between_words(text, start)
    end = _between_words(text, min(len(text), start + length))
    end = max(end, min(len(text), start + 1))
    parts, place = ["\N{HORIZONTAL ELLIPSIS}"] if start else [], start
    for first, last in found:
        first, last = max(first, place), min(last, end)
        if first < last:
            parts += [escape(text[place:first]), f"<mark>{escape(text[first:last])}</mark>"]
            place = last
    parts.append(escape(text[place:end]))
    return "".join(parts) + ("\N{HORIZONTAL ELLIPSIS}" if end < len(text) else "")


def page(title: str, body: str) -> str:
    """Returns a whole document around the HTML of its body."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _occurrences(text: str, answers: Sequence[str]) -> list[tuple[int, int]]:
    """Returns where answers stand, in order and without overlap."""
    refuse_string(answers, "answers")
    found: list[tuple[int, int]] = []
    for answer in answers:
        found += find_answer(text, answer)
    kept: list[tuple[int, int]] = []
    for first, last in sorted(found, key=lambda span: (span[0], -span[1])):
        if not kept or first >= kept[-1][1]:
            kept.append((first, last))
    return kept


def _between_words(text: str, place: int) -> int:
    """Moves a place in a text back to a space, or at least to where a character begins."""
    if place <= 0 or place >= len(text):
        return max(0, min(place, len(text)))
    for near in range(place, max(0, place - _EDGE), -1):
        if text[near - 1].isspace():
            return near
    while place > 0 and _continues(text, place):
        place -= 1
    return place


def _continues(text: str, place: int) -> bool:
    """Returns whether the code point at `place` is drawn as part of the one before it."""
    code = text[place]
    return (
        unicodedata.category(code)[0] == "M"
        or code == _ZERO_WIDTH_JOINER
        or text[place - 1] == _ZERO_WIDTH_JOINER
        or "\U0001f3fb" <= code <= "\U0001f3ff"  # skin tones
    )
