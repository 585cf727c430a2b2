"""The lexical half of what is served, adapted: chosen on dev questions, written down, built again.

Off by default (`--lexical default`): on five sets of 1,500 to 3,000 passages the constants and the
stemmer that dev liked best gained nothing on test questions.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ragjax.data import passage_text
from ragjax.index import Bm25Index, HybridIndex
from ragjax.runs.compare.choice import choose, served_figure
from ragjax.runs.indexes import Retriever
from ragjax.runs.workspace import Workspace
from ragjax.storage import write_json

LEXICAL = "lexical.json"
_CONSTANTS = (0.9, 0.4)  # k1 and b of `Bm25Index.build`
_GRID = (_CONSTANTS, (0.6, 0.4), (1.2, 0.4), (0.6, 0.75), (0.9, 0.75), (1.2, 0.75))


class Lexical(NamedTuple):
    """What lexical.json holds: how the words of the passages are counted."""

    language: str  # whose stems: a name, "auto" or "none"
    k1: float
    b: float
    expansions: dict[str, list[str]]  # passage id to the questions written from it

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Returns what a run chose; None where it chose nothing.

        Raises:
            ValueError: The file is not one that a run writes.
        """
        path = folder / LEXICAL
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text("utf-8-sig")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}: not what a run writes there ({error}); the same command writes it again"
            ) from error

    def describe(self) -> str:
        """Returns the choice in words."""
        written = sum(map(len, self.expansions.values()))
        expanded = f", passages expanded with {written} written questions" if written else ""
        return f"stems {self.language}, k1 {self.k1:g}, b {self.b:g}{expanded}"


def adapted_bm25(workspace: Workspace, bm25: Bm25Index, folder: Path) -> Bm25Index:
    """Returns the index that goes with the trained encoder of a run.

    Args:
        workspace: Documents and options.
        bm25: The index by default, which is returned where the run chose nothing else.
        folder: Of the run.
    """
    lexical = Lexical.read(folder)
    if lexical is None or lexical == _default(workspace):
        return bm25
    workspace.log(f"BM25 beside the adapted encoder: {lexical.describe()}")
    corpus = workspace.dataset.corpus
    return Bm25Index.kept(
        corpus.cache,
        lambda: map(passage_text, corpus),
        identity=corpus.fingerprint,
        **_options(workspace, lexical),
        k1=lexical.k1,
        b=lexical.b,
    )


def adapt_bm25(workspace: Workspace, bm25: Bm25Index, retriever: Retriever) -> Bm25Index:
    """Chooses k1, b, the stems and whether passages are expanded, one at a time, on dev questions.

    A choice departs from the default where the hybrid's figure gains more than noise; it is written
    to `lexical.json`.

    Args:
        workspace: Data; the written ones among its training questions expand their passages.
        bm25: The index by default.
        retriever: Whose dense index and weight are the other half.

    Returns:
        The index of the choice, which may be `bm25`.
    """
    default = _default(workspace)
    chosen, figures, found = [default], [_figure(workspace, bm25, retriever)], [bm25]
    plans: list[tuple[Lexical, Sequence[tuple[float, float]]]] = [(default, _GRID[1:])]
    if bm25.language != "none":
        plans.append((default._replace(language="none"), _GRID[:1]))
    if written := written_questions(workspace):
        plans.append((default._replace(expansions=written), _GRID[:1]))
    for plan, constants in plans:
        indexes = _indexes(workspace, plan, constants)
        for (k1, b), index in zip(constants, indexes, strict=True):
            workspace.stop.check()
            chosen.append(plan._replace(k1=k1, b=b))
            figures.append(_figure(workspace, index, retriever))
            found.append(index)
    best = choose(figures) if len(figures[0]) else 0
    write_json(workspace.folder / LEXICAL, chosen[best]._asdict())
    kept = "the default is kept" if not best else "chosen"
    workspace.log(
        f"lexical: {len(chosen)} ways to count words on dev, {kept}: {chosen[best].describe()}"
    )
    return found[best]


def written_questions(workspace: Workspace) -> dict[str, list[str]]:
    """Returns passage id to the training questions that were written from that passage."""
    written: dict[str, list[str]] = {}
    for question in workspace.questions["train"]:
        if question.passage is not None:
            written.setdefault(question.passage, []).append(question.text)
    return written


def _default(workspace: Workspace) -> Lexical:
    return Lexical(workspace.config.data_options.language, *_CONSTANTS, {})


def _indexes(
    workspace: Workspace, lexical: Lexical, constants: Sequence[tuple[float, float]]
) -> Iterator[Bm25Index]:
    texts = map(passage_text, workspace.dataset.corpus)
    return Bm25Index.variants(texts, constants, **_options(workspace, lexical))


def _options(workspace: Workspace, lexical: Lexical) -> Any:
    corpus, written = workspace.dataset.corpus, lexical.expansions.items()
    # Another corpus, which `evaluate` may be given, has none of these passages.
    known = {corpus.row_of(id): texts for id, texts in written if id in corpus}
    return {"language": lexical.language, "expansions": known}


def _figure(workspace: Workspace, bm25: Bm25Index, retriever: Retriever) -> NDArray[np.float64]:
    weight = retriever.hybrid.dense_weight
    hybrid = HybridIndex(retriever.dense, bm25, dense_weight=weight)
    return served_figure(workspace, hybrid, retriever.query_params)
