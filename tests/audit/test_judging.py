"""The tests of the audit fail as rarely as they say, and see what they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from privrec.audit.harness import (
    ALPHA,
    POWER,
    count_p,
    distance_p,
    judged,
    of_many,
    product_p,
    seen_deviation,
    two_sided,
    variance_p,
)


@pytest.mark.statistical
def test_p_values_of_honest_draws_are_not_too_small() -> None:
    rng = np.random.default_rng(5)
    draws = rng.normal(size=(4000, 64))
    others = rng.normal(size=(4000, 64))
    for p_values in (
        variance_p((draws**2).mean(axis=1), 64),
        two_sided(draws.sum(axis=1) / 8),
        product_p((draws * others).sum(axis=1), 64),
    ):
        for level in (0.1, 0.01):
            assert (p_values < level).mean() < level + 4 * np.sqrt(level / 4000)


def test_the_deviation_that_is_said_to_be_seen_is_seen() -> None:
    draws = 400_000
    quiet = (1 - seen_deviation(draws)) ** 2
    # The mean square of quiet draws is quiet times a chi-square over its freedom.
    threshold = stats.chi2.ppf(ALPHA / 2, draws) / draws
    assert stats.chi2.cdf(threshold / quiet * draws, draws) == pytest.approx(POWER, abs=0.003)
    assert float(variance_p(threshold * 0.9999, draws)) < ALPHA < float(variance_p(1.0, draws))
    assert seen_deviation(draws) < 0.01


@pytest.mark.parametrize("terms", [1, 4, 16, 500])
def test_the_bound_on_products_holds(terms: int) -> None:
    rng = np.random.default_rng(11)
    sums = sum(rng.normal(size=200_000) * rng.normal(size=200_000) for _ in range(terms))
    for size in np.quantile(np.abs(sums), [0.9, 0.99, 0.999]):
        assert (np.abs(sums) >= size).mean() <= float(product_p(np.array(size), terms))
    assert float(product_p(np.array(500.0), 500)) < ALPHA
    assert float(product_p(np.array(0.0), terms)) == 1.0


def test_counts_and_distances() -> None:
    assert count_p(0, 1000, 0.5) < ALPHA
    assert count_p(500, 1000, 0.5) == 1.0
    assert distance_p(0.1, 10_000) < ALPHA
    assert distance_p(0.001, 100) == 1.0


def test_many_p_values_are_corrected_for_their_number() -> None:
    assert of_many(np.array([0.5, 1e-4, 0.2])) == pytest.approx(3e-4)
    assert of_many(np.array([0.9, 0.8])) == 1.0
    assert of_many(np.zeros(0)) == 1.0


@pytest.mark.parametrize(("p_value", "passed"), [(ALPHA * 1.01, True), (ALPHA * 0.99, False)])
def test_a_finding_passes_from_the_level_on(p_value: float, passed: bool) -> None:
    assert judged("it", p_value, "this", "that").passed is passed


@pytest.mark.parametrize("p_values", [np.nan, [0.5, np.nan], [np.nan, 0.5]])
def test_a_finding_that_is_no_number_fails(p_values: float | list[float]) -> None:
    assert not judged("it", p_values, "this", "that").passed
    assert not judged("it", [distance_p(np.nan, 10), 0.5], "this", "that").passed
