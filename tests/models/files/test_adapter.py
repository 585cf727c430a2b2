"""LoRA adapters as PEFT writes them: merged as its formula says, or refused with a reason."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ragjax.models import load_encoder, load_language_model
from ragjax.models.export.base import read_base
from ragjax.models.testing import write_tiny_encoder, write_tiny_language_model

QUERY = "model.layers.1.self_attn.q_proj"
EMBED, HEAD = "model.embed_tokens", "lm_head"
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "../base"}


def write_adapter(folder, tensors, **settings):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    return str(folder)


def pair(rng, layer, weight, *, kind=""):
    """The two halves for a weight `[out, in]`, or, with `kind`, for a table `[in, out]`."""
    outputs, inputs = weight.shape[::-1] if kind else weight.shape
    end = "" if kind else ".weight"
    down = rng.normal(size=(2, inputs)).astype(np.float32)
    up = rng.normal(size=(outputs, 2)).astype(np.float32)
    stem = f"base_model.model.{layer}.lora_{kind}"
    return {f"{stem}A{end}": down, f"{stem}B{end}": up}, (up @ down).T if kind else up @ down


@pytest.fixture
def base(tmp_path):
    write_tiny_language_model(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("settings", "scale", "scale_embed"),
    [
        ({}, 3.0, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5, 6 / 2**0.5),
        ({"alpha_pattern": {"q_proj": 1}, "rank_pattern": {"q_proj": 2}}, 0.5, 3.0),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 1}}, 3.0, 3.0),
    ],
)
def test_an_adapter_is_merged_into_its_base(
    tmp_path, base, rng, settings, scale, scale_embed, caplog
):
    stored = load_file(base / "model.safetensors")
    query, change = pair(rng, QUERY, stored[f"{QUERY}.weight"])
    table, moved = pair(rng, EMBED, stored[f"{EMBED}.weight"], kind="embedding_")
    head = rng.normal(size=stored[f"{EMBED}.weight"].shape).astype(np.float32)
    saved = query | table | {f"base_model.model.{HEAD}.weight": head}
    adapter = write_adapter(tmp_path / "adapter", saved, **settings)
    found = load_language_model(adapter)
    assert "a LoRA adapter (2 layers), merged into" in caplog.text
    stored[f"{QUERY}.weight"] += np.float32(scale) * change
    stored[f"{EMBED}.weight"] += np.float32(scale_embed) * moved
    stored[f"{HEAD}.weight"] = head
    save_file(stored, base / "model.safetensors")
    expected = load_language_model(str(base))
    assert found.config == expected.config and not found.config.tie_embeddings
    for one, other in zip(
        jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert read_base(adapter).config == read_base(str(base)).config != {}


def test_an_adapter_of_an_encoder_is_merged_whatever_prefix_its_base_has(tmp_path, rng):
    write_tiny_encoder(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    stored = load_file(path)
    name = next(name for name in stored if name.endswith("layer.0.attention.self.query.weight"))
    layer = name.removesuffix(".weight").removeprefix("bert.")
    halves, change = pair(rng, f"bert.{layer}", stored[name])
    found = load_encoder(write_adapter(tmp_path / "adapter", halves))
    save_file(stored | {name: stored[name] + 3 * change}, path)
    expected = load_encoder(str(tmp_path / "base"))
    for one, other in zip(
        jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def one_half(halves):
    return {name: tensor for name, tensor in halves.items() if "lora_A" in name}


def narrow(halves):
    return {
        name: tensor[:, :3].copy() if "lora_A" in name else tensor
        for name, tensor in halves.items()
    }


def misnamed(halves):
    return {name.replace("q_proj", "x"): tensor for name, tensor in halves.items()}


def of_dora(halves):
    return halves | {"a.lora_magnitude_vector": np.ones(2, np.float32)}


@pytest.mark.parametrize(
    ("settings", "change", "said"),
    [
        ({"peft_type": "IA3"}, dict, "an adapter of type 'IA3', of which only LORA is read"),
        ({"use_dora": True}, dict, "use_dora = True is not supported .*merge_and_unload"),
        ({"bias": "all"}, dict, "bias = 'all' is not supported"),
        ({"base_model_name_or_path": None}, dict, "needs lora_alpha and base_model_name_or_path"),
        ({"base_model_name_or_path": "./nowhere"}, dict, "is a LoRA adapter of './nowhere', and"),
        ({"base_model_name_or_path": "../adapter"}, dict, "which is no folder of a model"),
        ({}, one_half, f"adapts {QUERY}, but there is one half alone to merge"),
        ({}, narrow, f"{QUERY} is .* and the adapter's tensors are .*; it is of another model"),
        ({}, misnamed, "but there is no tensor model.layers.1.self_attn.x.weight to merge"),
        ({}, of_dora, "tensor a.lora_magnitude_vector is no part of LoRA that is read"),
    ],
)
def test_what_cannot_be_merged_is_refused(tmp_path, base, rng, settings, change, said):
    weight = load_file(base / "model.safetensors")[f"{QUERY}.weight"]
    halves, _ = pair(rng, QUERY, weight)
    folder = write_adapter(tmp_path / "adapter", change(halves), **settings)
    for load in (load_language_model, load_encoder) if settings else (load_language_model,):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            load(folder)


def test_an_adapter_beside_a_whole_model_and_another_tokenizer_are_named(
    tmp_path, base, rng, caplog
):
    weight = load_file(base / "model.safetensors")[f"{QUERY}.weight"]
    halves, _ = pair(rng, QUERY, weight)
    expected = load_language_model(str(base)).fingerprint
    write_adapter(base, halves)
    assert load_language_model(str(base)).fingerprint == expected
    assert "the adapter in it is not read, the whole model beside it is" in caplog.text
    (base / "adapter_config.json").unlink()
    folder = write_adapter(tmp_path / "adapter", halves)
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    load_language_model(folder)
    assert "is another tokenizer than that of" in caplog.text
