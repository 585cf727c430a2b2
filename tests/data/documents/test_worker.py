"""Hostile files end the process that reads them, and nothing else."""

import random
import time

import pytest
from pdf_files import make_pdf

from ragjax.data.documents import worker
from ragjax.data.documents.sections import FileText, UnreadableError
from ragjax.data.documents.worker import FileReader

pytest.importorskip("lxml", reason="needs the [documents] extra")
pytest.importorskip("pypdfium2", reason="needs the [documents] extra")

# A reader that does what a file says.
PROGRAM = """
import os, time
from ragjax.data.documents import worker
from ragjax.data.documents.sections import FileText, Section
worker.READERS = {".pdf": lambda path: eval(path.read_text())}
worker.main()
"""
GOOD = 'print("noise") or FileText([Section(("a", "b"), ["c"], 2)], [7])'


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("os.abort()", "broken PDF files"),
        ("os._exit(0)", "broken PDF files"),
        ("1 / 0", "broken PDF files"),
        ("(f := lambda: f())()", "broken PDF files"),
        ("time.sleep(999)", "files that take longer than 2 s to read"),
        ("sum(iter(int, 1))", "files that take longer than 2 s to read"),
        ("bytearray(3 << 30)", "files that take more than 2 GiB to read"),
        ("FileText(['a' * (65 << 20)], [])", "files with more than 64 MiB of text (divide them)"),
    ],
)
def test_a_hostile_file_is_left_out_and_the_next_one_is_read(tmp_path, monkeypatch, content, why):
    seconds = 2 if "longer" in why else 100
    monkeypatch.setattr(worker, "_PROGRAM", PROGRAM)
    (tmp_path / "a.pdf").write_text(content)
    (tmp_path / "b.pdf").write_text(GOOD)
    with FileReader(seconds=seconds) as reader:
        with pytest.raises(UnreadableError) as error:
            reader.read(tmp_path / "a.pdf")
        assert str(error.value) == why
        assert reader.read(tmp_path / "b.pdf") == FileText([(("a", "b"), ["c"], 2)], [7])


def test_a_reader_that_is_not_used_starts_nothing():
    with FileReader() as reader:
        assert reader._process is None


def mutated(rng, content):
    """`content` with bytes changed, doubled, cut out or moved."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((1, 1, 4, 30, 300)))
        part = content[start:end]
        kind = rng.randrange(5)
        if kind == 0:
            content[start:end] = rng.randbytes(len(part))
        elif kind == 1:
            del content[start:end]
        elif kind == 2:
            content[start:start] = part * rng.choice((1, 2, 50))
        elif kind == 3:
            content[start:start] = rng.choice(
                (b"<", b">", b"-1", b"9999999999", b"\0", b"<table>", b"</p>", b"&#", b"obj", b"R")
            )
        else:
            place = rng.randrange(len(content) + 1)
            content[place:place] = part
    return bytes(content)


LINES = [["Pump (blue)", "It weighs 5 kg and-", "or more."], ["Care", "Dust it.", "2"], []]
SEEDS = {
    ".pdf": make_pdf(LINES, outline=[("Pump (blue)", 0), ("Care", 1), ("End", 2)]),
    ".html": (
        "<!DOCTYPE html><html><head><meta charset='utf-8'><title>Pump</title><style>p{}</style>"
        "</head><body><nav><ul><li><a href=a>Home</a></ul></nav><main><h1>Pump\u00e9</h1><p>It"
        " <b>weighs</b> 5 kg &amp; more.<table><tr><td>1<td>2</table><h2 id=care>Care</h2>"
        "<!-- x --><pre>a\n b</pre></main><footer>Imprint</footer></body></html>"
    ).encode(),
}


@pytest.mark.parametrize("ending", SEEDS)
@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_whatever_a_file_holds_it_is_read_or_left_out(tmp_path, ending, count):
    rng, path = random.Random(f"{ending} {count}"), tmp_path / f"a{ending}"
    read = slowest = 0
    with FileReader(seconds=20) as reader:
        for _ in range(count):
            content = mutated(rng, SEEDS[ending])
            path.write_bytes(content)
            started = time.monotonic()
            try:
                sections, _ = reader.read(path)
                read += any("weighs" in text for section in sections for text in section.paragraphs)
            except UnreadableError as error:
                assert not str(error).startswith("files"), content  # neither slow nor large
            slowest = max(slowest, time.monotonic() - started)
    assert read > count / 10  # most damage is small, and the text survives it
    assert slowest < 20
