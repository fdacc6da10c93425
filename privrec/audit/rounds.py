"""Probes of a round: that what is charged is what runs, who takes part, and what devices put in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from privrec.audit.harness import (
    REACH,
    Floats,
    Harness,
    Integers,
    checked,
    count_p,
    judged,
    of_many,
    two_sided,
)
from privrec.device.device import Cohort, Draws, Trained
from privrec.device.local import LocalModel
from privrec.device.recommender import RecommenderLearner
from privrec.device.samples import Histories
from privrec.device.tier import Tier
from privrec.device.update import Address, BoundedUpdate, Protection, RawUpdate
from privrec.models.layout import from_wire, to_wire
from privrec.models.ncf import NCF
from privrec.privacy.discrete import Grid
from privrec.privacy.mechanism import Band
from privrec.randomness import rng_for
from privrec.report.model import Checked
from privrec.run.simulation import SUMMING, Enrolled, Participant, Rows, Simulation, Summing
from privrec.secagg.client import Policy
from privrec.secagg.messages import Stage

FloatArray = NDArray[np.float32]

USERS = 4000
"""Users whose updates are measured; where 1 % of users are unclipped, none is among them with a
probability of 4e-18."""
SUMMED_USERS = 300
_ROUNDED = 2_000_000
_FEW_DEVICES, _WIDE_VECTOR = 24, 200_000
_LARGEST = np.float32(3e38)
_MEMBERS = 4_000_000  # coefficients of a batch of canaries


@dataclass(frozen=True)
class Hostile(RecommenderLearner):
    """Training whose updates are blown up before they leave it, as a broken device's may be.

    Nearly all exceed ``clip_norm``; ``norms`` gathers those of all that was handed over.
    """

    clip_norm: float = 1.0
    norms: list[float] = field(default_factory=list)

    def train(
        self, model: LocalModel[NCF], data: Histories, states: FloatArray, draws: Draws
    ) -> Trained:
        """As :meth:`RecommenderLearner.train`, times anything up to infinity."""
        trained = super().train(model, data, states, draws)
        values = trained.update.values.copy()
        with np.errstate(all="ignore"):
            for row, user in zip(values, data.users.tolist(), strict=True):
                _blow_up(row, user, self.clip_norm)
                self.norms.append(float(np.linalg.norm(row.astype(np.float64))))
        return replace(trained, update=RawUpdate(values, trained.update.address))


def _blow_up(values: FloatArray, user: int, clip_norm: float) -> None:
    """Most updates far beyond any clip norm; some not finite, some at the end of the range."""
    if user % 50 == 17:
        values[values != 0] = np.nan
    elif user % 50 == 29:
        values[values != 0] *= np.inf
    elif user % 50 == 41:
        values[values != 0] = _LARGEST
    elif norm := float(np.linalg.norm(values.astype(np.float64))):
        length = clip_norm * 10.0 ** rng_for(user, "audit length").uniform(0.3, 9)
        values *= np.float32(length / norm)


def clipping(harness: Harness) -> Iterator[Checked]:
    """Every user's integers are within the bound that the noise is scaled to."""
    encoding = harness.plan.protection.encoding
    clip_norm, bound = encoding.clip_norm, encoding.squared_bound
    learners = [
        Hostile(own.view, own.settings, own.popularity, own.examples, clip_norm=clip_norm)
        for own in (cohort.learner for cohort in harness.simulation.cohorts)
    ]
    cohorts = map(lambda cohort, own: replace(cohort, learner=own), _fresh(harness), learners)
    simulation = replace(harness.simulation, cohorts=tuple(cohorts))
    squared = []
    for _, _, update in _bounded(harness, simulation, harness.some(USERS)):
        vectors = [mine.vector().astype(np.float64) for mine in update.rows()]
        squared += [float(vector @ vector) for vector in vectors]
    users, broken = len(squared), sum(each > bound for each in squared)
    beyond = sum(not norm <= clip_norm for own in learners for norm in own.norms)
    found = f"{broken:,} of {users:,} users longer" if broken else f"all of {users:,} users within"
    yield checked(
        "clip norm of every user",
        not broken and beyond > 0,
        f"{found}; {beyond:,} sent more than the clip norm, the longest gave "
        f"{math.sqrt(max(squared, default=0) / bound):.4f} of the bound",
        f"at most {math.sqrt(bound):,.2f} steps, which the noise is scaled to; 1 % of users "
        f"unclipped escape with a chance of {0.99 ** max(1, beyond):.0e}",
    )


def _bounded(
    harness: Harness, simulation: Simulation, rows: Rows
) -> Iterator[tuple[Tier, Integers, BoundedUpdate]]:
    """What users of every tier put into a sum; they train on weights without zeros."""
    weights = harness.server.weights.copy()
    weights += rng_for(0, "audit weights").normal(0, 0.1, len(weights)).astype(np.float32)
    for tier, mine in zip(harness.plan.federation.tiers, rows, strict=True):
        for users, update, _ in simulation.answers(harness.round(0), weights, tier, mine):
            yield tier, users, update


def rounding(harness: Harness) -> Iterator[Checked]:
    """Rounding is right on average, wherever a value lies between two integers."""
    tier, encoding = harness.training[0], harness.plan.protection.encoding
    layout, held = tier.layout, harness.plan.federation.layouts_of(tier)
    round, root = harness.round(0), harness.simulation.root
    rows = max(1, _ROUNDED // layout.size)
    rng = rng_for(0, "audit rounding")
    moments, draws = np.zeros((2, 4)), 0
    step = max(1, _MEMBERS // layout.size)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        values = rng.normal(size=(count, layout.size)).astype(np.float32)
        values *= np.float32(encoding.clip_norm / 4 / math.sqrt(layout.size))
        # Far inside the clip norm nothing is rounded twice, so the mean is exactly right.
        update = RawUpdate(values, Address.whole(layout))
        coins = root.stream("rounding", *round.context, b"audit", start)
        bounded = update.bound(harness.plan.protection, round, held, coins, tier.weight)
        exact = values if tier.weight == 1 else values * np.float32(tier.weight)
        if rotation := harness.plan.protection.rotation(round, held):
            exact = from_wire(rotation.apply(to_wire(exact, held)), held)
        moments += _moments(bounded.integers, exact * np.float32(encoding.scale))
        draws += values.size
    sums, variances = moments
    z = np.divide(sums, np.sqrt(variances), out=np.zeros(4), where=variances > 0)
    mean, spread = sums[0] / draws, math.sqrt(variances[0]) / draws
    yield judged(
        "rounding to integers",
        two_sided(z),
        f"mean error {mean:+.1e} steps over {draws:,} values; "
        f"towards zero {-sums[1] / draws:+.1e}; worst {np.abs(z).max():.1f} standard errors",
        f"0, and a fair coin between two integers; a bias of {REACH * spread:.1e} steps is seen",
    )


def _moments(integers: NDArray[np.int32], exact: FloatArray) -> Floats:
    """Sums whose mean is 0 under fair coins, and their variances.

    Of the error; of that away from zero; of that times the place between two integers, which
    rounding to the nearest spoils; and of the squared error.
    """
    wide = exact.astype(np.float64)
    part = wide - np.floor(wide)
    variance, error = part * (1 - part), integers - wide
    sums = (error, np.sign(wide) * error, (part - 0.5) * error, error**2 - variance)
    spread = (variance, variance, (part - 0.5) ** 2 * variance, variance * (1 - 4 * variance))
    return np.array([[each.sum() for each in sums], [each.sum() for each in spread]])


def plain_sum(harness: Harness) -> Iterator[Checked]:
    """The sum that the engine takes is that of the vectors that devices send."""
    bare = replace(harness.plan.protection, shares=None, minimums=())
    rows = harness.some(SUMMED_USERS)
    cohort = harness.named(rows)
    summing = harness.summing(harness.round(0), bare, cohort)
    expected = _summed(harness, bare, rows, (summing,))
    wrong = int(np.count_nonzero(summing.total() != expected))
    yield checked(
        "plain sum",
        wrong == 0 and bool(expected.any()),
        f"{wrong:,} of {len(expected):,} coefficients differ, {len(cohort):,} devices",
        "the sum of the same integers",
    )


def secure_sum(harness: Harness) -> Iterator[Checked]:
    """The whole protocol gives the sum of the survivors' integers and noise, bit for bit."""
    devices = _FEW_DEVICES if sum(harness.sizes) <= _WIDE_VECTOR else _FEW_DEVICES // 2
    rows = [mine[:devices] for mine in harness.some(devices * len(harness.training))]
    # One device of the strongest tier falls silent after its shares; the others' sum is due.
    silent, *others = harness.named(rows)
    cohort = [Participant(silent.user, silent.tier, Stage.MASKED), *others]
    bands = range(len(harness.sizes))
    holders = [sum(len(bands) - each.tier > band for each in others) for band in bands]
    protection = _for_few(harness, tuple(max(1, each * 3 // 4) for each in holders))
    enrolled = Enrolled(harness.simulation.root, Policy(2, 0.0))
    layouts = harness.plan.federation.layouts
    made = (harness.round(0), layouts, protection, cohort, enrolled)
    masked, plain, bare = SUMMING["full"](*made), SUMMING["exact"](*made), SUMMING["exact"](*made)
    rows[silent.tier] = rows[silent.tier][1:]
    expected = _summed(harness, protection, rows, (masked, plain))
    total = masked.total()
    wrong = int(np.count_nonzero(total != plain.total()))
    wrong += int(np.count_nonzero(total - bare.total() != expected))
    yield checked(
        "secure sum",
        wrong == 0 and bool(expected.any()),
        f"{wrong:,} of {len(expected):,} coefficients differ, {len(cohort):,} devices, one of them "
        "falling silent",
        "the sum of the survivors' integers, and their noise where devices add it",
    )


def _summed(
    harness: Harness, protection: Protection, rows: Rows, summings: Sequence[Summing]
) -> Integers:
    """Put users' updates into every sum, and add their integers up on their own."""
    simulation = replace(harness.simulation, cohorts=_fresh(harness), protection=protection)
    total = np.zeros(harness.plan.federation.layout.size, np.int64)
    for tier, users, update in _bounded(harness, simulation, rows):
        for summing in summings:
            summing.add(tier.index, users, update)
        for mine in update.rows():
            held = to_wire(mine.vector(), harness.plan.federation.layouts_of(tier))
            total[: len(held)] += held
    return from_wire(total, harness.plan.federation.layouts)


def _for_few(harness: Harness, least: tuple[int, ...]) -> Protection:
    """The scenario's protection for a cohort of a few devices."""
    shares = harness.plan.protection.shares
    if shares is not None:
        bands = tuple(Band(n, few) for n, few in zip(harness.sizes, least, strict=True))
        # As wide as the scenario's own shares, of which there are fewer here.
        part = min(few / own.shares for few, own in zip(least, shares.bands, strict=True))
        multiplier = shares.noise_multiplier * math.sqrt(part)
        shares = replace(shares, bands=bands, noise_multiplier=multiplier)
    return replace(harness.plan.protection, shares=shares, minimums=least)


def _fresh(harness: Harness) -> tuple[Cohort[RecommenderLearner], ...]:
    """The cohorts with private states of their own, so that probes leave no trace."""
    return tuple(replace(c, states=c.states.copy()) for c in harness.simulation.cohorts)


PROBES: dict[str, Callable[[Harness], Iterator[Checked]]] = {
    "clip norm of every user": clipping,
    "rounding to integers": rounding,
}
"""Each by its own name, since a part that refuses to work ends its own probe alone."""
SUMS: dict[str, Callable[[Harness], Iterator[Checked]]] = {
    "plain sum": plain_sum,
    "secure sum": secure_sum,
}
"""Likewise, of what becomes of what devices put in."""


# -------------------------------------------------------------------------------------- accounting

_TOLERANCE = 1e-3  # of the looser accountant below the tighter, which rounding alone explains


def probe_accounting(harness: Harness) -> Iterator[Checked]:
    """The event names what server and devices use, its ε is in the budget, twice computed."""
    event, shares = harness.event, harness.plan.protection.shares
    rate = 1.0 if harness.of_examples else harness.simulation.sampling_rate
    noise = "gaussian" if shares is None else "discrete_gaussian"
    multiplier = event.noise_multiplier if shares is None else shares.noise_multiplier
    grid = None
    if shares is not None:
        narrowest = max(band.least - band.colluders for band in shares.bands)
        bound, size = harness.squared_sensitivity, sum(harness.sizes)
        grid = Grid(bound, size, narrowest, shares.remove_excess)
    charged = event.grid and replace(event.grid, small_cohort_delta=0.0)
    planned = noise, multiplier, rate, grid
    yield checked(
        "what is charged is what runs",
        (event.mechanism, event.noise_multiplier, event.sampling_rate, charged) == planned,
        f"{event.mechanism}, noise {event.noise_multiplier:.4f} of the sensitivity, sampling "
        f"{event.sampling_rate:g}",
        f"{noise}, {multiplier:.4f}, {rate:g}",
    )
    privacy = harness.scenario.privacy
    against, limit, delta = privacy.budget_against, privacy.epsilon, privacy.delta
    if harness.of_examples:
        against, limit, delta = "server", privacy.local_epsilon, privacy.local_delta
    first, second = harness.epsilon(against), harness.epsilon(against, "rdp")
    budget = math.inf if limit is None else limit
    yield checked(
        "ε of the planned rounds",
        first <= budget and second >= first * (1 - _TOLERANCE),
        f"{first:.4f} by loss distributions, {second:.4f} by Rényi divergences, at δ = "
        f"{delta:g} against {against}",
        "no budget; the latter is the looser" if budget == math.inf else f"at most {budget:g}",
    )


# ---------------------------------------------------------------------------------------- sampling

COINS = 40_000_000
MOST_ROUNDS, FEWEST_ROUNDS = 400, 60


def probe_sampling(harness: Harness) -> Iterator[Checked]:
    """Every user takes part by its own coin, in every round anew; where all do, that they do."""
    rate, population = harness.plan.event.sampling_rate, harness.simulation.population
    if rate < 1:
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, COINS // population))
        taken = np.zeros((rounds, population), np.bool_)
        for index, who in enumerate(taken):
            who[harness.simulation.sample(harness.round(index))] = True
        yield from (probe(taken, rate) for probe in (_sizes, _users, _rounds))
        return
    sizes = {len(harness.simulation.sample(harness.round(index))) for index in range(3)}
    found = f"{min(sizes):,} to {max(sizes):,} of {population:,} in a round"
    yield checked("everybody takes part", sizes == {population}, found, "all of them, as accounted")


def _sizes(taken: NDArray[np.bool_], rate: float) -> Checked:
    """Sizes of cohorts are binomial: their mean, and above all their spread."""
    rounds, population = taken.shape
    sizes = taken.sum(axis=1)
    mean, variance = population * rate, population * rate * (1 - rate)
    squares = float(((sizes - mean) ** 2).sum() / variance)
    spread = _dispersion_p(squares, rounds, population, rate)
    shift = float(two_sided((sizes.mean() - mean) / math.sqrt(variance / rounds)))
    return judged(
        "sizes of cohorts",
        [spread, shift],
        f"mean {sizes.mean():,.1f}, variance {sizes.var():,.1f} over {rounds:,} rounds",
        f"binomial: mean {mean:,.1f}, variance {variance:,.1f}; a fixed size has none",
    )


def _users(taken: NDArray[np.bool_], rate: float) -> Checked:
    """Every user is as likely as any other, and neighbours are drawn apart."""
    rounds, population = taken.shape
    variance = rate * (1 - rate)
    counts = taken.sum(axis=0)
    squares = float(((counts - rounds * rate) ** 2).sum() / (rounds * variance))
    spread = _dispersion_p(squares, population, rounds, rate)
    extremes = of_many(count_p(counts, rounds, rate))
    centred = taken - rate
    together = float((centred[:, 1:] * centred[:, :-1]).sum())
    pairs = rounds * max(1, population - 1)
    correlation = together / (variance * pairs)
    neighbours = float(two_sided(correlation * math.sqrt(pairs)))
    return judged(
        "chances of users",
        [spread, extremes, neighbours],
        f"between {counts.min():,} and {counts.max():,} of {rounds:,} rounds; neighbours "
        f"correlate by {correlation:+.1e}",
        f"{rounds * rate:,.1f} on average, each by its own coin of {rate:g}",
    )


def _rounds(taken: NDArray[np.bool_], rate: float) -> Checked:
    """Cohorts of two rounds overlap as independent ones do."""
    rounds, population = taken.shape
    centred = (taken - rate).astype(np.float32)
    overlaps = (centred @ centred.T)[np.triu_indices(rounds, 1)].astype(np.float64)
    z = overlaps / (rate * (1 - rate) * math.sqrt(population))
    whole = float(overlaps.sum()) / (rate * (1 - rate) * math.sqrt(population * len(overlaps)))
    largest = float(np.abs(z).max())
    p_values = [_bernstein(overlaps, population, rate), float(two_sided(whole))]
    return judged(
        "cohorts of different rounds",
        p_values,
        f"largest overlap {largest:.1f} standard errors from chance in {len(z):,} pairs",
        "independent",
    )


def _dispersion_p(squares: float, freedom: int, trials: int, rate: float) -> float:
    """Two-sided probability of a sum of squared standardised binomial counts.

    A gamma of the right mean and variance, since a count has a little excess kurtosis; it is the
    chi-square where counts are as good as Gaussian.
    """
    variance = rate * (1 - rate)
    excess = (1 - 6 * variance) / (trials * variance)
    scale = 1 + excess / 2
    law = stats.gamma(freedom / (2 * scale), scale=2 * scale)
    return float(np.minimum(1.0, 2 * np.minimum(law.cdf(squares), law.sf(squares))))


def _bernstein(sums: Floats, terms: int, rate: float) -> float:
    """Bound on the probability of any of these sums of products of centred coins (Bernstein)."""
    variance = terms * (rate * (1 - rate)) ** 2
    largest = max(rate, 1 - rate) ** 2
    most = float(np.abs(sums).max(initial=0.0))
    exponent = most**2 / (2 * (variance + largest * most / 3))
    return float(np.minimum(1.0, 2 * len(sums) * math.exp(-exponent)))
