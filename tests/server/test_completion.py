"""What the server makes of a sum of mixed tiers, against definitions by each device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from on_devices import lift

from privrec.device.device import Cohort, Draws, Trained
from privrec.device.local import LocalModel
from privrec.device.tier import Tier
from privrec.embedding.subspace import Subspace
from privrec.models.layout import Layout, bands
from privrec.models.losses import pack, unpack
from privrec.server.server import Release

SYSTEMS = ["fold", "rows", "dims"]
KEY, USERS = 5, 36
SHARES = (1 / 3, 1 / 6, 1 / 2)  # of 36 users: 12, 6 and 18


class Unscaled(Subspace):
    """A folded memory as FAIR has it: the blocks themselves, not in isometric scale."""

    @property
    def scale(self) -> float:
        return 1.0


def dense_of(update: Any, row: int, layout: Layout) -> np.ndarray:
    """A device's change as a float64 vector of a layout of which its own is a prefix."""
    own, address = update.address.layout, update.address
    values, found = update.values[row].astype(np.float64), np.zeros(layout.size)
    end = own.head + address.blocks.shape[1] * own.block
    blocks = address.blocks[row if len(address.blocks) > 1 else 0]
    biases = address.biases[row if len(address.biases) > 1 else 0]
    found[: own.head] = values[: own.head]
    np.add.at(layout.memory_of(found), blocks, values[own.head : end].reshape(-1, own.block))
    np.add.at(layout.biases_of(found), biases, values[end:])
    return found


def _alone(cohort: Cohort[Any], model: LocalModel[Any], row: int) -> Trained:
    """What one of the devices makes of a round."""
    mine, states = cohort.data.select(np.array([row])), cohort.states[row : row + 1]
    return cohort.learner.train(model, mine, states, Draws(KEY))


def trained(here: Any, weights: np.ndarray) -> Iterator[tuple[Tier, np.ndarray, Trained]]:
    """Every training device, one by one, with its tier's memory."""
    for tier, cohort in zip(here.tiers, here.parts.simulation.cohorts, strict=True):
        view = tier.view(here.federation.prefix(weights, tier))
        for row in range(len(cohort.states) if tier.weight else 0):
            yield tier, view, _alone(cohort, LocalModel(cohort.learner.view, view), row)


def mean_update(here: Any, weights: np.ndarray) -> np.ndarray:
    """Of all training devices, without clipping and rounding."""
    total, count = np.zeros(here.federation.layout.size), 0
    for tier, _, result in trained(here, weights):
        total += tier.weight * dense_of(tier.lift(result.update), 0, here.federation.layout)
        count += 1
    return total / count


def completed(here: Any, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The server's change of the weights, and the weights after it (their Gram matrix moves)."""
    update, after = mean_update(here, weights).astype(np.float32), weights.copy()
    here.parts.server.completion.complete(update, after)
    return update, after


def near(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> bool:
    return float(np.abs(found - expected).max()) <= tolerance * float(np.abs(expected).max())


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_sum_is_the_mean_over_everybody(mixed, system) -> None:
    here = mixed(system, shares=SHARES)
    weights = here.weights()
    update, after = completed(here, weights)
    assert np.array_equal(update, mean_update(here, weights).astype(np.float32))
    assert np.array_equal(after, weights)
    assert here.parts.server.plan.expected_cohort == 18


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("system", SYSTEMS)
def test_contributors_get_the_mean_over_those_that_hold_a_part(mixed, system, idle) -> None:
    """Band by band; devices that do not train hold nothing of it. By public shares, not counts."""
    tier_weights = (1.0, 0.0, 1.0) if idle else (1.0, 0.5, 1.0)
    settings = {"shares": SHARES, "weights": tier_weights, "devices__aggregation": "contributors"}
    here = mixed(system, **settings)
    weights, layout = here.weights(), here.federation.layout
    total, holders = np.zeros(layout.size), np.zeros(layout.size)
    for tier, _, result in trained(here, weights):
        total += tier.weight * dense_of(tier.lift(result.update), 0, layout)
        held = np.arange(layout.size)
        mine = layout.prefix_of(held, tier.layout)
        holders[mine] += 1
    update, _ = completed(here, weights)
    assert sorted(set(holders)) == ([12, 30] if idle else [12, 18, 36])
    assert near(update, total / holders)


def test_contributors_leave_alone_what_nobody_who_trains_holds(mixed) -> None:
    here = mixed(shares=(0.5, 0.5), capacities=(1.0, 0.25), weights=(0.0, 1.0),
                 devices__aggregation="contributors")  # fmt: skip
    update, _ = completed(here, here.weights())
    assert np.isfinite(update).all()
    *_, strongest = bands(update, here.federation.layouts)
    assert not any(part.any() for part in strongest)
    assert update.any()


def test_fair_averaging_is_the_average_of_lifted_memories(mixed) -> None:
    """FAIR: collapse to the means of classes, step on those as they are, lift, average all."""
    here = mixed(shares=SHARES, devices__aggregation="fair_averaging",
                 train__server_optimizer="fedavg", train__server_lr=1.0, train__local_steps=2,
                 train__local_lr=0.05)  # fmt: skip
    weights, whole = here.weights(), here.tiers[0]
    layout = here.federation.layout
    memory = whole.view(weights)
    average = np.zeros(layout.size)
    for tier, cohort in zip(here.tiers, here.parts.simulation.cohorts, strict=True):
        parts = tier.model
        assert parts.biases is not None
        own = tier.layout
        collapsed = np.concatenate((
            _means(layout.memory_of(memory), own.slots).ravel(),
            _means(layout.biases_of(memory)[:, None], own.bias_slots).ravel(),
        ))  # fmt: skip
        plain = replace(
            parts,
            vectors=Unscaled(**vars(parts.vectors)),
            biases=Unscaled(**vars(parts.biases)),
        )
        settings = replace(cohort.learner.settings, local_lr=here.scenario.train.local_lr)
        alike = replace(cohort, learner=replace(cohort.learner, view=plain, settings=settings))
        for row in range(len(cohort.states)):
            change = dense_of(_alone(alike, LocalModel(plain, collapsed), row).update, 0, own)
            after = collapsed + change
            layout.memory_of(average)[...] += np.tile(
                own.memory_of(after), (layout.slots // own.slots, 1)
            )
            layout.biases_of(average)[...] += np.tile(
                own.biases_of(after), layout.bias_slots // own.bias_slots
            )
    average /= USERS
    update, _ = completed(here, weights)
    assert near(whole.view(weights + update), average, 1e-4)
    assert not near(memory, average, 0.1)
    # A server step of rate 1 on it puts the average in the place of the memory.
    server, scale = here.parts.server, here.parts.server.plan.protection.encoding.scale
    server.weights = weights.copy()
    sent = mean_update(here, weights) * server.plan.expected_cohort * scale
    server.apply(Release(server.next_round(0), np.rint(sent).astype(np.int64), b""))
    assert near(whole.view(server.weights), average, 1e-2)


def _means(memory: np.ndarray, slots: int) -> np.ndarray:
    means: np.ndarray = memory.reshape(len(memory) // slots, slots, -1).mean(0)
    return means.astype(np.float32)


# --------------------------------------------------------------------------- implicit ALS


def dense_gradient(here: Any, tier: Tier, view: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """One tier's mean update of its memory, item by item over the whole of its catalogue.

    The gradient of ``½ Σ_history (u·v_i - 1)² + ½ α Σ_all (u·v_i)² + ½ ρ |v_i|²``, with the public
    ``S`` in the place of ``u uᵀ`` in the second sum; with Newton steps, times
    ``P = (α S + ρ I)^-1``.
    """
    train, table = here.scenario.train, tier.model.vectors
    cohort = here.parts.simulation.cohorts[tier.index]
    items = np.arange(table.items)
    rows = table.gather(tier.layout.memory_of(view).astype(np.float64), items)
    users = unpack(gram, table.dim)
    system = train.unobserved_weight * users + train.item_l2 * np.eye(table.dim)
    slopes = np.zeros_like(rows)
    for row in range(len(cohort.states)):
        model = LocalModel(cohort.learner.view, view)
        user = _alone(cohort, model, row).states[0, :-1].astype(np.float64)
        for item in cohort.data.of(row):
            slopes[item] += (rows[item] @ user - 1) * user
    slopes = slopes / len(cohort.states) + rows @ system
    if train.server_optimizer == "newton":
        slopes = slopes @ np.linalg.inv(system)
    pushed = np.zeros((table.slots, table.block))
    table.scatter_add(pushed, items, -train.local_lr * slopes)
    return pushed


@pytest.mark.parametrize(
    "capacities", [(1.0,), (0.25,), (1.0, 0.5, 0.25)], ids=["whole", "weak", "mixed"]
)
@pytest.mark.parametrize("kind", ["fedavg", "newton"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_completed_update_is_the_dense_gradient_over_all_items(
    mixed, system, capacities, kind
) -> None:
    """Nobody sampled or sent a negative; each tier counts by its share of the training weight."""
    shares = SHARES if len(capacities) == 3 else (1.0,)
    tier_weights = (1.0, 0.5, 0.25) if len(capacities) == 3 else (1.0,)
    here = mixed(system, capacities, shares=shares, weights=tier_weights, train__loss="ials",
                 train__local_lr=0.3, train__unobserved_weight=0.2, train__item_l2=0.05,
                 train__gram_rate=0.7, train__server_optimizer=kind)  # fmt: skip
    weights, layout = here.weights(), here.federation.layout
    update, after = completed(here, weights)
    # Devices can only precondition with what was public before; the server has the newest.
    gram = layout.gram_of(weights if kind == "newton" else after).astype(np.float64)
    expected = np.zeros((layout.slots, layout.block))
    for tier, share in zip(here.tiers, shares, strict=True):
        view = tier.view(here.federation.prefix(weights, tier))
        mine = dense_gradient(here, tier, view, gram[: tier.layout.gram])
        expected += share * tier.weight * lift(tier.vectors, mine, tier.index)
    assert not layout.gram_of(update).any()
    found = here.tiers[0].view(update)
    assert near(layout.memory_of(found), expected, 1e-4)
    touched = np.unique(np.concatenate([c.data.items for c in here.parts.simulation.cohorts]))
    assert len(touched) < 48 or system != "rows"


@pytest.mark.parametrize("rate", [0.25, 1.0])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_users_gram_matrix_follows_that_of_those_who_send_it(mixed, system, rate) -> None:
    """The mean of ``u uᵀ``; in dims, of each entry over the devices that have its dimensions."""
    here = mixed(system, shares=SHARES, weights=(1.0, 0.5, 0.25), train__loss="ials",
                 train__gram_rate=rate)  # fmt: skip
    weights, layout = here.weights(), here.federation.layout
    sums, held = np.zeros(layout.gram), np.zeros(layout.gram)
    for tier, _, result in trained(here, weights):
        packed = pack(result.states[:, :-1])[0]
        sums[: len(packed)] += tier.weight * packed
        held[: len(packed)] += tier.weight
    _, after = completed(here, weights)
    old = layout.gram_of(weights)
    assert near(layout.gram_of(after), old + rate * (sums / held - old), 1e-4)
    outside = np.ones(layout.size, bool)
    outside[layout.dense : layout.head] = False
    assert np.array_equal(after[outside], weights[outside])


@pytest.mark.parametrize("kind", ["fedavg", "newton"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_first_round_takes_over_the_gram_matrix_as_it_is(mixed, system, kind) -> None:
    """And gives nothing else where devices need one to step with."""
    here = mixed(system, shares=SHARES, train__loss="ials", train__gram_rate=0.25,
                 train__server_optimizer=kind)  # fmt: skip
    weights, layout = here.weights(), here.federation.layout
    layout.gram_of(weights)[...] = 0
    sent = mean_update(here, weights)
    assert layout.gram_of(sent).any()
    update, after = completed(here, weights)
    assert bool(update.any()) is (kind != "newton")
    holders = np.zeros(layout.gram)
    assert not layout.gram_of(update).any()
    for tier, share in zip(here.tiers, SHARES, strict=True):
        holders[: tier.layout.gram] += share
    assert near(layout.gram_of(after), layout.gram_of(sent) / holders)


def test_other_losses_leave_the_memory_to_the_devices(mixed) -> None:
    here = mixed(train__loss="full_softmax")
    assert here.federation.layout.gram == 0
    update, after = completed(here, here.weights())
    assert np.array_equal(update, mean_update(here, here.weights()).astype(np.float32))
    assert np.array_equal(after, here.weights())


@pytest.mark.parametrize("kind", ["fedavg", "fedadam", "sgd", "newton"])
def test_a_release_moves_the_gram_matrix_and_an_optimiser_does_not(mixed, kind) -> None:
    """It is no weight: moments and step sizes have no part in it."""
    here = mixed(train__loss="ials", train__server_optimizer=kind, train__server_lr=0.1,
                 train__gram_rate=1.0)  # fmt: skip
    server, layout = here.parts.server, here.federation.layout
    for seed in range(3):
        sent = np.random.default_rng(seed).normal(0, 0.01, layout.size)
        total = sent * server.plan.protection.encoding.scale * server.plan.expected_cohort
        server.apply(Release(server.next_round(0), np.rint(total).astype(np.int64), b""))
        assert np.allclose(layout.gram_of(server.weights), layout.gram_of(sent), atol=1e-4)
