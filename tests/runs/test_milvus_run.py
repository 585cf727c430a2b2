"""A run's index in a real Milvus server: published, searched, rolled back; and wrong flags."""

import dataclasses
import json
import shutil
import sys
from typing import NamedTuple

import numpy as np
import pytest
from milvus_server import milvus_server, needs_client
from programs import load_script

from ragjax.index import MilvusIndex
from ragjax.runs.indexes import in_milvus
from ragjax.runs.saved import doc_embeddings, open_run
from ragjax.runs.system import by_dense, by_hybrid, open_system, retrieve

NOWHERE = "milvus:http://127.0.0.1:9/docs"


class Shown(NamedTuple):
    out: str
    err: str  # in one line


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    with milvus_server(tmp_path_factory.mktemp("milvus")) as (uri, _):
        yield uri


@pytest.fixture
def program(capsys):
    """Runs a script; returns its exit code and what it printed."""

    def run(name, *flags):
        try:
            code = load_script(f"experiments/{name}.py").main([str(flag) for flag in flags])
        except SystemExit as stopped:  # where tyro makes the flags
            code = stopped.code
        out, err = capsys.readouterr()
        return code, Shown(out, " ".join(err.split()))

    return run


@pytest.mark.slow
def test_what_a_run_ships_is_published_asked_evaluated_and_rolled_back(
    uri, tiny_run, program, tmp_path
):
    run, index = tiny_run("adapt").folder, f"--index=milvus:{uri}/docs"
    code, shown = program("export", f"--run={run}", index, "--models=adapted", "--dry_run")
    assert code == 0 and "would hold 80 documents" in shown.out
    code, shown = program("export", f"--run={run}", index, "--models=adapted")
    assert code == 0, shown.err
    assert "80 of them inserted" in shown.out and "finds 1.000 of the exact best 10" in shown.out

    system = open_system(run, models="adapted", log=lambda _: None)
    served = in_milvus(system.retriever, f"milvus:{uri}/docs")
    questions = ["what does the red cat like?", "and the green dog?"]
    for by in (by_dense, by_hybrid):
        local = retrieve(system, questions, 5, by=by)
        there = retrieve(dataclasses.replace(system, retriever=served), questions, 5, by=by)
        assert there.found.doc_ids.tolist() == local.found.doc_ids.tolist()
        np.testing.assert_allclose(there.found.scores, local.found.scores, atol=1e-4)

    ask = [f"--run={run}", "--models=adapted", "--json", "--no-warm_up", questions[0]]
    ask += ["--max_new_tokens=3", "--retriever=dense", "--document_tokens=40"]
    answers = []
    for more in ([], [index]):
        code, shown = program("ask", *ask, *more)
        assert code == 0, shown.err
        answers.append(json.loads(shown.out))
    assert [d["id"] for d in answers[0]["documents"]] == [d["id"] for d in answers[1]["documents"]]
    assert answers[0]["answer"] == answers[1]["answer"]

    # Another encoder's: the base models have not made what is there.
    code, shown = program("ask", *ask, "--models=base", index)
    assert code == 2 and "not those of this encoder and corpus (model_fingerprint" in shown.err
    with pytest.raises(ValueError, match="model_fingerprint"):
        MilvusIndex.open(f"milvus:{uri}/docs", model_fingerprint="other")

    adapted = tmp_path / "run"  # that ships its adapted retriever
    shutil.copytree(run, adapted)
    facts = json.loads((adapted / "served.json").read_text())
    told = {"retriever": "adapted", "documents": "hybrid"}
    (adapted / "served.json").write_text(json.dumps(facts | told))
    small = ("--max_questions=10", "--answer_questions=2", "--max_new_tokens=3", "--resamples=20")
    tables = []
    for name, more in (("local", []), ("served", [index])):
        output = f"--output={tmp_path / name}"
        code, shown = program("evaluate", f"--run={adapted}", output, *small, *more)
        assert code == 0, shown.err
        tables.append(json.loads((tmp_path / name / "metrics.json").read_text())["after"])
    assert tables[0]["recall@5"] == tables[1]["recall@5"]
    for flags in (["evaluate", f"--output={tmp_path / 'none'}"], ["ask", "why?"]):
        code, shown = program(*flags, f"--run={run}", f"--index=milvus:{uri}/none")
        assert code == 2 and "has no alias none; publish an index first" in shown.err
    assert not (tmp_path / "none" / "config.json").exists()

    code, shown = program("export", f"--run={run}", index, "--models=adapted", "--index_kind=SCANN")
    assert code == 0 and "docs_000002_" in shown.out
    code, shown = program("export", index, "--roll_back")
    assert code == 0 and "names docs_000001_" in shown.out
    code, shown = program("export", index, "--roll_back")
    assert code == 2 and "no generation before docs_000001_" in shown.err


@pytest.mark.slow
def test_embeddings_of_a_run_are_those_of_what_it_ships(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run("adapt").folder, run)
    adapted, base = (doc_embeddings(open_run(run), which) for which in ("adapted", "base"))
    assert adapted.spec.model_fingerprint != base.spec.model_fingerprint
    assert base.folder.name == "0" and adapted.folder.name != "0"
    shutil.rmtree(adapted.folder)
    with pytest.raises(ValueError, match="not those of this encoder|no index of the adapted"):
        doc_embeddings(open_run(run), "adapted")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([f"--index={NOWHERE}"], "--index goes with one of --run FOLDER and --roll_back"),
        ([f"--index={NOWHERE}", "--run=r", "--roll_back"], "one of --run FOLDER and --roll_back"),
        ([f"--index={NOWHERE}", "--run=r", "--what=encoder"], "and without --what, --output"),
        (["--roll_back"], "--roll_back goes with --index"),
        ([f"--index={NOWHERE}", "--roll_back", "--dry_run"], "it does not go with --dry_run"),
        (["--run=r"], "give --what with --output FOLDER (a model), or --index"),
        (["--index=localhost/docs", "--run=r"], "served at milvus:URI/ALIAS, such as"),
        ([f"--index={NOWHERE}", "--run=r", "--keep=-1"], "--keep must be at least 0, got -1"),
    ],
)
def test_flags_of_an_export_that_are_at_odds(program, flags, message):
    code, shown = program("export", *flags)
    assert code == 2 and message in shown.err


def test_flags_of_a_search_that_are_at_odds(program, tmp_path):
    code, shown = program("ask", "--run=r", f"--index={NOWHERE}", "--retriever=bm25", "why?")
    assert code == 2 and "--retriever bm25 searches words alone" in shown.err
    code, shown = program("ask", "--run=r", "--index=docs", "why?")
    assert code == 2 and "served at milvus:URI/ALIAS, such as" in shown.err
    code, shown = program("evaluate", "--index=docs", f"--output={tmp_path}")
    assert code == 2 and "served at milvus:URI/ALIAS, such as" in shown.err


def test_a_server_that_does_not_answer_is_named_before_anything_is_loaded(program):
    needs_client()
    for name, flags in (("ask", ["--run=r", "why?"]), ("export", ["--run=r"])):
        code, shown = program(name, *flags, f"--index={NOWHERE}")
        assert code == 2 and "no Milvus server answers at http://127.0.0.1:9 (" in shown.err


def test_without_the_client_each_script_says_how_to_install_it(program, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    evaluate = ["evaluate", f"--output={tmp_path / 'out'}"]
    for flags in (["ask", "--run=r", "why?"], ["export", "--run=r"], evaluate):
        code, shown = program(*flags, f"--index={NOWHERE}")
        assert code == 2 and "pip install 'ragjax[milvus]'" in shown.err
