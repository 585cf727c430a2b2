"""What of the Milvus index needs no server; see also test_milvus_server.py."""

import json
import subprocess
import sys

import pytest
from milvus_server import needs_client
from programs import environment

from ragjax.index import MilvusIndex, MilvusOptions, StoreSpec
from ragjax.index.milvus import Generation
from ragjax.index.milvus_client import Address
from ragjax.index.milvus_publish import publish

SPEC = StoreSpec(size=1000, dim=64, model_fingerprint="encoder", corpus_fingerprint="corpus")


@pytest.mark.parametrize(
    ("address", "uri"),
    [
        ("milvus:http://localhost:19530/docs", "http://localhost:19530"),
        ("milvus:https://milvus.example.com/docs", "https://milvus.example.com"),
        ("milvus:http://[::1]:19530/docs", "http://[::1]:19530"),
    ],
)
def test_an_address_names_server_and_alias(address, uri):
    assert Address.parse(address) == (uri, "docs")


@pytest.mark.parametrize(
    "address",
    [
        "http://localhost:19530/docs",
        "milvus:localhost:19530/docs",
        "milvus:http://localhost:19530",
        "milvus:http://localhost:19530/",
        "milvus:http://localhost:19530/my-docs",
        "milvus:http://localhost:19530/1docs",
        "milvus:http://localhost:port/docs",
        "milvus:/docs",
        "milvus:",
        "",
        f"milvus:http://localhost:19530/{'a' * 201}",
    ],
)
def test_another_form_of_address_is_refused_with_an_example(address):
    with pytest.raises(ValueError, match="milvus:http://localhost:19530/docs.*got"):
        Address.parse(address)


def test_a_password_in_an_address_is_refused_and_not_shown():
    with pytest.raises(ValueError, match="put the token in MILVUS_TOKEN") as told:
        Address.parse("milvus:http://root:hidden-word@localhost:19530/docs")
    assert "hidden-word" not in str(told.value)


def test_options_that_milvus_does_not_have_are_refused():
    with pytest.raises(ValueError, match="one of HNSW, SCANN, IVF_FLAT, DISKANN, got 'FLAT'"):
        MilvusOptions(kind="FLAT")
    with pytest.raises(ValueError, match="build of HNSW takes M, efConstruction; got 'nlist'"):
        MilvusOptions(build={"nlist": 4})
    with pytest.raises(ValueError, match="build of DISKANN takes nothing; got 'M'"):
        MilvusOptions(kind="DISKANN", build={"M": 4})
    for value in (0, -1, 2.5, True, "4"):
        with pytest.raises(ValueError, match=r"search\['ef'\] must be a positive integer"):
            MilvusOptions(search={"ef": value})


def test_what_is_left_out_of_the_options_fits_the_documents():
    assert MilvusOptions(search={"ef": 32}).fitted(10, 8) == MilvusOptions(
        build={"M": 16, "efConstruction": 200}, search={"ef": 32}
    )
    lists = MilvusOptions(kind="SCANN").fitted(10_000, 64)
    assert lists.build == {"nlist": 400} and lists.search == {"nprobe": 50, "reorder_k": 200}
    # As many as a segment of 512 MB needs, however many segments there are.
    assert MilvusOptions(kind="IVF_FLAT").fitted(10**9, 1024).build == {"nlist": 4 * 362}
    few = MilvusOptions(kind="IVF_FLAT", build={"nlist": 4}, search={"nprobe": 9}).fitted(10, 8)
    assert few.search == {"nprobe": 4}


class Described:
    """A client that knows what one collection says of itself."""

    def __init__(self, description):
        self.description = description

    def describe_collection(self, name):
        return {"collection_name": name, "description": self.description}


def test_a_generation_reads_back_and_its_digest_tells_what_it_holds():
    options = MilvusOptions().fitted(SPEC.size, SPEC.dim)
    made = Generation(name="docs_000001_x", spec=SPEC, options=options, norms=(0.9, 1.1))
    assert Generation.read(Described(made.description()), "docs_000001_x") == made
    others = [
        Generation(name="", spec=SPEC, options=MilvusOptions().fitted(10, 64), norms=(0.9, 1.0)),
        Generation(
            name="",
            spec=StoreSpec(size=1000, dim=64, model_fingerprint="e", corpus_fingerprint="corpus"),
            options=options,
            norms=(0.9, 1.1),
        ),
    ]
    assert len({made.digest(), *(other.digest() for other in others)}) == 3


@pytest.mark.parametrize("text", ["", "documents", "[]", "{}", json.dumps({"ragjax": 2})])
def test_a_collection_of_others_is_refused(text):
    with pytest.raises(ValueError, match="docs was not published by this version of ragjax"):
        Generation.read(Described(text), "docs")


def test_without_the_client_its_installation_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ImportError, match=r"pip install 'ragjax\[milvus\]'"):
        MilvusIndex.open("milvus:http://localhost:19530/docs")


def test_the_client_leaves_the_log_of_the_program_open(tmp_path):
    needs_client()
    program = f"""
import logging
from ragjax.index.milvus_client import check_server
logging.basicConfig(filename={str(tmp_path / "log")!r}, filemode="w", level=logging.INFO)
logging.info("before")
try:
    check_server("milvus:http://127.0.0.1:9/docs")
except ConnectionError:
    logging.info("after")
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True)
    assert done.returncode == 0 and done.stderr == b""
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.rpartition(":")[2] for line in lines] == ["before", "after"]


@pytest.mark.parametrize(
    "wrong", [{"keep": -1}, {"min_recall": 1.1}, {"deadline_seconds": 0}, {"min_recall": -0.1}]
)
def test_numbers_out_of_range_are_refused_before_anything_is_asked(wrong):
    with pytest.raises(ValueError, match="keep must be at least 0, min_recall between 0 and 1"):
        publish("milvus:http://localhost:1/docs", None, **wrong)
