"""What a privacy reviewer works with: ``privrec report``, ``compare`` and ``population``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from privrec.cli import console
from privrec.errors import IntegrityError, UsageError
from privrec.run.record import OUTSIDE, adversary_text, epsilon_text, metric_name

if TYPE_CHECKING:
    from privrec.privacy.population import Population
    from privrec.report.render import Written
    from privrec.report.verify import Verdict

_name = click.argument("name", metavar="NAME")


class _Report(console.Commands):
    default = "write"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's, with ``write`` put before what is none of the group's commands."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=_Report,
    epilog=console.example(
        "privrec report runs/quickstart-1",
        "privrec report key runs/quickstart-1",
        "privrec report verify runs/quickstart-1 --key server.pub",
    ),
)
def report() -> None:
    """Write the report of a finished run again, or verify one."""


@report.command(
    epilog=console.example(
        "privrec report write runs/quickstart-1",
        "privrec report write ledger.jsonl --facts facts.toml",
    )
)
@click.argument("path", metavar="DIR|LEDGER", type=console.PATH)
@click.option(
    "--facts",
    type=console.PATH,
    metavar="FILE",
    help="What the operator tells of training that LEDGER accounts for, as TOML.",
)
@console.json_option
def write(path: Path, facts: Path | None, as_json: bool) -> None:
    """Write report.html, report.md, report.json and a registry draft of the finished run in DIR.

    LEDGER is one that other training charged with privrec.Ledger; its reports lie beside it.
    """
    if path.is_file():
        from privrec.report.build import build_account
        from privrec.report.render import write as write_files

        pages = write_files(build_account(path, facts), path.parent)
    elif facts is not None:
        raise UsageError(f"--facts {facts}: a run tells its own; name a ledger, or leave it out")
    else:
        console.check_run(path)
        pages = write_report(path)
    if as_json:
        click.echo(pages.json.read_text("utf-8").rstrip("\n"))
        return
    for page in (pages.html, pages.markdown, pages.json, pages.registry):
        click.echo(page)


@report.command(
    epilog=console.example("privrec report verify runs/quickstart-1/report.json --key server.pub")
)
@click.argument("path", metavar="FILE", type=console.PATH)
@click.option(
    "--key",
    metavar="HEX|FILE",
    help="The server's public key, as `privrec report key` prints it, got by another way than "
    "FILE. [default: the one that this machine keeps for the run]",
)
@click.option(
    "--trust-named-key",
    is_flag=True,
    help="Go on with the key that the ledger itself names: shows damage, not a forgery as a whole.",
)
@console.json_option
def verify(path: Path, key: str | None, trust_named_key: bool, as_json: bool) -> None:
    """Recompute the report in FILE from the ledger beside it, and say what does not match."""
    from privrec.report.verify import public_key
    from privrec.report.verify import verify as judge

    verdict = judge(
        path, key=None if key is None else public_key(key), trust_named_key=trust_named_key
    )
    if as_json:
        console.print_json(verdict.to_json())
    else:
        _print_verdict(verdict)
    if not verdict.holds:
        raise IntegrityError(
            f"{path}: {len(verdict.mismatches)} things do not match; do not rely on this report"
        )


@report.command(
    epilog=console.example(
        "privrec report key runs/quickstart-1", "privrec report key ledger.jsonl"
    )
)
@click.argument("path", metavar="DIR|LEDGER", type=console.PATH)
def key(path: Path) -> None:
    """Print the public key that signed the run in DIR, or a LEDGER, for reviewers to verify by.

    Only the machine that ran or charged it can tell; send the key by another way than the report.
    """
    if not path.is_file():
        console.check_run(path)
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    from privrec.privacy.ledger import Ledger
    from privrec.run.directory import LEDGER, public_key_of

    with Ledger.open(path if path.is_file() else path / LEDGER, repair=False) as ledger:
        found = public_key_of(str(ledger.header.get("run_id", "")))
    if found is None:
        raise UsageError(
            f"{path}: this machine does not keep its key; ask whoever made it, or set "
            "PRIVREC_STATE to where its secrets are"
        )
    click.echo(found.public_bytes(Encoding.Raw, PublicFormat.Raw).hex())


@report.command(epilog=console.example("privrec report schema"))
def schema() -> None:
    """Print the JSON Schema that every report.json of this version satisfies."""
    from privrec.report.model import schema_text

    click.echo(schema_text().rstrip("\n"))


def _print_verdict(verdict: Verdict) -> None:
    if verdict.mismatches:
        rows = [(each.where, each.reason) for each in verdict.mismatches]
        console.print_table("Does not match", ("where", "why"), rows)
    lists = {
        "Agrees:": verdict.checked,
        "Not checked:": verdict.unchecked,
        "On the operator's word, since no verifier can see it:": [e.title for e in verdict.word],
    }
    for heading, entries in lists.items():
        if entries:
            console.print_lines([heading, *(f"  {entry}" for entry in entries)])
    if not verdict.anchored:
        warning = "The key was the one that the ledger itself names"
        console.print_lines([f"{warning}: whoever made the files can have made up all of them."])


def write_report(directory: Path) -> Written:
    """Write the report of the finished run in ``directory`` into it."""
    from privrec.report.build import build
    from privrec.report.render import write as write_files

    return write_files(build(directory), directory)


@click.command(
    epilog=console.example(
        "privrec compare runs/ml-1m-1 runs/ml-1m-dp-1",
        "privrec compare runs/* --out comparison.html",
    ),
)
@click.argument("directories", metavar="DIR...", type=console.PATH, nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the table as an HTML page too.",
)
@console.json_option
def compare(directories: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Put finished runs side by side, with the settings that differ and popularity beside them.

    A terminal that is too narrow for a line a run gets a column a run; a pipe gets lines of fields
    with tabs between them.
    """
    for directory in directories:
        console.check_run(directory)
    from privrec.report.render import compare as side_by_side
    from privrec.report.render import replace_text

    comparison = side_by_side(directories)
    if out is not None:
        replace_text(out, comparison.to_html())
    if as_json:
        named = ("popularity", "settings", "cautions")
        more = {name: getattr(comparison, name) for name in named}
        console.print_json({"rows": comparison.rows(), **more})
        return
    columns = [*_HEADINGS, *comparison.metrics, *_COSTS]
    found = comparison.rows()
    if popularity := comparison.popularity:
        found.append({"name": "popularity", **popularity})
    rows = [[_cell(c, row[c]) if c in row else "" for c in columns] for row in found]
    names = {**_HEADINGS, **_COSTS}
    headings = [names.get(column) or metric_name(column) for column in columns]
    cautions = [f"caution: {caution}" for caution in comparison.cautions]
    width = console.terminal_width()
    if width is None:
        click.echo("\t".join((*headings, *comparison.settings)))
        own = [*zip(*comparison.settings.values(), strict=True), [""] * len(comparison.settings)]
        for (name, *cells), values in zip(rows, own, strict=False):
            click.echo("\t".join((name, *(cell.replace(",", "") for cell in cells), *values)))
        for caution in cautions:
            click.echo(caution, err=True)
        return
    title = f"Runs (metrics are {OUTSIDE})"
    if sum(max(map(len, column)) + 2 for column in zip(headings, *rows, strict=True)) > width:
        first, *others = zip(headings, *rows, strict=True)
        console.print_table(title, ("", *first[1:]), others)
    else:
        console.print_table(title, headings, rows)
    if differing := [(key, *values) for key, values in comparison.settings.items()]:
        console.print_table("Settings that differ", ("", *comparison.names), differing)
    if cautions:
        console.print_lines(cautions)


def _cell(column: str, value: Any) -> str:
    return epsilon_text(value, 3) if "epsilon" in column else console.number_text(value)


_HEADINGS = {
    "name": "run",
    "rounds": "rounds",
    "epsilon": "ε, recipients",
    "epsilon_server": "ε, cohorts known",
}
_COSTS = {"upload_bytes": "upload, bytes", "wall_s": "wall, s"}


@click.group(
    cls=console.Commands,
    epilog=console.example(
        "privrec population create readers --epsilon 8 --delta 1e-6",
        "privrec run scenarios/quickstart.toml --population readers",
    ),
)
def population() -> None:
    """Lifetime budgets: one limit on ε over several runs on the same users."""


@population.command(
    epilog=console.example("privrec population create readers --epsilon 8 --delta 1e-6")
)
@_name
@click.option("--epsilon", type=float, required=True, help="Lifetime limit on ε.")
@click.option("--delta", type=float, required=True, help="δ of that limit.")
@click.option(
    "--against",
    type=click.Choice(["recipients", "server"]),
    default="recipients",
    show_default=True,
    help="The adversary of that limit.",
)
@console.json_option
def create(name: str, epsilon: float, delta: float, against: Any, as_json: bool) -> None:
    """Begin the ledger of a population; its limit is never changed."""
    from privrec.privacy.population import create as begin

    _print_population(begin(name, epsilon=epsilon, delta=delta, against=against), as_json)


@population.command(epilog=console.example("privrec population show readers"))
@_name
@console.json_option
def show(name: str, as_json: bool) -> None:
    """Say what the runs on a population have spent."""
    from privrec.privacy.population import read

    _print_population(read(name), as_json)


def _print_population(found: Population, as_json: bool) -> None:
    from privrec.privacy.events import epsilon

    spent = {run: epsilon(counts, found.delta, found.against) for run, counts in found.runs.items()}
    if as_json:
        limit = {key: getattr(found, key) for key in ("name", "epsilon", "delta", "against")}
        console.print_json({**limit, "spent": found.spent(), "runs": spent})
        return
    limit_text = f"{found.epsilon:g} spent or set aside, against {adversary_text(found.against)}"
    so_far = f"Population {found.name}: ε = {epsilon_text(found.spent(), 3)} of {limit_text}"
    console.print_lines([f"{so_far}, at δ = {found.delta:g}."])
    if spent:
        rows = [(run, epsilon_text(value, 3)) for run, value in spent.items()]
        console.print_table("Runs", ("run", "ε by itself"), rows)
