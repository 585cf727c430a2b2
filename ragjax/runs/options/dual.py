"""Options of dual training."""

from dataclasses import dataclass, field
from typing import Literal

from ragjax.runs.options.checks import at_least, check_accumulate, fraction, positive
from ragjax.runs.options.questions import QuestionsConfig
from ragjax.runs.options.refresh import check_freshness, check_used
from ragjax.runs.options.shared import (
    LearningConfig,
    RunConfig,
    StepsConfig,
    TowersConfig,
)
from ragjax.runs.options.teachers import (
    AUTO_TEACHERS,
    LsrTarget,
    TeacherWeights,
    parse_teachers,
)

Stage = Literal["lm", "retriever"]

# Of a round that learns keyword queries.
_FEWEST_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class LMConfig(LearningConfig, StepsConfig):
    """Language-model stage: fine-tuning on retrieved documents.

    Attributes:
        questions: At most this many training questions.
        read: `together` puts the best documents of a question, useful or not, into one prompt, 1 to
            `documents` of them in random order; `apart` makes each a prompt of its own, as in
            RA-DIT.
        documents: Documents per question, at most.
        distractors: Share of the prompts that hold nothing useful, half of them only documents
            known to be of no use, half no document at all, so that such documents do no harm.
        question_weight: Weight of -log p(x|c) beside -log p(y|c∘x), where the one document of a
            prompt is useful: such a model also writes questions and ranks documents by them. 0:
            answers only. Questions without answers are learnt in any case.
        epochs: Passes over the prompts.
        batch_size: Prompts per step; of a causal decoder, on average: a row holds as many as fit.
        accumulate: Microbatches in which a step takes its rows; the gradients are the same, the
            memory that of one microbatch. Must divide `batch_size`.
    """

    questions: int = 96
    read: Literal["together", "apart"] = "together"
    documents: int = 3
    distractors: float = 0.2
    question_weight: float = 0.5
    accumulate: int = 1
    learning_rate: float = 3e-4
    train_layers: int = 10

    @property
    def searched(self) -> int:
        """Documents that are retrieved for a question: those without use are among them."""
        return self.documents if self.read == "apart" else 4 * self.documents

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().check()
        at_least(self, 1, "questions", "documents", "accumulate")
        at_least(self, 0, "question_weight")
        fraction(self, "distractors")
        check_accumulate(self.batch_size, self.accumulate)


@dataclass(frozen=True, kw_only=True)
class RetrieverConfig(TowersConfig, StepsConfig):
    """Retriever stage: training on the scores of the language model (LSR) or on labels (DPR).

    Attributes:
        objective: `pdist` is KL(p_LSR||p_R), `lsr` is KL(p_R||p_LSR); `dpr` is contrastive, with
            the relevant documents (judged, or else the few that hold an answer) as positives and
            retrieved ones as hard negatives: it needs no language model.
        teachers: What the target is made of, p_LSR = softmax(g/τ) with g a weighted sum of:
            `answer`, the language model's log p(y|c∘x) of the answer; `question`, its log p(x|c)
            of the question, which needs no answer; both in nats per token; `prior`, the scores of
            the retrieval that found the candidates, `file`, those of `scores_file`, and `reranker`,
            those of a cross-encoder, all z-scored over the candidates. Names with weights, such as
            `answer=1 question=1 prior=0.3`. `auto` chooses weights on the training questions, by
            which of their candidates count as found, see `ragjax.runs.teachers.choice`; with a file
            or a cross-encoder it takes that and the prior.
        known_share: Share of the target of a question that its relevant passages have (judged, or
            else the few that hold an answer), where they are known; the teachers have the rest. 0:
            the teachers alone, as in the papers.
        teaching_lm: Language model that teaches: the `adapted` one, where one was made and kept, or
            the `base` one, which has not read the training answers.
        scores_file: JSON lines `{"query-id": ..., "corpus-id": ..., "score": ...}` of any other
            teacher (a judge, an endpoint): the higher, the better.
        reranker: Cross-encoder that teaches: a folder or a hub id.
        score: Form of the answer's score: `prob` p(y|c∘x), `log_prob`, or either per token.
        temperature: τ of p_LSR = softmax(g/τ), in units of g.
        train: Encoders that are trained: `query`, `both` apart, or one `shared` by queries and
            documents.
        negatives: `batch` adds the other questions' candidates to the softmax with target 0; `none`
            compares the question's own candidates only, as the papers do.
        candidates: K, documents per question that the language model scores.
        documents: Of these, the encoder is trained on so many of the highest target in a step; the
            others count only where another question brings them. 0, and with negatives=none: all.
        search: What finds them, and those that the language model is trained on: `hybrid`, BM25
            and the dense index together, or the `dense` one alone, as in the papers.
        keyword_queries: Queries that a step learns beside its questions: each a few of the rarer
            words of a random passage, which is to be found by them (`ragjax.runs.written.pretext`).
            Negative: as many as `batch_size` with objective=pdist and negatives=batch, else 0.
        negative_depth: With `dpr`, hard negatives are drawn from this many of the best documents
            (ANCE: 200). The top few are often unlabelled positives.
        rounds: Times that candidates are retrieved, scored and trained on; the corpus is encoded
            again between rounds.
        lexical: How words are counted in the BM25 beside the trained encoder: `default`, or as
            `dev` says: k1, b, words stemmed or as written, and passages expanded with the questions
            written from them (doc2query).
        epochs: Passes over the questions in each round; of few questions, so many more that a round
            with keyword queries has 20 steps.
    """

    lexical: Literal["default", "dev"] = "default"
    objective: Literal["pdist", "lsr", "dpr"] = "pdist"
    teachers: tuple[str, ...] = AUTO_TEACHERS
    known_share: float = 0.5
    teaching_lm: Literal["base", "adapted"] = "adapted"
    scores_file: str = ""
    reranker: str = ""
    score: Literal["prob", "prob_per_token", "log_prob", "log_prob_per_token"] = (
        "log_prob_per_token"
    )
    temperature: float = 0.5
    train: Literal["query", "both", "shared"] = "shared"
    negatives: Literal["batch", "none"] = "batch"
    candidates: int = 4
    documents: int = 2
    epochs: int = 2
    batch_size: int = 16
    search: Literal["hybrid", "dense"] = "hybrid"
    keyword_queries: int = -1
    negative_depth: int = 20
    rounds: int = 1

    @property
    def target(self) -> LsrTarget:
        """Form and temperature of p_LSR, of the answer alone."""
        return LsrTarget(self.score, self.temperature)

    @property
    def learnt(self) -> int:
        """Documents of a question that a step encodes."""
        all_of_them = not self.documents or self.negatives == "none" or self.objective == "dpr"
        return self.candidates if all_of_them else min(self.documents, self.candidates)

    @property
    def keywords(self) -> int:
        """Keyword queries of a step."""
        if self.keyword_queries >= 0:
            return self.keyword_queries
        return self.batch_size * (self.objective == "pdist" and self.negatives == "batch")

    @property
    def fewest_steps(self) -> int:
        """Steps of a round: keyword queries are new in each, however few the questions are."""
        return _FEWEST_STEPS if self.keywords else 1

    @property
    def weights(self) -> TeacherWeights | None:
        """Weights of the teachers; None: they are chosen."""
        return parse_teachers(self.teachers)

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range, or the fields at odds."""
        super().check()
        at_least(self, 1, "candidates", "negative_depth", "rounds")
        at_least(self, 0, "documents")
        fraction(self, "known_share")
        positive(self, "temperature")
        self._check_teachers()
        if self.keywords and self.negatives == "none":
            raise ValueError(
                f"keyword_queries={self.keyword_queries} with negatives=none: the passage of such a"
                " query is found among those of the batch; add --retriever.negatives batch, or"
                " leave it out"
            )
        if self.objective == "lsr" and self.negatives == "batch":
            raise ValueError(
                "objective=lsr is KL(p_R||p_LSR), infinite where p_LSR is 0, so it cannot take the"
                " batch's other documents as negatives; add --retriever.negatives none"
            )

    def _check_teachers(self) -> None:
        weights = self.weights
        if weights is None and self.score != "log_prob_per_token":
            raise ValueError(
                f"score={self.score} is in other units than the nats per token that teachers auto"
                " weighs; name the teachers, for example --retriever.teachers answer=1"
            )
        for option, name in (("scores_file", "file"), ("reranker", "reranker")):
            given = getattr(self, option)
            if weights is not None and bool(getattr(weights, name)) != bool(given):
                raise ValueError(
                    f"{option}={given!r} with teachers {' '.join(self.teachers)}: it teaches where"
                    f" teachers names it; give both {option} and {name}=1, or neither"
                )
            if given and self.objective == "dpr":
                raise ValueError(
                    f"{option}={given!r}: objective=dpr learns from what counts as found alone;"
                    " leave it out, or take another objective"
                )


@dataclass(frozen=True, kw_only=True)
class AdaptConfig(RunConfig):
    """Dual training: the language model on retrieved documents, the retriever on its scores.

    Attributes:
        stages: Models that are trained, in this order: one or both.
        score_cache: Teacher scores of an earlier run (its `scores/0.jsonl`), to reuse with other
            options of the retriever; scores of another language model or prompt do not match.
        rerank: What ranks the best documents of what is served again: `question`, the language
            model by the likelihood of the question after each; a cross-encoder, by folder or hub
            id; or `none`. Its weight is chosen on dev, and 0 where it does not help. `auto`:
            `question`, but `none` on a CPU, where it takes seconds a question.
        rerank_depth: Documents of a question that are ranked again.
        questions: Questions that are made from passages.
        language_model: Stage that trains the language model.
        retriever: Stage that trains the retriever.
    """

    stages: tuple[Stage, ...] = ("lm", "retriever")
    score_cache: str = ""
    rerank: str = "auto"
    rerank_depth: int = 10
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    language_model: LMConfig = field(default_factory=LMConfig)
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)

    @property
    def trains_lm(self) -> bool:
        """Whether the language model is trained."""
        return "lm" in self.stages

    @property
    def documents_learnt(self) -> int:
        """Documents that the language model learns to read in one prompt, at most."""
        together = self.trains_lm and self.language_model.read == "together"
        return self.language_model.documents if together else 1

    @property
    def trains_retriever(self) -> bool:
        """Whether an encoder of the retriever is trained."""
        return "retriever" in self.stages

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().check()
        at_least(self, 1, "rerank_depth")
        if not self.rerank:
            raise ValueError("rerank must be auto, none, question or a cross-encoder, got nothing")
        if not self.stages:
            raise ValueError("stages names no model to train; give lm, retriever or both")
        if len(set(self.stages)) != len(self.stages):
            raise ValueError(f"stages names a stage twice: {' '.join(self.stages)}")
        retriever, mode = self.retriever, self.refresh.mode
        if self.score_cache and ("retriever" not in self.stages or retriever.objective == "dpr"):
            raise ValueError(
                "score_cache holds scores for training the retriever on them, which stages"
                f" {' '.join(self.stages)} with retriever.objective {retriever.objective} does not"
                " do; leave it out"
            )
        for name in ("scores_file", "reranker"):
            if (given := getattr(retriever, name)) and "retriever" not in self.stages:
                raise ValueError(
                    f"retriever.{name}={given!r} is for training the retriever, which stages"
                    f" {' '.join(self.stages)} leaves out; add --stages retriever"
                )
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
                f"retriever.rounds={retriever.rounds}: with refresh.mode {mode} candidates are"
                " retrieved at every step, so there is one round; add --retriever.rounds 1"
            )
        check_freshness(mode, train=retriever.train, doc_learning_rate=retriever.doc_learning_rate)
