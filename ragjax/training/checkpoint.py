"""Checkpoints: orbax underneath, digests, a finite check and a way back to the last good one."""

import operator
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from ragjax.storage import named_if_full, publish, read_sealed, sha256, walk_digests, write_sealed
from ragjax.storage.processes import everyone, is_first, meet, several
from ragjax.storage.random_keys import key_data, with_keys

FORMAT = 1
_DIGESTS = "ragjax.json"
# Seconds after which a host sees what another one has written, at the latest.
_SEEN_AFTER = 90


class Restored(NamedTuple):
    """A checkpoint read back and verified."""

    step: int  # the step it was saved at
    state: Any  # tree with the structure, shapes and dtypes of the template
    info: dict  # the plain values saved beside it (data position, index version, ...)


class Checkpointer:
    """Saves a tree of arrays from time to time and finds the newest one that is whole.

    orbax writes each step into a folder of its own by rename, but restores flipped bytes and NaN
    without a word. So each step also gets a file of sha256 digests, written after orbax has
    committed: a step without it, or whose bytes differ from it, is passed over with the reason.
    """

    def __init__(
        self, folder: str | os.PathLike, *, keep: int = 2, report: Callable[[str], None] = print
    ):
        """Opens (or creates) the folder of checkpoints.

        Args:
            folder: Where the steps live, one sub-folder each.
            keep: How many whole steps are kept; older ones, and damaged ones, are removed after a
                save.
            report: Called with one sentence for each step that is passed over or removed because
                it is damaged.

        Raises:
            ValueError: If `keep` is less than one.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self._folder = Path(folder).resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._keep, self._report = keep, report
        self._whole: set[int] = set()  # steps that this object wrote or verified
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, state: Any, info: dict | None = None, *, wait: bool = True) -> None:
        """Writes one step, and removes what it replaces once it is complete on disk.

        The step itself stays, also where the folder holds later ones: those of an earlier life of
        the run, which began again before them because they were damaged.

        Args:
            step: Number of the step.
            state: Tree of arrays, typed random keys among them; copied to the host before this
                returns, so a training step may take its buffers.
            info: JSON values to come back with it.
            wait: Return when the step is complete on disk. False: a thread writes it, and what it
                fails with is raised by the next `save` or `wait`.

        Raises:
            ValueError: If an array holds NaN or infinity; nothing is written then, so a diverged
                run cannot push out the last good checkpoint.
        """
        self.wait()
        arrays = key_data(state)
        step, info = operator.index(step), dict(info or {})
        building = self._folder / f".{step}.saving"
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        if several():  # each writes what its devices have
            _check_finite(step, arrays)
            if is_first():
                self._remove_unfinished()
            arrays = _orbax().save_async(building, jax.tree.map(_of_all, arrays))
        else:
            arrays = jax.tree.map(lambda leaf: np.array(leaf), arrays)
        about = {"format": FORMAT, "step": step, "info": info, "arrays": _array_table(state)}
        self._writing = self._pool.submit(self._write, building, arrays, about, nbytes)
        if wait:
            self.wait()

    @property
    def busy(self) -> bool:
        """Whether a step is being written."""
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Returns when the last step is complete on disk; raises what its writing failed with."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, building: Path, arrays: Any, about: dict[str, Any], nbytes: int) -> None:
        """Writes arrays, or waits until all processes have theirs written; adds the digests."""
        # Beside its name, so that a save that fails leaves an earlier one of the same step alone.
        step, target = about["step"], self._folder / str(about["step"])
        if not is_first():  # which says by digests that the step is whole
            arrays.result()
            return
        if not several():
            _check_finite(step, arrays)
            self._remove_unfinished()
        try:
            with named_if_full(target, nbytes):
                arrays.result() if several() else _orbax().save(building, arrays)
            digests = walk_digests(building, known={})
            write_sealed(building / _DIGESTS, about | {"sha256": digests})
            shutil.rmtree(target, ignore_errors=True)  # a step that an earlier life left behind
            publish(building, target)
        finally:
            self._remove_unfinished()
        self._whole.add(step)
        self._remove_old(step)

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Waits; where something else failed before, that is raised and not the writing."""
        try:
            self.wait()
        except Exception as second:
            if error is None:
                raise
            error.add_note(f"The last checkpoint could not be written: {second}")

    def steps(self) -> list[int]:
        """Returns the numbers of the steps on disk, oldest first, whole or not."""
        return sorted(
            int(p.name) for p in self._folder.iterdir() if p.is_dir() and p.name.isdigit()
        )

    def latest_good(self, template: Any, *, field: str = "") -> Restored | None:
        """Returns the newest step whose bytes match their digests, or None if there is none.

        Args:
            template: Tree of arrays (or `jax.ShapeDtypeStruct`) with the expected structure.
            field: The only field of the saved state to read, of which `template` is; "" reads all.

        Raises:
            ValueError: If a whole checkpoint has other arrays than `template`: the run's options
                have changed since.
        """
        self.wait()
        meet()  # what process 0 has written is there for all, and stays until all have read it
        try:
            return self._latest_good(template, field)
        finally:
            meet()

    def _latest_good(self, template: Any, field: str) -> Restored | None:
        step = self._newest_whole()
        if several():
            step = self._that_of_first(step)
        if step is None:
            return None
        folder = self._folder / str(step)
        manifest = read_sealed(folder / _DIGESTS, what="checkpoint")
        return Restored(step, _load(folder, manifest["arrays"], template, field), manifest["info"])

    def _newest_whole(self) -> int | None:
        for step in reversed(self.steps()):
            if (problem := self._problem(step)) is None:
                return step
            self._report(f"checkpoint {self._folder / str(step)} is passed over: {problem}")
        return None

    def _that_of_first(self, mine: int | None) -> int | None:
        """Returns the step that process 0 of a run reads; waits until this one sees it."""
        chosen = int(everyone(-1 if mine is None else mine)[0, 0])
        deadline = time.monotonic() + _SEEN_AFTER
        while chosen >= 0 and chosen != mine and (problem := self._problem(chosen)) is not None:
            if time.monotonic() > deadline:
                raise ValueError(f"checkpoint {self._folder / str(chosen)}: {problem}")
            time.sleep(1)
        return None if chosen < 0 else chosen

    def _problem(self, step: int) -> str | None:
        """Says what is wrong with a step, None if its bytes match its digests."""
        problem = _verify(self._folder / str(step))
        self._whole.discard(step)
        if problem is None:
            self._whole.add(step)
        return problem

    def _remove_unfinished(self) -> None:
        """Removes what a save that failed or was killed left, which takes the room of the next."""
        for path in self._folder.glob(".*.saving*"):
            shutil.rmtree(path, ignore_errors=True)

    def _remove_old(self, saved: int) -> None:
        """Removes the steps that are not among the newest whole ones; damaged ones do not count."""
        kept = 1  # the one just saved
        for step in reversed(self.steps()):
            folder = self._folder / str(step)
            if step == saved:
                continue
            if kept < self._keep:
                # A later step is read again: damaged, it would push out good ones.
                trusted = step in self._whole and step < saved
                problem = None if trusted else self._problem(step)
                if problem is None:
                    kept += 1
                    continue
                self._report(f"checkpoint {folder} is removed: {problem}")
            shutil.rmtree(folder, ignore_errors=True)
            self._whole.discard(step)


def _load(folder: Path, arrays: dict, template: Any, field: str) -> Any:
    """Reads a verified checkpoint, or one field of it, to where the template's arrays lie."""
    if field:
        prefix = f".{field}"
        arrays = {
            f"[{field!r}]{name.removeprefix(prefix)}": entry
            for name, entry in arrays.items()
            if name.startswith(prefix)
        }
        template = {field: template}
    # orbax casts and pads to whatever is asked for without a word: compare first.
    expected = _array_table(template)
    for name in sorted(expected.keys() | arrays.keys()):
        if arrays.get(name) != expected.get(name):
            raise ValueError(
                f"checkpoint {folder} is of another run: {name} is {arrays.get(name)} there and"
                f" {expected.get(name)} here (other model, trained towers or optimiser?); use"
                " another output folder"
            )
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def described(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or first
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)

    abstract = jax.tree.map(described, key_data(template))
    context = _orbax().Context()
    context.pytree.loading.partial_load = bool(field)
    with context:
        state = with_keys(_orbax().load(folder, abstract), template)
    return state[field] if field else state


def _check_finite(step: int, arrays: Any) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    if bad := [jax.tree_util.keystr(path) for path, leaf in leaves if not _is_finite(leaf)]:
        raise ValueError(
            f"step {step} is not saved: NaN or infinity in {', '.join(bad[:5])}"
            f" ({len(bad)} arrays); the last checkpoint stays"
        )


def _is_finite(array: Any) -> bool:
    # jax's issubdtype: numpy counts bfloat16 and the 8-bit floats as no numbers at all.
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return True
    return bool((jnp if isinstance(array, jax.Array) else np).isfinite(array).all())


def _of_all(leaf: Any) -> Any:
    """Returns an array as the processes of a run save it: over all their devices, or by one."""
    return np.asarray(leaf) if leaf.is_fully_addressable else leaf


def _array_table(tree: Any) -> dict[str, list]:
    return {
        jax.tree_util.keystr(path): [str(leaf.dtype), list(np.shape(leaf))]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _orbax() -> Any:
    # Imported late: checkpoints are not needed to build a step, and orbax takes a while to load.
    from orbax.checkpoint import v1

    return v1


def _verify(folder: Path) -> str | None:
    path = folder / _DIGESTS
    if not path.is_file():
        return "it was not finished (no digests)"
    try:
        manifest = read_sealed(path, what="checkpoint", version=FORMAT)
        digests, _, _ = manifest["sha256"], manifest["arrays"], manifest["info"]
    except (ValueError, KeyError, TypeError) as error:
        return f"{_DIGESTS} cannot be read ({error})"
    for name, expected in digests.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if (found := sha256(file)) != expected:
            return f"{name} has sha256 {found[:12]}…, expected {expected[:12]}…"
    return None
