"""Sampling answers: by temperature, from the k most likely tokens, from the nucleus.

Shapes: B answers, K documents each, L prompt slots, T new tokens, V vocabulary.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import Partial

from ragjax.generation.compiled import jit_decoding
from ragjax.generation.decoder import Decoder
from ragjax.generation.greedy import GreedyResult, decode_loop
from ragjax.generation.prompts import Limits, Prompts, prefill_documents, prefill_rows, repeat_rows


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature"],
    meta_fields=["top_k", "top_p"],
)
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; a pytree, compiled for `top_k` and `top_p`.

    Attributes:
        temperature: Divides the log-probabilities; above 0 (greedy decoding is the limit 0); may
            be traced.
        top_k: Draw from this many most likely tokens; 0: from all.
        top_p: Draw from the fewest most likely tokens that together have this probability, after
            temperature and `top_k`; the most likely one always stays. 1: from all.

    References:
        Fan et al., 2018, "Hierarchical Neural Story Generation", section 5 (top k).
        Holtzman et al., 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """

    temperature: float | Array
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        """Raises ValueError for an option out of its range; a traced temperature is not checked."""
        if isinstance(self.temperature, int | float) and not self.temperature > 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}; generate_greedy takes the "
                "most likely token"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 1, or 0 for all tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


@functools.partial(jit_decoding, static_argnames=("decoder", "limits", "samples"))
def generate_sampled(
    decoder: Decoder,
    params: Any,
    prompts: Prompts,
    limits: Limits,
    *,
    key: Array,
    sampling: Sampling,
    samples: int = 1,
) -> GreedyResult:
    """Draws answers to each prompt, token by token.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        prompts: One an answer, `[B, L]`.
        limits: Where answers end.
        key: A `jax.random` key, from which each row draws by its number alone; or `[B]` keys, one
            a row, where an answer should not depend on its place in the batch.
        sampling: How tokens are drawn.
        samples: Answers S to each prompt, which is read once; the rows are then B * S, those of
            a prompt side by side.

    Returns:
        Ids `[B, T]`, lengths `[B]` and log-probabilities `[B]`. The latter are the model's own,
        without temperature and without what tokens were drawn from.

    Raises:
        ValueError: The prompts are those of documents, or the number of keys is another.
    """
    prefilled = repeat_rows(prefill_rows(decoder, params, prompts, limits), samples)
    return decode_loop(prefilled, sampler(row_keys(key, prefilled.answers), sampling), limits)


@functools.partial(jit_decoding, static_argnames=("decoder", "limits"))
def generate_ensemble_sampled(
    decoder: Decoder,
    params: Any,
    prompts: Prompts,
    limits: Limits,
    *,
    key: Array,
    sampling: Sampling,
) -> GreedyResult:
    """Draws one answer to each question from the mixture over documents.

    Args:
        decoder: The language model's functions; hashable.
        params: Its parameters.
        prompts: One per document, `[B, K, L]`.
        limits: Where answers end.
        key: As in `generate_sampled`: one, or `[B]`.
        sampling: How tokens are drawn from the mixture (not from each document's distribution).

    Returns:
        Ids `[B, T]`, lengths `[B]` and log-probabilities `[B]` under the mixture.

    Raises:
        ValueError: The shapes do not fit together, or the number of keys is another.
    """
    prefilled = prefill_documents(decoder, params, prompts, limits)
    return decode_loop(prefilled, sampler(row_keys(key, prefilled.answers), sampling), limits)


def row_keys(key: Array, rows: int) -> Array:
    """Returns `[rows]` keys, by the number of the row unless there is one for each already."""
    if key.shape == (rows,):
        return key
    if key.shape != ():
        raise ValueError(
            f"key must be one key, or one for each of {rows} rows, got shape {key.shape}; make "
            "keys by jax.random.key"
        )
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows))


def sampler(keys: Array, sampling: Sampling) -> Partial:
    """Returns a function that draws tokens, for `decode_loop`; a pytree.

    Args:
        keys: `[B]`, one per answer; step t of a row draws with its key and t.
        sampling: How tokens are drawn.

    Returns:
        `(log-probabilities [B, V], step) -> token ids [B]`.
    """
    return Partial(_draw, keys, sampling)


def _draw(keys: Array, sampling: Sampling, log_probs: Array, step: Array) -> Array:
    scaled, token_ids = log_probs / sampling.temperature, None
    if sampling.top_k or sampling.top_p < 1:
        # In falling order, which the nucleus needs; all of them where top_k does not say.
        size = min(sampling.top_k or scaled.shape[-1], scaled.shape[-1])
        scaled, token_ids = lax.top_k(scaled, size)
        scaled = jnp.where(_in_nucleus(scaled, sampling.top_p), scaled, -jnp.inf)
    step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    drawn = jax.vmap(jax.random.categorical)(step_keys, scaled)
    if token_ids is not None:
        drawn = jnp.take_along_axis(token_ids, drawn[:, None], axis=1)[:, 0]
    return drawn.astype(jnp.int32)


def _in_nucleus(scaled: Array, top_p: float) -> Array:
    """Marks the first of sorted tokens `[B, S]` whose probability before them is below p."""
    if top_p == 1:
        return jnp.ones_like(scaled, bool)
    probs = jax.nn.softmax(scaled, axis=-1)
    return jnp.cumsum(probs, axis=-1) - probs < top_p
