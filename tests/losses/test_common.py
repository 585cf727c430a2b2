"""Wrong arguments, of every loss: the error names the argument, what came and what was expected."""

import jax
import numpy as np
import pytest

from ragjax import losses

SCORES, LOG_PROBS, TOKENS = np.zeros((2, 3)), np.zeros((2, 3, 4)), np.zeros((2, 4))
LENGTHS = np.array([4, 2])
Q, D3, KEY = np.zeros((2, 5)), np.zeros((2, 3, 5)), jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.rag_sequence_loss(3.0, LOG_PROBS),
            r"doc_scores: .*\[\.\.\., K\].*\[\]$",
        ),
        (
            lambda: losses.rag_sequence_loss(np.zeros(3), LOG_PROBS),
            r"log_probs: .*\[\.\.\.=\[\] \(as doc_scores\), K=3 .*, T\].*\[2, 3, 4\]",
        ),
        (
            lambda: losses.rag_sequence_loss(SCORES, LOG_PROBS, doc_mask=np.ones(3, bool)),
            r"doc_mask: .*\[\.\.\.=\[2\] \(as doc_scores\), K=3 \(as doc_scores\)\].*\[3\]",
        ),
        (
            lambda: losses.rag_token_loss(SCORES.astype(int), LOG_PROBS),
            r"doc_scores: expected a floating-point array of .*\[\.\.\., K\], got int\d+\[2, 3\]",
        ),
        (
            lambda: losses.rag_token_loss(SCORES, np.zeros((2, 5, 4))),
            r"log_probs: .*\[\.\.\.=\[2\] \(as doc_scores\), K=3 \(as .*\), T\].*\[2, 5, 4\]",
        ),
        (
            lambda: losses.document_posterior(SCORES, LOG_PROBS, doc_mask=np.ones((2, 3))),
            r"doc_mask: expected a bool \(True = keep\) array .*, got float32\[2, 3\]",
        ),
        (
            lambda: losses.rag_token_loss(SCORES, LOG_PROBS, token_mask=np.ones((2, 5), bool)),
            r"token_mask: .*T=4 \(as log_probs\).*bool\[2, 5\]",
        ),
        (lambda: losses.lm_loss(TOKENS[0]), r"token_log_probs: .*\[\.\.\., K, T\].*\[4\]"),
        (lambda: losses.sequence_log_probs(0.0), r"token_log_probs: .*\[\.\.\., T\].*\[\]$"),
        (
            lambda: losses.sequence_log_probs(LOG_PROBS, token_mask=np.ones(4, bool)),
            r"token_mask: .*\[\.\.\.=\[2\] \(as token_log_probs\), T=4.*\[4\]$",
        ),
        (lambda: losses.lsr_loss(SCORES, np.zeros((2, 4))), r"target_log_probs: .*K=3.*\[2, 4\]"),
        (lambda: losses.pdist_loss(SCORES, SCORES > 0), r"target_log_probs: .*got bool\[2, 3\]"),
        (
            lambda: losses.lsr_target(LOG_PROBS, temperature=1.0, doc_mask=SCORES == 0),
            r"doc_mask: .*\[\.\.\.=\[2, 3\] \(as scores\), K=4 \(as scores\)\].*\[2, 3\]",
        ),
        (lambda: losses.lsr_target(SCORES, temperature=0.0), "temperature: .*above 0, got 0.0"),
        (lambda: losses.lsr_target(SCORES, temperature=-1), "temperature: .*above 0, got -1"),
        (lambda: losses.lsr_target(SCORES, temperature=np.nan), "temperature: .*got nan"),
        (lambda: losses.lsr_target(SCORES, temperature=np.ones(2)), "temperature: .*scalar"),
        (
            lambda: losses.prob(LOG_PROBS, LENGTHS),
            r"lengths: expected an integer .*\[\.\.\.=\[2, 3\] \(as sequence_log_probs\)\], got",
        ),
        (lambda: losses.log_prob_per_token(SCORES, LENGTHS * 1.0), "lengths: .*integer.*float32"),
        (
            lambda: losses.info_nce_loss(TOKENS, TOKENS),
            r"positives: .*\[\.\.\.=\[2\] \(as scores\)\]",
        ),
        (lambda: losses.info_nce_loss(TOKENS[0], 4), r"positives: .*0 … 3 .*, got 4$"),
        (lambda: losses.posterior_entropy(SCORES, SCORES[:1]), r"token_log_probs: .*\[1, 3\]$"),
        (
            lambda: losses.info_nce_loss(TOKENS, np.array([0, 4])),
            r"positives: expected columns in 0 … 3 \(scores has M=4\), got \[0, 4\]",
        ),
        (lambda: losses.info_nce_loss(TOKENS, np.array([-1, 0])), r"positives: .*got \[-1, 0\]"),
        (
            lambda: losses.retrieval_utility(SCORES, LOG_PROBS, np.zeros((2, 5))),
            r"no_doc_token_log_probs: .*T=4 \(as token_log_probs\).*\[2, 5\]",
        ),
        (lambda: losses.token_log_probs(np.zeros(5), 3), r"logits: .*\[\.\.\., T, V\].*\[5\]"),
        (
            lambda: losses.token_log_probs(LOG_PROBS, np.zeros((2, 4), int)),
            r"targets: .*\[\.\.\.=\[2\] \(as logits\), T=3 \(as logits\)\].*\[2, 4\]",
        ),
        (lambda: losses.token_log_probs(LOG_PROBS, SCORES), "targets: .*integer.*float32"),
        (
            lambda: losses.token_log_probs(LOG_PROBS.astype(int), LENGTHS),
            "logits: .*floating-point.*got int",
        ),
        (lambda: losses.dpr_loss(Q, Q), r"doc_embeddings: .*, B=2.*H, D=5.*\].*\[2, 5\]"),
        (
            lambda: losses.dpr_loss(Q, D3[None]),
            r"doc_embeddings: .*\[\.\.\.=\[\] \(as query_embeddings\), B=2 .*\[1, 2, 3, 5\]",
        ),
        (lambda: losses.dpr_loss(Q, D3, temperature=0.0), "temperature: .*above 0, got 0"),
        (lambda: losses.dpr_loss(Q, D3, doc_ids=np.zeros((2, 3))), "doc_ids: .*integer.*float"),
        (lambda: losses.dpr_loss(Q, D3, doc_mask=np.ones((2, 3))), "doc_mask: .*bool.*float"),
        (lambda: losses.symmetric_contrastive_loss(Q, D3), r"doc_embeddings: .*\[2, 3, 5\]"),
        (
            lambda: losses.gumbel_top_k(Q, KEY, num_samples=6),
            "num_samples: expected 1 … K=5, got 6",
        ),
        (lambda: losses.gumbel_top_k(Q, KEY, num_samples=0), "num_samples: .*got 0"),
        (
            lambda: losses.gumbel_top_k(Q, KEY, num_samples=1, temperature=-1.0),
            "temperature: .*got -1",
        ),
        (
            lambda: losses.stochastic_rag_loss(Q, Q[:1], KEY, num_samples=1),
            r"utilities: .*\.\.\.=\[2\]",
        ),
        (
            lambda: losses.reinforce_loss(Q, np.zeros((2, 1), int), np.zeros((2, 1))),
            "samples: expected at least 2 draws",
        ),
        (lambda: losses.reinforce_loss(Q, Q, Q), "samples: .*integer"),
        (
            lambda: losses.reinforce_loss(Q, np.array([[0, 5], [0, 1]]), np.zeros((2, 2))),
            r"samples: expected columns in 0 … 4 \(doc_scores has K=5\), got \[\[0, 5\]",
        ),
        (
            lambda: losses.reinforce_loss(Q, np.array([[0, -1], [0, 1]]), np.zeros((2, 2))),
            "samples: expected columns",
        ),
        (lambda: losses.combine_losses({}, {}), "weights: expected one for each of"),
        (lambda: losses.combine_losses({"a": Q[:, 0]}, {"b": 1.0}), r"weights: .*\['a'\].*\['b'\]"),
        (
            lambda: losses.combine_losses({"a": Q, "b": Q[0]}, {"a": 1.0, "b": 1.0}),
            r"b: .*\[\.\.\.=\[2, 5\] \(as a\)\].*\[5\]",
        ),
        (lambda: losses.combine_losses({"a": Q[:, 0]}, {"a": Q}), r"weights\['a'\]: .*scalar"),
        (lambda: losses.loop_target(1.0, temperature=1.0), "leave_one_out_log_probs: "),
        (lambda: losses.loop_target(Q, temperature=np.inf), "temperature: .*got inf"),
        (
            lambda: losses.attention_mass(D3, D3),
            r"attention: .*\[\.\.\., A, T, K, L\].*\[2, 3, 5\]",
        ),
        (lambda: losses.emdr2_loss(Q, D3), "log_probs: .*K=5"),
        (lambda: losses.leave_one_out_log_probs(Q, D3), "log_probs: .*K=5"),
    ],
)
def test_bad_input_is_named_with_what_came_and_what_was_expected(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
