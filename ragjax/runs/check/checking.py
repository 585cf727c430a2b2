"""Reads what a run would read, as the run reads it, and goes on where that would stop."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ragjax.data import Dataset, Question, leaked_questions
from ragjax.data.beir import read_questions_alone
from ragjax.data.fields import parse_fields
from ragjax.data.jsonl import Flaw, RejectedRows
from ragjax.data.overlap import near_texts
from ragjax.runs.adapt import open_adapt
from ragjax.runs.check.languages import Languages, language_problems, measure_languages
from ragjax.runs.check.lengths import Lengths, measure_lengths
from ragjax.runs.check.problems import Problems
from ragjax.runs.data import (
    choose_questions,
    describe_supervision,
    find_places,
    measured_by,
    note_shared_passages,
    read_data,
)
from ragjax.runs.forecast import Cost, estimate_cost
from ragjax.runs.models import describe_encoders, describe_lm
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.prompt_lengths import check_prompts, run_prompts
from ragjax.runs.workspace import Workspace, make_workspace
from ragjax.training.loop import StopFlag

# Of a kind of text: where more are cut, that is a problem.
_CUT = 0.05
_SHOWN = 3
# What reading data and models may raise for what cannot be used.
BAD = (ValueError, OSError, ImportError)


class Split(NamedTuple):
    """The questions of one split."""

    name: str
    questions: int
    answers: int  # of them have an answer
    known: int  # of them have a passage that is known to be relevant
    used: int  # of them, by this run
    measured_by: str


@dataclass
class Checked:
    """What was found.

    Attributes:
        problems: All that is wrong.
        notes: How the data are read, and what is held out.
        data: Name of the data; "": they could not be read.
        passages: That there are.
        supervision: What is trained on and measured by, in one sentence.
        splits: Questions by split.
        lengths: Of the texts, in tokens.
        languages: Of passages and questions.
        cost: Of each stage on this machine; None: not asked for, or not known.
    """

    problems: Problems = field(default_factory=Problems)
    notes: list[str] = field(default_factory=list)
    data: str = ""
    passages: int = 0
    supervision: str = ""
    splits: list[Split] = field(default_factory=list)
    lengths: list[Lengths] = field(default_factory=list)
    languages: list[Languages] = field(default_factory=list)
    cost: Cost | None = None

    @property
    def code(self) -> int:
        """Exit code: 0 nothing is wrong; 1 a run would go on; 2 a run would be refused."""
        return 2 if self.problems.refused else int(self.problems.count > 0)


def check_run(config: AdaptConfig, *, with_cost: bool = True) -> Checked:
    """Reads data and models as `adapt` would, and collects all that is wrong.

    Rows that cannot be read are skipped and named, whatever `config` says of them. Of the models
    only tokenizers and sizes are read, but for the forecast of the cost.

    Args:
        config: Options of the run; its output folder is not looked at.
        with_cost: Whether both models are loaded and measured, for the time of each stage.
    """
    found = Checked()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lenient = _lenient(config)
        dataset = _read(config, lenient, folder, found)
        if dataset is None:
            return found
        questions = _count(config, dataset, found)
        _compare(dataset, questions, found.problems)
        workspace = _described(config, folder, dataset, questions, found.problems)
        if workspace is not None:
            _measure(workspace, found)
        if with_cost:
            _forecast(lenient, folder, found)
    return found


def _lenient(config: AdaptConfig) -> AdaptConfig:
    options = dataclasses.replace(config.data_options, on_bad_row="skip", on_unknown="skip")
    return dataclasses.replace(config, data_options=options)


def _read(
    config: AdaptConfig, lenient: AdaptConfig, folder: Path, found: Checked
) -> Dataset | None:
    """Returns the data without the rows that are bad; None where nothing can be made of them."""
    options, problems = config.data_options, found.problems
    strict = dataclasses.replace(
        config, data_options=dataclasses.replace(options, on_bad_row="skip")
    )
    dataset = None
    # Unknown ids end the reading of their file, so that others are only seen in the second try.
    for attempt in dict.fromkeys((strict, lenient)):
        try:
            with tqdm(desc="reading", unit="B", unit_scale=True, delay=5) as bar:

                def progress(done: int, total: int, bar: tqdm = bar) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                dataset = read_data(attempt, folder, lambda line: None, progress=progress)
            break
        except BAD as error:
            problems.refuse(error)
    if dataset is None:
        _read_questions(config, folder, problems)
    problems.add_rejected(folder, refused=options.on_bad_row == "stop")
    for note in dataset.notes if dataset else ():
        if isinstance(note, Flaw):
            problems.survive(note)
        elif str(folder) not in note:  # bad rows, which are listed
            found.notes.append(note)
    return dataset


def _read_questions(config: AdaptConfig, folder: Path, problems: Problems) -> None:
    """Looks for what is wrong with the questions of data that cannot be read as a whole."""
    known = {problem.reason for problem in problems.listed}
    with RejectedRows(folder / "questions" / "rejected.jsonl", "skip") as rejected:
        try:
            places = find_places(config)
            if places.documents and not places.queries:
                return
            read_questions_alone(
                None if places.documents else config.data or None,
                rejected,
                queries=places.queries,
                fields=parse_fields(config.data_options.fields),
            )
        except BAD as error:
            if str(error) not in known:
                problems.refuse(error)


def _count(
    config: AdaptConfig, dataset: Dataset, found: Checked
) -> dict[str, tuple[Question, ...]]:
    """Returns the questions of the run, and counts all of them."""
    found.data, found.passages = dataset.name, len(dataset.corpus)
    questions: dict[str, tuple[Question, ...]] = {}
    try:
        questions = choose_questions(config, dataset, found.notes.append)
        found.supervision = describe_supervision(dataset, questions)
    except BAD as error:
        found.problems.refuse(error)
    dataset.look_up(dataset.questions)
    for name, asked in dataset.questions.items():
        found.splits.append(
            Split(
                name=name,
                questions=len(asked),
                answers=sum(bool(question.answers) for question in asked),
                known=sum(map(bool, dataset.graded_rows(name))),
                used=len(questions.get(name, ())),
                measured_by=measured_by(dataset, name, asked) if asked else "",
            )
        )
        if name == "test" and asked and not found.splits[-1].known:
            found.problems.survive(
                f"no relevant passage of the {len(asked):,} test questions is known, so that"
                " nothing tells how good retrieval is; give answers that stand in passages (the"
                " field `answers`, or the column `answer`), or judgements (--qrels)"
            )
    return questions


def _compare(
    dataset: Dataset, questions: Mapping[str, Sequence[Question]], problems: Problems
) -> None:
    """Looks for copies of passages, and for what stands on both sides of a split."""
    corpus = dataset.corpus
    groups = sorted({min(rows): sorted(rows) for rows in dataset.twins.copies.values()}.items())
    if groups:
        copies = sum(len(rows) - 1 for _, rows in groups)
        pairs = [" = ".join(map(corpus.id_of, rows[:2])) for _, rows in groups]
        problems.survive(
            f"{copies:,} passages have the title and text of another ({_some(pairs)}): they count"
            " as one; leave the copies out"
        )
    if own := dataset.twins.own:
        problems.survive(
            f"{len(own):,} questions are passages of the corpus ({_some(list(own))}): none of them"
            " finds itself; take them out of the corpus if they are no documents"
        )
    note_shared_passages(dataset, questions, problems.survive)
    for split in ("dev", "test"):
        # Those that are the same are named where they are read.
        same = set(leaked_questions(dataset, split=split))
        asked = [(q.id, q.text) for q in dataset.questions.get(split, ()) if q.id not in same]
        # Those of train may be very many: they are looked at one by one.
        train = ((q.id, q.text) for q in dataset.questions.get("train", ()))
        if near := {id: other for other, id in near_texts(train, asked)}:
            pairs = [f"{id} ~ {other}" for id, other in near.items()]
            problems.survive(
                f"{len(near):,} of the {len(asked):,} {split} questions are almost the same as one"
                f" of train ({_some(pairs)}); take one of each pair out if they ask the same"
            )


def _described(
    config: AdaptConfig,
    folder: Path,
    dataset: Dataset,
    questions: dict[str, tuple[Question, ...]],
    problems: Problems,
) -> Workspace | None:
    """Returns data and models without weights; None where a model cannot be used."""
    encoders = lm = None
    for read in (describe_encoders, describe_lm):
        try:
            if read is describe_lm:
                lm = describe_lm(config)
            else:
                encoders = describe_encoders(config)
        except BAD as error:
            problems.refuse(error)
    if encoders is None or lm is None:
        return None
    try:
        return make_workspace(
            config,
            folder,
            dataset,
            questions,
            encoders,
            lm,
            stop=StopFlag(),
            log=lambda line: None,
        )
    except BAD as error:
        problems.refuse(error)
    return None


def _measure(workspace: Workspace, found: Checked) -> None:
    """Measures lengths and languages, and checks that every prompt fits."""
    found.lengths = measure_lengths(workspace)
    documents = find_places(workspace.config).documents
    for lengths in found.lengths:
        shorter = "make them shorter"
        if documents and lengths.what == "passages":
            shorter = "cut documents smaller with --data_options.passage_tokens"
        if lengths.share > _CUT:
            found.problems.survive(
                f"{lengths.share:.0%} of the {lengths.what} are cut to the {lengths.limit:,} tokens"
                f" that the {lengths.reader} takes of one (the longest, {lengths.longest_id}, has"
                f" {lengths.longest:,}); raise --{lengths.flag} if the model reads more, or"
                f" {shorter}"
            )
    found.languages = measure_languages(workspace)
    for problem in language_problems(found.languages, workspace.encoder):
        found.problems.survive(problem)
    if workspace.questions:
        try:
            check_prompts(workspace, run_prompts(workspace, dev=True))
        except BAD as error:
            found.problems.refuse(error)


def _forecast(config: AdaptConfig, folder: Path, found: Checked) -> None:
    """Goes as far as a run goes before its first expensive stage."""
    try:
        workspace = open_adapt(config, folder, stop=StopFlag(), log=lambda line: None)
        found.cost = estimate_cost(workspace, config)
    except BAD as error:
        if str(error) not in {problem.reason for problem in found.problems.listed}:
            found.problems.refuse(error)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
