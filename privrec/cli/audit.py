"""``privrec audit``: what this build does, measured against what is accounted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from privrec.cli.base import check_run, example, json_option, print_json
from privrec.errors import ReleaseRefused

if TYPE_CHECKING:
    from privrec.report.model import AuditPart


@click.command(
    short_help="Check noise, clipping, rounding and sampling of this build.",
    epilog=example("privrec audit scenarios/quickstart.toml", "privrec audit runs/quickstart-1"),
)
@click.argument("path", metavar="SCENARIO|DIR", type=click.Path(path_type=Path))
@click.option(
    "-s",
    "--set",
    "settings",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Change a key of the scenario; an empty value removes it. May be repeated.",
)
@click.option(
    "--canaries",
    type=click.IntRange(0, 100_000),
    default=1000,
    show_default=True,
    help="Canaries of the empirical bounds on ε; 0 leaves them out.",
)
@json_option
def audit(path: Path, settings: Sequence[str], canaries: int, as_json: bool) -> None:
    """Audit this build with a SCENARIO's settings, or with those of the run in DIR.

    No data is looked at. Of a run's directory the findings are kept as audit.json, from which its
    report takes them.
    """
    from privrec.audit import audit as examine
    from privrec.report.build import AUDIT
    from privrec.report.render import replace_text
    from privrec.scenario.load import load

    of_run = path.is_dir()
    if of_run:
        check_run(path)
    scenario = load(path / "scenario.toml" if of_run else path, tuple(settings))
    found = examine(scenario, canaries=canaries)
    if of_run and not settings:
        replace_text(path / AUDIT, found.model_dump_json(indent=2) + "\n")
    if as_json:
        print_json(found.model_dump())
    else:
        _print(found)
    if not found.passed:
        failed = [check.probe for check in found.checks if not check.passed]
        raise ReleaseRefused(
            f"{', '.join(failed)}: this build does not do what is accounted; release nothing that "
            "it makes"
        )


def _print(found: AuditPart) -> None:
    from privrec.cli.tables import print_lines, print_table
    from privrec.run.wording import epsilon_text

    rows = [
        ("ok" if check.passed else "FAIL", check.probe, check.found, check.expected)
        for check in found.checks
    ]
    print_table(f"Audit of privrec {found.version}", ("", "check", "found", "expected"), rows)
    bound = ""
    if found.lower_bound is not None and found.confidence is not None:
        bound = (
            f"ε is at least {found.lower_bound:.3g} with {found.confidence:.0%} confidence, and "
            f"{epsilon_text(found.claimed)} is claimed. "
        )
    print_lines([bound + found.method])
