"""The recommender's app: the scenario that its run-config names, and a new app in a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from privrec.errors import UsageError
from privrec.flower.enrolment import text_of
from privrec.scenario.load import Scenario, load


def scenario_of(folder: Path, run_config: Mapping[str, Any]) -> Scenario:
    """Load the scenario of an app as its run-config has it, if a deployment can run it.

    ``scenario`` is a file in the app's folder; ``set`` has overrides such as ``train.rounds=3``,
    with ``;`` between them.
    """
    overrides = [part.strip() for part in str(run_config.get("set", "")).split(";") if part.strip()]
    scenario = load(folder / str(run_config.get("scenario", "scenario.toml")), overrides)
    if scenario.model.learns != "interactions":
        raise UsageError(
            f'model.kind = "{scenario.model.kind}": deployments train recommenders; use "gmf", '
            '"mlp" or "neumf", or simulate it with privrec run'
        )
    population_of(scenario)
    if scenario.devices.popularity == "public":
        raise UsageError(
            'devices.popularity = "public" is the order of the counts in the data, which are on '
            'the devices here; use "released", or nesting = "fold"'
        )
    if scenario.privacy.noise == "central":
        raise UsageError(
            'privacy.noise = "central" trusts a server with sums that the secure sum hides from '
            'it; use "distributed"'
        )
    if scenario.devices.popularity == "released" and not scenario.privacy.in_shares:
        raise UsageError(
            'devices.popularity = "released": without noise in shares the server would have the '
            'counts before their noise; use privacy.noise = "distributed", or nesting = "fold"'
        )
    return scenario


def population_of(scenario: Scenario) -> int:
    """Return the number of enrolled devices, which the scenario must say."""
    if scenario.devices.population is None:
        raise UsageError(
            "devices.population is unset: noise and thresholds follow from the number of enrolled "
            "devices, which is public; set it"
        )
    return scenario.devices.population


def out_of(run_config: Mapping[str, Any]) -> Path:
    """Return the run's directory on this machine; ``~`` and relative paths are of its user's home.

    The directory that a SuperLink happened to be started in is nobody's choice.
    """
    out = text_of(run_config, "out")
    if out is None:
        raise UsageError('out is unset: name the run\'s directory, as in "~/privrec-runs/mine"')
    return Path.home() / Path(out).expanduser()


def name_of(folder: Path) -> str:
    """Return the name that an app has in a folder, and its runs below ``~/privrec-runs``."""
    return re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "recommender"


def init(folder: Path, scenario: Path | None = None) -> list[Path]:
    """Write a complete app that ``flwr run`` takes as it is.

    It depends on nothing that a registry would be asked for: it runs where privrec is installed.

    Args:
        folder: a new or empty folder; its name is the app's.
        scenario: what the app trains; a small synthetic one by default.

    Raises:
        UsageError: when the folder is taken, or the scenario cannot be deployed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: it exists and is not empty; name a new folder")
    template = resources.files("privrec.flower") / "template"
    text = (template / "scenario.toml").read_text(encoding="utf-8")
    if scenario is not None:
        scenario_of(scenario.parent, {"scenario": scenario.name})
        text = scenario.read_text(encoding="utf-8")
    values = {"name": name_of(folder)}
    written = {"recommender/__init__.py": '"""Federated recommendation."""\n'}
    for target in ("pyproject.toml", "README.md", "recommender/client.py", "recommender/server.py"):
        page = (template / f"{Path(target).name}.in").read_text(encoding="utf-8")
        written[target] = Template(page).substitute(values)
    written["recommender/scenario.toml"] = text
    for target, content in written.items():
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return [folder / target for target in written]
