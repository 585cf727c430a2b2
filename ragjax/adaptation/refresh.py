"""What a trainer and its worker processes must agree on: the corpus as a task for the encoder."""

from collections.abc import Sequence
from typing import Any, cast

from ragjax.data import Corpus, buckets_up_to, encode_texts, passage_text
from ragjax.data.corpus_cache import Passage
from ragjax.models.encoder import TextEncoder
from ragjax.models.inputs import Tokens
from ragjax.refresh.batches import DEFAULT_BUCKETS, EncodeOptions
from ragjax.refresh.task import EncodeTask


def corpus_task(
    encoder: TextEncoder,
    corpus: Corpus | Sequence[list[int]],
    *,
    encode_tokens: int,
    rows_per_shard: int,
    corpus_fingerprint: str = "",
) -> EncodeTask:
    """Returns the task of encoding a corpus with an encoder, whatever its weights become.

    Args:
        encoder: the un-adapted encoder; its fingerprint says where the weights started.
        corpus: passages, tokenised when they are encoded, or the encoder's token ids of each.
        encode_tokens: tokens in a batch, padding included.
        rows_per_shard: documents in a shard.
        corpus_fingerprint: of the corpus that token ids come from; "" takes that of `corpus`.
    """
    longest = encoder.max_length
    buckets = buckets_up_to(longest, DEFAULT_BUCKETS)
    settings: dict[str, Any] = {
        "encode": encoder.encode,
        "documents": cast(Sequence[Any], corpus),  # read by index only
        "pad_id": encoder.pad_id,
        "make_tokens": Tokens,
        "options": EncodeOptions(batch_tokens=encode_tokens, buckets=buckets),
        "corpus_fingerprint": corpus_fingerprint,
        "model_fingerprint": encoder.fingerprint,
        "rows_per_shard": rows_per_shard,
    }
    if not isinstance(corpus, Corpus):
        return EncodeTask(**settings)

    def tokenize(passages: Sequence[Passage]) -> list[list[int]]:
        texts = [encoder.doc_prefix + passage_text(passage) for passage in passages]
        return encode_texts(encoder.tokenizer, texts, max_length=longest).ids

    settings["corpus_fingerprint"] = corpus_fingerprint or corpus.fingerprint
    return EncodeTask(**settings, tokenize=tokenize)
