"""Speed and memory of loading a checkpoint, beside plain reading of the same files, in one run.

    python benchmarks/loading.py

Writes synthetic sharded checkpoints of a Llama-like decoder (1 GB for speed, 4 GB for memory; about
4 GB of disk at once, said before it starts, removed at the end) and loads each in a fresh process:
about three minutes on two CPU cores. "Reading" is a loop of 16 MB reads into one buffer, the
sequential speed of the disk or of the page cache; "reading into memory" keeps the bytes, as loading
has to: where the system is slow to hand out fresh memory, the two are far apart. Expect loading to
be at least 0.7 times as fast, from a cold cache, and a peak of at most 1.2 times the parameters.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
import tyro

from ragjax.models.files.key_table import KeyRule, apply_key_table, read_safetensors, transpose
from ragjax.models.files.placement import Placement

_WIDTH, _INNER, _VOCABULARY = 2048, 5632, 32_000
_SHARD = 10**9  # bytes
_BUFFER = 2**24  # bytes
_KINDS = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
_CODES = {"bfloat16": "BF16", "float32": "F32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What to measure."""

    speed_gb: float = 1.0
    """Size of the checkpoint whose loading is timed."""
    memory_gb: float = 4.0
    """Size of the checkpoint for the peak of memory; 0 leaves that out."""
    file_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the tensors in the files."""
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    """Of the parameters."""
    rounds: int = 3
    """Repetitions of each timing, interleaved; the median is shown."""
    folder: Path | None = None
    """Where the checkpoints are written, in a folder of their own; the system's by default."""


def main(flags: Flags) -> None:
    """Writes, loads, prints a table."""
    biggest = max(flags.speed_gb, flags.memory_gb)
    where = Path(flags.folder or tempfile.gettempdir())
    free = shutil.disk_usage(where).free / 1e9
    print(f"needs {biggest:.1f} GB of disk in {where} ({free:.0f} GB are free)", flush=True)
    if free < biggest * 1.1:
        raise SystemExit("not enough; give --folder on another disk, or a smaller checkpoint")
    print(f"files of {flags.file_dtype}, parameters {flags.dtype}, median of {flags.rounds}")
    with tempfile.TemporaryDirectory(dir=where, prefix="ragjax-loading-") as scratch:
        folder = Path(scratch)
        measure_speed(write_checkpoint(folder / "speed", flags.speed_gb, flags.file_dtype), flags)
        shutil.rmtree(folder / "speed")
        if flags.memory_gb:
            large = write_checkpoint(folder / "memory", flags.memory_gb, flags.file_dtype)
            report_memory(in_new_process(load, large, flags.dtype, True))


def measure_speed(folder: Path, flags: Flags) -> None:
    """Times reading and loading in turn, from the disk and from the page cache."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    cases: dict[str, Callable[[bool], dict[str, float]]] = {
        "reading": lambda cold: in_new_process(read, folder, False, cold),
        "reading into memory": lambda cold: in_new_process(read, folder, True, cold),
        "loading": lambda cold: in_new_process(load, folder, flags.dtype, cold),
    }
    heads = ("seconds", "GB/s", "of reading", "of reading into memory")
    print(f"{'':22}{'cache':8}{heads[0]:>8}{heads[1]:>7}{heads[2]:>12}{heads[3]:>24}")
    for cold in (True, False):
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(flags.rounds):
            for name, case in cases.items():
                seconds[name].append(case(cold)["seconds"])
            progress(f"round {number + 1} of {flags.rounds}")
        progress("")
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        for name, median in medians.items():
            ratios = [medians[base] / median for base in ("reading", "reading into memory")]
            print(
                f"{name:22}{'cold' if cold else 'warm':8}{median:8.2f}{size / 1e9 / median:7.2f}"
                f"{ratios[0]:12.2f}{ratios[1]:24.2f}"
            )


def report_memory(found: dict[str, float]) -> None:
    """Prints the peak of resident memory while loading."""
    gb = {name: found[name] / 1e9 for name in ("params", "rise", "largest", "peak")}
    bound = 1.2 * gb["params"] + gb["largest"]
    print(
        f"parameters {gb['params']:.2f} GB: memory rose by {gb['rise']:.2f} GB at most, "
        f"{gb['rise'] / gb['params']:.3f} times the parameters (1.2 times and the largest tensor, "
        f"{gb['largest']:.2f} GB, would be {bound:.2f} GB); the whole process peaked at "
        f"{gb['peak']:.2f} GB"
    )


def progress(text: str) -> None:
    """Shows what is going on in a line that the next one overwrites."""
    print(f"{text:40}", end="\r", flush=True)


def in_new_process(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Calls a function in a process of its own, so that no memory is left from the one before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def read(folder: Path, keep: bool, cold: bool) -> dict[str, float]:
    """Reads the files from front to back; with `keep` into as much memory."""
    paths = sorted(folder.glob("*.safetensors"))
    prepare(paths, cold)
    buffer, kept = np.empty(_BUFFER, np.uint8), []
    start = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            if keep:
                kept.append(np.fromfile(file, np.uint8))
            else:
                while file.readinto(buffer.data):
                    pass
    return {"seconds": time.perf_counter() - start}


def load(folder: Path, dtype: str, cold: bool) -> dict[str, float]:
    """Loads the checkpoint; measures time and the rise of resident memory."""
    jax.block_until_ready(jax.device_put(np.zeros(8)))  # jax's own memory, before
    prepare(sorted(folder.glob("*.safetensors")), cold)
    before = status("VmRSS")
    start = time.perf_counter()
    tensors = read_safetensors(folder)
    params = apply_key_table(
        tensors, TABLE, shapes_of(tensors), placement=Placement(dtype), source=folder
    )
    jax.block_until_ready(params)
    return {
        "seconds": time.perf_counter() - start,
        "rise": status("VmHWM") - before,
        "peak": status("VmHWM"),
        "params": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "largest": max(tensor.nbytes for tensor in tensors.values()),
    }


def prepare(paths: list[Path], cold: bool) -> None:
    """Takes the files out of the page cache, or puts them in."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and file.read(_BUFFER):
                pass


def status(field: str) -> int:
    """Returns a figure of this process's memory in bytes; VmHWM is its peak so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


TABLE = {
    "model.embed_tokens.weight": KeyRule("embed/embedding"),
    "model.norm.weight": KeyRule("final_norm/scale"),
    **{
        f"model.layers.{{}}.{name}_proj.weight": KeyRule(f"layers/{name}/kernel", transpose)
        for name in ("q", "k", "v", "o", "gate", "up", "down")
    },
    "model.layers.{}.norm.weight": KeyRule("layers/norm/scale"),
}


def layer_shapes(number: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields name and shape of the tensors of one layer, as PyTorch stores them."""
    stem = f"model.layers.{number}."
    for name in ("q", "o"):
        yield f"{stem}{name}_proj.weight", (_WIDTH, _WIDTH)
    for name in ("k", "v"):
        yield f"{stem}{name}_proj.weight", (_WIDTH // 4, _WIDTH)
    for name in ("gate", "up"):
        yield f"{stem}{name}_proj.weight", (_INNER, _WIDTH)
    yield f"{stem}down_proj.weight", (_WIDTH, _INNER)
    yield f"{stem}norm.weight", (_WIDTH,)


def shapes_of(tensors: Any) -> dict[str, Any]:
    """Returns the parameters that the files describe, as shapes."""
    layers = sum(name.endswith(".norm.weight") for name in tensors) - 1
    tree: dict[str, Any] = {}
    for pattern, rule in TABLE.items():
        shape = tensors[pattern.replace("{}", "0")].shape
        if "{}" in pattern:
            shape = (layers, *(reversed(shape) if len(shape) == 2 else shape))
        *parents, name = rule.path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jax.ShapeDtypeStruct(shape, np.float32)
    return tree


def write_checkpoint(folder: Path, gigabytes: float, dtype: str) -> Path:
    """Writes shards of random tensors and their index."""
    kind = _KINDS[dtype]
    one = sum(math.prod(shape) for _, shape in layer_shapes(0)) * kind.itemsize
    outer = _VOCABULARY * _WIDTH * kind.itemsize
    tensors: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (_VOCABULARY, _WIDTH))
    ]
    for number in range(max(1, round((gigabytes * 1e9 - outer) / one))):
        tensors += layer_shapes(number)
    tensors += [("model.norm.weight", (_WIDTH,))]
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, shape in tensors:
        held = sum(math.prod(other) for _, other in shards[-1]) * kind.itemsize
        if held and held + math.prod(shape) * kind.itemsize > _SHARD:
            shards.append([])
        shards[-1].append((name, shape))
    folder.mkdir()
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for number, (name, shard) in enumerate(zip(names, shards, strict=True)):
        progress(f"writing shard {number + 1} of {len(shards)}")
        write_shard(folder / name, shard, kind, _CODES[dtype])
    progress("")
    weight_map = {
        name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard
    }
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return folder


def write_shard(
    path: Path, tensors: list[tuple[str, tuple[int, ...]]], kind: np.dtype, code: str
) -> None:
    """Writes one safetensors file, a block of random values again and again."""
    header, end = {}, 0
    for name, shape in tensors:
        size = math.prod(shape) * kind.itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = np.random.default_rng(0).standard_normal(2**22, np.float32).astype(kind).tobytes()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end:
            end -= file.write(block[:end])
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
