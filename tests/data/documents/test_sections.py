import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragjax.data.documents.sections import MAX_HEADING_WORDS, sections

IMAGE = "data:image/png;base64," + "iVBORw0KGgo" * 1000


def told(text, ending=".md"):
    """Headings and paragraphs of each section that has any."""
    return [
        (" / ".join(section.headings), section.paragraphs)
        for section in sections(text, ending)
        if section.paragraphs
    ]


MARKDOWN = {
    "a title alone": ("# Pump\n", [("Pump", ["Pump"])]),
    "headings without text": (
        "# News\n\n## 1.2: faster\n\n## 1.1: fewer errors\n\n## 1.0\n\nFirst.\n",
        [
            ("News / 1.2: faster", ["1.2: faster"]),
            ("News / 1.1: fewer errors", ["1.1: fewer errors"]),
            ("News / 1.0", ["First."]),
        ],
    ),
    "signs in headings": (
        "# C#\n# F# #\n# 3 apples\nx",
        [(t, [t]) for t in ("C#", "F#")] + [("3 apples", ["x"])],
    ),
    "no heading without a space": ("#hash\n\n\\# 3 apples", [("", ["#hash", "\\# 3 apples"])]),
    "underlined": (
        "Fan\n===\nMoves\nair.\n\nTo\nclean\n---\nDust it.\n",
        [("Fan", ["Moves air."]), ("Fan / To clean", ["Dust it."])],
    ),
    "levels go back": (
        "# A\na\n### B\nb\n## C\nc\n# D\nd",
        [("A", ["a"]), ("A / B", ["b"]), ("A / C", ["c"]), ("D", ["d"])],
    ),
    "a paragraph above a line": (
        "word " * (MAX_HEADING_WORDS + 1) + "\n---\nmore",
        [("", [" ".join(["word"] * (MAX_HEADING_WORDS + 1)), "more"])],
    ),
    "a code fence on one line": (
        "# A\n\n```pip install pump```\n\n## B\n\nb",
        [("A", ["```pip install pump```"]), ("A / B", ["b"])],
    ),
    "fences in fences": (
        "# A\n````\n```\n# code\n```\n````\n~~~\n```\n# code\n~~~\n# B\nb",
        [("A", ["```` ``` # code ``` ```` ~~~ ``` # code ~~~"]), ("B", ["b"])],
    ),
    "a fence in a list": (
        "- a\n  ```\n  # code\n  ```\n# B\nb",
        [("", ["- a ``` # code ```"]), ("B", ["b"])],
    ),
    "code by its indentation": ("    # code\n\n# B\nb", [("", ["# code"]), ("B", ["b"])]),
    "headings in quotations stay there": ("> # A\n> a\n\nb", [("", ["> # A > a", "b"])]),
    "rules are no text": ("a\n\n---\n\nb\n\n***\n", [("", ["a", "b"])]),
    "other ends of lines": ("# A\r\na\r\rb\x0b# c", [("A", ["a", "b # c"])]),
    "images within the text": (
        f"# A ![logo]({IMAGE})\n\nsee ![a pump]({IMAGE} 'it') here\n\n[i]: <{IMAGE}>\n",
        [("A ![logo]()", ["see ![a pump]( 'it') here", "[i]: <>"])],
    ),
    "nothing": ("", []),
    "empty headings": ("#\n\n##\n\n# A\n##\n", [("A", ["A"])]),
}


@pytest.mark.parametrize(("text", "expected"), MARKDOWN.values(), ids=MARKDOWN.keys())
def test_markdown_is_read_as_commonmark(text, expected):
    assert told(text) == expected


FRONT_MATTER = {
    "above its own heading": ("---\ntitle: Pump\ntags: [a]\n---\n# Pump\nx", [("Pump", ["x"])]),
    "the only title": (
        "---\ntitle: 'Pump'\n---\nx\n## A\na",
        [("Pump", ["x"]), ("Pump / A", ["a"])],
    ),
    "nothing below": ("---\ntitle: Pump\n---\n", [("Pump", ["Pump"])]),
    "a description": (
        "---\ndescription: >\n  Moves\n  water.\ntitle: Pump\n...\n# A\na",
        [("Pump", ["Moves water."]), ("Pump / A", ["a"])],
    ),
    "of another kind": ("+++\ntitle = 'Pump'\ndate = 2020-01-01\n+++\nx", [("Pump", ["x"])]),
    "not quite YAML": ("---\ntitle: Pump: oil\ntags:\n- [x\n---\nx", [("Pump: oil", ["x"])]),
    "numbers": ("---\nweight: 3\ndraft: off\n---\nx", [("", ["x"])]),
    "rules, not front matter": ("---\n\nx\n\n---\n\ny", [("", ["x", "y"])]),
    "a heading, not front matter": (
        "---\n# Pump\nNote: oil it.\n\n---\nx",
        [("Pump", ["Note: oil it.", "x"])],
    ),
    "without an end": ("---\ntitle: Pump\n\nx", [("", ["title: Pump", "x"])]),
    "brackets without an end": (f"---\ntitle: Pump\na: {'[' * 3000}\n---\nx", [("Pump", ["x"])]),
    "escapes that are no characters": (
        '---\ntitle: "Pump\\ud800"\n---\nx',
        [("Pump?", ["x"])],
    ),
    "escapes beyond all characters": (
        '---\ntitle: Pump\na: "\\U00110000"\n---\nx',
        [("Pump", ["x"])],
    ),
    "numbers of TOML out of range": (
        f"+++\na = 1{'0' * 5000}\n+++\n\nx",
        [("", [f"+++ a = 1{'0' * 5000} +++", "x"])],
    ),
    "not TOML": ("+++\nOil it.\n+++\nx", [("", ["+++ Oil it. +++ x"])]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), FRONT_MATTER.values(), ids=FRONT_MATTER.keys())
def test_front_matter_is_a_title_and_a_description(text, expected):
    assert told(text) == expected


RST = {
    "two levels": (
        "Pump\n====\n\nMoves.\n\nCleaning\n--------\n\nRinse.\n",
        [("Pump", ["Moves."]), ("Pump / Cleaning", ["Rinse."])],
    ),
    "styles in order": (
        "####\n Up\n####\n\nA\n----\na\n\nB\n====\nb\n\nC\n----\nc\n",
        [("Up / A", ["a"]), ("Up / A / B", ["b"]), ("Up / C", ["c"])],
    ),
    "one below the other": ("A\n=\nB\n-\nb", [("A / B", ["b"])]),
    "a title alone": ("Pump\n====", [("Pump", ["Pump"])]),
    "no titles": (
        "Two lines\nof text\n-------\n\nLonger\n==\n\n# 3 apples\n\n  Code\n  ----\n\n-----\n\nx",
        [("", ["Two lines of text -------", "Longer ==", "# 3 apples", "Code ----", "x"])],
    ),
    "a table": (
        "=====  =====\na      b\n=====  =====\n1      2\n=====  =====\n",
        [("", ["===== ===== a b ===== ===== 1 2 ===== ====="])],
    ),
}


@pytest.mark.parametrize(("text", "expected"), RST.values(), ids=RST.keys())
def test_titles_of_restructured_text_are_underlined(text, expected):
    assert told(text, ".rst") == expected


def test_plain_text_has_no_headings():
    text = "Shopping\n========\n\n# 3 apples\n```\n# 2 pears\n\n---\na: b\n---\n"
    assert told(text, ".txt") == [
        ("", ["Shopping ========", "# 3 apples ``` # 2 pears", "--- a: b ---"])
    ]


LINES = [
    "",
    "#",
    "###",
    "# ",
    "## ",
    "```",
    "~~~",
    "````",
    "- ",
    "> ",
    "    ",
    "===",
    "---",
    "w",
    "<p>",
    "1. ",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(LINES), max_size=12), st.sampled_from([".md", ".rst", ".txt"]))
def test_no_word_is_lost_whatever_the_markup(lines, ending):
    marked = [f"{line}word{n}" if line[-1:] in (" ", "w") else line for n, line in enumerate(lines)]
    found = " ".join(
        f"{heading} {' '.join(paragraphs)}"
        for heading, paragraphs in told("\n".join(marked), ending)
    ).split()
    expected = {part for line in marked for part in line.split() if "word" in part}
    assert expected <= set(found)
