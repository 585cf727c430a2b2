"""Encoding speed beside sentence-transformers, on the same texts in one process.

    python benchmarks/encoding.py --data FOLDER

Both encode the passages of a BEIR folder with the same weights, part by part in turns, so that a
machine whose load drifts slows both alike; before that each encodes, untimed, passages of all
lengths (compilation, warm caches). The ratio by processor time is the steadier one on a machine
that also does other work. Needs the [parity] extra. Two CPU cores take about one and a half
minutes for 500 passages of about 150 tokens, one round; a ratio above 1 means that ragjax is
faster.

    python benchmarks/encoding.py --data FOLDER --passages 0 --rounds 1 --onnx --recall test

adds the ONNX files that an export writes, in float32 and int8, run by onnxruntime, and the recall
at 5 of all of them for the questions of a split. Needs the [onnx] extra, too.

    python benchmarks/encoding.py --data FOLDER --kill_resume --passages 400

kills an encoding half way, goes on with it, and shows what was kept, what was done twice, and
whether the result is that of an encoding left alone, byte for byte.
"""

import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from _beside import run_program
from numpy.typing import NDArray

from ragjax.data import encode_texts, pad_right, passage_text, read_beir
from ragjax.index import EmbeddingWriter, StoreSpec
from ragjax.models import DEFAULT_ENCODER, TextEncoder, load_encoder
from ragjax.models.export import plan_encoder
from ragjax.models.export.onnx_file import OnnxModelFile
from ragjax.models.files.sources import resolve_source
from ragjax.refresh import EncodeOptions, EncodeTask, encode_corpus, encode_to_store

Run = Callable[[list[str]], NDArray[np.float32]]
_REFERENCE = "sentence-transformers"


class Timed(NamedTuple):
    """What one encoder did in one round."""

    times: NDArray[np.float64]  # [parts, 2] seconds by the clock and of processor time
    embeddings: NDArray[np.float32]  # [N, D]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Compares the encoding speed of ragjax and sentence-transformers.

    Attributes:
        data: BEIR folder with the passages.
        encoder: text encoder: folder, hub id or pip:NAME==VERSION.
        passages: how many of the passages, from the first; 0 takes all.
        rounds: timed rounds of each; the median counts.
        parts: parts of the passages, encoded in turns; the times of a round are summed.
        warmup: passages of the untimed round, spread evenly over the lengths.
        batch_tokens: tokens in a ragjax batch, padding included; several to compare them.
        batch_rows: texts in a batch of sentence-transformers (its own default) and of onnxruntime.
        onnx: also times the ONNX files of the encoder.
        recall: split whose questions are searched for among the passages; empty: none.
        kill_resume: kills and resumes an encoding instead of timing it.
        rows_per_shard: passages in a shard of that encoding.
    """

    data: str
    encoder: str = DEFAULT_ENCODER
    passages: int = 500
    rounds: int = 3
    parts: int = 8
    warmup: int = 256
    batch_tokens: tuple[int, ...] = (EncodeOptions().batch_tokens,)
    batch_rows: int = 32
    onnx: bool = False
    recall: str = ""
    kill_resume: bool = False
    rows_per_shard: int = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code: 0, or 2 for bad input."""
    return run_program(Flags, _run, arguments, __doc__)


def _run(flags: Flags) -> None:
    (kill_and_resume if flags.kill_resume else compare)(flags)


def compare(flags: Flags) -> None:
    """Times both encoders and prints texts per second, the ratio and the largest difference."""
    if flags.passages < 0 or min(flags.rounds, flags.parts, flags.warmup) < 1:
        raise ValueError(
            "--rounds, --parts and --warmup must be at least 1, --passages at least 0."
        )
    texts, questions, relevant = _read_data(flags)
    encoder = load_encoder(flags.encoder)
    runs = {_REFERENCE: _sentence_transformer(flags, encoder)}
    for batch_tokens in flags.batch_tokens:
        runs[f"ragjax, {batch_tokens} tokens a batch"] = _ragjax(encoder, batch_tokens)
    if flags.onnx:
        runs |= _onnxruntime(encoder, flags.batch_rows)
    by_length = sorted(texts, key=len)
    warmup = min(flags.warmup, len(texts))
    for run in runs.values():
        run([by_length[row] for row in np.linspace(0, len(texts) - 1, warmup).astype(int)])
    rounds = [_timed_round(texts, runs, flags.parts) for _ in range(flags.rounds)]
    print(f"{len(texts)} passages, medians of {flags.rounds} rounds, {flags.parts} parts in turns")
    times = {
        name: np.median([round_[name].times.sum(axis=0) for round_ in rounds], axis=0)
        for name in runs
    }
    last = rounds[-1]
    for name, (wall, processor) in times.items():
        ratios = last[_REFERENCE].times[:, 0] / last[name].times[:, 0]
        difference = np.abs(last[name].embeddings - last[_REFERENCE].embeddings).max()
        print(
            f"{name:28} {len(texts) / wall:7.1f} texts/s  ratio {times[_REFERENCE][0] / wall:.2f}  "
            f"(parts {ratios.min():.2f} to {ratios.max():.2f}, by processor time "
            f"{times[_REFERENCE][1] / processor:.2f})  largest difference {difference:.0e}"
        )
    for name, run in runs.items() if questions else ():
        # Prefixes of models that have them are left out: of both sides.
        scores = run(questions) @ last[name].embeddings.T
        found = np.argsort(-scores, axis=1, kind="stable")[:, :5]
        share = np.mean([bool(rows & {*top}) for rows, top in zip(relevant, found, strict=True)])
        print(f"{name:28} recall@5 {share:.4f} of {len(questions)} {flags.recall} questions")


def _timed_round(texts: list[str], runs: dict[str, Run], parts: int) -> dict[str, Timed]:
    """Encodes each part of the texts with each encoder, another one first each time."""
    parts = min(parts, len(texts))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in runs}
    for number in range(parts):
        # Every part-th text: all parts have the same mixture of lengths.
        part = texts[number::parts]
        for name in list(runs) if number % 2 else reversed(runs):
            started = time.perf_counter(), time.process_time()
            found[name].append(runs[name](part))
            wall, processor = time.perf_counter(), time.process_time()
            times[name].append((wall - started[0], processor - started[1]))
            rate = len(part) / times[name][-1][0]
            print(f"part {number + 1} of {parts}: {name:28} {rate:7.1f} texts/s", flush=True)
    timed = {}
    for name in runs:
        embeddings = np.empty((len(texts), found[name][0].shape[1]), np.float32)
        for number in range(parts):
            embeddings[number::parts] = found[name][number]
        timed[name] = Timed(np.asarray(times[name]), embeddings)
    return timed


def kill_and_resume(flags: Flags) -> None:
    """Kills an encoding half way, resumes it and compares it with one that was left alone."""
    texts, _, _ = _read_data(flags)
    num_shards = -(-len(texts) // flags.rows_per_shard)
    if num_shards < 3:
        raise ValueError(f"{len(texts)} passages make {num_shards} shards; lower --rows_per_shard.")
    with tempfile.TemporaryDirectory() as folder:
        killed, clean = Path(folder, "killed"), Path(folder, "clean")
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_encode_to, args=(flags, texts, killed, sender))
        process.start()
        sender.close()
        # Half a shard beyond the middle: neither between two shards nor near an end.
        done = _last_report(receiver, (num_shards // 2 + 0.5) * flags.rows_per_shard)
        process.kill()
        process.join()
        done = max(done, _last_report(receiver, math.inf))
        building = Path(f"{killed}.building")
        before = {path.name: path.stat().st_mtime_ns for path in building.glob("shard-*.npy")}
        again = _encode_to(flags, texts, killed)
        _encode_to(flags, texts, clean)
        kept = [
            name for name, stamp in before.items() if (killed / name).stat().st_mtime_ns == stamp
        ]
        manifests = [json.loads((store / "manifest.json").read_text()) for store in (killed, clean)]
        # A shard counts as done twice when both processes encoded any of it.
        repeated = -(-done // flags.rows_per_shard) - (num_shards - again)
        print(
            f"killed with exit code {process.exitcode} after {done} of {len(texts)} passages: "
            f"{len(kept)} of {num_shards} shards kept, {again} encoded after that, "
            f"{repeated} of them for the second time; digests equal those of a clean run: "
            f"{manifests[0]['sha256'] == manifests[1]['sha256']}"
        )


def _last_report(receiver: Connection, enough: float) -> int:
    """Returns how many passages are done, once that is enough or the process has ended."""
    done = 0
    try:
        while done < enough:
            done = receiver.recv()
    except EOFError:
        pass
    return done


def _encode_to(
    flags: Flags, texts: list[str], folder: Path, sender: Connection | None = None
) -> int:
    """Encodes to a store, sends how many are done, and returns the number of shards encoded."""
    encoder = load_encoder(flags.encoder)
    spec = StoreSpec(
        size=len(texts),
        dim=encoder.embedding_size,
        model_fingerprint=encoder.fingerprint,
        corpus_fingerprint="benchmark",
        rows_per_shard=flags.rows_per_shard,
    )
    writer = EmbeddingWriter.open(folder, spec)
    missing = len(writer.missing())
    encode_to_store(
        _task(encoder, texts, flags.batch_tokens[0]),
        encoder.params,
        writer,
        progress=None if sender is None else lambda report: sender.send(report.done),
    )
    return missing


def _read_data(flags: Flags) -> tuple[list[str], list[str], list[set[int]]]:
    """Returns the first passages, title first, and questions with their rows among them."""
    with tempfile.TemporaryDirectory() as cache:
        dataset = read_beir(flags.data, cache=cache)
        corpus = dataset.corpus
        size = min(flags.passages or len(corpus), len(corpus))
        texts = [passage_text(corpus[row]) for row in range(size)]
        if not flags.recall:
            return texts, [], []
        graded = dataset.graded_rows(flags.recall)
        relevant = [{row for row in rows if row < size} for rows in graded]
        asked = [number for number, rows in enumerate(relevant) if rows]
        questions = [dataset.questions[flags.recall][number].text for number in asked]
        return texts, questions, [relevant[number] for number in asked]


def _ragjax(encoder: TextEncoder, batch_tokens: int) -> Run:
    """Returns a run of ragjax, tokenisation included."""
    return lambda texts: encode_corpus(_task(encoder, texts, batch_tokens), encoder.params)


def _task(encoder: TextEncoder, texts: Sequence[str], batch_tokens: int) -> EncodeTask:
    """Returns the task of encoding texts of up to the encoder's length."""
    buckets = [bucket for bucket in EncodeOptions().buckets if bucket < encoder.max_length]
    return EncodeTask(
        encode=encoder.encode,
        documents=texts,
        pad_id=encoder.pad_id,
        tokenize=_tokenize(encoder),
        options=EncodeOptions(batch_tokens=batch_tokens, buckets=(*buckets, encoder.max_length)),
    )


def _tokenize(encoder: TextEncoder) -> Callable[[Sequence[str]], Sequence[Sequence[int]]]:
    """Returns the encoder's token ids of texts, cut to its length."""
    return lambda texts: encode_texts(encoder.tokenizer, texts, max_length=encoder.max_length).ids


def _onnxruntime(encoder: TextEncoder, batch_rows: int) -> dict[str, Run]:
    """Returns runs of the ONNX files of the encoder, texts of like length in a batch."""
    contents = plan_encoder(encoder, formats=["onnx", "onnx-int8"])
    import onnxruntime

    def make(content: bytes) -> Run:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        wanted = [each.name for each in session.get_inputs()]

        def run(texts: list[str]) -> NDArray[np.float32]:
            ids = _tokenize(encoder)(texts)
            order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
            found = np.empty((len(ids), encoder.embedding_size), np.float32)
            for start in range(0, len(ids), batch_rows):
                rows = order[start : start + batch_rows]
                length = max(len(ids[row]) for row in rows)
                padded = pad_right([ids[row] for row in rows], length=length, pad_id=encoder.pad_id)
                given = {
                    "input_ids": padded.ids,
                    "attention_mask": padded.mask,
                    "token_type_ids": np.zeros_like(padded.ids),
                }
                inputs = {name: given[name].astype(np.int64) for name in wanted}
                found[rows] = np.asarray(session.run(["sentence_embedding"], inputs)[0])
            return found

        return run

    return {
        f"onnxruntime, {path.rpartition('/')[2]}": make(model.content)
        for path, model in contents.models.items()
        if isinstance(model, OnnxModelFile)
    }


def _sentence_transformer(flags: Flags, encoder: TextEncoder) -> Run:
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
