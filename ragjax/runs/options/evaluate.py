"""Options of an evaluation, of a finished run or of base models."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from ragjax.evaluation.support import CONTAINMENT_THRESHOLD
from ragjax.evaluation.systems import SYSTEMS
from ragjax.index.milvus_client import Address
from ragjax.runs.options.checks import Options, at_least
from ragjax.runs.options.files import to_dict
from ragjax.runs.options.modes import MODES, ModeName
from ragjax.runs.options.shared import OF_MACHINE, RunConfig
from ragjax.runs.options.tracking import tracker_names

# Systems of base models alone, then what a run adds, then what an adapted language model does
# without the adapted retriever and the other way round.
BASE_SYSTEMS, _HALF_SYSTEMS, _RUN_SYSTEMS = (
    tuple(name for name, kind in SYSTEMS.items() if kind.num_adapted == count) for count in range(3)
)
# What a run decides.
_OF_RUN = ("encoder", "query_encoder", "doc_encoder", "query_prefix", "doc_prefix", "lm")
_OF_RUN += ("template", "chat")
SystemName = Literal[(*BASE_SYSTEMS, *_RUN_SYSTEMS, *_HALF_SYSTEMS)]  # pyrefly: ignore  (names of a table)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Options):
    """Compare systems on one split: retrieval, answers, confidence, support, robustness.

    Attributes:
        run: Folder of a finished run of experiments/adapt.py or experiments/train_rag.py; empty:
            base models.
        data: BEIR folder; empty: that of the run, or the API documentation of the installed Python
            packages.
        queries: Questions of another place or kind than `queries.jsonl` in `data`, as for a run;
            empty: those in `data`, or as the run where `data` is empty, too.
        qrels: Relevance judgements of another place than `qrels` in `data`; empty: likewise.
        fields: Names of the fields in the files where they differ from BEIR's, for example
            `id=docid,text=contents`; empty: as the run.
        on_bad_row: What to do with a line that cannot be read: `stop`, or `skip` it; None: as the
            run, else `stop`.
        on_unknown: What to do where more than 1 % of a qrels file name unknown ids: `stop`, or
            `skip` those rows; None: as the run, else `stop`.
        language: Language of the passages, for BM25: `auto`, `none` or a name that Snowball has;
            empty: as the run, else `auto`.
        encoder: Text encoder: folder, hub id, or `pip:NAME==VERSION`; not with `run`.
        query_encoder: Encoder of queries, where it is another model; empty: `encoder`.
        doc_encoder: Encoder of documents; empty: `encoder`.
        query_prefix: Text that the encoder reads before each query ("" for none); None: what its
            files say; not with `run`.
        doc_prefix: Text that the encoder reads before each document ("" for none); None: what its
            files say; not with `run`.
        lm: Language model: folder, .gguf file, hub id, or `pip:NAME==VERSION`; not with `run`.
        template: What the language model reads, as text or as the name of a file, as in
            `--prompt.template` of a run; not with `run`.
        chat: Whether that is put into the chat template of an instruct model: `on`, `off`, or
            `auto`, where the right answers to a few dev questions are likelier in it; None: as the
            run, else `auto`; not with `run`.
        output: Output folder; the same command resumes an interrupted evaluation.
        split: Questions to evaluate on: `test`, `dev`, `train` or another that the data have.
        systems: Systems to compare (default: all available).
        documents: Documents read for an answer; None: as the run, else 3.
        mode: How several are read: `concat` one after the other in one prompt; `ensemble` and
            `rag_token` each alone, mixing the next-token distributions by p_R; `rag_sequence_fast`
            and `rag_sequence_thorough` each alone, weighing whole answers; `fusion` (T5 and BART)
            all at once, encoded apart (Fusion-in-Decoder). None: as the run, else concat.
        beams: Width of the beam, for the `rag_` modes; None: as the run, else 1.
        max_new_tokens: Tokens generated at most; None: as the run, else 24.
        document_tokens: Tokens kept of each document; None: as the run, else 140.
        index: Where the dense index that the run ships was published, `milvus:URI/ALIAS`, or that
            of base models; empty: it is searched in this process, as the others are.
        rerank: What ranks the best documents again, in a system of its own: `question`, the
            language model by the likelihood of the question after each; a cross-encoder, by folder
            or hub id; or `none`. None: as the run, else `none`.
        rerank_depth: Documents of a question that are ranked again; None: as the run, else 10.
        max_questions: At most this many questions of the split (the first of a seeded shuffle); 0:
            all.
        answer_questions: At most this many of them are also answered.
        seed: Of the order of the questions and of the bootstrap; None: as the run, else 0.
        resamples: Bootstrap resamples behind each 95 % interval.
        bins: Bins of equal mass for calibration.
        support_threshold: Share of the content words of a long answer that a passage must hold to
            support it.
        robustness: Also answer from the relevant passages alone, with distractors before and behind
            them, and from distractors alone.
        distractors: Irrelevant retrieved passages in those prompts.
        devices: Devices that compute, in every stage; 0: all of them.
        fsdp: Devices that have an equal part of each parameter; 0: as few as have room for both
            models, where that is known.
        distributed: `auto`: this process evaluates with others, as in a run.
        encode_tokens: Tokens in a batch of the encoder on each device; None: as the run, else as
            suits the device.
        score_tokens: Tokens in a batch of the language model on each device; None: likewise.
        log_to: Where options and results go, too: some of `tensorboard`, `wandb` and `trackio`,
            separated by commas.
    """

    run: str = ""
    data: str = ""
    queries: Annotated[str, tyro.conf.arg(aliases=("--questions",))] = ""
    qrels: str = ""
    fields: str = ""
    on_bad_row: Literal["stop", "skip"] | None = None
    on_unknown: Literal["stop", "skip"] | None = None
    language: str = ""
    encoder: str = ""
    query_encoder: str = ""
    doc_encoder: str = ""
    query_prefix: str | None = None
    doc_prefix: str | None = None
    lm: str = ""
    template: str = ""
    chat: Literal["auto", "on", "off"] | None = None
    output: str = "runs/evaluate"
    split: str = "test"
    systems: tuple[SystemName, ...] = ()
    documents: int | None = None
    mode: ModeName | None = None
    beams: int | None = None
    max_new_tokens: int | None = None
    document_tokens: int | None = None
    index: str = ""
    rerank: str | None = None
    rerank_depth: int | None = None
    max_questions: int = 0
    answer_questions: int = 100
    seed: int | None = None
    resamples: int = 2000
    bins: int = 10
    support_threshold: float = CONTAINMENT_THRESHOLD
    robustness: bool = True
    distractors: int = 2
    devices: int = 0
    fsdp: int = 0
    distributed: Literal["off", "auto"] = "off"
    encode_tokens: int | None = None
    score_tokens: int | None = None
    log_to: str = ""

    kind: ClassVar[str] = "evaluation"
    # In config.json, so that nobody takes an evaluation for a run.
    program: ClassVar[str] = "experiments/evaluate.py"

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range, or the fields at odds."""
        super().check()
        at_least(self, 1, "answer_questions", "resamples", "bins", "distractors")
        at_least(self, 1, "documents", "beams", "max_new_tokens", "document_tokens")
        at_least(self, 1, "encode_tokens", "score_tokens", "rerank_depth")
        at_least(self, 0, "max_questions", "devices", "fsdp")
        tracker_names(self.log_to)
        if self.index:
            Address.parse(self.index)
        if not self.output:
            raise ValueError("output must name a folder")
        if not 0 < self.support_threshold <= 1:
            raise ValueError(
                f"support_threshold must lie in (0, 1], got {self.support_threshold:g}"
            )
        if len(set(self.systems)) != len(self.systems):
            raise ValueError(f"systems names a system twice: {' '.join(self.systems)}")
        for name in _OF_RUN:
            default = EvaluateConfig.__dataclass_fields__[name].default
            if self.run and getattr(self, name) != default:
                raise ValueError(
                    f"--{name} {getattr(self, name)}: --run {self.run} says which models it"
                    " adapted, and what they read; leave one of them out"
                )
        there = {*BASE_SYSTEMS, *(["reranked"] if self.rerank != "none" else [])}
        if not self.run and (adapted := set(self.systems) - there):
            raise ValueError(
                f"--systems {' '.join(sorted(adapted))}: there are no adapted models; add --run"
                f" FOLDER, or choose among {' '.join(BASE_SYSTEMS)}"
            )
        if not self.run:
            # These values become options of a run, which check the rest; where there is a run they
            # are checked with its own.
            run_options(self, None)

    def fingerprint(self, run: RunConfig | None) -> str:
        """Returns a digest of everything that decides the result (not where it is written).

        Args:
            run: Options of the run; None: base models.
        """
        values = {k: v for k, v in to_dict(self).items() if k not in ("output", "run", *OF_MACHINE)}
        trained = [to_dict(run)] if run else None
        text = json.dumps([values, trained, self.run and str(Path(self.run).resolve())])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_options(config: EvaluateConfig, run: RunConfig | None) -> RunConfig:
    """Returns the options of the run with those of the evaluation in their place.

    Args:
        config: Options of the evaluation.
        run: Options of the run; None: base models.

    Raises:
        ValueError: The two do not go together; the message names the field.
    """
    base = run or RunConfig()
    given = {
        option.name: value
        for option in dataclasses.fields(config)
        if (value := getattr(config, option.name)) not in (None, "")
    }

    def chosen(*names: str) -> dict[str, Any]:
        return {name: given[name] for name in names if name in given}

    changes = chosen("query_encoder", "doc_encoder")
    changes |= chosen("data", "encoder", "lm", "output", "seed", "encode_tokens", "score_tokens")
    changes |= {"devices": config.devices, "fsdp": config.fsdp}
    changes |= {
        name: prefix
        for name in ("query_prefix", "doc_prefix")
        if (prefix := getattr(config, name)) is not None  # "" is one: none at all
    }
    # Other documents have other questions.
    names = ("queries", "qrels")
    changes |= {name: getattr(config, name) for name in names} if config.data else chosen(*names)
    if run is not None and not (base.data or config.data):
        # Written by the run: the packages may be others today.
        written = Path(config.run) / "data" / "python-docs"
        if written.is_dir() or not (base.queries or config.queries):
            changes["data"] = str(written)
    evaluation = chosen("documents", "mode", "beams", "max_new_tokens", "resamples")
    if config.mode is not None and not MODES[config.mode].beams:
        evaluation.setdefault("beams", 1)  # of a run that kept more
    questions = chosen("answer_questions", "fields", "on_bad_row", "on_unknown", "language")
    questions["test_questions"] = config.max_questions
    return dataclasses.replace(
        base,
        **changes,
        prompt=dataclasses.replace(base.prompt, **chosen("document_tokens", "template", "chat")),
        data_options=dataclasses.replace(base.data_options, **questions),
        evaluation=dataclasses.replace(base.evaluation, **evaluation),
    )


def system_names(
    config: EvaluateConfig, *, adapts_lm: bool, reranks: bool = False
) -> tuple[str, ...]:
    """Returns the systems that are compared.

    Args:
        config: Options.
        adapts_lm: Whether there is an adapted language model beside the one it came from.
        reranks: Whether the best documents are ranked again.

    Raises:
        ValueError: A system was chosen that needs one of these, and there is none.
    """
    halves = _HALF_SYSTEMS if adapts_lm else ()
    there = BASE_SYSTEMS + (_RUN_SYSTEMS + halves if config.run else ("reranked",))
    if not reranks:
        there = tuple(name for name in there if name != "reranked")
        if "reranked" in config.systems:
            raise ValueError(
                "--systems reranked: nothing ranks the documents again; add --rerank question, or a"
                " cross-encoder"
            )
    if missing := [name for name in config.systems if name not in there]:
        raise ValueError(
            f"--systems {' '.join(missing)}: {config.run} did not adapt the language model, so it"
            f" is the same as another; choose among {' '.join(there)}"
        )
    return tuple(name for name in there if not config.systems or name in config.systems)
