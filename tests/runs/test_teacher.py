import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.index import SearchResult
from ragjax.models import LMBatch
from ragjax.runs.compare.answers import Request, ScoredAnswer, answer_requests
from ragjax.runs.found import Findable
from ragjax.runs.options.dual import AdaptConfig, LMConfig, RetrieverConfig
from ragjax.runs.options.shared import DataConfig, EvaluationConfig
from ragjax.runs.options.teachers import LsrTarget, TeacherWeights
from ragjax.runs.teachers import batches as batches_module
from ragjax.runs.teachers.reading import TeacherScores, score_candidates
from ragjax.runs.teachers.target import target_log_probs, teacher_parts
from ragjax.runs.train import retriever as retriever_module
from ragjax.runs.train.retriever import _batch_docs, _lsr_batches
from ragjax.runs.train.stages import stage_steps
from ragjax.runs.train.targets import scored_targets
from ragjax.runs.workspace import open_workspace
from ragjax.training.loop import StopFlag
from ragjax.training.score_cache import ResultCache, Score


@pytest.fixture(scope="module")
def workspace(tiny_inputs, tmp_path_factory):
    config = AdaptConfig(
        **tiny_inputs,
        data_options=DataConfig(train_questions=9),
        evaluation=EvaluationConfig(max_new_tokens=4),
        language_model=LMConfig(train_layers=1),
        score_tokens=1024,
    )
    folder = tmp_path_factory.mktemp("workspace")
    return open_workspace(config, folder, stop=StopFlag(), log=lambda _: None)


@pytest.fixture
def teacher(workspace):
    return workspace.base_lm()


def some_candidates(rng, count, *, documents):
    ids = np.stack([rng.choice(documents, 4, replace=False) for _ in range(count)])
    mask = np.ones(ids.shape, bool)
    mask[0, 2:] = False
    scores = np.where(mask, rng.normal(size=ids.shape), -np.inf).astype(np.float32)
    return SearchResult(np.where(mask, ids, -1).astype(np.int32), scores, mask)


def plain_score(workspace, question, doc):
    """One pair alone, by the unpacked function."""
    context = workspace.prompts.context(question.text, workspace.documents.get([doc]))
    target = workspace.prompts.target(question.answers[0])
    packed = workspace.prompts.pack([context], [target])
    batch = LMBatch(*map(jnp.asarray, packed))
    return float(workspace.lm.token_log_probs(workspace.lm.params, batch).sum())


# Few documents share a row with many questions; many documents are read alone.
@pytest.mark.slow
@pytest.mark.parametrize("documents", [5, 60])
def test_packed_scores_are_those_of_each_pair_alone(workspace, teacher, rng, tmp_path, documents):
    questions = workspace.questions["train"]
    found = some_candidates(rng, len(questions), documents=documents)
    cache = ResultCache(tmp_path / "s.jsonl", Score)
    scores = score_candidates(workspace, teacher, questions, found, cache)
    for q, k in np.argwhere(found.mask):
        expected = plain_score(workspace, questions[q], int(found.doc_ids[q, k]))
        assert scores.log_probs[q, k] == pytest.approx(expected, abs=1e-3)
    assert (scores.log_probs[~found.mask] == 0).all()
    assert scores.lengths.tolist() == [
        len(workspace.prompts.target(q.answers[0])) for q in questions
    ]


def question_score(workspace, question, doc):
    """log p(x|c) of one pair, the question read alone behind its document, in plain text."""
    document = workspace.documents.get([doc])[0]
    encode = workspace.prompts.joiner.encode
    # The tiny tokenizer has a token for each byte.
    before = encode(f"{document.text}\n\nQuestion: ")
    before = [*before] if (bos := workspace.lm.bos_id) is None else [bos, *before]
    target = encode(question.text)
    packed = workspace.prompts.pack([before], [target], target_length=len(target))
    batch = LMBatch(*map(jnp.asarray, packed))
    return float(workspace.lm.token_log_probs(workspace.lm.params, batch).sum()), len(target)


def test_one_reading_scores_question_and_answer(workspace, teacher, rng, tmp_path, monkeypatch):
    # The last has no answer: only its question is scored. Some share a document and first words.
    questions = [*workspace.questions["train"][:4]]
    questions[3] = dataclasses.replace(questions[3], answers=())
    found = some_candidates(rng, 4, documents=5)
    read = []
    fetched = batches_module._fetched
    monkeypatch.setattr(
        batches_module,
        "_fetched",
        lambda batch, found: read.extend(batch.rows) or fetched(batch, found),
    )
    cache = ResultCache(tmp_path / "s.jsonl", Score)
    scores = score_candidates(
        workspace, teacher, questions, found, cache, wanted=("answer", "question")
    )
    assert len(read) == found.mask.sum()  # each pair once
    for q, k in np.argwhere(found.mask):
        doc, question = int(found.doc_ids[q, k]), questions[q]
        expected, length = question_score(workspace, question, doc)
        assert scores.question_log_probs[q, k] == pytest.approx(expected, abs=1e-3)
        assert scores.question_lengths[q] == length
        if question.answers:
            expected = plain_score(workspace, question, doc)
            assert scores.log_probs[q, k] == pytest.approx(expected, abs=1e-3)
    assert scores.lengths[3] == 0 and (scores.log_probs[3] == 0).all()
    assert (scores.question_log_probs[~found.mask] == 0).all()


def test_a_missing_question_score_of_an_earlier_run_is_computed_when_it_is_wanted(
    workspace, teacher, rng, tmp_path
):
    questions = workspace.questions["train"][:4]
    found = some_candidates(rng, 4, documents=5)
    earlier = tmp_path / "s.jsonl"
    old = score_candidates(workspace, teacher, questions, found, ResultCache(earlier, Score))
    cache = ResultCache(tmp_path / "t.jsonl", Score, earlier=[earlier])
    score_candidates(workspace, teacher, questions, found, cache)
    assert not (tmp_path / "t.jsonl").exists()
    both = score_candidates(
        workspace, teacher, questions, found, cache, wanted=("answer", "question")
    )
    np.testing.assert_allclose(both.log_probs, old.log_probs, atol=1e-4)
    assert (both.question_log_probs[found.mask] < 0).all()


def test_known_scores_cost_no_forward_pass(workspace, teacher, rng, tmp_path, monkeypatch):
    questions = workspace.questions["train"]
    found = some_candidates(rng, len(questions), documents=20)
    first = score_candidates(
        workspace, teacher, questions, found, ResultCache(tmp_path / "s.jsonl", Score)
    )

    def forbidden(*_):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(batches_module, "_score", forbidden)
    for cache in (
        ResultCache(tmp_path / "s.jsonl", Score),
        ResultCache(tmp_path / "t.jsonl", Score, earlier=[tmp_path / "s.jsonl"]),
    ):
        again = score_candidates(workspace, teacher, questions, found, cache)
        np.testing.assert_array_equal(again.log_probs, first.log_probs)


def test_another_language_model_does_not_get_the_scores_of_this_one(
    workspace, teacher, rng, tmp_path, monkeypatch
):
    questions = workspace.questions["train"]
    found = some_candidates(rng, len(questions), documents=20)
    cache = ResultCache(tmp_path / "s.jsonl", Score)
    score_candidates(workspace, teacher, questions, found, cache)
    known = len(cache)
    score_candidates(workspace, teacher._replace(fingerprint="x"), questions, found, cache)
    assert len(cache) == 2 * known


def test_a_cut_scoring_continues_to_the_same_bits(workspace, teacher, rng, tmp_path):
    questions = workspace.questions["train"]
    found = some_candidates(rng, len(questions), documents=20)
    path = tmp_path / "s.jsonl"
    whole = score_candidates(workspace, teacher, questions, found, ResultCache(path, Score))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:11]) + lines[11][:9])
    again = score_candidates(workspace, teacher, questions, found, ResultCache(path, Score))
    np.testing.assert_array_equal(again.log_probs, whole.log_probs)


def test_the_target_is_the_softmax_of_score_plus_weighted_z():
    found = SearchResult(
        np.array([[3, 1, 2], [4, 5, -1]], np.int32),
        np.array([[3.0, 2.0, 1.0], [1.0, 0.5, -np.inf]], np.float32),
        np.array([[True, True, True], [True, True, False]]),
    )
    scores = TeacherScores(
        np.array([[-4.0, -2.0, -8.0], [-1.0, -3.0, 0.0]], np.float32),
        np.array([4, 2], np.int32),
        np.zeros((2, 3), np.float32),
        np.zeros(2, np.int32),
    )
    target = LsrTarget("log_prob_per_token", 0.5, TeacherWeights(answer=1.0, prior=0.2))
    parts = teacher_parts("log_prob_per_token", scores, found)
    log_q = target_log_probs(target, parts, found)
    for row, kept in ((0, [0, 1, 2]), (1, [0, 1])):
        s = found.scores[row, kept].astype(float)
        g = scores.log_probs[row, kept] / scores.lengths[row]
        logits = (g + 0.2 * (s - s.mean()) / s.std()) / 0.5
        np.testing.assert_allclose(
            log_q[row, kept], logits - np.log(np.exp(logits).sum()), rtol=1e-5
        )
    assert log_q[1, 2] == -np.inf
    without = target._replace(weights=TeacherWeights(answer=1.0))
    g = scores.log_probs[0] / 4 / 0.5
    np.testing.assert_allclose(
        target_log_probs(without, parts, found)[0], g - np.log(np.exp(g).sum()), rtol=1e-5
    )


def test_a_batch_holds_its_candidates_once_and_random_documents_beside(rng):
    found = some_candidates(rng, 6, documents=8)
    rows = np.array([0, 3, 5])
    targets = scored_targets(found, found.scores).take(rows)
    wanted = {int(d) for d in targets.doc_ids[targets.mask]}
    docs = _batch_docs(sorted(wanted), 12, 50, (0, 1), {})
    assert wanted == set(docs[: len(wanted)])
    assert len(set(docs)) == len(docs) == 12
    assert docs == _batch_docs(sorted(wanted), 12, 50, (0, 1), {})
    assert docs != _batch_docs(sorted(wanted), 12, 50, (0, 2), {})
    copies = dict.fromkeys(range(8, 50), 8)  # all other documents have one text
    assert set(_batch_docs(sorted(wanted), 12, 50, (0, 1), copies)) - set(range(8)) == {8}
    # No permutation of the corpus, which would be 8 TB here.
    docs = _batch_docs(sorted(wanted), 12, 10**12, (0, 1), {})
    assert len(set(docs)) == 12 and max(docs) > 10**9


def test_the_encoder_is_trained_on_the_best_documents_of_each_question(workspace, rng):
    found = some_candidates(rng, 9, documents=40)
    targets = scored_targets(found, found.scores)
    every, best = (
        _lsr_batches(
            workspace,
            RetrieverConfig(
                batch_size=4,
                candidates=found.mask.shape[1],
                documents=count,
                keyword_queries=0,
            ),
            0,
            lambda step, rows: targets.take(rows),
        )(0)
        for count in (0, 1)
    )
    assert every.doc_mask.shape == (4 * found.mask.shape[1],) and best.doc_mask.shape == (4,)
    # What is left of a target is a distribution again, highest where the whole one is.
    np.testing.assert_allclose(np.exp(best.target_log_probs).sum(axis=1), 1, rtol=1e-5)
    for row in range(4):
        tokens = [
            tuple(np.asarray(batch.docs.ids[int(np.argmax(batch.target_log_probs[row]))]))
            for batch in (every, best)
        ]
        size = min(map(len, tokens))
        assert tokens[0][:size] == tokens[1][:size]


def test_keyword_queries_find_passages_that_no_question_brought(workspace, rng):
    found = some_candidates(rng, 9, documents=40)
    targets = scored_targets(found, found.scores)

    def batch_of(**options):
        config = RetrieverConfig(batch_size=4, documents=1, **options)
        return _lsr_batches(workspace, config, 0, lambda step, rows: targets.take(rows))(0)

    plain, batch = batch_of(keyword_queries=0), batch_of()
    assert plain.target_log_probs.shape == (4, 4) and batch.target_log_probs.shape == (8, 8)
    np.testing.assert_array_equal(batch.candidate_mask[4:].sum(axis=1), 1)
    places = np.argmax(batch.candidate_mask[4:], axis=1)
    # Of the documents that fill the batch; those that the four questions brought come first.
    assert places.tolist() == [4, 5, 6, 7]
    np.testing.assert_array_equal(np.asarray(batch.target_log_probs)[4 + np.arange(4), places], 0)
    # Its words are those of its passage.
    for row, place in enumerate(places, 4):
        asked = set(
            np.asarray(batch.queries.ids[row])[np.asarray(batch.queries.mask[row])].tolist()
        )
        assert asked - set(np.asarray(batch.docs.ids[place]).tolist()) == set()


def test_keyword_queries_that_no_passage_is_left_for_are_padding(workspace, rng):
    found = some_candidates(rng, 9, documents=40)
    targets, size = scored_targets(found, found.scores), len(workspace.dataset.corpus)
    config = RetrieverConfig(batch_size=4, documents=1, keyword_queries=size)
    batch = _lsr_batches(workspace, config, 0, lambda step, rows: targets.take(rows))(0)
    asked = np.asarray(batch.candidate_mask).any(axis=1)
    assert len(asked) == 4 + size and asked[:4].all()
    assert 4 < asked.sum() < len(asked)
    np.testing.assert_array_equal(np.asarray(batch.queries.mask).any(axis=1), asked)


def test_a_keyword_query_is_as_long_as_the_questions_at_most(workspace, rng, monkeypatch):
    found = some_candidates(rng, 9, documents=40)
    targets, config = scored_targets(found, found.scores), RetrieverConfig(batch_size=4)
    batch_at = _lsr_batches(workspace, config, 0, lambda step, rows: targets.take(rows))
    usual = batch_at(0).queries.ids.shape
    monkeypatch.setattr(retriever_module.Keywords, "query", lambda *_: "a long word " * 30)
    assert batch_at(0).queries.ids.shape == usual


def test_keyword_queries_need_the_negatives_of_the_batch():
    assert RetrieverConfig(batch_size=4).keywords == 4
    assert (
        RetrieverConfig(negatives="none").keywords == RetrieverConfig(objective="dpr").keywords == 0
    )
    with pytest.raises(ValueError, match=r"keyword_queries=3 with negatives=none.*--retriever.neg"):
        RetrieverConfig(keyword_queries=3, negatives="none").check()


def test_a_question_is_no_negative_of_itself_in_the_batch(workspace, rng, monkeypatch):
    config = RetrieverConfig(batch_size=4, keyword_queries=0)
    found = some_candidates(rng, 9, documents=40)
    targets = scored_targets(found, found.scores)
    batch_at = _lsr_batches(workspace, config, 0, lambda step, rows: targets.take(rows))
    assert batch_at(0).excluded is None
    every = [frozenset(range(80))] * 9  # whatever is in the batch
    allowed = Findable(every, [{}] * 9)
    monkeypatch.setattr(retriever_module, "findable_in_training", lambda _: allowed)
    batch_at = _lsr_batches(workspace, config, 0, lambda step, rows: targets.take(rows))
    batch = batch_at(0)
    np.testing.assert_array_equal(batch.excluded, np.tile(batch.doc_mask, (4, 1)))


def request(workspace, row, docs):
    question = workspace.questions["train"][row]
    return Request(question, tuple(docs), tuple(-float(i) for i in range(len(docs))))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["concat", "ensemble"])
def test_an_answer_depends_on_its_prompt_only_and_is_computed_once(
    workspace, teacher, tmp_path, mode
):
    config = dataclasses.replace(
        workspace.config, evaluation=EvaluationConfig(mode=mode, documents=2, max_new_tokens=4)
    )
    workspace = dataclasses.replace(workspace, config=config)
    requests = [request(workspace, row, [row, row + 1]) for row in (0, 1, 2, 0)]
    cache = ResultCache(tmp_path / "a.jsonl", ScoredAnswer)
    answers = answer_requests(workspace, teacher, requests, cache)
    assert len(cache) == 3 and answers[0] == answers[3]
    alone = answer_requests(
        workspace, teacher, requests[1:2], ResultCache(tmp_path / "b.jsonl", ScoredAnswer)
    )
    assert alone[0].prediction == answers[1].prediction
    assert alone[0].nll == pytest.approx(answers[1].nll, abs=1e-4)


@pytest.mark.slow
def test_the_nll_of_an_answer_is_that_of_its_tokens(workspace, teacher, tmp_path):
    cache = ResultCache(tmp_path / "a.jsonl", ScoredAnswer)
    (answer,) = answer_requests(workspace, teacher, [request(workspace, 0, [7])], cache)
    question = workspace.questions["train"][0]
    length = len(workspace.prompts.target(question.answers[0]))
    expected = -plain_score(workspace, question, 7) / length
    assert answer.nll == pytest.approx(expected, abs=1e-4)


def test_the_ensemble_nll_is_the_marginal_over_documents(workspace, teacher, tmp_path):
    config = dataclasses.replace(
        workspace.config, evaluation=EvaluationConfig(mode="ensemble", documents=2)
    )
    workspace = dataclasses.replace(workspace, config=config)
    cache = ResultCache(tmp_path / "a.jsonl", ScoredAnswer)
    (answer,) = answer_requests(workspace, teacher, [request(workspace, 0, [7, 9])], cache)
    question = workspace.questions["train"][0]
    length = len(workspace.prompts.target(question.answers[0]))
    weights = np.exp([0.0, -1.0]) / np.exp([0.0, -1.0]).sum()
    probabilities = np.exp([plain_score(workspace, question, doc) / 1.0 for doc in (7, 9)])
    expected = -np.log(weights @ probabilities) / length
    assert answer.nll == pytest.approx(expected, abs=1e-3)


def test_a_packed_row_may_be_longer_than_any_context(workspace):
    # It holds the targets too: a prompt that fills the model still finds a bucket.
    longest = workspace.prompts.max_context_length + workspace.config.prompt.answer_tokens
    batches = batches_module.context_batches(
        workspace.prompts, [longest, 40], workspace.config.score_tokens
    )
    assert [(batch.rows.tolist(), batch.length) for batch in batches] == [([0], longest), ([1], 64)]


def test_few_questions_are_repeated_beside_keyword_queries():
    config = RetrieverConfig(batch_size=4, epochs=2)
    assert [stage_steps(config, count) for count in (3, 200)] == [20, 100]
    papers = dataclasses.replace(config, negatives="none")
    assert stage_steps(papers, 3) == 2
