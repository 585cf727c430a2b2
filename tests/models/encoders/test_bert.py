"""The BERT encoder against two other implementations: numpy in float64, and PyTorch."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ragjax.models.encoders import bert
from ragjax.models.encoders.bert import (
    ACTIVATIONS,
    IGNORED_KEYS,
    KEY_TABLE,
    Bert,
    BertConfig,
    canonical_key,
)
from ragjax.models.files.key_table import apply_key_table, named_tensors
from ragjax.models.inputs import Tokens
from ragjax.models.layers.stacks import abstract, merge, split

CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=24,
    num_layers=3,
    num_heads=4,
    intermediate_size=40,
    max_positions=12,
)
HUGGINGFACE = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
}


@pytest.fixture
def tokens(rng):
    mask = np.arange(10)[None] < np.array([[10], [7], [1], [0]])
    ids = rng.integers(0, CONFIG.vocab_size, size=mask.shape).astype(np.int32)
    return Tokens(jnp.asarray(ids), jnp.asarray(mask))


@pytest.fixture
def params(rng):
    """Random numbers in every parameter, biases and norms too."""
    _, shapes = abstract(lambda: Bert(CONFIG, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)


def run(config, params, tokens):
    graphdef, _ = abstract(lambda: Bert(config, rngs=nnx.Rngs(0)))
    encode = lambda params, tokens: merge(graphdef, params)(tokens)  # noqa: E731  (closes over the structure)
    return jax.jit(encode)(params, tokens)


def numpy_bert(tensors, ids):
    """One unpadded text in float64, written from the paper's equations."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * w[name + ".weight"] + w[name + ".bias"]

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = x + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    size = CONFIG.hidden_size // CONFIG.num_heads
    for layer in range(CONFIG.num_layers):
        at = f"encoder.layer.{layer}."
        q, k, v = (linear(x, f"{at}attention.self.{part}") for part in ("query", "key", "value"))
        outputs = []
        for head in range(CONFIG.num_heads):
            part = slice(head * size, (head + 1) * size)
            weights = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
            outputs.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
        attended = linear(np.concatenate(outputs, -1), f"{at}attention.output.dense")
        x = norm(x + attended, f"{at}attention.output.LayerNorm")
        inner = linear(x, f"{at}intermediate.dense")
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        x = norm(x + linear(inner, f"{at}output.dense"), f"{at}output.LayerNorm")
    return x


def test_equals_the_equations_in_numpy_with_and_without_padding(params, tokens):
    hidden = np.asarray(run(CONFIG, params, tokens))
    assert hidden.dtype == np.float32
    tensors = named_tensors(params, bert.KEY_TABLE)
    for row in range(3):
        length = int(tokens.mask[row].sum())
        expected = numpy_bert(tensors, np.asarray(tokens.ids[row, :length]))
        np.testing.assert_allclose(hidden[row, :length], expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_equals_pytorch_on_the_same_weights(params, tokens, activation):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    from transformers import BertConfig as TorchConfig
    from transformers import BertModel

    torch_config = TorchConfig(**HUGGINGFACE, hidden_act=activation)
    model = BertModel(torch_config, add_pooling_layer=False).eval()
    tensors = {
        name: torch.tensor(array) for name, array in named_tensors(params, bert.KEY_TABLE).items()
    }
    model.load_state_dict(tensors, strict=True)
    real = slice(0, 3)  # PyTorch has no defined answer for a text without tokens
    with torch.inference_mode():
        expected = model(
            input_ids=torch.tensor(np.asarray(tokens.ids)[real]).long(),
            attention_mask=torch.tensor(np.asarray(tokens.mask)[real]).long(),
        ).last_hidden_state.numpy()
    hidden = run(dataclasses.replace(CONFIG, activation=activation), params, tokens)
    mask = np.asarray(tokens.mask)[real]
    np.testing.assert_allclose(np.asarray(hidden)[real][mask], expected[mask], atol=2e-5)


def test_every_activation_equals_its_published_formula():
    x = np.linspace(-6, 6, 401)
    tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    expected = {
        "gelu": 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
        "gelu_new": tanh,
        "gelu_pytorch_tanh": tanh,
        "relu": np.maximum(x, 0),
    }
    assert expected.keys() == ACTIVATIONS.keys()
    for name, values in expected.items():
        result = ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(result, values, atol=1e-6, err_msg=name)


def test_the_layer_of_a_long_stack_is_compiled_once(params, tokens):
    graphdef, _ = abstract(lambda: Bert(CONFIG, rngs=nnx.Rngs(0)))
    program = jax.make_jaxpr(lambda params: merge(graphdef, params)(tokens))(params)
    scans = [equation for equation in program.eqns if equation.primitive.name == "scan"]
    assert [equation.params["length"] for equation in scans] == [CONFIG.num_layers]


def test_gradients_are_finite_with_a_text_without_tokens(params, tokens):
    graphdef, _ = abstract(lambda: Bert(CONFIG, rngs=nnx.Rngs(0)))
    compute = jax.grad(lambda params: (merge(graphdef, params)(tokens) ** 2).mean())
    gradient = jax.jit(compute)(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["layers"]["query"]))


def test_low_precision_parameters_keep_their_dtype(params, tokens):
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    hidden = run(CONFIG, halved, tokens)
    assert hidden.dtype == jnp.bfloat16
    full = np.asarray(run(CONFIG, params, tokens), np.float32)
    near = np.corrcoef(np.asarray(hidden, np.float32)[0].ravel(), full[0].ravel())[0, 1]
    assert near > 0.99


def test_too_many_tokens_are_refused(params):
    tokens = Tokens(jnp.zeros((1, 13), jnp.int32), jnp.ones((1, 13), bool))
    with pytest.raises(ValueError, match="13 tokens per text, but the model has 12 positions"):
        run(CONFIG, params, tokens)


@pytest.mark.slow
def test_layers_start_different_and_depend_on_the_seed_only():
    _, first = split(Bert(CONFIG, rngs=nnx.Rngs(0)))
    _, again = split(Bert(CONFIG, rngs=nnx.Rngs(0)))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernel = first["layers"]["query"]["kernel"]
    assert kernel.shape == (3, 24, 24)
    assert np.abs(kernel[0] - kernel[1]).max() > 0


def test_published_key_variants_load(params):
    tensors = named_tensors(params, bert.KEY_TABLE)
    old = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    old["bert.pooler.dense.weight"] = old["cls.predictions.bias"] = np.zeros((2, 2), np.float32)
    renamed = {canonical_key(name): tensor for name, tensor in old.items()}
    loaded = apply_key_table(renamed, KEY_TABLE, params, ignored=IGNORED_KEYS)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_config_is_read_from_huggingface_fields():
    assert bert.parse_config(HUGGINGFACE) == CONFIG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "silu"}, "hidden_act 'silu'"),
        ({"num_attention_heads": 5}, "hidden_size 24 is not a multiple of num_attention_heads 5"),
        ({"vocab_size": "50"}, "vocab_size must be a positive whole number, got '50'"),
        (
            {"num_hidden_layers": 0},
            "num_hidden_layers must be a positive whole number up to 1000, got 0",
        ),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be .* up to 1000"),
        ({"type_vocab_size": None}, "type_vocab_size must be .* got None"),
        ({"layer_norm_eps": None}, "layer_norm_eps must be a positive number, got None"),
        ({"layer_norm_eps": "1e-5"}, "layer_norm_eps must be a positive number"),
    ],
)
def test_unsupported_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        bert.parse_config(HUGGINGFACE | change)
