import re
from pathlib import Path

from ragjax import generation
from ragjax.training import end_to_end

DOCS = Path(__file__).parents[2] / "docs"


def test_every_function_that_generates_is_in_the_reference_once():
    page = (DOCS / "generation.rst").read_text("utf-8")
    documented = re.findall(r"^\.\. autofunction:: (\w+)$", page, re.MULTILINE)
    assert len(documented) == len(set(documented))
    public = re.findall(r"(\w+) as \1\b", Path(generation.__file__).read_text("utf-8"))
    wanted = {name for name in public if name.startswith(("generate_", "stream_", "score_choices"))}
    assert wanted <= set(documented) <= set(public)


def test_every_name_on_the_page_of_training_exists():
    page = (DOCS / "end_to_end.rst").read_text("utf-8")
    for name in re.findall(r"^\.\. auto(?:function|class):: (\w+)$", page, re.MULTILINE):
        assert hasattr(end_to_end, name), name
    for name in re.findall(r"e2e\.(\w+)", page):
        assert hasattr(end_to_end, name), name
