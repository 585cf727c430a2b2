"""The chat template is chosen once by dev questions, kept, and read by all that follows."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from programs import load_script

from ragjax.runs import AdaptConfig, Asker, EvaluateConfig, RagConfig, open_system
from ragjax.runs.adapt import open_adapt
from ragjax.runs.check import check_run
from ragjax.runs.evaluate import _choose_prompt, open_evaluation
from ragjax.runs.forecast import estimate_cost
from ragjax.runs.inputs import begin, run_inputs
from ragjax.runs.options.checks import check_all
from ragjax.runs.options.evaluate import run_options
from ragjax.runs.prompt_lengths import run_prompts
from ragjax.runs.prompts import choice
from ragjax.runs.prompts.choice import choose_prompt, measured_prompts
from ragjax.runs.prompts.text import chat_text
from ragjax.runs.saved import open_run
from ragjax.training.loop import StopFlag

CHAT = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def instruct(shared, tiny_inputs):
    """The tiny inputs with a chat template in the files of the language model."""

    def write(folder):
        shutil.copytree(tiny_inputs["lm"], folder)
        (folder / "chat_template.jinja").write_text(CHAT)

    return tiny_inputs | {"lm": str(shared("instruct", write))}


def silent(line):
    """Reports to nobody."""


def opened(inputs, folder, log=silent, **options):
    options |= {"output": str(folder), "language_model": {"train_layers": 1}}
    config = AdaptConfig.from_dict(inputs | options)
    folder.mkdir(exist_ok=True)
    return open_adapt(config, folder, stop=StopFlag(), log=log)


def chosen(workspace):
    return choose_prompt(workspace, run_prompts(workspace, dev=True))


@pytest.mark.parametrize(("cost", "which"), [(1.0, True), (-1.0, False)])
def test_the_likelier_answers_choose(instruct, tmp_path, monkeypatch, cost, which):
    workspace, told = opened(instruct, tmp_path / "run"), []
    without, within = choice._nll(
        workspace, [workspace.lm, dataclasses.replace(workspace.lm, prompt=chat_text(workspace.lm))]
    )
    assert np.isfinite([without, within]).all() and without != within
    # Whichever a random model prefers, the other one costs more here.
    monkeypatch.setattr(choice, "_nll", lambda *_: [3.0, 3.0 - cost])
    workspace = chosen(dataclasses.replace(workspace, log=told.append))
    kept = json.loads((tmp_path / "run/prompt.json").read_text())
    assert kept["chat"] == which and kept["reason"] in workspace.notes
    shown = f"{'in the' if which else 'no'} chat template (the right answers to 16 dev questions"
    assert shown in kept["reason"] and f"{3 - cost:.2f} nats per token in it, 3.00" in told[-1]
    asked = workspace.prompts.context("what?")
    text = workspace.lm.tokenizer.decode(asked, skip_special_tokens=False)
    plain = "Question: what?\nAnswer:"
    assert text == (f"user\n{plain}<|end|>\nassistant\n" if which else plain)
    # Once chosen, nothing is measured again.
    monkeypatch.setattr(choice, "_nll", None)
    again = opened(instruct, tmp_path / "run")
    assert measured_prompts(again) == 0 and chosen(again).lm.prompt == workspace.lm.prompt
    assert kept["reason"] in again.notes


def test_answers_cost_what_they_cost_one_by_one(instruct, tmp_path):
    workspace = opened(instruct, tmp_path / "run")
    lm = dataclasses.replace(workspace.lm, prompt=chat_text(workspace.lm))
    found, score = choice._nll(workspace, [workspace.lm, lm]), jax.jit(lm.token_log_probs)
    for value, reading in zip(found, (workspace, choice._reading(workspace, lm)), strict=True):
        tokenizer, nats = workspace.lm.tokenizer, []
        for question in workspace.questions["dev"][:16]:
            (doc,) = workspace.relevant_rows("dev")[workspace.questions["dev"].index(question)]
            context = reading.prompts.context(question.text, reading.documents.get([doc]))
            answer = question.answers[0]
            end = "<|end|>" if reading.lm.prompt else "\n"
            written = answer if reading.lm.prompt else f" {answer}"
            target = tokenizer.encode(written + end, add_special_tokens=False).ids
            batch = reading.prompts.pack([context], [target])
            log_probs = score(lm.params, batch)
            plain = tokenizer.encode(f" {answer}\n", add_special_tokens=False).ids
            nats.append(-float(np.sum(log_probs)) / len(plain))
        np.testing.assert_allclose(value, np.mean(nats), rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "why", "chat"),
    [
        ({"prompt": {"chat": "off"}}, "prompt.chat off", False),
        ({"prompt": {"chat": "on"}}, "prompt.chat on", True),
        ({"keep": "last"}, "keep last: nothing is chosen on dev", False),
        ({"data_options": {"dev_questions": 0}}, "no dev question has an answer", False),
        ({"prompt": {"template": "<|end|>{document}\n{question}"}}, "writes '<|end|>' itself",
         False),
        ({"evaluation": {"max_new_tokens": 448}, "prompt": {"document_tokens": 20}}, "no room for",
         False),
    ],
)  # fmt: skip
def test_what_is_not_chosen_by_dev_says_why(instruct, tmp_path, monkeypatch, options, why, chat):
    monkeypatch.setattr(choice, "_nll", None)
    workspace = chosen(opened(instruct, tmp_path / "run", **options))
    kept = json.loads((tmp_path / "run/prompt.json").read_text())
    assert why in kept["reason"] and kept["chat"] is chat and kept["reason"] in workspace.notes
    assert bool(workspace.lm.prompt and workspace.lm.prompt.end) is chat


def test_the_choice_is_in_the_forecast(instruct, tiny_inputs, tmp_path):
    costs = {}
    for name, inputs in (("instruct", instruct), ("base", tiny_inputs)):
        workspace = opened(inputs, tmp_path / name)
        costs[name] = estimate_cost(workspace, workspace.config)
    assert costs["instruct"].seconds["prompt"] > 0 == costs["base"].seconds["prompt"]
    assert costs["instruct"].lm_forwards - costs["base"].lm_forwards == 32


@pytest.mark.parametrize("changed", ["template", "chat"])
def test_a_changed_template_is_another_input(instruct, tmp_path, changed):
    inputs, folder = dict(instruct), tmp_path / "run"
    path = tmp_path / "template.txt"
    path.write_text("{document}\n\n{question}")
    shutil.copytree(inputs["lm"], tmp_path / "lm")
    inputs["lm"] = str(tmp_path / "lm")

    def start():
        workspace = opened(inputs, folder, prompt={"template": str(path)})
        begin(folder, {}, run_inputs(workspace), kind="run", log=silent)

    start()
    start()
    if changed == "template":
        path.write_text("{document}\n\nQ: {question}")
    else:
        (tmp_path / "lm/chat_template.jinja").write_text(CHAT + " ")
    name = "template" if changed == "template" else "chat template"
    with pytest.raises(ValueError, match=f"has changed since: prompt: other {name}"):
        start()


@pytest.mark.slow
def test_a_run_trains_answers_and_asks_with_its_template(instruct, tiny_flags, tmp_path, capsys):
    template = tmp_path / "template.txt"
    template.write_text("Background: {document}\n\nQ: {question}\n")
    flags = [flag for flag in tiny_flags if not flag.startswith("--lm=")]
    flags += [f"--lm={instruct['lm']}", f"--prompt.template={template}", "--prompt.chat=on"]
    flags += ["--stages", "lm", f"--output={tmp_path / 'run'}"]
    assert load_script("experiments/adapt.py").main(flags) == 0
    assert "prompt: in the chat template (prompt.chat on)" in capsys.readouterr().out
    assert "prompt.chat on" in (tmp_path / "run/report.html").read_text("utf-8")
    template.unlink()  # the run keeps what it needs
    system = open_system(tmp_path / "run", log=silent)
    said = "Background: the red cat likes 0\n\nQ: what does the red cat like?"
    prompts = Asker(system).reader.prompts
    prompt = prompts.make("what does the red cat like?", [0], [0.0])
    decode = system.workspace.lm.tokenizer.decode
    shown = decode(prompt.contexts[0], skip_special_tokens=False)
    assert shown.replace("cat\nthe", "the") == f"user\n{said}<|end|>\nassistant\n"
    assert 256 in Asker(system).reader.limits.stop_ids
    config = EvaluateConfig(run=str(tmp_path / "run"), output=str(tmp_path / "e"))
    evaluated = open_evaluation(config, tmp_path / "e", stop=StopFlag(), log=silent)
    assert evaluated.workspace.lm.prompt == system.workspace.lm.prompt
    assert evaluated.workspace.prompts.context("x") == prompts.builder.context("x")
    assert _choose_prompt(evaluated, config) is evaluated
    trained = open_run(tmp_path / "run").models.language_model
    assert trained.prompt == system.workspace.lm.prompt


def test_base_models_are_evaluated_with_what_dev_chooses(instruct, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "_nll", lambda *_: [3.0, 2.0])
    config = EvaluateConfig(**instruct, output=str(tmp_path), answer_questions=2)
    evaluation = open_evaluation(config, tmp_path, stop=StopFlag(), log=silent)
    assert evaluation.workspace.lm.prompt is None
    after = _choose_prompt(evaluation, config)
    assert after.workspace.lm.prompt.end == after.weighing.lm.prompt.end == "<|end|>"
    assert after.workspace.questions == evaluation.workspace.questions
    assert after.workspace.prompts is after.weighing.prompts


def test_a_dev_question_without_room_in_the_chat_is_read_in_none(instruct, tmp_path):
    config = EvaluateConfig(**instruct, output=str(tmp_path), answer_questions=2)
    evaluation = open_evaluation(config, tmp_path, stop=StopFlag(), log=silent)
    first, *others = evaluation.weighing.questions["dev"]
    long = dataclasses.replace(first, text="why " * 600)
    weighing = dataclasses.replace(evaluation.weighing, questions={"dev": (long, *others)})
    after = _choose_prompt(evaluation._replace(weighing=weighing), config)
    kept = json.loads((tmp_path / "prompt.json").read_text())
    assert after.workspace.lm.prompt is None and not kept["chat"]
    assert f"no room for it: queries.jsonl: the dev question {first.id!r}" in kept["reason"]


def test_an_evaluation_takes_the_prompt_of_its_run():
    given = run_options(EvaluateConfig(template="{document} {question}", chat="on"), None).prompt
    assert (given.template, given.chat) == ("{document} {question}", "on")
    of_run = dataclasses.replace(RagConfig(), prompt=given)
    assert run_options(EvaluateConfig(run="r"), of_run).prompt == given
    for name, value in (("template", "{document} {question}"), ("chat", "off")):
        with pytest.raises(ValueError, match=f"--{name} .*: --run r says which models .* what th"):
            EvaluateConfig(run="r", **{name: value})


@pytest.mark.parametrize(
    ("template", "message"),
    [("no.txt", "no.txt: neither a text"), (f"{{document}} {{question}} {'x' * 500}", "too long")],
)
def test_a_check_reads_the_template(tiny_inputs, template, message):
    options = {"prompt": {"template": template}, "language_model": {"train_layers": 1}}
    found = check_run(AdaptConfig.from_dict(tiny_inputs | options), with_cost=False)
    (refused,) = [str(problem) for problem in found.problems.listed if message in str(problem)]
    assert "prompt.template" in refused and found.code == 2


def test_ask_gives_base_models_a_prompt(instruct, tmp_path, capsys):
    ask = load_script("experiments/ask.py")
    flags = [f"--{name}={value}" for name, value in instruct.items()]
    flags += [f"--cache={tmp_path}", "--template=Text: {document}\\n\\n{question}", "--chat=on"]
    system = ask._open(ask.tyro.cli(ask.Flags, args=flags))
    assert system.workspace.lm.prompt.context == (
        "user\nText: {document}\n\n{question}<|end|>\nassistant\n"
    )
    assert ask.main(["--run=r", "--chat=on", "x"]) == 2
    assert "--chat goes with --data; a run has its own" in capsys.readouterr().err


def test_a_bad_template_is_named_by_its_flag():
    config = AdaptConfig.from_dict({})
    object.__setattr__(config.prompt, "template", "{document} {questions}")
    with pytest.raises(ValueError, match="prompt.template.*line 1 has {questions}"):
        check_all(config, mark="--")
