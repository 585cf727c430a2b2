"""Texts of a run as token ids, for its encoder and its language model.

N documents, D embedding size.
"""

import logging
from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp

from ragjax.data import (
    Corpus,
    Passage,
    PromptBuilder,
    PromptTemplate,
    Question,
    buckets_up_to,
    encode_texts,
    pad_right,
    passage_text,
)
from ragjax.models.encoder import TextEncoder
from ragjax.models.inputs import Tokens
from ragjax.models.language_model import LanguageModel
from ragjax.refresh import EncodeTask
from ragjax.refresh.batches import EncodeOptions
from ragjax.runs.options.shared import PromptConfig

logger = logging.getLogger(__name__)
# From here on a file of embeddings for each 512 of them would be thousands of files.
_MANY_DOCUMENTS = 100_000


def corpus_task(encoder: TextEncoder, corpus: Corpus, *, encode_tokens: int) -> EncodeTask:
    """Returns the task of encoding a corpus with an encoder, whatever its parameters become.

    Processes that encode the same corpus must agree on it.

    Args:
        encoder: The base encoder; its fingerprint identifies the initial parameters.
        corpus: Passages, tokenised when they are encoded.
        encode_tokens: Tokens in a batch, padding included; nothing else limits its rows.
    """

    def tokenize(passages: Sequence[Passage]) -> list[list[int]]:
        texts = [encoder.doc_prefix + passage_text(passage) for passage in passages]
        return encode_texts(encoder.tokenizer, texts, max_length=encoder.max_length).ids

    return EncodeTask(
        encode=encoder.encode,
        documents=cast(Sequence[Any], corpus),  # read by index only
        pad_id=encoder.pad_id,
        tokenize=tokenize,
        make_tokens=Tokens,
        options=EncodeOptions(batch_tokens=encode_tokens, buckets=buckets(encoder)),
        corpus_fingerprint=corpus.fingerprint,
        model_fingerprint=encoder.fingerprint,
        rows_per_shard=8192 if len(corpus) > _MANY_DOCUMENTS else 512,
    )


def query_ids(encoder: TextEncoder, questions: Sequence[Question]) -> list[list[int]]:
    """Returns the encoder's token ids of questions, with its query prefix."""
    texts = [encoder.query_prefix + question.text for question in questions]
    return encode_texts(encoder.tokenizer, texts, max_length=encoder.max_length).ids


def truncated(ids: list[int], length: int) -> list[int]:
    """Returns the first token ids and the last one: an encoder expects its closing [SEP]."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def buckets(encoder: TextEncoder) -> tuple[int, ...]:
    """Returns the lengths, in tokens, that inputs of the encoder are padded to."""
    return buckets_up_to(encoder.max_length, EncodeOptions().buckets)


def bucket_of(encoder: TextEncoder, length: int) -> int:
    """Returns the length that a batch of the encoder is padded to."""
    return next(bucket for bucket in buckets(encoder) if bucket >= length)


def pad_tokens(encoder: TextEncoder, ids: Sequence[Sequence[int]], length: int) -> Tokens:
    """Returns token ids padded to one length, as the encoder takes them."""
    padded = pad_right(ids, length=length, pad_id=encoder.pad_id)
    return Tokens(jnp.asarray(padded.ids), jnp.asarray(padded.mask))


def make_prompts(
    config: PromptConfig, lm: LanguageModel, *, end_id: int | None = None, new_tokens: int = 0
) -> PromptBuilder:
    """Returns a language model's prompt builder; with `end_id`, targets end with that token.

    Room is kept for `new_tokens` that are generated.
    """
    # A model that was trained on prompts of its own reads those.
    texts = lm.prompt._asdict() if lm.prompt else {}
    texts.pop("end", None)
    template = PromptTemplate(
        **texts,
        max_document_tokens=config.document_tokens,
        max_answer_tokens=config.answer_tokens,
    )
    return prompts_of(lm, template, end_id=end_id, new_tokens=new_tokens)


def prompts_of(
    lm: LanguageModel, template: PromptTemplate, *, end_id: int | None = None, new_tokens: int = 0
) -> PromptBuilder:
    """Returns the prompt builder of a template, with the special tokens of a language model."""
    return PromptBuilder(
        lm.tokenizer,
        template=template,
        max_length=lm.max_length,
        pad_id=lm.pad_id,
        bos_id=lm.bos_id,
        end_id=end_id,
        context_end_ids=lm.text_format.context_end_ids,
        target_start_ids=lm.text_format.target_start_ids,
        new_tokens=new_tokens,
    )


def training_prompts(config: PromptConfig, lm: LanguageModel) -> PromptBuilder:
    """Returns the prompt builder of training, whose targets end where generation stops."""
    return make_prompts(config, lm, end_id=answer_end_id(lm))


def prompt_end_id(lm: LanguageModel) -> int | None:
    """Returns the token that ends an answer in the language model's prompt, None: it has none."""
    return lm.tokenizer.token_to_id(lm.prompt.end) if lm.prompt and lm.prompt.end else None


def answer_end_id(lm: LanguageModel) -> int | None:
    """Returns the token that ends trained targets, at which generation also stops.

    The one that its prompt ends an answer with (the end of a turn in a chat template); else the one
    that the model's targets end with by its convention; else a line break behind an answer, if that
    is one token; else the first of those that end a text. None: there is none of these, which is
    logged.
    """
    if (end_id := prompt_end_id(lm)) is not None:
        return end_id
    if (end_id := lm.text_format.target_end_id) is not None:
        return end_id
    answer, ended = (lm.tokenizer.encode(t, add_special_tokens=False).ids for t in ("a", "a\n"))
    line_break = ended[len(answer) :]
    # Where white space is dropped or unknown, the next token is none with a line break.
    if len(line_break) == 1 and "\n" in lm.tokenizer.decode(line_break):
        return line_break[0]
    if not lm.eos_ids:
        logger.warning(
            "%s: it has no end token and a line break is not one of its tokens: it cannot learn "
            "where an answer ends",
            lm.source,
        )
    return next(iter(lm.eos_ids), None)
