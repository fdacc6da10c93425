"""The accuracy of the last model by a secure sum: bounded, charged, and plain but for its noise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from privrec.device.samples import Histories
from privrec.device.update import Evaluating
from privrec.errors import BudgetError, IntegrityError, ReleaseRefused, ScenarioError
from privrec.evaluate import metrics
from privrec.privacy.events import epsilon
from privrec.privacy.ledger import Ledger
from privrec.randomness import SecretRoot
from privrec.report import build as building
from privrec.report.build import build
from privrec.report.render import compare, to_markdown
from privrec.run import lifecycle, summary, task
from privrec.run.plan import Plan
from privrec.run.record import WITHIN, Observer
from privrec.run.simulation import Simulation
from privrec.run.task import Recommending
from privrec.scenario.load import Scenario

ROUNDS, USERS, ITEMS = 3, 60, 40
LEVEL = 1e-4
TINY = f"""
name = "evaluated"
[data]
users = {USERS}
items = {ITEMS}
clusters = 3
interactions_per_user = 8
[model]
dim = 4
block = 2
[devices]
sampling = "everybody"
min_cohort = 5
tiers = [{{capacity = 1.0, share = 0.5}}, {{capacity = 0.25, share = 0.5}}]
[train]
rounds = {ROUNDS}
[privacy]
noise = "distributed"
clip_norm = 1.0
noise_multiplier = 4.0
evaluation_epsilon = 2.0
delta = 1e-4
[run]
footprint = false
"""
CENTRAL = ("privacy.noise=central",)
DEVICES = SecretRoot.known(b"devices")


def scenario(*changes: str) -> Scenario:
    return Scenario.from_toml(TINY, changes)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))


def started(out: Path, *changes: str, **more: Any) -> dict[str, Any]:
    return lifecycle.start(scenario(*changes), out=out, observer=Observer(), **more).payload


def evaluating(*changes: str) -> Evaluating:
    found = Plan.of(scenario(*changes), ITEMS, USERS).evaluating
    assert found is not None
    return found


def charged(out: Path) -> list[tuple[int, int]]:
    with Ledger.open(out / "ledger.jsonl", repair=False) as ledger:
        return [(charge.round, charge.attempt) for charge in ledger.charges]


# --------------------------------------------------------------------------- what is summed


def test_figures_are_those_of_full_ranking() -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(5, 12)).astype(np.float32)
    seen = np.array([0, 0, 1, 3, 4]), np.array([1, 2, 3, 0, 5])
    wanted = np.array([0, 1, 1, 3]), np.array([4, 5, 6, 7])
    found = metrics.figures(table.copy(), seen, wanted, 3)
    plain = table.astype(np.float64)
    plain[seen] = -np.inf
    for user, items in enumerate(([4], [5, 6], [], [7], [])):
        if not items:
            assert not found[user].any()
            continue
        ranks = [(plain[user] > plain[user, item]).sum() for item in items]
        logs = np.log(np.exp(plain[user]).sum()) - plain[user, items]
        loss = (logs / (2 * np.log(12))).clip(0, 1).mean()
        assert found[user].tolist() == pytest.approx([loss, np.less(ranks, 3).mean(), 1], rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_the_worst(bad: float) -> None:
    table = np.zeros((1, 6), np.float32)
    table[0, 2] = bad
    loss, hits, count = metrics.figures(table, (np.array([0]), np.array([1])), _one(2), 3)[0]
    assert (loss, hits, count) == (1.0, float(bad == np.inf), 1.0)


def _one(item: int) -> Any:
    return np.array([0]), np.array([item])


@pytest.mark.parametrize("changes", [(), CENTRAL], ids=["shares", "central"])
def test_one_user_moves_the_sum_by_no_more_than_is_charged(changes: tuple[str, ...]) -> None:
    found = evaluating(*changes)
    assert found.bound == found.step * 3**0.5
    if not changes:
        assert found.event.grid is not None
        assert found.event.grid.squared_sensitivity == 3 * found.step**2
    figures = np.array([[1, 1, 1], [9, -4, 2], [np.nan, np.inf, -np.inf], [0.5, 0.25, 1]])
    rows = np.array([each.vector() for each in found.bounded(figures).rows()])
    step = found.step
    wanted = [[step, step, step], [step, 0, step], [0, step, 0], [step // 2, step // 4, step]]
    assert rows.tolist() == wanted
    assert ((rows.astype(np.int64) ** 2).sum(1) <= 3 * step**2).all()
    for adversary in ("recipients", "server"):
        assert 1.9 < epsilon({found.event: 1}, 1e-4, adversary) <= 2.0  # type: ignore[arg-type]


def simulated(*changes: str) -> tuple[Recommending, Simulation, Any]:
    work = Recommending.load(scenario(*changes), None)
    devices = work.simulate(DEVICES)
    weights = np.random.default_rng(1).normal(0, 0.5, work.plan.federation.layout.size)
    return work, devices, weights.astype(np.float32)


def plain_sum(work: Recommending, devices: Simulation, weights: Any, found: Evaluating) -> Any:
    rows = found.bounded(work.figures(devices, weights)[1]).rows()
    return np.sum([each.vector() for each in rows], axis=0)


@pytest.mark.statistical
def test_the_sum_is_the_plain_one_and_the_noise_that_is_charged() -> None:
    """It must reject two thirds and one and a half of it too."""
    (work, devices, weights), found = simulated(), evaluating()
    plain, shares = plain_sum(work, devices, weights, found), found.protection.shares
    assert plain[2] == USERS * found.step  # everybody holds an item out
    assert shares is not None
    (band,), digests = shares.bands, (b"m" * 32,) * 2
    figures = work.figures(devices, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recommending, "figures", lambda *_: figures)
        rounds = [found.round("run", attempt, "plan", digests) for attempt in range(100)]
        sums = [work.summed_figures(devices, found, each, weights) for each in rounds]
    variance = (found.event.noise_multiplier * found.bound) ** 2
    variance *= band.least / (band.least - band.colluders)
    noise = (np.array(sums) - plain).astype(float)
    for wrong, right in ((1.0, True), (2 / 3, False), (3 / 2, False)):
        ratio = (noise**2).sum() / (wrong**2 * variance)
        assert bool(LEVEL / 2 < stats.chi2.cdf(ratio, noise.size) < 1 - LEVEL / 2) is right


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_the_protocol_gives_the_same_sum_bit_for_bit(rate: float) -> None:
    found, sums = evaluating(), []
    for how in ("exact", "full"):
        work, devices, weights = simulated(f"run.secure_sum={how}", f"devices.dropout_rate={rate}")
        round = found.round("run", 0, "plan", (b"m" * 32,))
        sums.append(work.summed_figures(devices, found, round, weights).tolist())
    assert sums[0] == sums[1]


def test_devices_one_by_one_find_what_batches_find() -> None:
    one, two = (work.figures(devices, weights) for work, devices, weights in (
        simulated(), simulated("run.engine=device")))  # fmt: skip
    assert one[0].tolist() == two[0].tolist() == list(range(USERS))
    np.testing.assert_allclose(one[1], two[1], atol=1e-5)
    work, devices, weights = simulated("devices.tiers=")
    train, held = work.split.train, work.split.heldout
    found = work.evaluate(devices, weights, whole=True).values
    figures = work.figures(devices, weights)[1]
    assert figures[:, 1].tolist() == found["full_recall@10"].tolist()
    assert held.single
    assert Histories(np.arange(USERS), train.indptr, train.items).lengths.min() > 0


def test_means_are_of_who_holds_an_item_out_and_drowned_ones_are_none() -> None:
    plan, found = Plan.of(scenario(*CENTRAL), ITEMS, USERS), evaluating(*CENTRAL)
    values, ends = summary.summed_metrics(plan, found, [12.0, 20.0, 40.0])
    assert values == {"summed_loss": 0.3 * 2 * np.log(ITEMS), "summed_hr@10": 0.5}
    std = found.event.noise_multiplier * 3**0.5
    low, high = ends["summed_hr@10"]
    assert (high - low) / 2 == pytest.approx(1.96 * std / 40 * (1 + 0.25) ** 0.5)
    with pytest.raises(ReleaseRefused, match=r"too few for a mean; raise privacy\.evaluation_"):
        summary.summed_metrics(plan, found, [1.0, 1.0, 1.9 * std])


# --------------------------------------------------------------------------- what it costs

BUDGET = ("privacy.noise_multiplier=", "privacy.epsilon=8", "privacy.evaluation_epsilon=6")


@pytest.mark.parametrize("noise", ["central", "distributed"])
def test_a_run_charges_it_after_its_rounds_and_within_its_budget(
    tmp_path: Path, noise: str
) -> None:
    payload = started(tmp_path / "run", *BUDGET, f"privacy.noise={noise}")
    wanted = [*((n, 0) for n in range(ROUNDS)), (ROUNDS, 0)]
    assert charged(tmp_path / "run") == wanted
    with Ledger.open(tmp_path / "run" / "ledger.jsonl", repair=False) as ledger:
        assert ledger.committed(ROUNDS, 0) is not None
        assert payload["privacy"]["epsilon"] == ledger.epsilon("recipients", 1e-4)
    assert 7.9 < payload["privacy"]["epsilon"] <= 8
    assert 5.9 < payload["privacy"]["epsilon_evaluation"] <= 6
    report = build(tmp_path / "run")
    keys = {metric.key for metric in report.accuracy.metrics}
    assert keys >= {"summed_hr@10", "summed_loss", "hr@10"}
    assert report.accuracy.note != WITHIN  # others stand beside them
    assert "alone they cost ε = 6.00" in " ".join(to_markdown(report).split())
    assert report.metric("summed_hr@10").low is not None  # type: ignore[union-attr]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    table = compare([tmp_path / "run", tmp_path / "again"])
    assert table.metrics[-2:] == ("summed_hr@10", "summed_loss")
    assert "Full ranking, with noise" in table.to_html()
    rounds = [point.round for point in report.curves[-1].points]
    assert rounds == sorted(set(rounds))
    assert rounds[-1] == ROUNDS


def test_rounds_leave_the_budget_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round that ends without a sum costs the last one, and not the accuracy."""
    collect, failed = Simulation.collect, list[int]()

    def failing(self: Simulation, round: Any, weights: Any) -> Any:
        if not failed:
            failed.append(round.index)
            raise ReleaseRefused("too few")
        return collect(self, round, weights)

    monkeypatch.setattr(Simulation, "collect", failing)
    with pytest.raises(BudgetError, match="round 3 would bring"):
        started(tmp_path / "run", *BUDGET)
    payload = json.loads((tmp_path / "run" / "result.json").read_text())
    assert payload["rounds"] == ROUNDS - 1
    assert "summed_loss" in payload["metrics"]
    assert payload["privacy"]["epsilon"] <= 8
    assert charged(tmp_path / "run") == [(0, 0), (0, 1), (1, 0), (ROUNDS, 0)]


def test_one_that_fails_leaves_the_model_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def few(*_: Any) -> Any:
        raise ReleaseRefused("too few devices")

    monkeypatch.setattr(task, "side_sum", few)
    payload = started(tmp_path / "run", *BUDGET)
    assert "summed_loss" not in payload["metrics"]
    assert "the evaluation would bring ε" in payload["gaps"]["the secure sum of metrics"]
    assert payload["rounds"] == ROUNDS
    assert charged(tmp_path / "run")[-1] == (ROUNDS, 0)
    assert build(tmp_path / "run").privacy.charges == ROUNDS + 1


def test_a_run_that_dies_after_it_pays_once_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, key = tmp_path / "run", {"unsafe_noise_key": b"k"}
    whole = started(tmp_path / "whole", **key)
    with monkeypatch.context() as patch:

        def died(*_: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr(lifecycle.SimulatedLoop, "finish", died)
        with pytest.raises(KeyboardInterrupt):
            started(out, **key)
    payload = lifecycle.resume(out, observer=Observer()).payload
    assert payload["metrics"] == whole["metrics"]
    assert charged(out) == charged(tmp_path / "whole")


def test_a_report_refuses_one_that_was_not_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(tmp_path / "run")
    build(tmp_path / "run")
    monkeypatch.setattr(building, "evaluating_of", lambda *_: None)
    with pytest.raises(IntegrityError, match="was charged after the last round"):
        build(tmp_path / "run")


def test_without_it_hashes_are_those_of_older_runs() -> None:
    plain, other = scenario("privacy.evaluation_epsilon="), scenario()
    for name in ("hash", "plan_hash", "privacy_hash"):
        assert getattr(plain, name)() != getattr(other, name)()
    dumped = plain.model_dump(exclude={"title", "description", "rows", "run"})
    del dumped["privacy"]["evaluation_epsilon"]
    from privrec.scenario.load import _digest

    assert plain.plan_hash() == _digest(dumped | {"seed": 0})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("privacy.noise=none", "privacy.noise_multiplier="), "charged to an ε of users"),
        (
            (
                *("privacy.local=example", "privacy.local_clip_norm=1"),
                *("privacy.local_epsilon=8", "train.loss=bce"),
            ),
            "no ε of single interactions",
        ),
        (("privacy.evaluation_epsilon=0",), "evaluation_epsilon"),
    ],
)
def test_what_it_does_not_go_with_is_refused(changes: tuple[str, ...], says: str) -> None:
    with pytest.raises(ScenarioError, match=says):
        scenario(*changes)
