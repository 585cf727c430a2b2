"""The script as its users start it: a real server on a free port, its flags, page and end."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from programs import ROOT, environment, load_script

pytest.importorskip("uvicorn", reason="needs the [serve] extra")

from ragjax.runs.ask.decoding import DECODES
from ragjax.runs.serve import app as app_module
from ragjax.runs.system import open_system

pytestmark = pytest.mark.slow

QUESTION = "what does the red cat like?"
SMALL = ("--document_tokens=40", "--max_new_tokens=4", "--documents=3", "--limits.batch=4")


class Server:
    """A server process, ready."""

    def __init__(self, folder, *flags):
        command = [sys.executable, str(ROOT / "experiments/serve.py"), f"--run={folder}"]
        self.process = subprocess.Popen(
            [*command, "--port=0", *SMALL, *flags],
            env=environment(), stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said = []
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.match(r"(http://\S+)/ ", line):
                self.url = found[1].replace("0.0.0.0", "127.0.0.1")
                break
        else:
            raise AssertionError("".join(self.said))

    def ready(self):
        end = time.monotonic() + 300
        while True:
            try:
                return self.get("/health")
            except urllib.error.HTTPError as error:
                assert error.code == 503 and time.monotonic() < end
                time.sleep(0.1)

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)

    def post(self, path, **fields):
        request = urllib.request.Request(
            self.url + path, json.dumps(fields).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def end(self, signum=signal.SIGTERM):
        self.process.send_signal(signum)
        try:
            return self.process.communicate(timeout=120)[1], self.process.returncode
        finally:
            self.process.kill()


def test_a_server_answers_and_ends_at_sigterm_with_what_was_asked(tiny_run):
    server = Server(tiny_run("train_rag").folder)
    assert server.url.startswith("http://127.0.0.1:")
    assert server.ready()["documents"] == 80
    found = server.post("/search", queries=[QUESTION], return_scores=True)
    assert found["result"][0][0]["document"]["contents"]
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as asked:
        body = json.dumps({"question": QUESTION}).encode()
        head = (
            "POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        asked.sendall(head.encode() + body)
        time.sleep(0.02)
        said, code = server.end()
        got = b"".join(iter(lambda: asked.recv(65536), b""))
    assert got.startswith(b"HTTP/1.1 200") and b'"answer":' in got
    assert code == 128 + signal.SIGTERM
    assert "Traceback" not in said and "serving generation index/" in said


def test_flags_reach_what_answers(tiny_run):
    server = Server(
        tiny_run("train_rag").folder, "--host=0.0.0.0", "--documents=2", "--models=base",
        "--retriever=bm25", "--rerank=question", "--rerank_depth=2", "--max_new_tokens=2",
        "--limits.body_kb=1",
    )  # fmt: skip
    assert any("no authentication" in line for line in server.said)
    assert server.ready()["generation"] == "index/0"
    assert len(server.post("/search", queries=[QUESTION])["result"][0]) == 2
    assert server.post("/search", queries=["zz"])["result"] == [[]]  # of words alone
    asked = {"model": "rag", "messages": [{"role": "user", "content": QUESTION}]}
    assert server.post("/v1/chat/completions", **asked)["usage"]["completion_tokens"] <= 2
    with pytest.raises(urllib.error.HTTPError, match="413"):
        server.post("/ask", question="a" * 1000)
    said, code = server.end(signal.SIGINT)
    assert code == 128 + signal.SIGINT
    assert "the best 2 documents are ranked again: question" in said


def test_flags_reach_the_reader(tiny_run):
    script = load_script("experiments/serve.py")
    system = open_system(tiny_run("train_rag").folder, log=lambda line: None)
    asker = script._asker(script.Flags(run="x", decode="concat", document_tokens=7), system)
    assert asker._decode is DECODES["concat"] and asker.reader.prompts.options.document_tokens == 7
    usual = script._asker(script.Flags(run="x"), system)
    assert usual._decode is DECODES["ensemble"] and usual.asked_documents == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--run="], "give --run FOLDER"),
        (["--run=/nowhere"], "no run there"),
        (["--documents=0"], "--documents must be at least 1, got 0"),
        (["--max_new_tokens=0"], "--max_new_tokens must be at least 1"),
        (["--document_tokens=-1"], "--document_tokens must be at least 0"),
        (["--rerank_depth=-1"], "--rerank_depth must be at least 0"),
        (["--rerank=/nowhere"], "--rerank"),
        (["--devices=0"], "--devices must be at least 1"),
        (["--limits.batch=0"], "--limits.batch must be at least 1, got 0"),
        (["--limits.watch_seconds=0"], "--limits.watch_seconds must be at least 0.1"),
        (["--host=192.0.2.1"], "--host 192.0.2.1 --port 8000"),
        (["--port=70000"], "--port must be at most 65535, got 70000"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tiny_run, capsys, more, message):
    script = load_script("experiments/serve.py")
    assert script.main([f"--run={tiny_run('train_rag').folder}", *more]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    with pytest.raises((ValueError, OSError)):
        script.main([f"--run={tiny_run('train_rag').folder}", *more, "--debug"])


def test_an_address_that_is_taken_is_named_before_anything_is_read(tiny_run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = [f"--run={tiny_run('train_rag').folder}", f"--port={taken.getsockname()[1]}"]
        assert load_script("experiments/serve.py").main(flags) == 2
    assert "give a free --port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"), [("--models=adapted", "finishes the run"), ("--devices=99", "devices")]
)
def test_a_run_that_cannot_be_opened_is_one_line_and_code_2(tiny_run, tmp_path, flag, message):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run("train_rag").folder, folder)
    shutil.rmtree(folder / "checkpoints")
    process = Server(folder, flag).process
    said, code = process.communicate(timeout=300)[1], process.returncode
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0] and "Traceback" not in said


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r'pip install "ragjax\[serve\]"'):
        app_module.check_installed()
