"""Time and memory of what a corpus goes through before the first question, by its size.

    python benchmarks/scale.py --sizes 10000 100000 1000000 --output runs/scale

Writes synthetic passages (words by Zipf's law, lengths log-normal around a hundred tokens) and,
for each size in a process of its own, does what `ask.py` does with a folder of documents: reads
them, tokenises them, counts the words for BM25, encodes them with a small random encoder, indexes
them and searches; then opens all of it again in another process. Memory is what a process holds of
its own, in its peak (pages of files that are mapped are the system's to drop). The exponents of
growth between sizes are those of processor time, which other work on the machine changes least; n
log n counts about 1.05. `--forecast` extrapolates the seconds of the largest size. Two CPU cores:
10,000 passages take half a minute, a million half an hour and 4 GB of disk.
"""

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from _beside import run_program
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm

from ragjax.index import HybridQueries
from ragjax.models.encoder import EncoderOptions, build_encoder
from ragjax.models.encoders.bert import FAMILY, BertConfig
from ragjax.models.testing import write_tiny_language_model
from ragjax.models.testing.encoder import random_params, write_encoder
from ragjax.runs.data import read_data
from ragjax.runs.indexes import build_bm25, build_retriever
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.saved import Models
from ragjax.runs.speed import Texts
from ragjax.runs.workspace import make_workspace
from ragjax.storage import write_json
from ragjax.training.loop import StopFlag

_SYLLABLES = tuple(
    a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "ar", "en")
)
_VOCABULARY = 200_000
_WHOLE_WORDS = 8000
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_QUESTIONS = 100
_DEPTH = 20
_ENCODE = "encode and index"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What to measure.

    Attributes:
        sizes: Numbers of passages, ascending.
        output: Folder of corpora, indexes and `scale.json`; removed corpora are made again.
        forecast: Number of passages to extrapolate to.
        only: Set by the benchmark itself: measure this size in this process.
    """

    sizes: tuple[int, ...] = (10_000, 100_000)
    output: Path = Path("runs/scale")
    forecast: int = 20_000_000
    only: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code: 0, or 2 for bad input."""
    return run_program(Flags, run, arguments, __doc__)


def run(flags: Flags) -> None:
    """Measures each size in processes of its own and prints a table."""
    if flags.only:
        print(json.dumps(_measure(flags.output / str(flags.only), flags.only)))
        return
    if not flags.sizes or list(flags.sizes) != sorted(set(flags.sizes)) or flags.sizes[0] < 1000:
        raise ValueError(f"sizes must be ascending, from 1,000 on, got {flags.sizes}")
    flags.output.mkdir(parents=True, exist_ok=True)
    _write_encoder(flags.output / "encoder")
    write_tiny_language_model(flags.output / "lm")
    found: dict[str, Any] = {}
    for size in flags.sizes:
        _write_corpus(flags.output / str(size), size)
        for name in ("out", "cache"):
            shutil.rmtree(flags.output / str(size) / name, ignore_errors=True)
        found[str(size)] = {name: _in_process(flags, size) for name in ("first", "again")}
        write_json(flags.output / "scale.json", found)
    print(format_table(found, flags.forecast))


def format_table(found: dict[str, Any], forecast: int) -> str:
    """Returns what was measured, the exponents of growth and the extrapolation, as text."""
    sizes = list(map(int, found))
    lines = []
    for call in ("first", "again"):
        lines.append(f"\n{'first time' if call == 'first' else 'again, in another process'}")
        heads = [f"{size:>15,}" for size in sizes] + ["  exponent", f"{forecast:>14,}"]
        lines.append(f"{'seconds (MiB)':<22}" + "".join(heads))
        for stage in found[str(sizes[0])][call]:
            cells = [found[str(size)][call][stage] for size in sizes]
            seconds = [cell["seconds"] for cell in cells]
            slope = exponent(sizes, [cell["cpu"] for cell in cells])
            row = [
                f"{s:.1f} ({c['mib']:,.0f})".rjust(15) for s, c in zip(seconds, cells, strict=True)
            ]
            future = seconds[-1] * (forecast / sizes[-1]) ** max(slope, 0)
            row += [f"{slope:>10.2f}", f"{future / 60:>10,.0f} min"]
            lines.append(f"{stage:<22}" + "".join(row))
    largest = found[str(sizes[-1])]["first"][_ENCODE]
    own, took = largest["forecast"], largest["seconds"]
    lines.append(
        f"\nencoding as a run forecasts it: {own:,.0f} s of {sizes[-1]:,} ({took:,.0f} measured,"
        f" with the index), {own * forecast / sizes[-1] / 60:,.0f} min of {forecast:,}"
    )
    return "\n".join(lines)


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Returns e of seconds ~ size ** e between the last two sizes; nan where there is one."""
    if len(sizes) < 2:
        return math.nan
    return math.log(max(seconds[-1], 1e-3) / max(seconds[-2], 1e-3)) / math.log(
        sizes[-1] / sizes[-2]
    )


def _in_process(flags: Flags, size: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", str(size), "--output", str(flags.output)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"measuring {size:,} passages ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(folder: Path, size: int) -> dict[str, Any]:
    """Returns seconds and MiB by stage."""
    found: dict[str, Any] = {}
    config = AdaptConfig(
        data=str(folder / "data"),
        encoder=str(folder.parent / "encoder"),
        lm=str(folder.parent / "lm"),
        output=str(folder / "out"),
    )
    for name in ("out", "cache"):
        (folder / name).mkdir(exist_ok=True)
    with _stage("read", found):
        dataset = read_data(config, folder / "cache", _to_stderr)
    with _stage("copies", found):
        len(dataset.twins.copies)
    with _stage("models", found):
        loaded = Models(config, None)
        workspace = make_workspace(
            config, folder / "out", dataset, {"train": (), "dev": (), "test": ()},
            loaded.base_encoders, loaded.base_language_model,
            stop=StopFlag(), log=_to_stderr,
        )  # fmt: skip
    with _stage("tokens", found):
        workspace.doc_tokens.lengths.sum()
    with _stage("BM25", found):
        bm25 = build_bm25(workspace)
    params = workspace.encoder.params
    texts = Texts(workspace, config)
    forecast = texts.corpus / texts.encoder_rate
    with _stage(_ENCODE, found):
        retriever = build_retriever(
            workspace, bm25, version=0, query_params=params, doc_params=params
        )
    found[_ENCODE]["forecast"] = forecast
    rng = np.random.default_rng(1)
    asked = [dataset.corpus[int(row)].text for row in rng.integers(0, size, _QUESTIONS)]
    texts = [" ".join(text.split()[:8]) for text in asked]
    queries = rng.normal(size=(_QUESTIONS, workspace.encoder.embedding_size)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    both = HybridQueries(queries, texts)
    for name, search in {
        "search BM25": lambda: bm25.search(texts, _DEPTH),
        "search dense": lambda: retriever.dense.search(queries, _DEPTH),
        "search hybrid": lambda: retriever.hybrid.search(both, _DEPTH),
    }.items():
        search()  # compiles
        with _stage(name, found):
            search()
    return found


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


@contextmanager
def _stage(name: str, found: dict[str, Any]) -> Iterator[None]:
    ended, most = threading.Event(), [_own_memory()]

    def watch() -> None:
        while not ended.wait(0.05):
            most[0] = max(most[0], _own_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started, cpu = time.perf_counter(), _processor_time()
    try:
        yield
    finally:
        seconds, cpu = time.perf_counter() - started, _processor_time() - cpu
        ended.set()
        watcher.join()
    mib = max(most[0], _own_memory())
    found[name] = {"seconds": round(seconds, 3), "cpu": round(cpu, 3), "mib": mib}


def _processor_time() -> float:
    """Returns the seconds that this process and those that it waited for computed."""
    return sum(os.times()[:4])


def _own_memory() -> float:
    """Returns the MiB that this process holds of its own."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return math.nan


def _write_corpus(folder: Path, size: int) -> None:
    path = folder / "data" / "corpus.jsonl"
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    words = _words()
    shares = 1 / np.arange(2, len(words) + 2) ** 1.05
    totals = np.cumsum(shares / shares.sum())
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for start in tqdm(range(0, size, 1000), desc=f"writing {size:,} passages", unit_scale=1000):
            lengths = np.exp(rng.normal(4.0, 0.5, min(1000, size - start))).astype(int) + 5
            chosen = np.searchsorted(totals, rng.random(lengths.sum())).clip(0, len(words) - 1)
            texts = np.split(words[chosen], np.cumsum(lengths)[:-1])
            for row, text in enumerate(texts, start):
                record = {"_id": f"d{row}", "title": str(text[0]), "text": " ".join(text)}
                file.write(json.dumps(record) + "\n")
    os.replace(partial, path)


def _words() -> np.ndarray:
    """Returns words of one to four syllables, the short ones first."""
    parts = (itertools.product(_SYLLABLES, repeat=count) for count in (1, 2, 3))
    made = itertools.islice(map("".join, itertools.chain(*parts)), _VOCABULARY)
    return np.array(list(made), dtype=object)


def _write_encoder(folder: Path) -> None:
    """Writes a random encoder of one narrow layer, with word pieces as BERT has them."""
    pieces = [*_SPECIAL, *_words()[:_WHOLE_WORDS], *(f"##{part}" for part in _SYLLABLES)]
    vocabulary = {piece: place for place, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(piece, vocabulary[piece]) for piece in ("[CLS]", "[SEP]")],
    )
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=64, num_layers=1, num_heads=1,
        intermediate_size=64, max_positions=256,
    )  # fmt: skip
    options = EncoderOptions(pad_id=0, pooling="mean", max_length=256, source="benchmarks/scale.py")
    params = random_params(FAMILY, config, 0)
    write_encoder(
        folder, build_encoder(FAMILY, config, params, tokenizer, options, normalized=True)
    )


if __name__ == "__main__":
    sys.exit(main())
