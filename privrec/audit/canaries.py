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
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from privrec.audit.harness import ALPHA, Floats, Harness, Integers, checked
from privrec.audit.noise import rounds_that_fit
from privrec.device.tier import Tier
from privrec.device.update import Address, Aggregate, RawUpdate, Round
from privrec.errors import ReleaseRefused, UsageError
from privrec.models.layout import to_wire
from privrec.privacy.accountant import gaussian
from privrec.privacy.events import epsilon
from privrec.randomness import rng_for
from privrec.report.model import Checked

Canaries: TypeAlias = tuple[Tier, Integers]
"""Canaries of one tier: their users, shape ``(m,)``."""
Update: TypeAlias = tuple[Tier, Integers, RawUpdate]

CONFIDENCE = 0.95
"""Of the lower bounds that are reported. One honest build in twenty may exceed a small claim, so an
audit fails only when chance does not explain it either, with the level of every other probe."""
_LOUD = np.float32(1000.0)  # clip norms before clipping
_CELLS = 4_000_000  # coefficients of a batch of canaries
_WORK = 300_000_000  # coefficients of all canaries of the one-shot estimate together
_FEWEST = 100
_QUIET = 32.0  # a canary's noise over what the others add to it, as variances


@dataclass
class Attack:
    """Both estimates from at most so many canaries; once probed, with a bound and how, in words."""

    harness: Harness
    most: int
    lower_bound: float | None = None
    method: str = ""

    def probe(self) -> Iterator[Checked]:
        """That the bounds stay below what is claimed."""
        yield self._one_run()
        yield self._one_shot()
        self.method += " Most attacks show less than is lost: a low bound is no sign of privacy."

    def _one_run(self) -> Checked:
        """Guess of each canary whether it took part, from one run's releases."""
        harness, delta = self.harness, self.harness.scenario.privacy.delta
        rng = _rng(harness, "one run")
        groups = _chosen(harness, self.most)
        total = sum(len(users) for _, users in groups)
        present = rng.random(total) < 0.5
        rounds = rounds_that_fit(harness, harness.scenario.train.rounds)
        made = best_guesses(total, _strength(harness, rounds), delta, CONFIDENCE)
        scores, done = np.zeros(total), 0
        for index in range(rounds):
            round = harness.round(index)
            places, signs, updates = _spikes(harness, round, groups, present, rng)
            released = _released(harness, round, updates)
            if released is not None:
                scores += signs * released[places]
                done += 1
        guesses = Guesses.of(scores, present, made)
        claimed, bound = _claimed(harness, done), guesses.lower_bound(delta, CONFIDENCE)
        right = f"{guesses.right:,} of {guesses.made:,} guesses right"
        self.lower_bound = bound
        self.method = (
            f"One run of {total:,} canaries, each there with probability one half and a "
            f"coefficient of its own in each round: {right} (Steinke, Nasr & Jagielski 2023)."
        )
        return checked(
            "canaries, one run",
            bound <= claimed or guesses.chance(_strength(harness, done)) >= ALPHA,
            f"{right}: ε is at least {bound:.3g} ({CONFIDENCE:.0%})",
            f"at most {claimed:.4f}, claimed for the {done:,} rounds of it",
        )

    def _one_shot(self) -> Checked:
        """Fit the cosines of canaries that took part, each in a random direction."""
        harness, event = self.harness, self.harness.plan.event
        delta, size = harness.scenario.privacy.delta, sum(harness.sizes)
        rng = _rng(harness, "one shot")
        rounds = rounds_that_fit(harness, harness.scenario.train.rounds)
        room = size * event.noise_multiplier**2 / _QUIET / event.sampling_rate
        affordable = max(_FEWEST, _WORK // (size * rounds))
        groups = _chosen(harness, max(2, min(self.most, int(room), affordable)))
        total = sum(len(users) for _, users in groups)
        rounds = max(1, min(rounds, _WORK // (size * total)))
        products, squares, done = np.zeros(total), 0.0, 0
        loud = np.float32(_LOUD * harness.plan.protection.encoding.clip_norm)
        for index in range(rounds):
            round, seed = harness.round(index), int(rng.integers(2**63))
            sampled = harness.simulation.sample(round)
            updates = (
                (tier, users[there], RawUpdate(values[there] * loud, whole))
                for tier, users, values in _unit(groups, seed)
                for there, whole in [(np.isin(users, sampled), Address.whole(tier.layout))]
            )
            released = _released(harness, round, updates)
            if released is None:
                continue
            place = 0
            for tier, users, values in _unit(groups, seed):
                wire = to_wire(values, harness.plan.federation.layouts_of(tier))
                products[place : place + len(users)] += wire @ released[: values.shape[1]]
                place += len(users)
            squares, done = squares + float(released @ released), done + 1
        cosines = products / np.sqrt(max(squares, np.finfo(float).tiny) * max(done, 1))
        estimate, least = separation(cosines, max(1, size * done), CONFIDENCE)
        sure = apart(separation(cosines, max(1, size * done), 1 - ALPHA)[1], delta)
        claimed = _claimed(harness, done)
        found = f"ε is about {apart(estimate, delta):.3g}, at least {apart(least, delta):.3g}"
        self.method += (
            f" One shot of {total:,} random directions in {done:,} rounds: {found} with "
            f"{CONFIDENCE:.0%} confidence if cosines are Gaussian (Andrew et al. 2023)."
        )
        return checked(
            "canaries, one shot",
            sure <= claimed,
            f"{found} ({CONFIDENCE:.0%}); {sure:.3g} beyond doubt",
            f"at most {claimed:.4f}, claimed for the {done:,} rounds of it",
        )


def _rng(harness: Harness, name: str) -> np.random.Generator:
    return rng_for(int.from_bytes(harness.root.tag("audit canaries"), "big"), name)


def _claimed(harness: Harness, rounds: int) -> float:
    """ε of so many rounds against recipients."""
    return epsilon({harness.plan.event: rounds}, harness.scenario.privacy.delta, "recipients")


def _strength(harness: Harness, rounds: int) -> float:
    """Separation of canaries' scores, if the noise is what is accounted."""
    event, rate = harness.plan.event, harness.plan.event.sampling_rate
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
        if count > 0:
            groups.append((tier, harness.simulation.cohorts[tier.index].users[mine[:count]]))
            taken += count
    return groups


def _spikes(
    harness: Harness,
    round: Round,
    groups: Sequence[Canaries],
    present: NDArray[np.bool_],
    rng: np.random.Generator,
) -> tuple[Integers, Floats, list[Update]]:
    """A place on the wire and a sign for each canary, and far too long updates of those there."""
    free, places = np.ones(sum(harness.sizes), np.bool_), []
    for tier, users in groups:
        mine = rng.choice(np.flatnonzero(free[: tier.layout.size]), len(users), replace=False)
        free[mine] = False
        places.append(mine)
    signs, sampled = rng.choice([-1.0, 1.0], len(present)), harness.simulation.sample(round)
    ends = np.cumsum([len(users) for _, users in groups])[:-1]
    parts = zip(groups, places, np.split(signs, ends), np.split(present, ends), strict=True)
    loud, updates = np.float32(_LOUD * harness.plan.protection.encoding.clip_norm), []
    for (tier, users), wire, sign, there in parts:
        sent = there & np.isin(users, sampled)
        order = to_wire(np.arange(tier.layout.size), harness.plan.federation.layouts_of(tier))
        update = _in_one_place(tier, order[wire[sent]], sign[sent] * loud)
        updates.append((tier, users[sent], update))
    return np.concatenate(places), signs, updates


def _in_one_place(tier: Tier, places: Integers, values: Floats) -> RawUpdate:
    """Updates that touch one coefficient each, named in the tier's layout."""
    layout, block = tier.layout, max(1, tier.layout.block)
    memory, inside = layout.slots * layout.block, places - layout.head
    in_memory, in_biases = (inside >= 0) & (inside < memory), inside >= memory
    blocks = np.where(in_memory, inside // block, 0)[:, None]
    biases = np.where(in_biases, inside - memory, 0)[:, None]
    address = Address(blocks, biases if layout.bias_slots else biases[:, :0], layout)
    row = np.where(in_memory, layout.head + inside % block, places)
    row = np.where(in_biases, layout.head + layout.block, row)
    spikes = np.zeros((len(places), address.width), np.float32)
    spikes[np.arange(len(places)), row] = values
    return RawUpdate(spikes, address)


def _unit(
    groups: Sequence[Canaries], seed: int
) -> Iterator[tuple[Tier, Integers, NDArray[np.float32]]]:
    """Random unit vectors of the canaries, in their layouts, a batch at a time."""
    for tier, users in groups:
        size = tier.layout.size
        step = max(1, _CELLS // size)
        for start in range(0, len(users), step):
            some, rng = users[start : start + step], rng_for(seed, tier.index, start)
            values = rng.standard_normal((len(some), size), np.float32)
            values /= np.linalg.norm(values, axis=1, keepdims=True)
            yield tier, some, values


def _released(harness: Harness, round: Round, updates: Iterable[Update]) -> Floats | None:
    """The released sum in units of the clip norm, in the order of the wire; None without one."""
    layouts, protection = harness.plan.federation.layouts, harness.plan.protection
    sampled = harness.simulation.sample(round)
    counted = protection.shares is not None or bool(protection.minimums)
    cohort = harness.named(harness.simulation.rows(sampled)) if counted else []
    try:
        summing = harness.summing(round, protection, cohort)
    except ReleaseRefused:
        return None  # too few devices came together, as a run has it too
    for number, (tier, users, update) in enumerate(updates):
        if len(users):
            coins = harness.simulation.root.stream("rounding", *round.context, b"canaries", number)
            held = harness.plan.federation.layouts_of(tier)
            bounded = update.bound(protection, round, held, coins, tier.weight)
            summing.add(tier.index, users, bounded)
    aggregate = Aggregate(summing.total(), len(sampled), None)
    release = harness.server.release(round, aggregate, harness.root)
    decoded = to_wire(protection.encoding.decode(release.total), layouts)
    if rotation := protection.rotation(round, layouts):
        decoded = rotation.undo(decoded[None])[0]
    return np.asarray(decoded / protection.encoding.clip_norm)


# ------------------------------------------------------------------------------------ lower bounds

LARGEST = 100.0
"""Bounds stop here: no number of canaries that fits a machine shows more."""


@dataclass(frozen=True)
class Guesses:
    """What an attacker achieved in one run, ``v`` right of ``r`` made about ``m`` canaries."""

    canaries: int
    made: int
    right: int

    @classmethod
    def of(cls, scores: NDArray[np.float64], present: NDArray[np.bool_], made: int) -> Guesses:
        """Guess "present" of the highest scores and "absent" of the lowest, half of ``made`` each.

        ``made`` is chosen before the scores are seen; an odd one is left out.
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

        ``strength`` is the distance of Gaussian scores with and without part in their deviations.
        An upper bound but for events as rare as six standard deviations: guesses are taken to be
        about the outermost scores that chance may have left.
        """
        half = self.made / 2
        if not half:
            return 1.0
        tail = half / self.canaries * max(0.1, 1 - 6 / math.sqrt(half))
        return float(stats.binom.sf(self.right - 1, self.made, _accuracy(tail, strength)))

    def lower_bound(self, delta: float, confidence: float) -> float:
        """The largest ε that is refuted with this confidence, at the claim's δ; 0 when none is."""
        steps = range(round(LARGEST * 1e4))
        kept = bisect_left(steps, True, key=lambda n: self.p_value(n / 1e4, delta) > 1 - confidence)
        return max(0, kept - 1) / 1e4


def best_guesses(canaries: int, strength: float, delta: float, confidence: float) -> int:
    """The even number of guesses that promises the highest bound, from the claim alone."""

    def bound(made: int) -> float:
        right = math.floor(made * _accuracy(made / canaries / 2, strength))
        return Guesses(canaries, made, right).lower_bound(delta, confidence)

    shares = np.geomspace(max(1e-3, 2 / canaries), 1.0, 24)
    numbers = {2 * max(1, round(share * canaries / 2)) for share in shares.tolist()}
    affordable = [made for made in sorted(numbers, reverse=True) if made <= canaries]
    return max(affordable, key=bound, default=0)


def _accuracy(tail: float, strength: float) -> float:
    """Share of right guesses on one tail of the mixture of two Gaussians."""
    reach = 10 + strength
    at = np.linspace(-reach, reach, 8001)
    above = (stats.norm.sf(at - strength / 2) + stats.norm.sf(at + strength / 2)) / 2
    threshold = at[int(np.searchsorted(-above, -min(tail, 0.5)))]
    own = float(stats.norm.sf(threshold - strength / 2))
    other = float(stats.norm.sf(threshold + strength / 2))
    return own / (own + other) if own + other else 1.0


def separation(cosines: Floats, dimension: int, confidence: float) -> tuple[float, float]:
    """The Gaussian fit of the one-shot estimate, from the cosines of 2 or more canaries.

    It is how far cosines of canaries that took part lie from those of canaries that did not, which
    have a variance of ``1 / dimension``, in standard deviations: as estimated, and at least, with
    ``confidence``. The mean is taken over the larger of the two deviations, so that a spread that
    has other reasons than noise is never taken for privacy lost.
    """
    if len(cosines) < 2 or dimension < 1:
        raise UsageError(
            f"{len(cosines)} cosines in {dimension} dimensions: the fit needs two canaries or more"
        )
    mean, own = float(cosines.mean()), float(cosines.std(ddof=1))
    deviation = max(own, 1 / math.sqrt(dimension))
    margin = float(stats.t.ppf(confidence, len(cosines) - 1)) * own / math.sqrt(len(cosines))
    return mean / deviation, (mean - margin) / deviation


def apart(deviations: float, delta: float) -> float:
    """ε of two Gaussians so many standard deviations apart; 0 where it is below 0."""
    return gaussian(deviations, delta) if deviations > 0 else 0.0
