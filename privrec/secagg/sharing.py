"""Secrets in shares: who holds whose, how many give one back, and how they are split.

Up to 200 devices everybody is everybody's neighbour. Beyond, each device draws its own 100
neighbours when it holds the roster, uniformly and from its own secret generator, and as many among
the holders of each further band (``docs/protocol.md``). So neither the server nor colluding devices
can influence who holds the shares of an honest device: they can only add edges, between which masks
are known to them anyway. A hash of the roster would not do, since the server could try rosters
until it likes the graph; a joint coin would be biased by whoever stays away.

Nothing here is negotiated: degree and thresholds follow from the number of devices.
Sources: Bell, Bonawitz, Gascón, Lepoint & Raykova, "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead" (CCS 2020) for sparse graphs; Shamir, "How to Share a Secret" (CACM
1979), here over a prime field of 256 bits.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

from privrec.errors import ReleaseRefused, UsageError
from privrec.randomness import SecureStream
from privrec.secagg.messages import SECRET_BYTES

MAX_FAILURE = 2.0**-40
PRIME = 2**256 - 189

Numbers = int | NDArray[np.int64]


@dataclass(frozen=True)
class Graph:
    """The neighbourhoods of a cohort: all others, or ``degree`` of them in a larger one.

    Both numbers are constants of the protocol; they are bound into every mask, so that devices of
    different opinions do not complete a round. Tests make them small.
    """

    complete_up_to: int = 200
    degree: int = 100

    def neighbours(self, devices: int) -> int:
        """How many devices hold the shares of one device."""
        return devices - 1 if devices <= self.complete_up_to else min(self.degree, devices - 1)

    def is_complete(self, devices: int) -> bool:
        """Whether everybody is a neighbour of everybody."""
        return self.neighbours(devices) == devices - 1

    def quorum(self, devices: int) -> int:
        """How many devices of a roster must confirm the same survivors.

        More than two thirds: two different quorums share an honest device as long as fewer than
        ``2 * quorum - devices`` collude, and an honest device confirms once.
        """
        return 2 * devices // 3 + 1

    def threshold(self, devices: int) -> int:
        """How many shares give a secret back: over two thirds of a device and its neighbours."""
        return 2 * (self.neighbours(devices) + 1) // 3 + 1

    def draw(self, own: int, among: Sequence[int], stream: SecureStream) -> tuple[int, ...]:
        """The neighbours of device ``own``, uniform among others, ascending.

        ``among`` is ascending and has ``own``; ``stream`` is the device's own for this attempt.
        """
        if self.is_complete(len(among)):
            return tuple(number for number in among if number != own)
        count = self.neighbours(len(among))
        lots = stream.uint64(len(among))
        lots[bisect_left(among, own)] = np.iinfo(np.uint64).max
        # A tie with the own lot has a chance of 2^-64 for each other device.
        return tuple(among[i] for i in sorted(np.argpartition(lots, count)[:count].tolist()))

    def check(self, holders: Sequence[int], corrupt_share: float) -> None:
        """Refuse a cohort that would be unsafe with this share of colluding devices in every band.

        It is when colluders could make two quorums, or the chance that some device drew its
        neighbours badly exceeds :data:`MAX_FAILURE`. ``holders`` counts those of each band.
        """
        devices = holders[0]
        corrupt = [math.floor(corrupt_share * count) for count in holders]
        excess = 2 * self.quorum(devices) - devices
        if corrupt[0] >= excess:
            raise ReleaseRefused(
                f"{corrupt[0]} of {devices} devices may collude, and fewer than {excess} may; "
                "assume a smaller share, or take part among more devices"
            )
        chance = sum(map(self.failure, holders, corrupt))
        if chance > MAX_FAILURE:
            raise ReleaseRefused(
                f"with {corrupt[0]} colluders among {devices} devices, neighbours are drawn badly "
                f"with a chance of 2^{math.log2(chance):.0f}, above 2^-40; assume a smaller share"
            )

    def failure(self, devices: int, corrupt: int) -> float:
        """Upper bound of the chance that neighbourhoods, drawn among holders, are unsafe."""
        if self.is_complete(devices):
            return 0.0
        return _failure(devices, corrupt, self.neighbours(devices), self.threshold(devices))


@functools.lru_cache(maxsize=64)
def _failure(devices: int, corrupt: int, degree: int, threshold: int) -> float:
    """Union bound over devices and over sets of devices.

    A device is lost when colluders among its neighbours could get both kinds of its shares. A set
    of s honest devices is opened apart from the rest only if each of them found all but one of its
    quorum within the set and the colluders.
    """
    lone = math.log(devices) + _tail(devices - 1, corrupt, degree, 2 * threshold - degree)
    honest = devices - corrupt
    sizes = np.arange(1, honest // 2 + 1)
    inside = np.minimum(devices - 1, sizes - 1 + corrupt)
    sets = _choose(honest, sizes) + sizes * _tail(devices - 1, inside, degree, threshold - 1)
    return float(min(1.0, np.exp(logsumexp(np.append(sets, lone)))))


def _tail(population: int, marked: Numbers, draws: int, least: int) -> NDArray[np.float64]:
    """Logarithm of the chance to draw ``least`` or more of the marked, without replacement."""
    hits = np.arange(least, draws + 1)
    marked = np.asarray(marked)[..., None]
    possible = (hits <= marked) & (draws - hits <= population - marked)
    ways = _choose(marked, np.minimum(hits, marked)) + _choose(
        population - marked, np.minimum(draws - hits, population - marked)
    )
    total = logsumexp(np.where(possible, ways, -np.inf), axis=-1)
    return np.minimum(0.0, total - _choose(population, draws))


def _choose(n: Numbers, k: Numbers) -> NDArray[np.float64]:
    """Logarithm of the binomial coefficient."""
    return np.asarray(gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(np.subtract(n, k) + 1.0))


def split_secrets(
    secrets: Sequence[bytes], threshold: int, points: Sequence[int], stream: SecureStream
) -> list[list[bytes]]:
    """Shares of each secret, any ``threshold`` of which give it back and fewer say nothing.

    Args:
        secrets: each 32 bytes that are, as a little-endian integer, below :data:`PRIME` (as random
            bytes are but for a chance of 2^-248).
        threshold: at least 1.
        points: where the polynomials are evaluated: distinct, from 1 to 2^32.
        stream: decides the polynomials. The coefficients are reduced 256-bit words, which are
            uniform but for a chance of 2^-248.
    """
    constants = [int.from_bytes(secret, "little") for secret in secrets]
    if max(constants) >= PRIME:
        raise UsageError("a secret of 256 bits that is no element of the field; draw another one")
    # All polynomials side by side in one wide integer: Horner's rule costs one product for all of
    # them, and is reduced once at the end, since points are small.
    width = 256 + threshold * max(points).bit_length() + threshold.bit_length()
    rows = [[_element(stream) for _ in range(threshold - 1)] + [c] for c in constants]
    wide = [sum(row[i] << (width * j) for j, row in enumerate(rows)) for i in range(threshold)]
    values = []
    for point in points:
        value = 0
        for coefficient in wide:
            value = value * point + coefficient
        values.append(value)
    mask = (1 << width) - 1
    return [
        [_share((value >> (width * j) & mask) % PRIME) for value in values]
        for j in range(len(secrets))
    ]


def combine_shares(shares: Sequence[bytes], points: Sequence[int]) -> bytes:
    """The secret behind a quorum of :func:`in_field` shares; anything when one is wrong."""
    values = [int.from_bytes(share, "little") for share in shares]
    return _share(sum(map(mul, _weights(tuple(points)), values)) % PRIME)


def in_field(share: bytes) -> bool:
    """Whether 32 bytes are an element of the field, as every share is."""
    return int.from_bytes(share, "little") < PRIME


@functools.lru_cache(maxsize=64)
def _weights(points: tuple[int, ...]) -> list[int]:
    """Lagrange's weights at zero: the product over j other than i of x_j / (x_j - x_i)."""
    product = math.prod(points)
    return [
        product * pow(x * math.prod(y - x for y in points if y != x), -1, PRIME) % PRIME
        for x in points
    ]


def _element(stream: SecureStream) -> int:
    return int.from_bytes(stream.bytes(SECRET_BYTES), "little") % PRIME


def _share(value: int) -> bytes:
    return value.to_bytes(SECRET_BYTES, "little")
