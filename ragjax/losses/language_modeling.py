"""Log-probs of target tokens, and the language model's half of dual training."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ragjax.losses._common import Axes


def token_log_probs(logits: ArrayLike, targets: ArrayLike) -> Array:
    r"""Computes the log-prob of each target token.

    .. math::
        \ell_t = z_{t, y_t} - \log \sum_v \exp(z_{tv})

    ℓ_t = logits[t, y_t] − log Σ_v exp(logits[t, v])

    Args:
        logits: `[..., T, V]` floating-point, at the positions that predict the targets.
        targets: `[..., T]` integer token ids in 0 … V−1.

    Returns:
        `[..., T]` log-probs in nats, float32 (float64 stays float64). An id outside 0 … V−1 (such
        as an ignore label) gives NaN, which a token mask drops.

    Raises:
        ValueError: Logits are not floating-point, targets not integer, or the shapes disagree.

    Gradients:
        ∂ℓ_t/∂logits[t] = onehot(y_t) − softmax(logits[t]).

    References:
        Vaswani et al., Attention Is All You Need, 2017, section 3.4 (softmax over the vocabulary).

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> logits, targets = jnp.zeros((1, 2, 4)), jnp.array([[0, 3]])
        >>> print(np.asarray(losses.token_log_probs(logits, targets)).round(3))  # -log 4
        [[-1.386 -1.386]]
    """
    axes = Axes()
    logits = axes.floats("logits", logits, "...TV")
    targets = axes.integers("targets", targets, "...T")
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_probs = chosen - jax.nn.logsumexp(logits, axis=-1)
    # Beyond V the lookup itself gives NaN; a negative id would count from the vocabulary's end.
    return jnp.where(targets >= 0, log_probs, jnp.nan)


def sequence_log_probs(token_log_probs: ArrayLike, *, token_mask: ArrayLike | None = None) -> Array:
    r"""Sums token log-probs into the log-prob of the whole target.

    .. math::
        \ell_c = \sum_t \ell_{ct}

    ℓ_c = Σ_t ℓ_ct

    Args:
        token_log_probs: `[..., K, T]` log p(y_t | c∘x, y_<t) in nats; or `[..., T]`, given no
            document.
        token_mask: `[..., T]` bool, True = a target token; all, if not given. It has an axis less
            than log-probs `[..., K, T]`.

    Returns:
        `[..., K]` (or `[...]`) in nats, float32. A target with no token has log-prob 0.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        1 at each kept token, 0 at each masked one, whatever it holds.

    References:
        Lewis et al., Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks, 2020,
        section 2.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from ragjax import losses
        >>> log_probs = jnp.array([[[-1.0, -2.0, -9.0]]])
        >>> mask = jnp.array([[True, True, False]])
        >>> print(losses.sequence_log_probs(log_probs, token_mask=mask))
        [[-3.]]
    """
    axes = Axes()
    # Only a mask has to be told which axis is that of the documents.
    per_doc = token_mask is not None and jnp.ndim(token_mask) < jnp.ndim(token_log_probs)
    log_probs = axes.floats("token_log_probs", token_log_probs, "...KT" if per_doc else "...T")
    keep = axes.mask("token_mask", token_mask, "...T")
    return jnp.sum(jnp.where(keep[..., None, :] if per_doc else keep, log_probs, 0.0), axis=-1)


def lm_loss(
    token_log_probs: ArrayLike,
    *,
    doc_mask: ArrayLike | None = None,
    token_mask: ArrayLike | None = None,
) -> Array:
    r"""Computes the language model's half of dual training (RA-DIT LM-ft).

    .. math::
        L = -\sum_c \sum_t \log p_{LM}(y_t|c \circ x, y_{<t})

    loss = −Σ_j Σ_t log p_LM(y_t | c_j∘x, y_<t): every document separately, without p_R weights, so
    the model learns to use a good document and to ignore a bad one.

    Args:
        token_log_probs: `[..., K, T]` log-probs of the target tokens in nats; targets only, no
            prompt tokens.
        doc_mask: `[..., K]` bool, True = a document; all, if not given.
        token_mask: `[..., T]` bool, True = a target token; all, if not given.

    Returns:
        `[...]` in nats, float32: summed over documents and tokens. 0 without a document.

    Raises:
        ValueError: Wrong rank, shape or dtype.

    Gradients:
        −1 to every kept token log-prob, 0 to the others.

    References:
        Lin et al., RA-DIT: Retrieval-Augmented Dual Instruction Tuning, 2024, section 2.3.

    Example:
        >>> import jax.numpy as jnp
        >>> from ragjax import losses
        >>> log_probs = jnp.array([[[-1.0, -2.0], [-3.0, -4.0]]])
        >>> print(losses.lm_loss(log_probs))
        [10.]
    """
    axes = Axes()
    log_probs = axes.floats("token_log_probs", token_log_probs, "...KT")
    doc_mask = axes.mask("doc_mask", doc_mask, "...K")
    token_mask = axes.mask("token_mask", token_mask, "...T")
    keep = doc_mask[..., None] & token_mask[..., None, :]  # [..., K, T]
    return -jnp.sum(jnp.where(keep, log_probs, 0.0), axis=(-2, -1))
