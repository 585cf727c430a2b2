"""Search in a Milvus server, by generations of documents behind one alias.

    publish("milvus:http://host:19530/manual", store)           # an EmbeddingStore
    index = MilvusIndex.open("milvus:http://host:19530/manual")
    result = index.search(query_embeddings, 20)                 # [B, D] -> [B, 20]

A generation is a collection that never changes once the alias names it, so a search that names one
collection mixes no two generations. A server that asks for a token finds it in the environment
variable `MILVUS_TOKEN`. B = queries, D = embedding size.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from ragjax.index import base, milvus_client
from ragjax.index.milvus_client import Address
from ragjax.index.store import StoreSpec, spec_as_json

_LOG = logging.getLogger(__name__)
_FORMAT = 1
ROW, EMBEDDING = "row", "embedding"
_SEGMENT_BYTES = 2**29
_MOST_LISTS = 65_536
_MOST_RESULTS = 16_384
# Of one request: queries, and results together, which are parsed in Python.
_QUERY_ROWS, _RESULT_ROWS = 256, 2**18
_TRIES = 3

MilvusKind = Literal["HNSW", "SCANN", "IVF_FLAT", "DISKANN"]
# Parameters by Milvus' names; a search is at least as wide as its results are many.
_BUILD = {
    "HNSW": {"M": 16, "efConstruction": 200},
    "SCANN": {"nlist": 0},
    "IVF_FLAT": {"nlist": 0},
    "DISKANN": {},
}
_SEARCH = {
    "HNSW": {"ef": 256},
    "SCANN": {"nprobe": 0, "reorder_k": 200},
    "IVF_FLAT": {"nprobe": 0},
    "DISKANN": {"search_list": 256},
}
_AT_LEAST_K = ("ef", "reorder_k", "search_list")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MilvusOptions:
    """How Milvus indexes and searches a generation, by inner product.

    Attributes:
        kind: Of the index. DISKANN needs a server that was set up for it.
        build: `M` and `efConstruction` of HNSW, `nlist` of SCANN and IVF_FLAT; what is left out
            is 16 and 200, and 4 sqrt(rows of a segment).
        search: `ef` of HNSW (256), `nprobe` of SCANN and IVF_FLAT (an eighth of `nlist`),
            `reorder_k` of SCANN (200) and `search_list` of DISKANN (256).
    """

    kind: MilvusKind = "HNSW"
    build: Mapping[str, int] = dataclasses.field(default_factory=dict)
    search: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses other kinds, other names and numbers that are not positive."""
        if self.kind not in get_args(MilvusKind):
            kinds = ", ".join(get_args(MilvusKind))
            raise ValueError(f"kind must be one of {kinds}, got {self.kind!r}")
        for field, known in (("build", _BUILD[self.kind]), ("search", _SEARCH[self.kind])):
            for name, value in getattr(self, field).items():
                if name not in known:
                    allowed = ", ".join(known) or "nothing"
                    raise ValueError(f"{field} of {self.kind} takes {allowed}; got {name!r}")
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ValueError(f"{field}[{name!r}] must be a positive integer, got {value!r}")

    def fitted(self, size: int, dim: int) -> "MilvusOptions":
        """Returns these options with every parameter, for N documents of size D."""
        # Each segment of a collection has an index of its own.
        rows = min(size, max(1, _SEGMENT_BYTES // (4 * dim)))
        build = {**_BUILD[self.kind], **self.build}
        search = {**_SEARCH[self.kind], **self.search}
        if "nlist" in build:
            build["nlist"] = build["nlist"] or min(_MOST_LISTS, 4 * math.isqrt(rows))
            search["nprobe"] = min(search["nprobe"] or build["nlist"] // 8 or 1, build["nlist"])
        return MilvusOptions(kind=self.kind, build=build, search=search)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One collection: documents as one encoder embedded them, and how they are searched.

    Attributes:
        name: Of the collection: alias, number and digest.
        spec: What the store held that was published.
        options: Of the index, with every parameter.
        norms: Smallest and largest norm of a sample of the documents.
    """

    name: str
    spec: StoreSpec
    options: MilvusOptions
    norms: tuple[float, float]

    def description(self) -> str:
        """Returns what the collection says of itself."""
        record = {"spec": spec_as_json(self.spec), "options": dataclasses.asdict(self.options)}
        return json.dumps({"ragjax": _FORMAT, **record, "norms": self.norms}, sort_keys=True)

    def digest(self) -> str:
        """Returns 12 hexadecimal digits that tell what the collection holds."""
        return hashlib.sha256(self.description().encode()).hexdigest()[:12]

    @classmethod
    def read(cls, client: Any, name: str) -> "Generation":
        """Reads what a collection says of itself.

        Raises:
            ValueError: It is none of ragjax, or of another version.
        """
        try:
            record = json.loads(client.describe_collection(name)["description"])
            if record["ragjax"] != _FORMAT:
                raise ValueError(f"its format is {record['ragjax']}, expected {_FORMAT}")
            return cls(
                name=name,
                spec=StoreSpec(**record["spec"]),
                options=MilvusOptions(**record["options"]),
                norms=tuple(record["norms"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the Milvus collection {name} was not published by this version of ragjax"
                f" ({error}); publish the index under an alias of its own"
            ) from error


class MilvusIndex:
    """The K documents of (nearly) largest inner product, found by a Milvus server.

    It follows its alias to generations that fit it. One that does not, of another encoder for
    example, is not followed: the generation before it is searched until this index is opened again.
    """

    def __init__(
        self,
        client: Any,
        at: Address,
        generation: Generation,
        wanted: Mapping[str, Any] | None,
    ) -> None:
        """Wraps a connection; use `MilvusIndex.open`. Without `wanted` no alias is followed."""
        self._client, self._address, self._wanted = client, at, wanted
        self._generation = generation
        self._norms = base.NormCheck(generation.norms)
        self._passed_over = ""

    @classmethod
    def open(
        cls,
        address: str,
        *,
        model_fingerprint: str | None = None,
        corpus_fingerprint: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> "MilvusIndex":
        """Opens the generation that an alias names.

        Args:
            address: `milvus:URI/ALIAS`.
            model_fingerprint: The encoder that must have made the embeddings; None accepts any.
            corpus_fingerprint: The corpus that must have been encoded; None accepts any.
            settings: Entries that the settings of the store must have had; None accepts any.

        Raises:
            ConnectionError: No server answers.
            FileNotFoundError: The server has no such alias.
            ValueError: The address has another form; what is there was not published by ragjax,
                or comes from another encoder, corpus or settings.
            ImportError: pymilvus is not installed.
        """
        where = Address.parse(address)
        wanted = {"model_fingerprint": model_fingerprint, "corpus_fingerprint": corpus_fingerprint}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        wanted |= settings or {}
        with milvus_client.named_errors(where.uri):
            client = milvus_client.connect(where.uri)
            name = milvus_client.aliased(client, where.alias)
            if name is None:
                raise FileNotFoundError(
                    f"Milvus at {where.uri} has no alias {where.alias}; publish an index first"
                )
            generation = Generation.read(client, name)
        if problem := generation.spec.differences(wanted):
            raise ValueError(
                f"the embeddings at {address} are not those of this encoder and corpus ({problem});"
                " publish those that are, or open the index with the models it was published from"
            )
        return cls(client, where, generation, wanted)

    @property
    def size(self) -> int:
        """Number of documents."""
        return self._generation.spec.size

    @property
    def dim(self) -> int:
        """Size of an embedding."""
        return self._generation.spec.dim

    @property
    def generation(self) -> Generation:
        """The generation that was searched last."""
        return self._generation

    def search(self, queries: ArrayLike, k: int) -> base.SearchResult:
        """Returns the k best documents that the server finds for each query, of one generation.

        Args:
            queries: `[B, D]` query embeddings; searched 256 at a time.
            k: Results per query, at most 16,384; slots that the index cannot fill are masked.

        Returns:
            `[B, k]` ids, inner products (float32) and mask, best first; of equal scores among
            those found the lower id first.

        Raises:
            ValueError: `k` is out of range, a query is not finite, or its size is not the index's.
            ConnectionError: The server does not answer any more.
            FileNotFoundError: The generation that was searched is gone, and the one that the alias
                names does not fit.
        """
        with milvus_client.named_errors(self._address.uri):
            for tries in range(_TRIES):
                generation = self._follow()
                try:
                    return self._search(generation, queries, k)
                except milvus_client.milvus_error():
                    # Dropped between the two requests: the whole search names another one.
                    moved = self._follow() is not generation
                    if not moved or tries == _TRIES - 1:
                        raise
        raise AssertionError("a search returns or raises")

    def _follow(self) -> Generation:
        """Returns the generation to search: that of the alias, or the present one."""
        present = self._generation
        if self._wanted is None:
            return present
        name = milvus_client.aliased(self._client, self._address.alias)
        if name is None or name in (present.name, self._passed_over):
            return present
        try:
            found = Generation.read(self._client, name)
            problem = found.spec.differences({**self._wanted, "dim": present.spec.dim})
        except ValueError as error:
            found, problem = present, str(error)
        except milvus_client.milvus_error() as error:
            if error.code != milvus_client.NO_COLLECTION:
                raise
            return present  # dropped between the two requests
        if problem:
            self._passed_over = name
            _LOG.warning(
                "%s names %s now, which does not fit (%s); %s is searched until the index is opened"
                " again.",
                self._address.alias,
                name,
                problem,
                present.name,
            )
            return present
        self._norms = base.NormCheck(found.norms)
        self._generation = found
        return found

    def _search(self, generation: Generation, queries: ArrayLike, k: int) -> base.SearchResult:
        found = base.check_k(k, size=generation.spec.size)
        if k > _MOST_RESULTS:
            raise ValueError(f"k must be at most {_MOST_RESULTS:,} in Milvus, got {k:,}")
        embeddings = base.check_query_embeddings(queries, dim=generation.spec.dim)
        self._norms.check(embeddings)
        params = {
            name: max(value, found) if name in _AT_LEAST_K else value
            for name, value in generation.options.search.items()
        }
        doc_ids = np.full((len(embeddings), found), base.NO_DOC, np.int32)
        scores = np.full((len(embeddings), found), -np.inf, np.float32)
        rows = max(1, min(_QUERY_ROWS, _RESULT_ROWS // found))
        for start in range(0, len(embeddings), rows):
            answers = self._client.search(
                generation.name,
                data=list(embeddings[start : start + rows]),
                anns_field=EMBEDDING,
                limit=found,
                search_params={"metric_type": "IP", "params": params},
                timeout=milvus_client.SECONDS,
            )
            for row, hits in enumerate(answers, start):
                ids = np.asarray(hits.ids, np.int32)
                inner = np.asarray(hits.distances, np.float32)
                order = np.lexsort((ids, -inner))
                doc_ids[row, : len(ids)], scores[row, : len(ids)] = ids[order], inner[order]
        return base.pad_result(doc_ids, scores, k)
