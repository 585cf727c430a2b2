"""What the stages of a run share: data, models and output folder.

Q questions, N documents, D embedding size.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from ragjax.data import (
    CorpusTokens,
    DataError,
    Dataset,
    DocumentTokens,
    PromptBuilder,
    Question,
    passage_text,
)
from ragjax.models.encoder import Encode, TextEncoder
from ragjax.models.language_model import LanguageModel
from ragjax.models.layers.stacks import cast_floats
from ragjax.refresh import EncodeTask, encode_corpus
from ragjax.refresh.task import params_digest
from ragjax.runs.data import (
    Log,
    choose_questions,
    describe_supervision,
    measured_by,
    note_shared_passages,
    read_data,
)
from ragjax.runs.folder import add_seconds
from ragjax.runs.models import (
    Encoders,
    base_towers,
    encode_tokens,
    in_compute_dtype,
    layout_of,
    load_encoders,
    load_lm,
    scale_note,
    scale_of,
    training_encode,
)
from ragjax.runs.options.modes import check_mode
from ragjax.runs.options.prompt import read_template
from ragjax.runs.options.shared import RunConfig, TowersConfig
from ragjax.runs.tokens import corpus_task, make_prompts, query_ids
from ragjax.runs.trainable import folded
from ragjax.training.finite import not_finite
from ragjax.training.loop import MetricsLog, StopFlag
from ragjax.training.mesh import Layout

_METRICS = "metrics.jsonl"


class FrozenLM(NamedTuple):
    """Parameters of a language model that scores and answers, and what identifies them."""

    params: Any  # in the dtype that they are computed in
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Data, models and folders of one run; made once, read by every stage.

    Attributes:
        config: Options of the run.
        folder: Output folder.
        dataset: Corpus and questions; what counts as found is asked of `gold_rows`.
        questions: Questions used, by split ("train", "dev", "test"), after the caps of the config.
        encoder: The base encoder of documents, and of queries where there is one.
        query_encoder: The base encoder of queries.
        lm: The base language model.
        prompts: Turns (documents, question, answer) into token ids, for scoring and answering.
        documents: Token ids of the documents for the language model.
        doc_tokens: Encoder token ids of the documents, N lists.
        metrics: Per-step metrics.
        stop: Set by a signal.
        log: Shows one line to the user.
        seconds: Wall-clock seconds by stage, filled as the stages end.
        notes: Sentences on the data for the report, beside those of the data set.
    """

    config: RunConfig
    folder: Path
    dataset: Dataset
    questions: dict[str, tuple[Question, ...]]
    encoder: TextEncoder
    query_encoder: TextEncoder
    lm: LanguageModel
    prompts: PromptBuilder
    documents: DocumentTokens
    doc_tokens: CorpusTokens
    metrics: MetricsLog
    stop: StopFlag
    log: Log
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Logs the beginning of a stage and records its wall-clock time."""
        self.stop.check()
        self.log(f"\n== {stage}")
        started = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + took
            add_seconds(self.folder, stage, took)

    def note(self, text: str) -> None:
        """Shows a sentence on the data to the user once, and keeps it for the report."""
        if text not in self.notes:
            self.log(f"note: {text}")
            self.notes.append(text)

    @functools.cached_property
    def layout(self) -> Layout:
        """The devices of the run, and what lies where on them."""
        return layout_of(self.config)

    @property
    def scale(self) -> float:
        """p_R = softmax(scale · q·d): the option, or what the encoder needs."""
        return self.config.retriever.scale or scale_of(self.encoder)

    def gold_rows(self, split: str) -> list[dict[int, float]]:
        """Returns corpus row to grade for the questions used of a split.

        By judgements, answers or the passage that a question was written from, see
        `Dataset.graded_rows`; empty where nothing is known, which counts in no mean.
        """
        return self.dataset.graded_rows(split, self.questions[split])

    def relevant_rows(self, split: str) -> list[frozenset[int]]:
        """Returns the relevant corpus rows of the questions used of a split, with their copies."""
        copies = self.dataset.twins.copies
        return [
            frozenset(
                copy for row, grade in rows.items() if grade > 0 for copy in copies.get(row, (row,))
            )
            for rows in self.gold_rows(split)
        ]

    def truth(self, split: str) -> str:
        """Returns by what retrieval is measured on a split: a key of `TRUTHS`."""
        return self.dataset.truth(split, self.questions[split])

    def measured_by(self, split: str) -> str:
        """Returns by what retrieval is measured on a split, in words behind "measured by"."""
        return measured_by(self.dataset, split, self.questions[split])

    @property
    def tested_by(self) -> str:
        """By what retrieval is measured where it is reported: on test, or an evaluation's split."""
        return self.measured_by("test" if "test" in self.questions else next(iter(self.questions)))

    def with_train(self, rows: NDArray[np.int64]) -> "Workspace":
        """Returns a workspace with some of the training questions."""
        train = tuple(self.questions["train"][row] for row in rows)
        return dataclasses.replace(self, questions={**self.questions, "train": train})

    @functools.cached_property
    def train_query_ids(self) -> list[list[int]]:
        """The query encoder's token ids of the training questions."""
        return query_ids(self.query_encoder, self.questions["train"])

    def encode_queries(self, params: Any, questions: Sequence[Question]) -> np.ndarray:
        """Returns query embeddings `[Q, D]` float32."""
        return self.encode_query_ids(params, query_ids(self.query_encoder, questions))

    def encode_query_ids(self, params: Any, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns embeddings `[Q, D]` float32 of queries that are token ids already."""
        return encode_corpus(self.query_task.of_token_ids(ids), params)

    @functools.cached_property
    def query_task(self) -> EncodeTask:
        """As `task`, with the encoder of queries: made for `of_token_ids`."""
        if self.query_encoder is self.encoder:
            return self.task
        tokens = encode_tokens(self.config)
        return corpus_task(self.query_encoder, self.dataset.corpus, encode_tokens=tokens)

    @functools.cached_property
    def task(self) -> EncodeTask:
        """The corpus as the encoder encodes it, whatever its parameters become."""
        tokens = encode_tokens(self.config)
        task = corpus_task(self.encoder, self.dataset.corpus, encode_tokens=tokens)
        return dataclasses.replace(task, documents=self.doc_tokens, tokenize=list)

    def in_compute_dtype(self, params: Any) -> Any:
        """Returns the language model's parameters in the dtype that it computes in."""
        if self.config.compute_dtype == "float32":
            return params
        return cast_floats(params, self.config.compute_dtype)

    def cast_lm(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Returns `(params, batch)` of the language model, computed in the dtype of the run."""
        return lambda params, batch: function(self.in_compute_dtype(params), batch)

    def base_lm(self) -> FrozenLM:
        """Returns the base language model as it scores and answers."""
        return self._frozen(self.lm.params, self.lm.fingerprint)

    def adapted_lm(self, params: Any) -> FrozenLM:
        """Returns the language model with adapted parameters as it scores and answers."""
        return self._frozen(folded(params), params_digest(params))

    def is_base(self, lm: FrozenLM) -> bool:
        """Tells whether a language model is the base one."""
        return lm.fingerprint == self._name(self.lm.fingerprint)

    def _frozen(self, params: Any, fingerprint: str) -> FrozenLM:
        return FrozenLM(self.in_compute_dtype(params), self._name(fingerprint))

    def _name(self, fingerprint: str) -> str:
        dtype = self.config.compute_dtype
        return fingerprint if dtype == "float32" else f"{fingerprint} {dtype}"

    def training_encodes(self) -> tuple[Encode, Encode]:
        """Returns `encode` of queries and of documents as training runs them."""
        encoders = (self.query_encoder, self.encoder)
        query, doc = (training_encode(encoder, self.config) for encoder in encoders)
        return query, doc


def open_workspace(
    config: RunConfig, folder: Path, *, stop: StopFlag, log: Log = print
) -> Workspace:
    """Reads the data, loads the models and checks that they fit each other.

    Args:
        config: Options of the run.
        folder: Output folder; the prepared corpus goes to its sub-folder `data`.
        stop: Checked between stages.
        log: Shows one line to the user.

    Raises:
        ValueError, FileNotFoundError: For data or models that cannot be used, before any
            expensive work.
    """
    read_template(config.prompt)  # before anything that takes time
    dataset = read_data(config, folder, log)
    notes: list[str] = []
    questions = choose_questions(config, dataset, notes.append)
    # There from the start, for whoever follows the run or reads why it ended.
    (folder / _METRICS).touch()
    encoders = load_encoders(config)
    lm = load_lm(config)
    check_mode(config.mode, lm, "--evaluation.mode")
    _check_layers(config.language_model.train_layers, "language_model", config.lm, lm.config)
    for encoder in encoders:
        _check_layers(config.retriever.train_layers, "retriever", encoder.source, encoder.config)
    workspace = make_workspace(config, folder, dataset, questions, encoders, lm, stop=stop, log=log)
    workspace.note(describe_supervision(dataset, questions))
    for note in notes:
        workspace.note(note)
    note_shared_passages(dataset, questions, workspace.note)
    return workspace


def make_workspace(
    config: RunConfig,
    folder: Path,
    dataset: Dataset,
    questions: dict[str, tuple[Question, ...]],
    encoders: Encoders,
    lm: LanguageModel,
    *,
    stop: StopFlag,
    log: Log = print,
) -> Workspace:
    """Returns the workspace of loaded data and models.

    Args:
        config: Options of the run.
        folder: Output folder.
        dataset: Corpus and questions; what counts as found is asked of `gold_rows`.
        questions: Questions used, by split.
        encoders: The base text encoders.
        lm: The base language model.
        stop: Checked between stages.
        log: Shows one line to the user.

    Raises:
        ValueError: A weight of a model is NaN or infinite.
    """
    for name, encoder in encoders.named.items():
        _check_weights(name.replace(" ", "_"), encoder.source, encoder.params)
    _check_weights("lm", config.lm, lm.params)
    encoders = encoders.mapped(lambda encoder: in_compute_dtype(encoder, config))
    query_encoder, encoder = encoders
    for name, each in encoders.named.items():
        log(f"{name} {each.source}: {_size(each.params)}, {each.embedding_size} dimensions")
    if query_encoder.query_prefix or encoder.doc_prefix:
        prefixes = (query_encoder.query_prefix, encoder.doc_prefix)
        log("queries start with {!r}, documents with {!r}".format(*prefixes))
    if scale := scale_note(encoder, config.retriever.scale):
        log(f"note: {scale}")
    log(f"language model {config.lm}: {_size(lm.params)}, vocabulary {lm.config.vocab_size:,}")
    if (there := jax.device_count()) > 1:
        log(f"{layout_of(config).describe()}, of {there} that are there")
    doc_tokens = CorpusTokens(
        len(dataset.corpus),
        lambda: (encoder.doc_prefix + passage_text(passage) for passage in dataset.corpus),
        encoder.tokenizer,
        max_length=encoder.max_length,
        report=lambda note: log(f"note: {note} for the encoder"),
        folder=dataset.corpus.cache,
        identity=f"{dataset.corpus.fingerprint} {encoder.doc_prefix}",
    )
    try:
        prompts = make_prompts(config.prompt, lm, new_tokens=config.evaluation.max_new_tokens)
    except DataError as error:
        raise ValueError(
            f"{lm.source} reads {lm.max_length} tokens, which leaves no room for a prompt beside"
            f" the {config.prompt.answer_tokens} tokens of --prompt.answer_tokens and the"
            f" {config.evaluation.max_new_tokens} of --evaluation.max_new_tokens; lower the larger"
        ) from error
    return Workspace(
        config=config,
        folder=folder,
        dataset=dataset,
        questions=questions,
        encoder=encoder,
        query_encoder=query_encoder,
        lm=lm,
        prompts=prompts,
        documents=DocumentTokens(prompts, dataset.corpus),
        doc_tokens=doc_tokens,
        metrics=MetricsLog(folder / _METRICS),
        stop=stop,
        log=log,
    )


def note_limits(workspace: Workspace, documents: Mapping[str, int]) -> None:
    """Tells where a run takes less than it was asked for, or than there is.

    Args:
        workspace: Data and options.
        documents: Options to the passages that they ask for of each question.
    """
    size = len(workspace.dataset.corpus)
    for name, count in documents.items():
        if count > size:
            workspace.log(f"note: --{name} {count:,}: there are {size:,} passages, all are taken")
    kept, most = workspace.config.retriever.doc_tokens, workspace.encoder.max_length
    if kept > most and kept != TowersConfig.doc_tokens:
        workspace.log(f"note: --retriever.doc_tokens {kept:,}: the encoder reads {most:,} tokens")


def note_batch(workspace: Workspace, name: str, batch_size: int) -> None:
    """Tells where a batch takes more questions than there are, so that it repeats some."""
    count = len(workspace.questions["train"])
    if batch_size > count > 0:
        workspace.log(
            f"note: --{name} {batch_size:,}: with {count:,} training questions a batch holds"
            " some more than once"
        )


def _check_layers(asked: int, flag: str, source: str, sizes: Any) -> None:
    if asked > sizes.num_layers:
        raise ValueError(
            f"--{flag}.train_layers {asked}: {source} has {sizes.num_layers} layers; 0 trains all"
        )


def _check_weights(flag: str, source: str, params: Any) -> None:
    if bad := not_finite(params):
        raise ValueError(
            f"--{flag} {source}: {len(bad)} arrays of its weights hold NaN or infinity, the first"
            f" {bad[0]}; the file is damaged, or was saved by a training that diverged: take a"
            " copy that is whole"
        )


def _size(params: Any) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return f"{count / 1e6:.0f} M parameters"


def tower_params(workspace: Workspace) -> dict[str, Any]:
    """Returns the base towers by name; see `base_towers`."""
    return base_towers(workspace.config, Encoders(workspace.query_encoder, workspace.encoder))
