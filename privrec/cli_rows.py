"""The rows of a scenario that compares settings: each a run of its own, below the first one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from privrec import run
from privrec.identity import remembered_data_dir
from privrec.record import Observer
from privrec.run import Result
from privrec.scenario import Row, Scenario

KEPT_OF_PRIVACY = ("epsilon", "epsilon_server", "noise_multiplier")


def with_rows(
    result: Result, scenario: Scenario, *, data_dir: Path | None, observer: Observer
) -> Result:
    """The result of a run after its scenario's rows were run as well.

    Row ``i`` is a complete run in ``rows/i`` of the run's directory, with a ledger of its own. What
    was begun before is resumed and what is finished is not run again. ``result.json`` gains
    ``rows``: name, changed settings, metrics, ε and costs of each.

    Args:
        result: The finished run of the scenario itself.
        scenario: Its scenario; without rows, ``result`` is returned unchanged.
        data_dir: Where the data lies; None for where the run found it.
        observer: Is told of every row as of a run.

    Raises:
        BudgetError, DataError, Interrupted, UsageError: As :func:`privrec.run.start`.
    """
    if not scenario.rows or "rows" in result.payload:
        return result
    place = data_dir or remembered_data_dir(result.path)
    rows = []
    for index, (row, (name, variant)) in enumerate(
        zip(scenario.rows, scenario.variants(), strict=True)
    ):
        titled = variant.with_settings({"title": name})
        out = result.path / "rows" / str(index)
        rows.append(_facts(row, _finished(titled, out, place, observer).payload))
    finished = replace(result, payload={**result.payload, "rows": rows})
    _replace_json(result.path / "result.json", finished.payload)
    return finished


def _finished(variant: Scenario, out: Path, data_dir: Path | None, observer: Observer) -> Result:
    if (out / "run.json").is_file():
        return run.resume(out, data_dir=data_dir, observer=observer)
    return run.start(variant, out=out, data_dir=data_dir, observer=observer)


def _facts(row: Row, payload: Mapping[str, Any]) -> dict[str, Any]:
    privacy = {key: payload["privacy"][key] for key in KEPT_OF_PRIVACY}
    return {"name": row.name, **row.set, **privacy, **payload["metrics"], **payload["cost"]}


def _replace_json(path: Path, payload: Mapping[str, Any]) -> None:
    draft = path.with_name(path.name + ".rows")
    draft.write_text(json.dumps(payload, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)
