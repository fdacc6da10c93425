"""Noise on the integer sum: the server's own, or shares of devices that nobody can take off.

:func:`rounded_gaussian` is the noise of ``noise = "central"``; all else here is distributed noise.

In a band at least ``t`` survivors are needed and ``c`` colluders are assumed, who know their own
shares, so that ``m = t - c`` shares are sure to be secret. A share has the variance ``σ² / m`` in
**every** coefficient of the device's prefix, touched or not. A sum of ``s`` survivors carries
``s σ² / m``: more than the accounted ``σ²``.

**Removing the excess.** A share is drawn from a seed of its own for each band. Once the survivors
are agreed on and signed, those that come after the first ``t`` signers in the agreed order give
their seeds away; whoever sums up draws those shares again and subtracts them. Exactly ``t`` shares
are left, whatever the number of survivors from ``t`` on, of which at least ``m`` are secret: ``σ²``
exactly without colluders, ``σ² t / (t - c)`` if all colluders were honest about their noise after
all. (Survivors that fell silent before they signed, and come before the ``t``-th that did, leave
their shares on top; how many they are says nothing of the size of the cohort.) The sum protects
everybody's update, also that of a device whose share is gone: the server sees sums alone. (XNoise,
Jiang et al. 2024, gives each device one component for every drop-out that it may tolerate and so
draws and shares n - t + 1 of them; with whole shares there is one, for the same result.)

**Security condition.** A seed is revealed only when (1) the device itself, or the quorum that holds
the shares of its seed, has seen that one and the same set of survivors was confirmed by the quorum
of the round; (2) that set has at least ``t`` devices in the band; (3) the device is among those
that :meth:`Shares.removed` names for it, given signatures that it has checked; and (4) no other set
is ever confirmed in this attempt. Then the shares of the first ``t`` signers of all stay secret,
whichever part of the signatures each device is shown, and an adversary with ``c`` colluders misses
``m``. Survivors that did not sign count for nothing: a server can name devices that were never
there, by prekeys that were opened when they dropped out of an earlier round. Which devices are
named does not matter for this bound, so the order may be public.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from privrec.errors import ReleaseRefused, UsageError
from privrec.privacy.discrete import Grid, check_variance, discrete_gaussian
from privrec.privacy.events import RoundEvent
from privrec.randomness import Name, SecretRoot, SecureStream

Device = TypeVar("Device")

LARGEST_SIGMA = 2.0**40
SEED_BYTES = 32
_BLOCK = 1 << 16


def rounded_gaussian(stream: SecureStream, sigma: float, size: int) -> NDArray[np.int64]:
    """Gaussian noise rounded on the integer grid, one independent draw a coefficient.

    Promise: added to an integer sum of L2 sensitivity ``B``, it gives exactly what the Gaussian
    mechanism of noise multiplier ``sigma / B`` gives, rounded. Rounding commutes with adding an
    integer, so it is post-processing and the accounting of the Gaussian holds unchanged; a rounded
    output also has no float artefacts from which the sum could be read.

    ``stream`` is of this draw alone. ``sigma`` is the deviation before rounding, in integer steps,
    above 0 and at most 2^40 (UsageError outside); above 1, the variance is ``sigma² + 1/12``.
    """
    if not (math.isfinite(sigma) and 0 < sigma <= LARGEST_SIGMA):
        raise UsageError(
            f"noise of standard deviation {sigma} steps: it must be above 0 and at most 2^40; "
            "check privacy.noise_multiplier and privacy.scale_bits"
        )
    noise = np.empty(size, dtype=np.int64)
    for start in range(0, size, _BLOCK):
        part = noise[start : start + _BLOCK]
        deviates = stream.normal(len(part))
        deviates *= sigma
        np.rint(deviates, out=deviates)
        part[:] = deviates
    return noise


@dataclass(frozen=True)
class Band:
    """Coefficients that the same devices hold; ``least`` is ``t``, the fewest survivors.

    ``colluders`` is ``c``, the devices in it that are assumed to tell the server their noise, or to
    add none; at least 0 and below ``least``.
    """

    size: int
    least: int
    colluders: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.colluders < self.least:
            raise UsageError(
                f"a band with {self.colluders} colluders among {self.least} fewest survivors: there"
                " must be fewer colluders than survivors; raise the fewest survivors of the band"
            )

    @property
    def shares(self) -> int:
        """``m``, the shares that stay secret whatever happens."""
        return self.least - self.colluders


@dataclass(frozen=True)
class Shares:
    """The distributed noise of a round; UsageError when too narrow or wide to be accounted.

    Promise: a device's share is a function of its seeds, the same on every platform; the sum over
    survivors, less what :meth:`excess` gives, has in each coefficient of a band :meth:`kept` times
    :meth:`share_variance`, and what is accounted of it never falls below ``σ²``.

    Attributes:
        squared_sensitivity: largest squared norm of one device's integers, ``squared_bound``.
        bands: of the whole vector, in its order; a device holds a prefix of them.
        remove_excess: whether the sum keeps ``least`` shares of each band.
    """

    noise_multiplier: float
    squared_sensitivity: int
    bands: tuple[Band, ...]
    remove_excess: bool = False

    def __post_init__(self) -> None:
        self.event(1.0)
        for band in range(len(self.bands)):
            check_variance(self.share_variance(band))

    @property
    def variance(self) -> Fraction:
        """``σ²``, the accounted variance of the sum in every coefficient, in squared steps."""
        return Fraction(self.noise_multiplier) ** 2 * self.squared_sensitivity

    def share_variance(self, band: int) -> Fraction:
        """Variance of one device's share in each coefficient of a band."""
        return self.variance / self.bands[band].shares

    def kept(self, band: int, survivors: int) -> int:
        """Shares left in the released sum of a band; ReleaseRefused for too few survivors."""
        if survivors < self.bands[band].least:
            raise ReleaseRefused(
                f"{survivors} survivors in band {band}, and at least {self.bands[band].least} are "
                "needed for its noise to be what is accounted; nothing is released"
            )
        return self.bands[band].least if self.remove_excess else survivors

    def event(self, sampling_rate: float) -> RoundEvent:
        """What a round costs that samples each user with this rate, in (0, 1]."""
        grid = grid_of(self.squared_sensitivity, self.bands, self.remove_excess)
        return RoundEvent("discrete_gaussian", self.noise_multiplier, sampling_rate, grid)

    def prepare(self) -> None:
        """Make the tables that draws look up, which processes forked hereafter then have too."""
        for band in range(len(self.bands)):
            discrete_gaussian(SecureStream(bytes(SEED_BYTES)), self.share_variance(band), 0)

    def draw(self, seeds: Sequence[bytes]) -> NDArray[np.int32]:
        """A device's share, which it adds to its integers: int32, of the length of its prefix.

        ``seeds`` has one of 32 bytes for each band of the prefix; UsageError otherwise.
        """
        parts = (self.draw_band(band, seed) for band, seed in enumerate(seeds))
        return np.concatenate([np.zeros(0, np.int32), *parts])

    def draw_band(self, band: int, seed: bytes) -> NDArray[np.int32]:
        """The part of a share in one band, int32, from the seed of that band."""
        if band >= len(self.bands) or len(seed) != SEED_BYTES:
            raise UsageError(
                f"a noise seed of {len(seed)} bytes for band {band}: it must have {SEED_BYTES}, "
                f"and there are {len(self.bands)} bands; take seeds from noise_seeds"
            )
        size = self.bands[band].size
        return discrete_gaussian(SecureStream(seed), self.share_variance(band), size)

    def removed(
        self, band: int, survivors: Sequence[Device], signers: Collection[Device] | None = None
    ) -> tuple[Device, ...]:
        """The survivors whose seed of a band is revealed: those after the fewest who signed.

        A device asks this about the holders of the band that were confirmed to it, in the order all
        agree on, never about those that the server names later; the server asks about the same.
        ``signers`` are known to have confirmed, all by default. Nobody is named without
        ``remove_excess``. ReleaseRefused for fewer than the band needs, or one named twice.
        """
        if len(set(survivors)) < len(survivors):
            raise ReleaseRefused(f"band {band}: a survivor is named twice; nothing is revealed")
        there = [n for n, d in enumerate(survivors) if signers is None or d in signers]
        last = there[self.kept(band, len(there)) - 1]
        return tuple(survivors[last + 1 :]) if self.remove_excess else ()

    def excess(self, seeds: Sequence[Sequence[bytes]]) -> NDArray[np.int64]:
        """The sum of the shares to subtract from the unmasked sum: int64, of the whole vector.

        ``seeds`` has a list for each band, of what the devices that :meth:`removed` names revealed.
        """
        total = [np.zeros(band.size, np.int64) for band in self.bands]
        for band, (part, revealed) in enumerate(zip(total, seeds, strict=True)):
            for seed in revealed:
                part += self.draw_band(band, seed)
        return np.concatenate(total)


def grid_of(
    squared_sensitivity: int,
    bands: Sequence[Band],
    remove_excess: bool,
    small_cohort_delta: float = 0.0,
) -> Grid:
    """What accounting depends on besides the noise; the band of the narrowest shares decides."""
    size, narrowest = sum(band.size for band in bands), max(band.shares for band in bands)
    return Grid(squared_sensitivity, size, narrowest, remove_excess, small_cohort_delta)


def noise_seeds(root: SecretRoot, bands: int, *context: Name) -> tuple[bytes, ...]:
    """The seeds of a device's share, one of 32 bytes for each band that it holds.

    Promise: the same root and context give the same seeds, any other independent ones; a seed tells
    nothing of the other bands' seeds, nor of the device's root.

    ``context`` is what the share is for: run, round, attempt, device and hashes of the plan and the
    model. The integer input belongs to it where seeds are made after it. Where they are shared out
    before, a device must never send two inputs in one attempt: its masks would repeat too.
    """
    return tuple(root.tag("noise share", *context, band) for band in range(bands))
