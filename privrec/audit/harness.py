"""The parts of a run on stand-in histories, for an audit to drive, and how a probe judges them.

Everything but the histories is what a run of the scenario has: the same assembly, devices, server,
noise and roots of the same kind. Histories are made up, so an audit says nothing of anybody's data.
What a probe measures is judged by tests with a stated chance of a false alarm.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from privrec.data import Interactions
from privrec.device.tier import Tier
from privrec.device.update import Aggregate, Protection, Round
from privrec.errors import ReleaseRefused, UsageError
from privrec.models.layout import band_sizes, to_wire
from privrec.privacy.events import Accountant, Adversary, RoundEvent, epsilon
from privrec.randomness import ROOT_BYTES, SecretRoot
from privrec.report.model import Checked
from privrec.run.parties import server_of, simulation_of
from privrec.run.plan import Plan
from privrec.run.privacy_plan import known_items
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

Noise: TypeAlias = list[tuple[Integers, float]]
"""What one release adds to the sum in each band, the band that every device holds first, and the
deviation that is expected of it."""


@dataclass(frozen=True)
class Harness:
    """The parts of a run of ``scenario`` that one audit drives, with stand-in histories.

    ``root`` is the server's secret, and ``stand_ins`` says which numbers were made up, if any.
    """

    scenario: Scenario
    plan: Plan
    server: Server
    simulation: Simulation
    root: SecretRoot
    stand_ins: str

    @classmethod
    def of(cls, scenario: Scenario, key: bytes | None = None) -> Harness:
        """Assemble them; ``key``, and what is refused, are those of :func:`privrec.audit.audit`."""
        if TASKS[scenario.model.learns] is not Recommending:
            raise UsageError(
                f'model.kind = "{scenario.model.kind}": it learns from texts or labels; an audit '
                "is for recommenders of items alone"
            )
        key = key or secrets.token_bytes(ROOT_BYTES)
        server, devices = SecretRoot(key + b"server"), SecretRoot(key + b"devices")
        users, items = scenario.population(), known_items(scenario)
        made_up = [f"{STAND_IN_USERS:,} users"] if users is None else []
        made_up += [f"{STAND_IN_ITEMS:,} items"] if items is None else []
        histories = stand_in(users or STAND_IN_USERS, items or STAND_IN_ITEMS)
        run = "audit-" + devices.tag("audit run").hex()[:16]
        plan = Plan.of(scenario, histories.n_items, histories.n_users)
        simulation = simulation_of(plan, histories, devices)
        return cls(scenario, plan, server_of(plan, run), simulation, server, " and ".join(made_up))

    @property
    def training(self) -> tuple[Tier, ...]:
        """Tiers whose devices train."""
        held = zip(self.plan.federation.tiers, self.simulation.cohorts, strict=True)
        return tuple(t for t, cohort in held if t.weight > 0 and len(cohort.users))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Coefficients of each band, the band that every device holds first."""
        return band_sizes(self.plan.federation.layouts)

    @property
    def event(self) -> RoundEvent:
        """What noise in sums is accounted as: that of users or, in shares, of interactions."""
        examples = self.plan.examples
        return examples if self.of_examples and examples else self.plan.event

    @property
    def of_examples(self) -> bool:
        """Whether noise in sums hides single interactions, and not users."""
        return self.scenario.privacy.local == "shares"

    @property
    def squared_sensitivity(self) -> int:
        """What devices keep to: most that a user, or an interaction, moves the sum, squared."""
        if self.of_examples:
            reach: int = self.simulation.cohorts[0].learner.examples.reach
            return (2 * reach) ** 2
        return self.plan.protection.encoding.squared_bound

    def epsilon(self, against: Adversary, accountant: Accountant = "pld") -> float:
        """ε of the planned rounds and of what is released beside them."""
        counts, privacy = Counter({self.event: self.scenario.train.rounds}), self.scenario.privacy
        if self.of_examples:
            return epsilon(counts, privacy.local_delta, "server", accountant)
        counts.update(self.plan.beside)
        return epsilon(counts, privacy.delta, against, accountant)

    def round(self, index: int, attempt: int = 0) -> Round:
        """A round as the server announces it."""
        self.server.index = index
        return self.server.next_round(attempt)

    def summing(self, round: Round, protection: Protection, cohort: list[Participant]) -> Summing:
        """A plain sum of that cohort."""
        layouts, enrolled = self.plan.federation.layouts, self.simulation.enrolled
        return SUMMING["exact"](round, layouts, protection, cohort, enrolled)

    def named(self, rows: Rows) -> list[Participant]:
        """Devices of each tier by their rows."""
        tiers, cohorts = self.plan.federation.tiers, self.simulation.cohorts
        return [
            Participant(user, tier.index)
            for tier, cohort, mine in zip(tiers, cohorts, rows, strict=True)
            for user in cohort.users[mine].tolist()
        ]

    def some(self, most: int) -> Rows:
        """Rows of each tier that trains, about ``most`` users in all, spread over all of them."""
        trains, cohorts = {tier.index for tier in self.training}, self.simulation.cohorts
        sizes = [len(each.users) if n in trains else 0 for n, each in enumerate(cohorts)]
        step = max(1, sum(sizes) // max(1, most))
        return [np.arange(0, size, step) for size in sizes]

    def released(self, round: Round, change: int = 0) -> Noise | None:
        """What one release adds to the plain sum; None when the round ends without one.

        ``change`` is added to the first coefficient of the sum, to make another input of it.
        """
        total = plain = np.zeros(self.plan.federation.layout.size, np.int64)
        plain[0], cohort = change, []
        if self.plan.protection.shares is not None:
            cohort = self.named(self.simulation.rows(self.simulation.sample(round)))
            try:
                total = plain + self.summing(round, self.plan.protection, cohort).total()
            except ReleaseRefused:
                return None  # too few devices came together: charged, and nothing was released
        release = self.server.release(round, Aggregate(total, len(cohort), None), self.root)
        values = to_wire(release.total - plain, self.plan.federation.layouts)
        bands = np.split(values, np.cumsum(self.sizes)[:-1])
        return list(zip(bands, self._deviations(cohort), strict=True))

    def _deviations(self, cohort: list[Participant]) -> list[float]:
        """Expected deviation of the released noise by band, worked out from the event anew."""
        shares, z = self.plan.protection.shares, self.event.noise_multiplier
        accounted = z**2 * self.squared_sensitivity
        if shares is None:
            return [accounted**0.5] * len(self.sizes)
        held = [len(self.sizes) - each.tier for each in cohort]
        holders = [sum(bands > number for bands in held) for number in range(len(self.sizes))]
        return [
            (accounted * (b.least if shares.remove_excess else n) / (b.least - b.colluders)) ** 0.5
            for b, n in zip(shares.bands, holders, strict=True)
        ]


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


def checked(probe: str, passed: bool, found: str, expected: str) -> Checked:
    """What one probe found; ``expected`` also says how small a deviation is seen."""
    return Checked(probe=probe, passed=passed, found=found, expected=expected)


def judged(
    probe: str, p_values: float | Sequence[float] | Floats, found: str, expected: str
) -> Checked:
    """A finding that fails when the smallest probability, see :func:`of_many`, is below ALPHA."""
    return checked(probe, bool(of_many(p_values) >= ALPHA), found, expected)


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
    return _two_tails(stats.chi2.cdf(at, freedom), stats.chi2.sf(at, freedom))


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
    return _two_tails(low, high)


def _two_tails(low: float | Floats, high: float | Floats) -> Floats:
    return np.asarray(np.minimum(1.0, 2 * np.minimum(low, high)))
