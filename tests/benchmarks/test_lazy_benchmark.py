"""The benchmark of lazy noise: its ways update alike, and its claims follow from its rows."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "scenarios" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize("name", ["as Opacus", "LazyDP's baseline", "cache-blocked eager"])
def test_ways_take_the_same_step(benchmark, monkeypatch, name):
    ways = benchmark("_lazy_ways")
    data = ways.batches(300, 3, 8, 2)
    plain, table = torch.zeros(300, 8), torch.zeros(300, 8)
    ways.SparseSGD(plain)(data[0], data[1])
    way = ways.PRIVATE[name](table)
    way(data[0], data[1])
    noise = (table - plain).numpy()
    assert noise.std() == pytest.approx(ways.LR * ways.STD, rel=0.1)
    assert np.abs(noise).min() > 0


@pytest.mark.parametrize("name", ["LazyDP's algorithm", "settle on read"])
def test_lazy_ways_touch_rows_of_batches_alone(benchmark, name):
    ways = benchmark("_lazy_ways")
    data = ways.batches(20_000, 1, 8, 2)
    plain, table = torch.zeros(20_000, 8), torch.zeros(20_000, 8)
    ways.SparseSGD(plain)(data[0], data[1])
    ways.PRIVATE[name](table)(data[0], data[1])
    changed = np.flatnonzero((table - plain).abs().sum(1).numpy() > 1e-7)
    assert set(changed) <= set(data[1].rows.tolist())


def test_zipf_batches_repeat_rows(benchmark):
    ways = benchmark("_lazy_ways")
    one, two = (ways.batches(10**5, 5, 2, 1, zipf=z)[0].rows.unique() for z in (True, False))
    assert len(one) < 0.7 * len(two)


def test_claims_follow_from_rows(benchmark):
    module = benchmark("lazy_noise")
    ways = benchmark("_lazy_ways")
    head = {"rows": 10**6, "lookups": 1, "touched": 0.002, module.SGD: 1.0}
    row = {**head, **dict.fromkeys(ways.PRIVATE, 1000.0), "LazyDP's algorithm": 3.0}
    row[module.OURS] = 2.5
    claims = {claim.name: claim for claim in module.update_claims([row])}
    assert claims["vs_lazydp_baseline_1e6"].value == pytest.approx(400)
    assert claims["vs_lazydp_baseline_1e7"].value is None
    assert not claims["vs_lazydp_baseline_1e7"].holds
    assert claims["vs_opacus_1e6"].holds
    assert claims["over_best_any"].value == pytest.approx(2.5 / 3)
    assert not claims["over_sparse_sgd_1pct"].holds


def test_auc_by_pairs(benchmark):
    rng = np.random.default_rng(0)
    scores, clicks = rng.normal(0, 1, 60), rng.integers(0, 2, 60).astype(float)
    pairs = [a > b for a in scores[clicks > 0] for b in scores[clicks == 0]]
    assert benchmark("lazy_noise").auc(scores, clicks) == pytest.approx(np.mean(pairs))


@pytest.mark.slow
def test_the_quick_benchmark_writes_its_document(benchmark, tmp_path, monkeypatch):
    module = benchmark("lazy_noise")
    monkeypatch.setattr(module, "QUICK", ((5000, 2, False),))
    module.main(["--quick", "--json", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    assert {row["part"] for row in written["rows"]} == {"update", "AUC"}
    assert {claim["name"] for claim in written["claims"]} >= {"vs_opacus_1e6", "over_best_any"}
