"""Publishing and searching in a real Milvus server; skipped where there is none."""

import logging
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from clustered_corpus import clustered
from milvus_server import milvus_server
from programs import environment

from ragjax.index import (
    EmbeddingWriter,
    ExactIndex,
    MilvusIndex,
    MilvusOptions,
    StoreSpec,
    milvus_client,
)
from ragjax.index.milvus_publish import publish, roll_back

QUICK = MilvusOptions(kind="IVF_FLAT", build={"nlist": 64}, search={"nprobe": 16})
pytestmark = pytest.mark.slow  # the server needs 10 seconds to start


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    with milvus_server(tmp_path_factory.mktemp("milvus")) as (uri, _):
        yield uri


def make_store(folder, embeddings, **spec):
    spec = {"model_fingerprint": "encoder", "corpus_fingerprint": "corpus"} | spec
    size, dim = embeddings.shape
    writer = EmbeddingWriter.open(folder, StoreSpec(size=size, dim=dim, **spec))
    for shard in range(writer.spec.num_shards):
        rows = writer.spec.rows(shard)
        writer.write(shard, embeddings[rows.start : rows.stop])
    return writer.publish()


def collections(uri, alias):
    names = milvus_client.connect(uri).list_collections()
    return sorted(name for name in names if name.startswith(f"{alias}_"))


def near(rng, docs, count):
    """Queries beside documents, of length 1."""
    points = docs[rng.integers(0, len(docs), count)] + 0.05 * rng.normal(
        size=(count, docs.shape[1])
    )
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def share_found(exact, found):
    pairs = zip(exact.doc_ids, found.doc_ids, strict=True)
    return np.mean([np.isin(*both).mean() for both in pairs])


def search_params(kind):
    return {"HNSW": {"ef": 256}, "SCANN": {"nprobe": 64}, "IVF_FLAT": {"nprobe": 64}}[kind]


@pytest.mark.parametrize("kind", ["HNSW", "IVF_FLAT", "SCANN"])
def test_ten_thousand_documents_are_found_as_by_exact_search(uri, rng, tmp_path, kind):
    docs = clustered(rng, 10_000, dim=64)
    queries = near(rng, docs, 300)
    told = []
    done = publish(
        f"milvus:{uri}/{kind}",
        make_store(tmp_path / "store", docs),
        options=MilvusOptions(kind=kind, search=search_params(kind)),
        on_rows=lambda rows, of: told.append((rows, of)),
    )
    assert done.inserted == 10_000 and told[-1] == (10_000, 10_000) and done.dropped == ()
    index = MilvusIndex.open(f"milvus:{uri}/{kind}")
    assert (index.size, index.dim, index.generation.name) == (10_000, 64, done.name)
    found, exact = index.search(queries, 10), ExactIndex(docs).search(queries, 10)
    recall = share_found(exact, found)
    print(f"{kind}: recall@10 {recall:.4f}, of its own documents {done.recall:.4f}")
    assert recall > 0.9 and done.recall > 0.9
    assert found.doc_ids.dtype == np.int32 and found.scores.dtype == np.float32
    inner = np.einsum("qkd,qd->qk", docs[found.doc_ids], queries)
    np.testing.assert_allclose(found.scores, inner, atol=1e-5)
    assert (np.diff(found.scores, axis=1) <= 0).all() and found.mask.all()


def test_a_hundred_thousand_documents_are_found_through_the_index(uri, rng, tmp_path):
    docs = clustered(rng, 100_000, dim=64, clusters=500)
    queries = near(rng, docs, 500)
    store = make_store(tmp_path / "store", docs)
    # Not HNSW: the server builds it with the lowest priority, for minutes beside other tests.
    options = MilvusOptions(kind="IVF_FLAT", search={"nprobe": 1})
    narrow = publish(f"milvus:{uri}/large", store, options=options, min_recall=0)
    wide = publish(f"milvus:{uri}/large", store, options=MilvusOptions(kind="IVF_FLAT"))
    index = MilvusIndex.open(f"milvus:{uri}/large")
    found, exact = index.search(queries, 10), ExactIndex(docs).search(queries, 10)
    recall = share_found(exact, found)
    print(f"100,000: recall@10 {recall:.4f}; {narrow.recall:.4f} in one list, {wide.recall:.4f}")
    assert recall > 0.9 and wide.recall > 0.9
    # Comparing every row would have found them all, so it is the index that is searched.
    assert narrow.recall < 0.99


def test_small_corpora_equal_scores_and_empty_slots(uri, rng, tmp_path, caplog):
    docs = np.repeat(clustered(rng, 3, dim=8), 2, axis=0)[[0, 2, 4, 1, 3, 5]]
    publish(f"milvus:{uri}/small", make_store(tmp_path / "store", docs))
    index = MilvusIndex.open(f"milvus:{uri}/small")
    result = index.search(docs[:3], 8)
    assert result.doc_ids[:, :2].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert result.mask.tolist() == [[True] * 6 + [False] * 2] * 3
    assert (result.doc_ids[:, 6:] == -1).all() and np.isneginf(result.scores[:, 6:]).all()
    assert "the last 2 slots are masked" in caplog.text
    assert index.search(np.zeros((0, 8), np.float32), 3).doc_ids.shape == (0, 3)
    with pytest.raises(ValueError, match="have size 7 but the index was built with size 8"):
        index.search(np.ones((2, 7), np.float32), 3)
    with pytest.raises(ValueError, match="k must be a positive integer, got 0"):
        index.search(docs[:1], 0)
    with pytest.raises(ValueError, match="k must be at most 16,384"):
        index.search(docs[:1], 16_385)
    with pytest.raises(ValueError, match="NaN or infinite"):
        index.search(np.full((1, 8), np.nan), 1)


def test_an_insert_that_was_killed_is_continued(uri, rng, tmp_path):
    docs = clustered(rng, 10_000, dim=64)
    store = make_store(tmp_path / "store", docs)
    program = textwrap.dedent(f"""
        import sys, time
        from ragjax.index import EmbeddingStore, MilvusOptions, milvus_publish

        milvus_publish._CHUNK_BYTES = 1000 * 64 * 4

        def told(rows, of):
            if rows == 4000:
                print(rows, flush=True)
                time.sleep(600)

        milvus_publish.publish(
            "milvus:{uri}/killed", EmbeddingStore.open({str(store.folder)!r}),
            options=MilvusOptions(kind="IVF_FLAT", build={{"nlist": 64}}, search={{"nprobe": 16}}),
            on_rows=told,
        )
    """)
    pipes = {"stdout": subprocess.PIPE, "env": environment()}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as child:
        assert child.stdout.readline() == b"4000\n"
        child.send_signal(signal.SIGKILL)
    address = f"milvus:{uri}/killed"
    with pytest.raises(FileNotFoundError, match="has no alias killed; publish an index first"):
        MilvusIndex.open(address)
    (half,) = collections(uri, "killed")
    done = publish(address, store, options=QUICK)
    assert done.name == half and done.inserted == 6000
    again = publish(address, store, options=QUICK)
    assert again.name == half and again.inserted == 0 and again.recall == done.recall
    every = MilvusIndex.open(address).search(docs, 1).doc_ids[:, 0]
    assert (every == np.arange(10_000)).mean() > 0.99
    # Of other embeddings: it is not continued, and dropped in the end.
    other = make_store(tmp_path / "other", docs[::-1])
    done = publish(address, other, options=MilvusOptions(kind="HNSW"), keep=0)
    assert done.inserted == 10_000 and done.dropped == (half,)


def test_a_swap_under_load_fails_no_query_and_mixes_no_generations(uri, rng, tmp_path):
    docs, queries = clustered(rng, 10_000, dim=64), clustered(rng, 500, dim=64)
    address = f"milvus:{uri}/swapped"
    one = make_store(tmp_path / "one", docs)
    two = make_store(tmp_path / "two", -docs, model_fingerprint="other")
    first = publish(address, one, options=QUICK)
    ended, failures, seen = threading.Event(), [], []

    def ask():
        index = MilvusIndex.open(address)
        try:
            while not ended.is_set():
                found = index.search(queries, 5)
                inner = np.einsum("qkd,qd->qk", docs[found.doc_ids], queries)
                signs = {
                    sign for sign in (1, -1) if np.allclose(found.scores, sign * inner, atol=1e-4)
                }
                seen.append(signs)
        except Exception as error:  # of any kind: none may come
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    second = publish(address, two, options=QUICK)
    time.sleep(1)
    assert roll_back(address) == first.name
    time.sleep(1)
    again = publish(address, two, options=QUICK)  # nothing to insert
    assert again.name == second.name and again.inserted == 0
    for number in range(3, 6):  # older ones are dropped while they may be searched
        docs_now = make_store(tmp_path / str(number), docs, corpus_fingerprint=str(number))
        publish(address, docs_now, options=QUICK, keep=0)
    while len(seen) * len(queries) < 10_000 and not failures:
        time.sleep(0.1)
    ended.set()
    for thread in threads:
        thread.join()
    assert failures == []
    count = {sign: sum(signs == {sign} for signs in seen) for sign in (1, -1)}
    print(f"{len(seen) * len(queries):,} queries, searches of each generation: {count}")
    assert sum(count.values()) == len(seen) and min(count.values()) > 0
    assert len(seen) * len(queries) >= 10_000


def test_generations_are_kept_and_rolled_back_to(uri, rng, tmp_path):
    address, names = f"milvus:{uri}/kept", []
    stores = [
        make_store(
            tmp_path / str(number), clustered(rng, 50, dim=8), corpus_fingerprint=str(number)
        )
        for number in range(4)
    ]
    for store in stores[:3]:
        names.append(publish(address, store, keep=1).name)
    assert collections(uri, "kept") == names[1:]
    index = MilvusIndex.open(address)
    assert roll_back(address) == names[1]
    index.search(np.ones((1, 8)), 1)
    assert index.generation.name == names[1] and index.generation.spec.corpus_fingerprint == "1"
    with pytest.raises(FileNotFoundError, match="no generation before kept_000002"):
        roll_back(address)
    done = publish(address, stores[3], keep=1)
    assert done.dropped == (names[2],)  # what was rolled back from is not returned to
    assert roll_back(address) == names[1]


def test_an_index_of_another_encoder_or_corpus_is_refused_and_not_followed(
    uri, rng, tmp_path, caplog
):
    address = f"milvus:{uri}/checked"
    docs = clustered(rng, 50, dim=8)
    settings = {"settings": {"model": "minilm"}}
    mine = publish(address, make_store(tmp_path / "mine", docs, **settings))
    wanted = {"model_fingerprint": "encoder", "corpus_fingerprint": "corpus", **settings}
    index = MilvusIndex.open(address, **wanted)
    for name, value in {**wanted, "settings": {"model": "e5"}}.items():
        other = {"settings": value} if name == "settings" else {name: "another"}
        if other == settings:
            continue
        with pytest.raises(ValueError, match="not those of this encoder and corpus.*expected"):
            MilvusIndex.open(address, **other)
    publish(address, make_store(tmp_path / "other", -docs, model_fingerprint="other"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert index.search(docs[:1], 1).doc_ids[0, 0] == 0
    assert index.generation.name == mine.name
    assert caplog.text.count("does not fit (model_fingerprint 'other', expected 'encoder'") == 1
    publish(address, make_store(tmp_path / "third", -2 * docs, model_fingerprint="third"))
    with pytest.raises(FileNotFoundError, match="has dropped what was searched"):
        index.search(docs[:1], 1)


def test_what_ragjax_did_not_publish_is_refused(uri, rng, tmp_path):
    client = milvus_client.connect(uri)
    client.create_collection("foreign_collection", dimension=8)
    client.create_alias("foreign_collection", "foreign")
    with pytest.raises(ValueError, match="foreign_collection was not published by this version"):
        MilvusIndex.open(f"milvus:{uri}/foreign")
    store = make_store(tmp_path / "store", clustered(rng, 20, dim=8))
    with pytest.raises(ValueError, match="names foreign_collection, which ragjax did not publish"):
        publish(f"milvus:{uri}/foreign", store)


def test_a_generation_that_others_dropped_is_made_again(uri, rng, tmp_path):
    address, docs = f"milvus:{uri}/dropped", clustered(rng, 50, dim=8)
    store = make_store(tmp_path / "store", docs)
    first = publish(address, store)
    milvus_client.connect(uri).drop_collection(first.name)
    assert publish(address, store).inserted == 50
    assert MilvusIndex.open(address).search(docs[:1], 1).doc_ids[0, 0] == 0


def test_a_recall_that_is_too_low_leaves_the_alias_as_it_was(uri, rng, tmp_path):
    address = f"milvus:{uri}/low"
    store = make_store(tmp_path / "store", rng.normal(size=(5000, 32)).astype(np.float32))
    first = publish(address, store, options=QUICK, min_recall=0)
    narrow = MilvusOptions(kind="IVF_FLAT", build={"nlist": 64}, search={"nprobe": 1})
    with pytest.raises(ValueError, match=f"than min_recall 0.9, so low still names {first.name}"):
        publish(address, store, options=narrow, min_recall=0.9)
    assert MilvusIndex.open(address).generation.name == first.name
    with pytest.raises(TimeoutError, match="searches 0 of 5,000 rows .* what is done is kept"):
        publish(address, store, options=MilvusOptions(kind="SCANN"), deadline_seconds=1e-9)
    assert MilvusIndex.open(address).generation.name == first.name


def test_a_server_that_ends_is_named_with_the_remedy(rng, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(milvus_client, "SECONDS", 3)
    monkeypatch.setenv("MILVUS_TOKEN", "root:hidden-word")
    docs = clustered(rng, 30, dim=8)
    store = make_store(tmp_path / "store", docs)
    with milvus_server(tmp_path / "server") as (uri, end):
        publish(f"milvus:{uri}/ended", store)
        index = MilvusIndex.open(f"milvus:{uri}/ended")
        end()
        for call in (
            lambda: index.search(docs[:1], 1),
            lambda: MilvusIndex.open(f"milvus:{uri}/ended"),
            lambda: publish(f"milvus:{uri}/ended", store),
            lambda: roll_back(f"milvus:{uri}/ended"),
        ):
            with pytest.raises(ConnectionError, match=f"no Milvus server answers at {uri}") as told:
                call()
            assert "start it, or check the address" in str(told.value)
            assert "hidden-word" not in str(told.value)
    assert "hidden-word" not in "".join(capfd.readouterr())
