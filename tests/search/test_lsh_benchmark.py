"""The benchmark of search on a device: its claims, and a short run."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "scenarios" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_ratio_is_of_neighbouring_runs(benchmark: Callable[[str], ModuleType]) -> None:
    found = {"a": [2.0, 20.0, 3.0], "b": [1.0, 10.0, 1.0]}
    assert benchmark("lsh").ratio(found, "a", "b") == 2.0


def test_learned_weights_are_learned(benchmark: Callable[[str], ModuleType]) -> None:
    searched = benchmark("_wide").learned(500, 60, 50)
    assert searched.queries.min() == 0  # behind a ReLU
    assert searched.items.items == 500
    assert (searched.items.centre**2).sum() > 0


@pytest.mark.slow
def test_a_short_run_writes_rows_and_claims(
    benchmark: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    target = tmp_path / "lsh.json"
    benchmark("lsh").main(["--quick", "--repetitions", "3", "--json", str(target)])
    content = json.loads(target.read_text("utf-8"))
    names = {claim["name"] for claim in content["claims"]}
    assert {"bits256_over_floor", "serial_over_dense16", "auto_over_best"} <= names
    recalls = {row["name"]: row["recall_0.1"] for row in content["rows"] if "recall_0.1" in row}
    for where in ("clusters", "learned"):
        assert recalls[f"{where}: scan"] == 1
        assert recalls[f"{where}: hamming"] > recalls[f"{where}: pghash"]
        assert recalls[f"{where}: pghash"] > recalls[f"{where}: uniform"]
