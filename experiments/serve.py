"""Serve a run over HTTP: search, answers with sources, embeddings, and a page to ask in.

    python experiments/serve.py --run runs/adapt
    python experiments/serve.py --run runs/rag --port 8080 --documents 3

Then http://127.0.0.1:8000/ is the page; `/search` (also `/retrieve`, as trainers such as Search-R1
call it), `/ask`, `/v1/chat/completions` and `/v1/embeddings` (as OpenAI's clients call them) take
JSON, and `/health` says when the models are read and compiled, after about a minute on two cores.
A run that `train_rag.py` is still training is served from the newest generation of its index, and
newer ones as they come. SIGTERM or Ctrl-C ends it once what was asked is answered. There is no
authentication. Needs `pip install "ragjax[serve]"`.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from ragjax.runs import Asker, ReaderOptions
from ragjax.runs.ask.decoding import DECODES
from ragjax.runs.compare.rerank import NONE, check_reranker
from ragjax.runs.options.checks import check_all, check_numbers, checked_later
from ragjax.runs.options.modes import ModeName
from ragjax.runs.program import (
    BAD_INPUT,
    escape_what_is_no_utf8,
    flag_names,
    in_own_flags,
    show_error,
)
from ragjax.runs.saved import ModelChoice
from ragjax.runs.serve.app import check_installed, is_loopback, listen, run_server
from ragjax.runs.serve.batches import ServeLimits
from ragjax.runs.serve.service import Service
from ragjax.runs.serve.source import Source
from ragjax.runs.system import SEARCHES, System, reranked_search


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Serve a run over HTTP.

    Attributes:
        run: Folder of a run that has ended, or that `train_rag.py` is training.
        host: Address to listen at; 127.0.0.1 is reached from this machine alone.
        port: Port to listen at; 0: any that is free.
        documents: Documents read for an answer, and found by a search that does not say (100 at
            most).
        models: `shipped` is what the run's dev questions chose; `adapted` or `base` in its place.
        retriever: Index that is searched; None: the one that a run ships, else `hybrid`.
        rerank: What ranks the best documents again, as of `ask.py`; None: as a run ships.
        rerank_depth: Documents that are ranked again; 0: as the run, else 10.
        decode: Decoding strategy over the documents, as of `ask.py`; None: as the run's reader.
        max_new_tokens: Tokens of an answer at most.
        document_tokens: Tokens read of each document; 0: 96.
        devices: Devices that have an equal part of each parameter, for models that do not fit one.
        limits: How much is taken at a time.
        debug: Show tracebacks.
    """

    run: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    documents: int = 4
    models: ModelChoice = "shipped"
    retriever: Literal["hybrid", "dense", "bm25"] | None = None
    rerank: str | None = None
    rerank_depth: int = 0
    decode: ModeName | None = None
    max_new_tokens: int = 16
    document_tokens: int = 0
    devices: int = 1
    limits: ServeLimits = ServeLimits()
    debug: bool = False

    def check(self) -> None:
        """Raises ValueError naming the flag that is missing or out of range."""
        if not self.run:
            raise ValueError("give --run FOLDER, a run of experiments/adapt.py or train_rag.py")
        leasts = {
            **{"documents": 1, "max_new_tokens": 1, "document_tokens": 0, "rerank_depth": 0},
            **{"devices": 1, "port": 0},
        }
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if self.port > 65535:
            raise ValueError(f"--port must be at most 65535, got {self.port}")
        check_numbers(self, mark="--")
        check_all(self.limits, mark="--", group="limits.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script and returns its exit code.

    Returns:
        128 + the signal that ended it; 2 for bad input.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
    escape_what_is_no_utf8()
    try:
        with checked_later():
            flags = tyro.cli(Flags, args=arguments, description=__doc__, use_underscores=True)
        flags.check()
        return _run(flags)
    except (ValueError, OSError, ImportError) as error:
        show_error(error, arguments, flag_names(Flags))
        return BAD_INPUT


def _run(flags: Flags) -> int:
    check_installed()
    check_reranker(flags.rerank or NONE, "--rerank")

    def prepare(system: System) -> Asker:
        return _asker(flags, system)

    source = Source(flags.run, prepare, models=flags.models, devices=flags.devices, log=_note)
    with listen(flags.host, flags.port) as listening:
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        if not is_loopback(host):
            _note(
                f"warning: --host {flags.host} is reached from other machines, and there is no"
                " authentication: whoever reaches it can read the documents"
            )
        _note(f"http://{shown}:{port}/ (ready when /health says so)")
        return run_server(Service(source, flags.limits), listening)


def _asker(flags: Flags, system: System) -> Asker:
    options = ReaderOptions(
        documents=flags.documents,
        max_new_tokens=flags.max_new_tokens,
        **({"document_tokens": flags.document_tokens} if flags.document_tokens else {}),
    )
    search = SEARCHES[flags.retriever] if flags.retriever else system.search
    return Asker(
        system,
        options,
        decode=DECODES[flags.decode] if flags.decode else None,
        by=reranked_search(system, search, flags.rerank, depth=flags.rerank_depth, log=_note),
    )


def _note(line: str) -> None:
    if line.strip():
        print(in_own_flags(line.strip(), flag_names(Flags)), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
