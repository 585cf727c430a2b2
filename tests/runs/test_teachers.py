"""Which teachers set the target: flags, files of scores, and the choice among mixtures."""

import dataclasses
import json

import numpy as np
import pytest

from ragjax.data import PromptTemplate, Question, passage_text
from ragjax.index import SearchResult
from ragjax.models.testing import write_tiny_cross_encoder
from ragjax.runs import LMTeacher
from ragjax.runs.indexes import build_bm25, build_towers
from ragjax.runs.options.dual import AdaptConfig, LMConfig, RetrieverConfig
from ragjax.runs.options.shared import DataConfig
from ragjax.runs.options.teachers import TeacherWeights, parse_teachers
from ragjax.runs.teachers import choice as choice_module
from ragjax.runs.teachers.choice import choose_teacher, open_scores, teaching_lm
from ragjax.runs.teachers.reading import TeacherScores, score_candidates
from ragjax.runs.teachers.target import mixed, parts_wanted, teacher_parts, z_scores
from ragjax.runs.workspace import FrozenLM, open_workspace, tower_params
from ragjax.training.loop import StopFlag
from ragjax.training.score_cache import ResultCache, Score


@pytest.fixture(scope="module")
def opened(tiny_inputs, tmp_path_factory):
    """A workspace, and the retriever that training starts from."""
    config = AdaptConfig(
        **tiny_inputs,
        data_options=DataConfig(train_questions=6),
        language_model=LMConfig(train_layers=1),
    )
    folder = tmp_path_factory.mktemp("teachers")
    workspace = open_workspace(config, folder, stop=StopFlag(), log=lambda _: None)
    bm25 = build_bm25(workspace)
    return workspace, build_towers(workspace, bm25, tower_params(workspace), 0)


@pytest.fixture
def workspace(opened, tmp_path):
    """The workspace in a folder of its own, which keeps what is shown."""
    told = []
    changed = dataclasses.replace(opened[0], folder=tmp_path, log=told.append)
    return dataclasses.replace(changed, notes=told)


def candidates(*rows):
    ids = np.array(rows, np.int32)
    scores = np.tile(np.arange(ids.shape[1], 0, -1, dtype=np.float32), (len(ids), 1))
    return SearchResult(ids, scores, ids >= 0)


def test_teachers_are_names_with_weights():
    assert parse_teachers(["auto"]) is None
    weights = parse_teachers(["answer=1", "question=0.5", "prior"])
    assert weights == TeacherWeights(answer=1.0, question=0.5, prior=1.0)
    assert str(weights) == "answer=1 question=0.5 prior=1"
    assert RetrieverConfig().weights is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["anwser=1"], "did you mean answer"),
        (["x=1"], "known: answer, question, prior, file, reranker"),
        (["answer=1", "answer=2"], "names answer twice"),
        (["answer=much"], "'much' is no number"),
        (["answer=0"], "above 0"),
        (["prior=nan"], "above 0"),
        ([], "names none"),
        (["auto", "prior=1"], "no teacher 'auto'"),
    ],
)
def test_teachers_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RetrieverConfig(teachers=tuple(values))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "prob"}, "--retriever.teachers answer=1"),
        ({"teachers": ("file=1",)}, "scores_file=''"),
        ({"teachers": ("answer=1",), "scores_file": "x"}, "both scores_file and file=1"),
        ({"objective": "dpr", "scores_file": "x"}, "objective=dpr"),
        ({"teachers": ("reranker=1",)}, "both reranker and reranker=1"),
    ],
)
def test_options_at_odds_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RetrieverConfig(**options)


def test_parts_are_nats_per_token_and_z_scores_and_a_question_stands_in_for_its_answer():
    scores = TeacherScores(
        np.array([[-4.0, -2.0, -8.0], [0.0, 0.0, 0.0]], np.float32), np.array([4, 0], np.int32),
        np.array([[-9.0, -3.0, -6.0], [-4.0, -2.0, -8.0]], np.float32), np.array([3, 2], np.int32),
    )  # fmt: skip
    found = candidates([5, 6, 7], [1, 2, -1])
    from_file = np.array([[np.nan, 1.0, 3.0], [np.nan] * 3])
    parts = teacher_parts("log_prob_per_token", scores, found, {"file": from_file})
    np.testing.assert_allclose(parts["answer"][0], [-1, -0.5, -2])
    np.testing.assert_allclose(parts["answer"][1], parts["question"][1])
    np.testing.assert_allclose(parts["question"][0], [-3, -1, -2])
    np.testing.assert_allclose(parts["prior"][0], [1.5**0.5, 0, -(1.5**0.5)], rtol=1e-6)
    np.testing.assert_allclose(parts["prior"][1], [1, -1, 0])
    np.testing.assert_allclose(parts["file"], [[0, -1, 1], [0, 0, 0]])
    g = mixed(TeacherWeights(answer=1.0, question=2.0, file=3.0), parts)
    np.testing.assert_allclose(g[0], [-1 - 6, -0.5 - 2 - 3, -2 - 4 + 3], rtol=1e-6)


def test_only_what_teaches_is_read():
    asked = [Question(id="a", text="x", answers=("y",)), Question(id="b", text="z")]
    assert parts_wanted(TeacherWeights(answer=1.0), asked[:1]) == ("answer",)
    assert parts_wanted(TeacherWeights(answer=1.0), asked) == ("answer", "question")
    assert parts_wanted(TeacherWeights(answer=1.0), asked[1:]) == ("question",)
    assert parts_wanted(TeacherWeights(question=1.0, prior=1.0), asked) == ("question",)
    assert parts_wanted(TeacherWeights(prior=1.0, file=1.0), asked) == ()


def test_the_language_model_that_teaches_is_the_one_that_is_asked_for():
    base, adapted = FrozenLM(None, "base"), FrozenLM(None, "adapted")
    for option, expected in (("base", base), ("adapted", adapted)):
        config = RetrieverConfig(teaching_lm=option)
        assert teaching_lm(config, base, adapted) == (option, expected)
        assert teaching_lm(config, base, base) == ("base", base)


def write_scores(folder, *lines):
    path = folder / "scores.jsonl"
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    return path


def scored(question, passage, score, names=("query-id", "corpus-id")):
    return {names[0]: question, names[1]: passage, "score": score}


GOOD = scored("q0", "red-cat", 1.5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (scored("q0", "red-cta", 1), "2: there is no passage 'red-cta'"),
        (scored("q999", "red-cat", 1), "2: there is no question 'q999'; did you mean"),
        (GOOD, "2: .* have a score in line 1 already"),
        ('{"query-id": "q0", "corpus-id": "red-dog", "score": NaN}\n', "2: .*NaN"),
        (scored("q0", "red-dog", None), "2: 'score' is None, which is no finite number; expected"),
        (scored("q0", "red-dog", True), "2: 'score' is True"),
        ({"query-id": "q0", "score": 1}, "2: needs one of the fields 'corpus-id' and 'passage'"),
        ("{\n", "2: broken JSON"),
    ],
)
def test_a_bad_line_of_a_file_of_scores_is_named(workspace, tmp_path, bad, message):
    path = write_scores(tmp_path, GOOD, bad)
    with pytest.raises(ValueError, match=message):
        open_scores(workspace, RetrieverConfig(scores_file=str(path)))
    with pytest.raises(ValueError, match="no such file"):
        open_scores(workspace, RetrieverConfig(scores_file=str(tmp_path / "other")))


def test_a_file_of_scores_teaches_and_says_what_it_covers(workspace, opened, tmp_path, monkeypatch):
    monkeypatch.setattr(choice_module, "score_candidates", None)  # no language model reads anything
    train = workspace.questions["train"]
    row = workspace.dataset.corpus.row_of
    found = candidates(*([[row("red-cat"), row("red-dog"), row("red-owl")]] * len(train)))
    path = write_scores(
        tmp_path,
        scored(train[0].id, "red-owl", 5, names=("question", "passage")),
        scored(train[0].id, "red-cat", 1),
        scored(train[1].id, "red-dog", 1),
    )
    config = RetrieverConfig(scores_file=str(path))
    cache = ResultCache(tmp_path / "s.jsonl", Score)
    teacher = choose_teacher(workspace, config, ("base", workspace.base_lm()), cache, found)
    assert teacher.target.weights == TeacherWeights(prior=0.3, file=0.7)
    needed = 3 * len(train)
    assert any(f"scores 3 of {needed} pairs" in line for line in workspace.notes)
    missing = (tmp_path / "scores" / "missing.jsonl").read_text().splitlines()
    assert len(missing) == needed - 3
    assert json.loads(missing[0]) == {"query-id": train[0].id, "corpus-id": "red-dog"}
    target = np.exp(teacher.log_probs(workspace, train, found, cache))
    assert target[0].argmax() == 2 and target[0, 1] > target[0, 2] * np.exp(-3)
    np.testing.assert_allclose(target[2:], np.tile(target[2], (len(train) - 2, 1)))  # the prior
    told = json.loads((tmp_path / "teachers.json").read_text())
    assert told["weights"] == {"prior": 0.3, "file": 0.7} and told["why"] == "as the options say"


def test_a_file_that_covers_nothing_is_refused(workspace, opened, tmp_path):
    path = write_scores(tmp_path, scored("q79", "red-cat", 1))
    train = workspace.questions["train"]
    config = RetrieverConfig(scores_file=str(path))
    cache = ResultCache(tmp_path / "s.jsonl", Score)
    found = candidates(*([[3, 4]] * len(train)))
    with pytest.raises(ValueError, match=r"scores none of the 12 pairs.*missing.jsonl"):
        choose_teacher(workspace, config, ("base", workspace.base_lm()), cache, found)


def test_a_cross_encoder_teaches_and_no_language_model_reads(
    workspace, opened, tmp_path, monkeypatch
):
    monkeypatch.setattr(choice_module, "score_candidates", None)
    source = str(write_tiny_cross_encoder(tmp_path / "model", 1))
    train = workspace.questions["train"]
    found = candidates(*([[0, 1, 2]] * len(train)))
    config = RetrieverConfig(reranker=source)
    cache, lm = ResultCache(tmp_path / "s.jsonl", Score), ("base", workspace.base_lm())
    teacher = choose_teacher(workspace, config, lm, cache, found)
    assert teacher.target.weights == TeacherWeights(prior=0.3, reranker=0.7)
    target = teacher.log_probs(workspace, train, found, cache, score=None)
    logits = teacher.reranker.afresh(train, found)
    g = 0.7 * z_scores(logits, found.mask) + 0.3 * z_scores(found.scores, found.mask)
    expected = g / 0.5 - np.log(np.exp(g / 0.5).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(target, expected, rtol=1e-4)
    assert len({tuple(row) for row in np.argsort(logits).tolist()}) > 1 or np.ptp(logits) > 0


def oracle(relevant_part):
    """Scores in which one part alone tells the relevant documents."""

    def score_candidates(workspace, lm, questions, found, cache, *, wanted):
        relevant = workspace.relevant_rows("train")
        good = np.stack(
            [np.isin(ids, list(own)) for ids, own in zip(found.doc_ids, relevant, strict=True)]
        )
        noise = np.random.default_rng(0).normal(size=good.shape).astype(np.float32)
        ones = np.ones(len(questions), np.int32)
        parts = {"answer": noise, "question": noise} | {relevant_part: np.float32(9) * good}
        return TeacherScores(parts["answer"], ones, parts["question"], ones)

    return score_candidates


@pytest.fixture
def many(workspace):
    """The workspace with as many training questions as a choice needs, and their candidates."""
    every = (*workspace.questions["train"], *workspace.questions["dev"])
    chosen = dataclasses.replace(workspace, questions={**workspace.questions, "train": every})
    size = len(workspace.dataset.corpus)
    return chosen, candidates(*[list(range(size))] * len(every))


@pytest.mark.parametrize(("part", "other"), [("answer", "question"), ("question", "answer")])
def test_the_mixture_is_the_one_that_ranks_training_passages_best(
    many, tmp_path, monkeypatch, part, other
):
    monkeypatch.setattr(choice_module, "score_candidates", oracle(part))
    grid = (TeacherWeights(**{other: 1.0}), TeacherWeights(**{part: 1.0, "prior": 0.001}))
    monkeypatch.setattr(choice_module, "_WITH_ANSWERS", grid)
    (workspace, found), lm = many, FrozenLM(None, "one")
    cache = ResultCache(tmp_path / "s.jsonl", Score)
    teacher = choose_teacher(workspace, RetrieverConfig(), ("adapted", lm), cache, found)
    assert teacher.target.weights == grid[1] and teacher.lm == lm
    told = json.loads((tmp_path / "teachers.json").read_text())
    assert told["language_model"] == "adapted" and told["questions"] >= 20
    assert told["alone"]["adapted"][part] == 1.0 > told["alone"]["adapted"][other]
    assert [one["mrr"] for one in told["mixtures"]].index(1.0) == 1
    assert "prior" in told["alone"]["adapted"] and "file" not in told["alone"]["adapted"]


def test_a_question_whose_candidates_are_all_alike_does_not_judge(many, tmp_path, monkeypatch):
    monkeypatch.setattr(choice_module, "score_candidates", oracle("answer"))
    workspace, found = many
    mask, relevant = np.array(found.mask), workspace.relevant_rows("train")
    mask[0] = np.isin(found.doc_ids[0], list(relevant[0]))  # nothing else
    mask[1] = ~np.isin(found.doc_ids[1], list(relevant[1]))  # none
    cache = ResultCache(tmp_path / "s.jsonl", Score)
    lm = ("base", workspace.base_lm())
    choose_teacher(workspace, RetrieverConfig(), lm, cache, found._replace(mask=mask))
    told = json.loads((tmp_path / "teachers.json").read_text())
    assert told["questions"] == len(relevant) - 2


def test_defaults_teach_where_too_little_is_known(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(choice_module, "score_candidates", None)  # nothing is read for a choice
    train = workspace.questions["train"]
    cache, lm = ResultCache(tmp_path / "s.jsonl", Score), ("base", workspace.base_lm())
    for found in (candidates(*([[0, 1, 2]] * len(train))), None):
        teacher = choose_teacher(workspace, RetrieverConfig(), lm, cache, found)
        assert teacher.target.weights == TeacherWeights(answer=1.0, question=1.0, prior=0.3)
        told = json.loads((tmp_path / "teachers.json").read_text())
        assert "are the fewest that choose" in told["why"]
    bare = [dataclasses.replace(question, answers=()) for question in train]
    none = dataclasses.replace(workspace, questions={"train": tuple(bare)})
    teacher = choose_teacher(none, RetrieverConfig(), lm, cache)
    assert teacher.target.weights == TeacherWeights(question=1.5, prior=0.5)


def test_a_forecast_counts_what_the_language_model_reads(workspace):
    asked = len(workspace.questions["train"])
    for options, expected in (
        ({}, asked * 6),
        ({"rounds": 3}, 3 * asked * 6),
        ({"teachers": ("question=1",)}, asked * 6),
        ({"teachers": ("prior=1",)}, 0),
        ({"scores_file": "x"}, 0),
        ({"reranker": "x"}, 0),
        ({"objective": "dpr"}, 0),
    ):
        config = RetrieverConfig(candidates=6, **options)
        assert (
            choice_module.count_pairs(workspace, config, len(workspace.questions["train"]))
            == expected
        )


def test_a_teacher_takes_plain_strings(workspace, tmp_path):
    lm, corpus = workspace.lm, workspace.dataset.corpus
    question = workspace.questions["train"][0]
    found = candidates([0, 1, 2])
    cache = ResultCache(tmp_path / "s.jsonl", Score)
    scores = score_candidates(
        workspace, workspace.base_lm(), [question], found, cache, wanted=("answer", "question")
    )
    parts = teacher_parts("log_prob_per_token", scores, found)
    texts = [passage_text(corpus[row]) for row in range(3)]
    for teacher, weights in (
        (LMTeacher(lm=lm, question=0.5), TeacherWeights(answer=1.0, question=0.5)),
        (LMTeacher(lm=lm, question=0.0), TeacherWeights(answer=1.0)),
    ):
        g = teacher.scores(question.text, question.answers[0], texts)
        assert g.shape == (3,) and g.dtype == np.float32
        np.testing.assert_allclose(g, mixed(weights, parts)[0], atol=1e-4)
    alone = LMTeacher(lm=lm).scores(question.text, None, texts)
    np.testing.assert_allclose(alone, 2 * parts["question"][0], atol=1e-4)
    assert LMTeacher(lm=lm).scores(question.text, None, []).shape == (0,)


def test_a_template_that_asks_first_has_the_question_read_behind_the_passage_again(workspace):
    lm, texts = workspace.lm, ["a red cat", "a blue owl"]
    first = PromptTemplate(
        context="{question}\n{document}\nAnswer:", closed_book="{question}\nAnswer:"
    )
    usual, asks_first = LMTeacher(lm=lm), LMTeacher(lm=lm, template=first)
    for weights in ({"answer": 0.0}, {"question": 0.0}):
        a, b = (
            dataclasses.replace(teacher, **weights).scores("which cat?", "red", texts)
            for teacher in (usual, asks_first)
        )
        assert np.allclose(a, b, atol=1e-4) is (weights == {"answer": 0.0})


@pytest.mark.parametrize(
    "options", [{"score": "x"}, {"answer": -1.0}, {"answer": 0.0, "question": 0.0}]
)
def test_a_teacher_that_says_nothing_is_refused(options):
    with pytest.raises(ValueError, match="must be"):
        LMTeacher(lm=None, **options)
