"""Options of an end-to-end run: both models trained through the marginal likelihood."""

from dataclasses import dataclass, field
from typing import Literal

from ragjax.runs.options.checks import at_least, check_accumulate, fraction, positive
from ragjax.runs.options.refresh import RefreshConfig, check_freshness, check_used
from ragjax.runs.options.shared import (
    EvaluationConfig,
    LearningConfig,
    LsrTarget,
    RunConfig,
    TowersConfig,
)

PROGRAM = "train_rag"
"""What the `config.json` of an end-to-end run says that it is of."""


@dataclass(frozen=True, kw_only=True)
class ReaderConfig(LearningConfig):
    """How the language model reads and learns.

    Attributes:
      reader: `separate` reads each document alone and gives p_LM(y|c∘x) of each; `fusion`
        (Fusion-in-Decoder, T5 and BART) reads all of a question's documents at once.
      train: Whether the language model learns.
      train_layers: Layers trained, from the top; 0 means all, with the embeddings.
    """

    reader: Literal["separate", "fusion"] = "separate"
    train: bool = True
    learning_rate: float = 3e-4
    train_layers: int = 10


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised: a weighted sum of terms, each in nats per question.

    Attributes:
      marginal: -log p(y|x) over the retrieved documents: `sequence` Σ_c p_R(c) Π_t p_LM(y_t|c∘x)
        (RAG-Sequence), `token` Π_t Σ_c p_R(c) p_LM(y_t|c∘x) (RAG-Token, REALM), `emdr2` the token
        form with the language model held constant; that then learns from `lm_weight`.
      marginal_weight: Weight of that term; 0 turns it off.
      negatives: `batch` lets p_R of the marginal and of the LSR term compare a question's documents
        with those of the batch's other questions as well, which explain nothing: it keeps the rest
        of the embedding space in place. `none` compares its own documents only, as the papers do.
      lm_weight: Weight of the mean over documents of -log p_LM(y|c∘x) (dual training's LM half); of
        -log p_LM(y|x, all documents) with `fusion`.
      lsr_weight: Weight of KL(p_LSR||p_R), the retriever half of dual training.
      score: What p_LSR compares: `prob` p(y|c∘x), `log_prob`, either per token, or `attention`, how
        much the decoder attends to each document (`fusion` only).
      temperature: τ of p_LSR = softmax(score/τ), in units of the score.
      contrastive_weight: Weight of the contrastive term on the relevance judgements (DPR), over all
        documents of the batch; the judged document joins the batch where it was not retrieved.
    """

    marginal: Literal["sequence", "token", "emdr2"] = "sequence"
    marginal_weight: float = 1.0
    negatives: Literal["batch", "none"] = "batch"
    lm_weight: float = 0.0
    lsr_weight: float = 0.0
    score: Literal["prob", "prob_per_token", "log_prob", "log_prob_per_token", "attention"] = (
        "log_prob_per_token"
    )
    temperature: float = 0.3
    contrastive_weight: float = 0.0

    @property
    def target(self) -> LsrTarget:
        """Options of p_LSR over single documents; attention is of all documents at once."""
        score = "log_prob_per_token" if self.score == "attention" else self.score
        return LsrTarget(score, self.temperature)

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range."""
        at_least(self, 0, "marginal_weight", "lm_weight", "lsr_weight", "contrastive_weight")
        positive(self, "temperature")
        if not (
            self.marginal_weight or self.lm_weight or self.lsr_weight or self.contrastive_weight
        ):
            raise ValueError("all weights are 0: nothing is learnt; set one of them above 0")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Steps, batches and what a step retrieves.

    Attributes:
      documents: K, documents retrieved and read for each question.
      null_document: Adds an empty document, the (K+1)th, to every question: what the language model
        knows by itself competes with what was retrieved (REALM).
      candidates: Documents are found by `hybrid`, BM25 and the live query encoder together, or by
        the live query encoder alone (`dense`); p_R is of the encoders in both cases.
      same_source: `drop` leaves out the documents that a question was made from, for questions that
        were made from the corpus: those whose id or title is the question's `metadata.doc`. They
        are not negatives of it either.
      overlap: Retrieve for step n+1 while step n runs, with the query encoder of step n; `False`
        waits for that step first.
      epochs: Passes over the questions.
      batch_size: Questions per step.
      accumulate: Parts in which the questions of a step are taken, one after the other.
      devices: Local devices that share each step's questions; 0: all that are there (less those of
        `refresh.devices`), as far as they divide `batch_size`.
      warmup_fraction: Share of the steps spent warming up, 0 to 1.
      weight_decay: Decoupled weight decay.
      clip_norm: Largest gradient norm, of all models together.
    """

    documents: int = 4
    null_document: bool = False
    candidates: Literal["hybrid", "dense"] = "hybrid"
    same_source: Literal["keep", "drop"] = "keep"
    overlap: bool = True
    epochs: int = 1
    batch_size: int = 8
    accumulate: int = 1
    devices: int = 0
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range."""
        at_least(self, 1, "documents", "epochs", "batch_size", "accumulate")
        at_least(self, 0, "devices", "weight_decay")
        positive(self, "clip_norm")
        fraction(self, "warmup_fraction")
        check_accumulate(self.batch_size, self.accumulate)
        if self.devices and self.batch_size % self.devices:
            raise ValueError(
                f"devices={self.devices} does not divide batch_size={self.batch_size}; each device"
                " takes an equal part of the questions"
            )


@dataclass(frozen=True, kw_only=True)
class RagConfig(RunConfig):
    """Train a retriever and a language model end to end through the marginal likelihood.

    Attributes:
      output: Folder of this run; the same command continues a run that was cut.
      objective: What is minimised.
      training: Steps, batches and what a step retrieves.
      language_model: How the language model reads and learns.
      retriever: Which encoders of the retriever learn.
      refresh: How fresh the index is that a step retrieves from.
      evaluation: How the systems are compared.
    """

    output: str = "runs/rag"
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    language_model: ReaderConfig = field(default_factory=ReaderConfig)
    retriever: TowersConfig = field(default_factory=TowersConfig)
    refresh: RefreshConfig = field(default_factory=lambda: RefreshConfig(mode="async"))
    evaluation: EvaluationConfig = field(
        default_factory=lambda: EvaluationConfig(documents=4, mode="ensemble")
    )

    @property
    def trains_lm(self) -> bool:
        """Whether the language model is trained."""
        return self.language_model.train

    @property
    def trains_retriever(self) -> bool:
        """Whether an encoder of the retriever is trained."""
        return self.retriever.train != "none"

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range, or the fields at odds."""
        super().__post_init__()
        if self.refresh.mode == "off":
            raise ValueError(
                "refresh.mode off: every step retrieves, so there is an index; the one of the start"
                " serves throughout with --refresh.mode frozen"
            )
        check_used(self.refresh)
        check_freshness(
            self.refresh.mode,
            train=self.retriever.train,
            doc_learning_rate=self.retriever.doc_learning_rate,
        )
        self._check_objective()
        self._check_accumulate()

    def _check_objective(self) -> None:
        objective, model = self.objective, self.language_model
        if objective.score == "attention" and model.reader != "fusion":
            raise ValueError(
                "score=attention is of a decoder that sees all documents at once; add"
                " --language_model.reader fusion"
            )
        if model.reader == "fusion" and objective.marginal != "emdr2" and objective.marginal_weight:
            raise ValueError(
                f"marginal={objective.marginal}: a fusion reader gives no likelihood of each"
                " document to learn from; use --objective.marginal emdr2, or"
                " --objective.marginal_weight 0 with --objective.lm_weight 1"
                " --objective.lsr_weight 1 --objective.score attention"
            )
        learns = objective.lm_weight or (
            objective.marginal_weight and objective.marginal != "emdr2"
        )
        if model.train and not learns:
            raise ValueError(
                "nothing trains the language model: with marginal=emdr2, or without the marginal"
                " term, it learns from --objective.lm_weight; set it above 0, or add"
                " --language_model.no-train"
            )
        if not model.train and objective.lm_weight:
            raise ValueError(
                f"lm_weight={objective.lm_weight:g} trains the language model, which"
                " language_model.train False leaves as it is; leave one of them out"
            )
        if not model.train and self.retriever.train == "none":
            raise ValueError("neither the language model nor the retriever is trained")
        teaches = objective.marginal_weight or objective.lsr_weight or objective.contrastive_weight
        if self.retriever.train != "none" and not teaches:
            raise ValueError(
                "nothing trains the retriever: lm_weight teaches the language model only; set"
                " another weight above 0, or add --retriever.train none --refresh.mode frozen"
            )

    def _check_accumulate(self) -> None:
        objective = self.objective
        if self.training.accumulate == 1:
            return
        if objective.contrastive_weight or objective.negatives == "batch":
            raise ValueError(
                f"accumulate={self.training.accumulate} takes the questions apart, but they meet in"
                " the batch's negatives; add --objective.negatives none"
                " --objective.contrastive_weight 0, or use --language_model.remat"
            )
