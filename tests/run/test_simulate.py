"""The simulated devices: one sum, whichever engine, however often it is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from privrec.device.device import TOLERANCE, Cohort, Device, Draws, Settings
from privrec.device.local import LocalModel
from privrec.device.recommender import RecommenderLearner
from privrec.device.samples import Histories
from privrec.device.tier import Federation, ModelView, Tier
from privrec.device.update import Protection, Round, model_digests
from privrec.embedding.nested import nested
from privrec.embedding.subspace import Subspace
from privrec.models.layout import Layout
from privrec.models.ncf import NCF
from privrec.privacy.events import RoundEvent
from privrec.randomness import SecretRoot, rng_for
from privrec.run.simulation import Enrolled, Simulation
from privrec.secagg.client import Policy
from privrec.secagg.ring import Encoding

ITEMS, USERS, ROOT = 40, 25, SecretRoot.known(b"devices")
SETTINGS: dict[str, Any] = {
    "negatives": 3,
    "unobserved_weight": 0.1,
    "item_l2": 0.01,
    "newton": False,
    "max_samples": 5,
    "user_steps": 2,
    "user_lr": 1.0,
    "user_l2": 0.3,
    "serve_steps": 3,
    "serve_negatives": 6,
    "local_steps": 2,
    "local_lr": 0.3,
}
HISTORIES = [
    np.random.default_rng(user).permutation(ITEMS)[: user % 9].astype(np.int32)
    for user in range(USERS)
]


def make_simulation(
    kind: str = "gmf",
    engine: str = "cohort",
    *,
    compression: float = 1.0,
    rate: float = 0.5,
    clip_norm: float = 0.5,
    scale_bits: int = 13,
    loss: str = "bce",
    histories: list[np.ndarray] | None = None,
) -> Simulation:
    model = NCF.of(kind, 8, (6, 5))  # type: ignore[arg-type]
    vectors = Subspace.sized(ITEMS, 8, block=4, key=1, compression=compression)
    biases = Subspace.sized(ITEMS, 1, block=1, key=2, compression=compression)
    view = ModelView.of(model, vectors, biases)
    learner = RecommenderLearner(view, Settings(loss=loss, **SETTINGS))
    chains = nested(vectors, [0]), nested(biases, [0])
    federation = Federation((Tier(0, 1.0, 1.0, 1.0, view, *chains),))
    devices = Cohort.of(learner, as_histories(histories or HISTORIES))
    return Simulation(
        federation,
        (devices,),
        population=USERS,
        protection=Protection(Encoding(clip_norm, view.layout.size, scale_bits)),
        enrolled=Enrolled(ROOT, Policy()),
        seed=3,
        sampling_rate=rate,
        engine=engine,  # type: ignore[arg-type]
    )


def as_histories(lists: list[np.ndarray]) -> Histories:
    indptr = np.cumsum([0, *map(len, lists)])
    return Histories(np.arange(len(lists)), indptr, np.concatenate(lists))


def states_of(simulation: Simulation) -> np.ndarray:
    """Private states of everybody, where all devices are of one tier."""
    (cohort,) = simulation.cohorts
    return cohort.states


def weights_of(simulation: Simulation, seed: int = 0) -> np.ndarray:
    size = simulation.federation.layout.size
    return np.random.default_rng(seed).normal(0, 0.4, size).astype(np.float32)


def digests_of(weights: np.ndarray) -> tuple[bytes, ...]:
    """Of a model that all devices hold whole, so that it is one band."""
    return model_digests(weights, (Layout(len(weights), 0, 1, 0),))


def round_of(weights: np.ndarray, index: int = 0, attempt: int = 0) -> Round:
    event = RoundEvent("none", 0.0, 0.5)
    return Round("run", index, attempt, event, "plan", digests_of(weights))


@pytest.mark.parametrize("loss", ["bce", "full_softmax"])
@pytest.mark.parametrize("compression", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["gmf", "mlp", "neumf"])
def test_both_engines_give_the_same_sum_but_for_rounding(kind, compression, loss) -> None:
    """Over three rounds; each device's coins move a coefficient by less than a step."""
    one, many = (
        make_simulation(kind, engine, compression=compression, loss=loss)
        for engine in ("device", "cohort")
    )
    for index in range(3):
        weights = weights_of(one, index)
        alone, together = (each.collect(round_of(weights, index), weights) for each in (one, many))
        assert alone.cohort == together.cohort > 5
        drift = 10 * TOLERANCE * 2**13
        assert np.abs(alone.total - together.total).max() <= alone.cohort * (1 + drift)
        assert np.abs(alone.total).max() > 100 * alone.cohort
        assert alone.loss == pytest.approx(together.loss, rel=1e-3)
        assert np.allclose(states_of(one), states_of(many), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("engine", ["cohort", "device"])
def test_the_sum_is_that_of_the_devices_clipped_updates(engine) -> None:
    """On a fine grid it is the sum of what the devices train, clipped one by one."""
    simulation = make_simulation("neumf", engine, clip_norm=0.1, scale_bits=20)
    weights = weights_of(simulation)
    users = simulation.sample(round_of(weights))
    expected = np.zeros(len(weights))
    for user in users:
        alone = make_simulation("neumf", "device", clip_norm=30.0, scale_bits=20)
        raw = only(alone, int(user), weights)
        expected += raw * min(1.0, 0.1 / max(float(np.linalg.norm(raw)), 1e-30))
    found = simulation.protection.encoding.decode(
        simulation.collect(round_of(weights), weights).total
    )
    assert np.abs(found - expected).max() < 2e-4
    assert np.abs(expected).max() > 0.02


def only(simulation: Simulation, user: int, weights: np.ndarray) -> np.ndarray:
    """The decoded answer of one device, drawn with the round's own samples."""
    key = int(rng_for(simulation.seed, "samples", 0).integers(2**63))
    (tier,), (devices,) = simulation.federation.tiers, simulation.cohorts
    device = Device(
        user, HISTORIES[user], tier, (tier.layout,), devices.learner, simulation.protection, ROOT
    )
    return simulation.protection.encoding.decode(
        device.answer(round_of(weights), weights, key).vector()
    )


@pytest.mark.parametrize("engine", ["cohort", "device"])
def test_a_round_collected_again_is_the_same_round(engine) -> None:
    """Replay after a crash between charge and record: same bits, same states."""
    simulation = make_simulation("neumf", engine)
    weights = [weights_of(simulation, index) for index in range(3)]
    simulation.collect(round_of(weights[0], 0), weights[0])
    before = states_of(simulation).copy()
    first = simulation.collect(round_of(weights[1], 1), weights[1])
    states = states_of(simulation).copy()
    assert not np.array_equal(before, states)
    for _ in range(2):
        again = simulation.collect(round_of(weights[1], 1), weights[1])
        assert np.array_equal(again.total, first.total)
        assert again.loss == first.loss
        assert np.array_equal(states_of(simulation), states)
    following = simulation.collect(round_of(weights[2], 2), weights[2])
    straight = make_simulation("neumf", engine)
    for index in range(3):
        last = straight.collect(round_of(weights[index], index), weights[index])
    assert np.array_equal(following.total, last.total)
    assert np.array_equal(states_of(simulation), states_of(straight))


@pytest.mark.parametrize("engine", ["cohort", "device"])
def test_another_attempt_starts_from_the_same_states_with_other_coins(engine) -> None:
    simulation = make_simulation(engine=engine)
    weights = weights_of(simulation)
    first = simulation.collect(round_of(weights), weights)
    states = states_of(simulation).copy()
    second = simulation.collect(round_of(weights, attempt=1), weights)
    assert second.cohort == first.cohort
    assert np.array_equal(states_of(simulation), states)
    assert not np.array_equal(first.total, second.total)
    assert np.abs(first.total - second.total).max() <= first.cohort


@pytest.mark.parametrize("engine", ["cohort", "device"])
def test_only_the_cohort_changes_its_states(engine) -> None:
    simulation = make_simulation(engine=engine)
    weights = weights_of(simulation)
    users = simulation.sample(round_of(weights))
    simulation.collect(round_of(weights), weights)
    moved = np.flatnonzero(states_of(simulation).any(1))
    assert set(moved) == {user for user in users if len(HISTORIES[user])}


@pytest.mark.parametrize("engine", ["cohort", "device"])
def test_an_empty_cohort_sums_to_zero(engine) -> None:
    simulation = make_simulation(engine=engine, rate=1e-9)
    weights = weights_of(simulation)
    aggregate = simulation.collect(round_of(weights), weights)
    assert (aggregate.cohort, aggregate.loss) == (0, None)
    assert aggregate.total.shape == weights.shape
    assert not aggregate.total.any()


@pytest.mark.parametrize("kind", ["gmf", "neumf"])
@pytest.mark.parametrize("compression", [1.0, 4.0])
@pytest.mark.parametrize("loss", ["bce", "full_softmax"])
def test_one_history_moves_the_sum_by_no_more_than_the_bound(kind, compression, loss) -> None:
    """Zero-out adjacency, as accounted: a history replaced by none, everything else the same."""
    for user in (0, 7, 17):
        sums = []
        for histories in (HISTORIES, [h if u != user else h[:0] for u, h in enumerate(HISTORIES)]):
            simulation = make_simulation(
                kind,
                "device",
                compression=compression,
                rate=1.0,
                clip_norm=0.01,
                loss=loss,
                histories=histories,
            )
            weights = weights_of(simulation)
            sums.append(simulation.collect(round_of(weights), weights).total)
        difference = sums[0] - sums[1]
        bound = simulation.protection.encoding.bound
        length = float(np.linalg.norm(difference.astype(np.float64)))
        assert length <= bound
        assert (length > 0.9 * bound) == bool(len(HISTORIES[user]))


@pytest.mark.parametrize("engine", ["cohort", "device"])
def test_a_broken_model_gives_a_zero_sum_and_keeps_the_states(engine) -> None:
    simulation = make_simulation("neumf", engine)
    sound = weights_of(simulation)
    simulation.collect(round_of(sound, 0), sound)
    states, broken = states_of(simulation).copy(), np.full_like(sound, np.nan)
    aggregate = simulation.collect(round_of(broken, 1), broken)
    assert not aggregate.total.any()
    assert aggregate.cohort > 0
    assert np.array_equal(states_of(simulation), states)


def test_the_seed_decides_cohorts_and_samples() -> None:
    one = make_simulation()
    two = replace(make_simulation(), seed=4)
    weights = weights_of(one)
    first, second = (each.collect(round_of(weights), weights) for each in (one, two))
    assert not np.array_equal(first.total, second.total)
    assert not np.array_equal(states_of(one).any(1), states_of(two).any(1))


def private_round(weights: np.ndarray, attempt: int = 0, run: str = "run") -> Round:
    event = RoundEvent("gaussian", 1.0, 0.5)
    return Round(run, 0, attempt, event, "plan", digests_of(weights))


def test_attempts_and_runs_of_an_accounted_round_have_cohorts_of_their_own() -> None:
    """Two releases under one coin would cost more than the two charges that are composed."""
    simulation = make_simulation()
    weights = weights_of(simulation)
    many = [private_round(weights, attempt) for attempt in range(400)]
    many += [private_round(weights, run=f"run-{number}") for number in range(400)]
    drawn = np.zeros((len(many), USERS), bool)
    for row, round in zip(drawn, many, strict=True):
        row[simulation.sample(round)] = True
    both = np.count_nonzero(drawn[1:] & drawn[:-1])
    assert stats.binomtest(both, (len(many) - 1) * USERS, 0.25).pvalue > 1e-4
    assert np.array_equal(simulation.sample(many[0]), np.flatnonzero(drawn[0]))


def test_who_knows_the_seed_does_not_know_an_accounted_cohort() -> None:
    one, other_root = make_simulation(), make_simulation()
    other_root.enrolled = Enrolled(SecretRoot.known(b"else"), Policy())
    weights = weights_of(one)
    ours, theirs = (each.sample(private_round(weights)) for each in (one, other_root))
    assert not np.array_equal(ours, theirs)
    # Without a guarantee the seed alone decides, so that the run repeats.
    assert np.array_equal(one.sample(round_of(weights)), other_root.sample(round_of(weights)))


@pytest.mark.parametrize("engine", ["cohort", "device"])
def test_another_attempt_at_an_accounted_round_starts_from_the_same_states(engine) -> None:
    twice, once = make_simulation(engine=engine), make_simulation(engine=engine)
    weights = weights_of(twice)
    for attempt in (0, 1):
        last = twice.collect(private_round(weights, attempt), weights)
    assert np.array_equal(last.total, once.collect(private_round(weights, 1), weights).total)
    assert np.array_equal(states_of(twice), states_of(once))


# --------------------------------------------------------------------------- tiers

SYSTEMS = ["fold", "rows", "dims"]
LOSSES = ["bce", "ials"]


def mixed_round(here: Any, weights: np.ndarray, index: int = 0, attempt: int = 0) -> Round:
    digests = model_digests(weights, here.federation.layouts)
    return Round("run", index, attempt, RoundEvent("none", 0.0, 0.5), "plan", digests)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_both_engines_agree_over_mixed_tiers(mixed, system, loss) -> None:
    one, many = (
        mixed(system, weights=(1.0, 0.5, 1.0), run__engine=engine, train__loss=loss)
        for engine in ("device", "cohort")
    )
    for index in range(3):
        weights = one.weights(index)
        alone, together = (
            each.parts.simulation.collect(mixed_round(each, weights, index), weights)
            for each in (one, many)
        )
        assert alone.cohort == together.cohort > 5
        drift = 20 * TOLERANCE * 2**13
        assert np.abs(alone.total - together.total).max() <= alone.cohort * (1 + drift)
        assert np.abs(alone.total).max() > 100 * alone.cohort
        assert alone.loss == pytest.approx(together.loss, rel=1e-3)
        for a, b in zip(one.parts.simulation.cohorts, many.parts.simulation.cohorts, strict=True):
            assert np.allclose(a.states, b.states, rtol=1e-2, atol=1e-3)
            assert a.states.any()


@pytest.mark.parametrize("engine", ["cohort", "device"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_sum_is_that_of_what_each_tier_trains(mixed, vector_in, system, engine) -> None:
    """Lifted, clipped, weighted, and added where its prefix lies in the whole vector."""
    settings = {"privacy__clip_norm": 0.05, "privacy__scale_bits": 20}
    here = mixed(system, weights=(1.0, 0.5, 0.25), run__engine=engine, **settings)
    weights, simulation = here.weights(), here.parts.simulation
    round, layout = mixed_round(here, weights), here.federation.layout
    key = int(rng_for(simulation.seed, "samples", 0).integers(2**63))
    expected, clipped = np.zeros(layout.size), 0
    for tier, cohort, rows in zip(
        here.tiers, simulation.cohorts, simulation.rows(simulation.sample(round)), strict=True
    ):
        view = tier.view(here.federation.prefix(weights, tier))
        for row in rows:
            mine, states = cohort.data.select(np.array([row])), cohort.states[row : row + 1]
            model = LocalModel(cohort.learner.view, view)
            trained = cohort.learner.train(model, mine, states, Draws(key))
            raw = vector_in(tier.lift(trained.update), layout)
            length = max(float(np.linalg.norm(raw)), 1e-30)
            expected += tier.weight * raw * min(1.0, 0.05 / length)
            clipped += length > 0.05
    found = simulation.protection.encoding.decode(simulation.collect(round, weights).total)
    assert clipped > 5
    assert np.abs(expected).max() > 0.02
    assert np.abs(found - expected).max() < 2e-4


@pytest.fixture
def vector_in():
    """One device's update as a vector of another layout, of which its own is a prefix."""

    def vector(update: Any, layout: Layout) -> np.ndarray:
        own, address, values = update.address.layout, update.address, update.values[0]
        found = np.zeros(layout.size)
        end = own.head + address.blocks.shape[1] * own.block
        found[: own.head] = values[: own.head]
        blocks = values[own.head : end].reshape(-1, own.block)
        np.add.at(layout.memory_of(found), address.blocks[0], blocks)
        np.add.at(layout.biases_of(found), address.biases[0], values[end:])
        return found

    return vector


@pytest.mark.parametrize("engine", ["cohort", "device"])
def test_devices_of_weight_zero_never_train(mixed, engine) -> None:
    """Nor does what they hold have a part in the sum, whatever it is."""
    one, two = (mixed(weights=(1.0, 0.0, 1.0), run__engine=engine, data__seed=0) for _ in range(2))
    idle = two.parts.simulation.cohorts[1]
    idle.states[...] = 3.0
    before, counted = idle.states.copy(), 0
    for index in range(4):
        weights = one.weights(index)
        rounds = [mixed_round(each, weights, index) for each in (one, two)]
        sums = [
            each.parts.simulation.collect(round, weights)
            for each, round in zip((one, two), rounds, strict=True)
        ]
        assert np.array_equal(sums[0].total, sums[1].total)
        assert sums[0].cohort == sums[1].cohort
        simulation = one.parts.simulation
        users = simulation.sample(rounds[0])
        rows = simulation.rows(users)
        assert len(rows[1]) == 0
        assert sums[0].cohort == len(rows[0]) + len(rows[2]) < len(users)
        counted += sums[0].cohort
    assert counted
    assert np.array_equal(idle.states, before)
    assert not one.parts.simulation.cohorts[1].states.any()


def test_every_user_is_in_one_tier_and_is_trained_as_itself(mixed) -> None:
    simulation = mixed().parts.simulation
    users = np.concatenate([cohort.users for cohort in simulation.cohorts])
    assert sorted(users) == list(range(simulation.population)) == list(range(36))
    chosen = np.array([0, 5, 6, 7, 20, 35])
    rows = simulation.rows(chosen)
    found = [c.users[mine] for c, mine in zip(simulation.cohorts, rows, strict=True)]
    assert sorted(np.concatenate(found)) == chosen.tolist()
    assert all(np.all(np.diff(cohort.users) > 0) for cohort in simulation.cohorts)


@pytest.mark.parametrize("engine", ["cohort", "device"])
def test_a_round_of_mixed_tiers_collected_again_is_the_same_round(mixed, engine) -> None:
    here, straight = (mixed(run__engine=engine) for _ in range(2))
    for index in range(3):
        weights = here.weights(index)
        for attempt in range(2):  # an attempt that was lost, and the one that counts
            again = here.parts.simulation.collect(
                mixed_round(here, weights, index, attempt), weights
            )
        once = straight.parts.simulation.collect(mixed_round(here, weights, index, 1), weights)
        assert np.array_equal(once.total, again.total)
        assert once.loss == again.loss
    for a, b in zip(here.parts.simulation.cohorts, straight.parts.simulation.cohorts, strict=True):
        assert np.array_equal(a.states, b.states)
        assert a.states.any()


@pytest.mark.parametrize("system", SYSTEMS)
def test_one_history_of_any_tier_moves_the_sum_by_no_more_than_its_weight(mixed, system) -> None:
    """Zero-out adjacency, with one bound for all capacities."""
    settings = {"privacy__clip_norm": 0.01, "devices__sampling": "everybody"}
    here, without = (
        mixed(system, weights=(1.0, 0.5, 1.0), run__engine="device", **settings) for _ in range(2)
    )
    weights, moved = here.weights(), []
    first = here.parts.simulation.collect(mixed_round(here, weights), weights).total
    for tier, cohort in zip(here.tiers, without.parts.simulation.cohorts, strict=True):
        whole, lengths = cohort.data, cohort.data.lengths.copy()
        lengths[1] = 0  # the second device of the tier forgets everything
        keep = np.ones(len(whole.items), bool)
        keep[whole.indptr[1] : whole.indptr[2]] = False
        indptr = np.concatenate(([0], np.cumsum(lengths)))
        cohort.data = Histories(whole.users, indptr, whole.items[keep])
        second = without.parts.simulation.collect(mixed_round(here, weights), weights).total
        cohort.data = whole
        for each in without.parts.simulation.cohorts:
            each.states[...] = 0
        difference = (first - second).astype(float)
        bound = here.parts.server.plan.protection.encoding.bound
        assert np.linalg.norm(difference) <= tier.weight * bound + len(difference) ** 0.5
        moved.append(np.linalg.norm(difference) / bound)
    assert min(moved) > 0.4


def test_devices_that_hold_nothing_have_no_part(mixed) -> None:
    """They keep their place in the population, so that cohorts of others are drawn as before."""
    here = mixed(capacities=(1.0, 0.0), shares=(0.5, 0.5), devices__sampling="everybody")
    simulation, weights = here.parts.simulation, here.weights()
    assert [tier.capacity for tier in here.tiers] == [1.0]
    assert (simulation.population, len(simulation.absent)) == (36, 18)
    members = simulation.cohorts[0].users
    assert sorted([*members, *simulation.absent]) == list(range(36))
    assert simulation.collect(mixed_round(here, weights), weights).cohort == 18
    assert here.parts.server.plan.expected_cohort == 18
    assert len(here.parts.everyone.states) == 36
    (tier,) = here.tiers
    assert here.federation.fraction(tier) == 1
    assert here.federation.holders == (1.0,)
