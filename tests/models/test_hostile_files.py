"""Damaged and hostile model files: each refused in a sentence; nothing crashes, hangs or runs."""

import copy
import json
import os
import random
import resource
import time

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from ragjax.models import encoder, language_model, load_encoder
from ragjax.models.config import parse_json, parse_sizes, read_config, read_json
from ragjax.models.gguf import read_gguf
from ragjax.models.safetensors import read_safetensors
from ragjax.models.testing import write_tiny_encoder, write_tiny_language_model
from ragjax.models.testing_seq2seq import write_tiny_seq2seq
from ragjax.models.tokenizers import load_tokenizer

# Of each kind of file; RAGJAX_MUTATIONS=10000 for a thorough run.
MUTATIONS = int(os.environ.get("RAGJAX_MUTATIONS", "2000"))
INDEX = "model.safetensors.index.json"
ENCODERS = ("bert", "dpr", "roberta", "modernbert", "qwen3")
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
SEQ2SEQ = ("t5", "flan-t5", "bart")
EXTREMES = [
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400),
    *(0.0, -0.5, 0.5, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
    *("", "x", "1", "../x", "/etc/passwd", "\x00", "\ud800", "x" * 5000, "default", "yarn"),
    *([], {}, [[]], [None], [0] * 100, {"": {}}, {"rope_type": 3}, {"type": []}),
]


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
    """A folder of two shards; `change(...)` rewrites its index."""
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


# --- mutations ----------------------------------------------------------------------------------


def mutated_bytes(data, generator, *, front=None):
    """Flips, cuts, repeats, inserts or overwrites some bytes, mostly in the first `front`."""
    data, size = bytearray(data), len(data)
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        limit = front if front and generator.random() < 0.9 else size
        place = generator.randrange(min(limit, len(data)) or 1)
        kind = generator.randrange(6)
        if kind == 0:
            data[place : place + 1] = [generator.randrange(256)]
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            del data[place : place + generator.randrange(1, 40)]
        elif kind == 3:
            data[place:place] = generator.randbytes(generator.randrange(1, 20))
        elif kind == 4:
            data[place:place] = data[place : place + generator.randrange(1, 60)]
        else:
            extreme = generator.choice([0, 1, 2**31, 2**32 - 1, 2**61, 2**63, 2**64 - 1])
            data[place : place + 8] = extreme.to_bytes(8, "little")
    return bytes(data)


def mutated_json(value, generator):
    """Replaces, removes or adds values anywhere in a JSON value."""
    value = copy.deepcopy(value)
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        nodes = [value]
        for node in nodes:
            inner = node.values() if isinstance(node, dict) else node
            nodes += [item for item in inner if isinstance(item, dict | list) and item]
        node = generator.choice(nodes)
        if not node:
            continue
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key, other = generator.choice(keys), generator.choice(keys)
        kind = generator.randrange(10)
        if kind == 0:
            del node[key]
        elif kind == 1:
            node[key], node[other] = node[other], node[key]
        elif kind == 2 and isinstance(node, dict):
            node[generator.choice(["", "x", "\x00", "quantization_config"])] = node[key]
        elif kind == 3:
            node[key] = [node[key]]
        else:
            node[key] = copy.deepcopy(generator.choice(EXTREMES))
    return json.dumps(value).encode()


def survive(action, mutations):
    """Run `action` on each mutation: it succeeds or refuses, quickly and in little memory."""
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for number, mutation in enumerate(mutations):
        start = time.monotonic()
        try:
            action(mutation)
        except (ValueError, OSError):
            refused += 1
        except BaseException as error:
            raise AssertionError(f"mutation {number}: {mutation[:2000]!r}") from error
        assert time.monotonic() - start < 20, f"mutation {number}: {mutation[:2000]!r}"
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert rise < 500_000, f"{rise} kB"  # a lying count was allocated
    return refused


@pytest.mark.slow
def test_mutations_of_an_index(sharded):
    data, generator = (sharded / INDEX).read_bytes(), random.Random(0)

    def open_folder(mutation):
        (sharded / INDEX).write_bytes(mutation)
        read_safetensors(sharded)

    value = json.loads(data)
    refused = survive(
        open_folder,
        (
            mutated_bytes(data, generator) if number % 2 else mutated_json(value, generator)
            for number in range(MUTATIONS)
        ),
    )
    assert MUTATIONS // 2 < refused < MUTATIONS


@pytest.mark.slow
def test_mutations_of_a_safetensors_header(sharded):
    path, generator = sharded / "model.safetensors", random.Random(1)
    data = (sharded / "one.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    value = json.loads(data[8 : 8 + length])

    def open_file(mutation):
        path.write_bytes(mutation)
        for tensor in read_safetensors(sharded).values():
            np.asarray(tensor)

    def mutations():
        for number in range(MUTATIONS):
            if number % 2:
                yield mutated_bytes(data, generator, front=8 + length)
            else:
                header = mutated_json(value, generator)
                yield len(header).to_bytes(8, "little") + header + data[8 + length :]

    assert survive(open_file, mutations()) > MUTATIONS // 2


def family_of(families, name):
    return next(family for family in families if name in family.model_types)


CASES = [
    *((write_tiny_encoder, encoder.FAMILIES, name) for name in ENCODERS),
    *((write_tiny_language_model, language_model.FAMILIES, name) for name in DECODERS),
    *((write_tiny_seq2seq, language_model.FAMILIES, name) for name in SEQ2SEQ),
]


def test_every_family_is_mutated():
    for families, names in (
        (encoder.FAMILIES, ENCODERS),
        (language_model.FAMILIES, (*DECODERS, *SEQ2SEQ)),
    ):
        for family in families:
            assert set(family.model_types) & set(names), f"none of {family.model_types}"


@pytest.mark.slow
@pytest.mark.parametrize(("write", "families", "name"), CASES)
def test_mutations_of_a_config(tmp_path, write, families, name):
    """Of what is accepted, some is taken further: to the shapes, which no tensor fits."""
    write(tmp_path / "model", family=name)
    path, generator = tmp_path / "model" / "config.json", random.Random(name)
    data = path.read_bytes()
    value, model_types = json.loads(data), [kind for f in families for kind in f.model_types]
    accepted = 0

    def parse(mutation):
        nonlocal accepted
        path.write_bytes(mutation)
        raw = read_config(path.parent, model_types)
        family = family_of(families, raw["model_type"])
        config = parse_sizes(family.parse_config, raw, path)
        accepted += 1
        if accepted % 50 == 0 and hasattr(family, "load_params"):
            family.load_params(config, {}, source="nothing")
        elif accepted % 50 == 0:
            encoder._read_params(path.parent, family, config)

    mutations = (
        mutated_json(value, generator) if number % 4 else mutated_bytes(data, generator)
        for number in range(MUTATIONS)
    )
    assert survive(parse, mutations) > MUTATIONS // 4


def write_small_gguf(path):
    """A decoder of no use with every kind of metadata."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁ab"]
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-i) for i in range(len(tokens))])
    writer.add_token_types([2, 3, 3, 6, 1, 1, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_array("llama.some.numbers", [1, 2, 3])
    writer.add_tensor("token_embd.weight", np.ones((9, 32), np.float32))
    quantised = gguf.quants.quantize(np.ones((32, 32), np.float32), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("blk.0.attn_q.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_mutations_of_a_gguf_header(tmp_path):
    path, generator = tmp_path / "small.gguf", random.Random(2)
    write_small_gguf(path)
    read_gguf(path)
    data = path.read_bytes()

    def open_file(mutation):
        path.write_bytes(mutation)
        for tensor in read_gguf(path).tensors.values():
            np.asarray(tensor)

    mutations = (mutated_bytes(data, generator, front=1100) for _ in range(MUTATIONS))
    assert MUTATIONS // 3 < survive(open_file, mutations) < MUTATIONS
