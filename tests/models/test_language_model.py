"""Loading language models from Hugging Face folders, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, processors

from ragjax.models import load_language_model
from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.decoder.huggingface import parse_huggingface_config
from ragjax.models.export.base import read_base
from ragjax.models.export.tokenizer import tokenizer_files
from ragjax.models.testing.language_model import (
    tiny_decoder_config,
    tiny_language_model,
    write_tiny_language_model,
)


@pytest.fixture
def folder(tmp_path):
    write_tiny_language_model(tmp_path / "tiny")
    return tmp_path / "tiny"


def change(path, **fields):
    settings = json.loads(path.read_text()) if path.is_file() else {}
    settings = {**settings, **fields}
    kept = {name: value for name, value in settings.items() if value != "absent"}
    path.write_text(json.dumps(kept))


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "t5", "flan-t5", "bart"]
)
def test_a_folder_gives_the_model_that_was_written(tmp_path, family):
    folder = tmp_path / "tiny"
    write_tiny_language_model(folder, family=family)
    model, expected = load_language_model(str(folder)), tiny_language_model(family=family)
    jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)
    for name in ("config", "bos_id", "eos_ids", "pad_id", "max_length", "fingerprint"):
        assert getattr(model, name) == getattr(expected, name)
    text = "ünïcödé 😀 12"
    ids = model.tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == expected.tokenizer.encode(text, add_special_tokens=False).ids
    assert model.tokenizer.decode(ids) == text
    assert model.source == str(folder)


def test_shards_give_the_same_model(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert load_language_model(str(folder)).fingerprint == tiny_language_model().fingerprint


def test_a_tied_head_that_is_stored_twice_is_ignored(folder, caplog):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 0}, path)
    assert load_language_model(str(folder)).fingerprint == tiny_language_model().fingerprint
    assert not caplog.records


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_head_of_its_own_counts_in_a_model_that_says_it_is_tied(tmp_path, family, dtype, caplog):
    """What merging an adapter leaves; transformers 5 reads it so too."""
    write_tiny_language_model(tmp_path, family=family)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = load_file(path)
    tensors.pop("lm_head.weight", None)
    head = tensors["model.embed_tokens.weight"].astype(dtype)
    head[3] += 1
    save_file(tensors | {"lm_head.weight": head}, path)
    change(config, tie_word_embeddings=True)
    model = load_language_model(str(tmp_path))
    np.testing.assert_array_equal(model.params["unembed"]["kernel"], head.T.astype(np.float32))
    assert "lm_head.weight is another table than model.embed_tokens.weight" in caplog.text
    change(config, tie_word_embeddings=False)
    assert load_language_model(str(tmp_path)).fingerprint == model.fingerprint
    assert model.family.format_config(model.config)["tie_word_embeddings"] is False
    with pytest.raises(ValueError, match="so the model is not tied"):
        tied = dataclasses.replace(model.config, tie_embeddings=True)
        model.family.load_params(tied, load_file(path), source="memory")


def test_stored_rotary_frequencies_are_those_of_the_configuration_or_named(folder, caplog):
    path = folder / "model.safetensors"
    tensors, config = load_file(path), tiny_decoder_config()
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    stored = (config.rope_theta**-exponents).astype(np.float32)
    save_file(tensors | {name.format(0): stored, name.format(1): stored.astype(np.float16)}, path)
    assert load_language_model(str(folder)).fingerprint == tiny_language_model().fingerprint
    assert not caplog.records
    save_file(tensors | {name.format(1): (500000**-exponents).astype(np.float32)}, path)
    assert load_language_model(str(folder)).fingerprint == tiny_language_model().fingerprint
    assert f"tensor {name.format(1)} holds other values than config.json gives" in caplog.text


def test_an_unknown_tiny_family_is_named():
    with pytest.raises(ValueError, match="family 'gpt2'; there are llama, mistral, .*, bart"):
        tiny_language_model(family="gpt2")


def test_fingerprints_tell_parameters_apart():
    assert tiny_language_model(0).fingerprint != tiny_language_model(1).fingerprint


def test_end_tokens_come_from_the_generation_config_first(folder):
    change(folder / "generation_config.json", eos_token_id=[5, 256])
    assert load_language_model(str(folder)).eos_ids == (5, 256)
    change(folder / "generation_config.json", eos_token_id="absent")
    change(folder / "config.json", eos_token_id="absent")
    assert load_language_model(str(folder)).eos_ids == ()


def test_the_first_token_is_what_the_tokenizer_would_add(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 256)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_language_model(str(folder)).bos_id == 256
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", 256)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_language_model(str(folder)).bos_id is None


def test_a_missing_pad_token_is_chosen_and_said(folder, caplog):
    change(folder / "config.json", pad_token_id="absent")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load_language_model(str(folder)).pad_id == 256
    assert "no pad token declared; rows are filled with '<|end|>' (masked)" in caplog.text


@pytest.mark.parametrize("declared_by", ["tokenizer_config.json", "config.json"])
def test_added_tokens_without_an_embedding_are_left_out(folder, caplog, declared_by):
    """As in Gemma 3 1B (`<image_soft_token>`) and copies of Llama 2 (`<pad>`)."""
    expected = load_language_model(str(folder)).tokenizer
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>", "<padding>"])
    tokenizer.add_tokens(["word"])
    assert tokenizer.encode("<image>word").ids == [258, 260]
    tokenizer.save(str(folder / "tokenizer.json"))
    if declared_by == "config.json":
        change(folder / "config.json", pad_token_id=259)
    else:
        change(folder / "config.json", pad_token_id="absent")
        change(folder / "tokenizer_config.json", pad_token="<padding>")
    model = load_language_model(str(folder))
    text = "an <image> of a word<padding><|end|>"
    assert model.tokenizer.encode(text).ids == expected.encode(text).ids
    assert model.tokenizer.get_vocab() == expected.get_vocab()
    assert model.pad_id == 256  # the end: what was left out fills no rows
    notes = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(notes) == 1
    assert notes[0].endswith(": '<image>' (258), '<padding>' (259), 'word' (260)")
    assert "\n" not in notes[0]


def test_tokens_left_out_are_not_exported():
    base = read_base("no such folder")._replace(
        tokenizer_config={
            "pad_token": "<image>",
            "additional_special_tokens": [
                "<|end|>",
                {"content": "<image>"},
                {"content": "<|end|>"},
            ],
        }
    )
    tokenizer = tiny_language_model().tokenizer
    files = tokenizer_files(tokenizer, base, tokens={}, max_length=8)
    assert "<image>" not in "".join(files.values())
    kept = json.loads(files["tokenizer_config.json"])["additional_special_tokens"]
    assert kept == ["<|end|>", {"content": "<|end|>"}]


def test_a_vocabulary_larger_than_the_embeddings_is_refused(folder):
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"]["more"] = 258
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="ids up to 258, but the model has embeddings for 258"):
        load_language_model(str(folder))


@pytest.mark.parametrize("pair", ["$A $B", "$A <first> $B"])
def test_a_token_without_an_embedding_around_each_text_is_refused(folder, pair):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<first>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A" if "<" in pair else "<first> $A", pair=pair, special_tokens=[("<first>", 258)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"puts '<first>' \(id 258\) .* embeddings for 258"):
        load_language_model(str(folder))


def test_a_negative_pad_token_is_none(folder):
    change(folder / "config.json", pad_token_id=-1)
    assert load_language_model(str(folder)).pad_id == 256


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not supported here; llama, mistral"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised .*gptq"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; silu and gelu"),
        ({"attention_bias": True}, r"missing tensor model\.layers\.0\.self_attn\.q_proj\.bias"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "positions scaled by 'dynam"),
        ({"rope_scaling": {"rope_type": "linear"}}, "no field 'factor', which a llama decoder"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor of the rotary scaling must be"),
        ({"rope_scaling": [4.0]}, "a size is not a positive number"),
        ({"rope_theta": float("inf")}, "Infinity is not a JSON number"),
        ({"num_hidden_layers": 10**9}, "num_layers must be at most 4096, got 1000000000"),
        ({"num_hidden_layers": "absent"}, "no field 'num_hidden_layers', which a llama decoder"),
        ({"num_key_value_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim must be even and positive, got 7"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"hidden_size": 33}, r"q_proj\.weight has shape \(32, 32\), .* needs \(33, 32\)"),
        ({"hidden_size": None}, "a size is not a positive number"),
        ({"num_attention_heads": 0, "head_dim": None}, "a size is not a positive number"),
        ({"num_hidden_layers": 4}, r"missing tensor model\.layers\.3\."),
        ({"num_hidden_layers": 2}, r"unexpected tensor model\.layers\.2\."),
        ({"tie_word_embeddings": False}, r"missing tensor lm_head\.weight"),
    ],
)
def test_what_cannot_be_loaded_is_named(folder, fields, message):
    change(folder / "config.json", **fields)
    with pytest.raises(ValueError, match=message) as caught:
        load_language_model(str(folder))
    assert str(folder) in str(caught.value)


def test_only_pytorch_files_are_refused_with_a_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="only PyTorch weights.*convert with"):
        load_language_model(str(folder))


def parsed(**fields) -> DecoderConfig:
    sizes = {
        "model_type": "mistral",
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    return parse_huggingface_config(sizes | fields)


def test_which_layers_slide():
    assert parsed(sliding_window=100).sliding_window == 100
    assert parsed(sliding_window=100).sliding_layers == (True, True, True)
    assert parsed(sliding_window=100).max_positions == 512
    assert parsed(sliding_window=None).sliding_layers == ()
    # transformers' default, which Mistral's first files leave out.
    assert parsed().sliding_window == 4096
    assert parsed(model_type="llama", sliding_window=100).sliding_window is None
    unused = parsed(model_type="qwen2", sliding_window=100, use_sliding_window=False)
    assert unused == tiny_decoder_config(num_kv_heads=4, qkv_bias=True, model_type="qwen2")
    used = {"model_type": "qwen2", "sliding_window": 100, "use_sliding_window": True}
    assert parsed(**used, max_window_layers=2).sliding_layers == (False, False, True)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert parsed(**used, layer_types=kinds).sliding_layers == (True, False, True)
    with pytest.raises(ValueError, match="layer_types must name .* 3 layers, got 2 entries"):
        parsed(**used, layer_types=kinds[:2])
    with pytest.raises(ValueError, match="got 3 entries, among them 'chunked_attention'"):
        parsed(**used, layer_types=[*kinds[:2], "chunked_attention"])


def test_both_spellings_of_the_rotary_base():
    assert parsed(rope_theta=7.0).rope_theta == 7.0
    newer = parsed(rope_parameters={"rope_theta": 7.0, "rope_type": "default"})
    assert newer == parsed(rope_theta=7.0)
