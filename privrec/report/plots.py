"""The pictures of a report: ε by round, what ε means, noise against signal, accuracy and bytes.

Lines and dots as inline SVG: no scripts, colours from the page, the same bytes every time.

Colours are CSS variables, so that the page decides light and dark; a title and a description are
inside for those who do not see it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from privrec.report.figures import amount_text, bytes_text, delta_text
from privrec.report.model import (
    Accounting,
    Curve,
    Mechanism,
    Metric,
    Point2,
    Reading,
    Report,
    TierCost,
)
from privrec.run.wording import adversary_text, epsilon_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins that matplotlib can draw with; the page's variables replace them in the text.
_VARIABLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--rule)",
    "#040404": "var(--first)",
    "#050505": "var(--second)",
    "#060606": "var(--third)",
    "#070707": "var(--fourth)",
}
MARKED = 30
"""Most points of a line for each to be marked with a dot."""

_INK, _MUTED, _RULE, *_LINES = _VARIABLES
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "privrec",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "text.color": _INK,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
_STEPS = [1, 2, 2.5, 5, 10]
WIDE = (7.4, 2.7)
HALF = (3.6, 2.6)


@dataclass(frozen=True)
class Line:
    """One line of a picture: ``(x, y)`` by growing x, and what is written beside its last point."""

    points: Sequence[tuple[float, float]]
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

    Args:
        key: begins every id inside.
        title: of the picture.
        description: what it shows, in words.
        size: width and height, inches.
        x: what the lower axis is.
        y: what the left axis is.
        rounds: whether the lower axis counts rounds.
        log: whether the left axis is logarithmic.
        limit: a dashed line across, with its words.
        colour: of the first line, counted from 0.
    """

    key: str
    title: str
    description: str
    size: tuple[float, float] = HALF
    x: str = "round"
    y: str = ""
    rounds: bool = True
    log: bool = False
    limit: tuple[float, str] | None = None
    colour: int = 0


def lines(frame: Frame, drawn: Sequence[Line]) -> str:
    """One ``<svg>`` of lines; short ones have their points marked."""
    with _figure(frame.size) as (figure, axes):
        _style(axes, frame)
        marks = frame.rounds and len(drawn[0].points) <= MARKED
        for place, line in enumerate(drawn):
            _draw(axes, line, _LINES[frame.colour + place], marks)
        _limit(axes, frame.limit)
        _range(axes, drawn, frame)
        return _embedded(_printed(figure), frame.key, frame.title, frame.description)


def dots(frame: Frame, names: Sequence[str], series: Sequence[tuple[str, Sequence[Dot]]]) -> str:
    """One ``<svg>`` of rows of dots, in the order given.

    Args:
        frame: what stands around; its ``size`` gives the width, the rows give the height.
        names: of the rows.
        series: name of each series, and its dots, one for each row; several get a legend.
    """
    with _figure((frame.size[0], 0.75 + 0.3 * len(names))) as (figure, axes):
        for order, (name, found) in enumerate(series):
            for place, dot in enumerate(found):
                _dot(axes, place, dot, _LINES[frame.colour + order], name if not place else "")
        axes.set_yticks(range(len(names)), [_shortened(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.margins(x=0.12)
        if frame.log:
            axes.set_xscale("log")
        axes.set_xlabel(frame.x)
        if len(series) > 1:
            figure.legend(loc="outside upper right", ncols=len(series), frameon=False)
        return _embedded(_printed(figure), frame.key, frame.title, frame.description)


def scatter(frame: Frame, found: Sequence[tuple[str, float, Dot]]) -> str:
    """One ``<svg>`` of named points, each with the interval of its height.

    Args:
        frame: what stands around.
        found: name, place on the lower axis, and height.
    """
    with _figure(frame.size) as (figure, axes):
        _style(axes, frame)
        colour = _LINES[frame.colour]
        for name, x, dot in found:
            if dot.low is not None and dot.high is not None:
                axes.plot([x, x], [dot.low, dot.high], color=colour)
            axes.plot([x], [dot.value], color=colour, marker="o", markersize=5.5)
            axes.annotate(
                _shortened(name), (x, dot.value), xytext=(7, 0), textcoords="offset points",
                va="center", color=_INK, annotation_clip=False,
            )  # fmt: skip
        axes.margins(x=0.15, y=0.15)
        return _embedded(_printed(figure), frame.key, frame.title, frame.description)


def _dot(axes: Axes, place: int, dot: Dot, colour: str, label: str) -> None:
    if dot.low is not None and dot.high is not None:
        axes.plot([dot.low, dot.high], [place, place], color=colour)
    axes.plot(
        [dot.value], [place], color=colour, marker="o", markersize=5.5, linestyle="",
        label=label or None,
    )  # fmt: skip
    axes.annotate(
        dot.text,
        (dot.value if dot.high is None else dot.high, place),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        color=_INK,
        annotation_clip=False,
    )


def _shortened(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:31]}…"


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot()


def _style(axes: Axes, frame: Frame) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    axes.set_xlabel(frame.x)
    axes.set_ylabel(frame.y, rotation=0, labelpad=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=frame.rounds, steps=_STEPS))
    if frame.log:
        axes.set_yscale("log")
        subs = (1.0, 2.0, 5.0) if frame.rounds else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
        axes.yaxis.set_minor_locator(LogLocator(subs=()))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw(axes: Axes, line: Line, colour: str, marks: bool) -> None:
    x, y = zip(*line.points, strict=True)
    axes.plot(x, y, color=colour, marker="o" if marks else "", markersize=3.2)
    axes.annotate(
        line.end,
        (x[-1], y[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        annotation_clip=False,
    )


def _limit(axes: Axes, limit: tuple[float, str] | None) -> None:
    if limit is None:
        return
    axes.axhline(limit[0], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        limit[1],
        (0.5, limit[0]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        color=_MUTED,
    )


def _range(axes: Axes, drawn: Sequence[Line], frame: Frame) -> None:
    axes.set_xlim(0, max(line.points[-1][0] for line in drawn))
    if frame.log:
        return
    if min(y for line in drawn for _, y in line.points) >= 0:
        axes.set_ylim(bottom=0)
    axes.set_ylim(top=max(axes.get_ylim()[1], 1.12 * (frame.limit[0] if frame.limit else 0)))


def _printed(figure: Figure) -> str:
    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return text.getvalue()


def _embedded(text: str, key: str, title: str, description: str) -> str:
    """Matplotlib's document as an element: no prolog, no page-wide style, ids of its own."""
    body = text[text.index("<svg") :].strip()
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", body)
    body = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "var(--sans)", body)
    for stand_in, variable in _VARIABLES.items():
        body = body.replace(stand_in, variable)
    box = re.search(r'viewBox="[^"]+"', body)
    start = f'<svg class="plot" role="img" {box[0] if box else ""}'
    names = f'aria-labelledby="{key}-title" aria-describedby="{key}-text"'
    link = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    words = (
        f'<title id="{key}-title">{escape(title)}</title>'
        f'<desc id="{key}-text">{escape(description)}</desc>'
    )
    return f"{start} {names} {link}>{words}{body[body.index('>') + 1 :]}"


@dataclass(frozen=True)
class Plot:
    """A finished picture with its words."""

    key: str
    heading: str
    caption: str
    svg: str
    wide: bool


def plots(report: Report) -> tuple[Plot, ...]:
    """The pictures of one run's rounds, ε first; a curve of one point is left out."""
    spent = report.curve("epsilon")
    others = [
        curve
        for curve in (_metric_curve(report), report.curve("loss"))
        if curve is not None and _drawable(curve)
    ]
    drawn = [_epsilon(report, spent)] if spent is not None and _drawable(spent) else []
    wide = len(others) == 1
    return (*drawn, *(_outside(report, curve, wide=wide) for curve in others))


def risks(report: Report) -> tuple[Plot, ...]:
    """What ε and δ mean, as curves: all pairs that hold, and the errors of any test."""
    return tuple(_risks(report))


def by_tier(report: Report) -> tuple[Plot, ...]:
    """Noise against signal by band, and bytes by tier, of a run with several capacities."""
    return tuple(_by_tier(report))


def _drawable(curve: Curve) -> bool:
    return len(curve.points) > 1


def _metric_curve(report: Report) -> Curve | None:
    others = {"loss", "epsilon", "epsilon_server"}
    return next((curve for curve in report.curves if curve.key not in others), None)


def _points(curve: Curve) -> list[tuple[float, float]]:
    return [(point.round, point.value) for point in curve.points]


# --------------------------------------------------------------------------- by round


def _epsilon(report: Report, recipients: Curve) -> Plot:
    drawn = _epsilon_lines(recipients, report.curve("epsilon_server"))
    said = "; ".join(f"{line.end.replace(chr(10), ' ')} after the last round" for line in drawn)
    budget = report.privacy.budget
    frame = Frame(
        key="epsilon",
        title="ε by round",
        description=f"ε grows with every round: {said}.",
        size=WIDE,
        y="ε",
        log=_spread(drawn) > 5,
        limit=(budget, f"budget {budget:g}") if budget else None,
    )
    return Plot(
        key="epsilon",
        heading="ε by round",
        caption="Spent privacy, computed from the ledger at "
        f"δ = {delta_text(report.privacy.delta)}. Lower is more private."
        f"{_limit_text(budget, report.privacy.budget_against)}",
        svg=lines(frame, drawn),
        wide=True,
    )


def _limit_text(budget: float | None, against: str) -> str:
    return f" The budget is {budget:g} against {adversary_text(against)}." if budget else ""


def _epsilon_lines(recipients: Curve, server: Curve | None) -> list[Line]:
    if server is None or server.points == recipients.points:
        return [Line(_points(recipients), f"both adversaries\nε = {_last(recipients)}")]
    return [
        Line(_points(recipients), f"recipients\nε = {_last(recipients)}"),
        Line(_points(server), f"cohorts known\nε = {_last(server)}"),
    ]


def _last(curve: Curve) -> str:
    return epsilon_text(curve.points[-1].value)


def _spread(drawn: Sequence[Line]) -> float:
    ends = [line.points[-1][1] for line in drawn]
    return max(ends) / max(min(ends), 1e-9)


def _outside(report: Report, curve: Curve, *, wide: bool) -> Plot:
    loss = curve.key == "loss"
    first, last = curve.points[0], curve.points[-1]
    frame = Frame(
        key="loss" if loss else "metric",
        title=f"{curve.name} by round",
        description=f"{curve.name} goes from {first.value:.3g} in round {first.round} to "
        f"{last.value:.3g} in round {last.round}.",
        size=WIDE if wide else HALF,
        colour=3 if loss else 2,
    )
    return Plot(
        key=frame.key,
        heading=frame.title,
        caption=f"{_measured_on(report, loss)}; {curve.note}.",
        svg=lines(frame, [Line(_points(curve), f"{last.value:.3f}")]),
        wide=wide,
    )


def _measured_on(report: Report, loss: bool) -> str:
    if loss:
        return "Mean over the devices of a round"
    return f"{report.accuracy.holdout.capitalize()} split"


# --------------------------------------------------------------------------- what ε means


def _risks(report: Report) -> Iterator[Plot]:
    if (
        report.privacy.private
        and report.accounting
        and any(point.x for point in report.accounting.curve)
    ):
        yield _pairs(report.accounting)
    if report.privacy.private and len(report.reading.trade_off) > 1:
        yield _trade_off(report.reading)


def _xy(points: Sequence[Point2]) -> list[tuple[float, float]]:
    return sorted((point.x, point.y) for point in points)


def _pairs(accounting: Accounting) -> Plot:
    recipients, known = _xy(accounting.curve), _xy(accounting.curve_server)
    drawn = [Line(recipients)]
    if known and known != recipients:
        drawn.append(Line(known))
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
    second = " Lower line: recipients; upper: cohorts known." if len(drawn) > 1 else ""
    return Plot(
        key="pairs",
        heading="One mechanism, many pairs",
        caption=f"The least δ at each ε. All of these hold at once.{second}",
        svg=lines(frame, drawn),
        wide=False,
    )


def _trade_off(reading: Reading) -> Plot:
    drawn = [Line(_xy(reading.trade_off)), Line([(0.0, 1.0), (1.0, 0.0)])]
    frame = Frame(
        key="trade-off",
        title="Errors of any test",
        description="The least chance of a miss by the chance of a false alarm; without the data "
        f"they add up to 1, here to at least {1 - reading.advantage:.2f}.",
        x="false alarms",
        y="misses",
        rounds=False,
    )
    return Plot(
        key="trade-off",
        heading="Errors of any membership test",
        caption="The least misses at each share of false alarms, against recipients. The straight "
        "line is guessing.",
        svg=lines(frame, drawn),
        wide=False,
    )


# --------------------------------------------------------------------------- by tier


def _by_tier(report: Report) -> Iterator[Plot]:
    if report.mechanism and len(report.mechanism.bands) > 1:
        yield _bands(report.mechanism)
    tiers = [tier for tier in report.tiers if tier.upload_bytes]
    if len(tiers) > 1:
        yield _bytes(tiers)


def _bands(mechanism: Mechanism) -> Plot:
    bands = mechanism.bands
    noise = [Dot(band.noise_norm, amount_text(band.noise_norm)) for band in bands]
    signal = [Dot(band.signal_norm, amount_text(band.signal_norm)) for band in bands]
    names = [f"from capacity {band.capacity:g}" for band in bands]
    said = "; ".join(
        f"{name}: noise {band.noise_norm:.3g}, signal at most {band.signal_norm:.3g}"
        for name, band in zip(names, bands, strict=True)
    )
    frame = Frame("bands", "Noise against signal by band", f"{said}.", WIDE, x="L2 norm", log=True)
    return Plot(
        key="bands",
        heading="Noise against signal, by band",
        caption="Expected norm of the noise in what each weaker tier holds, and the largest that "
        "the sum of all updates can have there.",
        svg=dots(frame, names, [("noise", noise), ("signal, at most", signal)]),
        wide=True,
    )


def _bytes(tiers: Sequence[TierCost]) -> Plot:
    names = [f"capacity {tier.capacity:g}" for tier in tiers]
    up = [Dot(float(tier.upload_bytes or 0), bytes_text(tier.upload_bytes)) for tier in tiers]
    said = "; ".join(f"{name}: {dot.text}" for name, dot in zip(names, up, strict=True))
    frame = Frame("bytes", "Upload by capacity", f"{said}.", WIDE, x="bytes", log=True, colour=2)
    return Plot(
        key="bytes",
        heading="Upload by capacity",
        caption="Bytes that one device sends in a round.",
        svg=dots(frame, names, [("upload", up)]),
        wide=True,
    )


# --------------------------------------------------------------------------- several runs


def intervals(metrics: Sequence[tuple[str, Metric]], heading: str) -> str:
    """One metric of several runs as dots with their intervals, in the order given.

    Args:
        metrics: Name of the run, and its metric; at least one.
        heading: What the picture shows.
    """
    said = "; ".join(f"{name}: {metric.value:.3f}" for name, metric in metrics)
    frame = Frame("intervals", heading, f"{said}.", WIDE, x="", colour=2)
    names = [name for name, _ in metrics]
    return dots(frame, names, [("", [_measured(metric) for _, metric in metrics])])


def privacy_utility(found: Sequence[tuple[str, float, Metric]], heading: str) -> str:
    """One metric of several private runs by their ε against recipients.

    Args:
        found: Name of the run, its ε, and its metric; at least two.
        heading: What the picture shows.
    """
    said = "; ".join(f"{name}: {metric.value:.3f} at ε = {e:.3g}" for name, e, metric in found)
    frame = Frame(
        "utility", heading, f"{said}.", WIDE, x="ε against recipients", rounds=False, colour=2
    )
    return scatter(frame, [(name, e, _measured(metric)) for name, e, metric in found])


def _measured(metric: Metric) -> Dot:
    return Dot(metric.value, f"{metric.value:.3f}", metric.low, metric.high)
