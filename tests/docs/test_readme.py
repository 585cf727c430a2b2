"""The README is short, its links lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.rst"))]


def test_it_is_read_in_a_few_minutes():
    assert len(README.encode()) <= 10_500


def test_each_reader_finds_the_first_command_on_the_first_screens():
    for words in ("experiments/adapt.py", "from ragjax.runs import", "from ragjax import losses"):
        assert README[: README.index(words)].count("\n") < 70, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text("utf-8")
    named = re.findall(r"\]\(([\w/.-]+)\)", text)
    named += re.findall(r"\b(?:experiments|benchmarks|notebooks|docs|tests)/[\w/]+\.\w+", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_links_within_a_page_lead_to_a_heading():
    for page in PAGES[:2]:  # of the others, Sphinx finds them
        text = page.read_text("utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}
        assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


def test_its_python_is_python():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        ast.parse(block)
