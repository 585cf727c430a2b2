"""Encoding speed beside sentence-transformers, on the same texts in one process.

    python experiments/benchmark_encoding.py --data FOLDER

Both encode the passages of a BEIR folder with the same weights, in turns, after one untimed round
each (compilation, warm caches). The ratio by processor time is the steadier one on a machine that
also does other work. Needs the [parity] extra. Two CPU cores and 500 passages of about
150 tokens take about five minutes; a ratio above 1 means that ragjax is faster.
"""

import dataclasses
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from ragjax.data import encode_texts, passage_text, read_beir
from ragjax.models import DEFAULT_ENCODER, TextEncoder, load_encoder
from ragjax.models.hub import resolve_source
from ragjax.refresh import EncodeOptions, encode_corpus


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Compares the encoding speed of ragjax and sentence-transformers.

    Attributes:
        data: BEIR folder with the passages.
        encoder: text encoder: folder, hub id or pip:NAME==VERSION.
        passages: how many of the passages, from the first.
        rounds: timed rounds of each; the median counts.
        batch_tokens: tokens in a ragjax batch, padding included; several to compare them.
        batch_rows: texts in a sentence-transformers batch (its own default is 32).
    """

    data: str
    encoder: str = DEFAULT_ENCODER
    passages: int = 500
    rounds: int = 3
    batch_tokens: tuple[int, ...] = (EncodeOptions().batch_tokens,)
    batch_rows: int = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code: 0, or 2 for bad input."""
    flags = tyro.cli(Flags, args=arguments)
    try:
        compare(flags)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def compare(flags: Flags) -> None:
    """Times both encoders and prints texts per second, the ratio and the largest difference."""
    if flags.passages < 1 or flags.rounds < 1:
        raise ValueError("--passages and --rounds must be at least 1.")
    texts = _read_texts(flags)
    encoder = load_encoder(flags.encoder)
    reference = _sentence_transformer(flags, encoder)
    runs = {"sentence-transformers": lambda: reference(texts)}
    for batch_tokens in flags.batch_tokens:
        options = EncodeOptions(batch_tokens=batch_tokens)
        runs[f"ragjax, {batch_tokens} tokens a batch"] = _ragjax(encoder, texts, options)
    embeddings = {name: run() for name, run in runs.items()}
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _, (name, run) in itertools.product(range(flags.rounds), runs.items()):
        started = time.perf_counter(), time.process_time()
        run()
        wall, processor = time.perf_counter(), time.process_time()
        rounds[name].append((wall - started[0], processor - started[1]))
    print(f"{len(texts)} passages, medians of {flags.rounds} rounds in turns")
    baseline = np.median(rounds["sentence-transformers"], axis=0)
    for name, times in rounds.items():
        wall, processor = np.median(times, axis=0)
        difference = np.abs(embeddings[name] - embeddings["sentence-transformers"]).max()
        print(
            f"{name:28} {len(texts) / wall:7.1f} texts/s  ratio {baseline[0] / wall:.2f}  "
            f"(by processor time {baseline[1] / processor:.2f})  "
            f"largest difference {difference:.0e}"
        )


def _read_texts(flags: Flags) -> list[str]:
    """Returns the first passages as they are encoded, title first."""
    with tempfile.TemporaryDirectory() as cache:
        corpus = read_beir(flags.data, cache=cache).corpus
        return [passage_text(corpus[row]) for row in range(min(flags.passages, len(corpus)))]


def _ragjax(
    encoder: TextEncoder, texts: list[str], options: EncodeOptions
) -> Callable[[], NDArray[np.float32]]:
    """Returns a run of ragjax, tokenisation included."""
    buckets = [bucket for bucket in options.buckets if bucket < encoder.max_length]
    options = dataclasses.replace(options, buckets=(*buckets, encoder.max_length))

    def tokenize(part: Sequence[str]) -> Sequence[Sequence[int]]:
        return encode_texts(encoder.tokenizer, part, max_length=encoder.max_length).ids

    return lambda: encode_corpus(
        encoder.encode, encoder.params, texts, tokenize, pad_id=encoder.pad_id, options=options
    )


def _sentence_transformer(flags: Flags, encoder: TextEncoder) -> Callable[[list[str]], Any]:
    """Returns sentence-transformers' encode with the same weights."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            "this comparison needs sentence-transformers: pip install 'ragjax[parity]'."
        ) from error
    model = SentenceTransformer(str(resolve_source(flags.encoder)), device="cpu")
    model.max_seq_length = encoder.max_length
    return lambda texts: model.encode(
        texts, batch_size=flags.batch_rows, show_progress_bar=False, convert_to_numpy=True
    )


if __name__ == "__main__":
    sys.exit(main())
