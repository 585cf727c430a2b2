"""RoBERTa's positions and configuration; its parity with PyTorch is in test_encoder_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ragjax.models.encoders import roberta
from ragjax.models.encoders.roberta import Roberta, RobertaConfig
from ragjax.models.files.key_table import named_tensors
from ragjax.models.inputs import Tokens
from ragjax.models.layers.stacks import abstract, merge
from ragjax.models.testing.encoder import random_params

CONFIG = RobertaConfig(
    vocab_size=50,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    intermediate_size=24,
    max_positions=9,
    type_vocab_size=1,
    padding_id=1,
)
HUGGINGFACE = {
    "model_type": "roberta",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 11,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}


def run(params, tokens):
    graphdef, _ = abstract(lambda: Roberta(CONFIG, rngs=nnx.Rngs(0)))
    encode = jax.jit(lambda params: merge(graphdef, params)(tokens))
    return np.asarray(encode(params))


@pytest.mark.slow
def test_a_padding_token_inside_a_text_takes_no_position():
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    params = random_params(roberta.FAMILY, CONFIG, 0, vary=True)
    settings = {name: value for name, value in HUGGINGFACE.items() if name != "model_type"}
    model = transformers.RobertaModel(
        transformers.RobertaConfig(**settings), add_pooling_layer=False
    ).eval()
    tensors = named_tensors(params, roberta.FAMILY.key_table(CONFIG))
    model.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()})
    ids = np.array([[0, 7, 1, 9, 2, 8, 3, 4, 5], [0, 7, 2, 1, 1, 1, 1, 1, 1]], np.int32)
    mask = np.array([[1] * 9, [1] * 3 + [0] * 6], bool)
    with torch.inference_mode():
        expected = model(
            input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()
        ).last_hidden_state.numpy()
    hidden = run(params, Tokens(jnp.asarray(ids), jnp.asarray(mask)))
    np.testing.assert_allclose(hidden[mask], expected[mask], atol=1e-4)


def test_masked_slots_take_no_position_whatever_they_hold():
    params = random_params(roberta.FAMILY, CONFIG, 0, vary=True)
    mask = jnp.asarray([[True] * 4 + [False] * 5])
    padded, other = (Tokens(jnp.asarray([[0, 7, 9, 2] + [filler] * 5]), mask) for filler in (1, 40))
    alone = Tokens(padded.ids[:, :4], mask[:, :4])
    expected = run(params, alone)
    for tokens in (padded, other):
        hidden = run(params, tokens)
        assert np.isfinite(hidden).all()
        np.testing.assert_allclose(hidden[:, :4], expected, atol=1e-5)


def test_config_is_read_from_huggingface_fields_and_written_back():
    assert roberta.parse_config(HUGGINGFACE) == CONFIG
    for model_type in ("roberta", "xlm-roberta", "camembert"):
        config = roberta.parse_config(HUGGINGFACE | {"model_type": model_type})
        written = roberta.format_config(config)
        assert written["model_type"] == model_type
        assert written["max_position_embeddings"] == 11 and written["pad_token_id"] == 1
        assert roberta.parse_config(written) == config


def test_a_longer_text_than_the_positions_is_refused():
    params = random_params(roberta.FAMILY, CONFIG, 0)
    assert params["embeddings"]["positions"]["embedding"].shape == (11, 16)
    tokens = Tokens(jnp.zeros((1, 10), jnp.int32), jnp.ones((1, 10), bool))
    with pytest.raises(ValueError, match="10 tokens per text, but the model has 9 positions"):
        run(params, tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad_token_id": None}, "pad_token_id must be a whole number of at least 0, got None"),
        ({"pad_token_id": -1}, "pad_token_id must be a whole number of at least 0, got -1"),
        ({"max_position_embeddings": 2}, "max_position_embeddings 2 leaves no position after the"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"hidden_act": "silu"}, "hidden_act 'silu'"),
    ],
)
def test_unsupported_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        roberta.parse_config(HUGGINGFACE | change)


@pytest.mark.parametrize("prefix", ["roberta.", "camembert.", ""])
def test_published_key_variants_are_known(prefix):
    assert roberta.canonical_key(f"{prefix}embeddings.LayerNorm.bias") in (
        roberta.FAMILY.key_table(CONFIG)
    )
