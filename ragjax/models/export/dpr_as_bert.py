"""Turns a DPR tower into a BERT that other programs know."""

import dataclasses

from ragjax.models.encoder import TextEncoder, build_encoder
from ragjax.models.encoders import bert, dpr
from ragjax.models.layers.head import Dense

# Averages and choices of projected vectors are the projection of averages and choices.
_LINEAR_POOLINGS = ("cls", "mean", "weightedmean", "lasttoken")


def as_bert(encoder: TextEncoder) -> TextEncoder:
    """Returns a DPR tower as a BERT whose projection, if it has one, is a dense layer.

    Hugging Face's DPR classes give no hidden states, so that sentence-transformers and what reads
    its folders cannot use them.

    Args:
        encoder: Any encoder; one that is no DPR tower is returned as it is.

    Raises:
        ValueError: The pooling does not commute with the projection.
    """
    if encoder.family is not dpr.FAMILY:
        return encoder
    sizes = [field.name for field in dataclasses.fields(bert.BertConfig)]
    config = bert.BertConfig(**{name: getattr(encoder.config, name) for name in sizes})
    params = {name: leaf for name, leaf in encoder.params.items() if name != "output"}
    steps = encoder.steps
    if "output" in encoder.params:
        if encoder.pooling not in _LINEAR_POOLINGS:
            raise ValueError(
                f"{encoder.source}: pooling {encoder.pooling!r} of projected hidden states is not "
                "the projection of pooled ones; cls, as DPR is trained with, is"
            )
        dense = Dense(
            inputs=config.hidden_size,
            outputs=encoder.config.projection_size,
            activation="Identity",
        )
        steps = (dense, *steps)
        later = encoder.params.get("projection", {})
        moved = {str(int(number) + 1): layer for number, layer in later.items()}
        params["projection"] = {"0": encoder.params["output"], **moved}
    options = dataclasses.replace(encoder, steps=steps)
    return build_encoder(bert.FAMILY, config, params, encoder.tokenizer, options)
