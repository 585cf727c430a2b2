"""Which half gained: every retriever with every language model."""

import numpy as np
import pytest

from ragjax.evaluation import QuestionRecord
from ragjax.evaluation.report.checks import cells_section
from ragjax.runs.compare.answers import _even_batches
from ragjax.runs.compare.cells import format_cells, tabulate

OPTIONS = {"num_resamples": 50, "seed": 0}
F1 = {
    "closed_book": 0.1, "closed_book_lm_half": 0.2, "hybrid_before": 0.3, "hybrid_lm_half": 0.5,
    "hybrid_base_lm": 0.4, "hybrid": 0.6, "bm25": None,
}  # fmt: skip


def records(**f1):
    """Four questions, each with its value; of a system without one, retrieval alone."""
    values = {name: {"recall@5": 1.0} | ({} if v is None else {"f1": v}) for name, v in f1.items()}
    return {
        name: [
            QuestionRecord(id=str(row), system=name, question="?", metrics=metrics)
            for row in range(4)
        ]
        for name, metrics in values.items()
    }


def test_every_measured_cell_and_the_differences_along_both_sides():
    table = tabulate(records(**F1), **OPTIONS)
    cells = {(cell["lm"], cell["documents"]): cell["f1"]["value"] for cell in table["cells"]}
    assert cells == pytest.approx(
        {
            ("base", "none"): 0.1, ("adapted", "none"): 0.2, ("base", "hybrid_before"): 0.3,
            ("adapted", "hybrid_before"): 0.5, ("base", "hybrid"): 0.4, ("adapted", "hybrid"): 0.6,
        }
    )  # fmt: skip
    found = {
        (row["side"], row["system"], row["baseline"]): row["value"] for row in table["differences"]
    }
    assert found["lm", "hybrid_lm_half", "hybrid_before"] == pytest.approx(0.2)
    assert found["lm", "hybrid", "hybrid_base_lm"] == pytest.approx(0.2)
    assert found["documents", "hybrid", "hybrid_lm_half"] == pytest.approx(0.1)
    assert found["documents", "hybrid_base_lm", "hybrid_before"] == pytest.approx(0.1)
    text = format_cells(table)
    assert "4 questions" in text and "BM25" not in text
    base = next(line.split() for line in text.splitlines() if line.startswith("base"))
    assert base == ["base", ".100", ".300", ".400"]
    page = cells_section(table)
    assert "adapted hybrid" in page and "hybrid_lm_half" in page
    assert cells_section({}) == ""


def test_one_language_model_has_one_row():
    names = ("closed_book", "before", "after", "hybrid")
    table = tabulate(records(**dict(zip(names, np.arange(4) / 10, strict=True))), **OPTIONS)
    assert {cell["lm"] for cell in table["cells"]} == {"base"}
    assert [cell["documents"] for cell in table["cells"]] == ["none", "before", "after", "hybrid"]
    assert all(row["side"] == "documents" for row in table["differences"])


def test_nothing_to_compare_is_no_table():
    assert tabulate(records(closed_book=0.1, bm25=None), **OPTIONS) == {}


@pytest.mark.parametrize("devices", [1, 4])
def test_answers_are_generated_in_two_shapes(rng, devices):
    lengths = np.concatenate([rng.integers(10, 60, 50), rng.integers(300, 480, 45)])
    batches = _even_batches(lengths.tolist(), 2048, devices)
    assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(95))
    assert all(lengths[batch.rows].max() <= batch.length for batch in batches)
    assert len({(batch.length, batch.batch_size) for batch in batches}) == 2
    assert all(batch.batch_size % devices == 0 for batch in batches)
    assert all(batch.length * batch.batch_size <= 2048 * devices for batch in batches)
    # Few rows of padding.
    assert sum(batch.batch_size - len(batch.rows) for batch in batches) <= len(batches) * devices
    assert len(_even_batches([30], 8, devices)) == 1
