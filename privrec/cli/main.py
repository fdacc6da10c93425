"""The command line: commands that parse, call and print.

Modules that load torch are imported inside the commands that train, so that help, ``plan`` and the
checks of a scenario answer at once. Results go to standard output, progress and errors to standard
error. Exit codes are those of :mod:`privrec.errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from privrec import __version__
from privrec.cli.audit import audit
from privrec.cli.base import Commands, check_run, example, print_json, shown
from privrec.cli.base import json_option as _json
from privrec.cli.base import run_dir as _run_dir
from privrec.cli.flower import flower
from privrec.cli.review import population, report, write_report
from privrec.errors import PrivrecError, UsageError

if TYPE_CHECKING:
    from privrec.report.render import Written
    from privrec.run.loop import Result
    from privrec.run.record import Observer, Observers
    from privrec.scenario.load import Scenario
    from privrec.search.select import Selector

Command = TypeVar("Command", bound=Callable[..., Any])

QUICKSTART = Path(__file__).with_name("quickstart.toml")
DEMO_USER = "7"

_PATH = click.Path(path_type=Path)


def _options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


_scenario = click.argument("scenario_file", metavar="SCENARIO", type=_PATH)
_set = click.option(
    "-s",
    "--set",
    "settings",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Change a key of the scenario; an empty value removes it. May be repeated.",
)
_data = click.option(
    "--data",
    "data_dir",
    type=_PATH,
    envvar="PRIVREC_DATA",
    metavar="PATH",
    help="Where the data set lies: its folder, archive or file, or a folder above. "
    "[default: $PRIVREC_DATA]",
)
_out = click.option(
    "--out",
    type=_PATH,
    metavar="DIR",
    help="Folder of the run; must be new or empty. [default: runs/NAME-1, runs/NAME-2, …]",
)
_population = click.option(
    "--population",
    metavar="NAME",
    help="Tie the run to this population's lifetime budget: see `privrec population`.",
)
_track = _options(
    click.option(
        "--tensorboard", type=_PATH, metavar="DIR", help="Log to TensorBoard too (extra `track`)."
    ),
    click.option("--mlflow", metavar="EXPERIMENT", help="Log to MLflow too (extra `track`)."),
)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example("privrec demo", "privrec run scenarios/quickstart.toml"),
)
@click.version_option(__version__, prog_name="privrec")
def main() -> None:
    """Train recommenders over people's own devices, within a user-level privacy budget.

    Exit codes: 0 done, 2 usage, 3 budget exhausted, 4 data integrity, 5 release refused,
    130 interrupted after a checkpoint.
    """


@main.command(
    short_help="The whole path on embedded data, offline, in under a minute.",
    epilog=example("privrec demo", "privrec demo --out runs/first"),
)
@_out
@_json
def demo(out: Path | None, as_json: bool) -> None:
    """Train on embedded synthetic data, recommend and report: the whole path, offline."""
    from privrec.scenario.load import load

    result = _start(load(QUICKSTART), out, None, ())
    pages = _reported(result.path)
    from privrec.run.recommend import recommend as recommendations

    found = recommendations(result.path, user=DEMO_USER, history=None, k=10, data_dir=None)
    with shown():
        if as_json:
            rows = [entry.to_json() for entry in found]
            page = None if pages is None else str(pages.html)
            print_json({**result.payload, "recommendations": rows, "report": page})
            return
        from privrec.cli.tables import print_recommendations, print_result

        print_result(result.payload)
        print_recommendations(found, f"Recommendations for user {DEMO_USER}")
        _say_where(result.path, pages)


@main.command(
    short_help="Train what a scenario describes and write its report.",
    epilog=example(
        "privrec run scenarios/quickstart.toml -s train.rounds=50 --out runs/short",
        "privrec run scenarios/ml-1m-dp.toml --data data/ml-1m --json",
    ),
)
@_scenario
@_set
@_data
@_out
@_population
@_track
@_json
def run(
    scenario_file: Path,
    settings: tuple[str, ...],
    data_dir: Path | None,
    out: Path | None,
    population: str | None,
    tensorboard: Path | None,
    mlflow: str | None,
    as_json: bool,
) -> None:
    """Train what SCENARIO describes, on simulated devices, and write its report."""
    _check_data(data_dir)
    from privrec.scenario.load import load

    scenario = load(scenario_file, settings)
    result = _start(scenario, out, data_dir, _sinks(tensorboard, mlflow), population)
    _finish(result, as_json)


@main.command(
    short_help="Go on with an interrupted run.",
    epilog=example("privrec resume runs/quickstart-1"),
)
@_run_dir
@_data
@_track
@_json
def resume(
    directory: Path,
    data_dir: Path | None,
    tensorboard: Path | None,
    mlflow: str | None,
    as_json: bool,
) -> None:
    """Go on with the interrupted run in DIR from its last checkpoint."""
    check_run(directory)
    _check_data(data_dir)
    from privrec.run.lifecycle import resume as go_on
    from privrec.run.rows import with_rows
    from privrec.scenario.load import load

    sinks = _sinks(tensorboard, mlflow)
    with _reported_in_any_case(directory), _observed(sinks) as observer:
        result = go_on(directory, data_dir=data_dir, observer=observer)
        scenario = load(directory / "scenario.toml")
        result = with_rows(result, scenario, data_dir=data_dir, observer=observer)
    _finish(result, as_json)


@main.command(
    short_help="Noise, ε by round and signal to noise, before any data.",
    epilog=example("privrec plan scenarios/ml-1m-dp.toml -s privacy.epsilon=4"),
)
@_scenario
@_set
@_json
def plan(scenario_file: Path, settings: tuple[str, ...], as_json: bool) -> None:
    """Say what SCENARIO will cost, without touching data: noise, ε by round, signal to noise."""
    from privrec.cli.plan import plan as planned
    from privrec.scenario.load import load

    payload = planned(load(scenario_file, settings))
    if as_json:
        print_json(payload)
        return
    from privrec.cli.tables import print_plan

    print_plan(payload)


main.add_command(report)
main.add_command(audit)


@main.command(
    short_help="Put finished runs side by side.",
    epilog=example(
        "privrec compare runs/ml-1m-1 runs/ml-1m-dp-1",
        "privrec compare runs/* --out comparison.html",
    ),
)
@click.argument("directories", metavar="DIR...", type=_PATH, nargs=-1, required=True)
@click.option("--out", type=_PATH, metavar="FILE", help="Write the table as an HTML page too.")
@_json
def compare(directories: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Put finished runs side by side."""
    for directory in directories:
        check_run(directory)
    from privrec.report.compare import compare as side_by_side
    from privrec.report.compare import write

    comparison = side_by_side(directories)
    if out is not None:
        write(comparison, out)
    if as_json:
        print_json({"rows": comparison.rows(), "cautions": comparison.cautions})
        return
    from privrec.cli.tables import print_comparison

    print_comparison(comparison)


@main.command(
    short_help="Recommend items to a user or for a history.",
    epilog=example(
        "privrec recommend runs/ml-1m-1 --user 42",
        "privrec recommend runs/ml-1m-1 --history liked.txt -k 20",
    ),
)
@_run_dir
@click.option("--user", metavar="ID", help="A user of the data set.")
@click.option(
    "--history",
    type=_PATH,
    metavar="FILE",
    help="Ids of liked items, one a line; a user vector is fitted to them.",
)
@click.option(
    "-k", "k", type=click.IntRange(1, 10_000), default=10, show_default=True, help="How many items."
)
@click.option(
    "--selector",
    type=click.Choice(("scan", "hamming", "sketch", "simhash", "pghash", "block_sign", "auto")),
    default="scan",
    show_default=True,
    help="How the best items are found; scan is exact.",
)
@_data
@_json
def recommend(
    directory: Path,
    user: str | None,
    history: Path | None,
    k: int,
    selector: Selector,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Recommend items, by the model in DIR, to a user or to a history never seen in training."""
    if (user is None) == (history is None):
        given = "neither was given" if user is None else "both were given"
        raise UsageError(f"--user or --history: exactly one is needed, and {given}; choose one")
    check_run(directory)
    _check_data(data_dir)
    from privrec.run.recommend import recommend as recommendations

    found = recommendations(
        directory, user=user, history=history, k=k, data_dir=data_dir, selector=selector
    )
    if as_json:
        print_json([entry.to_json() for entry in found])
        return
    from privrec.cli.tables import print_recommendations

    whom = f"user {user}" if user is not None else f"the history in {history}"
    print_recommendations(found, f"Recommendations for {whom}")


main.add_command(population)
main.add_command(flower)


@main.group(cls=Commands, epilog=example("privrec data list", "privrec data fetch ml-1m"))
def data() -> None:
    """List, fetch and describe data sets."""


@data.command("list", epilog=example("privrec data list --json"))
@_data
@_json
def list_data(data_dir: Path | None, as_json: bool) -> None:
    """List the data sets that can be fetched and say which are here."""
    _check_data(data_dir)
    from privrec.cli.doctor import found_data
    from privrec.data.catalogue import ARCHIVES

    here = found_data(data_dir)
    rows = [
        {"name": name, "holds": archive.holds, "url": archive.url, "found": here.get(name)}
        for name, archive in ARCHIVES.items()
    ]
    if as_json:
        print_json(rows)
        return
    from privrec.cli.tables import print_table

    cells = [(row["name"], row["holds"], row["found"] or "not here") for row in rows]
    print_table("Data sets", ("name", "holds", "found"), cells)


@data.command(epilog=example("privrec data fetch ml-1m"))
@click.argument("name", metavar="NAME")
@click.option(
    "--data",
    "directory",
    type=_PATH,
    metavar="DIR",
    envvar="PRIVREC_DATA",
    help="Where to keep it. [default: $PRIVREC_DATA, else the user's cache]",
)
def fetch(name: str, directory: Path | None) -> None:
    """Download a data set over https, check it, and show its terms of use once."""
    from privrec.data.fetch import fetch as download

    path = download(name, directory=directory, echo=lambda terms: click.echo(terms, err=True))
    click.echo(path)


@data.command(epilog=example("privrec data describe ml-1m --data data/ml-1m"))
@click.argument("name", metavar="NAME|SCENARIO")
@_set
@_data
@_json
def describe(name: str, settings: tuple[str, ...], data_dir: Path | None, as_json: bool) -> None:
    """Read a data set, by its name or as a scenario file has it, and count what is in it."""
    _check_data(data_dir)
    scenario = _scenario_for_data(name, settings)
    from privrec import data as data_sets
    from privrec.scenario.rules import WIDE

    load = data_sets.load_texts if scenario.model.kind in WIDE else data_sets.load
    facts = load(scenario.data, data_dir=data_dir).describe()
    if as_json:
        print_json(facts)
        return
    from privrec.cli.tables import print_table

    rows = [(fact.replace("_", " "), value) for fact, value in facts.items()]
    print_table(f"Data of {name}", ("fact", "value"), rows)


@main.command(
    short_help="Check what this machine offers to a run.",
    epilog=example("privrec doctor"),
)
@_data
@_json
def doctor(data_dir: Path | None, as_json: bool) -> None:
    """Check Python, packages, threads, the secure generator, AES speed, state folder and data."""
    _check_data(data_dir)
    from privrec.cli.doctor import examine

    findings = examine(data_dir)
    if as_json:
        print_json([finding.to_json() for finding in findings])
    else:
        from privrec.cli.tables import print_findings

        print_findings(findings)
    failed = [finding.name for finding in findings if finding.level == "fail"]
    if failed:
        raise PrivrecError(f"{', '.join(failed)}: a run needs this; see the remedy above")


# --------------------------------------------------------------------------- what commands share


def _start(
    scenario: Scenario,
    out: Path | None,
    data_dir: Path | None,
    sinks: Iterable[Observer],
    population: str | None = None,
) -> Result:
    path = _new_directory(scenario.name) if out is None else _checked_out(out)
    from privrec.run.lifecycle import check, start
    from privrec.run.rows import with_rows

    for _, variant in scenario.variants():
        check(variant, data_dir)  # before the first run is paid for
    with _reported_in_any_case(path), _observed(sinks) as observer:
        result = start(
            scenario, out=path, data_dir=data_dir, observer=observer, population=population
        )
        return with_rows(result, scenario, data_dir=data_dir, observer=observer)


@contextmanager
def _reported_in_any_case(directory: Path) -> Iterator[None]:
    """Write the report of a run that is finished although an error came of it, such as its budget.

    A row may have failed, or the settlement with the population; that error is the one to show.
    """
    try:
        yield
    except Exception:
        if (directory / "result.json").is_file():
            with suppress(PrivrecError):
                _reported(directory)
        raise


def _check_data(data_dir: Path | None) -> None:
    """Refuse a ``--data`` that does not exist; ``PRIVREC_DATA`` may name a folder yet to be made.

    Raises:
        UsageError: If it was given on the command line and is not there.
    """
    source = click.get_current_context().get_parameter_source("data_dir")
    if source is ParameterSource.COMMANDLINE and data_dir is not None and not data_dir.exists():
        raise UsageError(
            f"--data {data_dir}: there is no such file or folder; it must hold the data set; "
            "correct the path, or see: privrec data list"
        )


def _new_directory(name: str) -> Path:
    """The first of ``runs/NAME-1``, ``runs/NAME-2``, … that does not exist."""
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path


def _checked_out(path: Path) -> Path:
    """``--out``, refused before any work is done if a run cannot be written there.

    Raises:
        UsageError: If it is a file or a folder with something in it.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        kind = "this folder is not empty" if path.is_dir() else "this is a file"
        raise UsageError(
            f"--out {path}: {kind}; a run needs a new or empty folder; name another, or go on "
            f"with a run that is there by: privrec resume {path}"
        )
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UsageError(
            f"--out {path}: {above.name} is a file; a run folder lies in a folder; name another"
        )
    return path


def _sinks(tensorboard: Path | None, mlflow: str | None) -> list[Observer]:
    from privrec.run.tracking import MLflowSink, TensorBoardSink

    sinks: list[Observer] = []
    if tensorboard is not None:
        sinks.append(TensorBoardSink(tensorboard))
    if mlflow is not None:
        sinks.append(MLflowSink(mlflow))
    return sinks


def _observed(sinks: Iterable[Observer]) -> Observers:
    """The console and ``sinks`` as one observer, which is closed on leaving its ``with``."""
    from privrec.cli import console
    from privrec.run import record

    return record.Observers(console.console_observer(), *sinks)


def _finish(result: Result, as_json: bool) -> None:
    pages = _reported(result.path)
    with shown():
        if as_json:
            print_json(result.payload)
            return
        from privrec.cli.tables import print_result

        print_result(result.payload)
        _say_where(result.path, pages)


def _reported(directory: Path) -> Written | None:
    """Write the report of a finished run; None where that fails, which does not unmake the run.

    Raises:
        PrivrecError: If the files of the run do not agree, so that no report may be made of them.
    """
    try:
        return write_report(directory)
    except PrivrecError:
        raise
    except Exception as error:
        with suppress(OSError):
            click.echo(
                f"warning: the run is finished and is in {directory}; its report could not be "
                f"written ({type(error).__name__}: {error}). Write it by: privrec report "
                f"{directory}",
                err=True,
            )
        return None


def _say_where(directory: Path, pages: Written | None) -> None:
    click.echo(f"Run:    {directory}")
    if pages is not None:
        click.echo(f"Report: {pages.html}")


def _scenario_for_data(name: str, settings: Sequence[str]) -> Scenario:
    from privrec.scenario.load import Scenario, load
    from privrec.scenario.rules import WIDE

    if name.endswith(".toml"):
        return load(name, settings)
    text = 'name = "data"\n[privacy]\nnoise = "none"\n'
    kinds = [f"model.kind={kind}" for kind, sources in WIDE.items() if name in sources]
    wide = [*kinds, "train.loss=full_softmax", "devices.popularity=public"] if kinds else []
    given = [f"data.source={name}", *wide, *settings]
    return Scenario.from_toml(text, given, source=f"data {name}")
