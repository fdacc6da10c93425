"""Probes of the sampling: every user by its own coin, in every round anew."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from privrec.audit.bench import Harness
from privrec.audit.judging import CheckResult, judged, of_many, two_sided

COINS = 40_000_000
MOST_ROUNDS, FEWEST_ROUNDS = 400, 60


def probe(bench: Harness) -> Iterator[CheckResult]:
    """All probes of who takes part; where everybody does, that they do."""
    rate = bench.event.sampling_rate
    if rate >= 1:
        yield _everybody(bench)
        return
    taken = _taken(bench)
    yield _sizes(taken, rate)
    yield _users(taken, rate)
    yield _rounds(taken, rate)


def _everybody(bench: Harness) -> CheckResult:
    population = bench.simulation.population
    sizes = {len(bench.simulation.sample(bench.round(index))) for index in range(3)}
    return CheckResult(
        "everybody takes part",
        sizes == {population},
        f"{sizes.pop():,} of {population:,}"
        if len(sizes) == 1
        else f"between {min(sizes):,} and {max(sizes):,} of {population:,}",
        "all of them, as accounted",
    )


def _taken(bench: Harness) -> NDArray[np.bool_]:
    """Who was drawn in each of many rounds, shape ``(rounds, population)``."""
    population = bench.simulation.population
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, COINS // population))
    taken = np.zeros((rounds, population), np.bool_)
    for index in range(rounds):
        taken[index, bench.simulation.sample(bench.round(index))] = True
    return taken


def _sizes(taken: NDArray[np.bool_], rate: float) -> CheckResult:
    """Sizes of cohorts are binomial: their mean, and above all their spread."""
    rounds, population = taken.shape
    sizes = taken.sum(axis=1)
    mean, variance = population * rate, population * rate * (1 - rate)
    squares = float(((sizes - mean) ** 2).sum() / variance)
    # A binomial count has a little excess kurtosis, which matters for small cohorts only.
    spread = _dispersion_p(squares, rounds, _excess(population, rate))
    shift = float(two_sided((sizes.mean() - mean) / math.sqrt(variance / rounds)))
    return judged(
        "sizes of cohorts",
        of_many(np.array([spread, shift])),
        f"mean {sizes.mean():,.1f}, variance {sizes.var():,.1f} over {rounds:,} rounds",
        f"binomial: mean {mean:,.1f}, variance {variance:,.1f}; a fixed size has none",
    )


def _users(taken: NDArray[np.bool_], rate: float) -> CheckResult:
    """Every user is as likely as any other, and neighbours are drawn apart."""
    rounds, population = taken.shape
    variance = rate * (1 - rate)
    counts = taken.sum(axis=0)
    squares = float(((counts - rounds * rate) ** 2).sum() / (rounds * variance))
    spread = _dispersion_p(squares, population, _excess(rounds, rate))
    extremes = of_many(
        np.minimum(
            1.0,
            2
            * np.minimum(
                stats.binom.cdf(counts, rounds, rate), stats.binom.sf(counts - 1, rounds, rate)
            ),
        )
    )
    centred = taken - rate
    together = float((centred[:, 1:] * centred[:, :-1]).sum())
    pairs = rounds * max(1, population - 1)
    correlation = together / (variance * pairs)
    neighbours = float(two_sided(correlation * math.sqrt(pairs)))
    return judged(
        "chances of users",
        of_many(np.array([spread, extremes, neighbours])),
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
    p_values = np.array([_bernstein(overlaps, population, rate), float(two_sided(whole))])
    return judged(
        "cohorts of different rounds",
        of_many(p_values),
        f"largest overlap {largest:.1f} standard errors from chance in {len(z):,} pairs",
        "independent",
    )


def _excess(trials: int, rate: float) -> float:
    """Excess kurtosis of a binomial count."""
    variance = rate * (1 - rate)
    return (1 - 6 * variance) / (trials * variance)


def _dispersion_p(squares: float, freedom: int, excess: float) -> float:
    """Two-sided probability of a sum of squared standardised counts.

    A gamma of the right mean and variance; the chi-square where counts are as good as Gaussian.
    """
    scale = 1 + excess / 2
    shape = freedom / (2 * scale)
    law = stats.gamma(shape, scale=2 * scale)
    return min(1.0, 2 * float(min(law.cdf(squares), law.sf(squares))))


def _bernstein(sums: NDArray[np.float64], terms: int, rate: float) -> float:
    """Bound on the probability of any of these sums of products of centred coins (Bernstein)."""
    variance = terms * (rate * (1 - rate)) ** 2
    largest = max(rate, 1 - rate) ** 2
    most = float(np.abs(sums).max(initial=0.0))
    exponent = most**2 / (2 * (variance + largest * most / 3))
    return min(1.0, 2 * len(sums) * math.exp(-exponent))
