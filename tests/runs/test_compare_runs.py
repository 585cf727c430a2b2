"""Two runs compared: what is set side by side, what flipped, and the exit code."""

import json

import numpy as np
import pytest
from programs import load_script

from ragjax.evaluation import paired_difference
from ragjax.runs import CompareConfig, compare_runs, dry_run

HYBRID, DENSE = "hybrid", "after"


def system(recall, f1, *, nll=1.0, prediction="red"):
    """What predictions.jsonl has of one system; None: not measured."""
    metrics = {"recall@5": recall, "f1": f1, "answer_nll": nll}
    return {
        "prediction": prediction,
        "doc_ids": ["d1", "d2"],
        "doc_scores": [0.9, 0.1],
        "metrics": {name: value for name, value in metrics.items() if value is not None},
    }


def write_run(folder, systems, *, shipped=HYBRID, corpus="c", changes=None, **facts):
    """Writes the files of a finished run in which each question has these systems.

    `systems` maps a question to its systems, by name.
    """
    folder.mkdir()
    judged = {"questions": str(sorted(systems)), "relevance judgements": "j"}
    inputs = {"corpus": {"passages": corpus}, "test split": judged}
    metrics = {name: {"n": len(systems)} for name in next(iter(systems.values()))}
    lines = [
        {"id": id, "question": f"what of {id}?", "answers": ["red"], "systems": found}
        for id, found in systems.items()
    ]
    files = {
        "config.json": {"fingerprint": "x", "config": {}, "inputs": inputs},
        "metrics.json": metrics | ({"served": {}} if shipped else {}),
        "differences.json": {"differences": []} | ({"served": shipped} if shipped else {}),
        "notes.json": {"facts": {"retrieval measured by": "judgements"} | facts},
    } | (changes or {})
    for name, value in files.items():
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "predictions.jsonl").write_text(text)
    return str(folder)


# Recall and F1 of 6 questions. B finds q2 and loses q3 and q4; it answers q1 and q2 and loses q4.
A = {f"q{n}": (recall, f1) for n, (recall, f1) in enumerate(
    [(1, 0.6), (1, 0.4), (0, 0.0), (0.5, 0.0), (1, 0.5), (0, None)]
)}  # fmt: skip
B = {f"q{n}": (recall, f1) for n, (recall, f1) in enumerate(
    [(1, 1.0), (0.5, 0.5), (0.2, 0.9), (0, 0.1), (0, 0.49), (0, None)]
)}  # fmt: skip


def of(values, **others):
    return {id: {HYBRID: system(*pair)} | others for id, pair in values.items()}


@pytest.fixture
def two(tmp_path):
    """Folders of both runs."""
    return [write_run(tmp_path / "a", of(A)), write_run(tmp_path / "b", of(B))]


@pytest.fixture
def main(tmp_path):
    script = load_script("experiments/evaluate.py")
    return lambda *flags: script.main([*flags, f"--output={tmp_path / 'o'}"])


def refused(main, capsys, *flags):
    """Runs the script, which must refuse its input, and returns what it said."""
    try:
        code = main(*flags)
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said
    return " ".join(said.split())


def read(tmp_path):
    return json.loads((tmp_path / "o" / "compare.json").read_text())


def test_differences_are_paired_on_the_questions_of_both(two, main, tmp_path, capsys):
    assert main("--compare", *two, "--resamples=500", "--seed=3") == 0
    found = read(tmp_path)
    assert found["A"] == {"folder": two[0], "system": HYBRID} and found["questions"] == 6
    columns = [np.array([pair[0] for pair in side.values()]) for side in (B, A)]
    expected = paired_difference(*columns, num_resamples=500, seed=3)._asdict()
    names = {"metric": "recall@5", "system": "B", "baseline": "A"}
    assert found["differences"][0] == names | expected
    assert found["metrics"]["A"]["recall@5"]["value"] == pytest.approx(columns[1].mean())
    f1 = [one for one in found["differences"] if one["metric"] == "f1"]
    assert f1[0]["n"] == 5  # one question has no answer
    out = capsys.readouterr().out
    assert "recall@5: B - A -0.300 [" in out
    assert f"A: {two[0]}, hybrid; B: {two[1]}, hybrid" in out


def test_what_flipped_is_counted_and_listed(two, main, tmp_path, capsys):
    assert main("--compare", *two) == 0
    flips = read(tmp_path)["flipped"]
    ids = {
        (kind, how): [one["id"] for one in group]
        for kind, by_how in flips.items()
        for how, group in by_how.items()
    }
    assert ids == {
        ("found", "lost"): ["q3", "q4"], ("found", "won"): ["q2"],
        ("right", "lost"): ["q4"], ("right", "won"): ["q1", "q2"],
    }  # fmt: skip
    assert flips["found"]["lost"][0] == {
        "id": "q3", "question": "what of q3?", "A": ["d1", "d2"], "B": ["d1", "d2"],
    }  # fmt: skip
    assert flips["right"]["won"][0]["A"] == "red"
    out = capsys.readouterr().out
    assert "a relevant passage among the first 5: 2 questions lost from A to B, 1 won" in out
    assert "a right answer: 1 questions lost from A to B, 2 won" in out
    assert "  lost q3: what of q3?" in out
    page = (tmp_path / "o" / "report.html").read_text("utf-8")
    assert "Questions that flipped" in page and "what of q3?" in page and "b against a" in page


@pytest.mark.parametrize(
    "flags,code,said",
    [
        (("--metric=recall@5", "--max_loss=.31"), 0, "recall@5: B is worse by 0.3000, within"),
        (("--metric=recall@5", "--max_loss=.3"), 0, "within --max_loss 0.3"),
        (("--metric=recall@5", "--max_loss=.29"), 1, "beyond --max_loss 0.29"),
        (("--metric", "recall@5", "f1", "--max_loss=.29"), 1, "f1: B is not worse"),
        (("--metric=f1", "--max_loss=0"), 0, "f1: B is not worse"),
        (("--metric=answer_nll", "--max_loss=.1"), 1, "answer_nll: B is worse by 0.5000, beyond"),
    ],
)
def test_the_exit_code_is_1_where_b_is_worse_by_more_than_the_limit(
    tmp_path, main, capsys, flags, code, said
):
    first = {id: {HYBRID: system(*pair, nll=1.0)} for id, pair in A.items()}
    second = {id: {HYBRID: system(*pair, nll=1.5)} for id, pair in B.items()}
    folders = [write_run(tmp_path / "a", first), write_run(tmp_path / "b", second)]
    assert main("--compare", *folders, *flags) == code
    assert said in capsys.readouterr().out
    limits = read(tmp_path)["limits"]
    assert all(limit["holds"] for limit in limits) is (code == 0)


def test_questions_that_only_one_was_asked_are_left_out_and_said(tmp_path, main, capsys):
    first = {id: pair for id, pair in A.items() if id != "q0"}
    second = {id: pair for id, pair in B.items() if id not in ("q4", "q5")}
    folders = [write_run(tmp_path / "a", of(first)), write_run(tmp_path / "b", of(second))]
    assert main("--compare", *folders) == 0
    assert "3 questions of both; asked in one only: 2 of A, 1 of B" in capsys.readouterr().out
    assert read(tmp_path)["questions"] == 3


def test_the_systems_are_those_that_are_shipped_or_named(tmp_path, main, capsys):
    better = {DENSE: system(1.0, 1.0)}
    folders = [
        write_run(tmp_path / "a", of(A, **better)),
        write_run(tmp_path / "b", of(B, **better), shipped=DENSE),
    ]

    def systems(*flags):
        assert main("--compare", *folders, *flags) == 0
        found = read(tmp_path)
        return found["A"]["system"], found["B"]["system"]

    assert systems() == (HYBRID, DENSE)
    assert systems(f"--system={DENSE}") == (DENSE, DENSE)
    assert systems("--system", DENSE, HYBRID) == (DENSE, HYBRID)
    said = refused(main, capsys, "--compare", *folders, "--system=bm25")
    assert f"--system bm25: {folders[0]} has not measured it; it has hybrid after" in said


def test_base_models_are_compared_by_their_hybrid(tmp_path, main, two):
    found = {id: {"hybrid_before": system(*pair)} for id, pair in A.items()}
    folder = write_run(tmp_path / "base", found, shipped="")
    assert main("--compare", folder, two[1]) == 0
    assert read(tmp_path)["A"]["system"] == "hybrid_before"


def test_a_run_that_does_not_say_what_it_ships_needs_a_name(tmp_path, main, two, capsys):
    changes = {"differences.json": {"differences": []}}
    folder = write_run(tmp_path / "old", of(A), changes=changes)
    said = refused(main, capsys, "--compare", folder, two[1])
    assert f"{folder}: it does not say what it ships; add --system, one of hybrid" in said
    assert main("--compare", folder, two[1], "--system=hybrid") == 0


OTHER = {id: pair for id, pair in zip(("x1", "x2"), A.values(), strict=False)}
JUDGED = {"corpus": {"passages": "c"}, "test split": {"questions": str(sorted(A))}}


@pytest.mark.parametrize(
    "options,said",
    [
        ({"corpus": "other"}, "searched different passages; evaluate both on the same data"),
        ({"systems": of(OTHER)}, "(6 questions) and {b} (2) share no question; evaluate both"),
        (
            {"retrieval measured by": "answers"},
            "what counts as found is not the same in {a} and {b} (judgements; answers); evaluate",
        ),
        (
            {"changes": {"config.json": {"config": {}, "inputs": JUDGED}}},
            "what counts as found is not the same in {a} and {b}; evaluate",
        ),
    ],
)
def test_other_data_are_refused_with_what_to_do(tmp_path, main, capsys, options, said):
    systems = options.pop("systems", of(B))
    a, b = write_run(tmp_path / "a", of(A)), write_run(tmp_path / "b", systems, **options)
    message = refused(main, capsys, "--compare", a, b)
    assert said.format(a=a, b=b) in message
    assert "experiments/evaluate.py --run RUN --data FOLDER" in message
    assert not (tmp_path / "o").exists()


def edit(folder, change):
    path = folder / "predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda lines: lines[1].update(answers=["blue"]), "question q1 has other words or other"),
        (lambda lines: lines[1].update(id="q0"), "line 2 holds this question for the second time"),
        (lambda lines: lines[1].pop("systems"), "predictions.jsonl: line 2 holds no prediction"),
        (
            lambda lines: lines[2]["systems"][HYBRID]["metrics"].update(f1="high"),
            "predictions.jsonl: line 3 holds no prediction",
        ),
        (list.clear, "it has measured nothing, or has not ended"),
    ],
)
def test_records_that_do_not_fit_are_named(tmp_path, two, main, capsys, change, said):
    edit(tmp_path / "b", change)
    assert said in refused(main, capsys, "--compare", *two)


def test_damaged_folders_are_named(tmp_path, two, main, capsys):
    assert "no run there" in refused(main, capsys, "--compare", two[0], str(tmp_path / "none"))
    with (tmp_path / "b" / "predictions.jsonl").open("a") as file:
        file.write("{broken\n")
    assert "predictions.jsonl: 1 lines cannot be read" in refused(main, capsys, "--compare", *two)
    (tmp_path / "a" / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(main, capsys, "--compare", *two)


def test_a_folder_that_does_not_say_what_it_read_is_compared_with_a_note(
    tmp_path, two, main, capsys
):
    folder = write_run(tmp_path / "old", of(B), changes={"config.json": {"config": {}}})
    assert main("--compare", two[0], folder) == 0
    assert f"note: {folder} does not say what it read" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags,said",
    [
        (("A",), "--compare takes two folders, RUN_A RUN_B; got 1 ('A')"),
        (("A", "B", "C"), "--compare takes two folders, RUN_A RUN_B; got 3"),
        (("A", "B", "--metric=f1"), "--metric f1: it has no limit; add --max_loss"),
        (("A", "B", "--max_loss=.01"), "--max_loss 0.01: of which metric? add --metric"),
        (("A", "B", "--metric=f1", "--max_loss=-1"), "--max_loss must be at least 0, got -1"),
        (("A", "B", "--system", "a", "b", "c"), "--system takes one system, or one of A and one"),
        (("A", "B", "--resamples=0"), "--resamples must be at least 1"),
        (("A", "B", "--split=dev"), "--split"),
    ],
)
def test_mistakes_are_one_sentence(main, capsys, flags, said):
    assert said in refused(main, capsys, "--compare", *flags)


def test_a_metric_that_was_not_measured_is_refused(two, main, capsys, tmp_path):
    flags = ("--metric=mrr@10", "--max_loss=0")
    said = refused(main, capsys, "--compare", *two, *flags)
    assert "--metric mrr@10: not measured in both; there are recall@5 f1 answer_nll" in said
    assert not (tmp_path / "o").exists()


def test_nothing_is_written_over_but_an_earlier_comparison(two, main, tmp_path, capsys):
    assert main("--compare", *two) == 0
    assert main("--compare", *reversed(two)) == 0
    assert read(tmp_path)["A"]["folder"] == two[1]
    (tmp_path / "o" / "letter.txt").write_text("x")
    said = refused(main, capsys, "--compare", *two)
    assert f"--output {tmp_path / 'o'} holds something else than a comparison" in said


def test_from_python_and_dry(two, tmp_path):
    config = CompareConfig(
        compare=tuple(two), output=str(tmp_path / "o"), metric=("recall@5",), max_loss=0.1
    )
    said = []
    dry_run(config, log=said.append)
    assert said == ["6 questions of both; asked in one only: 0 of A, 0 of B"]
    assert not (tmp_path / "o").exists()
    found = compare_runs(config, log=said.append)
    assert found.exit_code == 1 and not found.limits[0].holds
    assert found.limits[0].loss == pytest.approx(0.3)
    assert found.report.is_file() and len(found.flips["found"]["lost"]) == 2


@pytest.mark.slow
def test_runs_of_both_scripts_and_an_evaluation_are_compared(tiny_run, tiny_inputs, tmp_path, main):
    adapted, trained = tiny_run("adapt").folder, tiny_run("train_rag").folder
    flags = ["--metric=recall@5", "--max_loss=1"]
    assert main("--compare", str(adapted), str(trained), *flags) == 0
    found = read(tmp_path)
    assert found["questions"] == 6  # of 10 and 6, which begin alike
    for name, folder in (("A", adapted), ("B", trained)):
        lines = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
        of_run = [line["systems"][found[name]["system"]] for line in lines][:6]
        mean = np.mean([one["metrics"]["recall@5"] for one in of_run])
        assert found["metrics"][name]["recall@5"]["value"] == pytest.approx(mean)
    assert main("--compare", str(adapted), str(adapted), "--metric=f1", "--max_loss=0") == 0
    assert read(tmp_path)["flipped"]["right"] == {"lost": [], "won": []}
    output = tmp_path / "base"
    flags = [*(f"--{name}={value}" for name, value in tiny_inputs.items()), "--max_questions=10"]
    flags += ["--answer_questions=2", "--max_new_tokens=2", "--resamples=20", "--no-robustness"]
    script = load_script("experiments/evaluate.py")
    assert script.main([*flags, "--systems", "hybrid_before", f"--output={output}"]) == 0
    assert main("--compare", str(output), str(adapted)) == 0
    found = read(tmp_path)
    assert found["A"]["system"] == "hybrid_before" and found["questions"] == 10
