"""Thousands of random changes to every kind of model file: refused or harmless, never a crash."""

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

from ragjax.models import encoder, language_model
from ragjax.models.files.config import parse_sizes, read_config
from ragjax.models.files.gguf.model import read_gguf
from ragjax.models.files.key_table import read_safetensors
from ragjax.models.testing import write_tiny_encoder, write_tiny_language_model

# Of each kind of file; a nightly run takes RAGJAX_MUTATIONS=10000.
MUTATIONS = int(os.environ.get("RAGJAX_MUTATIONS", "300"))
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
    *((write_tiny_language_model, language_model.FAMILIES, name) for name in SEQ2SEQ),
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
            tensors = read_safetensors(path.parent)
            encoder.fill_params(family, config, tensors, path.parent)

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
