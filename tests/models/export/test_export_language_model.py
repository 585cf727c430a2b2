"""Exported language models: what transformers makes of them, and what a folder hands on."""

import dataclasses
import functools
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from ragjax.models import LMBatch, load_language_model, lora
from ragjax.models.decoder import model as decoder
from ragjax.models.export import export_language_model, plan_language_model
from ragjax.models.testing import tiny_language_model
from ragjax.models.testing.language_model import tiny_decoder_config
from ragjax.models.testing.seq2seq import tiny_seq2seq
from ragjax.models.trainable import merge_trainable, split_trainable

SLIDING = {"sliding_window": 6, "sliding_layers": (True, True, False)}
DECODERS = {
    "llama": {},
    "llama, untied": {"tie_embeddings": False},
    "mistral": {"model_type": "mistral", "sliding_window": 6, "sliding_layers": (True,) * 3},
    "qwen2": {"model_type": "qwen2", "qkv_bias": True},
    "qwen3": {"model_type": "qwen3"},
    "gemma3": {
        "model_type": "gemma3_text",
        "activation": "gelu_pytorch_tanh",
        "local_rope_theta": 5e3,
        **SLIDING,
    },
}
SEQ2SEQ = ["t5", "flan-t5", "bart"]


def read(folder, name):
    return json.loads((folder / name).read_text("utf-8"))


@functools.cache
def language_model_of(family):
    """A tiny language model whose biases and norms are random too."""
    base = tiny_seq2seq(1, family) if family in SEQ2SEQ else tiny_language_model(1)
    config, shapes = base.config, base.params
    if family in DECODERS:
        config = tiny_decoder_config(**DECODERS[family])
        init = functools.partial(decoder.init_params, config)
        shapes = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)
    return dataclasses.replace(
        base,
        params=params,
        config=config,
        token_log_probs=functools.partial(base.family.token_log_probs, config),
    )


def batch_of(rows):
    """One context and one target each, padded."""
    length, targets = max(len(c) for c, _ in rows), max(len(t) for _, t in rows)
    contexts, answers = np.zeros((len(rows), length), int), np.zeros((len(rows), targets), int)
    context_mask, answer_mask = contexts.astype(bool), answers.astype(bool)
    for row, (context, target) in enumerate(rows):
        contexts[row, length - len(context) :], context_mask[row, length - len(context) :] = (
            context,
            True,
        )
        answers[row, : len(target)], answer_mask[row, : len(target)] = target, True
    return LMBatch(*map(jnp.asarray, (contexts, context_mask, answers, answer_mask)))


ROWS = [([5, 9, 200, 31, 77, 6, 8, 90], [44, 12, 3]), ([100, 4, 18], [7, 256])]


def log_probs_of(lm):
    found = np.asarray(jax.jit(lm.token_log_probs)(lm.params, batch_of(ROWS)))
    return [row[: len(target)] for row, (_, target) in zip(found, ROWS, strict=True)]


def torch_log_probs(folder, rows=ROWS):
    """Log-probabilities of the targets by the model that transformers makes of a folder."""
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    import transformers

    seq2seq = read(folder, "config.json").get("is_encoder_decoder")
    kind = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, attn_implementation="eager").eval()
    assert model.dtype == torch.float32
    results = []
    for context, target in rows:
        with torch.inference_mode():
            if seq2seq:
                start = [model.config.decoder_start_token_id, *target[:-1]]
                logits = model(torch.tensor([context]), decoder_input_ids=torch.tensor([start]))
                logits = logits.logits[0]
            else:
                logits = model(torch.tensor([context + target])).logits[0][len(context) - 1 : -1]
        found = logits.double().log_softmax(-1).numpy()
        results.append(found[np.arange(len(target)), target])
    return results


@pytest.mark.slow
@pytest.mark.parametrize("family", [*DECODERS, *SEQ2SEQ])
def test_transformers_computes_the_same_log_probs(tmp_path, family):
    lm = language_model_of(family)
    exported = export_language_model(lm, tmp_path / "out")
    again = load_language_model(str(tmp_path / "out"))
    assert again.config == lm.config
    for field in ("bos_id", "eos_ids", "pad_id", "max_length", "text_format"):
        assert getattr(again, field) == getattr(lm, field), field
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    tied = "lm_head.weight" not in plan_language_model(lm).weights[""].tensors
    assert tied == lm.config.tie_embeddings
    assert exported.num_tensors == len(plan_language_model(lm).weights[""].tensors)
    for found, expected in zip(torch_log_probs(tmp_path / "out"), log_probs_of(lm), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_transformers_tokenises_and_knows_the_special_tokens(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    lm = tiny_language_model()
    export_language_model(lm, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "A text, with 3 things."
    assert tokenizer(text)["input_ids"] == lm.tokenizer.encode(text).ids
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257)
    assert read(tmp_path / "out", "generation_config.json") == {
        "eos_token_id": 256,
        "pad_token_id": 257,
    }


def test_a_first_token_that_the_tokenizer_does_not_add_is_added(tmp_path):
    # As in a GGUF file, whose metadata say so beside the vocabulary.
    lm = dataclasses.replace(tiny_language_model(), bos_id=256)
    export_language_model(lm, tmp_path / "out")
    again = load_language_model(str(tmp_path / "out"))
    assert again.bos_id == 256 and again.tokenizer.encode("a").ids[0] == 256
    assert lm.tokenizer.encode("a").ids[0] != 256


@pytest.mark.slow
def test_shards_are_filled_in_order_and_load_everywhere(tmp_path):
    lm = language_model_of("llama")
    whole = export_language_model(lm, tmp_path / "whole")
    split = export_language_model(lm, tmp_path / "split", max_shard_size=20_000)
    index = read(tmp_path / "split", "model.safetensors.index.json")
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    assert index["metadata"] == {"total_size": total}
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 3
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert set(files) == {path.name for path in (tmp_path / "split").glob("*.safetensors")}
    largest = max(split.sizes[name] for name in files[1:])  # the first is the embedding table alone
    assert largest < 20_000 + 2_000
    again = load_language_model(str(tmp_path / "split"))
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    assert whole.num_tensors == split.num_tensors
    for folder in ("whole", "split"):
        found = torch_log_probs(tmp_path / folder)
        np.testing.assert_allclose(found[0], log_probs_of(lm)[0], atol=1e-5)


@pytest.mark.slow
def test_adapters_and_split_layers_are_merged(tmp_path):
    lm = language_model_of("llama, untied")
    learning, frozen = split_trainable(lm.params, lm.family.layout, 2)
    adapters = lora.init_adapters(learning, rank=2, alpha=4.0, key=jax.random.key(0))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    params = merge_trainable(lora.attach(learning, adapters), frozen)
    assert isinstance(params["layers"], tuple)
    export_language_model(lm, tmp_path / "out", params=params)
    expected = log_probs_of(dataclasses.replace(lm, params=params))
    again = log_probs_of(load_language_model(str(tmp_path / "out")))
    assert np.abs(again[0] - log_probs_of(lm)[0]).max() > 0.01
    for row in range(len(ROWS)):
        np.testing.assert_allclose(again[row], expected[row], atol=1e-5)


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    config = tiny_decoder_config(num_layers=24, hidden_size=128, intermediate_size=512)
    lm = language_model_of("llama")
    shapes = jax.eval_shape(functools.partial(decoder.init_params, config), jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    lm = dataclasses.replace(lm, config=config, params=params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    export_language_model(lm, tmp_path / "first")  # what is imported and cached once
    tracemalloc.start()
    try:
        export_language_model(lm, tmp_path / "second", dtype="bfloat16")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 5


# --- what the source's files say ------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    """A language model's folder with everything that an export hands on, and what it does not."""
    folder = tmp_path / "source"
    export_language_model(language_model_of("qwen2"), folder)
    edits = {
        "config.json": {"rope_theta": 10000.0, "use_cache": True, "_name_or_path": "x/y"},
        "generation_config.json": {"temperature": 0.7, "bos_token_id": 3},
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": "evil.py"},
            "tokenizer_class": "LlamaTokenizer",
            "chat_template": "{{ messages[0].content }}",
            "padding_side": "left",
            "unk_token": {"content": "<|pad|>"},
        },
    }
    for name, fields in edits.items():
        (folder / name).write_text(json.dumps(read(folder, name) | fields))
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A model\n")
    (folder / "LICENSE").write_text("MIT License\n")
    (folder / "modeling_x.py").write_text("raise SystemExit")
    return folder


def test_a_folder_hands_on_its_settings_and_licence(tmp_path, source):
    lm = load_language_model(str(source))
    export_language_model(lm, tmp_path / "out")
    config = read(tmp_path / "out", "config.json")
    assert config["use_cache"] is True and "_name_or_path" not in config
    assert lm.family.parse_config(config) == lm.config
    generation = read(tmp_path / "out", "generation_config.json")
    assert generation["temperature"] == 0.7 and generation["bos_token_id"] == 3
    tokenizer = read(tmp_path / "out", "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in tokenizer
    assert (tokenizer["padding_side"], tokenizer["unk_token"]) == ("left", "<|pad|>")
    assert tokenizer["chat_template"] == "{{ messages[0].content }}"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT License\n"
    assert not (tmp_path / "out" / "modeling_x.py").exists()
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"


def test_transformers_renders_the_chat_template(tmp_path, source):
    pytest.importorskip("jinja2", reason="transformers renders templates with it")
    import transformers

    export_language_model(load_language_model(str(source)), tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": "hello"}]
    assert loaded.apply_chat_template(talk, tokenize=False) == "hello"


def test_several_chat_templates_keep_their_names(tmp_path, source):
    templates = [{"name": "default", "template": "one"}, {"name": "tools", "template": "two"}]
    edited = read(source, "tokenizer_config.json") | {"chat_template": templates}
    (source / "tokenizer_config.json").write_text(json.dumps(edited))
    (source / "chat_template.jinja").unlink(missing_ok=True)
    export_language_model(load_language_model(str(source)), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "one"
    assert read(tmp_path / "out", "tokenizer_config.json")["chat_template"] == templates


def test_a_config_that_is_not_of_this_model_is_not_handed_on(tmp_path, source):
    lm = load_language_model(str(source))
    shorter = dataclasses.replace(lm.config, max_positions=100)
    export_language_model(dataclasses.replace(lm, config=shorter), tmp_path / "out")
    config = read(tmp_path / "out", "config.json")
    assert config["max_position_embeddings"] == 100 and "use_cache" not in config


def test_a_tokenizer_beyond_the_embeddings_is_refused(tmp_path):
    lm = tiny_language_model()
    small = dataclasses.replace(lm.config, vocab_size=100)
    with pytest.raises(ValueError, match="ids up to 257, but the model has embeddings for 100"):
        export_language_model(dataclasses.replace(lm, config=small), tmp_path / "out")
