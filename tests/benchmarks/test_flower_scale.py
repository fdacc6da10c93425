"""A short run of `flower_scale.py`, and what it makes of its figures."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs the extra privrec[flower]")

BENCHMARKS = Path(__file__).resolve().parents[2] / "scenarios" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("flower_scale")


def test_a_quick_run_measures_every_exchange(
    benchmark: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "flwr")  # as the script does; given back after the test
    benchmark.main(["--quick", "--json", str(tmp_path / "out.json")])
    content = json.loads((tmp_path / "out.json").read_text())
    few, more = content["rows"]
    assert [few["nodes"], more["nodes"]] == [20, 30]
    for row in (few, more):
        assert set(row["node_by_exchange_s"]) == set(benchmark.STAGES)
        assert 0 < row["node_s"] == pytest.approx(sum(row["node_by_exchange_s"].values()))
        assert 0 < row["server_s"] == pytest.approx(sum(row["server_by_exchange_s"].values()))
        # A vector of 4 bytes an entry, and little else.
        assert 4 * row["size"] < row["up_by_exchange"]["masked"] < 4 * row["size"] + 500
        # The roster: 236 bytes a node, and a frame.
        assert 0 < row["down_by_exchange"]["shares"] - 236 * row["nodes"] < 1000
    assert few["server_s_exponent"] is None
    assert isinstance(more["server_s_exponent"], float)
    assert [claim["holds"] for claim in content["claims"]] == [False, False]  # not measured


def test_exponents_and_claims(benchmark: ModuleType) -> None:
    def row(nodes: int, server_s: float, node_s: float) -> dict[str, Any]:
        return {"nodes": nodes, "server_s": server_s, "node_s": node_s}

    first, second = benchmark.with_growth([row(500, 2.0, 0.3), row(1000, 8.0, 0.3)])
    assert first["server_s_exponent"] is None
    assert second["server_s_exponent"] == pytest.approx(2)
    assert second["node_s_exponent"] == pytest.approx(0)
    assert [claim.holds for claim in benchmark.claims_of([first, second])] == [True, True]
    slow = row(1000, 20.5, 0.6)
    assert [claim.holds for claim in benchmark.claims_of([slow])] == [False, False]
