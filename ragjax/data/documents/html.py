"""The text of an HTML page under its headings, without menus, scripts and what is hidden."""

import codecs
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ragjax.data.documents.sections import FileText, Heading, Part, UnreadableError, outlined

_NO_TEXT = frozenset(
    "button canvas datalist footer head iframe nav noscript object script select style svg template"
    " textarea".split()
)
_NO_TEXT_ROLES = frozenset(("banner", "contentinfo", "navigation", "search"))
# Of a page that does not say where its text is.
_BESIDE_TEXT = frozenset(("aside", "header"))
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_LISTS = frozenset(("ul", "ol", "dl", "table"))
# All others begin a paragraph.
_WITHIN_LINES = frozenset(
    "a abbr acronym b bdi bdo big cite code data del dfn em font i img input ins kbd label mark"
    " meter output progress q rb rp rt ruby s samp small span strike strong sub sup time tt u var"
    " wbr".split()
)
# What pages show beside a heading as a link to it.
_ANCHORS = frozenset(("#", "\u00a7", "\u00b6", "\U0001f517"))
_DECLARED = re.compile(
    rb"<(?:meta|\?xml)[^>]*\b(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE
)
# Encodings that are meant by the names of others, as browsers take them.
_MEANT = {
    "ascii": "cp1252",
    "euc_kr": "cp949",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "iso8859-1": "cp1252",
    "shift_jis": "cp932",
}
_NO_ENCODING = "HTML files that are not UTF-8 and do not declare a known encoding"
_MENU_LINKS, _MENU_SHARE = 4, 0.9


def read_html(path: Path) -> FileText:
    """Returns the sections of a page; broken markup is read as browsers do.

    The text is that of `main`, or of the only `article`, where the page has one. Elements that are
    hidden or have no text (scripts, controls of forms), landmarks (`nav`, `footer`, a banner) and
    lists that are links alone are left out, the last unless nothing else is there. The title is the
    outermost heading of a page without `h1`. A row of a table is a paragraph.

    Raises:
        UnreadableError: The encoding is not UTF-8, and not declared.
    """
    from lxml import etree

    text = _decoded(path.read_bytes())
    parser = etree.HTMLParser(
        encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True
    )
    content = text.encode("utf-8", "replace")
    page = etree.fromstring(content, parser) if text.strip() else None
    if page is None:
        return FileText([], [])
    root = _text_of(page)
    parts = list(_parts(root, menus=False)) or list(_parts(root, menus=True))
    if not any(isinstance(part, Heading) and part.level == 1 for part in parts):
        title = " ".join((page.findtext(".//title") or "").split())
        parts.insert(0, Heading(0, title))
    return FileText(list(outlined(parts)), [])


def _decoded(content: bytes) -> str:
    """Returns the text of a file by its byte-order mark, as UTF-8, or as it declares."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    if b"\0" not in content:
        with contextlib.suppress(UnicodeDecodeError):
            return content.decode("utf-8-sig")
        declared = _DECLARED.search(content[:4096])
        name = declared[1].decode() if declared else ""
        with contextlib.suppress(LookupError, ValueError):
            name = codecs.lookup(name).name
            return content.decode(_MEANT.get(name, name), "replace")
    raise UnreadableError(_NO_ENCODING)


def _text_of(page: Any) -> Any:
    """Returns the element with the text of a page."""
    for path in ("//main | //*[@role='main']", "//article"):
        if len(found := page.xpath(path)) == 1 and "".join(found[0].itertext()).strip():
            return found[0]
    return page


def _parts(root: Any, *, menus: bool) -> Iterator[Part]:
    """Yields headings and paragraphs below an element."""
    from lxml import etree

    words: list[str] = []

    def said() -> str:
        text = " ".join("".join(words).split()).strip("| ")
        words.clear()
        return text

    is_page = root.getparent() is None
    level = 0  # of the heading that is read
    walk = etree.iterwalk(root, events=("start", "end"))
    for event, element in walk:
        name = element.tag
        breaks = name not in _WITHIN_LINES and not (name in ("td", "th") or level)
        if event == "start":
            if breaks and (text := said()):
                yield text
            level = level or _HEADINGS.get(name, 0)
            if _is_left_out(element, is_page) or (not menus and _is_menu(element)):
                walk.skip_subtree()
            else:
                words.append(element.text or "")
        else:
            if name in _HEADINGS and level == _HEADINGS[name]:
                text, level = said(), 0
                if text:
                    yield Heading(_HEADINGS[name], text)
            elif breaks and (text := said()):
                yield text
            words.append({"td": " | ", "th": " | ", "br": " "}.get(name, ""))
            if element is not root:
                words.append(element.tail or "")
    if text := said():
        yield text


def _is_left_out(element: Any, is_page: bool) -> bool:
    name = element.tag
    return (
        name in _NO_TEXT
        or element.get("role") in _NO_TEXT_ROLES
        or element.get("hidden") is not None
        or element.get("aria-hidden") == "true"
        or (is_page and name in _BESIDE_TEXT and not element.xpath("boolean(.//h1 | .//h2)"))
        or (name == "a" and "".join(element.itertext()).strip() in _ANCHORS)
    )


def _is_menu(element: Any) -> bool:
    """Tells whether a list is links and nothing else."""
    if element.tag not in _LISTS:
        return False
    links = ["".join(link.itertext()).split() for link in element.iter("a") if link.get("href")]
    if len(links) < _MENU_LINKS:
        return False
    linked = sum(len("".join(link)) for link in links)
    return linked >= _MENU_SHARE * len("".join("".join(element.itertext()).split()))
