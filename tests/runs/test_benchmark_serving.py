"""The benchmark of the server runs whole on a tiny run, and loses nothing."""

import asyncio
import json
import subprocess
import sys

import pytest
from programs import environment, load_script

pytest.importorskip("uvicorn", reason="needs the [serve] extra")


@pytest.fixture
def benchmark(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return load_script("benchmarks/serving.py")


@pytest.mark.slow
def test_every_search_is_answered_as_it_is_alone(benchmark, tiny_run, tmp_path, capsys):
    output = tmp_path / "found.json"
    flags = [f"--run={tiny_run('train_rag').folder}", "--clients=8", "--requests=200",
             "--server=--limits.batch=4 --documents=2", f"--output={output}"]  # fmt: skip
    assert benchmark.main(flags) == 0
    found = json.loads(output.read_text())
    assert (found["lost"], found["mixed_up"], found["exit_code"]) == (0, 0, 143)
    assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"]
    assert "200 searches, 8 clients: 0 lost, 0 mixed up" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--clients=0", "--requests=0", "--topk=0"])
def test_sizes_out_of_range_are_refused(benchmark, capsys, flag):
    assert benchmark.main(["--run=x", flag]) == 2
    assert f"error: {flag.split('=')[0]} must be at least 1" in capsys.readouterr().err


def test_a_server_that_does_not_start_is_told_with_its_last_words(benchmark, tmp_path):
    log = tmp_path / "log"
    with (
        log.open("wb") as file,
        subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.exit('no run there')"], stderr=file
        ) as server,
        pytest.raises(ValueError, match="did not start: no run there"),
    ):
        benchmark._port(server, log)


def test_a_connection_that_ends_without_an_answer_is_an_error(benchmark):
    async def hang_up(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async def main():
        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            client = await benchmark._Client.open(server.sockets[0].getsockname()[1])
            try:
                await client.send("GET", "/health", b"")
            finally:
                await client.close()

    with pytest.raises(ConnectionError, match="ended a connection at /health"):
        asyncio.run(main())
