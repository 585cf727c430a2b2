"""T5 and Flan-T5 against PyTorch with the same weights."""

import numpy as np
import pytest
from seq2seq_reference import (
    check_gradients,
    check_greedy,
    check_log_probs,
    parameter_count,
    torch_model,
    torch_parameter_count,
)

from ragjax.models.seq2seq.t5 import FAMILY, format_config, parse_config, relative_buckets
from ragjax.models.testing.seq2seq import tiny_seq2seq_config

SIZES = {
    "d_model": 24,
    "d_kv": 10,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
OTHER_SIZES = SIZES | {"d_model": 16, "d_kv": 4, "num_layers": 3, "num_decoder_layers": 2}
OTHER_SIZES |= {"relative_attention_num_buckets": 6, "layer_norm_epsilon": 1e-3}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CASES = {
    "t5": SIZES,
    "t5 other sizes": OTHER_SIZES,
    "flan": SIZES | GATED,
    "flan other sizes": OTHER_SIZES | GATED,
    "gated silu": OTHER_SIZES | GATED | {"feed_forward_proj": "gated-silu"},
    "tied gated": OTHER_SIZES | {"feed_forward_proj": "gated-gelu"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_log_probs_equal_pytorch(case, rng):
    check_log_probs(FAMILY, torch_model("T5", CASES[case]), rng)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["t5", "flan other sizes"])
def test_gradients_equal_pytorch(case, rng):
    check_gradients(FAMILY, torch_model("T5", CASES[case]), rng)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["t5", "flan"])
def test_greedy_answers_equal_pytorch(case, rng):
    # PyTorch's cache takes the encoder's number of layers for the decoder's.
    changes = CASES[case] | {"eos_token_id": 1, "num_decoder_layers": 2}
    answers = check_greedy(FAMILY, torch_model("T5", changes), rng)
    assert len({tuple(answer) for answer in answers}) > 1


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (32, 100)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_are_those_of_pytorch(num_buckets, max_distance, both_ways):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    t5 = pytest.importorskip(
        "transformers.models.t5.modeling_t5", reason="needs the [parity] extra"
    )
    offsets = np.arange(-300, 301, dtype=np.int32)[None]
    expected = t5.T5Attention._relative_position_bucket(
        torch.tensor(offsets).long(), both_ways, num_buckets, max_distance
    )
    found = relative_buckets(
        offsets, num_buckets=num_buckets, max_distance=max_distance, both_ways=both_ways
    )
    np.testing.assert_array_equal(found, expected.numpy())


FULL_SIZES = {
    "t5-11b": {"d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_heads": 128},
    "flan-t5-xxl": {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64} | GATED,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZES)
def test_full_sizes_have_as_many_parameters_as_in_pytorch(name):
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    pytest.importorskip("torch", reason="needs the [parity] extra")
    changes = {"vocab_size": 32128, "num_layers": 24, **FULL_SIZES[name]}
    settings = transformers.T5Config(**changes)
    expected = torch_parameter_count(transformers.T5ForConditionalGeneration, settings)
    if "tie_word_embeddings" in changes:
        expected += 32128 * changes["d_model"]  # which transformers 5 ties until it loads them
    found = parameter_count(FAMILY, parse_config(settings.to_dict()))
    assert found == expected > 11e9


@pytest.mark.parametrize("family", ["t5", "flan-t5"])
def test_a_configuration_round_trips(family):
    config = tiny_seq2seq_config(family)
    assert parse_config(format_config(config)) == config


def test_the_scaling_that_transformers_5_stores_apart_is_read():
    settings = format_config(tiny_seq2seq_config("flan-t5"))
    settings |= {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert parse_config(settings) == tiny_seq2seq_config("flan-t5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "d_model must be a positive whole number, got 0"),
        ({"num_heads": None}, "num_heads must be a positive whole number, got None"),
        ({"num_layers": 10**9}, "num_layers must be .* up to 1000, got 1000000000"),
        ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj = 'gated-tanh' is not supported"),
        ({"decoder_start_token_id": 300}, "decoder_start_id must be a token id below .*259, got 3"),
        ({"decoder_start_token_id": "0"}, "decoder_start_token_id must be a token id .*got '0'"),
        ({"relative_attention_num_buckets": 7}, "must be even, at least 4 and below .* 7 and 20"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_config(format_config(tiny_seq2seq_config()) | changes)
