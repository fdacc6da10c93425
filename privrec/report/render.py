"""Reports as files: JSON, a self-contained page, Markdown, a draft for a registry, comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privrec import storage
from privrec.errors import UsageError
from privrec.report.build import build
from privrec.report.model import Report, Scalar
from privrec.report.plots import by_tier, intervals, plots, privacy_utility, risks
from privrec.report.words import delta_text, render, tables
from privrec.run.directory import SCENARIO
from privrec.run.record import SUMMED, metric_name, told_once
from privrec.scenario.keys import as_toml
from privrec.scenario.load import load

OPEN = "(the operator fills this in)"
"""Stands in a draft for a registry where privrec does not know."""


@dataclass(frozen=True)
class Written:
    """Where the files of a report lie."""

    json: Path
    html: Path
    markdown: Path
    registry: Path


def write(report: Report, directory: Path) -> Written:
    """Write the four files into an existing directory, each as :func:`replace_text` does.

    Those of training elsewhere are named after its ledger, since a folder may hold several.
    """
    endings = ("json", "html", "md", "registry.yaml")
    stem = f"{report.scenario}.report" if report.told else "report"
    paths = [directory / f"{stem}.{ending}" for ending in endings]
    for path, text_of in zip(paths, (to_json, to_html, to_markdown, to_registry), strict=True):
        replace_text(path, text_of(report))
    return Written(*paths)


def to_json(report: Report) -> str:
    """Write the report as JSON that satisfies `model.json_schema`."""
    return report.model_dump_json(indent=2) + "\n"


def to_html(report: Report) -> str:
    """Write one HTML page without scripts, or anything to load from elsewhere."""
    pictures = {
        "reading": tuple(risks(report)),
        "rounds": tuple(plots(report)),
        "tiers": tuple(by_tier(report)),
    }
    return render("report.html.j2", **_page(report), pictures=pictures)


def to_markdown(report: Report) -> str:
    """Write Markdown with the same sections as the page, without pictures."""
    return render("report.md.j2", **_page(report))


def to_registry(report: Report) -> str:
    """Draft an entry for a registry of deployments, in YAML; a simulated run says it is none."""
    return render("registry.yaml.j2", report=report, open=f'"{OPEN}"')


def _page(report: Report) -> dict[str, Any]:
    check = verification(report)
    bare = {"tag": "", "texts": (), "pairs": (), "table": None}
    found = tables("sections.toml.j2", report=report, check=check)["sections"]
    sections = [{**bare, **section} for section in found]
    return {"report": report, "sections": sections, "check": check}


def verification(report: Report) -> str | None:
    """Python lines that recompute both ε with dp-accounting alone; None without a guarantee.

    None too where something else than Gaussian rounds was charged.
    """
    privacy = report.privacy
    if not privacy.private or any(event.event is not None for event in privacy.events):
        return None
    relation = "ADD_OR_REMOVE_ONE" if privacy.adjacency == "add-or-remove" else "REPLACE_SPECIAL"
    charged = "\n".join(
        f"    ({event.accounted_multiplier!r}, {event.hidden_rate!r}, {event.count}),"
        for event in privacy.events
    )
    return _CHECK.format(charged=charged, delta=privacy.delta, relation=relation)


_CHECK = """\
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant

charged = [  # accounted noise multiplier, sampling rate that is hidden, times charged
{charged}
]
for adversary in ("recipients", "server"):
    accountant = PLDAccountant(NeighboringRelation.{relation})
    for noise, rate, times in charged:
        event = dp_event.GaussianDpEvent(noise)
        if adversary == "recipients" and rate < 1:
            event = dp_event.PoissonSampledDpEvent(rate, event)
        accountant.compose(event, times)
    print(adversary, accountant.get_epsilon({delta!r}))
"""


def replace_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all; a UsageError where the folder cannot be written."""
    try:
        storage.replace(path, text.encode())
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}; a report is written into an existing folder that can be "
            "written. Name another one."
        ) from None


@dataclass(frozen=True)
class Comparison:
    """Reports by the names they are shown under, and why they may not be comparable."""

    names: tuple[str, ...]
    reports: tuple[Report, ...]
    cautions: tuple[str, ...]
    settings: Mapping[str, Sequence[str]]
    """Keys of the scenarios in which the runs differ, with the value of each run as TOML."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Keys of all metrics that any run has, those of full ranking and then secure sums last."""
        found = ({m.key: m.value for m in each.accuracy.metrics} for each in self.reports)
        keys = dict.fromkeys(key for metrics in found for key in told_once(metrics))
        return tuple(sorted(keys, key=lambda key: [*map(key.startswith, (SUMMED, "full_"))]))

    @property
    def popularity(self) -> dict[str, float]:
        """The metrics of the commonest items for everybody, where all runs share data and split."""
        if len({(_data(each), each.accuracy.holdout) for each in self.reports}) > 1:
            return {}
        found = ((m.key, m.baselines) for each in self.reports for m in each.accuracy.metrics)
        return {key: values["popularity"] for key, values in found if "popularity" in values}

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
                **{key: metrics.get(key) for key in self.metrics},
                **report.cost.model_dump(exclude={"note"}),
            }
            for name, report, metrics in zip(self.names, self.reports, values, strict=True)
        ]

    def to_html(self) -> str:
        """The comparison as one HTML page without scripts, or anything to load from elsewhere."""
        headline = next(iter(self.reports[0].accuracy.metrics), None)
        heading = f"{metric_name(headline.key)} by run" if headline else ""
        of = dict(zip(self.names, self.reports, strict=True))
        first = _data(self.reports[0])
        shown = {
            name: metric
            for name, each in of.items()
            if headline and _data(each) == first and (metric := each.metric(headline.key))
        }
        spent = {name: of[name].adversary("recipients").epsilon for name in shown}
        private = [(name, e, shown[name]) for name, e in spent.items() if e is not None]
        spread = [e for _, e, _ in private]
        comparable = (
            len(_deltas(self.reports)) == len({_data(each) for each in self.reports}) == 1
            and len(private) > 1
            and max(spread) > 1.02 * min(spread)  # less would draw how the search for noise ended
        )
        full, summed = ([m for m in self.metrics if m.startswith(p)] for p in ("full_", SUMMED))
        protocols = {
            "Among 99 items": [m for m in self.metrics if m not in (*full, *summed)],
            "Full ranking": full,
        }
        if summed:
            protocols["Full ranking, with noise"] = summed
        return render(
            "compare.html.j2",
            comparison=self,
            rows=self.rows(),
            metrics=self.metrics,
            protocols=protocols,
            heading=heading,
            plot=intervals(shown, heading) if shown else "",
            utility=privacy_utility(private, f"{heading} and ε") if comparable else "",
        )


def compare(directories: Sequence[Path]) -> Comparison:
    """The runs of several directories, in the order given.

    Raises:
        UsageError: when they are fewer than two, or one is named twice or is no finished run.
        IntegrityError: as `build.build`, for any of them.
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
    scenarios = [report.scenario for report in reports]
    choices = (scenarios, [place.name for place in places], [str(place) for place in places])
    # The shortest names that tell all runs apart.
    names = next(names for names in choices if len(set(names)) == len(names))
    settings = _differing([load(directory / SCENARIO).document() for directory in directories])
    return Comparison(tuple(names), reports, tuple(_cautions(reports)), settings)


def _differing(documents: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The keys of tables, dotted, whose values are not the same in all scenarios."""
    tables = [{k: v for k, v in each.items() if isinstance(v, Mapping)} for each in documents]
    keys = dict.fromkeys((t, key) for each in tables for t in each for key in each[t])
    found = {
        f"{table}.{key}": [as_toml(each.get(table, {}).get(key)) for each in tables]
        for table, key in keys
    }
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _data(report: Report) -> tuple[Scalar, ...]:
    """What tells the data of two runs apart: metrics of different data share no picture."""
    return tuple(report.data.get(key) for key in ("source", "users", "items", "interactions"))


def _deltas(reports: Sequence[Report]) -> set[float]:
    """Every δ at which a run has a guarantee."""
    private = (report.privacy for report in reports if report.privacy.private)
    return {privacy.delta for privacy in private if privacy.delta is not None}


def _cautions(reports: Sequence[Report]) -> Iterator[str]:
    if len({report.accuracy.holdout for report in reports}) > 1:
        yield "Metrics are of different splits (test and validation): do not compare them."
    if len({_data(report) for report in reports}) > 1:
        yield "The runs used different data: metrics and costs are not comparable."
    if len(deltas := _deltas(reports)) > 1:
        values = ", ".join(delta_text(delta) for delta in sorted(deltas))
        yield f"The runs state ε at different δ ({values}): an ε means less at a larger δ."
    if len({report.simulated for report in reports}) > 1:
        yield "Some runs are simulated and some are not: their costs are not comparable."
