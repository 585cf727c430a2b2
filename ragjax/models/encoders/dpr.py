"""The question and context encoders of Dense Passage Retrieval: BERT in a file of its own kind.

References:
    Karpukhin et al., "Dense Passage Retrieval for Open-Domain Question Answering", 2020, section 3.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jax import Array

from ragjax.models.encoders import bert
from ragjax.models.encoders.bert import Bert, BertConfig
from ragjax.models.families import EncoderFamily
from ragjax.models.files.config import integer_field
from ragjax.models.files.key_table import KeyRule, transpose
from ragjax.models.inputs import Tokens
from ragjax.models.layers.linear import Linear

# Class that Hugging Face loads a tower with: what its tensors' names start with.
_TOWERS = {"DPRQuestionEncoder": "question_encoder", "DPRContextEncoder": "ctx_encoder"}


@dataclass(frozen=True, kw_only=True)
class DprConfig(BertConfig):
    """Sizes of one tower of DPR."""

    tower: str = "question_encoder"  # or "ctx_encoder"
    projection_size: int = 0  # D of the embeddings; 0 = no projection, D is hidden_size


class Dpr(Bert):
    """BERT, and a projection of its hidden states where there is one.

    The projection is linear: before the pooling (CLS) it gives what it gives after it.
    """

    def __init__(self, config: DprConfig, *, rngs: nnx.Rngs):
        """Makes randomly initialised parameters.

        Args:
            config: Sizes.
            rngs: Source of the random keys.
        """
        super().__init__(config, rngs=rngs)
        sizes = (config.hidden_size, config.projection_size)
        self.output = Linear(*sizes, rngs=rngs) if config.projection_size else None

    def __call__(self, tokens: Tokens, *, remat: bool = False) -> Array:
        """Computes the (projected) hidden states, as `Bert` does."""
        return self._project(super().__call__(tokens, remat=remat))

    def first_hidden(self, tokens: Tokens, *, remat: bool = False) -> Array:
        """Computes the (projected) hidden states of the first tokens, as `Bert` does."""
        return self._project(super().first_hidden(tokens, remat=remat))

    def _project(self, hidden: Array) -> Array:
        return hidden if self.output is None else self.output(hidden)


def parse_config(config: Mapping[str, Any]) -> DprConfig:
    """Reads the fields of a Hugging Face `config.json` of model type `dpr`.

    Raises:
        ValueError: A field is missing or not of its type, or the file is that of a DPR reader.
    """
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    towers = [_TOWERS[name] for name in names if isinstance(name, str) and name in _TOWERS]
    if len(towers) != 1:
        raise ValueError(
            f"architectures {architectures!r}: exactly one of {', '.join(_TOWERS)} is expected, as "
            "it says which tower of DPR the file holds"
        )
    projected = config.get("projection_dim") not in (0, None)
    return DprConfig(
        **dataclasses.asdict(bert.parse_config(config)),
        tower=towers[0],
        projection_size=integer_field(config, "projection_dim") if projected else 0,
    )


def format_config(config: DprConfig) -> dict[str, Any]:
    """Returns the contents of a `config.json` that `parse_config` reads as `config`."""
    return bert.format_config(config) | {
        "model_type": "dpr",
        "architectures": [name for name, tower in _TOWERS.items() if tower == config.tower],
        "projection_dim": config.projection_size,
    }


def key_table(config: DprConfig) -> dict[str, KeyRule]:
    """Returns where each tensor of a DPR tower goes."""
    table = {f"{config.tower}.bert_model.{name}": rule for name, rule in bert.KEY_TABLE.items()}
    if config.projection_size:
        stem = f"{config.tower}.encode_proj."
        table[f"{stem}weight"] = KeyRule("output/kernel", transpose)
        table[f"{stem}bias"] = KeyRule("output/bias")
    return table


FAMILY = EncoderFamily(
    model_types=("dpr",),
    parse_config=parse_config,
    format_config=format_config,
    make_module=Dpr,
    key_table=key_table,
    canonical_key=bert.canonical_key,
    ignored_keys=tuple(f"{tower}.bert_model.pooler.dense.*" for tower in _TOWERS.values()),
    buffers=lambda config: {
        f"{tower}.bert_model.{name}": holds
        for tower in _TOWERS.values()
        for name, holds in bert.BUFFERS.items()
    },
    default_pooling="cls",
)
