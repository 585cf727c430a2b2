"""What a fresh index is worth: both towers trained, one run for each way of keeping it fresh.

    python benchmarks/freshness.py --data FOLDER --output runs/freshness
    python benchmarks/freshness.py --data FOLDER --output runs/staleness \
        --arms sync:8 sync:40 sync:240 frozen --seeds 3

An arm is `frozen`, `query_only`, `rerank`, `sync:EVERY`, `async:EVERY`, or one of the last two
with the share of the documents that a refresh encodes, `sync:EVERY:0.2`. Every arm starts from the
same encoder and sees the same questions in the same order. It is trained with DPR's loss on the
relevance judgements, with the documents that the index of the moment returns as hard negatives
(ANCE). The quality is that of the trained towers with a corpus encoded afresh, measured outside
the timed part. Runs that `results.jsonl` in the output folder already holds are not repeated. Two
CPU cores, 1,500 passages cut to 64 tokens: about four minutes an arm.

References:
    Xiong et al., Approximate Nearest Neighbor Negative Contrastive Learning, 2021; Guu et al.,
    REALM, 2020, section 4.4 (stale index).
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import jax
import numpy as np
from _beside import run_program
from _freshness_results import plot_quality, table_row

from ragjax.evaluation import retrieval_metrics
from ragjax.index import EmbeddingWriter, ExactIndex
from ragjax.models import DEFAULT_ENCODER
from ragjax.models.testing import write_tiny_language_model
from ragjax.refresh import encode_corpus, encode_to_store
from ragjax.refresh.task import params_digest
from ragjax.runs.options.dual import AdaptConfig, LMConfig, RetrieverConfig
from ragjax.runs.options.refresh import RefreshConfig
from ragjax.runs.options.shared import DataConfig
from ragjax.runs.train.retriever import open_labelled, train_retriever
from ragjax.runs.workspace import Workspace, open_workspace, tower_params
from ragjax.training.live import LiveRetrieval
from ragjax.training.loop import MetricsLog, StopFlag
from ragjax.training.lsr import towers
from ragjax.training.steps import TrainState

METRICS = ("recall@1", "recall@5", "mrr@10")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Compares ways of keeping the index fresh while both towers train.

    Attributes:
        data: BEIR folder with relevance judgements for train and test.
        output: Folder of the results; runs that it holds are not repeated.
        encoder: Text encoder: folder, hub id or pip:NAME==VERSION.
        arms: What is compared; the first is the baseline of the paired differences.
        seeds: Runs of each arm, with seeds 0, 1, ...
        questions: Training questions at most.
        test_questions: Test questions at most; 0: all.
        epochs: Passes over them.
        batch_size: Questions a step.
        candidates: Documents for each question: relevant ones and hard negatives.
        negative_depth: Best documents of the index that negatives are drawn from.
        learning_rate: Peak learning rate of both towers.
        max_tokens: Tokens kept of each text, indexed and trained on.
        points: Times that the quality is measured in a run, at equal distances.
        plot: File of a picture, such as freshness.png, with the quality of all arms against time
            and against refreshes; needs matplotlib (the [notebooks] extra).
    """

    data: str
    output: str = "runs/freshness"
    encoder: str = DEFAULT_ENCODER
    arms: tuple[str, ...] = ("sync:8", "async:8", "rerank", "frozen", "query_only")
    seeds: int = 1
    questions: int = 512
    test_questions: int = 0
    epochs: int = 2
    batch_size: int = 16
    candidates: int = 2
    negative_depth: int = 10
    learning_rate: float = 2e-5
    max_tokens: int = 64
    points: int = 3
    plot: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code: 0, or 2 for bad input."""
    return run_program(Flags, run, arguments, __doc__)


def run(flags: Flags) -> None:
    """Trains what is missing and prints the table of all arms."""
    if flags.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'ragjax[notebooks]'")
    configs = [arm_config(flags, arm, seed) for seed in range(flags.seeds) for arm in flags.arms]
    output = Path(flags.output)
    output.mkdir(parents=True, exist_ok=True)
    # Each run builds its own step: what an earlier one compiled is read from here.
    jax.config.update("jax_compilation_cache_dir", str(output / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    bench = Bench(flags, output)
    done = {result["key"] for result in bench.results()}
    names = [(arm, seed) for seed in range(flags.seeds) for arm in flags.arms]
    missing = [
        (arm, seed, config)
        for (arm, seed), config in zip(names, configs, strict=True)
        if bench.key(arm, seed) not in done
    ]
    if bench.key("un-adapted", 0) not in done:
        bench.measure_unadapted()
    if missing:
        bench.warm_up()
    for number, (arm, seed, config) in enumerate(missing, 1):
        print(f"\n== {arm}, seed {seed} ({number} of {len(missing)} runs)", flush=True)
        bench.train(arm, seed, config)
    print(bench.table())
    if flags.plot:
        plot_quality(bench.results(), flags.arms, Path(flags.plot))
        print(f"\nplot: {flags.plot}")


def arm_config(flags: Flags, arm: str, seed: int) -> AdaptConfig:
    """Returns the options of a run.

    Raises:
        ValueError: For an arm that cannot be read.
    """
    mode, *rest = arm.split(":")
    if mode not in ("frozen", "query_only", "rerank", "sync", "async") or len(rest) > 2:
        raise ValueError(
            f"arm {arm!r}: expected frozen, query_only, rerank, sync:EVERY or async:EVERY,"
            " EVERY in steps, then perhaps the share of the documents encoded (sync:8:0.2)"
        )
    train = "query" if mode == "query_only" else "both"
    return AdaptConfig(
        data=flags.data,
        encoder=flags.encoder,
        encoder_max_length=flags.max_tokens,
        output=flags.output,
        stages=("retriever",),
        language_model=LMConfig(train_layers=0),
        seed=seed,
        checkpoint_minutes=1e6,
        data_options=DataConfig(
            train_questions=flags.questions, test_questions=flags.test_questions
        ),
        retriever=RetrieverConfig(
            objective="dpr",
            train=train,
            candidates=flags.candidates,
            negative_depth=flags.negative_depth,
            doc_tokens=flags.max_tokens,
            epochs=flags.epochs,
            batch_size=flags.batch_size,
            learning_rate=flags.learning_rate,
        ),
        refresh=RefreshConfig(
            mode=mode,  # pyrefly: ignore[bad-argument-type]  (checked above)
            every=rest[0] if rest else RefreshConfig().every,
            partial=float(rest[1]) if len(rest) > 1 else 1.0,
        ),
    )


class Bench:
    """Data and models, loaded once, and the results on disk."""

    def __init__(self, flags: Flags, output: Path):
        """Loads the data and the encoder, and encodes the corpus with it."""
        self._flags, self._output = flags, output
        # A workspace wants a language model; nothing here reads it.
        lm = str(output / "no-language-model")
        write_tiny_language_model(Path(lm))
        config = dataclasses.replace(arm_config(flags, flags.arms[0], 0), lm=lm)
        self._workspace = open_workspace(config, output, stop=StopFlag(), log=print)
        self._lm = lm
        task, params = self._workspace.task, self._workspace.encoder.params
        spec = task.spec(params, params_digest=params_digest(params))
        folder = Path(tempfile.mkdtemp(prefix="before-", dir=output)) / "embeddings"
        self._before = encode_to_store(task, params, EmbeddingWriter.open(folder, spec))

    def key(self, arm: str, seed: int) -> str:
        """Returns what identifies a run among the results."""
        return f"{Path(self._flags.data).parent.name}/{Path(self._flags.data).name} {arm} {seed}"

    def results(self) -> list[dict[str, Any]]:
        """Returns the finished runs."""
        path = self._output / "results.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def warm_up(self) -> None:
        """Compiles what every arm needs, outside the timed runs."""
        print("warm-up", flush=True)
        flags = dataclasses.replace(self._flags, questions=2 * self._flags.batch_size, epochs=1)
        for arm in ("rerank", "query_only"):
            config = arm_config(flags, arm, 0)
            workspace = self._open(config, "warm-up")
            questions = dict(workspace.questions)
            questions["train"] = questions["train"][: flags.questions]
            self._run(dataclasses.replace(workspace, questions=questions), config.retriever, [])

    def measure_unadapted(self) -> None:
        """Appends the quality of the encoder that every arm starts from."""
        params = self._workspace.encoder.params
        metrics = self._quality(params, params)
        self._append(
            {"key": self.key("un-adapted", 0), "arm": "un-adapted", "seed": 0, "seconds": 0.0,
             "refreshes": 0, "staleness_steps": 0.0, "step_seconds": 0.0, "points": []},
            metrics,
        )  # fmt: skip

    def train(self, arm: str, seed: int, config: AdaptConfig) -> None:
        """Trains one arm and appends its result."""
        workspace = self._open(config, f"{arm.replace(':', '-')}-{seed}")
        steps = -(-len(workspace.questions["train"]) * config.retriever.epochs
                  // config.retriever.batch_size)  # fmt: skip
        at = sorted(
            {round(steps * (i + 1) / self._flags.points) for i in range(self._flags.points)}
        )
        started = time.process_time()
        rows, points = self._run(workspace, config.retriever, at)
        processor = time.process_time() - started
        result: dict[str, Any] = {
            "key": self.key(arm, seed), "arm": arm, "seed": seed, "steps": steps,
            "process_seconds": processor,
            # Without the first step, which may compile.
            "seconds": sum(row["seconds"] for row in rows[1:]),
            "step_seconds": float(np.median([row["seconds"] for row in rows[1:]])),
            "refreshes": int(max(row["index/version"] for row in rows)),
            "staleness_steps": float(np.mean([row["index/staleness_steps"] for row in rows])),
            "callback_seconds": float(np.median([row["index/callback_seconds"] for row in rows])),
            "swap_seconds": max(row["index/swap_seconds"] for row in rows),
            "overlaps": sorted({row["index/overlap"] for row in rows if "index/overlap" in row}),
            "encode_seconds": float(np.median(
                [row["index/encode_seconds"] for row in rows if row["index/version"]] or [0.0])),
            "step_seconds_inside": rows[-1].get("index/step_seconds_inside"),
            "step_seconds_outside": rows[-1].get("index/step_seconds_outside"),
            "points": [],
        }  # fmt: skip
        metrics: Mapping[str, np.ndarray] = {}
        for point in points:
            metrics = self._quality(point["query"], point["doc"])
            shown = {name: float(values.mean()) for name, values in metrics.items()}
            result["points"].append({k: point[k] for k in ("step", "seconds", "refreshes")} | shown)
        self._append(result, metrics)
        shown = {name: round(result["points"][-1][name], 4) for name in METRICS}
        print(f"{arm}: {shown}, {result['seconds']:.0f} s, {result['refreshes']} refreshes")

    def _append(self, result: dict[str, Any], metrics: Mapping[str, np.ndarray]) -> None:
        """Adds a line to results.jsonl, with the metrics of each test question."""
        questions = {name: values.tolist() for name, values in metrics.items()}
        with open(self._output / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(result | {"questions": questions}) + "\n")

    def table(self) -> str:
        """Returns all arms of this data side by side, seeds averaged, with paired differences."""
        arms = ("un-adapted", *self._flags.arms)
        wanted = {self.key(arm, seed) for arm in arms for seed in range(self._flags.seeds)}
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
        for result in self.results():
            if result["key"] in wanted:
                found[result["arm"]].append(result)
        base = self._flags.arms[0]
        lines = [
            "",
            "| arm | runs | recall@5 | mrr@10 | recall@5 - " + base + " | seconds | refreshes |"
            " mean staleness, steps | seconds a step |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for arm, results in found.items():
            lines.append(table_row(arm, results, found[base]))
        return "\n".join(lines)

    def _open(self, config: AdaptConfig, name: str) -> Workspace:
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._output))
        config = dataclasses.replace(config, lm=self._lm)
        return dataclasses.replace(
            self._workspace, config=config, folder=folder,
            metrics=MetricsLog(folder / "metrics.jsonl"),
        )  # fmt: skip

    def _run(
        self, workspace: Workspace, config: RetrieverConfig, at: Sequence[int]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Trains; returns the metrics of each step and the towers after the steps in `at`."""
        params = tower_params(workspace)
        live = open_labelled(workspace, config, params, self._before)
        observed = _Observed(live.retrieval, at)
        with closing(live.retrieval.refresher):
            trained = train_retriever(workspace, config, 0, params, live.at, observed)
        if at:
            observed.keep(at[-1], *towers(trained, None))
        lines = (workspace.folder / "metrics.jsonl").read_text("utf-8").splitlines()
        shutil.rmtree(workspace.folder)  # checkpoints and generations of half a gigabyte
        return [json.loads(line) for line in lines], observed.points

    def _quality(self, query_params: Any, doc_params: Any) -> dict[str, np.ndarray]:
        """Returns metrics of each test question, the corpus encoded with these towers."""
        index = ExactIndex(self._encode(doc_params))
        queries = self._workspace.encode_queries(query_params, self._workspace.questions["test"])
        found = index.search(queries, 20)
        metrics = retrieval_metrics(found.doc_ids, self._workspace.gold_rows("test"))
        return {name: np.asarray(metrics[name], float) for name in METRICS}

    def _encode(self, doc_params: Any) -> np.ndarray:
        return encode_corpus(self._workspace.task, doc_params)


class _Observed:
    """The host's side of a step, keeping copies of the towers at some steps."""

    def __init__(self, retrieval: LiveRetrieval, at: Sequence[int]):
        self._retrieval, self._at = retrieval, frozenset(at)
        self._started = 0.0
        self._paused = 0.0
        self.points: list[dict[str, Any]] = []

    def resume(self, step: int, state: TrainState, saved: Mapping[str, Any] | None) -> None:
        self._retrieval.resume(step, state, saved)

    def before_step(self, step: int, state: TrainState) -> Mapping[str, float]:
        if step == 1:  # the first step may compile
            self._started = time.perf_counter()
        metrics = self._retrieval.before_step(step, state)
        if step in self._at:
            self.keep(step, self._retrieval.query_params, self._retrieval.doc_params)
        return metrics

    def state_dict(self) -> Mapping[str, Any]:
        return self._retrieval.state_dict()

    def line(self, step: int) -> str:
        return self._retrieval.line(step)

    def keep(self, step: int, query_params: Any, doc_params: Any) -> None:
        started = time.perf_counter()
        seconds = started - self._started - self._paused
        query, doc = (jax.tree.map(np.array, params) for params in (query_params, doc_params))
        refreshes = self._retrieval.refresher.snapshot.version
        self.points.append(
            {"step": step, "seconds": seconds, "refreshes": refreshes, "query": query, "doc": doc}
        )
        self._paused += time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
