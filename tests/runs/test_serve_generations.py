"""A run that is served while it trains: newer generations as they come, its models at the end."""

import shutil
import threading

import pytest

pytest.importorskip("starlette", reason="needs the [serve] extra")

from serve_clients import QUESTION, open_client, until, wait_until_ready

pytestmark = pytest.mark.slow


@pytest.fixture
def training(tiny_run, tmp_path):
    """The folder of a run as it is while it trains: without its end, its last generation held."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_run("train_rag").folder, folder)
    (folder / "metrics.json").unlink()
    generations = sorted((folder / "refresh" / "generations").iterdir())
    held = [(path, tmp_path / path.name) for path in generations[1:]]
    for path, away in held:
        path.rename(away)
    return folder, held


def test_a_newer_generation_is_served_as_it_comes_and_the_shipped_models_at_the_end(
    training, tiny_run
):
    folder, held = training
    served, client = open_client(folder)
    with client:
        wait_until_ready(served, client)
        first = client.post("/search", json={"queries": [QUESTION], "return_scores": True}).json()
        number = sorted((folder / "refresh" / "generations").iterdir())[0].name
        assert first["generation"].startswith(f"refresh/{number}, step ")
        assert served.opened.asker.system.retriever.version == int(number)
        stop, lost, seen = threading.Event(), [], set()

        def ask_on():
            while not stop.is_set():
                found = client.post("/search", json={"queries": [QUESTION]})
                seen.add(found.json().get("generation"))
                lost.extend([found.text] if found.status_code != 200 else [])

        thread = threading.Thread(target=ask_on)
        thread.start()
        for path, away in held:
            away.rename(path)
        newest = held[-1][0].name
        until(lambda: newest in client.get("/health").json()["generation"])
        second = client.post("/search", json={"queries": [QUESTION], "return_scores": True}).json()
        shutil.copy(tiny_run("train_rag").folder / "metrics.json", folder)
        until(lambda: client.get("/health").json()["generation"].startswith("index/"))
        stop.set()
        thread.join()
    assert lost == [] and second["generation"] in seen
    assert first["result"] != second["result"]


def test_a_generation_that_cannot_be_read_leaves_the_one_that_serves(training, caplog):
    folder, held = training
    served, client = open_client(folder)
    with client:
        wait_until_ready(served, client)
        before = client.get("/health").json()["generation"]
        path, away = held[-1]
        (away / "manifest.json").write_text("{}")
        away.rename(path)
        until(lambda: client.get("/health").json()["generation"] == before)
        (folder / "config.json").rename(folder / "config.away")
        until(lambda: "goes on serving" in caplog.text)
        assert client.post("/ask", json={"question": QUESTION}).status_code == 200


def test_a_run_without_anything_to_serve_is_refused_at_once(training, tmp_path):
    folder, _ = training
    shutil.rmtree(folder / "refresh")
    with pytest.raises(ValueError, match="the run has not ended, and has no index generation"):
        open_client(folder)
    with pytest.raises(FileNotFoundError, match="no run there"):
        open_client(tmp_path / "nowhere")
    served, _ = open_client(folder, models="base")
    assert served._source.newest() == "ended"
