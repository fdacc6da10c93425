"""Probes of single interactions: what one moves where noise comes in shares, and user vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.audit.harness import (
    Floats,
    Harness,
    Integers,
    checked,
    judged,
    seen_deviation,
    two_sided,
    variance_p,
)
from privrec.device.device import Draws
from privrec.device.example_shares import ExampleShares, ExampleSums
from privrec.device.local import LocalModel
from privrec.device.samples import Histories
from privrec.device.update import Address, SummedExamples
from privrec.randomness import rng_for
from privrec.report.model import Checked

_AT_ONCE = 4_000_000  # coefficients of devices that are looked at together
_MOST_DEVICES, _DRAWS = 200, 20_000
_LOUD = (0.0, 1.0, 1e4, 1e30)  # item vectors from those of a first round to what overflows


def bound(harness: Harness) -> Iterator[Checked]:
    """Leaving out an interaction moves all that noise is added to by no more than is accounted."""
    learner, made = _learner(harness)
    cohort, moved, looked = harness.simulation.cohorts[0], list[float](), 0
    some = harness.some(_rows(harness))[0]
    data = cohort.data.select(some)
    for loud in _LOUD:
        rng = rng_for(looked, "audit examples")
        weights = rng.normal(0, 0.1 + loud, len(harness.server.weights)).astype(np.float32)
        states = rng.normal(0, 1, (len(some), learner.state_dim)).astype(np.float32)
        model = LocalModel(learner.view, weights)
        whole = _outputs(harness, model, data, states)
        for place in range(int(data.lengths.max(initial=0))):
            shift = whole - _outputs(harness, model, _without(data, place), states)
            moved += np.einsum("ij,ij->i", shift, shift).tolist()
            looked += len(shift)
    most = math.sqrt(max(moved, default=0.0))
    beyond = sum(each > made.reach**2 for each in moved)
    yield checked(
        "what an interaction moves",
        not beyond and most > 0,
        f"{beyond:,} of {looked:,} beyond; the most that one moved were {most / made.reach:.4f} of "
        "the bound",
        f"at most {made.reach:,} steps, half of what the noise is scaled to",
    )


def user_vectors(harness: Harness) -> Iterator[Checked]:
    """A user vector has all of its noise in every step, also where nothing is learnt."""
    learner, made = _learner(harness)
    rows, steps, changes = _rows(harness), learner.settings.local_steps, list[Floats]()
    model = LocalModel(learner.view, harness.server.weights)
    nothing = Histories(np.arange(rows), np.zeros(rows + 1, np.int64), np.zeros(0, np.int32))
    states = np.full((rows, learner.state_dim), 0.1, np.float32)
    for index in range(-(-_DRAWS // states.size)):
        draws = Draws.of(harness.simulation.root, harness.round(index), index)
        trained = learner.train(model, nothing, states, draws)
        changes.append((trained.states - states).astype(np.float64))
    # What is there is in steps of the grid, of this deviation in each.
    standard = np.concatenate(changes) * made.scale / (made.deviation * math.sqrt(steps))
    ratio, sums = float((standard**2).mean()), standard.sum(axis=0) / math.sqrt(len(standard))
    yield judged(
        "noise of user vectors",
        [
            float(variance_p(ratio, standard.size)),
            *variance_p((standard**2).mean(axis=0), len(standard)).tolist(),
            *two_sided(sums).tolist(),
        ],
        f"{math.sqrt(ratio):.4f} σ over {standard.size:,} coefficients of {len(changes)} rounds",
        f"1 σ as accounted ({made.deviation:,.6g} steps), in every step and coefficient; "
        f"{seen_deviation(standard.size):.2%} is seen",
    )


def _learner(harness: Harness) -> tuple[Any, ExampleShares]:
    learner = harness.simulation.cohorts[0].learner
    return learner, learner.examples


def _rows(harness: Harness) -> int:
    """Devices whose whole vectors are looked at together."""
    return int(np.clip(_AT_ONCE // sum(harness.sizes), 4, _MOST_DEVICES))


def _outputs(
    harness: Harness, model: LocalModel[Any], data: Histories, states: NDArray[np.float32]
) -> Integers:
    """All that noise is added to in a round: user vectors step by step, then the part of the sum.

    Private states stay, as they do given what came before.
    """
    (learner, made), protection = _learner(harness), harness.plan.protection
    draws = Draws.of(harness.simulation.root, harness.round(0), 0)
    sums = ExampleSums(model, learner.settings, made, data, states, draws)
    steps = range(learner.settings.local_steps)
    users = [sums.add(np.flatnonzero(sums.turns == step)) for step in steps]
    update = SummedExamples(sums.shared(), Address.whole(learner.view.layout))
    # No coins are needed where nothing is rounded.
    bounded = update.bound(protection, harness.round(0), (), harness.root.stream("audit"))
    return np.concatenate((*users, bounded.integers), axis=1).astype(np.int64)


def _without(data: Histories, place: int) -> Histories:
    """The histories without their item at a place, where they have one."""
    kept = np.ones(len(data.items), np.bool_)
    at = data.indptr[:-1] + place
    kept[at[place < data.lengths]] = False
    before = np.concatenate(([0], np.cumsum(kept)))
    return Histories(data.users, before[data.indptr], data.items[kept])


PROBES: dict[str, Callable[[Harness], Iterator[Checked]]] = {
    "what an interaction moves": bound,
    "noise of user vectors": user_vectors,
}
"""Each by its own name, as those of rounds."""
