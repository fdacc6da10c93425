"""Rényi bounds against the exact laws, one coefficient or several, sampled or not."""

import math

import numpy as np
import pytest
from scipy import special

from privrec.errors import UsageError
from privrec.privacy import accountant, renyi
from privrec.privacy.closeness import Grid
from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.renyi import Part, plain, sampled


def log_law(variance, reach):
    """Logarithm of Skellam's probabilities from ``-reach`` to ``reach``, by two Poissons."""
    count = np.arange(3 * reach + int(4 * variance) + 60)
    poisson = count * math.log(variance / 2) - variance / 2 - special.gammaln(count + 1)
    return np.array(
        [special.logsumexp(poisson[abs(x) :] + poisson[: len(count) - abs(x)])
         for x in range(-reach, reach + 1)]
    )  # fmt: skip


def divergence(one, two, order):
    return special.logsumexp(order * one + (1 - order) * two) / (order - 1)


def skellam_part(variance, squared, dimension=1, rate=1.0, count=1):
    noise_multiplier = math.sqrt(variance / squared)
    return Part(noise_multiplier, rate, count, Grid(squared, dimension, 1, True))


@pytest.mark.parametrize("variance", [2.0, 10.0, 60.0])
@pytest.mark.parametrize("shift", [1, 2, 5])
def test_skellam_meets_its_bound(variance, shift):
    reach = int(12 * math.sqrt(variance)) + 60 * shift
    law = log_law(variance, reach)
    out, moved = law[shift:], law[:-shift]
    part = skellam_part(variance, shift**2)
    orders = [order for order in (2, 3, 5, 8, 16, 32) if plain(part, order) < math.inf]
    assert orders or variance / shift <= 0.5
    for order in orders:
        exact = divergence(moved, out, order)
        assert exact <= plain(part, order) * (1 + 1e-9)
        assert plain(part, order) < (1.6 if variance > 2 else 3) * exact


def test_skellam_in_several_coefficients_meets_its_bound():
    variance = 12.0
    for shift in [(3, 0, 0), (2, 2, 1), (0, 0, 3)]:
        total = 0.0
        for step in shift:
            law = log_law(variance, 200)
            total += divergence(law[: len(law) - step], law[step:], 4) if step else 0.0
        assert total <= plain(skellam_part(variance, 9, 3), 4)


def test_the_bound_is_the_published_one():
    """Theorem 3.5: α Δ₂²/2μ + min{((2α-1) Δ₂² + 6 Δ₁) / 4μ², 3 Δ₁ / 2μ}."""
    fine, coarse = skellam_part(50.0, 9, dimension=4), skellam_part(5.0, 1, dimension=4)
    assert plain(fine, 3) == pytest.approx(27 / 100 + (5 * 9 + 6 * 6) / (4 * 2500))  # Δ₁ = 3 √4
    assert plain(skellam_part(50.0, 9, 10**6), 3) == pytest.approx(0.27 + (45 + 54) / 10**4)
    assert plain(coarse, 8) == pytest.approx(8 / 10 + (15 + 6) / 100)
    rough = skellam_part(1.0, 1)
    assert plain(rough, 2) == pytest.approx(1 + min((3 + 6) / 4, 3 / 2))


def test_orders_beyond_the_theorem_have_no_bound():
    part = skellam_part(8.1, 16)  # 1 + 2 μ / Δ = 5.05
    assert plain(part, 5) < math.inf
    assert plain(part, 6) == math.inf
    assert sampled(part, 6) == math.inf


def test_skellam_tends_to_the_gaussian():
    for order in (2, 10, 64):
        fine = plain(skellam_part(10.0**8, 10**8, 10**6), order)
        assert order / 2 < fine < order / 2 * (1 + 1e-6)


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("order", [2, 5, 12])
def test_a_sampled_round_meets_its_bound_in_both_directions(rate, order):
    variance, shift = 40.0, 3
    law = log_law(variance, 260)
    out, moved = law[shift:], law[:-shift]
    mixed = np.logaddexp(math.log1p(-rate) + out, math.log(rate) + moved)
    bound = sampled(skellam_part(variance, shift**2, rate=rate), order)
    there, back = divergence(mixed, out, order), divergence(out, mixed, order)
    assert max(there, back) <= bound * (1 + 1e-9)
    assert bound < 1.5 * there + 1e-9


@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.1), (3.0, 0.5), (0.8, 0.01)])
def test_gaussian_divergences_are_those_of_dp_accounting(sigma, rate):
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    other = RdpAccountant(
        orders=[2, 3, 8, 32], neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    other.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)))
    found = [sampled(Part(sigma, rate, 1), order) for order in (2, 3, 8, 32)]
    assert found == pytest.approx(other._rdp, rel=1e-6)


def test_epsilon_of_gaussians_is_a_little_above_that_of_finer_orders():
    rounds = (accountant.Rounds(1.2, 0.05, 300), accountant.Rounds(8.0, 1.0, 2))
    parts = [Part(1.2, 0.05, 300), Part(8.0, 1.0, 2)]
    finer = accountant.rdp(rounds, 1e-5)
    assert finer * 0.999 <= renyi.epsilon(parts, 1e-5) < 1.05 * finer


def test_no_order_no_claim():
    assert renyi.epsilon([skellam_part(0.3, 100)], 1e-5) == math.inf


@pytest.mark.parametrize(("variance", "shift", "rate"), [(60.0, 4, 1.0), (400.0, 20, 0.2)])
def test_epsilon_holds_for_the_exact_law(variance, shift, rate):
    event = RoundEvent(
        "skellam", math.sqrt(variance) / shift, rate, Grid(shift**2, 1, 7, excess_removed=True)
    )
    found = epsilon([event], 1e-5, "recipients")
    law = np.exp(log_law(variance, int(14 * math.sqrt(variance))))
    out, moved = np.pad(law, (0, shift)), np.pad(law, (shift, 0))
    mixed = (1 - rate) * out + rate * moved
    for one, two in ((mixed, out), (out, mixed)):
        assert np.maximum(one - math.exp(found) * two, 0).sum() <= 1e-5
    if rate == 1:
        assert np.maximum(mixed - math.exp(0.7 * found) * out, 0).sum() > 1e-5


class TestEvents:
    GRID = Grid(10**6, 1000, 10, excess_removed=True)
    SKELLAM = RoundEvent("skellam", 1.5, 0.1, GRID)

    def test_pld_and_rdp_are_the_same_bound(self):
        found = epsilon({self.SKELLAM: 50}, 1e-5, "recipients")
        assert found == epsilon({self.SKELLAM: 50}, 1e-5, "recipients", "rdp")
        gaussian = epsilon({RoundEvent("gaussian", 1.5, 0.1): 50}, 1e-5, "recipients", "rdp")
        assert gaussian * 0.999 < found < gaussian * 1.1

    def test_mixtures_with_other_mechanisms(self):
        more = {self.SKELLAM: 50, RoundEvent("gaussian", 5.0): 3}
        assert epsilon(more, 1e-5, "server") > epsilon({self.SKELLAM: 50}, 1e-5, "server")

    def test_prv_and_dp_accounting_do_not_know_it(self):
        with pytest.raises(UsageError, match="'prv' knows no Skellam"):
            epsilon([self.SKELLAM], 1e-5, "server", "prv")
        with pytest.raises(UsageError, match="no event for it"):
            self.SKELLAM.dp_event("server")
