"""The evaluation script: every column, file and flag, resumed, and with odd data."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from programs import load_script

from ragjax.evaluation import f1_score
from ragjax.runs.options.evaluate import (
    EvaluateConfig,
    run_options,
    system_names,
)
from ragjax.runs.program import parse_flags
from ragjax.runs.saved import open_run
from ragjax.storage import sealed
from ragjax.training.loop import Interrupted, StopFlag

RESULTS = (
    "metrics.json",
    "differences.json",
    "calibration.json",
    "support.json",
    "robustness.json",
    "predictions.jsonl",
)
SMALL = (
    "--max_questions=10",
    "--answer_questions=5",
    "--max_new_tokens=3",
    "--resamples=20",
    "--documents=2",
)


@pytest.fixture(scope="module")
def script():
    return load_script("experiments/evaluate.py")


@pytest.fixture(scope="module")
def base(tiny_inputs):
    """Flags of an evaluation of un-adapted models that takes a few seconds."""
    return [*(f"--{name}={value}" for name, value in tiny_inputs.items()), *SMALL]


@pytest.fixture(scope="module")
def evaluated(script, base, tmp_path_factory):
    """The folder of a finished evaluation of un-adapted models."""
    output = tmp_path_factory.mktemp("evaluated") / "base"
    assert script.main([*base, f"--output={output}"]) == 0
    return output


@pytest.fixture(scope="module")
def run_folder(tiny_run):
    """A finished run that adapted both models."""
    return tiny_run("adapt").folder


def load(folder, name):
    text = (folder / name).read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else (
        json.loads(text)
    )  # fmt: skip


def refused(script, capsys, *flags):
    """Runs the script, which must refuse its input, and returns what it said."""
    try:
        code = script.main(list(flags))
    except SystemExit as ended:  # values that the options themselves refuse end in tyro's box
        code = ended.code
    said = " ".join(capsys.readouterr().err.replace("|", " ").split())
    assert code == 2, said
    assert "Traceback" not in said
    return said


# -- what it writes


@pytest.mark.slow
def test_un_adapted_models_have_four_columns(evaluated):
    metrics = load(evaluated, "metrics.json")
    assert list(metrics) == ["closed_book", "bm25", "before", "hybrid_before"]
    assert metrics["before"]["n"] == 10
    assert metrics["before"]["applicable"]["f1"] == 5
    assert "recall@5" in metrics["bm25"] and "recall@5" not in metrics["closed_book"]
    assert "supported" in metrics["bm25"] and "supported" not in metrics["closed_book"]
    assert all("corpus_hallucination" in row for row in metrics.values())
    assert list(load(evaluated, "support.json")) == list(metrics)
    differences = load(evaluated, "differences.json")["differences"]
    pairs = {(d["system"], d["baseline"]) for d in differences if d["metric"] == "corpus_supported"}
    assert ("before", "closed_book") in pairs and ("hybrid_before", "closed_book") in pairs
    for name in ("f1", "answer_nll", "confidence", "confidence_per_token", "empty_answer"):
        cell = metrics["hybrid_before"][name]
        assert cell["low"] <= cell["value"] <= cell["high"]


@pytest.mark.slow
def test_every_rate_is_the_mean_of_its_questions(evaluated):
    metrics, lines = load(evaluated, "metrics.json"), load(evaluated, "predictions.jsonl")
    assert len(lines) == 10
    for system, summary in metrics.items():
        rows = [line["systems"][system]["metrics"] for line in lines]
        for name in set(summary) - {"n", "applicable"}:
            values = [row[name] for row in rows if name in row]
            assert summary[name]["value"] == pytest.approx(np.mean(values))


@pytest.mark.slow
def test_support_and_hallucination_follow_their_definitions(evaluated, tiny_inputs):
    rows = (Path(tiny_inputs["data"]) / "corpus.jsonl").read_text("utf-8").splitlines()
    corpus = {row["_id"]: f"{row['title']} {row['text']}" for row in map(json.loads, rows)}
    answered = 0
    for line in load(evaluated, "predictions.jsonl"):
        for name in ("bm25", "before", "hybrid_before"):
            found = line["systems"][name]
            if found["prediction"] is None or found["metrics"]["empty_answer"]:
                assert "supported" not in found["metrics"]
                continue
            read = " ".join(corpus[doc] for doc in found["doc_ids"][:2]).lower().split()
            word = found["prediction"].lower()
            if word.isalnum():
                assert found["metrics"]["supported"] == float(word in read)
            right = f1_score(found["prediction"], line["answers"]) >= 0.5
            expected = float(not right and not found["metrics"]["supported"])
            assert found["metrics"]["hallucination"] == expected
            answered += 1
    assert answered == 15


@pytest.mark.slow
def test_support_by_the_corpus_is_of_the_same_passages_for_every_system(evaluated, tiny_inputs):
    rows = (Path(tiny_inputs["data"]) / "corpus.jsonl").read_text("utf-8").splitlines()
    corpus = {row["_id"]: f"{row['title']} {row['text']}" for row in map(json.loads, rows)}
    checked = 0
    for line in load(evaluated, "predictions.jsonl"):
        listed = {doc for system in line["systems"].values() for doc in system["doc_ids"]}
        # The question names the relevant passage: "what does the red cat like?" is of red-cat.
        relevant = "-".join(line["question"].split()[3:5])
        words = set(" ".join(corpus[doc] for doc in {*listed, relevant}).lower().split())
        for found in line["systems"].values():
            word = (found["prediction"] or "").lower()
            if not word.isalnum():
                continue
            metrics = found["metrics"]
            assert metrics["corpus_supported"] == float(word in words)
            right = f1_score(word, line["answers"]) >= 0.5
            assert metrics["corpus_hallucination"] == float(not right and word not in words)
            assert metrics["corpus_supported"] >= metrics.get("supported", 0.0)
            checked += 1
    assert checked


@pytest.mark.slow
def test_calibration_counts_every_answer(evaluated):
    calibration = load(evaluated, "calibration.json")
    lines = load(evaluated, "predictions.jsonl")
    assert set(calibration) == {"closed_book", "bm25", "before", "hybrid_before"}
    for system, by_name in calibration.items():
        assert set(by_name) == {"confidence", "confidence_per_token"}
        for name, found in by_name.items():
            assert found["n"] == sum(row["count"] for row in found["reliability"]) == 5
            rows = [line["systems"][system]["metrics"] for line in lines]
            rows = [row for row in rows if name in row]
            gaps = [(row[name] - (row["f1"] >= 0.5)) ** 2 for row in rows]
            assert found["brier"]["value"] == pytest.approx(np.mean(gaps))


@pytest.mark.slow
def test_robustness_has_every_condition_and_reads_what_it_says(evaluated, tiny_inputs):
    robustness = load(evaluated, "robustness.json")
    conditions = ["closed_book", "gold", "gold_first", "gold_last", "distractors"]
    assert list(robustness["conditions"]) == conditions
    assert robustness["n"] == 5
    pairs = {(row["system"], row["baseline"]) for row in robustness["differences"]}
    assert ("gold_first", "gold") in pairs and ("distractors", "closed_book") in pairs
    compared = {row["metric"] for row in robustness["differences"] if row["system"] == "gold"}
    assert compared == {"exact_match", "f1", "answer_nll", "corpus_hallucination"}
    lines = [line for line in load(evaluated, "predictions.jsonl") if "robustness" in line]
    assert len(lines) == 5
    same = []
    for line in lines:
        found = line["robustness"]
        (gold,) = found["gold"]["doc_ids"]
        # The question names the passage: "what does the red cat like?" is of red-cat.
        assert all(word in line["question"] for word in gold.split("-"))
        distractors = found["distractors"]["doc_ids"]
        ranked = [d for d in line["systems"]["hybrid_before"]["doc_ids"] if d != gold]
        assert distractors == ranked[:2]
        assert found["gold_first"]["doc_ids"] == [gold, *distractors]
        assert found["gold_last"]["doc_ids"] == [*distractors, gold]
        assert found["closed_book"]["doc_ids"] == []
        alone = line["systems"]["closed_book"]
        assert found["closed_book"]["prediction"] == alone["prediction"]
        same.append(found["distractors"]["prediction"] == alone["prediction"])
    assert robustness["same_as_closed_book"]["value"] == pytest.approx(np.mean(same))


@pytest.mark.slow
def test_the_report_is_drawn(evaluated):
    page = (evaluated / "report.html").read_text("utf-8")
    for word in ("hybrid_before", "confidence_per_token", "gold_last", "hallucination"):
        assert word in page


@pytest.mark.slow
def test_the_screen_shows_forecast_options_and_tables(script, base, tmp_path, capsys):
    flags = [*base, f"--output={tmp_path / 'o'}", "--answer_questions=3", "--no-robustness"]
    assert script.main(flags) == 0
    out = capsys.readouterr().out
    assert out.index("== forecast") < out.index("== answers")
    assert "answer_questions=3" in out and "3 of them answered" in out
    for row in ("recall@5", "f1", "hallucination", "calibration_error", "supported"):
        assert f"\n{row} " in out
    assert "\ncorpus_hallucination: before - closed_book" in out
    assert "f1: before - closed_book" in out
    assert not (tmp_path / "o" / "robustness.json").exists() and "== robustness" not in out
    assert "robustness" not in load(tmp_path / "o", "predictions.jsonl")[0]


# -- resume


@pytest.mark.slow
def test_a_finished_evaluation_repeated_gives_the_same_bytes(script, base, evaluated):
    before = {name: (evaluated / name).read_bytes() for name in (*RESULTS, "report.html")}
    answers = (evaluated / "evaluation" / "answers.jsonl").read_bytes()
    assert script.main([*base, f"--output={evaluated}"]) == 0
    assert {name: (evaluated / name).read_bytes() for name in before} == before
    assert (evaluated / "evaluation" / "answers.jsonl").read_bytes() == answers


@pytest.mark.slow
def test_cut_within_the_answers_it_ends_with_the_same_bytes(
    script, base, evaluated, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "cut"
    calls = []

    def stop_at_third(self):
        calls.append(None)
        if (output / "evaluation" / "answers.jsonl").exists() and len(calls) % 3 == 0:
            raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(StopFlag, "check", stop_at_third)
        assert script.main([*base, f"--output={output}"]) == 128 + 15
    assert "the same command continues" in capsys.readouterr().err
    known = (output / "evaluation" / "answers.jsonl").read_text("utf-8")
    whole = (evaluated / "evaluation" / "answers.jsonl").read_text("utf-8")
    assert 0 < len(known) < len(whole)
    # A killed process can leave half a line.
    (output / "evaluation" / "answers.jsonl").write_text(known + '{"key": "to')
    assert script.main([*base, f"--output={output}"]) == 0
    for name in RESULTS:
        assert (output / name).read_bytes() == (evaluated / name).read_bytes(), name


@pytest.mark.slow
def test_answers_without_their_probability_are_computed_again(script, base, evaluated, tmp_path):
    output = tmp_path / "old"
    shutil.copytree(evaluated, output)
    path = output / "evaluation" / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    old = [{k: row[k] for k in ("key", "prediction", "nll")} for row in rows]
    path.write_text("".join(json.dumps(sealed(row)) + "\n" for row in old))
    assert script.main([*base, f"--output={output}"]) == 0
    assert (output / "calibration.json").read_bytes() == (
        evaluated / "calibration.json"
    ).read_bytes()


# -- a run


@pytest.mark.slow
def test_distractors_are_compared_with_the_base_model_without_documents(
    script, run_folder, tmp_path
):
    flags = [f"--run={run_folder}", f"--output={tmp_path}", "--resamples=20", "--systems", "hybrid"]
    assert script.main([*flags, "--max_questions=6", "--answer_questions=3"]) == 0
    robustness = load(tmp_path, "robustness.json")
    assert robustness["conditions"]["closed_book_base"]["n"] == robustness["n"]
    pairs = {(row["system"], row["baseline"]) for row in robustness["differences"]}
    assert ("distractors", "closed_book_base") in pairs


@pytest.mark.slow
def test_a_run_has_every_column_and_its_own_figures(script, run_folder, tmp_path, capsys):
    output = tmp_path / "o"
    flags = [f"--run={run_folder}", f"--output={output}", "--resamples=50", "--no-robustness"]
    assert script.main([*flags, "--max_questions=10", "--answer_questions=6"]) == 0
    out = capsys.readouterr().out
    metrics = load(output, "metrics.json")
    assert list(metrics) == [
        "closed_book", "bm25", "before", "hybrid_before", "after", "hybrid",
        "lm_half", "closed_book_lm_half", "hybrid_base_lm", "hybrid_lm_half", "after_base_lm",
        "bm25_lm_half", "served",
    ]  # fmt: skip
    # What the run measured of itself, on the same questions with the same options.
    known = load(run_folder, "metrics.json")
    others = load(run_folder, "differences.json")["other_systems"]
    for system, summary in {**known, **others}.items():
        for name in set(summary) - {"n", "applicable"}:
            assert metrics[system][name] == pytest.approx(summary[name]), (system, name)
    # Nothing was encoded again, and only what the run did not answer was answered.
    assert "embeddings of the documents: " in out and not (output / "index").exists()
    assert known["after"] != known["before"]
    compared = load(output, "differences.json")["differences"]
    pairs = {(row["system"], row["baseline"]) for row in compared}
    assert {("after", "before"), ("hybrid", "hybrid_before"), ("hybrid", "bm25")} <= pairs


@pytest.mark.slow
def test_a_run_is_evaluated_on_other_data(script, run_folder, write_domain, tmp_path):
    data = write_domain(tmp_path / "other", splits=("eval",))
    with open(data / "corpus.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"_id": "new", "title": "", "text": "one more passage"}) + "\n")
    output = tmp_path / "o"
    flags = [f"--run={run_folder}", f"--data={data}", "--split=eval", f"--output={output}"]
    systems = ["--systems", "after", "hybrid"]
    assert script.main([*flags, *SMALL, "--no-robustness", *systems]) == 0
    metrics = load(output, "metrics.json")
    assert list(metrics) == ["after", "hybrid", "served"]
    assert (output / "index" / "1").is_dir()  # another corpus, so it was encoded


@pytest.mark.slow
def test_the_options_of_a_run_hold_unless_flags_say_otherwise(run_folder):
    run = open_run(run_folder).config
    same = run_options(EvaluateConfig(run=str(run_folder)), run)
    assert same.evaluation.documents == 2 and same.evaluation.max_new_tokens == 3
    assert (same.data, same.encoder, same.lm) == (
        run.data,
        run.encoder,
        run.lm,
    )
    changed = run_options(
        EvaluateConfig(
            run=str(run_folder),
            documents=4,
            mode="rag_token",
            beams=3,
            max_new_tokens=5,
            document_tokens=7,
            seed=9,
            resamples=11,
            encode_tokens=77,
            score_tokens=88,
            fields="id=docid",
            data="elsewhere",
            max_questions=6,
            answer_questions=5,
        ),
        run,
    )
    evaluation = changed.evaluation
    assert (evaluation.documents, evaluation.mode, evaluation.beams) == (4, "rag_token", 3)
    assert (evaluation.max_new_tokens, evaluation.resamples) == (5, 11)
    assert changed.prompt.document_tokens == 7 and changed.seed == 9
    assert (changed.encode_tokens, changed.score_tokens) == (77, 88)
    assert changed.data == "elsewhere"
    caps = changed.data_options
    assert (caps.fields, caps.test_questions, caps.answer_questions) == ("id=docid", 6, 5)


# -- flags


def test_every_option_changes_the_fingerprint_except_where_it_is_written():
    config = EvaluateConfig(mode="rag_token")
    changed = {
        "data": "x", "fields": "id=a", "language": "none", "on_bad_row": "skip",
            "on_unknown": "skip", "encoder": "x", "lm": "x",
                "query_encoder": "x", "doc_encoder": "x",
            "query_prefix": "", "doc_prefix": "d: ", "split": "dev",
            "template": "{document} {question}", "chat": "on",
        "systems": ("bm25",), "documents": 2, "mode": "rag_sequence_fast", "beams": 2,
        "max_new_tokens": 2, "document_tokens": 9, "max_questions": 3, "answer_questions": 3,
        "seed": 3, "resamples": 3, "bins": 3, "support_threshold": 0.5, "robustness": False,
        "distractors": 3, "encode_tokens": 3, "score_tokens": 3, "rerank": "question",
        "rerank_depth": 3, "index": "milvus:http://host:19530/docs", "queries": "q.csv",
        "qrels": "r.tsv",
    }  # fmt: skip
    assert {f.name for f in dataclasses.fields(config)} - {
        "run",
        "output",
        "devices",
        "fsdp",
        "distributed",
        "log_to",
    } == set(changed)
    plain = config.fingerprint(None)
    for name, value in changed.items():
        other = dataclasses.replace(config, **{name: value})
        assert other.fingerprint(None) != plain, name
    elsewhere = dataclasses.replace(config, output="elsewhere")
    assert elsewhere.fingerprint(None) == plain


@pytest.mark.slow
def test_flags_of_what_is_measured(script, base, evaluated, tmp_path, capsys):
    """One evaluation with several flags changed at once, each seen in its own place."""
    output = tmp_path / "o"
    flags = [
        *base, f"--output={output}", "--split=dev", "--systems", "hybrid_before",
        "--seed=5", "--bins=1", "--distractors=1", "--max_new_tokens=1", "--answer_questions=4",
        "--support_threshold=1", "--document_tokens=5", "--max_questions=6",
    ]  # fmt: skip
    assert script.main(flags) == 0
    out = capsys.readouterr().out
    metrics, lines = load(output, "metrics.json"), load(output, "predictions.jsonl")
    assert list(metrics) == ["hybrid_before"]
    assert len(lines) == 6
    asked = {line["id"] for line in lines}
    assert asked.isdisjoint(line["id"] for line in load(evaluated, "predictions.jsonl"))
    assert "chosen on dev questions, also on these" in out
    assert "6 questions of dev, 4 of them answered" in out
    (only,) = load(output, "calibration.json")["hybrid_before"]["confidence"]["reliability"]
    assert only["count"] == 4
    found = [line["robustness"]["distractors"]["doc_ids"] for line in lines if "robustness" in line]
    assert [len(docs) for docs in found] == [1] * 4
    assert "or 100% of the content words" in out


def test_the_config_file_comes_before_the_flags(script, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('documents = 3\nsystems = ["bm25", "before"]\nbins = 4\n')
    flags = parse_flags(EvaluateConfig(), None, [f"--config={path}", "--bins=5"]).options
    assert (flags.documents, flags.systems, flags.bins) == (3, ("bm25", "before"), 5)


@pytest.mark.slow
def test_dry_run_leaves_nothing(script, base, tmp_path, capsys):
    assert script.main([*base, f"--output={tmp_path / 'o'}", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "== forecast" in out and "== answers" not in out
    assert not (tmp_path / "o").exists()


def test_debug_shows_the_traceback(script, base, tmp_path):
    with pytest.raises(ValueError, match="--split nowhere"):
        script.main([*base, f"--output={tmp_path / 'o'}", "--split=nowhere", "--debug"])


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--split=nowhere"], "--split nowhere: data has no such questions; it has dev, test"),
        (["--systems", "after"], "there are no adapted models; add --run"),
        (["--beams=2"], "beams=2 does nothing with mode concat"),
        (["--beams=0", "--mode=rag_token"], "beams must be at least 1"),
        (["--support_threshold=0"], "support_threshold must lie in"),
        (["--bins=0"], "bins must be at least 1"),
        (["--distractors=0"], "distractors must be at least 1"),
        (["--max_questions=-1"], "max_questions must be at least 0"),
        (["--documents=0"], "documents must be at least 1"),
        (["--systems", "bm25", "bm25"], "names a system twice"),
        (["--run=nowhere"], "says which models it adapted"),
        (["--output="], "output must name a folder"),
        (["--fields=text"], "expected id=docid,text=contents"),
    ],
)
def test_mistakes_are_one_sentence(script, base, tmp_path, capsys, flags, match):
    assert match in refused(script, capsys, *base, f"--output={tmp_path / 'o'}", *flags)


def test_a_folder_that_is_no_run(script, tmp_path, capsys):
    message = refused(script, capsys, f"--run={tmp_path}", f"--output={tmp_path / 'o'}")
    assert "no run there" in message


@pytest.mark.slow
def test_folders_that_hold_something_else(script, base, evaluated, run_folder, tmp_path, capsys):
    message = refused(script, capsys, *base, f"--output={evaluated}", "--bins=3")
    assert "bins: 10 there, 3 here" in message
    (tmp_path / "letter.txt").write_text("x")
    assert "letter.txt" in refused(script, capsys, *base, f"--output={tmp_path}")
    flags = [f"--run={run_folder}", f"--output={run_folder}"]
    assert "is the folder of the run" in refused(script, capsys, *flags)
    # An evaluation is no run.
    flags = [f"--run={evaluated}", f"--output={tmp_path / 'o'}"]
    assert f"{evaluated} was made by experiments/evaluate.py" in refused(script, capsys, *flags)


def test_without_an_adapted_language_model_its_columns_are_refused():
    config = EvaluateConfig(run="r", systems=("lm_half",))
    with pytest.raises(ValueError, match="r did not adapt the language model"):
        system_names(config, adapts_lm=False)
    assert system_names(config, adapts_lm=True) == ("lm_half",)
    everything = system_names(EvaluateConfig(run="r"), adapts_lm=False)
    assert everything == ("closed_book", "bm25", "before", "hybrid_before", "after", "hybrid")
