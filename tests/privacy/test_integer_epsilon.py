"""What integers cost: ε with distributed noise in a ring against the Gaussian's in real numbers."""

import math

import pytest

from privrec.errors import UsageError
from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.mechanism import Band, Shares
from privrec.secagg.ring import Encoding, Load, Ring, spread

DELTA = 1e-5


def in_ring(bits, devices, size, noise):
    """Encoding and event of a round whose noise in real numbers is ``noise`` clip norms.

    The small ring takes the finest scale that a full cohort allows; the large one the default.
    """
    least = 2 * devices // 3 + 1
    encoding = Encoding(1.0, size, 13)
    load = Load(size, devices, noise**2 * devices / least, spread(size) if bits == 16 else 1)
    if bits == 16:
        encoding = Encoding(1.0, size, Ring(16).fitting_scale_bits(encoding, load))
    Ring(bits).check(encoding, load)
    multiplier = noise * 2**encoding.scale_bits / encoding.bound
    shares = Shares(multiplier, encoding.squared_bound, (Band(size, least),), True)
    return encoding, shares


def excess(event, noise, *, rounds, adversary):
    """How much ε exceeds that of the continuous Gaussian, as a fraction."""
    gaussian = RoundEvent("gaussian", noise, event.sampling_rate)
    found = epsilon({event: rounds}, DELTA, adversary)
    return found / epsilon({gaussian: rounds}, DELTA, adversary) - 1


@pytest.mark.parametrize("devices", [20, 200, 1000])
@pytest.mark.parametrize("size", [2**10, 2**14, 98_000, 2**17 - 1, 2**17])
@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_the_small_ring_costs_less_than_three_percent(devices, size, noise):
    _, shares = in_ring(16, devices, size, noise)
    for rounds in (1, 30):
        assert 0 <= excess(shares.event(1.0), noise, rounds=rounds, adversary="server") < 0.03


@pytest.mark.parametrize("devices", [20, 1000, 20_000])
@pytest.mark.parametrize("size", [2**10, 118_000, 2**17])
@pytest.mark.parametrize("noise", [0.5, 2.0, 30.0])
def test_the_large_ring_costs_less_than_a_thousandth(devices, size, noise):
    _, shares = in_ring(32, devices, size, noise)
    rounds = 1 + math.ceil(noise**2)
    assert 0 <= excess(shares.event(1.0), noise, rounds=rounds, adversary="server") < 0.001


@pytest.mark.parametrize(("bits", "most"), [(16, 0.03), (32, 0.001)])
def test_sampled_rounds_too(bits, most):
    _, shares = in_ring(bits, 300, 2**16, 1.0)
    found = excess(shares.event(0.1), 1.0, rounds=50, adversary="recipients")
    assert -1e-4 < found < most


def test_at_the_same_noise_multiplier_the_grid_alone_costs_next_to_nothing():
    for bits in (16, 32):
        _, shares = in_ring(bits, 1000, 2**17, 1.0)
        found = excess(shares.event(1.0), shares.noise_multiplier, rounds=10, adversary="server")
        assert 0 <= found < 2e-4


def test_what_does_not_fit_the_small_ring_is_refused():
    encoding = Encoding(1.0, 2**17, 13)
    load = Load(2**17, 1000, 1.5, spread(2**17))
    with pytest.raises(UsageError, match="could wrap around"):
        Ring(16).check(encoding, load)


def test_it_would_show_if_rounding_were_forgotten():
    """The sensitivity of the integers is larger than the clip norm in steps, and is what counts."""
    encoding, shares = in_ring(16, 1000, 2**17, 1.0)
    assert 1.005 < encoding.bound / 2**encoding.scale_bits < 1.03
    honest = epsilon([shares.event(1.0)], DELTA, "server")
    forgotten = epsilon([RoundEvent("gaussian", 1.0)], DELTA, "server")
    assert honest > forgotten * 1.005
