"""Runs whose sums have shares of example-level noise: the plan, the sum, and what is refused."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
from parts import assemble
from small_runs import make_scenario, run_once

from privrec import data
from privrec.data import Interactions
from privrec.device.example_shares import ExampleShares
from privrec.errors import IntegrityError, ReleaseRefused, ScenarioError, UsageError
from privrec.privacy.events import epsilon
from privrec.privacy.ledger import Ledger
from privrec.randomness import SecretRoot
from privrec.report.build import build
from privrec.run.plan import Plan
from privrec.run.simulation import leaving
from privrec.secagg.messages import Stage

ROUNDS, USERS = 3, 40
TINY = f"""
name = "tiny-shares"
[data]
users = {USERS}
items = 30
clusters = 3
interactions_per_user = 8
[model]
dim = 4
block = 2
[devices]
population = {USERS}
sampling = "everybody"
min_cohort = 10
[train]
rounds = {ROUNDS}
loss = "bpr"
user_steps = 0
local_steps = 2
local_lr = 0.1
server_optimizer = "fedavg"
[privacy]
noise = "none"
clip_norm = 1.0
scale_bits = 16
local = "shares"
local_clip_norm = 1.0
local_epsilon = 6.0
local_delta = 1e-6
[run]
footprint = false
"""

pytestmark = pytest.mark.usefixtures("state")
scenario = partial(make_scenario, TINY)
done = partial(run_once, TINY)


def parts_of(*changes: str, key: bytes = b"k", train: Interactions | None = None):
    chosen = scenario(*changes)
    found = data.load(chosen.data, data_dir=None).train if train is None else train
    return assemble(chosen, found, "run", SecretRoot.known(key))


def nothing(users: int, items: int) -> Interactions:
    """Histories of no items."""
    names = np.arange(users), np.arange(items)
    return Interactions(np.zeros(users + 1, np.int64), np.zeros(0, np.int32), None, *names)


def test_the_plan_charges_what_devices_and_shares_do():
    parts = parts_of()
    plan, learner = parts.plan, parts.simulation.cohorts[0].learner
    event, shares, bound = plan.examples, plan.protection.shares, learner.examples
    assert not plan.event.is_private
    assert isinstance(bound, ExampleShares)
    # A unit of the clip norm is 2 reach steps, of the step size and the scale.
    assert bound.reach == int(0.1 * 1.0 / 2 * 2**16)
    assert event.grid.squared_sensitivity == (2 * bound.reach) ** 2 == shares.squared_sensitivity
    assert event.noise_multiplier == shares.noise_multiplier == bound.noise_multiplier
    (band,) = shares.bands
    assert (band.least, band.colluders) == (27, 2)
    assert float(shares.share_variance(0)) * 25 == pytest.approx(bound.deviation**2)
    assert plan.protection.minimums == (27,)
    assert 5.9 < epsilon({event: ROUNDS}, 1e-6, "server") <= 6.0


@pytest.mark.parametrize("dropouts", ["0.0", "0.2"])
@pytest.mark.parametrize("wrong", [1.0, 2 / 3, 1.5])
def test_a_released_sum_has_the_noise_that_is_accounted_and_that_of_colluders(dropouts, wrong):
    """Of devices without examples; two thirds of it and half too much are refused.

    Who leaves before the signatures gives no seed away: shares stay until enough signers' are in.
    """
    parts = parts_of(f"devices.dropout_rate={dropouts}", train=nothing(USERS, 3000))
    shares = parts.plan.protection.shares
    round, devices = parts.server.next_round(0), parts.simulation
    total = devices.collect(round, parts.server.weights).total
    (band,) = shares.bands
    leaves = leaving(devices.root, round, USERS, float(dropouts))
    alive = np.flatnonzero(leaves > Stage.MASKED)
    order = np.array(sorted(alive.tolist(), key=devices.enrolled.identity))
    signed = leaves[order] > Stage.CONFIRM
    kept = int((np.cumsum(signed) - signed < band.least).sum())
    assert kept == band.least or dropouts != "0.0"
    wanted = float(shares.share_variance(0)) * kept * wrong**2
    ratio = float((total.astype(np.float64) ** 2).mean()) / wanted
    assert (abs(ratio - 1) < 5 * np.sqrt(2 / len(total))) == (wrong == 1.0)
    assert np.count_nonzero(total) > 0.99 * len(total)
    at_least = (2 * shares.noise_multiplier) ** 2 * (shares.squared_sensitivity / 4)
    assert wanted >= at_least or wrong != 1.0


def test_with_too_few_survivors_nothing_is_released():
    parts = parts_of("devices.dropout_rate=0.9")
    with pytest.raises(ReleaseRefused, match="too few devices"):
        parts.simulation.collect(parts.server.next_round(0), parts.server.weights)


def test_the_protocol_gives_the_bits_of_the_plain_sum_and_any_number_of_workers_too():
    totals, states = [], []
    for change in ("run.secure_sum=exact", "run.secure_sum=full", "run.workers=2"):
        parts = parts_of(change, "devices.dropout_rate=0.1")
        round = parts.server.next_round(0)
        totals.append(parts.simulation.collect(round, parts.server.weights).total)
        states.append(parts.simulation.states[0])
    for total, state in zip(totals[1:], states[1:], strict=True):
        assert np.array_equal(total, totals[0])
        assert np.array_equal(state, states[0])


def test_one_device_and_the_cohort_give_the_same_sum():
    """Up to where floats are rounded to integers, which is example by example."""
    totals, states = [], []
    for engine in ("cohort", "device"):
        parts = parts_of(f"run.engine={engine}")
        round = parts.server.next_round(0)
        totals.append(parts.simulation.collect(round, parts.server.weights).total)
        states.append(parts.simulation.states[0])
    assert np.abs(totals[0] - totals[1]).max() <= 40
    assert np.abs(totals[0]).mean() > 1000
    assert np.abs(states[0] - states[1]).max() < 1e-3


def test_a_run_has_an_epsilon_of_interactions_against_whoever_sees_sums(tmp_path):
    privacy = done(tmp_path / "run")["privacy"]
    assert privacy["epsilon"] is None
    assert 5.9 < privacy["examples"]["epsilon"] <= 6.0
    with Ledger.open(tmp_path / "run" / "ledger.jsonl", repair=False) as ledger:
        (event,) = ledger.examples
        assert event.mechanism == "discrete_gaussian"
        assert ledger.examples[event] == ROUNDS
    report = build(tmp_path / "run")
    assert report.examples.epsilon == privacy["examples"]["epsilon"]
    assert report.cost.noise_deferred == 0.5


def test_an_epsilon_against_sums_is_never_taken_for_one_against_uploads(tmp_path):
    out = tmp_path / "run"
    privacy = done(out)["privacy"]
    assert privacy["examples"]["adversary"] == "sums"
    report = build(out)
    assert "no device’s own upload" in report.claim
    assert "Not against whoever sees one device’s upload" in report.examples.against
    payload = json.loads((out / "result.json").read_text())
    payload["privacy"]["examples"]["adversary"] = "uploads"
    (out / "result.json").write_text(json.dumps(payload))
    with pytest.raises(IntegrityError, match=r"examples\.adversary"):
        build(out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.user_steps=1", "user vector fitted without noise"),
        ("train.loss=softmax", "a loss of its own"),
        ("train.max_samples=5", "window"),
        ("privacy.noise=central", "what is summed has one noise"),
        ("privacy.noise=distributed", "what is summed has one noise"),
        ("privacy.clip_norm=", "bound on each coefficient"),
        ("privacy.ring_bits=16", "not rotated"),
        ("devices.tiers=[{capacity = 1.0, share = 0.5}, {capacity = 0.5, share = 0.5}]", "tiers"),
        ("privacy.local_clip_norm=", "bound on each interaction"),
    ],
)
def test_what_would_undo_it_is_refused(change, words):
    with pytest.raises(ScenarioError, match=words):
        scenario(change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("privacy.scale_bits=8", "raise privacy.scale_bits"),
        ("privacy.clip_norm=10000", "lower privacy.clip_norm"),
        ("devices.min_cohort=41", "sample more devices"),
        ("privacy.local_noise_multiplier=0.001", "distributed noise"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_any_data(change, words):
    more = ("privacy.local_epsilon=",) if "multiplier" in change else ()
    with pytest.raises(UsageError, match=words):
        Plan.of(scenario(change, *more), 30, USERS)


def test_a_sum_that_could_wrap_around_is_refused():
    with pytest.raises(UsageError, match="wrap around"):
        Plan.of(scenario("privacy.scale_bits=19", "devices.population=6040"), 30, 6040)
