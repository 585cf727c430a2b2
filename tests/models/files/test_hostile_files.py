"""Damaged and hostile model files: each refused in a sentence; nothing crashes, hangs or runs."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from ragjax.models import load_encoder
from ragjax.models.files.config import parse_json, read_config, read_json
from ragjax.models.files.key_table import read_safetensors
from ragjax.models.files.tokenizers import load_tokenizer
from ragjax.models.testing import write_tiny_encoder

INDEX = "model.safetensors.index.json"


# --- safetensors --------------------------------------------------------------------------------


def write_raw(path, header, data=b"", *, length=None):
    """A safetensors file with any header; `length` is what the file says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b"\xff{}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": {}, "a": {}}', "the key 'a' is there twice"),
        ({"a": 3}, "tensor 'a' needs a dtype, a shape and two data_offsets"),
        ({"a": entry(shape=(-2,))}, "tensor 'a' needs"),
        ({"a": entry(shape=(True, 2))}, "tensor 'a' needs"),
        ({"a": entry(shape=(2.0,))}, "tensor 'a' needs"),
        ({"a": entry(offsets=(0,))}, "tensor 'a' needs"),
        ({"a": entry(offsets=(8, 0))}, "does not fit data_offsets"),
        ({"a": entry(shape=(3,))}, "does not fit data_offsets"),
        ({"a": entry(shape=(2**40, 2**40))}, "does not fit data_offsets"),
        ({"a": entry(shape=(2**63, 0), offsets=(0, 0))}, "does not fit data_offsets"),
        ({"a": entry(shape=[1] * 40 + [2])}, "does not fit data_offsets"),
        ({"a": entry(offsets=(2**64, 2**64 + 8))}, "does not begin where the one before ends"),
        ({"a": entry(offsets=(8, 16))}, "does not begin where the one before ends"),
        ({"a": entry(), "b": entry()}, "'b' does not begin where the one before ends"),
        ({"a": entry(shape=(1,), offsets=(0, 4))}, "the tensors end at byte"),
        ({"a": entry(shape=(4,), offsets=(0, 16))}, "the tensors end at byte"),
        ({"a": entry(dtype="F33")}, "unknown dtype 'F33'"),
        ({"a": entry(dtype=["F32"])}, "tensor 'a' needs"),
        ({"a": entry(dtype="F8_E4M3", shape=(8,))}, "tensor 'a' is quantised"),
        ({"__metadata__": {}}, "the tensors end at byte"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, message):
    write_raw(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match=message) as raised:
        read_safetensors(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(raised.value)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 200])
def test_a_header_longer_than_its_file_is_not_allocated(tmp_path, length):
    write_raw(tmp_path / "model.safetensors", {"a": entry()}, bytes(8), length=length)
    with pytest.raises(ValueError, match=f"a header of {length} bytes in a file of"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 20])
def test_a_file_cut_in_its_header_is_refused(tmp_path, size):
    path = tmp_path / "model.safetensors"
    write_raw(path, {"a": entry()}, bytes(8))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="model.safetensors: "):
        read_safetensors(tmp_path)


@pytest.fixture
def sharded(tmp_path, rng):
    """A folder of two shards and their index."""
    tensors = {name: rng.normal(size=(2, 3)).astype(np.float32) for name in "abcd"}
    shards = {"one.safetensors": "ab", "two.safetensors": "cd"}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def change_index(folder, **changes):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(changes)
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v is not None}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard",
    [
        "../one.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b.safetensors",
        "a\\b",
        "C:x",
        "a\x00b",
    ],
)
def test_an_index_names_plain_files_only(sharded, shard):
    (sharded / "a").mkdir()
    save_file({"a": np.ones(1, np.float32)}, sharded / "a" / "b.safetensors")
    change_index(sharded, a=shard)
    with pytest.raises(ValueError, match="index.json: shard .* is not a plain file name"):
        read_safetensors(sharded)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a": "three.safetensors"}, FileNotFoundError, "three.safetensors: shard named in"),
        ({"a": 3}, ValueError, "the shard of tensor 'a' is 3, not a name"),
        ({"a": ["one.safetensors"]}, ValueError, "the shard of tensor 'a' is"),
        ({"a": "two.safetensors"}, ValueError, "tensor 'a' is not (in|listed for) this shard"),
        ({"e": "two.safetensors"}, ValueError, "two.safetensors: tensor 'e' is not in this shard"),
        ({"d": None}, ValueError, "two.safetensors: tensor 'd' is not listed for this shard"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(sharded, changes, error, message):
    assert sorted(read_safetensors(sharded)) == list("abcd")
    change_index(sharded, **changes)
    with pytest.raises(error, match=message):
        read_safetensors(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    save_file({name: np.ones((2, 3), np.float32) for name in "bcd"}, sharded / "two.safetensors")
    with pytest.raises(ValueError, match="two.safetensors: tensor 'b' is also in one.safetensors"):
        read_safetensors(sharded)


def test_a_cut_shard_is_named(sharded):
    path = sharded / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="two.safetensors: not a readable safetensors file"):
        read_safetensors(sharded)


def test_files_may_be_links_as_in_the_cache_of_the_hub(sharded, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    for path in [sharded / INDEX, *sharded.glob("*.safetensors")]:
        path.rename(blobs / f"{path.name}-digest")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}-digest")
    tensors = read_safetensors(snapshot)
    assert sorted(tensors) == list("abcd") and np.asarray(tensors["a"]).shape == (2, 3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path, ["bert"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.ckpt", "x.pkl", "x.pt", "x.pth"])
def test_pickles_are_named_and_never_opened(tmp_path, name):
    ran = tmp_path / "ran"
    payload = b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR."  # runs when it is unpickled
    (tmp_path / name).write_bytes(payload)
    with pytest.raises(FileNotFoundError, match=f"only PyTorch weights .{name}.*runs code"):
        read_safetensors(tmp_path)
    assert not ran.exists()


# --- JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": 1e999}', "the number 1e999 is out of range"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ("\x00", "not valid JSON"),
        ('{"a": 1} x', "not valid JSON"),
        ("3", "expected an object at the top, got int"),
    ],
)
def test_only_strict_json_is_read(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_json(tmp_path / "config.json")
    assert "config.json: " in str(raised.value)


def test_json_that_is_not_utf8_is_refused():
    with pytest.raises(ValueError, match="here: not valid JSON .*utf-8"):
        parse_json(b'{"a": "\xff"}', "here")


def test_a_json_file_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(10**10)  # takes no space
    with pytest.raises(ValueError, match="10000000000 bytes, more than"):
        read_json(path)


@pytest.mark.parametrize("field", ["auto_map", "trust_remote_code"])
def test_a_config_that_brings_code_is_refused(tmp_path, field):
    folder = write_tiny_encoder(tmp_path / "model")
    ran = tmp_path / "ran"
    (folder / "modeling.py").write_text(f"open({str(ran)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config[field] = {"AutoModel": "modeling.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=rf"its own Python code \({field}\), which ragjax does not"
    ):
        load_encoder(str(folder))
    assert not ran.exists()


def test_a_tokenizer_that_brings_code_is_refused(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "tok.py").write_text(f"open({str(ran)!r}, 'w')")
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    auto_map = {"auto_map": {"AutoTokenizer": ["tok.Tok", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(auto_map))
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"its own Python code \(auto_map\)"):
        load_tokenizer(tmp_path, vocab_size=10)
    assert not ran.exists()


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path):
    folder = write_tiny_encoder(tmp_path / "model")
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    load_tokenizer(folder, vocab_size=size)
    with pytest.raises(ValueError, match=f"ids up to {size - 1}, but .* for {size - 1} tokens"):
        load_tokenizer(folder, vocab_size=size - 1)
