"""Speed and memory of reading a corpus, by kind of table.

    python benchmarks/reading.py --passages 1000000 --output runs/reading

Writes the same synthetic passages (a hundred words each, about 600 bytes) as every kind of table
that `--data` takes, and opens each in a process of its own, with one thread: the first time, which
reads and checks the table and writes the prepared corpus, and again, which maps it. Memory is the
most that the process ever held, libraries and mapped pages among it. On a busy machine the CPU
time says more than the time. A million passages: about six
minutes on one CPU core, and 6 GB of disk.
"""

import csv
import dataclasses
import gzip
import itertools
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from ragjax.data import Corpus
from ragjax.storage import write_json

_KINDS = {
    "JSON lines": "jsonl",
    "JSON lines, gzip": "jsonl.gz",
    "JSON array": "json",
    "CSV": "csv",
    "TSV in quotes (DPR)": "tsv",
    "Parquet": "parquet",
    "Arrow": "arrow",
}
_WORDS, _VOCABULARY = 100, 5000
_BATCH = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What to measure.

    Attributes:
        passages: How many there are.
        output: Folder of the tables and of `reading.json`; tables that are there are read again.
        only: Set by the benchmark itself: open this file in this process.
    """

    passages: int = 100_000
    output: Path = Path("runs/reading")
    only: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code: 0, or 2 for bad input."""
    flags = tyro.cli(Flags, args=arguments, description=__doc__)
    if flags.passages < 1:
        print(f"error: passages must be at least 1, got {flags.passages}", file=sys.stderr)
        return 2
    if flags.only:
        print(json.dumps(_measure(Path(flags.only), flags.output / "cache")))
        return 0
    flags.output.mkdir(parents=True, exist_ok=True)
    heads = f"{'of CPU time':>12}{'MiB':>8}{'again, s':>10}{'file, MB':>10}"
    print(f"{'passages a second':<22}{'first':>10}{heads}")
    found = {}
    for kind, ending in _KINDS.items():
        path = flags.output / f"{flags.passages}.{ending}"
        if not path.exists():
            _write(path, flags.passages)
        shutil.rmtree(flags.output / "cache", ignore_errors=True)
        first, again = (_in_process(flags, path) for _ in range(2))
        found[kind] = {"first": first, "again": again, "bytes": path.stat().st_size}
        print(
            f"{kind:<22}{flags.passages / first['seconds']:>10,.0f}"
            f"{flags.passages / first['cpu_seconds']:>12,.0f}{first['mib']:>8,.0f}"
            f"{again['seconds']:>10.2f}{path.stat().st_size / 1e6:>10,.0f}",
            flush=True,
        )
        write_json(flags.output / "reading.json", found)
    return 0


def _in_process(flags: Flags, path: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--only", str(path), "--output", str(flags.output)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: reading {path} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(path: Path, cache: Path) -> dict[str, float]:
    started, computed = time.perf_counter(), time.process_time()
    Corpus.open(path, cache=cache)
    seconds, computed = time.perf_counter() - started, time.process_time() - computed
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "cpu_seconds": computed, "mib": kib / 1024}


def _rows(count: int) -> Iterator[list[str]]:
    """Yields id, text and title, the same at each call."""
    rng = np.random.default_rng(0)
    letters = rng.integers(97, 123, (_VOCABULARY, 9), dtype=np.uint8)
    lengths = rng.integers(2, 10, _VOCABULARY)
    words = [bytes(w[:n]).decode() for w, n in zip(letters, lengths, strict=True)]
    for row in tqdm(range(count), desc="writing", file=sys.stderr, mininterval=1):
        chosen = rng.integers(0, _VOCABULARY, _WORDS).tolist()
        text = " ".join([words[place] for place in chosen])
        yield [f"d{row}", f'{text}, "{words[chosen[0]]}".', words[chosen[1]]]


def _write(path: Path, count: int) -> None:
    partial = path.with_name(f"partial-{path.name}")
    columns = ("_id", "text", "title")
    rows = _rows(count)
    if path.suffix in (".parquet", ".arrow"):
        _write_columns(partial, columns, rows, path.suffix)
    elif path.suffix in (".csv", ".tsv"):
        with open(partial, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows(itertools.chain([columns], rows))
    else:
        is_array = path.suffix == ".json"
        with gzip.open(partial, "wt") if path.suffix == ".gz" else open(partial, "w") as file:
            file.write("[\n" if is_array else "")
            for number, row in enumerate(rows):
                file.write(",\n" if is_array and number else "")
                file.write(json.dumps(dict(zip(columns, row, strict=True))))
                file.write("" if is_array else "\n")
            file.write("\n]\n" if is_array else "")
    partial.rename(path)


def _write_columns(path: Path, columns: Sequence[str], rows: Iterator[Any], ending: str) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([(name, pyarrow.string()) for name in columns])
    new = parquet.ParquetWriter if ending == ".parquet" else pyarrow.ipc.new_stream
    with new(str(path), schema) as writer:
        while batch := list(itertools.islice(rows, 100 * _BATCH)):
            writer.write_table(pyarrow.table(list(zip(*batch, strict=True)), schema=schema))


if __name__ == "__main__":
    sys.exit(main())
