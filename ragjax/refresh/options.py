"""How an index is refreshed, what goes on, and what can go wrong."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax

from ragjax.refresh.build import BuildOptions
from ragjax.refresh.partial import PartialPolicy


class RefreshState(enum.Enum):
    """Where the refresh under way is."""

    IDLE = "idle"
    ENCODING = "encoding"
    BUILDING = "building"
    READY = "ready"
    FAILED = "failed"


class RefreshError(RuntimeError):
    """A refresh failed for good; the cause is chained, the earlier generation still serves."""


class ResumeError(RefreshError):
    """A checkpoint cannot be continued identically, because what it names is gone."""


class IndexTooStaleError(RuntimeError):
    """The index lags further behind the encoder than allowed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefreshOptions:
    """How an index is refreshed.

    Attributes:
        index: Kind of index; "auto" decides by size and memory.
        build: Of a ScaNN index.
        devices: Devices that share an exact index; None: the first one has it.
        keep: Generations kept on disk, at least 3.
        max_retries: Times that a failed refresh is tried again before it counts as failed.
        backoff_seconds: Wait before the first retry; it doubles each time.
        on_failure: What a failed refresh does to training: "stop" raises at the next `update` or
            `poll`, "warn" says so and goes on with the earlier generation.
        max_index_lag_steps: Most steps that the index may lag behind the encoder; 0: no limit.
        on_lag: What happens beyond it: "wait" for a fresher index, "warn", or "stop".
        adopt_after: Steps from an export until its index serves. -1: as soon as it is ready,
            which depends on the speed of the machine. 0: training waits for it (synchronous).
            More: the index serves from exactly that step on, so that a repeated or resumed run is
            the same; the next export waits until then.
        partial: Encode only a part of the documents in most refreshes; None encodes all. What is
            encoded depends on what was retrieved since the start of this process, so a resumed run
            is another one: not with `adopt_after` above 0.
    """

    index: Literal["auto", "exact", "scann"] = "auto"
    build: BuildOptions = dataclasses.field(default_factory=BuildOptions)
    devices: Sequence[jax.Device] | None = None
    keep: int = 3
    max_retries: int = 2
    backoff_seconds: float = 1.0
    on_failure: Literal["stop", "warn"] = "stop"
    max_index_lag_steps: int = 0
    on_lag: Literal["wait", "warn", "stop"] = "wait"
    adopt_after: int = -1
    partial: PartialPolicy | None = None

    def __post_init__(self) -> None:
        """Refuses what is out of range, naming the field."""
        for name, low in (("keep", 3), ("max_retries", 0), ("backoff_seconds", 0),
                          ("max_index_lag_steps", 0), ("adopt_after", -1)):  # fmt: skip
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name, known in (("index", ("auto", "exact", "scann")), ("on_failure", ("stop", "warn")),
                            ("on_lag", ("wait", "warn", "stop"))):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if self.partial is not None and self.adopt_after > 0:
            raise ValueError(
                "partial refreshes are not the same in a resumed run, which adopt_after="
                f"{self.adopt_after} promises; use adopt_after=-1 or 0, or encode all documents"
            )


class RefreshStatus(NamedTuple):
    """What goes on, for a progress line."""

    state: RefreshState
    step: int  # of the parameters that are encoded or built; -1 where nothing is under way
    fraction: float  # of the encoding that is done
    remaining_seconds: float  # of the encoding, estimated
    waiting_step: int  # of the parameters that are next; -1 where none wait
    builder_pid: int  # process that builds the index; 0 where none does
    failures: int  # failed attempts since the start
    last_error: str  # of the newest failure, "" where there was none
