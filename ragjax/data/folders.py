"""A folder of documents, and questions about it, as a data set in the BEIR layout.

write_documents("manual/", "data/manual")
write_questions("data/manual", [Asked("How long is the warranty?", ("two years",))])
dataset = read_beir("data/manual", cache="runs/cache")
"""

import contextlib
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from ragjax.data.documents.found import READ, Found, find_files, listed, name_below, some
from ragjax.data.documents.passages import make_cut
from ragjax.data.documents.sections import FileText, UnreadableError, sections
from ragjax.data.documents.worker import PACKAGES, READERS, FileReader
from ragjax.data.jsonl import DataError, Flaw
from ragjax.data.matching import holds_answer, refuse_string
from ragjax.storage import read_sealed, write_jsonl, write_sealed, write_text

# With its title and special tokens, a passage then fits what training reads of a document (160).
TOKENS = 128
FEWEST_TOKENS = 10
_FORMAT = 1  # raise it when files are read or cut in another way
_WHAT = "record of documents"


class Asked(NamedTuple):
    """A question about the documents."""

    text: str
    answers: tuple[str, ...]  # the first is what a model learns to say
    file: str = ""  # the document that answers it, as a path below the folder; "": any


class Written(NamedTuple):
    """What was made of a folder."""

    files: int
    passages: int
    skipped: Sequence[str]  # files without text
    unreadable: Mapping[str, Sequence[str]]  # why -> HTML and PDF files and pages
    left_out: Mapping[str, Sequence[str]]  # what it is -> files of other kinds

    def notes(self) -> tuple[str, ...]:
        """Returns a sentence on each kind of file that is not in the passages."""
        notes: list[str] = []
        if self.skipped:
            notes.append(Flaw(f"{len(self.skipped):,} files have no text: {some(self.skipped)}"))
        if self.unreadable:
            notes.append(Flaw(f"could not be read: {listed(self.unreadable)}"))
        if self.left_out:
            notes.append(f"not read: {listed(self.left_out)}; {READ}")
        return tuple(notes)


class Cutting(NamedTuple):
    """How documents are cut into passages."""

    tokens: int = TOKENS  # of a passage, at most, without its title
    overlap: int = 0  # at the end of a passage that the next one begins with, at most
    tokenizer: Tokenizer | None = None  # counts them; None: they are estimated

    def check(self) -> None:
        """Raises DataError for numbers that cut nothing."""
        if self.tokens < FEWEST_TOKENS:
            raise DataError(f"tokens must be at least {FEWEST_TOKENS}, got {self.tokens}")
        if not 0 <= self.overlap <= self.tokens // 2:
            raise DataError(
                f"overlap must be from 0 to half of tokens={self.tokens}, got {self.overlap}"
            )

    def digest(self) -> str:
        """Returns what tells two ways to cut apart."""
        counted = self.tokenizer.to_str() if self.tokenizer else ""
        return hashlib.sha256(f"{self.tokens} {self.overlap} {counted}".encode()).hexdigest()


def write_documents(
    folder: str | Path, output: str | Path, *, cutting: Cutting | None = None
) -> Written:
    """Cuts the files below a folder into passages and writes `corpus.jsonl`, one file at a time.

    A passage crosses neither a heading nor a page. The title is the file's name and the headings
    that the passage stands under, which Markdown (read as CommonMark), reStructuredText, HTML and
    the outline of a PDF file have; a heading with nothing below it is a passage too. Of front
    matter, the title and the description are kept. The id is the path below the folder and a
    number, so it stays while the file does; `metadata.source` is the path and the page.

    Args:
        folder: Has .md, .markdown, .txt and .rst files in UTF-8, .html, .htm, .xhtml and .pdf
            files, at any depth, also below linked folders; hidden ones are left out. Or one file.
        output: Folder of the data set; made where it is missing.
        cutting: How long passages are; None: 128 estimated tokens.

    Returns:
        How much was written, and what was left out: HTML and PDF files that are broken, need a
        password or have no text are named there.

    Raises:
        FileNotFoundError: There is no such folder.
        ImportError: The packages that read HTML or PDF files are not installed.
        DataError: No file in it has text, a text is not UTF-8, or a number is out of range.
    """
    folder, cutting = Path(folder), cutting or Cutting()
    cutting.check()
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder of documents")
    return _write(folder, find_files(folder), Path(output), cutting)


def _write(folder: Path, found: Found, output: Path, cutting: Cutting) -> Written:
    _require_readers(found.files)
    cut = make_cut(*cutting)
    files, passages, skipped = 0, 0, []
    unreadable: dict[str, list[str]] = {}

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal files, passages
        for name, text in _texts(folder, found.files, unreadable):
            file = Path(name).stem.replace("_", " ")
            number = 0
            for section in text.sections:
                source = f"{name}, page {section.page}" if section.page else name
                title = " - ".join([file, *section.headings])
                for passage in cut(section.paragraphs):
                    row = {"_id": f"{name}#{number}", "title": title, "text": passage}
                    yield row | {"metadata": {"source": source}}
                    number += 1
            if not number:
                skipped.append(name)
            files, passages = files + (number > 0), passages + number
        if not passages:
            why = "; ".join(written().notes()) or f"the folder is empty; {READ}"
            raise DataError(f"{folder}: no text to read ({why})")

    def written() -> Written:
        return Written(files, passages, tuple(skipped), unreadable, found.left_out)

    output.mkdir(parents=True, exist_ok=True)
    try:
        write_jsonl(output / "corpus.jsonl", rows())
    except BaseException:
        with contextlib.suppress(OSError):  # there is something else in it
            output.rmdir()
        raise
    return written()


def prepared_documents(
    folder: Path,
    cache: Path,
    cutting: Cutting,
    *,
    log: Callable[[str], None],
    apart: Collection[Path] = (),
) -> tuple[Path, Written]:
    """Returns a data set made of a folder of documents, and what was made.

    It is made again where a file, the cutting or the version of a reader is another one.

    Args:
        folder: As `write_documents` takes it.
        cache: Folder for it; it gets the name of `folder` there, in a folder of its own.
        cutting: How long passages are.
        log: Told that documents are read, which may take minutes.
        apart: Files and folders in it that are no documents, such as questions.

    Raises:
        FileNotFoundError, ImportError, DataError: As `write_documents` does.
    """
    identity = hashlib.sha256(f"{_FORMAT} {cutting.digest()}".encode())
    place = hashlib.sha256(os.fsencode(folder.resolve()) + identity.digest()).hexdigest()[:16]
    cutting.check()
    found = find_files(folder, apart)
    files = found.files
    used = {PACKAGES[suffix] for suffix in {path.suffix.lower() for path in files} & READERS.keys()}
    for package in ("semantic-text-splitter", *sorted(used)):
        with contextlib.suppress(PackageNotFoundError):  # said where it is needed
            identity.update(f" {package} {version(package)}".encode())
    for path in files:
        status = path.stat()
        stamp = (name_below(path, folder), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        identity.update(repr(stamp).encode())
    made = cache / f"documents-{place}"
    output, record = made / folder.resolve().name, made / "made.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        known = read_sealed(record, what=_WHAT)
        if known["identity"] == identity.hexdigest() and (output / "corpus.jsonl").is_file():
            # Files that are not read may be others.
            return output, Written(**known["written"] | {"left_out": found.left_out})
    record.unlink(missing_ok=True)
    if files:
        log(f"reading {len(files):,} documents of {folder}")
    written = _write(folder, found, output, cutting)
    value = {"identity": identity.hexdigest(), "written": written._asdict()}
    write_sealed(record, value, shared=True)
    return output, written


def _require_readers(files: Sequence[Path]) -> None:
    for path in files:
        package = PACKAGES.get(path.suffix.lower())
        if package and importlib.util.find_spec(package) is None:
            raise ImportError(
                f'{path}: {package} reads such files: pip install "ragjax[documents]", or take them'
                " out of the folder"
            )


def _texts(
    folder: Path, files: Sequence[Path], unreadable: dict[str, list[str]]
) -> Iterator[tuple[str, FileText]]:
    """Yields name and text of each file; those that cannot be read are added to `unreadable`."""
    with FileReader() as reader:
        for path in files:
            name, ending = name_below(path, folder), path.suffix.lower()
            try:
                if ending in READERS:
                    text = reader.read(path)
                else:
                    text = FileText(list(sections(_read(path), ending)), [])
            except UnreadableError as error:
                unreadable.setdefault(str(error), []).append(name)
                continue
            for page in text.unread:
                unreadable.setdefault("broken pages", []).append(f"{name}, page {page}")
            yield name, text


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8, or take it out of the"
            " folder"
        ) from error


def write_questions(
    output: str | Path, questions: Sequence[Asked], *, test_every: int = 3
) -> dict[str, int]:
    """Writes questions beside the passages: `queries.jsonl`, `qrels/train.tsv`, `qrels/test.tsv`.

    The passages that hold an answer word for word (whole words, letter case and punctuation aside)
    are its relevant ones; they serve to measure retrieval, and training without labels does not
    look at them.

    Args:
        output: Folder with the `corpus.jsonl` of `write_documents`.
        questions: At least two.
        test_every: Every so many questions, one is kept for testing; at least 2.

    Returns:
        Split to number of questions.

    Raises:
        TypeError: The answers of a question are one string.
        DataError: No passage (of the named file) holds an answer of a question, or there are too
            few questions.
    """
    output = Path(output)
    if test_every < 2 or len(questions) < 2:
        raise DataError(
            f"at least two questions and test_every >= 2 are needed, got {len(questions)} questions"
            f" and test_every={test_every}"
        )
    with open(output / "corpus.jsonl", encoding="utf-8") as file:
        passages = [json.loads(line) for line in file]
    queries: list[dict[str, Any]] = []
    judged: dict[str, list[str]] = {"train": [], "test": []}
    for number, asked in enumerate(questions):
        relevant = _holders(passages, asked)
        id = f"q{number}"
        answers = {"answers": list(asked.answers)}
        queries.append({"_id": id, "text": asked.text, "metadata": answers})
        split = "test" if number % test_every == test_every - 1 else "train"
        judged[split] += [f"{id}\t{doc_id}\t1\n" for doc_id in relevant]
    if not judged["test"]:
        judged["test"].append(judged["train"].pop())
    (output / "qrels").mkdir(exist_ok=True)
    write_jsonl(output / "queries.jsonl", queries)
    for split, lines in judged.items():
        text = "".join(["query-id\tcorpus-id\tscore\n", *lines])
        write_text(output / "qrels" / f"{split}.tsv", text)
    return {split: len({row.split("\t")[0] for row in rows}) for split, rows in judged.items()}


def _holders(passages: Sequence[dict], asked: Asked) -> list[str]:
    """Returns the ids of the passages that hold an answer, as whole words."""
    refuse_string(asked.answers, f"the answers of {asked.text!r}")
    if not asked.text.strip() or not any(answer.strip() for answer in asked.answers):
        raise DataError(f"the question {asked.text!r} needs a text and an answer")
    there = [
        passage
        for passage in passages
        if not asked.file or passage["_id"].rpartition("#")[0] == asked.file
    ]
    found = [
        passage["_id"]
        for passage in there
        if any(holds_answer(passage["text"], answer) for answer in asked.answers)
    ]
    if not found:
        where = f"of {asked.file} " if asked.file else ""
        raise DataError(
            f"the question {asked.text!r}: no passage {where}holds its answer"
            f" {asked.answers[0]!r} word for word; give the answer as the documents have it, as one"
            " of several answers if you like"
        )
    return found
