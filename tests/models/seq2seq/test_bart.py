"""BART against PyTorch with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from seq2seq_reference import (
    check_gradients,
    check_greedy,
    check_log_probs,
    make_batch,
    our_model,
    parameter_count,
    torch_log_probs,
    torch_model,
    torch_parameter_count,
)

from ragjax.models import LMBatch
from ragjax.models.seq2seq.bart import FAMILY, format_config, parse_config
from ragjax.models.testing.seq2seq import tiny_seq2seq, tiny_seq2seq_config

SIZES = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": 16,
}
OTHER_SIZES = SIZES | {"d_model": 32, "encoder_layers": 3, "decoder_layers": 2}
CASES = {
    "gelu": SIZES,
    "scaled embeddings": OTHER_SIZES | {"scale_embedding": True},
    "relu": OTHER_SIZES | {"activation_function": "relu"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_log_probs_equal_pytorch(case, rng):
    check_log_probs(FAMILY, torch_model("Bart", CASES[case]), rng)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gelu", "scaled embeddings"])
def test_gradients_equal_pytorch(case, rng):
    check_gradients(FAMILY, torch_model("Bart", CASES[case]), rng)


@pytest.mark.slow
@pytest.mark.parametrize("forced", [None, 7])
def test_greedy_answers_equal_pytorch(forced, rng):
    model = torch_model("Bart", SIZES)
    model.generation_config.forced_eos_token_id = None
    model.generation_config.forced_bos_token_id = forced
    answers = check_greedy(FAMILY, model, rng, forced_first_id=forced)
    assert len({tuple(answer) for answer in answers}) > 1
    assert forced is None or {answer[0] for answer in answers} == {forced}


@pytest.mark.slow
def test_the_bare_model_without_unembedding_loads(rng):
    """As facebook/bart-base is published: no "model." and no final bias."""
    model = torch_model("Bart", SIZES)
    model.final_logits_bias.zero_()
    config, _ = our_model(FAMILY, model)
    tensors = {name: value.numpy() for name, value in model.model.state_dict().items()}
    params = FAMILY.load_params(config, tensors, source="PyTorch")
    assert "final_bias" not in params
    batch = make_batch(rng)
    found = FAMILY.token_log_probs(config, params, batch)
    expected = torch_log_probs(model, batch, config.decoder_start_id).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_full_size_has_as_many_parameters_as_in_pytorch():
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    pytest.importorskip("torch", reason="needs the [parity] extra")
    settings = transformers.BartConfig()  # bart-large
    expected = torch_parameter_count(transformers.BartForConditionalGeneration, settings)
    assert parameter_count(FAMILY, parse_config(settings.to_dict())) == expected > 4e8


def test_a_configuration_round_trips():
    config = tiny_seq2seq_config("bart", scale_embedding=True, activation="relu")
    assert parse_config(format_config(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": "32"}, "d_model must be a positive whole number, got '32'"),
        ({"decoder_attention_heads": 5}, "d_model = 32 must be a multiple of num_heads = 5"),
        ({"activation_function": "tanh"}, "activation_function = 'tanh' is not supported"),
        ({"normalize_before": True}, "normalize_before = True is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False is not supported"),
        ({"forced_bos_token_id": 259}, "forced_first_id must be a token id below .*259, got 259"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_config(format_config(tiny_seq2seq_config("bart")) | changes)


def test_a_context_longer_than_the_positions_is_refused(rng):
    lm = tiny_seq2seq(family="bart")
    config = tiny_seq2seq_config("bart", max_positions=8)
    batch = make_batch(rng, vocab_size=256)
    with pytest.raises(ValueError, match="11 tokens per context, but the model has 8 positions"):
        jax.eval_shape(lambda: FAMILY.token_log_probs(config, lm.params, batch))


def test_a_target_longer_than_the_positions_is_refused(rng):
    lm = tiny_seq2seq(family="bart")
    config = tiny_seq2seq_config("bart", max_positions=4)
    ids = jnp.asarray(rng.integers(0, 256, (2, 4)), jnp.int32)
    mask = jnp.ones((2, 4), bool)
    long = jnp.asarray(rng.integers(0, 256, (2, 5)), jnp.int32)
    batch = LMBatch(ids, mask, long, jnp.ones((2, 5), bool))
    with pytest.raises(ValueError, match="5 tokens per target, but the model has 4 positions"):
        jax.eval_shape(lambda: FAMILY.token_log_probs(config, lm.params, batch))
    decoder = FAMILY.make_decoder(config)
    with pytest.raises(ValueError, match=r"room for 5 tokens .* the model has 4 positions"):
        jax.eval_shape(lambda: decoder.prefill(lm.params, ids, mask, cache_length=8))
    assert jax.eval_shape(lambda: decoder.prefill(lm.params, ids, mask, cache_length=7))
