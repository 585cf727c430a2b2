"""Arrays inside `jax.shard_map`, which remembers over which axes of the mesh each may vary."""

from jax import Array, lax, typeof


def varying_alike(*arrays: Array) -> list[Array]:
    """Marks each array as varying over every mesh axis over which any of them does.

    A function with a gradient of its own needs it: what it returns as the gradient of an array
    that is the same on all devices is then summed over them. Outside `jax.shard_map` nothing
    changes.

    Args:
        *arrays: Any shapes.

    Returns:
        The same arrays.
    """
    axes = frozenset().union(*(typeof(array).mat.varying for array in arrays))
    return [
        lax.pcast(array, tuple(missing), to="varying") if missing else array
        for array, missing in ((array, axes - typeof(array).mat.varying) for array in arrays)
    ]
