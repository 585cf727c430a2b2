"""Measure attribution against truth: is the passage of highest posterior the gold one?

    python benchmarks/attribution.py --data FOLDER

FOLDER is in the BEIR layout, with answers and relevance judgements. For each test question whose
gold passage is among the K retrieved, the answer is attributed to a passage in five ways; the table
gives the share of all questions for which that is the gold one, and the paired difference to
the passage that the retriever ranks first. On two cores about four seconds
a question.
"""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
from _beside import run_program
from tqdm import tqdm

from ragjax.data import Question, batch_rows
from ragjax.evaluation import bootstrap_interval, paired_difference
from ragjax.runs.ask.asker import Asker
from ragjax.runs.ask.decoding import decode_ensemble
from ragjax.runs.ask.prompts import ReaderOptions
from ragjax.runs.options.shared import DataConfig, RunConfig
from ragjax.runs.system import SEARCHES, System, open_base_system, open_system, retrieve

RANKED_FIRST = "ranked first"
_DEFAULTS = RunConfig()


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Measure attribution against truth.

    Attributes:
        run: Folder of a finished run, in place of `data`, `encoder` and `lm`.
        data: Folder in the BEIR layout with test questions, answers and judgements.
        encoder: Text encoder for `data`.
        lm: Language model for `data`.
        cache: Folder for the embeddings of `data`.
        output: JSON-lines file of what was found for each question; a later call goes on with it.
        retriever: What finds the passages; p_R is the dense retriever's in every case.
        answers: Attribute the first gold answer, or the one that the language model writes.
        questions: Test questions looked at, a fair sample.
        documents: Passages per question.
        document_tokens: Tokens read of each passage; an answer that stands behind them is not seen.
        max_new_tokens: Tokens of an answer.
        resamples: Bootstrap resamples behind each 95 % interval.
    """

    run: str = ""
    data: str = ""
    encoder: str = _DEFAULTS.encoder
    lm: str = _DEFAULTS.lm
    cache: str = "runs/ask"
    output: str = ""
    retriever: Literal["dense", "bm25", "hybrid"] = "dense"
    answers: Literal["gold", "generated"] = "gold"
    questions: int = 200
    documents: int = 5
    document_tokens: int = 256
    max_new_tokens: int = 24
    resamples: int = 2000

    def check(self) -> None:
        """Raises ValueError naming the flag that is missing or out of range."""
        if bool(self.run) == bool(self.data):
            raise ValueError("give one of --run FOLDER and --data FOLDER")
        for name in ("questions", "documents", "document_tokens", "max_new_tokens", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code: 0, or 2 for bad input."""
    logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
    return run_program(Flags, _run, arguments, __doc__)


def _run(flags: Flags) -> None:
    flags.check()
    system = _open(flags)
    questions = [q for q in system.workspace.questions["test"] if q.answers]
    if not questions:
        raise ValueError(f"{system.name}: no test questions with answers and judgements")
    # Neighbours in a file are often about one document.
    order = batch_rows(0, 0, num_examples=len(questions), batch_size=len(questions))
    questions = [questions[row] for row in order[: flags.questions]]
    rows = list(_rows(flags, system, questions))
    found = np.array([RANKED_FIRST in row["gold"] for row in rows])
    print(
        f"{len(rows)} questions of {system.name}, {flags.documents} passages each by"
        f" {flags.retriever}, {flags.answers} answers, p_R = softmax({system.scale:g} cosine);"
        f" gold among the passages: {found.mean():.3f}"
    )
    print(f"{'attributed to':<28}{'is gold':>8}  95 % interval    difference to ranked first")
    columns = {
        name: np.array([float(row["gold"].get(name, False)) for row in rows])
        for name in (RANKED_FIRST, *_FIELDS)
    }
    baseline = columns[RANKED_FIRST]
    for name, column in columns.items():
        mean = bootstrap_interval(column, num_resamples=flags.resamples, seed=0)
        line = f"{name:<28}{mean.value:>8.3f}  [{mean.low:.3f}, {mean.high:.3f}]"
        if name != RANKED_FIRST:
            gain = paired_difference(column, baseline, num_resamples=flags.resamples, seed=0)
            line += f"   {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] p={gain.p_value:.3g}"
        print(line)


_FIELDS = {
    "highest p_R": "prior",
    "highest posterior": "posterior",
    "largest leave-one-out": "change",
    "highest p_LM(y|c,x)": "log_prob",
}


def _open(flags: Flags) -> System:
    if flags.run:
        return open_system(Path(flags.run), log=_note)
    config = dataclasses.replace(
        _DEFAULTS,
        data=flags.data,
        encoder=flags.encoder,
        lm=flags.lm,
        data_options=DataConfig(dev_questions=200),
    )
    return open_base_system(config, cache=Path(flags.cache), log=_note)


def _rows(flags: Flags, system: System, questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
    """Yields one row per question: which ways of attributing name a gold passage."""
    known = _known(flags)
    texts = [question.text for question in questions]
    retrieved = retrieve(system, texts, flags.documents, by=SEARCHES[flags.retriever])
    options = ReaderOptions(
        documents=flags.documents,
        document_tokens=flags.document_tokens,
        max_new_tokens=flags.max_new_tokens,
    )
    asker = Asker(system, options, decode=decode_ensemble, by=SEARCHES[flags.retriever])
    grades = system.workspace.dataset.graded_rows("test", questions)
    for row, question in enumerate(tqdm(questions, desc="attribution", file=sys.stderr)):
        key = f"{flags.retriever} {flags.answers} {question.id}"
        if key not in known:
            kept = retrieved.found.mask[row]
            docs = retrieved.found.doc_ids[row][kept].tolist()
            gold = {doc for doc, grade in grades[row].items() if grade > 0}
            result: dict[str, Any] = {"key": key, "question": question.text, "gold": {}}
            # Where no gold passage was found, no attribution can name one.
            if gold & set(docs):
                scores = retrieved.doc_scores[row][kept].tolist()
                given = question.answers[0] if flags.answers == "gold" else None
                answer = asker.answer_from(question.text, docs, scores, given)
                reply = asker.explain(answer, span=False)
                ways = {RANKED_FIRST: 0} | {
                    name: np.argmax([getattr(source, field) for source in reply.sources])
                    for name, field in _FIELDS.items()
                }
                result["answer"] = reply.answer
                result["docs"] = [
                    {
                        "id": source.id,
                        "gold": doc in gold,
                        "p_r": source.prior,
                        "posterior": source.posterior,
                        "log_prob": source.log_prob,
                    }
                    for doc, source in zip(docs, reply.sources, strict=True)
                ]
                result["no_document_log_prob"] = reply.no_doc_log_prob
                result["gold"] = {name: docs[int(place)] in gold for name, place in ways.items()}
            known[key] = result
            if flags.output:
                with open(flags.output, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result, ensure_ascii=False) + "\n")
        yield known[key]


def _known(flags: Flags) -> dict[str, dict[str, Any]]:
    if not flags.output or not Path(flags.output).is_file():
        return {}
    # Not at the other ends of lines that Unicode has: JSON does not escape them.
    lines = Path(flags.output).read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    return {row["key"]: row for row in rows}


def _note(line: str) -> None:
    if line.strip():
        print(line.strip(), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
