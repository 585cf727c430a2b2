import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.losses import encode_in_chunks, lsr_loss, pdist_loss
from ragjax.models import Tokens
from ragjax.models.testing import tiny_encoder
from ragjax.training.lsr import LsrBatch, make_lsr_loss, real_questions, towers
from ragjax.training.mesh import ROWS
from ragjax.training.optimizer import OptimizerConfig, make_optimizer
from ragjax.training.steps import init_state, make_train_step

B, K, M, L = 3, 2, 8, 12


def random_tokens(rng, rows):
    lengths = rng.integers(3, L + 1, rows)
    mask = np.arange(L)[None, :] < lengths[:, None]
    return Tokens(jnp.asarray(rng.integers(4, 40, (rows, L)), jnp.int32), jnp.asarray(mask))


def random_batch(rng):
    target = np.full((B, M), -np.inf, np.float32)
    candidates = np.zeros((B, M), bool)
    for b in range(B):
        columns = rng.choice(M - 1, K, replace=False)
        weights = rng.dirichlet(np.ones(K))
        target[b, columns], candidates[b, columns] = np.log(weights), True
    return LsrBatch(
        queries=random_tokens(rng, B),
        docs=random_tokens(rng, M),
        target_log_probs=jnp.asarray(target),
        candidate_mask=jnp.asarray(candidates),
        doc_mask=jnp.arange(M) < M - 1,
    )


def reference(encoder, query_params, doc_params, batch, scale, in_batch):
    """The loss by the formula, in float64, question by question."""
    queries = np.asarray(encoder.encode(query_params, batch.queries), np.float64)
    docs = np.asarray(encoder.encode(doc_params, batch.docs), np.float64)
    losses = []
    for b in range(B):
        own = np.flatnonzero(batch.candidate_mask[b])
        columns = np.flatnonzero(batch.doc_mask) if in_batch else own
        scores = scale * docs[columns] @ queries[b]
        log_p = scores - np.log(np.exp(scores).sum())
        log_q = np.asarray(batch.target_log_probs, np.float64)[b, columns]
        q = np.exp(log_q)
        losses.append(sum(q[i] * (log_q[i] - log_p[i]) for i in range(len(columns)) if q[i] > 0))
    return np.mean(losses)


@pytest.mark.slow
@pytest.mark.parametrize("in_batch", [True, False])
def test_the_loss_is_the_mean_kl_over_questions(rng, in_batch):
    encoder, batch = tiny_encoder(), random_batch(rng)
    loss_fn = make_lsr_loss(encoder.encode, pdist_loss, scale=20.0, in_batch=in_batch)
    loss, metrics = loss_fn({"shared": encoder.params}, None, batch, jax.random.key(0))
    expected = reference(encoder, encoder.params, encoder.params, batch, 20.0, in_batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert 0 <= float(metrics["agreement"]) <= 1
    assert 0 <= float(metrics["retriever_entropy"]) <= 1


def test_a_question_of_one_candidate_is_learnt_but_not_in_the_entropies(rng):
    encoder, batch = tiny_encoder(), random_batch(rng)
    alone = jnp.zeros(M, bool).at[2].set(True)
    more = batch._replace(
        candidate_mask=batch.candidate_mask.at[2].set(alone),
        target_log_probs=batch.target_log_probs.at[2].set(jnp.where(alone, 0.0, -jnp.inf)),
    )
    without = more._replace(candidate_mask=more.candidate_mask.at[2].set(False))
    loss_fn = make_lsr_loss(encoder.encode, pdist_loss, scale=20.0, in_batch=True)
    (loss, metrics), (other, same) = (
        loss_fn({"shared": encoder.params}, None, one, jax.random.key(0)) for one in (more, without)
    )
    assert float(loss) != float(other)
    for name in ("agreement", "retriever_entropy", "target_entropy"):
        np.testing.assert_allclose(metrics[name], same[name], rtol=1e-6)


def test_an_impossible_target_and_nan_in_padding_cost_nothing_but_their_own_question():
    rng = np.random.default_rng(0)
    table = {"table": jnp.asarray(rng.normal(size=(40, 4)), jnp.float32)}
    batch = random_batch(rng)
    target = batch.target_log_probs.at[1].set(-jnp.inf)
    padding = Tokens(batch.docs.ids, batch.docs.mask & batch.doc_mask[:, None])
    no_text = Tokens(batch.queries.ids, batch.queries.mask.at[1].set(False))

    def encode(params, tokens):
        weights = tokens.mask[..., None].astype(jnp.float32)
        total = (params["table"][tokens.ids] * weights).sum(1)
        return jnp.where(weights.any(1), total, jnp.nan)

    def evaluate(objective, **changes):
        loss = make_lsr_loss(encode, objective, scale=2.0, in_batch=objective is pdist_loss)
        return jax.jit(
            jax.value_and_grad(
                lambda p: loss({"shared": p}, None, batch._replace(**changes), None), has_aux=True
            )
        )(table)

    for objective in (pdist_loss, lsr_loss):
        (loss, metrics), slope = evaluate(objective, target_log_probs=target, docs=padding)
        no_question = batch.candidate_mask.at[1].set(False)
        (rest, _), rest_slope = evaluate(
            objective, target_log_probs=target, candidate_mask=no_question, queries=no_text
        )
        np.testing.assert_allclose(loss, rest * 2 / 3, rtol=1e-6)  # divided by all three
        np.testing.assert_allclose(slope["table"], rest_slope["table"] * 2 / 3, atol=1e-6)
        assert metrics["impossible_answers"] == 1


@pytest.mark.slow
def test_a_padding_question_changes_neither_loss_nor_gradient(rng):
    encoder, batch = tiny_encoder(), random_batch(rng)
    loss_fn = make_lsr_loss(encoder.encode, pdist_loss, scale=20.0, in_batch=True)

    def value(params, batch):
        return loss_fn({"shared": params}, None, batch, jax.random.key(0))[0]

    padded = batch._replace(
        queries=jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), batch.queries),
        target_log_probs=jnp.concatenate([batch.target_log_probs, jnp.full((1, M), -jnp.inf)]),
        candidate_mask=jnp.concatenate([batch.candidate_mask, jnp.zeros((1, M), bool)]),
    )
    ours, theirs = (jax.value_and_grad(value)(encoder.params, b) for b in (batch, padded))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def train(objective, names, rng, steps=10):
    encoder, batch = tiny_encoder(), random_batch(rng)
    towers_ = {"query": encoder.params, "doc": encoder.params}
    trainable = {name: towers_[name] for name in names}
    frozen = {name: towers_[name] for name in towers_ if name not in names}
    before = jax.tree.map(np.array, towers_)
    config = OptimizerConfig(learning_rate=1e-2, schedule="constant")
    optimizer = make_optimizer(config, total_steps=steps)
    in_batch = objective is pdist_loss
    loss_fn = make_lsr_loss(encoder.encode, objective, scale=20.0, in_batch=in_batch)
    if not in_batch:
        batch = batch._replace(
            target_log_probs=jnp.where(batch.candidate_mask, batch.target_log_probs, 0.0)
        )
    step, state = make_train_step(loss_fn, optimizer), init_state(trainable, optimizer, 0)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch, frozen)
        losses.append(float(metrics["loss"]))
    return before, {**frozen, **state.params}, losses


def differs(a, b):
    return any(
        not np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("objective", [pdist_loss, lsr_loss])
def test_query_only_training_leaves_the_document_tower_bit_identical_after_10_steps(rng, objective):
    before, after, losses = train(objective, ["query"], rng)
    assert not differs(before["doc"], after["doc"])
    assert differs(before["query"], after["query"])
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_both_towers_learn_apart(rng):
    before, after, _ = train(pdist_loss, ["query", "doc"], rng)
    assert differs(before["query"], after["query"]) and differs(before["doc"], after["doc"])
    assert differs(after["query"], after["doc"])


def test_a_shared_tower_serves_both_sides():
    query, doc = towers({"shared": 1}, None)
    assert query is doc
    assert towers({"query": 1}, {"doc": 2}) == (1, 2)


@pytest.mark.slow
def test_no_gradient_reaches_the_target(rng):
    encoder, batch = tiny_encoder(), random_batch(rng)
    loss_fn = make_lsr_loss(encoder.encode, lsr_loss, scale=20.0, in_batch=False)
    finite = jnp.where(batch.candidate_mask, batch.target_log_probs, 0.0)

    def value(target):
        loss, _ = loss_fn(
            {"shared": encoder.params}, None, batch._replace(target_log_probs=target),
            jax.random.key(0),
        )  # fmt: skip
        return loss

    np.testing.assert_array_equal(jax.grad(value)(finite), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_tokens", [1, L, 2 * L, 5 * L])
def test_chunks_change_neither_loss_nor_gradient(rng, chunk_tokens):
    encoder, batch = tiny_encoder(), random_batch(rng)

    def step(tokens):
        loss_fn = make_lsr_loss(
            encoder.encode, pdist_loss, scale=20.0, in_batch=True, chunk_tokens=tokens
        )
        return jax.value_and_grad(
            lambda params: loss_fn({"shared": params}, None, batch, jax.random.key(0))[0]
        )(encoder.params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), step(chunk_tokens), step(10_000)
    )


@pytest.mark.slow
def test_a_larger_batch_does_not_take_more_memory_than_one_chunk(rng):
    encoder = tiny_encoder()

    def peak(rows):
        tokens = random_tokens(rng, rows)

        def value(params):
            return encode_in_chunks(encoder.encode, params, tokens, chunk_size=8).sum()

        compiled = jax.jit(jax.grad(value)).lower(encoder.params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(128) < 1.5 * peak(16)


@pytest.mark.slow
def test_pmap_over_the_rows_learns_what_one_device_learns(rng):
    encoder, optimizer = (
        tiny_encoder(),
        make_optimizer(OptimizerConfig(learning_rate=1e-3), total_steps=3),
    )
    batch = random_batch(rng)
    # Four queries and eight documents on four devices; one query is padding.
    padded = batch._replace(
        queries=Tokens(*(jnp.pad(leaf, ((0, 1), (0, 0))) for leaf in batch.queries)),
        target_log_probs=jnp.pad(batch.target_log_probs, ((0, 1), (0, 0)), constant_values=-np.inf),
        candidate_mask=jnp.pad(batch.candidate_mask, ((0, 1), (0, 0))),
        excluded=jnp.zeros((B + 1, M), bool).at[0, 3].set(True),
    )
    results = []
    for axis, mapped in ((None, None), (ROWS, jax.devices()[:4])):
        loss = make_lsr_loss(encoder.encode, pdist_loss, scale=20.0, in_batch=True, axis_name=axis)
        step = make_train_step(loss, optimizer, weight=real_questions, mapped=mapped)
        state = init_state({"shared": encoder.params}, optimizer, 0)
        results.append([])
        for _ in range(3):
            state, metrics = step(state, padded)
            results[-1].append({name: float(value) for name, value in metrics.items()})
    for mine, expected in zip(*results, strict=True):
        assert mine == pytest.approx(expected, rel=1e-4, abs=1e-5)
