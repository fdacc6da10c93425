"""What a scenario's ``[privacy]`` makes every party agree on: event, sensitivity, noise and ring.

It looks at sizes and numbers of devices alone, so that a plan is made before any data is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from scipy.stats import binom

from privrec.device.update import SMALL_RING_BITS, Protection
from privrec.errors import UsageError
from privrec.privacy.calibrate import noise_multiplier_for
from privrec.privacy.closeness import Crowd, check_small_cohorts, small_cohort_delta
from privrec.privacy.events import RoundEvent
from privrec.privacy.mechanism import Band, Shares, grid_of
from privrec.scenario.kinds import PUBLISHED
from privrec.scenario.load import Scenario
from privrec.secagg.ring import LARGEST_WRAP, Encoding, Load, Ring, spread

LOOSE_CLIP_NORM = 100.0
"""Clip norm of a run without noise that names none: a range for the integers, rarely reached."""


def known_items(scenario: Scenario) -> int | None:
    """Size of the catalogue, where it is public without looking at the data."""
    data = scenario.data
    items: int | None = getattr(data, "items", None)
    if items is None and data.source in PUBLISHED:
        _, items, _ = PUBLISHED[data.source]
    most = getattr(data, "vocabulary", None)
    return items if items is None or most is None else min(items, most)


def plan_privacy(
    scenario: Scenario, sizes: Sequence[int], holders: Sequence[int]
) -> tuple[RoundEvent, Protection]:
    """The privacy event of each round, and how updates are protected.

    Args:
        scenario: what to run; a target ε is calibrated to its planned rounds.
        sizes: coefficients of each band, the band that all devices hold first.
        holders: training devices that hold each band.

    Raises:
        UsageError: when no noise meets the target, a band has too few devices, or a sum could wrap
            around.
    """
    privacy = scenario.privacy
    encoding = encoding_of(scenario, sum(sizes))
    ring = Ring(privacy.ring_bits)
    minimums = minimums_of(scenario, holders)
    if privacy.noise != "distributed":
        protection = Protection(encoding, ring, None, minimums)
        event = event_without_shares(scenario)
    else:
        bands = _bands(scenario, sizes, holders, minimums)
        spoiled = _small_cohorts(scenario, holders, minimums)
        grid = grid_of(encoding.squared_bound, bands, privacy.remove_excess, spoiled)
        event = _calibrated(
            scenario, lambda z: RoundEvent("discrete_gaussian", z, _rate(scenario), grid)
        )
        shares = Shares(
            event.noise_multiplier, encoding.squared_bound, bands, privacy.remove_excess
        )
        protection = Protection(encoding, ring, shares, minimums)
    _check_ring(scenario, protection, sizes, holders)
    return event, protection


def event_without_shares(scenario: Scenario) -> RoundEvent:
    """The event of each round with central noise, or with none; no sizes matter to it."""
    return _calibrated(scenario, lambda z: RoundEvent("gaussian", z, _rate(scenario)))


def example_event(scenario: Scenario) -> RoundEvent | None:
    """The example-level event of a round on each device that takes part; None without local noise.

    All steps of a round together are one Gaussian mechanism, since each example is in one of them
    (:mod:`privrec.device.examples`). Sampling of devices amplifies nothing at this level: that a
    device is there at all moves a sum by more than one example.
    """
    privacy = scenario.privacy
    if privacy.local == "none":
        return None
    multiplier = privacy.local_noise_multiplier
    if multiplier is None:
        multiplier = _example_multiplier(
            privacy.local_epsilon or 0.0, privacy.local_delta, scenario.train.rounds
        )
    return RoundEvent("gaussian", multiplier)


def release_event(scenario: Scenario) -> RoundEvent | None:
    """What the release of the popularity order costs; None where none is released."""
    devices, delta = scenario.devices, scenario.privacy.delta
    if devices.popularity != "released" or devices.popularity_epsilon is None:
        return None
    event_of = partial(RoundEvent, "gaussian")
    return event_of(noise_multiplier_for(devices.popularity_epsilon, delta, event_of, 1, "server"))


@lru_cache(maxsize=64)
def _example_multiplier(target: float, delta: float, rounds: int) -> float:
    return noise_multiplier_for(target, delta, partial(RoundEvent, "gaussian"), rounds, "server")


def encoding_of(scenario: Scenario, dimension: int) -> Encoding:
    """Clip norm and integer grid."""
    clip_norm = scenario.privacy.clip_norm or LOOSE_CLIP_NORM
    return Encoding(clip_norm, dimension, scenario.privacy.scale_bits)


def minimums_of(scenario: Scenario, holders: Sequence[int]) -> tuple[int, ...]:
    """Fewest survivors of each band; none where sums of any number of devices are taken.

    Raises:
        UsageError: when a band has fewer devices in a round than each device insists on.
    """
    privacy, least = scenario.privacy, scenario.devices.min_cohort
    if privacy.noise != "distributed" and scenario.run.secure_sum == "exact":
        return ()
    expected = [_rate(scenario) * devices for devices in holders]
    minimums = [max(least, math.floor(privacy.least_survivors * each) + 1) for each in expected]
    for needed, each in zip(minimums, expected, strict=True):
        if needed > each:
            raise UsageError(
                f"{each:.4g} devices hold a part of the model in a round on average, and at least "
                f"{needed} must: devices.min_cohort = {least}, privacy.least_survivors = "
                f"{privacy.least_survivors:g}; sample more devices, lower them, or drop a tier"
            )
    return tuple(minimums)


def _calibrated(scenario: Scenario, event_of: Callable[[float], RoundEvent]) -> RoundEvent:
    privacy = scenario.privacy
    if privacy.noise == "none":
        return RoundEvent("none", 0.0, _rate(scenario))
    noise_multiplier = privacy.noise_multiplier
    if noise_multiplier is None:
        noise_multiplier = noise_multiplier_for(
            privacy.epsilon or 0.0, privacy.delta, event_of, scenario.train.rounds,
            privacy.budget_against, before=release_event(scenario),
        )  # fmt: skip
    return event_of(noise_multiplier)


def _bands(
    scenario: Scenario, sizes: Sequence[int], holders: Sequence[int], minimums: Sequence[int]
) -> tuple[Band, ...]:
    """The bands, with as many colluders as are assumed among the devices of a large round."""
    colluding, rate = scenario.privacy.colluding_share, _rate(scenario)
    return tuple(
        Band(size, least, math.ceil(colluding * _most(devices, rate)))
        for size, least, devices in zip(sizes, minimums, holders, strict=True)
    )


def _most(devices: int, rate: float) -> int:
    """Devices in a round, which are more with a chance of at most :data:`LARGEST_WRAP`."""
    return int(binom.isf(LARGEST_WRAP, devices, rate))


def _small_cohorts(scenario: Scenario, holders: Sequence[int], minimums: Sequence[int]) -> float:
    """What a round adds to δ because small cohorts release nothing."""
    staying = _rate(scenario) * (1 - scenario.devices.dropout_rate)
    if _rate(scenario) == 1:
        return 0.0  # everybody is sampled: there is no secrecy of sampling to spoil
    crowds = [Crowd(devices, least) for devices, least in zip(holders, minimums, strict=True)]
    check_small_cohorts(crowds, staying, scenario.train.rounds, scenario.privacy.delta)
    return small_cohort_delta(crowds, staying, 1)


def _check_ring(
    scenario: Scenario, protection: Protection, sizes: Sequence[int], holders: Sequence[int]
) -> None:
    shares = protection.shares
    small = protection.ring.bits == SMALL_RING_BITS
    for band, (size, devices) in enumerate(zip(sizes, holders, strict=True)):
        most = _most(devices, _rate(scenario))
        noise = 0.0
        if shares is not None:
            kept = shares.kept(band, max(most, shares.bands[band].least))
            noise = kept * shares.noise_multiplier**2 / shares.bands[band].shares
        load = Load(size, most, noise, spread(size) if small else 1)
        protection.ring.check(protection.encoding, load)


def _rate(scenario: Scenario) -> float:
    return scenario.devices.sampling_rate
