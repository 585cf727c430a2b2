"""Losses that join a retriever and a language model: pure functions of arrays.

One contract for all of them:

- Arrays in, one float32 value in nats per query `[...]` out, unreduced: the caller takes the mean.
- Letters: `K` retrieved documents per query, `T` target tokens, `V` vocabulary, `M` candidates;
  axis order `[..., K, T]`. `...` are the axes of the queries, the same in every argument of a call:
  a batch, a batch of sequences, or none for a single query, so that `jax.vmap` works as well.
- Masks are bool, True = keep. What a masked slot holds, NaN included, changes neither value nor
  gradient. A query with no document has loss 0 and gradient 0.
- Computed in float32 whatever the inputs' dtype (float64 stays float64).
- They hold no state: jit, vmap, pmap, shard_map and sharded jit all work. The contrastive
  losses over embeddings, whose negatives are the other queries of a batch `[..., B]`, look across
  devices where an `axis_name` is given.
"""

from ragjax.losses.chunked import chunked_token_log_probs as chunked_token_log_probs
from ragjax.losses.combine import CombinedLoss as CombinedLoss
from ragjax.losses.combine import combine_losses as combine_losses
from ragjax.losses.contrastive import info_nce_loss as info_nce_loss
from ragjax.losses.contrastive_embeddings import dpr_loss as dpr_loss
from ragjax.losses.contrastive_embeddings import encode_in_chunks as encode_in_chunks
from ragjax.losses.contrastive_embeddings import (
    symmetric_contrastive_loss as symmetric_contrastive_loss,
)
from ragjax.losses.diagnostics import Degeneracy as Degeneracy
from ragjax.losses.diagnostics import Entropy as Entropy
from ragjax.losses.diagnostics import agreement as agreement
from ragjax.losses.diagnostics import kl_divergence as kl_divergence
from ragjax.losses.diagnostics import posterior_entropy as posterior_entropy
from ragjax.losses.diagnostics import retrieval_utility as retrieval_utility
from ragjax.losses.diagnostics import retriever_entropy as retriever_entropy
from ragjax.losses.diagnostics import target_degeneracy as target_degeneracy
from ragjax.losses.diagnostics import target_entropy as target_entropy
from ragjax.losses.distillation import attention_mass as attention_mass
from ragjax.losses.distillation import loop_target as loop_target
from ragjax.losses.distillation import lsr_loss as lsr_loss
from ragjax.losses.distillation import lsr_target as lsr_target
from ragjax.losses.distillation import pdist_loss as pdist_loss
from ragjax.losses.estimators import SampledDocs as SampledDocs
from ragjax.losses.estimators import gumbel_top_k as gumbel_top_k
from ragjax.losses.estimators import reinforce_loss as reinforce_loss
from ragjax.losses.estimators import stochastic_rag_loss as stochastic_rag_loss
from ragjax.losses.language_modeling import lm_loss as lm_loss
from ragjax.losses.language_modeling import sequence_log_probs as sequence_log_probs
from ragjax.losses.language_modeling import token_log_probs as token_log_probs
from ragjax.losses.marginal import document_posterior as document_posterior
from ragjax.losses.marginal import emdr2_loss as emdr2_loss
from ragjax.losses.marginal import leave_one_out_log_probs as leave_one_out_log_probs
from ragjax.losses.marginal import rag_sequence_loss as rag_sequence_loss
from ragjax.losses.marginal import rag_token_loss as rag_token_loss
from ragjax.losses.scores import log_prob as log_prob
from ragjax.losses.scores import log_prob_per_token as log_prob_per_token
from ragjax.losses.scores import prob as prob
from ragjax.losses.scores import prob_per_token as prob_per_token
from ragjax.losses.scores import rerank_log_probs as rerank_log_probs
