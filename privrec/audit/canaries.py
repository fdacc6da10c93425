"""Canaries: users whose updates the auditor chooses, to see what the released sums tell of them.

A canary's update goes the way of everybody's: clipped, rounded, summed and noised by the parts of
the run. All other users send nothing, which an attacker may know of them, and which helps it most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privrec.audit.bench import Harness
from privrec.audit.bounds import Guesses, best_guesses, separation
from privrec.audit.judging import ALPHA, CheckResult
from privrec.audit.noise import rounds_that_fit
from privrec.device.device import privatize
from privrec.device.tier import Tier
from privrec.device.update import Address, Aggregate, RawUpdate, Round
from privrec.errors import ReleaseRefused
from privrec.models.layout import to_wire
from privrec.privacy.events import epsilon
from privrec.randomness import rng_for
from privrec.run.summing import SUMMING

Floats = NDArray[np.float64]
Users = NDArray[np.int64]

CONFIDENCE = 0.95
"""Of the lower bounds that are reported.

One honest build in twenty may exceed a claim by that much, where the claim is small. So an audit
fails only when chance does not explain it either, with the level of every other probe.
"""
_LOUD = np.float32(1000.0)  # clip norms before clipping
_CELLS = 4_000_000  # coefficients of a batch of canaries
_WORK = 300_000_000  # coefficients of all canaries of the one-shot estimate together
_FEWEST = 100
_QUIET = 32.0  # a canary's noise over what the others add to it, as variances


@dataclass(frozen=True)
class Canaries:
    """Canaries of one tier.

    Args:
        tier: what they hold.
        users: who they are, shape ``(m,)``.
    """

    tier: Tier
    users: Users


@dataclass(frozen=True)
class Attack:
    """What the canaries gave.

    Args:
        findings: that the bounds stay below what is claimed.
        lower_bound: on ε, with :data:`CONFIDENCE`.
        method: how, in words.
    """

    findings: tuple[CheckResult, ...]
    lower_bound: float
    method: str


def attack(bench: Harness, most: int) -> Attack:
    """Both estimates.

    Args:
        bench: of a scenario with noise.
        most: canaries at most, at least 2.
    """
    run, guesses, bound = _one_run(bench, most)
    shot, method = _one_shot(bench, most)
    text = (
        f"One run of {guesses.canaries:,} canaries, each there with probability one half and a "
        f"coefficient of its own in each round: {guesses.right:,} of {guesses.made:,} guesses "
        f"right (Steinke, Nasr & Jagielski 2023). {method} Most attacks show less than is lost: a "
        "low bound is no sign of more privacy than claimed."
    )
    return Attack((run, shot), bound, text)


def _one_run(bench: Harness, most: int) -> tuple[CheckResult, Guesses, float]:
    """Guess of each canary whether it took part, from one run's releases."""
    delta = bench.scenario.privacy.delta
    rng = _rng(bench, "one run")
    groups = _chosen(bench, most)
    total = sum(len(group.users) for group in groups)
    present = rng.random(total) < 0.5
    strength = _strength(bench, rounds := _rounds(bench))
    made = best_guesses(total, strength, delta, CONFIDENCE)
    scores, done = np.zeros(total), 0
    for index in range(rounds):
        places, signs = _places(bench, groups, rng), rng.choice([-1.0, 1.0], total)
        released = _released(
            bench, bench.round(index), _spikes(bench, groups, places, signs, present)
        )
        if released is not None:
            scores += signs * released[np.concatenate(places)]
            done += 1
    guesses = Guesses.of(scores, present, made)
    claimed, bound = _claimed(bench, done), guesses.lower_bound(delta, CONFIDENCE)
    finding = CheckResult(
        "canaries, one run",
        bound <= claimed or guesses.chance(_strength(bench, done)) >= ALPHA,
        f"{guesses.right:,} of {guesses.made:,} guesses right: ε is at least {bound:.3g} "
        f"({CONFIDENCE:.0%})",
        f"at most {claimed:.4f}, claimed for the {done:,} rounds of it",
    )
    return finding, guesses, bound


def _one_shot(bench: Harness, most: int) -> tuple[CheckResult, str]:
    """Fit the cosines of canaries that took part, each in a random direction."""
    delta, size = bench.scenario.privacy.delta, sum(bench.sizes)
    rng = _rng(bench, "one shot")
    rounds = _rounds(bench)
    room = size * bench.event.noise_multiplier**2 / _QUIET / bench.event.sampling_rate
    affordable = max(_FEWEST, _WORK // (size * rounds))
    groups = _chosen(bench, max(2, min(most, int(room), affordable)))
    total = sum(len(group.users) for group in groups)
    rounds = max(1, min(rounds, _WORK // (size * total)))
    products, squares, done = np.zeros(total), 0.0, 0
    for index in range(rounds):
        seed = int(rng.integers(2**63))
        released = _released(bench, bench.round(index), _directions(bench, groups, seed))
        if released is None:
            continue
        place = 0
        for tier, users, values in _unit(bench, groups, seed):
            held = released[: values.shape[1]]
            wire = to_wire(values, (tier.layout, *bench.federation.weaker(tier)))
            products[place : place + len(users)] += wire @ held
            place += len(users)
        squares, done = squares + float(released @ released), done + 1
    cosines = products / np.sqrt(max(squares, np.finfo(float).tiny) * max(done, 1))
    found = separation(cosines.tolist(), max(1, size * done), CONFIDENCE)
    sure = separation(cosines.tolist(), max(1, size * done), 1 - ALPHA).lower_bound(delta)
    claimed = _claimed(bench, done)
    text = (
        f"One shot of {total:,} random directions in {done:,} rounds: ε is about "
        f"{found.epsilon(delta):.3g}, at least {found.lower_bound(delta):.3g} with "
        f"{CONFIDENCE:.0%} confidence if cosines are Gaussian (Andrew et al. 2023)."
    )
    finding = CheckResult(
        "canaries, one shot",
        sure <= claimed,
        f"ε is about {found.epsilon(delta):.3g}, at least {found.lower_bound(delta):.3g} "
        f"({CONFIDENCE:.0%}); {sure:.3g} beyond doubt",
        f"at most {claimed:.4f}, claimed for the {done:,} rounds of it",
    )
    return finding, text


def _rng(bench: Harness, name: str) -> np.random.Generator:
    return rng_for(int.from_bytes(bench.root.tag("audit canaries"), "big"), name)


def _rounds(bench: Harness) -> int:
    return rounds_that_fit(bench, bench.scenario.train.rounds)


def _claimed(bench: Harness, rounds: int) -> float:
    """ε of so many rounds against recipients."""
    return epsilon({bench.event: rounds}, bench.scenario.privacy.delta, "recipients")


def _strength(bench: Harness, rounds: int) -> float:
    """Separation of canaries' scores, if the noise is what is accounted."""
    event, rate = bench.event, bench.event.sampling_rate
    variance = event.noise_multiplier**2 + rate * (1 - rate)
    return float(rate * np.sqrt(rounds / variance))


def _chosen(bench: Harness, most: int) -> list[Canaries]:
    """Canaries of all tiers that train, the weakest first, no more than have a place each."""
    groups, taken = [], 0
    rows = bench.some(most)
    population = sum(len(mine) for mine in rows)
    for tier in reversed(bench.training):
        mine = rows[tier.index]
        share = -(-most * len(mine) // population)
        count = min(len(mine), share, tier.layout.size - taken, most - taken)
        users = bench.simulation.cohorts[tier.index].users[mine[:count]]
        groups.append(Canaries(tier, users))
        taken += count
    return [group for group in groups if len(group.users)]


def _places(
    bench: Harness, groups: Sequence[Canaries], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """A place of its own for each canary, in the order of the wire, within what it holds."""
    free = np.ones(sum(bench.sizes), np.bool_)
    places = []
    for group in groups:
        held = np.flatnonzero(free[: group.tier.layout.size])
        mine = rng.choice(held, len(group.users), replace=False)
        free[mine] = False
        places.append(mine)
    return places


Updates = Iterator[tuple[Tier, Users, RawUpdate]]


def _spikes(
    bench: Harness, groups: Sequence[Canaries], places: Sequence[NDArray[np.int64]], signs: Floats,
    present: NDArray[np.bool_],
) -> Updates:  # fmt: skip
    """Updates of the canaries that are there, each far too long and in one coefficient."""
    start = 0
    for group, wire in zip(groups, places, strict=True):
        end = start + len(group.users)
        there = present[start:end]
        layout = group.tier.layout
        order = to_wire(np.arange(layout.size), (layout, *bench.federation.weaker(group.tier)))
        update = _in_one_place(
            group.tier, order[wire[there]], signs[start:end][there] * _loud(bench)
        )
        yield group.tier, group.users[there], update
        start = end


def _loud(bench: Harness) -> np.float32:
    return np.float32(_LOUD * bench.protection.encoding.clip_norm)


def _in_one_place(tier: Tier, places: NDArray[np.int64], values: Floats) -> RawUpdate:
    """Updates that touch one coefficient each, named in the tier's layout."""
    layout, count = tier.layout, len(places)
    memory = layout.slots * layout.block
    inside = places - layout.head
    in_memory = (inside >= 0) & (inside < memory)
    in_biases = inside >= memory
    blocks = np.where(in_memory, inside // max(1, layout.block), 0)[:, None]
    biases = np.where(in_biases, inside - memory, 0)[:, None]
    if not layout.bias_slots:
        biases = biases[:, :0]
    row = np.where(in_memory, layout.head + inside % max(1, layout.block), places)
    row = np.where(in_biases, layout.head + layout.block, row)
    address = Address(blocks, biases, layout)
    spikes = np.zeros((count, address.width), np.float32)
    spikes[np.arange(count), row] = values
    return RawUpdate(spikes, address)


def _unit(
    bench: Harness, groups: Sequence[Canaries], seed: int
) -> Iterator[tuple[Tier, Users, NDArray[np.float32]]]:
    """Random unit vectors of the canaries, in their layouts, a batch at a time."""
    for group in groups:
        size = group.tier.layout.size
        step = max(1, _CELLS // size)
        for start in range(0, len(group.users), step):
            users = group.users[start : start + step]
            rng = rng_for(seed, group.tier.index, start)
            values = rng.standard_normal((len(users), size), np.float32)
            values /= np.linalg.norm(values, axis=1, keepdims=True)
            yield group.tier, users, values


def _directions(bench: Harness, groups: Sequence[Canaries], seed: int) -> Updates:
    for tier, users, values in _unit(bench, groups, seed):
        yield tier, users, RawUpdate(values * _loud(bench), Address.whole(tier.layout))


def _released(bench: Harness, round: Round, updates: Updates) -> Floats | None:
    """The released sum in units of the clip norm, in the order of the wire; None without one."""
    layouts, protection = bench.federation.layouts, bench.protection
    sampled = bench.simulation.sample(round)
    counted = protection.shares is not None or bool(protection.minimums)
    cohort = bench.named(bench.simulation.rows(sampled)) if counted else []
    made = SUMMING["exact"]
    try:
        summing = made(round, bench.federation, protection, cohort, bench.simulation.enrolled)
    except ReleaseRefused:
        return None  # too few devices came together, as a run has it too
    for number, (tier, users, update) in enumerate(updates):
        there = np.isin(users, sampled)
        if not there.any():
            continue
        coins = bench.simulation.root.stream("rounding", *round.context, b"canaries", number)
        bounded = privatize(
            _only(update, there), protection, round, tier, bench.federation.weaker(tier), coins
        )
        summing.add(tier, users[there], bounded)
    aggregate = Aggregate(summing.total(), len(sampled), None)
    release = bench.server.release(round, aggregate, bench.root)
    decoded = to_wire(protection.encoding.decode(release.total), layouts)
    rotation = protection.rotation(round, layouts)
    if rotation is not None:
        decoded = rotation.undo(decoded[None])[0]
    scaled: Floats = decoded / protection.encoding.clip_norm
    return scaled


def _only(update: RawUpdate, chosen: NDArray[np.bool_]) -> RawUpdate:
    """Some rows of a batch."""
    address = update.address
    blocks, biases = (
        names if len(names) == 1 and len(chosen) > 1 else names[chosen]
        for names in (address.blocks, address.biases)
    )
    return RawUpdate(update.values[chosen], Address(blocks, biases, address.layout))
