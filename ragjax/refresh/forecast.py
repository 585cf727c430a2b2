"""What refreshing the index will cost, before a run starts: time, memory, disk and staleness.

forecast = forecast_refresh(documents=100_000, dim=384, encode_documents_per_second=400, ...)
print(forecast.describe())
"""

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


class RefreshForecast(NamedTuple):
    """What refreshes cost; seconds are those of the rates that were given."""

    documents: int  # in the corpus, encoded in each refresh
    encode_seconds: float  # of a refresh
    build_seconds: float  # of a refresh
    refresh_seconds: float  # both
    steps_between: float | None  # as asked; None: as soon as possible, or known to the run only
    fastest_steps: int  # fewest steps from one refresh to the next that can be kept up
    shared_device: bool  # True = documents are encoded where the model trains
    overhead: float  # seconds spent refreshing for each second of training; 0 on spare devices
    mean_staleness_steps: float  # of the index that serves, in the long run
    max_staleness_steps: float  # the step before a new index serves
    bytes_on_disk: int  # at most, while a refresh runs
    bytes_in_memory: int  # at most, while a refresh runs; of host and device together
    free_bytes: int  # on the disk
    kept_generations: int  # finished embeddings on the disk

    @property
    def keeps_up(self) -> bool:
        """True where a refresh ends before the next one is due."""
        return self.steps_between is None or self.steps_between >= self.fastest_steps

    @property
    def fits_disk(self) -> bool:
        """True where the disk has room for what is kept and what is being written."""
        return self.bytes_on_disk <= self.free_bytes

    def warnings(self) -> list[str]:
        """Returns a sentence with its remedy for each thing that will not work as asked."""
        found = []
        if not self.fits_disk:
            spare = self.kept_generations > _FEWEST_GENERATIONS
            fewer = f"keep fewer than {self.kept_generations} generations, " if spare else ""
            found.append(
                f"the disk is too small by {_size(self.bytes_on_disk - self.free_bytes)}: {fewer}"
                "store float16 embeddings, or write to another disk."
            )
        if not self.keeps_up:
            found.append(
                f"a refresh takes the time of {self.fastest_steps:,} steps, so one every "
                f"{self.steps_between:,.0f} steps cannot be kept up: refresh every "
                f"{self.fastest_steps:,} steps or more, encode a part of the documents, or "
                + (
                    "encode on spare devices, where a refresh costs the training nothing."
                    if self.shared_device
                    else "encode on more devices."
                )
            )
        return found

    def describe(self) -> str:
        """Returns a few lines for the user."""
        asked = self.steps_between
        if asked == math.inf:
            return "refresh: never; the initial index serves to the end of the run"
        every = "as soon as possible" if asked is None else f"every {asked:,.0f} steps"
        device = "costs the training no time, on spare devices"
        if self.shared_device:
            costs = "costs" if self.keeps_up else "would cost"
            device = (
                f"{costs} {self.overhead:,.1%} on top of the training time, on the device that "
                "trains"
            )
        lines = [
            f"refresh: {every}, {self.documents:,} documents in about "
            f"{_duration(self.refresh_seconds)} (encoding {_duration(self.encode_seconds)}, "
            f"building the index {_duration(self.build_seconds)})",
            device,
            f"the index lags {self.mean_staleness_steps:,.0f} steps behind on average and "
            f"{self.max_staleness_steps:,.0f} at most",
            f"about {_size(self.bytes_on_disk)} on disk ({_size(self.free_bytes)} free) and "
            f"{_size(self.bytes_in_memory)} of memory while a refresh runs",
        ]
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings()])


def forecast_refresh(
    *,
    documents: int,
    dim: int,
    encode_documents_per_second: float,
    build_seconds: float,
    step_seconds: float,
    steps_between: float | None,
    kept_generations: int,
    bytes_per_value: float,
    parameter_bytes: int,
    shared_device: bool,
    free_bytes: int,
) -> RefreshForecast:
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
        documents: in the corpus, encoded in each refresh.
        dim: size of an embedding.
        encode_documents_per_second: measured.
        build_seconds: of an index; see `estimate_build_seconds`.
        step_seconds: of a training step, without refreshing.
        steps_between: mean steps from one refresh to the next, as a trigger's `steps_between`:
            None for as soon as possible or unknown, infinite for never.
        kept_generations: finished embeddings kept on disk, besides those being written.
        bytes_per_value: on disk, of a value of an embedding: 4 for float32 and 2 for float16, and
            4.5 more where a ScaNN index is kept beside.
        parameter_bytes: of the document encoder; a copy is held while it is encoded with, and one
            is kept on disk beside each generation.
        shared_device: True = documents are encoded on the device that trains.
        free_bytes: on the disk.

    Returns:
        The forecast. Its memory has the exported parameters, the index that serves, the one being
        built and the embeddings it is built from, both indexes with float32 embeddings.

    Raises:
        ValueError: a size or time that is not positive.
    """
    _check(
        positive={
            "documents": documents,
            "dim": dim,
            "encode_documents_per_second": encode_documents_per_second,
            "step_seconds": step_seconds,
            "bytes_per_value": bytes_per_value,
            "steps_between": math.inf if steps_between is None else steps_between,
        },
        not_negative={
            "build_seconds": build_seconds,
            "kept_generations": kept_generations,
            "parameter_bytes": parameter_bytes,
            "free_bytes": free_bytes,
        },
    )
    encode_seconds = documents / encode_documents_per_second
    refresh_seconds = encode_seconds + build_seconds
    lag = math.ceil(refresh_seconds / step_seconds)
    asked = lag if steps_between is None else steps_between
    period = max(asked, lag)
    embeddings = documents * dim
    stored = math.ceil((kept_generations + 1) * embeddings * bytes_per_value)
    return RefreshForecast(
        documents=documents,
        encode_seconds=encode_seconds,
        build_seconds=build_seconds,
        refresh_seconds=refresh_seconds,
        steps_between=steps_between,
        fastest_steps=lag,
        shared_device=shared_device,
        overhead=refresh_seconds / (asked * step_seconds) if shared_device else 0.0,
        mean_staleness_steps=lag + (period - 1) / 2,
        max_staleness_steps=lag + period - 1,
        bytes_on_disk=stored + (kept_generations + 1) * parameter_bytes,
        bytes_in_memory=3 * embeddings * _INDEX_BYTES_PER_VALUE + parameter_bytes,
        free_bytes=free_bytes,
        kept_generations=kept_generations,
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
        documents: number of documents.
        dim: size of an embedding.
        kind: "exact" or "scann", as `IndexChoice.name`.

    Raises:
        ValueError: another kind, or a size that is not positive.
    """
    _check(positive={"documents": documents, "dim": dim}, not_negative={})
    if kind not in ("exact", "scann"):
        raise ValueError(f'The kind of an index is "exact" or "scann", got {kind!r}.')
    rate = _EXACT
    if kind == "scann":
        rate = _BRUTE_FORCE if documents < _QUANTIZED_FROM else _QUANTIZED
        rate = rate if documents < _TREE_FROM else _TREE
    return rate * documents * dim / 1e6


def _check(*, positive: dict[str, float], not_negative: dict[str, float]) -> None:
    """Refuses numbers that are too small, or not numbers."""
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    for name, value in not_negative.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}.")


def _duration(seconds: float) -> str:
    """Returns a span of time in the unit a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(num_bytes: int) -> str:
    """Returns a number of bytes in MiB, or in GiB from ten of them."""
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:,.1f} MiB" if mebibytes < 10_240 else f"{mebibytes / 1024:,.1f} GiB"
