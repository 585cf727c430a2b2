"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT's layers with positions that start elsewhere."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from ragjax.models.encoders import bert
from ragjax.models.encoders.bert import Bert, BertConfig, BertEmbeddings
from ragjax.models.families import ClassifierKeys, EncoderFamily
from ragjax.models.inputs import PairTokens, Tokens

# `model_type`: the class that Hugging Face loads it with.
_CLASSES = {
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "camembert": "CamembertModel",
}


@dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """Sizes of a RoBERTa encoder; `max_positions` counts those that a text can use."""

    padding_id: int = 1  # token without a position; the first real token has the one after it
    model_type: str = "roberta"  # or "xlm-roberta", "camembert": the same model


class Roberta(Bert):
    """RoBERTa without its pooler: token ids in, hidden states of the last layer out.

    References:
        Liu et al., "RoBERTa: A Robustly Optimized BERT Pretraining Approach", 2019.
        Conneau et al., "Unsupervised Cross-lingual Representation Learning at Scale", 2020.
    """

    def __init__(self, config: RobertaConfig, *, rngs: nnx.Rngs):
        """Makes randomly initialised parameters (normal, standard deviation 0.02).

        Args:
            config: Sizes.
            rngs: Source of the random keys.
        """
        super().__init__(config, rngs=rngs)
        self.embeddings = RobertaEmbeddings(config, rngs=rngs)


class RobertaEmbeddings(BertEmbeddings):
    """BERT's embeddings, with the positions of the real tokens counted from `padding_id + 1`."""

    def __init__(self, config: RobertaConfig, *, rngs: nnx.Rngs):
        """Makes randomly initialised tables."""
        super().__init__(config, unused_positions=config.padding_id + 1, rngs=rngs)
        self.padding_id = config.padding_id

    def _embed_positions(self, tokens: Tokens | PairTokens) -> Array:
        # A padding token inside a text has no position, as in Hugging Face's implementation.
        real = tokens.mask & (tokens.ids != self.padding_id)
        counted = jnp.where(real, jnp.cumsum(real, axis=1, dtype=jnp.int32), 0)
        return self.positions.embedding[counted + self.padding_id]


def parse_config(config: Mapping[str, Any]) -> RobertaConfig:
    """Reads the fields of a Hugging Face `config.json` of model type `roberta` or its relatives.

    Raises:
        ValueError: A field is missing, is not of its type, or asks for what is not supported.
    """
    padding_id = config.get("pad_token_id", 1)
    if not isinstance(padding_id, int) or isinstance(padding_id, bool) or padding_id < 0:
        raise ValueError(f"pad_token_id must be a whole number of at least 0, got {padding_id!r}")
    fields = dataclasses.asdict(bert.parse_config(config))
    fields["max_positions"] -= padding_id + 1
    if fields["max_positions"] < 1:
        raise ValueError(
            f"max_position_embeddings {config['max_position_embeddings']} leaves no position after "
            f"the {padding_id + 1} that pad_token_id {padding_id} reserves"
        )
    return RobertaConfig(**fields, padding_id=padding_id, model_type=config["model_type"])


def format_config(config: RobertaConfig) -> dict[str, Any]:
    """Returns the contents of a `config.json` that `parse_config` reads as `config`."""
    return bert.format_config(config) | {
        "model_type": config.model_type,
        "architectures": [_CLASSES[config.model_type]],
        "max_position_embeddings": config.max_positions + config.padding_id + 1,
        "pad_token_id": config.padding_id,
    }


def canonical_key(name: str) -> str:
    """Returns the name that `bert.KEY_TABLE` uses for a tensor of a published checkpoint.

    Args:
        name: Tensor name; may start with "roberta." or, in the first CamemBERT files, "camembert.".
    """
    return name.removeprefix("roberta.").removeprefix("camembert.")


FAMILY = EncoderFamily(
    model_types=tuple(_CLASSES),
    parse_config=parse_config,
    format_config=format_config,
    make_module=Roberta,
    key_table=lambda config: bert.KEY_TABLE,
    canonical_key=canonical_key,
    ignored_keys=("pooler.dense.*", "lm_head.*"),
    buffers=lambda config: bert.BUFFERS,
    classifier=ClassifierKeys(dense="classifier.dense", output="classifier.out_proj"),
)
