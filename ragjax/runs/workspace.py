"""What the stages of a run share: data, models and output folder.

Q questions, N documents, D embedding size.
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from ragjax.data import (
    Corpus,
    CorpusTokens,
    Dataset,
    DocumentTokens,
    Passage,
    PromptBuilder,
    PromptTemplate,
    Question,
    batch_rows,
    buckets_up_to,
    encode_texts,
    leaked_questions,
    pad_right,
    passage_text,
    read_beir,
    write_python_docs,
)
from ragjax.data.fields import parse_fields
from ragjax.models.encoder import Encode, TextEncoder, load_encoder, with_options
from ragjax.models.inputs import Tokens
from ragjax.models.language_model import LanguageModel, load_language_model
from ragjax.models.layers.stacks import cast_floats
from ragjax.refresh import EncodeTask, encode_corpus
from ragjax.refresh.batches import DEFAULT_BUCKETS, EncodeOptions
from ragjax.refresh.task import params_digest
from ragjax.runs.folder import add_seconds
from ragjax.runs.options.shared import PromptConfig, RunConfig
from ragjax.training.loop import MetricsLog, StopFlag

Log = Callable[[str], None]
_SHOWN = 3  # ids in a note


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
        dataset: Corpus, questions, relevance judgements.
        questions: Questions used, by split ("train", "dev", "test"), after the caps of the config.
        encoder: The base text encoder.
        lm: The base language model.
        prompts: Turns (documents, question, answer) into token ids, for scoring and answering.
        documents: Token ids of the documents for the language model.
        doc_tokens: Encoder token ids of the documents, N lists.
        metrics: Per-step metrics.
        stop: Set by a signal.
        log: Shows one line to the user.
        seconds: Wall-clock seconds by stage, filled as the stages end.
    """

    config: RunConfig
    folder: Path
    dataset: Dataset
    questions: dict[str, tuple[Question, ...]]
    encoder: TextEncoder
    lm: LanguageModel
    prompts: PromptBuilder
    documents: DocumentTokens
    doc_tokens: CorpusTokens
    metrics: MetricsLog
    stop: StopFlag
    log: Log
    seconds: dict[str, float] = field(default_factory=dict)

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

    def gold_rows(self, split: str) -> list[dict[int, int]]:
        """Returns corpus row to grade for the questions used of a split."""
        return self.dataset.graded_rows(split, self.questions[split])

    def relevant_rows(self, split: str) -> list[frozenset[int]]:
        """Returns the relevant corpus rows of the questions used of a split."""
        return [
            frozenset(row for row, grade in rows.items() if grade > 0)
            for rows in self.gold_rows(split)
        ]

    @functools.cached_property
    def train_query_ids(self) -> list[list[int]]:
        """The encoder's token ids of the training questions."""
        return query_ids(self.encoder, self.questions["train"])

    def encode_queries(self, params: Any, questions: Sequence[Question]) -> np.ndarray:
        """Returns query embeddings `[Q, D]` float32."""
        return self.encode_query_ids(params, query_ids(self.encoder, questions))

    def encode_query_ids(self, params: Any, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns embeddings `[Q, D]` float32 of queries that are token ids already."""
        return encode_corpus(self.task.of_token_ids(ids), params)

    @functools.cached_property
    def task(self) -> EncodeTask:
        """The corpus as the encoder encodes it, whatever its parameters become."""
        return corpus_task(
            self.encoder,
            self.doc_tokens,
            encode_tokens=self.config.encode_tokens,
            corpus_fingerprint=self.dataset.corpus.fingerprint,
        )

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
        return self._frozen(params, params_digest(params))

    def _frozen(self, params: Any, fingerprint: str) -> FrozenLM:
        dtype = self.config.compute_dtype
        name = fingerprint if dtype == "float32" else f"{fingerprint} {dtype}"
        return FrozenLM(self.in_compute_dtype(params), name)

    def training_encode(self) -> Encode:
        """Returns `encode` as training runs it: recomputing its layers if the options say so."""
        if not self.config.retriever.remat:
            return self.encoder.encode
        dtype = _cast_dtype(self.config)
        return with_options(self.encoder, remat=True, compute_dtype=dtype).encode


def corpus_task(
    encoder: TextEncoder,
    corpus: Corpus | CorpusTokens,
    *,
    encode_tokens: int,
    corpus_fingerprint: str = "",
) -> EncodeTask:
    """Returns the task of encoding a corpus with an encoder, whatever its weights become.

    A trainer and its worker processes must agree on it.

    Args:
        encoder: The un-adapted encoder; its fingerprint says where the weights started.
        corpus: Passages, tokenised when they are encoded, or the encoder's token ids of each.
        encode_tokens: Tokens in a batch, padding included.
        corpus_fingerprint: Of the corpus that token ids come from; "" takes that of `corpus`.
    """
    longest = encoder.max_length
    task = EncodeTask(
        encode=encoder.encode,
        documents=cast(Sequence[Any], corpus),  # read by index only
        pad_id=encoder.pad_id,
        make_tokens=Tokens,
        options=EncodeOptions(
            batch_tokens=encode_tokens, buckets=buckets_up_to(longest, DEFAULT_BUCKETS)
        ),
        corpus_fingerprint=corpus_fingerprint,
        model_fingerprint=encoder.fingerprint,
    )
    if not isinstance(corpus, Corpus):
        return task

    def tokenize(passages: Sequence[Passage]) -> list[list[int]]:
        texts = [encoder.doc_prefix + passage_text(passage) for passage in passages]
        return encode_texts(encoder.tokenizer, texts, max_length=longest).ids

    fingerprint = corpus_fingerprint or corpus.fingerprint
    return dataclasses.replace(task, tokenize=tokenize, corpus_fingerprint=fingerprint)


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
    dataset = read_data(config, folder, log)
    questions = choose_questions(config, dataset)
    encoder = load_encoder(config.encoder, max_length=config.encoder_max_length or None)
    lm = load_language_model(config.lm)
    _check_layers(config.language_model.train_layers, "language_model", config.lm, lm.config)
    _check_layers(config.retriever.train_layers, "retriever", config.encoder, encoder.config)
    return make_workspace(config, folder, dataset, questions, encoder, lm, stop=stop, log=log)


def make_workspace(
    config: RunConfig,
    folder: Path,
    dataset: Dataset,
    questions: dict[str, tuple[Question, ...]],
    encoder: TextEncoder,
    lm: LanguageModel,
    *,
    stop: StopFlag,
    log: Log = print,
) -> Workspace:
    """Returns the workspace of loaded data and models.

    Args:
        config: Options of the run.
        folder: Output folder.
        dataset: Corpus, questions, relevance judgements.
        questions: Questions used, by split.
        encoder: The base text encoder.
        lm: The base language model.
        stop: Checked between stages.
        log: Shows one line to the user.
    """
    encoder = _in_compute_dtype(encoder, config)
    log(f"encoder {config.encoder}: {_size(encoder.params)}, {encoder.embedding_size} dimensions")
    log(f"language model {config.lm}: {_size(lm.params)}, vocabulary {lm.config.vocab_size:,}")
    doc_tokens = CorpusTokens(
        len(dataset.corpus),
        lambda: (encoder.doc_prefix + passage_text(passage) for passage in dataset.corpus),
        encoder.tokenizer,
        max_length=encoder.max_length,
        report=lambda note: log(f"note: {note} for the encoder"),
    )
    prompts = make_prompts(config.prompt, lm)
    return Workspace(
        config=config,
        folder=folder,
        dataset=dataset,
        questions=questions,
        encoder=encoder,
        lm=lm,
        prompts=prompts,
        documents=DocumentTokens(prompts, dataset.corpus),
        doc_tokens=doc_tokens,
        metrics=MetricsLog(folder / "metrics.jsonl"),
        stop=stop,
        log=log,
    )


def _cast_dtype(config: RunConfig) -> str | None:
    return None if config.compute_dtype == "float32" else config.compute_dtype


def _in_compute_dtype(encoder: TextEncoder, config: RunConfig) -> TextEncoder:
    """Returns the encoder as the run uses it; embeddings of another dtype are another encoder's."""
    if (dtype := _cast_dtype(config)) is None:
        return encoder
    identity = hashlib.sha256(f"{encoder.fingerprint} {dtype}".encode()).hexdigest()
    encoder = with_options(encoder, compute_dtype=dtype)
    return dataclasses.replace(encoder, fingerprint=identity)


def _check_layers(asked: int, flag: str, source: str, sizes: Any) -> None:
    if asked > sizes.num_layers:
        raise ValueError(
            f"--{flag}.train_layers {asked}: {source} has {sizes.num_layers} layers; 0 trains all"
        )


def read_data(config: RunConfig, folder: Path, log: Log) -> Dataset:
    """Reads the data of a run; what is prepared from them goes to the sub-folder `data`."""
    options = config.data_options
    source = Path(config.data) if config.data else folder / "data" / "python-docs"
    if not config.data and not (source / "corpus.jsonl").is_file():
        write_python_docs(source)
    dataset = read_beir(
        source,
        cache=folder / "data" / "cache",
        fields=parse_fields(options.fields, flag="--data_options.fields"),
        on_bad_row=options.on_bad_row,
        dev_fraction=config.dev_fraction,
    )
    for note in dataset.notes:
        log(f"note: {note}")
    for split in ("dev", "test"):
        if leaked := leaked_questions(dataset, split=split):
            log(
                f"note: {len(leaked)} of the {len(dataset.questions[split])} {split} questions are"
                f" also asked in train: {', '.join(leaked[:_SHOWN])}"
                f"{', ...' if len(leaked) > _SHOWN else ''}"
            )
    return dataset


def choose_questions(config: RunConfig, dataset: Dataset) -> dict[str, tuple[Question, ...]]:
    """Returns the questions of a run by split, after its caps.

    Raises:
        ValueError: There are none to train on, or none to test on.
    """
    caps = config.data_options
    limits = {"train": caps.train_questions, "dev": caps.dev_questions, "test": caps.test_questions}
    chosen: dict[str, tuple[Question, ...]] = {}
    for split, limit in limits.items():
        known = dataset.questions.get(split, ())
        if split == "train":
            # p_LM(y|c∘x) of a question without an answer has no y to train on.
            known = tuple(question for question in known if question.answers)
        if not known and split != "dev":
            need = "answers and " if split == "train" else ""
            raise ValueError(
                f"{dataset.name}: no {split} questions with {need}relevance judgements; add"
                f" qrels/{split}.tsv and answers in queries.jsonl"
            )
        # A seeded order, so that a cap takes a fair sample and a larger cap a larger one.
        count = None if split == "test" and limit == 0 else limit
        chosen[split] = shuffled(known, config.seed)[:count]
    return chosen


def shuffled(questions: Sequence[Question], seed: int) -> tuple[Question, ...]:
    """Returns the questions in the order of a run with this seed."""
    if not questions:
        return ()
    order = batch_rows(seed, 0, num_examples=len(questions), batch_size=len(questions))
    return tuple(questions[row] for row in order)


def make_prompts(
    config: PromptConfig, lm: LanguageModel, *, end_id: int | None = None
) -> PromptBuilder:
    """Returns a language model's prompt builder; with `end_id`, targets end with that token."""
    return PromptBuilder(
        lm.tokenizer,
        template=PromptTemplate(
            max_document_tokens=config.document_tokens, max_answer_tokens=config.answer_tokens
        ),
        max_length=lm.max_length,
        pad_id=lm.pad_id,
        bos_id=lm.bos_id,
        end_id=end_id,
        context_end_ids=lm.text_format.context_end_ids,
        target_start_ids=lm.text_format.target_start_ids,
    )


def training_prompts(config: PromptConfig, lm: LanguageModel) -> PromptBuilder:
    """Returns the prompt builder of training, whose targets end where generation stops."""
    return make_prompts(config, lm, end_id=answer_end_id(lm))


def _size(params: Any) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return f"{count / 1e6:.0f} M parameters"


def answer_end_id(lm: LanguageModel) -> int | None:
    """Returns the token that ends trained targets, else a newline, if that is one token."""
    if (end_id := lm.text_format.target_end_id) is not None:
        return end_id
    ids = lm.tokenizer.encode("\n", add_special_tokens=False).ids
    return ids[0] if len(ids) == 1 else None


def tower_params(workspace: Workspace) -> dict[str, Any]:
    """Returns the base towers by name: one `shared` tower, or `query` and `doc` apart."""
    return dict.fromkeys(workspace.config.retriever.tower_names, workspace.encoder.params)


def query_ids(encoder: TextEncoder, questions: Sequence[Question]) -> list[list[int]]:
    """Returns the encoder's token ids of questions, with its query prefix."""
    texts = [encoder.query_prefix + question.text for question in questions]
    return encode_texts(encoder.tokenizer, texts, max_length=encoder.max_length).ids


def truncated(ids: list[int], length: int) -> list[int]:
    """Returns the first token ids and the last one: an encoder expects its closing [SEP]."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def buckets(encoder: TextEncoder) -> tuple[int, ...]:
    """Returns the lengths, in tokens, that inputs of the encoder are padded to."""
    return buckets_up_to(encoder.max_length, EncodeOptions().buckets)


def bucket_of(encoder: TextEncoder, length: int) -> int:
    """Returns the length that a batch of the encoder is padded to."""
    return next(bucket for bucket in buckets(encoder) if bucket >= length)


def pad_tokens(encoder: TextEncoder, ids: Sequence[Sequence[int]], length: int) -> Tokens:
    """Returns token ids padded to one length, as the encoder takes them."""
    padded = pad_right(ids, length=length, pad_id=encoder.pad_id)
    return Tokens(jnp.asarray(padded.ids), jnp.asarray(padded.mask))
