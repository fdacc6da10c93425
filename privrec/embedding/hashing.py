"""The keyed hash that places items in the shared memory: a wire protocol, equal on every platform.

Part ``p`` of the virtual table is hashed to the ``p``-th output of splitmix64 seeded with the
table's key, so any part can be placed without a state and without a stored index.
Source: Steele, Lea & Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UInt64Array = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_BIJECTION_ROUNDS = 4


def splitmix64(seed: int, positions: NDArray[np.integer]) -> UInt64Array:
    """Outputs of splitmix64 seeded with ``seed`` at the given zero-based positions.

    Args:
        seed: any integer, taken modulo 2^64.
        positions: integers of any shape, taken modulo 2^64.

    Returns:
        uint64 array of the same shape; ``splitmix64(seed, arange(k))`` is the published sequence.
    """
    return finalise(steps(positions) + np.uint64(seed & 0xFFFFFFFFFFFFFFFF))


def steps(positions: NDArray[np.integer]) -> UInt64Array:
    """How far splitmix64's state has come at zero-based positions, whatever its seed."""
    z = np.asarray(positions).astype(np.uint64)
    z += np.uint64(1)
    z *= GOLDEN
    return z


def finalise(z: UInt64Array) -> UInt64Array:
    """Splitmix64's output function, in place: a bijection of 64-bit words that avalanches."""
    shifted = z >> np.uint64(30)
    z ^= shifted
    z *= _MIX_1
    np.right_shift(z, np.uint64(27), out=shifted)
    z ^= shifted
    z *= _MIX_2
    np.right_shift(z, np.uint64(31), out=shifted)
    z ^= shifted
    return z


def permute(key: int, positions: NDArray[np.integer], bits: int) -> UInt64Array:
    """A keyed bijection of ``[0, 2^bits)`` applied to ``positions``.

    Each round is invertible on ``bits``-bit words: an odd multiplication and an addition carry low
    bits upwards, and a xor with the upper half brings them down again, so that folding by the low
    bits still scatters neighbouring positions.

    Args:
        key: any integer; the round constants are splitmix64 outputs of it.
        positions: integers in ``[0, 2^bits)``.
        bits: width of the domain, 0 to 63.
    """
    mask = np.uint64((1 << bits) - 1)
    shift = np.uint64(max(1, (bits + 1) // 2))
    constants = splitmix64(key, np.arange(2 * _BIJECTION_ROUNDS))
    x = np.asarray(positions).astype(np.uint64)
    for odd, offset in constants.reshape(-1, 2):
        x *= odd | np.uint64(1)
        x += offset
        x &= mask
        x ^= x >> shift
    return x
