"""Lines and dots as inline SVG: no scripts, colours from the page, the same bytes every time.

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
