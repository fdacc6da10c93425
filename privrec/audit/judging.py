"""Tests with a stated chance of a false alarm, and what one of them found."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

ALPHA = 1e-8
"""Chance of each test to fail on an honest build; with fewer than 100 tests, 1e-6 of any to."""
POWER = 0.99
"""Chance to see the smallest deviation that a test is said to see."""
REACH = float(stats.norm.isf(ALPHA / 2) + stats.norm.ppf(POWER))
"""Standard errors between what is right and the smallest deviation that is seen."""


@dataclass(frozen=True)
class CheckResult:
    """What one probe found.

    Args:
        probe: what was looked at.
        passed: whether it is as accounted.
        found: the measured figure, in words.
        expected: what it has to be, in words, and how small a deviation is seen.
    """

    probe: str
    passed: bool
    found: str
    expected: str


def judged(probe: str, p_value: float, found: str, expected: str) -> CheckResult:
    """A finding that passes unless what was found has a probability below :data:`ALPHA`."""
    return CheckResult(probe, bool(p_value >= ALPHA), found, expected)


def of_many(p_values: float | Floats) -> float:
    """The smallest of several, corrected for how many there are (Bonferroni)."""
    values = np.ravel(p_values)
    return min(1.0, float(values.min(initial=1.0)) * max(1, len(values)))


def two_sided(z: float | Floats) -> Floats:
    """Probability of a deviation of at least ``|z|`` standard errors."""
    return np.asarray(2 * stats.norm.sf(np.abs(z)))


def variance_p(ratio: float | Floats, freedom: float) -> Floats:
    """Probability that the variance of Gaussian draws is off by that ratio or more, two-sided.

    Args:
        ratio: mean square over the expected variance.
        freedom: number of draws.
    """
    at = np.asarray(ratio) * freedom
    low, high = stats.chi2.cdf(at, freedom), stats.chi2.sf(at, freedom)
    return np.asarray(np.minimum(1.0, 2 * np.minimum(low, high)))


def seen_deviation(freedom: float) -> float:
    """The smallest relative error of a standard deviation that :func:`variance_p` sees."""
    return REACH * math.sqrt(1 / (2 * freedom))


def distance_p(distance: float, draws: int) -> float:
    """Probability that an empirical distribution is that far from the true one (DKW, Massart)."""
    return min(1.0, 2 * math.exp(-2 * draws * distance**2))


def product_p(sums: Floats, terms: int) -> Floats:
    """Probability that a sum of products of independent standard normals is that large.

    Chernoff's bound with ``E exp(λ x y) = (1 - λ²)^(-1/2)``, which holds for any number of terms.

    Args:
        sums: of ``terms`` products each.
        terms: how many.
    """
    size = np.maximum(np.abs(sums), 1e-12)
    best = (np.sqrt(terms**2 + 4 * size**2) - terms) / (2 * size)
    exponent = -best * size - terms / 2 * np.log1p(-(best**2))
    return np.asarray(np.minimum(1.0, 2 * np.exp(exponent)))


def count_p(count: int, trials: int, chance: float) -> float:
    """Two-sided probability of a binomial count."""
    low = float(stats.binom.cdf(count, trials, chance))
    high = float(stats.binom.sf(count - 1, trials, chance))
    return min(1.0, 2 * min(low, high))
