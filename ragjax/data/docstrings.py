"""Docstrings as plain passages: markup simplified, cut at a sentence, one line of single spaces."""

import inspect
import re

_ROLE = re.compile(r":[A-Za-z][\w:+-]*:`([^`]+)`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]+>`_{0,2}")
_TARGET = re.compile(r"^~|^!|\s*<[^>]*>$")
_DIRECTIVE = re.compile(r"^\s*\.\.\s+([\w:-]+?)::\s*(.*)$")
_COMMENT = re.compile(r"^\s*\.\.(\s|$)")
_UNDERLINE = re.compile(r"^\s*([-=~^*#])\1{2,}\s*$")
_TABLE_BORDER = re.compile(r"^\s*(\+[-=+]{3,}|={3,} +=[= ]*)$")
_PARAMETER = re.compile(r"^(\s*)(\*{0,2}\w[\w*, ]*?) : (\S.*)$")
_CALL = r"^{name}\(.*\)( *->.*)?( *--.*)?$"
# A sentence ends here, unless the dot belongs to one of the usual abbreviations.
_SENTENCE_END = re.compile(
    r"(?<=[.!?:;])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)\s+(?=[\"'(\[*]*\w)"
)
# What is left of call signatures that C functions spread over several lines.
_LEADING_CALLS = re.compile(r"^(?:--\s+|(?:async )?[\w.]+\([^()]*\)\.?\s+(?=--|[A-Z]))+")
_SPOKEN = {
    "note": "Note:",
    "warning": "Warning:",
    "caution": "Caution:",
    "tip": "Tip:",
    "important": "Important:",
    "seealso": None,
    "deprecated": "Deprecated since",
    "versionchanged": "Changed in",
}
_DROPPED_SECTIONS = {"see also", "references", "examples", "example", "example usage", "reference"}
_SECTION_LINE = re.compile(r"^([A-Z][A-Za-z ]{2,24}):$")


def clean_docstring(docstring: str, *, name: str) -> str:
    """Turns a docstring into plain prose on one line.

    Doctests, code blocks, formulas, references and example sections go; roles, links and literals
    become their text; headings and parameter lists become short labels.

    Args:
        docstring: As found on the object, in reStructuredText, Google or NumPy form.
        name: The object's own name, to drop the call signatures that C functions start with.

    Returns:
        The text with single spaces and no line breaks; may be empty.
    """
    lines = inspect.cleandoc(docstring).splitlines()
    lines = _drop_signatures(lines, name)
    lines = _drop_doctests(lines)
    lines = [line for line in lines if not _TABLE_BORDER.match(line)]
    lines = _label_headings(lines)
    lines = _drop_directives(lines)
    lines = _drop_sections(lines)
    lines = [_PARAMETER.sub(r"\1\2 (\3):", line) for line in lines]
    return _LEADING_CALLS.sub("", _inline("\n".join(lines)))


def cut_text(text: str, *, max_words: int) -> str:
    """Keeps the leading sentences of a text that fit into a number of words.

    Args:
        text: One line of prose.
        max_words: Largest number of space-separated words to keep, at least 1.

    Returns:
        The longest run of whole leading sentences within the limit, without labels left dangling at
        its end; the first `max_words` words where the first sentence alone is longer.
    """
    kept: list[str] = []
    num_words = 0
    for sentence in _SENTENCE_END.split(text):
        num_words += len(sentence.split())
        if num_words > max_words:
            break
        kept.append(sentence)
    # A label whose content is cut off says nothing.
    while len(kept) > 1 and kept[-1].endswith(":"):
        kept.pop()
    return " ".join(kept) or " ".join(text.split()[:max_words])


def _drop_signatures(lines: list[str], name: str) -> list[str]:
    call = re.compile(_CALL.format(name=rf"[\w.]*\b{re.escape(name)}"))
    first = 0
    while first < len(lines) and (not lines[first].strip() or call.match(lines[first].strip())):
        first += 1
    return lines[first:]


def _drop_doctests(lines: list[str]) -> list[str]:
    kept = []
    inside = False
    for line in lines:
        inside = bool(line.strip()) and (inside or line.lstrip().startswith(">>>"))
        if not inside:
            kept.append(line)
    return kept


def _label_headings(lines: list[str]) -> list[str]:
    """Replaces a heading and its underline by `Heading:` between blank lines."""
    kept: list[str] = []
    for line in lines:
        if _UNDERLINE.match(line):
            if kept and kept[-1].strip():
                kept[-1:] = ["", kept[-1].strip().rstrip(":") + ":", ""]
        else:
            kept.append(line)
    return kept


def _drop_directives(lines: list[str]) -> list[str]:
    """Drops blocks of code and formulas, keeps the words of notes and warnings."""
    kept: list[str] = []
    drop_deeper_than: int | None = None
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if drop_deeper_than is not None:
            if not line.strip() or depth > drop_deeper_than:
                continue
            drop_deeper_than = None
        directive = _DIRECTIVE.match(line)
        if directive:
            label = _SPOKEN.get(directive[1])
            if label is None:
                drop_deeper_than = depth
            else:
                kept += ["", f"{' ' * depth}{label} {directive[2]}"]
        elif _COMMENT.match(line):
            drop_deeper_than = depth
        elif line.rstrip().endswith("::"):
            if line.strip(" :").lower() not in _DROPPED_SECTIONS:
                kept.append(line.rstrip()[:-1])
            drop_deeper_than = depth
        else:
            kept.append(line)
    return kept


def _drop_sections(lines: list[str]) -> list[str]:
    """Drops sections that only point elsewhere, and headings with nothing below them."""
    kept: list[str] = []
    dropping = indented = False
    for line in lines:
        heading = _SECTION_LINE.match(line)
        if heading:
            dropping = heading[1].lower() in _DROPPED_SECTIONS
            indented = False
        elif dropping and line.strip():
            # Google sections end with their indentation, NumPy sections at the next heading.
            indented = indented or line.startswith(" ")
            dropping = line.startswith(" ") or not indented
        if not dropping:
            kept.append(line)
    while kept and (not kept[-1].strip() or _SECTION_LINE.match(kept[-1])):
        kept.pop()
    return kept


def _inline(text: str) -> str:
    text = _ROLE.sub(lambda match: _TARGET.sub("", match[1]), text)
    text = _LINK.sub(r"\1", text)
    text = re.sub(r"`{1,2}([^`]+)`{1,2}_?", r"\1", text)
    text = re.sub(r"\*\*([^*\s][^*\n]*)\*\*", r"\1", text)
    text = re.sub(r"(?<!\w)\*([A-Za-z][\w ]*)\*(?!\w)", r"\1", text)
    text = re.sub(r"^\s*[-*•]\s+", "", text, flags=re.MULTILINE)
    # A paragraph without closing punctuation still ends a sentence.
    text = re.sub(r"(\w|\))[ \t]*\n\s*\n", r"\1.\n\n", text)
    return " ".join(text.split())
