"""Encode documents for a trainer whose index is refreshed by other processes.

On the host that trains, and on any host that sees the same folder under any path:

    python experiments/adapt.py --data FOLDER --output runs/mine --refresh.mode async \
        --refresh.workers
    python experiments/refresh_worker.py --root /mnt/shared/runs/mine/refresh --data FOLDER

Any number of workers share the documents; start and stop them at any time. The shard of a worker
that is killed is encoded by another one. Data and encoder must be the trainer's: their fingerprints
are compared, and a worker with others exits with code 2.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import tyro

from ragjax.data import Corpus
from ragjax.data.fields import parse_fields
from ragjax.refresh import WorkerOptions, run_worker
from ragjax.runs.models import in_compute_dtype, load_encoders
from ragjax.runs.options.checks import check_numbers
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.program import BAD_INPUT, flag_names, show_error
from ragjax.runs.tokens import corpus_task
from ragjax.training.loop import graceful_stop


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Encode documents for a trainer whose index is refreshed by other processes.

    Attributes:
        root: Folder that the trainer writes its encoding jobs to.
        data: Folder with the trainer's `corpus.jsonl`.
        cache: Folder for the prepared corpus of this host; "" takes `cache` beside the data.
        encoder: The trainer's base encoder, its `--doc_encoder` where it has two.
        query_prefix: As the trainer's `--query_prefix`.
        doc_prefix: As the trainer's `--doc_prefix`.
        encoder_max_length: As the trainer's `--encoder_max_length`.
        compute_dtype: As the trainer's `--compute_dtype`.
        fields: As the trainer's `--data_options.fields`.
        on_bad_row: As the trainer's `--data_options.on_bad_row`.
        encode_tokens: Tokens in a batch on this host's devices; 0: as the trainer.
        poll_seconds: Seconds between two checks for work.
        heartbeat_seconds: Seconds between two heartbeats.
        once: Exit when there is no work.
        debug: Show tracebacks.
    """

    root: str
    data: str
    cache: str = ""
    encoder: str = AdaptConfig().encoder
    query_prefix: str | None = None
    doc_prefix: str | None = None
    encoder_max_length: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    fields: str = ""
    on_bad_row: Literal["stop", "skip"] = "stop"
    encode_tokens: int = 0
    poll_seconds: float = 1.0
    heartbeat_seconds: float = 2.0
    once: bool = False
    debug: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script and returns its exit code: 0, 2 for bad input, 128 + signal if stopped."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    flags = tyro.cli(Flags, args=arguments, description=__doc__)
    try:
        return _run(flags)
    except (ValueError, OSError) as error:
        show_error(error, arguments, flag_names(Flags))
        return BAD_INPUT


def _run(flags: Flags) -> int:
    check_numbers(flags, mark="--")
    for name, least in (("poll_seconds", 1e-3), ("heartbeat_seconds", 1e-3),
                        ("encode_tokens", 0), ("encoder_max_length", 0)):  # fmt: skip
        if not getattr(flags, name) >= least:
            raise ValueError(f"--{name} must be at least {least:g}, got {getattr(flags, name):g}")
    fields = parse_fields(flags.fields)
    with graceful_stop() as stop:
        corpus = Corpus.open(
            flags.data,
            cache=flags.cache or Path(flags.data) / "cache",
            fields=fields,
            on_bad_row=flags.on_bad_row,
        )
        trainer = AdaptConfig(
            encoder=flags.encoder,
            query_prefix=flags.query_prefix,
            doc_prefix=flags.doc_prefix,
            encoder_max_length=flags.encoder_max_length,
            compute_dtype=flags.compute_dtype,
        )
        encoder = in_compute_dtype(load_encoders(trainer).doc, trainer)
        # Sizes of batches and shards come with each job.
        task = corpus_task(encoder, corpus, encode_tokens=1024)
        devices = jax.local_devices()
        print(
            f"worker {os.getpid()}: {len(corpus):,} documents, {len(devices)} devices", flush=True
        )
        run_worker(
            flags.root,
            task,
            encoder.params,
            stop=lambda: stop.signum is not None,
            options=WorkerOptions(
                poll_seconds=flags.poll_seconds,
                heartbeat_seconds=flags.heartbeat_seconds,
                batch_tokens=flags.encode_tokens or None,
                devices=devices if len(devices) > 1 else None,
                once=flags.once,
            ),
            report=lambda line: print(line, flush=True),
        )
        return 0 if stop.signum is None else 128 + stop.signum


if __name__ == "__main__":
    sys.exit(main())
