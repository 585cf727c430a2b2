"""A system that is opened holds what a run adapted, or models as they are, and retrieves."""

import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.data import pad_right
from ragjax.index import USUAL_WEIGHT
from ragjax.models import Tokens, load_encoder, load_language_model
from ragjax.runs import indexes as retrieval
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.saved import adapted_encoder, adapted_language_model, open_run
from ragjax.runs.system import (
    SEARCHES,
    by_bm25,
    by_dense,
    by_hybrid,
    open_base_system,
    open_system,
    retrieve,
)
from ragjax.runs.trainable import folded
from ragjax.training.loop import Interrupted, StopFlag

QUESTION = "what does the green owl like?"


def silent(line):
    """Reports to nobody."""


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_inputs):
    return open_base_system(
        AdaptConfig(**tiny_inputs), cache=tmp_path_factory.mktemp("cache"), log=silent
    )


def embed(encoder, params, text):
    ids = encoder.tokenizer.encode(text).ids[: encoder.max_length]
    padded = pad_right([ids], length=encoder.max_length, pad_id=encoder.pad_id)
    tokens = Tokens(jnp.asarray(padded.ids), jnp.asarray(padded.mask))
    return np.asarray(jax.jit(encoder.encode)(params, tokens), np.float64)[0]


@pytest.mark.parametrize("name", ["dense", "bm25", "hybrid"])
def test_logits_are_the_scaled_cosines_whatever_found_the_documents(base, tiny_inputs, name):
    found, doc_scores = retrieve(base, [QUESTION, "the red cat"], 3, by=SEARCHES[name])
    encoder = load_encoder(tiny_inputs["encoder"])
    corpus = base.workspace.dataset.corpus
    assert found.mask.all()
    for row, text in enumerate([QUESTION, "the red cat"]):
        query = embed(encoder, encoder.params, text)
        for column, doc in enumerate(found.doc_ids[row]):
            passage = corpus[int(doc)]
            document = embed(encoder, encoder.params, f"{passage.title}\n{passage.text}")
            expected = 20 * query @ document / np.linalg.norm(query) / np.linalg.norm(document)
            assert doc_scores[row, column] == pytest.approx(expected, abs=1e-3)


def test_each_way_of_searching_is_its_own_index(base):
    by_word = retrieve(base, ["elk"], 8, by=by_bm25).found
    corpus = base.workspace.dataset.corpus
    assert {corpus[int(doc)].title for doc in by_word.doc_ids[0]} == {"elk"}
    dense = retrieve(base, [QUESTION], 80, by=by_dense)
    assert np.all(np.diff(dense.doc_scores[0]) <= 1e-4)
    both = retrieve(base, [QUESTION], 5, by=by_hybrid).found
    assert both.scores[0].tolist() == sorted(both.scores[0].tolist(), reverse=True)
    assert set(SEARCHES) == {"dense", "bm25", "hybrid"}


def test_more_documents_than_there_are_leave_masked_places(base):
    found, doc_scores = retrieve(base, [QUESTION], 85, by=by_dense)
    assert found.doc_ids.shape == doc_scores.shape == (1, 85)
    assert found.mask.sum() == 80
    assert not found.mask[0, 80:].any()
    assert sorted(found.doc_ids[0, :80].tolist()) == list(range(80))


def test_no_matching_word_retrieves_nothing(base):
    found, doc_scores = retrieve(base, ["zzz qqq"], 3, by=by_bm25)
    assert not found.mask.any()
    assert doc_scores.tolist() == [[0, 0, 0]]


def test_no_documents_asked_for_are_none(base):
    found, doc_scores = retrieve(base, [QUESTION, ""], 0, by=by_dense)
    assert found.doc_ids.shape == doc_scores.shape == (2, 0)


def test_a_negative_number_of_documents_is_refused(base):
    with pytest.raises(ValueError, match="k must be at least 0 documents, got -1"):
        retrieve(base, [QUESTION], -1, by=by_dense)


def test_the_second_start_encodes_nothing(base, tiny_inputs, monkeypatch):
    def encode(*arguments, **options):
        raise AssertionError("the corpus was encoded again")

    monkeypatch.setattr(retrieval, "encode_to_store", encode)
    cache = base.workspace.folder.parent
    again = open_base_system(AdaptConfig(**tiny_inputs), cache=cache, log=silent)
    np.testing.assert_array_equal(again.retriever.embeddings, base.retriever.embeddings)


def test_other_data_get_embeddings_of_their_own_in_one_cache(base, tiny_inputs, tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "title": "", "text": "one fish"}\n')
    cache = base.workspace.folder.parent
    config = AdaptConfig(**tiny_inputs | {"data": str(tmp_path)})
    other = open_base_system(config, cache=cache, log=silent)
    assert other.size == 1
    assert other.workspace.folder != base.workspace.folder
    found = retrieve(other, ["fish"], 2, by=by_hybrid).found
    assert found.mask.tolist() == [[True, False]]


def test_documents_alone_are_enough_and_judged_questions_weigh_the_hybrid(
    base, tiny_inputs, tmp_path
):
    lines = []
    shutil.copy(Path(tiny_inputs["data"]) / "corpus.jsonl", tmp_path)
    config = AdaptConfig(**tiny_inputs | {"data": str(tmp_path)})
    alone = open_base_system(config, cache=tmp_path / "cache", log=lines.append)
    assert alone.retriever.hybrid.dense_weight == USUAL_WEIGHT
    assert any("no dev questions" in line for line in lines)
    assert len(base.workspace.questions["dev"]) == 27


def test_missing_documents_are_named(tiny_inputs, tmp_path):
    config = AdaptConfig(**tiny_inputs | {"data": str(tmp_path / "nowhere")})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_base_system(config, cache=tmp_path / "cache", log=silent)


@pytest.fixture(scope="module")
def whole(tiny_run):
    """A run that adapted both models, in two rounds, with two encoders."""
    return tiny_run("adapt-lora").folder


@pytest.fixture(scope="module")
def only_lm(tiny_run):
    """A run that adapted the language model alone."""
    return tiny_run("lm-only").folder


@pytest.mark.slow
def test_a_run_retrieves_as_it_did_when_it_was_evaluated(whole, monkeypatch):
    def encode(*arguments, **options):
        raise AssertionError("the corpus was encoded again")

    monkeypatch.setattr(retrieval, "encode_to_store", encode)
    system = open_system(whole, models="adapted", log=silent)
    lines = [json.loads(line) for line in (whole / "predictions.jsonl").read_text().splitlines()]
    texts = [line["question"] for line in lines]
    corpus = system.workspace.dataset.corpus
    for name, search in (("after", by_dense), ("hybrid", by_hybrid), ("bm25", by_bm25)):
        found = retrieve(system, texts, 20, by=search).found
        for row, line in enumerate(lines):
            ids = [corpus.id_of(int(doc)) for doc in found.doc_ids[row][found.mask[row]]]
            assert ids == line["systems"][name]["doc_ids"]


@pytest.mark.slow
def test_a_run_answers_with_its_adapted_models(whole, tiny_inputs):
    system = open_system(whole, models="adapted", log=silent)
    run = open_run(whole)
    adapted = folded(adapted_language_model(run).params)
    jax.tree.map(np.testing.assert_array_equal, system.lm_params, adapted)
    jax.tree.map(
        np.testing.assert_array_equal,
        system.retriever.query_params,
        adapted_encoder(run, "query").params,
    )
    assert system.retriever.version == 2
    assert system.name == str(whole)


@pytest.mark.slow
def test_what_is_shipped_is_opened_unless_the_adapted_or_base_models_are_asked_for(
    whole, tiny_inputs, tmp_path
):
    copy, base = tmp_path / "run", load_encoder(tiny_inputs["encoder"])
    shutil.copytree(whole, copy)
    served = json.loads((copy / "served.json").read_text())
    changes = {"retriever": "base", "search": "bm25", "language_model": "adapted"}
    changes |= {"dense_weight": 0.77, "reason": "as dev says"}
    (copy / "served.json").write_text(json.dumps(served | changes))
    said = []
    system = open_system(copy, log=said.append)
    assert system.search is by_bm25 and system.retriever.version == 0 and "as dev says" in said
    jax.tree.map(np.testing.assert_array_equal, system.retriever.query_params, base.params)
    assert system.retriever.hybrid.dense_weight == 0.77
    adapted = open_system(copy, models="adapted", log=silent)
    assert adapted.search is by_hybrid and adapted.retriever.version == 2
    assert adapted.retriever.hybrid.dense_weight != 0.77
    jax.tree.map(np.testing.assert_array_equal, adapted.lm_params, system.lm_params)
    neither = open_system(copy, models="base", log=silent)
    lm = load_language_model(tiny_inputs["lm"])
    jax.tree.map(np.testing.assert_array_equal, neither.lm_params, lm.params)


@pytest.mark.slow
def test_what_a_run_did_not_adapt_is_as_it_was(only_lm, tiny_inputs):
    system = open_system(only_lm, log=silent)
    base = load_encoder(tiny_inputs["encoder"])
    jax.tree.map(np.testing.assert_array_equal, system.retriever.query_params, base.params)
    assert system.retriever.version == 0
    before = jax.tree.leaves(load_language_model(tiny_inputs["lm"]).params)
    after = jax.tree.leaves(system.lm_params)
    assert any((a != b).any() for a, b in zip(after, before, strict=True))


@pytest.mark.slow
def test_a_run_without_its_last_index_has_not_ended(whole, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    for number in (1, 2):
        shutil.rmtree(copy / "index" / str(number))
    with pytest.raises(ValueError, match="no index of the adapted encoder"):
        open_system(copy, models="adapted", log=silent)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run there"):
        open_system(tmp_path, log=silent)


def test_scann_is_built_once_in_a_process_of_its_own(base, tiny_inputs, tmp_path):
    lines = []
    for _ in range(2):
        system = open_base_system(
            AdaptConfig(**tiny_inputs, index="scann"), cache=tmp_path, log=lines.append
        )
    assert sum(line.startswith("building the ScaNN index: about") for line in lines) == 1
    assert any(line.startswith("ScaNN index, as asked: 80 documents") for line in lines)
    assert type(system.retriever.dense).__name__ == "ScannIndex"
    asked = [QUESTION, "the red cat"]
    found, scores = retrieve(system, asked, 80, by=by_dense)
    expected = retrieve(base, asked, 80, by=by_dense)
    # Few documents are searched exactly, as `scann_options` says.
    assert found.mask.all() and np.array_equal(found.doc_ids, expected.found.doc_ids)
    np.testing.assert_allclose(scores, expected.doc_scores, atol=1e-4)
    # A damaged file is no reason to stop, nor to search it.
    path = next(tmp_path.glob("*/scann/*/index/*.npy"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    open_base_system(AdaptConfig(**tiny_inputs, index="scann"), cache=tmp_path, log=lines.append)
    assert sum(line.startswith("building the ScaNN index: about") for line in lines) == 2


def test_a_stop_ends_the_build_and_leaves_no_index(tiny_inputs, tmp_path, monkeypatch):
    stop = StopFlag()

    def log(line):
        if line.startswith("building"):
            stop.signum = signal.SIGTERM

    monkeypatch.setattr("ragjax.refresh.build._PROGRAM", "import time; time.sleep(600)")
    with pytest.raises(Interrupted):
        open_base_system(
            AdaptConfig(**tiny_inputs, index="scann"), cache=tmp_path, stop=stop, log=log
        )
    assert not list(tmp_path.glob("*/scann/*"))


def test_opening_again_tokenises_no_document_and_counts_no_word(tiny_inputs, tmp_path, monkeypatch):
    config = AdaptConfig(**tiny_inputs)
    first = open_base_system(config, cache=tmp_path, log=silent)
    expected = retrieve(first, [QUESTION], 5, by=by_hybrid)
    monkeypatch.setattr("ragjax.index.words.split_words", lambda text, singles: text.split())
    monkeypatch.setattr("ragjax.data.corpus.Corpus.__iter__", lambda corpus: 1 / 0)
    again = open_base_system(config, cache=tmp_path, log=silent)
    assert again.workspace.doc_tokens[:] == first.workspace.doc_tokens[:]
    found = retrieve(again, [QUESTION], 5, by=by_dense).found
    np.testing.assert_array_equal(found.doc_ids, retrieve(first, [QUESTION], 5, by=by_dense)[0][0])
    assert expected.found.mask.all()
