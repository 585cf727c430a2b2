"""Headings of Markdown and reStructuredText files, and the text that stands under each."""

import contextlib
import re
import string
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import yaml
from markdown_it import MarkdownIt

# A longer "heading" is a paragraph with a line drawn below it.
MAX_HEADING_WORDS = 30
# Images and fonts inside a text; what is shorter is an example of one.
_INLINE_DATA = re.compile(r"data:[\w.+-]+/[\w.+-]+[;,][^\s)>\"']{100,}")
_DESCRIPTIONS = ("subtitle", "description", "summary", "abstract")
_FIELD = re.compile(r"[\w.-]+\s*:")
_FIELDS = re.compile(r"[\w.-]+\s*:|\s|-|#|$")
_BLOCKS = MarkdownIt("commonmark").disable(["inline", "text_join"])


class Section(NamedTuple):
    """The text between one heading, or page, and the next."""

    headings: tuple[str, ...]  # that it stands under, the outermost first
    paragraphs: list[str]  # each on one line
    page: int = 0  # from 1; 0: the file has no pages


class Heading(NamedTuple):
    """A heading."""

    level: int  # the outermost have the smallest
    text: str


class FileText(NamedTuple):
    """The text of a file."""

    sections: list[Section]
    unread: list[int]  # pages that could not be read, from 1


class UnreadableError(ValueError):
    """A file that is left out; the message is what all such files are called, in the plural."""


# A heading, a paragraph below it, or the number of the page that begins.
Part = Heading | str | int


class _Heading(NamedTuple):
    start: int  # its first line
    end: int  # the line behind its last one
    level: int
    text: str


def sections(text: str, ending: str) -> Iterator[Section]:
    """Returns the sections of a file in order; nothing that can be read is left out.

    A heading without anything below it is its own paragraph. The front matter of a Markdown file
    gives its title, as the outermost heading, and its description. Long data URIs, which are
    images, are taken out of Markdown and reStructuredText.

    Args:
        text: Of the whole file.
        ending: Of the file's name, in small letters; ".md" and ".markdown" are CommonMark, ".rst"
            is reStructuredText, and any other has no headings.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    title, found = "", []
    if find := _FINDERS.get(ending):
        lines = [_INLINE_DATA.sub("", line) for line in lines]
        if find is _markdown_headings:
            title, lines = _without_front_matter(lines)
        found = find(lines)
    if title in (heading.text for heading in found):
        title = ""
    found = [_Heading(0, 0, 0, title), *found]
    starts = [*(heading.start for heading in found[1:]), len(lines)]
    return outlined(
        part
        for heading, start in zip(found, starts, strict=True)
        for part in (Heading(heading.level, heading.text), *_paragraphs(lines[heading.end : start]))
    )


def outlined(parts: Iterable[Part]) -> Iterator[Section]:
    """Yields what stands under each heading; one with nothing below it is its own paragraph.

    Args:
        parts: Of a file, in order.
    """
    above: dict[int, str] = {}
    heading, page, paragraphs, is_said = Heading(0, ""), 0, [], False
    for part in (*parts, Heading(0, "")):
        if isinstance(part, str):
            paragraphs.append(part)
            continue
        if (
            isinstance(part, Heading)
            and part.level <= heading.level
            and not (paragraphs or is_said)
        ):
            paragraphs += filter(None, [heading.text])
        if paragraphs:
            yield Section(tuple(filter(None, above.values())), paragraphs, page)
        is_said, paragraphs = is_said or bool(paragraphs), []
        if isinstance(part, int):
            page = part
        else:
            heading, is_said = part, False
            above = {level: name for level, name in above.items() if level < part.level}
            above[part.level] = part.text


def _paragraphs(lines: Sequence[str]) -> list[str]:
    joined: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            joined[-1] += line.split()
        else:
            joined.append([])
    return [" ".join(words) for words in joined if words]


def _markdown_headings(lines: list[str]) -> list[_Heading]:
    """Returns the headings outside of lists and quotations; rules between texts become empty."""
    found = []
    tokens = _BLOCKS.parse("\n".join(lines))
    for place, token in enumerate(tokens):
        if token.level or token.map is None:
            continue
        start, end = token.map
        if token.type == "hr":
            lines[start:end] = [""] * (end - start)
        elif token.type == "heading_open":
            words = tokens[place + 1].content.split()
            if not words or (len(words) > MAX_HEADING_WORDS and token.markup[0] in "=-"):
                lines[end - 1] = ""
            elif len(words) <= MAX_HEADING_WORDS:
                found.append(_Heading(start, end, int(token.tag[1:]), " ".join(words)))
    return found


def _rst_headings(lines: list[str]) -> list[_Heading]:
    """Returns the underlined titles; each new style of line is one level deeper."""
    found: list[_Heading] = []
    styles: list[tuple[str, bool]] = []
    for place, line in enumerate(lines):
        if not _is_adornment(line):
            continue
        above = lines[place - 1] if place else ""
        if not above.strip():
            # A line between blank ones separates texts; else it may stand over a title.
            if len(line) > 3 and not "".join(lines[place + 1 : place + 2]).strip():
                lines[place] = ""
            continue
        over = lines[place - 2] if place > 1 else ""
        is_over = over.rstrip() == line.rstrip()
        is_title = is_over or (not over.strip() and not above[0].isspace())
        is_after = bool(found) and found[-1].end == place - 1
        fits = len(line.rstrip()) >= min(4, len(above.strip()))
        if _is_adornment(above) or not fits or not (is_title or is_after):
            continue
        style = (line[0], is_over)
        if style not in styles:
            styles.append(style)
        start = place - 1 - is_over
        found.append(_Heading(start, place + 1, 1 + styles.index(style), " ".join(above.split())))
    return found


def _is_adornment(line: str) -> bool:
    """Tells whether a line is one punctuation mark over and over."""
    line = line.rstrip()
    return line[:1] in tuple(string.punctuation) and line == line[0] * len(line)


def _without_front_matter(lines: list[str]) -> tuple[str, list[str]]:
    """Returns the title in the front matter, if any, and the lines with what else it tells."""
    fence = lines[0].rstrip()
    ends = {fence, "..."}
    end = next((n for n, line in enumerate(lines) if n and line.rstrip() in ends), 0)
    block = lines[1:end]
    values = None
    if fence == "+++":
        with contextlib.suppress(ValueError, RecursionError):  # also numbers out of range
            values = tomllib.loads("\n".join(block))
    elif fence == "---" and block and _FIELD.match(block[0]):
        try:
            values = yaml.load("\n".join(block), yaml.BaseLoader)  # every value as written
        # Such as `title: Pump: a guide`, which many programs take; or characters that are none.
        except (yaml.YAMLError, ValueError, RecursionError):
            if all(map(_FIELDS.match, block)):
                pairs = (line.partition(":") for line in block if _FIELD.match(line))
                values = {name: value for name, _, value in pairs}
    if not values or not isinstance(values, Mapping):
        return "", lines
    told = {
        # Half of a surrogate pair, which an escape may be, is no text.
        key: " ".join(values[key].encode("utf-8", "replace").decode().strip(" \"'").split())
        for key in ("title", *_DESCRIPTIONS)
        if isinstance(values.get(key), str)
    }
    described = [line for key in _DESCRIPTIONS if key in told for line in (told[key], "")]
    return told.get("title", ""), [*described, *lines[end + 1 :]]


_FINDERS: Mapping[str, Callable[[list[str]], list[_Heading]]] = {
    ".md": _markdown_headings,
    ".markdown": _markdown_headings,
    ".rst": _rst_headings,
}
