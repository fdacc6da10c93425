"""Masks: AES-128-CTR keystreams, added to a prefix of a vector of integers in place.

The vector is walked in pieces that stay in the cache, each under all masks before the next, so that
memory is read once however many masks there are. Integers wrap around by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

Words = NDArray[np.unsignedinteger[Any]]

MASK_KEY_BYTES = 16
_PIECE_BYTES = 1 << 16
_ZEROS = memoryview(bytes(_PIECE_BYTES))
_CIPHER_TAIL = 15  # update_into asks for a block less one byte more than it writes
_BATCH = 512  # keystreams open at a time


@dataclass(frozen=True)
class Mask:
    """One keystream.

    Args:
        key: 16 bytes that are used for this mask and nothing else.
        length: entries of the prefix that it covers.
        negative: whether it is subtracted.
    """

    key: bytes
    length: int
    negative: bool

    def __repr__(self) -> str:
        return f"Mask(length={self.length})"


def word_type(ring_bits: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The type of an entry on the wire: unsigned, little-endian, of 32 or 16 bits."""
    return np.dtype("<u4") if ring_bits == 32 else np.dtype("<u2")


def apply_masks(vector: Words, masks: Iterable[Mask]) -> None:
    """Add or subtract every mask, in place and modulo the ring.

    Args:
        vector: contiguous entries of a :func:`word_type`, at least as many as any mask covers.
        masks: in any order, of any number: memory does not grow with it.
    """
    pending = iter(masks)
    while batch := list(islice(pending, _BATCH)):
        # Longest first, so that the masks that still cover a piece come before all others.
        batch.sort(key=lambda mask: -mask.length)
        _apply(vector, batch)


def _apply(vector: Words, masks: Sequence[Mask]) -> None:
    step = _PIECE_BYTES // vector.itemsize
    buffer = np.empty(_PIECE_BYTES + _CIPHER_TAIL, np.uint8)
    target, words = buffer.data, buffer[:_PIECE_BYTES].view(vector.dtype)
    streams = [(_keystream(mask.key), mask.length, _operation(mask)) for mask in masks]
    for start in range(0, masks[0].length, step):
        piece = vector[start : start + step]
        for stream, length, operation in streams:
            count = min(length - start, len(piece))
            if count <= 0:
                break
            stream.update_into(_ZEROS[: count * vector.itemsize], target)
            operation(piece[:count], words[:count], out=piece[:count])


def _operation(mask: Mask) -> np.ufunc:
    return np.subtract if mask.negative else np.add


def _keystream(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES128(key), modes.CTR(bytes(16))).encryptor()
