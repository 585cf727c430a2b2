"""What a refresher keeps on disk because checkpoints name it, and finds again on a resume."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ragjax.refresh.background import Background
from ragjax.refresh.export import read_export
from ragjax.refresh.options import RefreshError, ResumeError
from ragjax.refresh.pipeline import Pipeline

# A trainer keeps a few checkpoints; what older ones name may go.
_CHECKPOINTS = 4
_POLL_SECONDS = 0.01


class KeptForCheckpoints:
    """Generations, and exported parameters of refreshes under way, that checkpoints name."""

    def __init__(
        self,
        background: Background,
        pipeline: Pipeline,
        report: Callable[[str], None],
        *,
        adopt_after: int,
    ) -> None:
        """Nothing is named yet; from 0, `adopt_after` promises that a resumed run is the same."""
        self._identical = adopt_after >= 0
        self._other = ", or continue with adopt_after=-1" if adopt_after > 0 else ""
        self._background, self._pipeline, self._report = background, pipeline, report
        # (generation, steps of exported parameters) that the newest checkpoints name.
        self._named: deque[tuple[int, frozenset[int]]] = deque(maxlen=_CHECKPOINTS)

    def pin(self, number: int, encoder_step: int, pending: Any) -> None:
        """Keeps what a checkpoint names, for as long as it may be the one that is read."""
        steps = frozenset([encoder_step] if pending is None else [encoder_step, int(pending[0])])
        if (number, steps) not in self._named:
            self._named.append((number, steps))
        self._pipeline.pin(
            frozenset(number for number, _ in self._named),
            frozenset(step for _, steps in self._named for step in steps),
        )

    def pending(self, scheduled: tuple[int, int] | None) -> list[Any] | None:
        """Returns the refresh under way as a checkpoint keeps it, None where there is none.

        Args:
            scheduled: Steps of the export and of its adoption, where that step is fixed: this
                then waits until the parameters are on disk.

        Returns:
            The two steps (-1: adopted when ready) and the digest of the parameters.
        """
        if scheduled is not None:
            return [*scheduled, self._wait_for(scheduled[0])]
        step = self._background.newest_step()
        digest = None if step is None else self._pipeline.exported.get(step)
        return None if digest is None else [step, -1, digest]

    def params_of_index(self, template: Any, step: int, digest: str, mismatch: str) -> Any | None:
        """Returns the parameters of a checkpoint's index that is gone, None where they are too.

        Args:
            template: Parameters of the same shapes.
            step: Of the parameters.
            digest: Of the parameters.
            mismatch: Why they cannot be used, if they cannot.

        Raises:
            ResumeError: They are gone, and the run must continue identically.
        """
        params = None if mismatch else self._read(template, step, digest)
        if params is not None:
            self._report(
                f"the index of step {step} that the checkpoint names is gone; it is built again "
                "from the exported parameters."
            )
            return params
        lost = mismatch or (
            f"the checkpoint names the index of step {step}, but neither that generation nor its "
            f"exported parameters are left in {self._pipeline.export_folder(step).parents[1]}"
        )
        if self._identical:
            raise ResumeError(
                f"The run cannot be continued identically: {lost}; start it again in another "
                f"folder{self._other}"
            )
        self._report(f"{lost}; the index is built from the present parameters.")
        return None

    def params_under_way(
        self, template: Any, export_step: int, adopt_step: int, digest: str
    ) -> Any | None:
        """Returns the parameters of the refresh under way at a checkpoint, None where gone.

        Args:
            template: Parameters of the same shapes.
            export_step: Of the parameters.
            adopt_step: When their index is due.
            digest: Of the parameters.

        Raises:
            ResumeError: They are gone, and the run must continue identically.
        """
        params = self._read(template, export_step, digest)
        if params is None and self._identical:
            folder = self._pipeline.export_folder(export_step).parents[1]
            raise ResumeError(
                f"The parameters of step {export_step}, whose index is due at step {adopt_step}, "
                f"are gone from {folder}; start the run again in another folder{self._other}"
            )
        return params

    def _read(self, template: Any, step: int, digest: str) -> Any | None:
        """Returns the exported parameters of a step, or None where they are not left."""
        try:
            export = read_export(self._pipeline.export_folder(step), template)
        except (OSError, ValueError) as error:
            self._report(f"the exported parameters of step {step} cannot be used: {error}")
            return None
        return export.params if export.digest == digest else None

    def _wait_for(self, step: int) -> str:
        """Waits until the parameters of a step are on disk and returns their digest."""
        while (digest := self._pipeline.exported.get(step)) is None:
            if not self._background.works and step not in self._pipeline.exported:
                raise RefreshError(
                    f"The parameters of step {step} could not be exported: "
                    f"{self._background.last_error or 'the refresher is closed'}"
                )
            time.sleep(_POLL_SECONDS)
        return digest
