"""Rényi divergences of Gaussian rounds, sampled or not."""

import math

import numpy as np
import pytest
from scipy import special

from privrec.privacy import accountant
from privrec.privacy.accountant import Rounds, renyi


@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.1), (3.0, 0.5), (0.8, 0.01), (1.5, 1.0)])
def test_divergences_are_those_of_dp_accounting(sigma, rate):
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    other = RdpAccountant(
        orders=[2, 3, 8, 32], neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    other.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)))
    found = [renyi(Rounds(sigma, rate, 1), order) for order in (2, 3, 8, 32)]
    assert found == pytest.approx(other._rdp, rel=1e-6)


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("order", [2, 5, 12])
def test_a_sampled_round_is_the_larger_of_both_directions(rate, order):
    place, step = np.linspace(-30, 40, 70_001, retstep=True)
    out, moved = (-((place - m) ** 2) / 8 - math.log(2 * math.sqrt(2 * math.pi)) for m in (0, 1))
    mixed = np.logaddexp(math.log1p(-rate) + out, math.log(rate) + moved)

    def divergence(one, two):
        return (special.logsumexp(order * one + (1 - order) * two) + math.log(step)) / (order - 1)

    bound = renyi(Rounds(2.0, rate, 1), order)
    assert divergence(mixed, out) == pytest.approx(bound, rel=1e-6)
    assert divergence(out, mixed) <= bound * (1 + 1e-9)


def test_epsilon_by_whole_orders_is_a_little_above_that_of_finer_ones():
    rounds = (Rounds(1.2, 0.05, 300), Rounds(8.0, 1.0, 2))
    divergences = {a: sum(part.count * renyi(part, a) for part in rounds) for a in range(2, 65)}
    found = min(
        d + math.log1p(-1 / a) - math.log(1e-5 * a) / (a - 1) for a, d in divergences.items()
    )
    finer = accountant.rdp(rounds, 1e-5)
    assert finer * 0.999 <= found < 1.05 * finer
