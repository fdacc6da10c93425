"""Shamir's secret sharing over a prime field of 256 bits.

Secrets are 32 bytes. Several secrets can be split at once, each by its own polynomial. Weights of
the reconstruction depend on the quorum alone, and are computed once for each.
Source: Shamir, "How to Share a Secret" (CACM 1979).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from operator import mul

from privrec.errors import UsageError
from privrec.randomness import SecureStream

PRIME = 2**256 - 189
SECRET_BYTES = 32


def split(
    secrets: Sequence[bytes], threshold: int, points: Sequence[int], stream: SecureStream
) -> list[list[bytes]]:
    """Shares of each secret, any ``threshold`` of which give it back and fewer say nothing.

    Args:
        secrets: each 32 bytes that are, as a little-endian integer, below :data:`PRIME` (as random
            bytes are but for a chance of 2^-248).
        threshold: shares that are needed, at least 1.
        points: where the polynomials are evaluated: distinct, from 1 to 2^32.
        stream: decides the polynomials. The coefficients are reduced 256-bit words, which are
            uniform but for a chance of 2^-248.

    Returns:
        For each secret the 32-byte shares in the order of ``points``.

    Raises:
        UsageError: when a secret is not below the prime.
    """
    constants = [int.from_bytes(secret, "little") for secret in secrets]
    if max(constants) >= PRIME:
        raise UsageError("a secret of 256 bits that is no element of the field; draw another one")
    # All polynomials side by side in one wide integer: Horner's rule costs one product for all of
    # them, and is reduced once at the end, since points are small.
    width = 256 + threshold * max(points).bit_length() + threshold.bit_length()
    rows = [[_element(stream) for _ in range(threshold - 1)] + [c] for c in constants]
    wide = [sum(row[i] << (width * j) for j, row in enumerate(rows)) for i in range(threshold)]
    values = [_horner(wide, point) for point in points]
    mask = (1 << width) - 1
    return [
        [_share((value >> (width * j) & mask) % PRIME) for value in values]
        for j in range(len(secrets))
    ]


def combine(shares: Sequence[bytes], points: Sequence[int]) -> bytes:
    """The secret behind a quorum of shares; anything at all when a share is wrong or missing.

    Args:
        shares: 32 bytes each; see :func:`in_field`.
        points: where they were evaluated, in the same order.
    """
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


def _horner(coefficients: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in coefficients:
        value = value * point + coefficient
    return value


def _element(stream: SecureStream) -> int:
    return int.from_bytes(stream.bytes(SECRET_BYTES), "little") % PRIME


def _share(value: int) -> bytes:
    return value.to_bytes(SECRET_BYTES, "little")
