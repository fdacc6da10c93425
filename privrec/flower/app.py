"""A new Flower app, written to a folder, and the scenario that its run-config names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from privrec.errors import UsageError
from privrec.scenario.load import Scenario, load


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
    if scenario.model.learns != "interactions":
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


_FILES = {
    "pyproject.toml.in": "pyproject.toml",
    "README.md.in": "README.md",
    "client.py.in": "recommender/client.py",
    "server.py.in": "recommender/server.py",
}


def init(folder: Path, scenario: Path | None = None) -> list[Path]:
    """Write a complete app that ``flwr run`` takes as it is.

    Args:
        folder: a new or empty folder; its name is the app's.
        scenario: what the app trains; a small synthetic one by default.

    Returns:
        The files, in the order that they were written.

    Raises:
        UsageError: when the folder is taken, or the scenario cannot be deployed.
        ScenarioError: when the scenario is malformed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: it exists and is not empty; name a new folder")
    template = resources.files("privrec.flower") / "template"
    text = (template / "scenario.toml").read_text(encoding="utf-8")
    if scenario is not None:
        checked(load(scenario))
        text = scenario.read_text(encoding="utf-8")
    name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "recommender"
    values = {
        "name": name,
        "publisher": "privrec",
        "out": f"{Path.home() / 'privrec-runs' / name}",
        "items": 0,
    }
    written = {"recommender/__init__.py": '"""Federated recommendation."""\n'}
    for source, target in _FILES.items():
        page = (template / source).read_text(encoding="utf-8")
        written[target] = Template(page).substitute(values)
    written["recommender/scenario.toml"] = text
    for target, content in written.items():
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return [folder / target for target in written]
