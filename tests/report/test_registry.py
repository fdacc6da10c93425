"""The draft for a registry of deployments: YAML, honest about what it does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from privrec.report.build import build
from privrec.report.render import to_registry
from privrec.run.record import epsilon_text

OPEN = "(the operator fills this in)"
yaml = pytest.importorskip("yaml", reason="PyYAML comes with the extra docs")


def drafted(run: Path) -> tuple[str, dict[str, Any]]:
    text = to_registry(build(run))
    return text, yaml.safe_load(text)


@pytest.mark.parametrize("noise", ["central", "distributed", "none"])
def test_it_is_yaml_that_says_what_the_report_says(a_run: Any, noise: str) -> None:
    run = a_run(noise=noise, rate=1.0)
    report, (_, draft) = build(run), drafted(run)
    assert draft["status"] == "simulated"
    assert draft["privacy_loss"]["private"] is report.privacy.private
    recipients = report.adversary("recipients").epsilon
    told = "infinite" if recipients is None else epsilon_text(recipients)
    assert draft["privacy_loss"]["epsilon_recipients"] == told
    known = {"distributed": "epsilon_server"}.get(noise, "epsilon_cohorts_known")
    assert {each for each in draft["privacy_loss"] if each.startswith("epsilon")} == {
        "epsilon_recipients", known,
    }  # fmt: skip
    actors = {each["name"]: each["epsilon"] for each in draft["model"]["actors"]}
    told = draft["privacy_loss"][known] if noise == "distributed" else "infinite"
    assert actors["the server and its operator"] == told
    assert draft["dp_flavor"]["bounds"] == list(report.definition.contribution_bounds)
    assert draft["verification"]["ledger_head"] == report.privacy.ledger_head


def test_a_simulated_run_is_not_to_be_registered(a_run: Any) -> None:
    text, draft = drafted(a_run())
    assert text.startswith("# Draft. This run is SIMULATED")
    assert draft["data_curator"] == OPEN
    text, draft = drafted(a_run("deployed", simulated=False))
    assert "SIMULATED" not in text
    assert draft["status"] == "deployed"


def test_words_of_a_scenario_cannot_break_out(a_run: Any) -> None:
    name = 'a: "b"\n- c #'
    _, draft = drafted(a_run(settings={"description": name}))
    assert draft["description"] == name
    assert json.dumps(name) in to_registry(build(a_run("again", settings={"description": name})))
