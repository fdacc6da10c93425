"""The rows of a scenario that compares settings: each a run of its own, below the first one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from privrec.errors import UsageError
from privrec.run import directory, lifecycle
from privrec.run.identity import Identity
from privrec.run.loop import Result
from privrec.run.population_budget import population_of
from privrec.run.record import Observer
from privrec.scenario.load import Row, Scenario

KEPT_OF_PRIVACY = ("epsilon", "epsilon_server", "epsilon_popularity", "noise_multiplier")
FULL = "full_"
ROWS = "rows/"


def with_rows(
    result: Result, scenario: Scenario, *, data_dir: Path | None, observer: Observer
) -> Result:
    """The result of a run after its scenario's rows were run as well.

    Row ``i`` is a complete run in ``rows/i`` of the run's directory, with a ledger of its own; with
    ``run.seeds`` above 1 further ones follow in ``rows/i-1`` and so on. What was begun before is
    resumed, what has gaps is tried again, and what is finished is not run again. ``result.json``
    gains ``rows``: name, changed settings, metrics, ε and costs of each; over several seeds, means
    and their 95 % intervals. Its ``gaps`` gain those of the rows.

    Args:
        result: The finished run of the scenario itself.
        scenario: Its scenario; without rows, ``result`` is returned unchanged.
        data_dir: Where the data lies; None for where the run found it.
        observer: Is told of every row as of a run.

    Raises:
        BudgetError, DataError, Interrupted, UsageError: As :func:`privrec.run.lifecycle.start`.
    """
    stated = result.payload["gaps"]
    gaps = {what: why for what, why in stated.items() if not what.startswith(ROWS)}
    whole = "rows" in result.payload and gaps == stated
    if not scenario.rows or whole:
        return result
    identity = Identity.read(result.path)
    place = data_dir or identity.data_dir
    population = population_of(result.path)  # its rows are further runs over the same users
    rows = []
    for index, (row, (name, variant)) in enumerate(
        zip(scenario.rows, scenario.variants(), strict=True)
    ):
        payloads = []
        for folder, each in _repeated(variant, f"{ROWS}{index}", name):
            found = _finished(each, result.path / folder, place, observer, population).payload
            payloads.append(found)
            gaps |= {f"{folder}: {what}": why for what, why in found["gaps"].items()}
        rows.append(_facts(row, payloads))
    payload = directory.leave(result.path, {**result.payload, "rows": rows, "gaps": gaps}, identity)
    return replace(result, payload=payload)


def _repeated(variant: Scenario, folder: str, name: str) -> list[tuple[str, Scenario]]:
    """Folder and scenario of each seed of a row; what no seed changes is measured once."""
    once = {"title": name, "run.seeds": 1, "run.baselines": ["popularity"]}
    first = variant.with_settings(once)
    return [
        (folder, first),
        *(
            (
                f"{folder}-{step}",
                first.with_settings({"run.seed": variant.run.seed + step, "run.footprint": False}),
            )
            for step in range(1, variant.run.seeds)
        ),
    ]


def _finished(
    variant: Scenario, out: Path, data_dir: Path | None, observer: Observer, population: str | None
) -> Result:
    if (out / "run.json").is_file():
        if Identity.read(out).scenario_hash != variant.hash():
            raise UsageError(
                f"{out}: a run of another scenario lies where this row belongs; move it away"
            )
        return lifecycle.resume(out, data_dir=data_dir, observer=observer)
    return lifecycle.start(
        variant, out=out, data_dir=data_dir, observer=observer, population=population
    )


def _facts(row: Row, payloads: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = payloads[0]
    privacy = {key: first["privacy"].get(key) for key in KEPT_OF_PRIVACY}
    found = [_named(payload["metrics"]) for payload in payloads]
    values = {key: [each[key] for each in found] for key in _measured(found)}
    means = {key: float(np.mean(each)) for key, each in values.items()}
    facts = {"name": row.name, **row.set, **privacy, **means, **first["cost"]}
    facts["tiers"] = [_tier(tiers) for tiers in zip(*(p["tiers"] for p in payloads), strict=True)]
    if len(payloads) > 1:
        facts["intervals"] = {key: _interval(each) for key, each in values.items()}
        facts["seeds"] = [payload["run_id"] for payload in payloads]
    return facts


def _tier(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A tier's facts: of the first seed, but for metrics, which are means."""
    found = [_named(tier) for tier in seeds]
    kept = {key: value for key, value in found[0].items() if "@" not in key}
    return kept | {
        key: float(np.mean([tier[key] for tier in found])) for key in _measured(found) if "@" in key
    }


def _measured(seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """What every seed has: a mean over those without a gap would be of other runs."""
    return [key for key in seeds[0] if all(key in each for each in seeds)]


def _named(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics, those of full ranking by their short names too where there is no other protocol."""
    short = {key.replace(FULL, ""): value for key, value in metrics.items() if FULL in key}
    return {**short, **metrics}


def _interval(values: Sequence[float]) -> list[float]:
    """Student's 95 % interval of the mean over seeds."""
    reach = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return [float(np.mean(values) - reach), float(np.mean(values) + reach)]
