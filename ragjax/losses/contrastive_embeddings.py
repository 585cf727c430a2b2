"""Contrastive losses over embeddings: in-batch, hard and cross-device negatives; chunked encoding.

Letters: `B` queries of one batch, `H` documents given per query (the gold one first), `D`
embedding size. Leading axes `...` are batches of their own: the documents of one are no negatives
of another.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from ragjax.losses._common import Axes, alike, positive_scalar
from ragjax.losses.contrastive import info_nce_loss


def dpr_loss(
    query_embeddings: ArrayLike,
    doc_embeddings: ArrayLike,
    *,
    temperature: float | Array = 1.0,
    doc_ids: ArrayLike | None = None,
    doc_mask: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> Array:
    r"""Computes the DPR loss: each query's gold document against every document of the batch.

    .. math::
        L_i = -\log \frac{\exp(q_i \cdot d_{i0} / \tau)}{\sum_{j,h} \exp(q_i \cdot d_{jh} / \tau)}

    Args:
        query_embeddings: `[..., B, D]`, normalised by the caller if cosines are wanted.
        doc_embeddings: `[..., B, H, D]`: the gold document of each query, then its hard negatives.
        temperature: Scalar τ > 0; 1 for DPR's dot products, 0.05 is usual for cosines.
        doc_ids: `[..., B, H]` integer; a document with the id of the query's gold one is no
            negative.
        doc_mask: `[..., B, H]` bool, True = a document; a query whose gold document is False has
            loss 0.
        axis_name: Mapped axis (or axes) over which the batch is split; every device's documents
            become candidates.

    Returns:
        `[..., B]` in nats, float32: this device's queries.

    Raises:
        ValueError: Wrong rank, shape or dtype, or a temperature that is not a positive scalar.

    Gradients:
        Through both embeddings, also of other devices' documents; whether the gradient still needs
        a `pmean` depends on the transform: see the documentation's page on transforms.

    References:
        Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering, 2020,
        section 3.2.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> queries, docs = jnp.eye(2), jnp.eye(2)[:, None]
        >>> print(np.asarray(losses.dpr_loss(queries, docs, temperature=0.1)).round(4))
        [0. 0.]
    """
    axes = Axes()
    queries, docs = alike(
        axes.floats("query_embeddings", query_embeddings, "...BD"),
        axes.floats("doc_embeddings", doc_embeddings, "...BHD"),
    )
    ids = None if doc_ids is None else axes.integers("doc_ids", doc_ids, "...BH")
    keep = axes.mask("doc_mask", doc_mask, "...BH")
    temperature = positive_scalar("temperature", temperature, queries.dtype)
    *leading, batch, per_query, _ = docs.shape
    has_gold = keep[..., :1]  # [..., B, 1]
    # NaN · 0 is NaN in the other embeddings' gradient: what is masked must not enter the product.
    queries = jnp.where(has_gold, queries, 0.0)
    docs = jnp.where(keep[..., None], docs, 0.0)

    def of_whole_batch(array: Array) -> Array:
        """Turns `[..., B, H, ...]` into `[..., M, ...]`, with the other devices' documents."""
        flat = array.reshape(*leading, batch * per_query, *array.shape[len(leading) + 2 :])
        if axis_name is None:
            return flat
        return lax.all_gather(flat, axis_name, axis=len(leading), tiled=True)

    highest = lax.Precision.HIGHEST
    scores = jnp.einsum("...bd,...md->...bm", queries, of_whole_batch(docs), precision=highest)
    candidates = of_whole_batch(keep)[..., None, :] & has_gold
    if ids is not None:
        candidates &= of_whole_batch(ids)[..., None, :] != ids[..., :1]
    first = 0 if axis_name is None else lax.axis_index(axis_name) * batch * per_query
    positives = jnp.broadcast_to(
        first + per_query * jnp.arange(batch, dtype=jnp.int32), (*leading, batch)
    )
    # `info_nce_loss` keeps the gold column of a row that has any candidate; this row may have lost
    # all others (one query, no negatives), and is still a query with loss 0.
    return info_nce_loss(scores / temperature, positives, mask=candidates)


def symmetric_contrastive_loss(
    query_embeddings: ArrayLike,
    doc_embeddings: ArrayLike,
    *,
    temperature: float | Array = 1.0,
    doc_ids: ArrayLike | None = None,
    doc_mask: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> Array:
    r"""Computes the mean of the query→document and the document→query contrastive losses.

    .. math::
        L_i = \tfrac12 \big( -\log\operatorname{softmax}_j(q_i \cdot d_j / \tau)_i
                             -\log\operatorname{softmax}_j(d_i \cdot q_j / \tau)_i \big)

    Args:
        query_embeddings: `[..., B, D]`.
        doc_embeddings: `[..., B, D]`, the gold document of each query.
        temperature: Scalar τ > 0.
        doc_ids: `[..., B]` integer; pairs with the same document are no negatives of one another.
        doc_mask: `[..., B]` bool, True = a pair.
        axis_name: Mapped axis over which the batch is split; see `dpr_loss`.

    Returns:
        `[..., B]` in nats, float32.

    Raises:
        ValueError: Wrong rank, shape or dtype, or a temperature that is not a positive scalar.

    Gradients:
        Through both embeddings; see `dpr_loss`.

    References:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
        2021, section 2.3.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from ragjax import losses
        >>> print(np.asarray(losses.symmetric_contrastive_loss(jnp.eye(2), jnp.eye(2))).round(4))
        [0.3133 0.3133]
    """
    axes = Axes()
    queries = axes.floats("query_embeddings", query_embeddings, "...BD")
    docs = axes.floats("doc_embeddings", doc_embeddings, "...BD")
    ids = None if doc_ids is None else axes.integers("doc_ids", doc_ids, "...B")[..., None]
    keep = axes.mask("doc_mask", doc_mask, "...B")[..., None]

    def one_way(anchors: Array, others: Array) -> Array:
        return dpr_loss(
            anchors,
            others[..., None, :],
            temperature=temperature,
            doc_ids=ids,
            doc_mask=keep,
            axis_name=axis_name,
        )

    return (one_way(queries, docs) + one_way(docs, queries)) / 2


def encode_in_chunks(
    encode: Callable[[Any, Any], Array], params: Any, inputs: Any, *, chunk_size: int
) -> Array:
    """Encodes a batch chunk by chunk and again in the backward pass: gradient caching.

    What follows sees all embeddings at once, so a contrastive loss over them is that of the whole
    batch, while the activations of one chunk only are in memory. Dropout: put one key per row into
    `inputs`; a chunk is then encoded again with the very same keys.

    Args:
        encode: `(params, rows of inputs) -> [rows, D]`; a row may not depend on the others.
        params: Its parameters, any tree.
        inputs: Tree of arrays whose first axis has the batch's size B.
        chunk_size: Rows encoded at a time, at least 1; need not divide B.

    Returns:
        `[B, D]`, as `encode(params, inputs)`.

    Raises:
        ValueError: `chunk_size` below 1, or inputs without a common first axis.

    Gradients:
        Those of `encode`, to params and inputs.

    References:
        Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021,
        section 3.

    Example:
        >>> import jax.numpy as jnp
        >>> from ragjax import losses
        >>> rows = jnp.arange(10.0).reshape(5, 2)
        >>> encode = lambda weights, x: x @ weights
        >>> print(losses.encode_in_chunks(encode, jnp.ones((2, 1)), rows, chunk_size=2)[:, 0])
        [ 1.  5.  9. 13. 17.]
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise ValueError(f"inputs: expected arrays with one common first axis, got shapes {shapes}")
    rows = shapes[0][0]
    if rows <= chunk_size:
        return encode(params, inputs)
    again = jax.checkpoint(lambda part: encode(params, part))
    whole = rows // chunk_size * chunk_size

    def split(leaf: Array) -> Array:
        return leaf[:whole].reshape(-1, chunk_size, *leaf.shape[1:])

    encoded = lax.map(again, jax.tree.map(split, inputs))
    encoded = encoded.reshape(whole, *encoded.shape[2:])
    if whole == rows:
        return encoded
    rest = again(jax.tree.map(lambda leaf: leaf[whole:], inputs))
    return jnp.concatenate([encoded, rest])
