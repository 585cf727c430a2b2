"""Encoding a corpus: order, padding, static shapes, compilation and resuming."""

import concurrent.futures
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.index import EmbeddingStore, EmbeddingWriter, StoreSpec
from ragjax.refresh import (
    EncodeOptions,
    EncodeTask,
    Tokens,
    encode_corpus,
    encode_to_store,
    encode_token_ids,
    tqdm_progress,
)
from ragjax.refresh.encode import _compiled
from ragjax.refresh.task import Cancelled

VOCABULARY, DIM, PAD = 50, 8, 49
OPTIONS = EncodeOptions(buckets=(4, 8, 16), batch_tokens=64, max_rows=8, window=40)


def tiny_encode(params, tokens):
    """One attention layer and a mean over the tokens, as a sentence encoder in small."""
    hidden = params["embed"][tokens.ids]  # [B, L, D]
    scores = jnp.einsum("bld,bmd->blm", hidden @ params["query"], hidden)
    scores = jnp.where(tokens.mask[:, None, :], scores, -1e9)
    hidden = jnp.tanh(jax.nn.softmax(scores) @ hidden)
    weights = tokens.mask[..., None].astype(jnp.float32)
    pooled = (hidden * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1.0)
    return pooled / (jnp.linalg.norm(pooled, axis=1, keepdims=True) + 1e-6)


def task_of(documents, **changes):
    settings = {"encode": tiny_encode, "documents": documents, "pad_id": PAD, "options": OPTIONS}
    return EncodeTask(**(settings | changes))


@pytest.fixture
def params(rng):
    return {
        "embed": rng.normal(size=(VOCABULARY, DIM)).astype(np.float32),
        "query": rng.normal(size=(DIM, DIM)).astype(np.float32),
    }


@pytest.fixture
def token_ids(rng):
    return [rng.integers(0, 49, size=length).tolist() for length in rng.integers(1, 17, size=100)]


def one_by_one(params, token_ids):
    """Every document alone, without padding, in float64."""
    rows = []
    for ids in token_ids:
        hidden = params["embed"].astype(np.float64)[ids]
        weights = np.exp(hidden @ params["query"] @ hidden.T)
        pooled = np.tanh(weights / weights.sum(axis=1, keepdims=True) @ hidden).mean(axis=0)
        rows.append(pooled / (np.linalg.norm(pooled) + 1e-6))
    return np.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        EncodeOptions(buckets=(16,), batch_tokens=16, window=7),
        EncodeOptions(buckets=(5, 16), batch_tokens=4000, max_rows=3),
        EncodeOptions(buckets=(3, 7, 16), batch_tokens=1),
        EncodeOptions(),
    ],
)
def test_an_embedding_does_not_depend_on_the_batches(params, token_ids, options):
    embeddings = encode_token_ids(tiny_encode, params, token_ids, pad_id=PAD, options=options)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, one_by_one(params, token_ids), atol=1e-5)


def test_an_embedding_does_not_depend_on_the_company(params, token_ids):
    whole = encode_token_ids(tiny_encode, params, token_ids, pad_id=PAD, options=OPTIONS)
    reversed_ = encode_token_ids(tiny_encode, params, token_ids[::-1], pad_id=PAD, options=OPTIONS)
    np.testing.assert_allclose(whole, reversed_[::-1], atol=1e-6)


def test_a_document_without_tokens_is_encoded(params):
    embeddings = encode_token_ids(tiny_encode, params, [[], [3]], pad_id=PAD)
    np.testing.assert_array_equal(embeddings[0], np.zeros(DIM))


def test_texts_are_tokenised_window_by_window(params, token_ids):
    texts = [" ".join(map(str, ids)) for ids in token_ids]
    seen = []

    def tokenize(window):
        seen.append(len(window))
        return [[int(word) for word in text.split()] for text in window]

    embeddings = encode_corpus(task_of(texts, tokenize=tokenize), params)
    np.testing.assert_allclose(embeddings, one_by_one(params, token_ids), atol=1e-5)
    assert seen == [40, 40, 20]


def test_an_encoder_may_take_tokens_of_its_own(params, token_ids):
    embeddings = encode_token_ids(
        lambda params, tokens: tiny_encode(params, Tokens(tokens["a"], tokens["b"])),
        params,
        token_ids,
        pad_id=PAD,
        make_tokens=lambda ids, mask: {"a": ids, "b": mask},
    )
    np.testing.assert_allclose(embeddings, one_by_one(params, token_ids), atol=1e-5)


def test_new_parameters_and_new_lengths_compile_nothing_again(params, token_ids):
    traced = []

    def counting_encode(params, tokens):
        traced.append(tokens.ids.shape)
        return tiny_encode(params, tokens)

    shapes = []
    for scale in (1.0, 2.0, 3.0):
        scaled = jax.tree.map(lambda leaf, scale=scale: scale * leaf, params)
        encode_corpus(
            task_of(token_ids, encode=counting_encode),
            scaled,
            progress=lambda progress: shapes.append(progress.num_shapes),
        )
    assert len(traced) == len(set(traced)) == shapes[-1] <= 6
    assert all(rows * length <= 64 and length in (4, 8, 16) for rows, length in traced)


@pytest.mark.parametrize("num_devices", [1, 3, 8])
def test_several_devices_encode_like_one(params, token_ids, num_devices):
    one = encode_token_ids(tiny_encode, params, token_ids, pad_id=PAD, options=OPTIONS)
    devices = jax.devices()[:num_devices]
    several = encode_corpus(task_of(token_ids), params, devices=devices)
    np.testing.assert_allclose(several, one, atol=1e-6)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_nothing_lies_on_devices_that_were_not_given(params, token_ids, compute_dtype):
    params = jax.device_put(params, jax.devices()[0])
    others = set(jax.devices()[4:])
    options = EncodeOptions(buckets=(16,), batch_tokens=64, compute_dtype=compute_dtype)
    before = jax.live_arrays()
    seen = []

    def look(report):
        for array in jax.live_arrays():
            if not any(array is other for other in before):
                seen.append((array.shape, array.sharding))

    task = task_of(token_ids, options=options)
    encode_corpus(task, params, progress=look, devices=jax.devices()[4:])
    assert all(sharding.device_set <= others for _, sharding in seen)
    # Fetching a result makes an array of each part; what is on all four is ours.
    whole = [(shape, sharding) for shape, sharding in seen if sharding.device_set == others]
    assert {shape for shape, _ in whole} >= {(VOCABULARY, DIM), (DIM, DIM), (16, DIM)}
    for shape, sharding in whole:
        # Parameters are whole on each device, the rows of a batch are divided.
        is_param = shape in {(VOCABULARY, DIM), (DIM, DIM)}
        assert sharding.shard_shape(shape) == (shape if is_param else (shape[0] // 4, *shape[1:]))


@pytest.mark.parametrize("axis_type", list(jax.sharding.AxisType)[:2])
def test_the_mesh_of_the_training_does_not_matter(params, token_ids, axis_type):
    expected = encode_token_ids(tiny_encode, params, token_ids, pad_id=PAD, options=OPTIONS)
    training = jax.make_mesh((4,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:4])
    with jax.set_mesh(training):
        found = encode_corpus(task_of(token_ids), params, devices=jax.devices()[4:])
        assert jax.sharding.get_mesh() == training
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_new_parameters_compile_nothing_on_several_devices(params, token_ids):
    def own_encode(params, tokens):
        return tiny_encode(params, tokens)

    devices = jax.devices()[2:6]
    compiled = []
    # Wherever the parameters come from: host, another device, the same devices.
    replicated = jax.sharding.NamedSharding(
        jax.sharding.Mesh(devices, ("other",)), jax.sharding.PartitionSpec()
    )
    for given in (params, jax.device_put(params), jax.device_put(params, replicated)):
        encode_corpus(task_of(token_ids, encode=own_encode), given, devices=devices)
        compiled.append(_compiled(own_encode, Tokens)._cache_size())
    assert compiled[0] == compiled[1] == compiled[2] <= 6


def test_devices_that_hold_the_same_parameters_share_the_rows(params, token_ids):
    expected = encode_corpus(task_of(token_ids), params)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shares = []

    def watched(params, tokens):
        jax.debug.inspect_array_sharding(
            tokens.ids,
            callback=lambda found: shares.append(found.shard_shape(tokens.ids.shape)[0]),
        )
        shares.append(tokens.ids.shape[0] // 8)
        return tiny_encode(params, tokens)

    # As a trainer's parameters lie; few texts are the questions of one step.
    copies = jax.device_put(params, everywhere)
    for texts in (token_ids, token_ids[:8]):
        found = encode_corpus(task_of(texts, encode=watched), copies)
        np.testing.assert_allclose(found, expected[: len(texts)], atol=1e-6)
    assert shares and sorted(shares[::2]) == sorted(shares[1::2])
    assert min(shares) == 1


@pytest.mark.parametrize("devices", [[], [jax.devices()[1]] * 2])
def test_bad_devices_are_refused(params, token_ids, devices):
    with pytest.raises(ValueError, match="devices must be distinct and at least one, got"):
        encode_corpus(task_of(token_ids), params, devices=devices)


def test_the_compute_dtype_is_that_of_the_floating_parameters(params, token_ids):
    params = {**params, "count": np.asarray(7, np.int32)}
    whole = encode_token_ids(tiny_encode, params, token_ids, pad_id=PAD)
    traced = set()

    def typed_encode(params, tokens):
        traced.update((name, str(leaf.dtype)) for name, leaf in params.items())
        return tiny_encode(params, tokens)

    options = EncodeOptions(compute_dtype="bfloat16")
    half = encode_token_ids(typed_encode, params, token_ids, pad_id=PAD, options=options)
    assert traced == {("embed", "bfloat16"), ("query", "bfloat16"), ("count", "int32")}
    assert half.dtype == np.float32
    difference = np.abs(half - whole).max()
    assert 1e-5 < difference < 0.05
    assert params["embed"].dtype == np.float32


def test_a_window_is_tokenised_while_the_one_before_is_encoded(params, token_ids):
    tokenising = [threading.Event() for _ in range(3)]
    encoding = [threading.Event() for _ in range(3)]
    waited = []

    def tokenize(window):
        number = token_ids.index(window[0]) // 40
        tokenising[number].set()
        if number:
            # Neither wait ends unless both threads are at work at once.
            waited.append(encoding[number - 1].wait(5))
        return window

    def progress(report):
        number = (report.done - 1) // 40
        encoding[number].set()
        if number < 2:
            waited.append(tokenising[number + 1].wait(5))
        # No more than one window ahead, or the memory would not be bounded.
        assert not any(event.is_set() for event in tokenising[number + 2 :])

    encode_corpus(task_of(token_ids, tokenize=tokenize), params, progress=progress)
    assert len(waited) > 2 and all(waited)


def test_a_cancelled_encoding_stops_before_the_next_batch(params, token_ids):
    cancelled = threading.Event()
    reports = []

    def progress(report):
        reports.append(report.done)
        cancelled.set()

    with pytest.raises(Cancelled, match="cancelled"):
        encode_corpus(task_of(token_ids), params, progress=progress, cancelled=cancelled)
    assert len(reports) == 1


def test_progress_ends_at_one_with_a_rate(params, token_ids, capsys):
    reports = []
    bar = tqdm_progress("encoding")

    def progress(report):
        reports.append(report)
        bar(report)

    encode_corpus(task_of(token_ids), params, progress=progress)
    fractions = [report.fraction for report in reports]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert (reports[-1].done, reports[-1].total) == (100, 100)
    assert reports[-1].remaining_seconds == 0 and reports[-1].texts_per_second > 0
    # Halfway through the first window the longer half of its texts is done.
    assert reports[1].fraction > reports[1].done / 100
    assert "100/100" in capsys.readouterr().err


def test_what_cannot_be_encoded_is_refused(params, token_ids):
    with pytest.raises(ValueError, match="no documents to encode"):
        encode_token_ids(tiny_encode, params, [], pad_id=PAD)
    with pytest.raises(ValueError, match="no documents to encode"):
        encode_corpus(task_of(token_ids), params, rows=range(0))
    long = task_of(token_ids[:47] + [[1] * 17] + token_ids[48:])
    for rows in (None, range(40, 50), np.asarray([3, 47, 5])):
        with pytest.raises(ValueError, match="document 47 has 17 tokens, more than .* 16"):
            encode_corpus(long, params, rows=rows)
    with pytest.raises(ValueError, match="tokenize returned 1 rows for 40 texts"):
        encode_corpus(task_of(token_ids, tokenize=lambda rows: rows[:1]), params)
    params["embed"][13] = np.nan
    ids = [[1], [2, 13]] * 25
    with pytest.raises(ValueError, match=r"embeddings hold NaN .*\(row 1, 3, 5"):
        encode_token_ids(tiny_encode, params, ids, pad_id=PAD, options=OPTIONS)
    with pytest.raises(ValueError, match=r"embeddings hold NaN .*\(row 7, 9\)"):
        encode_corpus(task_of(ids), params, rows=np.asarray([4, 7, 9]))


def test_only_the_rows_that_are_asked_for_are_encoded_in_their_order(params, token_ids):
    expected = one_by_one(params, token_ids)
    for rows in (range(30, 80), np.asarray([7, 99, 0, 50])):
        found = encode_corpus(task_of(token_ids), params, rows=rows)
        np.testing.assert_allclose(found, expected[rows], atol=1e-5)


def test_other_texts_are_encoded_as_the_documents_are(params, token_ids):
    task = task_of([1, 2], tokenize=None, corpus_fingerprint="c").of_token_ids(token_ids)
    np.testing.assert_allclose(
        encode_corpus(task, params), one_by_one(params, token_ids), atol=1e-5
    )
    assert task.corpus_fingerprint == ""


def test_an_error_in_tokenize_reaches_the_caller(params):
    def broken(rows):
        raise KeyError("no such document")

    with pytest.raises(KeyError, match="no such document"):
        encode_corpus(task_of([1, 2], tokenize=broken), params)


def spec():
    return StoreSpec(
        size=100, dim=DIM, model_fingerprint="m", corpus_fingerprint="c", rows_per_shard=30
    )


class Killed(BaseException):
    """Ends a run the way no handler catches."""


def to_store(folder, params, token_ids, progress=None, cancelled=None):
    writer = EmbeddingWriter.open(folder, spec())
    return encode_to_store(
        task_of(token_ids), params, writer, progress=progress, cancelled=cancelled
    )


def test_a_killed_encoding_goes_on_and_ends_with_the_same_bytes(tmp_path, params, token_ids):
    whole = to_store(tmp_path / "whole", params, token_ids)
    np.testing.assert_allclose(whole.read(), one_by_one(params, token_ids), atol=1e-5)

    def kill(report):
        if report.done > 65:
            raise Killed

    with pytest.raises(Killed):
        to_store(tmp_path / "killed", params, token_ids, kill)
    assert EmbeddingWriter.open(tmp_path / "killed", spec()).missing() == [2, 3]
    reports = []
    to_store(tmp_path / "killed", params, token_ids, reports.append)
    assert 60 < reports[0].done < 75 and reports[-1].fraction == 1.0
    np.testing.assert_array_equal(EmbeddingStore.open(tmp_path / "killed").read(), whole.read())


def test_a_cancelled_encoding_keeps_its_finished_shards(tmp_path, params, token_ids):
    whole = to_store(tmp_path / "whole", params, token_ids)
    cancelled = threading.Event()

    def progress(report):
        if report.done > 35:
            cancelled.set()

    with pytest.raises(Cancelled):
        to_store(tmp_path / "store", params, token_ids, progress, cancelled)
    assert not (tmp_path / "store").exists()
    assert EmbeddingWriter.open(tmp_path / "store", spec()).missing() == [1, 2, 3]
    store = to_store(tmp_path / "store", params, token_ids, cancelled=threading.Event())
    np.testing.assert_array_equal(store.read(), whole.read())


def test_a_store_for_another_number_of_documents_is_refused(tmp_path, params, token_ids):
    with pytest.raises(ValueError, match="for 100 documents, got 99"):
        to_store(tmp_path / "store", params, token_ids[:99])


def test_a_complete_but_unpublished_store_is_published_without_encoding(
    tmp_path, params, token_ids
):
    whole = to_store(tmp_path / "whole", params, token_ids)
    writer = EmbeddingWriter.open(tmp_path / "other", spec())
    for shard in writer.missing():
        writer.write(shard, whole.read_shard(shard))

    store = to_store(tmp_path / "other", None, token_ids)
    np.testing.assert_array_equal(store.read(), whole.read())


def test_a_program_that_ends_cancels_the_encoding_instead_of_failing_it(params, monkeypatch):
    # The interpreter closes every pool before its main thread counts as ended.
    submitted = []

    def submit(pool, function, *arguments):
        if submitted:
            raise RuntimeError("cannot schedule new futures after shutdown")
        submitted.append(function)
        return original(pool, function, *arguments)

    original = concurrent.futures.ThreadPoolExecutor.submit
    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", submit)
    with pytest.raises(Cancelled, match="program ends"):
        encode_token_ids(tiny_encode, params, [[1, 2]] * 100, pad_id=PAD, options=OPTIONS)
    assert submitted
