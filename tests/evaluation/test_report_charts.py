"""Charts of the report: ticks, thinning, gaps, scales, text alternatives, what goes together."""

import math
import re

import numpy as np
import pytest
from report_parts import read

from ragjax.evaluation.calibration import ReliabilityBin
from ragjax.evaluation.report.charts import (
    Series,
    interval_bar,
    line_chart,
    reliability_diagram,
    share_bar,
    smooth,
    thin,
    ticks,
)
from ragjax.evaluation.report.curves import curves
from ragjax.evaluation.report.html import page


@pytest.mark.parametrize("low,high", [(0, 1), (0.2, 0.9), (-3, 7), (1000, 1001), (1e-6, 2e-6)])
def test_ticks_are_round_evenly_spaced_and_within(low, high):
    places = ticks(low, high)
    assert 2 <= len(places) <= 6
    assert all(low - 1e-9 * abs(low) <= place <= high + 1e-9 * abs(high) for place in places)
    steps = np.diff(places)
    assert steps == pytest.approx(np.full_like(steps, steps[0]))
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert any(mantissa == pytest.approx(m) for m in (1, 2, 2.5, 5))


def test_thinning_takes_means_and_keeps_gaps():
    values = [float(step) for step in range(1000)]
    thinned = thin(Series("a", range(1000), values), 300)
    assert len(thinned.x) == 250
    assert thinned.y[:2] == [1.5, 5.5] and thinned.x[:2] == [1.5, 5.5]
    gaps = thin(Series("a", range(8), [1.0, None, None, None, None, None, 3.0, 5.0]), 4)
    assert gaps.y == [1.0, None, None, 4.0]
    short = Series("a", [0], [None])
    assert thin(short) is short and thin(Series("a", [], [])).x == []


def test_smoothing_is_a_centred_mean():
    assert smooth([1.0, 2.0, None, 6.0, 2.0], 3) == [1.5, 1.5, None, 4.0, 4.0]


def points(svg, name):
    return [
        [tuple(map(float, pair.split(","))) for pair in run.split()]
        for run in re.findall(rf'<polyline class="{name}" points="([^"]*)"', svg)
    ]


def test_a_chart_draws_its_values_and_breaks_at_gaps():
    svg = line_chart(
        [Series("loss", [0, 1, 2, 3, 4, 5], [2.0, 1.0, None, 1.5, None, 2.0])],
        title="Loss <x>", x_label="step", y_label="nats",
    )  # fmt: skip
    runs = points(svg, "curve l0")
    assert [len(run) for run in runs] == [2]
    assert svg.count("<circle") == 2  # the values alone between gaps
    ((first, second),) = runs
    assert first[0] < second[0] and first[1] < second[1]  # a fall is drawn downwards
    shown = read(svg)
    (plot,) = [attrs for tag, attrs in shown.tags if tag == "svg"]
    assert plot["role"] == "img"
    assert "Loss <x>. loss: first 2.000, last 2.000, lowest 1.000" in plot["aria-label"]
    assert "2 missing" in plot["aria-label"] and "nats" in shown.text and "step" in shown.text


def test_every_point_is_inside_the_drawing(rng):
    for scale in (1e-6, 1.0, 1e6):
        values = (rng.normal(size=500) * scale).tolist()
        svg = line_chart(
            [Series("a", range(500), values)], title="t", x_label="x", y_label="y"
        )  # fmt: skip
        for run in points(svg, "raw l0") + points(svg, "curve l0"):
            assert len(run) <= 300
            assert all(0 <= x <= 360 and 0 <= y <= 212 for x, y in run)


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0], [-2.0, -2.0], [1e300, 1e300], [0.01, 23.0]])
def test_odd_values_can_be_drawn(values):
    svg = line_chart([Series("a", range(len(values)), values)], title="t", x_label="", y_label="")
    assert "nan" not in svg and "inf" not in svg
    read(svg)


def test_long_curves_are_averaged_and_say_so_but_a_sawtooth_is_not_smoothed():
    saw = Series("a", range(900), [float(step % 20) for step in range(900)])
    svg = line_chart([saw], title="t", x_label="x", y_label="y")
    assert "each point is the mean of 3 steps" in svg
    assert len(points(svg, "raw l0")) == 1 and len(points(svg, "curve l0")) == 1
    svg = line_chart([saw], title="t", x_label="x", y_label="y", smoothed_from=math.inf)
    assert points(svg, "raw l0") == [] and len(points(svg, "curve l0")[0]) == 300
    assert ">0</text>" in svg  # the axis begins at the first step, not at the first mean
    rows = [{"stage": "s", "step": step, "index/staleness_steps": step % 9} for step in range(90)]
    assert 'class="raw' not in curves(rows)


def test_a_wide_range_gets_a_logarithmic_axis():
    svg = line_chart(
        [Series("a", [0, 1, 2], [0.01, 1.0, 100.0])], title="t", x_label="x", y_label="y"
    )
    ((low, middle, high),) = points(svg, "curve l0")
    assert middle[1] == pytest.approx((low[1] + high[1]) / 2, abs=0.11)
    assert {"0.01", "1", "100"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def test_a_chart_without_values_says_so():
    shown = line_chart([Series("a", [0], [None])], title="t", x_label="x", y_label="y")
    assert "No value was logged" in shown and "<svg" not in shown


def test_several_curves_have_a_legend_and_differ_without_colour():
    two = [Series("p", [0, 1], [0.0, 1.0]), Series("<q>", [0, 1], [1.0, 0.0])]
    svg = line_chart(two, title="t", x_label="x", y_label="y")
    assert "&lt;q&gt;" in svg and svg.count("<li>") == 2
    style = page("t", "")
    assert ".l1.curve{stroke-dasharray" in style


def test_bars_and_whiskers_are_to_scale():
    bar = interval_bar(0.1, 0.05, 0.2, limit=0.2, label="l")
    assert 'x1="86.0" x2="134.0"' in bar and 'cx="102.0"' in bar
    assert 'cx="70.0"' in interval_bar(0, 0, 0, limit=0.0, label="l")
    assert '<rect class="f1" width="25.0"' in share_bar(0.25, 1, "l")
    assert 'width="100.0"' in share_bar(7, 0, "l")


def test_a_reliability_diagram_has_a_disc_per_bin():
    bins = [ReliabilityBin(0.1, 0.3, 0.2, 0.4, 9), ReliabilityBin(0.8, 1.0, 0.9, 0.5, 4)]
    svg = reliability_diagram(bins, title="t", note="n")
    discs = re.findall(r'<circle class="f0" cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"', svg)
    (x0, y0, r0), (x1, y1, r1) = [tuple(map(float, disc)) for disc in discs]
    assert x0 < x1 and y0 > y1 and (r0 - 2) / (r1 - 2) == pytest.approx(1.5, abs=0.03)
    assert "at probability .20, .40 of 9 right" in svg


def test_curves_group_the_values_and_join_the_rounds():
    rows = [{"stage": "lm", "step": s, "loss": 2.0 - s, "seconds": 0.1} for s in range(2)]
    for round in range(2):
        rows += [
            {
                "stage": f"retriever-{round}", "step": step, "loss": 1.0,
                "retriever_entropy": 0.9, "target_entropy": None, "index/staleness_steps": step,
                "index/recall": 1.0, "retrieval/recall": 0.5, "grad_norm": 1.0,
                "index/build_seconds": 3.0, "odd": float(step), "constant": 1.0,
                "marginal": 0.5, "marginal_nll": 2.0,
            }
            for step in range(3)
        ]  # fmt: skip
    shown = read(curves(rows))
    titles = re.findall(r"<strong>(.*?)</strong>", curves(rows))
    assert titles == [
        "Loss", "Time per step",
        "Loss", "Entropy over the candidates", "Terms of the loss",
        "Negative log-likelihood of the answer", "Right passage among the retrieved",
        "Staleness of the index", "Gradient norm", "odd",
    ]  # fmt: skip
    assert "Language model: 2 steps" in shown.text and "Retriever: 6 steps, 2 rounds" in shown.text
    loss = curves(rows).split("<strong>Loss</strong>")[2]
    ((*_, last),) = points(loss.split("</figure>")[0], "curve l0")
    assert last[0] == 350  # the sixth step is at the right edge
    assert loss.split("</figure>")[0].count('class="stage"') == 1
