"""A served run and its client, in this process."""

import time

from starlette.testclient import TestClient

from ragjax.runs.ask.asker import Asker
from ragjax.runs.ask.prompts import ReaderOptions
from ragjax.runs.serve.app import make_app
from ragjax.runs.serve.batches import ServeLimits
from ragjax.runs.serve.service import Service
from ragjax.runs.serve.source import Source

QUESTION = "what does the red cat like?"
OPTIONS = ReaderOptions(documents=3, document_tokens=40, max_new_tokens=4, windows=2)
LIMITS = ServeLimits(batch=4, waiting=40, answers=3, body_kb=20, watch_seconds=0.1)


def silent(line):
    """Reports to nobody."""


def open_client(folder, limits=LIMITS, **more):
    source = Source(folder, lambda system: Asker(system, OPTIONS), log=silent, **more)
    served = Service(source, limits)
    client = TestClient(make_app(served), raise_server_exceptions=False)
    return served, client


def until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


def wait_until_ready(served, client):
    def ready():
        if served.failure is not None:
            raise served.failure
        return client.get("/health").status_code == 200

    until(ready)
