"""The pure parts of the report: escaping, numbers, verdicts, selection, tables."""

import math
import re

import pytest
from report_parts import DIFFERENCES, HOSTILE, METRICS, cell, difference, explained, line, read

from ragjax.evaluation.report.checks import (
    calibration_section,
    dev_section,
    robustness_section,
    teachers_section,
)
from ragjax.evaluation.report.explained import divergence, explained_section
from ragjax.evaluation.report.html import escape, excerpt, isolated, number, signed, table
from ragjax.evaluation.report.questions import (
    PassageText,
    by_answer,
    by_passage,
    changes,
    questions_section,
    select,
    shown_documents,
)
from ragjax.evaluation.report.results import (
    differences_tables,
    findings,
    lower_is_better,
    main_pair,
    results_table,
    verdict,
)


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_text_reads_back_as_what_html_can_hold(text):
    shown = read(f"<p>{escape(text)}</p>")
    assert [tag for tag, _ in shown.tags] == ["p"]
    expected = "".join(
        "\ufffd"
        if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0
        or 0xD800 <= ord(c) < 0xE000 or ord(c) in (0xFFFE, 0xFFFF)
        else c
        for c in text
    )  # fmt: skip
    assert shown.text == expected
    escape(text).encode("utf-8")
    quoted = read(f'<p title="{escape(text)}"></p>')
    assert quoted.tags == [("p", {"title": expected})]


def test_isolated_text_is_in_a_bdi():
    assert isolated("a<b") == '<bdi dir="auto">a&lt;b</bdi>'


@pytest.mark.parametrize(
    "value,expected",
    [(0.5641, ".564"), (-0.01, "−.010"), (7.4481, "7.448"), (0.0, ".000"), (-0.0001, ".000"),
     (1.0, "1.000"), (0.9999, "1.000"), (None, "–"), (float("nan"), "–"), (True, "–"), ("1", "–")],
)  # fmt: skip
def test_numbers(value, expected):
    assert number(value) == expected


@pytest.mark.parametrize("value,expected", [(0.1, "+.100"), (-0.1, "−.100"), (0, ".000")])
def test_signed_numbers(value, expected):
    assert signed(value) == expected


def test_a_table_has_scoped_headers_and_its_own_scrolling_box():
    shown = read(table(["a", "b"], [["x", "y"]], caption="what <it> shows"))
    scopes = [attrs["scope"] for tag, attrs in shown.tags if tag == "th"]
    assert scopes == ["col", "col", "row"]
    (box,) = [attrs for tag, attrs in shown.tags if attrs.get("class") == "scroll"]
    assert box["tabindex"] == "0" and box["aria-label"] == "what <it> shows"


def test_an_excerpt_marks_whole_words_in_any_case():
    found = excerpt("paris is not Parisian, but PARIS  is <b>Paris</b>", ["Paris"])
    assert re.findall("<mark>(.*?)</mark>", found) == ["paris", "PARIS", "Paris"]
    assert "&lt;b&gt;" in found


def test_an_excerpt_goes_to_the_answer_and_says_what_it_left_out():
    text = "word " * 200 + "the answer is forty-two (42). " + "word " * 200
    found = excerpt(text, ["forty-two"], length=100)
    assert "<mark>forty-two</mark>" in found
    assert found.startswith("…") and found.endswith("…") and len(found) < 160
    assert not re.search(r"…ord|wor…", found)
    assert excerpt(text, ["nowhere"], length=20).startswith("word word")


def test_an_excerpt_never_cuts_a_drawn_character():
    text = "👩🏽‍🔬" * 100
    for length in range(1, 60):
        shown = excerpt(text, [], length=length).rstrip("…")
        assert len(shown) == 1 or len(shown) % 4 == 0


def test_overlapping_and_blank_answers_are_marked_once():
    found = excerpt("New York City", ["New York", "York City", "", "  "])
    assert found == "<mark>New York</mark> City"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_passages_and_answers_stay_text(text):
    for answers in ([], [text], [text[:5]]):
        shown = read(f"<p>{excerpt(text, answers)}</p>")
        assert {tag for tag, _ in shown.tags} <= {"p", "mark"}


def test_lower_is_better_for_losses_only():
    assert [name for name in ("answer_nll", "ece", "brier", "aurc", "hallucination")
            if not lower_is_better(name)] == []  # fmt: skip
    assert [name for name in ("recall@5", "f1", "mrr@10", "precision", "auroc", "supported")
            if lower_is_better(name)] == []  # fmt: skip


def test_findings_say_better_worse_undecided_or_same():
    rows = [
        difference("recall@5", 0.1, 0.05, 0.2),
        difference("f1", -0.1, -0.2, -0.05),
        difference("mrr@10", 0.1, -0.05, 0.2),
        difference("answer_nll", 0.1, 0.05, 0.2),
        difference("brier", -0.1, -0.2, -0.05),
        difference("ndcg@10", 0.0, 0.0, 0.0),
    ]
    states = {one.metric: one.state for one in findings(METRICS, rows)}
    assert states == {
        "recall@5": "better", "f1": "worse", "mrr@10": "undecided", "answer_nll": "worse",
        "brier": "better", "ndcg@10": "same",
    }  # fmt: skip


def test_the_verdict_is_a_sentence_with_the_numbers():
    found = findings(METRICS, DIFFERENCES)
    assert verdict(found, ("after", "before")) == (
        "Better in 2 of 3 (after against before): recall@5 rose from .564 to .708 (+.144 [+.108,"
        " +.182]); answer_nll fell from 3.100 to 2.400 (−.700 [−.900, −.500], lower is better); no"
        " measurable change of f1 (+.010 [−.020, +.040])."
    )


@pytest.mark.parametrize(
    "rows,opening",
    [
        ([difference("f1", 0.01, -0.1, 0.1)], "No measurable change"),
        ([difference("f1", -0.2, -0.3, -0.1)], "Worse"),
        ([difference("f1", 0.2, 0.1, 0.3)], "Better"),
        (
            [difference("f1", 0.2, 0.1, 0.3), difference("recall@5", -0.2, -0.3, -0.1)],
            "Better in 1 of 2, worse in 1 of 2",
        ),
    ],
)
def test_the_verdict_is_honest(rows, opening):
    assert verdict(findings(METRICS, rows), ("after", "before")).startswith(opening + " (after")


def test_without_a_comparison_the_verdict_says_so():
    assert "nothing to say" in verdict([], None)
    assert main_pair({}, []) is None
    assert main_pair({}, [difference("f1", 0, 0, 0, "x", "y")]) == ("x", "y")
    rows = [difference("f1", 0, 0, 0, "x", "y"), *DIFFERENCES]
    assert main_pair({}, rows) == ("after", "before")
    assert main_pair(METRICS, []) == ("after", "before")


def test_the_table_stars_the_best_of_each_metric():
    rows = re.findall(r"<tr>.*?</tr>", results_table(METRICS))
    starred = {}
    for row in rows:
        cells = re.findall(r"<td>(.*?)</td>", row)
        if cells:
            starred[read(row).text.split("\n")[0][:6]] = ['class="best"' in one for one in cells]
    assert starred == {
        "recall": [False, True], "f1.300": [False, True], "answer": [False, True],
        "questi": [False, False],
    }  # fmt: skip
    same = {name: {"f1": cell(0.5), "n": 3} for name in ("before", "after")}
    assert 'class="best"' not in results_table(same)


def test_the_differences_open_with_the_main_pair():
    rows = [difference("f1", 0.1, 0.05, 0.2, "hybrid", "bm25"), *DIFFERENCES]
    shown = differences_tables(findings(METRICS, rows), ("after", "before"))
    boxes = [attrs for tag, attrs in read(shown).tags if tag == "details"]
    assert ["open" in box for box in boxes] == [True, False]
    assert shown.index("after") < shown.index("hybrid")
    assert "&lt; .001" in shown  # p of answer_nll


def test_changes_are_those_of_the_first_relevant_passage():
    lines = [
        line("a", ["x", "g", "y"], ["g", "x"], f1=(0.2, 0.7)),
        line("b", ["g"], ["x", "y", "z"], f1=(1.0, 1.0)),
        line("c", [], []),
        {"id": "d", "systems": {"after": {}}},
    ]
    gold = {"a": ["g"], "b": ["g", "h"], "c": ["g"]}
    found = changes(lines, ("after", "before"), gold)
    assert [(c.rank_before, c.rank_after) for c in found] == [(2, 1), (1, None), (None, None)]
    assert [c.passage_change for c in found] == [0.5, -1.0, None]
    assert [c.answer_change for c in found] == pytest.approx([0.5, 0.0, 0.0])


def test_without_judgements_the_metric_takes_the_place_of_the_rank():
    one = line("a", ["x"], ["y"])
    one["systems"]["after"]["metrics"]["mrr@10"] = 0.25
    (found,) = changes([one], ("after", "before"), {})
    assert found.passage_change == 0.25 and found.rank_after is None


def test_the_largest_changes_come_first_and_ties_go_by_id():
    lines = [
        line("d", ["x", "g"], ["g"]),
        line("b", ["x", "g"], ["g"]),
        line("c", ["x", "y", "z", "g"], ["g"]),
        line("a", ["g"], ["x", "g"]),
        line("e", ["g"], ["g"]),
    ]
    found = changes(lines, ("after", "before"), {id: ["g"] for id in "abcde"})
    chosen = select(found, by_passage, 2)
    assert [one.line["id"] for one in chosen.won] == ["c", "b"]
    assert [one.line["id"] for one in chosen.lost] == ["a"]
    assert (chosen.num_won, chosen.num_lost, chosen.num_same) == (3, 1, 1)
    assert select(found, by_answer, 2).num_same == 5


def test_the_card_shows_both_sides_with_the_relevant_passage():
    deep = [f"d{n}" for n in range(9)] + ["g"]
    lines = [line("a", deep, ["g", "d1"], f1=(0.0, 1.0), question="where <is> it?")]
    passages = {
        "g": PassageText("Title & co", "It is in Paris.", "a<b>.pdf, page 3"),
        "d1": PassageText("", "no"),
    }
    gold = {"a": ["g"]}
    shown = read(questions_section(lines, ("after", "before"), gold, passages.get))
    text = shown.text
    assert "where <is> it?" in text and "rank 10 → 1" in text and "1 of 1 questions won" in text
    assert text.count("★ relevant") == 2 and text.count("Title & co") == 2
    assert text.count("a<b>.pdf, page 3") == 2
    assert text.count("The text is not at hand.") == 2  # d0, d2; d1 has a text but no title
    assert "d1" in text
    assert set(shown_documents(lines, ("after", "before"), gold)) == {"g", "d0", "d1", "d2"}


def test_the_views_are_bars_with_the_distance_before_and_after():
    shown = explained_section(explained(), lambda doc: None)
    before = 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.75)
    after = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert f"{before:.3f}".lstrip("0") in shown and f"{after:.3f}".lstrip("0") in shown
    widths = re.findall(r'<rect class="f(\d)" width="([\d.]+)"', shown)
    assert widths[:4] == [("0", "75.0"), ("1", "25.0"), ("2", "50.0"), ("3", "90.0")]
    assert "&lt;d&gt;" in shown
    assert divergence([1.0, 0.0], [1.0, 0.0]) == 0.0


def test_calibration_shows_tables_and_diagrams_per_confidence():
    rows = [{"low": 0.1, "high": 0.3, "confidence": 0.2, "accuracy": 0.4, "count": 7}]
    node = {"n": 7, "ece": cell(0.123), "reliability": rows}
    shown = calibration_section({"before": {"confidence": node}, "after": {"confidence": node}})
    text = read(shown).text
    assert shown.count("<figure") == 2 and ".123" in text and "7 answers" in text
    assert "ece" in text and "before" in text


def test_dev_and_robustness_are_tables():
    values = {
        "n": 1012,
        "conditions": {"gold": {"f1": cell(0.61), "n": 12}, "both": {"f1": cell(0.42), "n": 12}},
        "differences": [difference("f1", -0.19, -0.3, -0.1, "both", "gold")],
        "same_as_closed_book": cell(0.87),
    }
    text = read(robustness_section(values)).text
    for part in ("1,012", ".610", ".420", "−.190", ".610 → .420", "▼ worse", ".870 ["):
        assert part in text
    systems = {"before": {"f1": cell(0.61)}, "<x>": {"f1": cell(0.42)}}
    shown = read(dev_section({"systems": systems, "differences": []})).text
    assert "Systems" in shown and "<x>" in shown and "Differences" not in shown
    assert robustness_section({}) == dev_section({}) == ""


def test_teachers_are_tables():
    values = {
        "weights": {"answer": 1.0, "prior": 0.3},
        "language_model": "adapted",
        "why": "chosen on 40 dev questions",
        "alone": {"adapted": {"answer": 0.863, "prior": 0.783}},
        "mixtures": [
            {"language_model": "base", "weights": {"<x>": 2.0}, "mrr": 0.911},
        ],
    }
    text = read(teachers_section(values)).text
    for part in ("answer=1.0 prior=0.3", "chosen on 40", ".863", ".783", "<x>=2.0", ".911"):
        assert part in text
    assert "Each alone" not in teachers_section({"weights": {"answer": 1.0}})
    assert teachers_section({}) == ""
