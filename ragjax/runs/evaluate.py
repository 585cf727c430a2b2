"""Evaluates a finished run, or models as they were published, on questions of any split."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ragjax.data import Dataset, Question, batch_rows
from ragjax.index import SearchResult
from ragjax.models.encoder import load_encoder
from ragjax.models.language_model import load_language_model
from ragjax.runs.compare.answers import Answer
from ragjax.runs.compare.measures import measure_answer
from ragjax.runs.compare.results import write_evaluation
from ragjax.runs.compare.robustness import Robustness, answer_conditions
from ragjax.runs.compare.systems import (
    SEARCH_DEPTH,
    System,
    answer_cache,
    answered_rows,
    evaluate_systems,
)
from ragjax.runs.forecast import describe_evaluation
from ragjax.runs.indexes import Rankings, Retriever, build_bm25, build_retriever, doc_logits, search
from ragjax.runs.options.evaluate import (
    EvaluateConfig,
    evaluation_fingerprint,
    run_options,
    system_names,
)
from ragjax.runs.options.files import to_dict
from ragjax.runs.options.shared import RunConfig
from ragjax.runs.report.page import corpus_lookup, write_report
from ragjax.runs.saved import FinishedRun, open_run
from ragjax.runs.system import (
    run_language_model,
    run_towers,
)
from ragjax.runs.workspace import FrozenLM, Report, Workspace, make_workspace, read_data
from ragjax.storage import write_json
from ragjax.training.loop import StopFlag
from ragjax.training.score_cache import ResultCache

CONFIG = "config.json"
# In the config, so that nobody takes an evaluation for a run.
PROGRAM = "experiments/evaluate.py"


class Opened(NamedTuple):
    """What is evaluated, ready to be asked."""

    workspace: Workspace
    weighing: Workspace  # the same with the dev questions that choose the weight of the hybrid
    run: FinishedRun | None
    query_params: Any  # of the adapted encoder, or of the only one
    doc_params: Any
    lm_params: Any
    adapts_retriever: bool
    adapts_lm: bool


def check_output(config: EvaluateConfig, folder: Path) -> None:
    """Checks that a folder is free, or holds an earlier life of this same evaluation.

    Args:
        config: Options.
        folder: Output folder; may be missing.

    Raises:
        FileNotFoundError: There is no run.
        ValueError: The folder holds something else, or an evaluation with other options.
    """
    path = folder / CONFIG
    if config.run and Path(config.run).resolve() == folder.resolve():
        raise ValueError(
            f"--output {folder} is the folder of the run, whose results would be written over;"
            " choose another"
        )
    if not path.is_file():
        ours = {"run.lock", "data", "cost.json", CONFIG + ".tmp"}
        strangers = sorted(p.name for p in folder.glob("*") if p.name not in ours)
        if strangers:
            raise ValueError(
                f"{folder} is not empty ({', '.join(strangers[:3])}) and holds no evaluation;"
                " choose another --output folder"
            )
        return
    run = open_run(Path(config.run)) if config.run else None
    try:
        earlier = json.loads(path.read_text("utf-8"))
        same = earlier["fingerprint"] == evaluation_fingerprint(config, run)
        known, now = earlier["config"], to_dict(config)
        changed = [
            f"{name}: {known.get(name)!r} there, {now.get(name)!r} here"
            for name in sorted({*known, *now} - {"output"})
            if known.get(name) != now.get(name)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not the config of an evaluation ({error}); choose another --output"
        ) from error
    if not same:
        what = "; ".join(changed[:5]) or "the run was made again"
        raise ValueError(
            f"{folder} holds another evaluation ({what}); choose another --output folder, or give"
            " the same options to continue it"
        )


def open_evaluation(
    config: EvaluateConfig, folder: Path, *, stop: StopFlag, report: Report
) -> Opened:
    """Reads run, data and models, and checks that every prompt has room.

    Args:
        config: Options.
        folder: Output folder; what is prepared of the data goes to its sub-folder `data`.
        stop: Looked at between stages.
        report: Shows one line to the user.

    Raises:
        FileNotFoundError, ValueError: For a run, data or models that cannot be used.
    """
    run = open_run(Path(config.run)) if config.run else None
    options = run_options(config, run)
    adapted_lm = run is not None and run.config.trains_lm
    adapted_retriever = run is not None and run.config.trains_retriever
    system_names(config, adapts_lm=adapted_lm)  # raises before the data are read
    dataset = read_data(options, folder, report)
    questions = _choose_questions(config, options, dataset)
    if run is None:
        encoder = load_encoder(options.encoder, max_length=options.encoder_max_length or None)
        lm = load_language_model(options.lm)
        query_params, doc_params, lm_params = encoder.params, encoder.params, lm.params
    else:
        query, doc = run_towers(run)
        language_model = run_language_model(run)
        encoder, lm = query.model, language_model.model
        query_params, doc_params = query.params, doc.params
        lm_params = language_model.params
    workspace = make_workspace(
        options, folder, dataset, questions, encoder, lm, stop=stop, report=report
    )
    _check_prompts(workspace, config)
    _note_what_was_seen(workspace, config)
    dev = _shuffled(dataset.questions.get("dev", ()), options.seed)
    weighing = {"dev": dev[: options.data_options.dev_questions]}
    return Opened(
        workspace=workspace,
        weighing=dataclasses.replace(workspace, questions=weighing),
        run=run,
        query_params=query_params,
        doc_params=doc_params,
        lm_params=lm_params,
        adapts_retriever=adapted_retriever,
        adapts_lm=adapted_lm,
    )


def _choose_questions(
    config: EvaluateConfig, options: RunConfig, dataset: Dataset
) -> dict[str, tuple[Question, ...]]:
    """Returns the questions of the split, in the order of a run: the first of both are the same."""
    known = dataset.questions.get(config.split, ())
    if not known:
        raise ValueError(
            f"--split {config.split}: {dataset.name} has no such questions; it has"
            f" {', '.join(sorted(name for name, q in dataset.questions.items() if q))}"
        )
    return {config.split: _shuffled(known, options.seed)[: config.max_questions or None]}


def _shuffled(questions: Sequence[Question], seed: int) -> tuple[Question, ...]:
    if not questions:
        return ()
    order = batch_rows(seed, 0, num_examples=len(questions), batch_size=len(questions))
    return tuple(questions[row] for row in order)


def _check_prompts(workspace: Workspace, config: EvaluateConfig) -> None:
    """Refuses documents that no prompt has room for, before anything expensive."""
    evaluation, prompts = workspace.config.evaluation, workspace.prompts
    size = len(workspace.dataset.corpus)
    count = min(evaluation.documents, size)
    if config.robustness:
        count = min(evaluation.documents + config.distractors, size)
    if evaluation.mode != "concat":
        count = 1
    for row in answered_rows(workspace, config.split):
        question = workspace.questions[config.split][row]
        try:
            prompts.context(question.text, [[0]] * count)
        except ValueError as error:
            raise ValueError(f"question {question.id!r}, --documents: {error}") from error


def _note_what_was_seen(workspace: Workspace, config: EvaluateConfig) -> None:
    """Says what the figures of this split cannot show."""
    split = config.split
    if split == "train" and config.run:
        workspace.report("note: the run was trained on train questions")
    if split == "dev":
        workspace.report("note: the weight of the hybrid is chosen on dev questions, also on these")
    answered = len(answered_rows(workspace, split))
    if not answered:
        workspace.report(f"note: no question of {split} has an answer: retrieval alone is measured")


def describe_cost(opened: Opened, config: EvaluateConfig) -> str:
    """Measures both models and says how long the evaluation will take at most."""
    return describe_evaluation(
        opened.workspace,
        config.split,
        system_names(config, adapts_lm=opened.adapts_lm),
        encodings=1 + opened.adapts_retriever,
        distractors=config.distractors if config.robustness else 0,
    )


def evaluate(config: EvaluateConfig, *, stop: StopFlag, report: Report = print) -> dict[str, Any]:
    """Evaluates whatever is not evaluated yet and returns what `metrics.json` holds.

    Args:
        config: Options; the caller has checked `config.output`
            (`ragjax.runs.evaluate.check_output`).
        stop: Looked at between batches.
        report: Shows one line to the user.

    Raises:
        FileNotFoundError, ValueError: For a run, data or models that cannot be used, before any
            expensive work.
    """
    folder = Path(config.output)
    opened = open_evaluation(config, folder, stop=stop, report=report)
    workspace, split = opened.workspace, config.split
    # Only now: input that was refused leaves nothing that would refuse the next one.
    fingerprint = evaluation_fingerprint(config, opened.run)
    identity = {"program": PROGRAM, "fingerprint": fingerprint}
    write_json(folder / CONFIG, identity | {"config": to_dict(config)})
    report(describe_cost(opened, config))
    found = _retrieve(opened, split)
    base, lm = _readers(opened)
    cache = answer_cache(workspace, _earlier_answers(opened.run))
    with workspace.timed("answers"):
        records = evaluate_systems(
            workspace,
            _systems(opened, config, found, base, lm),
            split=split,
            measure=measure_answer(config.support_threshold),
            cache=cache,
        )
    robustness = _measure_robustness(opened, config, found, lm, cache)
    metrics = write_evaluation(workspace, config, records, robustness)
    path = write_report(
        folder,
        title=f"Evaluation on {workspace.dataset.name}, {split} questions",
        lookup=corpus_lookup(workspace.dataset.corpus),
        gold=_gold(workspace, split),
    )
    report(f"report: {path}")
    return metrics


class _Found(NamedTuple):
    before: Retriever
    after: Retriever  # the same where the run did not adapt it
    bm25: SearchResult
    found_before: Rankings
    found_after: Rankings


def _retrieve(opened: Opened, split: str) -> _Found:
    """Builds the indexes and searches each once."""
    workspace, encoder = opened.workspace, opened.workspace.encoder
    earlier = sorted((opened.run.folder / "index").glob("*")) if opened.run else []
    with workspace.timed("index before"):
        bm25 = build_bm25(workspace)
        before = build_retriever(
            opened.weighing, bm25, version=0, query_params=encoder.params,
            doc_params=encoder.params, earlier=earlier,
        )  # fmt: skip
    after = before
    if opened.adapts_retriever:
        with workspace.timed("index after"):
            after = build_retriever(
                opened.weighing, bm25, version=1, query_params=opened.query_params,
                doc_params=opened.doc_params, earlier=earlier,
            )  # fmt: skip
    questions = workspace.questions[split]
    found_before = search(workspace, before, questions, SEARCH_DEPTH)
    return _Found(
        before,
        after,
        bm25.search([question.text for question in questions], SEARCH_DEPTH),
        found_before,
        search(workspace, after, questions, SEARCH_DEPTH) if after is not before else found_before,
    )


def _systems(
    opened: Opened, config: EvaluateConfig, found: _Found, base: FrozenLM, lm: FrozenLM
) -> list[System]:
    """Returns the systems that are compared; p_R is the dense retriever's in all of them."""
    scale = opened.workspace.config.retriever.scale
    dense_before, hybrid_before, queries_before = found.found_before
    dense, hybrid, queries = found.found_after
    before = functools.partial(doc_logits, found.before, queries_before, scale=scale)
    after = functools.partial(doc_logits, found.after, queries, scale=scale)
    there = {
        "closed_book": System("closed_book", base, None),
        "bm25": System("bm25", base, found.bm25, before(found.bm25)),
        "before": System("before", base, dense_before, before(dense_before)),
        "hybrid_before": System("hybrid_before", base, hybrid_before, before(hybrid_before)),
        "after": System("after", lm, dense, after(dense)),
        "hybrid": System("hybrid", lm, hybrid, after(hybrid)),
        "lm_half": System("lm_half", lm, dense_before, before(dense_before)),
        "closed_book_lm_half": System("closed_book_lm_half", lm, None),
        "hybrid_base_lm": System("hybrid_base_lm", base, hybrid, after(hybrid)),
    }
    return [there[name] for name in system_names(config, adapts_lm=opened.adapts_lm)]


def _readers(opened: Opened) -> tuple[FrozenLM, FrozenLM]:
    """Returns the un-adapted language model and the adapted one, which may be the same."""
    workspace = opened.workspace
    base = workspace.base_lm()
    if not opened.adapts_lm:
        return base, base
    return base, workspace.adapted_lm(opened.lm_params)


def _measure_robustness(
    opened: Opened, config: EvaluateConfig, found: _Found, lm: FrozenLM, cache: ResultCache[Answer]
) -> Robustness | None:
    workspace, rows = opened.workspace, answered_rows(opened.workspace, config.split)
    if not (config.robustness and rows):
        return None
    with workspace.timed("robustness"):
        robustness = answer_conditions(
            workspace,
            lm,
            found.after,
            found.found_after.hybrid,
            cache,
            split=config.split,
            rows=rows,
            num_distractors=config.distractors,
            measure=measure_answer(config.support_threshold),
        )
    if robustness is None:
        workspace.report("note: no question has a relevant passage and a distractor: no robustness")
    return robustness


def _earlier_answers(run: FinishedRun | None) -> list[Path]:
    """Returns the answers that the run kept: the same prompts were read for its own table."""
    path = run.folder / "evaluation" / "answers.jsonl" if run else None
    return [path] if path and path.is_file() else []


def _gold(workspace: Workspace, split: str) -> dict[str, list[str]]:
    judged = workspace.dataset.qrels[split]
    return {
        question.id: sorted(doc for doc, grade in judged[question.id].items() if grade > 0)
        for question in workspace.questions[split]
    }
