"""A cache of what a frozen language model computed, keyed by everything the result depends on."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from ragjax.storage import JsonLog, read_lines, sealed, unsealed


class Score(NamedTuple):
    """How likely an answer is after one document."""

    log_prob: float  # log p_LM(y | c∘x), nats, summed over the answer's tokens
    length: int  # answer tokens, to turn the sum into a mean


Value = TypeVar("Value", bound=Any)
_LOG = logging.getLogger(__name__)


def result_key(*parts: Any) -> str:
    """Returns a digest of the parts: fingerprints and texts that decide a result.

    For a teacher's score these are the fingerprint of the language model, the prompt's template,
    the question, the answer and the document.

    Args:
        *parts: JSON values; their order and boundaries count.
    """
    text = json.dumps(parts, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class ResultCache(Generic[Value]):
    """Results on disk, one JSON line each, appended in batches.

    While the language model is frozen, its score of (question, document) never changes, so epochs
    and re-runs with another retriever setting cost no forward pass for pairs seen before.
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        kind: type[Value],
        *,
        earlier: Sequence[str | os.PathLike] = (),
    ):
        """Reads what is there; a last line torn by a killed run is dropped.

        Args:
            path: The JSONL file; created at the first `put`. None: results are not kept on disk.
            kind: The NamedTuple of a result; its fields are the keys of a line.
            earlier: Files of results that were complete before this cache was begun; only read.

        Raises:
            ValueError: If a line other than the last cannot be read, has changed, or holds NaN or
                infinity.
        """
        self._log, self._kind = None if path is None else JsonLog(path), kind
        self._results: dict[str, Value] = {}
        self.hits = 0
        self.misses = 0
        for file in earlier:
            self._read(Path(file))
        self._earlier = frozenset(self._results)
        if self._log is not None and self._log.path.exists():
            self._read(self._log.path)

    def __len__(self) -> int:
        """Returns how many results are known."""
        return len(self._results)

    def was_known(self, key: str) -> bool:
        """Tells whether a result was known before this cache was begun.

        What is left is the work of this cache, and does not change when it is cut and continued:
        batches planned from it are the same in every life of a run.
        """
        return key in self._earlier

    def get(self, key: str) -> Value | None:
        """Returns a result, or None where it has not been computed; counts hits and misses."""
        result = self._results.get(key)
        self.hits += result is not None
        self.misses += result is None
        return result

    def put(self, keys: Sequence[str], results: Sequence[Value]) -> None:
        """Appends results; on disk when this returns, all but those that are not finite."""
        known = dict(zip(keys, results, strict=True))
        self._results |= known
        if self._log is None:
            return
        self._log.append(
            (
                sealed({"key": key, **result._asdict()})
                for key, result in known.items()
                if not _bad_fields(result)
            ),
            sync=True,
        )

    def _read(self, path: Path) -> None:
        unsure = 0
        for number, row in read_lines(path):
            if row is not None and "key" in row and "checksum" not in row:
                unsure += 1
                continue
            try:
                if (values := unsealed(row or {})) is None:
                    raise TypeError("its checksum is that of something else")
                key = values.pop("key")
                result = self._kind(**values)
                if bad := _bad_fields(result):
                    raise TypeError(f"{bad} is not finite")
                self._results[key] = result
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number}: not a whole {self._kind.__name__} ({error}); delete the line"
                    " to compute it again"
                ) from error
        if unsure:
            _LOG.warning(
                "%s: %d results without a checksum, of an earlier version, are computed again",
                path, unsure,
            )  # fmt: skip


def _bad_fields(result: Any) -> str:
    fields = result._asdict().items()
    return ", ".join(name for name, v in fields if isinstance(v, float) and not math.isfinite(v))
