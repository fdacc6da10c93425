"""A new Flower app, written to a folder."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from string import Template

from privrec.errors import UsageError
from privrec.flower.settings import checked
from privrec.scenario.load import load

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
