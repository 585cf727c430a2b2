"""What the language model is trained on, and that packing changes nothing but the time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.data import Question
from ragjax.index import SearchResult
from ragjax.models import LMBatch
from ragjax.runs.options.dual import AdaptConfig, LMConfig
from ragjax.runs.options.shared import DataConfig
from ragjax.runs.tokens import training_prompts
from ragjax.runs.train.dev_nll import DEV_QUESTIONS, DevNll
from ragjax.runs.train.language_model import train_lm
from ragjax.runs.train.reading import Reading, lm_steps, readings
from ragjax.runs.trainable import LM_KEPT, split_lm
from ragjax.runs.workspace import open_workspace
from ragjax.training.checkpoint import Checkpointer
from ragjax.training.lm import answer_tokens, make_lm_loss
from ragjax.training.loop import StopFlag


@pytest.fixture(scope="module")
def workspace(tiny_inputs, tmp_path_factory):
    config = AdaptConfig(
        **tiny_inputs,
        data_options=DataConfig(train_questions=20),
        language_model=LMConfig(train_layers=1),
    )
    folder = tmp_path_factory.mktemp("workspace")
    return open_workspace(config, folder, stop=StopFlag(), log=lambda _: None)


@pytest.fixture
def found(workspace):
    """Twelve documents of each question: the relevant one is second, the last question lacks it."""
    truths, size = workspace.relevant_rows("train"), len(workspace.dataset.corpus)
    ids = np.zeros((len(truths), 12), np.int32)
    for row, truth in enumerate(truths):
        others = [doc for doc in range(size) if doc not in truth][row : row + 12]
        ids[row] = others
        if row + 1 < len(truths):
            ids[row, 1] = next(iter(truth))
    return SearchResult(ids, np.zeros(ids.shape, np.float32), np.ones(ids.shape, bool))


def relevant_column(workspace, found, reading):
    """Returns whether each document of a reading is relevant."""
    truth = workspace.relevant_rows("train")[reading.question]
    return [doc in truth for doc in reading.docs]


def test_together_reads_one_to_k_documents_in_any_order_and_some_prompts_without_use(
    workspace, found
):
    config = LMConfig(documents=3, distractors=0.5)
    many = [
        reading
        for seed in range(20)
        for reading in readings(with_seed(workspace, seed), config, found)
    ]
    counts = {len(reading.docs) for reading in many}
    assert counts == {0, 1, 2, 3}
    closed = sum(not reading.docs for reading in many) / len(many)
    assert 0.15 < closed < 0.35
    useless = [r for r in many if r.docs and not any(relevant_column(workspace, found, r))]
    useful = [r for r in many if any(relevant_column(workspace, found, r))]
    assert len(useless) > 0.1 * len(many) and len(useful) > 0.3 * len(many)
    places = {relevant_column(workspace, found, r).index(True) for r in useful if len(r.docs) == 3}
    assert places == {0, 1, 2}
    # p(x|c) is learnt behind one useful document only.
    asked = [reading for reading in many if reading.asked]
    assert asked and all(len(reading.docs) == 1 for reading in asked)
    last = len(found.mask) - 1
    assert all(relevant_column(workspace, found, r) == [True] for r in asked if r.question != last)
    assert readings(workspace, config, found) == readings(workspace, config, found)


def with_seed(workspace, seed):
    return dataclasses.replace(workspace, config=dataclasses.replace(workspace.config, seed=seed))


def test_apart_reads_each_document_alone(workspace, found):
    read = readings(workspace, LMConfig(read="apart", documents=2, question_weight=0), found)
    expected = [
        Reading(row, (int(doc),)) for row, docs in enumerate(found.doc_ids) for doc in docs[:2]
    ]
    assert read == expected


def test_a_question_without_answers_is_learnt_from_its_useful_document(workspace, found):
    questions = [Question(id=q.id, text=q.text) for q in workspace.questions["train"]]
    split = workspace.questions | {"train": tuple(questions)}
    bare = dataclasses.replace(workspace, questions=split)
    config = LMConfig(question_weight=0)
    read = readings(bare, config, found)
    # All but the last, whose document was not found.
    assert [reading.question for reading in read] == list(range(len(questions) - 1))
    assert all(reading.asked for reading in read)
    assert all(reading.docs == (found.doc_ids[reading.question, 1],) for reading in read)
    batch = lm_steps(bare, config, read).batch_at(0)
    weights, mask = np.asarray(batch.weights), np.asarray(batch.rows.target_mask)
    np.testing.assert_array_equal(weights, mask.astype(np.float32))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_packed_prompts_give_the_loss_of_each_prompt_alone(workspace, found, weight):
    config = LMConfig(batch_size=6, question_weight=weight)
    docs = found.doc_ids.tolist()
    read = [Reading(0, tuple(docs[0][:3])), Reading(1, ()), Reading(2, tuple(docs[2][:1]), True)]
    read += [Reading(row, tuple(docs[row][:2])) for row in (3, 4)]
    steps = lm_steps(workspace, config, read)
    lm = workspace.lm
    loss = make_lm_loss(
        lambda params, rows: lm.family.packed_token_log_probs(lm.config, params, rows)
    )
    losses, totals = [], []
    for step in range(steps.num_steps):
        batch = steps.batch_at(step)
        losses.append(loss(lm.params, None, batch, jax.random.key(0))[0])
        totals.append(answer_tokens(batch))
    found_sum = float(np.dot(losses, totals))
    builder = training_prompts(workspace.config.prompt, lm)
    expected, count = 0.0, 0.0
    for reading in read:
        question = workspace.questions["train"][reading.question]
        documents = workspace.documents.get(reading.docs)
        context, target = (
            builder.context(question.text, documents),
            builder.target(question.answers[0]),
        )
        expected += nll(lm, context, target)
        count += len(target)
        if weight and reading.asked:
            start = bytes_of(lm, context).rindex(question.text.encode())
            ids = context[start : start + len(question.text)]
            expected += weight * nll(lm, context[:start], ids)
            count += weight * len(ids)
    assert sum(totals) == pytest.approx(count)
    assert found_sum == pytest.approx(expected, rel=1e-4)


def bytes_of(lm, ids):
    """Of a tokenizer whose tokens are bytes."""
    return lm.tokenizer.decode(ids).encode()


def nll(lm, context, target, params=None):
    batch = LMBatch(
        *(jnp.asarray([row]) for row in (context, [True] * len(context))),
        *(jnp.asarray([row]) for row in (target, [True] * len(target))),
    )
    return -float(lm.token_log_probs(params or lm.params, batch).sum())


class TestDev:
    """Dev questions judge the language model."""

    @pytest.fixture
    def dev(self, workspace):
        truths, size = workspace.relevant_rows("dev"), len(workspace.dataset.corpus)
        ids = np.array(
            [[*truth, *(doc for doc in range(size) if doc not in truth)][:4] for truth in truths],
            np.int32,
        )
        return SearchResult(ids, np.zeros(ids.shape, np.float32), np.ones(ids.shape, bool))

    def test_the_figure_is_the_likelihood_behind_what_is_served_and_behind_what_is_useless(
        self, workspace, dev
    ):
        config, lm = LMConfig(train_layers=1), workspace.lm
        split = split_lm(config, lm.family, lm.params, seed=0)
        other = jax.tree.map(lambda leaf: 0.5 * leaf, split.trainable)
        judge = DevNll(workspace, config, split, dev)
        assert judge.count == DEV_QUESTIONS < len(workspace.questions["dev"])
        builder = training_prompts(workspace.config.prompt, lm)
        for trainable in (split.trainable, other):
            figure, params = judge(trainable), split.merged(trainable)
            for row in (0, DEV_QUESTIONS - 1):
                question, docs = workspace.questions["dev"][row], dev.doc_ids[row].tolist()
                target = builder.target(question.answers[0])
                expected = [
                    -nll(lm, builder.context(question.text, workspace.documents.get(read)), target,
                         params) / len(target)
                    for read in (docs[:3], docs[1:2])
                ]  # fmt: skip
                assert figure[row] == pytest.approx(np.mean(expected), rel=1e-4)

    def test_a_training_that_ruins_it_leaves_the_base_model(self, workspace, found, dev, tmp_path):
        lines = []
        ruined = dataclasses.replace(workspace, folder=tmp_path, log=lines.append)
        config = LMConfig(train_layers=1, learning_rate=30.0, batch_size=8, warmup_fraction=0)
        assert train_lm(ruined, config, found, dev) is None
        assert any("the base language model is kept" in line for line in lines)
        kept = Checkpointer(tmp_path / "checkpoints" / LM_KEPT)
        split = split_lm(config, workspace.lm.family, workspace.lm.params, seed=0)
        restored = kept.latest_good(split.trainable, field="params")
        assert restored.info["factor"] == 0
        jax.tree.map(np.testing.assert_array_equal, restored.state, split.trainable)

    def test_a_training_that_helps_is_kept_and_another_life_keeps_the_same(
        self, workspace, found, dev, tmp_path
    ):
        config = LMConfig(train_layers=2, learning_rate=3e-3, batch_size=8)
        helped = dataclasses.replace(workspace, folder=tmp_path)
        adapted = train_lm(helped, config, found, dev)
        assert adapted is not None
        again = train_lm(helped, config, found, dev)
        jax.tree.map(np.testing.assert_array_equal, adapted, again)
