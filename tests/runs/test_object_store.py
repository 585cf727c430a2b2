"""A corpus encoded into an S3-compatible store, whose server and writers are killed meanwhile."""

import contextlib
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from programs import load_script, start

from ragjax.index import EmbeddingStore, fetch_store
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.system import open_base_system

SECRET = "geheim-geheim-geheim"


class Server:
    """moto's S3 server on loopback; what it holds is gone with its process."""

    def __init__(self, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self._log, self._process = f"http://127.0.0.1:{self.port}", log, None

    def start(self):
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(200):
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(urllib.request.Request(f"{self.url}/bucket", method="PUT"))
                return
            time.sleep(0.1)
        raise AssertionError(self._log.read_text())

    def kill(self):
        self._process.kill()
        self._process.wait()


@pytest.fixture
def server(tmp_path, monkeypatch):
    if importlib.util.find_spec("moto") is None:
        pytest.skip("moto is not installed: pip install 'moto[server]' brings an S3 server to test")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    server = Server(tmp_path / "server.log")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"_id": str(n), "text": f"the {n} cats"}) for n in range(200)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def command(data, tiny_inputs, tmp_path):
    def command(output, *flags):
        return [
            f"--encoder={tiny_inputs['encoder']}", f"--data={data}", f"--output={output}",
            f"--cache={tmp_path / 'cache'}", "--rows_per_shard=4", *flags,
        ]  # fmt: skip

    return command


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_embeddings_of_an_object_store_serve_a_run(server, command, data, tiny_inputs, tmp_path):
    encode = load_script("experiments/encode.py").main
    for rank in ("1", "0"):
        assert encode(command("s3://bucket/place", "--rank", rank, "--world", "2")) == 0
    assert encode(command(tmp_path / "local")) == 0
    fetch_store("s3://bucket/place", tmp_path / "copy")
    assert files(tmp_path / "copy") == files(tmp_path / "local")
    inputs = tiny_inputs | {"data": str(data)}
    systems = [
        open_base_system(
            AdaptConfig(**inputs, embeddings=place), cache=tmp_path / str(n), log=lambda line: None
        )
        for n, place in enumerate(("", "s3://bucket/place", str(tmp_path / "local")))
    ]
    expected = np.asarray(systems[0].retriever.embeddings)
    for system in systems[1:]:
        np.testing.assert_allclose(np.asarray(system.retriever.embeddings), expected, atol=1e-5)
    for place in ("s3://bucket/place", str(tmp_path / "local")):
        with pytest.raises(ValueError, match=f"embeddings {place}: not those of this encoder"):
            config = AdaptConfig(**tiny_inputs, embeddings=place)
            open_base_system(config, cache=tmp_path / "other", log=lambda line: None)
    with pytest.raises(FileNotFoundError, match="s3://bucket/nowhere/ holds no published"):
        config = AdaptConfig(**inputs, embeddings="s3://bucket/nowhere")
        open_base_system(config, cache=tmp_path / "none", log=lambda line: None)


@pytest.mark.slow
def test_processes_and_server_killed_meanwhile_end_with_the_same_objects(
    server, command, tmp_path, rng
):
    undisturbed = start("experiments/encode.py", command(tmp_path / "local"))
    assert undisturbed.communicate() and undisturbed.returncode == 0
    told, place = "", "s3://bucket/place"
    for attempt in range(20):
        process = start("experiments/encode.py", command(place, "--rank=0", "--world=1"))
        try:
            # From the start of Python to after the end of the whole encoding.
            said = process.communicate(timeout=rng.uniform(2, 12) if attempt < 8 else 300)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            said = process.communicate()
        told += "".join(said)
        if attempt == 4:
            server.kill()
            server.start()
        if process.returncode == 0 and attempt > 4:
            break
    assert process.returncode == 0, told
    fetch_store(place, tmp_path / "copy")
    assert files(tmp_path / "copy") == files(tmp_path / "local")
    assert EmbeddingStore.open(tmp_path / "copy").spec.num_shards == 50
    assert SECRET not in told


def test_a_server_that_is_gone_is_named(server, command, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("ragjax.index.objects._RETRIES", 0)
    assert load_script("experiments/encode.py").main(command("s3://bucket/place")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match("error: s3://bucket/place/spec.json: .*connect", said, re.IGNORECASE), said
    assert SECRET not in said
