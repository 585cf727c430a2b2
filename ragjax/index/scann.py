"""Approximate search with ScaNN, with the padding, finiteness and small-N rules it lacks.

    index = ScannIndex.build(doc_embeddings)     # [N, D]
    result = index.search(query_embeddings, 20)  # [B, D] -> [B, 20]

ScaNN itself returns fewer columns when it has fewer than k documents, pads short rows with id 0
and NaN, and may end the process on a NaN. None of that passes this module.
"""

import dataclasses
import importlib.util
import logging
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ragjax import storage
from ragjax.index import base, recall

_LOG = logging.getLogger(__name__)
BRUTE_FORCE_BELOW = 20_000
TREE_FROM = 100_000
# ScaNN trains 16 centres for each block of dimensions and needs a document for each.
_MIN_QUANTIZED = 16
_MAX_TRAINING_ROWS = 250_000
# Rows that ScaNN codes together in an update.
_UPSERT_ROWS = 256
_MANIFEST = "ragjax.json"
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScannOptions:
    """How an index is built and searched.

    Attributes:
        num_leaves: Partitions of the documents; 0 searches them all.
        leaves_to_search: Partitions looked into for each query; 0 with `num_leaves` 0.
        dimensions_per_block: Dimensions coded together in 4 bits; 0 scores exactly instead.
        reorder: Candidates scored again with the full vectors, for each query.
        anisotropic_threshold: T of the anisotropic quantisation loss.
        threads: Of the build and of the search; 0 takes ScaNN's own choice (every core).

    References:
        Guo et al., "Accelerating Large-Scale Inference with Anisotropic Vector Quantization", 2020.
    """

    num_leaves: int = 0
    leaves_to_search: int = 0
    dimensions_per_block: int = 2
    reorder: int = 200
    anisotropic_threshold: float = 0.2
    threads: int = 0

    def __post_init__(self) -> None:
        """Refuses negative numbers."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"{field.name} must not be negative: {getattr(self, field.name)}")


def scann_options(size: int, *, threads: int = 0) -> ScannOptions:
    """Returns the setting ScaNN's authors advise for a corpus of `size` documents.

    Exact scores below 20,000 documents, quantised scores and reordering below 100,000, and above
    that also a partition into about sqrt(N) leaves of which an eighth is searched.
    """
    if size < BRUTE_FORCE_BELOW:
        return ScannOptions(dimensions_per_block=0, reorder=0, threads=threads)
    if size < TREE_FROM:
        return ScannOptions(threads=threads)
    leaves = math.isqrt(size)
    return ScannOptions(num_leaves=leaves, leaves_to_search=max(1, leaves // 8), threads=threads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScannDetails:
    """What is known of a built index, also saved beside it.

    Attributes:
        size: Number of documents.
        dim: Size of an embedding.
        options: As used, after what did not fit the corpus was adjusted.
        notes: One sentence for each adjustment.
        recall: Fraction of the exact best 10 found, measured at the build.
        build_seconds: What the build took, without measuring the recall.
        doc_norms: Smallest and largest norm of a sample of the documents.
    """

    size: int
    dim: int
    options: ScannOptions
    notes: tuple[str, ...]
    recall: float
    build_seconds: float
    doc_norms: tuple[float, float]


class ScannIndex:
    """The K documents of (nearly) largest inner product; never changed once built."""

    def __init__(self, searcher: Any, details: ScannDetails) -> None:
        """Wraps a searcher; use `ScannIndex.build` or `ScannIndex.load`."""
        self._searcher = searcher
        self._norms = base.NormCheck(details.doc_norms)
        self.details = details
        if details.options.threads:
            searcher.set_num_threads(details.options.threads)

    @classmethod
    def build(
        cls,
        doc_embeddings: ArrayLike,
        *,
        options: ScannOptions | None = None,
        probe_queries: ArrayLike | None = None,
    ) -> "ScannIndex":
        """Builds the index and measures its recall.

        Args:
            doc_embeddings: `[N, D]`; row i is document i.
            options: Default: `scann_options(N)`.
            probe_queries: `[P, D]` real queries for the recall; default: 100 of the documents.

        Raises:
            ValueError: The embeddings are no finite matrix, or there are none.
            ImportError: ScaNN does not work here; the message says why.
        """
        embeddings = np.asarray(base.check_documents(doc_embeddings))
        size, dim = embeddings.shape
        chosen, notes = _fit_options(options or scann_options(size), size)
        for note in notes:
            _LOG.warning("%s", note)
        started = time.monotonic()
        searcher = _build_searcher(embeddings, chosen)
        details = ScannDetails(
            size=size,
            dim=dim,
            options=chosen,
            notes=notes,
            recall=math.nan,
            build_seconds=time.monotonic() - started,
            doc_norms=base.norm_range(embeddings),
        )
        measured = recall.recall_against_exact(cls(searcher, details), embeddings, probe_queries)
        return cls(searcher, dataclasses.replace(details, recall=measured))

    @property
    def size(self) -> int:
        """Number of documents."""
        return self.details.size

    @property
    def dim(self) -> int:
        """Size of an embedding."""
        return self.details.dim

    def search(self, queries: ArrayLike, k: int) -> base.SearchResult:
        """Returns (nearly) the k documents of largest inner product for each query.

        Args:
            queries: `[B, D]` query embeddings.
            k: Results per query; slots that the searched leaves cannot fill are masked.

        Returns:
            `[B, k]` ids, inner products (float32) and mask, best first.

        Raises:
            ValueError: `k` is not positive, a query is not finite, or its size is not the index's.
        """
        found = base.check_k(k, size=self.size)
        embeddings = base.check_query_embeddings(queries, dim=self.dim)
        if not len(embeddings):
            return base.empty_result(0, k)
        self._norms.check(embeddings)
        options = self.details.options
        doc_ids, scores = self._searcher.search_batched_parallel(
            embeddings,
            final_num_neighbors=found,
            pre_reorder_num_neighbors=max(options.reorder, found) if options.reorder else None,
            leaves_to_search=options.leaves_to_search or None,
        )
        # Short rows are padded with id 0 and NaN, which `pad_result` masks.
        return base.pad_result(doc_ids.astype(np.int64), scores, k)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the index to a new folder, complete or not at all.

        Raises:
            FileExistsError: Something is there already.
        """
        with storage.new_folder(Path(folder)) as building:
            with storage.named_if_full(Path(folder), 0):
                self._searcher.serialize(str(building), relative_path=True)
            manifest = {
                "format": _FORMAT,
                "details": dataclasses.asdict(self.details),
                "sha256": {path.name: storage.sha256(path) for path in building.iterdir()},
            }
            storage.write_sealed(building / _MANIFEST, manifest)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        threads: int | None = None,
        verified: bool = False,
    ) -> "ScannIndex":
        """Opens an index that `save` wrote, after every file passed its checksum.

        Args:
            folder: Where it was saved.
            threads: Of the search; default: as the index was built.
            verified: The caller has compared the checksums a moment ago, for example of a larger
                folder around this one; only what lies in the folder is checked again.

        Raises:
            FileNotFoundError: No complete index there.
            ValueError: A file is missing, changed or does not belong there.
            ImportError: ScaNN does not work here; the message says why.
        """
        source = Path(folder)
        manifest = storage.read_sealed(source / _MANIFEST, what="ScaNN index")
        # ScaNN unpickles a docid file if it finds one, so nothing unlisted may lie there.
        check = storage.check_listing if verified else storage.verify_folder
        check(source, manifest.get("sha256"), also=(_MANIFEST,))
        try:
            values = dict(manifest["details"])
            values["options"] = ScannOptions(**values["options"])
            values["notes"] = tuple(values["notes"])
            values["doc_norms"] = tuple(values["doc_norms"])
            details = ScannDetails(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{source / _MANIFEST} is no ScaNN index manifest: {error}") from error
        if threads is not None:
            options = dataclasses.replace(details.options, threads=threads)
            details = dataclasses.replace(details, options=options)
        return cls(
            _import_scann().load_searcher(str(source), assets_backcompat_shim=False), details
        )

    @classmethod
    def upserted_copy(
        cls,
        folder: str | os.PathLike[str],
        rows: ArrayLike,
        doc_embeddings: ArrayLike,
        *,
        probe_queries: ArrayLike | None = None,
        threads: int | None = None,
        verified: bool = False,
    ) -> "ScannIndex":
        """Opens a private copy of a saved index and gives some documents new embeddings.

        Neither the folder nor an index loaded from it before changes. The new vectors are coded
        with the codebook and the partition of the old ones, which no longer fit once most of them
        have moved: `details.recall` tells, and `build` starts afresh.

        Args:
            folder: Where the index was saved.
            rows: `[R]` different documents whose embeddings have changed.
            doc_embeddings: `[N, D]`, all documents as they shall be found: the new embeddings in
                `rows`, and in the others those that were indexed, against which the recall is
                measured.
            probe_queries: `[P, D]` real queries for the recall; default: 100 of the documents.
            threads: Of the update and the search; default: as the index was built.
            verified: As in `load`.

        Returns:
            The index; `details.build_seconds` is what the update took.

        Raises:
            FileNotFoundError: No complete index there.
            ValueError: The folder as in `load`; the embeddings are not finite or not of the
                index's size; or rows that are no document or listed twice.
            ImportError: ScaNN does not work here; the message says why.
        """
        embeddings = np.asarray(base.check_documents(doc_embeddings))
        index = cls.load(folder, threads=threads, verified=verified)
        if embeddings.shape != (index.size, index.dim):
            raise ValueError(
                f"Document embeddings are {embeddings.shape} but the index in {folder} holds "
                f"{(index.size, index.dim)}; build a new index for another corpus or encoder"
            )
        positions = base.check_rows(rows, index.size)
        started = time.monotonic()
        # Not the wrapper's method, which wants docids and would store them as a pickle.
        changed = index._searcher.searcher.upsert(
            positions.tolist(), embeddings[positions], _UPSERT_ROWS
        )
        if list(changed) != positions.tolist():
            raise RuntimeError("ScaNN moved documents while updating them; build a new index")
        details = dataclasses.replace(
            index.details,
            build_seconds=time.monotonic() - started,
            doc_norms=base.norm_range(embeddings),
            recall=recall.recall_against_exact(index, embeddings, probe_queries),
        )
        return cls(index._searcher, details)


def _fit_options(options: ScannOptions, size: int) -> tuple[ScannOptions, tuple[str, ...]]:
    """Returns options that a corpus of `size` documents can be built with, and what changed."""
    notes = []
    changes: dict[str, int] = {}
    leaves = options.num_leaves
    if leaves > size:
        notes.append(f"num_leaves {leaves} is more than the {size} documents; using {size}.")
        leaves = changes["num_leaves"] = size
    if leaves and not 1 <= options.leaves_to_search <= leaves:
        fitted = min(max(options.leaves_to_search, 1), leaves)
        notes.append(
            f"leaves_to_search {options.leaves_to_search} is not between 1 and the {leaves} leaves;"
            f" using {fitted}."
        )
        changes["leaves_to_search"] = fitted
    if options.dimensions_per_block and size < _MIN_QUANTIZED:
        notes.append(
            f"Quantised scores need at least {_MIN_QUANTIZED} documents, got {size}; "
            "scoring exactly."
        )
        changes |= {"num_leaves": 0, "leaves_to_search": 0, "dimensions_per_block": 0, "reorder": 0}
    return dataclasses.replace(options, **changes), tuple(notes)


def _build_searcher(embeddings: NDArray[np.float32], options: ScannOptions) -> Any:
    """Runs ScaNN's builder; never with docids, which it would store as a pickle."""
    builder = _import_scann().builder(embeddings, 10, "dot_product")
    builder = builder.set_n_training_threads(options.threads)
    if options.num_leaves:
        builder = builder.tree(
            options.num_leaves,
            options.leaves_to_search,
            training_sample_size=min(len(embeddings), _MAX_TRAINING_ROWS),
        )
    if options.dimensions_per_block:
        builder = builder.score_ah(
            options.dimensions_per_block,
            anisotropic_quantization_threshold=options.anisotropic_threshold,
        )
        if options.reorder:
            builder = builder.reorder(options.reorder)
    else:
        builder = builder.score_brute_force()
    return builder.build()


def _import_scann() -> Any:
    """Imports ScaNN's numpy interface, or says why it cannot be had."""
    problem = scann_problem()
    if problem:
        raise ImportError(problem)
    from scann.scann_ops.py import scann_ops_pybind

    return scann_ops_pybind


def scann_problem() -> str | None:
    """Says in one sentence why ScaNN does not work here; None if it does."""
    remedy = "use the exact index instead (index='exact')"
    if sys.platform != "linux":
        return f"ScaNN has no package for {platform.system()}; {remedy}"
    if sys.version_info >= (3, 14):
        return f"ScaNN has no package for Python {platform.python_version()}; {remedy}"
    # Without these instructions, importing scann ends the process.
    missing = _missing_cpu_flags()
    if missing:
        return f"ScaNN needs the CPU instructions {' and '.join(missing)}; {remedy}"
    if importlib.util.find_spec("scann") is None:
        return f"ScaNN is not installed (pip install scann); until then {remedy}"
    return None


def _missing_cpu_flags() -> list[str]:
    """Returns which of AVX and FMA an x86 CPU lacks, where the kernel says."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [flag for flag in ("avx", "fma") if flag not in words]
