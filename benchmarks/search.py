"""ScaNN as this library builds it beside faiss: recall@20, build and search times in one run.

    python benchmarks/search.py --size 1000000 --dim 64

The vectors lie in clusters of clusters, as those of texts do, and the queries near documents. ScaNN
and IVF-PQ (with the best candidates scored again, as ScaNN does) and HNSW are each built once;
then faiss's search is made as thorough as it needs to be to find what ScaNN finds, and all three
are timed in turns: all questions in one batch, and one at a time. Needs `pip install faiss-cpu`.
"""

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _beside import in_turns, run_program
from numpy.typing import NDArray

from ragjax.index import ExactIndex, ScannIndex, scann_options
from ragjax.storage import write_json

_EQUAL = 0.005  # recalls so close count as equal
_SINGLE = 50  # questions that are asked one at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What to compare.

    Attributes:
        size: Documents.
        dim: Size of an embedding.
        queries: Questions.
        k: Results of each.
        rounds: Times that each search is timed; the median counts.
        threads: Of every library; 0: one for each core.
        output: File for the results, JSON; "": none.
    """

    size: int = 100_000
    dim: int = 64
    queries: int = 500
    k: int = 20
    rounds: int = 5
    threads: int = 0
    output: str = ""


@dataclasses.dataclass(frozen=True)
class Built:
    """An index, how it searches and what was asked of it.

    Attributes:
        name: Of the index.
        seconds: Of the build.
        search: Embeddings `[B, D]` to document ids `[B, K]`.
        settings: What it was told, in words.
    """

    name: str
    seconds: float
    search: Callable[[NDArray[np.float32]], NDArray[Any]]
    settings: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code: 0, or 2 for bad input."""
    return run_program(Flags, run, arguments, __doc__)


def run(flags: Flags) -> None:
    """Builds all, searches in turns and prints a table."""
    for name in ("size", "queries", "k", "rounds"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(flags, name)}")
    if flags.dim < 8 or flags.dim % 8:
        raise ValueError(f"--dim must be a multiple of 8, got {flags.dim}")
    import faiss

    threads = flags.threads or os.cpu_count() or 1
    faiss.omp_set_num_threads(threads)
    documents, queries = _vectors(flags)
    truth = ExactIndex(documents).search(queries, flags.k).doc_ids
    started = time.perf_counter()
    index = ScannIndex.build(documents, options=scann_options(flags.size, threads=threads))
    options = index.details.options
    built = [
        Built(
            "ScaNN", time.perf_counter() - started,
            lambda batch: index.search(batch, flags.k).doc_ids,
            f"{options.num_leaves} leaves, {options.leaves_to_search} searched",
        )
    ]  # fmt: skip
    wanted = _recall(built[0].search(queries), truth)
    for name, make in (("faiss IVF-PQ", _ivf_pq), ("faiss HNSW", _hnsw)):
        started = time.perf_counter()
        searched, field, values = make(faiss, documents)
        seconds = time.perf_counter() - started

        def search(batch: NDArray[np.float32], searched: Any = searched) -> NDArray[Any]:
            return searched.search(batch, flags.k)[1]

        for value in values:
            field(value)
            if _recall(search(queries), truth) >= wanted - _EQUAL:
                break
        built.append(Built(name, seconds, search, f"{value} searched"))
    rows = _timed(built, queries, truth, flags)
    if flags.output:
        write_json(Path(flags.output), {"flags": dataclasses.asdict(flags), "rows": rows})
    print(format_rows(rows))


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the table."""
    lines = [
        f"{'index':<14}{'build s':>9}{'recall':>8}{'ms a batch':>12}{'ms a query':>12}  setting"
    ]
    for row in rows:
        lines.append(
            f"{row['index']:<14}{row['build_seconds']:>9.1f}{row['recall']:>8.3f}"
            f"{row['batch_ms']:>12.1f}{row['query_ms']:>12.2f}  {row['settings']}"
        )
    return "\n".join(lines)


def _timed(
    built: Sequence[Built], queries: NDArray[np.float32], truth: NDArray[Any], flags: Flags
) -> list[dict[str, Any]]:
    def singly(each: Built) -> Callable[[], Any]:
        return lambda: [each.search(query[None]) for query in queries[:_SINGLE]]

    batches = in_turns(
        {each.name: lambda each=each: each.search(queries) for each in built},
        flags.rounds, "searching in batches",
    )  # fmt: skip
    singles = in_turns({each.name: singly(each) for each in built}, flags.rounds, "one at a time")
    return [
        {
            "index": each.name,
            "build_seconds": each.seconds,
            "recall": _recall(each.search(queries), truth),
            "batch_ms": 1000 * statistics.median(batches[each.name]),
            "query_ms": 1000 * statistics.median(singles[each.name]) / min(_SINGLE, len(queries)),
            "settings": each.settings,
        }
        for each in built
    ]


def _ivf_pq(faiss: Any, documents: NDArray[np.float32]) -> tuple[Any, Any, list[int]]:
    """Returns an index with as many cells as ScaNN has leaves, 4 bits for each two dimensions."""
    size, dim = documents.shape
    cells = max(1, int(size**0.5))
    coarse = faiss.IndexFlatIP(dim)
    coded = faiss.IndexIVFPQFastScan(coarse, dim, cells, dim // 2, 4, faiss.METRIC_INNER_PRODUCT)
    refined = faiss.IndexRefineFlat(coded)
    refined.k_factor = 10
    refined.train(documents[:: max(1, size // (64 * cells))])
    refined.add(documents)
    probes = sorted({min(cells, 1 << power) for power in range(cells.bit_length() + 1)})
    return refined, lambda value: setattr(coded, "nprobe", value), probes


def _hnsw(faiss: Any, documents: NDArray[np.float32]) -> tuple[Any, Any, list[int]]:
    index = faiss.IndexHNSWFlat(documents.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 100
    index.add(documents)
    depths = [1 << power for power in range(4, 13)]
    return index, lambda value: setattr(index.hnsw, "efSearch", value), depths


def _recall(found: NDArray[Any], truth: NDArray[Any]) -> float:
    """Returns the mean share of the exact best k that were found."""
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), truth.tolist(), strict=True)]
    return float(np.mean(hits)) / truth.shape[1]


def _vectors(flags: Flags) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns unit vectors `[N, D]` in clusters of clusters, and queries `[Q, D]` near some."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32)

    topics = max(1, int(flags.size**0.5) // 8)
    fine = topics * 16
    centres = draw(topics, flags.dim)[np.arange(fine) % topics] + np.float32(0.6) * draw(
        fine, flags.dim
    )
    documents = centres[rng.integers(0, fine, flags.size)]
    documents += np.float32(0.6) * draw(flags.size, flags.dim)
    queries = documents[rng.integers(0, flags.size, flags.queries)]
    queries = queries + np.float32(0.4) * draw(flags.queries, flags.dim)
    for vectors in (documents, queries):
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return documents, queries


if __name__ == "__main__":
    sys.exit(main())
