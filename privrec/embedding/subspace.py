"""A huge embedding table that lives in a small memory: FAIR's random subspace, in blocks.

Slot and sign of each block come from a keyed hash, which is a wire protocol, equal on every
platform. Nothing of size ``items * dim`` is ever held.

Part ``p`` of the virtual table is hashed to the ``p``-th output of splitmix64 seeded with the
table's key, so any part can be placed without a state and without a stored index.
Source: Steele, Lea & Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from privrec.embedding.table import Places, Table, check_size

UInt64Array = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_BIJECTION_ROUNDS = 4


def splitmix64(seed: int | UInt64Array, positions: NDArray[np.integer]) -> UInt64Array:
    """Outputs of splitmix64 seeded with ``seed`` at zero-based positions of any shape.

    Both are taken modulo 2^64, and an array of seeds is broadcast against the positions;
    ``splitmix64(seed, arange(k))`` is the published sequence.
    """
    own = np.uint64(seed & 0xFFFFFFFFFFFFFFFF) if isinstance(seed, int) else seed
    return finalise(steps(positions) + own)


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
    """A keyed bijection of ``[0, 2^bits)``, ``bits`` at most 63, applied to ``positions``.

    Each round is invertible on ``bits``-bit words: an odd multiplication and an addition carry low
    bits upwards, and a xor with the upper half brings them down again, so that folding by the low
    bits still scatters neighbouring positions. The rounds' constants are splitmix64 outputs of
    ``key``, any integer.
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


_SIGN_KEY = 0x5EED_5167
_WORD = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Subspace(Table):
    """The map from items to signed slots of a memory of ``slots`` blocks of ``block`` floats.

    All holders of the same ``key`` agree on every slot, so their memories can be summed. When the
    memory is large enough (``slots >= items * parts``) the map is a keyed bijection: nothing
    collides, and the same code serves a table that is not compressed.

    A memory that was folded ``j`` times is kept in isometric coordinates: a block of it stands for
    ``2^j`` equal blocks of the unfolded memory, each ``2^(-j/2)`` times as large. So its norm is
    theirs, and a step on it is the step on the unfolded memory, projected
    (:mod:`privrec.embedding.nested`).

    Args:
        slots: a power of two.
        folds: how often the memory was halved; the hash is taken before folding.
        looked_up: whether all places are computed once, at ``12 * parts`` bytes an item.
    """

    key: int
    folds: int = 0
    looked_up: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = self.slots >= 1 and self.slots & (self.slots - 1) == 0
        check_size(holds, f"slots = {self.slots}", "a power of two (so that halving nests)")

    @classmethod
    def sized(
        cls, items: int, dim: int, *, block: int, key: int, compression: float = 1.0
    ) -> Subspace:
        """The subspace whose memory is the virtual table's size divided by ``compression``.

        The number of slots is rounded to a power of two: up when nothing is to be compressed (so
        that nothing collides), else to the nearest. :attr:`compression` tells what came out.
        """
        check_size(compression >= 1, f"compression = {compression}", "at least 1")
        wanted = max(1.0, items * (dim // max(1, block)) / compression)
        power = np.ceil(np.log2(wanted)) if compression == 1 else np.round(np.log2(wanted))
        return cls(items, dim, block, 1 << int(power), key)

    @property
    def scale(self) -> float:
        """The factor ``2^(-folds/2)`` of isometric coordinates."""
        return float(2.0 ** (-self.folds / 2))

    @property
    def injective(self) -> bool:
        """Whether no two parts share a slot."""
        return self.folds == 0 and self.slots >= self.items * self.parts

    def folded(self, times: int) -> Subspace:
        """The same subspace in a memory halved ``times`` times: ``slot mod (slots / 2^times)``."""
        most = self.slots.bit_length() - 1
        check_size(0 <= times <= most, f"times = {times}", f"0 to {most} for {self.slots} slots")
        return replace(self, slots=self.slots >> times, folds=self.folds + times)

    def tabulated(self) -> Subspace:
        """The same map, looked up."""
        return replace(self, looked_up=True)

    @cached_property
    def _places(self) -> Places:
        return replace(self, looked_up=False).locate(np.arange(self.items))

    def locate(self, items: NDArray[np.integer]) -> Places:
        """Slots and signs by the keyed hash."""
        if self.looked_up:
            slots, signs = self._places
            return np.take(slots, items, axis=0), np.take(signs, items, axis=0)
        words, negative = self._words(items)
        return words.view(np.int64), 1 - 2 * (negative >> np.uint64(63)).astype(np.float32)

    def locate_doubled(self, items: NDArray[np.integer]) -> NDArray[np.int64]:
        """Slots, plus ``slots`` where the sign is negative."""
        if self.looked_up:
            return super().locate_doubled(items)
        words, negative = self._words(items)
        # The sign bit, moved to where it adds the number of slots, which is a power of two.
        negative >>= np.uint64(64 - self.slots.bit_length())
        negative &= np.uint64(self.slots)
        words |= negative
        return words.view(np.int64)

    def _words(self, items: NDArray[np.integer]) -> tuple[UInt64Array, UInt64Array]:
        """Slots, and words whose first bit says which signs are negative."""
        position = np.asarray(items, dtype=np.int64)[..., None] * self.parts + np.arange(self.parts)
        unfolded, walked = self.slots << self.folds, steps(position)
        if unfolded >= self.items * self.parts:
            slots = permute(self.key, position, unfolded.bit_length() - 1)
        else:
            slots = finalise(walked + np.uint64(self.key & _WORD))
        slots &= np.uint64(self.slots - 1)
        walked += np.uint64((self.key ^ _SIGN_KEY) & _WORD)
        return slots, finalise(walked)
