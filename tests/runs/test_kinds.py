"""What a user may have: documents, questions, answers, judgements, each with what stands before."""

import json

import jax
import numpy as np
import pytest
from programs import load_script

from ragjax.runs import open_run
from ragjax.runs.data import choose_questions, describe_supervision, measured_by, read_data
from ragjax.runs.options.dual import AdaptConfig

KINDS = ("documents", "questions", "answers", "judgements")


def poison(folder):
    """Lets every judgement of train and dev point to a wrong passage."""
    for path in (folder / "qrels" / "train.tsv", folder / "qrels" / "dev.tsv"):
        header, *rows = path.read_text().splitlines()
        columns = [row.split("\t") for row in rows]
        wrong = [other[1] for other in columns[1:] + columns[:1]]
        rows = [f"{row[0]}\t{doc}\t{row[2]}" for row, doc in zip(columns, wrong, strict=True)]
        path.write_text("\n".join([header, *rows]) + "\n")


def remove(folder):
    """Removes the judgements of train and dev."""
    for split in ("train", "dev"):
        (folder / "qrels" / f"{split}.tsv").unlink()


@pytest.fixture
def domains(tmp_path, write_domain):
    """Folders whose judgements of train and dev are wrong, or not there; the same otherwise."""
    folders = [write_domain(tmp_path / name / "data") for name in ("wrong", "without")]
    for folder, change in zip(folders, (poison, remove), strict=True):
        change(folder)
    return folders


def read(folder, supervision, output):
    options = {"supervision": supervision, "train_questions": 12}
    config = AdaptConfig.from_dict({"data": str(folder), "data_options": options})
    dataset = read_data(config, output, lambda line: None)
    return dataset, choose_questions(config, dataset)


@pytest.mark.parametrize("supervision", KINDS[:3])
def test_wrong_judgements_change_nothing_of_the_data(tmp_path, domains, supervision):
    (one, asked), (other, also_asked) = (
        read(folder, supervision, folder.parent / "run") for folder in domains
    )
    assert asked == also_asked and asked["test"]
    assert one.supervision == other.supervision == supervision
    for split, questions in asked.items():
        graded = one.graded_rows(split, questions)
        assert graded == other.graded_rows(split, questions)
        assert one.truth(split, questions) == other.truth(split, questions)


def test_what_is_known_is_said(tmp_path, domains):
    said = {kind: describe_supervision(*read(domains[0], kind, tmp_path / kind)) for kind in KINDS}
    test = "retrieval on 26 test questions is measured by relevance judgements"
    by_answer = "retrieval on 11 dev questions is measured by the few passages that hold an answer"
    nothing = "retrieval on 11 dev questions is measured by nothing: there are neither"
    assert said["documents"] == (
        f"supervision: documents (0 training questions, 0 with answers); {test}"
    )
    counts = "supervision: questions (12 training questions, 0 with answers); "
    assert said["questions"].startswith(counts + nothing) and said["questions"].endswith(test)
    counts = "(12 training questions, 12 with answers); "
    assert said["answers"] == f"supervision: answers {counts}{by_answer}; {test}"
    assert said["judgements"].startswith(f"supervision: judgements {counts}retrieval on 27 dev")


def test_the_share_of_questions_that_are_known_is_said(tmp_path, write_domain):
    folder = write_domain(tmp_path / "data")
    remove(folder)
    rows = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        row["metadata"] = {"answers": ["likes"]}  # as all passages have it
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset, asked = read(folder, "auto", tmp_path / "run")
    known = sum(map(bool, dataset.graded_rows("dev", asked["dev"])))
    assert 0 < known < 11
    assert measured_by(dataset, "dev", asked["dev"]).endswith(f"(known for {known} of 11)")


def test_passages_are_read_once_for_the_answers_of_all_splits(tmp_path, domains, monkeypatch):
    read_passages = []
    monkeypatch.setattr(
        "ragjax.data.truth.rows_with_answers",
        lambda texts, answers: read_passages.append(answers) or dict.fromkeys(answers, ()),
    )
    dataset, asked = read(domains[0], "answers", tmp_path / "run")
    describe_supervision(dataset, asked)
    assert len(read_passages) == 1 and len(read_passages[0]) == 12 + 11  # not of judged test


# From documents alone these tiny models write nothing to train on.
@pytest.mark.slow
@pytest.mark.parametrize("supervision", KINDS[1:3])
def test_wrong_judgements_change_nothing_of_a_run(tmp_path, domains, tiny_flags, supervision):
    runs = []
    for folder in domains:
        flags = [flag for flag in tiny_flags if not flag.startswith("--data=")]
        flags += [f"--data={folder}", f"--data_options.supervision={supervision}"]
        output = folder.parent / "run"
        assert load_script("experiments/adapt.py").main([*flags, f"--output={output}"]) == 0
        runs.append(open_run(output))
    wrong, without = runs
    for name in ("metrics.json", "differences.json", "predictions.jsonl", "served.json"):
        assert (wrong.folder / name).read_bytes() == (without.folder / name).read_bytes()
    for model in ("query_encoder", "doc_encoder", "language_model"):
        params = [jax.tree.leaves(getattr(run.models, model).params) for run in runs]
        for one, other in zip(*params, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_run_with_nothing_to_measure_by_says_so(tmp_path, write_domain, tiny_flags):
    folder = write_domain(tmp_path / "data")
    for path in (folder / "qrels").iterdir():
        path.unlink()
    (folder / "qrels").rmdir()
    rows = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    lines = [json.dumps({"_id": row["_id"], "text": row["text"]}) + "\n" for row in rows]
    (folder / "queries.jsonl").write_text("".join(lines))
    flags = [flag for flag in tiny_flags if not flag.startswith("--data=")]
    output = tmp_path / "run"
    flags += [f"--data={folder}", f"--output={output}", "--stages=lm"]
    assert load_script("experiments/adapt.py").main(flags) == 0
    noted = json.loads((output / "notes.json").read_text())
    assert open_run(output).metrics == {}
    assert any(note.startswith("nothing is measured") for note in noted["notes"])
    assert noted["facts"]["retrieval measured by"].startswith("nothing: there are neither")
