"""The parts of benchmarks/models.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import load_script

from ragjax.models import LMBatch, Tokens
from ragjax.models.decoder import model as decoder
from ragjax.models.encoder import make_encode
from ragjax.models.encoders import bert
from ragjax.models.encoders.bert import BertConfig
from ragjax.models.layers.pooling import mean_pool
from ragjax.models.testing.language_model import tiny_decoder_config


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks/models.py")


def tiny_sizes(script):
    encoder = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        intermediate_size=96,
        max_positions=32,
    )
    decoder_config = tiny_decoder_config(num_layers=1, vocab_size=64)
    return script.Sizes("float32", encoder, 4, 32, decoder_config, 2, 25, 8)


def counted(function, *shapes):
    """What XLA's own analysis counts; of a loop it counts one pass, so there is one layer."""
    return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


def test_an_encoders_multiplications_are_those_xla_counts(script):
    sizes = tiny_sizes(script)
    _, shapes = bert.FAMILY.abstract(sizes.encoder)
    tokens = Tokens(
        jax.ShapeDtypeStruct((4, 32), jnp.int32), jax.ShapeDtypeStruct((4, 32), jnp.bool_)
    )
    found = counted(make_encode(bert.FAMILY, sizes.encoder, mean_pool), shapes, tokens)
    # Norms, softmax and the activation are a tenth or so at these sizes.
    assert 0.75 < script.encoder_flops(sizes.encoder, 4, 32) / found <= 1.0


def test_a_decoders_multiplications_are_at_most_those_xla_counts(script):
    config = tiny_sizes(script).decoder
    shapes = jax.eval_shape(lambda key: decoder.init_params(config, key), jax.random.key(0))

    def array(length, dtype):
        return jax.ShapeDtypeStruct((2, length), dtype)

    batch = LMBatch(
        array(25, jnp.int32), array(25, jnp.bool_), array(8, jnp.int32), array(8, jnp.bool_)
    )
    found = counted(lambda p, b: decoder.token_log_probs(config, p, b), shapes, batch)
    # XLA multiplies the masked half of the attention, too.
    assert 0.65 < script.decoder_flops(config, 2, 32, 8) / found <= 1.0


@pytest.mark.parametrize(
    "kind,expected",
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("TPU v5 lite", 197.0),
        ("cpu", None),
    ],
)
def test_the_peak_of_known_devices(script, kind, expected):
    assert script.peak_tflops(kind) == expected


def test_the_table_shows_rates_and_shares(script):
    work = script.Work("encoder", 1000, 2e12, {})
    lines = script.report(work, {"JAX": [0.5, 0.1, 0.2], "PyTorch": [0.4, 0.4, 0.4]}, 100.0)
    assert lines[0] == "encoder: 1,000 tokens, 2 TFLOP a step"
    assert lines[1].split() == (
        "JAX 200.0 ms 5,000 tokens/s 10 TFLOP/s 10.0 % of the peak 2.00x PyTorch".split()
    )
    assert "%" not in script.report(work, {"JAX": [0.1]}, None)[1]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["encoder", "decoder"])
def test_every_step_runs_and_a_training_step_lowers_the_loss(script, model):
    options = script.Options(torch=False)
    make_work = {"encoder": script.encoder_work, "decoder": script.decoder_work}[model]
    forward = make_work(tiny_sizes(script), "forward", options)
    assert script.measure(forward, 1)["JAX"][0] > 0
    train = make_work(tiny_sizes(script), "train", options)
    assert train.flops == pytest.approx(3 * forward.flops)
    step = train.steps["JAX"]()
    losses = [float(step()) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_an_implementation_that_cannot_run_leaves_the_others(script, capsys):
    def broken():
        raise RuntimeError("no compiler")

    work = script.Work("encoder", 1, 1.0, {"JAX": lambda: lambda: 1, "PyTorch": broken})
    assert list(script.measure(work, 2)) == ["JAX"]
    assert "PyTorch: RuntimeError: no compiler" in capsys.readouterr().out


def test_full_sizes_are_those_of_the_published_models(script):
    config = script.SIZES["full"].decoder
    shapes = jax.eval_shape(lambda key: decoder.init_params(config, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(1.236e9, rel=1e-3)
    _, shapes = bert.FAMILY.abstract(script.SIZES["full"].encoder)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(1.089e8, rel=1e-3)
    smollm2 = jax.eval_shape(
        lambda key: decoder.init_params(script.SMOLLM2, key), jax.random.key(0)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2)) == pytest.approx(134.5e6, rel=1e-3)
    assert dataclasses.asdict(script.Options())["size"] == "auto"
    assert np.isfinite(script.SIZES["tiny"].texts)
