"""Who may connect, and clients that do not go on: nothing of a run is needed for it."""

import asyncio
import json
import os
import signal
import socket
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn", reason="needs the [serve] extra")

from starlette.testclient import TestClient

from ragjax.data import Passage
from ragjax.runs.serve import app as app_module
from ragjax.runs.serve.app import allowed_hosts, make_app, run_server
from ragjax.runs.serve.batches import ServeLimits
from ragjax.runs.serve.service import Found, Told


class Stub:
    """A service of no run, which finds nothing."""

    def __init__(self, *, documents=4):
        self.limits, self.failure, self.asked = ServeLimits(), None, []
        asker = SimpleNamespace(asked_documents=documents, system=SimpleNamespace(size=1))
        self.opened = SimpleNamespace(asker=asker, name="index/0")

    async def start(self):
        """Starts nothing."""

    async def stop(self):
        """Stops nothing."""

    def waiting(self):
        return {}

    async def search(self, texts, k):
        self.asked.append(k)
        return []


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1"])
def test_an_address_of_this_machine_is_reached_by_its_own_name(address):
    client = TestClient(make_app(Stub(), hosts=allowed_hosts(address)))
    shown = f"[{address}]" if ":" in address else address
    for host, status in ((f"{shown}:8000", 200), ("localhost", 200), ("evil.example", 400)):
        assert client.get("/", headers={"host": host}).status_code == status
    assert allowed_hosts("0.0.0.0") == ("*",)


@pytest.mark.parametrize(("documents", "found"), [(3, 3), (150, 100)])
def test_a_search_that_does_not_say_finds_as_many_as_an_answer_reads(documents, found):
    service = Stub(documents=documents)
    answer = TestClient(make_app(service)).post("/search", json={"queries": ["a"]})
    assert answer.status_code == 200 and service.asked == [found]


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(app_module, "_BODY_SECONDS", 0.05)
    parts, sent = [{"type": "http.request", "body": b"{", "more_body": True}], []

    async def receive():
        return parts.pop() if parts else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/search", "headers": headers,
             "query_string": b""}  # fmt: skip
    asyncio.run(make_app(Stub())(scope, receive, send))
    assert sent[0]["status"] == 408 and (b"connection", b"close") in sent[0]["headers"]
    assert "did not come within" in json.loads(sent[1]["body"])["error"]["message"]


def test_a_client_that_does_not_go_on_does_not_keep_an_ending_server(monkeypatch):
    monkeypatch.setattr(app_module, "_BODY_SECONDS", 1)
    listening = app_module.listen("127.0.0.1", 0)
    client = socket.create_connection(listening.getsockname())
    head = "POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: 9\r\n\r\n".encode())
    service, timer = Stub(), threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))

    async def start():
        timer.start()

    service.start = start
    with client, listening:
        assert run_server(service, listening) == 128 + signal.SIGTERM
        assert client.recv(4096).startswith(b"HTTP/1.1 408")
    timer.join()


def test_a_client_that_reads_no_answer_does_not_keep_an_ending_server(monkeypatch):
    monkeypatch.setattr(app_module, "_ENDING_SECONDS", 1)
    listening, service = app_module.listen("127.0.0.1", 0), Stub()
    long = Found(Passage("d1", "", "word " * 4_000_000), 1.0)

    async def search(texts, k):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return [Told("index/0", [long])]

    service.search = search
    client = socket.create_connection(listening.getsockname())
    body = json.dumps({"queries": ["a"]}).encode()
    head = "POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    with client, listening:
        assert run_server(service, listening) == 128 + signal.SIGTERM
