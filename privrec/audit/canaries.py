"""Canaries: users whose updates the auditor chooses, to see what the released sums tell of them.

A canary's update goes the way of everybody's: clipped, rounded, summed and noised by the parts of
the run. All other users send nothing, which an attacker may know of them, and which helps it most.
Whoever can tell canaries that took part from canaries that did not shows that ε is at least so
much; no attack shows that it is not more.

**One run** (Steinke, Nasr & Jagielski, "Privacy Auditing with One (1) Training Run", 2023,
theorem 5.2). Each of ``m`` canaries takes part with probability one half, independently. Of ``r``
guesses ``v`` are right. Under (ε, δ) privacy the right ones are stochastically dominated by
``Binomial(r, 1 / (1 + exp(-ε)))``, up to an addition of at most ``2 m δ α``. The bound holds for
every attack and every distribution.

**One shot** (Andrew et al., "One-shot Empirical Privacy Estimation for Federated Learning", 2023).
Canaries are random directions, and the cosine of each with what was released is Gaussian with a
variance known in advance where the canary took no part. What the canaries that took part show is
fitted by a Gaussian, and ε is that of telling the two apart. It is sharper, and an estimate: it
holds as far as the cosines are Gaussian, which high dimensions make them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from privrec.audit.harness import ALPHA, CheckResult, Floats, Harness
from privrec.audit.noise import rounds_that_fit
from privrec.device.tier import Tier
from privrec.device.update import Address, Aggregate, RawUpdate, Round
from privrec.errors import ReleaseRefused, UsageError
from privrec.models.layout import to_wire
from privrec.privacy.accountant import gaussian
from privrec.privacy.events import epsilon
from privrec.randomness import rng_for

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
    """Canaries of one tier: users, shape ``(m,)``."""

    tier: Tier
    users: Users


@dataclass(frozen=True)
class Attack:
    """What the canaries gave.

    Attributes:
        findings: that the bounds stay below what is claimed.
        lower_bound: on ε, with :data:`CONFIDENCE`.
        method: how, in words.
    """

    findings: tuple[CheckResult, ...]
    lower_bound: float
    method: str


def attack(harness: Harness, most: int) -> Attack:
    """Both estimates for a scenario with noise, from at most so many canaries, 2 or more."""
    run, guesses, bound = _one_run(harness, most)
    shot, method = _one_shot(harness, most)
    text = (
        f"One run of {guesses.canaries:,} canaries, each there with probability one half and a "
        f"coefficient of its own in each round: {guesses.right:,} of {guesses.made:,} guesses "
        f"right (Steinke, Nasr & Jagielski 2023). {method} Most attacks show less than is lost: a "
        "low bound is no sign of more privacy than claimed."
    )
    return Attack((run, shot), bound, text)


def _one_run(harness: Harness, most: int) -> tuple[CheckResult, Guesses, float]:
    """Guess of each canary whether it took part, from one run's releases."""
    delta = harness.scenario.privacy.delta
    rng = _rng(harness, "one run")
    groups = _chosen(harness, most)
    total = sum(len(group.users) for group in groups)
    present = rng.random(total) < 0.5
    rounds = rounds_that_fit(harness, harness.scenario.train.rounds)
    strength = _strength(harness, rounds)
    made = best_guesses(total, strength, delta, CONFIDENCE)
    scores, done = np.zeros(total), 0
    for index in range(rounds):
        places, signs = _places(harness, groups, rng), rng.choice([-1.0, 1.0], total)
        updates = _spikes(harness, groups, places, signs, present)
        released = _released(harness, harness.round(index), updates)
        if released is not None:
            scores += signs * released[np.concatenate(places)]
            done += 1
    guesses = Guesses.of(scores, present, made)
    claimed, bound = _claimed(harness, done), guesses.lower_bound(delta, CONFIDENCE)
    finding = CheckResult(
        "canaries, one run",
        bound <= claimed or guesses.chance(_strength(harness, done)) >= ALPHA,
        f"{guesses.right:,} of {guesses.made:,} guesses right: ε is at least {bound:.3g} "
        f"({CONFIDENCE:.0%})",
        f"at most {claimed:.4f}, claimed for the {done:,} rounds of it",
    )
    return finding, guesses, bound


def _one_shot(harness: Harness, most: int) -> tuple[CheckResult, str]:
    """Fit the cosines of canaries that took part, each in a random direction."""
    delta, size = harness.scenario.privacy.delta, sum(harness.sizes)
    rng = _rng(harness, "one shot")
    rounds = rounds_that_fit(harness, harness.scenario.train.rounds)
    room = size * harness.event.noise_multiplier**2 / _QUIET / harness.event.sampling_rate
    affordable = max(_FEWEST, _WORK // (size * rounds))
    groups = _chosen(harness, max(2, min(most, int(room), affordable)))
    total = sum(len(group.users) for group in groups)
    rounds = max(1, min(rounds, _WORK // (size * total)))
    products, squares, done = np.zeros(total), 0.0, 0
    for index in range(rounds):
        seed = int(rng.integers(2**63))
        updates = (
            (tier, users, RawUpdate(values * _loud(harness), Address.whole(tier.layout)))
            for tier, users, values in _unit(groups, seed)
        )
        released = _released(harness, harness.round(index), updates)
        if released is None:
            continue
        place = 0
        for tier, users, values in _unit(groups, seed):
            held = released[: values.shape[1]]
            wire = to_wire(values, harness.federation.layouts_of(tier))
            products[place : place + len(users)] += wire @ held
            place += len(users)
        squares, done = squares + float(released @ released), done + 1
    cosines = products / np.sqrt(max(squares, np.finfo(float).tiny) * max(done, 1))
    found = separation(cosines.tolist(), max(1, size * done), CONFIDENCE)
    sure = separation(cosines.tolist(), max(1, size * done), 1 - ALPHA).lower_bound(delta)
    claimed = _claimed(harness, done)
    estimate = f"ε is about {found.epsilon(delta):.3g}, at least {found.lower_bound(delta):.3g}"
    text = (
        f"One shot of {total:,} random directions in {done:,} rounds: {estimate} with "
        f"{CONFIDENCE:.0%} confidence if cosines are Gaussian (Andrew et al. 2023)."
    )
    finding = CheckResult(
        "canaries, one shot",
        sure <= claimed,
        f"{estimate} ({CONFIDENCE:.0%}); {sure:.3g} beyond doubt",
        f"at most {claimed:.4f}, claimed for the {done:,} rounds of it",
    )
    return finding, text


def _rng(harness: Harness, name: str) -> np.random.Generator:
    return rng_for(int.from_bytes(harness.root.tag("audit canaries"), "big"), name)


def _claimed(harness: Harness, rounds: int) -> float:
    """ε of so many rounds against recipients."""
    return epsilon({harness.event: rounds}, harness.scenario.privacy.delta, "recipients")


def _strength(harness: Harness, rounds: int) -> float:
    """Separation of canaries' scores, if the noise is what is accounted."""
    event, rate = harness.event, harness.event.sampling_rate
    variance = event.noise_multiplier**2 + rate * (1 - rate)
    return float(rate * np.sqrt(rounds / variance))


def _chosen(harness: Harness, most: int) -> list[Canaries]:
    """Canaries of all tiers that train, the weakest first, no more than have a place each."""
    groups, taken = [], 0
    rows = harness.some(most)
    population = sum(len(mine) for mine in rows)
    for tier in reversed(harness.training):
        mine = rows[tier.index]
        share = -(-most * len(mine) // population)
        count = min(len(mine), share, tier.layout.size - taken, most - taken)
        users = harness.simulation.cohorts[tier.index].users[mine[:count]]
        groups.append(Canaries(tier, users))
        taken += count
    return [group for group in groups if len(group.users)]


def _places(
    harness: Harness, groups: Sequence[Canaries], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """A place of its own for each canary, in the order of the wire, within what it holds."""
    free = np.ones(sum(harness.sizes), np.bool_)
    places = []
    for group in groups:
        held = np.flatnonzero(free[: group.tier.layout.size])
        mine = rng.choice(held, len(group.users), replace=False)
        free[mine] = False
        places.append(mine)
    return places


Updates = Iterator[tuple[Tier, Users, RawUpdate]]


def _spikes(
    harness: Harness,
    groups: Sequence[Canaries],
    places: Sequence[Users],
    signs: Floats,
    present: NDArray[np.bool_],
) -> Updates:
    """Updates of the canaries that are there, each far too long and in one coefficient."""
    ends = np.cumsum([len(group.users) for group in groups])[:-1]
    parts = zip(groups, places, np.split(signs, ends), np.split(present, ends), strict=True)
    for group, wire, sign, there in parts:
        layout = group.tier.layout
        order = to_wire(np.arange(layout.size), harness.federation.layouts_of(group.tier))
        update = _in_one_place(group.tier, order[wire[there]], sign[there] * _loud(harness))
        yield group.tier, group.users[there], update


def _loud(harness: Harness) -> np.float32:
    return np.float32(_LOUD * harness.protection.encoding.clip_norm)


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
    groups: Sequence[Canaries], seed: int
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


def _released(harness: Harness, round: Round, updates: Updates) -> Floats | None:
    """The released sum in units of the clip norm, in the order of the wire; None without one."""
    layouts, protection = harness.federation.layouts, harness.protection
    sampled = harness.simulation.sample(round)
    counted = protection.shares is not None or bool(protection.minimums)
    cohort = harness.named(harness.simulation.rows(sampled)) if counted else []
    try:
        summing = harness.summing(round, protection, cohort)
    except ReleaseRefused:
        return None  # too few devices came together, as a run has it too
    for number, (tier, users, update) in enumerate(updates):
        there = np.isin(users, sampled)
        if not there.any():
            continue
        coins = harness.simulation.root.stream("rounding", *round.context, b"canaries", number)
        held, mine = harness.federation.layouts_of(tier), _only(update, there)
        bounded = mine.bound(protection, round, held, coins, tier.weight)
        summing.add(tier, users[there], bounded)
    aggregate = Aggregate(summing.total(), len(sampled), None)
    release = harness.server.release(round, aggregate, harness.root)
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


# ------------------------------------------------------------------------------------ lower bounds

LARGEST = 100.0
"""Bounds stop here: no number of canaries that fits a machine shows more."""


@dataclass(frozen=True)
class Guesses:
    """What an attacker achieved in one run: ``right <= made <= canaries``.

    Attributes:
        canaries: ``m``, each of which took part with probability one half.
        made: ``r``, guesses that were made; about the others the attacker abstained.
        right: ``v`` of them.
    """

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.made <= self.canaries or self.canaries < 1:
            raise UsageError(
                f"{self.right} of {self.made} guesses right about {self.canaries} canaries: there "
                "must be at least one canary, a guess at most about each, and no more right ones"
            )

    @classmethod
    def of(cls, scores: NDArray[np.float64], present: NDArray[np.bool_], made: int) -> Guesses:
        """Guess "present" of the highest scores and "absent" of the lowest, half of ``made`` each.

        Args:
            scores: of each canary, shape ``(m,)``; larger ones speak for its presence.
            made: how many guesses, chosen before the scores were seen; an odd one is left out.
        """
        half = min(made, len(scores)) // 2
        order = np.argsort(scores, kind="stable")
        right = int(present[order[len(order) - half :]].sum()) + int((~present[order[:half]]).sum())
        return cls(len(scores), 2 * half, right)

    def p_value(self, epsilon: float, delta: float) -> float:
        """Probability of at least so many right guesses under (ε, δ) privacy, from above."""
        if not self.made:
            return 1.0
        chance = 1 / (1 + math.exp(-epsilon))
        beta = float(stats.binom.sf(self.right - 1, self.made, chance))
        below = stats.binom.pmf(np.arange(self.right - 1, -1, -1), self.made, chance)
        alpha = float((np.cumsum(below) / np.arange(1, self.right + 1)).max(initial=0.0))
        return min(1.0, beta + 2 * self.canaries * delta * alpha)

    def chance(self, strength: float) -> float:
        """Probability of at least so many right guesses, if scores are what noise makes of them.

        Args:
            strength: separation of the scores of canaries with and without part, in standard
                deviations of either, both of them Gaussian.

        Returns:
            An upper bound but for events as rare as six standard deviations: the guesses are taken
            to be about the outermost scores that chance may have left.
        """
        half = self.made / 2
        if not half:
            return 1.0
        tail = half / self.canaries * max(0.1, 1 - 6 / math.sqrt(half))
        return float(stats.binom.sf(self.right - 1, self.made, _accuracy(tail, strength)))

    def lower_bound(self, delta: float, confidence: float) -> float:
        """The largest ε that is refuted with this confidence, at the claim's δ; 0 when none is."""
        if self.p_value(0.0, delta) > 1 - confidence:
            return 0.0
        low, high = 0.0, LARGEST
        while high - low > 1e-4:
            middle = (low + high) / 2
            refuted = self.p_value(middle, delta) <= 1 - confidence
            low, high = (middle, high) if refuted else (low, middle)
        return low


def best_guesses(canaries: int, strength: float, delta: float, confidence: float) -> int:
    """An even number of guesses that promises the highest bound, from the claim and nothing else.

    ``strength`` is as in :meth:`Guesses.chance`.
    """
    best, found = 0, -1.0
    for share in np.geomspace(max(1e-3, 2 / canaries), 1.0, 24):
        made = 2 * max(1, round(share * canaries / 2))
        right = math.floor(made * _accuracy(made / canaries / 2, strength))
        bound = Guesses(max(canaries, made), made, right).lower_bound(delta, confidence)
        if bound >= found and made <= canaries:
            best, found = made, bound
    return best


def _accuracy(tail: float, strength: float) -> float:
    """Share of right guesses on one tail of the mixture of two Gaussians."""
    reach = 10 + strength
    at = np.linspace(-reach, reach, 8001)
    above = (stats.norm.sf(at - strength / 2) + stats.norm.sf(at + strength / 2)) / 2
    threshold = at[int(np.searchsorted(-above, -min(tail, 0.5)))]
    own = float(stats.norm.sf(threshold - strength / 2))
    other = float(stats.norm.sf(threshold + strength / 2))
    return own / (own + other) if own + other else 1.0


@dataclass(frozen=True)
class Separation:
    """How far the cosines of canaries that took part lie from those of canaries that did not.

    In standard deviations: an estimate, and the least with the confidence that was asked for.
    """

    estimate: float
    least: float

    def epsilon(self, delta: float) -> float:
        """ε of two Gaussians that far apart."""
        return gaussian(self.estimate, delta) if self.estimate > 0 else 0.0

    def lower_bound(self, delta: float) -> float:
        """ε of two Gaussians as far apart as is certain with the confidence asked for."""
        return gaussian(self.least, delta) if self.least > 0 else 0.0


def separation(cosines: Sequence[float], dimension: int, confidence: float) -> Separation:
    """The Gaussian fit of the one-shot estimate.

    Args:
        cosines: of each canary with what was released, at least 2.
        dimension: coefficients of what was released; without its canary a cosine has a variance
            of ``1 / dimension``.
        confidence: of the bound from below.

    Returns:
        The mean over the larger of the two deviations, so that a spread that has other reasons
        than noise is never taken for privacy lost.
    """
    values = np.asarray(cosines, np.float64)
    if len(values) < 2 or dimension < 1:
        raise UsageError(
            f"{len(values)} cosines in {dimension} dimensions: the fit needs two canaries or more"
        )
    mean, own = float(values.mean()), float(values.std(ddof=1))
    deviation = max(own, 1 / math.sqrt(dimension))
    margin = float(stats.t.ppf(confidence, len(values) - 1)) * own / math.sqrt(len(values))
    return Separation(mean / deviation, (mean - margin) / deviation)
