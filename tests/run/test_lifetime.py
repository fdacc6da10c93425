"""The lifetime budget of a population: what is reserved, what is settled, and what is refused."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from privrec.device.update import Aggregate, Round
from privrec.errors import BudgetError, IntegrityError, ReleaseRefused, UsageError
from privrec.privacy import population
from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.ledger import Ledger
from privrec.privacy.population import PopulationCharge
from privrec.randomness import state_dir
from privrec.run import lifecycle
from privrec.run.privacy_plan import charges_of, event_without_shares
from privrec.run.record import Observer
from privrec.run.simulation import Simulation
from privrec.scenario.load import Scenario
from privrec.storage import line_of, parsed

EVENT, OTHER = RoundEvent("gaussian", 2.0), RoundEvent("gaussian", 3.0, 0.5)
DELTA, ROUNDS = 1e-6, 4
TINY = f"""
name = "tiny"
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
sampling_rate = 0.4
[train]
rounds = {ROUNDS}
[privacy]
noise = "central"
clip_norm = 1.0
noise_multiplier = 2.0
delta = 1e-6
[run]
footprint = false
"""


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))


def create(**counts: int) -> None:
    """A population whose limit is just what so many events of each kind cost the server."""
    kinds = {"event": EVENT, "other": OTHER, "tiny": RoundEvent("gaussian", 2.0, 0.4)}
    limit = epsilon(Counter({kinds[k]: n for k, n in counts.items()}), DELTA, "server")
    population.create("readers", epsilon=limit, delta=DELTA, against="server")


def start(out: Path, *changes: str) -> Path:
    made = lifecycle.start(
        Scenario.from_toml(TINY, changes), out=out, observer=Observer(), population="readers"
    )
    return made.path


def charged(path: Path) -> Counter[RoundEvent]:
    with Ledger.open(path / "ledger.jsonl", repair=False) as ledger:
        return Counter(ledger.counts)


def held() -> list[Counter[RoundEvent]]:
    return list(population.read("readers").runs.values())


def test_runs_over_the_same_users_share_one_limit() -> None:
    create(event=3, other=1)
    population.reserve("readers", "first", Counter({EVENT: 2}))
    population.reserve("readers", "second", Counter({OTHER: 1}))
    with pytest.raises(BudgetError, match="lifetime"):
        population.reserve("readers", "third", Counter({EVENT: 2}))
    assert held() == [Counter({EVENT: 2}), Counter({OTHER: 1})]
    standing = population.reserve("readers", "third", Counter({EVENT: 1}))
    assert (standing.runs, standing.reserved) == (2, population.read("readers").epsilon)


def test_a_resumed_run_sets_aside_the_larger_of_both() -> None:
    create(event=3, other=1)
    for planned in ({EVENT: 3}, {EVENT: 1, OTHER: 1}, {EVENT: 2}):
        population.reserve("readers", "first", Counter(planned))
    assert held() == [Counter({EVENT: 3, OTHER: 1})]


def test_a_finished_run_gives_back_what_it_did_not_charge_and_no_more() -> None:
    create(event=3)
    population.reserve("readers", "first", Counter({EVENT: 3}))
    for beyond in (Counter({EVENT: 4}), Counter({EVENT: 2, OTHER: 1})):
        with pytest.raises(IntegrityError, match="more than it had set aside"):
            population.settle("readers", "first", beyond)
    population.settle("readers", "first", Counter({EVENT: 2}))
    population.reserve("readers", "second", Counter({EVENT: 1}))
    assert held() == [Counter({EVENT: 2}), Counter({EVENT: 1})]
    with pytest.raises(UsageError, match="set nothing aside"):
        population.settle("readers", "third", Counter({EVENT: 1}))


def test_a_reservation_is_on_disk_before_its_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    create(event=3)
    flushed: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (flushed.append(os.fstat(file).st_ino), fsync(file))
    )
    population.reserve("readers", "first", Counter({EVENT: 3}))
    for path in (population.path_of("readers"), state_dir() / "runs" / "first" / "population.json"):
        assert {path.stat().st_ino, path.parent.stat().st_ino} <= set(flushed)


def test_an_entry_that_was_rewritten_shows_in_the_next_one() -> None:
    create(event=3)
    population.reserve("readers", "first", Counter({EVENT: 2}))
    population.reserve("readers", "second", Counter({EVENT: 1}))
    path = population.path_of("readers")
    lines = path.read_bytes().splitlines(keepends=True)
    entry = parsed(lines[1])
    assert entry is not None
    entry["events"][0][1] = 1
    del entry["hash"]
    path.write_bytes(b"".join([lines[0], line_of(entry), *lines[2:]]))
    with pytest.raises(IntegrityError, match="line 3 does not follow the one before"):
        population.read("readers")


def test_what_goes_beyond_a_reservation_is_set_aside_or_refused() -> None:
    create(event=3)
    population.reserve("readers", "first", Counter({EVENT: 2}))
    tie = PopulationCharge("readers", "first", Counter({EVENT: 2}))
    tie.cover(Counter({EVENT: 3}))
    assert held() == [Counter({EVENT: 3})]
    with pytest.raises(BudgetError, match="lifetime"):
        tie.cover(Counter({EVENT: 4}))


def test_a_run_beyond_the_limit_is_refused_before_its_data_is_read() -> None:
    create(tiny=ROUNDS - 1)
    with pytest.raises(BudgetError, match="nothing was read or charged"):
        lifecycle.check_lifetime("readers", Scenario.from_toml(TINY))
    lifecycle.check_lifetime("readers", Scenario.from_toml(TINY, [f"train.rounds={ROUNDS - 1}"]))


def test_spare_attempts_are_set_aside_from_the_beginning() -> None:
    target = ["privacy.noise_multiplier=", "privacy.epsilon=9"]
    spares = [*target, "privacy.spare_attempts=3"]
    one, more = (Scenario.from_toml(TINY, words) for words in (target, spares))
    event = event_without_shares(one)
    assert charges_of(one, event, ()) == Counter({event: ROUNDS})
    assert charges_of(more, event, ()) == Counter({event: ROUNDS + 3})
    louder = event_without_shares(more)
    assert louder.noise_multiplier > event.noise_multiplier
    for attempts, bound in ((ROUNDS, 8.9), (ROUNDS + 3, 9.0)):
        assert epsilon(Counter({louder: attempts}), DELTA, "recipients") <= bound


@pytest.mark.parametrize("spare", [0, 1])
def test_a_round_that_is_charged_again_is_set_aside_too(
    tmp_path: Path, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(tiny=ROUNDS + spare)
    collect, aborted = Simulation.collect, []

    def once(self: Simulation, round: Round, weights: object) -> Aggregate:
        if round.index == ROUNDS - 1 and not aborted:
            aborted.append(round)
            raise ReleaseRefused("too few devices")
        return collect(self, round, weights)

    monkeypatch.setattr(Simulation, "collect", once)
    if spare:
        start(tmp_path / "run")
    else:
        with pytest.raises(BudgetError, match="lifetime"):
            start(tmp_path / "run")
    assert held() == [charged(tmp_path / "run")]
    assert sum(held()[0].values()) == ROUNDS + spare
