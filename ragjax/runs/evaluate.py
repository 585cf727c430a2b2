"""Evaluates a finished run, or base models, on questions of any split."""

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from ragjax.data import Dataset, Question
from ragjax.index import Bm25Index, MilvusIndex
from ragjax.refresh.task import params_digest
from ragjax.runs.compare.lexical import adapted_bm25
from ragjax.runs.compare.measures import corpus_evidence, measure_answer
from ragjax.runs.compare.rerank import (
    DEFAULT_DEPTH,
    NONE,
    Chosen,
    Reranker,
    check_reranker,
    chosen_name,
    fit_to_run,
)
from ragjax.runs.compare.results import Checks, shipped_system, write_results
from ragjax.runs.compare.robustness import answer_conditions
from ragjax.runs.compare.systems import (
    answer_cache,
    answered_rows,
    evaluate_systems,
    make_columns,
    retrieve_documents,
)
from ragjax.runs.data import Log, note_shared_passages, read_data, shuffled, trained_on
from ragjax.runs.folder import claim, config_record
from ragjax.runs.forecast import describe_evaluation
from ragjax.runs.indexes import Retriever, build_bm25, build_retriever, in_milvus
from ragjax.runs.inputs import begin, run_inputs, split_identity
from ragjax.runs.options.evaluate import (
    EvaluateConfig,
    run_options,
    system_names,
)
from ragjax.runs.options.modes import MODES, check_mode
from ragjax.runs.options.shared import RunConfig
from ragjax.runs.prompt_lengths import OF_EVALUATION, Asked, check_prompts
from ragjax.runs.prompts.choice import choose_prompt, measured_prompts
from ragjax.runs.report.page import corpus_lookup, gold_ids, write_notes, write_report
from ragjax.runs.saved import Evaluation, FinishedRun, Models, open_run
from ragjax.runs.tracking.trackers import check_trackers, track
from ragjax.runs.workspace import FrozenLM, Workspace, make_workspace, note_limits
from ragjax.runs.written.file import with_written
from ragjax.training.loop import StopFlag


class Opened(NamedTuple):
    """Data and models of an evaluation, loaded."""

    workspace: Workspace
    weighing: Workspace  # the same with the dev questions that choose the weight of the hybrid
    run: FinishedRun | None
    models: Models
    systems: tuple[str, ...]  # that are compared
    rerank: str  # what ranks documents again


def open_evaluation(config: EvaluateConfig, folder: Path, *, stop: StopFlag, log: Log) -> Opened:
    """Reads run, data and models, and checks that every prompt has room.

    Args:
        config: Options.
        folder: Output folder; what is prepared of the data goes to its sub-folder `data`.
        stop: Looked at between stages.
        log: Shows one line to the user.

    Raises:
        FileNotFoundError, ValueError: For a run, data or models that cannot be used.
    """
    check_trackers(config.log_to)
    run = open_run(Path(config.run)) if config.run else None
    options = run_options(config, run.config if run else None)
    placed = {"devices": config.devices, "fsdp": config.fsdp}
    models = run.open_models("adapted", **placed) if run else Models(options, None)
    rerank = _reranking(config, run)
    if config.index:
        MilvusIndex.open(config.index)  # before anything that takes time
    check_reranker(rerank, "--rerank")
    systems = system_names(config, adapts_lm=models.trains_lm, reranks=rerank != NONE)
    dataset = read_data(options, folder, log)
    if run and (run.config.data, run.config.queries) == (options.data, options.queries):
        written = with_written(dict(dataset.questions), run.folder, dataset.corpus)
        dataset = dataclasses.replace(dataset, questions=written)
    questions = _choose_questions(config, options, dataset)
    models = models.read()
    check_mode(options.mode, models.base_language_model, "--mode")
    workspace = make_workspace(
        options,
        folder,
        dataset,
        questions,
        models.base_encoders,
        models.base_language_model,
        stop=stop,
        log=log,
    )
    # Before anything expensive.
    check_prompts(workspace, _asked(workspace, config), OF_EVALUATION)
    _note_what_was_seen(workspace, config)
    distractors = {"distractors": config.distractors} if config.robustness else {}
    note_limits(workspace, {"evaluation.documents": options.evaluation.documents} | distractors)
    dev = shuffled(dataset.questions.get("dev", ()), options.seed)
    weighing = {"dev": dev[: options.data_options.dev_questions]}
    return Opened(
        workspace=workspace,
        weighing=dataclasses.replace(workspace, questions=weighing),
        run=run,
        models=models,
        systems=systems,
        rerank=rerank if "reranked" in systems else NONE,
    )


def _reranking(config: EvaluateConfig, run: FinishedRun | None) -> str:
    """Returns what ranks documents again: as asked, else as the run does."""
    chosen = Chosen.read(run.folder) if run else None
    return chosen_name(config.rerank or (chosen.name if chosen and chosen.weight else NONE))


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
    return {config.split: shuffled(known, options.seed)[: config.max_questions or None]}


def _asked(workspace: Workspace, config: EvaluateConfig) -> list[Asked]:
    """Returns what the language model reads."""
    count = workspace.config.evaluation.documents + config.robustness * config.distractors
    if MODES[workspace.config.mode].apart:
        count = 1
    asked = workspace.questions[config.split]
    answered = [asked[row] for row in answered_rows(workspace, config.split)]
    count = min(count, len(workspace.dataset.corpus))
    return [Asked(config.split, answered, count)]


def _choose_prompt(opened: Opened, config: EvaluateConfig) -> Opened:
    """Lets dev questions choose what base models read; a run has chosen."""
    if opened.run:
        return opened
    asked, questions = _asked(opened.workspace, config), opened.workspace.questions
    weighing = choose_prompt(opened.weighing, asked)
    workspace = dataclasses.replace(weighing, questions=questions)
    return opened._replace(workspace=workspace, weighing=weighing)


def _note_what_was_seen(workspace: Workspace, config: EvaluateConfig) -> None:
    """Logs what the results of this split do not show."""
    split = config.split
    dataset, options = workspace.dataset, workspace.config
    if config.run and split != "train":
        train = shuffled(trained_on(dataset), options.seed)[: options.data_options.train_questions]
        note_shared_passages(dataset, {"train": train, **workspace.questions}, workspace.note)
    if split == "train" and config.run:
        workspace.log("note: the run was trained on train questions")
    if split == "dev":
        workspace.log("note: the weight of the hybrid is chosen on dev questions, also on these")
    answered = len(answered_rows(workspace, split))
    if not answered:
        workspace.log(f"note: no question of {split} has an answer: retrieval alone is measured")
    workspace.note(f"retrieval is measured by {workspace.measured_by(split)}")


def describe_cost(opened: Opened, config: EvaluateConfig) -> str:
    """Measures both models and says how long the evaluation will take at most."""
    options = opened.workspace.config
    return describe_evaluation(
        opened.workspace,
        config.split,
        opened.systems,
        encodings=1 + options.trains_retriever,
        distractors=config.distractors if config.robustness else 0,
        chosen_by=0 if opened.run else measured_prompts(opened.weighing),
        reranked=(
            opened.rerank,
            _rerank_depth(opened, config),
            [len(opened.weighing.questions["dev"]), len(opened.workspace.questions[config.split])],
        ),
    )


def evaluate(
    config: EvaluateConfig, *, stop: StopFlag | None = None, log: Log = print
) -> Evaluation:
    """Compares systems on one split and writes the results; continues what was interrupted.

    Args:
        config: Options.
        stop: Set by the caller to stop between batches; None: set by SIGTERM and SIGINT.
        log: Shows one line to the user.

    Raises:
        FileNotFoundError, ValueError: For a run, data, models or an output folder that cannot be
            used, before any expensive work.
    """
    record = evaluation_record(config)
    with claim(config, record, stop) as (flag, folder), ExitStack() as tracked:
        opened = open_evaluation(config, folder, stop=flag, log=log)
        # After validation, so that a rejected evaluation leaves no config.json behind.
        begin(folder, record, _inputs(opened), kind=config.kind, log=log)
        tracked.enter_context(track(config, record, opened.workspace))
        log(describe_cost(opened, config))
        opened = _choose_prompt(opened, config)
        metrics = _evaluate(opened, config)
        write_notes(opened.workspace)
        path = write_report(
            folder,
            title=f"Evaluation on {opened.workspace.dataset.name}, {config.split} questions",
            lookup=corpus_lookup(opened.workspace.dataset.corpus),
            gold=gold_ids(
                opened.workspace.dataset, config.split, opened.workspace.questions[config.split]
            ),
        )
        log(f"report: {path}")
    return Evaluation(folder=Path(config.output), metrics=metrics, config=config)


def evaluation_record(config: EvaluateConfig) -> dict[str, Any]:
    """Returns what config.json will hold.

    Raises:
        FileNotFoundError, ValueError: There is no such run, or its results would be written over.
    """
    if config.run and Path(config.run).resolve() == Path(config.output).resolve():
        raise ValueError(
            f"--output {config.output} is the folder of the run, whose results would be written"
            " over; choose another"
        )
    run = open_run(config.run).config if config.run else None
    mode = run_options(config, run).mode
    return config_record(config, config.fingerprint(run), mode=mode)


def _inputs(opened: Opened) -> dict[str, Any]:
    """Returns what the result depends on beside the options: data, base and trained models."""
    models, options = opened.models, opened.workspace.config
    trained = {}
    if options.trains_retriever:
        encoders = (models.query_encoder.params, models.doc_encoder.params)
        trained["encoders"] = params_digest(encoders)
    if models.trains_lm:
        trained["language model"] = params_digest(models.language_model.params)
    return run_inputs(opened.workspace) | {
        "re-ranking": {"by": opened.rerank},
        "dev questions of the hybrid's weight": split_identity(opened.weighing, "dev"),
        "trained models": trained,
    }


def _evaluate(opened: Opened, config: EvaluateConfig) -> dict[str, Any]:
    workspace, split = opened.workspace, config.split
    bm25, before, after = _indexes(opened)
    if config.index:
        before, after = _in_milvus(opened, config.index, before, after)
    base = workspace.base_lm()
    lm = (
        workspace.adapted_lm(opened.models.language_model.params)
        if opened.models.trains_lm
        else base
    )
    depth = _rerank_depth(opened, config)
    documents = retrieve_documents(
        workspace, bm25, before, after, split,
        distractors=config.distractors if config.robustness else 0, deepest=depth,
    )  # fmt: skip
    systems = opened.systems
    reranker = _fit_reranker(opened, bm25, before, after, lm, depth)
    if reranker:
        questions = workspace.questions[split]
        documents["reranked"] = reranker.documents(questions, documents[_served(opened.run)])
    else:
        systems = tuple(name for name in systems if name != "reranked")
    cache = answer_cache(workspace.folder, _earlier_answers(opened.run))
    evidence = corpus_evidence(workspace, documents, split)
    measure = measure_answer(workspace, config.support_threshold, evidence)
    with workspace.timed("answers"):
        columns = make_columns(systems, documents, base, lm)
        records = evaluate_systems(workspace, columns, cache, split=split, measure=measure)
    robustness = None
    if config.robustness and answered_rows(workspace, split):
        with workspace.timed("robustness"):
            robustness = answer_conditions(
                workspace, lm, after, documents["hybrid"].found, cache,
                split=split, num_distractors=config.distractors, measure=measure,
            )  # fmt: skip
        if robustness is None:
            workspace.log(
                "note: no question has a relevant passage and a distractor: no robustness"
            )
    checks = Checks(config.bins, config.support_threshold, robustness)
    served = "reranked" if reranker else _served(opened.run)
    shipped = shipped_system(records, served) if opened.run else ""
    return write_results(workspace, records, checks, shipped=shipped)


def _rerank_depth(opened: Opened, config: EvaluateConfig) -> int:
    """Returns how many documents are ranked again; 0: none."""
    if opened.rerank == NONE:
        return 0
    chosen = Chosen.read(opened.run.folder) if opened.run else None
    return config.rerank_depth or (chosen.depth if chosen else DEFAULT_DEPTH)


def _fit_reranker(
    opened: Opened,
    bm25: Bm25Index,
    before: Retriever,
    after: Retriever,
    lm: FrozenLM,
    depth: int,
) -> Reranker | None:
    """Chooses on dev how documents are ranked again, also where a run chose on fewer of them."""
    earlier = [opened.run.folder] if opened.run else []
    return fit_to_run(
        opened.weighing, bm25, before, after, lm,
        name=opened.rerank, depth=depth, served=_served(opened.run), earlier=earlier,
    )  # fmt: skip


def _served(run: FinishedRun | None) -> str:
    """Returns which documents a run ships; those of the adapted hybrid where it does not say."""
    return run.served.documents if run and run.served else "hybrid"


def _indexes(opened: Opened) -> tuple[Bm25Index, Retriever, Retriever]:
    """Builds BM25, the base index and the adapted one, which may be the base one again."""
    workspace = opened.workspace
    indexes = sorted((opened.run.folder / "index").glob("*")) if opened.run else []
    earlier = [folder for folder in indexes if folder.name.isdecimal()]
    with workspace.timed("index before"):
        bm25 = build_bm25(workspace)
        before = build_retriever(
            opened.weighing, bm25, version=0, query_params=workspace.query_encoder.params,
            doc_params=workspace.encoder.params, earlier=earlier,
        )  # fmt: skip
    if not workspace.config.trains_retriever:
        return bm25, before, before
    with workspace.timed("index after"):
        words = adapted_bm25(workspace, bm25, opened.run.folder) if opened.run else bm25
        after = build_retriever(
            opened.weighing, words, version=1, query_params=opened.models.query_encoder.params,
            doc_params=opened.models.doc_encoder.params, earlier=earlier,
        )  # fmt: skip
    return bm25, before, after


def _in_milvus(
    opened: Opened, address: str, before: Retriever, after: Retriever
) -> tuple[Retriever, Retriever]:
    """Returns both retrievers, of which a server searches the one that the run ships."""
    if before is after:
        served = in_milvus(after, address)
        return served, served
    run = opened.run
    if run and run.served and run.served.retriever == "base":
        return in_milvus(before, address), after
    return before, in_milvus(after, address)


def _earlier_answers(run: FinishedRun | None) -> list[Path]:
    """Returns the answers that the run kept: the same prompts were read for its own table."""
    path = run.folder / "evaluation" / "answers.jsonl" if run else None
    return [path] if path and path.is_file() else []
