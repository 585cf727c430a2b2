"""A real Milvus server on loopback, from an environment of its own."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

PYTHON = "RAGJAX_MILVUS_PYTHON"
_REASON = (
    f"{PYTHON} names no Python with a Milvus server: python -m venv FOLDER,"
    f" FOLDER/bin/pip install milvus==2.3.5, {PYTHON}=FOLDER/bin/python"
)
_SERVE = """
import os, pathlib, socket, sys
from milvus import MilvusServer

server = MilvusServer()
server.set_base_dir(sys.argv[1])
names = [name for name in server.config_keys if name.endswith("_port")]
sockets = {name: socket.socket() for name in [*names, "web", "peer"]}
for each in sockets.values():
    each.bind(("127.0.0.1", 0))
ports = {name: each.getsockname()[1] for name, each in sockets.items()}
server.webservice_port = ports.pop("web")
# Two ports of the store of its metadata are no options: 2379 and 2380.
peer, own = (f"http://127.0.0.1:{port}" for port in (ports.pop("peer"), ports["etcd_port"]))
settings = {"listen-peer-urls": peer, "initial-advertise-peer-urls": peer, "name": "default"}
settings |= {"listen-client-urls": own, "advertise-client-urls": own}
settings["initial-cluster"] = f"default={peer}"
path = pathlib.Path(sys.argv[1], "etcd.yaml")
path.write_text("".join(f"{name}: {value}\\n" for name, value in settings.items()))
os.environ["ETCD_CONFIG_PATH"] = str(path)
server.config.update(**ports)
for each in sockets.values():
    each.close()
server.start()
print(server.listen_port, flush=True)
server.wait()
"""


def needs_client():
    """Skips a test where the client is not installed, without importing it: ragjax does."""
    if importlib.util.find_spec("pymilvus") is None:
        pytest.skip("needs the [milvus] extra")


@contextlib.contextmanager
def milvus_server(folder: Path):
    """Starts a server with its data in a folder; gives its URI and a function that ends it."""
    needs_client()
    if not os.environ.get(PYTHON):
        pytest.skip(_REASON)
    process = subprocess.Popen(
        [os.environ[PYTHON], "-c", _SERVE, str(folder.absolute())],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the server is a child of this process, in its group
    )

    def end():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    with process.stdout:
        try:
            port = process.stdout.readline().strip()
            assert port, f"the server did not start; see {folder / 'logs'}"
            yield f"http://127.0.0.1:{port}", end
        finally:
            end()
    shutil.rmtree(folder)  # half a gigabyte
