"""Sampling answers: by temperature, from the k most likely tokens, from the nucleus.

Shapes: R rows, B questions, K documents each, L prompt slots, T new tokens, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ragjax.generation.compiled import jit_decoding
from ragjax.generation.decoder import Decoder
from ragjax.generation.ensemble import read_mixture
from ragjax.generation.greedy import Choose, GreedyResult, decode_loop, read_prompts

_STATIC = ("decoder", "top_k", "top_p", "max_new_tokens", "stop_ids", "min_new_tokens")


@functools.partial(jit_decoding, static_argnames=_STATIC)
def generate_sampled(
    decoder: Decoder,
    params: Any,
    context_ids: Array,
    context_mask: Array,
    key: Array,
    *,
    temperature: float | Array,
    top_k: int = 0,
    top_p: float = 1.0,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    min_new_tokens: int = 0,
) -> GreedyResult:
    """Draws one answer to each prompt, token by token.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        context_ids: `[R, L]` int32, left-padded.
        context_mask: `[R, L]` bool, True = real token.
        key: A `jax.random` key, from which each row draws by its number alone; or `[R]` keys, one
            a row, where an answer should not depend on its place in the batch.
        temperature: Divides the log-probabilities; above 0 (`generate_greedy` is the limit 0).
        top_k: Draw from this many most likely tokens; 0: from all.
        top_p: Draw from the fewest most likely tokens that together have this probability, after
            temperature and `top_k`; the most likely one always stays. 1: from all.
        max_new_tokens: T, at least 1.
        stop_ids: Tokens that end an answer.
        min_new_tokens: Stop tokens are not drawn before this many tokens.

    Returns:
        Ids `[R, T]`, lengths `[R]` and log-probabilities `[R]`. The latter are the model's own,
        without temperature and without what tokens were drawn from.

    Raises:
        ValueError: An option is out of its range.

    References:
        Fan et al., 2018, "Hierarchical Neural Story Generation", section 5 (top k).
        Holtzman et al., 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    prefilled = read_prompts(
        decoder, params, context_ids, context_mask, max_new_tokens=max_new_tokens
    )
    rows = context_ids.shape[0]
    return decode_loop(
        jax.nn.log_softmax,
        sampler(row_keys(key, rows), temperature=temperature, top_k=top_k, top_p=top_p),
        functools.partial(decoder.decode_step, params),
        prefilled,
        rows=rows,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        min_new_tokens=min_new_tokens,
    )


@functools.partial(jit_decoding, static_argnames=_STATIC)
def generate_ensemble_sampled(
    decoder: Decoder,
    params: Any,
    context_ids: Array,
    context_mask: Array,
    doc_scores: Array,
    key: Array,
    *,
    doc_mask: Array | None = None,
    temperature: float | Array,
    top_k: int = 0,
    top_p: float = 1.0,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    min_new_tokens: int = 0,
) -> GreedyResult:
    """Draws one answer to each question from the mixture over documents.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        context_ids: `[B, K, L]` int32, left-padded prompts, one per document.
        context_mask: `[B, K, L]` bool, True = real token.
        doc_scores: `[B, K]` float, logits of p_R.
        key: As in `generate_sampled`: one, or `[B]`.
        doc_mask: `[B, K]` bool, True = there is a document; None: all there. Without any
            document, all K prompts count the same.
        temperature: Of the mixture, not of each document's distribution.
        top_k: As in `generate_sampled`.
        top_p: As in `generate_sampled`.
        max_new_tokens: T, at least 1.
        stop_ids: Tokens that end an answer.
        min_new_tokens: Stop tokens are not drawn before this many tokens.

    Returns:
        Ids `[B, T]`, lengths `[B]` and log-probabilities `[B]` under the mixture.

    Raises:
        ValueError: The shapes do not fit together, or an option is out of its range.
    """
    mixture = read_mixture(
        decoder,
        params,
        context_ids,
        context_mask,
        doc_scores,
        doc_mask=doc_mask,
        max_new_tokens=max_new_tokens,
    )
    rows = context_ids.shape[0]
    return decode_loop(
        mixture.mix,
        sampler(row_keys(key, rows), temperature=temperature, top_k=top_k, top_p=top_p),
        mixture.advance,
        mixture.prefilled,
        rows=rows,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        min_new_tokens=min_new_tokens,
    )


def row_keys(key: Array, rows: int) -> Array:
    """Returns `[rows]` keys, by the number of the row unless there is one for each already."""
    if key.shape == (rows,):
        return key
    if key.shape != ():
        raise ValueError(
            f"a key, or one for each of {rows} rows, is needed, got shape {key.shape}; make keys "
            "by jax.random.key"
        )
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows))


def sampler(
    keys: Array, *, temperature: float | Array, top_k: int = 0, top_p: float = 1.0
) -> Choose:
    """Returns a function that draws tokens, for `decode_loop`.

    Args:
        keys: `[rows]`, one per answer; step t of a row draws with its key and t.
        temperature: Above 0; may be traced.
        top_k: 0 or the number of candidates.
        top_p: Probability of the candidates, above 0 and at most 1.

    Returns:
        `(log-probabilities [rows, V], step) -> token ids [rows]`.

    Raises:
        ValueError: An option is out of its range.
    """
    check_sampling(temperature, top_k, top_p)

    def choose(log_probs: Array, step: Array) -> Array:
        scaled, token_ids = log_probs / temperature, None
        if top_k or top_p < 1:
            # In falling order, which the nucleus needs; all of them where top_k does not say.
            size = min(top_k or scaled.shape[-1], scaled.shape[-1])
            scaled, token_ids = lax.top_k(scaled, size)
            scaled = jnp.where(_in_nucleus(scaled, top_p), scaled, -jnp.inf)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
        drawn = jax.vmap(jax.random.categorical)(step_keys, scaled)
        if token_ids is not None:
            drawn = jnp.take_along_axis(token_ids, drawn[:, None], axis=1)[:, 0]
        return drawn.astype(jnp.int32)

    return choose


def check_sampling(temperature: float | Array, top_k: int, top_p: float) -> None:
    """Refuses options of `sampler` that are out of their range; a traced one is not looked at.

    Raises:
        ValueError: The option, what it is and what it should be.
    """
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(
            f"temperature must be above 0, got {temperature}; generate_greedy takes the most "
            "likely token"
        )
    if top_k < 0:
        raise ValueError(f"top_k must be at least 1, or 0 for all tokens, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def _in_nucleus(scaled: Array, top_p: float) -> Array:
    """Marks the first of sorted tokens `[rows, S]` whose probability before them is below p."""
    if top_p == 1:
        return jnp.ones_like(scaled, bool)
    probs = jax.nn.softmax(scaled, axis=-1)
    return jnp.cumsum(probs, axis=-1) - probs < top_p
