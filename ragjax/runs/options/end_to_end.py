"""Options of end-to-end training."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ragjax.runs.options.checks import Options, at_least, check_accumulate, positive
from ragjax.runs.options.modes import AUTO
from ragjax.runs.options.refresh import RefreshConfig, check_freshness, check_used
from ragjax.runs.options.shared import (
    EvaluationConfig,
    LearningConfig,
    RunConfig,
    StepsConfig,
    TowersConfig,
)
from ragjax.runs.options.teachers import LsrTarget

# Scores of a document that depend on the others.
OF_ALL_DOCUMENTS = ("attention", "leave_one_out")


@dataclass(frozen=True, kw_only=True)
class ReaderConfig(LearningConfig):
    """How the language model reads documents, and how it is trained.

    Attributes:
        reader: `separate` reads each document alone and gives p_LM(y|c∘x) of each; `fusion`
            (Fusion-in-Decoder, T5 and BART) reads all documents of a question at once.
        train: Train the language model.
        train_layers: Layers trained, from the top; 0 means all, with the embeddings.
    """

    reader: Literal["separate", "fusion"] = "separate"
    train: bool = True
    learning_rate: float = 3e-4
    train_layers: int = 10


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Options):
    """The loss: a weighted sum of terms, each in nats per question.

    Attributes:
        marginal: -log p(y|x) over the retrieved documents: `sequence` Σ_c p_R(c) Π_t p_LM(y_t|c∘x)
            (RAG-Sequence), `token` Π_t Σ_c p_R(c) p_LM(y_t|c∘x) (RAG-Token, REALM), `emdr2` the
            token form with a stop gradient on the language model, which `lm_weight` then trains.
            `gumbel` and `reinforce` take in its place the expected score Σ_c p_R(c) score(c), by
            `samples` documents that are drawn: with Gumbel top-k, straight through (Stochastic
            RAG), or by REINFORCE with a leave-one-out baseline, which teaches the retriever alone.
        marginal_weight: Weight of that term; 0 turns it off.
        samples: Documents that `gumbel` draws for a question without, `reinforce` with replacement.
        negatives: `batch` adds the documents of the batch's other questions to the softmax of p_R,
            in the marginal and the LSR term, with likelihood 0; `none` compares a question's own
            documents only, as the papers do.
        lm_weight: Weight of the mean over documents of -log p_LM(y|c∘x); with `fusion`, of
            -log p_LM(y|x, all documents).
        lsr_weight: Weight of the divergence between p_LSR and p_R.
        direction: Of that divergence, named as `adapt.py` does: `pdist` is KL(p_LSR||p_R), `lsr` is
            KL(p_R||p_LSR).
        score: What p_LSR compares: `prob` p(y|c∘x), `log_prob`, either per token; `attention`, the
            attention of the decoder on each document (`fusion` only); `leave_one_out`, the answer's
            log-probability per token that is lost without the document (LOOP; `fusion` reads the
            others again for each).
        temperature: τ of p_LSR = softmax(score/τ), in units of the score.
        contrastive_weight: Weight of the contrastive term on the labels (DPR), over all documents
            of the batch; a labelled document that was not retrieved joins the batch.
    """

    marginal: Literal["sequence", "token", "emdr2", "gumbel", "reinforce"] = "sequence"
    marginal_weight: float = 1.0
    samples: int = 4
    negatives: Literal["batch", "none"] = "batch"
    lm_weight: float = 0.0
    lsr_weight: float = 0.0
    direction: Literal["pdist", "lsr"] = "pdist"
    score: Literal[
        "prob", "prob_per_token", "log_prob", "log_prob_per_token", "attention", "leave_one_out"
    ] = "log_prob_per_token"
    temperature: float = 0.3
    contrastive_weight: float = 0.0

    @property
    def target(self) -> LsrTarget:
        """Options of p_LSR over single documents; some scores are of all documents at once."""
        score = "log_prob_per_token" if self.score in OF_ALL_DOCUMENTS else self.score
        return LsrTarget(score, self.temperature)

    @property
    def draws(self) -> bool:
        """Whether documents are drawn in place of summing over them."""
        return self.marginal in ("gumbel", "reinforce") and self.marginal_weight > 0

    @property
    def marginal_trains_lm(self) -> bool:
        """Whether the marginal term has a gradient to the language model."""
        return self.marginal not in ("emdr2", "reinforce") and self.marginal_weight > 0

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().check()
        at_least(self, 0, "marginal_weight", "lm_weight", "lsr_weight", "contrastive_weight")
        positive(self, "temperature")
        if not (
            self.marginal_weight or self.lm_weight or self.lsr_weight or self.contrastive_weight
        ):
            raise ValueError("all weights are 0, so nothing is trained; set one of them above 0")
        at_least(self, 2 if self.marginal == "reinforce" else 1, "samples")
        if self.draws and self.score in OF_ALL_DOCUMENTS:
            raise ValueError(
                f"marginal={self.marginal} draws single documents, and score={self.score} is of all"
                " of them; use --objective.score log_prob_per_token"
            )
        if self.negatives == "none":
            return
        if self.lsr_weight and self.direction == "lsr":
            raise ValueError(
                "direction=lsr is KL(p_R||p_LSR), infinite where p_LSR is 0, so it cannot take the"
                " batch's other documents as negatives; add --objective.negatives none"
            )
        if self.draws:
            raise ValueError(
                f"marginal={self.marginal} is an expected score, which the batch's other documents"
                " do not have; add --objective.negatives none"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(StepsConfig):
    """Steps, batches and retrieval of end-to-end training.

    Attributes:
        documents: K, documents retrieved and read for each question.
        null_document: Add an empty document, the (K+1)th, to every question: answering without
            retrieval competes with the retrieved documents (REALM).
        candidates: Retrieve by `hybrid`, BM25 and the live query encoder together, or by the live
            query encoder alone (`dense`); p_R is of the encoders in both cases.
        same_source: `drop` leaves out the documents that a question was made from: those whose id
            or title is the question's `metadata.doc`. They are no negatives of it either.
        statements: Statements to reconstruct from retrieved passages, trained on beside the
            questions: a file with one a line, or how many sentences to draw from the corpus, which
            `same_source drop` then keeps from finding their own passage; "" for none.
        overlap: Retrieve for step n+1 while step n runs, with the query encoder of step n; `False`
            waits for that step first.
        retrieval: Where a step retrieves: on the `host`, before it; or in the step itself, whose
            one compiled program calls back to the host for the documents of its own query
            embeddings (`callback`). The same documents where `overlap` is False.
        accumulate: Microbatches in which a step takes its questions.
        clip_norm: Largest gradient norm, of all models together.
    """

    documents: int = 4
    null_document: bool = False
    candidates: Literal["hybrid", "dense"] = "hybrid"
    same_source: Literal["keep", "drop"] = "keep"
    statements: str = ""
    overlap: bool = True
    retrieval: Annotated[Literal["host", "callback"], tyro.conf.arg(aliases=("--retrieval",))] = (
        "host"
    )
    accumulate: int = 1

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().check()
        at_least(self, 1, "documents", "accumulate")
        check_accumulate(self.batch_size, self.accumulate)


@dataclass(frozen=True, kw_only=True)
class RagConfig(RunConfig):
    """End-to-end training of both models through the marginal likelihood.

    Attributes:
        output: Output folder; the same command resumes an interrupted run.
        objective: The loss.
        training: Steps, batches and retrieval.
        language_model: How the language model reads documents, and how it is trained.
        retriever: Which encoders are trained, and how.
        refresh: How the index is kept up to date while the encoders train.
        evaluation: How the systems are compared.
    """

    output: str = "runs/rag"
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    language_model: ReaderConfig = field(default_factory=ReaderConfig)
    retriever: TowersConfig = field(default_factory=TowersConfig)
    refresh: RefreshConfig = field(default_factory=lambda: RefreshConfig(mode="async"))
    evaluation: EvaluationConfig = field(
        default_factory=lambda: EvaluationConfig(documents=4, mode=AUTO, answers="all")
    )

    program = "train_rag"

    @property
    def mode(self) -> str:
        """How several documents make one answer: as the language model was trained to read them."""
        if self.evaluation.mode != AUTO:
            return self.evaluation.mode
        return "fusion" if self.language_model.reader == "fusion" else "ensemble"

    @property
    def fuses_null(self) -> bool:
        """Whether an empty document is among those that the decoder attends to at once."""
        return self.training.null_document and self.language_model.reader == "fusion"

    @property
    def trains_lm(self) -> bool:
        """Whether the language model is trained."""
        return self.language_model.train

    @property
    def trains_retriever(self) -> bool:
        """Whether an encoder of the retriever is trained."""
        return self.retriever.train != "none"

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range, or the fields at odds."""
        super().check()
        if self.refresh.mode == "off":
            raise ValueError(
                "refresh.mode off: every step retrieves, so there is an index; the one of the start"
                " is used throughout with --refresh.mode frozen"
            )
        if self.training.retrieval == "callback" and self.refresh.mode == "rerank":
            raise ValueError(
                "refresh.mode rerank encodes documents with the live encoder for each search, which"
                " a compiled step cannot call back for; use --retrieval host"
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
                "objective.score=attention is of a decoder that reads all documents at once; add"
                " --language_model.reader fusion"
            )
        documents = self.training.documents + self.training.null_document
        if objective.draws and objective.marginal == "gumbel" and objective.samples > documents:
            raise ValueError(
                f"objective.samples={objective.samples}: gumbel draws without replacement, of"
                f" {documents} documents; lower it, or raise --training.documents"
            )
        if model.reader == "fusion" and objective.marginal != "emdr2" and objective.marginal_weight:
            raise ValueError(
                f"objective.marginal={objective.marginal}: a fusion reader gives no likelihood of"
                " each document; use --objective.marginal emdr2, or"
                " --objective.marginal_weight 0 with --objective.lm_weight 1"
                " --objective.lsr_weight 1 --objective.score attention"
            )
        if model.train and not (objective.lm_weight or objective.marginal_trains_lm):
            raise ValueError(
                "nothing trains the language model: with marginal=emdr2 or reinforce, or without"
                " the marginal term, only --objective.lm_weight does; set it above 0, or add"
                " --language_model.no_train"
            )
        if not model.train and objective.lm_weight:
            raise ValueError(
                f"objective.lm_weight={objective.lm_weight:g} trains the language model, which"
                " language_model.train False leaves as it is; leave one of them out"
            )
        if not model.train and self.retriever.train == "none":
            raise ValueError("neither the language model nor the retriever is trained")
        teaches = objective.marginal_weight or objective.lsr_weight or objective.contrastive_weight
        if self.retriever.train != "none" and not teaches:
            raise ValueError(
                "nothing trains the retriever: lm_weight trains the language model only; set"
                " another weight above 0, or add --retriever.train none --refresh.mode frozen"
            )

    def _check_accumulate(self) -> None:
        objective = self.objective
        if self.training.accumulate == 1:
            return
        if objective.contrastive_weight or objective.negatives == "batch":
            raise ValueError(
                f"training.accumulate={self.training.accumulate} splits a step, but all its"
                " questions share the batch's negatives; add --objective.negatives none"
                " --objective.contrastive_weight 0, or use --language_model.remat"
            )
