"""The BERT encoder as Flax NNX modules, and where its checkpoints' tensors go.

Shapes: B texts, L tokens, D hidden size, H heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax import Array

from ragjax.models.families import ClassifierKeys, EncoderFamily
from ragjax.models.files.config import integer_field, number_field, read_sizes, write_fields
from ragjax.models.files.key_table import KeyRule, counts_up, transpose
from ragjax.models.inputs import PairTokens, Tokens
from ragjax.models.layers.attention import attend
from ragjax.models.layers.linear import Linear
from ragjax.models.layers.norms import layer_norm
from ragjax.models.layers.stacks import count_layers, scan_layers, split_last, stacked

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    # erf, not jax.nn.gelu's erfc: the same to 1e-7 and less than half the time on CPU.
    "gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5)),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
# Size: field of config.json.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
# Tokens of a batch, per layer, from which `Bert.first_hidden` saves more time than it costs: D^2
# parameters take as long to copy as their products with about 50 tokens on two CPU cores.
_TOKENS_PER_LAYER = 64


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of a BERT encoder."""

    vocab_size: int  # tokens
    hidden_size: int  # floats per token
    num_layers: int
    num_heads: int
    intermediate_size: int  # floats per token inside the feed-forward block
    max_positions: int  # tokens per text
    type_vocab_size: int = 2  # token types; the second text of a pair is of type 1
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"  # a key of ACTIVATIONS

    def __post_init__(self) -> None:
        """Checks that the sizes fit together."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act {self.activation!r} is not supported, one of {sorted(ACTIVATIONS)} is"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_heads}"
            )


def parse_config(config: Mapping[str, Any]) -> BertConfig:
    """Reads the fields of a Hugging Face `config.json` of model type `bert`.

    Args:
        config: The parsed file.

    Raises:
        ValueError: A field is missing, is not of its type, or asks for what is not supported.
    """
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise ValueError(f"position_embedding_type {positions!r} is not supported, absolute is")
    if config.get("is_decoder"):
        raise ValueError("is_decoder is true: a decoder is not a text encoder")
    return BertConfig(
        **read_sizes(config, SIZES),
        type_vocab_size=integer_field(config, "type_vocab_size"),
        layer_norm_eps=number_field(config, "layer_norm_eps", 1e-12),
        activation=str(config.get("hidden_act", "gelu")),
    )


def format_config(config: BertConfig) -> dict[str, Any]:
    """Returns the contents of a `config.json` that `parse_config` reads as `config`."""
    return {
        "model_type": "bert",
        "architectures": ["BertModel"],
        **write_fields(config, SIZES),
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": config.activation,
    }


class Bert(nnx.Module):
    """BERT without its pooler: token ids in, hidden states of the last layer out.

    References:
        Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
        Understanding", 2019, section 3.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        """Makes randomly initialised parameters (normal, standard deviation 0.02).

        Args:
            config: Sizes.
            rngs: Source of the random keys.
        """
        self.embeddings = BertEmbeddings(config, rngs=rngs)
        self.layers = stacked(
            lambda key: BertLayer(config, rngs=nnx.Rngs(key)), rngs.params(), config.num_layers
        )

    def __call__(self, tokens: Tokens, *, remat: bool = False) -> Array:
        """Computes the hidden states.

        Args:
            tokens: Ids `[B, L]` int32 below `vocab_size`, mask `[B, L]` bool; L at most
                `max_positions`.
            remat: True = recompute each layer in the backward pass.

        Returns:
            `[B, L, D]`, in the dtype of the parameters; positions outside the mask are finite and
            without meaning.
        """
        mask = tokens.mask[:, None, None, :]  # [B, 1, 1, L]
        return scan_layers(
            self.layers,
            lambda layer, hidden: layer(hidden, mask),
            self.embeddings(tokens),
            remat=remat,
        )

    def first_hidden(self, tokens: Tokens, *, remat: bool = False) -> Array:
        """Computes the hidden states of the first tokens, which is all that CLS pooling reads.

        The last layer then asks for the first token only and spares five sixths of its products.

        Args:
            tokens: As for `__call__`.
            remat: As for `__call__`.

        Returns:
            `[B, D]`, the same as `self(tokens)[:, 0]` up to rounding.
        """
        # Taking the layers apart copies them, which few tokens do not pay for.
        if tokens.ids.size < _TOKENS_PER_LAYER * count_layers(self.layers):
            return Bert.__call__(self, tokens, remat=remat)[:, 0]
        below, top = split_last(self.layers)
        mask = tokens.mask[:, None, None, :]  # [B, 1, 1, L]
        hidden = self.embeddings(tokens)
        hidden = scan_layers(below, lambda layer, x: layer(x, mask), hidden, remat=remat)
        return scan_layers(top, lambda layer, x: layer(x, mask, first_only=True), hidden)[:, 0]


class BertEmbeddings(nnx.Module):
    """Sum of token, position and type embeddings, normalised."""

    def __init__(self, config: BertConfig, *, unused_positions: int = 0, rngs: nnx.Rngs):
        """Makes randomly initialised tables.

        Args:
            config: Sizes.
            unused_positions: Rows of the position table before the one of the first token.
            rngs: Source of the random keys.
        """

        def table(size: int) -> nnx.Embed:
            init = nnx.initializers.normal(0.02)
            return nnx.Embed(size, config.hidden_size, embedding_init=init, rngs=rngs)

        self.words = table(config.vocab_size)
        self.positions = table(config.max_positions + unused_positions)
        self.max_positions = config.max_positions
        self.types = table(config.type_vocab_size)
        self.norm = _layer_norm(config, rngs)

    def __call__(self, tokens: Tokens | PairTokens) -> Array:
        """Embeds `[B, L]` tokens as `[B, L, D]`; those of a single text are of type 0."""
        length = tokens.ids.shape[1]
        if length > self.max_positions:
            raise ValueError(
                f"{length} tokens per text, but the model has {self.max_positions} positions"
            )
        types, table = getattr(tokens, "types", None), self.types.embedding
        typed = table[0][None, None] if types is None else table[types]
        added = self._embed_positions(tokens) + typed
        # Rows by index: calling nnx.Embed would cast to the dtype it was initialised with.
        return self.norm(self.words.embedding[tokens.ids] + added)

    def _embed_positions(self, tokens: Tokens | PairTokens) -> Array:
        """Returns what stands for the places of the tokens, `[B or 1, L, D]`."""
        return self.positions.embedding[: tokens.ids.shape[1]][None]


class BertLayer(nnx.Module):
    """Self-attention and a feed-forward block, each added to its input and normalised after."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        """Makes randomly initialised weights."""

        def linear(inputs: int, outputs: int) -> Linear:
            init = nnx.initializers.normal(0.02)
            return Linear(inputs, outputs, kernel_init=init, rngs=rngs)

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

    def __call__(self, hidden: Array, mask: Array, *, first_only: bool = False) -> Array:
        """Transforms hidden states.

        Args:
            hidden: `[B, L, D]`.
            mask: `[B, 1, 1, L]` bool, True = token that is attended to.
            first_only: True: the first token alone attends.

        Returns:
            `[B, L, D]`, or `[B, 1, D]` with `first_only`.
        """
        asking = hidden[:, :1] if first_only else hidden
        attended = self.attention_output(self._attend(asking, hidden, mask))
        hidden = self.attention_norm(asking + attended)
        inner = ACTIVATIONS[self.activation](self.intermediate(hidden))
        return self.output_norm(hidden + self.output(inner))

    def _attend(self, asking: Array, hidden: Array, mask: Array) -> Array:
        def heads(projected: Array) -> Array:
            return projected.reshape(*projected.shape[:2], self.num_heads, -1)

        query, key, value = self.query(asking), self.key(hidden), self.value(hidden)
        attended = attend(heads(query), heads(key), heads(value), mask=mask)
        return attended.reshape(asking.shape)


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

# The heads of the pre-training tasks: no part of a text encoder.
IGNORED_KEYS = ("pooler.dense.*", "cls.*")
BUFFERS = {"embeddings.position_ids": counts_up}


def canonical_key(name: str) -> str:
    """Returns the name that `KEY_TABLE` uses for a tensor of any published BERT checkpoint.

    Args:
        name: Tensor name; may start with "bert." and, in checkpoints that came from TensorFlow,
            end with "LayerNorm.gamma" or "LayerNorm.beta".
    """
    name = name.removeprefix("bert.")
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name


def _layer_norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return layer_norm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)


FAMILY = EncoderFamily(
    model_types=("bert",),
    parse_config=parse_config,
    format_config=format_config,
    make_module=Bert,
    key_table=lambda config: KEY_TABLE,
    canonical_key=canonical_key,
    ignored_keys=IGNORED_KEYS,
    buffers=lambda config: BUFFERS,
    classifier=ClassifierKeys(dense="pooler.dense", output="classifier", typed=True),
)
