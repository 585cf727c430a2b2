"""When the corpus is encoded again: rules asked before every training step.

    trigger = parse_trigger("500")  # every 500 steps
    if trigger(context):
        refresher.submit(params, step)

Rules that count steps look at `step` and `last_export_step` only, so a resumed run decides as an
uninterrupted one, and what is due stays due until it is submitted, even if the very step is never
shown to the rule. They also fire while a refresh runs: what to do with two is the caller's choice.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, NamedTuple, Protocol

from ragjax.index.base import IndexSnapshot

DEFAULT_CHECK_EVERY = 50

_FORMS = (
    "500 or every:500 (steps), 0-1000:500,1000-:2000 (from step to step: every so many), asap, "
    "never, drift:0.05 or drift:0.05/100 (measured drift / steps between measurements)"
)
_WHOLE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)(e\d{1,2}|k|m)?")
_RANGE = re.compile(r"([^-:]+)-([^-:]*):([^-:]+)")
_UNITS = {"k": 3, "m": 6}

DriftMeasure = Callable[[Any, IndexSnapshot], float]


class TriggerContext(NamedTuple):
    """What a trigger may look at."""

    step: int  # training step about to be taken, counted over epochs
    last_export_step: int  # of the newest submitted parameters; at first of the initial index
    busy: bool  # True = a refresh runs
    params: Any  # live parameters of the document encoder
    snapshot: IndexSnapshot  # the index that serves


class Trigger(Protocol):
    """Decides whether the parameters of this step are worth a refresh."""

    def __call__(self, context: TriggerContext) -> bool:
        """Returns True where a refresh is due."""
        ...

    def steps_between(self, num_steps: int) -> float | None:
        """Returns the mean steps from one refresh of a run to the next, the first from step 0.

        Args:
            num_steps: Steps of the run, which takes the steps 0 to `num_steps` - 1.

        Returns:
            Steps, infinite where the run never refreshes, None where only the run can tell.
        """
        ...


@dataclasses.dataclass(frozen=True)
class EveryNSteps:
    """Due at every multiple of n.

    Attributes:
        n: Steps from one refresh to the next.
    """

    n: int

    def __post_init__(self) -> None:
        """Refuses less than a step."""
        _check_steps("n", self.n)

    def __call__(self, context: TriggerContext) -> bool:
        """Tells whether a multiple of n was reached since the last export."""
        return context.step // self.n > context.last_export_step // self.n

    def steps_between(self, num_steps: int) -> float | None:
        """Returns n, or infinity where the run ends before."""
        return float(self.n) if num_steps > self.n else math.inf


class StepRange(NamedTuple):
    """A part of a run and how often it refreshes: at start, start + every, ... before stop."""

    start: int  # first step
    stop: int | None  # first step that is outside; None: no end
    every: int  # steps

    @property
    def end(self) -> float:
        """`stop`, infinite where it is None."""
        return math.inf if self.stop is None else self.stop

    def num_due(self, last_step: float) -> int:
        """Returns how many refreshes are due from the start up to `last_step`, included."""
        last = min(last_step, self.end - 1)
        return int((last - self.start) // self.every) + 1 if last >= self.start else 0


@dataclasses.dataclass(frozen=True)
class StepRanges:
    """Another number of steps in each part of a run, as Atlas' schedules; none outside of them.

    Attributes:
        ranges: `(start, stop, every)` in order, each counting from its own start; a `stop` of
            None, in the last only, leaves the end open.

    References:
        Izacard et al., "Atlas: Few-shot Learning with Retrieval Augmented Language Models", 2022.
    """

    ranges: tuple[StepRange, ...]

    def __init__(self, ranges: Iterable[tuple[int, int | None, int]]) -> None:
        """Takes the ranges and refuses what is empty, overlaps or is out of order."""
        object.__setattr__(self, "ranges", tuple(StepRange(*item) for item in ranges))
        if not self.ranges:
            raise ValueError("A schedule needs at least one range of steps; for none use Never()")
        for item in self.ranges:
            _check_steps("every", item.every)
            if item.start < 0 or item.end <= item.start:
                raise ValueError(f"The range of steps {_span(item)} is empty or negative")
        for before, after in itertools.pairwise(self.ranges):
            if after.start < before.end:
                raise ValueError(
                    f"The range of steps {_span(after)} starts before {_span(before)} ends; list "
                    "the ranges in order, each from where the last one stops"
                )

    def __call__(self, context: TriggerContext) -> bool:
        """Tells whether a step due in the range of this step was reached since the last export."""
        for item in self.ranges:
            if item.start <= context.step < item.end:
                return item.num_due(context.step) > item.num_due(context.last_export_step)
        return False

    def steps_between(self, num_steps: int) -> float | None:
        """Returns the mean over the steps up to the last refresh of the run."""
        count, last = 0, 0
        for item in self.ranges:
            due = item.num_due(num_steps - 1)
            if item.start == 0 and due:
                due -= 1  # step 0 has the initial index
                count, last = due, due * item.every
            elif due:
                count, last = count + due, item.start + (due - 1) * item.every
        return last / count if count else math.inf


@dataclasses.dataclass(frozen=True)
class AsSoonAsPossible:
    """Due whenever no refresh runs and the parameters are newer than the last export."""

    def __call__(self, context: TriggerContext) -> bool:
        """Tells whether a refresh could start and would change something."""
        return not context.busy and context.step > context.last_export_step

    def steps_between(self, num_steps: int) -> float | None:
        """Returns None: it depends on how long a refresh takes."""
        del num_steps


@dataclasses.dataclass(frozen=True)
class Never:
    """Never due: the initial index serves to the end."""

    def __call__(self, context: TriggerContext) -> bool:
        """Returns False."""
        del context
        return False

    def steps_between(self, num_steps: int) -> float | None:
        """Returns infinity."""
        del num_steps
        return math.inf


@dataclasses.dataclass(frozen=True)
class OnDrift:
    """Due when the index has drifted from the live document encoder by as much as a threshold.

    Measured `check_every`, 2 `check_every`, ... steps after the last export, unless a refresh
    runs. Only a step that is shown is measured: a caller that shows every s-th step to the trigger
    wants a multiple of s for `check_every`.

    Attributes:
        measure: `(params, snapshot) -> drift`, 0 for an index without any; see
            `ragjax.refresh.drift`.
        threshold: Least drift that is refreshed.
        check_every: Steps from one measurement to the next.
    """

    measure: DriftMeasure
    threshold: float
    check_every: int = DEFAULT_CHECK_EVERY

    def __post_init__(self) -> None:
        """Refuses a threshold that always or never fires, and less than a step."""
        if not 0 < self.threshold < math.inf:
            raise ValueError(
                f"The threshold of the drift must be above 0, got {self.threshold}; to refresh "
                "all the time use AsSoonAsPossible()"
            )
        _check_steps("check_every", self.check_every)

    def __call__(self, context: TriggerContext) -> bool:
        """Measures where it is time to and tells whether the threshold is reached.

        Raises:
            ValueError: The measure is not a number.
        """
        elapsed = context.step - context.last_export_step
        if context.busy or elapsed <= 0 or elapsed % self.check_every:
            return False
        value = float(self.measure(context.params, context.snapshot))
        if math.isnan(value):
            raise ValueError(
                f"The drift measured at step {context.step} is not a number; look for embeddings "
                "that are not finite"
            )
        return value >= self.threshold

    def steps_between(self, num_steps: int) -> float | None:
        """Returns None, or infinity where the run ends before the first measurement."""
        return None if num_steps > self.check_every else math.inf


def parse_trigger(text: str, *, measure: DriftMeasure | None = None) -> Trigger:
    """Reads a trigger as users write it.

    Whole numbers may also be written as 1e3, 16k or 2m.

    Args:
        text: `500` or `every:500` | `0-1000:500,1000-:2000` | `asap` | `never` | `drift:0.05` or
            `drift:0.05/100`, the latter with the steps between measurements.
        measure: What measures the drift, needed by `drift` only; see `OnDrift`.

    Raises:
        ValueError: None of these forms; the message lists them and says what is wrong.
    """
    try:
        return _parse(text.strip().lower(), measure)
    except ValueError as error:
        raise ValueError(
            f"Cannot read {text!r} as a time to refresh: {error}; it is one of: {_FORMS}"
        ) from error


def _parse(text: str, measure: DriftMeasure | None) -> Trigger:
    """Reads a trigger; a ValueError says what is wrong without the forms."""
    if text == "asap":
        return AsSoonAsPossible()
    if text == "never":
        return Never()
    kind, colon, rest = text.partition(":")
    if kind == "drift":
        return _parse_drift(rest, measure)
    if kind == "every" or not colon:
        return EveryNSteps(_whole(rest if colon else text))
    if "-" not in kind:
        raise ValueError(f"{kind!r} is not known")
    return StepRanges([_parse_range(part.strip()) for part in text.split(",")])


def _parse_drift(text: str, measure: DriftMeasure | None) -> OnDrift:
    """Reads "0.05" or "0.05/100"."""
    threshold, slash, check_every = text.partition("/")
    try:
        value = float(threshold)
    except ValueError:
        raise ValueError(f"{threshold!r} is not a number") from None
    if measure is None:
        raise ValueError(
            "drift needs something that measures it: pass measure=EmbeddingDrift(...) or "
            "TopKDrift(...), or take a number of steps"
        )
    return OnDrift(measure, value, _whole(check_every) if slash else DEFAULT_CHECK_EVERY)


def _parse_range(text: str) -> StepRange:
    """Reads "0-1000:500" or "1000-:2000"."""
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a range of steps")
    start, stop, every = match.groups()
    return StepRange(_whole(start), _whole(stop) if stop.strip() else None, _whole(every))


def _whole(text: str) -> int:
    """Reads a whole number such as 500, 1e3, 1.5k or 2m."""
    match = _WHOLE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text.strip()!r} is not a whole number of steps")
    digits, unit = match.groups()
    exponent = 0 if unit is None else _UNITS[unit] if unit in _UNITS else int(unit[1:])
    value = Decimal(digits) * 10**exponent
    if value != int(value):
        raise ValueError(f"{text.strip()!r} is not a whole number of steps")
    return int(value)


def _check_steps(name: str, value: int) -> None:
    """Refuses what is not a positive number of steps."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of steps, at least 1, got {value!r}")


def _span(item: StepRange) -> str:
    """Writes a range of steps as the user does."""
    return f"{item.start}-{'' if item.stop is None else item.stop}"
