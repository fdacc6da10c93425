"""Masks: what they and all else of one attempt are derived from, and how they are put on.

A mask is an AES-128-CTR keystream, added to a prefix of a vector of integers in place. Partners are
drawn in ``ClientSession._enter`` (:mod:`privrec.secagg.client`); ``ClientSession._masks`` makes the
keys and the signs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from privrec.secagg.keys import derive, statement
from privrec.secagg.messages import PAIR_TAG_BYTES, SHARE_COMMITMENT_BYTES, Words
from privrec.secagg.roster import Call
from privrec.secagg.sharing import Graph

MASK_KEY_BYTES = 16
_PIECE_BYTES = 1 << 16
_ZEROS = memoryview(bytes(_PIECE_BYTES))
_CIPHER_TAIL = 15  # update_into asks for a block less one byte more than it writes
_BATCH = 512  # keystreams open at a time


def model_root(digests: Sequence[bytes]) -> bytes:
    """What stands for the model: a digest over those of its bands, the band that all hold first."""
    return statement("model", *digests)


@dataclass(frozen=True)
class Binding:
    """Keys, commitments and statements of one attempt at one round, bound to all that was agreed.

    Two devices that were told different things (another roster, configuration, run, round, attempt
    or model) derive different keys: their masks do not cancel, their shares do not open, and their
    signatures do not count for each other. A server gains nothing by telling them different things.

    ``agreed`` is what the keys of two devices agree on, those for masking in :meth:`pair_key` and
    those for sealing elsewhere; ``root`` is the :func:`model_root`; devices go by their numbers.
    Labels are part of the protocol: keys derive from them.

    Args:
        context: digest of all that was agreed on before the model.
    """

    context: bytes

    @classmethod
    def of(cls, call: Call, graph: Graph) -> Binding:
        """The binding to a call and to the constants of the protocol."""
        return cls(statement("context", call.digest, graph.complete_up_to, graph.degree))

    def sealing_key(self, agreed: bytes, sender: int, receiver: int) -> bytes:
        """The AES-GCM key of the one message from a device to another; 32 bytes."""
        return derive(agreed, "sealing", self.context, sender, receiver)

    def pair_key(self, agreed: bytes, root: bytes, one: int, other: int) -> bytes:
        """The key of the mask between two devices, the same for both; 16 bytes."""
        low, high = sorted((one, other))
        return derive(agreed, "pair mask", self.context, root, low, high)[:MASK_KEY_BYTES]

    def self_key(self, seed: bytes, root: bytes) -> bytes:
        """The key of a device's own mask; 16 bytes."""
        return derive(seed, "self mask", self.context, root)[:MASK_KEY_BYTES]

    def pair_tag(self, agreed: bytes, root: bytes, sender: int, receiver: int) -> bytes:
        """What one device sends to another that drew it, once it is masked with it; 16 bytes."""
        return derive(agreed, "pledge", self.context, root, sender, receiver)[:PAIR_TAG_BYTES]

    def seed_commitment(self, kind: int, dealer: int, seed: bytes) -> bytes:
        """A commitment to a seed; 32 bytes, which hide it since it is random."""
        return statement("seed mark", self.context, kind, dealer, seed)

    def share_commitment(self, kind: int, dealer: int, holder: int, share: bytes) -> bytes:
        """A commitment to one share; 16 bytes, which hide it since it is random.

        A holder that alters its share would need a second preimage of 128 bits. A dealer could make
        two shares of one commitment, and could as well deal wrong ones.
        """
        stated = statement("share mark", self.context, kind, dealer, holder, share)
        return stated[:SHARE_COMMITMENT_BYTES]

    def confirmation(self, survivors: bytes, root: bytes) -> bytes:
        """What devices sign when they confirm the survivors (a bitmap) and the model they saw."""
        return statement("confirmation", self.context, root, survivors)


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


def apply_masks(vector: Words, masks: Iterable[Mask]) -> None:
    """Add or subtract every mask, in place and modulo the ring.

    The vector is walked in pieces that stay in the cache, each under all masks before the next, so
    that memory is read once however many masks there are. Integers wrap around by themselves.

    Args:
        vector: contiguous entries of a :func:`~privrec.secagg.messages.word_type`, at least as many
            as any mask covers.
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
    streams = [
        (_keystream(mask.key), mask.length, np.subtract if mask.negative else np.add)
        for mask in masks
    ]
    for start in range(0, masks[0].length, step):
        piece = vector[start : start + step]
        for stream, length, operation in streams:
            count = min(length - start, len(piece))
            if count <= 0:
                break
            stream.update_into(_ZEROS[: count * vector.itemsize], target)
            operation(piece[:count], words[:count], out=piece[:count])


def _keystream(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES128(key), modes.CTR(bytes(16))).encryptor()
