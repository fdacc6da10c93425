"""Flower's own DP strategies, charged to a ledger: real rounds in one process."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="the flower extra is not installed")

from docs_pages import ROOT, fences
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
)
from sum_apps import app_of, fedavg, flat, grid_of, model

from privrec import Ledger
from privrec.errors import BudgetError, ReleaseRefused, UsageError
from privrec.flower import attach
from privrec.privacy.events import RoundEvent, epsilon
from privrec.report.build import build_account
from privrec.report.render import write
from privrec.report.verify import verify

NODES = 5
FACTS = """
library = "Flower"
population = 5
clip_norm = 1.0
releases = ["The model of each round."]
tuning = "None."
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


def alike(node: int) -> Mapping[str, float]:
    return {"num-examples": 1}


def begun(tmp_path: Path, budget: float | None = None, **words: Any) -> Ledger:
    words = {"unit": "node", "delta": 1e-3, **words}
    return Ledger.create(tmp_path / "ledger.jsonl", budget=budget, **words)


def own(inner: Any = None, noise: float = 2.0, kind: Any = None) -> Any:
    kind = kind or DifferentialPrivacyServerSideFixedClipping
    return kind(inner or fedavg(NODES), noise, 1.0, NODES)


def trained(strategy: Any, rounds: int = 2, metrics: Any = alike, **grid: Any) -> Any:
    nodes = grid_of(NODES, app_of(metrics=metrics), **grid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return strategy.start(nodes, floats(), num_rounds=rounds, timeout=5)


def floats() -> ArrayRecord:
    return ArrayRecord({name: each for name, each in model().items() if name != "steps"})


@pytest.mark.parametrize(
    "kind",
    [DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyClientSideFixedClipping],
)
def test_each_round_is_charged_before_it_is_released(tmp_path: Path, kind: Any) -> None:
    strategy = own(kind=kind)
    seen = []
    with begun(tmp_path) as ledger:
        noise = strategy._add_noise_to_aggregated_arrays

        def noised(arrays: ArrayRecord) -> ArrayRecord:
            with Ledger.open(tmp_path / "ledger.jsonl", repair=False) as read:
                seen.append(len(read.charges))
            return noise(arrays)  # type: ignore[no-any-return]

        strategy._add_noise_to_aggregated_arrays = noised
        attach(ledger, strategy)
        result = trained(strategy)
        assert seen == [1, 2]
        assert ledger.counts == {RoundEvent("gaussian", 2.0): 2}
        spent = ledger.epsilon()
        assert spent == ledger.epsilon("server")
        assert spent == epsilon({RoundEvent("gaussian", 2.0): 2}, 1e-3, "server")
    assert not np.array_equal(flat(result.arrays), flat(floats()))


def test_a_round_beyond_the_budget_is_not_released(tmp_path: Path) -> None:
    event = RoundEvent("gaussian", 2.0)
    with begun(tmp_path, epsilon({event: 2}, 1e-3, "server")) as ledger:
        strategy = own()
        attach(ledger, strategy)
        with pytest.raises(BudgetError):
            trained(strategy, rounds=3)
        assert len(ledger.charges) == 2


def test_nodes_that_count_for_more_than_others_are_refused(tmp_path: Path) -> None:
    with begun(tmp_path) as ledger:
        strategy = own()
        attach(ledger, strategy)
        with pytest.raises(ReleaseRefused, match="num-examples"):
            trained(strategy, metrics=lambda node: {"num-examples": 2**node})
        assert not ledger.charges


def test_a_round_that_lacks_a_node_releases_nothing(tmp_path: Path) -> None:
    with begun(tmp_path) as ledger:
        strategy = own()
        attach(ledger, strategy)
        result = trained(strategy, rounds=1, lost=lambda m: m.metadata.dst_node_id == 3)
        assert not ledger.charges
    assert not result.arrays or np.array_equal(flat(result.arrays), flat(floats()))


@pytest.mark.parametrize("adjacency", ["add-or-remove", "replace-one"])
def test_a_cohort_of_fixed_size_moves_by_two_clip_norms(tmp_path: Path, adjacency: Any) -> None:
    with begun(tmp_path, adjacency=adjacency) as ledger:
        strategy = own(noise=3.0)
        attach(ledger, strategy)
        trained(strategy, rounds=1)
        assert ledger.counts == {RoundEvent("gaussian", 1.5): 1}


@pytest.mark.parametrize("inner", [FedAdam, FedMedian])
def test_other_aggregates_are_refused(tmp_path: Path, inner: Any) -> None:
    with begun(tmp_path) as ledger:
        with pytest.raises(UsageError, match="around FedAvg"):
            attach(ledger, own(inner()))
        adaptive = DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.1, NODES)
        for other in (adaptive, FedAvg(), object()):
            with pytest.raises(UsageError, match="by yourself"):
                attach(ledger, other)


def test_the_example_of_the_page_attaches(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "__page__"}
    exec("import privrec", names)  # noqa: S102
    blocks = [
        f for f in fences((ROOT / "docs/ledger.md").read_text("utf-8")) if "flower" in f.words
    ]
    for fence in blocks:
        exec(fence.text, names)  # noqa: S102
    assert len(blocks) == 1
    nodes = grid_of(10, app_of(metrics=alike))
    names["strategy"].start(nodes, floats(), num_rounds=2, timeout=5)
    assert len(names["ledger"].charges) == 2
    names["ledger"].close()


def test_its_report_verifies_and_forgeries_do_not(tmp_path: Path) -> None:
    (tmp_path / "facts.toml").write_text(FACTS)
    with begun(tmp_path, 20.0) as ledger:
        strategy = own()
        attach(ledger, strategy)
        trained(strategy)
        ledger.end()
        spent = ledger.epsilon()
    path = tmp_path / "ledger.jsonl"
    write(build_account(path, tmp_path / "facts.toml"), tmp_path)
    report = tmp_path / "ledger.report.json"
    assert verify(report).holds
    honest = {each: each.read_text("utf-8") for each in (report, path)}
    forgeries = {
        report: [
            (f'"epsilon": {spent}', '"epsilon": 0.1'),
            ('"unit": "node"', '"unit": "user"'),
            ('"population": 5', '"population": 50000'),
            ('"delta": 0.001', '"delta": 1e-09'),
            ('"clip_norm": 1.0', '"clip_norm": 0.1'),
            ('"noise_multiplier": 2.0', '"noise_multiplier": 20.0'),
            ('"charges": 2', '"charges": 1'),
            ('"library": "Flower"', '"library": "Another"'),
        ],
        path: [
            ('"noise_multiplier":2.0', '"noise_multiplier":20.0'),
            ('"unit":"node"', '"unit":"user"'),
            ('"budget":20.0', '"budget":2.0'),
        ],
    }
    for file, changes in forgeries.items():
        for old, new in changes:
            assert old in honest[file], old
            file.write_text(honest[file].replace(old, new), "utf-8")
            assert not verify(report).holds, old
        file.write_text(honest[file], "utf-8")
    assert verify(report).holds
