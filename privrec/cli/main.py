"""The command line: train and go on; the groups of other commands are added here.

Modules that load torch are imported inside the commands that train, so that help, ``plan`` and the
checks of a scenario answer at once. Exit codes are those of :mod:`privrec.errors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from privrec import __version__
from privrec.cli import console
from privrec.cli.init import init
from privrec.cli.machine import data, doctor, flower
from privrec.cli.plan import audit, plan, scenario
from privrec.cli.report import compare, population, report, write_report
from privrec.cli.serve import export, print_recommendations, recommend
from privrec.errors import PrivrecError, UsageError
from privrec.run.record import (
    EXAMPLE_AGAINST,
    OUTSIDE,
    SUMMED,
    adversary_text,
    epsilon_text,
    headline_metric,
    metric_name,
    told_once,
)

if TYPE_CHECKING:
    from privrec.report.render import Written
    from privrec.run.record import Observers, Result

QUICKSTART = "quickstart"
DEMO_USER = "7"

out_option = click.option(
    "--out",
    type=console.PATH,
    metavar="DIR",
    help="Folder of the run; must be new or empty. [default: runs/NAME-1, runs/NAME-2, …]",
)


tensorboard_option = click.option(
    "--tensorboard",
    type=console.PATH,
    metavar="DIR",
    help="Log to TensorBoard too (extra `track`).",
)
mlflow_option = click.option(
    "--mlflow", metavar="EXPERIMENT", help="Log to MLflow too (extra `track`)."
)


@click.group(
    cls=console.Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=console.example("privrec demo", "privrec run quickstart"),
)
@click.version_option(__version__, prog_name="privrec")
def main() -> None:
    """Train recommenders over people's own devices, within a user-level privacy budget.

    Exit codes: 0 done, 2 usage, 3 budget exhausted, 4 data integrity, 5 release refused,
    130 interrupted after a checkpoint.
    """


@main.command(epilog=console.example("privrec demo", "privrec demo --out runs/first"))
@out_option
@console.json_option
def demo(out: Path | None, as_json: bool) -> None:
    """The whole path on embedded data, offline. Train, recommend and report."""
    from privrec.run import lifecycle
    from privrec.scenario.load import load

    quickstart = load(QUICKSTART)
    path = _new_folder(quickstart.name, out)
    with _watched(path) as observer:
        result = lifecycle.start(quickstart, out=path, observer=observer)
    _finish(result, as_json, user=DEMO_USER)


main.add_command(init)


@main.command(
    epilog=console.example(
        "privrec run quickstart -s train.rounds=50 --out runs/short",
        "privrec run my.toml --data data/ml-1m --json",
        'privrec run frontier-ml-1m --row "ε = 4"',
    ),
)
@console.scenario_file
@console.settings_option
@console.data_option
@out_option
@click.option(
    "--row", metavar="NAME", help="Run this row of SCENARIO alone; -s rows= leaves out all of them."
)
@click.option(
    "--population",
    metavar="NAME",
    help="Tie the run to this population's lifetime budget: see `privrec population`.",
)
@tensorboard_option
@mlflow_option
@console.json_option
def run(
    scenario_file: Path,
    settings: tuple[str, ...],
    data_dir: Path | None,
    out: Path | None,
    row: str | None,
    population: str | None,
    tensorboard: Path | None,
    mlflow: str | None,
    as_json: bool,
) -> None:
    """Train what SCENARIO describes and write its report. Devices are simulated."""
    console.check_data(data_dir)
    from privrec.scenario.load import load

    described = load(scenario_file, settings)
    if row is not None:
        if row not in described.variants:
            rows = ", ".join(map(repr, described.variants)) or "no rows"
            raise UsageError(f"--row {row!r}: {scenario_file} has {rows}; name one that it has")
        described = described.variants[row].with_settings({"title": row})
    path = _new_folder(described.name, out)
    from privrec.run import lifecycle
    from privrec.run.task import load_task

    for variant in described.variants.values():
        load_task(variant, data_dir).check()  # before the first run is paid for
    with _watched(path, tensorboard, mlflow) as observer:
        result = lifecycle.start(
            described, out=path, data_dir=data_dir, observer=observer, population=population
        )
        result = lifecycle.with_rows(result, described, data_dir=data_dir, observer=observer)
    _finish(result, as_json)


@main.command(epilog=console.example("privrec resume runs/quickstart-1 --workers 4"))
@console.run_dir
@console.data_option
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Processes that train devices, as run.workers; any number gives the same bits.",
)
@tensorboard_option
@mlflow_option
@console.json_option
def resume(
    directory: Path,
    data_dir: Path | None,
    workers: int | None,
    tensorboard: Path | None,
    mlflow: str | None,
    as_json: bool,
) -> None:
    """Go on with the interrupted run in DIR from its checkpoint."""
    console.check_run(directory)
    console.check_data(data_dir)
    from privrec.run import lifecycle
    from privrec.scenario.load import load

    with _watched(directory, tensorboard, mlflow) as observer:
        result = lifecycle.resume(directory, data_dir=data_dir, observer=observer, workers=workers)
        described = load(directory / "scenario.toml")
        result = lifecycle.with_rows(result, described, data_dir=data_dir, observer=observer)
    _finish(result, as_json)


for _command in (
    plan, report, audit, compare, recommend, export, population, flower, data, scenario, doctor,
):  # fmt: skip
    main.add_command(_command)


# --------------------------------------------------------------------------- what commands share


def _new_folder(name: str, out: Path | None) -> Path:
    """``--out`` if a run can be written there; without it, the first free ``runs/NAME-number``."""
    if out is None:
        number = 1
        while (path := Path("runs") / f"{name}-{number}").exists():
            number += 1
        return path
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        from privrec.run.directory import going_on

        kind = "this folder is not empty" if out.is_dir() else "this is a file"
        raise UsageError(
            f"--out {out}: {kind}; a run needs a new or empty folder; name another, or go on "
            f"with a run that is there by: {going_on(out)}"
        )
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UsageError(
            f"--out {out}: {above.name} is a file; a run folder lies in a folder; name another"
        )
    return out


@contextmanager
def _watched(
    directory: Path, tensorboard: Path | None = None, mlflow: str | None = None
) -> Iterator[Observers]:
    """The console and the services that a run is shown on.

    A run that is finished is reported although an error came of it, such as its budget: a row may
    have failed, or the settlement with the population. That error is the one to show.
    """
    from privrec.run import record
    from privrec.run.progress import ConsoleObserver
    from privrec.run.record import Observer, Observers

    sinks: list[Observer] = []
    if tensorboard is not None:
        sinks.append(record.TensorBoardSink(tensorboard))
    if mlflow is not None:
        sinks.append(record.MLflowSink(mlflow))
    try:
        with Observers(ConsoleObserver(), *sinks) as observer:
            yield observer
    except Exception:
        if (directory / "result.json").is_file():
            with suppress(PrivrecError):
                _reported(directory)
        raise


def _reported(directory: Path) -> Written | None:
    """Write the report of a finished run; None where that fails, which does not unmake the run.

    Where the files of the run do not agree, no report may be made of them: that error is raised.
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


def _finish(result: Result, as_json: bool, *, user: str | None = None) -> None:
    """Report the run and print it, with recommendations for a user of the data set."""
    from privrec.run.recommend import recommend as recommendations

    pages = _reported(result.path)
    found = recommendations(result.path, user=user, k=10) if user is not None else ()
    with console.shown():
        if as_json:
            rows = [asdict(entry) for entry in found]
            page = None if pages is None else str(pages.html)
            more = {"recommendations": rows, "report": page} if found else {}
            console.print_json({**result.payload, **more})
            return
        print_result(result.payload)
        if found:
            print_recommendations(found, f"Recommendations for user {user}")
        click.echo(f"Run:    {result.path}")
        if pages is not None:
            click.echo(f"Report: {pages.html}")


def print_result(payload: Mapping[str, Any]) -> None:
    """Print the metrics, the privacy and the costs of a finished run, from its ``result.json``."""
    kind = "Simulated run" if payload["simulated"] else "Run"
    title = f"{kind}: {payload['scenario']}, {payload['rounds']} rounds"
    intervals, baselines = payload.get("intervals") or {}, payload.get("baselines") or {}
    rows = []
    for key, value in told_once(payload["metrics"]).items():
        low, high = intervals.get(key) or (None, None)
        within = "" if low is None else f"{low:.4f} to {high:.4f}"
        others = (baseline.get(key) for baseline in baselines.values())
        beside = ("" if other is None else f"{other:.4f}" for other in others)
        rows.append((metric_name(key), f"{value:.4f}", within, *beside))
    summed = any(key.startswith(SUMMED) for key in payload["metrics"])
    outside = f"{OUTSIDE} but for secure sums" if summed else OUTSIDE
    title = f"{title} (accuracy on {payload.get('holdout', 'test')}, {outside})"
    console.print_table(title, ("metric", "value", "95 %", *baselines), rows)
    console.print_lines(_privacy_lines(payload["privacy"]))
    costs = [
        (words, console.number_text(payload["cost"][name]), unit)
        for name, (words, unit) in _COSTS.items()
        if payload["cost"].get(name) is not None
    ]
    console.print_table(f"Cost ({OUTSIDE})", ("what", "value", "unit"), costs)
    if payload.get("rows"):
        _print_rows(payload["rows"], baselines)
    gaps = payload.get("gaps") or {}
    lines = [f"Not measured: {what}: {why}" for what, why in gaps.items()]
    console.print_lines([*_below_popularity(payload), *lines])


_COSTS = {
    "upload_bytes": ("upload of a device in a round", "bytes"),
    "download_bytes": ("download of a device in a round", "bytes"),
    "device_peak_bytes": ("memory of a device, at most", "bytes"),
    "cpu_s_per_device_round": ("CPU of a device in a round", "s"),
    "noise_deferred": ("devices' own noise that was not drawn", "share"),
    "wall_s": ("training and evaluation", "s"),
}


def _below_popularity(payload: Mapping[str, Any]) -> Iterator[str]:
    """A warning where the commonest items, the same for everybody, would have served better."""
    metrics = payload["metrics"]
    popularity = (payload.get("baselines") or {}).get("popularity") or {}
    key = headline_metric(metrics)
    if key is not None and key in popularity and metrics[key] < popularity[key]:
        remedy = "train for longer, or with other settings (privrec init proposes some)."
        if payload["privacy"].get("noise") != "none":
            remedy = (
                "noise drowns what users have in common: let everybody take part (devices.sampling "
                '= "everybody"), have more users or fewer items (data.min_item), or a larger ε.'
            )
        yield (
            f"warning: {metric_name(key)} of {metrics[key]:.3f} is below the {popularity[key]:.3f} "
            f"of the commonest items for everybody; {remedy}"
        )


def _privacy_lines(privacy: Mapping[str, Any]) -> Iterator[str]:
    single = privacy.get("examples")
    if privacy.get("noise") == "none":
        if single and single["adversary"] == "sums":
            what, no = "the noise of the sums hides single interactions", "users have no guarantee"
        elif single:
            what, no = "no noise was added to the sums", "so users have no guarantee"
        else:
            what, no = "no noise was added", "so there is no privacy guarantee"
        yield f"Privacy: {what}, {no}."
    elif privacy.get("noise_known"):
        yield "Privacy: the noise is known, so there is no privacy guarantee (ε = ∞)."
    else:
        yield (
            f"Privacy: ε = {epsilon_text(privacy['epsilon'], 3)} against "
            f"{adversary_text('recipients')}, ε = {epsilon_text(privacy['epsilon_server'], 3)} "
            f"against {adversary_text('server')}, at δ = {privacy['delta']:g}; unit "
            f"{privacy['unit']}, adjacency {privacy['adjacency']}."
        )
    if single is not None:
        yield (
            f"Single interactions, a unit of its own: ε = {epsilon_text(single['epsilon'], 3)} "
            f"against {EXAMPLE_AGAINST[single['adversary']]}, at δ = {single['delta']:g}."
        )


def _print_rows(rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, Any]) -> None:
    """A line for each row and baseline, with the metrics of the longest list."""
    wanted = _headlines(rows[0])
    lines = [[row["name"], *(_headline(row, key) for key in wanted), _by_tier(row)] for row in rows]
    for name, found in baselines.items():
        values = {key.removeprefix("full_"): value for key, value in found.items()} | found
        lines.append([f"{name} (centralised)", *(_headline(values, key) for key in wanted), ""])
    heads = ["", *(metric_name(key) for key in wanted), "NDCG by tier (own)"]
    console.print_table(f"Rows (metrics are {OUTSIDE})", heads, lines)


def _headlines(row: Mapping[str, Any]) -> list[str]:
    """Keys of the metrics at the longest cut-off, each under one name only."""
    shares = [key for key in row if key.startswith(("accuracy@", "precision@"))]
    if shares:
        return shares
    most = max((int(key.partition("@")[2]) for key in row if "@" in key), default=0)
    stems = ("hr", "ndcg", "recall", "full_ndcg", "own_ndcg", "own_full_ndcg")
    found = [f"{stem}@{most}" for stem in stems if f"{stem}@{most}" in row]
    return [
        key for key in found if "full_" not in key or row[key] != row.get(key.replace("full_", ""))
    ]


def _headline(row: Mapping[str, Any], key: str) -> str:
    bounds = (row.get("intervals") or {}).get(key)
    reach = f" ± {(bounds[1] - bounds[0]) / 2:.4f}" if bounds else ""
    return f"{row[key]:.4f}{reach}" if row.get(key) is not None else ""


def _by_tier(row: Mapping[str, Any]) -> str:
    tiers = row.get("tiers") or []
    keys = [key for key in tiers[0] if key.startswith("ndcg@")] if len(tiers) > 1 else []
    return " · ".join(f"{tier[keys[-1]]:.3f}" for tier in tiers) if keys else ""
