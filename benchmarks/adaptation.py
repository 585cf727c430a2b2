"""Retrieval after adaptation beside its peers: same encoder, same texts, as many questions.

    python benchmarks/adaptation.py --data FOLDER OTHER --output runs/adaptation
    python benchmarks/adaptation.py --data FOLDER --output runs/adaptation --stress

Compared on the test questions of every folder (BEIR layout), each dense alone and together with
BM25: the un-adapted encoder; sentence-transformers' MultipleNegativesRankingLoss on gold pairs
(two epochs, batches of 32, 256 tokens, the learning rate that is best on dev), alone (`mnrl`) and
with the hard negatives that it mines (`mnrl_hard`); FedRAG's LSR trainer (`fedrag`); and ragjax
from each kind of supervision. Whatever a system learned from, it is measured by the relevance
judgements of the test questions. The weight of BM25 beside a peer is chosen on dev judgements;
ragjax chooses its own from what its kind of supervision has.

What is measured goes to `cells.jsonl` in the output folder, one line for each set, number of
questions, seed and system; what is there is not computed again, so a long comparison can run in
pieces. Peers run in a process of their own, by `--peers_python`, whose world has
`pip install "sentence-transformers[train]"` and, for `fedrag`,
`pip install --no-deps fed-rag pydantic-settings peft` and sentence-transformers 4: since cells are
kept, call it once with each Python and its `--peers`. Two CPU cores, 2,000 passages and 240
questions: three minutes a peer, five to ten a run of ragjax.

With `--stress` the runs are those that could do harm: 20 questions; shuffled answers; answers of
another domain (the next folder); 20 times the learning rate. What they ship is compared with the
un-adapted hybrid.

References:
    Reimers and Gurevych, Sentence-BERT, 2019; Henderson et al., Efficient Natural Language
    Response Suggestion, 2017 (the ranking loss); Shi et al., REPLUG, 2023 (LSR).
"""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from _adaptation_table import Cell, format_rows, format_table, read_cells
from _beside import run_program

from ragjax.data import passage_text, read_beir
from ragjax.evaluation import retrieval_metrics
from ragjax.index import Bm25Index, SearchResult
from ragjax.models import DEFAULT_ENCODER, DEFAULT_LM, load_encoder, load_language_model
from ragjax.models.export import export_language_model
from ragjax.models.files.sources import resolve_source
from ragjax.runs.adapt import adapt
from ragjax.runs.folder import RunFiles
from ragjax.runs.found import findable_in, search_findable
from ragjax.runs.indexes import Retriever, build_bm25, build_retriever, search
from ragjax.runs.options.dual import AdaptConfig, Stage
from ragjax.runs.options.files import load_config_file
from ragjax.runs.workspace import Workspace, open_workspace
from ragjax.storage import write_json
from ragjax.training.loop import StopFlag

Peer = Literal["mnrl", "mnrl_hard", "fedrag"]
Kind = Literal["documents", "questions", "answers", "judgements"]
METRICS = ("recall@1", "recall@5", "recall@20", "mrr@10", "ndcg@10")
# Rows of a cell -> systems of a run's table.
_OURS = {
    "dense": "after", "hybrid": "hybrid", "bm25": "bm25", "reranked": "reranked",
}  # fmt: skip
STRESS = ("20 questions", "shuffled answers", "foreign answers", "learning rate x 20")
_DEPTH = 20
# What the peers are trained with; FedRAG reads as many documents as its own default.
_PEER = {"epochs": 2, "batch_size": 32, "max_tokens": 256, "documents": 2, "device": "cpu"}


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Compares adaptation from each kind of supervision with its peers.

    Attributes:
        data: BEIR folders with relevance judgements for train, dev and test.
        output: Folder of the results; what it holds is not computed again.
        kinds: Supervision that ragjax learns from, a run for each.
        questions: Numbers of training questions; sets that have fewer take all of theirs.
        seeds: Runs of each, with seeds 0, 1, ...
        peers: What ragjax is compared with.
        learning_rates: Of the peers; the best by dense MRR@10 on dev counts.
        peers_python: Python that has the peers; "": this one.
        stages: Stages of ragjax's runs.
        encoder: Text encoder: folder, hub id or pip:NAME==VERSION.
        lm: Language model, likewise.
        config: File with other options of ragjax's runs; see experiments/adapt.py.
        stress: Run what could do harm in place of the comparison.
        rows: File for the rows of the table as docs/results.rst has them.
    """

    data: tuple[str, ...]
    output: str = "runs/adaptation"
    kinds: tuple[Kind, ...] = ("documents", "questions", "answers", "judgements")
    questions: tuple[int, ...] = (240,)
    seeds: int = 3
    peers: tuple[Peer, ...] = ("mnrl", "mnrl_hard", "fedrag")
    learning_rates: tuple[float, ...] = (2e-5, 5e-5)
    peers_python: str = ""
    stages: tuple[Stage, ...] = ("lm", "retriever")
    encoder: str = DEFAULT_ENCODER
    lm: str = DEFAULT_LM
    config: str = ""
    stress: bool = False
    rows: str = ""

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range."""
        for name in ("data", "questions", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"--{name} names nothing")
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {self.seeds}")
        names = [set_name(folder) for folder in self.data]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"--data names {min(twice)} twice")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code: 0, or 2 for bad input."""
    return run_program(Flags, run, arguments, __doc__)


def run(flags: Flags) -> None:
    """Computes what is missing and prints the table."""
    path = Path(flags.output) / "cells.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in flags.data:
        for size in (20,) if flags.stress else flags.questions:
            for seed in range(flags.seeds):
                bench = Bench(flags, folder, size, seed)
                bench.fill_stress() if flags.stress else bench.fill()
    cells = read_cells(path)
    names = [set_name(folder) for folder in flags.data]
    for size in flags.questions:
        wanted = [c for c in cells if c.data in names and c.size in (size, 20)]
        print(format_table(wanted, f"{size} training questions"))
        if flags.rows:
            Path(flags.rows).write_text(format_rows(wanted), "utf-8")


def set_name(folder: str) -> str:
    """Returns the last two parts of a folder."""
    return "/".join(Path(folder).resolve().parts[-2:])


class Bench:
    """One set with its training questions, loaded once, and its lines of `cells.jsonl`."""

    def __init__(self, flags: Flags, folder: str, size: int, seed: int):
        """Names them; nothing is loaded before a cell is missing."""
        self._flags, self._folder, self._size, self._seed = flags, folder, size, seed
        self._output = Path(flags.output)
        self._name = set_name(folder)
        self._cells = self._output / "cells.jsonl"
        self._work = self._output / "work" / self._name.replace("/", "-")

    def fill(self) -> None:
        """Computes the un-adapted system, the peers and a run of each kind."""
        self._unadapted()
        for peer in self._flags.peers:
            rates = self._flags.learning_rates[-1:] if peer == "fedrag" else (
                self._flags.learning_rates
            )  # fmt: skip
            for rate in rates:
                self._once(f"{peer} {rate:g}", functools.partial(self._train_peer, peer, rate))
        for kind in self._flags.kinds:
            self._once(f"ragjax {kind}", functools.partial(self._adapt, kind))

    def fill_stress(self) -> None:
        """Computes the un-adapted system and the runs that could do harm."""
        self._unadapted()
        for name in STRESS:
            self._once(f"stress {name}", functools.partial(self._stress, name))

    def _once(self, system: str, compute: Any) -> None:
        """Appends what `compute` returns as the line of a system, unless there is one."""
        mine = (self._name, self._size, self._seed, system)
        if any(cell.key == mine for cell in read_cells(self._cells)):
            return
        print(f"\n== {self._name}, {self._size} questions, seed {self._seed}: {system}", flush=True)
        started = time.perf_counter()
        values = compute()
        cell = Cell(*mine, seconds=time.perf_counter() - started, **values)
        with open(self._cells, "a", encoding="utf-8") as file:
            file.write(json.dumps(cell._asdict()) + "\n")
        print({name: round(float(np.nanmean(v)), 4) for name, v in cell.questions.items()})

    @functools.cached_property
    def _workspace(self) -> Workspace:
        config = self._config("judgements", self._work)
        config = dataclasses.replace(config, stages=("retriever",))
        self._work.mkdir(parents=True, exist_ok=True)
        return open_workspace(config, self._work, stop=StopFlag(), log=_quiet)

    @functools.cached_property
    def _bm25(self) -> Bm25Index:
        return build_bm25(self._workspace)

    def _config(self, kind: Kind, output: Path, **data: Any) -> AdaptConfig:
        flags, base = self._flags, AdaptConfig()
        base = load_config_file(flags.config, base) if flags.config else base
        if hasattr(base.data_options, "supervision"):
            data["supervision"] = kind
        options = dataclasses.replace(base.data_options, train_questions=self._size, **data)
        return dataclasses.replace(
            base, data=self._folder, encoder=flags.encoder, lm=flags.lm, output=str(output),
            seed=self._seed, stages=flags.stages, data_options=options,
        )  # fmt: skip

    def _unadapted(self) -> None:
        def compute() -> dict[str, Any]:
            params = self._workspace.encoder.params
            return self._measure(self._build(params, params, self._work))

        self._once("un-adapted", compute)

    def _build(self, query_params: Any, doc_params: Any, folder: Path) -> Retriever:
        """Indexes the corpus with an encoder; the hybrid's weight is chosen on dev judgements."""
        return build_retriever(
            dataclasses.replace(self._workspace, folder=folder),
            self._bm25,
            version=0,
            query_params=query_params,
            doc_params=doc_params,
        )

    def _train_peer(self, peer: Peer, rate: float) -> dict[str, Any]:
        workspace = self._workspace
        folder = self._work / f"{peer}-{rate:g}-{self._size}-{self._seed}"
        trained = folder / "model" / "note.json"
        if not trained.exists():  # else an earlier life ended while it encoded the corpus
            folder.mkdir(exist_ok=True)
            write_json(folder / "job.json", self._job(peer, rate, folder))
            python = self._flags.peers_python or sys.executable
            program = Path(__file__).with_name("_peers.py")
            ended = subprocess.run([python, str(program), str(folder / "job.json")], check=False)
            if ended.returncode:
                raise ValueError(
                    f"{peer} ended with code {ended.returncode}; see above, --peers_python, --peers"
                )
        most = workspace.encoder.max_length
        encoder = load_encoder(str(folder / "model"), max_length=most)
        values = self._measure(self._build(encoder.params, encoder.params, folder))
        note = json.loads(trained.read_text("utf-8"))
        shutil.rmtree(folder)
        return values | {"note": note}

    def _job(self, peer: Peer, rate: float, folder: Path) -> dict[str, Any]:
        """Returns what `_peers.py` is to do, with everything that it reads."""
        workspace = self._workspace
        questions = workspace.questions["train"]
        corpus = [passage_text(passage) for passage in workspace.dataset.corpus]
        job = {
            "system": peer, "output": str(folder / "model"), "corpus": corpus, "seed": self._seed,
            "encoder": str(resolve_source(self._flags.encoder)), "learning_rate": rate, **_PEER,
            "max_tokens": min(_PEER["max_tokens"], workspace.encoder.max_length),
            "pairs": [
                [question.text, corpus[row]]
                for question, grades in zip(questions, workspace.gold_rows("train"), strict=True)
                for row, grade in grades.items()
                if grade > 0
            ],
        }  # fmt: skip
        if peer == "fedrag":
            job["lm"] = str(self._output / "work" / "language-model")
            if not Path(job["lm"]).exists():
                export_language_model(load_language_model(self._flags.lm), job["lm"])
            job["answers"] = [[q.text, q.answers[0]] for q in questions if q.answers]
        return job

    def _adapt(self, kind: Kind) -> dict[str, Any]:
        name = f"{self._name.replace('/', '-')}-{kind}-{self._size}-{self._seed}"
        return self._adapted(self._config(kind, self._output / "runs" / name))

    def _stress(self, name: str) -> dict[str, Any]:
        slug = f"{self._name.replace('/', '-')}-stress-{name.replace(' ', '-')}-{self._seed}"
        config = self._config("answers", self._output / "runs" / slug)
        if name in ("shuffled answers", "foreign answers"):
            folder = self._work / f"{name.split()[0]}-{self._seed}"
            write_other_answers(Path(self._folder), self._donor(name), folder, self._seed)
            config = dataclasses.replace(config, data=str(folder))
        if name != "20 questions":
            options = dataclasses.replace(config.data_options, train_questions=240)
            config = dataclasses.replace(config, data_options=options)
        if name == "learning rate x 20":
            rate = 20 * config.retriever.learning_rate
            lm = dataclasses.replace(
                config.language_model, learning_rate=20 * config.language_model.learning_rate
            )
            retriever = dataclasses.replace(config.retriever, learning_rate=rate)
            config = dataclasses.replace(config, retriever=retriever, language_model=lm)
        return self._adapted(config)

    def _donor(self, name: str) -> Path:
        """Returns the folder whose answers are taken: its own, or the next set's."""
        folders = [set_name(folder) for folder in self._flags.data]
        step = int(name == "foreign answers")
        if step and len(folders) < 2:
            raise ValueError("--stress takes the answers of another set: name two in --data")
        return Path(self._flags.data[(folders.index(self._name) + step) % len(folders)])

    def _adapted(self, config: AdaptConfig) -> dict[str, Any]:
        """Runs ragjax and returns what the run itself measured on the test questions."""
        finished = adapt(config)
        lines = RunFiles(finished.folder).lines("predictions.jsonl")
        systems = {line["id"]: line["systems"] for line in lines}
        ids = sorted(question.id for question in self._workspace.questions["test"])
        served = RunFiles(finished.folder).mapping("served.json")
        ours = _OURS | {"shipped": served["documents"]}
        questions = {
            f"{name} {metric}": [
                systems.get(id, {}).get(system, {}).get("metrics", {}).get(metric, np.nan)
                for id in ids
            ]
            for name, system in ours.items()
            for metric in METRICS
            if any(system in row for row in systems.values())
        }
        return {
            "questions": questions,
            "dev": {},
            "weight": served["dense_weight"],
            "note": served["reason"],
        }

    def _measure(self, retriever: Retriever) -> dict[str, Any]:
        """Returns the metrics of every test question, dense, lexical and fused."""
        workspace = self._workspace
        rankings = search(workspace, retriever, "test", _DEPTH)
        texts = [question.text for question in workspace.questions["test"]]
        lexical = search_findable(
            lambda depth: self._bm25.search(texts, depth),
            findable_in(workspace, "test"), _DEPTH, size=self._bm25.size,
        )  # fmt: skip
        found = {"dense": rankings.dense, "hybrid": rankings.hybrid, "bm25": lexical}
        questions: dict[str, list[float]] = {}
        for name, result in found.items():
            questions |= self._metrics(name, result, "test")
        dev = search(workspace, retriever, "dev", _DEPTH)
        on_dev = self._metrics("dense", dev.dense, "dev") | self._metrics(
            "hybrid", dev.hybrid, "dev"
        )
        return {
            "questions": questions,
            "dev": {name: float(np.nanmean(values)) for name, values in on_dev.items()},
            "weight": retriever.hybrid.dense_weight,
        }

    def _metrics(self, name: str, found: SearchResult, split: str) -> dict[str, list[float]]:
        """Returns the metrics of a split's questions in the order of their ids."""
        workspace = self._workspace
        ids = [question.id for question in workspace.questions[split]]
        order = sorted(range(len(ids)), key=ids.__getitem__)
        columns = retrieval_metrics(found.doc_ids, workspace.gold_rows(split))
        return {f"{name} {metric}": column[order].tolist() for metric, column in columns.items()}


def write_other_answers(source: Path, donor: Path, folder: Path, seed: int) -> None:
    """Writes a data folder whose training questions have answers that are not theirs.

    Args:
        source: BEIR folder.
        donor: BEIR folder whose training answers are dealt out; the source itself: shuffled.
        folder: Where to write; replaced.
        seed: Of the shuffle.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in source.iterdir():
        if not part.name.startswith("queries.jsonl"):
            (folder / part.name).symlink_to(part.resolve())
    own = read_beir(source, cache=folder / "cache")
    other = own if donor == source else read_beir(donor, cache=folder / "cache-of-donor")
    pool = [list(question.answers) for question in other.questions["train"] if question.answers]
    rng = np.random.default_rng(seed)
    dealt = {q.id: pool[i % len(pool)] for q, i in zip(
        own.questions["train"], rng.permutation(len(own.questions["train"])), strict=True
    )}  # fmt: skip
    rows = {q.id: (q, split) for split, asked in own.questions.items() for q in asked}
    with open(folder / "queries.jsonl", "w", encoding="utf-8") as file:
        for id, (question, split) in rows.items():
            answers = dealt.get(id, list(question.answers))
            made_from = {} if question.source is None else {"doc": question.source}
            metadata = {"answers": answers, "split": split, **made_from}
            row = {"_id": id, "text": question.text, "metadata": metadata}
            file.write(json.dumps(row) + "\n")


def _quiet(line: str) -> None:
    """Shows nothing."""


if __name__ == "__main__":
    sys.exit(main())
