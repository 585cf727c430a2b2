"""Charts as inline SVG: curves over steps, a reliability diagram, bars and interval whiskers.

Shapes carry their meaning twice, by colour and by dash or symbol, and every chart its text
alternative. The same values give the same bytes.

Example:
    line_chart([Series("loss", [0, 1, 2], [3.1, None, 2.4])], title="Loss", x_label="step",
               y_label="nats")
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ragjax.evaluation.calibration import ReliabilityBin
from ragjax.evaluation.report.html import escape, number

_MAX_POINTS = 300
# A curve of at least this many points is also drawn smoothed, unless told otherwise.
_SMOOTHED_FROM = 40
# Drawn for the width of a phone, so that the labels are legible there.
_WIDTH, _HEIGHT = 360, 212
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 36
_STYLES = 6


class Series(NamedTuple):
    """One curve; a y of None is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


def thin(series: Series, limit: int = _MAX_POINTS) -> Series:
    """Returns at most `limit` points: each the mean over as many steps, without its gaps."""
    size = -(-len(series.x) // limit) if series.x else 1
    if size == 1:
        return series
    starts = range(0, len(series.x), size)
    means = [_mean(series.y[start : start + size]) for start in starts]
    places = [_mean(series.x[start : start + size]) or 0.0 for start in starts]
    return Series(series.name, places, means)


def smooth(values: Sequence[float | None], width: int) -> list[float | None]:
    """Returns means over a centred window of `width` values; gaps stay gaps."""
    half = width // 2
    return [
        None if value is None else _mean(values[max(0, place - half) : place + half + 1])
        for place, value in enumerate(values)
    ]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers within [low, high], evenly spaced."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    note: str = "",
    boundaries: Sequence[float] = (),
    smoothed_from: float = _SMOOTHED_FROM,
) -> str:
    """Returns a figure of curves with axes, ticks, legend and text alternative.

    The y axis is logarithmic where all values are positive and span more than a factor of 50.

    Args:
        series: Curves; thinned to 300 points each.
        title: What the chart shows.
        x_label: Name and unit of the x axis.
        y_label: Name and unit of the y axis.
        note: A sentence under the title.
        boundaries: x of vertical lines, where a new round begins.
        smoothed_from: Points from which on a running mean is drawn over a curve.
    """
    drawn = [thin(one) for one in series]
    values = [y for one in drawn for y in one.y if y is not None]
    places = [x for one in series for x in one.x]
    averaged = max((-(-len(one.x) // _MAX_POINTS) for one in series), default=1)
    if averaged > 1:
        note = "; ".join(filter(None, [note, f"each point is the mean of {averaged} steps"]))
    described = "; ".join(_described(one) for one in series)
    if not values:
        return _figure(title, note, '<p class="soft">No value was logged.</p>')
    scale = _scale(places, values)
    shapes = [_axes(scale, _whole_ticks(scale), x_label, y_label)]
    shapes += [
        f'<line class="stage" x1="{scale.x(x)}" x2="{scale.x(x)}" y1="{_TOP}"'
        f' y2="{_HEIGHT - _BOTTOM}"/>'
        for x in boundaries
    ]
    shapes += [_curve(scale, one, place, smoothed_from) for place, one in enumerate(drawn)]
    legend = "" if len(series) < 2 else _legend([one.name for one in series])
    return _figure(title, note, legend + _svg("".join(shapes), title=title, description=described))


def reliability_diagram(bins: Sequence[ReliabilityBin], *, title: str, note: str) -> str:
    """Returns a figure of the share of right answers over the predicted probability.

    The area of a disc is the number of answers in a bin; on the diagonal, probability and share
    agree.

    Args:
        bins: Bins of answers.
        title: What the chart shows.
        note: A sentence under the title.
    """
    scale = _Scale(0.0, 1.0, 0.0, 1.0, False)
    most = max((one.count for one in bins), default=1)
    places = ticks(0.0, 1.0)
    shapes = [_axes(scale, places, "predicted probability of the answer", "share that is right")]
    shapes.append(
        f'<line class="diagonal" x1="{scale.x(0)}" y1="{scale.y(0)}" x2="{scale.x(1)}"'
        f' y2="{scale.y(1)}"/>'
    )
    for one in bins:
        radius = round(2 + 8 * math.sqrt(one.count / most), 1)
        shapes.append(
            f'<circle class="f0" cx="{scale.x(one.confidence)}" cy="{scale.y(one.accuracy)}"'
            f' r="{radius}"><title>{one.count} answers</title></circle>'
        )
    described = "; ".join(
        f"at probability {number(one.confidence, 2)}, {number(one.accuracy, 2)} of {one.count}"
        " right"
        for one in bins
    )
    return _figure(title, note, _svg("".join(shapes), title=title, description=described))


def interval_bar(value: float, low: float, high: float, *, limit: float, label: str) -> str:
    """Returns a whisker from low to high around zero, with a dot at the value.

    Args:
        value: The difference.
        low: Lower end of its interval.
        high: Upper end.
        limit: Half the width of the axis, at least the largest absolute end.
        label: Text alternative.
    """
    half = limit if limit > 0 else 1.0
    x = [round(70 + 64 * max(-1.0, min(1.0, end / half)), 1) for end in (low, value, high)]
    return (
        f'<svg viewBox="0 0 140 18" width="140" height="18" role="img"><title>{escape(label)}'
        '</title><line class="axis" x1="70" x2="70" y1="1" y2="17"/>'
        f'<line class="whisker" x1="{x[0]}" x2="{x[2]}" y1="9" y2="9"/>'
        f'<circle class="point" cx="{x[1]}" cy="9" r="4"/></svg>'
    )


def share_bar(share: float, style: int, label: str) -> str:
    """Returns a horizontal bar for a share between 0 and 1.

    Args:
        share: The share.
        style: Number of the colour.
        label: Text alternative.
    """
    width = round(100 * max(0.0, min(1.0, share)), 1)
    return (
        '<svg viewBox="0 0 100 9" preserveAspectRatio="none" role="img">'
        f'<title>{escape(label)}</title><rect class="track" width="100" height="9"/>'
        f'<rect class="f{style % _STYLES}" width="{width}" height="9"/></svg>'
    )


class _Scale(NamedTuple):
    """From values to places in the drawing."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log: bool

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        place = math.log10(value) if self.log else value
        share = (place - self.y_low) / (self.y_high - self.y_low)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None


def _scale(places: Sequence[float], values: Sequence[float]) -> _Scale:
    log = min(values) > 0 and max(values) / min(values) > 50
    if log:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    else:
        low, high = min(values), max(values)
        # Shares are shown from 0 to 1 where they fill much of it; others with a little room.
        if 0 <= low and high <= 1 and high > 0.5:
            low, high = 0.0, 1.0
        elif 0 <= low < 0.35 * high:
            low = 0.0
    room = (high - low) * 0.05 if not log and (low, high) != (0.0, 1.0) else 0.0
    low, high = (low if low == 0 else low - room), high + room
    if not high > low:  # one value only: a line in the middle
        spread = abs(high) * 0.1 or 1.0
        low, high = low - spread, high + spread
    left, right = min(places), max(places)
    return _Scale(left, right if right > left else left + 1, low, high, log)


def _axes(scale: _Scale, x_ticks: Sequence[float], x_label: str, y_label: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for place, label in _y_ticks(scale):
        y = scale.y(place)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{round(y + 4, 1)}" text-anchor="end">{label}</text>'
        )
    for place in x_ticks:
        label = f"{place:,.0f}" if place == round(place) else f"{place:g}"
        x = scale.x(place)
        parts.append(f'<text x="{x}" y="{bottom + 14}" text-anchor="middle">{label}</text>')
    middle = round((_LEFT + right) / 2)
    height = round((_TOP + bottom) / 2)
    parts += [
        f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>',
        f'<text x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(10 {height}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    return "".join(parts)


def _whole_ticks(scale: _Scale) -> list[float]:
    """Returns round numbers of steps; there are no half steps."""
    return [place for place in ticks(scale.x_low, scale.x_high) if place == round(place)]


def _y_ticks(scale: _Scale) -> list[tuple[float, str]]:
    if scale.log:
        powers = range(math.ceil(scale.y_low), math.floor(scale.y_high) + 1)
        return [(10.0**power, f"{10.0**power:g}") for power in powers]
    places = ticks(scale.y_low, scale.y_high)
    step = places[1] - places[0] if len(places) > 1 else abs(places[0])
    digits = max(0, min(6, -math.floor(math.log10(step) + 1e-9))) if step else 0
    if len(places) > 1 and round(step, digits) != round(step, digits + 1):
        digits += 1  # steps of 0.25
    return [(place, _tick_label(place, digits)) for place in places]


def _tick_label(place: float, digits: int) -> str:
    if abs(place) >= 10_000:
        return f"{place:.3g}"
    text = f"{place:.{digits}f}"
    text = text.replace("-", "\N{MINUS SIGN}") if float(text) else text.lstrip("-")
    return text


def _curve(scale: _Scale, series: Series, style: int, smoothed_from: float) -> str:
    style %= _STYLES
    values = list(series.y)
    shapes = []
    if sum(value is not None for value in values) >= smoothed_from:
        shapes.append(_lines(scale, series.x, values, f"raw l{style}", style))
        values = smooth(values, max(5, len(values) // 12))
    shapes.append(_lines(scale, series.x, values, f"curve l{style}", style))
    return "".join(shapes)


def _lines(
    scale: _Scale, places: Sequence[float], values: Sequence[float | None], name: str, style: int
) -> str:
    runs: list[list[str]] = [[]]
    for x, y in zip(places, values, strict=True):
        if y is None:
            runs.append([])
        else:
            runs[-1].append(f"{scale.x(x)},{scale.y(y)}")
    shapes = []
    for run in runs:
        if len(run) == 1:
            x, y = run[0].split(",")
            shapes.append(f'<circle class="f{style}" cx="{x}" cy="{y}" r="2.5"/>')
        elif run:
            shapes.append(f'<polyline class="{name}" points="{" ".join(run)}"/>')
    return "".join(shapes)


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        '<li><svg viewBox="0 0 26 8" aria-hidden="true">'
        f'<line class="curve l{place % _STYLES}" x1="1" x2="25" y1="4" y2="4"/></svg>'
        f"{escape(name)}</li>"
        for place, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def _described(series: Series) -> str:
    values = [value for value in series.y if value is not None]
    gaps = len(series.y) - len(values)
    if not values:
        return f"{series.name}: no value"
    missing = f", {gaps} missing" if gaps else ""
    return (
        f"{series.name}: first {number(values[0])}, last {number(values[-1])}, lowest"
        f" {number(min(values))}, highest {number(max(values))}, {len(values)} values{missing}"
    )


def _figure(title: str, note: str, body: str) -> str:
    subtitle = f' <span class="soft">{escape(note)}</span>' if note else ""
    return (
        f'<figure class="chart"><figcaption><strong>{escape(title)}</strong>{subtitle}</figcaption>'
        f"{body}</figure>"
    )


def _svg(shapes: str, *, title: str, description: str) -> str:
    # One label instead of <desc> with ids: ids would have to be unique in the page.
    label = f"{title}. {description}." if description else title
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
        f' aria-label="{escape(label)}"><title>{escape(label)}</title>{shapes}</svg>'
    )
