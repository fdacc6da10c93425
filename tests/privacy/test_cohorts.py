"""Small cohorts: the claim by enumeration, the sum, and the refusals."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from privrec.errors import UsageError
from privrec.privacy.discrete import check_small_cohorts, small_cohort_delta
from privrec.privacy.events import RoundEvent, epsilon


def outcomes(others, least, rate, moved, sigma):
    """The law of a round: a grid of sums, and last no release; all coins enumerated."""
    x = np.linspace(-12 * sigma, 12 * sigma + 1, 4001)
    found = np.zeros(len(x) + 1)
    for coins in product((0, 1), repeat=others + 1):
        chance = math.prod(rate if coin else 1 - rate for coin in coins)
        if sum(coins) < least:
            found[-1] += chance
        else:
            density = stats.norm.pdf(x, moved if coins[0] else 0, sigma)
            found[:-1] += chance * density / density.sum()
    return found


@pytest.mark.parametrize(
    ("others", "least", "rate", "sigma"),
    [(3, 2, 0.3, 0.8), (5, 2, 0.2, 1.5), (2, 3, 0.5, 1.0), (4, 1, 0.1, 0.7), (3, 4, 0.8, 1.0)],
)
def test_the_claim_by_enumeration(others, least, rate, sigma):
    with_user, without = (outcomes(others, least, rate, moved, sigma) for moved in (1, 0))
    assert with_user[-1] == pytest.approx(without[-1])
    crowds = [(others + 1, least)]
    added = small_cohort_delta(crowds, rate, 1)
    delta = 1e-3
    found = epsilon([RoundEvent("gaussian", sigma, rate)], delta, "recipients")
    exact = [
        np.maximum(one - math.exp(found) * two, 0).sum()
        for one, two in ((with_user, without), (without, with_user))
    ]
    assert max(exact) <= delta + added


def test_without_the_addition_the_claim_is_false():
    with_user, without = (outcomes(2, 2, 0.1, moved, 2.0) for moved in (1, 0))
    found = epsilon([RoundEvent("gaussian", 2.0, 0.1)], 1e-6, "recipients")
    exact = np.maximum(with_user - math.exp(found) * without, 0).sum()
    assert exact > 500e-6
    assert exact <= 1e-6 + small_cohort_delta([(3, 2)], 0.1, 1)


def test_is_the_binomial_tail_of_all_bands():
    crowds = [(600, 40), (300, 15), (100, 3)]
    tails = [stats.binom.cdf(least - 1, population, 0.1) for population, least in crowds]
    assert small_cohort_delta(crowds, 0.1, 1) == pytest.approx(sum(tails), rel=1e-9)
    assert small_cohort_delta(crowds, 0.1, 50) == pytest.approx(50 * sum(tails), rel=1e-9)
    assert small_cohort_delta(crowds, 0.1, 10**9) == 1
    assert small_cohort_delta(crowds, 0.1, 0) == 0


def test_far_tails_keep_their_digits():
    found = small_cohort_delta([(100_000, 500)], 0.01, 1)
    assert found == pytest.approx(stats.binom.cdf(499, 100_000, 0.01), rel=1e-6)
    assert 0 < found < 1e-60


def test_above_one_half_the_odds_count():
    for rate, odds in ((0.75, 3), (0.5, 1)):
        tail = stats.binom.cdf(29, 50, rate)
        assert small_cohort_delta([(50, 30)], rate, 1) == pytest.approx(odds * tail, rel=1e-9)


def test_with_everybody_nothing_is_secret_about_sampling():
    assert small_cohort_delta([(50, 50)], 1.0, 100) == 0
    assert small_cohort_delta([(50, 51)], 0.5, 1) == 1  # it never releases at all


def test_what_one_round_takes_of_delta():
    crowds = [(6000, 203)]
    taken = small_cohort_delta(crowds, 0.05, 100)
    assert 1e-8 < taken < 1e-7
    each = check_small_cohorts(crowds, 0.05, 100, 1e-5)
    assert each == small_cohort_delta(crowds, 0.05, 1) == pytest.approx(taken / 100)


def test_more_than_a_hundredth_of_delta_is_refused():
    with pytest.raises(UsageError, match=r"6000 devices.*least, 240,.*raise the sampling rate"):
        check_small_cohorts([(6000, 240), (9000, 10)], 0.05, 100, 1e-5)
    limit = small_cohort_delta([(6000, 200)], 0.05, 10) * 100
    check_small_cohorts([(6000, 200)], 0.05, 10, limit * 1.001)
    with pytest.raises(UsageError, match="more than a hundredth"):
        check_small_cohorts([(6000, 200)], 0.05, 10, limit * 0.999)


def test_a_band_that_can_never_release_is_refused():
    with pytest.raises(UsageError, match="10 devices that needs 20"):
        check_small_cohorts([(10, 20)], 1.0, 1, 1e-5)
