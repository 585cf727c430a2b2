"""The LM half of dual training: fine-tune the language model on each retrieved document."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ragjax.losses import lm_loss
from ragjax.models.inputs import LMBatch
from ragjax.training.steps import LossFn, Metrics


def make_lm_loss(
    token_log_probs: Callable[[Any, LMBatch], jax.Array],
    merge: Callable[[Any, Any], Any] | None = None,
) -> LossFn:
    """Builds the loss −Σ_i Σ_j log p_LM(y_i | c_ij ∘ x_i) / (number of answer tokens in the batch).

    Each row of the batch is one (question, document) pair: documents are seen separately and carry
    no retriever weight. Dividing by the batch's answer tokens changes the step's length only, and
    makes the loss nats per token.

    Args:
        token_log_probs: `(params, LMBatch) -> [R, T]`.
        merge: `(trainable, frozen) -> params`; None if all parameters are trained.

    Returns:
        `(params, frozen, batch, key) -> (loss [], metrics)` for `make_train_step`, with an
        `LMBatch` as batch. Rows whose target mask is all False count nothing; a row whose answer
        has probability 0 counts 0, and `impossible_answers` says how many there were.

    Gradients:
        To the trainable parameters, through the answer tokens only.

    References:
        Lin et al., RA-DIT: Retrieval-Augmented Dual Instruction Tuning, 2023, section 2.3.
    """

    def loss(params: Any, frozen: Any, batch: LMBatch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del key  # dropout is off: the model that is scored is the model that is trained
        full = merge(params, frozen) if merge else params
        log_probs = token_log_probs(full, batch)[:, None, :]  # [R, 1, T]
        per_row = lm_loss(log_probs, token_mask=batch.target_mask)  # [R]
        tokens = jnp.maximum(1, batch.target_mask.sum())
        lost = per_row == jnp.inf
        nll = jnp.where(lost, 0.0, per_row).sum() / tokens.astype(per_row.dtype)
        return nll, {"answer_tokens": tokens, "impossible_answers": lost.sum()}

    return loss


def answer_tokens(batch: LMBatch) -> jax.Array:
    """Returns how many tokens the loss of `make_lm_loss` is a mean over, for `make_train_step`.

    Args:
        batch: Rows.

    Returns:
        `[]` int32.
    """
    return batch.target_mask.sum()
