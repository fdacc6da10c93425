"""Noise of the nodes in a Flower app: its size, its ledger, and what a node insists on."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2

pytest.importorskip("flwr", reason="the flower extra is not installed")

from click.testing import CliRunner
from flwr.app import Array, ArrayRecord, Message
from forging import chained, entries_of
from memory_grid import MemoryGrid, stage_of
from sum_apps import (
    SIZE,
    app_of,
    delta,
    flat,
    grid_of,
    lenient,
    mean_of,
    moved,
    one_round,
    strategy_of,
)
from sum_apps import model as two_arrays

from privrec.cli.main import main
from privrec.errors import BudgetError, IntegrityError, UsageError
from privrec.flower.exchange import pack, unpack
from privrec.flower.plan import SumPlan, integers, outlook, plan_of
from privrec.flower.secure_sum import SecureSum
from privrec.privacy.events import epsilon
from privrec.privacy.ledger import Ledger
from privrec.randomness import SecretRoot, state_dir
from privrec.report.build import build_account
from privrec.report.render import write
from privrec.report.verify import verify

WIDE = 20_000


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))


def wide() -> ArrayRecord:
    return ArrayRecord({"w": Array(np.zeros(WIDE, np.float32))})


def still(node: int, round: int) -> np.ndarray:
    """An update of nothing: what comes out is noise."""
    return np.zeros(WIDE)


def noisy(nodes: int, tmp_path: Path, **changes: Any) -> SecureSum:
    settings = {"noise_multiplier": 1.0, "ledger": tmp_path / "ledger.jsonl", **changes}
    return strategy_of(nodes, **settings)


def planned(size: int, noise_multiplier: float) -> SumPlan:
    """What the strategy of :func:`noisy` plans for five nodes."""
    return plan_of(5, size, 1.0, noise_multiplier, colluding_share=0.05, remove_excess=True)


def gone(*nodes: int) -> Any:
    return lambda message: stage_of(message) == "masked" and message.metadata.dst_node_id in nodes


def accepts(values: np.ndarray, variance: float) -> bool:
    """Whether zero-mean values may have this variance, at a thousandth."""
    statistic = float((values**2).sum() / variance)
    return chi2.ppf(5e-4, len(values)) < statistic < chi2.isf(5e-4, len(values))


# ---------------------------------------------------------------------- size


@pytest.mark.statistical
@pytest.mark.parametrize("remove_excess", [True, False])
@pytest.mark.parametrize("dropped", [(), (2, 5)])
def test_the_noise_of_a_sum_is_what_was_accounted(
    tmp_path: Path, remove_excess: bool, dropped: tuple[int, ...]
) -> None:
    grid = grid_of(9, app_of(lenient(), change=still), lost=gone(*dropped))
    strategy = noisy(9, tmp_path, colluding_share=0.1, remove_excess=remove_excess)
    arrays, _ = one_round(strategy, grid, wide())
    plan = plan_of(9, WIDE, 1.0, 1.0, colluding_share=0.1, remove_excess=remove_excess)
    assert (plan.least, plan.colluders) == (7, 1)
    survivors = 9 - len(dropped)
    kept = plan.least if remove_excess else survivors
    # The mean of the survivors, in units of the model, of noise that six shares alone make up.
    share = plan.encoding.squared_bound / (plan.least - plan.colluders)
    variance = kept * share / (survivors * plan.encoding.scale) ** 2
    values = flat(arrays)
    assert accepts(values, variance)
    assert not accepts(values, variance * 4 / 9)
    assert not accepts(values, variance * 9 / 4)
    assert abs(values.mean()) < 4 * np.sqrt(variance / WIDE)


@pytest.mark.statistical
def test_noise_is_fresh_in_every_round_and_attempt(tmp_path: Path) -> None:
    """Two sums with the same noise would give their difference away."""
    grid, strategy = grid_of(5, app_of(lenient(), change=still)), noisy(5, tmp_path)
    drawn = [flat(one_round(strategy, grid, wide(), round)[0]) for round in (1, 2, 2)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(drawn[one], drawn[other])[0, 1]) < 4 / np.sqrt(WIDE)


def test_the_mean_under_noise_counts_every_node_as_one(tmp_path: Path) -> None:
    strategy = noisy(5, tmp_path, noise_multiplier=0.01)
    arrays, metrics = one_round(strategy, grid_of(5), two_arrays())
    mean = np.mean([delta(node) for node in range(1, 6)], axis=0)
    assert np.allclose(flat(arrays), flat(moved(two_arrays(), mean)), atol=0.02)
    assert set(metrics) == {"epsilon"}


def test_a_plan_with_noise_sends_coefficients_alone() -> None:
    plan = plan_of(9, WIDE, 1.0, 1.0)
    assert plan.length == WIDE
    assert plan.shares.variance == plan.encoding.squared_bound
    assert plan_of(9, WIDE, 1.0).shares is None
    with pytest.raises(UsageError, match="without being accounted"):
        plan_of(9, WIDE, 1.0, 1.0, metrics=(("loss", 1.0),))
    assert SumPlan.unpack(plan.pack()) == plan


@pytest.mark.parametrize("wanted", [0, 1, 5, 8, 10**6, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("size", [1, 12, 1000])
def test_whatever_its_weight_a_node_stays_within_what_is_charged(size: int, wanted: float) -> None:
    plan = plan_of(9, size, 3.0, 1.0, max_examples=8)
    assert plan.length == size + 1
    assert plan.shares.variance == plan.encoding.squared_bound
    assert [band.size for band in plan.shares.bands] == [size + 1]
    for length in (0.1, 3.0, 50.0):
        update = np.full(size, length / np.sqrt(size), np.float32)
        coins = SecretRoot.known(b"coins").stream("rounding", size)
        own = integers(plan, update, {"num-examples": wanted}, coins).astype(np.int64)
        assert (own**2).sum() <= plan.encoding.squared_bound
        share = min(wanted, 8) / 8 if np.isfinite(wanted) and wanted > 0 else 0
        steps = plan.encoding.scale * share
        assert own[-1] == pytest.approx(1.5 * steps, abs=1)
        assert own[:-1] == pytest.approx(update * min(1, 3 / length) * steps, abs=1)
    longest = plan_of(9, size, 3.0 * np.hypot(1, 0.5), 1.0)  # what the noise is scaled to
    assert plan.encoding.clip_norm == pytest.approx(longest.encoding.clip_norm)


def test_nodes_may_count_with_their_examples_under_noise_too(tmp_path: Path) -> None:
    strategy = noisy(9, tmp_path, noise_multiplier=0.01, max_examples=8, noisy_weights=True)
    arrays, metrics = one_round(strategy, grid_of(9), two_arrays())
    assert np.allclose(flat(arrays), flat(moved(two_arrays(), mean_of(range(1, 10)))), atol=0.02)
    assert set(metrics) == {"epsilon"}
    shared = {"colluding_share": 0.05, "remove_excess": True, "max_examples": 8}
    with read(tmp_path) as ledger:
        assert set(ledger.counts) == {plan_of(9, SIZE, 1.0, 0.01, **shared).event}


def test_weights_that_noise_drowns_give_no_mean_and_are_charged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Noise of one round in forty looks like weights: not of a dozen rounds, one after the other.
    for attempt in range(12):
        (folder := tmp_path / str(attempt)).mkdir()
        strategy = noisy(5, folder, noise_multiplier=50.0, max_examples=8, noisy_weights=True)
        if one_round(strategy, grid_of(5), two_arrays()) == (None, None):
            break
    assert "they give no mean; lower max_examples" in caplog.text
    with read(folder) as ledger:
        assert len(ledger.charges) == 1
    for changes in ({"max_examples": None}, {"noise_multiplier": None, "ledger": None}):
        with pytest.raises(UsageError, match="noisy_weights are for sums with noise"):
            noisy(5, tmp_path, noisy_weights=True, **changes)


@pytest.mark.parametrize("nodes", [3, 9, 200, 5000])
@pytest.mark.parametrize("noise_multiplier", [0.0, 0.5, 20.0])
def test_no_sum_of_a_plan_wraps_around(nodes: int, noise_multiplier: float) -> None:
    plan = plan_of(nodes, 10**6, 3.0, noise_multiplier, colluding_share=0.05)
    deviation = noise_multiplier * plan.encoding.bound * 1.3
    assert nodes * plan.encoding.bound + 6 * deviation < 2**31
    assert plan.scale_bits == (13.0 if noise_multiplier else min(23.0, plan.scale_bits))
    assert plan.scale_bits > (12 if nodes <= 5000 else 0)


# ---------------------------------------------------------------------- ledger


def read(tmp_path: Path) -> Ledger:
    return Ledger.open(tmp_path / "ledger.jsonl", repair=False)


def test_every_attempt_is_charged_before_anybody_is_asked(tmp_path: Path) -> None:
    seen: list[int] = []

    def look(message: Message) -> bool:
        if stage_of(message) == "shares":
            seen.append(len(read(tmp_path).charges))
        return gone(1, 2, 3)(message) if len(seen) > 5 else False

    strategy = noisy(5, tmp_path)
    grid = grid_of(5, lost=look)
    assert one_round(strategy, grid)[0] is not None
    assert one_round(strategy, grid, round=2) == (None, None)  # drop-outs: charged all the same
    grid.lost = lambda message: False
    assert one_round(strategy, grid, round=2)[0] is not None
    assert seen == [1] * 5 + [2] * 5
    ledger = read(tmp_path)
    assert [(c.round, c.attempt) for c in ledger.charges] == [(0, 0), (1, 0), (1, 1)]
    committed = [ledger.committed(c.round, c.attempt) is not None for c in ledger.charges]
    assert committed == [True, False, True]


def test_epsilon_is_that_of_the_ledger_and_is_told_each_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flwr.privrec")
    strategy, found = noisy(5, tmp_path, noise_multiplier=3.0), []
    result = strategy.start(grid_of(5), two_arrays(), num_rounds=3, timeout=5)
    found = [result.train_metrics_clientapp[round]["epsilon"] for round in (1, 2, 3)]
    event = planned(12, 3.0).shares.event(1.0)
    assert found == [epsilon({event: n}, 1e-5, "server") for n in (1, 2, 3)]
    assert found == sorted(found)
    assert f"epsilon {found[-1]:g} at delta 1e-05 against the server" in caplog.text
    assert read(tmp_path).epsilon("server", 1e-5) == found[-1]


def test_its_ledger_has_a_report_that_verifies(tmp_path: Path) -> None:
    strategy, path = noisy(5, tmp_path, noise_multiplier=3.0), tmp_path / "ledger.jsonl"
    strategy.start(grid_of(5), two_arrays(), num_rounds=2, timeout=5)
    spent = read(tmp_path).epsilon("server", 1e-5)
    alone = verify(path)
    assert alone.holds
    assert f"ε against somebody who knows every cohort is {spent:g} at δ = 1e-05" in alone.checked
    facts = tmp_path / "facts.toml"
    facts.write_text('population = 5\nclip_norm = 1.0\nreleases = ["models"]\ntuning = "None."\n')
    report = build_account(path, facts)
    write(report, tmp_path)
    assert verify(path).holds
    assert report.adversary("server").epsilon == spent
    assert (report.privacy.unit, report.privacy.noise) == ("node", "distributed")
    assert report.trust_model is not None
    assert report.trust_model.kind == "devices"
    entries = entries_of(path)
    chained(path, [entries[0], *entries[3:]])
    assert not verify(path).holds


def test_epsilon_sets_the_noise_and_is_never_exceeded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = noisy(5, tmp_path, noise_multiplier=None, epsilon=4.0)
    result = strategy.start(grid_of(5), two_arrays(), num_rounds=3, timeout=5)
    spent = result.train_metrics_clientapp[3]["epsilon"]
    assert 3.9 < spent <= 4.0
    with pytest.raises(BudgetError, match="no round gave a model: .* it is not started"):
        strategy.start(grid_of(5), result.arrays, num_rounds=1, timeout=5)
    assert "it is not started" in caplog.text
    assert len(read(tmp_path).charges) == 3
    told = outlook(5, SIZE, 4.0, rounds=3)  # what the planner had said of it
    assert told.noise_multiplier == strategy.noise_multiplier
    plan = planned(SIZE, told.noise_multiplier)
    share = float(plan.shares.share_variance(0))
    assert told.deviation == pytest.approx((plan.least * share) ** 0.5 / plan.encoding.scale / 5)
    assert told.signal == pytest.approx(1 / (told.deviation * SIZE**0.5))


def test_a_budget_halts_a_run_that_was_given_its_noise(tmp_path: Path) -> None:
    strategy = noisy(5, tmp_path, noise_multiplier=3.0, epsilon=3.0)
    grid = grid_of(5)
    result = strategy.start(grid, two_arrays(), num_rounds=6, timeout=5)
    rounds = list(result.train_metrics_clientapp)
    assert rounds == list(range(1, len(rounds) + 1))
    assert 0 < len(rounds) < 6
    asked = [m for m in grid.sent if stage_of(m) == "shares"]
    assert len(asked) == 5 * len(rounds)


def test_the_command_says_what_the_planner_says() -> None:
    words = ["flower", "plan", "--epsilon", "8", "--rounds", "3", "--coefficients", "1000"]
    told = CliRunner().invoke(main, [*words, "--nodes", "9", "--nodes", "90", "--json"])
    found = [outlook(nodes, 1000, 8.0, rounds=3) for nodes in (9, 90)]
    assert json.loads(told.output) == [asdict(each) for each in found]
    assert found[1].signal > 9 * found[0].signal
    table = CliRunner().invoke(main, words).output
    assert "ε = 8 at δ = 1e-05 over 3 rounds" in table
    assert "10,000" in table


def test_a_model_that_is_too_long_is_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"268,435,453 float .* at most 268,435,452; train"):
        plan_of(9, 2**28 - 3, 1.0)
    assert plan_of(9, 2**28 - 4, 1.0).length == 2**28


def test_another_server_goes_on_with_the_ledger(tmp_path: Path) -> None:
    first = noisy(5, tmp_path, noise_multiplier=3.0)
    first.start(grid_of(5), two_arrays(), num_rounds=2, timeout=5)
    second = noisy(5, tmp_path, noise_multiplier=3.0)
    result = second.start(grid_of(5), two_arrays(), num_rounds=1, timeout=5)
    charges = read(tmp_path).charges
    assert [(c.round, c.attempt) for c in charges] == [(0, 0), (1, 0), (0, 1)]
    event = charges[0].event
    spent = result.train_metrics_clientapp[1]["epsilon"]
    assert spent == epsilon({event: 3}, 1e-5, "server")


def test_a_ledger_of_another_delta_or_without_its_key_is_refused(tmp_path: Path) -> None:
    one_round(noisy(5, tmp_path), grid_of(5), two_arrays())
    with pytest.raises(IntegrityError, match="it is about delta = 1e-05, not 1e-06"):
        one_round(noisy(5, tmp_path, delta=1e-6), grid_of(5), two_arrays())
    (key,) = (state_dir() / "flower").glob("*/server.key")
    key.unlink()
    with pytest.raises(UsageError, match="the key that signs"):
        one_round(noisy(5, tmp_path), grid_of(5), two_arrays())


def test_a_ledger_whose_end_was_cut_is_refused(tmp_path: Path) -> None:
    strategy = noisy(5, tmp_path)
    one_round(strategy, grid_of(5), two_arrays())
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    with pytest.raises(IntegrityError, match="cut away"):
        one_round(strategy, grid_of(5), two_arrays(), 2)


def test_a_budget_that_nothing_meets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="noise of variance"):
        one_round(noisy(5, tmp_path, noise_multiplier=None, epsilon=1e-4, delta=1e-9), grid_of(5))


# ---------------------------------------------------------------------- what a node insists on


def answered(grid: MemoryGrid) -> list[str]:
    return [reply.error.reason for reply in grid.replies if reply.has_error()]


def test_a_node_refuses_less_noise_than_it_insists_on(tmp_path: Path) -> None:
    grid = grid_of(5, app_of(lenient(noise_multiplier=1.0)))
    weak = {"noise_multiplier": 0.9, "colluding_share": 0.0}
    assert one_round(noisy(5, tmp_path, **weak), grid) == (None, None)
    assert "and this node insists on 1" in answered(grid)[0]
    grid = grid_of(5, app_of(lenient(noise_multiplier=1.0)))
    assert one_round(noisy(5, tmp_path), grid)[0] is not None
    grid = grid_of(5, app_of(lenient(noise_multiplier=1.0)))
    assert one_round(strategy_of(5), grid) == (None, None)


def test_a_node_counts_out_the_noise_of_those_it_does_not_trust(tmp_path: Path) -> None:
    # Two of ten may collude: of the seven fewest survivors five shares are sure.
    strict = {"noise_multiplier": 1.0, "corrupt_share": 0.2}
    grid = grid_of(10, app_of(lenient(**strict)))
    assert one_round(noisy(10, tmp_path, colluding_share=0.0), grid) == (None, None)
    assert "noise of 0.8452 times the sensitivity" in answered(grid)[0]
    grid = grid_of(10, app_of(lenient(**strict)))
    assert one_round(noisy(10, tmp_path, colluding_share=0.2), grid)[0] is not None


def test_a_server_cannot_lower_the_noise_behind_the_masks(tmp_path: Path) -> None:
    """All nodes are told of another plan than the one that the call is bound to."""

    def tampered(message: Message) -> Message:
        if stage_of(message) != "shares":
            return message
        body, meta = unpack(message), message.metadata
        plan = SumPlan.unpack(body["plan"])
        body["plan"] = planned(plan.size, 0.1).pack()
        return Message(pack(body), meta.dst_node_id, meta.message_type)

    grid = grid_of(5, tampered=tampered)
    assert one_round(noisy(5, tmp_path), grid) == (None, None)
    assert "whose terms are not those of its plan" in answered(grid)[0]
