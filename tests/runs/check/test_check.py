"""What a check tells of good data, of data with flaws, and of models that do not fit."""

import json
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from programs import load_script
from safetensors.numpy import load_file, save_file

from ragjax.runs import AdaptConfig, LMConfig, forecast
from ragjax.runs.adapt import open_adapt
from ragjax.runs.check import check_run
from ragjax.runs.check.problems import LISTED
from ragjax.training.loop import StopFlag


@pytest.fixture
def domain(tmp_path, write_domain):
    return write_domain(tmp_path / "domain")


@pytest.fixture
def config(tiny_inputs, domain):
    return AdaptConfig(
        **tiny_inputs | {"data": str(domain)}, language_model=LMConfig(train_layers=1)
    )


def append(path, *lines):
    with open(path, "a") as file:
        file.writelines(line + "\n" for line in lines)


def reasons(found):
    return [str(problem) for problem in found.problems.listed]


def test_good_data_are_counted_and_nothing_is_wrong(config, domain):
    found = check_run(config, with_cost=False)
    assert (found.data, found.passages) == ("domain", 80)
    assert "supervision: judgements (27 training questions, 27 with answers)" in found.supervision
    by_name = {split.name: split for split in found.splits}
    assert by_name["test"][1:5] == (26, 26, 26, 26)
    assert by_name["train"].measured_by == "relevance judgements"
    what = {f"{each.what}, {each.reader}": each for each in found.lengths}
    # A letter is a token of these models; the encoder adds two.
    rows = map(json.loads, (domain / "corpus.jsonl").read_text().splitlines())
    letters = [len(f"{row['title']}. {row['text']}".replace(" ", "")) for row in rows]
    assert abs(what["passages, encoder"].longest - max(letters) - 2) <= 1
    assert what["passages, encoder"].measured == what["passages, encoder"].of == 80
    assert what["answers, language model"].median == len(" 10")
    assert all(each.cut == 0 and each.limit > 0 for each in found.lengths)
    assert found.languages[0].counts.keys() <= {"english"}
    assert found.cost is None
    # Templates: "what does the red cat like?"
    assert all("almost the same" in reason for reason in reasons(found))
    assert found.code == int(found.problems.count > 0)


FLAWS = {
    "copies": (
        "corpus.jsonl",
        ['{"_id": "x", "title": "cat", "text": "the red cat likes 0"}'],
        "1 passages have the title and text of another (red-cat = x)",
    ),
    "blank": ("corpus.jsonl", ['{"_id": "x", "text": " "}'], "1 passages without text or title"),
    "own": (
        "corpus.jsonl",
        ['{"_id": "x", "text": "what does the red cat like?"}'],
        "1 questions are passages of the corpus (q0)",
    ),
    "leaks": (
        "queries.jsonl",
        ['{"_id": "x", "text": "What does the RED cat like"}'],
        "stand in no qrels file",
    ),
    "long": (
        "corpus.jsonl",
        [json.dumps({"_id": f"x{n}", "text": f"long {n} " * 30}) for n in range(9)],
        "of the passages are cut to the 64 tokens that the encoder takes of one",
    ),
    "german": (
        "corpus.jsonl",
        [
            json.dumps(
                {"_id": f"x{n}", "text": f"Der Hund und die Katze sind nicht mit {n} im Haus"}
            )
            for n in range(30)
        ],
        "of the passages that were measured are not English (german)",
    ),
    "unknown": (
        "corpus.jsonl",
        [json.dumps({"_id": f"x{n}", "text": "приветмир" * 4 + str(n)}) for n in range(9)],
        "of the tokens of the passages are unknown to",
    ),
}


@pytest.mark.parametrize(("name", "lines", "reason"), FLAWS.values(), ids=FLAWS)
def test_what_a_run_goes_on_with_is_named(config, domain, name, lines, reason):
    append(domain / name, *lines)
    found = check_run(config, with_cost=False)
    assert found.problems.refused == 0 and found.code == int(found.problems.count > 0)
    assert any(reason in each for each in reasons(found))


def test_test_questions_that_nothing_can_measure_are_named(config, domain, tmp_path):
    asked = tmp_path / "asked.csv"
    asked.write_text("question\n" + "".join(f"what is cat {n}?\n" for n in range(20)))
    shutil.rmtree(domain / "qrels")
    (domain / "queries.jsonl").unlink()
    found = check_run(replace(config, queries=str(asked)), with_cost=False)
    assert any("no relevant passage of the 4 test questions is known" in r for r in reasons(found))
    assert found.code == 1


def test_leaks_and_near_questions_are_named(config, domain):
    text = (domain / "queries.jsonl").read_text()
    # q0 and q3 are of train, q1 and q4 of dev.
    long = "please tell me in a few plain words what exactly that animal likes to eat"
    for animal, asked in (
        ("dog", "What does the RED cat like"),
        ("fox", f"{long} now?"),
        ("hen", f"{long} too?"),
    ):
        text = text.replace(f"what does the red {animal} like?", asked)
    (domain / "queries.jsonl").write_text(text)
    said = " ".join(reasons(check_run(config, with_cost=False)))
    assert "1 of the 27 dev questions are also asked in train: q1" in said
    assert "1 of the 26 dev questions are almost the same as one of train (q4 ~ q3)" in said


def test_all_bad_rows_are_listed_and_a_run_that_skips_them_goes_on(config, domain):
    append(domain / "corpus.jsonl", '{"_id": "a"', '{"_id": "b", "text": 5}')
    append(domain / "queries.jsonl", '{"_id": "c", "text": ""}')
    append(domain / "qrels" / "dev.tsv", "q1 red-dog 1")
    found = check_run(config, with_cost=False)
    assert found.code == 2 and found.passages == 80
    bad = [(p.file.rpartition("/")[2], p.line) for p in found.problems.listed if p.refused]
    assert sorted(bad) == [
        ("corpus.jsonl", 81),
        ("corpus.jsonl", 82),
        ("dev.tsv", 29),
        ("queries.jsonl", 81),
    ]
    options = replace(config.data_options, on_bad_row="skip")
    found = check_run(replace(config, data_options=options), with_cost=False)
    assert found.code == 1 and found.problems.refused == 0
    assert len([problem for problem in found.problems.listed if problem.file]) == 4


def test_questions_are_read_where_documents_cannot_be(config, domain):
    append(domain / "corpus.jsonl", '{"_id": "red-cat", "text": "again"}')
    append(domain / "queries.jsonl", "{", '{"_id": "q1", "text": "again?"}', '{"_id": "z"}')
    found = check_run(config, with_cost=False)
    corpus, questions, row = reasons(found)
    assert "the id 'red-cat' stands in line 1 and again in line 81" in corpus
    assert "the id 'q1' stands in line 2 and again in line 82" in questions
    assert "queries.jsonl:81: broken JSON" in row
    assert found.code == 2 and found.problems.refused == 3 and not found.splits


def test_questions_are_read_where_a_folder_of_documents_cannot_be(config, tmp_path):
    folder = tmp_path / "manual"
    folder.mkdir()
    (folder / "a.md").write_bytes(b"caf\xe9")
    config = replace(config, data=str(folder))
    (document,) = reasons(check_run(config, with_cost=False))
    assert "a.md: not UTF-8" in document
    (folder / "questions.csv").write_text("question,answer\na?\nb?,c\n")
    document, row = reasons(check_run(config, with_cost=False))
    assert "a.md: not UTF-8" in document and "questions.csv:2: 1 cells, but 2 columns" in row


def test_many_problems_are_counted_and_the_first_are_listed(config, domain):
    append(domain / "corpus.jsonl", *["{"] * (LISTED + 5))
    found = check_run(config, with_cost=False)
    assert found.problems.refused == LISTED + 5 and len(found.problems.listed) == LISTED


def test_unknown_ids_of_every_file_are_named(config, domain):
    for split in ("dev", "test"):
        append(domain / "qrels" / f"{split}.tsv", f"q1\tnowhere-{split}\t1")
    found = check_run(config, with_cost=False)
    said = " ".join(reasons(found))
    assert found.code == 2 and "nowhere-dev" in said and "nowhere-test" in said


def test_models_that_cannot_be_used_are_all_named(config, tmp_path):
    for name in ("encoder", "lm"):
        shutil.copytree(getattr(config, name), tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": f"odd-{name}"}))
    models = {name: str(tmp_path / name) for name in ("encoder", "lm")}
    found = check_run(replace(config, **models), with_cost=False)
    said = " ".join(reasons(found))
    assert found.code == 2 and "odd-encoder" in said and "odd-lm" in said
    assert found.splits and not found.lengths


def test_no_weights_are_read_without_the_cost(config, tmp_path):
    for name in ("encoder", "lm"):
        path = shutil.copytree(getattr(config, name), tmp_path / name) / "model.safetensors"
        tensors = load_file(path)
        save_file({key: value * float("nan") for key, value in tensors.items()}, path)
    models = {name: str(tmp_path / name) for name in ("encoder", "lm")}
    assert check_run(replace(config, **models), with_cost=False).problems.refused == 0
    found = check_run(replace(config, **models))
    assert found.code == 2 and "hold NaN or infinity" in reasons(found)[-1]


def test_documents_that_are_cut_again_are_to_be_cut_smaller(tiny_inputs, tmp_path):
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "cats.md").write_text("# Cats\n\nthe red cat likes fish and the owl\n")
    models = {name: tiny_inputs[name] for name in ("encoder", "lm")}
    options = {"prompt": {"document_tokens": 5}, "language_model": {"train_layers": 1}}
    given = {"data": str(tmp_path / "manual"), **options, **models}
    config = AdaptConfig.from_dict(given | {"output": str(tmp_path / "run")})
    remedy = "cut documents smaller with --data_options.passage_tokens"
    found = check_run(config, with_cost=False)
    assert any(f"if the model reads more, or {remedy}" in reason for reason in reasons(found))
    workspace = open_adapt(config, tmp_path / "run", stop=StopFlag(), log=lambda line: None)
    remedy = "(--prompt.document_tokens; --data_options.passage_tokens cuts documents smaller)"
    assert any(remedy in note for note in workspace.notes)
    assert describe_answers(workspace) == "no test question has an answer: nothing is compared"


def test_a_forecast_without_answers_says_that_retrieval_is_compared(config, tmp_path):
    workspace = open_adapt(config, tmp_path / "run", stop=StopFlag(), log=lambda line: None)
    assert describe_answers(workspace).endswith("answer: retrieval alone is compared")


def describe_answers(workspace):
    texts = SimpleNamespace(config=workspace.config, workspace=workspace, answered=lambda split: 0)
    return forecast._describe_answers(texts)


def test_the_script_prints_text_or_json_with_the_cost(config, domain, tiny_inputs, capsys):
    script = load_script("experiments/check.py")
    flags = [f"--{name}={value}" for name, value in tiny_inputs.items()]
    flags += ["--language_model.train_layers=1", f"--data={domain}"]
    code = script.main(flags)
    out = capsys.readouterr().out
    assert code in (0, 1)
    assert "passages, encoder" in out and "language of passages" in out
    assert "== forecast" in out and "on this machine" in out
    assert "nothing is wrong" in out or "that a run goes on with:" in out
    assert script.main([*flags, "--json", "--no-cost"]) == code
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["code"] == code and found["cost"] is None and found["passages"] == 80
    append(domain / "corpus.jsonl", '{"_id": "a", "words": "b"}')
    assert script.main([*flags, "--no-cost"]) == 2
    out = capsys.readouterr().out
    assert "1 problem would stop a run:" in out
    assert "corpus.jsonl:81: no field 'text'" in out and "--data_options.fields=" in out


def test_flags_that_cannot_be_used_end_with_code_2(capsys):
    script = load_script("experiments/check.py")
    assert script.main(["--data_options.fields=text"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_block_of_the_documentation_runs(config, domain, capsys):
    page = (Path(__file__).parents[3] / "docs" / "runs.rst").read_text("utf-8")
    block = page.split("from ragjax.runs.check import check_run")[1].split("\n\n")[1]
    given = {"AdaptConfig": lambda data: replace(config, data=str(domain)), "check_run": check_run}
    exec(textwrap.dedent(block), given)
    assert capsys.readouterr().out.startswith(("0 [", "1 ["))
