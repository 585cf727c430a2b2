"""Options of how the index is kept up to date while its encoders train."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal

from ragjax.refresh import Trigger, parse_trigger
from ragjax.runs.options.checks import Options, at_least, fraction, positive


@dataclass(frozen=True, kw_only=True)
class RefreshConfig(Options):
    """How the index is kept up to date while the encoders train.

    Attributes:
        mode: `off` retrieves the candidates of every question once, before each round. The others
            retrieve for each step with the live query encoder: `frozen` from the initial index,
            `query_only` likewise while only the query encoder trains, `rerank` from it, re-ranked
            by the live document encoder, `sync` from an index that is rebuilt while training waits,
            `async` from one that is rebuilt in the background.
        every: When `sync` and `async` rebuild: steps (`20`), ranges of steps
            (`0-1000:500,1000-:2000`), `asap`, `drift:0.05` (mean change of an embedding, measured
            every 50 steps; `drift:0.05/10`: every 10) or `never`.
        adopt_after: Steps between exporting the parameters and swapping in their index, the same
            in every run; -1: as soon as it is ready (`async`).
        max_lag: Most steps that the index may lag behind the encoder; 0: no limit.
        on_lag: Beyond that training waits, warns, or stops.
        overfetch: Documents that `rerank` encodes again for each one that is returned.
        partial: Share of the corpus re-encoded in a refresh, the most retrieved and most changed
            documents first; 1: all.
        full_every: With `partial` below 1, every n-th refresh re-encodes all documents.
        devices: Encode on this many of the last local devices, train on the others; 0: share.
        dispatch: `static` encodes in this process, or a share in each process of the run; `ray` by
            actors of a Ray cluster, that of the variable RAY_ADDRESS or one started here.
        deadline_seconds: Longest build of an index; 0: no limit.
        on_failure: Stop the run after a refresh that failed for good, or warn.
        keep: Generations of the index kept on disk, at least 3.
    """

    mode: Literal["off", "frozen", "query_only", "rerank", "sync", "async"] = "off"
    every: str = "20"
    adopt_after: int = -1
    max_lag: int = 0
    on_lag: Literal["wait", "warn", "stop"] = "wait"
    overfetch: int = 4
    partial: float = 1.0
    full_every: int = 4
    devices: int = 0
    dispatch: Literal["static", "ray"] = "static"
    deadline_seconds: float = 0.0
    on_failure: Literal["stop", "warn"] = "stop"
    keep: int = 3

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().check()
        at_least(self, -1, "adopt_after")
        at_least(self, 0, "max_lag", "devices", "deadline_seconds")
        at_least(self, 1, "overfetch", "full_every")
        at_least(self, 3, "keep")
        positive(self, "partial")
        fraction(self, "partial")
        try:
            _ = self.trigger
        except ValueError as error:
            raise ValueError(f"every: {error}") from error
        if self.partial < 1 and self.adopt_after > 0:
            raise ValueError(
                f"partial={self.partial:g} depends on what was retrieved, so a resumed run is"
                f" another, which adopt_after={self.adopt_after} rules out; leave one of them out"
            )
        if self.dispatch == "ray" and self.devices:
            raise ValueError(
                f"devices={self.devices} encode in this process, dispatch=ray in others; leave one"
                " of them out"
            )

    @functools.cached_property
    def trigger(self) -> Trigger:
        """When the index is rebuilt; a drift is measured by whoever knows the encoder."""
        return parse_trigger(self.every, measure=lambda params, snapshot: 0.0)


# Modes in which a field has an effect; elsewhere it would be ignored silently.
_ACTS_IN = {
    "every": ("sync", "async"),
    "adopt_after": ("async",),
    "max_lag": ("sync", "async"),
    "overfetch": ("rerank",),
    "partial": ("sync", "async"),
    "devices": ("sync", "async"),
    "dispatch": ("sync", "async"),
}
_LIVE = ("frozen", "query_only", "rerank", "sync", "async")
# How and where an index is built, or what happens when that fails, but not its content: a run may
# be resumed with other values.
NO_RESULT = ("devices", "dispatch", "keep", "deadline_seconds", "on_failure", "on_lag")


def check_used(refresh: RefreshConfig) -> None:
    """Raises ValueError for an option without effect in the chosen mode."""
    for option in dataclasses.fields(refresh):
        modes = _ACTS_IN.get(option.name, _LIVE)
        value = getattr(refresh, option.name)
        if option.name != "mode" and value != option.default and refresh.mode not in modes:
            raise ValueError(
                f"refresh.{option.name}={value!r} does nothing with refresh.mode {refresh.mode};"
                f" add --refresh.mode {modes[-1]}, or leave it out"
            )


def check_freshness(mode: str, *, train: str, doc_learning_rate: float) -> None:
    """Raises ValueError for a mode that does not go with which encoders are trained.

    Args:
        mode: `refresh.mode`.
        train: `retriever.train`.
        doc_learning_rate: `retriever.doc_learning_rate`.
    """
    if mode == "query_only" and train != "query":
        raise ValueError(
            "refresh.mode query_only trains the query encoder alone; add --retriever.train query"
        )
    still = train in ("query", "none") or (train == "both" and doc_learning_rate == 0)
    if mode in ("sync", "async", "rerank") and still:
        remedy = "frozen" if train == "none" else "query_only --retriever.train query"
        raise ValueError(
            f"refresh.mode {mode} is for a document encoder that is trained, and retriever.train"
            f" {train} with doc_learning_rate {doc_learning_rate:g} leaves it as it is; use"
            f" --refresh.mode {remedy}"
        )
