"""ModernBERT's layers and configuration; its parity with PyTorch is in test_encoder_parity.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ragjax.models.encoders import modernbert
from ragjax.models.encoders.modernbert import ModernBert, ModernBertConfig
from ragjax.models.files.key_table import apply_key_table, named_tensors
from ragjax.models.inputs import Tokens
from ragjax.models.layers.stacks import abstract, merge
from ragjax.models.testing.encoder import random_params

CONFIG = ModernBertConfig(
    vocab_size=50,
    hidden_size=16,
    num_layers=4,
    num_heads=2,
    intermediate_size=24,
    max_positions=30,
    global_layers=(True, False, False, True),
    local_attention=6,
)
OLD = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 30,
    "global_attn_every_n_layers": 3,
    "local_attention": 6,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def run(config, params, tokens):
    graphdef, _ = abstract(lambda: ModernBert(config, rngs=nnx.Rngs(0)))
    encode = jax.jit(lambda params: merge(graphdef, params)(tokens))
    return np.asarray(encode(params))


@pytest.fixture
def tokens(rng):
    ids = jnp.asarray(rng.integers(0, 50, (1, 20)), jnp.int32)
    return Tokens(ids, jnp.ones(ids.shape, bool))


def test_a_local_layer_sees_half_the_window_on_each_side(tokens):
    """Of one local layer, the last token is seen by the three before it only."""
    config = dataclasses.replace(CONFIG, num_layers=1, global_layers=(False,))
    params = random_params(modernbert.FAMILY, config, 0, vary=True)
    changed = tokens._replace(ids=tokens.ids.at[0, -1].add(1) % 50)
    difference = np.abs(run(config, params, tokens) - run(config, params, changed)).max(axis=2)[0]
    np.testing.assert_array_equal(difference > 1e-6, np.arange(20) >= 16)
    everywhere = dataclasses.replace(config, global_layers=(True,))
    difference = np.abs(run(everywhere, params, tokens) - run(everywhere, params, changed))
    assert (difference.max(axis=2) > 0).all()


def test_the_layer_of_a_long_stack_is_compiled_once(tokens):
    graphdef, params = abstract(lambda: ModernBert(CONFIG, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    program = jax.make_jaxpr(lambda params: merge(graphdef, params)(tokens))(params)
    scans = [equation for equation in program.eqns if equation.primitive.name == "scan"]
    assert [equation.params["length"] for equation in scans] == [CONFIG.num_layers]


@pytest.mark.parametrize("biased", [True, False])
def test_tensors_go_back_exactly_and_the_first_norm_does_not_exist(biased):
    config = dataclasses.replace(
        CONFIG, norm_bias=biased, attention_bias=biased, mlp_bias=biased, num_layers=4
    )
    params = random_params(modernbert.FAMILY, config, 0, vary=True)
    table = modernbert.key_table(config)
    tensors = named_tensors(params, table)
    norms = [name for name in tensors if name.endswith("attn_norm.weight")]
    assert norms == [f"layers.{layer}.attn_norm.weight" for layer in (1, 2, 3)]
    assert ("layers.0.mlp.Wi.bias" in tensors) == biased
    loaded = apply_key_table(tensors, table, params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_single_layer_has_no_attention_norm():
    config = dataclasses.replace(CONFIG, num_layers=1, global_layers=(True,))
    _, params = abstract(lambda: ModernBert(config, rngs=nnx.Rngs(0)))
    assert "attention_norms" not in params
    assert not any("attn_norm" in name for name in modernbert.key_table(config))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"layer_types": [FULL, SLIDING, SLIDING, FULL], "global_attn_every_n_layers": 7},
        {
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": 160000.0},
                SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
            },
            "global_rope_theta": 1.0,
            "local_rope_theta": 1.0,
        },
        {"global_rope_theta": None, "local_rope_theta": None},
    ],
)
def test_old_and_new_fields_are_read(change):
    assert modernbert.parse_config(OLD | change) == CONFIG


def test_config_is_written_in_both_forms():
    config = dataclasses.replace(CONFIG, global_theta=7.0, local_theta=3.0, norm_bias=True)
    written = modernbert.format_config(config)
    assert modernbert.parse_config(written) == config
    new = ("layer_types", "rope_parameters")
    old = {name: value for name, value in written.items() if name not in new}
    assert modernbert.parse_config(old) == config


def test_a_longer_text_than_the_positions_is_refused():
    tokens = Tokens(jnp.zeros((1, 31), jnp.int32), jnp.ones((1, 31), bool))
    with pytest.raises(ValueError, match="31 tokens per text, but the model has 30 positions"):
        run(CONFIG, random_params(modernbert.FAMILY, CONFIG, 0), tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 16}, "hidden_size 16 is not an even multiple of num_attention"),
        ({"hidden_activation": "silu"}, "hidden_activation 'silu'"),
        ({"layer_types": [FULL]}, "layer_types names 1 layers, num_hidden_layers is 4"),
        ({"layer_types": [FULL, SLIDING, "x", FULL]}, "layer_types must be a list of"),
        ({"layer_types": 3}, "layer_types must be a list of"),
        ({"global_attn_every_n_layers": 0}, "global_attn_every_n_layers must be a positive"),
        ({"local_attention": "6"}, "local_attention must be a positive whole number"),
        ({"rope_parameters": {FULL: {"rope_type": "yarn"}}}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": {FULL: 3}}, "rope_parameters must hold an object"),
        ({"rope_parameters": [1]}, "rope_parameters must hold an object"),
        ({"global_rope_theta": -1.0}, "global_rope_theta must be a positive number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be .* up to 1000"),
    ],
)
def test_unsupported_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        modernbert.parse_config(OLD | change)
