"""A `Report` as files: ``report.json``, a self-contained ``report.html`` and ``report.md``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from privrec.errors import UsageError
from privrec.report import examples, figures, sections
from privrec.report.derive import thinned
from privrec.report.model import Facts, Metric, Point, Report, Scalar
from privrec.report.plots import by_tier, plots, risks
from privrec.report.registry import to_registry
from privrec.run.wording import adversary_text, epsilon_text, metric_name


@dataclass(frozen=True)
class Written:
    """Where the files of a report lie."""

    json: Path
    html: Path
    markdown: Path
    registry: Path


def write(report: Report, directory: Path) -> Written:
    """Write the four files, each replaced as a whole.

    Args:
        report: What to write.
        directory: An existing directory, usually the run's own.

    Raises:
        UsageError: The directory does not exist or cannot be written.
    """
    endings = ("json", "html", "md", "registry.yaml")
    written = Written(*(directory / f"report.{ending}" for ending in endings))
    replace_text(written.json, to_json(report))
    replace_text(written.html, to_html(report))
    replace_text(written.markdown, to_markdown(report))
    replace_text(written.registry, to_registry(report))
    return written


def to_json(report: Report) -> str:
    """The report as JSON that satisfies `model.json_schema`."""
    return report.model_dump_json(indent=2) + "\n"


def to_html(report: Report) -> str:
    """The report as one HTML page without scripts, or anything to load from elsewhere."""
    return render(
        "report.html.j2",
        **_page(report),
        plots=plots(report),
        risks=risks(report),
        by_tier=by_tier(report),
    )


def to_markdown(report: Report) -> str:
    """The report as Markdown, with the same words and figures as the page, without pictures."""
    return render("report.md.j2", **_page(report))


def _page(report: Report) -> dict[str, Any]:
    return {
        "report": report,
        "recipients": report.adversary("recipients"),
        "server": report.adversary("server"),
        "headline": headline(report),
        "guarantee": _guarantee(report),
        "reading": sections.reading(report),
        "audit": sections.audit(report),
        "segments": sections.segments(report),
        "baselines": _baselines(report.accuracy.metrics),
        "columns": columns(report.rows),
        "check": verification(report),
    }


def _guarantee(report: Report) -> tuple[sections.Section, ...]:
    """The starred parts, and the guarantee of single interactions where there is one."""
    parts = sections.guarantee(report)
    return parts if report.examples is None else (*parts, examples.section(report.examples))


def headline(report: Report) -> Metric | None:
    """The metric that stands beside ε at the top: the first of the accuracy table."""
    return next(iter(report.accuracy.metrics), None)


def _baselines(metrics: Sequence[Metric]) -> list[str]:
    return list(dict.fromkeys(name for metric in metrics for name in metric.baselines))


def columns(rows: Sequence[Facts]) -> list[str]:
    """The keys of all rows in the order in which they first occur, the name first."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return sorted(keys, key=lambda key: key != "name")


def verification(report: Report) -> str | None:
    """Python lines that recompute both ε with dp-accounting alone; None without a guarantee."""
    if not report.privacy.private:
        return None
    charged = "\n".join(
        f"    ({event.accounted_multiplier!r}, {event.hidden_rate!r}, {event.count}),"
        for event in report.privacy.events
    )
    return _CHECK.format(charged=charged, delta=report.privacy.delta)


_CHECK = """\
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant

charged = [  # accounted noise multiplier, sampling rate that is hidden, times charged
{charged}
]
for adversary in ("recipients", "server"):
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)
    for noise, rate, times in charged:
        event = dp_event.GaussianDpEvent(noise)
        if adversary == "recipients" and rate < 1:
            event = dp_event.PoissonSampledDpEvent(rate, event)
        accountant.compose(event, times)
    print(adversary, accountant.get_epsilon({delta!r}))
"""


# --------------------------------------------------------------------------- templates and files


def render(template: str, **values: Any) -> str:
    """A template of ``templates/`` with values; unknown names are errors, HTML is escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    # S701: escaping is chosen by the template's name; Markdown has its own `cell` filter.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(["html.j2"], default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        adversary=adversary_text,
        bytes=figures.bytes_text,
        cell=_cell,
        delta=figures.delta_text,
        epsilon=epsilon_text,
        fact=figures.fact_text,
        fact_name=figures.fact_name,
        interval=figures.interval_text,
        metric_name=metric_name,
        number=figures.number_text,
        result=_result,
        seconds=figures.seconds_text,
        sparse=_sparse,
    )
    return environment


def _result(value: Scalar, key: str) -> str:
    return figures.result_text(key, value)


def _sparse(points: Sequence[Point]) -> list[Point]:
    return thinned(points, 20)


def _cell(text: object) -> str:
    """Text that stays within one cell or line of Markdown and is not taken for markup."""
    plain = " ".join(str(text).split())
    for sign in ("\\", "|", "*", "_", "`", "[", "]", "#"):
        plain = plain.replace(sign, f"\\{sign}")
    return plain.replace("<", "&lt;")


def replace_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all.

    Raises:
        UsageError: The folder does not exist or cannot be written.
    """
    try:
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}; a report is written into an existing folder that can be "
            "written. Name another one."
        ) from None
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(draft).chmod(0o644)
    Path(draft).replace(path)
