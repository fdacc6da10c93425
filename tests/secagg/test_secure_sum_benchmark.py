"""The benchmark of the secure sum: what its claims are made of, and a short run of our side."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "scenarios" / "benchmarks"


@pytest.fixture
def secure_sum(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("secure_sum")


def rows(module: ModuleType, client: float, over: float, upload: int) -> list[dict[str, Any]]:
    size = module.Size(100, 10**6)
    ours = module.as_row("privrec", size, [module.Sample(0.1, 1.0, upload + 36, 0.1 / over, 36)])
    theirs = module.as_row("Flower", size, [module.Sample(client, 26.0, 8 * 10**6)])
    theirs |= {"client_ratio": client / 0.1, "server_ratio": 26.0}
    return [ours, theirs]


def test_claims_are_those_of_the_largest_size_and_can_fail(secure_sum: ModuleType) -> None:
    good = secure_sum.claims_of(rows(secure_sum, 1.6, 1.4, 4 * 10**6))
    assert [claim.name for claim in good] == [
        "client_cpu_ratio",
        "server_cpu_ratio",
        "upload_bytes_per_entry",
        "client_over_floor",
    ]
    assert all(claim.holds for claim in good)
    assert [claim.value for claim in good] == pytest.approx([16, 26, 4, 1.4])
    bad = secure_sum.claims_of(rows(secure_sum, 1.4, 1.6, 4 * 10**6 + 1))
    assert [claim.holds for claim in bad] == [False, True, False, False]


def test_a_smaller_size_makes_no_claim_on_ratios(secure_sum: ModuleType) -> None:
    size = secure_sum.Size(20, 10**4)
    ours = secure_sum.as_row("privrec", size, [secure_sum.Sample(0.1, 1.0, 40_036, 0.09, 36)])
    theirs = secure_sum.as_row("Flower", size, [secure_sum.Sample(9.0, 9.0, 80_000)])
    found = secure_sum.claims_of([ours, theirs | {"client_ratio": 90.0, "server_ratio": 9.0}])
    assert [claim.value is None for claim in found] == [True, True, False, False]


def test_the_full_run_has_every_size_of_the_promise(secure_sum: ModuleType) -> None:
    sizes = {(size.devices, size.entries) for size in secure_sum.FULL}
    assert sizes >= {(n, 10**e) for n in (20, 100) for e in (4, 5, 6)}
    assert {500, 1000} <= {devices for devices, _ in sizes}
    assert all(size.dropped == size.devices // 10 for size in secure_sum.FULL)


def run_quick(tmp_path: Path, *options: str) -> dict[str, Any]:
    path = tmp_path / "secure_sum.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "secure_sum.py", "--quick", "--json", path, *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "CPU of one secure sum" in done.stdout
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    assert set(content) == {"rows", "claims", "machine"}
    return content


@pytest.mark.slow
def test_a_quick_run_of_our_side(tmp_path: Path) -> None:
    content = run_quick(tmp_path, "--no-flower")
    assert [row["ring_bits"] for row in content["rows"]] == [32, 16]
    for row in content["rows"]:
        assert 0 < row["floor_s"] < row["client_s"] < 1
    claims = {claim["name"]: claim for claim in content["claims"]}
    assert claims["upload_bytes_per_entry"]["holds"]
    assert claims["client_cpu_ratio"]["value"] is None


@pytest.mark.slow
@pytest.mark.skipif(find_spec("flwr") is None, reason="flwr is not installed in this environment")
def test_a_quick_run_of_both_sides(tmp_path: Path) -> None:
    content = run_quick(tmp_path)
    (theirs,) = [row for row in content["rows"] if "Flower" in row["name"]]
    assert theirs["client_ratio"] > 2
    assert theirs["server_ratio"] > 5
