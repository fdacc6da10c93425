"""The pictures of a report: ε by round, what ε means, noise against signal, accuracy and bytes.

Lines and dots as inline SVG: no scripts, the same bytes every time. Colours are the page's CSS
variables, so that the page decides light and dark; a title and a description are inside for those
who do not see the picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
class Frame:
    """What stands around the lines of a picture.

    Attributes:
        key: begins every id inside.
        description: what the picture shows, in words.
        size: width and height, points.
        rounds: whether the lower axis counts rounds.
        log: whether the left axis, or the only one of a row of dots, is logarithmic.
        limit: a dashed line across, with its words.
        colour: of the first line, counted from 0.
    """

    key: str
    title: str
    description: str
    size: XY = HALF
    x: str = "round"
    y: str = ""
    rounds: bool = True
    log: bool = False
    limit: tuple[float, str] | None = None
    colour: int = 0


@dataclass(frozen=True)
class Plot:
    """A finished picture with its words."""

    key: str
    heading: str
    caption: str
    svg: str
    wide: bool


def _plot(frame: Frame, svg: str, caption: str, heading: str = "") -> Plot:
    return Plot(frame.key, heading or frame.title, caption, svg, frame.size == WIDE)


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


def _svg(frame: Frame, size: XY, body: Sequence[str]) -> str:
    key, (width, height) = frame.key, size
    return (
        f'<svg class="plot" role="img" viewBox="0 0 {width:g} {height:g}" font-size="9" '
        f'aria-labelledby="{key}-title" aria-describedby="{key}-text" '
        'font-family="var(--sans)" xmlns="http://www.w3.org/2000/svg">'
        f'<title id="{key}-title">{escape(frame.title)}</title>'
        f'<desc id="{key}-text">{escape(frame.description)}</desc>{"".join(body)}</svg>'
    )


def _lower(axis: _Axis, y: float, frame: Frame, *, top: float | None = None) -> Iterator[str]:
    """The lower axis: ticks with lines up to ``top`` if it is given, figures and a name."""
    whole = frame.rounds and top is None
    for value in axis.ticks(6, whole=whole):
        x = axis(value)
        yield _path([(x, y + 3), (x, y if top is None else top)], "rule", 0.6)
        yield _text(x, y + 10, delta_text(value), colour="muted", anchor="middle")
    yield _path([(axis.start, y), (axis.end, y)], "rule", 0.8)
    yield _text((axis.start + axis.end) / 2, y + 23, frame.x, colour="muted", anchor="middle")


def _grid(axis: _Axis, left: float, right: float, frame: Frame) -> Iterator[str]:
    """The left axis: lines across with figures, its name above, and the limit."""
    for value in axis.ticks(6):
        yield _path([(left, axis(value)), (right, axis(value))], "rule", 0.6)
        yield _text(left - 5, axis(value), delta_text(value), colour="muted", anchor="end")
    if frame.y:
        yield _text(left - 5, axis.end - 11, frame.y, colour="muted", anchor="end")
    if frame.limit is not None:
        y = axis(frame.limit[0])
        yield _path([(left, y), (right, y)], "muted", 1, "4 3")
        yield _text((left + right) / 2, y - 7, frame.limit[1], colour="muted", anchor="middle")


def lines(frame: Frame, drawn: Sequence[Line]) -> str:
    """Draw lines in one ``<svg>``; short ones have their points marked."""
    heights = [y for line in drawn for _, y in line.points]
    limit = [frame.limit[0]] if frame.limit else []
    log = frame.log and min([*heights, *limit]) > 0
    low, high = _span([*heights, *limit], log=log, margin=0.05)
    if not log and min(heights) >= 0:
        low = 0.0
    letters = max(len(row) for line in drawn for row in line.end.split("\n"))
    width, height = frame.size
    right = width - 8 - letters * _LETTER
    vertical = _Axis(low, high, height - 30, 18, log)
    horizontal = _Axis(0, max(line.points[-1][0] for line in drawn), 42, right)
    body = [*_grid(vertical, 42, right, frame), *_lower(horizontal, height - 30, frame)]
    marked = frame.rounds and len(drawn[0].points) <= MARKED
    for line, colour in zip(drawn, _COLOURS[frame.colour :], strict=False):
        places = [(horizontal(x), vertical(y)) for x, y in line.points]
        body.append(_path(places, colour))
        body += [_circle(*place, colour, 1.6) for place in places if marked]
        body.append(_text(right + 6, places[-1][1], line.end, colour=colour))
    return _svg(frame, frame.size, body)


def dots(frame: Frame, names: Sequence[str], series: Sequence[tuple[str, Sequence[Dot]]]) -> str:
    """Draw rows of dots in one ``<svg>``, in the order given.

    Args:
        frame: its ``size`` gives the width, the rows give the height.
        series: name of each series, and its dots, one for each row; several get a legend.
    """
    found = [dot for _, row in series for dot in row]
    ends = [end for dot in found for end in (dot.value, dot.low, dot.high) if end is not None]
    width, height = frame.size[0], 54 + 22.0 * len(names)
    left = 14 + _LETTER * max(len(_shortened(name)) for name in names)
    right = width - 8 - _LETTER * max(len(dot.text) for dot in found)
    log = frame.log and min(ends) > 0
    axis = _Axis(*_span(ends, log=log, margin=0.06), left, right, log)
    body = list(_lower(axis, height - 30, frame, top=18))
    for place, name in enumerate(names):
        body.append(_text(left - 8, 29 + 22 * place, _shortened(name), anchor="end"))
    for order, (title, row) in enumerate(series):
        colour = _COLOURS[frame.colour + order]
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
    return _svg(frame, (width, height), body)


def scatter(frame: Frame, found: Sequence[tuple[str, float, Dot]]) -> str:
    """Draw named points in one ``<svg>``, each with the interval of its height.

    Args:
        found: name, place on the lower axis, and height.
    """
    width, height = frame.size
    ends = [end for _, _, dot in found for end in (dot.value, dot.low, dot.high) if end is not None]
    right = width - 8 - _LETTER * max(len(_shortened(name)) for name, _, _ in found)
    vertical = _Axis(*_span(ends, log=False, margin=0.15), height - 30, 18)
    across = _span([x for _, x, _ in found], log=False, margin=0.15)
    horizontal = _Axis(max(0.0, across[0]), across[1], 42, right)
    body = [*_grid(vertical, 42, right, frame), *_lower(horizontal, height - 30, frame)]
    colour = _COLOURS[frame.colour]
    for name, value, dot in found:
        x, y = horizontal(value), vertical(dot.value)
        if dot.low is not None and dot.high is not None:
            body.append(_path([(x, vertical(dot.low)), (x, vertical(dot.high))], colour))
        body += [_circle(x, y, colour), _text(x + 7, y, _shortened(name))]
    return _svg(frame, frame.size, body)


def _shortened(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:31]}…"


# --------------------------------------------------------------------------- by round


def plots(report: Report) -> tuple[Plot, ...]:
    """The pictures of one run's rounds, ε first; a curve of one point is left out."""
    drawable = {curve.key: curve for curve in report.curves if len(curve.points) > 1}
    spent, known = drawable.pop("epsilon", None), drawable.pop("epsilon_server", None)
    loss = drawable.pop("loss", None)
    others = [*list(drawable.values())[:1], *([loss] if loss else [])]
    first = [_epsilon(report, spent, known)] if spent else []
    return (*first, *(_outside(report, curve, wide=len(others) == 1) for curve in others))


def _points(curve: Curve) -> list[XY]:
    return [(point.round, point.value) for point in curve.points]


def _epsilon(report: Report, recipients: Curve, server: Curve | None) -> Plot:
    privacy = report.privacy
    named = [("recipients", recipients), ("cohorts known", server)]
    if server is None or server.points == recipients.points:
        named = [("both adversaries", recipients)]
    drawn = [
        Line(_points(curve), f"{name}\nε = {epsilon_text(curve.points[-1].value)}")
        for name, curve in named
        if curve is not None
    ]
    said = "; ".join(f"{line.end.replace(chr(10), ' ')} after the last round" for line in drawn)
    ends = [line.points[-1][1] for line in drawn]
    caption = (
        f"Spent privacy, computed from the ledger at δ = {delta_text(privacy.delta)}. "
        "Lower is more private."
    )
    if privacy.budget:
        against = adversary_text(privacy.budget_against)
        caption += f" The budget is {privacy.budget:g} against {against}."
    frame = Frame(
        key="epsilon",
        title="ε by round",
        description=f"ε grows with every round: {said}.",
        size=WIDE,
        y="ε",
        log=max(ends) > 5 * min(ends) > 0,
        limit=(privacy.budget, f"budget {privacy.budget:g}") if privacy.budget else None,
    )
    return _plot(frame, lines(frame, drawn), caption)


def _outside(report: Report, curve: Curve, *, wide: bool) -> Plot:
    loss = curve.key == "loss"
    first, last = curve.points[0], curve.points[-1]
    split = f"{report.accuracy.holdout.capitalize()} split"
    measured = "Mean over the devices of a round" if loss else split
    frame = Frame(
        key="loss" if loss else "metric",
        title=f"{curve.name} by round",
        description=f"{curve.name} goes from {first.value:.3g} in round {first.round} to "
        f"{last.value:.3g} in round {last.round}.",
        size=WIDE if wide else HALF,
        colour=3 if loss else 2,
    )
    picture = lines(frame, [Line(_points(curve), f"{last.value:.3f}")])
    return _plot(frame, picture, f"{measured}; {curve.note}.")


# --------------------------------------------------------------------------- what ε means


def risks(report: Report) -> Iterator[Plot]:
    """What ε and δ mean, as curves: all pairs that hold, and the errors of any test."""
    if not report.privacy.private:
        return
    accounting, reading = report.accounting, report.reading
    if accounting and any(point.x for point in accounting.curve):
        recipients, known = _xy(accounting.curve), _xy(accounting.curve_server)
        two = bool(known) and known != recipients
        second = " Lower line: recipients; upper: cohorts known." if two else ""
        frame = Frame(
            key="pairs",
            title="δ by ε",
            description=f"δ falls from {recipients[0][1]:.2g} at ε = {recipients[0][0]:.3g} to "
            f"{recipients[-1][1]:.2g} at ε = {recipients[-1][0]:.3g}.",
            x="ε",
            y="δ",
            rounds=False,
            log=True,
            limit=(accounting.delta, f"δ = {delta_text(accounting.delta)}"),
        )
        yield _plot(
            frame,
            lines(frame, [Line(recipients), *([Line(known)] if two else [])]),
            f"The least δ at each ε. All of these hold at once.{second}",
            "One mechanism, many pairs",
        )
    frame = Frame(
        key="trade-off",
        title="Errors of any test",
        description="The least chance of a miss by the chance of a false alarm; without the data "
        f"they add up to 1, here to at least {1 - reading.advantage:.2f}.",
        x="false alarms",
        y="misses",
        rounds=False,
    )
    yield _plot(
        frame,
        lines(frame, [Line(_xy(reading.trade_off)), Line([(0.0, 1.0), (1.0, 0.0)])]),
        "The least misses at each share of false alarms, against recipients. The straight line is "
        "guessing.",
        "Errors of any membership test",
    )


def _xy(points: Sequence[Point2]) -> list[XY]:
    return sorted((point.x, point.y) for point in points)


# --------------------------------------------------------------------------- by tier


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
        title = "Noise against signal by band"
        frame = Frame("bands", title, f"{said}.", WIDE, x="L2 norm", log=True)
        yield _plot(
            frame,
            dots(frame, names, [("noise", noise), ("signal, at most", signal)]),
            "Expected norm of the noise in what each weaker tier holds, and the largest that the "
            "sum of all updates can have there.",
            "Noise against signal, by band",
        )
    tiers = [tier for tier in report.tiers if tier.upload_bytes]
    if len(tiers) > 1:
        names = [f"capacity {tier.capacity:g}" for tier in tiers]
        sent = [Dot(float(tier.upload_bytes or 0), bytes_text(tier.upload_bytes)) for tier in tiers]
        said = "; ".join(f"{name}: {dot.text}" for name, dot in zip(names, sent, strict=True))
        title = "Upload by capacity"
        frame = Frame("bytes", title, f"{said}.", WIDE, x="bytes", log=True, colour=2)
        picture = dots(frame, names, [("upload", sent)])
        yield _plot(frame, picture, "Bytes that one device sends in a round.")


# --------------------------------------------------------------------------- several runs


def intervals(metrics: Sequence[tuple[str, Metric]], heading: str) -> str:
    """Draw one metric of several runs as dots with their intervals, in the order given.

    Args:
        metrics: name of the run, and its metric; at least one.
    """
    said = "; ".join(f"{name}: {metric.value:.3f}" for name, metric in metrics)
    frame = Frame("intervals", heading, f"{said}.", WIDE, x="", rounds=False, colour=2)
    names = [name for name, _ in metrics]
    return dots(frame, names, [("", [_measured(metric) for _, metric in metrics])])


def privacy_utility(found: Sequence[tuple[str, float, Metric]], heading: str) -> str:
    """Draw one metric of several private runs by their ε against recipients.

    Args:
        found: name of the run, its ε, and its metric; at least two.
    """
    said = "; ".join(f"{name}: {metric.value:.3f} at ε = {e:.3g}" for name, e, metric in found)
    words = f"{said}."
    frame = Frame("utility", heading, words, WIDE, "ε against recipients", rounds=False, colour=2)
    return scatter(frame, [(name, e, _measured(metric)) for name, e, metric in found])


def _measured(metric: Metric) -> Dot:
    return Dot(metric.value, f"{metric.value:.3f}", metric.low, metric.high)
