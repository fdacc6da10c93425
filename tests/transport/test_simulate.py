"""The simulated devices: one sum, whichever engine, however often it is asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from privrec.device.cohort import TOLERANCE, Cohort
from privrec.device.device import Device
from privrec.device.round import Round, digest
from privrec.device.train import Recommender, Settings, Trainer
from privrec.embedding.subspace import Subspace
from privrec.models.layout import Layout
from privrec.models.ncf import NCF
from privrec.privacy.events import RoundEvent
from privrec.randomness import SecretRoot, rng_for
from privrec.secagg.ring import Encoding
from privrec.transport.simulate import Simulation

ITEMS, USERS, ROOT = 40, 25, SecretRoot.known(b"devices")
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
    layout = Layout(model.dense, vectors.slots, 4, biases.slots)
    settings = Settings(loss, 3, 5, 2, 1.0, 0.3, 3, 6, 2, 0.3)
    histories = histories or HISTORIES
    devices = Cohort.of(
        Trainer(Recommender(model, vectors, biases, layout), settings),
        np.cumsum([0, *map(len, histories)]),
        np.concatenate(histories),
    )
    encoding = Encoding(clip_norm, layout.size, scale_bits)
    return Simulation(devices, encoding, ROOT, 3, rate, engine)  # type: ignore[arg-type]


def weights_of(simulation: Simulation, seed: int = 0) -> np.ndarray:
    size = simulation.devices.trainer.recommender.layout.size
    return np.random.default_rng(seed).normal(0, 0.4, size).astype(np.float32)


def round_of(weights: np.ndarray, index: int = 0, attempt: int = 0) -> Round:
    event = RoundEvent("none", 0.0, 0.5)
    return Round("run", index, attempt, event, "plan", digest(weights))


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
        assert np.allclose(one.devices.states, many.devices.states, rtol=1e-2, atol=1e-3)


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
    found = simulation.encoding.decode(simulation.collect(round_of(weights), weights).total)
    assert np.abs(found - expected).max() < 2e-4
    assert np.abs(expected).max() > 0.02


def only(simulation: Simulation, user: int, weights: np.ndarray) -> np.ndarray:
    """The decoded answer of one device, drawn with the round's own samples."""
    key = int(rng_for(simulation.seed, "samples", 0).integers(2**63))
    devices = simulation.devices
    device = Device(user, HISTORIES[user], devices.trainer, simulation.encoding, ROOT)
    return simulation.encoding.decode(device.answer(round_of(weights), weights, key).vector())


@pytest.mark.parametrize("engine", ["cohort", "device"])
def test_a_round_collected_again_is_the_same_round(engine) -> None:
    """Replay after a crash between charge and record: same bits, same states."""
    simulation = make_simulation("neumf", engine)
    weights = [weights_of(simulation, index) for index in range(3)]
    simulation.collect(round_of(weights[0], 0), weights[0])
    before = simulation.devices.states.copy()
    first = simulation.collect(round_of(weights[1], 1), weights[1])
    states = simulation.devices.states.copy()
    assert not np.array_equal(before, states)
    for _ in range(2):
        again = simulation.collect(round_of(weights[1], 1), weights[1])
        assert np.array_equal(again.total, first.total)
        assert again.loss == first.loss
        assert np.array_equal(simulation.devices.states, states)
    following = simulation.collect(round_of(weights[2], 2), weights[2])
    straight = make_simulation("neumf", engine)
    for index in range(3):
        last = straight.collect(round_of(weights[index], index), weights[index])
    assert np.array_equal(following.total, last.total)
    assert np.array_equal(simulation.devices.states, straight.devices.states)


@pytest.mark.parametrize("engine", ["cohort", "device"])
def test_another_attempt_starts_from_the_same_states_with_other_coins(engine) -> None:
    simulation = make_simulation(engine=engine)
    weights = weights_of(simulation)
    first = simulation.collect(round_of(weights), weights)
    states = simulation.devices.states.copy()
    second = simulation.collect(round_of(weights, attempt=1), weights)
    assert second.cohort == first.cohort
    assert np.array_equal(simulation.devices.states, states)
    assert not np.array_equal(first.total, second.total)
    assert np.abs(first.total - second.total).max() <= first.cohort


@pytest.mark.parametrize("engine", ["cohort", "device"])
def test_only_the_cohort_changes_its_states(engine) -> None:
    simulation = make_simulation(engine=engine)
    weights = weights_of(simulation)
    users = simulation.sample(round_of(weights))
    simulation.collect(round_of(weights), weights)
    moved = np.flatnonzero(simulation.devices.states.any(1))
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
        bound = simulation.encoding.bound
        length = float(np.linalg.norm(difference.astype(np.float64)))
        assert length <= bound
        assert (length > 0.9 * bound) == bool(len(HISTORIES[user]))


@pytest.mark.parametrize("engine", ["cohort", "device"])
def test_a_broken_model_gives_a_zero_sum_and_keeps_the_states(engine) -> None:
    simulation = make_simulation("neumf", engine)
    sound = weights_of(simulation)
    simulation.collect(round_of(sound, 0), sound)
    states, broken = simulation.devices.states.copy(), np.full_like(sound, np.nan)
    aggregate = simulation.collect(round_of(broken, 1), broken)
    assert not aggregate.total.any()
    assert aggregate.cohort > 0
    assert np.array_equal(simulation.devices.states, states)


def test_the_seed_decides_cohorts_and_samples() -> None:
    one = make_simulation()
    two = replace(make_simulation(), seed=4)
    weights = weights_of(one)
    first, second = (each.collect(round_of(weights), weights) for each in (one, two))
    assert not np.array_equal(first.total, second.total)
    assert not np.array_equal(one.devices.states.any(1), two.devices.states.any(1))


def private_round(weights: np.ndarray, attempt: int = 0, run: str = "run") -> Round:
    event = RoundEvent("gaussian", 1.0, 0.5)
    return Round(run, 0, attempt, event, "plan", digest(weights))


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
    one, other_root = make_simulation(), replace(make_simulation(), root=SecretRoot.known(b"else"))
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
    assert np.array_equal(twice.devices.states, once.devices.states)
