"""The way of a plain run through the package stays short enough to be read in an evening."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_plain_run_is_few_functions_and_few_frames_deep(tmp_path: Path) -> None:
    script, scenario = ROOT / "tests/architecture/path.py", "scenarios/quickstart.toml"
    done = subprocess.run(
        [
            sys.executable, script, scenario, "train.rounds=2", "run.eval_every=1",
            "data.users=200", "devices.population=200",
        ],
        env={"PYTHONPATH": str(ROOT), "PRIVREC_STATE": str(tmp_path), "PATH": ""},
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert 300 < found["functions"] <= 700
    assert 40 < found["files"] <= 80
    assert found["depths"]["privacy/ledger.py:Ledger.charge"] <= 7
    assert found["depths"]["device/recommender.py:RecommenderLearner.train"] <= 9


def test_the_package_has_few_files() -> None:
    assert len(list((ROOT / "privrec").rglob("*.py"))) <= 132
    assert len(list((ROOT / "privrec").glob("*.py"))) <= 6
