"""The pictures of a report: ε by round, what ε means, noise against signal, accuracy and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from privrec.report.drawing import HALF, WIDE, Dot, Frame, Line, dots, lines, scatter
from privrec.report.figures import amount_text, bytes_text, delta_text
from privrec.report.model import Curve, Metric, Report
from privrec.report.parts import Accounting, Mechanism, Point2, Reading, TierCost
from privrec.run.wording import adversary_text, epsilon_text


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
