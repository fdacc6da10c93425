"""Several runs side by side: rows for a table or a program, and one self-contained page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from privrec.errors import UsageError
from privrec.report.build import build
from privrec.report.model import Metric, Report, Scalar
from privrec.report.plots import intervals, privacy_utility
from privrec.report.render import replace_text
from privrec.report.words import delta_text, render
from privrec.run.record import metric_name


@dataclass(frozen=True)
class Comparison:
    """Reports by the names they are shown under, and why they may not be comparable."""

    names: tuple[str, ...]
    reports: tuple[Report, ...]
    cautions: tuple[str, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Keys of all metrics that any run has, those of full ranking last."""
        keys = (metric.key for report in self.reports for metric in report.accuracy.metrics)
        return tuple(sorted(dict.fromkeys(keys), key=lambda key: key.startswith("full_")))

    def rows(self) -> list[dict[str, Scalar]]:
        """One flat row a run: name, ε, metrics and costs; an infinite ε is None."""
        values = [{m.key: m.value for m in report.accuracy.metrics} for report in self.reports]
        return [
            {
                "name": name,
                "scenario": report.scenario,
                "simulated": report.simulated,
                "rounds": report.rounds,
                "private": report.privacy.private,
                "epsilon": report.adversary("recipients").epsilon,
                "epsilon_server": report.adversary("server").epsilon,
                "delta": report.privacy.delta,
                "holdout": report.accuracy.holdout,
                **{
                    key: found.value if (found := report.metric(key)) else None
                    for key in self.metrics
                },
                **report.cost.model_dump(exclude={"note"}),
            }
            for name, report, metrics in zip(self.names, self.reports, values, strict=True)
        ]


def compare(directories: Sequence[Path]) -> Comparison:
    """The runs of several directories, in the order given.

    Args:
        directories: At least two finished runs, no one twice.

    Raises:
        UsageError: Fewer than two, or one of them twice, or not a finished run.
        IntegrityError: As `build.build`, for any of them.
    """
    places = [directory.resolve() for directory in directories]
    twice = [place for place, count in Counter(places).items() if count > 1]
    if len(places) < 2 or twice:
        found = f"{twice[0]} is named twice" if twice else f"{len(places)} run was named"
        raise UsageError(
            f"{found}; a comparison needs at least two different runs. Name each directory once: "
            "privrec compare runs/a runs/b"
        )
    reports = tuple(build(directory) for directory in directories)
    return Comparison(tuple(_names(places, reports)), reports, tuple(_cautions(reports)))


def to_html(comparison: Comparison) -> str:
    """The comparison as one HTML page without scripts, or anything to load from elsewhere."""
    shown = _shown(comparison)
    heading = f"{metric_name(shown[0][1].key)} by run" if shown else ""
    return render(
        "compare.html.j2",
        comparison=comparison,
        rows=comparison.rows(),
        metrics=comparison.metrics,
        protocols=_protocols(comparison.metrics),
        heading=heading,
        plot=intervals(shown, heading) if shown else "",
        utility=_utility(comparison, shown, heading),
    )


def _utility(comparison: Comparison, shown: Sequence[tuple[str, Metric]], heading: str) -> str:
    """Accuracy by ε, where two runs or more have both, at one δ."""
    metrics = dict(shown)
    private = [
        (name, spent, metrics[name])
        for name, report in zip(comparison.names, comparison.reports, strict=True)
        if name in metrics and (spent := report.adversary("recipients").epsilon) is not None
    ]
    deltas = {report.privacy.delta for report in comparison.reports if report.privacy.private}
    if len(private) < 2 or len(deltas) > 1:
        return ""
    return privacy_utility(private, f"{heading} and ε")


def write(comparison: Comparison, path: Path) -> None:
    """Write the page, replaced as a whole.

    Raises:
        UsageError: The folder does not exist or cannot be written.
    """
    replace_text(path, to_html(comparison))


def _protocols(keys: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Metric keys by how the held-out item is ranked; keys of one protocol stand together."""
    full = [key for key in keys if key.startswith("full_")]
    sampled = [key for key in keys if key not in full]
    return [
        (name, group)
        for name, group in (("Among 99 items", sampled), ("Full ranking", full))
        if group
    ]


def _shown(comparison: Comparison) -> list[tuple[str, Metric]]:
    """The headline metric of the first run, in all runs that have it."""
    first = next(iter(comparison.reports[0].accuracy.metrics), None)
    if first is None:
        return []
    found = (report.metric(first.key) for report in comparison.reports)
    return [(n, metric) for n, metric in zip(comparison.names, found, strict=True) if metric]


def _names(places: Sequence[Path], reports: Sequence[Report]) -> Iterator[str]:
    """The shortest of scenario, folder and path that tells all runs apart."""
    for candidates in (
        [report.scenario for report in reports],
        [place.name for place in places],
    ):
        if len(set(candidates)) == len(candidates):
            yield from candidates
            return
    yield from (str(place) for place in places)


def _cautions(reports: Sequence[Report]) -> Iterator[str]:
    if len({report.accuracy.holdout for report in reports}) > 1:
        yield "Metrics are of different splits (test and validation): do not compare them."
    if len({_data(report) for report in reports}) > 1:
        yield "The runs used different data: metrics and costs are not comparable."
    deltas = {report.privacy.delta for report in reports if report.privacy.private}
    if len(deltas) > 1:
        values = ", ".join(delta_text(delta) for delta in sorted(d for d in deltas if d))
        yield f"The runs state ε at different δ ({values}): an ε means less at a larger δ."
    if len({report.simulated for report in reports}) > 1:
        yield "Some runs are simulated and some are not: their costs are not comparable."


def _data(report: Report) -> tuple[Scalar, ...]:
    return tuple(report.data.get(key) for key in ("source", "users", "items", "interactions"))
