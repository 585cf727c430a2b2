"""The LM half of dual training: fine-tune the language model on each retrieved document."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ragjax.losses import lm_loss
from ragjax.training.steps import LossFn, Metrics


class WeightedRows(NamedTuple):
    """Rows whose target tokens weigh differently, such as those of a question and of its answer."""

    rows: Any  # what `token_log_probs` takes, with a `target_mask` [R, T]
    weights: jax.Array  # [R, T] float32, at least 0; 0: the token has no part in the loss


def make_lm_loss(
    token_log_probs: Callable[[Any, Any], jax.Array],
    merge: Callable[[Any, Any], Any] | None = None,
) -> LossFn:
    """Builds the loss −Σ_i Σ_j log p_LM(y_i | c_ij ∘ x_i) / (number of answer tokens in the batch).

    Where each row of the batch is one (question, document) pair, documents are seen separately and
    carry no retriever weight. Dividing by the batch's answer tokens changes the step's length only,
    and makes the loss nats per token. Of `WeightedRows` it is the weighted mean over the tokens:
    with weight 1 on those of y and λ on those of x, −Σ (log p(y|c∘x) + λ log p(x|c)) over the
    weights.

    Args:
        token_log_probs: `(params, LMBatch) -> [R, T]`.
        merge: `(trainable, frozen) -> params`; None if all parameters are trained.

    Returns:
        `(params, frozen, batch, key) -> (loss [], metrics)` for `make_train_step`, with an
        `LMBatch` or `WeightedRows` as batch. Rows whose target mask is all False count nothing; a
        row with a target of probability 0 counts 0, and `impossible_answers` says how many there
        were.

    Gradients:
        To the trainable parameters, through the answer tokens only.

    References:
        Lin et al., RA-DIT: Retrieval-Augmented Dual Instruction Tuning, 2023, section 2.3.
        Sachan et al., Improving Passage Retrieval with Zero-Shot Question Generation, 2022,
        section 2.2 (log p(x|c)).
    """

    def loss(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del key  # dropout is off: the model that is scored is the model that is trained
        full = merge(params, frozen) if merge else params
        rows, weights = _parts(batch)
        counted = rows.target_mask & weights.astype(bool)  # [R, T]
        log_probs = token_log_probs(full, rows)
        weighted = jnp.where(counted, log_probs * weights.astype(log_probs.dtype), 0.0)
        per_row = lm_loss(weighted[:, None, :], token_mask=counted)  # [R]
        total = answer_tokens(batch).astype(per_row.dtype)
        lost = per_row == jnp.inf
        nll = jnp.where(lost, 0.0, per_row).sum() / jnp.where(total > 0, total, 1.0)
        return nll, {
            "answer_tokens": jnp.maximum(1, counted.sum()),
            "impossible_answers": lost.sum(),
        }

    return loss


def answer_tokens(batch: Any) -> jax.Array:
    """Returns what the loss of `make_lm_loss` is a mean over, for `make_train_step`.

    Args:
        batch: Rows.

    Returns:
        `[]`: how many target tokens, int32; of `WeightedRows` their weights, float32.
    """
    rows, weights = _parts(batch)
    return jnp.where(rows.target_mask, weights, jnp.zeros((), weights.dtype)).sum()


def _parts(batch: Any) -> tuple[Any, jax.Array]:
    if isinstance(batch, WeightedRows):
        return batch.rows, batch.weights
    return batch, batch.target_mask
