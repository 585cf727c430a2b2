"""Dual training from documents and questions to a before/after table, resumable at any point."""

import functools
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragjax.index import Bm25Index, HybridQueries, SearchResult
from ragjax.losses import target_entropy
from ragjax.runs.compare.lexical import adapt_bm25
from ragjax.runs.compare.rerank import check_reranker, fit_to_run
from ragjax.runs.compare.results import evaluate_run, show_first_numbers
from ragjax.runs.compare.served import choose_served
from ragjax.runs.data import Log, require_answers
from ragjax.runs.folder import claim, config_record
from ragjax.runs.forecast import describe_time, estimate_cost
from ragjax.runs.found import Findable, FindableIndex, findable_in_training, first_copies
from ragjax.runs.indexes import Retriever, build_bm25, build_towers, search
from ragjax.runs.inputs import begin, run_inputs
from ragjax.runs.models import rows_note
from ragjax.runs.options.dual import AdaptConfig, RetrieverConfig
from ragjax.runs.prompt_lengths import check_prompts, run_prompts
from ragjax.runs.prompts.choice import choose_prompt
from ragjax.runs.report.page import data_name, report_run
from ragjax.runs.saved import FinishedRun, open_run
from ragjax.runs.teachers.choice import choose_teacher, open_scores, teaching_lm
from ragjax.runs.tracking.trackers import check_trackers, track
from ragjax.runs.train.guard import Guard, Kept
from ragjax.runs.train.language_model import train_lm
from ragjax.runs.train.live import check_machine
from ragjax.runs.train.retriever import (
    TargetsAt,
    labelled_targets,
    train_live,
    train_retriever,
)
from ragjax.runs.train.targets import Targets, Teaching, known_passages, taught_targets
from ragjax.runs.workspace import (
    FrozenLM,
    Workspace,
    note_batch,
    note_limits,
    open_workspace,
    tower_params,
)
from ragjax.runs.written.file import file_inputs
from ragjax.runs.written.stage import add_written, check_questions
from ragjax.training.loop import StopFlag
from ragjax.training.score_cache import ResultCache, Score


def adapt(config: AdaptConfig, *, stop: StopFlag | None = None, log: Log = print) -> FinishedRun:
    """Trains the language model on retrieved documents, and the retriever by its scores.

    The results are in `config.output`. The same call continues a run that was interrupted, and
    repeats nothing of one that has ended.

    Args:
        config: Options.
        stop: Set by the caller to stop between batches; None: set by SIGTERM and SIGINT.
        log: Shows one line to the user.

    Returns:
        Metrics, models and report.

    Raises:
        FileNotFoundError, ValueError: For data, models or an output folder that cannot be used,
            before any expensive work.
        Interrupted: After saving, where the run was stopped.
    """
    started = time.perf_counter()
    record = config_record(config, config.fingerprint(), mode=config.mode)
    with claim(config, record, stop) as (flag, folder), ExitStack() as tracked:
        workspace = open_adapt(config, folder, stop=flag, log=log)
        # After validation, so that a rejected run leaves no config.json behind.
        inputs = run_inputs(workspace) | file_inputs(config.questions.file)
        begin(folder, record, inputs, kind=config.kind, log=log)
        tracked.enter_context(track(config, record, workspace))
        log(estimate_cost(workspace, config).describe())
        workspace = choose_prompt(workspace, run_prompts(workspace, dev=True))
        with workspace.timed("index before"):
            bm25 = build_bm25(workspace)
            params = tower_params(workspace)
            before = build_towers(workspace, bm25, params, 0)
            show_first_numbers(workspace, bm25, before)
        most = max(config.language_model.searched, config.retriever.candidates)
        dense = config.retriever.search == "dense"
        candidates, lm = Candidates(workspace, before, most, dense=dense), workspace.base_lm()
        if config.trains_lm and workspace.questions["train"]:
            with workspace.timed("language model"):
                lm = _adapt_lm(workspace, config, candidates)
        workspace, before = add_written(workspace, config, bm25, before, lm)
        candidates = candidates.of(workspace, before)
        after, kept = before, None
        if config.trains_retriever:
            guard = Guard(workspace, bm25, before, params)
            kept = _adapt_retriever(workspace, config, bm25, params, candidates, lm, guard)
            words = bm25
            if config.retriever.lexical == "dev":
                words = adapt_bm25(workspace, bm25, before)
            after = _build_after(workspace, words, kept.params, config.retriever.rounds)
        served = choose_served(workspace, bm25, before, after, lm, kept)
        reranker = fit_to_run(
            workspace, bm25, before, after, lm,
            name=config.rerank, depth=config.rerank_depth, served=served.documents,
        )  # fmt: skip
        with workspace.timed("evaluation"):
            evaluate_run(
                workspace, bm25, before, after, lm, served=served.documents, reranker=reranker
            )
        with workspace.timed("report"):
            title = f"Adaptation to {data_name(config.data or config.queries)}"
            report_run(workspace, before, after, lm, title=title, target=config.retriever.target)
        log(describe_time(workspace.seconds, started))
    return open_run(Path(config.output))


def open_adapt(config: AdaptConfig, folder: Path, *, stop: StopFlag, log: Log = print) -> Workspace:
    """Reads data and models of a run and checks what only they can tell; see `open_workspace`."""
    if config.score_cache:
        if not Path(config.score_cache).is_file():
            raise ValueError(f"--score_cache {config.score_cache}: no such file")
        try:
            ResultCache(config.score_cache, Score)
        except ValueError as error:
            raise ValueError(f"--score_cache {error}") from error
    check_machine(config)
    check_trackers(config.log_to)
    check_reranker(config.rerank, "--rerank")
    if config.retriever.reranker:
        check_reranker(config.retriever.reranker, "--retriever.reranker")
    workspace = open_workspace(config, folder, stop=stop, log=log)
    check_questions(workspace, config.questions)
    _check_supervision(workspace, config)
    open_scores(workspace, config.retriever)
    check_prompts(workspace, run_prompts(workspace, dev=True))
    _note_limits(workspace, config)
    return workspace


def _check_supervision(workspace: Workspace, config: AdaptConfig) -> None:
    """Tells what the data are too little for; raises ValueError where nothing can be trained."""
    dataset, questions = workspace.dataset, workspace.questions["train"]
    retriever = config.retriever
    if not questions:
        if config.questions.count(0) or config.questions.file:
            return
        raise ValueError(
            f"{dataset.name}: there are no training questions (supervision:"
            f" {dataset.supervision}); add queries.jsonl, or have them written, by leaving"
            " --questions.passages out"
        )
    weights = retriever.weights
    if config.trains_retriever and retriever.objective != "dpr" and weights is not None:
        if weights.answer and not weights.question:
            require_answers(dataset, questions, f"--retriever.teachers {weights}")
    if config.trains_retriever and retriever.objective == "dpr":
        known = sum(map(bool, workspace.relevant_rows("train")))
        if not known:
            raise ValueError(
                f"--retriever.objective dpr: {dataset.name} tells of no training question which"
                " passage is relevant; add qrels/train.tsv or answers that few passages hold, or"
                " take another objective"
            )
        if known < len(questions):
            workspace.note(
                f"--retriever.objective dpr: {known} of the {len(questions)} training questions"
                " have a known passage, and the others teach nothing"
            )


def _note_limits(workspace: Workspace, config: AdaptConfig) -> None:
    """Tells where the run takes less than it was asked for, or than there is."""
    retriever, documents = config.retriever, {"evaluation.documents": config.evaluation.documents}
    if config.trains_lm:
        documents["language_model.documents"] = config.language_model.documents
    if config.trains_retriever:
        documents["retriever.candidates"] = retriever.candidates
        documents["retriever.keyword_queries"] = retriever.keyword_queries
        note_batch(workspace, "retriever.batch_size", retriever.batch_size)
        for flag, rows in (
            ("retriever.batch_size", retriever.batch_size),
            ("retriever.keyword_queries", retriever.keywords),
        ):
            if note := rows_note(workspace.layout, flag, rows):
                workspace.log(note)
        most = max(1, retriever.candidates - 1)
        cut = sum(len(relevant) > most for relevant in workspace.relevant_rows("train"))
        if cut and retriever.objective == "dpr":
            workspace.log(
                f"note: --retriever.candidates {retriever.candidates}: {cut} training questions"
                f" have more than {most} relevant passages, of which {most} are taken"
            )
    note_limits(workspace, documents)


class Candidates:
    """The best documents of the training questions, which are embedded and searched once."""

    def __init__(
        self, workspace: Workspace, retriever: Retriever, most: int, *, dense: bool = False
    ) -> None:
        """Names the retriever and the most documents that will be wanted of a hybrid search.

        Args:
            workspace: Data and models.
            retriever: Both indexes.
            most: Documents of a question, at most.
            dense: True: there is no hybrid search, the dense index alone is searched.
        """
        self.retriever, self._workspace, self._most = retriever, workspace, most
        self._dense = dense

    def of(self, workspace: Workspace, retriever: Retriever) -> "Candidates":
        """Returns those of other training questions, or by another retriever."""
        if workspace is self._workspace and retriever is self.retriever:
            return self
        return Candidates(workspace, retriever, self._most, dense=self._dense)

    def hybrid(self, k: int) -> SearchResult:
        """Returns the k best documents `[Q, k]` of BM25 and the dense index together."""
        if self._dense:
            return self.dense(k)
        index = self.retriever.hybrid
        # Scores are relative to the candidates of a search, whose number may depend on k.
        if index.depth_of(k) == index.depth_of(self._most):
            return self._best.top(k)
        return FindableIndex(index, self._findable).search(self._queries, k)

    def dense(self, k: int) -> SearchResult:
        """Returns the k best documents `[Q, k]` of the dense index."""
        index = FindableIndex(self.retriever.dense, self._findable)
        return index.search(self._queries.embeddings, k)

    @functools.cached_property
    def _best(self) -> SearchResult:
        index = FindableIndex(self.retriever.hybrid, self._findable)
        return index.search(self._queries, self._most)

    @functools.cached_property
    def _findable(self) -> Findable:
        return findable_in_training(self._workspace)

    @functools.cached_property
    def _queries(self) -> HybridQueries:
        workspace = self._workspace
        embeddings = workspace.encode_query_ids(
            self.retriever.query_params, workspace.train_query_ids
        )
        return HybridQueries(embeddings, [q.text for q in workspace.questions["train"]])


def _adapt_lm(workspace: Workspace, config: AdaptConfig, candidates: Candidates) -> FrozenLM:
    options, dev = config.language_model, None
    found = candidates.hybrid(options.searched)
    if workspace.questions["dev"]:
        depth = max(options.searched, config.evaluation.documents)
        dev = search(workspace, candidates.retriever, "dev", depth).hybrid
    params = train_lm(workspace, options, found, dev)
    return workspace.base_lm() if params is None else workspace.adapted_lm(params)


def _adapt_retriever(
    workspace: Workspace,
    config: AdaptConfig,
    bm25: Bm25Index,
    params: dict[str, Any],
    candidates: Candidates,
    lm: FrozenLM,
    guard: Guard,
) -> Kept:
    """Trains the towers and keeps what is best on dev; the index of that is not yet built."""
    options, before = config.retriever, candidates.retriever
    teacher_lm = teaching_lm(options, workspace.base_lm(), lm)
    known = known_passages(
        workspace, given=options.known_share, written=config.questions.passage_share
    )
    teaching, rows = Teaching(None, known), known.asked
    scores = [config.score_cache] if config.score_cache else []
    if config.refresh.mode != "off":
        cache = ResultCache(workspace.folder / "scores" / "live.jsonl", Score, earlier=scores)
        if options.objective != "dpr" and rows.size:
            with workspace.timed("teacher"):
                asked = workspace.with_train(rows)
                teaching = teaching._replace(
                    teacher=choose_teacher(asked, options, teacher_lm, cache)
                )
        with workspace.timed("retriever"):
            params = train_live(workspace, options, bm25, before, params, teaching, cache, guard)
        return guard.finish(params)
    for number in range(options.rounds):
        if options.objective == "dpr":
            targets_at = _labelled_round(workspace, options, candidates, number)
        else:
            path = workspace.folder / "scores" / f"{number}.jsonl"
            cache = ResultCache(path, Score, earlier=scores)
            scores.append(str(path))
            with workspace.timed("teacher"):
                found = candidates.hybrid(options.candidates)
                if rows.size and teaching.teacher is None:
                    asked, scored = workspace.with_train(rows), found.take(rows)
                    teacher = choose_teacher(asked, options, teacher_lm, cache, scored)
                    teaching = teaching._replace(teacher=teacher)
                targets_at = _scored_round(workspace, teaching, found, cache)
        with workspace.timed("retriever"):
            params = train_retriever(workspace, options, number, params, targets_at, guard=guard)
        if number + 1 < options.rounds:
            retriever = _build_after(workspace, bm25, params, number + 1)
            dense = options.search == "dense"
            candidates = Candidates(workspace, retriever, options.candidates, dense=dense)
    return guard.finish(params)


def _build_after(
    workspace: Workspace, bm25: Bm25Index, params: Mapping[str, Any], version: int
) -> Retriever:
    with workspace.timed("index after"):
        return build_towers(workspace, bm25, params, version)


def _scored_round(
    workspace: Workspace, teaching: Teaching, found: SearchResult, cache: ResultCache[Score]
) -> TargetsAt:
    """Lets the teacher score the candidates of the questions that it sets the target of."""
    targets = taught_targets(workspace, teaching, np.arange(len(found.mask)), found, cache)
    if (rows := teaching.known.asked).size:
        _report_target(targets.take(rows), workspace.log)
    return lambda step, rows: targets.take(rows)


def _labelled_round(
    workspace: Workspace, config: RetrieverConfig, candidates: Candidates, number: int
) -> TargetsAt:
    """Takes the relevance judgements, with results of the dense index as hard negatives."""
    found = candidates.dense(config.negative_depth)
    relevant = [first_copies(workspace, rows) for rows in workspace.relevant_rows("train")]

    def targets_at(step: int, rows: NDArray[np.int64]) -> Targets:
        chosen, seed = [relevant[row] for row in rows], (workspace.config.seed + number, step)
        return labelled_targets(found.take(rows), chosen, config.candidates, seed=seed)

    return targets_at


def _report_target(targets: Targets, log: Log) -> None:
    """Reports how sharp the target is, and what to change where it teaches nothing."""
    # Of the teacher's part alone, where known passages have another.
    log_probs = np.where(targets.mask, targets.log_probs, -np.inf)
    log_probs -= np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
    entropy = target_entropy(log_probs, doc_mask=targets.mask)
    mean = float(np.asarray(entropy.normalized).mean())
    log(f"teacher: entropy of p_LSR is {mean:.2f} of its maximum")
    if mean >= 0.98:
        log(
            "warning: the target is uniform and teaches nothing; lower --retriever.temperature or"
            " use --retriever.score log_prob_per_token"
        )
    elif mean <= 0.02:
        log("warning: the target is a single document; raise --retriever.temperature")
