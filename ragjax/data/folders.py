"""A folder of text and Markdown files, and questions about it, as a data set in the BEIR layout.

write_documents("manual/", "data/manual")
write_questions("data/manual", [Asked("How long is the warranty?", ("two years",))])
dataset = read_beir("data/manual", cache="runs/cache")
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ragjax.data.jsonl import DataError
from ragjax.data.matching import holds_answer, refuse_string
from ragjax.data.sections import sections
from ragjax.storage import write_jsonl, write_text

SUFFIXES = (".md", ".markdown", ".txt", ".rst")
_TABLES = (".csv", ".tsv", ".parquet", ".arrow")
_READ = (
    f"documents are read from {', '.join(SUFFIXES)} files (convert others, for example with pandoc"
    " or pdftotext), passages from corpus.jsonl"
)
_SHOWN = 3  # names in a note
# Letters of a word above those that most words have.
_LONG = re.compile(r"[^\s\u0e00-\u0eff\u2e80-\U0010ffff]{20}")
# Ends of sentences, also of scripts that put no space after them.
_SENTENCE_END = re.compile(r"(?<=[.!?\u061f\u06d4])\s+|(?<=[\u3002\uff01\uff1f])")


class Asked(NamedTuple):
    """A question about the documents."""

    text: str
    answers: tuple[str, ...]  # the first is what a model learns to say
    file: str = ""  # the document that answers it, as a path below the folder; "": any


class Written(NamedTuple):
    """What was made of a folder."""

    files: int
    passages: int
    skipped: tuple[str, ...]  # files without text
    left_out: Mapping[str, Sequence[str]]  # why -> files that were not read

    def notes(self) -> tuple[str, ...]:
        """Returns a sentence on the files without text, and one on those that were not read."""
        notes = []
        if self.skipped:
            notes.append(f"{len(self.skipped):,} files have no text: {_some(self.skipped)}")
        if self.left_out:
            notes.append(f"not read: {_listed(self.left_out)}; {_READ}")
        return tuple(notes)


def write_documents(
    folder: str | Path, output: str | Path, *, words_per_passage: int = 120
) -> Written:
    """Cuts the files below a folder into passages and writes `corpus.jsonl`.

    A passage never crosses a heading, and a paragraph is cut, between sentences, only where it is
    longer than a passage. The title is the file's name and the headings that the passage stands
    under, which Markdown (read as CommonMark) and reStructuredText have; a heading with nothing
    below it is a passage too. Of front matter, the title and the description are kept. The id is
    the path below the folder and a number, so it stays while the file does.

    Args:
        folder: Has .md, .markdown, .txt or .rst files in UTF-8, at any depth, also below linked
            folders; hidden ones are left out. Or one such file.
        output: Folder of the data set; made where it is missing.
        words_per_passage: Words of a passage, about; at least 10.

    Returns:
        How much was written, and what was left out.

    Raises:
        FileNotFoundError: There is no such folder.
        DataError: No file in it has text, a file is not UTF-8, or `words_per_passage` is too small.
    """
    folder, output = Path(folder), Path(output)
    if words_per_passage < 10:
        raise DataError(f"words_per_passage must be at least 10, got {words_per_passage}")
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder of documents")
    rows: list[dict[str, str]] = []
    skipped: list[str] = []
    found = _find_files(folder)
    for path in found.files:
        name = _name(path, folder)
        passages = list(_passages(_read(path), path.suffix.lower(), words_per_passage))
        if not passages:
            skipped.append(name)
        file = name.rpartition("/")[2].removesuffix(path.suffix).replace("_", " ")
        for number, (headings, text) in enumerate(passages):
            title = " - ".join([file, *headings])
            rows.append({"_id": f"{name}#{number}", "title": title, "text": text})
    written = Written(len(found.files) - len(skipped), len(rows), tuple(skipped), found.left_out)
    if not rows:
        why = "; ".join(written.notes()) or f"the folder is empty; {_READ}"
        raise DataError(f"{folder}: no text to read ({why})")
    output.mkdir(parents=True, exist_ok=True)
    write_jsonl(output / "corpus.jsonl", rows)
    return written


def document_files(folder: Path) -> list[Path]:
    """Returns the files below a folder that `write_documents` reads, by name."""
    return _find_files(folder).files


def holds_data_set(path: Path) -> bool:
    """Tells whether a folder or file has passages as a table, or parts of such a data set.

    A data set without its corpus is a mistake, whatever README stands beside it.
    """
    if not path.is_dir():
        return ".json" in path.name or path.suffix in ("", ".gz", *_TABLES)
    names = {file.name for file in path.iterdir() if file.is_file() and file.suffix not in SUFFIXES}
    parts = {name.partition(".")[0] for name in names}
    return (
        any(".jsonl" in name or name.endswith(".parquet") for name in names)
        or not names.isdisjoint({"state.json", "dataset_dict.json"})  # saved by `datasets`
        or not parts.isdisjoint({"corpus", "queries"})
        or (path / "qrels").is_dir()
    )


class _Found(NamedTuple):
    files: list[Path]
    left_out: dict[str, list[str]]  # why -> names below the folder


def _find_files(folder: Path) -> _Found:
    """Returns the files below a folder, links followed; each is read under one name."""
    found = _Found([], {})
    seen: set[str] = set()
    places = [folder]  # the folder, then the links in it

    def leave(path: Path, why: str) -> None:
        found.left_out.setdefault(why, []).append(_name(path, folder))

    def take(path: Path) -> None:
        if not path.is_file():
            leave(path, "broken links" if path.is_symlink() else "not plain files")
        elif path.suffix.lower() in SUFFIXES:
            found.files.append(path)
        else:
            leave(path, path.suffix.lower() or "without an ending")

    def is_new(path: Path) -> bool:
        real = os.path.realpath(path)
        if is_known := real in seen:
            leave(path, "read under another name")
        seen.add(real)
        return not is_known

    # What is linked comes last, so that a file's own name is the one it is read under.
    for place in places:
        if not place.is_dir():
            if is_new(place):
                take(place)
            continue
        for top, names, files in os.walk(place, onerror=_raise):
            if not is_new(Path(top)):
                names.clear()
                continue
            for path in (Path(top, name) for name in sorted(names + files)):
                if path.name.startswith("."):
                    leave(path, "hidden")
                elif path.is_symlink():
                    places.append(path)
                elif path.name in files and is_new(path):
                    take(path)
            names[:] = sorted(name for name in names if not name.startswith("."))
    return _Found(sorted(found.files), found.left_out)


def _raise(error: OSError) -> None:
    raise error


def _name(path: Path, folder: Path) -> str:
    """Returns a path below a folder as text; bytes of it that are no UTF-8 become escapes."""
    below = path.relative_to(folder if path != folder else folder.parent)
    return os.fsencode(below.as_posix()).decode("utf-8", "backslashreplace")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _listed(left_out: Mapping[str, Sequence[str]]) -> str:
    """Returns how many files were left out for which reason, with a few names each."""
    kinds = sorted(left_out.items(), key=lambda kind: (-len(kind[1]), kind[0]))
    return ", ".join(f"{len(names):,} {why} ({_some(names)})" for why, names in kinds)


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


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8, or take it out of the"
            " folder"
        ) from error


def _passages(text: str, ending: str, words: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields (headings, text) of each passage of a file."""
    for headings, paragraphs in sections(text, ending):
        for passage in _filled(paragraphs, words):
            yield headings, passage


def _filled(paragraphs: Sequence[str], words: int) -> Iterator[str]:
    """Joins short paragraphs, and cuts long ones between sentences, into passages."""
    passage: list[str] = []
    length = 0
    for piece in _pieces(paragraphs, words):
        size = _length(piece)
        if passage and length + size > words:
            yield " ".join(passage)
            passage, length = [], 0
        passage.append(piece)
        length += size
    if passage:
        yield " ".join(passage)


def _pieces(paragraphs: Sequence[str], words: int) -> Iterator[str]:
    """Yields paragraphs, the sentences of longer ones, and the words of longer sentences."""
    for paragraph in paragraphs:
        is_long = _length(paragraph) > words
        for sentence in _SENTENCE_END.split(paragraph) if is_long else [paragraph]:
            for word in sentence.split(" ") if _length(sentence) > words else [sentence]:
                # What is still too long has no spaces.
                size = 2 * words if _length(word) > words else max(len(word), 1)
                yield from (word[start : start + size] for start in range(0, len(word), size))


def _length(text: str) -> int:
    """Returns about how many words a text has; long words and scripts without spaces count more."""
    spaceless = sum("\u0e00" <= letter <= "\u0eff" or letter >= "\u2e80" for letter in text)
    return len(text.split()) + spaceless // 2 + len(_LONG.findall(text))
