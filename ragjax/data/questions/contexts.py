"""The passages that stand beside questions in their files, as a corpus."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from ragjax.data.jsonl import DataError
from ragjax.data.questions.records import Context
from ragjax.storage import replacing


@contextlib.contextmanager
def written_contexts(path: Path, *, max_chars: int) -> Iterator[Callable[[Context], None]]:
    """Writes each passage once, as JSON lines that are complete when the block ends.

    Args:
        path: The file; its folder is made.
        max_chars: Longest text, in characters.

    Yields:
        Takes a passage. It raises DataError for a text that is too long, and for an id that stands
        for another passage already.
    """
    known: dict[int, int] = {}  # digest of the id to that of the passage
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, shared=True) as file:

        def keep(context: Context) -> None:
            if len(context.text) > max_chars:
                raise DataError(
                    f"the passage {context.id!r} has {len(context.text)} characters, above"
                    f" max_chars = {max_chars}; cut it into several"
                )
            key, content = _digest(context.id), _digest(f"{context.title}\n{context.text}")
            if key not in known:
                known[key] = content
                row = {"_id": context.id, "title": context.title, "text": context.text}
                file.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")
            elif known[key] != content:
                raise DataError(
                    f"the id {context.id!r} stands for two different passages; make ids unique"
                )

        yield keep


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
