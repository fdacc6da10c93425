"""What commands print for people: tables on standard output, plain where it is not a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from privrec.run.record import OUTSIDE
from privrec.run.wording import adversary_text, epsilon_text, metric_name

if TYPE_CHECKING:
    from privrec.cli.doctor import Finding
    from privrec.report.compare import Comparison
    from privrec.run.recommend import Recommendation

EPSILON_DIGITS = 3
_MARKS = {"ok": "ok", "note": "note", "fail": "FAIL"}


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under column headings; columns of numbers are aligned to the right.

    Args:
        title: Line above the table.
        columns: Headings.
        rows: Cells, as many in each row as there are headings.
    """
    cells = [[_text(cell) for cell in row] for row in rows]
    numeric = [all(_is_number(row[place]) for row in cells) for place in range(len(columns))]
    table = Table(box=None)
    for name, right in zip(columns, numeric, strict=True):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in cells:
        table.add_row(*(escape(cell) for cell in row))
    console = Console(highlight=False)
    console.print(escape(title), style="bold")
    console.print(table)
    console.print()


def print_lines(lines: Iterable[str]) -> None:
    """Print sentences, wrapped at the width of the terminal."""
    console = Console(highlight=False)
    for line in lines:
        console.print(escape(line))
    console.print()


def print_result(payload: Mapping[str, Any]) -> None:
    """Print the metrics, the privacy and the costs of a finished run.

    Args:
        payload: The content of ``result.json``.
    """
    kind = "Simulated run" if payload["simulated"] else "Run"
    title = f"{kind}: {payload['scenario']}, {payload['rounds']} rounds"
    holdout = payload.get("holdout", "test")
    _print_metrics(payload, f"{title} (accuracy on {holdout}, {OUTSIDE})")
    print_lines(_privacy_lines(payload["privacy"]))
    _print_cost(payload["cost"])
    if payload.get("rows"):
        _print_variants(payload)
    print_lines(f"Not measured: {what}: {why}" for what, why in (payload.get("gaps") or {}).items())


def _print_metrics(payload: Mapping[str, Any], title: str) -> None:
    intervals, baselines = payload.get("intervals") or {}, payload.get("baselines") or {}
    rows = [
        [
            metric_name(key),
            f"{value:.4f}",
            _interval(intervals.get(key)),
            *(_digits(baseline.get(key)) for baseline in baselines.values()),
        ]
        for key, value in payload["metrics"].items()
    ]
    print_table(title, ("metric", "value", "95 %", *baselines), rows)


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else ""


def _privacy_lines(privacy: Mapping[str, Any]) -> list[str]:
    single = privacy.get("examples")
    return [*_user_lines(privacy), *([] if single is None else [_example_line(single)])]


def _example_line(single: Mapping[str, Any]) -> str:
    return (
        f"Single interactions, a unit of its own: ε = {_epsilon(single['epsilon'])} against "
        f"whoever sees a device's upload, at δ = {single['delta']:g}."
    )


def _user_lines(privacy: Mapping[str, Any]) -> list[str]:
    if privacy.get("noise") == "none" and privacy.get("examples"):
        return ["Privacy: no noise was added to the sums, so users have no guarantee."]
    if privacy.get("noise") == "none":
        return ["Privacy: no noise was added, so there is no privacy guarantee."]
    if privacy.get("noise_known"):
        return ["Privacy: the noise is known, so there is no privacy guarantee (ε = ∞)."]
    return [
        f"Privacy: ε = {_epsilon(privacy['epsilon'])} against {adversary_text('recipients')}, "
        f"ε = {_epsilon(privacy['epsilon_server'])} against {adversary_text('server')}, "
        f"at δ = {privacy['delta']:g}; unit {privacy['unit']}, adjacency {privacy['adjacency']}."
    ]


def _epsilon(value: Any) -> str:
    return epsilon_text(value, EPSILON_DIGITS)


_COSTS = {
    "upload_bytes": ("upload of a device in a round", "bytes"),
    "download_bytes": ("download of a device in a round", "bytes"),
    "device_peak_bytes": ("memory of a device, at most", "bytes"),
    "cpu_s_per_device_round": ("CPU of a device in a round", "s"),
    "noise_deferred": ("devices' own noise that was not drawn", "share"),
    "wall_s": ("the whole run", "s"),
}


def _print_cost(cost: Mapping[str, Any]) -> None:
    rows = [
        (words, _number(cost[name]), unit)
        for name, (words, unit) in _COSTS.items()
        if cost.get(name) is not None
    ]
    print_table(f"Cost ({OUTSIDE})", ("what", "value", "unit"), rows)


def _print_variants(payload: Mapping[str, Any]) -> None:
    """A line for each row and baseline, with the metrics of the longest list."""
    rows, baselines = payload["rows"], payload.get("baselines") or {}
    wanted = _headlines(rows[0])
    lines = [[row["name"], *(_headline(row, key) for key in wanted), _by_tier(row)] for row in rows]
    for name, found in baselines.items():
        values = {key.removeprefix("full_"): value for key, value in found.items()} | found
        lines.append([f"{name} (centralised)", *(_headline(values, key) for key in wanted), ""])
    heads = ["", *(metric_name(key) for key in wanted), "NDCG by tier (own)"]
    print_table(f"Rows (metrics are {OUTSIDE})", heads, lines)


def _headlines(row: Mapping[str, Any]) -> list[str]:
    """Keys of the metrics at the longest cut-off, each under one name only."""
    shares = [key for key in row if key.startswith(("accuracy@", "precision@"))]
    if shares:
        return shares
    most = max((int(key.partition("@")[2]) for key in row if "@" in key), default=0)
    stems = ("hr", "ndcg", "recall", "full_ndcg", "own_ndcg", "own_full_ndcg")
    found = [f"{stem}@{most}" for stem in stems if f"{stem}@{most}" in row]
    return [key for key in found if "full_" not in key or row[key] != row.get(_short(key))]


def _short(key: str) -> str:
    return key.replace("full_", "")


def _headline(row: Mapping[str, Any], key: str) -> str:
    if row.get(key) is None:
        return ""
    bounds = (row.get("intervals") or {}).get(key)
    reach = f" ± {(bounds[1] - bounds[0]) / 2:.4f}" if bounds else ""
    return f"{row[key]:.4f}{reach}"


def _by_tier(row: Mapping[str, Any]) -> str:
    tiers = row.get("tiers") or []
    if len(tiers) < 2:
        return ""
    keys = [key for key in tiers[0] if key.startswith("ndcg@")]
    return " · ".join(f"{tier[keys[-1]]:.3f}" for tier in tiers) if keys else ""


def print_plan(payload: Mapping[str, Any]) -> None:
    """Print what :func:`privrec.cli.plan.plan` found, for the scenario and for each of its rows."""
    _print_one_plan(payload, f"Plan of {payload['scenario']}")
    for row in payload["rows"]:
        _print_one_plan(row, f"Row {row['name']}")


def _print_one_plan(plan: Mapping[str, Any], title: str) -> None:
    print_table(title, ("setting", "value"), _plan_settings(plan))
    if plan["epsilon_by_round"]:
        rows = [
            (entry["round"], _epsilon(entry["epsilon"]), _epsilon(entry["epsilon_server"]))
            for entry in plan["epsilon_by_round"]
        ]
        columns = ("after round", "ε, recipients", "ε, cohorts known")
        print_table(f"ε at δ = {plan['delta']:g}, by user, zero-out", columns, rows)
    if plan["signal"]:
        print_table(
            "One round at best: every update clipped, and all of one direction",
            ("what", "value"),
            _signal_rows(plan["signal"]),
        )
    if plan["warnings"]:
        print_lines(f"warning: {warning}" for warning in plan["warnings"])


def _plan_settings(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = [
        ("rounds", f"{plan['rounds']:,}"),
        ("noise", plan["noise"]),
        ("noise multiplier", _number(plan["noise_multiplier"])),
        ("clip norm", _number(plan["clip_norm"])),
        ("sampling", f"{plan['sampling']}, rate {plan['sampling_rate']:g}"),
        ("population", _number(plan["population"])),
        ("expected cohort", _number(plan["expected_cohort"])),
    ]
    if plan["budget"] is not None:
        adversary = adversary_text(plan["budget_against"])
        settings.append(("budget", f"ε = {plan['budget']:g} against {adversary}"))
    return settings


def _signal_rows(signal: Mapping[str, Any]) -> list[tuple[str, str]]:
    words = {
        "signal_norm": "norm of the sum",
        "noise_per_coefficient": "noise in a coefficient (standard deviation)",
        "ratio_per_coefficient": "sum over noise, were it all in one coefficient",
        "coefficients": "coefficients",
        "noise_norm": "norm of the noise in all of them",
        "ratio": "sum over noise, in all of them",
    }
    return [(text, _number(signal[key])) for key, text in words.items() if key in signal]


_COMPARED = ("name", "rounds", "epsilon", "epsilon_server")


def print_comparison(comparison: Comparison) -> None:
    """Print runs side by side: ε, metrics and what a device uploads; then what to beware of."""
    columns = (*_COMPARED, *comparison.metrics, "upload_bytes", "wall_s")
    rows = [
        [
            _epsilon(row[column]) if "epsilon" in column else _number(row[column])
            for column in columns
        ]
        for row in comparison.rows()
    ]
    headings = [_HEADINGS.get(column) or metric_name(column) for column in columns]
    print_table(f"Runs (metrics are {OUTSIDE})", headings, rows)
    if comparison.cautions:
        print_lines(f"caution: {caution}" for caution in comparison.cautions)


_HEADINGS = {
    "name": "run",
    "rounds": "rounds",
    "epsilon": "ε, recipients",
    "epsilon_server": "ε, cohorts known",
    "upload_bytes": "upload, bytes",
    "wall_s": "wall, s",
}


def print_recommendations(entries: Sequence[Recommendation], title: str) -> None:
    """Print ranked items: with titles where the data set has them."""
    titled = any(entry.title for entry in entries)
    columns = ("rank", "item", "title", "score") if titled else ("rank", "item", "score")
    rows = [
        (entry.rank, entry.item_id, *([entry.title or ""] if titled else []), f"{entry.score:.3f}")
        for entry in entries
    ]
    print_table(title, columns, rows)


def print_findings(findings: Sequence[Finding]) -> None:
    """Print what the doctor found, with a remedy where one is needed."""
    rows = [
        (_MARKS[finding.level], finding.name, finding.detail, finding.remedy)
        for finding in findings
    ]
    print_table("privrec doctor", ("", "what", "found", "remedy"), rows)


def _number(value: object) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e9):
        return f"{int(value):,}"
    return f"{value:.4g}"


def _text(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return text == "∞"
    return True
