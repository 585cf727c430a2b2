"""What refreshing the index will cost, before a run starts: time, memory, disk and staleness.

work = RefreshWork(documents=100_000, dim=384, encode_documents_per_second=400, ...)
forecast = forecast_refresh(work)
print(forecast.describe())
"""

import dataclasses
import math
from typing import NamedTuple

# Seconds to build a ScaNN index, for each million values (documents x dimensions).
_BRUTE_FORCE, _QUANTIZED, _TREE = 0.1, 0.5, 0.65
# From how many documents on `scann_options` quantises and partitions.
_QUANTIZED_FROM, _TREE_FROM = 20_000, 100_000
# An exact index is checked and copied to the device.
_EXACT = 0.003
_INDEX_BYTES_PER_VALUE = 4
# What `GenerationStore` keeps at least.
_FEWEST_GENERATIONS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefreshWork:
    """What a refresh works on, how fast that goes, and what it may take.

    Attributes:
        documents: In the corpus, encoded in each refresh.
        dim: Size of an embedding.
        encode_documents_per_second: Measured.
        build_seconds: Of an index; see `estimate_build_seconds`.
        step_seconds: Of a training step, without refreshing.
        steps_between: Mean steps from one refresh to the next, as a trigger's `steps_between`:
            None for as soon as possible or unknown, infinite for never.
        kept_generations: Finished embeddings kept on disk, besides those being written.
        bytes_per_value: On disk, of a value of an embedding: 4 for float32 and 2 for float16, and
            4.5 more where a ScaNN index is kept beside.
        parameter_bytes: Of the document encoder; a copy is held while it is encoded with, and one
            is kept on disk beside each generation.
        shared_device: True = documents are encoded on the device that trains.
        free_bytes: On the disk.
    """

    documents: int
    dim: int
    encode_documents_per_second: float
    build_seconds: float
    step_seconds: float
    steps_between: float | None
    kept_generations: int
    bytes_per_value: float
    parameter_bytes: int
    shared_device: bool
    free_bytes: int

    def __post_init__(self) -> None:
        """Refuses numbers that are too small, or none."""
        for name, value in vars(self).items():
            if name in ("build_seconds", "kept_generations", "parameter_bytes", "free_bytes"):
                if not value >= 0:
                    raise ValueError(f"{name} must not be negative, got {value}")
            elif value is not None and name != "shared_device":
                _check_positive(name, value)


class RefreshForecast(NamedTuple):
    """What refreshes cost; seconds are those of the rates that were given."""

    work: RefreshWork
    encode_seconds: float  # of a refresh
    refresh_seconds: float  # of a refresh, with building the index
    fastest_steps: int  # fewest steps from one refresh to the next that can be kept up
    overhead: float  # seconds spent refreshing for each second of training; 0 on spare devices
    mean_staleness_steps: float  # of the index that serves, in the long run
    max_staleness_steps: float  # the step before a new index serves
    bytes_on_disk: int  # at most, while a refresh runs
    bytes_in_memory: int  # at most, while a refresh runs; of host and device together

    @property
    def keeps_up(self) -> bool:
        """True where a refresh ends before the next one is due."""
        return self.work.steps_between is None or self.work.steps_between >= self.fastest_steps

    @property
    def fits_disk(self) -> bool:
        """True where the disk has room for what is kept and what is being written."""
        return self.bytes_on_disk <= self.work.free_bytes

    def warnings(self) -> list[str]:
        """Returns a sentence with its remedy for each thing that will not work as asked."""
        found, work = [], self.work
        if not self.fits_disk:
            spare = work.kept_generations > _FEWEST_GENERATIONS
            fewer = f"keep fewer than {work.kept_generations} generations, " if spare else ""
            found.append(
                f"the disk is too small by {_size(self.bytes_on_disk - work.free_bytes)}: {fewer}"
                "store float16 embeddings, or write to another disk."
            )
        if not self.keeps_up:
            found.append(
                f"a refresh takes the time of {self.fastest_steps:,} steps, so one every "
                f"{work.steps_between:,.0f} steps cannot be kept up: refresh every "
                f"{self.fastest_steps:,} steps or more, encode a part of the documents, or "
                + (
                    "encode on spare devices, where a refresh costs the training nothing."
                    if work.shared_device
                    else "encode on more devices."
                )
            )
        return found

    def describe(self) -> str:
        """Returns a few lines for the user."""
        work, asked = self.work, self.work.steps_between
        if asked == math.inf:
            return "refresh: never; the initial index serves to the end of the run"
        every = "as soon as possible" if asked is None else f"every {asked:,.0f} steps"
        device = "costs the training no time, on spare devices"
        if work.shared_device:
            costs = "costs" if self.keeps_up else "would cost"
            device = (
                f"{costs} {self.overhead:,.1%} on top of the training time, on the device that "
                "trains"
            )
        lines = [
            f"refresh: {every}, {work.documents:,} documents in about "
            f"{_duration(self.refresh_seconds)} (encoding {_duration(self.encode_seconds)}, "
            f"building the index {_duration(work.build_seconds)})",
            device,
            f"the index lags {self.mean_staleness_steps:,.0f} steps behind on average and "
            f"{self.max_staleness_steps:,.0f} at most",
            f"about {_size(self.bytes_on_disk)} on disk ({_size(work.free_bytes)} free) and "
            f"{_size(self.bytes_in_memory)} of memory while a refresh runs",
        ]
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings()])


def forecast_refresh(work: RefreshWork) -> RefreshForecast:
    """Forecasts what refreshes cost.

    With T_refresh = documents / rate + build and n steps of T_step from one refresh to the next, a
    refresh is kept up where T_refresh <= n T_step, and on the device that trains it takes
    T_refresh / (n T_step) of the training time on top. (Shared fairly between training and
    encoding, a refresh takes twice as long there and so do its steps: their number is the same.)
    An index serves from ceil(T_refresh / T_step) steps after its parameters were exported until
    the next one does. Where n cannot be kept up, the staleness is that of refreshes that follow
    each other and start with fresh parameters; the overhead is of n as asked, as if the training
    waited.

    Args:
        work: What is refreshed, and how fast.

    Returns:
        The forecast. Its memory has the exported parameters, the index that serves, the one being
        built and the embeddings it is built from, both indexes with float32 embeddings.
    """
    encode_seconds = work.documents / work.encode_documents_per_second
    refresh_seconds = encode_seconds + work.build_seconds
    lag = math.ceil(refresh_seconds / work.step_seconds)
    asked = lag if work.steps_between is None else work.steps_between
    period = max(asked, lag)
    values, stored = work.documents * work.dim, work.kept_generations + 1
    return RefreshForecast(
        work=work,
        encode_seconds=encode_seconds,
        refresh_seconds=refresh_seconds,
        fastest_steps=lag,
        overhead=refresh_seconds / (asked * work.step_seconds) if work.shared_device else 0.0,
        mean_staleness_steps=lag + (period - 1) / 2,
        max_staleness_steps=lag + period - 1,
        bytes_on_disk=math.ceil(stored * values * work.bytes_per_value)
        + stored * work.parameter_bytes,
        bytes_in_memory=3 * values * _INDEX_BYTES_PER_VALUE + work.parameter_bytes,
    )


def estimate_build_seconds(documents: int, dim: int, kind: str) -> float:
    """Returns about how long building an index takes, without encoding.

    Seconds for each million values (documents x dimensions), measured with 20,000 to 200,000
    documents of 128 and 384 dimensions on 2 shared cores of an AMD EPYC server, the check of the
    embeddings and of the recall included: ScaNN with exact scores 0.04 to 0.12, with quantised
    scores 0.36 to 0.58, with a tree 0.40 to 0.70, of which the upper part is assumed; an exact
    index 0.001 to 0.003. More cores are faster, a tree over millions of documents is cheaper by the
    document since it is trained on a sample, and after a first refresh the time of that one is
    better than this.

    Args:
        documents: Number of documents.
        dim: Size of an embedding.
        kind: "exact" or "scann", as `IndexChoice.name`.

    Raises:
        ValueError: Another kind, or a size that is not positive.
    """
    _check_positive("documents", documents)
    _check_positive("dim", dim)
    if kind not in ("exact", "scann"):
        raise ValueError(f'the kind of an index is "exact" or "scann", got {kind!r}')
    rate = _EXACT
    if kind == "scann":
        rate = _BRUTE_FORCE if documents < _QUANTIZED_FROM else _QUANTIZED
        rate = rate if documents < _TREE_FROM else _TREE
    return rate * documents * dim / 1e6


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _duration(seconds: float) -> str:
    """Returns a span of time in the unit a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(num_bytes: int) -> str:
    """Returns a number of bytes in MiB, or in GiB from ten of them."""
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:,.1f} MiB" if mebibytes < 10_240 else f"{mebibytes / 1024:,.1f} GiB"
