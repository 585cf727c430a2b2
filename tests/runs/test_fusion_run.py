"""A run whose reader attends to all documents at once is answered so: table, evaluate and ask."""

import contextlib
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import load_script

from ragjax.generation import Limits, Prompts, generate_greedy
from ragjax.models.seq2seq.fusion import FusionBatch, fusion_decoder, fusion_token_log_probs
from ragjax.models.testing import write_tiny_language_model
from ragjax.runs import Asker, open_run, open_system
from ragjax.runs.ask.decoding import DECODES
from ragjax.runs.ask.prompts import ReaderOptions
from ragjax.runs.ask.view import format_reply, format_source, plain, reply_as_json
from ragjax.runs.compare.answers import Request, answer_limits, answer_requests
from ragjax.runs.compare.systems import answer_cache
from ragjax.runs.evaluate import open_evaluation
from ragjax.runs.options.end_to_end import (
    ObjectiveConfig,
    RagConfig,
    ReaderConfig,
    TrainingConfig,
)
from ragjax.runs.options.evaluate import EvaluateConfig, run_options
from ragjax.runs.options.shared import EvaluationConfig, RunConfig
from ragjax.runs.system import by_dense, open_base_system
from ragjax.training.loop import StopFlag

QUESTION = "what does the red cat like?"
FUSED = {
    "objective": ObjectiveConfig(marginal="emdr2", lm_weight=1),
    "language_model": ReaderConfig(reader="fusion"),
}
FUSED_FLAGS = (
    "--language_model.reader=fusion", "--objective.marginal=emdr2", "--objective.lm_weight=1",
    "--refresh.every=1",
)  # fmt: skip


@pytest.fixture(scope="module", params=["t5", "bart"])
def lm_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_language_model(folder, family=request.param)
    return str(folder)


def fused_reference(lm, params, contexts, target, limits):
    """What `fusion_decoder` writes, and log p of a target, from contexts as they are."""
    length = -(-max(map(len, contexts)) // 64) * 64
    ids = np.array([[*context, *[7] * (length - len(context))] for context in contexts], np.int32)
    mask = np.arange(length) < np.array([[len(context)] for context in contexts])
    prompts = Prompts(jnp.asarray(ids)[None], jnp.asarray(mask)[None])
    result = generate_greedy(fusion_decoder(lm.config), params, prompts, limits)
    targets = jnp.asarray([target], jnp.int32)
    batch = FusionBatch(*prompts[:2], targets, jnp.ones(targets.shape, bool))
    score = jax.jit(fusion_token_log_probs, static_argnums=0)
    log_probs = np.asarray(score(lm.config, params, batch))[0]
    said = np.asarray(result.ids)[0, : int(result.lengths[0])].tolist()
    return said, log_probs


# What decides.


def test_the_saved_options_decide_and_flags_override_them():
    assert RagConfig().mode == "ensemble" and RunConfig().mode == "concat"
    assert RagConfig(**FUSED).mode == "fusion"
    kept = RagConfig(**FUSED, evaluation=EvaluationConfig(mode="ensemble"))
    assert kept.mode == "ensemble"
    run = RagConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(RagConfig(**FUSED)))))
    assert run_options(EvaluateConfig(run="r"), run).mode == "fusion"
    assert run_options(EvaluateConfig(run="r", mode="ensemble"), run).mode == "ensemble"
    assert run_options(EvaluateConfig(mode="fusion"), None).mode == "fusion"


@pytest.mark.parametrize(
    ("script", "flags", "named"),
    [
        ("evaluate", ["--mode=fusion"], "--mode fusion"),
        ("train_rag", ["--evaluation.mode=fusion"], "--evaluation.mode fusion"),
        ("adapt", ["--evaluation.mode=fusion"], "--evaluation.mode fusion"),
        ("ask", ["--decode=fusion", "--no-warm-up", QUESTION], "--decode fusion"),
    ],
)
def test_a_causal_decoder_cannot_read_so(script, flags, named, tiny_inputs, tmp_path, capsys):
    inputs = [f"--{name}={value}" for name, value in tiny_inputs.items()]
    where = f"--{'cache' if script == 'ask' else 'output'}={tmp_path / 'o'}"
    assert load_script(f"experiments/{script}.py").main([*inputs, where, *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{named}: {tiny_inputs['lm']} is a causal decoder" in error
    assert not list((tmp_path / "o").glob("index")), "before anything expensive"


# The same reader in every place.


@pytest.mark.slow
def test_answers_are_those_of_the_fusion_decoder(lm_folder, tiny_inputs, tmp_path):
    config = EvaluateConfig(
        **tiny_inputs | {"lm": lm_folder}, mode="fusion", documents=3, max_new_tokens=4
    )
    workspace = open_evaluation(config, tmp_path, stop=StopFlag(), log=lambda _: None).workspace
    teacher, lm = workspace.base_lm(), workspace.lm
    questions = workspace.questions["test"][:3]
    # Fewer documents than others have, other scores, and none.
    docs = [(4, 1, 7), (2,), (5, 0)]
    requests = [
        Request(question, rows, (0.0,) * len(rows))
        for question, rows in zip(questions, docs, strict=True)
    ]
    closed = Request(questions[0], (), ())
    cache = answer_cache(tmp_path)
    answers = answer_requests(workspace, teacher, [*requests, closed], cache)
    limits = answer_limits(lm, 4)
    prompts = workspace.prompts
    for request, answer in zip([*requests, closed], answers, strict=True):
        text = request.question.text
        each = [prompts.context(text, [ids]) for ids in workspace.documents.get(request.docs)]
        target = prompts.target(request.question.answers[0])
        contexts = each or [prompts.context(text)]
        said, log_probs = fused_reference(lm, teacher.params, contexts, target, limits)
        assert answer.prediction == lm.tokenizer.decode(said).strip()
        assert answer.nll == pytest.approx(-log_probs.sum() / len(target), abs=1e-4)
    # With the empty document of the training, which the decoder attends to as well.
    null = RagConfig(
        **{**FUSED, "training": TrainingConfig(null_document=True)},
        evaluation=workspace.config.evaluation,
        prompt=workspace.config.prompt,
    )
    (answer,) = answer_requests(
        dataclasses.replace(workspace, config=null), teacher, requests[1:2], cache
    )
    text = requests[1].question.text
    contexts = [prompts.context(text, workspace.documents.get([2])), prompts.context(text)]
    target = prompts.target(requests[1].question.answers[0])
    said, log_probs = fused_reference(lm, teacher.params, contexts, target, limits)
    assert answer.prediction == lm.tokenizer.decode(said).strip()
    assert answer.nll == pytest.approx(-log_probs.sum() / len(target), abs=1e-4)
    # p_R has no part in them.
    weighed = requests[0]._replace(doc_scores=(3.0, 1.0, 0.0))
    assert answer_requests(workspace, teacher, [weighed], cache) == answers[:1]
    assert len(cache) == 5


@pytest.fixture(scope="module")
def asker(lm_folder, tiny_inputs, tmp_path_factory):
    config = RagConfig(**tiny_inputs | {"lm": lm_folder}, **FUSED)
    system = open_base_system(config, cache=tmp_path_factory.mktemp("c"), log=lambda _: None)
    options = ReaderOptions(documents=3, document_tokens=40, max_new_tokens=4, windows=3)
    return Asker(system, options, by=by_dense)


@pytest.mark.slow
def test_ask_writes_scores_and_leaves_out_as_the_fusion_decoder_does(asker):
    lm, params = asker.reader.lm, asker.system.lm_params
    answer = asker.answer(QUESTION)
    limits = Limits(
        max_new_tokens=asker.reader.prompts.max_target,
        stop_ids=asker.reader.limits.stop_ids,
        min_new_tokens=1,
    )
    contexts, ids = answer.prompt.contexts, answer.generated.ids
    said, whole = fused_reference(lm, params, contexts, ids, limits)
    assert ids == said and len(contexts) == 3
    start = len(lm.text_format.target_start_ids)

    def log_prob(chosen):
        return fused_reference(lm, params, chosen, ids, limits)[1][start:].sum()

    reply = asker.explain(answer)
    assert reply.log_prob == pytest.approx(whole[start:].sum(), abs=1e-3)
    closed = log_prob([answer.prompt.closed_book])
    assert reply.utility == pytest.approx(whole[start:].sum() - closed, abs=2e-3)
    for place, source in enumerate(reply.sources):
        others = [context for row, context in enumerate(contexts) if row != place]
        assert source.change == pytest.approx(reply.log_prob - log_prob(others), abs=2e-3)
        assert source.log_prob == pytest.approx(log_prob([contexts[place]]), abs=1e-3)
        assert math.isnan(source.posterior)
    assert reply.relied_on == int(np.argmax([source.change for source in reply.sources]))
    assert sum(source.prior for source in reply.sources) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_the_empty_document_of_the_training_is_read_beside_the_others(asker):
    system, options = asker.system, asker.reader.prompts.options
    config = dataclasses.replace(
        system.workspace.config, training=TrainingConfig(null_document=True)
    )
    workspace = dataclasses.replace(system.workspace, config=config)
    other = Asker(dataclasses.replace(system, workspace=workspace), options, by=by_dense)
    answer = other.answer(QUESTION, answer="30")
    reply, (lm, params) = other.explain(answer), (other.reader.lm, system.lm_params)
    start, ids = len(lm.text_format.target_start_ids), answer.generated.ids

    def log_prob(*chosen):
        scored = fused_reference(lm, params, list(chosen), ids, other.reader.limits)
        return scored[1][start:].sum()

    contexts, null = answer.prompt.contexts, answer.prompt.closed_book
    assert reply.log_prob == pytest.approx(log_prob(*contexts, null), abs=2e-3)
    left = reply.log_prob - log_prob(*contexts[1:], null)
    assert reply.sources[0].change == pytest.approx(left, abs=2e-3)
    assert reply.sources[0].log_prob == pytest.approx(log_prob(contexts[0]), abs=2e-3)
    reading = answer.generated.reading
    found = other.reader.leave_out(answer.prompt, reading, 1, [[]], ids)
    whole = fused_reference(lm, params, [*contexts, null], ids, other.reader.limits)[1].sum()
    np.testing.assert_allclose(found, [whole, whole], atol=2e-3)


@pytest.mark.slow
def test_a_part_that_is_left_out_was_never_read(asker):
    prompt = asker.reader.prompts.make(QUESTION, [0, 1], [0.0, 0.0])
    target = asker.reader.prompts.builder.target("30")
    reading = asker.reader.read_fused(prompt)
    start, size = prompt.places[1]
    found = asker.reader.leave_out(prompt, reading, 1, [range(size), [0, 2]], target)
    # A tiny tokenizer has a token a byte, and the positions of what is left close up.
    first, second = prompt.contexts
    without = [
        second[:start] + second[start + size :],
        [token for place, token in enumerate(second) if place not in (start, start + 2)],
    ]
    lm, params = asker.reader.lm, asker.system.lm_params
    log_probs = [
        fused_reference(lm, params, [first, other], target, asker.reader.limits)[1].sum()
        for other in (second, *without)
    ]
    if lm.family.model_types != ("t5",):  # T5's distances are those of slots
        np.testing.assert_allclose(found, log_probs, atol=5e-3)
    assert found[0] == pytest.approx(log_probs[0], abs=2e-3)
    assert len(found) == 3 and found[0] != pytest.approx(found[1])


@pytest.mark.slow
def test_a_reply_says_that_no_posterior_applies(asker):
    answer = asker.answer(QUESTION, answer="9 zz")
    reply = asker.explain(answer)
    assert "attended to all passages at once (fusion)" in reply.notes[-1]
    found = reply_as_json(reply)
    assert [source["posterior"] for source in found["documents"]] == [None] * 3
    assert json.dumps(found, allow_nan=False)
    shown = format_reply(reply, style=plain)
    assert "posterior 0" not in shown and "n/a" in shown and "nan" not in shown
    assert reply.span is not None
    line = format_source(answer, asker.system.workspace.dataset.corpus, style=plain)
    assert line.endswith("(read with the others at once)")
    # One document, and none, have the closed book beside them.
    alone = asker.explain(asker.answer_from(QUESTION, [3], [0.0], "0"))
    assert alone.sources[0].change == pytest.approx(alone.utility)
    none = asker.explain(asker.answer_from(QUESTION, [], [], "0"))
    assert none.utility == 0 and none.sources == ()
    other = Asker(asker.system, asker.reader.prompts.options, decode=DECODES["ensemble"])
    assert not math.isnan(other.ask(QUESTION).sources[0].posterior)


@pytest.mark.slow
def test_nothing_compiles_after_the_warm_up(asker, compilations):
    assert list(asker.warm_up())
    with compilations() as compiled:
        for question in ("cat", QUESTION):
            asker.ask(question)
    assert compiled == []


# A whole run.


@pytest.fixture(scope="module")
def fused_run(shared, tiny_rag_flags, tmp_path_factory):
    """A finished run that trained a fusion reader, and what it printed."""

    def write(folder):
        folder.mkdir()
        write_tiny_language_model(folder / "lm", family="t5")
        with open(folder / "printed.txt", "w") as file, contextlib.redirect_stdout(file):
            flags = [*tiny_rag_flags, f"--lm={folder / 'lm'}", *FUSED_FLAGS]
            script = load_script("experiments/train_rag.py")
            assert script.main([*flags, f"--output={folder / 'run'}"]) == 0

    folder = shared("fused-run", write)
    return folder / "run", (folder / "printed.txt").read_text()


def answers_of(folder, name="after"):
    lines = (folder / "predictions.jsonl").read_text("utf-8").splitlines()
    systems = {row["question"]: row["systems"][name] for row in map(json.loads, lines)}
    return {question: row for question, row in systems.items() if row["prediction"] is not None}


@pytest.mark.slow
def test_a_run_is_answered_as_it_was_trained_in_every_place(fused_run, tmp_path, capsys):
    folder, printed = fused_run
    assert "documents are read in mode fusion: each encoded alone" in printed
    assert json.loads((folder / "config.json").read_text())["mode"] == "fusion"
    assert "fusion: each encoded alone" in (folder / "report.html").read_text("utf-8")
    settings = json.loads((folder / "explained.json").read_text())["settings"]
    assert settings["read"] == "each passage alone, unlike for the answers"
    dev = json.loads((folder / "dev.json").read_text())["systems"]["after"]
    assert "answer_nll" in dev and "marginal_nll" not in dev

    table = answers_of(folder)
    system = open_system(folder, log=lambda _: None)
    workspace, lm = system.workspace, open_run(folder).models.language_model
    corpus = workspace.dataset.corpus
    limits = answer_limits(lm, 3)
    by_text = {question.text: question for question in workspace.questions["test"]}
    assert len(table) == 3
    for text, row in table.items():
        docs = [corpus.row_of(doc) for doc in row["doc_ids"][:2]]
        contexts = [workspace.prompts.context(text, [ids]) for ids in workspace.documents.get(docs)]
        target = workspace.prompts.target(by_text[text].answers[0])
        said, log_probs = fused_reference(lm, lm.params, contexts, target, limits)
        assert row["prediction"] == lm.tokenizer.decode(said).strip()
        nll = -log_probs.sum() / len(target)
        assert row["metrics"]["answer_nll"] == pytest.approx(nll, abs=1e-4)

    output = tmp_path / "evaluation"
    flags = [f"--run={folder}", f"--output={output}", "--resamples=50", "--answer_questions=3"]
    evaluate = load_script("experiments/evaluate.py")
    assert evaluate.main(flags) == 0
    assert "documents are read in mode fusion" in capsys.readouterr().out
    assert json.loads((output / "config.json").read_text())["mode"] == "fusion"
    for text, row in answers_of(output).items():
        assert row["prediction"] == table[text]["prediction"]
        assert row["metrics"]["answer_nll"] == pytest.approx(table[text]["metrics"]["answer_nll"])

    ask = load_script("experiments/ask.py")
    flags = [f"--run={folder}", "--documents=2", "--retriever=dense", "--max_new_tokens=3"]
    for text, row in table.items():
        assert ask.main([*flags, "--document_tokens=140", "--no-warm-up", "--json", text]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["answer"] == row["prediction"]
        assert [source["id"] for source in found["documents"]] == row["doc_ids"][:2]


@pytest.mark.slow
def test_a_flag_reads_a_fused_run_otherwise(fused_run, tmp_path, capsys):
    folder, _ = fused_run
    flags = [f"--run={folder}", f"--output={tmp_path / 'e'}", "--resamples=10", "--mode=ensemble"]
    assert load_script("experiments/evaluate.py").main([*flags, "--answer_questions=1"]) == 0
    assert "documents are read in mode ensemble" in capsys.readouterr().out
    flags = [f"--run={folder}", "--decode=ensemble", "--no-warm-up", "--json", QUESTION]
    assert load_script("experiments/ask.py").main(flags) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["documents"][0]["posterior"] is not None
