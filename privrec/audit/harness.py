"""The parts of a run on stand-in histories, for an audit to drive, and how a probe judges them.

Everything but the histories is what a run of the scenario has: the same assembly, devices, server,
noise and roots of the same kind. Histories are made up, so an audit says nothing of anybody's data.
What a probe measures is judged by tests with a stated chance of a false alarm.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from privrec.data import Interactions
from privrec.device.tier import Federation, Tier
from privrec.device.update import Aggregate, Protection, Round
from privrec.errors import ReleaseRefused, UsageError
from privrec.models.layout import to_wire
from privrec.privacy.events import RoundEvent, epsilon
from privrec.randomness import ROOT_BYTES, SecretRoot
from privrec.run.plan import Plan
from privrec.run.privacy_plan import known_items, release_event
from privrec.run.simulation import SUMMING, Participant, Rows, Simulation, Summing
from privrec.run.task import TASKS, Recommending
from privrec.scenario.load import Scenario
from privrec.server.server import Server

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

STAND_IN_USERS = 1000
STAND_IN_ITEMS = 1000
_HISTORY = 6
_STRIDE = 7919  # a prime, so that no user has an item twice


@dataclass(frozen=True)
class Noise:
    """The noise that one release carries, in the order of the wire.

    Attributes:
        values: what was released less the sum without noise.
        deviations: what is expected of each band, the band that every device holds first.
    """

    values: Integers
    deviations: tuple[float, ...]


@dataclass(frozen=True)
class Harness:
    """The parts of a run of ``scenario`` that one audit drives.

    Attributes:
        simulation: the devices, with stand-in histories.
        root: the server's secret, drawn for this audit.
        stand_ins: numbers that are not public and were made up, in words; empty when none was.
    """

    scenario: Scenario
    plan: Plan
    server: Server
    simulation: Simulation
    root: SecretRoot
    stand_ins: str

    @classmethod
    def of(cls, scenario: Scenario, key: bytes | None = None) -> Harness:
        """The parts of a run of ``scenario``.

        Args:
            key: what all secrets of the audit derive from, for tests that repeat; by default the
                operating system gives one.

        Raises:
            UsageError: when it learns from something else than interactions.
        """
        if TASKS[scenario.model.learns] is not Recommending:
            raise UsageError(
                f'model.kind = "{scenario.model.kind}": it learns from texts or labels; an audit '
                "is for recommenders of items alone"
            )
        key = key or secrets.token_bytes(ROOT_BYTES)
        server, devices = SecretRoot(key + b"server"), SecretRoot(key + b"devices")
        users, items, made_up = scenario.population(), known_items(scenario), []
        if users is None:
            made_up.append(f"{STAND_IN_USERS:,} users")
        if items is None:
            made_up.append(f"{STAND_IN_ITEMS:,} items")
        histories = stand_in(users or STAND_IN_USERS, items or STAND_IN_ITEMS)
        run = "audit-" + devices.tag("audit run").hex()[:16]
        plan = Plan.of(scenario, histories.n_items, histories.n_users)
        simulation = plan.simulate(histories, devices)
        return cls(scenario, plan, plan.server(run), simulation, server, " and ".join(made_up))

    @property
    def federation(self) -> Federation:
        """The tiers."""
        return self.plan.federation

    @property
    def protection(self) -> Protection:
        """Bounds, ring and noise, as server and devices agreed on them."""
        return self.plan.protection

    @property
    def event(self) -> RoundEvent:
        """What each round is charged as."""
        return self.plan.event

    @property
    def training(self) -> tuple[Tier, ...]:
        """Tiers whose devices train."""
        held = zip(self.federation.tiers, self.simulation.cohorts, strict=True)
        return tuple(t for t, cohort in held if t.weight > 0 and len(cohort.users))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Coefficients of each band, the band that every device holds first."""
        ends = [layout.size for layout in reversed(self.federation.layouts)]
        return tuple(np.diff(ends, prepend=0).tolist())

    def epsilon(self, against: str, accountant: str = "pld") -> float:
        """ε of the planned rounds and of what is released before them."""
        counts = {self.event: self.scenario.train.rounds}
        before = release_event(self.scenario)
        if before is not None:
            counts[before] = counts.get(before, 0) + 1
        return epsilon(counts, self.scenario.privacy.delta, against, accountant)  # type: ignore[arg-type]

    def round(self, index: int, attempt: int = 0) -> Round:
        """A round as the server announces it."""
        server = self.server
        server.index = index
        return server.next_round(attempt)

    def summing(self, round: Round, protection: Protection, cohort: list[Participant]) -> Summing:
        """A plain sum of that cohort."""
        enrolled = self.simulation.enrolled
        return SUMMING["exact"](round, self.federation, protection, cohort, enrolled)

    def named(self, rows: Rows) -> list[Participant]:
        """Devices of each tier by their rows."""
        tiers, cohorts = self.federation.tiers, self.simulation.cohorts
        return [
            Participant(user, tier)
            for tier, cohort, mine in zip(tiers, cohorts, rows, strict=True)
            for user in cohort.users[mine].tolist()
        ]

    def some(self, most: int) -> Rows:
        """Rows of each tier that trains, about ``most`` users in all, spread over all of them."""
        training = self.training
        population = sum(len(self.simulation.cohorts[tier.index].users) for tier in training)
        step = max(1, population // max(1, most))
        return [
            np.arange(0, len(cohort.users) if tier in training else 0, step)
            for tier, cohort in zip(self.federation.tiers, self.simulation.cohorts, strict=True)
        ]

    def released(self, round: Round, change: int = 0) -> Noise | None:
        """What one release adds to the plain sum; None when the round ends without one.

        ``change`` is added to the first coefficient of the sum, to make another input of it.
        """
        plain = np.zeros(self.federation.layout.size, np.int64)
        plain[0] = change
        shares, cohort = self.protection.shares, []
        total = plain
        if shares is not None:
            cohort = self.named(self.simulation.rows(self.simulation.sample(round)))
            try:
                total = plain + self.summing(round, self.protection, cohort).total()
            except ReleaseRefused:
                return None  # too few devices came together: charged, and nothing was released
        release = self.server.release(round, Aggregate(total, len(cohort), None), self.root)
        values = to_wire(release.total - plain, self.federation.layouts)
        return Noise(values, self.deviations(cohort))

    def deviations(self, cohort: list[Participant]) -> tuple[float, ...]:
        """Expected deviation of the released noise by band, worked out from the event anew."""
        protection, z = self.protection, self.event.noise_multiplier
        accounted = z**2 * protection.encoding.squared_bound
        if protection.shares is None:
            return (accounted**0.5,) * len(self.sizes)
        found = []
        for number, band in enumerate(protection.shares.bands):
            holders = sum(len(self.sizes) - each.tier.index > number for each in cohort)
            left = band.least if protection.shares.remove_excess else holders
            found.append((accounted * left / (band.least - band.colluders)) ** 0.5)
        return tuple(found)

    def band(self, wire: Integers, number: int) -> Integers:
        """One band of a vector in the order of the wire."""
        start = sum(self.sizes[:number])
        return wire[start : start + self.sizes[number]]


def stand_in(users: int, items: int) -> Interactions:
    """Made-up histories of a few items each, every item about as often as any other."""
    length = min(_HISTORY, items)
    stride = _STRIDE if items % _STRIDE else 1
    spread = np.arange(users)[:, None] * length + stride * np.arange(length)
    names = np.arange(users), np.arange(items)
    indptr = np.arange(users + 1, dtype=np.int64) * length
    return Interactions(indptr, (spread % items).ravel().astype(np.int32), None, *names)


# ------------------------------------------------------------------------------- statistical tests

ALPHA = 1e-8
"""Chance of each test to fail on an honest build; with fewer than 100 tests, 1e-6 of any to."""
POWER = 0.99
"""Chance to see the smallest deviation that a test is said to see."""
REACH = float(stats.norm.isf(ALPHA / 2) + stats.norm.ppf(POWER))
"""Standard errors between what is right and the smallest deviation that is seen."""


@dataclass(frozen=True)
class CheckResult:
    """What one probe found: whether it is as accounted, in words.

    Attributes:
        expected: what was to be found, and how small a deviation is seen.
    """

    probe: str
    passed: bool
    found: str
    expected: str


def judged(
    probe: str, p_values: float | Sequence[float] | Floats, found: str, expected: str
) -> CheckResult:
    """A finding that fails when the smallest probability, see :func:`of_many`, is below ALPHA."""
    return CheckResult(probe, bool(of_many(p_values) >= ALPHA), found, expected)


def of_many(p_values: float | Sequence[float] | Floats) -> float:
    """The smallest of several, corrected for how many there are (Bonferroni); NaN if one is."""
    values = np.ravel(p_values)
    return float(np.minimum(1.0, values.min(initial=1.0) * max(1, len(values))))


def two_sided(z: float | Floats) -> Floats:
    """Probability of a deviation of at least ``|z|`` standard errors."""
    return np.asarray(2 * stats.norm.sf(np.abs(z)))


def variance_p(ratio: float | Floats, freedom: float) -> Floats:
    """Two-sided probability of a mean square over the expected one, of ``freedom`` Gaussians."""
    at = np.asarray(ratio) * freedom
    low, high = stats.chi2.cdf(at, freedom), stats.chi2.sf(at, freedom)
    return np.asarray(np.minimum(1.0, 2 * np.minimum(low, high)))


def seen_deviation(freedom: float) -> float:
    """The smallest relative error of a standard deviation that :func:`variance_p` sees."""
    return REACH * math.sqrt(1 / (2 * freedom))


def distance_p(distance: float, draws: int) -> float:
    """Probability that an empirical distribution is that far from the true one (DKW, Massart)."""
    return float(np.minimum(1.0, 2 * math.exp(-2 * draws * distance**2)))


def product_p(sums: Floats, terms: int) -> Floats:
    """Probability that sums of ``terms`` products of independent standard normals are that large.

    Chernoff's bound with ``E exp(λ x y) = (1 - λ²)^(-1/2)``, which holds for any number of terms.
    """
    size = np.maximum(np.abs(sums), 1e-12)
    best = (np.sqrt(terms**2 + 4 * size**2) - terms) / (2 * size)
    exponent = -best * size - terms / 2 * np.log1p(-(best**2))
    return np.asarray(np.minimum(1.0, 2 * np.exp(exponent)))


def count_p(count: int | Integers, trials: int, chance: float) -> Floats:
    """Two-sided probability of binomial counts."""
    low, high = stats.binom.cdf(count, trials, chance), stats.binom.sf(count - 1, trials, chance)
    return np.asarray(np.minimum(1.0, 2 * np.minimum(low, high)))
