"""Lower bounds on ε from guesses: against simulated mechanisms, by theorem and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from privrec.audit.canaries import Guesses, apart, best_guesses, separation
from privrec.audit.harness import ALPHA
from privrec.errors import UsageError
from privrec.privacy.accountant import gaussian


def test_a_p_value_without_delta_is_that_of_a_binomial() -> None:
    guesses = Guesses(canaries=100, made=40, right=31)
    for epsilon in (0.0, 0.5, 2.0):
        chance = math.exp(epsilon) / (1 + math.exp(epsilon))
        expected = stats.binom.sf(30, 40, chance)
        assert guesses.p_value(epsilon, 0.0) == pytest.approx(expected, rel=1e-9)


def test_delta_adds_the_worst_of_all_ways_to_use_it() -> None:
    guesses = Guesses(canaries=50, made=10, right=9)
    chance = 1 / (1 + math.exp(-1.0))
    masses = [float(stats.binom.pmf(k, 10, chance)) for k in range(11)]
    alpha = max(sum(masses[9 - i : 9]) / i for i in range(1, 10))
    expected = sum(masses[9:]) + 2 * 50 * 1e-3 * alpha
    assert guesses.p_value(1.0, 1e-3) == pytest.approx(expected, rel=1e-9)


def test_all_right_bounds_epsilon_by_the_odds() -> None:
    # 0.05 = q^r, so q = 0.05^(1/r) and ε = log(q / (1 - q)).
    q = 0.05 ** (1 / 100)
    bound = Guesses(100, 100, 100).lower_bound(0.0, 0.95)
    assert bound == pytest.approx(math.log(q / (1 - q)), abs=2e-4)


def test_bounds_move_the_right_way() -> None:
    bounds = [Guesses(200, 100, right).lower_bound(1e-5, 0.95) for right in range(50, 101, 10)]
    assert bounds == sorted(bounds)
    assert bounds[0] == 0.0
    loose, strict = (Guesses(200, 100, 95).lower_bound(1e-5, c) for c in (0.9, 0.99))
    assert strict < loose
    assert Guesses(200, 100, 95).lower_bound(1e-3, 0.95) < loose
    assert Guesses(5, 0, 0).lower_bound(1e-5, 0.95) == 0.0


@pytest.mark.statistical
@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_randomised_response_is_bounded_with_the_stated_confidence(epsilon: float) -> None:
    rng = np.random.default_rng(7)
    chance = 1 / (1 + math.exp(-epsilon))
    rights = rng.binomial(500, chance, 1000)
    refuted = {r: Guesses(500, 500, r).p_value(epsilon, 0.0) <= 0.05 for r in set(rights.tolist())}
    exceeded = np.mean([refuted[r] for r in rights.tolist()])
    assert 0.01 < exceeded < 0.08  # this mechanism is the worst of its ε, so the bound is tight


def test_guesses_are_made_at_both_ends() -> None:
    scores = np.array([5.0, -3.0, 0.1, 4.0, -2.0, 0.0])
    present = np.array([True, False, True, False, False, True])
    assert Guesses.of(scores, present, 4) == Guesses(6, 4, 3)
    assert Guesses.of(scores, present, 5) == Guesses(6, 4, 3)
    assert Guesses.of(scores, present, 100) == Guesses(6, 6, 4)


@pytest.mark.statistical
@pytest.mark.parametrize("strength", [0.1, 0.7, 2.0])
@pytest.mark.parametrize("made", [20, 200])
def test_chance_explains_what_honest_noise_gives(strength: float, made: int) -> None:
    rng = np.random.default_rng(17)
    chances = []
    for _ in range(300):
        present = rng.random(400) < 0.5
        scores = rng.normal(size=400) + strength * present
        chances.append(Guesses.of(scores, present, made).chance(strength))
    for level in (0.2, 0.05, 0.01):
        assert np.mean(np.array(chances) < level) < level + 3 * math.sqrt(level / 300)


def test_chance_does_not_explain_everything() -> None:
    assert Guesses(400, 200, 200).chance(0.7) < ALPHA
    assert Guesses(400, 200, 100).chance(0.7) > 0.5
    assert Guesses(400, 0, 0).chance(0.7) == 1.0


@pytest.mark.parametrize(("canaries", "strength"), [(2, 1.0), (60, 0.05), (1000, 2.0)])
def test_the_number_of_guesses_is_chosen_before_the_scores(canaries: int, strength: float) -> None:
    made = best_guesses(canaries, strength, 1e-5, 0.95)
    assert 0 < made <= canaries
    assert made % 2 == 0


@pytest.mark.statistical
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_two_gaussians_are_told_apart_as_far_as_they_are(strength: float) -> None:
    rng, dimension = np.random.default_rng(3), 4096
    cosines = (rng.normal(size=4000) + strength) / math.sqrt(dimension)
    estimate, least = separation(cosines, dimension, 0.95)
    assert estimate == pytest.approx(strength, abs=0.06)
    assert least < estimate
    assert apart(estimate, 1e-5) == pytest.approx(gaussian(strength, 1e-5), rel=0.15)
    assert apart(least, 1e-5) < gaussian(strength, 1e-5)
    missed = 0
    for _ in range(300):
        some = (rng.normal(size=50) + strength) / math.sqrt(dimension)
        missed += separation(some, dimension, 0.95)[1] > strength
    assert missed < 30


def test_a_spread_of_other_reasons_is_not_taken_for_privacy_lost() -> None:
    assert separation(np.array([0.5, -0.5] * 50 + [0.6]), 100, 0.95)[0] < 0.1
    # Less spread than noise has: that of noise counts.
    assert separation(np.full(10, 0.1), 100, 0.95)[0] == pytest.approx(1.0)
    assert apart(separation(np.full(10, -0.3), 100, 0.95)[1], 1e-5) == 0.0


def test_a_fit_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="two canaries"):
        separation(np.array([0.1]), 10, 0.95)
