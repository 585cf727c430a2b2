"""What a run ships: of the systems that it could serve, what dev questions say.

Q dev questions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ragjax.index import Bm25Index
from ragjax.runs.compare.choice import (
    FIGURE_DEPTH,
    choose,
    judge_problem,
    prefer,
    ranking_figure,
)
from ragjax.runs.compare.systems import retrieve_documents
from ragjax.runs.folder import RunFiles
from ragjax.runs.indexes import Retriever
from ragjax.runs.train.guard import Kept
from ragjax.runs.workspace import FrozenLM, Workspace
from ragjax.storage import write_json

SERVED = "served.json"
# Documents of a system -> its name in a sentence. The first one is kept in case of doubt.
_NAMES = {
    "hybrid_before": "un-adapted hybrid",
    "bm25": "BM25",
    "before": "un-adapted dense",
    "after": "adapted dense",
    "hybrid": "adapted hybrid",
}
_DEFAULT = "hybrid_before"
_SEARCHES = {"bm25": "bm25", "before": "dense", "after": "dense"}
_ADAPTED = ("after", "hybrid")
_FIGURES = (f"mrr@{FIGURE_DEPTH}", "hit@5")


class Served(NamedTuple):
    """What served.json holds."""

    documents: str  # what is served, by its name among the documents of the table
    search: str  # "hybrid", "dense" or "bm25"
    retriever: str  # "base" or "adapted" towers
    language_model: str  # "base" or "adapted"
    dense_weight: float  # of the dense side in the hybrid
    step: str  # of the adapted towers, shipped or not,
    factor: float  # and their weight beside those before training
    reason: str  # a sentence for the user
    questions: int  # dev questions with a known truth
    dev: dict[str, dict[str, float]]  # by documents: mean figures on dev

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Returns what a run ships; None where its folder says nothing of it."""
        values = RunFiles(folder).mapping(SERVED)
        return cls(**values) if values.keys() == set(cls._fields) else None


def choose_served(
    workspace: Workspace,
    bm25: Bm25Index,
    before: Retriever,
    after: Retriever,
    lm: FrozenLM,
    kept: Kept | None,
) -> Served:
    """Chooses what is shipped by the dev questions, writes `served.json` and says so.

    Args:
        workspace: Data, options, folder.
        bm25: The index of words.
        before: The un-adapted retriever.
        after: The adapted one, or the un-adapted one again.
        lm: The language model that answers.
        kept: What was kept of its training; None: no retriever was trained.
    """
    found, relevant = {}, workspace.relevant_rows("dev")
    if relevant:
        found = retrieve_documents(workspace, bm25, before, after, "dev")
    names = [name for name in _NAMES if name in found and (kept or name not in _ADAPTED)]
    rank = {name: ranking_figure(found[name].found, relevant) for name in names}
    hit = {name: ranking_figure(found[name].found.top(5), relevant) > 0 for name in names}
    base = rank.get(_DEFAULT, np.zeros(0))
    known = ~np.isnan(base)
    hits = {name: np.where(known, values, np.nan) for name, values in hit.items()}
    if workspace.config.keep == "last":
        documents = "hybrid" if kept else _DEFAULT
        why = "the last step is kept as it is (keep last)"
    else:
        why = judge_problem(base, relevant, len(workspace.dataset.corpus))
        documents = _DEFAULT if why else _best(names, rank, hits, kept)
    dev = {name: _means(rank[name], hits[name], known) for name in names}
    chosen = after if documents in _ADAPTED else before
    served = Served(
        documents=documents,
        search=_SEARCHES.get(documents, "hybrid"),
        retriever="adapted" if documents in _ADAPTED else "base",
        language_model="base" if lm.fingerprint == workspace.base_lm().fingerprint else "adapted",
        dense_weight=chosen.hybrid.dense_weight,
        step=kept.step if kept else "",
        factor=kept.factor if kept else 0.0,
        reason=_sentence(documents, dev, int(known.sum()), why, trained=kept is not None),
        questions=int(known.sum()),
        dev=dev,
    )
    write_json(workspace.folder / SERVED, served._asdict())
    workspace.log(f"\n{served.reason}")
    return served


def _best(
    names: list[str],
    rank: Mapping[str, NDArray[np.float64]],
    hits: Mapping[str, NDArray[np.float64]],
    kept: Kept | None,
) -> str:
    """Returns what is better than the un-adapted hybrid by more than noise, or that.

    BM25 hides from a few dev questions what its dense side has gained. So the adapted hybrid is
    also taken where it is no worse on the mean and its dense side alone is better by more than
    noise.
    """
    off = kept.optimism if kept else 0.0
    figures = {name: rank[name] - off * (name in _ADAPTED) for name in names}
    default, best = names[0], names[choose(list(figures.values()))]
    if best == default and kept and prefer(figures["after"], figures["before"]):
        best = "hybrid" if np.nanmean(figures["hybrid"] - figures[default]) >= 0 else default
    # Rank 1 is not to be bought with what a reader of five passages needs.
    return default if prefer(hits[default], hits[best]) else best


def _means(
    rank: NDArray[np.float64], hits: NDArray[np.float64], known: NDArray[np.bool_]
) -> dict[str, float]:
    if not known.any():
        return {}
    values = (rank[known].mean(), hits[known].mean())
    return {name: round(float(value), 6) for name, value in zip(_FIGURES, values, strict=True)}


def _sentence(
    documents: str, dev: Mapping[str, Any], count: int, why: str, *, trained: bool
) -> str:
    """Says what is shipped and what dev says of it."""
    shipped, name = f"shipped: {_NAMES[documents]}", _FIGURES[0]
    if why:
        return f"{shipped}, not chosen on dev: {why}"
    base, mine = dev[_DEFAULT][name], dev[documents][name]
    on = f"on {count} dev questions"
    gained = f"{name.upper()} {base:.3f} \N{RIGHTWARDS ARROW} {mine:.3f} {on}"
    if documents in _ADAPTED:
        dense = f"{dev['before'][name]:.3f} \N{RIGHTWARDS ARROW} {dev['after'][name]:.3f}"
        return (
            f"adaptation helped; {shipped} (un-adapted hybrid \N{RIGHTWARDS ARROW} it: {gained};"
            f" dense side alone {dense})"
        )
    said = f"{shipped} ({name.upper()} {mine:.3f} {on}"
    if not trained:
        return f"{said})"
    adapted = ", ".join(f"{_NAMES[one]} {dev[one][name]:.3f}" for one in _ADAPTED)
    return f"adaptation of the retriever did not help here; {said}; {adapted})"
