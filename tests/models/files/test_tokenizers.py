"""The end token that tokenizer_config.json asks for."""

import json

import pytest
from tokenizers import Tokenizer, processors

from ragjax.models import load_encoder
from ragjax.models.files.tokenizers import with_end_token
from ragjax.models.testing import tiny_encoder, write_tiny_encoder


def byte_level():
    return processors.ByteLevel(trim_offsets=False)


def template(*, start):
    return processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 2)])


@pytest.mark.parametrize(
    ("present", "start"),
    [
        (None, []),
        (byte_level(), []),
        (template(start="[CLS]"), ["[CLS]"]),
        (processors.Sequence([byte_level(), template(start="[CLS]")]), ["[CLS]"]),
    ],
)
@pytest.mark.parametrize(
    ("settings", "end"),
    [
        ({"add_eos_token": True, "eos_token": "[SEP]"}, ["[SEP]"]),
        ({"add_eos_token": True, "eos_token": {"content": "[SEP]"}}, ["[SEP]"]),
        ({"add_eos_token": False, "eos_token": "[SEP]"}, []),
        ({"add_eos_token": True, "eos_token": "no such token"}, []),
        ({"add_eos_token": True}, []),
    ],
)
def test_the_end_token_follows_the_text(present, start, settings, end, tmp_path):
    spec = json.loads(tiny_encoder().tokenizer.to_str()) | {"post_processor": None}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    if present is not None:
        tokenizer.post_processor = present
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for _ in range(2):  # and is not added again
        tokenizer = with_end_token(tokenizer, tmp_path)
        assert tokenizer.encode("ab").tokens == [*start, "a", "b", *end]


def test_an_encoder_loads_with_it(tmp_path):
    folder = write_tiny_encoder(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    settings = {"pad_token": "[PAD]", "eos_token": "[SEP]", "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_encoder(str(folder)).tokenizer.encode("ab").tokens == ["a", "b", "[SEP]"]
