"""The end-to-end loss against float64 NumPy, its gradients, and where questions meet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.special import log_softmax, logsumexp

from ragjax import losses
from ragjax.losses import log_prob_per_token
from ragjax.models.inputs import Tokens
from ragjax.models.seq2seq.fusion import FusionBatch
from ragjax.training import end_to_end as e2e
from ragjax.training.end_to_end import NO_SLOT, NULL_DOC, LMReader, Outputs, RagBatch, make_rag_loss
from ragjax.training.mesh import ROWS
from ragjax.training.steps import init_state, make_train_step

pytestmark = pytest.mark.slow

SCALE = 3.0
VOCABULARY = 11


def encode(params, tokens):
    """Embeds a text as the mean of its tokens' rows."""
    mask = tokens.mask[..., None].astype(jnp.float32)
    return (params["table"][tokens.ids] * mask).sum(1) / jnp.maximum(1, mask.sum(1))


def token_log_probs(params, batch):
    """Predicts each target token from the sum of the context's rows and the token before."""
    mask = batch.context_mask[..., None].astype(jnp.float32)
    state = (params["table"][batch.context_ids] * mask).sum(1)  # [R, D]
    before = jnp.pad(batch.target_ids, ((0, 0), (1, 0)))[:, :-1]
    hidden = state[:, None, :] + params["table"][before]
    log_probs = jax.nn.log_softmax(hidden @ params["out"], axis=-1)
    chosen = jnp.take_along_axis(log_probs, batch.target_ids[..., None], axis=-1)[..., 0]
    return jnp.where(batch.target_mask, chosen, 0.0)


READER = LMReader(e2e.separate_reader(token_log_probs))


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    table = functools.partial(rng.normal, size=(VOCABULARY, 4))
    params = {
        "query": {"table": table()},
        "doc": {"table": table()},
        "lm": {"table": 0.5 * table(), "out": rng.normal(size=(4, VOCABULARY))},
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


FROZEN = {"lm": None, "towers": {}}


def make_batch(questions=3, documents=3, seed=1, *, corpus=None, slots=None):
    """A batch of distinct documents, all of them there."""
    rng = np.random.default_rng(seed)
    slots = slots or documents
    ids = np.arange(questions * slots, dtype=np.int32).reshape(questions, slots)
    if corpus is None:
        corpus = rng.integers(1, VOCABULARY, size=(ids.max() + 1, 5)).astype(np.int32)

    def ints(*shape):
        return jnp.asarray(rng.integers(1, VOCABULARY, size=shape), jnp.int32)

    target_mask = np.ones((questions, 4), bool)
    target_mask[0, 2:] = False
    return RagBatch(
        queries=Tokens(ints(questions, 3), jnp.ones((questions, 3), bool)),
        docs=Tokens(jnp.asarray(corpus[ids]), jnp.ones((questions, slots, 5), bool)),
        doc_ids=jnp.asarray(ids),
        doc_mask=jnp.ones((questions, documents), bool),
        context_ids=ints(questions, documents, 6),
        context_mask=jnp.ones((questions, documents, 6), bool),
        target_ids=ints(questions, 4),
        target_mask=jnp.asarray(target_mask),
    )


def reference(params, batch):
    """Scores `[B, M]` and log-probs `[B, K, T]` in float64, by loops."""
    table = {name: np.asarray(params[name]["table"], np.float64) for name in params}
    queries = table["query"][np.asarray(batch.queries.ids)].mean(1)
    docs = table["doc"][np.asarray(batch.docs.ids)].mean(2)  # [B, S, D]
    scores = SCALE * queries @ docs.reshape(-1, docs.shape[-1]).T
    questions, documents = batch.doc_mask.shape
    log_probs = np.zeros((questions, documents, batch.target_ids.shape[1]))
    out = np.asarray(params["lm"]["out"], np.float64)
    for b in range(questions):
        for k in range(documents):
            state = table["lm"][np.asarray(batch.context_ids[b, k])].sum(0)
            previous = 0
            for t, token in enumerate(np.asarray(batch.target_ids[b])):
                if batch.target_mask[b, t]:
                    log_probs[b, k, t] = log_softmax((state + table["lm"][previous]) @ out)[token]
                previous = token
    return scores, log_probs


def own(scores, batch):
    """The columns of each question's own candidates, `[B, K]`."""
    questions, slots = batch.doc_ids.shape
    blocks = scores.reshape(questions, questions, slots)
    return blocks[np.arange(questions), np.arange(questions)][:, : batch.doc_mask.shape[1]]


def loss_of(terms, *, reader=READER, **kwargs):
    return make_rag_loss(encode, reader, terms, scale=SCALE, **kwargs)


def value(term, batch, params=None, **kwargs):
    params = params or make_params()
    return loss_of({"only": (1.0, term)}, **kwargs)(params, FROZEN, batch, None)


def test_the_sequence_term_is_the_marginal_over_whole_answers():
    params, batch = make_params(), make_batch()
    scores, log_probs = reference(params, batch)
    prior = log_softmax(own(scores, batch), axis=1)
    expected = -logsumexp(prior + log_probs.sum(2), axis=1).mean()
    loss, metrics = value(e2e.sequence_term, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    lengths = np.asarray(batch.target_mask).sum(1)
    per_token = (-logsumexp(prior + log_probs.sum(2), axis=1) / lengths).mean()
    np.testing.assert_allclose(metrics["marginal_nll"], per_token, rtol=1e-5)


def test_the_token_and_emdr2_terms_are_the_marginal_of_each_token():
    params, batch = make_params(), make_batch()
    scores, log_probs = reference(params, batch)
    prior = log_softmax(own(scores, batch), axis=1)[:, :, None]
    each = logsumexp(prior + log_probs, axis=1) * np.asarray(batch.target_mask)
    for term in (e2e.token_term, e2e.emdr2_term):
        np.testing.assert_allclose(value(term, batch)[0], -each.sum(1).mean(), rtol=1e-5)


def test_the_lm_term_is_the_mean_over_the_documents():
    batch = make_batch()
    batch = batch._replace(doc_mask=batch.doc_mask.at[1, 2].set(False))
    _, log_probs = reference(make_params(), batch)
    sums = -log_probs.sum(2)
    expected = np.mean([sums[0].mean(), sums[1, :2].mean(), sums[2].mean()])
    np.testing.assert_allclose(value(e2e.lm_term, batch)[0], expected, rtol=1e-5)


def test_the_lsr_term_is_the_divergence_from_the_language_models_view():
    params, batch = make_params(), make_batch()
    scores, log_probs = reference(params, batch)
    lengths = np.asarray(batch.target_mask).sum(1, keepdims=True)
    target = log_softmax(log_probs.sum(2) / lengths / 0.3, axis=1)
    live = log_softmax(own(scores, batch), axis=1)
    expected = (np.exp(target) * (target - live)).sum(1).mean()
    term = e2e.make_lsr_term(log_prob_per_token, 0.3)
    np.testing.assert_allclose(value(term, batch)[0], expected, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_the_other_direction_is_the_divergence_from_the_retriever(temperature):
    params, batch = make_params(), make_batch()
    scores, log_probs = reference(params, batch)
    lengths = np.asarray(batch.target_mask).sum(1)
    target = log_softmax(log_probs.sum(2) / lengths[:, None] / temperature, axis=1)
    live = log_softmax(own(scores, batch), axis=1)
    expected = (np.exp(live) * (live - target)).sum(1).mean()
    term = e2e.make_lsr_term(log_prob_per_token, temperature, losses.lsr_loss)
    np.testing.assert_allclose(value(term, batch)[0], expected, rtol=1e-4)


def loop_by_hand(scores, log_probs, lengths, temperature):
    """KL(q‖p_R) with q from the answer's likelihood without each document, `[B]`."""
    live, answers = log_softmax(scores, axis=1), log_probs.sum(2)
    without = np.zeros(live.shape)
    for left_out in range(live.shape[1]):
        others = [column for column in range(live.shape[1]) if column != left_out]
        prior = log_softmax(scores[:, others], axis=1)
        without[:, left_out] = logsumexp(prior + answers[:, others], axis=1) / lengths
    target = log_softmax(-without / temperature, axis=1)
    return (np.exp(target) * (target - live)).sum(1)


def test_the_leave_one_out_term_distils_what_the_answer_loses_without_a_document():
    params, batch = make_params(), make_batch()
    scores, log_probs = reference(params, batch)
    lengths = np.asarray(batch.target_mask).sum(1)
    expected = loop_by_hand(own(scores, batch), log_probs, lengths, 0.5).mean()
    term = e2e.make_leave_one_out_term(0.5)
    np.testing.assert_allclose(value(term, batch)[0], expected, rtol=1e-4)


def test_a_fusion_reader_reads_once_more_without_each_document():
    batch = make_batch()
    batch = batch._replace(doc_mask=batch.doc_mask.at[1, 1:].set(False))
    worth = jnp.asarray([3.0, 1.0, 0.5])  # of the documents to every answer, in nats

    def fused(params, batch):
        there = jnp.where(batch.context_mask.any(axis=2), worth, 0.0).sum(axis=1)
        there = jnp.where(batch.context_mask.any(axis=(1, 2)), there, jnp.nan)
        first = jnp.arange(batch.target_mask.shape[1]) == 0
        return jnp.where(first, there[:, None] - 9, 0.0)

    reader = LMReader(None, e2e.fusion_reader(fused), lambda params, batch: jnp.zeros((3, 3)))
    found = value(e2e.make_leave_one_out_term(0.5), batch, reader=reader)[0]
    scores, _ = reference(make_params(), batch)
    lengths = np.asarray(batch.target_mask).sum(1)
    live = log_softmax(own(scores, batch), axis=1)
    target = log_softmax(np.asarray(worth) / lengths[:, None] / 0.5, axis=1)
    each = (np.exp(target) * (target - live)).sum(1)
    each[1] = 0.0  # one document is all there is
    np.testing.assert_allclose(found, each.mean(), rtol=1e-4)


@pytest.mark.parametrize("make", [e2e.make_gumbel_term, e2e.make_reinforce_term])
def test_drawn_documents_give_the_gradient_of_the_expected_score(make):
    batch = make_batch()
    scores, log_probs = reference(make_params(), batch)
    live = jnp.asarray(own(scores, batch) / SCALE, jnp.float32)
    sums = jnp.asarray(log_probs, jnp.float32)
    lengths = np.asarray(batch.target_mask).sum(1)
    utility = log_probs.sum(2) / lengths[:, None]
    prior = np.exp(log_softmax(np.asarray(live, np.float64), axis=1))
    expected = -prior * (utility - (prior * utility).sum(1, keepdims=True))

    def loss(doc_scores, key):
        outputs = Outputs(batch, doc_scores, doc_scores, lambda: sums, None, None, None, key)
        return make(log_prob_per_token, 2)(outputs).sum()

    keys = jax.random.split(jax.random.key(0), 4000)
    found = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(live, keys)
    assert float(jnp.abs(found[0] - found[1]).max()) > 1e-3  # other draws, other gradients
    if make is e2e.make_reinforce_term:
        np.testing.assert_allclose(found.mean(0), expected, atol=0.05)
    else:  # biased, of the same sign
        cosine = (found.mean(0) * expected).sum() / (
            np.linalg.norm(found.mean(0)) * np.linalg.norm(expected)
        )
        assert cosine > 0.9


def test_marginal_and_negatives_are_the_marginal_over_the_whole_batch():
    params, batch = make_params(), make_batch()
    scores, log_probs = reference(params, batch)
    explained = np.full(scores.shape, -np.inf)
    for b in range(3):
        explained[b, 3 * b : 3 * b + 3] = log_probs[b].sum(1)
    expected = -logsumexp(log_softmax(scores, axis=1) + explained, axis=1).mean()
    terms = {"marginal": (1.0, e2e.sequence_term), "negatives": (1.0, e2e.negatives_term)}
    loss, metrics = loss_of(terms)(params, FROZEN, batch, None)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["marginal"] + metrics["negatives"], loss, rtol=1e-6)


@pytest.mark.parametrize("term", [e2e.token_term, e2e.emdr2_term])
def test_marginal_of_tokens_and_negatives_is_the_same_over_the_whole_batch(term):
    batch = make_batch()
    scores, log_probs = reference(make_params(), batch)
    explained = np.full((*scores.shape, log_probs.shape[2]), -np.inf)
    for b in range(3):
        explained[b, 3 * b : 3 * b + 3] = log_probs[b]
    each = logsumexp(log_softmax(scores, axis=1)[..., None] + explained, axis=1)
    expected = -(each * np.asarray(batch.target_mask)).sum(1).mean()
    terms = {"marginal": (1.0, term), "negatives": (1.0, e2e.token_negatives_term)}
    np.testing.assert_allclose(
        loss_of(terms)(make_params(), FROZEN, batch, None)[0], expected, rtol=1e-5
    )


def test_an_answer_that_no_document_makes_possible_costs_its_own_question_only():
    params, batch = make_params(), make_batch()

    def impossible(params, batch):
        log_probs = READER.log_probs(params, batch)
        return jnp.where(jnp.arange(3)[:, None, None] == 1, -jnp.inf, log_probs)

    def evaluate(reader, batch):
        terms = {
            name: (1.0, term)
            for name, term in {
                "marginal": e2e.sequence_term, "token": e2e.token_term, "lm": e2e.lm_term,
                "lsr": e2e.make_lsr_term(log_prob_per_token, 0.3),
            }.items()
        }  # fmt: skip
        loss = loss_of(terms, reader=reader)
        return jax.jit(jax.value_and_grad(lambda p: loss(p, FROZEN, batch, None), has_aux=True))(
            params
        )

    (loss, metrics), slopes = evaluate(LMReader(impossible), batch)
    without = batch._replace(doc_mask=batch.doc_mask.at[1].set(False))
    (expected, others), expected_slopes = evaluate(READER, without)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), slopes, expected_slopes)
    assert (metrics["impossible_answers"], others["impossible_answers"]) == (1, 0)
    assert all(np.isfinite(value) for value in metrics.values())


def test_what_an_encoder_and_a_reader_make_of_masked_slots_reaches_nothing():
    batch = make_batch()
    batch = batch._replace(
        doc_mask=batch.doc_mask.at[1, 2].set(False),
        docs=Tokens(batch.docs.ids, batch.docs.mask.at[1, 2].set(False)),
    )

    def sick_encode(params, tokens):
        empty = ~tokens.mask.any(axis=1, keepdims=True)
        return jnp.where(empty, jnp.nan, encode(params, tokens))

    def sick_reader(params, batch):
        kept = batch.doc_mask[:, :, None] & batch.target_mask[:, None, :]
        return jnp.where(kept, READER.log_probs(params, batch), jnp.nan)

    terms = {
        "marginal": (1.0, e2e.sequence_term), "negatives": (1.0, e2e.negatives_term),
        "lsr": (1.0, e2e.make_lsr_term(log_prob_per_token, 0.3)),
    }  # fmt: skip

    def evaluate(encode, reader):
        loss = make_rag_loss(encode, LMReader(reader), terms, scale=SCALE)
        return jax.jit(jax.value_and_grad(lambda p: loss(p, FROZEN, batch, None)[0]))(make_params())

    got, expected = evaluate(sick_encode, sick_reader), evaluate(encode, READER.log_probs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)


def test_a_document_of_two_questions_is_no_negative_and_counts_once():
    params, batch = make_params(), make_batch()
    # Question 1 retrieved document 0 of question 0 in place of its own first one.
    ids = batch.doc_ids.at[1, 0].set(0)
    docs = Tokens(batch.docs.ids.at[1, 0].set(batch.docs.ids[0, 0]), batch.docs.mask)
    batch = batch._replace(doc_ids=ids, docs=docs)
    scores, _ = reference(params, batch)
    total = {  # columns in the softmax of each question: its own, then distinct others
        0: [0, 1, 2, 4, 5, 6, 7, 8],  # column 3 is document 0 again
        1: [3, 4, 5, 1, 2, 6, 7, 8],  # column 0 is its own column 3
        2: [6, 7, 8, 0, 1, 2, 4, 5],
    }
    expected = [
        logsumexp(scores[b, columns]) - logsumexp(scores[b, 3 * b : 3 * b + 3])
        for b, columns in total.items()
    ]
    np.testing.assert_allclose(value(e2e.negatives_term, batch)[0], np.mean(expected), rtol=1e-5)


def test_a_document_that_belongs_to_a_question_is_no_negative_of_it():
    batch = make_batch()
    relevant = np.zeros((3, 9), bool)
    relevant[0, [0, 4, 5]] = True  # its own first candidate, and two that question 1 retrieved
    scores, _ = reference(make_params(), batch)
    total = {0: [0, 1, 2, 3, 6, 7, 8], 1: range(9), 2: range(9)}
    expected = [
        logsumexp(scores[b, list(columns)]) - logsumexp(scores[b, 3 * b : 3 * b + 3])
        for b, columns in total.items()
    ]
    batch = batch._replace(relevant=jnp.asarray(relevant))
    np.testing.assert_allclose(value(e2e.negatives_term, batch)[0], np.mean(expected), rtol=1e-5)


def test_the_contrastive_term_is_the_softmax_over_the_batch_without_other_relevant_ones():
    params = make_params()
    batch = make_batch(documents=3, slots=4)
    relevant = np.zeros((3, 12), bool)
    relevant[0, [3, 8]] = True  # its extra slot, and what question 2 retrieved first
    relevant[1, 5] = True
    batch = batch._replace(
        positive=jnp.asarray([3, 1, -1], jnp.int32),  # question 2 has no judged document
        relevant=jnp.asarray(relevant),
        doc_ids=batch.doc_ids.at[1, 3].set(NO_SLOT).at[2, 3].set(NO_SLOT),
    )
    scores, _ = reference(params, batch)
    there = [m for m in range(12) if m not in (7, 11)]
    expected = [
        logsumexp(scores[0, [m for m in there if m != 8]]) - scores[0, 3],
        logsumexp(scores[1, there]) - scores[1, 5],
        0.0,
    ]
    np.testing.assert_allclose(value(e2e.contrastive_term, batch)[0], np.mean(expected), rtol=1e-5)


def gradients(terms, batch, reader=READER):
    loss, key = loss_of(terms, reader=reader), jax.random.key(0)
    return jax.grad(lambda params: loss(params, FROZEN, batch, key)[0])(make_params())


def size(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("term", "query", "doc", "lm"),
    [
        (e2e.sequence_term, True, True, True),
        (e2e.token_term, True, True, True),
        (e2e.emdr2_term, True, True, False),
        (e2e.lm_term, False, False, True),
        (e2e.make_lsr_term(log_prob_per_token, 0.3), True, True, False),
        (e2e.make_lsr_term(log_prob_per_token, 0.3, losses.lsr_loss), True, True, False),
        (e2e.make_leave_one_out_term(0.3), True, True, False),
        (e2e.make_gumbel_term(log_prob_per_token, 2), True, True, True),
        (e2e.make_reinforce_term(log_prob_per_token, 4), True, True, False),
        (e2e.negatives_term, True, True, False),
    ],
)
def test_each_term_teaches_what_it_says(term, query, doc, lm):
    found = gradients({"only": (1.0, term)}, make_batch())
    assert {name: size(found[name]) > 1e-6 for name in found} == {
        "query": query, "doc": doc, "lm": lm,
    }  # fmt: skip


def test_the_gradient_to_the_scores_is_prior_minus_posterior():
    params, batch = make_params(), make_batch()
    scores, log_probs = reference(params, batch)
    live = own(scores, batch)
    posterior = np.exp(log_softmax(live + log_probs.sum(2), axis=1))
    prior = np.exp(log_softmax(live, axis=1))

    def of_scores(doc_scores):
        outputs = Outputs(
            batch, doc_scores, doc_scores, lambda: jnp.asarray(log_probs), *[None] * 4
        )
        return e2e.sequence_term(outputs).sum()

    found = jax.grad(of_scores)(jnp.asarray(live, jnp.float32))
    np.testing.assert_allclose(found, prior - posterior, atol=1e-5)


@pytest.mark.parametrize("garbage", [7, 10])
def test_what_a_masked_slot_holds_changes_nothing(garbage):
    terms = {
        "marginal": (1.0, e2e.sequence_term),
        "negatives": (1.0, e2e.negatives_term),
        "lm": (0.5, e2e.lm_term),
        "lsr": (0.5, e2e.make_lsr_term(log_prob_per_token, 0.3)),
    }
    clean = make_batch()
    clean = clean._replace(
        doc_mask=clean.doc_mask.at[1, 2].set(False),
        doc_ids=clean.doc_ids.at[1, 2].set(NO_SLOT),
    )
    dirty = clean._replace(
        docs=Tokens(clean.docs.ids.at[1, 2].set(garbage), clean.docs.mask),
        context_ids=clean.context_ids.at[1, 2].set(garbage),
        target_ids=clean.target_ids.at[0, 2:].set(garbage),
    )
    params = make_params()
    loss = jax.value_and_grad(lambda p, batch: loss_of(terms)(p, FROZEN, batch, None)[0])
    jax.tree.map(np.testing.assert_array_equal, loss(params, clean), loss(params, dirty))


def test_a_question_without_documents_counts_nothing_and_has_no_gradient():
    terms = {"marginal": (1.0, e2e.sequence_term), "negatives": (1.0, e2e.negatives_term)}
    batch = make_batch(questions=1)
    batch = batch._replace(
        doc_mask=jnp.zeros_like(batch.doc_mask), doc_ids=jnp.full_like(batch.doc_ids, NO_SLOT)
    )
    loss, metrics = loss_of(terms)(make_params(), FROZEN, batch, None)
    assert loss == 0 and all(np.isfinite(float(v)) for v in metrics.values())
    assert size(gradients(terms, batch)) == 0


def test_utility_is_what_the_documents_add_to_the_null_document():
    params, batch = make_params(), make_batch()
    batch = batch._replace(doc_ids=batch.doc_ids.at[:, 2].set(NULL_DOC))
    scores, log_probs = reference(params, batch)
    marginal = logsumexp(log_softmax(own(scores, batch), axis=1) + log_probs.sum(2), axis=1)
    expected = (marginal - log_probs[:, 2].sum(1)).mean()
    np.testing.assert_allclose(value(e2e.sequence_term, batch)[1]["utility"], expected, rtol=1e-4)
    assert value(e2e.sequence_term, make_batch())[1]["utility"] == 0  # there is none


def test_a_weight_scales_its_term_and_zero_turns_it_off():
    batch, params = make_batch(), make_params()
    terms = {"marginal": (0.5, e2e.sequence_term), "lm": (0.0, e2e.lm_term)}
    loss, metrics = loss_of(terms)(params, FROZEN, batch, None)
    np.testing.assert_allclose(loss, 0.5 * metrics["marginal"], rtol=1e-6)
    assert metrics["lm"] > 0


def test_a_questions_loss_does_not_depend_on_the_others():
    params, batch = make_params(), make_batch()
    alone = [
        value(e2e.sequence_term, jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], batch), params)[0]
        for b in range(3)
    ]
    np.testing.assert_allclose(
        value(e2e.sequence_term, batch, params)[0], np.mean(alone), rtol=1e-6
    )


def test_chunks_of_documents_change_nothing():
    batch, params = make_batch(), make_params()
    whole = value(e2e.sequence_term, batch, params, chunk_tokens=None)[0]
    np.testing.assert_allclose(
        value(e2e.sequence_term, batch, params, chunk_tokens=10)[0], whole, rtol=1e-6
    )


ALL_TERMS = {
    "marginal": (1.0, e2e.token_term),
    "negatives": (1.0, e2e.negatives_term),
    "contrastive": (0.5, e2e.contrastive_term),
    "lsr": (0.5, e2e.make_lsr_term(log_prob_per_token, 0.3)),
}


def judged(batch):
    questions, slots = batch.doc_ids.shape
    relevant = np.eye(questions, dtype=bool).repeat(slots, axis=1)
    return batch._replace(positive=jnp.zeros(questions, jnp.int32), relevant=jnp.asarray(relevant))


def test_eight_devices_learn_what_one_learns():
    batch, params = judged(make_batch(questions=8)), make_params()
    loss = loss_of(ALL_TERMS, chunk_tokens=None)
    differentiated = jax.jit(
        jax.value_and_grad(lambda p, batch: loss(p, FROZEN, batch, None), has_aux=True)
    )
    one = differentiated(params, batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
    shared = jax.device_put(batch, rows)
    assert len(shared.docs.ids.sharding.device_set) == 8
    eight = differentiated(jax.device_put(params, everywhere), shared)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), one, eight)


def test_a_step_taken_in_parts_is_the_whole_step():
    batch, params = make_batch(questions=4), make_params()
    optimizer = optax.sgd(0.1)
    states = []
    for accumulate in (1, 2):
        step = make_train_step(
            loss_of({"marginal": (1.0, e2e.sequence_term)}),
            optimizer,
            accumulate=accumulate,
            weight=lambda batch: jnp.asarray(batch.target_ids.shape[0]),
        )
        state, metrics = step(init_state(params, optimizer, 0), batch, FROZEN)
        states.append((state.params, metrics["loss"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *states)


def test_a_fusion_reader_sees_only_the_documents_that_are_there():
    seen: list[FusionBatch] = []

    def fused(params, batch):
        seen.append(batch)
        return jnp.where(batch.target_mask, -1.0, 0.0)

    batch = make_batch()
    batch = batch._replace(doc_mask=batch.doc_mask.at[1, 2].set(False))
    reader = LMReader(None, e2e.fusion_reader(fused), lambda params, batch: jnp.zeros((3, 3)))
    loss, metrics = value(e2e.fused_lm_term, batch, reader=reader)
    assert not seen[0].context_mask[1, 2].any() and seen[0].context_mask[1, 1].all()
    np.testing.assert_allclose(loss, (2 + 4 + 4) / 3)
    assert "target_entropy" in metrics and "marginal_nll" not in metrics


def test_the_attention_term_distils_the_decoders_attention():
    mass = jnp.asarray([[3.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 2.0, 3.0]])
    reader = LMReader(None, None, lambda params, batch: mass)
    batch = make_batch()
    scores, _ = reference(make_params(), batch)
    target = log_softmax(np.asarray(mass) / 0.5, axis=1)
    expected = (np.exp(target) * (target - log_softmax(own(scores, batch), axis=1))).sum(1).mean()
    np.testing.assert_allclose(
        value(e2e.make_attention_term(0.5), batch, reader=reader)[0], expected, rtol=1e-4
    )


def test_a_term_that_the_reader_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="does not give"):
        value(e2e.fused_lm_term, make_batch())


def test_pmap_over_the_questions_learns_what_one_device_learns():
    batch = make_batch(questions=4, documents=2, slots=3)
    batch = batch._replace(
        # One document twice, on two devices, and one that is no negative of a question elsewhere.
        doc_ids=batch.doc_ids.at[3, 1].set(batch.doc_ids[0, 1]),
        positive=jnp.array([2, -1, 0, 1], jnp.int32),
        relevant=jnp.zeros((4, 12), bool).at[0, 10].set(True),
    )
    terms = {
        "marginal": (1.0, e2e.sequence_term),
        "contrastive": (0.5, e2e.contrastive_term),
        "negatives": (1.0, e2e.negatives_term),
    }
    optimizer, results = optax.adam(1e-2), []
    for axis, mapped in ((None, None), (ROWS, jax.devices()[:2]), (ROWS, jax.devices()[:4])):
        step = make_train_step(
            loss_of(terms, axis_name=axis), optimizer, mapped=mapped,
            weight=lambda batch: jnp.float32(len(batch.doc_ids)),
        )  # fmt: skip
        state, found = init_state(make_params(), optimizer, 0), []
        for _ in range(3):
            state, metrics = step(state, batch, FROZEN)
            found.append({name: float(value) for name, value in metrics.items()})
        results.append(found)
    for other in results[1:]:
        for mine, expected in zip(other, results[0], strict=True):
            assert mine == pytest.approx(expected, rel=1e-5, abs=1e-5)
