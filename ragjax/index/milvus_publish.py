"""Publishing embeddings in a Milvus server: a new generation, proven in use, then the swap.

One program at a time publishes under an alias; any number search it, see `ragjax.index.milvus`.
N = documents, D = embedding size.
"""

import dataclasses
import logging
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from numpy.typing import ArrayLike

from ragjax.index import base, milvus, milvus_client, recall
from ragjax.index.store import EmbeddingStore

_LOG = logging.getLogger(__name__)
_CHUNK_BYTES = 2**23
_POLL_SECONDS = 0.5
# Milvus builds no index for a segment of fewer rows, it compares them all.
_NEVER_INDEXED = 1024


class Published(NamedTuple):
    """What `publish` did."""

    name: str  # of the collection that the alias names now
    recall: float  # fraction of the exact best 10 that it finds
    inserted: int  # rows; fewer than N where an earlier call had begun
    dropped: tuple[str, ...]  # collections: older ones, and what no search used


class _Place(NamedTuple):
    """A generation in a server."""

    client: Any
    uri: str
    generation: milvus.Generation


def publish(
    address: str,
    store: EmbeddingStore,
    *,
    options: milvus.MilvusOptions | None = None,
    probe_queries: ArrayLike | None = None,
    keep: int = 1,
    min_recall: float = 0.8,
    deadline_seconds: float = 3600.0,
    on_rows: Callable[[int, int], Any] | None = None,
) -> Published:
    """Serves embeddings as a new generation, and points the alias to it once it is in use.

    The alias is untouched until every row is searched through the index and the recall is
    measured. Called again after it was killed or has failed, it goes on where it was; called again
    after it has succeeded, it checks the generation once more and inserts nothing.

    Args:
        address: `milvus:URI/ALIAS`; the alias need not exist.
        store: The embeddings; row i is document i.
        options: Of the index; default: HNSW.
        probe_queries: `[P, D]` real queries for the recall; default: 100 of the documents.
        keep: Generations before the new one that `roll_back` can return to; older ones are
            dropped.
        min_recall: Least fraction of the exact best 10 that the index must find.
        deadline_seconds: How long to wait for the server to build and load the index.
        on_rows: Told the rows inserted so far and N after each chunk.

    Raises:
        ConnectionError: No server answers.
        TimeoutError: The index was not in use by the deadline.
        ValueError: An option is out of range, the address has another form, or the recall is too
            low; the alias is as it was.
        OSError: The server refused something, or lost rows.
        ImportError: pymilvus is not installed.
    """
    where = milvus_client.Address.parse(address)
    if keep < 0 or not 0 <= min_recall <= 1 or not deadline_seconds > 0:
        raise ValueError(
            "keep must be at least 0, min_recall between 0 and 1 and deadline_seconds above 0, got"
            f" {keep}, {min_recall} and {deadline_seconds}"
        )
    with milvus_client.named_errors(where.uri):
        client = milvus_client.connect(where.uri)
        present = milvus_client.aliased(client, where.alias)
        generation = _name(client, where.alias, present, _describe(store, options))
        place = _Place(client, where.uri, generation)
        # What is searched already is never written to.
        inserted = 0 if generation.name == present else _insert(place, store, on_rows)
        _wait_until_in_use(place, deadline_seconds)
        index = milvus.MilvusIndex(client, where, generation, None)
        found = recall.recall_against_exact(index, store.rows(), probe_queries)
        if found < min_recall:
            raise ValueError(
                f"the index {generation.name} finds {found:.3f} of the exact neighbours, less than"
                f" min_recall {min_recall:g}, so {where.alias} still names {present or 'nothing'};"
                f" search wider than {dict(generation.options.search)}, or ask for less"
            )
        _point(client, where.alias, generation.name)
        dropped = _drop_others(client, where.alias, generation.name, present, keep)
    return Published(generation.name, found, inserted, dropped)


def roll_back(address: str, *, deadline_seconds: float = 600.0) -> str:
    """Points an alias to the generation before the one it names.

    The one it named stays until the next `publish`, for searches that have begun.

    Args:
        address: `milvus:URI/ALIAS`.
        deadline_seconds: How long to wait for the server to load that generation again, if need
            be.

    Returns:
        The collection that the alias names now.

    Raises:
        ConnectionError: No server answers.
        FileNotFoundError: There is no such alias, or no generation before.
        TimeoutError: The generation before was not in use by the deadline.
        ValueError: The address has another form.
        ImportError: pymilvus is not installed.
    """
    where = milvus_client.Address.parse(address)
    with milvus_client.named_errors(where.uri):
        client = milvus_client.connect(where.uri)
        present = milvus_client.aliased(client, where.alias)
        names = _generations(client, where.alias)
        older = [name for name in names if present and name < present]
        if not older:
            raise FileNotFoundError(
                f"{address}: there is no generation before {present or 'the first'} to return to"
            )
        generation = milvus.Generation.read(client, older[-1])
        _wait_until_in_use(_Place(client, where.uri, generation), deadline_seconds)
        _point(client, where.alias, generation.name)
    return generation.name


def _describe(store: EmbeddingStore, options: milvus.MilvusOptions | None) -> milvus.Generation:
    """Returns what a collection of these embeddings will hold, without a name."""
    size, dim = store.spec.size, store.spec.dim
    return milvus.Generation(
        name="",
        spec=store.spec,
        options=(options or milvus.MilvusOptions()).fitted(size, dim),
        norms=base.norm_range(store.rows()),
    )


def _generations(client: Any, alias: str) -> list[str]:
    """Returns the collections of an alias, in the order in which they were made."""
    names = client.list_collections()
    return sorted(name for name in names if re.fullmatch(_pattern(alias), name))


def _pattern(alias: str) -> str:
    return rf"{alias}_\d{{6}}_[0-9a-f]{{12}}"


def _name(
    client: Any, alias: str, present: str | None, generation: milvus.Generation
) -> milvus.Generation:
    """Returns a generation with its name: a new one, or that of an earlier call for the same."""
    names = _generations(client, alias)
    if present and not re.fullmatch(_pattern(alias), present):
        raise ValueError(
            f"the alias {alias} names {present}, which ragjax did not publish; choose another alias"
        )
    digest = generation.digest()
    # Of those that came after the present one, or the present one itself.
    same = [name for name in names if name.endswith(digest) and name >= (present or "")]
    # The collection that the alias names may have been dropped by others.
    numbers = [int(name.split("_")[-2]) for name in (*names, *filter(None, [present]))]
    number = 1 + max(numbers, default=0)
    return dataclasses.replace(
        generation, name=same[-1] if same else f"{alias}_{number:06d}_{digest}"
    )


def _insert(place: _Place, store: EmbeddingStore, on_rows: Callable[[int, int], Any] | None) -> int:
    """Makes the collection and inserts the rows that it lacks; returns how many."""
    client, _, generation = place
    name, size, dim = generation.name, store.spec.size, store.spec.dim
    begun = client.has_collection(name)
    if not begun:
        client.create_collection(
            name, schema=_schema(client, generation), consistency_level="Eventually"
        )
    # One program inserts them in order, so what is there is the first rows.
    start = _rows_of(client, name) if begun else 0
    chunk = max(1, _CHUNK_BYTES // (4 * dim))
    for first in range(start, size, chunk):
        rows = range(first, min(first + chunk, size))
        embeddings = base.check_embeddings(
            store.read_rows(rows), name="document embeddings", rows=rows
        )
        pairs = zip(rows, embeddings, strict=True)
        client.insert(name, [{milvus.ROW: row, milvus.EMBEDDING: one} for row, one in pairs])
        if on_rows:
            on_rows(rows.stop, size)
    there = _rows_of(client, name)
    if there != size:
        client.drop_collection(name)
        raise OSError(
            f"Milvus at {place.uri} held {there:,} rows in {name} after {size:,} were inserted; it"
            " is dropped, publish again"
        )
    return max(0, size - start)


def _schema(client: Any, generation: milvus.Generation) -> Any:
    """Returns the schema of a collection: row of the corpus and embedding."""
    from pymilvus import DataType

    schema = client.create_schema(
        auto_id=False, enable_dynamic_field=False, description=generation.description()
    )
    schema.add_field(milvus.ROW, DataType.INT64, is_primary=True)
    schema.add_field(milvus.EMBEDDING, DataType.FLOAT_VECTOR, dim=generation.spec.dim)
    return schema


def _rows_of(client: Any, name: str) -> int:
    """Returns how many rows a collection has; rows in memory are counted once written."""
    client.flush(name)
    return int(client.get_collection_stats(name)["row_count"])


def _wait_until_in_use(place: _Place, seconds: float) -> None:
    """Builds and loads the index, and returns when every row is searched through it.

    The state of the index is no proof: Milvus 2.3.5 says Finished, with all rows indexed, up to 16
    seconds before its searches stop comparing every row. What its query nodes say they have loaded
    changes in the same moment as the results do.
    """
    client, uri, generation = place
    deadline = time.monotonic() + seconds
    name, size = generation.name, generation.spec.size
    if not client.list_indexes(name):
        options = generation.options
        params = client.prepare_index_params()
        params.add_index(
            milvus.EMBEDDING,
            index_name=milvus.EMBEDDING,
            index_type=options.kind,
            metric_type="IP",
            params=dict(options.build),
        )
        client.create_index(name, params, sync=False)
    in_use, state, loads = 0, "", False
    while time.monotonic() < deadline:
        state = client.describe_index(name, milvus.EMBEDDING)["state"]
        if state == "Failed":
            raise OSError(f"Milvus at {uri} could not build the index of {name}; its log says why")
        # Loaded before the index is built, the rows would be compared all for a while.
        if state == "Finished":
            if not loads:
                left = max(1.0, deadline - time.monotonic())
                client.load_collection(name, timeout=left)
                loads = True
            in_use = _rows_in_use(client, name)
            if in_use == size:
                return
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(
        f"Milvus at {uri} searches {in_use:,} of {size:,} rows of {name} through the index (state"
        f" {state}) at the deadline; give it more seconds: what is done is kept"
    )


def _rows_in_use(client: Any, name: str) -> int:
    """Returns the rows of the loaded segments that have an index, or never get one."""
    from pymilvus import SegmentState

    return sum(
        segment.num_rows
        for segment in client.list_loaded_segments(name)
        if segment.state == SegmentState.Sealed
        and (segment.index_id or segment.num_rows < _NEVER_INDEXED)
    )


def _point(client: Any, alias: str, name: str) -> None:
    """Lets an alias name a collection, in one step."""
    try:
        # Also where it names a collection that was dropped, of which a server may say nothing.
        client.alter_alias(name, alias)
    except milvus_client.milvus_error() as error:
        if error.code != milvus_client.NO_ALIAS:
            raise
        client.create_alias(name, alias)


def _drop_others(
    client: Any, alias: str, name: str, before: str | None, keep: int
) -> tuple[str, ...]:
    """Drops what no search needs: generations before those kept, and what was never in use.

    Between the one before and the new one lie those that were rolled back from or half written.
    """
    names = _generations(client, alias)
    older = [each for each in names if each < name and (before is None or each <= before)]
    kept = {name, *older[max(0, len(older) - keep) :]} if keep else {name}
    dropped = tuple(each for each in names if each not in kept)
    for each in dropped:
        client.drop_collection(each)
    return dropped
