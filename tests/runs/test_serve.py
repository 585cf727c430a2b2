"""A served run: every route, streams, limits and errors."""

import base64
import json
import threading

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the [serve] extra")

from serve_clients import LIMITS, OPTIONS, QUESTION, open_client, until, wait_until_ready
from starlette.testclient import TestClient

from ragjax.data import passage_text
from ragjax.runs.serve import service as service_module
from ragjax.runs.serve.app import as_refusal, make_app
from ragjax.runs.serve.service import warm_up
from ragjax.runs.serve.source import Source
from ragjax.runs.system import encode_documents, encode_queries, retrieve

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def opened(tiny_run):
    """The service of a finished run, and a client, ready."""
    served, client = open_client(tiny_run("train_rag").folder)
    with client:
        first = client.get("/health")
        assert first.status_code in (200, 503)
        wait_until_ready(served, client)
        yield served, client


@pytest.fixture
def client(opened):
    return opened[1]


@pytest.fixture
def system(opened):
    return opened[0].opened.asker.system


def events(text):
    """The data of server-sent events."""
    parts = text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return [part.removeprefix("data: ") for part in parts]


def test_until_the_models_are_read_all_is_refused_for_now(tiny_run, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(Source, "open", lambda self: go_on.wait(60) and 1 / 0)
    served, client = open_client(tiny_run("train_rag").folder)
    ended = threading.Event()
    served.on_failure = ended.set
    with client:
        for answer in (
            client.get("/health"),
            client.post("/search", json={"queries": ["a"]}),
            client.post("/ask", json={"question": "a"}),
        ):
            assert answer.status_code == 503 and answer.headers["retry-after"] == "2"
            assert "ask again soon" in answer.json()["error"]["message"]
        go_on.set()
        assert ended.wait(60) and isinstance(served.failure, ZeroDivisionError)


def test_health_names_the_generation(client, system):
    found = client.get("/health").json()
    assert found == {
        "status": "ready", "generation": f"index/{system.retriever.version}", "documents": 80,
        "waiting": {"texts": 0, "answers": 0},
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/search", "/retrieve"])
def test_search_answers_in_the_form_of_search_r1(client, system, opened, path):
    queries = [QUESTION, "what does the green owl like?", ""]
    asked = {"queries": queries, "topk": 3, "return_scores": True}
    found = client.post(path, json=asked)
    result = found.json()["result"]
    assert found.headers["x-generation"] == found.json()["generation"]
    expected = retrieve(system, queries, 10, by=opened[0].opened.asker.by).found
    corpus = system.workspace.dataset.corpus
    for row, documents in enumerate(result):
        assert 0 < len(documents) <= 3
        for place, each in enumerate(documents):
            passage = corpus[int(expected.doc_ids[row, place])]
            # What Search-R1's trainer makes of it.
            title, _, text = each["document"]["contents"].partition("\n")
            assert (each["document"]["id"], title, text) == (
                passage.id, passage.title, passage.text,
            )  # fmt: skip
            assert each["score"] == pytest.approx(expected.scores[row, place], rel=1e-4)
    bare = client.post(path, json={"queries": queries[:1]}).json()["result"]
    assert len(bare[0]) == OPTIONS.documents
    assert [doc["id"] for doc in bare[0]] == [each["document"]["id"] for each in result[0]]


def test_concurrent_searches_are_those_of_one_at_a_time(client, monkeypatch):
    colours = ("red", "green", "blue", "white", "black", "brown", "pink", "grey")
    queries = [f"what does the {colour} elk like?" for colour in colours]

    def ask(query):
        asked = {"queries": [query], "topk": 2, "return_scores": True}
        return client.post("/search", json=asked).json()["result"][0]

    alone = [ask(query) for query in queries]
    sizes, search = [], service_module._search
    monkeypatch.setattr(
        service_module, "_search",
        lambda asker, texts, k: (sizes.append(len(texts)), search(asker, texts, k))[1],
    )  # fmt: skip
    together = [None] * len(queries)
    threads = [
        threading.Thread(target=lambda n=n: together.__setitem__(n, ask(queries[n])))
        for n in range(len(queries))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = client.post("/search", json={"queries": queries, "topk": 2, "return_scores": True})
    for one, two, three in zip(alone, together, whole.json()["result"], strict=True):
        assert [d["document"] for d in one] == [d["document"] for d in two]
        assert [d["document"] for d in one] == [d["document"] for d in three]
        scores = [[d["score"] for d in found] for found in (one, two, three)]
        np.testing.assert_allclose(scores[1:], [scores[0]] * 2, rtol=1e-4, atol=1e-5)
    assert max(sizes) == LIMITS.batch and sum(sizes) == 2 * len(queries)


def test_an_answer_comes_with_sources_and_attribution(client, system, opened):
    found = client.post("/ask", json={"question": QUESTION}).json()
    reply = opened[0].opened.asker.ask(QUESTION)
    assert found["answer"] == reply.answer and found["grounded"] == reply.grounded
    assert [source["id"] for source in found["documents"]] == [s.id for s in reply.sources]
    shares = [source["posterior"] for source in found["documents"]]
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert found["generation"] == f"index/{system.retriever.version}"
    given = client.post("/ask", json={"question": QUESTION, "answer": "likes", "explain": True})
    assert given.json()["answer"] == "likes" and given.json()["span"]["text"] == "likes"
    bare = client.post("/ask", json={"question": QUESTION, "answer": "likes", "explain": False})
    assert bare.json()["span"] is None


def test_a_streamed_answer_is_the_whole_one_in_pieces(client):
    whole = client.post("/ask", json={"question": QUESTION}).json()
    streamed = client.post("/ask", json={"question": QUESTION, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *pieces, last = map(json.loads, events(streamed.text))
    assert "".join(piece["text"] for piece in pieces) == whole["answer"] == last["reply"]["answer"]
    timeless = [{k: v for k, v in d.items() if "seconds" not in k} for d in (whole, last["reply"])]
    assert timeless[0] == timeless[1]


def test_a_chat_is_in_the_form_of_openai(client):
    asked = {"model": "rag", "messages": [{"role": "user", "content": QUESTION}]}
    found = client.post("/v1/chat/completions", json=asked).json()
    assert (found["object"], found["model"]) == ("chat.completion", "rag")
    (choice,) = found["choices"]
    assert choice["message"]["role"] == "assistant" and choice["index"] == 0
    assert choice["finish_reason"] in ("stop", "length")
    usage = found["usage"]
    assert 1 <= usage["completion_tokens"] <= OPTIONS.max_new_tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert found["rag"]["documents"][0]["text"] and found["rag"]["notes"] is not None
    streamed = client.post(
        "/v1/chat/completions",
        json=asked | {"stream": True, "stream_options": {"include_usage": True}},
    )
    *chunks, done = events(streamed.text)
    assert done == "[DONE]"
    *pieces, ended, used = map(json.loads, chunks)
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    text = "".join(piece["choices"][0]["delta"]["content"] for piece in pieces)
    assert text == choice["message"]["content"]
    assert ended["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert used["choices"] == [] and used["usage"] == usage


def test_embeddings_are_those_of_either_encoder_in_the_form_of_openai(client, system):
    texts = ["the red cat", "an owl", "a", "b", "c"]  # more than a batch
    encoders = {"query_encoder": encode_queries, "doc_encoder": encode_documents}
    for model, encode in encoders.items():
        found = client.post("/v1/embeddings", json={"model": model, "input": texts}).json()
        rows = [row["embedding"] for row in found["data"]]
        np.testing.assert_allclose(rows, encode(system, texts), atol=1e-5)
        assert [row["index"] for row in found["data"]] == list(range(5))
        assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 5
        packed = client.post(
            "/v1/embeddings",
            json={"model": model, "input": texts[0], "encoding_format": "base64"},
        ).json()["data"][0]["embedding"]
        np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), rows[0],
                                   atol=1e-5)  # fmt: skip
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names == ["rag", "query_encoder", "doc_encoder"]


def test_documents_are_embedded_as_they_were_indexed(client, system):
    passage = system.workspace.dataset.corpus[5]
    asked = {"model": "doc_encoder", "input": passage_text(passage)}
    found = client.post("/v1/embeddings", json=asked).json()["data"][0]["embedding"]
    np.testing.assert_allclose(found, system.retriever.embeddings[np.array([5])][0], atol=1e-4)


def test_nothing_compiles_after_the_warm_up(opened, compilations):
    asker = opened[0].opened.asker
    for _ in warm_up(asker, LIMITS.batch):
        pass
    with compilations() as compiled:
        for size in range(1, LIMITS.batch + 1):
            texts = [QUESTION, "cat", "what does the pink elk like? " * 3, "zz"][:size]
            retrieve(asker.system, texts, 10, by=asker.by)
            encode_documents(asker.system, texts)
    assert compiled == []


# What is refused.


@pytest.mark.parametrize(
    ("path", "sent", "status", "words"),
    [
        ("/search", {"json": {"queries": "a"}}, 400, "queries must be a list"),
        ("/search", {"json": {"queries": ["a"] * 41}}, 400, "more than the 40"),
        ("/ask", {"json": {}}, 400, "question is missing"),
        ("/ask", {"content": b"{", "headers": {"content-type": "application/json"}}, 400, "JSON"),
        ("/ask", {"content": b'{"question": "a"}'}, 415, "Content-Type: application/json"),
        ("/ask", {"json": {"question": "a" * 20_000}}, 413, "longer than 20,000 bytes"),
        ("/v1/chat/completions", {"json": {"model": "gpt"}}, 404, "no model 'gpt' here"),
        ("/v1/embeddings", {"json": {"model": "rag", "input": "a"}}, 404, "no model 'rag' here"),
        ("/nowhere", {"json": {}}, 404, "nothing is at /nowhere"),
        ("/health", {"json": {}}, 405, "another method"),
    ],
)
def test_a_wrong_request_gets_one_sentence_and_its_status(client, path, sent, status, words):
    found = client.post(path, **sent)
    assert found.status_code == status
    error = found.json()["error"]
    assert words in error["message"] and error["code"] == status
    assert error["type"] == "invalid_request_error"


def test_a_long_body_is_refused_without_its_length_being_told(client):
    def parts():
        for _ in range(30):
            yield b" " * 1000

    found = client.post("/ask", content=parts(), headers={"content-type": "application/json"})
    assert found.status_code == 413


def test_what_fails_inside_tells_the_client_nothing(client, monkeypatch):
    def fail(asker, item):
        raise ValueError("/secret/folder is damaged")

    monkeypatch.setattr(service_module, "_answer", fail)
    for found in (
        client.post("/ask", json={"question": QUESTION}),
        client.post("/ask", json={"question": QUESTION, "stream": True}),
    ):
        assert "the server failed at this request" in found.text
        assert "secret" not in found.text and "Traceback" not in found.text
    assert as_refusal(ValueError("--decode concat: too long")).status == 400


def test_too_many_questions_are_refused_and_the_others_are_answered(client, monkeypatch):
    answer, started, go_on = service_module._answer, threading.Event(), threading.Event()

    def wait(asker, item):
        started.set()
        assert go_on.wait(60)
        return answer(asker, item)

    monkeypatch.setattr(service_module, "_answer", wait)
    statuses = []

    def ask():
        statuses.append(client.post("/ask", json={"question": QUESTION}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(LIMITS.answers + 1)]
    threads[0].start()
    assert started.wait(60)  # which does not wait any more
    for thread in threads[1:]:
        thread.start()
    until(lambda: client.get("/health").json()["waiting"]["answers"] == LIMITS.answers)
    for stream in (False, True):
        refused = client.post("/ask", json={"question": QUESTION, "stream": stream})
        assert refused.status_code == 503 and refused.headers["retry-after"] == "2"
        assert "too many requests wait" in refused.json()["error"]["message"]
    go_on.set()
    for thread in threads:
        thread.join()
    assert statuses == [200] * (LIMITS.answers + 1)


def test_a_name_that_means_this_machine_elsewhere_is_refused(tiny_run):
    served, _ = open_client(tiny_run("train_rag").folder)
    app = make_app(served, hosts=("localhost", "127.0.0.1", "::1", "[::1]"))
    client = TestClient(app)  # without its lifespan: nothing is opened
    for host, status in (("evil.example", 400), ("localhost:8000", 200), ("[::1]:8000", 200)):
        assert client.get("/", headers={"host": host}).status_code == status
