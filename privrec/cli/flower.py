"""``privrec flower``: an app to start from, and keys for its devices."""

from __future__ import annotations

from pathlib import Path

import click

from privrec.cli.console import PATH, Commands, example, json_option, print_json
from privrec.errors import UsageError


@click.group(
    cls=Commands,
    epilog=example("privrec flower init my-app", "privrec flower enroll keys --roster roster.txt"),
)
def flower() -> None:
    """Deploy with Flower: write an app, enrol devices."""


@flower.command(epilog=example("privrec flower init my-app --scenario my.toml"))
@click.argument("folder", type=PATH)
@click.option("--scenario", type=PATH, help="What the app trains; a small one if unset.")
@json_option
def init(folder: Path, scenario: Path | None, as_json: bool) -> None:
    """Write a complete Flower app to FOLDER, ready for `flwr run`."""
    from privrec.flower.app import init as write

    files = write(folder, scenario)
    if as_json:
        print_json({"files": [str(path) for path in files]})
        return
    for path in files:
        click.echo(f"wrote {path}")
    click.echo(f"Run it: cd {folder} && flwr run .")


@flower.command(epilog=example("privrec flower enroll keys --roster roster.txt --number 7"))
@click.argument("keys", type=PATH)
@click.option("--roster", type=PATH, help="Add the devices to this file.")
@click.option("--office", type=PATH, help="Certify them with this secret key.")
@click.option("--partition", nargs=2, type=int, metavar="ID COUNT", help="Users of a partition.")
@click.option("--population", type=int, help="Users of the data set, with --partition.")
@click.option("--number", type=int, default=0, show_default=True, help="Of a single device.")
@json_option
def enroll(
    keys: Path,
    roster: Path | None,
    office: Path | None,
    partition: tuple[int, int] | None,
    population: int | None,
    number: int,
    as_json: bool,
) -> None:
    """Make the keys of a node in the new folder KEYS, and enrol its devices."""
    from privrec.flower.enrol import enroll as make

    if partition is None:
        users: range = range(number, number + 1)
    else:
        part, parts = partition
        if population is None or not 0 <= part < parts:
            raise UsageError(
                f"--partition {part} {parts}: ID is below COUNT, and --population N says how many "
                "users the data set has"
            )
        users = range(part, population, parts)
    identities = make(keys, users, roster, office)
    if as_json:
        print_json({"keys": str(keys), "identities": identities})
        return
    click.echo(f"{len(identities)} devices; their secret root is in {keys}: keep it there")
    if roster is not None:
        click.echo(f"Enrolled in {roster}: hand that file to every device, not by the server")
    if office is not None:
        click.echo(f"Certified by {office}: hand {office}.pub to every device")
