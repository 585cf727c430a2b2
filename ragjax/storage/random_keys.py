"""Typed random keys (`jax.random.key`) as the plain numbers that files hold."""

from typing import Any

import jax


def key_data(tree: Any) -> Any:
    """Returns a tree with its typed random keys as integers, `[..., 2]` or so; other leaves stay.

    Args:
        tree: Of arrays or `jax.ShapeDtypeStruct`.
    """

    def plain(leaf: Any) -> Any:
        if not _is_key(leaf):
            return leaf
        struct = isinstance(leaf, jax.ShapeDtypeStruct)
        return jax.eval_shape(jax.random.key_data, leaf) if struct else jax.random.key_data(leaf)

    return jax.tree.map(plain, tree)


def with_keys(arrays: Any, template: Any) -> Any:
    """Returns arrays, as of `key_data`, with the typed random keys of a template.

    Args:
        arrays: Tree with integers where the template has keys.
        template: Tree of arrays or `jax.ShapeDtypeStruct`.
    """

    def typed(like: Any, leaf: Any) -> Any:
        if not _is_key(like):
            return leaf
        kinds = []  # the kind of key, which jax tells of arrays and of what it traces only
        jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), like)
        return jax.random.wrap_key_data(leaf, impl=kinds[0])

    return jax.tree.map(typed, template, arrays)


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
