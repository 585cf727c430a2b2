"""The whole page of the report: hostile text, policy, headings, missing parts, colours."""

import base64
import dataclasses
import hashlib
import html
import re

import pytest
from report_parts import DIFFERENCES, HOSTILE, METRICS, cell, difference, explained, line, read

from ragjax.evaluation.report import ReportData, render_report
from ragjax.evaluation.report.html import page
from ragjax.evaluation.report.questions import PassageText


def everything():
    hostile = " ".join(HOSTILE)
    passages = {"g": PassageText(hostile, hostile + " Paris"), "x": PassageText("t", hostile)}
    explained_hostile = explained(settings={hostile: hostile})
    explained_hostile["questions"][0] |= {"question": hostile, "answers": [hostile]}
    return ReportData(
        title=hostile,
        facts={hostile: hostile},
        metrics={**METRICS, hostile: {hostile: cell(0.5), "n": 3}},
        other_metrics={"lm_half": {"f1": cell(0.123), "n": 40, "applicable": {"f1": 9}}},
        differences=[*DIFFERENCES, difference(hostile, 0.1, 0.0, 0.2, hostile, hostile)],
        steps=[{"stage": hostile, "step": s, "loss": 1.0, hostile: s} for s in range(3)],
        questions=[line("a", ["x", "g"], ["g", "x"], question=hostile) | {"answers": [hostile]}],
        gold={"a": ["g"]},
        passages=passages,
        explained=explained_hostile,
        calibration={hostile: {hostile: {"n": 3, "reliability": [], hostile: cell(0.2)}}},
        dev={"systems": {hostile: {hostile: cell(0.1)}}},
        teachers={"weights": {hostile: 1.0}, "language_model": hostile, "why": hostile,
                  "alone": {hostile: {hostile: 0.5}}},
        robustness={"n": 3, "conditions": {hostile: {hostile: cell(0.1)}},
                    "same_as_closed_book": cell(0.5)},
        support={hostile: {hostile: cell(0.1)}},
        cost={"seconds": {hostile: 3.0, "b": 4000.0}, "peak_memory_bytes": 2**31,
              "counts": {hostile: 12345}},
        config={hostile: {hostile: [hostile]}},
        notes=[hostile],
        problems=[hostile],
    )  # fmt: skip


def test_a_page_of_hostile_text_is_whole_and_asks_for_nothing():
    source = render_report(everything())
    source.encode("utf-8")
    shown = read(source)
    tags = {tag for tag, _ in shown.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attrs in shown.tags:
        assert not [name for name in attrs if name.startswith("on") or name in ("style", "src")]
        if "href" in attrs:
            assert tag == "a" and attrs["href"].startswith("#part-")
    assert "<script>alert(1)</script>" in shown.text  # as text
    ids = [attrs["id"] for _, attrs in shown.tags if "id" in attrs]
    links = [attrs["href"][1:] for tag, attrs in shown.tags if tag == "a"]
    assert len(ids) == len(set(ids)) and links == ids
    assert "2.0 GiB" in shown.text and "1 h 06 min" in shown.text


def test_the_policy_allows_the_style_by_hash_and_nothing_else():
    source = page("t", "<p>x</p>")
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = html.unescape(re.search(r'Policy" content="([^"]*)"', source)[1])
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert not re.search(r"url\(|@import|http", style)
    assert source.index("Content-Security-Policy") < source.index("<style>")


def test_headings_are_in_order_and_every_image_has_a_name():
    shown = read(render_report(everything()))
    levels = [int(tag[1]) for tag, _ in shown.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    for place, (tag, attrs) in enumerate(shown.tags):
        if tag == "svg" and attrs.get("aria-hidden") != "true":
            assert attrs["role"] == "img" and shown.tags[place + 1][0] == "title"
        if tag == "th":
            assert attrs["scope"] in ("row", "col", "rowgroup")


@pytest.mark.parametrize("left_out", [
    "metrics", "differences", "steps", "questions", "gold", "passages", "explained", "calibration",
    "dev", "teachers", "robustness", "support", "cost", "config", "notes", "problems", "facts",
    "other_metrics",
])  # fmt: skip
def test_any_part_may_be_missing(left_out):
    data = everything()
    empty = type(getattr(data, left_out))()
    read(render_report(dataclasses.replace(data, **{left_out: empty})))


def test_a_page_without_anything_is_still_a_page():
    shown = read(render_report(ReportData(title="empty")))
    assert "nothing to say about a change" in shown.text
    assert not [tag for tag, _ in shown.tags if tag == "section"]


def test_the_same_data_give_the_same_bytes():
    assert render_report(everything()) == render_report(everything())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_enough_contrast(scheme):
    style = re.search(r"<style>(.*?)</style>", page("t", ""), re.DOTALL)[1]
    light, dark = re.findall(r":root\{(.*?)\}", style, re.DOTALL)[:2]
    colours = dict(re.findall(r"--([\w-]+):(#\w+)", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([\w-]+):(#\w+)", dark))
    pairs = [(name, ground) for ground in ("page", "card") for name in
             ("ink", "soft", "accent", "better", "worse", "gold")]  # fmt: skip
    pairs += [("gold", "gold-fill"), ("ink", "gold-fill"), ("soft", "gold-fill"),
              ("mark-ink", "mark")]  # fmt: skip
    for name, ground in pairs:
        assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for name in ("s0", "s1", "s2", "s3", "s4", "s5"):
        assert contrast(colours[name], colours["card"]) >= 3.0, name


def contrast(first, second):
    """WCAG 2.2, relative luminance and contrast ratio."""

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)
