"""The pictures of a report: ε by round, what ε means, noise against signal, accuracy and bytes.

Lines and dots as inline SVG: no scripts, the same bytes every time. Colours are the page's CSS
variables, so that the page decides light and dark; a title and a description are inside for those
who do not see the picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

from privrec.report.model import Curve, Metric, Point2, Report
from privrec.report.words import amount_text, bytes_text, delta_text
from privrec.run.record import adversary_text, epsilon_text

MARKED = 30
"""Most points of a line for each to be marked with a dot."""

WIDE = (533.0, 194.0)
HALF = (259.0, 187.0)
_LETTER = 5.0  # mean width of a letter at size 9
_COLOURS = ("first", "second", "third", "fourth")

XY = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a picture: ``(x, y)`` by growing x, and what is written beside its last point."""

    points: Sequence[XY]
    end: str = ""


@dataclass(frozen=True)
class Dot:
    """One value of a row of dots, with the ends of its interval if it has one."""

    value: float
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Plot:
    """A picture with its words, and what stands around its lines.

    Attributes:
        key: begins every id inside.
        size: width and height, points.
        rounds: whether the lower axis counts rounds.
        log: whether the left axis, or the only one of a row of dots, is logarithmic.
        limit: a dashed line across, with its words.
        colour: of the first line, counted from 0.
    """

    key: str
    title: str
    description: str
    caption: str = ""
    size: XY = HALF
    x: str = "round"
    y: str = ""
    rounds: bool = True
    log: bool = False
    limit: tuple[float, str] | None = None
    colour: int = 0
    svg: str = ""

    @property
    def wide(self) -> bool:
        """Whether the picture takes the page's whole width."""
        return self.size == WIDE


# --------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class _Axis:
    """Maps values from ``low`` to ``high`` to places from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int, *, whole: bool = False) -> list[float]:
        """At most ``most`` round numbers within the axis, evenly spread."""
        if not self.log or self.high < 10 * self.low:
            return _steps(self.low, self.high, most, 1.0 if whole else 0.0)
        span = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1,)):
            found = [digit * 10.0**power for power in span for digit in digits]
            found = [value for value in found if self.low <= value * 1.0001 <= self.high * 1.0002]
            if len(found) <= most:
                return found
        return found[:: math.ceil(len(found) / most)]


def _steps(low: float, high: float, most: int, least: float) -> list[float]:
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    steps = (max(unit * factor, least) for factor in (1, 2, 2.5, 5, 10, 20))
    step = next(s for s in steps if (high - low) / s < most and (s % 1 == 0 or not least))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * place for place in range(first, last + 1)]


def _span(values: Sequence[float], *, log: bool, margin: float = 0.0) -> XY:
    """The least and largest value, set apart where they are equal, and widened by a share."""
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
    if low == high:
        low, high = low - 0.5, high + 0.5
    more = margin * (high - low)
    low, high = low - more, high + more
    return (10**low, 10**high) if log else (low, high)


def _text(x: float, y: float, words: str, *, colour: str = "ink", anchor: str = "start") -> str:
    """Text of one line or several, the middle of which is at ``y``."""
    rows = words.split("\n")
    first = y + 3 - 5.5 * (len(rows) - 1)
    spans = "".join(
        f'<tspan x="{x:.1f}" y="{first + 11 * place:.1f}">{escape(row)}</tspan>'
        for place, row in enumerate(rows)
    )
    return f'<text text-anchor="{anchor}" fill="var(--{colour})">{spans}</text>'


def _path(points: Sequence[XY], colour: str, width: float = 1.8, dashes: str = "") -> str:
    places = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<polyline points="{places}" fill="none" stroke="var(--{colour})" '
        f'stroke-width="{width}"{dashed}/>'
    )


def _circle(x: float, y: float, colour: str, radius: float = 2.75) -> str:
    return f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{radius}" fill="var(--{colour})"/>'


def _drawn(plot: Plot, size: XY, body: Sequence[str]) -> Plot:
    key, (width, height) = plot.key, size
    svg = (
        f'<svg class="plot" role="img" viewBox="0 0 {width:g} {height:g}" font-size="9" '
        f'aria-labelledby="{key}-title" aria-describedby="{key}-text" '
        'font-family="var(--sans)" xmlns="http://www.w3.org/2000/svg">'
        f'<title id="{key}-title">{escape(plot.title)}</title>'
        f'<desc id="{key}-text">{escape(plot.description)}</desc>{"".join(body)}</svg>'
    )
    return replace(plot, svg=svg)


def _lower(axis: _Axis, y: float, plot: Plot, *, top: float | None = None) -> Iterator[str]:
    """The lower axis: ticks with lines up to ``top`` if it is given, figures and a name."""
    for value in axis.ticks(6, whole=plot.rounds and top is None):
        x = axis(value)
        yield _path([(x, y + 3), (x, y if top is None else top)], "rule", 0.6)
        yield _text(x, y + 10, delta_text(value), colour="muted", anchor="middle")
    yield _path([(axis.start, y), (axis.end, y)], "rule", 0.8)
    yield _text((axis.start + axis.end) / 2, y + 23, plot.x, colour="muted", anchor="middle")


def _axes(
    plot: Plot, heights: XY, across: XY, letters: int, *, log: bool = False
) -> tuple[_Axis, _Axis, list[str]]:
    """The lower and the left axis and the lines around them, with room for ``letters`` beside."""
    left, right, bottom = 42, plot.size[0] - 8 - letters * _LETTER, plot.size[1] - 30
    vertical = _Axis(*heights, bottom, 18, log)
    horizontal = _Axis(*across, left, right)
    body = []
    for value in vertical.ticks(6):
        body.append(_path([(left, vertical(value)), (right, vertical(value))], "rule", 0.6))
        figure = delta_text(value)
        body.append(_text(left - 5, vertical(value), figure, colour="muted", anchor="end"))
    if plot.y:
        body.append(_text(left - 5, vertical.end - 11, plot.y, colour="muted", anchor="end"))
    if plot.limit is not None:
        value, words = plot.limit
        y = vertical(value)
        body.append(_path([(left, y), (right, y)], "muted", 1, "4 3"))
        body.append(_text((left + right) / 2, y - 7, words, colour="muted", anchor="middle"))
    return horizontal, vertical, [*body, *_lower(horizontal, bottom, plot)]


def lines(plot: Plot, drawn: Sequence[Line]) -> Plot:
    """Draw lines; short ones have their points marked."""
    heights = [y for line in drawn for _, y in line.points]
    ends = [*heights, *([plot.limit[0]] if plot.limit else [])]
    log = plot.log and min(ends) > 0
    low, high = _span(ends, log=log, margin=0.05)
    if not log and min(heights) >= 0:
        low = 0.0
    letters = max(len(row) for line in drawn for row in line.end.split("\n"))
    last = max(line.points[-1][0] for line in drawn)
    horizontal, vertical, body = _axes(plot, (low, high), (0, last), letters, log=log)
    marked = plot.rounds and len(drawn[0].points) <= MARKED
    for line, colour in zip(drawn, _COLOURS[plot.colour :], strict=False):
        places = [(horizontal(x), vertical(y)) for x, y in line.points]
        body.append(_path(places, colour))
        body += [_circle(*place, colour, 1.6) for place in places if marked]
        body.append(_text(horizontal.end + 6, places[-1][1], line.end, colour=colour))
    return _drawn(plot, plot.size, body)


def dots(plot: Plot, names: Sequence[str], series: Mapping[str, Sequence[Dot]]) -> Plot:
    """Draw named rows of dots, which give the height, in order; several series get a legend."""
    found = [dot for row in series.values() for dot in row]
    width, height = plot.size[0], 54 + 22.0 * len(names)
    left = 14 + _LETTER * max(len(_shortened(name)) for name in names)
    right = width - 8 - _LETTER * max(len(dot.text) for dot in found)
    log = plot.log and min(_ends(found)) > 0
    axis = _Axis(*_span(_ends(found), log=log, margin=0.06), left, right, log)
    body = list(_lower(axis, height - 30, plot, top=18))
    for place, name in enumerate(names):
        body.append(_text(left - 8, 29 + 22 * place, _shortened(name), anchor="end"))
    for order, (title, row) in enumerate(series.items()):
        colour = _COLOURS[plot.colour + order]
        for place, dot in enumerate(row):
            y = 29 + 22.0 * place
            last = dot.value if dot.high is None else dot.high
            if dot.low is not None:
                body.append(_path([(axis(dot.low), y), (axis(last), y)], colour))
            body.append(_circle(axis(dot.value), y, colour))
            body.append(_text(axis(last) + 8, y, dot.text))
        if len(series) > 1:
            x = width - 110 * (len(series) - order)
            body += [_circle(x, 8, colour), _text(x + 8, 8, title)]
    return _drawn(plot, (width, height), body)


def _ends(found: Sequence[Dot]) -> list[float]:
    return [end for dot in found for end in (dot.value, dot.low, dot.high) if end is not None]


def _shortened(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:31]}…"


# --------------------------------------------------------------------------- the pictures


def plots(report: Report) -> Iterator[Plot]:
    """The pictures of one run's rounds, ε first; a curve of one point is left out."""
    drawable = {curve.key: curve for curve in report.curves if len(curve.points) > 1}
    spent, known = drawable.pop("epsilon", None), drawable.pop("epsilon_server", None)
    loss = drawable.pop("loss", None)
    others = [*list(drawable.values())[:1], *([loss] if loss else [])]
    if spent:
        yield _epsilon(report, spent, known)
    for curve in others:
        yield _outside(report, curve, size=HALF if len(others) > 1 else WIDE)


def _points(curve: Curve) -> list[XY]:
    return [(point.round, point.value) for point in curve.points]


def _epsilon(report: Report, recipients: Curve, server: Curve | None) -> Plot:
    budget = report.privacy.budget
    named = {"recipients": recipients, "cohorts known": server}
    if server is None or server.points == recipients.points:
        named = {"both adversaries": recipients}
    drawn = [
        Line(_points(curve), f"{name}\nε = {epsilon_text(curve.points[-1].value)}")
        for name, curve in named.items()
        if curve is not None
    ]
    said = "; ".join(f"{line.end.replace(chr(10), ' ')} after the last round" for line in drawn)
    ends = [line.points[-1][1] for line in drawn]
    caption = (
        f"Spent privacy, computed from the ledger at δ = {delta_text(report.privacy.delta)}. "
        "Lower is more private."
    )
    if budget:
        against = adversary_text(report.privacy.budget_against)
        caption += f" The budget is {budget:g} against {against}."
    plot = Plot(
        key="epsilon",
        title="ε by round",
        description=f"ε grows with every round: {said}.",
        caption=caption,
        size=WIDE,
        y="ε",
        log=max(ends) > 5 * min(ends) > 0,
        limit=(budget, f"budget {budget:g}") if budget else None,
    )
    return lines(plot, drawn)


def _outside(report: Report, curve: Curve, *, size: XY) -> Plot:
    loss = curve.key == "loss"
    first, last = curve.points[0], curve.points[-1]
    split = f"{str(report.accuracy.holdout).capitalize()} split"
    plot = Plot(
        key="loss" if loss else "metric",
        title=f"{curve.name} by round",
        description=f"{curve.name} goes from {first.value:.3g} in round {first.round} to "
        f"{last.value:.3g} in round {last.round}.",
        caption=f"{'Mean over the devices of a round' if loss else split}; {curve.note}.",
        size=size,
        colour=3 if loss else 2,
    )
    return lines(plot, [Line(_points(curve), f"{last.value:.3f}")])


def risks(report: Report) -> Iterator[Plot]:
    """What ε and δ mean, as curves: all pairs that hold, and the errors of any test."""
    if not report.privacy.private:
        return
    accounting, reading = report.accounting, report.reading
    if accounting and any(point.x for point in accounting.curve):
        recipients, known = _xy(accounting.curve), _xy(accounting.curve_server)
        two = bool(known) and known != recipients
        second = " Lower line: recipients; upper: cohorts known." if two else ""
        plot = Plot(
            key="pairs",
            title="ε at other values of δ",
            description=f"δ falls from {recipients[0][1]:.2g} at ε = {recipients[0][0]:.3g} to "
            f"{recipients[-1][1]:.2g} at ε = {recipients[-1][0]:.3g}.",
            caption=f"The smallest δ for each ε. All of these pairs hold at once.{second}",
            x="ε",
            y="δ",
            rounds=False,
            log=True,
            limit=(accounting.delta, f"δ = {delta_text(accounting.delta)}"),
        )
        yield lines(plot, [Line(recipients), *([Line(known)] if two else [])])
    plot = Plot(
        key="trade-off",
        title="Errors of any membership test",
        description="The least chance of a miss by the chance of a false alarm; without the data "
        f"they add up to 1, here to at least {1 - reading.advantage:.2f}.",
        caption="The least misses at each share of false alarms, against recipients. The straight "
        "line is guessing.",
        x="false alarms",
        y="misses",
        rounds=False,
    )
    yield lines(plot, [Line(_xy(reading.trade_off)), Line([(0.0, 1.0), (1.0, 0.0)])])


def _xy(points: Sequence[Point2]) -> list[XY]:
    return sorted((point.x, point.y) for point in points)


def by_tier(report: Report) -> Iterator[Plot]:
    """Noise against signal by band, and bytes by tier, of a run with several capacities."""
    bands = report.mechanism.bands if report.mechanism else ()
    if len(bands) > 1:
        names = [f"from capacity {band.capacity:g}" for band in bands]
        noise = [Dot(band.noise_norm, amount_text(band.noise_norm)) for band in bands]
        signal = [Dot(band.signal_norm, amount_text(band.signal_norm)) for band in bands]
        said = "; ".join(
            f"{name}: noise {band.noise_norm:.3g}, signal at most {band.signal_norm:.3g}"
            for name, band in zip(names, bands, strict=True)
        )
        title = "Noise against signal, by band"
        caption = (
            "Expected norm of the noise in what each weaker tier holds, and the largest that the "
            "sum of all updates can have there."
        )
        plot = Plot("bands", title, f"{said}.", caption, WIDE, x="L2 norm", log=True)
        yield dots(plot, names, {"noise": noise, "signal, at most": signal})
    tiers = [tier for tier in report.tiers if tier.upload_bytes]
    if len(tiers) > 1:
        names = [f"capacity {tier.capacity:g}" for tier in tiers]
        sent = [Dot(float(tier.upload_bytes or 0), bytes_text(tier.upload_bytes)) for tier in tiers]
        said = "; ".join(f"{name}: {dot.text}" for name, dot in zip(names, sent, strict=True))
        title, caption = "Upload by capacity", "Bytes that one device sends in a round."
        plot = Plot("bytes", title, f"{said}.", caption, WIDE, x="bytes", log=True, colour=2)
        yield dots(plot, names, {"upload": sent})


def intervals(metrics: Mapping[str, Metric], heading: str) -> str:
    """Draw one metric of several runs, by their names, as dots with their intervals."""
    said = "; ".join(f"{name}: {metric.value:.3f}" for name, metric in metrics.items())
    plot = Plot("intervals", heading, f"{said}.", size=WIDE, x="", rounds=False, colour=2)
    return dots(plot, list(metrics), {"": [_measured(each) for each in metrics.values()]}).svg


def privacy_utility(found: Sequence[tuple[str, float, Metric]], heading: str) -> str:
    """Draw a metric of at least two private runs by ε against recipients: name, ε, metric each."""
    said = "; ".join(f"{name}: {metric.value:.3f} at ε = {e:.3g}" for name, e, metric in found)
    words = "ε against recipients"
    plot = Plot("utility", heading, f"{said}.", size=WIDE, x=words, rounds=False, colour=2)
    measured = [_measured(metric) for _, _, metric in found]
    low, high = _span([spent for _, spent, _ in found], log=False, margin=0.15)
    heights = _span(_ends(measured), log=False, margin=0.15)
    letters = max(len(_shortened(name)) for name, _, _ in found)
    horizontal, vertical, body = _axes(plot, heights, (max(0.0, low), high), letters)
    colour = _COLOURS[plot.colour]
    for (name, spent, _), dot in zip(found, measured, strict=True):
        x, y = horizontal(spent), vertical(dot.value)
        if dot.low is not None and dot.high is not None:
            body.append(_path([(x, vertical(dot.low)), (x, vertical(dot.high))], colour))
        body += [_circle(x, y, colour), _text(x + 7, y, _shortened(name))]
    return _drawn(plot, plot.size, body).svg


def _measured(metric: Metric) -> Dot:
    return Dot(metric.value, f"{metric.value:.3f}", metric.low, metric.high)
