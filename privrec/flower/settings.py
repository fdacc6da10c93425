"""The scenario of an app, as its run-config has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privrec.errors import UsageError
from privrec.scenario.load import Scenario, load
from privrec.scenario.texts import WIDE


def scenario_of(folder: Path, run_config: Mapping[str, Any]) -> Scenario:
    """The scenario that ``scenario`` and ``set`` of a run-config name.

    Args:
        folder: of the app.
        run_config: ``scenario`` is a file in ``folder``; ``set`` has overrides, such as
            ``train.rounds=3``, with ``;`` between them.

    Raises:
        ScenarioError: when it is malformed.
        UsageError: when it needs what a deployment cannot give.
    """
    overrides = [part.strip() for part in str(run_config.get("set", "")).split(";") if part.strip()]
    return checked(load(folder / str(run_config.get("scenario", "scenario.toml")), overrides))


def checked(scenario: Scenario) -> Scenario:
    """The scenario, unless it needs what a deployment cannot give.

    Raises:
        UsageError: when it does.
    """
    if scenario.model.kind in WIDE:
        raise UsageError(
            f'model.kind = "{scenario.model.kind}": deployments train recommenders; use "gmf", '
            '"mlp" or "neumf", or simulate it with privrec run'
        )
    if scenario.devices.population is None:
        raise UsageError(
            "devices.population is unset: noise and thresholds follow from the number of enrolled "
            "devices, which is public; set it"
        )
    if scenario.devices.order == "rows":
        raise UsageError(
            'devices.nesting = "rows" needs an order of items by popularity, which no server of a '
            'deployment has; use "fold" or "dims"'
        )
    if scenario.privacy.noise == "central":
        raise UsageError(
            'privacy.noise = "central" trusts a server with sums that the secure sum hides from '
            'it; use "distributed"'
        )
    return scenario
