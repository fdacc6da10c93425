"""A `Report` as files: JSON, a self-contained page, Markdown, and a draft for a registry."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privrec.errors import UsageError
from privrec.report.model import Report
from privrec.report.plots import by_tier, plots, risks
from privrec.report.words import render, tables


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
        directory: an existing one, usually the run's own.

    Raises:
        UsageError: when the directory does not exist or cannot be written.
    """
    endings = ("json", "html", "md", "registry.yaml")
    written = Written(*(directory / f"report.{ending}" for ending in endings))
    replace_text(written.json, to_json(report))
    replace_text(written.html, to_html(report))
    replace_text(written.markdown, to_markdown(report))
    replace_text(written.registry, to_registry(report))
    return written


def to_json(report: Report) -> str:
    """Write the report as JSON that satisfies `model.json_schema`."""
    return report.model_dump_json(indent=2) + "\n"


def to_html(report: Report) -> str:
    """Write one HTML page without scripts, or anything to load from elsewhere."""
    pictures = {"reading": risks(report), "rounds": plots(report), "tiers": by_tier(report)}
    return render("report.html.j2", **_page(report), pictures=pictures)


def to_markdown(report: Report) -> str:
    """Write Markdown with the same sections as the page, without pictures."""
    return render("report.md.j2", **_page(report))


def to_registry(report: Report) -> str:
    """Draft an entry for a registry of deployments, in YAML; a simulated run says it is none."""
    return render("registry.yaml.j2", report=report)


def _page(report: Report) -> dict[str, Any]:
    check = verification(report)
    bare = {"tag": "", "texts": (), "pairs": (), "table": None}
    found = tables("sections.toml.j2", report=report, check=check)["sections"]
    sections = [{**bare, **section} for section in found]
    return {"report": report, "sections": sections, "check": check}


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


def replace_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all.

    Raises:
        UsageError: when the folder does not exist or cannot be written.
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
