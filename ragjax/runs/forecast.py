"""What a run will cost, from the lengths of its texts and the measured speed of its models."""

import functools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ragjax.evaluation.systems import SYSTEMS
from ragjax.index import choose_index
from ragjax.refresh import (
    RefreshForecast,
    RefreshWork,
    estimate_build_seconds,
    forecast_refresh,
)
from ragjax.runs.compare.rerank import NONE, chosen_name
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.options.end_to_end import RagConfig
from ragjax.runs.prompts.choice import measured_prompts
from ragjax.runs.speed import Texts
from ragjax.runs.teachers.choice import count_pairs
from ragjax.runs.teachers.reading import QUESTION
from ragjax.runs.tokens import bucket_of
from ragjax.runs.train.batches import RagBatches
from ragjax.runs.train.best import FACTORS, measured_steps
from ragjax.runs.train.dev_nll import DEV_QUESTIONS
from ragjax.runs.train.guard import POOL_PASSAGES
from ragjax.runs.train.stages import stage_steps
from ragjax.runs.trainable import split_lm, split_towers
from ragjax.runs.workspace import Workspace, tower_params
from ragjax.runs.written.stage import count_passages
from ragjax.storage import compiled_folder

# Distinct prompts with documents per answered question and language model: systems often retrieve
# the same documents.
_PROMPTS = {"served": 1.7, "all": 4.0}
# Share of the slots that hold a token where a step's prompts are packed into rows.
_PACKED = 0.9
# Times that the language model is measured on dev beside once before it is trained.
_MEASURED_AGAIN = 4
# A question in front of a document, for a cross-encoder.
_PAIR_QUESTION = 16
# Share of the written questions whose passage is found again.
_FOUND_SHARE = 0.25
# A default run on two CPU cores compiles 196 programs in 28 s, and none where they have been kept.
_COMPILE_SECONDS = 30.0
# To count the words of a passage of a hundred tokens for BM25; later calls find them counted.
_COUNT_SECONDS = 2.4e-4
# Copies of the trained parameters on disk: with the optimizer's two moments, in two checkpoints.
_CHECKPOINT_COPIES = 3 * 2
# Stages that a training step consists of.
_STEP_STAGES = ("reading", "teacher", "retriever")


class Work(NamedTuple):
    """Tokens that one stage puts through a model."""

    stage: str
    tokens: float
    rate: float  # tokens a second in a forward pass
    passes: float = 1.0  # forward passes that a token costs


class Cost(NamedTuple):
    """A forecast; seconds are for this machine, measured a moment ago."""

    documents: int  # encoded, all times together
    lm_forwards: int  # (document, question) prompts read by the language model
    seconds: dict[str, float]  # by stage
    bytes_on_disk: int
    free_bytes: int
    answers: str  # which of them are compared
    refresh: RefreshForecast | None  # of the index while the retriever trains; None: not refreshed

    def describe(self) -> str:
        """Returns a few lines for the user."""
        shown = {stage: s for stage, s in self.seconds.items() if s >= 1}
        lines = [
            "\n== forecast",
            f"{self.documents:,} documents to encode, {self.lm_forwards:,} prompts for the language"
            " model",
            self.answers,
            f"about {_total(self.seconds, shown)}",
            f"about {self.bytes_on_disk / 2**20:,.0f} MiB on disk"
            f" ({self.free_bytes / 2**20:,.0f} MiB free)",
        ]
        if folder := compiled_folder():
            lines.append(f"programs are compiled once and kept in {folder}")
        if self.bytes_on_disk > self.free_bytes:
            lines.append("warning: the disk is too small for this run")
        if self.refresh is not None:
            lines.append(self.refresh.describe())
        return "\n".join(lines)


def estimate_cost(workspace: Workspace, config: AdaptConfig) -> Cost:
    """Measures both models on a few real texts and forecasts a dual run.

    Compiling the encoder for it is not lost: the run uses the same shape.
    """
    texts = Texts(workspace, config)
    retriever = config.retriever
    given = len(workspace.questions["train"])
    passages = min(count_passages(workspace, config.questions), len(workspace.doc_tokens))
    writes = config.questions.task == "written"
    made = config.questions.per_passage if writes else 1
    # Beside given questions some are written by default to measure by alone.
    trained = passages if config.questions.passages >= 0 or not given else 0
    train = given + math.ceil(trained * made * (_FOUND_SHARE if writes else 1))
    rounds = retriever.rounds if config.trains_retriever else 0
    asked = given if config.questions.passage_share == 1 else train
    pairs = count_pairs(workspace, retriever, asked) if rounds and asked else 0
    crossed = asked * retriever.candidates * rounds if retriever.reranker else 0
    rows, learnt, judged = _language_model(texts, config)
    length = bucket_of(
        workspace.encoder, min(retriever.doc_tokens, int(workspace.doc_tokens.lengths.max()))
    )
    steps = stage_steps(retriever, train)
    taught = retriever.batch_size * (retriever.learnt * length + 32)
    taught = steps * rounds * (taught + retriever.keywords * (length + 32))
    return _cost(
        texts,
        [
            Work("language model", learnt + judged, texts.lm_rate),
            Work("questions", writes * passages * texts.written(made), texts.lm_rate),
            Work("teacher", texts.scored(pairs), texts.lm_rate),
            *_cross_encoded(texts, "teacher's cross-encoder", crossed),
            *_reranked(
                texts,
                config.rerank,
                config.rerank_depth,
                [len(workspace.questions[split]) for split in ("dev", "test")],
            ),
            Work("retriever", taught, texts.encoder_rate, texts.encoder_passes),
            *_measured(texts, len(FACTORS) + rounds * len(measured_steps(steps))),
        ],
        encodings=1 + rounds,
        prompts=pairs + rows + passages * writes,
        steps=steps,
    )


def _language_model(texts: Texts, config: AdaptConfig) -> tuple[float, float, float]:
    """Returns prompts of the stage, and forward passes of tokens to train and to judge on dev."""
    options, questions = config.language_model, texts.workspace.questions
    rows = min(options.questions, len(questions["train"])) * options.epochs
    if not config.trains_lm:
        return 0, 0, 0
    rows *= options.documents if options.read == "apart" else 1
    # Together: as many documents as 1 to all of them on the mean, closed book for some.
    each = (1 - options.distractors / 2) * (1 + options.documents) / 2
    read = 1 if options.read == "apart" else each
    learnt = rows * (read * texts.document + texts.question) / _PACKED * texts.lm_passes
    dev = min(DEV_QUESTIONS, len(questions["dev"])) if config.keep == "best" else 0
    prompts = (config.evaluation.documents + 1) * texts.document + 2 * texts.question
    # Layers that are not trained are passed once.
    layers = texts.workspace.lm.config.num_layers
    again = _MEASURED_AGAIN * (options.train_layers or layers) / layers
    return rows, learnt, dev * prompts / _PACKED * (1 + again)


def _measured(texts: Texts, times: int) -> list[Work]:
    """Returns the work of measuring the retriever on dev so many times."""
    workspace, config = texts.workspace, texts.config
    nothing = config.keep == "last" or not config.trains_retriever
    if nothing or not workspace.questions["dev"]:
        return []
    share = min(1.0, POOL_PASSAGES / len(workspace.doc_tokens))
    return [Work("measuring on dev", times * share * texts.corpus, texts.encoder_rate)]


def estimate_rag_cost(workspace: Workspace, config: RagConfig) -> Cost:
    """Measures both models on a few real texts and forecasts an end-to-end run."""
    texts = Texts(workspace, config)
    batches = RagBatches(workspace, config)
    steps = stage_steps(config.training, len(workspace.questions["train"]))
    questions = steps * config.training.batch_size
    read = questions * (batches.num_retrieved + config.training.null_document)
    encoded = read + questions * bool(config.objective.contrastive_weight)
    documents = encoded * batches.doc_tokens
    objective, fusion = config.objective, config.language_model.reader == "fusion"
    again = objective.lsr_weight > 0 and objective.score == "leave_one_out" and fusion
    scored = len(workspace.questions["dev"]) * config.evaluation.documents * 2
    return _cost(
        texts,
        [
            Work(
                "reading",
                read * batches.context_tokens,
                texts.lm_rate,
                # A fusion reader reads once more without each document.
                texts.lm_passes + again * batches.num_retrieved,
            ),
            Work("retriever", documents, texts.encoder_rate, texts.encoder_passes),
            Work("dev", scored * texts.prompt, texts.lm_rate),
            *_measured(texts, 1 + len(FACTORS)),
        ],
        encodings=1 + config.trains_retriever,
        prompts=read + scored,
        steps=steps,
    )


def describe_evaluation(
    workspace: Workspace,
    split: str,
    systems: Sequence[str],
    *,
    encodings: int,
    distractors: int,
    chosen_by: int = 0,
    reranked: tuple[str, int, Sequence[int]] = (NONE, 0, ()),
) -> str:
    """Measures both models and returns how long an evaluation will take at most.

    Args:
        workspace: Data, models, options.
        split: Questions of the evaluation.
        systems: Names of the systems that are compared.
        encodings: Times that the corpus is encoded.
        distractors: Of a prompt that measures robustness; 0: it is not measured.
        chosen_by: Prompts that are read to choose what the language model reads.
        reranked: What ranks documents again, how many of a question, and the questions of each
            stage.
    """
    texts = Texts(workspace, workspace.config)
    answered, read = texts.answered(split), texts.config.evaluation.documents
    closed_book = sum(SYSTEMS[name].documents is None for name in systems)
    # Documents of each answer to a question.
    answers = [0] * closed_book + [read] * (len(systems) - closed_book)
    if distractors:
        # Relevant passages alone, with distractors before and behind them, and distractors alone.
        answers += [0, read, read + distractors, read + distractors, distractors]
    prompts = answered * sum(map(texts.prompts_of, answers))
    work = [Work("encoding", texts.corpus, texts.encoder_rate, encodings)]
    if chosen_by:
        work.append(Work("prompt", chosen_by * texts.prompt, texts.lm_rate))
    work += _reranked(texts, *reranked)
    if prompts:
        work.append(Work("answers", answered * sum(map(texts.answer, answers)), texts.lm_rate))
    return (
        f"\n== forecast\n{len(workspace.questions[split]):,} questions of {split},"
        f" {answered:,} of them answered; at most {prompts:,} prompts for the language model\n"
        f"at most about {_total(_seconds(work))}, less what is known already and what systems share"
    )


def duration(seconds: float) -> str:
    """Returns a span of time in the unit a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def describe_time(seconds: Mapping[str, float], started: float) -> str:
    """Returns a line on how long a call took, in all and by stage."""
    stages = ", ".join(f"{stage} {duration(s)}" for stage, s in seconds.items())
    return f"\ntook {duration(time.perf_counter() - started)} in this call ({stages})"


def _reranked(texts: Texts, asked: str, depth: int, counts: Sequence[int]) -> list[Work]:
    """Returns the work of ranking the best documents again, of so many questions a stage."""
    if (name := chosen_name(asked)) == NONE:
        return []
    lengths = texts.workspace.doc_tokens.lengths
    pairs = [min(depth, len(lengths)) * count for count in counts]
    if name == QUESTION:
        return [Work("re-rank", sum(map(texts.scored, pairs)), texts.lm_rate)]
    return _cross_encoded(texts, "re-rank", sum(pairs))


def _cross_encoded(texts: Texts, stage: str, pairs: int) -> list[Work]:
    """Returns the work of a cross-encoder of the encoder's size."""
    length = float(texts.workspace.doc_tokens.lengths.mean()) + _PAIR_QUESTION
    return [Work(stage, pairs * length, texts.encoder_rate)] if pairs else []


def _cost(
    texts: Texts, training: Sequence[Work], *, encodings: int, prompts: float, steps: int
) -> Cost:
    """Adds to the work of training what every run has: the index, its refreshes, the evaluation."""
    workspace, config = texts.workspace, texts.config
    size, read = len(workspace.doc_tokens), config.evaluation.documents
    answered = texts.answered("test") * (1 + config.trains_lm)
    distinct = _PROMPTS[config.evaluation.answers]
    answer = distinct * texts.answer(read) + texts.answer(0)
    chosen_by = measured_prompts(workspace)
    work = [
        Work("encoding", texts.corpus, texts.encoder_rate, encodings),
        Work("prompt", chosen_by * texts.prompt, texts.lm_rate),
        *training,
        Work("evaluation", answered * answer, texts.lm_rate),
    ]
    seconds = _seconds(work) | {"BM25": size * _COUNT_SECONDS, "compiling": _COMPILE_SECONDS}
    disk = os.statvfs(workspace.folder)
    free_bytes = disk.f_bavail * disk.f_frsize
    refresh = None
    if config.refresh.mode in ("sync", "async"):
        step_seconds = sum(seconds.get(stage, 0.0) for stage in _STEP_STAGES) / steps
        refresh = _refreshes(texts, steps, step_seconds, free_bytes)
        if refresh.work.shared_device:
            every = max(refresh.work.steps_between or 1, refresh.fastest_steps)
            seconds["refreshes"] = steps / every * refresh.refresh_seconds
    index_bytes = size * workspace.encoder.embedding_size * 4 * encodings
    split = functools.partial(split_towers, config.retriever, seed=0)
    base = tower_params(workspace)
    trained = (encodings - 1) * _trained_bytes(split, base)
    kept = (1 + (config.keep == "best")) * config.trains_retriever * _tree_bytes(base)
    if config.trains_lm:
        lm = workspace.lm
        split = functools.partial(split_lm, config.language_model, lm.family, seed=0)
        trained += _trained_bytes(split, lm.params)
    refreshes = refresh.bytes_on_disk if refresh else 0
    return Cost(
        documents=size * encodings,
        lm_forwards=int(chosen_by + prompts + answered * distinct * texts.prompts_of(read)),
        seconds=seconds,
        bytes_on_disk=index_bytes + trained * _CHECKPOINT_COPIES + kept + refreshes,
        free_bytes=free_bytes,
        answers=_describe_answers(texts),
        refresh=refresh,
    )


def _describe_answers(texts: Texts) -> str:
    """Returns a line on the questions that are answered, and from what."""
    config, questions = texts.config, len(texts.workspace.questions["test"])
    answered, read = texts.answered("test"), config.evaluation.documents
    if not answered:
        rows = texts.workspace.dataset.graded_rows("test", texts.workspace.questions["test"])
        compared = "retrieval alone" if any(rows) else "nothing"
        return f"no test question has an answer: {compared} is compared"
    whose = {
        "served": "what the hybrid finds (--evaluation.answers all: BM25 and dense too)",
        "all": "what every retriever finds",
    }[config.evaluation.answers]
    return (
        f"answers to {answered:,} of {questions:,} test questions"
        f" (--data_options.answer_questions), from the best {read} of {whose}"
    )


def _refreshes(texts: Texts, steps: int, step_seconds: float, free_bytes: int) -> RefreshForecast:
    """Returns what keeping the index fresh costs."""
    workspace, config, size = texts.workspace, texts.config.refresh, len(texts.workspace.doc_tokens)
    dim = workspace.encoder.embedding_size
    kind = choose_index(size, dim, kind=workspace.config.index).name
    encoded = config.partial + (1 - config.partial) / config.full_every
    work = RefreshWork(
        documents=size,
        dim=dim,
        encode_documents_per_second=texts.encoder_rate * size / texts.corpus / encoded,
        build_seconds=estimate_build_seconds(size, dim, kind),
        step_seconds=step_seconds,
        steps_between=config.trigger.steps_between(steps),
        kept_generations=config.keep,
        bytes_per_value=4.0 if kind == "exact" else 8.5,
        parameter_bytes=_tree_bytes(workspace.encoder.params),
        shared_device=not (config.devices or config.dispatch == "ray"),
        free_bytes=free_bytes,
    )
    return forecast_refresh(work)


def _trained_bytes(split: Callable[[Any], Any], params: Any) -> int:
    """Returns the bytes of the trainable parameters that `split` would return."""
    return _tree_bytes(jax.eval_shape(lambda params: split(params).trainable, params))


def _tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _seconds(work: Sequence[Work]) -> dict[str, float]:
    return {part.stage: part.tokens * part.passes / part.rate for part in work}


def _total(seconds: dict[str, float], shown: dict[str, float] | None = None) -> str:
    stages = seconds if shown is None else shown
    parts = ", ".join(f"{stage} {duration(s)}" for stage, s in stages.items())
    return f"{duration(sum(seconds.values()))} on this machine ({parts})"
