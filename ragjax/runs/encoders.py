"""The text encoders of a run: one for queries and documents, or two."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import NamedTuple

from ragjax.models.encoder import Encode, TextEncoder, load_encoder, with_options
from ragjax.runs.options.shared import RunConfig


class Encoders(NamedTuple):
    """The encoder of queries and that of documents, the same object where there is one."""

    query: TextEncoder
    doc: TextEncoder

    @property
    def named(self) -> dict[str, TextEncoder]:
        """Each encoder once, by what messages call it."""
        if self.query is self.doc:
            return {"encoder": self.doc}
        return {"query encoder": self.query, "doc encoder": self.doc}

    def mapped(self, change: Callable[[TextEncoder], TextEncoder]) -> "Encoders":
        """Returns both after a change, one object where they were one."""
        query = change(self.query)
        return Encoders(query, query if self.query is self.doc else change(self.doc))


def load_encoders(config: RunConfig) -> Encoders:
    """Loads the encoders of a run, used as its options say.

    Raises:
        FileNotFoundError: One of them is missing.
        ValueError: One cannot be used, or the two do not embed into one space.
    """
    loaded = {
        source: load_encoder(
            source,
            max_length=config.encoder_max_length or None,
            query_prefix=config.query_prefix,
            doc_prefix=config.doc_prefix,
        )
        for source in dict.fromkeys(config.encoder_sources)
    }
    query, doc = (loaded[source] for source in config.encoder_sources)
    for what, first, other in (
        ("dimensions", query.embedding_size, doc.embedding_size),
        ("length 1 of the embeddings", query.normalized, doc.normalized),
    ):
        if first != other:
            raise ValueError(
                f"--query_encoder {query.source} and --doc_encoder {doc.source} cannot be compared:"
                f" {what} {first} there, {other} here; give two encoders that were trained together"
            )
    return Encoders(query, doc)


def in_compute_dtype(encoder: TextEncoder, config: RunConfig) -> TextEncoder:
    """Returns the encoder as the run uses it; embeddings of another dtype are another encoder's."""
    if (dtype := _cast_dtype(config)) is None:
        return encoder
    identity = hashlib.sha256(f"{encoder.fingerprint} {dtype}".encode()).hexdigest()
    encoder = with_options(encoder, compute_dtype=dtype)
    return dataclasses.replace(encoder, fingerprint=identity)


def training_encode(encoder: TextEncoder, config: RunConfig) -> Encode:
    """Returns `encode` as training runs it: recomputing its layers if the options say so."""
    if not config.retriever.remat:
        return encoder.encode
    return with_options(encoder, remat=True, compute_dtype=_cast_dtype(config)).encode


def scale_of(encoder: TextEncoder) -> float:
    """Returns the factor from q·d to a logit of p_R: 20 of cosines, 1 of other dot products."""
    return 20.0 if encoder.normalized else 1.0


def scale_note(encoder: TextEncoder, asked: float) -> str | None:
    """Says by which factor p_R weighs embeddings that are not of length 1; None: nothing to say.

    Args:
        encoder: Of documents.
        asked: `retriever.scale`.
    """
    if encoder.normalized:
        return None
    if not asked:
        return (
            f"embeddings of {encoder.source} are not scaled to length 1: p_R is the softmax"
            f" of their dot products, times {scale_of(encoder):g} (--retriever.scale)"
        )
    if asked > scale_of(encoder):
        return (
            f"--retriever.scale {asked:g} multiplies the dot products of embeddings that are"
            f" not scaled to length 1 ({encoder.source}): p_R may be all on one document; such"
            f" encoders are trained with {scale_of(encoder):g}"
        )
    return None


def _cast_dtype(config: RunConfig) -> str | None:
    return None if config.compute_dtype == "float32" else config.compute_dtype
