import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ragjax.models import Tokens
from ragjax.models.layers import stacks
from ragjax.models.layers.linear import Linear
from ragjax.models.layers.stacks import (
    cast_floats,
    count_layers,
    merge,
    over_layers,
    scan_layers,
    split,
    split_last,
    stacked,
)
from ragjax.models.testing import tiny_encoder
from ragjax.models.trainable import ENCODER, join_layers, merge_trainable, split_trainable


class Residual(nnx.Module):
    def __init__(self, key):
        self.linear = Linear(3, 3, rngs=nnx.Rngs(key))

    def __call__(self, hidden, factor=1.0):
        return hidden + factor * jnp.tanh(self.linear(hidden))


class Stack(nnx.Module):
    def __init__(self, num_layers):
        self.layers = stacked(Residual, jax.random.key(0), num_layers)

    def __call__(self, hidden, inputs=None, remat=False):
        def step(layer, hidden, *factor):
            return layer(hidden, *factor)

        return scan_layers(self.layers, step, hidden, inputs=inputs, remat=remat)


GRAPHDEF, PARAMS = split(Stack(4))
HIDDEN = jnp.float32([[0.3, -1.0, 2.0], [1.0, 0.5, 0.0]])


def in_stacks(*sizes):
    ends = np.cumsum(sizes)
    return {
        "layers": tuple(
            jax.tree.map(lambda leaf, part=slice(end - size, end): leaf[part], PARAMS["layers"])
            for size, end in zip(sizes, ends, strict=True)
        )
    }


def by_hand(factors=(1.0, 1.0, 1.0, 1.0)):
    hidden = np.asarray(HIDDEN, np.float64)
    linear = PARAMS["layers"]["linear"]
    for kernel, bias, factor in zip(linear["kernel"], linear["bias"], factors, strict=True):
        hidden = hidden + factor * np.tanh(hidden @ np.asarray(kernel) + np.asarray(bias))
    return hidden


@pytest.mark.parametrize("params", [PARAMS, in_stacks(4), in_stacks(1, 3), in_stacks(2, 1, 1)])
@pytest.mark.parametrize("fewest,remat", [(1, False), (3, False), (1, True)])
def test_layers_run_in_turn_however_they_are_stacked(params, fewest, remat, monkeypatch):
    monkeypatch.setattr(stacks, "FEWEST_WRITTEN_OUT", fewest)
    found = merge(GRAPHDEF, params)(HIDDEN, remat=remat)
    np.testing.assert_allclose(found, by_hand(), atol=1e-5)


@pytest.mark.parametrize("fewest", [1, 3])
@pytest.mark.parametrize("params", [PARAMS, in_stacks(1, 3)])
def test_each_layer_gets_its_own_input(params, fewest, monkeypatch):
    monkeypatch.setattr(stacks, "FEWEST_WRITTEN_OUT", fewest)
    factors = (0.0, 2.0, -1.0, 0.5)
    found = merge(GRAPHDEF, params)(HIDDEN, jnp.float32(factors))
    np.testing.assert_allclose(found, by_hand(factors), atol=1e-5)


@pytest.mark.parametrize("longest,fewest,scans", [(3, 1, 0), (2, 1, 1), (3, 3, 1)])
def test_results_of_the_layers_are_stacked(longest, fewest, scans, monkeypatch):
    monkeypatch.setattr(stacks, "LONGEST_WRITTEN_OUT", longest)
    monkeypatch.setattr(stacks, "FEWEST_WRITTEN_OUT", fewest)

    def body(carry, layer):
        return carry + layer["a"], (carry * layer["b"][None], None)

    layers = {"a": jnp.float32([1, 2, 3]), "b": jnp.float32([[1, 0], [0, 1], [2, 2]])}
    first = jnp.ones((2, 1))  # two vectors
    last, (results, nothing) = over_layers(body, first, layers)
    np.testing.assert_array_equal(last, [[7], [7]])
    assert nothing is None
    np.testing.assert_array_equal(results[:, 0], [[1, 0], [0, 2], [8, 8]])
    program = str(jax.make_jaxpr(lambda first: over_layers(body, first, layers))(first))
    assert program.count("scan[") == scans


@pytest.mark.parametrize("sizes", [(4,), (3, 1), (1, 3)])
def test_the_last_layer_comes_off(sizes):
    below, top = split_last(merge(GRAPHDEF, in_stacks(*sizes)).layers)
    assert count_layers(below) == 3 and count_layers(top) == 1
    hidden = scan_layers([*below, top], lambda layer, hidden: layer(hidden), HIDDEN)
    np.testing.assert_allclose(hidden, by_hand(), atol=1e-5)


def saved_bytes(remat, length=64):
    """What the backward pass keeps of a forward pass."""
    graphdef, params = split(Stack(length))

    def loss(params):
        return merge(graphdef, params)(jnp.ones((256, 3)), remat=remat).sum()

    _, backward = jax.vjp(loss, params)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(backward))


@pytest.mark.slow
def test_rematerialisation_keeps_less_and_has_the_same_gradient():
    def gradient(remat):
        loss = lambda p: (merge(GRAPHDEF, p)(HIDDEN, remat=remat) ** 2).sum()  # noqa: E731  (closes over the case)
        return jax.jit(jax.grad(loss))(PARAMS)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
                 gradient(True), gradient(False))  # fmt: skip
    assert saved_bytes(True) < 0.6 * saved_bytes(False)


def reverse_scans(jaxpr):
    """Lengths of the scans that run backwards."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["reverse"]:
            yield equation.params["length"]
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from reverse_scans(getattr(inner, "jaxpr", inner))


@pytest.mark.slow
@pytest.mark.parametrize("num_layers,expected", [(1, []), (2, [2]), (None, [2])])
def test_frozen_layers_of_an_encoder_cost_no_backward_work(num_layers, expected):
    encoder = tiny_encoder()
    encode = jax.jit(encoder.encode)
    trainable, frozen = split_trainable(encoder.params, ENCODER, num_layers)
    tokens = Tokens(jnp.full((2, 5), 7, jnp.int32), jnp.ones((2, 5), bool))

    def loss(trainable):
        return encode(merge_trainable(trainable, frozen), tokens)[0, 0]

    assert list(reverse_scans(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr)) == expected
    expected_value = encode(encoder.params, tokens)[0, 0]
    np.testing.assert_allclose(loss(trainable), expected_value, rtol=1e-4)
    whole = join_layers(merge_trainable(trainable, frozen))
    jax.tree.map(np.testing.assert_array_equal, whole, encoder.params)
    assert ("embeddings" in trainable) is (num_layers is None)


def test_what_follows_the_layers_learns_with_them():
    params = {
        "embeddings": {"scale": jnp.ones(2)},
        "layers": {"scale": jnp.ones((3, 2))},
        "final_norm": {"scale": jnp.ones(2)},
        "projection": {"0": {"kernel": jnp.ones((2, 2))}},
        "attention_norms": {"scale": jnp.ones((3, 2))},
    }
    trainable, frozen = split_trainable(params, ENCODER, 1)
    assert sorted(trainable) == ["final_norm", "layers", "projection"]
    assert sorted(frozen) == ["attention_norms", "embeddings", "layers"]
    assert trainable["layers"]["scale"].shape == (1, 2)


@pytest.mark.parametrize("num_layers", [0, 3])
def test_more_layers_than_there_are_cannot_learn(num_layers):
    with pytest.raises(ValueError, match=f"between 1 and 2 .or None., got {num_layers}"):
        split_trainable(tiny_encoder().params, ENCODER, num_layers)


def test_only_floats_are_converted_and_gradients_keep_their_dtype():
    tree = {"w": jnp.ones(2), "ids": jnp.arange(2)}
    cast = cast_floats(tree, jnp.bfloat16)
    assert cast["w"].dtype == jnp.bfloat16 and cast["ids"].dtype == jnp.int32
    grad = jax.grad(lambda w: cast_floats(w, jnp.bfloat16).sum().astype(jnp.float32))(tree["w"])
    assert grad.dtype == jnp.float32
