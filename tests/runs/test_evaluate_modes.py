"""How answers are made in each mode, and what odd data do to an evaluation."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from programs import load_script

from ragjax.evaluation import compare
from ragjax.evaluation.systems import PAIRS
from ragjax.generation import Prompts, generate_greedy
from ragjax.index import SearchResult
from ragjax.models.inputs import LMBatch
from ragjax.runs.ask.decoding import DECODES
from ragjax.runs.compare.answers import Request, ScoredAnswer, answer_limits, answer_requests
from ragjax.runs.compare.measures import corpus_evidence, measure_answer, passages_read
from ragjax.runs.compare.systems import Documents, answer_cache, make_record
from ragjax.runs.evaluate import open_evaluation
from ragjax.runs.options.evaluate import EvaluateConfig
from ragjax.runs.options.modes import MODES
from ragjax.training.loop import StopFlag

APART = [name for name, mode in MODES.items() if mode.apart and not mode.fused]
# Passages that share no words, in several scripts; the last is far longer than any prompt.
PASSAGES = {
    "zh": ("", "中国的首都是北京，人口很多。"),
    "ar": ("مصر", "عاصمة مصر هي القاهرة وهي مدينة كبيرة."),
    "he": ("שפה", "שלום עולם, זוהי ירושלים."),
    "emoji": ("", "the 🦊 lives in 🏔️ and eats 🍎"),
    "en": ("fox", "the red fox likes berries"),
    "long": ("novel", "chapter " * 4000 + "the end is near"),
}
QUESTIONS = {
    "q-zh": ("中国的首都是什么？", ["北京"], "zh"),
    "q-ar": ("ما هي عاصمة مصر؟", ["القاهرة"], "ar"),
    "q-he": ("איפה?", ["ירושלים"], "he"),
    "q-emoji": ("where does the 🦊 live?", ["🏔️"], "emoji"),
    "q-nowhere": ("zyxw vuts?", ["an answer that stands nowhere"], "en"),
    "q-unanswered": ("what does the red fox like?", [], "en"),
    "q-long": ("what is near in the novel?", ["the end"], "long"),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of odd data."""
    folder = tmp_path_factory.mktemp("odd") / "odd"
    (folder / "qrels").mkdir(parents=True)
    passages = [{"_id": k, "title": t, "text": x} for k, (t, x) in PASSAGES.items()]
    questions = [
        {"_id": key, "text": text, "metadata": {"answers": answers} if answers else {}}
        for key, (text, answers, _) in QUESTIONS.items()
    ]
    for name, rows in (("corpus", passages), ("queries", questions)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    rows = [f"{key}\t{doc}\t1" for key, (_, _, doc) in QUESTIONS.items()]
    text = "\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n"
    (folder / "qrels" / "test.tsv").write_text(text)
    return folder


@pytest.fixture(scope="module")
def script():
    return load_script("experiments/evaluate.py")


@pytest.fixture(scope="module")
def opened(odd, tiny_inputs, tmp_path_factory):
    """Odd data and tiny models, opened for evaluation."""
    inputs = tiny_inputs | {"data": str(odd)}
    config = EvaluateConfig(**inputs, documents=2, max_new_tokens=3, document_tokens=24)
    folder = tmp_path_factory.mktemp("opened")
    return open_evaluation(config, folder, stop=StopFlag(), log=lambda _: None)


def in_mode(opened, folder, **evaluation):
    """Returns the workspace with other options of answering, in a folder of its own."""
    config = opened.workspace.config
    changed = dataclasses.replace(config.evaluation, **evaluation)
    return dataclasses.replace(
        opened.workspace, config=dataclasses.replace(config, evaluation=changed), folder=folder
    )


def answers_in(workspace, requests):
    teacher = workspace.base_lm()
    return answer_requests(workspace, teacher, requests, answer_cache(workspace.folder))


def test_ask_has_every_mode():
    assert set(DECODES) == set(MODES)


def requests_of(workspace, docs, scores):
    questions = [question for question in workspace.questions["test"] if question.answers]
    return [Request(question, docs, scores) for question in questions[:2]]


@pytest.mark.slow
def test_the_probability_of_an_answer_is_that_of_its_tokens(opened, tmp_path):
    workspace = in_mode(opened, tmp_path, mode="concat")
    requests = requests_of(workspace, (4, 1), (0.0, 0.0))
    limits = answer_limits(workspace.lm, 3)
    for request, answer in zip(requests, answers_in(workspace, requests), strict=True):
        documents = workspace.documents.get(request.docs)
        context = workspace.prompts.context(request.question.text, documents)
        ids, mask = jnp.array([context], jnp.int32), jnp.ones((1, len(context)), bool)
        params = workspace.lm.params
        result = generate_greedy(workspace.lm.decoder, params, Prompts(ids, mask), limits)
        length = int(result.lengths[0])
        said = result.ids[0, :length].tolist()
        assert workspace.lm.tokenizer.decode(said).strip() == answer.prediction
        # The likeliest way to end, if it ended: scored token by token with the plain model.
        total = 0.0
        for place in range(answer.num_tokens):
            choices = [said[place]] if place < length else list(limits.stop_ids)
            targets = jnp.array([[*said[:place], choice] for choice in choices], jnp.int32)
            rows = len(choices)
            log_probs = workspace.lm.token_log_probs(
                params,
                LMBatch(
                    jnp.tile(ids, (rows, 1)), jnp.tile(mask, (rows, 1)),
                    targets, jnp.ones(targets.shape, bool),
                ),
            )  # fmt: skip
            total += float(jnp.max(log_probs[:, -1]))
        assert answer.num_tokens == min(length + 1, 3)
        assert answer.log_prob == pytest.approx(total, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", APART)
def test_with_one_document_every_mode_is_the_plain_one(opened, tmp_path, mode):
    plain = in_mode(opened, tmp_path / "plain", mode="concat")
    requests = requests_of(plain, (4,), (1.5,))
    other = in_mode(opened, tmp_path / mode, mode=mode)
    for one, two in zip(answers_in(plain, requests), answers_in(other, requests), strict=True):
        assert one.prediction == two.prediction and one.num_tokens == two.num_tokens
        assert one.nll == pytest.approx(two.nll, abs=1e-4)
        assert one.log_prob == pytest.approx(two.log_prob, abs=1e-3)


@pytest.mark.slow
def test_two_documents_are_weighed_by_their_scores(opened, tmp_path):
    found = {}
    for mode in APART:
        workspace = in_mode(opened, tmp_path / mode, mode=mode)
        even = requests_of(workspace, (4, 1), (0.0, 0.0))
        sure = requests_of(workspace, (4, 1), (0.0, -200.0))
        found[mode] = answers_in(workspace, [*even, *sure])
    alone = in_mode(opened, tmp_path / "alone", mode="ensemble")
    expected = answers_in(alone, requests_of(alone, (4,), (0.0,)))
    for mode, answers in found.items():
        for answer, plain in zip(answers[2:], expected, strict=True):
            # What the other document proposed may be likelier under this one than its own greedy
            # answer, which is found where each is scored under both.
            if mode == "rag_sequence_thorough":
                assert answer.log_prob >= plain.log_prob - 1e-3
            else:
                assert answer.prediction == plain.prediction, mode
            assert answer.nll == pytest.approx(plain.nll, abs=1e-3)
        assert [a.nll for a in answers[:2]] != [a.nll for a in answers[2:]]
    # One beam is the ensemble; its likelihood is the token form, the others' the sequence form.
    for one, two in zip(found["ensemble"], found["rag_token"], strict=True):
        assert one.prediction == two.prediction
        assert one.log_prob == pytest.approx(two.log_prob, abs=1e-3)
    assert [a.nll for a in found["rag_token"][:2]] != [a.nll for a in found["ensemble"][:2]]
    for fast, thorough in zip(
        found["rag_sequence_fast"], found["rag_sequence_thorough"], strict=True
    ):
        assert fast.log_prob <= thorough.log_prob + 1e-4
        assert fast.nll == pytest.approx(thorough.nll)


@pytest.mark.slow
def test_more_beams_are_another_answer_in_the_cache(opened, tmp_path):
    one = in_mode(opened, tmp_path, mode="rag_token", beams=1)
    three = in_mode(opened, tmp_path, mode="rag_token", beams=3)
    requests = requests_of(one, (4, 1), (0.3, 0.0))[:1]
    (greedy,) = answers_in(one, requests)
    (best,) = answers_in(three, requests)
    assert best.log_prob / best.num_tokens >= greedy.log_prob / greedy.num_tokens - 1e-4
    assert len(answer_cache(one.folder)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ("concat", "ensemble"))
def test_nothing_retrieved_is_answered_as_without_documents(opened, tmp_path, mode):
    workspace = in_mode(opened, tmp_path, mode=mode)
    with_docs, without = requests_of(workspace, (4, 1), (0.0, 0.0))
    without = without._replace(docs=(), doc_scores=())
    # A request without documents comes first, so nothing may follow from the first one.
    mixed = answers_in(workspace, [without, with_docs])
    apart = in_mode(opened, tmp_path / "apart", mode=mode)
    assert mixed == [answers_in(apart, [without])[0], answers_in(apart, [with_docs])[0]]


def test_support_counts_the_part_that_was_read(opened, tmp_path):
    workspace = in_mode(opened, tmp_path, mode="concat")
    question = workspace.questions["test"][0]
    rows = [workspace.dataset.corpus.row_of(id) for id in ("en", "long")]
    request = Request(question, tuple(rows), (0.0, 0.0))
    fox, novel = passages_read(workspace, request)
    assert fox.startswith("fox") and "chapter" not in fox
    # Of the novel the first 24 tokens were read, not its end.
    assert "near" not in novel
    measure = measure_answer(workspace, 0.8, {question.id: rows[:1]})
    said = ScoredAnswer("novel", None, -1.0, 2)
    metrics = measure(request, said)
    assert metrics["supported"] == 1.0
    assert metrics["confidence"] == pytest.approx(math.exp(-1.0))
    assert metrics["confidence_per_token"] == pytest.approx(math.exp(-0.5))
    assert measure(request, ScoredAnswer("near", None, -1.0, 2))["supported"] == 0.0
    closed = measure(Request(question, (), ()), said)
    assert "supported" not in closed and "confidence" in closed
    # By the evidence of the corpus, whatever was read.
    assert metrics["corpus_supported"] == closed["corpus_supported"] == 0.0
    assert closed["corpus_hallucination"] == 1.0 and metrics["hallucination"] == 0.0
    found = measure(Request(question, (), ()), ScoredAnswer("likes berries", None, -1.0, 2))
    assert found["corpus_supported"] == found["corpus_supported_if_wrong"] == 1.0
    assert found["corpus_hallucination"] == 0.0
    empty = measure(request, ScoredAnswer("", None, -1.0, 1))
    assert empty["empty_answer"] == 1.0 and math.isnan(empty["supported"])
    assert math.isnan(empty["corpus_hallucination"])


def test_the_evidence_is_all_that_was_found_and_what_is_relevant(opened):
    workspace = opened.workspace
    questions, size = workspace.questions["test"], len(PASSAGES)
    first = np.tile(np.array([[3, 1, 0]], np.int32), (len(questions), 1))
    second = np.tile(np.array([[1, 4, -1]], np.int32), (len(questions), 1))
    documents = {
        name: Documents(SearchResult(ids, np.where(ids >= 0, 1.0, -np.inf), ids >= 0), ids)
        for name, ids in (("bm25", first), ("after", second))
    }
    evidence = corpus_evidence(workspace, documents, "test")
    assert list(evidence) == [question.id for question in questions]
    for question in questions:
        gold = workspace.dataset.corpus.row_of(QUESTIONS[question.id][2])
        expected = [gold, *(row for row in (3, 1, 0, 4) if row != gold)]
        assert list(evidence[question.id]) == expected and max(expected) < size


def test_fewer_hallucinations_than_the_model_alone_can_be_shown(opened):
    """The same answers measured for two systems, of which one read nothing."""
    workspace = opened.workspace
    questions = [question for question in workspace.questions["test"] if question.answers]
    rows = {q.id: (workspace.dataset.corpus.row_of(QUESTIONS[q.id][2]),) for q in questions}
    measure = measure_answer(workspace, 0.8, rows)
    records = {
        name: [
            make_record(
                question,
                name,
                metrics=measure(
                    Request(question, rows[question.id][:read], (0.0,) * read),
                    ScoredAnswer(said(question), None, -1.0, 1),
                ),
            )
            for question in questions
        ]
        for name, read, said in (
            (
                "before",
                1,
                lambda question: workspace.dataset.corpus[rows[question.id][0]].text[-9:],
            ),
            ("closed_book", 0, lambda question: "Atlantis"),
        )
    }
    names = ("hallucination", "corpus_hallucination")
    compared = compare(records, pairs=(("before", "closed_book"),), metrics=names, num_resamples=50)
    assert [one.metric for one in compared] == ["corpus_hallucination"]
    assert compared[0].difference.value < 0 and compared[0].difference.n == len(questions)
    assert "corpus_hallucination" in PAIRS["before", "closed_book"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ("concat", "ensemble"))
def test_odd_data_are_evaluated(script, odd, tiny_inputs, tmp_path, mode, capsys):
    """More documents asked for than there are, any script, no word in common, no answer."""
    output = tmp_path / "o"
    inputs = tiny_inputs | {"data": str(odd), "output": str(output)}
    flags = [
        *(f"--{k}={v}" for k, v in inputs.items()), f"--mode={mode}", "--documents=9",
        "--max_new_tokens=2", "--resamples=10", "--document_tokens=12", "--distractors=3",
    ]  # fmt: skip
    assert script.main(flags) == 0, capsys.readouterr().err
    lines = {
        row["id"]: row
        for row in map(json.loads, (output / "predictions.jsonl").read_text("utf-8").splitlines())
    }
    assert set(lines) == set(QUESTIONS)
    nowhere = lines["q-nowhere"]["systems"]
    assert nowhere["bm25"]["doc_ids"] == []
    assert nowhere["bm25"]["prediction"] == nowhere["closed_book"]["prediction"]
    assert nowhere["bm25"]["metrics"]["recall@20"] == 0.0
    assert all(system["metrics"].get("answer@5", 0.0) == 0.0 for system in nowhere.values())
    unanswered = lines["q-unanswered"]["systems"]
    assert unanswered["bm25"]["prediction"] is None
    assert set(unanswered["before"]["metrics"]) >= {"recall@5"}
    assert "f1" not in unanswered["before"]["metrics"]
    for line in lines.values():
        assert len(line["systems"]["before"]["doc_ids"]) == len(PASSAGES)
    # Words of any script are found, and so are their passages.
    assert lines["q-ar"]["systems"]["bm25"]["doc_ids"][0] == "ar"
    assert lines["q-emoji"]["answers"] == ["🏔️"]
    robustness = json.loads((output / "robustness.json").read_text())
    assert robustness["n"] == 6
    # Read apart, passages have no order.
    assert ("gold_last" in robustness["conditions"]) == (mode == "concat")
    assert "🏔️" in (output / "predictions.jsonl").read_text("utf-8")


@pytest.mark.slow
def test_questions_without_answers_measure_retrieval_alone(
    script, odd, tiny_inputs, tmp_path, capsys
):
    (tmp_path / "data" / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "qrels/test.tsv"):
        (tmp_path / "data" / name).write_bytes((odd / name).read_bytes())
    rows = [json.dumps({"_id": k, "text": text}) + "\n" for k, (text, _, _) in QUESTIONS.items()]
    (tmp_path / "data" / "queries.jsonl").write_text("".join(rows))
    output = tmp_path / "o"
    inputs = tiny_inputs | {"data": str(tmp_path / "data"), "output": str(output)}
    assert script.main([*(f"--{k}={v}" for k, v in inputs.items()), "--resamples=10"]) == 0
    assert "no question of test has an answer" in capsys.readouterr().out
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics) == ["bm25", "before", "hybrid_before"]
    assert "f1" not in metrics["before"] and "recall@5" in metrics["before"]
    assert json.loads((output / "calibration.json").read_text()) == {}
    assert not (output / "robustness.json").exists()


def test_more_documents_than_a_prompt_has_room_for_is_one_sentence(
    script, odd, tiny_inputs, tmp_path, capsys
):
    folder = tmp_path / "many"
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": f"d{n}", "text": f"word{n} " * 3} for n in range(600)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    question = {"_id": "q", "text": "which word?", "metadata": {"answers": ["word1"]}}
    (folder / "queries.jsonl").write_text(json.dumps(question) + "\n")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td1\t1\n")
    inputs = tiny_inputs | {"data": str(folder), "output": str(tmp_path / "o")}
    code = script.main([*(f"--{k}={v}" for k, v in inputs.items()), "--documents=500"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and "question 'q', 'which word?', has no room for 502 documents" in error
    assert np.char.count(error, "lower --documents") == 1
