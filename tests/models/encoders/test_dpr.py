"""The configuration of DPR towers; their parity with PyTorch is in test_encoder_parity.py."""

import pytest

from ragjax.models.encoders import dpr

HUGGINGFACE = {
    "architectures": ["DPRContextEncoder"],
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
    "projection_dim": 0,
}


@pytest.mark.parametrize(
    ("architecture", "tower"),
    [("DPRContextEncoder", "ctx_encoder"), ("DPRQuestionEncoder", "question_encoder")],
)
def test_the_architecture_says_which_tower_it_is(architecture, tower):
    config = dpr.parse_config(HUGGINGFACE | {"architectures": [architecture]})
    assert (config.tower, config.projection_size) == (tower, 0)
    assert dpr.format_config(config)["architectures"] == [architecture]
    assert all(name.startswith(f"{tower}.bert_model.") for name in dpr.key_table(config))


@pytest.mark.parametrize("change", [{"projection_dim": 7}, {"projection_dim": None}])
def test_the_projection_is_read_and_written(change):
    config = dpr.parse_config(HUGGINGFACE | change)
    assert config.projection_size == (change["projection_dim"] or 0)
    assert dpr.parse_config(dpr.format_config(config)) == config
    assert ("ctx_encoder.encode_proj.bias" in dpr.key_table(config)) == bool(config.projection_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["DPRReader"]}, "architectures .'DPRReader'.: exactly one of"),
        ({"architectures": None}, "exactly one of DPRQuestionEncoder, DPRContextEncoder"),
        ({"architectures": [1]}, "exactly one of"),
        ({"projection_dim": -1}, "projection_dim must be a positive whole number, got -1"),
    ],
)
def test_what_is_no_tower_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dpr.parse_config(HUGGINGFACE | change)
