"""What travels between devices and server after the call, in the order of a round.

Sets of devices are bitmaps over the roster; what belongs to their members follows in their order,
joined. ``context`` is the digest of the call and the graph: a message of another run, round,
attempt, roster or configuration is refused by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from privrec.errors import UsageError
from privrec.secagg.keys import KEY_BYTES, SIGNATURE_BYTES
from privrec.secagg.masks import Words, word_type
from privrec.secagg.roster import MAX_BANDS, NOISE
from privrec.secagg.shamir import SECRET_BYTES
from privrec.secagg.wire import (
    HEADER_BYTES,
    MAX_DEVICES,
    Bitmap,
    Buffer,
    Digest,
    Each,
    Message,
    Size,
    check_header,
    header,
    refused,
)

SHARE_MARK_BYTES = 16
PLEDGE_BYTES = 16
MAX_SECRETS = NOISE + MAX_BANDS
MAX_RIDER_BYTES = 1 << 26

Rider = Annotated[bytes, Size(0, MAX_RIDER_BYTES)]


def sealed_bytes(secrets: int) -> int:
    """Size of one share of each of a device's secrets, sealed with AES-GCM."""
    return secrets * SECRET_BYTES + _TAG_BYTES


_TAG_BYTES = 16
_MAX_SEALED = sealed_bytes(MAX_SECRETS) * MAX_DEVICES


@dataclass(frozen=True)
class Shares(Message):
    """From a device: its secrets in shares, sealed for each neighbour.

    Args:
        context: of the round.
        neighbours: who holds the shares.
        partners: all that the device drew to be masked with, neighbours included.
        seed_marks: digests that commit to the seed of the self-mask and to those of the noise, if
            they are dealt; the prekey itself commits to the mask key.
        share_marks: for each neighbour, 16-byte digests of its share of each secret, by which the
            server tells an altered share.
        sealed: for each neighbour, its shares under AES-GCM.
    """

    KIND: ClassVar[int] = 2
    context: Digest
    neighbours: Bitmap
    partners: Bitmap
    seed_marks: Annotated[tuple[bytes, ...], Each(Size(32), MAX_SECRETS)]
    share_marks: Annotated[bytes, Size(0, MAX_SECRETS * SHARE_MARK_BYTES * MAX_DEVICES)]
    sealed: Annotated[bytes, Size(0, _MAX_SEALED)]


@dataclass(frozen=True)
class Deal(Message):
    """To a device: the shares that it holds for others, and the model of the round.

    Args:
        context: of the round.
        present: devices that sent shares.
        recipients: those of them whose shares this device holds.
        drawers: those of them that drew this device to be masked with, recipients included.
        sealed: for each recipient, its shares under AES-GCM.
        model: a 32-byte digest for each band of the model, the band that all hold first.
    """

    KIND: ClassVar[int] = 3
    context: Digest
    present: Bitmap
    recipients: Bitmap
    drawers: Bitmap
    sealed: Annotated[bytes, Size(0, _MAX_SEALED)]
    model: Annotated[tuple[bytes, ...], Each(Size(32), MAX_BANDS)]


@dataclass(frozen=True)
class Survivors(Message):
    """To a device: whose masked vectors are in the sum, and the root of the model they saw.

    Args:
        context: of the round.
        survivors: whose vectors are in the sum.
        root: of the model.
        pledges: in a sparse graph, from each survivor that the device drew, 16 bytes that tell it
            that they are masked with each other.
    """

    KIND: ClassVar[int] = 5
    context: Digest
    survivors: Bitmap
    root: Digest
    pledges: Annotated[bytes, Size(0, PLEDGE_BYTES * MAX_DEVICES)]


@dataclass(frozen=True)
class Confirmation(Message):
    """From a device: its signature over context, survivors and root."""

    KIND: ClassVar[int] = 6
    context: Digest
    signature: Annotated[bytes, Size(SIGNATURE_BYTES)]


@dataclass(frozen=True)
class Quorum(Message):
    """To a device: who confirmed, each with its signature, and maybe the next round's call."""

    KIND: ClassVar[int] = 7
    context: Digest
    signers: Bitmap
    signatures: Annotated[bytes, Size(0, SIGNATURE_BYTES * MAX_DEVICES)]
    following: Rider


@dataclass(frozen=True, repr=False)
class Opening(Message):
    """From a device: its own seed, and of each recipient a share of what is needed.

    Args:
        context: of the round.
        seed: the seed of the device's own self-mask.
        recipients: devices whose shares follow.
        shares: for each recipient that survived a share of its seed, and of each seed of noise that
            is in excess; for each other one of its mask key.
        noise: the device's own seeds of noise that is in excess, in the order of bands.
        following: the device's first message of the next round, if it was called.
    """

    KIND: ClassVar[int] = 8
    context: Digest
    seed: Annotated[bytes, Size(KEY_BYTES)]
    recipients: Bitmap
    shares: Annotated[bytes, Size(0, MAX_SECRETS * SECRET_BYTES * MAX_DEVICES)]
    noise: Annotated[bytes, Size(0, MAX_BANDS * SECRET_BYTES)]
    following: Rider


# The masked vector is no msgpack: header, context, then the raw entries, which so lie aligned, and
# in a sparse graph a pledge to each that drew the device.
MASKED_KIND = 4
MASKED_START = HEADER_BYTES + 32


def masked_message(
    context: bytes, integers: np.ndarray, ring_bits: int, pledges: bytes
) -> tuple[bytearray, Words]:
    """A masked message that holds the plain entries still, and a view of them to be masked in.

    Args:
        context: of the round.
        integers: the device's vector, of any integer type; it is not changed.
        ring_bits: 32 or 16; entries are taken modulo ``2**ring_bits``.
        pledges: what follows the entries.

    Returns:
        The message, and its entries.

    Raises:
        UsageError: when the vector is not one of integers.
    """
    if integers.dtype.kind not in "iu" or integers.ndim != 1:
        raise UsageError(
            f"a vector of {integers.dtype} and {integers.ndim} dimensions: the secure sum takes "
            "one of integers; encode it first"
        )
    dtype = word_type(ring_bits)
    end = MASKED_START + len(integers) * dtype.itemsize
    message = bytearray(end + len(pledges))
    message[:MASKED_START], message[end:] = header(MASKED_KIND) + context, pledges
    entries = np.frombuffer(message, dtype, len(integers), MASKED_START)
    np.copyto(entries, integers, casting="unsafe")  # no second copy; wraps around
    return message, entries


def masked_entries(
    message: Buffer, context: bytes, length: int, ring_bits: int, pledges: int = 0
) -> tuple[Words, bytes]:
    """A view of the entries of a masked message, and the pledges, joined.

    Args:
        message: from :func:`masked_message`.
        context: of the round.
        length: entries that the sender's tier has.
        ring_bits: 32 or 16.
        pledges: how many are due.

    Raises:
        ReleaseRefused: when it is of another round or length.
    """
    dtype, view = word_type(ring_bits), memoryview(message)
    check_header(message, MASKED_KIND)
    if view[HEADER_BYTES:MASKED_START] != context:
        raise refused("a masked vector of another round, roster or configuration")
    end = MASKED_START + length * dtype.itemsize
    if len(view) != end + pledges * PLEDGE_BYTES:
        raise refused(
            f"a masked vector of {len(view) - MASKED_START} bytes, while the device's tier sends "
            f"{length} entries of {dtype.itemsize}, and {pledges} pledges"
        )
    return np.frombuffer(message, dtype, length, MASKED_START), bytes(view[end:])
