"""ε of settings whose figures are known from elsewhere, and ε on a grid held to dp-accounting's."""

import itertools
import math

import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from opacus_prv import prv

from privrec.privacy import accountant
from privrec.privacy.events import RoundEvent, epsilon

DELTA = 1e-6
# (sampling rate, noise multiplier, rounds): RDP, PRV, PLD at a step of 1e-3, and the central limit
# of Gaussian differential privacy, which is no bound.
KNOWN = {
    (0.01, 1.0, 1000): (2.437, 2.135, 2.1253, 1.836),
    (0.1, 2.0, 500): (6.679, 6.227, 6.2169, 5.97),
    (0.0166, 0.8, 3000): (11.245, 10.354, 10.3444, 9.47),
}


def part(setting):
    rate, sigma, rounds = setting
    return (accountant.Rounds(sigma, rate, rounds),)


@pytest.mark.parametrize("setting", KNOWN)
def test_known_figures_of_rdp_prv_and_pld(setting):
    rdp, opacus, pld, _ = KNOWN[setting]
    assert accountant.rdp(part(setting), DELTA) == pytest.approx(rdp, rel=2e-4)
    assert prv(part(setting), DELTA) == pytest.approx(opacus, abs=6e-3)
    found = accountant.pld(part(setting), DELTA)
    assert found == pytest.approx(pld, rel=1e-3)
    rate, sigma, rounds = setting
    assert epsilon({RoundEvent("gaussian", sigma, rate): rounds}, DELTA, "recipients") >= found


@pytest.mark.parametrize("setting", KNOWN)
def test_the_central_limit_is_below_and_so_no_bound(setting):
    rate, sigma, rounds = setting
    mu = rate * math.sqrt(rounds * (math.exp(1 / sigma**2) - 1))
    limit = accountant.gaussian(mu, DELTA)
    assert limit == pytest.approx(KNOWN[setting][3], abs=6e-3)
    assert limit < accountant.pld(part(setting), DELTA)


@pytest.mark.parametrize("setting", KNOWN)
def test_a_further_figure_composes_nothing_again(setting, monkeypatch):
    accountant.pld.__wrapped__(part(setting), DELTA)
    # Either would take most of the time of the first figure.
    monkeypatch.delattr(privacy_loss_distribution, "from_gaussian_mechanism")
    monkeypatch.delattr(accountant, "_convolve")
    accountant.pld.__wrapped__(part(setting), 2 * DELTA)


GRID = [
    (rate, sigma, rounds, delta)
    for rate, sigma, rounds, delta in itertools.product(
        (0.004, 0.02, 0.1, 0.3, 1.0), (0.8, 1.2, 2.0, 5.0), (1, 20, 200, 1000, 4000), (1e-5, 1e-7)
    )
]


def by_dp_accounting(rate, sigma, rounds, delta, step):
    ledger = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, step)
    event = dp_event.GaussianDpEvent(sigma)
    ledger.compose(event if rate == 1 else dp_event.PoissonSampledDpEvent(rate, event), rounds)
    return ledger.get_epsilon(delta)


def from_below(rate, sigma, rounds, delta, step):
    """dp-accounting's optimistic estimate: what no true ε lies under."""
    one = privacy_loss_distribution.from_gaussian_mechanism(
        sigma,
        value_discretization_interval=step,
        sampling_prob=rate,
        pessimistic_estimate=False,
        neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
    )
    return one.self_compose(rounds).get_epsilon_for_delta(delta)


def test_there_are_200_settings():
    assert len(GRID) == 200


@pytest.mark.slow
@pytest.mark.parametrize("setting", GRID, ids=lambda s: "-".join(map(str, s)))
def test_epsilon_agrees_with_dp_accounting_and_never_lies_below(setting):
    rate, sigma, rounds, delta = setting
    found = epsilon({RoundEvent("gaussian", sigma, rate): rounds}, delta, "recipients")
    step = max(2e-5, min(1e-3, found / 5000))
    expected = by_dp_accounting(rate, sigma, rounds, delta, step)
    assert found == pytest.approx(expected, rel=1.5e-3, abs=2e-4)
    # Beyond exp(709) dp-accounting leaves the subtracted half of the divergence out, so that its
    # estimate from below is none any more; there the closed form is exact.
    if found < 709:
        assert found >= from_below(rate, sigma, rounds, delta, step)
    else:
        assert rate == 1
        assert found >= accountant.gaussian(math.sqrt(rounds) / sigma, delta)


@pytest.mark.parametrize("setting", GRID[::23], ids=lambda s: "-".join(map(str, s)))
def test_some_of_the_grid_in_every_run(setting):
    rate, sigma, rounds, delta = setting
    found = epsilon({RoundEvent("gaussian", sigma, rate): rounds}, delta, "recipients")
    assert found == pytest.approx(by_dp_accounting(*setting, 1e-3), rel=1e-2, abs=1e-3)
    assert found >= from_below(*setting, 1e-3)


def test_the_check_from_below_would_find_too_little():
    setting = (0.1, 2.0, 200, 1e-5)
    low = from_below(*setting, 1e-4)
    counts = {RoundEvent("gaussian", 2.0, 0.1): 200}
    assert epsilon(counts, 1e-5, "recipients") * 0.99 < low
