"""Curves by round as inline SVG: no scripts, colours from the page, the same bytes every time.

Each function gives one ``<svg>`` element for an HTML page. Colours are CSS variables, so that the
page decides light and dark; a title and a description are inside for those who do not see it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from privrec.report.figures import delta_text
from privrec.report.model import Curve, Metric, Point, Report
from privrec.wording import adversary_text, epsilon_text

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
_WIDE = (7.4, 2.7)
_HALF = (3.6, 2.6)


@dataclass(frozen=True)
class Plot:
    """A finished picture with its words."""

    key: str
    heading: str
    caption: str
    svg: str
    wide: bool


@dataclass(frozen=True)
class _Line:
    """One line of a picture; ``end`` is written beside its last point."""

    points: Sequence[Point]
    end: str


def plots(report: Report) -> tuple[Plot, ...]:
    """The pictures of one run, ε by round first; a curve of one point is left out."""
    spent = report.curve("epsilon")
    others = [
        curve
        for curve in (_metric_curve(report), report.curve("loss"))
        if curve is not None and _drawable(curve)
    ]
    drawn = [_epsilon(report, spent)] if spent is not None and _drawable(spent) else []
    wide = len(others) == 1
    return (*drawn, *(_outside(report, curve, wide=wide) for curve in others))


def _drawable(curve: Curve) -> bool:
    return len(curve.points) > 1


def _metric_curve(report: Report) -> Curve | None:
    others = {"loss", "epsilon", "epsilon_server"}
    return next((curve for curve in report.curves if curve.key not in others), None)


# --------------------------------------------------------------------------- the pictures


def _epsilon(report: Report, recipients: Curve) -> Plot:
    lines = _epsilon_lines(recipients, report.curve("epsilon_server"))
    said = "; ".join(f"{line.end.replace(chr(10), ' ')} after the last round" for line in lines)
    budget = report.privacy.budget
    limit = _limit_text(budget, report.privacy.budget_against)
    return Plot(
        key="epsilon",
        heading="ε by round",
        caption="Spent privacy, computed from the ledger at "
        f"δ = {delta_text(report.privacy.delta)}. Lower is more private.{limit}",
        svg=_svg(
            "epsilon",
            "ε by round",
            f"ε grows with every round: {said}.",
            lines,
            size=_WIDE,
            label="ε",
            log=_spread(lines) > 5,
            limit=budget,
            marks=len(recipients.points) <= MARKED,
        ),
        wide=True,
    )


def _limit_text(budget: float | None, against: str) -> str:
    return f" The budget is {budget:g} against {adversary_text(against)}." if budget else ""


def _epsilon_lines(recipients: Curve, server: Curve | None) -> list[_Line]:
    if server is None or server.points == recipients.points:
        return [_Line(recipients.points, f"both adversaries\nε = {_last(recipients)}")]
    return [
        _Line(recipients.points, f"recipients\nε = {_last(recipients)}"),
        _Line(server.points, f"cohorts known\nε = {_last(server)}"),
    ]


def _last(curve: Curve) -> str:
    return epsilon_text(curve.points[-1].value)


def _spread(lines: Sequence[_Line]) -> float:
    ends = [line.points[-1].value for line in lines]
    return max(ends) / max(min(ends), 1e-9)


def _outside(report: Report, curve: Curve, *, wide: bool) -> Plot:
    loss = curve.key == "loss"
    key = "loss" if loss else "metric"
    heading = f"{curve.name} by round"
    first, last = curve.points[0], curve.points[-1]
    return Plot(
        key=key,
        heading=heading,
        caption=f"{_measured_on(report, loss)}; {curve.note}.",
        svg=_svg(
            key,
            heading,
            f"{curve.name} goes from {first.value:.3g} in round {first.round} to "
            f"{last.value:.3g} in round {last.round}.",
            [_Line(curve.points, f"{last.value:.3f}")],
            size=_WIDE if wide else _HALF,
            label="",
            marks=len(curve.points) <= MARKED,
            colour=3 if loss else 2,
        ),
        wide=wide,
    )


def _measured_on(report: Report, loss: bool) -> str:
    if loss:
        return "Mean over the devices of a round"
    return f"{report.accuracy.holdout.capitalize()} split"


def intervals(metrics: Sequence[tuple[str, Metric]], heading: str) -> str:
    """One metric of several runs as dots with their intervals, in the order given.

    Args:
        metrics: Name of the run, and its metric; at least one.
        heading: What the picture shows.
    """
    import matplotlib as mpl

    size = (_WIDE[0], 0.75 + 0.3 * len(metrics))
    with mpl.rc_context(_SETTINGS):
        figure, axes = _figure(size)
        for place, (_, metric) in enumerate(metrics):
            _dot(axes, place, metric)
        axes.set_yticks(range(len(metrics)), [_shortened(name) for name, _ in metrics])
        axes.set_ylim(len(metrics) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.margins(x=0.08)
        said = "; ".join(f"{name}: {metric.value:.3f}" for name, metric in metrics)
        return _embedded(_printed(figure), "intervals", heading, f"{said}.")


def _dot(axes: Axes, place: int, metric: Metric) -> None:
    colour = _LINES[2]
    if metric.low is not None and metric.high is not None:
        axes.plot([metric.low, metric.high], [place, place], color=colour)
    axes.plot([metric.value], [place], color=colour, marker="o", markersize=5.5)
    axes.annotate(
        f"{metric.value:.3f}",
        (metric.value if metric.high is None else metric.high, place),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        color=_INK,
        annotation_clip=False,
    )


def _shortened(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:31]}…"


# --------------------------------------------------------------------------- drawing


def _svg(
    key: str,
    title: str,
    description: str,
    lines: Sequence[_Line],
    *,
    size: tuple[float, float],
    label: str,
    log: bool = False,
    limit: float | None = None,
    marks: bool = False,
    colour: int = 0,
) -> str:
    """One ``<svg>`` of lines by round; its ids begin with ``key``."""
    import matplotlib as mpl

    with mpl.rc_context(_SETTINGS):
        figure, axes = _figure(size)
        _style(axes, label, log)
        for place, line in enumerate(lines):
            _draw(axes, line, _LINES[colour + place], marks)
        _limit(axes, limit)
        _range(axes, lines, limit, log)
        return _embedded(_printed(figure), key, title, description)


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _style(axes: Axes, label: str, log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    axes.set_xlabel("round")
    axes.set_ylabel(label, rotation=0, labelpad=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=_STEPS))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(LogLocator(subs=()))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw(axes: Axes, line: _Line, colour: str, marks: bool) -> None:
    rounds = [point.round for point in line.points]
    values = [point.value for point in line.points]
    axes.plot(rounds, values, color=colour, marker="o" if marks else "", markersize=3.2)
    axes.annotate(
        line.end,
        (rounds[-1], values[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        annotation_clip=False,
    )


def _limit(axes: Axes, limit: float | None) -> None:
    if limit is None:
        return
    axes.axhline(limit, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"budget {limit:g}",
        (0.5, limit),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        color=_MUTED,
    )


def _range(axes: Axes, lines: Sequence[_Line], limit: float | None, log: bool) -> None:
    axes.set_xlim(0, max(line.points[-1].round for line in lines))
    if log:
        return
    if min(point.value for line in lines for point in line.points) >= 0:
        axes.set_ylim(bottom=0)
    axes.set_ylim(top=max(axes.get_ylim()[1], 1.12 * (limit or 0)))


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
