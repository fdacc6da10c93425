"""The benchmarks of wide outputs run, and their claims follow from their rows."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "scenarios" / "benchmarks"


@pytest.mark.slow
def test_bolt_measures_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    importlib.import_module("bolt").main(["--quick", "--json", str(tmp_path / "bolt.json")])
    found = json.loads((tmp_path / "bolt.json").read_text())
    claims = {claim["name"]: claim for claim in found["claims"]}
    rows = {row["name"]: row for row in found["rows"]}
    assert set(claims) == {"inference_ratio", "top1_share", "training_ratio"}
    dense, sparse = rows["training, dense PyTorch"], rows["training, sparse"]
    assert sparse["p_at_1"] >= dense["p_at_1"]
    assert claims["training_ratio"]["value"] == dense["train_s"] / sparse["train_s"]
    ratio = rows["query, dense PyTorch"]["query_ms"] / rows["query, sparse"]["query_ms"]
    assert claims["inference_ratio"]["value"] == pytest.approx(ratio)
    assert claims["top1_share"]["value"] == rows["query, sparse"]["top1_share"]


@pytest.mark.slow
def test_selectors_of_a_small_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    path = tmp_path / "pghash.json"
    importlib.import_module("pghash_extreme").main(
        ["--quick", "--share", "0.1", "--json", str(path)]
    )
    found = json.loads(path.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    first = rows["small: simhash, all rows"]
    device = [row for row in found["rows"] if row.get("compression") == 16]
    assert len(device) == 3
    assert all(row["active"] == pytest.approx(0.1) for row in device)
    behind = max(first["p_at_1"] - row["p_at_1"] for row in device)
    claims = {claim["name"]: claim["value"] for claim in found["claims"]}
    assert claims["behind_simhash_small"] == behind
    # The process of a device holds no layer: a smaller memory shows in its peak.
    assert all(row["peak_mib"] < first["peak_mib"] for row in device)


def test_the_shapes_are_those_of_the_repository() -> None:
    shapes = importlib.import_module("_bolt")
    amazon, delicious = shapes.AMAZON_670K, shapes.DELICIOUS_200K
    assert (amazon.features, amazon.labels) == (135_909, 670_091)
    assert (delicious.features, delicious.labels) == (782_585, 205_443)
