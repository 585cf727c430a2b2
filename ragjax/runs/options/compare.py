"""Options of a comparison of two finished runs or evaluations."""

from dataclasses import dataclass
from typing import ClassVar

from ragjax.runs.options.checks import Options, at_least


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Options):
    """Compare two finished runs or evaluations, A and B, question by question.

    Attributes:
        compare: Folders of A and of B, each made by experiments/adapt.py, experiments/train_rag.py
            or experiments/evaluate.py.
        output: Output folder; an earlier comparison in it is replaced.
        system: The system that is compared in both, or one of A and one of B (`before after`);
            empty: what each ships, and of base models the hybrid.
        metric: Metrics that may not get worse from A to B by more than `max_loss`.
        max_loss: How much worse the mean of B may be in these, in the unit of the metric, so that
            the exit code is 0, and not 1; None: it is 0 whatever the difference.
        resamples: Bootstrap resamples behind each 95 % interval.
        seed: Of the bootstrap.
    """

    compare: tuple[str, ...]
    output: str = "runs/compare"
    system: tuple[str, ...] = ()
    metric: tuple[str, ...] = ()
    max_loss: float | None = None
    resamples: int = 2000
    seed: int = 0

    kind: ClassVar[str] = "comparison"
    program: ClassVar[str] = "experiments/evaluate.py --compare"
    distributed: ClassVar[str] = "off"

    def check(self) -> None:
        """Raises ValueError naming the field that is out of range, or the fields at odds."""
        super().check()
        at_least(self, 1, "resamples")
        at_least(self, 0, "max_loss")
        if len(self.compare) != 2 or not all(self.compare):
            raise ValueError(
                f"compare takes two folders, RUN_A RUN_B; got {len(self.compare)}"
                f" ({', '.join(map(repr, self.compare)) or 'none'})"
            )
        if len(self.system) > 2:
            raise ValueError(
                f"system takes one system, or one of A and one of B; got {len(self.system)}"
            )
        if self.metric and self.max_loss is None:
            raise ValueError(
                f"metric {' '.join(self.metric)}: it has no limit; add --max_loss, such as .01"
            )
        if self.max_loss is not None and not self.metric:
            raise ValueError(
                f"max_loss {self.max_loss:g}: of which metric? add --metric, such as recall@5"
            )
        if not self.output:
            raise ValueError("output must name a folder")
