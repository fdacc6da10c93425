import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from opacus_prv import prv
from scipy import stats

from privrec.privacy import accountant
from privrec.privacy.events import RoundEvent, epsilon

SETTINGS = [
    # noise_multiplier, sampling_rate, rounds, delta
    (1.0, 0.1, 100, 1e-5),
    (1.2, 0.05, 600, 1e-5),
    (0.8, 0.01, 2000, 1e-6),
    (10.0, 0.1, 400, 1e-5),
    (0.5, 0.3, 50, 1e-5),
    (4.0, 0.9, 30, 1e-3),
    (2.0, 1.0, 10, 1e-8),
]
# Values at this step are exact to far more than three digits.
FINE = 1e-4


def rounds(sigma, rate=1.0, count=1):
    return (accountant.Rounds(sigma, rate, count),)


def direct(events, delta, step=FINE):
    """ε by dp-accounting alone, from its own events and its own composition."""
    ledger = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, step)
    for event, count in events.items():
        ledger.compose(event.dp_event("recipients"), count)
    return ledger.get_epsilon(delta)


@pytest.mark.parametrize(("sigma", "rate", "count", "delta"), SETTINGS)
def test_equals_dp_accounting_to_three_digits(sigma, rate, count, delta):
    event = RoundEvent("gaussian", sigma, rate)
    expected = direct({event: count}, delta)
    found = epsilon({event: count}, delta, "recipients")
    assert expected - 1e-3 * expected <= found <= expected * 1.005 + 1e-4
    assert found == pytest.approx(expected, rel=1.5e-3)


def test_mixture_equals_dp_accounting():
    events = {
        RoundEvent("gaussian", 1.5, 0.1): 40,
        RoundEvent("gaussian", 2.5, 0.02): 300,
        RoundEvent("gaussian", 6.0): 3,
        RoundEvent("gaussian", 8.0): 2,
    }
    expected = direct(events, 1e-5)
    assert epsilon(events, 1e-5, "recipients") == pytest.approx(expected, rel=1.5e-3)


def test_known_figures():
    events = {RoundEvent("gaussian", 1.0, 0.1): 100}
    assert epsilon(events, 1e-5, "recipients") == pytest.approx(7.05, abs=0.005)
    assert epsilon(events, 1e-5, "server") == pytest.approx(91.8, abs=0.05)


def pair_delta(sigma, rate, found, *, removed):
    """δ of one round against zero-out, integrated from the two densities it compares."""

    x = np.linspace(-12 * sigma, 12 * sigma + 1, 400_001)
    out = stats.norm.pdf(x, 0, sigma)
    sampled = (1 - rate) * out + rate * stats.norm.pdf(x, 1, sigma)
    one, two = (sampled, out) if removed else (out, sampled)
    return np.trapezoid(np.maximum(one - np.exp(found) * two, 0), x)


@pytest.mark.parametrize(("sigma", "rate"), [(0.7, 0.3), (1.0, 0.1), (2.0, 1.0)])
def test_one_round_against_zero_out(sigma, rate):
    # The claim from first principles: replaced by none or put in, δ is met, and just so.
    found = epsilon({RoundEvent("gaussian", sigma, rate): 1}, 1e-3, "recipients")
    both = [pair_delta(sigma, rate, found, removed=removed) for removed in (True, False)]
    assert max(both) <= 1e-3
    assert max(both) == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
@pytest.mark.parametrize(("sigma", "count"), [(2.0, 1), (5.0, 100), (30.0, 1000)])
def test_grid_agrees_with_the_closed_form(sigma, count, delta):
    # Almost everybody is sampled, so that the grid is used where the truth is known.
    exact = accountant.pld(rounds(sigma, 1.0, count), delta)
    found = accountant.pld(rounds(sigma, 1 - 1e-10, count), delta)
    assert exact * (1 - 1e-6) <= found <= exact * 1.005


def test_never_below_the_truth_when_coarse():
    exact = accountant.gaussian(math.sqrt(50) / 5, 1e-5)
    part = rounds(5.0, 1 - 1e-10, 50)
    coarse = [accountant._pld_on_grid(part, 1e-5, 2.0**-k) for k in (1, 3, 5, 7, 9)]
    assert coarse == sorted(coarse, reverse=True)
    assert coarse[-1] >= exact * (1 - 1e-6)
    assert coarse[0] > 1.05 * exact


def refined(monkeypatch, at):
    """The steps that are tried, and the result, when ε is ``at(step / first step)``."""
    steps = []

    def on_grid(part, delta, step):
        steps.append(step)
        return at(step / steps[0])

    monkeypatch.setattr(accountant, "_pld_on_grid", on_grid)
    return accountant.pld.__wrapped__(rounds(1.0, 0.1, 10), 1e-5), steps


def test_refined_until_it_moves_by_less_than_half_a_percent(monkeypatch):
    found, steps = refined(monkeypatch, lambda step: 1 + step**2)
    assert [steps[0] / step for step in steps] == [1, 4, 16, 64]  # 2, 1.0625, 1.0039, 1.0002
    assert found == 1 + 64**-2


def test_refinement_ends(monkeypatch):
    found, steps = refined(monkeypatch, lambda step: step)
    assert len(steps) == 6
    assert found == 4.0**-5


def test_an_infinite_epsilon_is_not_refined_but_bounded_by_rdp(monkeypatch):
    found, steps = refined(monkeypatch, lambda step: math.inf)
    assert (found, len(steps)) == (accountant.rdp(rounds(1.0, 0.1, 10), 1e-5), 2)


@pytest.mark.parametrize(("sigma", "rate", "count", "delta"), SETTINGS)
def test_rdp_lies_above(sigma, rate, count, delta):
    part = rounds(sigma, rate, count)
    assert accountant.pld(part, delta) < accountant.rdp(part, delta)
    assert accountant.rdp(part, delta) < 1.6 * accountant.pld(part, delta)


@pytest.mark.parametrize(("sigma", "rate", "count", "delta"), SETTINGS[:2] + SETTINGS[-1:])
def test_prv_agrees(sigma, rate, count, delta):
    part = rounds(sigma, rate, count)
    difference = prv(part, delta) - accountant.pld(part, delta)
    assert -0.005 < difference < 0.02


def test_prv_of_a_mixture_agrees():
    mixture = rounds(1.5, 0.1, 40) + rounds(6.0, 1.0, 3)
    assert prv(mixture, 1e-5) == pytest.approx(accountant.pld(mixture, 1e-5), abs=0.02)


def test_gaussian_inverts_its_delta():
    for strength in (0.01, 0.5, 3.0, 40.0):
        found = accountant.gaussian(strength, 1e-6)
        assert accountant.gaussian_delta(strength, found) == pytest.approx(1e-6, rel=1e-6)
    assert accountant.gaussian(1e-9, 1e-6) == 0


def test_gaussian_equals_dp_accounting():
    event = {RoundEvent("gaussian", 2.0): 10}
    assert accountant.gaussian(math.sqrt(10) / 2, 1e-5) == pytest.approx(
        direct(event, 1e-5), rel=1e-4
    )


def test_tail_in_the_window():
    # The mass that is wrapped around is within the tail that is counted as a certain loss.
    losses = accountant._one_round(1.0, 0.1, 2.0**-7)[0]
    lowest, highest = accountant._window([losses], [100])
    mass = accountant._convolve([losses], [100], lowest, highest)
    assert mass.sum() == pytest.approx((1 - losses.at_infinity) ** 100, abs=1e-12)
    wide = accountant._convolve([losses], [100], 100 * losses.lowest, 20 * highest)
    offset = lowest - 100 * losses.lowest
    inside = wide[offset : offset + highest - lowest + 1].sum()
    assert wide.sum() - inside < 1e-12
    assert len(mass) < len(wide) / 5


def test_delta_below_what_doubles_carry_is_left_to_rdp():
    part = rounds(1.0, 0.1, 100)
    assert accountant.pld(part, 1e-16) == accountant.rdp(part, 1e-16) < math.inf
    assert accountant.pld(part, 1e-5) < accountant.rdp(part, 1e-5)


def test_extreme_noise():
    assert accountant.pld(rounds(1e6, 0.1, 10), 1e-5) == 0
    little = accountant.pld(rounds(0.02, 0.05, 3), 1e-5)
    assert 3000 < little < accountant.rdp(rounds(0.02, 0.05, 3), 1e-5)


def test_masses_that_overflow_are_not_taken_for_no_loss():
    # Rounded upwards, the masses of one round add up to 1.008, whose 10^5th power is no number. The
    # truth is above 0: what q sqrt(n) / sigma = 3e-8 tells has a δ of 1e-8 at ε = 0.
    assert accountant.pld(rounds(1e9, 0.1, 10**5), 1e-10) > 0
    assert accountant._pld_on_grid(rounds(1e9, 0.1, 10**5), 1e-10, 2.0**-46) == math.inf


@pytest.mark.parametrize(("sigma", "count"), [(0.01, 10**9), (0.1, 10**9), (1.0, 10**9)])
def test_rounds_beyond_any_grid_are_bounded_at_once(sigma, count):
    found = accountant.pld(rounds(sigma, 0.9, count), 1e-6)
    assert 0.8 * count / 2 / sigma**2 < found <= accountant.pld(rounds(sigma, 1.0, count), 1e-6)


def test_the_curve_of_a_run_is_cheap(monkeypatch):
    """Work is counted, not seconds: one distribution of a round, and short convolutions of it."""
    event, asked, lengths = RoundEvent("gaussian", 1.31, 0.07), [], []
    library, convolve = privacy_loss_distribution.from_gaussian_mechanism, accountant._convolve

    def counted(*arguments, **options):
        asked.append(arguments)
        return library(*arguments, **options)

    def measured(parts, counts, lowest, highest):
        lengths.append(highest - lowest + 1)
        return convolve(parts, counts, lowest, highest)

    monkeypatch.setattr(privacy_loss_distribution, "from_gaussian_mechanism", counted)
    monkeypatch.setattr(accountant, "_convolve", measured)
    curve = [epsilon({event: count}, 1e-5, "recipients") for count in range(1, 201)]
    assert len(asked) <= 1 + accountant._LEVELS
    assert len(lengths) <= 200 * 6
    assert max(lengths) < 2**16
    assert curve == sorted(curve)
    assert curve[-1] == pytest.approx(direct({event: 200}, 1e-5, 1e-3), rel=2e-3)


def test_rounds_are_merged_by_kind(monkeypatch):
    made, one_round = [], accountant._one_round
    monkeypatch.setattr(accountant, "_one_round", lambda *a: (made.append(a), one_round(*a))[1])
    mixed = (*rounds(3.0, 1.0, 2), *rounds(4.0, 1.0, 1), *rounds(3.0, 0.5, 7))
    accountant._pld_on_grid(mixed, 1e-5, 2.0**-6)
    merged = pytest.approx((2 / 9 + 1 / 16) ** -0.5)
    assert made == [(merged, 1.0, 2.0**-6), (3.0, 0.5, 2.0**-6)]


def test_the_parts_of_dp_accounting_in_use_are_there():
    # A clearer sign than an AttributeError deep inside, when dp-accounting changes.
    losses = dp_accounting.pld.privacy_loss_distribution.from_gaussian_mechanism(1.0)
    assert {"_pmf_remove", "_pmf_add"} <= set(vars(losses))
