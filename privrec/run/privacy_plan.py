"""What a scenario's ``[privacy]`` makes every party agree on: event, sensitivity, noise and ring.

It looks at sizes and numbers of devices alone, so that a plan is made before any data is touched.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from scipy.special import bdtrc

from privrec.device.update import (
    FIGURES,
    SMALL_RING_BITS,
    Counting,
    Evaluating,
    Protection,
)
from privrec.embedding.nested import Nested, nested
from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable, Table
from privrec.errors import UsageError
from privrec.privacy.discrete import Grid, check_small_cohorts
from privrec.privacy.events import (
    Accountant,
    Adversary,
    RoundEvent,
    epsilon,
    noise_multiplier_for,
)
from privrec.privacy.mechanism import Band, Shares, grid_of
from privrec.randomness import rng_for
from privrec.scenario.kinds import PUBLISHED
from privrec.scenario.load import Scenario
from privrec.secagg.ring import LARGEST_WRAP, Encoding, Load, Ring, spread

LOOSE_CLIP_NORM = 100.0
"""Clip norm of a run without noise that names none: a range for the integers, rarely reached."""

EPSILONS: Mapping[str, tuple[Adversary, Accountant]] = {
    "epsilon": ("recipients", "pld"),
    "epsilon_server": ("server", "pld"),
    "epsilon_rdp": ("recipients", "rdp"),
    "epsilon_server_rdp": ("server", "rdp"),
}
"""Every ε of a claim: its adversary and its accountant."""

Coordinates = tuple[Nested, Nested | None]

EXAMPLE_ADVERSARIES: Mapping[str, str] = {"example": "uploads", "shares": "sums"}
"""Whoever sees what the ε of single interactions holds against, by ``privacy.local``."""

COUNTED_BITS = 13
"""A vector of a side sum is no longer than two to this, in steps of the grid, if there is room."""

COARSEST = 5.0
"""Least steps of the bound of an example over what rounding may add to its norm."""


def known_catalogue(scenario: Scenario, counted: int | None = None) -> int | None:
    """Size of the catalogue, or all words: ``counted``, or public without looking at the data."""
    data = scenario.data
    items: int | None = counted or getattr(data, "items", None)
    if items is None and data.source in PUBLISHED:
        _, items, _ = PUBLISHED[data.source]
    return items


def known_items(scenario: Scenario, counted: int | None = None) -> int | None:
    """The same, of words those alone that the vocabulary has room for."""
    items, most = known_catalogue(scenario, counted), getattr(scenario.data, "vocabulary", None)
    return items if items is None or most is None else min(items, most)


def tables_of(scenario: Scenario, n_items: int) -> tuple[Table, Table | None]:
    """Tables of item vectors and biases at capacity 1, hashed where compressed or folded."""
    model, order = scenario.model, scenario.devices.order
    whole = all(tier.capacity in (0, 1) for tier in scenario.devices.chain)
    plain = order != "fold" or (whole and model.compression == 1)
    keys = rng_for(scenario.run.seed, "subspace").integers(2**63, size=2).tolist()

    def table(dim: int, block: int, key: int) -> Table:
        if plain:
            return PlainTable.of(n_items, dim, block=block, by_part=order == "dims")
        return Subspace.sized(n_items, dim, block=block, key=key, compression=model.compression)

    return table(model.dim, model.block, keys[0]), table(1, 1, keys[1]) if model.item_bias else None


def coordinates_of(
    scenario: Scenario, tables: tuple[Table, Table | None], halvings: list[int]
) -> Coordinates:
    """Nested coordinates of item vectors and biases."""
    (vectors, biases), order = tables, scenario.devices.order
    # Item biases of the first dimensions are those of all items.
    same = [0] * len(halvings) if order == "dims" else halvings
    chain = nested(vectors, halvings)
    return chain, None if biases is None else nested(biases, same)


def plan_privacy(
    scenario: Scenario,
    sizes: Sequence[int],
    holders: Sequence[int],
    calibrated: float | None = None,
    beside: Sequence[RoundEvent] = (),
) -> tuple[RoundEvent, RoundEvent | None, Protection]:
    """Return the privacy event of each round, that of its examples, and how updates are protected.

    A target ε is calibrated to the planned attempts, unless ``calibrated`` is the noise multiplier
    that was found for the same arguments before. ``sizes`` are the coefficients of each band and
    ``holders`` the training devices that hold it, the band that all devices hold first; ``beside``
    is what is released before and after the rounds. A UsageError says that no noise meets the
    target, a band has too few devices, or a sum could wrap.
    """
    privacy, rate = scenario.privacy, scenario.devices.sampling_rate
    encoding, ring = encoding_of(scenario, sum(sizes)), Ring(privacy.ring_bits)
    minimums = _minimums(scenario, holders, rate)
    most = [most_sampled(devices, rate) for devices in holders]
    examples = example_event(scenario, sizes, holders)
    shares: Shares | None = None
    if privacy.noise != "distributed":
        event = event_without_shares(scenario)
        if examples is not None and examples.grid is not None:
            moved, bands = examples.grid.squared_sensitivity, _bands(scenario, sizes, holders, rate)
            shares = Shares(examples.noise_multiplier, moved, bands, privacy.remove_excess)
    else:
        bands = _bands(scenario, sizes, holders, rate)
        spoiled, bound = 0.0, encoding.squared_bound
        if rate < 1:  # when everybody is sampled, there is no secrecy of sampling to spoil
            crowds = list(zip(holders, minimums, strict=True))
            staying = rate * (1 - scenario.devices.dropout_rate)
            spoiled = check_small_cohorts(crowds, staying, attempts_of(scenario), privacy.delta)
        grid = grid_of(bound, bands, privacy.remove_excess, spoiled)
        made = partial(_distributed, rate, grid)
        event = made(calibrated) if calibrated else _calibrated(scenario, made, beside)
        shares = Shares(event.noise_multiplier, bound, bands, privacy.remove_excess)
    for band, (size, many) in enumerate(zip(sizes, most, strict=True)):
        noise = 0.0
        if shares is not None:
            kept = shares.kept(band, max(many, shares.bands[band].least))
            noise = kept * float(shares.share_variance(band)) / encoding.squared_bound
        peak = spread(size) if ring.bits == SMALL_RING_BITS else 1
        ring.check(encoding, Load(size, many, noise, peak))
    return event, examples, Protection(encoding, ring, shares, minimums)


def _distributed(rate: float, grid: Grid, noise_multiplier: float) -> RoundEvent:
    return RoundEvent("discrete_gaussian", noise_multiplier, rate, grid)


def most_sampled(devices: int, rate: float) -> int:
    """Devices in a round, which are more with a chance of at most ``LARGEST_WRAP``."""
    counts = range(devices + 1)
    return bisect_left(counts, True, key=lambda k: bool(bdtrc(k, devices, rate) <= LARGEST_WRAP))


def event_without_shares(scenario: Scenario) -> RoundEvent:
    """Return the event of each round with central noise, or none; no sizes matter to it."""
    rate, beside = scenario.devices.sampling_rate, beside_without_shares(scenario)
    return _calibrated(scenario, lambda z: RoundEvent("gaussian", z, rate), beside)


def example_event(
    scenario: Scenario, sizes: Sequence[int], holders: Sequence[int]
) -> RoundEvent | None:
    """Return the example-level event of a round on each device in it; None without local noise.

    All steps of a round together are one mechanism, since each example is in one of them
    (:mod:`privrec.device.examples`, and :mod:`privrec.device.example_shares` with noise in shares).
    Sampling of devices amplifies nothing at this level: that a device is there at all moves a sum
    by more than one example. ``sizes`` and ``holders`` are those of :func:`plan_privacy`.
    """
    privacy = scenario.privacy
    if privacy.local == "none":
        return None
    grid = None
    if privacy.local == "shares":
        bands = _bands(scenario, sizes, holders, scenario.devices.sampling_rate)
        reach = reach_of(scenario, sum(sizes))
        grid = grid_of((2 * reach) ** 2, bands, privacy.remove_excess)
    multiplier = privacy.local_noise_multiplier
    if multiplier is None:
        target = privacy.local_epsilon or 0.0
        multiplier = _everybody(target, privacy.local_delta, attempts_of(scenario), grid)
    return _event(grid, multiplier)


def reach_of(scenario: Scenario, dimension: int) -> int:
    """Largest norm of an example in steps of the grid: half of what changing one moves."""
    privacy, train, model = scenario.privacy, scenario.train, scenario.model
    encoding = encoding_of(scenario, dimension)
    reach = math.floor(train.local_lr * (privacy.local_clip_norm or 0.0) / 2 * encoding.scale)
    samples = 1 + getattr(train, "negatives", 0)
    own = model.dim + 1 + model.dense_weights(model.dim) + samples * (model.dim + model.item_bias)
    least = math.ceil(COARSEST * math.sqrt(own))
    if reach < least:
        raise UsageError(
            f"an interaction has a norm of at most {reach} steps of the integer grid, and rounding "
            f"its {own} coefficients needs {least}: raise privacy.scale_bits = "
            f"{privacy.scale_bits:g}, or lower privacy.clip_norm = {encoding.clip_norm:g} towards "
            "train.local_lr times privacy.local_clip_norm"
        )
    return reach


def _event(grid: Grid | None, multiplier: float) -> RoundEvent:
    return RoundEvent("discrete_gaussian" if grid else "gaussian", multiplier, 1.0, grid)


def example_figures(
    scenario: Scenario, charged: Mapping[RoundEvent, int], *, noise_known: bool
) -> dict[str, Any] | None:
    """The guarantee of single interactions; None where devices hide none.

    That ε stands beside the one of users and is never added to it: they bound different changes of
    the data, and are of two units.
    """
    privacy = scenario.privacy
    if privacy.local == "none":
        return None
    value = epsilon(charged, privacy.local_delta, "server")
    holds = not noise_known and math.isfinite(value) and bool(charged)
    return {
        "epsilon": value if holds else None,
        "delta": privacy.local_delta,
        "noise_multiplier": min((event.noise_multiplier for event in charged), default=None),
        "clip_norm": privacy.local_clip_norm,
        "budget": privacy.local_epsilon,
        "adversary": EXAMPLE_ADVERSARIES[privacy.local],
        "charges": sum(charged.values()),
    }


def beside_without_shares(scenario: Scenario) -> tuple[RoundEvent, ...]:
    """Return what is charged beside rounds with central noise; no sizes matter to it."""
    spent = _popularity_epsilon(scenario), scenario.privacy.evaluation_epsilon
    return tuple(_once(scenario, each, None) for each in spent if each is not None)


def _popularity_epsilon(scenario: Scenario) -> float | None:
    """ε of the order of popularity; None where none is released."""
    devices = scenario.devices
    return devices.popularity_epsilon if devices.popularity == "released" else None


def _once(scenario: Scenario, epsilon: float, grid: Grid | None) -> RoundEvent:
    return _event(grid, _everybody(epsilon, scenario.privacy.delta, 1, grid))


def enrolled(scenario: Scenario, users: int) -> int:
    """Return how many of the users have a device of some capacity."""
    shares = math.fsum(tier.share for tier in scenario.devices.chain if tier.capacity != 0)
    return round(shares * users)


def counting_of(scenario: Scenario, items: int, devices: int) -> Counting | None:
    """Return how the order of popularity is released; None where none is."""
    spent, most = _popularity_epsilon(scenario), min(scenario.devices.popularity_items, items)
    if spent is None:
        return None
    return Counting(items, most, *_side_sum(scenario, items, most, devices, spent))


def evaluating_of(scenario: Scenario, devices: int) -> Evaluating | None:
    """Return how the accuracy of the last model is released; None where it is not."""
    spent, size = scenario.privacy.evaluation_epsilon, len(FIGURES)
    if spent is None:
        return None
    planned = _side_sum(scenario, size, size, devices, spent)
    return Evaluating(size, size, *planned, index=scenario.train.rounds)


def _side_sum(
    scenario: Scenario, size: int, most: int, devices: int, epsilon: float
) -> tuple[int, RoundEvent, Protection]:
    """Step, event and protection of a :class:`SideSum` that costs ``epsilon``.

    All ``devices`` take part. With noise in shares they add their own, like that of a round, so
    that the ε holds against the server too; else the server adds Gaussian noise. The grid is the
    finest, of at most :data:`COUNTED_BITS`, on which no sum of theirs wraps around.
    """
    ring, privacy, event = Ring(), scenario.privacy, _once(scenario, epsilon, None)
    minimums, shares = _minimums(scenario, [devices], 1.0), None
    for bits in range(max(0, math.floor(COUNTED_BITS - math.log2(most) / 2)), -1, -1):
        step, noise = 1 << bits, 0.0
        if privacy.in_shares:
            moved, bands = most * step**2, _bands(scenario, [size], [devices], 1.0)
            event = _once(scenario, epsilon, grid_of(moved, bands, privacy.remove_excess))
            shares = Shares(event.noise_multiplier, moved, bands, privacy.remove_excess)
            noise = event.noise_multiplier**2 * devices / bands[0].shares
        length, load = math.sqrt(most), Load(size, devices, noise)
        encoding = Encoding(length, size, math.log2(step * length))
        if ring.wrap_probability(encoding, load) <= LARGEST_WRAP:
            break
    ring.check(encoding, load)
    return step, event, Protection(encoding, ring, shares, minimums)


def charges_of(
    scenario: Scenario, event: RoundEvent, beside: Sequence[RoundEvent]
) -> Counter[RoundEvent]:
    """Return all that a run charges: rounds with their spare attempts, and what is ``beside``."""
    return Counter({event: attempts_of(scenario)}) + Counter(beside)


def attempts_of(scenario: Scenario) -> int:
    """Return the attempts at rounds that the budget is planned for."""
    return scenario.train.rounds + scenario.privacy.spare_attempts


@lru_cache(maxsize=64)
def _everybody(target: float, delta: float, attempts: int, grid: Grid | None) -> float:
    """The multiplier of so many mechanisms that everybody takes part in."""
    return noise_multiplier_for(target, delta, partial(_event, grid), attempts, "server")


def encoding_of(scenario: Scenario, dimension: int) -> Encoding:
    """Return the clip norm and the integer grid."""
    clip_norm = scenario.privacy.clip_norm or LOOSE_CLIP_NORM
    return Encoding(clip_norm, dimension, scenario.privacy.scale_bits)


def _bands(
    scenario: Scenario, sizes: Sequence[int], holders: Sequence[int], rate: float
) -> tuple[Band, ...]:
    """Bands with noise in shares: of a large round's devices, as many collude as are assumed to."""
    colluding, minimums = scenario.privacy.colluding_share, _minimums(scenario, holders, rate)
    most = [most_sampled(devices, rate) for devices in holders]
    return tuple(
        Band(size, least, math.ceil(colluding * many))
        for size, least, many in zip(sizes, minimums, most, strict=True)
    )


def _minimums(scenario: Scenario, holders: Sequence[int], rate: float) -> tuple[int, ...]:
    """Fewest survivors of each band; none where sums of any number of devices are taken."""
    privacy, least = scenario.privacy, scenario.devices.min_cohort
    if not privacy.in_shares and scenario.run.secure_sum == "exact":
        return ()
    minimums = []
    for devices in holders:
        expected = rate * devices
        needed = max(least, math.floor(privacy.least_survivors * expected) + 1)
        if needed > expected:
            raise UsageError(
                f"{expected:.4g} devices hold a part of the model in a round on average, and at "
                f"least {needed} must: devices.min_cohort = {least}, privacy.least_survivors = "
                f"{privacy.least_survivors:g}; sample more devices, lower them, or drop a tier"
            )
        minimums.append(needed)
    return tuple(minimums)


def _calibrated(
    scenario: Scenario, event_of: Callable[[float], RoundEvent], beside: Sequence[RoundEvent]
) -> RoundEvent:
    privacy = scenario.privacy
    if privacy.noise == "none":
        return RoundEvent("none", 0.0, scenario.devices.sampling_rate)
    multiplier = privacy.noise_multiplier
    if multiplier is None:
        multiplier = noise_multiplier_for(
            privacy.epsilon or 0.0,
            privacy.delta,
            event_of,
            attempts_of(scenario),
            privacy.budget_against,
            beside=beside,
        )
    return event_of(multiplier)
