"""A server under load: requests lost or mixed up, p50 and p95 of their time, requests a second.

    python benchmarks/serving.py --run runs/adapt

Starts `experiments/serve.py` on a free port, asks it each of the run's questions once, and then
lets 32 clients ask 10^4 searches, each the next one as soon as it has an answer; every answer must
be the one that its question got alone. Takes a few minutes on two cores.
"""

import asyncio
import dataclasses
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _beside import run_program

from ragjax.runs import open_run
from ragjax.runs.data import read_data
from ragjax.storage import write_json

_SERVER = Path(__file__).parents[1] / "experiments" / "serve.py"
_QUESTIONS = 500  # different ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What is asked of which run.

    Attributes:
        run: Folder of a run.
        clients: Connections, each with one request at a time.
        requests: Searches in all.
        topk: Documents of each.
        server: Flags of `serve.py`, in one string.
        output: File for the results, JSON; "": none.
    """

    run: str
    clients: int = 32
    requests: int = 10_000
    topk: int = 3
    server: str = ""
    output: str = ""


class Answer(NamedTuple):
    """What a search got."""

    status: int
    ids: tuple[str, ...]
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code: 0, or 2 for bad input or a lost request."""
    return run_program(Flags, run, arguments, __doc__)


def run(flags: Flags) -> None:
    """Starts the server, loads it, stops it and prints what came of it."""
    for name in ("clients", "requests", "topk"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(flags, name)}")
    folder = Path(flags.run)
    dataset = read_data(open_run(folder).config, folder, lambda line: None)
    texts = [question.text for split in dataset.questions.values() for question in split]
    texts = list(dict.fromkeys(texts))[:_QUESTIONS]
    if not texts:
        raise ValueError(f"--run {flags.run}: its data has no questions to ask")
    command = [sys.executable, str(_SERVER), f"--run={flags.run}", "--port=0"]
    # A file, since a pipe that nobody reads would stop a server that has much to say.
    with tempfile.NamedTemporaryFile(prefix="serving-", suffix=".log") as log:
        server = subprocess.Popen([*command, *flags.server.split()], stderr=log)
        try:
            port = _port(server, Path(log.name))
            found = asyncio.run(_load(flags, port, texts))
            server.send_signal(signal.SIGTERM)
            found["exit_code"] = server.wait(timeout=60)
        finally:
            server.kill()
            server.wait()
    if flags.output:
        write_json(Path(flags.output), {"flags": dataclasses.asdict(flags), **found})
    print(
        f"{found['requests']:,} searches, {flags.clients} clients: {found['lost']} lost,"
        f" {found['mixed_up']} mixed up; {found['per_second']:,.0f} a second,"
        f" p50 {found['p50_ms']:.1f} ms, p95 {found['p95_ms']:.1f} ms, p99 {found['p99_ms']:.1f} ms"
    )
    if found["lost"] or found["mixed_up"]:
        raise ValueError("the server lost or mixed up requests")


def _port(server: subprocess.Popen[bytes], log: Path) -> int:
    """Returns the port that a server says it listens at."""
    while True:
        ended = server.poll() is not None
        said = log.read_text("utf-8")
        if found := re.search(r"^http://127\.0\.0\.1:(\d+)/", said, re.MULTILINE):
            return int(found[1])
        if ended:
            raise ValueError(f"the server did not start: {' '.join(said.splitlines()[-3:])}")
        time.sleep(0.1)


async def _load(flags: Flags, port: int, texts: Sequence[str]) -> dict[str, Any]:
    first = await _Client.open(port)
    while (await first.send("GET", "/health", b""))[0] != 200:
        await asyncio.sleep(0.2)
    alone = {text: (await _search(first, text, flags.topk)).ids for text in texts}
    await first.close()
    answers: list[Answer] = []
    mixed_up = 0
    left = iter(range(flags.requests))

    async def ask() -> None:
        nonlocal mixed_up
        client = await _Client.open(port)
        for number in left:
            text = texts[number % len(texts)]
            answer = await _search(client, text, flags.topk)
            mixed_up += answer.status == 200 and answer.ids != alone[text]
            answers.append(answer)
        await client.close()

    started = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(flags.clients)))
    seconds = time.perf_counter() - started
    times = 1000 * np.asarray([answer.seconds for answer in answers])
    p50, p95, p99 = np.percentile(times, (50, 95, 99)).tolist()
    answered = sum(answer.status == 200 for answer in answers)
    return {
        "requests": flags.requests, "lost": flags.requests - answered, "mixed_up": mixed_up,
        "seconds": seconds, "per_second": flags.requests / seconds,
        "p50_ms": p50, "p95_ms": p95, "p99_ms": p99,
    }  # fmt: skip


async def _search(client: "_Client", text: str, k: int) -> Answer:
    body = json.dumps({"queries": [text], "topk": k}).encode()
    started = time.perf_counter()
    status, content = await client.send("POST", "/search", body)
    seconds = time.perf_counter() - started
    if status != 200:
        return Answer(status, (), seconds)
    (documents,) = json.loads(content)["result"]
    return Answer(status, tuple(document["id"] for document in documents), seconds)


class _Client:
    """One connection that is kept open; so little that it takes no time from the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> "_Client":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def send(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Returns the status and the body of the response.

        Raises:
            ConnectionError: The server ended the connection instead.
        """
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.lower().split("\r\n")
            length = next(line for line in lines if line.startswith("content-length:"))
            content = await self._reader.readexactly(int(length.partition(":")[2]))
        except EOFError as error:
            raise ConnectionError(f"the server ended a connection at {path}: {error}") from error
        return int(lines[0].split()[1]), content


if __name__ == "__main__":
    sys.exit(main())
