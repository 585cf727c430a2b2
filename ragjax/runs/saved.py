"""What a finished run left in its folder: its options, its results and its models."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from ragjax.index import EmbeddingStore
from ragjax.models.encoder import TextEncoder
from ragjax.models.language_model import LanguageModel
from ragjax.refresh.task import params_digest
from ragjax.runs.compare.served import Served
from ragjax.runs.data import read_data
from ragjax.runs.folder import CONFIG, REPORT
from ragjax.runs.inputs import check_model
from ragjax.runs.models import Encoders, base_towers, in_compute_dtype, load_encoders, load_lm
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.options.end_to_end import RagConfig
from ragjax.runs.options.evaluate import EvaluateConfig
from ragjax.runs.options.files import from_dict
from ragjax.runs.options.shared import RunConfig
from ragjax.runs.trainable import END_TO_END, LM_KEPT, Trained, split_lm, split_models
from ragjax.training.checkpoint import Checkpointer, Restored
from ragjax.training.lsr import towers

ModelChoice = Literal["shipped", "adapted", "base"]

# What the screen shows of a result, before and after.
_SHOWN = ("recall@5", "f1", "answer_nll")


class Models:
    """The models of a run, each read when it is first asked for.

    What the run did not train is the base model.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path | None,
        inputs: Mapping[str, Any] | None = None,
        base: Collection[str] = (),
    ):
        """Names the run.

        Args:
            config: Its options.
            folder: Its output folder; None: there is no run yet, all models are base models.
            inputs: What its config.json says of the base models; None: nothing.
            base: Taken as they were before training: `retriever`, `language_model`.
        """
        self._config, self._folder, self._inputs, self._base = config, folder, inputs, base
        trained = config.trains_retriever and folder is not None
        self.trained_retriever = trained and "retriever" not in base

    def read(self) -> Self:
        """Reads all models now, so that a run that has not ended is refused before other work."""
        _ = self.query_encoder, self.language_model
        return self

    @cached_property
    def base_encoders(self) -> Encoders:
        """The encoders that training started from.

        Raises:
            ValueError: Another one has the name of one of them today.
        """
        config = self._config
        encoders = load_encoders(config)
        for name, encoder in encoders.named.items():
            check_model(in_compute_dtype(encoder, config), name, self._inputs, self._folder)
        return encoders

    @property
    def base_encoder(self) -> TextEncoder:
        """The encoder of documents, and of queries where there is one, before training."""
        return self.base_encoders.doc

    @cached_property
    def base_language_model(self) -> LanguageModel:
        """The language model that training started from.

        Raises:
            ValueError: Another one has its name today.
        """
        lm = load_lm(self._config, self._folder)
        check_model(lm, "language model", self._inputs, self._folder)
        return lm

    @property
    def query_encoder(self) -> TextEncoder:
        """The encoder of queries with its trained parameters."""
        return dataclasses.replace(self.base_encoders.query, params=self._towers[0])

    @property
    def doc_encoder(self) -> TextEncoder:
        """The encoder of documents with its trained parameters."""
        return dataclasses.replace(self.base_encoder, params=self._towers[1])

    @property
    def trains_lm(self) -> bool:
        """Whether the language model was trained: there may be nothing to train it on."""
        if self._folder is None or "language_model" in self._base or not self._config.trains_lm:
            return False
        skipped = (
            isinstance(self._config, AdaptConfig)
            and not (self._folder / "checkpoints" / "lm").is_dir()
            and (self._folder / "metrics.json").is_file()
        )
        return not skipped

    @cached_property
    def language_model(self) -> LanguageModel:
        """The language model with its trained parameters, adapters beside the weights."""
        config, base = self._config, self.base_language_model
        if self._folder is None or not self.trains_lm:
            return base
        if isinstance(config, RagConfig):
            return dataclasses.replace(base, params=self._end_to_end.lm_params)
        split = split_lm(config.language_model, base.family, base.params, seed=config.seed)
        kept = (self._folder / "checkpoints" / LM_KEPT).is_dir()
        restored = self._restore(LM_KEPT if kept else "lm", split.trainable)
        if kept and not restored.info["factor"]:
            return base
        return dataclasses.replace(base, params=split.joined(restored.state))

    @cached_property
    def _towers(self) -> tuple[Any, Any]:
        """Parameters of the query and of the document encoder."""
        params = base_towers(self._config, self.base_encoders)
        if self.trained_retriever:
            params = self._restore("retriever", params).state
        return towers(params, None)

    @cached_property
    def _end_to_end(self) -> Trained:
        config, lm = self._config, self.base_language_model
        assert isinstance(config, RagConfig), "both models were trained and saved together"
        params = base_towers(config, self.base_encoders)
        split = split_models(config, lm.family, lm.params, params)
        return split.merged(self._restore(END_TO_END, split.trainable).state)

    def _restore(self, stage: str, template: Any) -> Restored:
        assert self._folder is not None, "base models are in no checkpoint"
        folder = self._folder / "checkpoints" / stage
        notes: list[str] = []
        where, again = (
            f"{self._folder}: stage {stage}",
            f"the same {script_of(self._config)} command",
        )
        if not folder.is_dir():
            raise ValueError(f"{where} has not begun; {again} finishes the run")
        restored = Checkpointer(folder, report=notes.append).latest_good(template, field="params")
        listed = f" ({'; '.join(notes)})" if notes else ""
        if restored is None:
            raise ValueError(f"{where} has no whole checkpoint; {again} finishes the run{listed}")
        steps = restored.info["num_steps"]
        if restored.step != steps:
            raise ValueError(
                f"{where} is at step {restored.step} of {steps}; {again} finishes the run{listed}"
            )
        return restored


@dataclass(frozen=True)
class Results:
    """Results in an output folder.

    Attributes:
        folder: Output folder.
        metrics: By system, then by metric with its 95 % interval ("value", "low", "high"); None:
            the folder was not evaluated to its end.
    """

    folder: Path
    metrics: Mapping[str, Any] | None

    main_file: ClassVar[str] = "metrics.json"

    @property
    def exit_code(self) -> int:
        """What the script ends with."""
        return 0

    @property
    def report(self) -> Path:
        """The page with all of it, where the run has ended."""
        return self.folder / REPORT

    def __repr__(self) -> str:
        """Returns the folder and a few metrics, before and after, in one line."""
        metrics = self.metrics or {}
        sides = [metrics[name] for name in ("before", "after") if name in metrics]
        shown = [
            f"{name} " + " -> ".join(f"{side[name]['value']:.3g}" for side in sides)
            for name in _SHOWN
            if sides and all(name in side for side in sides)
        ]
        return f"{type(self).__name__}({', '.join([repr(str(self.folder)), *shown])})"


@dataclass(frozen=True, repr=False)
class FinishedRun(Results):
    """What `adapt` or `train_rag` made.

    Attributes:
        config: An AdaptConfig or a RagConfig.
        inputs: Digests of what it read, as its config.json has them; None: it has none.
        models: Base and trained models.
    """

    config: RunConfig
    inputs: Mapping[str, Any] | None = None

    @cached_property
    def models(self) -> Models:
        """The base and the trained models, on one device."""
        return self.open_models("adapted")

    @cached_property
    def served(self) -> Served | None:
        """What the run ships, as its dev questions chose; None: it says nothing of that."""
        return Served.read(self.folder)

    def open_models(self, which: ModelChoice, *, devices: int = 1, fsdp: int = 1) -> Models:
        """Returns the trained models, the base ones, or of each what is shipped.

        Args:
            which: `adapted`, `base` or `shipped`.
            devices: Devices that have them; 0: all.
            fsdp: Devices that have an equal part of each parameter; 0: see `RunConfig`.
        """
        served = self.served._asdict() if which == "shipped" and self.served else {}
        names = ("retriever", "language_model")
        base = [name for name in names if "base" in (which, served.get(name))]
        config = dataclasses.replace(self.config, devices=devices, fsdp=fsdp)
        return Models(config, self.folder, self.inputs, base)


@dataclass(frozen=True, repr=False)
class Evaluation(Results):
    """What `evaluate` made.

    Attributes:
        config: Its options.
    """

    config: EvaluateConfig


def open_run(folder: str | Path) -> FinishedRun:
    """Reads the options and results of a run.

    Raises:
        FileNotFoundError: There is no run.
        ValueError: Its `config.json` is not one of a run of this version.
    """
    folder = Path(folder)
    path = folder / CONFIG
    known = "give the --output folder of a run of experiments/adapt.py or experiments/train_rag.py"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no run there (no {CONFIG}); {known}")
    try:
        content = json.loads(path.read_text("utf-8-sig"))
        values, program = content["config"], content.get("program")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the config of a run ({error})") from error
    bases = {base.program: base for base in (AdaptConfig(), RagConfig())}
    if program not in bases:
        raise ValueError(f"{folder} was made by {program}; {known}")
    return FinishedRun(
        folder=folder,
        metrics=_read_metrics(folder),
        config=from_dict(bases[program], values, path),
        inputs=content.get("inputs"),
    )


def adapted_encoder(run: FinishedRun, tower: str, which: ModelChoice = "adapted") -> TextEncoder:
    """Returns a trained encoder of a run.

    Args:
        run: The run; the training of its retriever must have ended.
        tower: `query`, `doc`, or `encoder` where one tower serves both.
        which: `adapted`; `shipped` and `base` may be the encoder that training started from.

    Raises:
        ValueError: The run did not train an encoder, has two towers and none was chosen, or has
            not ended.
        OSError: The base encoder is not there any more.
    """
    config = run.config
    if not config.trains_retriever:
        raise ValueError(
            f"{run.folder}: this run adapted the language model only; export --what language_model"
        )
    if tower == "encoder" and config.retriever.train != "shared":
        raise ValueError(
            f"{run.folder}: this run has two encoders (retriever.train"
            f" {config.retriever.train}); export --what query_encoder and --what doc_encoder"
        )
    models = run.models if which == "adapted" else run.open_models(which)
    return models.doc_encoder if tower == "doc" else models.query_encoder


def doc_embeddings(run: FinishedRun, which: ModelChoice = "shipped") -> EmbeddingStore:
    """Opens the embeddings of the documents that a run kept.

    Args:
        run: The run; the training of its retriever must have ended.
        which: `shipped`, `adapted` or `base`: whose embeddings they are.

    Raises:
        FileNotFoundError: They are not there.
        ValueError: They are damaged, the run has not ended, or another encoder made them.
        OSError: The base encoder is not there any more.
    """
    models = run.open_models(which)
    version = newest_index(run.folder) if models.trained_retriever else 0
    return EmbeddingStore.open(
        run.folder / "index" / str(version),
        model_fingerprint=params_digest(models.doc_encoder.params),
    )


def document_ids(run: FinishedRun, store: EmbeddingStore) -> list[str]:
    """Returns the ids of the documents that a store of a run has the embeddings of, row by row.

    Raises:
        FileNotFoundError: The data of the run are not there any more.
        ValueError: They have other documents today.
    """
    corpus = read_data(run.config, run.folder, lambda note: None).corpus
    if corpus.fingerprint != store.spec.corpus_fingerprint:
        raise ValueError(
            f"{run.folder}: {run.config.data or 'its data'} has other documents than those that"
            " were encoded; give it the documents of the run back, or adapt again"
        )
    return [passage.id for passage in corpus]


def newest_index(folder: Path) -> int:
    """Returns the number of the newest index of a run's adapted encoder.

    Raises:
        ValueError: There is none.
    """
    # One that is being encoded counts: damaged, it is made again.
    names = [path.name.removesuffix(".building") for path in (folder / "index").glob("*")]
    numbers = [int(name) for name in names if name.isdecimal()]
    if not numbers or max(numbers) == 0:
        raise ValueError(
            f"{folder}: no index of the adapted encoder there; the same command finishes the run"
        )
    return max(numbers)


def adapted_language_model(run: FinishedRun) -> LanguageModel:
    """Returns the trained language model of a run.

    Raises:
        ValueError: The run did not train the language model, or its training has not ended.
        OSError: The base model is not there any more.
    """
    if not run.models.trains_lm:
        raise ValueError(
            f"{run.folder}: this run adapted the retriever only; export --what encoder,"
            " query_encoder or doc_encoder, or the language model as it was:"
            f" --source {run.config.lm} --what language_model"
        )
    return run.models.language_model


def _read_metrics(folder: Path) -> dict[str, Any] | None:
    try:
        main = json.loads((folder / "metrics.json").read_text("utf-8-sig"))
        others = json.loads((folder / "differences.json").read_text("utf-8-sig"))["other_systems"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{folder}: metrics.json or differences.json is damaged ({error})"
        ) from error
    return {**main, **others}


def script_of(config: RunConfig) -> str:
    """Returns the path of the script that makes such a run."""
    return f"experiments/{config.program or 'adapt'}.py"
