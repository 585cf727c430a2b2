"""Where the arrays of a run lie: the only module that names the axes of the mesh.

The devices form a mesh of two axes, `data` x `fsdp`. The rows of a batch are divided over both.
Parameters and optimiser states are divided over `fsdp` and copied along `data`, so that
`fsdp` = 1 is data parallelism and `fsdp` = all devices is ZeRO's third stage.

References:
    Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
    2020, section 5; Xu et al., "GSPMD", 2021.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ragjax.storage.processes import put

_AXES = _DATA, _FSDP = "data", "fsdp"
ROWS = _DATA
"""Axis over which a step under `jax.pmap` has its rows."""
# Values below which every device has an array whole: gathering it would take longer than reading.
_SMALLEST = 2**16
# Key of the parameters that are stacks of layers, which a scan takes one after the other.
_STACKS = "layers"
T = TypeVar("T")


class Layout(NamedTuple):
    """The mesh of a run; none for a single device, where everything is as JAX does it."""

    mesh: Mesh | None = None
    mapped: bool = False  # training steps run under `jax.pmap`

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def devices(self) -> list[jax.Device] | None:
        """Those of this process; None for a single device, the default one."""
        if self.mesh is None:
            return None
        here = jax.process_index()
        return [device for device in self.mesh.devices.flat if device.process_index == here]

    @property
    def rows_axis(self) -> str | None:
        """The mapped axis of training steps; None: they run under `jax.jit`."""
        return ROWS if self.mapped else None

    def describe(self) -> str:
        """Returns a few words on the mesh."""
        if self.mesh is None:
            return "1 device"
        return f"{self.num_devices} devices: " + " x ".join(
            f"{axis} {size}" for axis, size in self.mesh.shape.items()
        )

    def sharding(self, path: str, shape: Sequence[int]) -> NamedSharding | None:
        """Returns where a parameter, or a value of the optimiser for each of its values, goes.

        Divided is the largest axis that `fsdp` divides; of a stack of layers never the first one.

        Args:
            path: Keys of the parameter, joined by "/".
            shape: Of the parameter.
        """
        if self.mesh is None:
            return None
        parts, spec = self.mesh.shape.get(_FSDP, 1), PartitionSpec()
        first = int(_STACKS in path.split("/"))
        fitting = [axis for axis in range(first, len(shape)) if shape[axis] % parts == 0]
        if parts > 1 and fitting and math.prod(shape) >= _SMALLEST:
            largest = max(fitting, key=lambda axis: shape[axis])
            # Without a None behind it, as the results of a compiled step have it.
            spec = PartitionSpec(*[None] * largest, _FSDP)
        return NamedSharding(self.mesh, spec)

    def divide(self, batch: T) -> T:
        """Divides the rows of a batch inside of a compiled program, as `spread_rows` does."""
        if self.mesh is None or self.mapped:
            return batch
        mesh, fixed = self.mesh, jax.lax.with_sharding_constraint
        return jax.tree.map(lambda leaf: fixed(leaf, _of_rows(mesh, leaf)), batch)

    def place(self, tree: T) -> T:
        """Puts parameters or a state of training where they go."""
        if self.mesh is None:
            return tree

        def place(path: Any, leaf: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return put(leaf, self.sharding(name, leaf.shape))

        return jax.tree_util.tree_map_with_path(place, tree)


def make_layout(devices: Sequence[jax.Device], *, fsdp: int = 1, mapped: bool = False) -> Layout:
    """Returns the layout over some devices.

    Args:
        devices: At least one.
        fsdp: Devices that have an equal part of each parameter.
        mapped: Run training steps under `jax.pmap`, which needs `fsdp` 1.

    Raises:
        ValueError: `fsdp` does not divide the number of devices.
    """
    count = len(devices)
    if fsdp < 1 or count % fsdp:
        raise ValueError(f"fsdp={fsdp} does not divide the {count} devices")
    if count == 1:
        return Layout()
    # As `jax.pmap` makes it, so that what lies there is what its programs expect.
    shape, axes = ((count,), (ROWS,)) if mapped else ((count // fsdp, fsdp), _AXES)
    kinds = (AxisType.Auto,) * len(shape)
    return Layout(jax.make_mesh(shape, axes, axis_types=kinds, devices=list(devices)), mapped)


def mesh_of(params: Any) -> Mesh | None:
    """Returns the mesh that parameters lie on; None: on one device."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh  # pyrefly: ignore[bad-return]  (of placed arrays never abstract)
    return None


def rows_multiple(params: Any) -> int:
    """Returns what the rows of a batch must be a multiple of for the devices of some parameters."""
    mesh = mesh_of(params)
    return 1 if mesh is None else mesh.size


def copy_to_all(tree: T, params: Any) -> T:
    """Copies small arrays to each of the devices that some parameters lie on."""
    mesh = mesh_of(params)
    if mesh is None:
        return tree
    return jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, PartitionSpec())), tree)


def spread_rows(batch: T, params: Any) -> T:
    """Divides the rows of a batch over the devices that some parameters lie on.

    Args:
        batch: Arrays whose first axis is the rows. Rows that all devices do not divide evenly are
            divided over one axis of the mesh, or, where that is not possible either, computed
            by each device.
        params: What the batch will be computed with.
    """
    mesh = mesh_of(params)
    if mesh is None:
        return batch
    return jax.tree.map(lambda leaf: put(leaf, _of_rows(mesh, leaf)), batch)


def _of_rows(mesh: Mesh, leaf: Any) -> NamedSharding:
    """Returns how the rows of an array are divided."""
    single = sorted(mesh.shape.items(), key=lambda axis: -axis[1])
    ways = [(mesh.axis_names, mesh.size), *single]
    rows = leaf.shape[:1]
    axes = next((axes for axes, count in ways if rows and rows[0] % count == 0), None)
    return NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec())
