"""The systems that are compared, and which differences between them are tested and shown."""

from typing import Literal, NamedTuple


class SystemKind(NamedTuple):
    """One system: a language model and the documents that it reads."""

    note: str
    lm: Literal["base", "adapted"]
    # None: closed book; `hybrid_before` and `hybrid`: BM25 with the encoder of `before`, `after`.
    # `reranked`: those of what is served, the best of them ranked again.
    documents: Literal["bm25", "before", "hybrid_before", "after", "hybrid", "reranked"] | None

    @property
    def num_adapted(self) -> int:
        """Number of its two models that are adapted."""
        return (self.lm == "adapted") + (self.documents in ("after", "hybrid", "reranked"))


# In the order of tables.
SYSTEMS = {
    "closed_book": SystemKind("the base language model without documents", "base", None),
    "bm25": SystemKind("documents by BM25", "base", "bm25"),
    "before": SystemKind("documents by the base encoder", "base", "before"),
    "after": SystemKind("documents by the adapted encoder", "adapted", "after"),
    "hybrid": SystemKind("documents by BM25 and the adapted encoder", "adapted", "hybrid"),
    "reranked": SystemKind(
        "documents of what is served, the best of them ranked again", "adapted", "reranked"
    ),
    "hybrid_before": SystemKind("documents by BM25 and the base encoder", "base", "hybrid_before"),
    "lm_half": SystemKind(
        "documents by the base encoder, read by the adapted language model", "adapted", "before"
    ),
    "closed_book_lm_half": SystemKind(
        "the adapted language model without documents", "adapted", None
    ),
    "hybrid_base_lm": SystemKind(
        "documents as hybrid, read by the base language model", "base", "hybrid"
    ),
    "hybrid_lm_half": SystemKind(
        "documents as hybrid_before, read by the adapted language model", "adapted", "hybrid_before"
    ),
    "after_base_lm": SystemKind(
        "documents as after, read by the base language model", "base", "after"
    ),
    "bm25_lm_half": SystemKind(
        "documents by BM25, read by the adapted language model", "adapted", "bm25"
    ),
}
# Documents of the systems, in the order of tables, and what they are called there.
DOCUMENTS = {
    "none": "closed book",
    "bm25": "BM25",
    "before": "dense",
    "hybrid_before": "hybrid",
    "after": "adapted dense",
    "hybrid": "adapted hybrid",
    "reranked": "re-ranked",
}
# Those that a run answers with by default: of what is served, and without documents, both language
# models, so that every cause of a difference is told apart. Answers cost the most time.
SERVED_SYSTEMS = (
    "closed_book",
    "closed_book_lm_half",
    "hybrid_before",
    "hybrid_lm_half",
    "hybrid_base_lm",
    "hybrid",
    "reranked",
)
# In the table and the metrics.json of a run, with `reranked` where there is one; the others are in
# its differences.json.
MAIN_SYSTEMS = ("closed_book", "bm25", "before", "after", "hybrid")

# (system, baseline) to the metrics whose differences are printed; files hold those of all metrics.
PAIRS: dict[tuple[str, str], tuple[str, ...]] = {
    ("after", "before"): (
        "recall@5",
        "mrr@10",
        "f1",
        "answer_nll",
        "hallucination",
        "corpus_hallucination",
    ),
    ("hybrid", "hybrid_before"): (
        "recall@5",
        "f1",
        "answer_nll",
        "hallucination",
        "corpus_hallucination",
    ),
    ("hybrid", "bm25"): ("recall@5", "f1"),
    ("reranked", "hybrid"): ("recall@1", "recall@5", "mrr@10", "f1"),
    ("reranked", "hybrid_before"): ("recall@5", "mrr@10"),
    ("reranked", "after"): (),
    ("reranked", "bm25"): ("recall@5", "mrr@10"),
    ("hybrid_before", "bm25"): ("recall@5",),
    ("before", "closed_book"): ("f1", "answer_nll", "corpus_hallucination"),
    ("hybrid_before", "closed_book"): ("corpus_hallucination",),
    ("after", "closed_book_lm_half"): ("f1", "answer_nll", "corpus_hallucination"),
    ("hybrid", "closed_book_lm_half"): ("corpus_hallucination",),
    ("after", "closed_book"): ("corpus_hallucination",),
    ("hybrid", "closed_book"): ("corpus_hallucination",),
    ("closed_book_lm_half", "closed_book"): (),
    ("lm_half", "before"): ("f1", "answer_nll"),
    ("hybrid", "hybrid_base_lm"): ("f1", "answer_nll"),
    ("hybrid_lm_half", "hybrid_before"): ("f1", "answer_nll"),
}
COMPARED_PAIRS = tuple(PAIRS)
# Those of a run's own table, in the order of its differences.json.
RUN_PAIRS = (
    ("after", "before"),
    ("lm_half", "before"),
    ("hybrid", "hybrid_base_lm"),
    ("before", "closed_book"),
    ("after", "closed_book_lm_half"),
    ("hybrid", "bm25"),
    ("hybrid", "hybrid_before"),
    ("hybrid_lm_half", "hybrid_before"),
    ("closed_book_lm_half", "closed_book"),
    ("reranked", "hybrid"),
    ("reranked", "hybrid_before"),
    ("reranked", "after"),
    ("reranked", "bm25"),
)
