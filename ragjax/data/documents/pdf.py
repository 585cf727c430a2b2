"""The text of a PDF file page by page, under the headings of its outline."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ragjax.data.documents.sections import FileText, Heading, Part, UnreadableError, outlined

_PASSWORD_NEEDED = (4, 5)  # error codes of PDFium: another password, an unknown way to encrypt
_MOST_ENTRIES = 100_000
# What PDFium puts for the hyphen of a word that goes on in the next line, and for no character.
_JOINED = re.compile(r"[\ufffe\u00ad]\s*|[\x00-\x08\x0b\x0e-\x1f\x7f\uffff]")
_NUMBERING = re.compile(r"^[\W\d_]+(?=\w)")
_NUMBER = re.compile(r"\d{1,9}")


def read_pdf(path: Path) -> FileText:
    """Returns the sections of a PDF file; none of them crosses a page.

    Words that a hyphen divides between two lines are joined. A line at the top or bottom of a page
    that returns on the next ones is left out there, with numbers that count pages from the third
    time on. An entry of the
    outline is a heading where a line of its page says the same, else where the page begins.

    Raises:
        UnreadableError: It needs a password, is broken, or has no text.
    """
    import pypdfium2

    pages: list[list[str]] = []
    unread: list[int] = []
    try:
        document = pypdfium2.PdfDocument(path)
        outline = _outline(document)
    except pypdfium2.PdfiumError as error:
        if error.err_code in _PASSWORD_NEEDED:
            raise UnreadableError("PDF files that need a password") from error
        raise UnreadableError("broken PDF files") from error
    for number in range(len(document)):
        try:
            pages.append(_lines(document, number))
        except pypdfium2.PdfiumError:
            pages.append([])
            unread.append(number + 1)
    if not any(pages):
        broken = "broken PDF files" if unread else ""
        raise UnreadableError(broken or "PDF files without text (scanned: ocrmypdf reads them)")
    parts = _parts(_without_running_lines(pages), outline)
    return FileText(list(outlined(parts)), unread)


def _outline(document: Any) -> dict[int, list[Heading]]:
    """Returns the headings of each page, from 0."""
    outline: dict[int, list[Heading]] = {}
    for entry in itertools.islice(document.get_toc(), _MOST_ENTRIES):
        place, title = entry.get_dest(), " ".join(entry.get_title().split())
        page = place.get_index() if place else None
        if page is not None and title:
            outline.setdefault(page, []).append(Heading(entry.level + 1, title))
    return outline


def _lines(document: Any, number: int) -> list[str]:
    page = document[number]
    try:
        text = page.get_textpage().get_text_bounded()
    finally:
        page.close()  # which frees it now
    lines = (" ".join(line.split()) for line in _JOINED.sub("", text).splitlines())
    return [line for line in lines if line]


def _without_running_lines(pages: Sequence[list[str]]) -> Iterator[list[str]]:
    """Yields the lines of each page but a first or last one that has come before."""
    for number, lines in enumerate(pages):
        kept = lines
        for edge in (0, -1):
            if kept and any(_returns(pages, number, edge, apart) for apart in (1, 2)):
                kept = kept[1:] if edge == 0 else kept[:-1]
        yield kept


def _returns(pages: Sequence[Sequence[str]], number: int, edge: int, apart: int) -> bool:
    """Tells whether a line stands so many pages before; with numbers that count pages, twice."""
    line = pages[number][edge]
    earlier = [pages[n][edge] for n in (number - apart, number - 2 * apart) if n >= 0 and pages[n]]
    if line in earlier[:1]:
        return True
    counted = [line, *earlier]
    if len(counted) < 3 or len({_NUMBER.sub("", text) for text in counted}) > 1:
        return False
    found = zip(*([int(n) for n in _NUMBER.findall(text)] for text in counted), strict=False)
    return all(one - two == two - three in (0, apart) for one, two, three in found)


def _parts(
    pages: Iterable[Sequence[str]], outline: Mapping[int, Sequence[Heading]]
) -> Iterator[Part]:
    for number, lines in enumerate(pages):
        yield number + 1
        start = 0
        for heading in outline.get(number, ()):
            found, size = _place(lines, start, heading.text)
            if text := " ".join(lines[start:found]):
                yield text
            yield heading
            start = found + size
        if text := " ".join(lines[start:]):
            yield text


def _place(lines: Sequence[str], start: int, title: str) -> tuple[int, int]:
    """Returns where a title stands and how many lines it has; (start, 0) where it is not found."""
    wanted = _key(title)
    for place in range(start, len(lines)):
        for size in (1, 2):
            if _key(" ".join(lines[place : place + size])) == wanted:
                return place, size
    return start, 0


def _key(title: str) -> str:
    """Returns a title without its number, letter case and signs."""
    return re.sub(r"\W+", "", _NUMBERING.sub("", title)).casefold()
