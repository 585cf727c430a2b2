"""A whole run, and its teacher, with an encoder-decoder as the language model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import load_script
from test_teacher import plain_score, some_candidates

from ragjax.models import LMBatch
from ragjax.models.testing import write_tiny_language_model
from ragjax.runs.options.dual import AdaptConfig, LMConfig
from ragjax.runs.options.shared import DataConfig
from ragjax.runs.teachers.reading import score_candidates
from ragjax.runs.tokens import answer_end_id, training_prompts
from ragjax.runs.train.reading import Reading, lm_steps, make_prompt
from ragjax.runs.workspace import open_workspace
from ragjax.training.lm import answer_tokens, make_lm_loss
from ragjax.training.loop import StopFlag
from ragjax.training.score_cache import ResultCache, Score


@pytest.fixture(scope="module")
def t5_inputs(tiny_inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    write_tiny_language_model(folder, family="t5")
    return tiny_inputs | {"lm": str(folder)}


@pytest.mark.slow
def test_unpacked_scores_are_those_of_each_pair_alone(t5_inputs, tmp_path, rng):
    config = AdaptConfig(
        **t5_inputs,
        data_options=DataConfig(train_questions=5),
        language_model=LMConfig(train_layers=1),
        score_tokens=1024,
    )
    workspace = open_workspace(config, tmp_path, stop=StopFlag(), log=lambda _: None)
    assert answer_end_id(workspace.lm) == 257
    questions = workspace.questions["train"]
    found = some_candidates(rng, len(questions), documents=9)
    teacher = workspace.base_lm()
    cache = ResultCache(tmp_path / "s.jsonl", Score)
    scores = score_candidates(workspace, teacher, questions, found, cache)
    for q, k in np.argwhere(found.mask):
        expected = plain_score(workspace, questions[q], int(found.doc_ids[q, k]))
        assert scores.log_probs[q, k] == pytest.approx(expected, abs=1e-3)
    assert (scores.log_probs[~found.mask] == 0).all()


@pytest.mark.slow
def test_rows_of_two_lengths_give_the_loss_of_each_prompt_alone(t5_inputs, tmp_path):
    config = AdaptConfig(
        **t5_inputs,
        data_options=DataConfig(train_questions=20),
        language_model=LMConfig(train_layers=1, batch_size=4),
    )
    workspace = open_workspace(config, tmp_path, stop=StopFlag(), log=lambda _: None)
    lm, questions = workspace.lm, workspace.questions["train"]
    read = [Reading(row, tuple(range(5 * (row % 2)))) for row in range(len(questions))]
    steps = lm_steps(workspace, config.language_model, read)
    loss, traced = make_lm_loss(lm.token_log_probs), []

    @jax.jit
    def run(params, batch):
        traced.append(batch.context_ids.shape)
        return loss(params, None, batch, jax.random.key(0))[0], answer_tokens(batch)

    found = [run(lm.params, steps.batch_at(step)) for step in range(steps.num_steps)]
    assert steps.num_steps == 5 and len(traced) == 2 and {rows for rows, _ in traced} == {4}
    builder = training_prompts(config.prompt, lm)
    expected = tokens = 0.0
    for one in read:
        prompt = make_prompt(workspace, builder, questions[one.question], one.docs)
        packed = builder.pack([prompt.context], [prompt.target], target_length=len(prompt.target))
        expected -= float(lm.token_log_probs(lm.params, LMBatch(*map(jnp.asarray, packed))).sum())
        tokens += len(prompt.target)
    assert sum(int(count) for _, count in found) == tokens
    assert sum(float(nll) * int(count) for nll, count in found) == pytest.approx(expected, rel=1e-4)
    again = lm_steps(workspace, config.language_model, read)
    jax.tree.map(np.testing.assert_array_equal, again.batch_at(3), steps.batch_at(3))


@pytest.mark.slow
def test_an_encoder_reads_the_document_and_a_decoder_the_question(t5_inputs, tmp_path, rng):
    config = AdaptConfig(
        **t5_inputs,
        data_options=DataConfig(train_questions=3),
        language_model=LMConfig(train_layers=1),
    )
    workspace = open_workspace(config, tmp_path, stop=StopFlag(), log=lambda _: None)
    questions, lm = workspace.questions["train"], workspace.lm
    found = some_candidates(rng, len(questions), documents=9)
    cache = ResultCache(tmp_path / "s.jsonl", Score)
    scores = score_candidates(
        workspace, workspace.base_lm(), questions, found, cache, wanted=("answer", "question")
    )
    encode = workspace.prompts.joiner.encode
    for q, k in np.argwhere(found.mask):
        doc = int(found.doc_ids[q, k])
        assert scores.log_probs[q, k] == pytest.approx(
            plain_score(workspace, questions[q], doc), abs=1e-3
        )
        ends = lm.text_format.context_end_ids
        context = [*workspace.documents.get([doc])[0], *ends]
        target = encode(questions[q].text)
        packed = workspace.prompts.pack([context], [target], target_length=len(target))
        batch = LMBatch(*map(jnp.asarray, packed))
        expected = float(lm.token_log_probs(lm.params, batch).sum())
        assert scores.question_log_probs[q, k] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_a_whole_run_with_a_t5_ends_with_metrics(t5_inputs, tiny_flags, tmp_path):
    flags = [*tiny_flags, f"--lm={t5_inputs['lm']}", "--retriever.rounds=1"]
    flags += [f"--output={tmp_path / 'run'}"]
    assert load_script("experiments/adapt.py").main(flags) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"before", "after"} <= set(metrics)
    assert np.isfinite(metrics["after"]["answer_nll"]["value"])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert {"lm", "retriever-0"} <= {step["stage"] for step in steps}
