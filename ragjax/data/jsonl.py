"""JSON lines: one object per line; every refusal names file, line, reason and remedy."""

import contextlib
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from gzip import BadGzipFile, GzipFile
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Self

import orjson

from ragjax.storage import nearest_path, replacing

BadRowPolicy = Literal["stop", "skip"]
ReadProgress = Callable[[int, int], None]  # (bytes read, bytes in all)

DEFAULT_MAX_LINE_BYTES = 16 << 20
_REJECTED_EXCERPT_BYTES = 1000
_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


class DataError(ValueError):
    """Input data that cannot be used; the message names the place and the remedy."""


class Flaw(str):
    """A note on something that is wrong with the data, not only on how they are read."""


class Line(NamedTuple):
    """One non-blank line of a file."""

    number: int  # from 1
    raw: bytes  # without its end; only the first bytes when it is over-long
    size: int  # bytes of the whole line; larger than len(raw) when it is over-long


class JsonRow(NamedTuple):
    """One object of a JSON-lines file."""

    line: int  # from 1
    record: dict[str, Any]
    raw: bytes


class RejectedRows:
    """Stops at the first bad row, or counts bad rows and writes them to a file.

    Use as a context manager; the file appears, complete, when the block ends without an error.

    Args:
        path: The JSON-lines file that receives `{"file", "line", "reason", "row"}` objects.
        policy: "stop" raises at the first bad row; "skip" counts and records it.
    """

    def __init__(self, path: Path, policy: BadRowPolicy):
        """Checks the policy; creates no file before the first bad row."""
        if policy not in ("stop", "skip"):
            raise DataError(f"on_bad_row must be 'stop' or 'skip', got {policy!r}")
        self.path = path
        self.policy = policy
        self.count = 0
        self.first_reason: str | None = None
        self._opened = contextlib.ExitStack()
        self._file: BinaryIO | None = None

    def add(self, source: Path, line: int, reason: str, raw: bytes = b"") -> None:
        """Refuses one row.

        Raises:
            DataError: The policy is "stop".
        """
        message = f"{source}:{line}: {reason}"
        if self.policy == "stop":
            raise DataError(message)
        self.first_reason = self.first_reason or message
        self.count += 1
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._opened.enter_context(replacing(self.path, shared=True))
        excerpt = raw[:_REJECTED_EXCERPT_BYTES].decode("utf-8", errors="replace")
        row = {"file": str(source), "line": line, "reason": reason, "row": excerpt}
        text = json.dumps(row, ensure_ascii=False) + "\n"
        self._file.write(text.encode("utf-8", "backslashreplace"))

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Publishes the file, or removes that of an earlier reading."""
        self._opened.__exit__(*error)
        if not self.count and error[0] is None:
            self.path.unlink(missing_ok=True)


class SourceFile:
    """A plain or gzip-compressed text file, read once from start to end in bounded memory.

    Args:
        path: The file; gzip is recognised by its first bytes, not by its name.
        max_line_bytes: Lines above this size are cut to it, see `Line.size`.
        progress: Called about every 8 MiB with the bytes read and the size of the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
        progress: ReadProgress | None = None,
    ):
        """Keeps the options; the file is opened by `lines`."""
        self.path = path
        self.max_line_bytes = max_line_bytes
        self._progress = progress
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Hex digest of the bytes read so far (of the compressed ones, for gzip)."""
        return self._digest.hexdigest()

    def lines(self) -> Iterator[Line]:
        """Yields the non-blank lines; a byte-order mark and CRLF ends are taken off.

        Raises:
            DataError: UTF-16 text, or a damaged gzip file.
        """
        with self._opened() as stream:
            for number, raw, size in self._split(stream):
                if size > len(raw):
                    yield Line(number, raw, size)
                elif (raw := raw.rstrip(b"\r\n")) and not raw.isspace():
                    yield Line(number, raw, len(raw))

    def raw_lines(self) -> Iterator[Line]:
        """Yields every line with its end; only a byte-order mark is taken off.

        Raises:
            DataError: UTF-16 text, or a damaged gzip file.
        """
        with self._opened() as stream:
            for line in self._split(stream):
                yield Line(*line)

    def chunks(self, size: int) -> Iterator[bytes]:
        """Yields the content in pieces of at most `size` bytes; a byte-order mark is taken off.

        Raises:
            DataError: UTF-16 text, or a damaged gzip file.
        """
        with self._opened() as stream:
            chunk = self._without_bom(stream.read(size))
            while chunk:
                yield chunk
                chunk = stream.read(size)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        raw = _CountingReader(open(self.path, "rb", buffering=0), self._digest, self._progress)
        with contextlib.closing(raw), io.BufferedReader(raw, 1 << 18) as buffered:
            is_gzip = buffered.peek(2)[:2] == _GZIP_MAGIC
            try:
                yield GzipFile(fileobj=buffered) if is_gzip else buffered
            except (EOFError, BadGzipFile, zlib.error) as error:
                raise DataError(f"{self.path}: damaged gzip file ({error}); copy it again") from (
                    error
                )

    def _split(self, stream: Any) -> Iterator[tuple[int, bytes, int]]:
        number = 0
        while raw := stream.readline(self.max_line_bytes + 1):
            number += 1
            size = len(raw)
            if size > self.max_line_bytes and not raw.endswith(b"\n"):
                raw = raw[:_REJECTED_EXCERPT_BYTES]
                while rest := stream.readline(1 << 16):
                    size += len(rest)
                    if rest.endswith(b"\n"):
                        break
            elif number == 1:
                raw = self._without_bom(raw)
                size = len(raw)
            yield number, raw, size

    def _without_bom(self, raw: bytes) -> bytes:
        if raw[:2] in _UTF16_BOMS or b"\x00" in raw[:64]:
            raise DataError(
                f"{self.path}:1: UTF-16 text (starts with bytes {raw[:4].hex(' ')}); expected "
                "UTF-8: convert it, for example with iconv -f utf-16 -t utf-8"
            )
        return raw.removeprefix(_UTF8_BOM)


def read_jsonl(source: SourceFile, rejected: RejectedRows) -> Iterator[JsonRow]:
    """Yields the objects of a JSON-lines file; bad lines go to `rejected`.

    Raises:
        DataError: UTF-16, damaged gzip, or a bad line when the policy is "stop".
    """
    for line in source.lines():
        if line.size > len(line.raw):
            reason = (
                f"the line has {line.size} bytes, above the limit set by max_chars; cut the text "
                "into passages, or open the corpus with a larger max_chars"
            )
            rejected.add(source.path, line.number, reason, line.raw)
            continue
        try:
            record = parse_object(line.raw)
        except DataError as error:
            rejected.add(source.path, line.number, str(error), line.raw)
            continue
        yield JsonRow(line.number, record, line.raw)


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parses one line as a JSON object.

    Raises:
        DataError: Not UTF-8, not JSON (NaN and Infinity are not), or not an object.
    """
    value: Any = None
    try:
        value = orjson.loads(raw)
        is_exact = not _holds_large(value)
    except (orjson.JSONDecodeError, RecursionError):
        is_exact = False
    if not is_exact:
        # Takes half of a surrogate pair, and says more.
        value = _decode(raw)
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _holds_large(value: Any) -> bool:
    """Tells whether a float may be an integer of more than 64 bits, which orjson rounds."""
    if type(value) is float:
        return not -_LARGE < value < _LARGE
    if type(value) is dict:
        value = value.values()
    elif type(value) is not list:
        return False
    for one in value:
        if type(one) is not str and _holds_large(one):
            return True
    return False


def _decode(raw: bytes) -> Any:
    try:
        return DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(error)) from error
    except json.JSONDecodeError as error:
        hint = _HINTS.get(raw.strip()[:1] if raw[:1] == b"[" else raw.strip(), "")
        raise DataError(f"broken JSON at column {error.colno}: {error.msg}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not usable JSON: {error}") from error


def string_field(record: Mapping[str, Any], key: str) -> str:
    """Returns a string field that can be written as UTF-8.

    Raises:
        DataError: Another type, or a lone surrogate.
    """
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f"field {key!r} is {_shown(value)}; expected a string")
    check_encodable(value, key)
    return value


def id_field(record: Mapping[str, Any], key: str) -> str:
    """Returns an id as a string; whole numbers are written in decimal.

    Raises:
        DataError: Neither a non-empty string nor a whole number.
    """
    value = record[key]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise DataError(f"id {key!r} is {_shown(value)}; expected a non-empty string or number")
    check_encodable(value, key)
    return value


def check_encodable(value: str, key: str) -> None:
    r"""Refuses lone surrogates (an escape such as "\ud800"), which no tokenizer accepts."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"field {key!r} holds half of a surrogate pair, U+{ord(value[error.start]):04X}; "
            "write the whole character"
        ) from error


def require_path(path: Path) -> Path:
    """Returns the path if it exists.

    Raises:
        FileNotFoundError: It does not; the message has the nearest existing name that could serve,
            or else the nearest of another format.
    """
    if path.exists():
        return path
    if not path.parent.is_dir():
        require_path(path.parent)
    lines = ".jsonl" if path.suffix == ".jsonl" else ""
    near, other = nearest_path(path, having=lines), nearest_path(path)
    if near and (near.is_dir() or near.suffix == path.suffix or ".json" in near.name):
        remedy = f"did you mean {str(near)!r}?"
    elif other:
        advice = f"; write it as {path.name}, one JSON object a line" if lines else ""
        remedy = f"there is {other.name}, which is something else{advice}"
    else:
        remedy = f"{path.parent} has no such name"
    raise FileNotFoundError(f"{path} does not exist; {remedy}")


class _CountingReader(io.RawIOBase):
    """Hashes what is read and reports the position."""

    def __init__(self, file: io.FileIO, digest: Any, progress: ReadProgress | None):
        self._file = file
        self._total = os.fstat(self._file.fileno()).st_size
        self._digest = digest
        self._progress = progress
        self._position = 0
        self._reported = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        self._position += count
        if self._progress and (self._position - self._reported >= 8 << 20 or not count):
            self._reported = self._position
            self._progress(self._position, self._total)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def not_utf8(error: UnicodeDecodeError) -> str:
    """Returns what is wrong with a line that is no UTF-8, and what to do."""
    return (
        f"byte 0x{error.object[error.start]:02x} at position {error.start} of the line is not"
        " UTF-8; convert the file, for example with iconv -f latin1 -t utf-8"
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write null or leave the field out")


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {json.dumps(value, ensure_ascii=True, default=str)[:60]}"


_LARGE = 2.0**63
# By the begin of a broken line.
_HINTS = {
    b"[": "; one object per line is expected, not one array",
    b"{": "; one object per line is expected, not one over several lines",
}
DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
