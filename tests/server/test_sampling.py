"""Who takes part: independent coins, of the accounted rate, and never drawn again."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from privrec.randomness import SecretRoot
from privrec.run.simulation import cohort

LEVEL = 1e-4  # of each test; the draws are seeded, so that a pass is a pass for good
ROUNDS, USERS, RATE = 3000, 200, 0.1


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """Participation by round and user."""
    marks = np.zeros((ROUNDS, USERS), bool)
    for index in range(ROUNDS):
        marks[index, cohort(coins(index, USERS), RATE)] = True
    return marks


def coins(index: int, users: int) -> np.ndarray:
    return SecretRoot.known(b"coins").stream("cohort", index).uint64(users)


def sizes_fit(sizes: np.ndarray, rate: float) -> bool:
    """Mean, variance and shape of a binomial."""
    mean, variance = USERS * rate, USERS * rate * (1 - rate)
    z = (sizes.mean() - mean) / np.sqrt(variance / len(sizes))
    ratio = ((sizes - mean) ** 2).sum() / variance
    spread = LEVEL / 2 < stats.chi2.cdf(ratio, len(sizes)) < 1 - LEVEL / 2
    return bool(abs(z) < stats.norm.isf(LEVEL / 2) and spread)


@pytest.mark.statistical
def test_sizes_are_binomial(drawn: np.ndarray) -> None:
    sizes = drawn.sum(1)
    assert sizes_fit(sizes, RATE)
    assert not sizes_fit(sizes, RATE * 1.05)
    assert not sizes_fit(np.full(ROUNDS, round(USERS * RATE)), RATE)  # a fixed size is another law
    assert not sizes_fit(2 * sizes[: ROUNDS // 2], RATE * 2)


@pytest.mark.statistical
def test_every_user_has_the_rate(drawn: np.ndarray) -> None:
    counts = drawn.sum(0)
    expected = stats.binom(ROUNDS, RATE)
    assert expected.cdf(counts.min()) > LEVEL / USERS
    assert expected.sf(counts.max()) > LEVEL / USERS
    ratio = ((counts - ROUNDS * RATE) ** 2).sum() / (ROUNDS * RATE * (1 - RATE))
    assert LEVEL < stats.chi2.cdf(ratio, USERS) < 1 - LEVEL


@pytest.mark.statistical
def test_users_and_rounds_are_independent(drawn: np.ndarray) -> None:
    correlations = np.corrcoef(drawn[:, :60].T)[np.triu_indices(60, 1)] * np.sqrt(ROUNDS)
    assert stats.kstest(correlations, "norm").pvalue > LEVEL
    both = np.count_nonzero(drawn[1:] & drawn[:-1])
    assert stats.binomtest(both, (ROUNDS - 1) * USERS, RATE**2).pvalue > LEVEL


def test_a_coin_below_the_rate_is_in() -> None:
    words = np.array([0, 2**62 - 1, 2**62, 2**64 - 1], np.uint64)
    assert cohort(words, 0.25).tolist() == [0, 1]
    assert cohort(words, 1 - 2**-53).tolist() == [0, 1, 2]
    assert cohort(words, 2**-70).tolist() == []


def test_a_cohort_may_be_empty() -> None:
    sizes = [len(cohort(coins(index, 5), 0.1)) for index in range(100)]
    assert 0 in sizes
    assert max(sizes) > 0


def test_everybody_takes_part_at_a_rate_of_one() -> None:
    for index in range(3):
        assert np.array_equal(cohort(coins(index, 50), 1.0), np.arange(50))
