"""The contract every loss and diagnostic shares, checked case by case."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from losses_reference import CASES, FUNCTIONS, KEY, Batch, as_float64, make_batch, with_value

from ragjax import losses

LOSSES = [name for name in CASES if name.endswith("_loss")]

every_case = pytest.mark.parametrize("name", CASES)
every_loss = pytest.mark.parametrize("name", LOSSES)


def with_gradients(loss, batch: Batch):
    """The loss, and the gradients of its sum to doc_scores and token_log_probs."""

    def total(doc_scores, log_probs):
        value = loss(batch._replace(doc_scores=doc_scores, token_log_probs=log_probs))
        return value.sum(), value

    slopes, value = jax.grad(total, argnums=(0, 1), has_aux=True)(
        batch.doc_scores, batch.token_log_probs
    )
    return value, *slopes


# Compiled once per loss: most tests below call it on the same shapes.
EVALUATE = {
    name: jax.jit(lambda batch, loss=loss: with_gradients(loss, batch))
    for name, (loss, _) in CASES.items()
}

LSR_TARGET = jax.jit(losses.lsr_target)


def assert_close(got, expected, tolerance=1e-5):
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def finite_differences(loss, batch: Batch, field: str, step=1e-5):
    values = getattr(batch, field)
    slopes = np.zeros_like(values)
    for index in np.ndindex(values.shape):
        shift = np.zeros_like(values)
        shift[index] = step
        above = loss(batch._replace(**{field: values + shift})).sum()
        below = loss(batch._replace(**{field: values - shift})).sum()
        slopes[index] = (above - below) / (2 * step)
    return slopes


@every_case
@pytest.mark.parametrize("masked", [True, False])
def test_value_equals_the_formula_in_float64(name, masked, rng):
    batch = make_batch(rng, masked=masked)
    value, *_ = EVALUATE[name](batch)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, CASES[name][1](as_float64(batch)), rtol=1e-5, atol=1e-5)


@every_case
def test_gradient_equals_finite_differences_of_the_formula(name, rng):
    batch = make_batch(rng)
    _, to_scores, to_log_probs = EVALUATE[name](batch)
    formula, exact = CASES[name][1], as_float64(batch)
    np.testing.assert_allclose(
        to_scores, finite_differences(formula, exact, "doc_scores"), atol=2e-5
    )
    np.testing.assert_allclose(
        to_log_probs, finite_differences(formula, exact, "token_log_probs"), atol=2e-5
    )


@every_case
def test_masks_not_given_keep_everything(name, rng):
    batch = make_batch(rng, masked=False)
    value = jax.jit(CASES[name][0])(batch._replace(doc_mask=None, token_mask=None))
    np.testing.assert_allclose(value, EVALUATE[name](batch)[0], rtol=1e-5, atol=1e-6)


@every_case
@pytest.mark.parametrize("garbage", [7.0, -np.inf, np.inf, np.nan])
def test_garbage_in_masked_slots_changes_neither_value_nor_gradient(name, garbage, rng):
    batch = make_batch(rng)
    token_kept = batch.doc_mask[:, :, None] & batch.token_mask[:, None, :]
    spoiled = batch._replace(
        doc_scores=np.where(batch.doc_mask, batch.doc_scores, garbage),
        token_log_probs=np.where(token_kept, batch.token_log_probs, garbage),
        target=np.where(batch.doc_mask, batch.target, garbage),
        sparse_target=np.where(batch.doc_mask, batch.sparse_target, garbage),
        no_doc_log_probs=np.where(batch.token_mask, batch.no_doc_log_probs, garbage),
    )
    assert_close(EVALUATE[name](spoiled), EVALUATE[name](batch), tolerance=0)


@every_case
def test_query_without_documents_has_loss_and_gradient_zero(name, rng):
    batch = make_batch(rng)
    empty = batch._replace(doc_mask=np.zeros_like(batch.doc_mask))
    for array in EVALUATE[name](empty):
        np.testing.assert_array_equal(array, 0)


@every_case
def test_nan_in_a_kept_slot_stays_visible_and_in_its_own_row(name, rng):
    batch = make_batch(rng, masked=False)
    spoiled = batch._replace(
        doc_scores=with_value(batch.doc_scores, (1, 2), np.nan),
        token_log_probs=with_value(batch.token_log_probs, (1, 2, 1), np.nan),
        target=with_value(batch.target, (1, 2), np.nan),
        sparse_target=with_value(batch.sparse_target, (1, 2), np.nan),
    )
    value, *slopes = EVALUATE[name](spoiled)
    np.testing.assert_array_equal(np.isnan(value), np.arange(5) == 1)
    for slope in slopes:
        assert np.isfinite(np.delete(slope, 1, axis=0)).all()


@every_case
def test_order_of_documents_never_matters(name, rng):
    batch = make_batch(rng)
    order = np.array([3, 1, 5, 0, 4, 2])
    permuted = Batch(
        doc_scores=batch.doc_scores[:, order],
        token_log_probs=batch.token_log_probs[:, order],
        target=batch.target[:, order],
        sparse_target=batch.sparse_target[:, order],
        no_doc_log_probs=batch.no_doc_log_probs,
        positives=np.argsort(order)[batch.positives].astype(np.int32),
        doc_mask=batch.doc_mask[:, order],
        token_mask=batch.token_mask,
    )
    value, to_scores, to_log_probs = EVALUATE[name](batch)
    expected = (value, to_scores[:, order], to_log_probs[:, order])
    assert_close(EVALUATE[name](permuted), expected)


@every_case
def test_loss_of_a_query_does_not_depend_on_the_batch_size(name, rng):
    batch = make_batch(rng)
    loss = jax.jit(CASES[name][0])
    alone = [
        loss(jax.tree.map(lambda array, row=row: array[row : row + 1], batch)) for row in range(5)
    ]
    np.testing.assert_allclose(
        np.concatenate(alone), EVALUATE[name](batch)[0], rtol=1e-5, atol=1e-6
    )


def in_dtypes(batch: Batch, floats, integers=np.int32) -> Batch:
    """The batch with its floating-point and integer arrays in other dtypes."""
    kinds = {np.dtype(np.float32): floats, np.dtype(np.int32): integers}
    return jax.tree.map(lambda a: a.astype(kinds.get(a.dtype, a.dtype)), batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_strictest_settings_of_a_project_refuse_nothing(name, rng):
    loss, batch = FUNCTIONS[name], make_batch(rng)
    mixed = in_dtypes(batch, np.float64, np.int64)._replace(doc_scores=batch.doc_scores)

    def evaluate(batch):
        return with_gradients(loss, batch)

    with jax.numpy_dtype_promotion("strict"):
        assert jax.eval_shape(evaluate, in_dtypes(batch, np.float16, np.uint8))[0].dtype == "f4"
        with jax.enable_x64(True):
            for wide in (batch, in_dtypes(batch, np.float64, np.int64), mixed):
                jax.eval_shape(evaluate, wide)
            jax.eval_shape(evaluate, in_dtypes(batch, np.float16, np.int64))
        # Not compiled: every single operation is looked at. Row 3 has no document.
        with jax.debug_nans(True):
            evaluate(batch)


# What these make of the log-probs is an embedding, a logit or a product of the test's own.
NOT_OF_ANSWERS = {
    "dpr_loss", "token_log_probs",
    "symmetric_contrastive_loss", "chunked_token_log_probs", "gumbel_top_k",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - NOT_OF_ANSWERS))
def test_an_answer_that_no_document_makes_possible_costs_its_own_row_only(name, rng):
    batch = make_batch(rng)
    impossible = batch._replace(
        token_log_probs=with_value(batch.token_log_probs, 0, -np.inf),
        no_doc_log_probs=with_value(batch.no_doc_log_probs, 0, -np.inf),
        target=with_value(batch.target, 0, -np.inf),
        sparse_target=with_value(batch.sparse_target, 0, -np.inf),
    )
    evaluate = EVALUATE.get(name) or jax.jit(lambda b: with_gradients(FUNCTIONS[name], b))
    got, expected = evaluate(impossible), evaluate(batch)
    assert not np.isnan(got[0]).any()
    assert all(np.isfinite(slope).all() for slope in got[1:])
    for ours, without in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours[1:], without[1:])


@pytest.mark.parametrize("name", ["pdist_loss", "lsr_loss", "kl_divergence", "info_nce_loss"])
def test_a_score_of_minus_infinity_costs_its_own_row_only(name, rng):
    batch = make_batch(rng, masked=False)
    spoiled = batch._replace(doc_scores=with_value(batch.doc_scores, (0, slice(1, 4)), -np.inf))
    spoiled = spoiled._replace(target=with_value(spoiled.target, (1, 2), -np.inf))
    got, expected = EVALUATE[name](spoiled), EVALUATE[name](batch)
    for ours, without in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours[2:], without[2:])
    assert not np.isnan(got[0]).any()
    assert all(np.isfinite(slope).all() for slope in got[1:])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_eager_jit_vmap_and_any_leading_axes_agree(name, rng, monkeypatch):
    # The same noise for every query, or each shape would draw other documents.
    noise = jax.random.gumbel(KEY, (6,))
    monkeypatch.setattr(jax.random, "gumbel", lambda key, *to: jnp.broadcast_to(noise, to[0]))
    loss, batch = FUNCTIONS[name], make_batch(rng, num_queries=6)
    two_axes = jax.tree.map(lambda array: array.reshape(2, 3, *array.shape[1:]), batch)
    first = jax.tree.map(lambda array: array[0], batch)

    def evaluate(batch):
        return with_gradients(loss, batch)

    # A project may be as strict about dtypes as the tests are about ranks.
    with jax.numpy_dtype_promotion("strict"):
        expected, mapped, reshaped = jax.jit(
            lambda batch, two_axes: (evaluate(batch), jax.vmap(evaluate)(batch), evaluate(two_axes))
        )(batch, two_axes)
        low = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == np.float32 else a, batch)
        assert jax.eval_shape(evaluate, low)[0].dtype == jnp.float32
        alone = loss(first)
    assert expected[0].any()
    assert_close(mapped, expected)
    assert_close([array.reshape(6, *array.shape[2:]) for array in reshaped], expected)
    assert_close([alone], [expected[0][0]])


def test_every_public_function_of_queries_has_a_case():
    public = {name for name, value in vars(losses).items() if inspect.isfunction(value)}
    assert public - {name.split()[0] for name in FUNCTIONS} == {"encode_in_chunks"}


def sharded(batch: Batch, axis_type) -> tuple[Batch, NamedSharding]:
    """Splits the queries over eight devices."""
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    return jax.device_put(batch, sharding), sharding


@every_loss
def test_eight_devices_equal_one_device_in_loss_and_gradient(name, rng):
    loss, _ = CASES[name]
    batch = make_batch(rng, num_queries=16)
    split, sharding = sharded(batch, AxisType.Auto)
    mapped = jax.shard_map(
        loss, mesh=sharding.mesh, in_specs=(sharding.spec,), out_specs=sharding.spec
    )
    both = jax.jit(lambda b: (with_gradients(loss, b), with_gradients(mapped, b)))(split)
    for parallel in both:
        assert len(parallel[0].sharding.device_set) == 8
        assert_close(parallel, EVALUATE[name](batch))


@every_loss
def test_explicit_mesh_equals_one_device_through_auto_axes(name, rng):
    loss, _ = CASES[name]
    batch = make_batch(rng, num_queries=16)
    split, sharding = sharded(batch, AxisType.Explicit)
    evaluate = jax.sharding.auto_axes(
        lambda b: with_gradients(loss, b), axes="batch", out_sharding=sharding
    )
    with jax.set_mesh(sharding.mesh):
        assert_close(jax.jit(evaluate)(split), EVALUATE[name](batch))


@every_loss
def test_pmap_equals_one_device_in_loss_and_gradient(name, rng):
    loss, _ = CASES[name]
    batch = make_batch(rng, num_queries=16)
    parts = jax.tree.map(lambda a: a.reshape(8, 2, *a.shape[1:]), batch)
    got = jax.pmap(lambda b: with_gradients(loss, b))(parts)
    assert_close([a.reshape(16, *a.shape[2:]) for a in got], EVALUATE[name](batch))


@every_case
def test_bfloat16_inputs_are_computed_in_float32(name, rng):
    batch = make_batch(rng)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == np.float32 else a, batch)
    same_values = jax.tree.map(
        lambda a: a.astype(np.float32) if a.dtype == jnp.bfloat16 else a, low
    )
    value = jax.jit(CASES[name][0])(low)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, EVALUATE[name](same_values)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["rag_sequence_loss", "rag_token_loss", "lsr_loss", "pdist_loss"])
def test_extreme_scores_give_finite_losses_and_gradients(name, rng):
    batch = make_batch(rng)
    extreme = batch._replace(
        doc_scores=batch.doc_scores * 1e4, token_log_probs=batch.token_log_probs * 1e4
    )
    for array in EVALUATE[name](extreme):
        assert np.isfinite(array).all()


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 8))
def test_any_mask_and_scale_equals_the_formula(seed, spread):
    rng = np.random.default_rng(seed)
    batch = make_batch(rng)
    doc_mask = rng.random(batch.doc_mask.shape) < rng.random()
    batch = batch._replace(
        doc_scores=batch.doc_scores * np.float32(spread),
        positives=np.argmax(doc_mask, axis=1).astype(np.int32),
        doc_mask=doc_mask,
    )
    exact = as_float64(batch)
    for name in ("rag_sequence_loss", "rag_token_loss", "info_nce_loss", "retriever_entropy"):
        np.testing.assert_allclose(
            EVALUATE[name](batch)[0], CASES[name][1](exact), rtol=1e-5, atol=1e-5, err_msg=name
        )


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1), temperature=st.floats(0.01, 10))
def test_no_divergence_is_negative(seed, temperature):
    rng = np.random.default_rng(seed)
    batch = make_batch(rng)
    target = LSR_TARGET(batch.target, temperature=temperature, doc_mask=batch.doc_mask)
    batch = batch._replace(target=target, sparse_target=target)
    for name in ("lsr_loss", "pdist_loss"):
        assert (np.asarray(EVALUATE[name](batch)[0]) > -1e-5).all()


def test_importing_losses_loads_jax_and_nothing_heavier():
    code = "import sys, ragjax.losses; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "jax" in loaded
    heavy = {"flax", "transformers", "scann", "tokenizers", "optax", "torch", "orbax"}
    assert not heavy & set(loaded)
