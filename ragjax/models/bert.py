"""The BERT encoder as Flax NNX modules, and where its checkpoints' tensors go.

Shapes: B texts, L tokens, D hidden size, H heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ragjax.models.inputs import Tokens
from ragjax.models.nnx_trees import scan_layers, stacked
from ragjax.models.safetensors import KeyRule, transpose

MODEL_TYPES = ("bert",)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    # erf, not jax.nn.gelu's erfc: the same to 1e-7 and less than half the time on CPU.
    "gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5)),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of a BERT encoder."""

    vocab_size: int  # tokens
    hidden_size: int  # floats per token
    num_layers: int
    num_heads: int
    intermediate_size: int  # floats per token inside the feed-forward block
    max_positions: int  # tokens
    type_vocab_size: int = 2  # token types; ragjax feeds type 0 only
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"  # a key of ACTIVATIONS

    def __post_init__(self) -> None:
        """Check that the sizes fit together."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act {self.activation!r} is not supported, one of {sorted(ACTIVATIONS)} is"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_heads}"
            )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "BertConfig":
        """Read the fields of a Hugging Face `config.json` of model type `bert`.

        Args:
          config: the parsed file.

        Raises:
          ValueError: a field is missing, is not of its type, or asks for what is not supported.
        """
        positions = config.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise ValueError(f"position_embedding_type {positions!r} is not supported, absolute is")
        if config.get("is_decoder"):
            raise ValueError("is_decoder is true: a decoder is not a text encoder")
        return cls(
            vocab_size=_integer(config, "vocab_size"),
            hidden_size=_integer(config, "hidden_size"),
            num_layers=_integer(config, "num_hidden_layers"),
            num_heads=_integer(config, "num_attention_heads"),
            intermediate_size=_integer(config, "intermediate_size"),
            max_positions=_integer(config, "max_position_embeddings"),
            type_vocab_size=_integer(config, "type_vocab_size"),
            layer_norm_eps=float(config.get("layer_norm_eps", 1e-12)),
            activation=str(config.get("hidden_act", "gelu")),
        )


class Bert(nnx.Module):
    """BERT without its pooler: token ids in, hidden states of the last layer out.

    References:
      Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
      Understanding", 2019, section 3.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        """Make randomly initialised parameters (normal, standard deviation 0.02).

        Args:
          config: sizes.
          rngs: source of the random keys.
        """
        self.embeddings = BertEmbeddings(config, rngs=rngs)
        self.layers = stacked(
            lambda key: BertLayer(config, rngs=nnx.Rngs(key)), rngs.params(), config.num_layers
        )

    def __call__(self, tokens: Tokens) -> Array:
        """Compute the hidden states.

        Args:
          tokens: ids `[B, L]` int32 below `vocab_size`, mask `[B, L]` bool; L at most
            `max_positions`.

        Returns:
          `[B, L, D]`, in the dtype of the parameters; positions outside the mask are finite and
          without meaning.
        """
        # Finite, so that a row without tokens gives finite numbers.
        bias = jnp.where(tokens.mask, 0.0, -1e30)[:, None, None, :]  # [B, 1, 1, L]
        hidden = self.embeddings(tokens.ids)
        return scan_layers(self.layers, lambda layer, hidden: layer(hidden, bias), hidden)


class BertEmbeddings(nnx.Module):
    """Sum of token, position and type embeddings, normalised."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        """Make randomly initialised tables."""

        def table(size: int) -> nnx.Embed:
            init = nnx.initializers.normal(0.02)
            return nnx.Embed(size, config.hidden_size, embedding_init=init, rngs=rngs)

        self.words = table(config.vocab_size)
        self.positions = table(config.max_positions)
        self.types = table(config.type_vocab_size)
        self.norm = _layer_norm(config, rngs)

    def __call__(self, ids: Array) -> Array:
        """Embed `[B, L]` int32 ids as `[B, L, D]`; every token is of type 0."""
        length = ids.shape[1]
        limit = self.positions.embedding.shape[0]
        if length > limit:
            raise ValueError(f"{length} tokens per text, but the model has {limit} positions")
        added = self.positions.embedding[:length] + self.types.embedding[0][None]  # [L, D]
        # Rows by index: calling nnx.Embed would cast to the dtype it was initialised with.
        return self.norm(self.words.embedding[ids] + added[None])


class BertLayer(nnx.Module):
    """Self-attention and a feed-forward block, each added to its input and normalised after."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        """Make randomly initialised weights."""

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            init = nnx.initializers.normal(0.02)
            return nnx.Linear(inputs, outputs, kernel_init=init, rngs=rngs)

        size = config.hidden_size
        self.num_heads = config.num_heads
        self.activation = config.activation
        self.query = linear(size, size)
        self.key = linear(size, size)
        self.value = linear(size, size)
        self.attention_output = linear(size, size)
        self.attention_norm = _layer_norm(config, rngs)
        self.intermediate = linear(size, config.intermediate_size)
        self.output = linear(config.intermediate_size, size)
        self.output_norm = _layer_norm(config, rngs)

    def __call__(self, hidden: Array, bias: Array) -> Array:
        """Transform hidden states.

        Args:
          hidden: `[B, L, D]`.
          bias: `[B, 1, 1, L]` float32, added to the attention logits: 0 or very negative.

        Returns:
          `[B, L, D]`.
        """
        attended = self.attention_output(self._attend(hidden, bias))
        hidden = self.attention_norm(hidden + attended)
        inner = ACTIVATIONS[self.activation](self.intermediate(hidden))
        return self.output_norm(hidden + self.output(inner))

    def _attend(self, hidden: Array, bias: Array) -> Array:
        query = self._split_heads(self.query(hidden))
        key = self._split_heads(self.key(hidden))
        value = self._split_heads(self.value(hidden))
        logits = (query @ key.swapaxes(-1, -2)).astype(jnp.float32)  # [B, H, L, L]
        scale = query.shape[-1] ** -0.5
        weights = jax.nn.softmax(logits * scale + bias, axis=-1).astype(hidden.dtype)
        return (weights @ value).swapaxes(1, 2).reshape(hidden.shape)

    def _split_heads(self, projected: Array) -> Array:
        """Turn `[B, L, D]` into `[B, H, L, D / H]`.

        Heads go before tokens: one transposed copy here, and XLA's CPU code then multiplies
        matrices; an einsum over `[B, L, H, D / H]` took 2.7 times as long.
        """
        batch, length, size = projected.shape
        heads = (batch, length, self.num_heads, size // self.num_heads)
        return projected.reshape(heads).swapaxes(1, 2)


# Hugging Face's tensor names, without the "bert." that some checkpoints put before each.
_LAYER = "encoder.layer.{}."
_LINEAR = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
}
_NORM = {"attention.output.LayerNorm": "attention_norm", "output.LayerNorm": "output_norm"}

KEY_TABLE: dict[str, KeyRule] = {
    "embeddings.word_embeddings.weight": KeyRule("embeddings/words/embedding"),
    "embeddings.position_embeddings.weight": KeyRule("embeddings/positions/embedding"),
    "embeddings.token_type_embeddings.weight": KeyRule("embeddings/types/embedding"),
    "embeddings.LayerNorm.weight": KeyRule("embeddings/norm/scale"),
    "embeddings.LayerNorm.bias": KeyRule("embeddings/norm/bias"),
    **{
        f"{_LAYER}{hf}.weight": KeyRule(f"layers/{to}/kernel", transpose)
        for hf, to in _LINEAR.items()
    },
    **{f"{_LAYER}{hf}.bias": KeyRule(f"layers/{to}/bias") for hf, to in _LINEAR.items()},
    **{f"{_LAYER}{hf}.weight": KeyRule(f"layers/{to}/scale") for hf, to in _NORM.items()},
    **{f"{_LAYER}{hf}.bias": KeyRule(f"layers/{to}/bias") for hf, to in _NORM.items()},
}

# Constants, and the heads of the pre-training tasks: no part of a text encoder.
IGNORED_KEYS = ("embeddings.position_ids", "pooler.dense.*", "cls.*")


def canonical_key(name: str) -> str:
    """Return the name that `KEY_TABLE` uses for a tensor of any published BERT checkpoint.

    Args:
      name: tensor name; may start with "bert." and, in checkpoints that came from TensorFlow,
        end with "LayerNorm.gamma" or "LayerNorm.beta".
    """
    name = name.removeprefix("bert.")
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name


def _layer_norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, cancels: it loses digits where the mean is large.
    epsilon = config.layer_norm_eps
    return nnx.LayerNorm(config.hidden_size, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def _integer(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field} must be a positive whole number, got {value!r}")
    return value
