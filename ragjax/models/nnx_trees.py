"""The only place that converts between Flax NNX modules and plain nested dicts of arrays."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]


def split(module: nnx.Module) -> tuple[Any, Params]:
    """Split a module into its static structure and its parameters.

    Args:
      module: any NNX module whose whole state is arrays.

    Returns:
      `(graphdef, params)`: `params` is a nested dict, keyed by attribute name, of arrays (of
      `jax.ShapeDtypeStruct` for an abstract module). `graphdef` is hashable and holds no array.
    """
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: Any, params: Params) -> Any:
    """Rebuild the module that `split` took apart; works under `jax.jit` and `jax.grad`.

    Args:
      graphdef: from `split`.
      params: nested dict of the same structure as `split` returned; leaves may be tracers.

    Returns:
      A module of the same class, holding `params`.
    """
    return nnx.merge(graphdef, params)


def abstract(make_module: Callable[[], nnx.Module]) -> tuple[Any, Params]:
    """Split the module that `make_module` would build, without computing any array.

    Args:
      make_module: builds the module, for instance `lambda: Bert(config, rngs=nnx.Rngs(0))`.

    Returns:
      `(graphdef, params)` as `split`, with `jax.ShapeDtypeStruct` leaves: the target that
      `ragjax.models.safetensors.apply_key_table` fills.
    """
    return split(nnx.eval_shape(make_module))


def stacked(make_layer: Callable[[jax.Array], nnx.Module], key: jax.Array, num_layers: int) -> Any:
    """Build `num_layers` identical layers as one module whose arrays are stacked on axis 0.

    Args:
      make_layer: builds one layer from a random key.
      key: random key; layer i gets the i-th of its splits.
      num_layers: number of layers, at least 1.

    Returns:
      One module of the layer's class; every array has a leading axis of size `num_layers`.
      Run it with `scan_layers`.
    """
    return nnx.vmap(make_layer, in_axes=0, out_axes=0)(jax.random.split(key, num_layers))


def scan_layers(layers: Any, step: Callable[[Any, jax.Array], jax.Array], hidden: Any) -> Any:
    """Apply stacked layers one after the other; the layer is traced and compiled once.

    Args:
      layers: module from `stacked`.
      step: `(layer, hidden) -> hidden`, given one unstacked layer.
      hidden: carry, of fixed shape and dtype.

    Returns:
      The carry after the last layer.
    """
    graphdef, state = nnx.split(layers)

    def body(carry: Any, layer_state: Any) -> tuple[Any, None]:
        return step(nnx.merge(graphdef, layer_state), carry), None

    return jax.lax.scan(body, hidden, state)[0]
