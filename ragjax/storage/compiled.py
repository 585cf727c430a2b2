"""Programs that XLA compiled, kept from process to process."""

import contextlib
import hashlib
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

MOST_BYTES = 4 * 2**30
_READS_BACK = "reads-back"  # holds "yes" or "no"


def cache_folder() -> Path:
    """Returns the folder of what can be made again: `$RAGJAX_CACHE` or `~/.cache/ragjax`."""
    return Path(os.environ.get("RAGJAX_CACHE") or "~/.cache/ragjax").expanduser()


def keep_compiled() -> None:
    """Keeps what this process compiles from now on in `cache_folder()`, and takes it from there.

    Machines of one kind share a folder, and it holds at most 4 GiB: what was used longest ago goes
    first. Nothing changes where the user has set `jax_compilation_cache_dir` or turned
    `jax_enable_compilation_cache` off (`JAX_ENABLE_COMPILATION_CACHE=0`), where the folder cannot
    be written, or on CPUs whose programs XLA refuses to read back (jax-ml/jax#38445).
    """
    if not _option("jax_enable_compilation_cache") or _option("jax_compilation_cache_dir"):
        return
    on_cpu = jax.default_backend() == "cpu"
    # XLA's programs for the CPU of a Mac do not survive the way to disk.
    if on_cpu and sys.platform == "darwin":
        return
    folder = cache_folder() / "compiled" / _kind_of_machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _trim(folder)
        known = folder / _READS_BACK
        if on_cpu and not known.exists():
            known.write_text("yes" if _reads_back() else "no", "utf-8")
        if on_cpu and known.read_text("utf-8") == "no":
            return
    except OSError:
        return
    _use(folder)


def compiled_folder() -> Path | None:
    """Returns where compiled programs are kept; None: nowhere."""
    folder = _option("jax_compilation_cache_dir")
    return Path(folder) if folder and _option("jax_enable_compilation_cache") else None


def _option(name: str) -> str | None:
    return getattr(jax.config, name)


def _use(folder: Path | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder and str(folder))
    # Many small programs take as long as a few large ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # else what was so when the first program was compiled holds


def _kind_of_machine() -> str:
    """Returns a digest of what compiled programs depend on and jax's own key leaves out."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = [platform.processor()]
    features = [line for line in lines if line.startswith(("flags", "Features"))]
    words = [version("jaxlib"), platform.machine(), *(features or lines)[:1]]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]


def _reads_back() -> bool:
    """Compiles a program twice, and says whether it came from disk the second time."""
    heard: list[str] = []

    def hear(event: str, **_: str | int) -> None:
        heard.append(event)

    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(action="ignore"):
        _use(Path(scratch))
        jax.monitoring.register_event_listener(hear)
        try:
            with _silent():
                for _ in range(2):
                    jax.jit(lambda x: x * 3 + 1).lower(np.ones(5)).compile()
        finally:
            jax.monitoring.unregister_event_listener(hear)
            _use(None)
    return "/jax/compilation_cache/cache_hits" in heard


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hides what XLA itself writes to stderr, past Python's."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _trim(folder: Path) -> None:
    """Removes what was used longest ago until the folder is small enough."""
    with os.scandir(folder) as entries:
        files = [(entry.path, entry.stat()) for entry in entries if entry.is_file()]
    size = sum(stat.st_size for _, stat in files)
    for path, stat in sorted(files, key=lambda file: max(file[1].st_atime, file[1].st_mtime)):
        if size <= MOST_BYTES:
            return
        with contextlib.suppress(FileNotFoundError):  # another process trims too
            os.remove(path)
        size -= stat.st_size
