"""The container: metadata, quantisations, byte orders, split files, and headers that lie."""

import struct

import gguf
import numpy as np
import pytest

from ragjax.models.files.gguf import file as gguf_file
from ragjax.models.files.gguf.file import FLOATS, QUANTIZED, read_gguf_file, split_names
from ragjax.models.files.sources import resolve_source

KINDS = gguf.GGMLQuantizationType
ROWS, COLUMNS = 5, 512


def write_gguf(path, tensors, *, endian="little", fields=None, **options):
    """Writes `{name: array or (raw bytes [rows, bytes], kind)}` with the gguf package."""
    order = getattr(gguf.GGUFEndian, endian.upper())
    writer = gguf.GGUFWriter(path, "llama", endianess=order, **options)
    for name, value in (fields or {}).items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind, generator):
    """Any bytes are a quantised row; the scales, which are float16, are kept finite and small."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = generator.integers(0, 256, (ROWS * COLUMNS // block, size)).astype(np.uint8)
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    scales |= {"Q4_1": (0, 2), "Q5_1": (0, 2)}
    for place in scales.get(kind.name, (0,)):
        half = generator.normal(0, 0.1, len(data)).astype(np.float16)
        data[:, place : place + 2] = half[:, None].view(np.uint8)
    if kind.name == "IQ1_M":  # its scale is spread over the high nibbles of four numbers
        data[:, 48:56] &= 0x1F
    return data.reshape(ROWS, -1)


def plain_q5(data, *, with_minimum):
    """Q5_0 and Q5_1 from the format's description, one number after the other."""
    values = []
    size = 24 if with_minimum else 22
    for start in range(0, len(data), size):
        block = data[start : start + size]
        scale = np.frombuffer(block[:2], np.float16).astype(np.float32)[0]
        rest = 4 if with_minimum else 2
        minimum = np.frombuffer(block[2:4], np.float16).astype(np.float32)[0]
        high = int.from_bytes(block[rest : rest + 4], "little")
        low = block[rest + 4 :]
        for place in range(32):
            nibble = low[place % 16] >> (4 * (place // 16)) & 15
            number = nibble | (high >> place & 1) << 4
            values.append(scale * number + minimum if with_minimum else scale * (number - 16))
    return np.array(values, np.float32)


@pytest.mark.slow  # imports torch and transformers
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantised_blocks_equal_another_implementation(tmp_path, rng, name):
    kind = KINDS[name]
    blocks = random_blocks(kind, rng)
    path = write_gguf(tmp_path / "a.gguf", {"w": (blocks, kind)})
    tensor = read_gguf_file(path).tensors["w"]
    assert tensor.shape == (ROWS, COLUMNS) and tensor.dtype == np.float32
    found = np.asarray(tensor)
    if name in ("Q5_0", "Q5_1"):
        expected = plain_q5(blocks.tobytes(), with_minimum=name == "Q5_1")
    else:
        torch = pytest.importorskip("torch", reason="needs the [parity] extra")
        other = pytest.importorskip(
            "transformers.integrations.gguf.dequant", reason="needs the [parity] extra"
        )
        expected = other.dequantize(torch.from_numpy(blocks.reshape(-1).copy()), kind.value).numpy()
    expected = expected.reshape(ROWS, COLUMNS)
    assert np.isfinite(found).all() and len(np.unique(found)) > 100
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_piece_is_dequantised_at_once_and_many_pieces_equal_one(tmp_path, rng, monkeypatch):
    path = write_gguf(tmp_path / "a.gguf", {"w": (random_blocks(KINDS.Q4_1, rng), KINDS.Q4_1)})
    tensor, calls = read_gguf_file(path).tensors["w"], []
    whole = gguf.quants.Q4_1.dequantize_blocks

    def counted(blocks):
        calls.append(len(blocks))
        return whole(blocks)

    monkeypatch.setattr(gguf.quants.Q4_1, "dequantize_blocks", counted)
    at_once = np.asarray(tensor)
    assert calls == [ROWS * COLUMNS // 32]
    monkeypatch.setattr(gguf_file, "_CHUNK", 1000)
    np.testing.assert_array_equal(np.asarray(tensor), at_once)
    assert len(calls) == 3


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("endian", ["little", "big"])
def test_floats_of_both_byte_orders_come_back_exactly(tmp_path, rng, name, endian):
    values = rng.normal(size=(3, 64)).astype(np.float32)
    if name == "BF16":
        values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
        raw = (values.view(np.uint32) >> 16).astype("<u2")
        stored = (raw.byteswap() if endian == "big" else raw).view(np.uint8)
        stored = (stored.reshape(3, -1), KINDS.BF16)
    else:
        values = values.astype(FLOATS[name]).astype(np.float32)
        stored = values.astype(FLOATS[name])
    path = write_gguf(
        tmp_path / "a.gguf", {"w": stored}, endian=endian, fields={"a.b": ["x", "é"], "n": 7}
    )
    found = read_gguf_file(path)
    assert found.fields["a.b"] == ["x", "é"] and found.fields["n"] == 7
    np.testing.assert_array_equal(np.asarray(found.tensors["w"]), values)


def test_quantised_big_endian_files_are_refused_with_the_remedy(tmp_path, rng):
    blocks = (random_blocks(KINDS.Q8_0, rng), KINDS.Q8_0)
    path = write_gguf(tmp_path / "a.gguf", {"w": blocks}, endian="big")
    with pytest.raises(ValueError, match="Q8_0 in a big-endian file; convert it with `gguf-conv"):
        read_gguf_file(path)


@pytest.mark.parametrize("name", ["I8", "I32", "F64", "Q8_1", "TQ1_0", "MXFP4"])
def test_other_quantisations_are_refused_by_name(tmp_path, name):
    block, size = gguf.GGML_QUANT_SIZES[KINDS[name]]
    raw = np.zeros((4, 256 // block * size), np.uint8)
    path = write_gguf(tmp_path / "a.gguf", {"w": (raw, KINDS[name])})
    with pytest.raises(ValueError, match=f"a.gguf: tensor 'w' is quantised as {name}, .* use a"):
        read_gguf_file(path)


def test_metadata_equals_the_reader_of_the_gguf_package(tmp_path):
    fields = {
        "a": 3,
        "b": -7,
        "c": 0.25,
        "d": True,
        "e": "é▁",
        "f": [1, 2],
        "g": [0.5],
        "h": [False],
    }
    path = write_gguf(tmp_path / "a.gguf", {"w": np.ones(4, np.float32)}, fields=fields)
    reader = gguf.GGUFReader(path)
    expected = {name: field.contents() for name, field in reader.fields.items()}
    expected = {name: value for name, value in expected.items() if not name.startswith("GGUF.")}
    assert read_gguf_file(path).fields == expected
    assert expected["e"] == "é▁" and expected["h"] == [False]


# --- split files --------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path, rng):
    """Three parts as llama.cpp's own tool names and numbers them."""
    tensors = {f"t{i}": rng.normal(size=(8, 32)).astype(np.float32) for i in range(6)}
    write_gguf(
        tmp_path / "m.gguf",
        tensors,
        split_max_tensors=2,
        fields={"general.name": "split", "some.list": [1, 2]},
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == split_names("m-00001-of-00003.gguf")
    return tmp_path, tensors


@pytest.mark.parametrize("part", [1, 2, 3])
def test_all_parts_are_read_from_any(split, part):
    folder, tensors = split
    found = read_gguf_file(folder / f"m-0000{part}-of-00003.gguf")
    assert found.fields["general.name"] == "split"
    assert list(found.tensors) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(np.asarray(found.tensors[name]), tensor)


def test_a_folder_of_parts_is_one_model(split):
    folder, _ = split
    assert resolve_source(str(folder)) == folder / "m-00001-of-00003.gguf"


def test_a_missing_part_is_named(split):
    folder, _ = split
    (folder / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(FileNotFoundError, match="m-00003-of-00003.gguf: no such file, a part of"):
        read_gguf_file(folder / "m-00001-of-00003.gguf")


def test_a_renamed_part_is_refused_with_the_remedy(split):
    folder, _ = split
    (folder / "m-00001-of-00003.gguf").rename(folder / "alone.gguf")
    with pytest.raises(ValueError, match="alone.gguf: is one of 3 parts; .* --merge"):
        read_gguf_file(folder / "alone.gguf")


def test_a_part_of_another_model_is_noticed(split, tmp_path):
    folder, tensors = split
    write_gguf(folder / "m-00002-of-00003.gguf", {"t0": tensors["t0"]})
    with pytest.raises(ValueError, match="m-00002.*tensor 't0' is also in m-00001"):
        read_gguf_file(folder / "m-00001-of-00003.gguf")
    write_gguf(folder / "m-00002-of-00003.gguf", {"t2": tensors["t2"]})
    with pytest.raises(ValueError, match="the parts hold 5 tensors, not 6"):
        read_gguf_file(folder / "m-00001-of-00003.gguf")


# --- headers that lie ---------------------------------------------------------------------------


def text(value):
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def field(name="a", kind=4, value=b"\x01\x00\x00\x00"):
    return text(name) + struct.pack("<I", kind) + value


def array(kind, count, data=b""):
    return struct.pack("<IQ", kind, count) + data


def tensor(name="t", sizes=(4,), kind=0, offset=0, dimensions=None):
    count = len(sizes) if dimensions is None else dimensions
    head = text(name) + struct.pack("<I", count) + struct.pack(f"<{len(sizes)}Q", *sizes)
    return head + struct.pack("<IQ", kind, offset)


def build(fields=(), tensors=(), *, data=32, version=3, counts=None, magic=b"GGUF"):
    num_tensors, num_fields = counts or (len(tensors), len(fields))
    head = magic + struct.pack("<IQQ", version, num_tensors, num_fields)
    head += b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


HUGE = 2**64 - 1
LIES = {
    "magic": (build(magic=b"GGML"), "does not begin with GGUF"),
    "version 1": (build(version=1), "version 1; 2 and 3 are supported"),
    "version 9": (build(version=9), "version 9; 2 and 3"),
    "tensors": (build(counts=(HUGE, 0)), "18446744073709551615 tensors in a file of"),
    "fields": (build(counts=(0, 2**40)), "1099511627776 metadata fields in a file of"),
    "a field too few": (build([field()], counts=(0, 3)), "the field '' is there twice"),
    "name": (build([struct.pack("<Q", HUGE) + b"a"]), "bytes wanted, .* left in the file"),
    "string": (build([field(kind=8, value=struct.pack("<Q", 2**62))]), "bytes wanted"),
    "utf-8": (build([field(kind=8, value=text(b"\xff"))]), "a string is not UTF-8"),
    "utf-8 in a list": (build([field(kind=9, value=array(8, 1, text(b"\xff")))]), "not UTF-8"),
    "strings": (build([field(kind=9, value=array(8, 2**61))]), "strings in 'a' in a file of"),
    "long strings": (
        build([field(kind=9, value=array(8, 2, text("a") + struct.pack("<Q", HUGE)))]),
        "a string is longer than the file",
    ),
    "numbers": (build([field(kind=9, value=array(6, 2**62))]), "values in 'a' in a file of"),
    "nested": (build([field(kind=9, value=array(9, 1, array(4, 0)))]), "is an array of type 9"),
    "array type": (build([field(kind=9, value=array(77, 1))]), "is an array of type 77"),
    "field type": (build([field(kind=13)]), "is of the unknown type 13"),
    "field twice": (build([field(), field()]), "the field 'a' is there twice"),
    "alignment": (build([field("general.alignment", value=bytes(4))]), "general.alignment is 0"),
    "alignment 3": (build([field("general.alignment", value=b"\3\0\0\0")]), "not a power of two"),
    "alignment text": (build([field("general.alignment", 8, text("x"))]), "alignment is 'x'"),
    "tensor twice": (build(tensors=[tensor(), tensor()]), "tensor 't' is there twice"),
    "overlap": (
        build(tensors=[tensor(sizes=(16,)), tensor("u", offset=32)], data=64),
        "tensor 'u' overlaps another",
    ),
    "dimensions": (build(tensors=[tensor(dimensions=2**31)]), "has 2147483648 dimensions"),
    "no dimensions": (build(tensors=[tensor(sizes=())]), "has 0 dimensions"),
    "size": (build(tensors=[tensor(sizes=(2**62, 2**62))]), "is not in the file"),
    "size 0": (build(tensors=[tensor(sizes=(0, 2**62))]), "is not in the file"),
    "offset": (build(tensors=[tensor(offset=2**63)]), "at 9223372036854775808 is not in the"),
    "misaligned": (build(tensors=[tensor(offset=4)], data=64), "at 4 is not in the file"),
    "cut": (build(tensors=[tensor(sizes=(9,))]), "tensor 't' at 0 is not in the file"),
    "tensor type": (build(tensors=[tensor(kind=4)]), "is of the unknown type 4"),
    "row": (build(tensors=[tensor(kind=8)]), "has rows of 4 values"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_refused(tmp_path, name):
    content, message = LIES[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_gguf_file(path)
    assert str(raised.value).startswith(f"{path}: damaged or not a GGUF file (")


def test_the_same_header_without_lies_is_read(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(build([field(kind=9, value=array(8, 1, text("x")))], [tensor(sizes=(8,))]))
    found = read_gguf_file(path)
    assert found.fields == {"a": ["x"]}
    np.testing.assert_array_equal(np.asarray(found.tensors["t"]), np.zeros(8))


def test_a_file_cut_while_it_is_open_is_named(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(build(tensors=[tensor(sizes=(8,))]))
    found = read_gguf_file(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="a.gguf: ends before its last tensor does"):
        np.asarray(found.tensors["t"])
