"""Probes of a round: that what is charged is what runs, who takes part, and what devices put in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from privrec.audit.harness import REACH, CheckResult, Harness, count_p, judged, of_many, two_sided
from privrec.device.device import Cohort, Draws, Trained, privatize
from privrec.device.recommender import RecommenderLearner
from privrec.device.samples import Histories
from privrec.device.tier import LocalModel, Tier
from privrec.device.update import Address, BoundedUpdate, Protection, RawUpdate
from privrec.models.layout import from_wire, to_wire
from privrec.models.ncf import NCF
from privrec.privacy.mechanism import Band
from privrec.randomness import rng_for
from privrec.run.simulation import SUMMING, Enrolled, Participant, Rows, Simulation
from privrec.secagg.client import Policy
from privrec.secagg.messages import Stage

FloatArray = NDArray[np.float32]
Users = NDArray[np.int64]

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

    Nearly all exceed ``clip_norm``; ``norms``, of what each user handed over, is filled meanwhile.
    """

    clip_norm: float = 1.0
    norms: dict[int, float] = field(default_factory=dict)

    def train(
        self, model: LocalModel[NCF], data: Histories, states: FloatArray, draws: Draws
    ) -> Trained:
        """As :meth:`RecommenderLearner.train`, times anything up to infinity."""
        trained = super().train(model, data, states, draws)
        values = trained.update.values.copy()
        for row, user in enumerate(data.users.tolist()):
            _blow_up(values[row], user, self.clip_norm)
            with np.errstate(all="ignore"):
                self.norms[user] = float(np.linalg.norm(values[row].astype(np.float64)))
        return replace(trained, update=RawUpdate(values, trained.update.address))

    @classmethod
    def of(cls, learner: RecommenderLearner, clip_norm: float) -> Hostile:
        """The same training, hostile."""
        parts = learner.view, learner.settings, learner.popularity, learner.examples
        return cls(*parts, clip_norm=clip_norm)


def _blow_up(values: FloatArray, user: int, clip_norm: float) -> None:
    """Most updates far beyond any clip norm; some not finite, some at the end of the range."""
    with np.errstate(all="ignore"):
        if user % 50 == 17:
            values[values != 0] = np.nan
        elif user % 50 == 29:
            values[values != 0] *= np.inf
        elif user % 50 == 41:
            values[values != 0] = _LARGEST
        elif len(values):
            norm = float(np.linalg.norm(values.astype(np.float64)))
            length = clip_norm * 10.0 ** rng_for(user, "audit length").uniform(0.3, 9)
            if norm:
                values *= np.float32(length / norm)


def clipping(harness: Harness) -> CheckResult:
    """Every user's integers are within the bound that the noise is scaled to."""
    clip_norm = harness.protection.encoding.clip_norm
    cohorts = tuple(
        replace(cohort, learner=Hostile.of(cohort.learner, clip_norm), states=cohort.states.copy())
        for cohort in harness.simulation.cohorts
    )
    simulation = replace(harness.simulation, cohorts=cohorts)
    bound = harness.protection.encoding.squared_bound
    users = beyond = broken = 0
    longest = 0.0
    for _, _, update in _bounded(harness, simulation, harness.some(USERS)):
        for mine in update.rows():
            vector = mine.vector().astype(np.float64)
            squared = float(vector @ vector)
            longest, broken = max(longest, squared), broken + (squared > bound)
            users += 1
    for cohort in cohorts:
        norms = cohort.learner.norms.values() if isinstance(cohort.learner, Hostile) else ()
        beyond += sum(not norm <= clip_norm for norm in norms)
    found = f"{broken:,} of {users:,} users longer" if broken else f"all of {users:,} users within"
    return CheckResult(
        "clip norm of every user",
        not broken and beyond > 0,
        f"{found}; {beyond:,} sent more than the clip norm, the longest gave "
        f"{math.sqrt(longest / bound):.4f} of the bound",
        f"at most {math.sqrt(bound):,.2f} steps, which the noise is scaled to; 1 % of users "
        f"unclipped escape with a chance of {0.99 ** max(1, beyond):.0e}",
    )


def _bounded(
    harness: Harness, simulation: Simulation, rows: Rows, silent: int | None = None
) -> Iterator[tuple[Tier, Users, BoundedUpdate]]:
    """What users of every tier put into a sum, but for one who falls silent.

    They train on weights that are not zero anywhere.
    """
    weights = harness.server.weights.copy()
    weights += rng_for(0, "audit weights").normal(0, 0.1, len(weights)).astype(np.float32)
    round = harness.round(0)
    for tier, mine in zip(harness.federation.tiers, rows, strict=True):
        there = mine[simulation.cohorts[tier.index].users[mine] != silent]
        for users, update, _ in simulation.answers(round, weights, tier, there):
            yield tier, users, update


def rounding(harness: Harness) -> CheckResult:
    """Rounding is right on average, wherever a value lies between two integers."""
    tier, encoding = harness.training[0], harness.protection.encoding
    layout, weaker = tier.layout, harness.federation.weaker(tier)
    round, root = harness.round(0), harness.simulation.root
    rows = max(1, _ROUNDED // layout.size)
    rng = rng_for(0, "audit rounding")
    sums, variances, draws = np.zeros(4), np.zeros(4), 0
    step = max(1, _MEMBERS // layout.size)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        values = rng.normal(size=(count, layout.size)).astype(np.float32)
        values *= np.float32(encoding.clip_norm / 4 / math.sqrt(layout.size))
        # Far inside the clip norm nothing is rounded twice, so the mean is exactly right.
        update = RawUpdate(values, Address.whole(layout))
        coins = root.stream("rounding", *round.context, b"audit", start)
        bounded = privatize(update, harness.protection, round, tier, weaker, coins)
        exact = values if tier.weight == 1 else values * np.float32(tier.weight)
        rotation = harness.protection.rotation(round, (layout, *weaker))
        if rotation is not None:
            turned = rotation.apply(to_wire(exact, (layout, *weaker)))
            exact = from_wire(turned, (layout, *weaker))
        moments = _moments(bounded.integers, exact * np.float32(encoding.scale))
        sums, variances, draws = sums + moments[0], variances + moments[1], draws + values.size
    z = np.divide(sums, np.sqrt(variances), out=np.zeros(4), where=variances > 0)
    mean, spread = sums[0] / draws, math.sqrt(variances[0]) / draws
    return judged(
        "rounding to integers",
        two_sided(z),
        f"mean error {mean:+.1e} steps over {draws:,} values; "
        f"towards zero {-sums[1] / draws:+.1e}; worst {np.abs(z).max():.1f} standard errors",
        f"0, and a fair coin between two integers; a bias of {REACH * spread:.1e} steps is seen",
    )


def _moments(
    integers: NDArray[np.int32], exact: FloatArray
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums whose mean is 0 under fair coins, and their variances.

    Of the error; of the error away from zero; of the error times the place between two integers,
    which rounding to the nearest spoils; and of the squared error.
    """
    wide = exact.astype(np.float64)
    part = wide - np.floor(wide)
    variance, error = part * (1 - part), integers - wide
    sums = (error, np.sign(wide) * error, (part - 0.5) * error, error**2 - variance)
    spread = (variance, variance, (part - 0.5) ** 2 * variance, variance * (1 - 4 * variance))
    return np.array([s.sum() for s in sums]), np.array([v.sum() for v in spread])


def plain_sum(harness: Harness) -> CheckResult:
    """The sum that the engine takes is that of the vectors that devices send."""
    bare = replace(harness.protection, shares=None, minimums=())
    simulation = replace(harness.simulation, protection=bare, cohorts=_fresh(harness))
    rows = harness.some(SUMMED_USERS)
    summing = harness.summing(harness.round(0), bare, harness.named(rows))
    expected = np.zeros(harness.federation.layout.size, np.int64)
    users = 0
    for tier, each, update in _bounded(harness, simulation, rows):
        summing.add(tier, each, update)
        for mine in update.rows():
            expected += _padded(harness, tier, mine.vector())
            users += 1
    wrong = int(np.count_nonzero(summing.total() != expected))
    return CheckResult(
        "plain sum",
        wrong == 0 and bool(expected.any()),
        f"{wrong:,} of {len(expected):,} coefficients differ, {users:,} devices",
        "the sum of the same integers",
    )


def secure_sum(harness: Harness) -> CheckResult:
    """The whole protocol gives the sum of the survivors' integers and noise, bit for bit."""
    devices = _FEW_DEVICES if sum(harness.sizes) <= _WIDE_VECTOR else _FEW_DEVICES // 2
    rows = [mine[:devices] for mine in harness.some(devices * len(harness.training))]
    cohort = harness.named(rows)
    # One device of the strongest tier falls silent after its shares; the others' sum is due.
    silent = cohort[0]
    cohort = [Participant(silent.user, silent.tier, Stage.MASKED), *cohort[1:]]
    least = [
        sum(len(harness.sizes) - each.tier.index > band for each in cohort[1:]) * 3 // 4
        for band in range(len(harness.sizes))
    ]
    protection = _for_few(harness, tuple(max(1, each) for each in least))
    enrolled = Enrolled(harness.simulation.root, Policy(2, 0.0))
    made = (harness.round(0), harness.federation, protection, cohort, enrolled)
    masked, plain, bare = SUMMING["full"](*made), SUMMING["exact"](*made), SUMMING["exact"](*made)
    simulation = replace(harness.simulation, cohorts=_fresh(harness), protection=protection)
    expected = np.zeros(harness.federation.layout.size, np.int64)
    for tier, users, update in _bounded(harness, simulation, rows, silent.user):
        masked.add(tier, users, update)
        plain.add(tier, users, update)
        for mine in update.rows():
            expected += _padded(harness, tier, mine.vector())
    total = masked.total()
    wrong = int(np.count_nonzero(total != plain.total()))
    wrong += int(np.count_nonzero(total - bare.total() != expected))
    return CheckResult(
        "secure sum",
        wrong == 0 and bool(expected.any()),
        f"{wrong:,} of {len(expected):,} coefficients differ, {len(cohort):,} devices, one of them "
        "falling silent",
        "the sum of the survivors' integers, and their noise where devices add it",
    )


def _for_few(harness: Harness, least: tuple[int, ...]) -> Protection:
    """The scenario's protection for a cohort of a few devices."""
    shares = harness.protection.shares
    if shares is not None:
        bands = tuple(Band(n, few) for n, few in zip(harness.sizes, least, strict=True))
        # As wide as the scenario's own shares, of which there are fewer here.
        part = min(few / own.shares for few, own in zip(least, shares.bands, strict=True))
        multiplier = shares.noise_multiplier * math.sqrt(part)
        shares = replace(shares, bands=bands, noise_multiplier=multiplier)
    return replace(harness.protection, shares=shares, minimums=least)


def _fresh(harness: Harness) -> tuple[Cohort[RecommenderLearner], ...]:
    """The cohorts with private states of their own, so that probes leave no trace."""
    return tuple(replace(c, states=c.states.copy()) for c in harness.simulation.cohorts)


def _padded(harness: Harness, tier: Tier, vector: NDArray[np.int32]) -> NDArray[np.int64]:
    """A tier's vector with zeros where it holds nothing, in the layout of the shared vector."""
    whole = np.zeros(harness.federation.layout.size, np.int64)
    held = to_wire(vector, (tier.layout, *harness.federation.weaker(tier)))
    whole[: len(held)] = held
    return from_wire(whole, harness.federation.layouts)


PROBES: dict[str, Callable[[Harness], CheckResult]] = {
    "clip norm of every user": clipping,
    "rounding to integers": rounding,
    "plain sum": plain_sum,
    "secure sum": secure_sum,
}
"""Each by its own name, since a part that refuses to work ends its own probe alone."""


# -------------------------------------------------------------------------------------- accounting

_TOLERANCE = 1e-3  # of the looser accountant below the tighter, which rounding alone explains


def probe_accounting(harness: Harness) -> Iterator[CheckResult]:
    """All probes of the accounting of a scenario with noise."""
    yield _charged(harness)
    yield _budget(harness)


def _charged(harness: Harness) -> CheckResult:
    """The event names the mechanism, noise and sampling that server and devices use."""
    event, shares = harness.event, harness.protection.shares
    noise = "gaussian" if shares is None else "discrete_gaussian"
    multiplier = event.noise_multiplier if shares is None else shares.noise_multiplier
    grid = event.grid
    same = (
        event.mechanism == noise
        and event.noise_multiplier == multiplier
        and event.sampling_rate == harness.simulation.sampling_rate
        and (shares is None) == (grid is None)
    )
    if shares is not None and grid is not None:
        same &= grid.shares == max(b.least - b.colluders for b in shares.bands)
        same &= grid.dimension == sum(harness.sizes)
        same &= grid.squared_sensitivity == harness.protection.encoding.squared_bound
        same &= grid.excess_removed == shares.remove_excess
    return CheckResult(
        "what is charged is what runs",
        bool(same),
        f"{event.mechanism}, noise {event.noise_multiplier:.4f} of the sensitivity, sampling "
        f"{event.sampling_rate:g}",
        f"{noise}, {multiplier:.4f}, {harness.simulation.sampling_rate:g}",
    )


def _budget(harness: Harness) -> CheckResult:
    """ε of the planned rounds is within the budget, and a second accountant does not object."""
    privacy = harness.scenario.privacy
    against = privacy.budget_against
    first, second = harness.epsilon(against), harness.epsilon(against, "rdp")
    budget = math.inf if privacy.epsilon is None else privacy.epsilon
    agree = second >= first * (1 - _TOLERANCE)
    return CheckResult(
        "ε of the planned rounds",
        first <= budget and agree,
        f"{first:.4f} by loss distributions, {second:.4f} by Rényi divergences, at δ = "
        f"{privacy.delta:g} against {against}",
        "no budget; the latter is the looser" if budget == math.inf else f"at most {budget:g}",
    )


# ---------------------------------------------------------------------------------------- sampling

COINS = 40_000_000
MOST_ROUNDS, FEWEST_ROUNDS = 400, 60


def probe_sampling(harness: Harness) -> Iterator[CheckResult]:
    """Every user takes part by its own coin, in every round anew; where all do, that they do."""
    rate, population = harness.event.sampling_rate, harness.simulation.population
    if rate < 1:
        taken = _taken(harness)
        yield _sizes(taken, rate)
        yield _users(taken, rate)
        yield _rounds(taken, rate)
        return
    sizes = {len(harness.simulation.sample(harness.round(index))) for index in range(3)}
    found = f"{min(sizes):,} to {max(sizes):,} of {population:,} in a round"
    expected = "all of them, as accounted"
    yield CheckResult("everybody takes part", sizes == {population}, found, expected)


def _taken(harness: Harness) -> NDArray[np.bool_]:
    """Who was drawn in each of many rounds, shape ``(rounds, population)``."""
    population = harness.simulation.population
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, COINS // population))
    taken = np.zeros((rounds, population), np.bool_)
    for index in range(rounds):
        taken[index, harness.simulation.sample(harness.round(index))] = True
    return taken


def _sizes(taken: NDArray[np.bool_], rate: float) -> CheckResult:
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


def _users(taken: NDArray[np.bool_], rate: float) -> CheckResult:
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


def _rounds(taken: NDArray[np.bool_], rate: float) -> CheckResult:
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


def _bernstein(sums: NDArray[np.float64], terms: int, rate: float) -> float:
    """Bound on the probability of any of these sums of products of centred coins (Bernstein)."""
    variance = terms * (rate * (1 - rate)) ** 2
    largest = max(rate, 1 - rate) ** 2
    most = float(np.abs(sums).max(initial=0.0))
    exponent = most**2 / (2 * (variance + largest * most / 3))
    return float(np.minimum(1.0, 2 * len(sums) * math.exp(-exponent)))
