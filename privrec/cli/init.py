"""``privrec init``: a scenario for an own table or a published set, with settings that fit it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from privrec.cli import console
from privrec.errors import UsageError

if TYPE_CHECKING:
    from privrec.data.sniff import Look
    from privrec.scenario.load import Scenario

_TABLES = ("data", "model", "devices", "train", "privacy", "run")
_HEAD = """\
# {:,} users, {:,} items and {:,} interactions to learn from were counted in
# {table}
# without noise, and settings follow from them: these figures are public from here on.
# docs/scenarios.md has every key. min_rating, min_user and min_item leave rows out.

"""


@click.command(
    epilog=console.example(
        "privrec init ratings.csv",
        "privrec init orders.csv --epsilon 4 -s data.min_user=5 --out shop.toml",
        "privrec init ml-100k --epsilon 4",
    )
)
@click.argument("table", metavar="TABLE|NAME", type=console.PATH)
@click.option(
    "--epsilon",
    type=click.FloatRange(1e-4, 1000),
    default=8.0,
    show_default=True,
    help="ε for every user, at a δ that fits how many they are.",
)
@click.option(
    "--upload-bytes",
    type=click.IntRange(min=1),
    metavar="N",
    help="The most that a device sends in a round; vectors are shortened to it.",
)
@click.option("--titles", type=console.PATH, metavar="FILE", help="A table of items and titles.")
@click.option(
    "--out", type=console.PATH, metavar="FILE", help="The scenario. [default: TABLE's name, .toml]"
)
@console.settings_option
@console.data_option
@console.json_option
def init(
    table: Path,
    epsilon: float,
    upload_bytes: int | None,
    titles: Path | None,
    out: Path | None,
    settings: tuple[str, ...],
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Write a scenario for a TABLE of your own or a published set, with settings that fit it.

    Columns are found by their names or, without a header, by their look; what was taken is
    printed. The settings follow from how many users, items and interactions there are. A published
    set goes by its NAME, such as ml-100k: see `privrec data list`. Devices weigh public features of
    its items, where it has them.
    """
    console.check_data(data_dir)
    from privrec.cli.plan import planned
    from privrec.data import load as read
    from privrec.scenario.defaults import private_settings
    from privrec.scenario.kinds import READERS

    name, path = _name(table), out or Path(f"{_name(table)}.toml")
    if path.exists():
        raise UsageError(f"{path}: this file is there, and is kept; name another by --out")
    titled = () if titles is None else (f"data.titles={titles}",)
    if str(table) in set(READERS) - {"table"}:
        look, bare = _published(table, (*titled, *settings))
    else:
        data_dir = None  # it is where the command line says
        look, bare = look_at_table(table, (*titled, *settings))
    split = read(bare.data, data_dir=data_dir)
    facts, sizes = split.describe(), (split.train.n_users, split.train.n_items, split.train.size)
    document: Mapping[str, Mapping[str, Any]]
    fitting = private_settings(
        *sizes,
        epsilon=epsilon,
        upload_bytes=upload_bytes or math.inf,
        timed=split.train.times is not None,
    )
    document = {"data": look.keys, **fitting}
    if hasattr(bare.data, "item_features") and split.train.titles is not None:
        document["data"] = {**look.keys, "item_features": True}  # genres stand beside titles
    scenario = _scenario(table, document, settings)
    warnings = planned(scenario, split.train.n_items)["warnings"]
    document = _kept(document, scenario, settings)
    path.write_text(_HEAD.format(*sizes, table=table) + _toml(name, document), "utf-8")
    if as_json:
        taken = [dict(zip(("what", "taken", "why"), each, strict=True)) for each in look.reasons]
        found = {"scenario": str(path), "taken": taken, "data": facts, "warnings": warnings}
        console.print_json(found)
        return
    if look.reasons:
        print_look(look, table)
    rows = [(fact.replace("_", " "), value) for fact, value in facts.items()]
    console.print_table("Data", ("fact", "value"), rows)
    if warnings:
        console.print_lines(f"warning: {warning}" for warning in warnings)
    steps = ["then see what its budget costs, and train by it:", f"  privrec plan {path}"]
    if scenario.privacy.in_shares:  # which no plan can tell without the data
        steps = ["then train by it:"]
    place = "" if data_dir is None else f" --data {data_dir}"
    lines = [f"Wrote {path}: read it, {steps[0]}", *steps[1:], f"  privrec run {path}{place}"]
    click.echo("\n".join(lines))


def _published(name: Path, settings: Sequence[str]) -> tuple[Look, Scenario]:
    """The same as :func:`look_at_table` of a source that has no columns to find."""
    from privrec.data.sniff import Look

    settings = [setting for setting in settings if setting.strip().startswith("data.")]
    bare = {"data": {"source": str(name)}, "privacy": {"noise": "none"}}
    return Look(bare["data"], ()), _scenario(name, bare, settings)


def look_at_table(table: Path, settings: Sequence[str]) -> tuple[Look, Scenario]:
    """How a table is read, but for what ``-s`` says of ``[data]``; and a scenario with its data."""
    from privrec.data.sniff import look_at

    settings = [setting for setting in settings if setting.strip().startswith("data.")]
    bare = {"data": {"source": "table", "path": str(table)}, "privacy": {"noise": "none"}}
    said = _kept(bare, _scenario(table, bare, settings), settings)["data"]
    if "titles" in said and "title_column" not in said:
        titles = look_at(Path(said["titles"]), needed=("title",)).keys
        said |= {"title_column": titles["title_column"]}
    look = look_at(table, said)
    return look, _scenario(table, {**bare, "data": look.keys}, ())


def print_look(look: Look, table: Path) -> None:
    """Print what was taken for what in a table."""
    console.print_table(f"Columns of {table}", ("what", "taken", "because of"), look.reasons)


def _name(table: Path) -> str:
    """A table's name as that of a scenario."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", table.name.partition(".")[0])
    return plain.strip("-._")[:64] or "own"


def _scenario(
    table: Path, document: Mapping[str, Mapping[str, Any]], settings: Sequence[str]
) -> Scenario:
    from privrec.scenario.load import Scenario

    text = _toml(_name(table), document)
    return Scenario.from_toml(text, settings, source=f"a scenario for {table}")


def _kept(
    document: Mapping[str, Mapping[str, Any]], scenario: Scenario, settings: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The keys of a document and those of ``-s``, as a scenario made of both has them."""
    resolved = scenario.document()
    said = {setting.partition("=")[0].strip() for setting in settings}
    return {
        table: {
            key: value
            for key, value in resolved[table].items()
            if key in document.get(table, ()) or f"{table}.{key}" in said
        }
        for table in _TABLES
    }


def _toml(name: str, document: Mapping[str, Mapping[str, Any]]) -> str:
    """A scenario as text, one key a line, tables apart."""
    from privrec.scenario.keys import as_toml

    tables = [
        "\n".join([f"[{table}]", *(f"{key} = {as_toml(value)}" for key, value in keys.items())])
        for table, keys in document.items()
        if keys
    ]
    return "\n\n".join([f"name = {as_toml(name)}", *tables]) + "\n"
