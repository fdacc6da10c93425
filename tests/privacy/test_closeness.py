"""Sums of integer noise against the Gaussian mechanism that is accounted, by brute force."""

import math

import numpy as np
import pytest

from privrec.errors import UsageError
from privrec.privacy import discrete
from privrec.privacy.discrete import Grid, Slack
from privrec.privacy.events import RoundEvent, epsilon


def law(variance, reach=None):
    reach = reach or math.ceil(12 * math.sqrt(variance)) + 2
    x = np.arange(-reach, reach + 1)
    weights = np.exp(-(x**2) / (2 * variance))
    return weights / weights.sum()


def sum_law(share, shares):
    total = np.ones(1)
    for _ in range(shares):
        total = np.convolve(total, law(share))
    return total


def log_ratio(share, shares):
    """Largest log-ratio of the sum to one discrete Gaussian, where doubles carry it."""
    total = sum_law(share, shares)
    whole = law(share * shares, len(total) // 2)
    clear = whole > 1e-6
    return np.abs(np.log(total[clear] / whole[clear])).max()


@pytest.mark.parametrize("share", [0.2, 0.35, 0.6])
@pytest.mark.parametrize("shares", [2, 3, 10, 200])
def test_a_sum_of_discrete_gaussians_is_as_close_as_stated(share, shares):
    stated = discrete._of_sum(share, shares)
    found = log_ratio(share, shares)
    assert found <= stated * (1 + 1e-9)
    assert found > 0.02 * stated  # of the same order, as far as doubles show it


def test_many_shares_are_bounded_by_the_terms_written_out():
    each = [discrete._apart(0.5 * k / (k + 1)) for k in range(1, 1000)]
    assert sum(each) <= discrete._of_sum(0.5, 1000) < 1.2 * sum(each)
    assert discrete._of_sum(0.5, 1) == 0
    assert discrete._of_sum(0.5, 66) == pytest.approx(sum(each[:65]), rel=1e-12)


@pytest.mark.parametrize("variance", [0.15, 0.3, 0.5, 1.0])
def test_sums_over_shifted_integers_ripple_as_stated(variance):
    """Poisson's formula, from which all else follows: the normaliser of a moved Gaussian."""
    x, centre = np.arange(-40, 41), np.linspace(0, 1, 101)
    sums = np.exp(-((x - centre[:, None]) ** 2) / (2 * variance)).sum(1)
    found = np.log(sums.max() / sums.min())
    assert 0.9 * discrete._apart(variance) < found <= discrete._apart(variance) * (1 + 1e-6)


def test_hardly_any_variance_has_no_bound():
    assert discrete._apart(0.01) == math.inf


@pytest.mark.parametrize("rho", [0.2, 0.5])
def test_randomised_rounding_of_a_gaussian_is_as_close_as_stated(rho):
    """N(0, σ² - ρ) rounded to N_Z(X, ρ), integrated, against N_Z(0, σ²)."""
    variance = 6.0
    x = np.linspace(-25, 25, 20_001)
    density = np.exp(-(x**2) / (2 * (variance - rho)))
    density /= density.sum()
    y = np.arange(-40, 41)
    kernel = np.exp(-((y[:, None] - x) ** 2) / (2 * rho))
    kernel /= kernel.sum(0)
    rounded = kernel @ density
    exact = law(variance, 40)
    clear = exact > 1e-6
    found = np.abs(np.log(rounded[clear] / exact[clear])).max()
    assert 0 < found <= discrete._apart(rho)


def hockey_stick(noise, shift, at, rate):
    """δ of zero-out at ε ``at``, both directions, from the law of the noise on a whole grid."""
    pads = [(s, s) for s in shift]
    out = np.pad(noise, pads)
    moved = np.roll(out, shift, range(noise.ndim))
    mixed = (1 - rate) * out + rate * moved
    return max(
        np.maximum(one - math.exp(at) * two, 0).sum() for one, two in ((mixed, out), (out, mixed))
    )


SETTINGS = [
    # share, shares, shift, sampling rate, delta
    (5.0, 3, (4,), 1.0, 1e-5),
    (5.0, 20, (6,), 1.0, 1e-5),
    (8.0, 20, (12,), 0.2, 1e-5),
    (12.0, 4, (3,), 0.05, 1e-4),
    (5.0, 2, (3, 4), 1.0, 1e-4),
    (5.0, 6, (5, 0), 0.3, 1e-4),
    (5.0, 6, (3, 4), 0.3, 1e-4),
    (5.0, 2, (1, 2, 2), 1.0, 1e-4),
]


@pytest.mark.parametrize(("share", "shares", "shift", "rate", "delta"), SETTINGS)
def test_epsilon_holds_for_every_shift_and_hardly_exceeds_the_truth(
    share, shares, shift, rate, delta
):
    """From first principles: the law of the sum on a grid, shifted by whole vectors."""
    squared = sum(s * s for s in shift)
    noise_multiplier = math.sqrt(share * shares / squared)
    event = RoundEvent(
        "discrete_gaussian", noise_multiplier, rate, Grid(squared, len(shift), shares, True)
    )
    found = epsilon([event], delta, "recipients")
    line = sum_law(share, shares)
    if len(shift) > 1:
        line = line[np.abs(np.arange(len(line)) - len(line) // 2) < 8 * math.sqrt(share * shares)]
    noise = line
    for _ in shift[1:]:
        noise = np.multiply.outer(noise, line)
    assert hockey_stick(noise, shift, found, rate) <= delta
    # ε without noise lost to the grid, five percent lower, is not met by the true mechanism.
    bare = epsilon([RoundEvent("gaussian", noise_multiplier, rate)], delta, "recipients")
    assert hockey_stick(noise, shift, 0.9 * bare, rate) > delta


def test_shares_that_are_too_narrow_cost_more_than_the_gaussian():
    """Why they are refused: what their sum gives away is not what would be accounted."""
    share, shares = 0.04, 50
    noise = sum_law(share, shares)
    bare = epsilon([RoundEvent("gaussian", math.sqrt(share * shares) / 3)], 1e-4, "server")
    assert hockey_stick(noise, (3,), bare, 1.0) > 10e-4
    with pytest.raises(UsageError, match=r"0\.2 integer steps.*50 such shares.*raise privacy\.sca"):
        RoundEvent("discrete_gaussian", math.sqrt(share * shares) / 3, 1.0, Grid(9, 1, 50, True))


class TestGrid:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ((0, 1, 1, True), "squared_sensitivity 0"),
            ((9.0, 1, 1, True), "squared_sensitivity 9.0"),
            ((9, 0, 1, True), "dimension 0"),
            ((9, 1, -1, True), "shares -1"),
            ((9, 1, True, True), "shares True"),
            ((9, 1, 1, 1), "excess_removed 1"),
        ],
    )
    def test_values_outside_their_range(self, values, message):
        with pytest.raises(UsageError, match=message):
            Grid(*values)

    def test_the_narrowest_share_that_is_allowed(self):
        grid = Grid(10**6, 2**17, 100, True)
        widths = np.linspace(1, 3, 201)
        most = discrete.LARGEST_LOG_RATIO
        allowed = [w for w in widths if grid.log_ratio(w * 10 / 1000) <= most]
        assert 1.8 < min(allowed) < 2.0
        assert allowed == [w for w in widths if w >= min(allowed)]

    def test_more_shares_and_more_coefficients_are_never_closer(self):
        base = Grid(10**4, 1000, 10, True).log_ratio(0.06)
        assert base > 0
        assert Grid(10**4, 1000, 11, True).log_ratio(0.06) > base
        assert Grid(10**4, 1001, 10, True).log_ratio(0.06) > base
        assert Grid(10**4, 1000, 10, True).log_ratio(0.061) < base

    def test_hardly_any_noise_has_no_bound(self):
        assert Grid(1, 1, 1, True).log_ratio(1.0) == math.inf
        assert Grid(100, 1, 10_000, True).log_ratio(0.2) == math.inf

    def test_what_the_grid_takes_of_the_noise(self):
        assert Grid(10**8, 5, 5, True).multiplier(1.0) == pytest.approx(1 - 1.5e-8, abs=1e-12)
        assert Grid(100, 5, 5, True).multiplier(1.0) == pytest.approx(math.sqrt(0.97))


class TestSlack:
    def test_none_changes_nothing(self):
        assert Slack().inner(1e-5) == 1e-5
        assert Slack().outer(3.25, 1e-5) == 3.25
        assert Slack().outer(math.inf, 1e-5) == math.inf

    def test_both_parts_are_paid(self):
        slack = Slack(1e-3, 1e-30)
        assert slack.inner(1e-5) == pytest.approx(1e-5 * 0.999 * math.exp(-1e-3), rel=1e-12)
        assert slack.outer(3.25, 1e-5) == pytest.approx(3.252)

    def test_samplers_that_would_take_too_much_of_delta_leave_no_claim(self):
        # (1 + exp(ε)) t against δ / 1000
        assert Slack(0.0, 1e-12).outer(9.2, 1e-5) == 9.2
        assert Slack(0.0, 1e-12).outer(9.3, 1e-5) == math.inf
        assert Slack(0.0, 1e-60).outer(1000.0, 1e-5) == math.inf


def test_small_cohorts_take_their_part_of_delta():
    assert Slack(spoiled=1e-8).inner(1e-6) <= 1e-6 - 1e-8
    assert math.isinf(Slack(spoiled=1e-7).outer(1.0, 1e-6))
