"""``privrec audit``: what it prints, keeps and exits with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from audit_scenarios import QUICKSTART, SMALL
from click.testing import CliRunner, Result

import privrec
from privrec.cli.main import main
from privrec.privacy.mechanism import rounded_gaussian
from privrec.run.record import Observer
from privrec.server import server

FEW = [word for setting in SMALL for word in ("-s", setting)]


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    scenario = privrec.load_scenario(QUICKSTART, (*SMALL, "train.rounds=2", "run.footprint=false"))
    privrec.start(scenario, out=tmp_path / "run", observer=Observer())
    return tmp_path / "run"


def test_a_scenario_is_audited() -> None:
    result = call("audit", QUICKSTART, *FEW, "--canaries", "50")
    assert result.exit_code == 0, result.output
    for words in ("Audit of privrec", "amount of noise", "clip norm of every", "is claimed"):
        assert words in result.output
    assert "FAIL" not in result.output


def test_findings_are_given_to_programs() -> None:
    found = json.loads(call("audit", QUICKSTART, *FEW, "--canaries", "0", "--json").stdout)
    assert found["passed"] is True
    assert found["lower_bound"] is None
    assert {"probe", "passed", "found", "expected"} == set(found["checks"][0])


def test_an_audit_of_a_run_goes_into_its_report(run: Path) -> None:
    assert call("report", run).exit_code == 0
    assert json.loads((run / "report.json").read_text("utf-8"))["audit"] is None
    assert call("audit", run, "--canaries", "50").exit_code == 0
    assert call("report", run).exit_code == 0
    kept = json.loads((run / "audit.json").read_text("utf-8"))
    assert json.loads((run / "report.json").read_text("utf-8"))["audit"] == kept
    page = (run / "report.html").read_text("utf-8")
    assert "Audit of this build" in page
    assert "amount of noise, the whole vector" in page
    assert call("report", "verify", run / "report.json").exit_code == 0


def test_an_audit_with_other_settings_is_not_kept(run: Path) -> None:
    assert call("audit", run, "-s", "train.rounds=3", "--canaries", "0").exit_code == 0
    assert not (run / "audit.json").exists()


def test_a_failed_audit_is_kept_and_refuses(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        server,
        "rounded_gaussian",
        lambda stream, sigma, n: rounded_gaussian(stream, 0.9 * sigma, n),
    )
    result = call("audit", run, "--canaries", "0")
    assert result.exit_code == 5
    assert "amount of noise, the whole vector" in result.output
    assert "release nothing" in result.output
    assert json.loads((run / "audit.json").read_text("utf-8"))["passed"] is False
    assert call("report", run).exit_code == 0
    assert "A CHECK FAILED" in (run / "report.html").read_text("utf-8")


def test_something_else_is_no_run(tmp_path: Path) -> None:
    assert call("audit", tmp_path).exit_code == 2
    assert call("audit", tmp_path / "none.toml").exit_code == 2
