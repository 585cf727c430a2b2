"""Reads HTML and PDF files in a process of its own: a hostile file may crash it, hang or swell.

One JSON line goes in for each file, its path, and one comes out: its text, or why there is none.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from ragjax.data.documents.html import read_html
from ragjax.data.documents.pdf import read_pdf
from ragjax.data.documents.sections import FileText, Section, UnreadableError

READERS: Mapping[str, Callable[[Path], FileText]] = {
    ".htm": read_html,
    ".html": read_html,
    ".xhtml": read_html,
    ".pdf": read_pdf,
}
# What must be installed for them, as it is imported.
PACKAGES = {ending: "pypdfium2" if ending == ".pdf" else "lxml" for ending in READERS}
_SECONDS = 120
_MEMORY = 2 << 30  # bytes of addresses
_MOST_TEXT = 64 << 20  # bytes
_PROGRAM = "from ragjax.data.documents.worker import main; main()"


class FileReader:
    """Reads files one after the other; as a context manager it ends its process.

    A file that crashes the process, takes longer than two minutes or more than 2 GiB is left out,
    and the next one is read by another process.
    """

    def __init__(self, *, seconds: int = _SECONDS) -> None:
        """Starts nothing.

        Args:
            seconds: For each file, at most.
        """
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def read(self, path: Path) -> FileText:
        """Returns the text of an HTML or PDF file.

        Raises:
            UnreadableError: It has none.
        """
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(str(path.absolute())).encode() + b"\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            self.close()
            if process.returncode == -signal.SIGALRM:
                raise UnreadableError(f"files that take longer than {self._seconds} s to read")
            raise UnreadableError(f"broken {path.suffix.lower()[1:].upper()} files")
        reply = json.loads(line)
        if why := reply.get("why"):
            raise UnreadableError(why)
        sections = [
            Section(tuple(headings), paragraphs, page)
            for headings, paragraphs, page in reply["sections"]
        ]
        return FileText(sections, reply["unread"])

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        here = str(Path(__file__).parents[3])
        path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH", "")])])
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, str(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what the libraries say of a file is in the reply
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the run, which then ends this
        )

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Ends the process."""
        self.close()


def main() -> None:
    """Answers the lines of stdin, in the process of a `FileReader`."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    with contextlib.suppress(ImportError, OSError, ValueError):  # not everywhere
        import resource

        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, taken + _MEMORY))
    for line in sys.stdin.buffer:
        signal.alarm(int(sys.argv[1]))  # ends the process, whatever it is in
        replies.write(_reply(Path(json.loads(line))) + b"\n")
        replies.flush()
        signal.alarm(0)


def _reply(path: Path) -> bytes:
    kind = path.suffix.lower()
    try:
        text = READERS[kind](path)
        reply = json.dumps({"sections": text.sections, "unread": text.unread}).encode()
        if len(reply) <= _MOST_TEXT:
            return reply
        why = f"files with more than {_MOST_TEXT >> 20} MiB of text (divide them)"
    except UnreadableError as error:
        why = str(error)
    except MemoryError:
        why = f"files that take more than {_MEMORY >> 30} GiB to read"
    except Exception:  # whatever a parser raises of a broken file
        why = f"broken {kind[1:].upper()} files"
    return json.dumps({"why": why}).encode()
