"""Reading sentence-transformers folders: refusals, and embeddings as that package computes them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ragjax.models import Tokens, load_encoder
from ragjax.models.files.sentence_transformers import known_prompts, read_recipe
from ragjax.models.layers.head import Dense, Normalize, Truncate
from ragjax.models.testing import write_tiny_encoder

TEXTS = ["a first text", "a second, longer text", "three"]
PROMPTS = {"query": "q: ", "passage": "p: "}


def write_json(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def write_dense(folder, **fields):
    """A folder whose only further module is a Dense layer of 16 to 4 dimensions."""
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"))
    modules = [{"path": path, "type": f"sentence_transformers.models.{k}"} for path, k in kinds]
    write_json(folder / "modules.json", modules)
    config = {"in_features": 16, "out_features": 4, "bias": True}
    write_json(folder / "2_Dense" / "config.json", config | fields)
    rng = np.random.default_rng(0)
    tensors = {"linear.weight": rng.normal(size=(4, 16)), "linear.bias": rng.normal(size=4)}
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    save_file(tensors, folder / "2_Dense" / "model.safetensors")
    return tensors


def embed(encoder, texts, prefix=""):
    rows = [encoder.tokenizer.encode(prefix + text).ids for text in texts]
    mask = np.arange(max(map(len, rows)))[None] < np.array([[len(row)] for row in rows])
    ids = np.full(mask.shape, encoder.pad_id, np.int32)
    ids[mask] = np.concatenate(rows)
    run = jax.jit(encoder.encode)
    return np.asarray(run(encoder.params, Tokens(jnp.asarray(ids), jnp.asarray(mask))))


@pytest.fixture
def folder(tmp_path):
    return write_tiny_encoder(tmp_path / "model")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the peer
@pytest.mark.parametrize("layout", ["new", "old"])
def test_a_folder_with_every_kind_of_module_equals_sentence_transformers(folder, tmp_path, layout):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    peer = pytest.importorskip("sentence_transformers", reason="needs the [parity] extra")
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]", model_max_length=30
    ).save_pretrained(folder)
    from sentence_transformers import models as parts

    torch.manual_seed(0)
    modules = [
        parts.Transformer(str(folder)),
        parts.Pooling(16, ["cls", "mean"]),
        parts.Dense(32, 12, activation_function=torch.nn.GELU()),
        parts.Dense(12, 8, bias=False, activation_function=torch.nn.Identity()),
        parts.Normalize(),
    ]
    model = peer.SentenceTransformer(modules=modules, prompts=PROMPTS, truncate_dim=6, device="cpu")
    target = tmp_path / "saved"
    model.save(str(target))
    if layout == "old":
        rewrite_as_old(target)
    encoder = load_encoder(str(target))
    assert encoder.pooling == "cls+mean" and encoder.embedding_size == 6
    assert [type(step) for step in encoder.steps] == [Dense, Dense, Normalize, Truncate]
    assert encoder.max_length == model.max_seq_length == 30
    for prefix, reference in (
        (encoder.query_prefix, model.encode_query(TEXTS)),
        (encoder.doc_prefix, model.encode_document(TEXTS)),
    ):
        np.testing.assert_allclose(embed(encoder, TEXTS, prefix), reference, atol=1e-5)
    scaled = load_encoder(str(target), normalize=True)
    reference = model.encode_query(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(embed(scaled, TEXTS, "q: "), reference, atol=1e-5)


def rewrite_as_old(folder: Path) -> None:
    """Turn what version 6 wrote into the layout of version 2."""
    path = folder / "modules.json"
    modules = json.loads(path.read_text())
    for module in modules:
        module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]
    write_json(path, modules)
    pooling = {"word_embedding_dimension": 16, "pooling_mode_max_tokens": False}
    pooling |= {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 30})
    (folder / "4_Normalize" / "config.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", config | {"model_max_length": 512})


@pytest.mark.parametrize(
    ("declared", "function"),
    [
        ("torch.nn.modules.linear.Identity", lambda x: x),
        ("torch.nn.modules.activation.Tanh", np.tanh),
        (None, np.tanh),
    ],
)
def test_a_dense_layer_becomes_parameters(folder, declared, function):
    base = embed(load_encoder(str(folder), normalize=False), TEXTS)
    fields = {} if declared is None else {"activation_function": declared}
    tensors = write_dense(folder, **fields)
    encoder = load_encoder(str(folder))
    assert encoder.params["projection"]["0"]["kernel"].shape == (16, 4)
    expected = function(base @ tensors["linear.weight"].T + tensors["linear.bias"])
    np.testing.assert_allclose(embed(encoder, TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "my.package.Swish"}, "activation_function 'my.package.Swish'"),
        ({"activation_function": "torch.nn.Softmax"}, "activation_function 'torch.nn.Softmax'"),
        ({"use_residual": True}, "use_residual is true"),
        ({"module_input_name": "token_embeddings"}, "module_input_name 'token_embeddings'"),
        ({"in_features": "16"}, "in_features and out_features must be"),
        ({"out_features": 5}, r"tensor linear.weight has shape \(4, 16\)"),
        ({"bias": False}, "unexpected tensor linear.bias"),
    ],
)
def test_a_dense_layer_that_is_not_understood_is_refused(folder, fields, message):
    write_dense(folder, **fields)
    with pytest.raises(ValueError, match=f"2_Dense.*{message}|{message}"):
        read_recipe(folder)


def test_a_dense_layer_of_another_size_is_refused(folder):
    write_dense(folder)
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode": ["cls", "mean"]})
    with pytest.raises(ValueError, match="takes 16 dimensions, but gets embeddings of 32"):
        load_encoder(str(folder))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([("", "Pooling"), ("", "Transformer")], "one Transformer, then one Pooling"),
        ([("", "Transformer")], "one Transformer, then one Pooling"),
        ([("", "Transformer"), ("", "Pooling"), ("", "Pooling")], "one Transformer, then one"),
        ([("../other", "Transformer")], "path '../other' of module .* leaves the folder"),
        ([("/etc", "Transformer")], "path '/etc' of module .* leaves the folder"),
        ([("", "Router")], "module 'sentence_transformers.models.Router' is not supported"),
    ],
)
def test_other_module_lists_are_refused(folder, modules, message):
    value = [{"path": path, "type": f"sentence_transformers.models.{k}"} for path, k in modules]
    write_json(folder / "modules.json", value)
    with pytest.raises(ValueError, match=f"modules.json: .*{message}"):
        read_recipe(folder)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"prompts": ["query"]}, "prompts must be an object of texts"),
        ({"prompts": {"query": 3}}, "prompts must be an object of texts"),
        ({"prompts": PROMPTS, "default_prompt_name": "sts"}, "default_prompt_name 'sts' is not"),
        ({"truncate_dim": "6"}, "truncate_dim must be a positive whole number, got '6'"),
        ({"truncate_dim": 0}, "truncate_dim must be a positive whole number, got 0"),
    ],
)
def test_declarations_of_the_wrong_kind_are_refused(folder, declared, message):
    write_json(folder / "config_sentence_transformers.json", declared)
    with pytest.raises(ValueError, match=f"config_sentence_transformers.json: {message}"):
        read_recipe(folder)


@pytest.mark.parametrize("length", ["long", 0, -1])
def test_a_maximum_length_that_is_none_is_refused(folder, length):
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": length})
    with pytest.raises(ValueError, match="max_seq_length must be a positive number"):
        read_recipe(folder)


def test_the_maximum_length_may_stand_in_other_files(folder):
    (folder / "sentence_bert_config.json").unlink()
    write_json(folder / "tokenizer_config.json", {"model_max_length": 20})
    assert load_encoder(str(folder)).max_length == 20
    write_json(folder / "tokenizer_config.json", {"model_max_length": int(1e30)})
    assert load_encoder(str(folder)).max_length == 64
    write_json(folder / "sentence_roberta_config.json", {"max_seq_length": 30})
    assert load_encoder(str(folder)).max_length == 30


@pytest.mark.parametrize(
    ("name", "query_prefix"),
    [
        ("intfloat/e5-large", "query: "),
        ("hf:intfloat/multilingual-e5-base@main", "query: "),
        ("/data/intfloat/e5-base-v2/", "query: "),
        ("/cache/models--intfloat--e5-base-v2/snapshots/0a1b", "query: "),
        ("nomic-ai/modernbert-embed-base", "search_query: "),
        ("intfloat/multilingual-e5-large-instruct", None),
        ("intfloat/e5-mistral-7b-instruct", None),
        ("me/my-e5-base-v2", None),
        (None, None),
    ],
)
def test_known_prompts_go_by_the_full_name(name, query_prefix):
    found = known_prompts([None, name])
    assert (found and found[0]) == query_prefix
