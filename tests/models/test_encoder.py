"""Loading text encoders from folders, and MiniLM-L6-v2 against sentence-transformers."""

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_folders import edit_json, embed, tokenize
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, processors

from ragjax.models import DEFAULT_ENCODER, Tokens, load_encoder
from ragjax.models.testing import tiny_encoder, write_tiny_encoder

TEXTS = ["a first text", "a second, longer text", "three"]
REFERENCE = Path(__file__).parent / "data" / "minilm_reference.json"


def test_a_written_folder_loads_bit_equal(tiny_folder):
    made, loaded = tiny_encoder(), load_encoder(str(tiny_folder))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, made.params)
    np.testing.assert_array_equal(embed(loaded, TEXTS), embed(made, TEXTS))
    assert loaded.fingerprint == made.fingerprint
    for field in ("config", "pooling", "normalized", "max_length", "pad_id", "embedding_size"):
        assert getattr(loaded, field) == getattr(made, field), field
    assert loaded.source == str(tiny_folder)


def test_byte_order_marks_are_no_part_of_a_model_folder(tmp_path):
    write_tiny_encoder(tmp_path)
    expected = load_encoder(str(tmp_path)).fingerprint
    for path in tmp_path.rglob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_encoder(str(tmp_path)).fingerprint == expected


def test_embeddings_are_float32_of_length_one_and_differ():
    embeddings = embed(tiny_encoder(), TEXTS)
    assert embeddings.dtype == np.float32 and embeddings.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    similarity = embeddings @ embeddings.T
    assert similarity[~np.eye(3, dtype=bool)].max() < 0.99


def test_padding_does_not_change_an_embedding():
    encoder = tiny_encoder()
    together = embed(encoder, TEXTS)
    alone = np.concatenate([embed(encoder, [text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_a_text_without_tokens_is_finite():
    encoder = tiny_encoder()
    tokens = Tokens(jnp.zeros((2, 4), jnp.int32), jnp.zeros((2, 4), bool))
    np.testing.assert_array_equal(encoder.encode(encoder.params, tokens), 0)


def test_the_fingerprint_tells_models_and_their_use_apart(tiny_folder):
    base = load_encoder(str(tiny_folder)).fingerprint
    others = [
        tiny_encoder(1).fingerprint,
        load_encoder(str(tiny_folder), pooling="cls").fingerprint,
        load_encoder(str(tiny_folder), normalize=False).fingerprint,
        load_encoder(str(tiny_folder), max_length=32).fingerprint,
    ]
    assert len({base, *others}) == 5


def test_arguments_override_the_folder(tiny_folder):
    encoder = load_encoder(str(tiny_folder), pooling="cls", normalize=False, max_length=10)
    assert (encoder.pooling, encoder.normalized, encoder.max_length) == ("cls", False, 10)
    assert np.abs(np.linalg.norm(embed(encoder, TEXTS), axis=1) - 1).min() > 0.1
    for bad in (2, 65):
        with pytest.raises(ValueError, match=f"max_length {bad} is not between 3 .* and 64"):
            load_encoder(str(tiny_folder), max_length=bad)
    with pytest.raises(ValueError, match="pooling 'cls.median': 'median' is not one of cls, max"):
        load_encoder(str(tiny_folder), pooling="cls+median")


def test_a_plain_folder_is_mean_pooled_and_not_normalised(folder, caplog):
    for name in ("modules.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    with caplog.at_level(logging.INFO):
        encoder = load_encoder(str(folder))
    assert (encoder.pooling, encoder.normalized, encoder.max_length) == ("mean", False, 64)
    assert (encoder.query_prefix, encoder.doc_prefix) == ("", "")
    assert "no pooling declared; mean is used" in caplog.text


@pytest.mark.parametrize("family", ["dpr", "roberta", "modernbert", "qwen3"])
def test_every_family_is_written_and_read_bit_equal(family, tmp_path):
    made = tiny_encoder(2, family)
    loaded = load_encoder(str(write_tiny_encoder(tmp_path, 2, family)))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, made.params)
    assert loaded.fingerprint == made.fingerprint
    tokens = tokenize(made, TEXTS)
    shape = jax.eval_shape(made.encode, made.params, tokens)
    assert (shape.shape, shape.dtype) == ((3, made.embedding_size), np.float32)


def test_an_unknown_tiny_family_is_refused():
    with pytest.raises(ValueError, match="family 'elmo' is not one of bert, dpr"):
        tiny_encoder(family="elmo")


def test_two_tensors_for_one_parameter_are_refused(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "embeddings.LayerNorm.weight"
    save_file({**tensors, f"bert.{name}": tensors[name]}, path)
    with pytest.raises(ValueError, match="tensors .* are the same parameter twice"):
        load_encoder(str(folder))


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode": ["mean", "cls"]}, "mean+cls"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "cls+mean"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "lasttoken"),
        ({"pooling_mode": "weightedmean", "include_prompt": True}, "weightedmean"),
        ({}, "mean"),
    ],
)
def test_pooling_is_read_from_old_and_new_folders(folder, config, pooling):
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    encoder = load_encoder(str(folder))
    assert encoder.pooling == pooling
    assert encoder.embedding_size == 16 * (1 + pooling.count("+"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling_mode_median_tokens": True}, "pooling .'pooling_mode_median_tokens'. is not"),
        ({"pooling_mode": "median"}, "pooling .'median'. is not supported; modes of cls, max"),
        ({"pooling_mode": [3]}, "pooling .3. is not supported"),
        ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt is false"),
    ],
)
def test_unsupported_pooling_is_refused(folder, config, message):
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"1_Pooling/config.json: {message}"):
        load_encoder(str(folder))


def test_an_unknown_module_is_refused(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "path": "3_LSTM", "type": "sentence_transformers.models.LSTM"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="modules.json: module '.*LSTM' is not supported"):
        load_encoder(str(folder))


def test_the_transformer_may_lie_in_a_subfolder(folder):
    below = folder / "0_Transformer"
    below.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "sentence_bert_config.json"):
        (folder / name).rename(below / name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    edit_json(below / "sentence_bert_config.json", max_seq_length=20)
    encoder = load_encoder(str(folder))
    assert encoder.max_length == 20
    jax.tree.map(np.testing.assert_array_equal, encoder.params, tiny_encoder().params)


def test_max_length_never_exceeds_the_positions(folder):
    edit_json(folder / "sentence_bert_config.json", max_seq_length=4096)
    assert load_encoder(str(folder)).max_length == 64


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"prompts": {"query": "Q: ", "document": "D: "}}, ("Q: ", "D: ")),
        ({"prompts": {"query": "Q: ", "passage": "P: "}}, ("Q: ", "P: ")),
        ({"prompts": {"query": "", "document": ""}}, ("", "")),
        ({"prompts": {"sts": "S: ", "query": "Q: "}, "default_prompt_name": "sts"}, ("Q: ", "S: ")),
        ({"prompts": {}, "default_prompt_name": None}, ("", "")),
    ],
)
def test_prompts_are_read(folder, declared, expected):
    (folder / "config_sentence_transformers.json").write_text(json.dumps(declared))
    encoder = load_encoder(str(folder))
    assert (encoder.query_prefix, encoder.doc_prefix) == expected


_INSTRUCT = "Instruct: find passages\nQuery: "


@pytest.mark.parametrize(
    ("prompts", "expected", "said"),
    [
        (
            {"web_search_query": _INSTRUCT, "sts_query": "S: "}, (_INSTRUCT, ""),
            ["queries get 'web_search_query' of the prompts 'web_search_query', 'sts_query'"],
        ),
        (
            {"Retrieval-query": "Q: ", "Retrieval-document": "D: "}, ("Q: ", "D: "),
            ["queries get 'Retrieval-query' of", "documents get 'Retrieval-document' of"],
        ),
        (
            {"retrieval.query": "Q: ", "retrieval.passage": "P: "}, ("Q: ", "P: "),
            ["queries get 'retrieval.query' of", "documents get 'retrieval.passage' of"],
        ),
        ({"nl2code": "N: "}, ("", ""), ["queries get none of the prompts 'nl2code'"]),
        ({"query": "Q: ", "code_doc": "D: "}, ("Q: ", ""), ["documents get none of"]),
        ({"query": "Q: "}, ("Q: ", ""), []),
    ],
)  # fmt: skip
def test_prompts_under_other_names_are_used_or_named(folder, prompts, expected, said, caplog):
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": prompts}))
    with caplog.at_level(logging.WARNING):
        encoder = load_encoder(str(folder))
    assert (encoder.query_prefix, encoder.doc_prefix) == expected
    notes = [record.getMessage() for record in caplog.records]
    assert [part in note for part, note in zip(said, notes, strict=True)] == [True] * len(said)
    caplog.clear()
    given = load_encoder(str(folder), query_prefix="", doc_prefix="mine: ")
    assert (given.query_prefix, given.doc_prefix) == ("", "mine: ")
    assert not caplog.records


def test_prefixes_of_a_model_card_are_said(folder, caplog):
    (folder / "config_sentence_transformers.json").unlink(missing_ok=True)
    place = folder.rename(folder.parent / "e5-small-v2")
    (place.parent / "intfloat").mkdir()
    place = place.rename(place.parent / "intfloat" / "e5-small-v2")
    with caplog.at_level(logging.WARNING):  # as the scripts show it
        assert load_encoder(str(place)).query_prefix == "query: "
    assert "from the model card, queries start with 'query: '" in caplog.text


def test_do_lower_case_is_honoured(folder):
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    ids = [load_encoder(str(folder)).tokenizer.encode(text).ids for text in ("AB", "ab")]
    assert ids[0] != ids[1]
    edit_json(folder / "sentence_bert_config.json", do_lower_case=True)
    lowered = [load_encoder(str(folder)).tokenizer.encode(text).ids for text in ("AB", "ab")]
    assert lowered == [ids[1], ids[1]]


def test_the_tokenizer_neither_truncates_nor_pads(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=32)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(load_encoder(str(folder)).tokenizer.encode("a" * 20).ids) == 22


def test_without_a_pad_token_one_is_chosen_and_said(folder, caplog):
    spec = (folder / "tokenizer.json").read_text().replace("[PAD]", "[NOPE]")
    (folder / "tokenizer.json").write_text(spec)
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    edit_json(folder / "config.json", pad_token_id=None, eos_token_id=3)
    with caplog.at_level(logging.WARNING):
        encoder = load_encoder(str(folder))
    assert encoder.pad_id == 3
    assert "no pad token declared; rows are filled with '[SEP]'" in caplog.text
    edit_json(folder / "config.json", eos_token_id=None)
    assert load_encoder(str(folder)).pad_id == 0


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_declared_pad_token_wins(folder, caplog, name):
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    edit_json(folder / name, pad_token={"content": "z"})
    encoder = load_encoder(str(folder))
    assert encoder.pad_id == encoder.tokenizer.token_to_id("z")
    assert not caplog.records


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"auto_map": {"AutoModel": "x.Y"}}, "its own Python code .auto_map."),
        ({"model_type": "t5"}, "model_type 't5' is not supported here; bert, dpr, roberta"),
        ({"model_type": None}, "model_type None"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised .*gptq"),
        ({"hidden_size": "16"}, "config.json: hidden_size must be"),
        ({"vocab_size": 40}, "tokenizer has ids up to 50, .* embeddings for 40 tokens"),
        ({"num_hidden_layers": 3}, "missing tensor encoder.layer.2.attention.self.query.weight"),
        ({"num_hidden_layers": 1}, "unexpected tensor encoder.layer.1."),
        ({"intermediate_size": 64}, r"intermediate.dense.weight has shape \(32, 16\)"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(folder, fields, message):
    edit_json(folder / "config.json", **fields)
    with pytest.raises(ValueError, match=message):
        load_encoder(str(folder))


@pytest.mark.parametrize("name", ["config.json", "modules.json", "tokenizer.json"])
def test_a_broken_json_file_is_named(folder, name):
    (folder / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name}: not "):
        load_encoder(str(folder))


def test_json_of_the_wrong_kind_is_named(folder):
    (folder / "modules.json").write_text("{}")
    with pytest.raises(ValueError, match="modules.json: expected an array at the top, got dict"):
        load_encoder(str(folder))


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json, so this is not a model folder"):
        load_encoder(str(folder))


def test_a_gguf_file_is_no_text_encoder(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="text encoders load from folders"):
        load_encoder(str(path))


def test_half_precision_weights_load_as_float32(folder):
    path = folder / "model.safetensors"
    save_file({name: t.astype(np.float16) for name, t in load_file(path).items()}, path)
    params = load_encoder(str(folder)).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_an_old_tokenizer_is_converted_by_transformers(folder):
    """A BERT folder with vocab.txt only."""
    (folder / "tokenizer.json").unlink()
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "first", "text", "##s"]
    (folder / "vocab.txt").write_text("\n".join(vocab))
    edit_json(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    expected = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocab)}, unk_token="[UNK]"))
    expected.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    encoded = load_encoder(str(folder)).tokenizer.encode("First texts")
    assert encoded.tokens == ["[CLS]", "first", "text", "##s", "[SEP]"]
    assert expected.encode("texts").ids == [2, 6, 7, 3] and encoded.ids == [2, 5, 6, 7, 3]


def test_a_folder_without_any_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer.json, and none of vocab.txt"):
        load_encoder(str(folder))


@pytest.fixture(scope="module")
def minilm():
    try:
        return load_encoder(DEFAULT_ENCODER)
    except OSError as error:
        pytest.skip(f"the weights are neither in the cache nor on the package index: {error}")


@pytest.mark.slow
def test_minilm_gives_the_stored_embeddings(minilm):
    """Reference made by data/make_minilm_reference.py."""
    reference = json.loads(REFERENCE.read_text())
    embeddings = embed(minilm, reference["texts"])
    np.testing.assert_allclose(embeddings[:, :16], reference["first_16"], atol=1e-5)
    pooled = embed(load_encoder(DEFAULT_ENCODER, normalize=False), reference["texts"])
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), reference["pooled_norm"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the peer
def test_minilm_equals_sentence_transformers(minilm):
    peer = pytest.importorskip("sentence_transformers", reason="needs the [parity] extra")
    from ragjax.models import resolve_source

    texts = [*json.loads(REFERENCE.read_text())["texts"], *TEXTS]
    model = peer.SentenceTransformer(str(resolve_source(DEFAULT_ENCODER)), device="cpu")
    np.testing.assert_allclose(embed(minilm, texts), model.encode(texts), atol=1e-5)
    assert minilm.max_length == model.max_seq_length == 256
