"""Models without their weights: all the rest is as in the loaded ones."""

import dataclasses

import pytest

from ragjax.models.encoder import describe_encoder, load_encoder
from ragjax.models.language_model import describe_language_model, load_language_model
from ragjax.models.testing import write_tiny_encoder, write_tiny_language_model

ABOUT_WEIGHTS = {"params", "encode", "fingerprint", "tokenizer", "token_log_probs", "decoder"}


def same(described, loaded):
    assert described.params == {} and loaded.params
    assert described.tokenizer.to_str() == loaded.tokenizer.to_str()
    for field in dataclasses.fields(loaded):
        if field.name not in ABOUT_WEIGHTS:
            assert getattr(described, field.name) == getattr(loaded, field.name), field.name


@pytest.mark.parametrize("family", ["bert", "dpr", "qwen3"])
def test_an_encoder(tmp_path, family):
    folder = str(write_tiny_encoder(tmp_path / "encoder", family=family))
    options = {"max_length": 20, "query_prefix": "query: ", "doc_prefix": ""}
    same(describe_encoder(folder, **options), load_encoder(folder, **options))
    with pytest.raises(ValueError, match="max_length 500 is not between 3"):
        describe_encoder(folder, max_length=500)


def test_a_language_model(tmp_path):
    folder = str(tmp_path / "lm")
    write_tiny_language_model(tmp_path / "lm")
    same(describe_language_model(folder), load_language_model(folder))
    (tmp_path / "lm" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        describe_language_model(folder)
