"""Runs with example-level noise: two units side by side, from the scenario to the report."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
from parts import assemble
from small_runs import make_scenario, run_once

from privrec import data
from privrec.errors import BudgetError, IntegrityError, ReleaseRefused, ScenarioError
from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.ledger import Ledger
from privrec.randomness import SecretRoot
from privrec.report.build import build
from privrec.report.render import to_markdown
from privrec.run.simulation import Simulation

ROUNDS = 3
TINY = f"""
name = "tiny-local"
[data]
users = 40
items = 30
clusters = 3
interactions_per_user = 8
[model]
dim = 4
block = 2
[devices]
population = 40
sampling = "everybody"
[train]
rounds = {ROUNDS}
loss = "bpr"
user_steps = 0
local_steps = 3
local_lr = 0.1
server_optimizer = "fedavg"
[privacy]
noise = "none"
clip_norm = 20.0
local = "example"
local_clip_norm = 1.0
local_epsilon = 6.0
local_delta = 1e-6
[run]
footprint = false
"""
USERS_TOO = ("privacy.noise=distributed", "privacy.epsilon=8.0", "devices.min_cohort=10")


pytestmark = pytest.mark.usefixtures("state")
scenario = partial(make_scenario, TINY)
done = partial(run_once, TINY)


def test_alone_it_has_an_epsilon_of_its_own_and_none_of_users(tmp_path):
    privacy = done(tmp_path / "run")["privacy"]
    assert privacy["epsilon"] is None
    assert not privacy["private"]
    single = privacy["examples"]
    event = RoundEvent("gaussian", single["noise_multiplier"])
    assert single["epsilon"] == epsilon({event: ROUNDS}, 1e-6, "server") <= 6.0
    assert single["unit"] == "example"
    report = build(tmp_path / "run")
    assert report.examples.epsilon == single["epsilon"]
    assert "example level" in report.claim
    assert "no guarantee at user level" in report.claim
    assert 0 < report.cost.noise_deferred < 1
    assert "never added" in to_markdown(report)


def test_together_both_hold_and_neither_is_added(tmp_path):
    privacy = done(tmp_path / "run", *USERS_TOO)["privacy"]
    alone = done(tmp_path / "users", *USERS_TOO, *WITHOUT)["privacy"]
    assert privacy["private"]
    assert privacy["epsilon"] == alone["epsilon"]
    assert privacy["examples"]["epsilon"] <= 6.0
    with Ledger.open(tmp_path / "run" / "ledger.jsonl", repair=False) as ledger:
        assert sum(ledger.counts.values()) == sum(ledger.examples.values()) == ROUNDS
        assert not set(ledger.counts) & set(ledger.examples)
    report = build(tmp_path / "run")
    assert report.privacy.unit == "user"
    assert report.examples.unit == "example"


WITHOUT = ("privacy.local=none", "privacy.local_clip_norm=", "privacy.local_epsilon=")


def test_one_device_and_the_cohort_give_the_same_sum():
    """The same noise, device by device; only the rounding to integers has coins of its own."""
    totals = []
    for engine in ("cohort", "device"):
        chosen = scenario(f"run.engine={engine}")
        train = data.load(chosen.data, data_dir=None).train
        parts = assemble(chosen, train, "run", SecretRoot.known(b"k"))
        round = parts.server.next_round(0)
        totals.append(parts.simulation.collect(round, parts.server.weights).total)
    assert np.abs(totals[0] - totals[1]).max() <= 40
    assert np.abs(totals[0]).mean() > 100


def test_a_report_is_refused_when_the_result_says_another_epsilon(tmp_path):
    out = tmp_path / "run"
    done(out)
    payload = json.loads((out / "result.json").read_text())
    payload["privacy"]["examples"]["epsilon"] /= 2
    (out / "result.json").write_text(json.dumps(payload))
    with pytest.raises(IntegrityError, match=r"examples\.epsilon"):
        build(out)


@pytest.mark.parametrize("index", [0, ROUNDS - 1])
def test_a_retry_that_would_exceed_the_budget_stops(tmp_path, index, monkeypatch):
    """Each attempt is charged for examples too, so a lost round ends the run before its last."""
    collect, lost = Simulation.collect, []

    def losing(self, round, weights):
        if round.index == index and not lost:
            lost.append(round.index)
            raise ReleaseRefused("lost")
        return collect(self, round, weights)

    monkeypatch.setattr(Simulation, "collect", losing)
    with pytest.raises(BudgetError, match="example-level"):
        done(tmp_path / "run")
    lost.clear()
    done(tmp_path / "with a spare", "privacy.spare_attempts=1")
    with Ledger.open(tmp_path / "with a spare/ledger.jsonl") as ledger:
        assert sum(ledger.examples.values()) == ROUNDS + 1
        assert epsilon(ledger.examples, 1e-6, "server") <= 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.user_steps=1", "user vector fitted without noise"),
        ("train.loss=softmax", "a loss of its own"),
        ("train.max_samples=5", "window"),
        ("privacy.local_clip_norm=", "bound on each interaction"),
        ("privacy.local_epsilon=", "target ε or a multiplier"),
        ("privacy.local_noise_multiplier=1.0", "each decides the other"),
        ("privacy.local=none", "protects no single interaction"),
    ],
)
def test_what_would_undo_it_is_refused(change, words):
    with pytest.raises(ScenarioError, match=words):
        scenario(change)
