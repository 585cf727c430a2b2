"""Options of a run: frozen dataclasses that check themselves."""

from dataclasses import dataclass, field
from typing import Literal

from ragjax.runs.options.checks import at_least, check_accumulate, fraction, positive
from ragjax.runs.options.refresh import check_freshness, check_used
from ragjax.runs.options.shared import LearningConfig, LsrTarget, RunConfig, TowersConfig

Stage = Literal["lm", "retriever"]


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

    @property
    def target(self) -> LsrTarget:
        """Options of p_LSR."""
        return LsrTarget(self.score, self.temperature, self.prior_weight)

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

    @property
    def trains_lm(self) -> bool:
        """Whether the language model is trained."""
        return "lm" in self.stages

    @property
    def trains_retriever(self) -> bool:
        """Whether an encoder of the retriever is trained."""
        return "retriever" in self.stages

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
