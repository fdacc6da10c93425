"""What travels between devices and server, and how it becomes bytes.

A message is a dataclass whose fields carry their :class:`Limits`; as bytes it is a version, a kind
and one msgpack array. What does not match in type, number or length is refused before anything else
looks at it. Packing is canonical: digests and signatures are made over it.

The call, with which a round begins, is in :mod:`privrec.secagg.roster`. All that follows names by
``context``, the digest of the call and the graph, what it belongs to. Sets of devices are bitmaps
over the roster; what belongs to their members follows in their order, joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Annotated, Any, ClassVar, Self, get_origin, get_type_hints

import msgpack
import numpy as np
from numpy.typing import NDArray

from privrec.errors import ReleaseRefused, UsageError

MAGIC = b"PS"
VERSION = 1
HEADER_BYTES = 4
MAX_DEVICES = 1 << 16
MAX_BANDS = 32
DIGEST_BYTES = 32
SECRET_BYTES = 32
SHARE_COMMITMENT_BYTES = 16
PAIR_TAG_BYTES = 16
_SIGNATURE_BYTES = 64
_AEAD_TAG_BYTES = 16
_MAX_ITEMS = 64  # in any array of any message
_HEAD_BYTES = 9  # that msgpack spends at most on an integer, or on type and length of anything

SEED, MASKING, NOISE = range(3)
"""Secrets that a device deals in shares: the seed of its own mask, its mask key, and from 2 on the
seeds of its noise, that of the band that all hold first."""
MAX_SECRETS = NOISE + MAX_BANDS

Buffer = bytes | bytearray | memoryview
Words = NDArray[np.unsignedinteger[Any]]


class Stage(IntEnum):
    """The four exchanges of a round, each named by what devices answer."""

    SHARES = 0
    MASKED = 1
    CONFIRM = 2
    UNMASK = 3
    DONE = 4


# ------------------------------------------------------------------------------------------- codec


@dataclass(frozen=True)
class Limits:
    """What a field may hold: its type, and its least and largest value, or size in bytes.

    Attributes:
        most: 0 for a single value; otherwise the field is a tuple of 1 to ``most`` of them.
    """

    kind: type
    low: int
    high: int
    most: int = 0

    def problem(self, value: object) -> str | None:
        """What is wrong with a value, or None."""
        if not self.most:
            return self._problem_of_one(value)
        if type(value) is not tuple or not 1 <= len(value) <= self.most:
            return f"not an array of 1 to {self.most} items"
        return next(filter(None, map(self._problem_of_one, value)), None)

    def size(self) -> int:
        """Bytes that a packed value takes at most."""
        one = _HEAD_BYTES + (self.high if self.kind in (bytes, str) else 0)
        return _HEAD_BYTES + self.most * one if self.most else one

    def _problem_of_one(self, value: object) -> str | None:
        if type(value) is not self.kind:
            return f"{type(value).__name__} instead of {self.kind.__name__}"
        if isinstance(value, int):
            return None if self.low <= value <= self.high else f"{value} outside its range"
        size = len(value.encode() if isinstance(value, str) else value)  # type: ignore[arg-type]
        is_fine = self.low <= size <= self.high
        return None if is_fine else f"{size} bytes, not {self.low} to {self.high}"


Digest = Annotated[bytes, Limits(bytes, DIGEST_BYTES, DIGEST_BYTES)]
Signature = Annotated[bytes, Limits(bytes, _SIGNATURE_BYTES, _SIGNATURE_BYTES)]
Bitmap = Annotated[bytes, Limits(bytes, 1, MAX_DEVICES // 8)]
Counter = Annotated[int, Limits(int, 0, 2**63 - 1)]


class Message:
    """A dataclass that travels; subclasses set ``KIND`` and annotate every field with limits."""

    KIND: ClassVar[int]
    _limits: ClassVar[dict[str, Limits]]

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls, include_extras=True).items()
        own = {name: hint for name, hint in hints if get_origin(hint) is not ClassVar}
        cls._limits = {name: hint.__metadata__[0] for name, hint in own.items()}

    def __repr__(self) -> str:
        """Without the fields, some of which are secret: a message may end up in a log."""
        return f"{type(self).__name__}({len(self.pack())} bytes)"

    def pack(self) -> bytes:
        """The message as bytes; equal messages give equal bytes."""
        return header(self.KIND) + packed([getattr(self, name) for name in self._limits])

    @classmethod
    def parse(cls, message: Buffer) -> Self:
        """The message that :meth:`pack` made; any other bytes are refused with ReleaseRefused."""
        if len(message) > cls.limit():
            raise refused(f"{len(message)} bytes, where messages have {cls.limit()} at most")
        check_header(message, cls.KIND)
        values = _unpacked(memoryview(message)[HEADER_BYTES:])
        due = len(cls._limits)
        if type(values) is not tuple or len(values) != due:
            raise refused(f"a message of kind {cls.KIND} must be an array of {due} fields")
        parsed = cls(*values)
        if problem := parsed.problem():
            raise refused(problem)
        return parsed

    def problem(self) -> str | None:
        """The first field outside its limits, or None."""
        for name, limits in self._limits.items():
            if problem := limits.problem(getattr(self, name)):
                return f"{type(self).__name__}.{name} is {problem}"
        return None

    @classmethod
    def limit(cls) -> int:
        """Bytes that a message of this kind takes at most; a transport need not take in more."""
        return HEADER_BYTES + _HEAD_BYTES + sum(each.size() for each in cls._limits.values())


def refused(problem: str) -> ReleaseRefused:
    """The error for a message that is not answered."""
    return ReleaseRefused(
        f"{problem}: the message is refused and nothing is sent in return; "
        "both sides must run the same version and send what the protocol prescribes"
    )


def header(kind: int) -> bytes:
    """The first :data:`HEADER_BYTES` bytes of every message."""
    return MAGIC + bytes((VERSION, kind))


def check_header(message: Buffer, kind: int) -> None:
    """Refuse what is not a message of this version and ``kind``."""
    start = bytes(memoryview(message)[:HEADER_BYTES])
    if len(start) < HEADER_BYTES or start[:2] != MAGIC:
        raise refused(f"{len(message)} bytes that are no message of secure aggregation")
    if start[2] != VERSION:
        raise refused(f"a message of version {start[2]}, while this is version {VERSION}")
    if start[3] != kind:
        raise refused(f"a message of kind {start[3]} where kind {kind} is due")


def packed(values: object) -> bytes:
    """Values as msgpack, each with its type and length: no other values have the same bytes."""
    return bytes(msgpack.packb(values, use_bin_type=True))


def _unpacked(body: Buffer) -> object:
    limits = {"max_array_len": _MAX_ITEMS, "max_map_len": 0, "max_ext_len": 0}
    try:
        return msgpack.unpackb(
            body, raw=False, use_list=False, list_hook=_shallow, strict_map_key=True, **limits
        )
    # msgpack lets its own errors, those of UTF-8 and, for a bad map key, a TypeError through.
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise refused(f"a message that is no msgpack ({type(error).__name__})") from None


def _shallow(array: tuple[object, ...]) -> tuple[object, ...]:
    """Refuse arrays in arrays in an array: each byte of them becomes an object of many."""
    if any(type(inner) is tuple for item in array if type(item) is tuple for inner in item):
        raise ValueError("arrays within arrays")
    return array


def bitmap(members: Sequence[int], devices: int) -> bytes:
    """A set of numbers from 0 to ``devices - 1`` as bits, the lowest first."""
    bits = np.zeros(devices, np.uint8)
    bits[list(members)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


@lru_cache(maxsize=256)
def members(bits: bytes, devices: int) -> tuple[int, ...]:
    """The device numbers of a :func:`bitmap`, ascending; a bitmap for other sizes is refused."""
    if len(bits) != -(-devices // 8):
        raise refused(f"a set of devices in {len(bits)} bytes, while the roster has {devices}")
    flags = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
    if flags[devices:].any():
        raise refused(f"a set that names a device beyond the {devices} of the roster")
    return tuple(np.flatnonzero(flags).tolist())


def split(joined: bytes, sizes: Sequence[int]) -> list[bytes]:
    """Pieces of these sizes, in bytes; refused unless ``joined`` is as long as they together."""
    ends = list(accumulate(sizes, initial=0))
    if len(joined) != ends[-1]:
        raise refused(f"{len(joined)} bytes where {len(sizes)} pieces, {ends[-1]} bytes, are due")
    return [joined[start:end] for start, end in pairwise(ends)]


# ---------------------------------------------------------------------------------------- messages


def sealed_bytes(secrets: int) -> int:
    """Size of one share of each of a device's secrets, sealed with AES-GCM."""
    return secrets * SECRET_BYTES + _AEAD_TAG_BYTES


_MAX_SEALED = sealed_bytes(MAX_SECRETS) * MAX_DEVICES
_MAX_SHARES = MAX_SECRETS * SECRET_BYTES * MAX_DEVICES
_MAX_COMMITMENTS = MAX_SECRETS * SHARE_COMMITMENT_BYTES * MAX_DEVICES


@dataclass(frozen=True)
class Shares(Message):
    """From a device: its secrets in shares, sealed for each neighbour.

    Attributes:
        neighbours: who holds the shares.
        masked_with: all that the device drew to be masked with, neighbours included.
        seed_commitments: digests of the seed of the self-mask and of those of the noise, if they
            are dealt; the prekey itself commits to the mask key.
        share_commitments: for each neighbour, 16-byte digests of its share of each secret, by
            which the server tells an altered share.
        sealed: for each neighbour, its shares under AES-GCM.
    """

    KIND: ClassVar[int] = 2
    context: Digest
    neighbours: Bitmap
    masked_with: Bitmap
    seed_commitments: Annotated[
        tuple[bytes, ...], Limits(bytes, DIGEST_BYTES, DIGEST_BYTES, most=MAX_SECRETS)
    ]
    share_commitments: Annotated[bytes, Limits(bytes, 0, _MAX_COMMITMENTS)]
    sealed: Annotated[bytes, Limits(bytes, 0, _MAX_SEALED)]


@dataclass(frozen=True)
class Deal(Message):
    """To a device: the shares that it holds for others, and the model of the round.

    Attributes:
        present: devices that sent shares.
        dealers: those of them whose shares this device holds.
        drawn_by: those of them that drew this device to be masked with, dealers included.
        sealed: for each dealer, its shares under AES-GCM.
        model: a digest of each band of the model, the band that all hold first.
    """

    KIND: ClassVar[int] = 3
    context: Digest
    present: Bitmap
    dealers: Bitmap
    drawn_by: Bitmap
    sealed: Annotated[bytes, Limits(bytes, 0, _MAX_SEALED)]
    model: Annotated[tuple[bytes, ...], Limits(bytes, DIGEST_BYTES, DIGEST_BYTES, most=MAX_BANDS)]


@dataclass(frozen=True)
class Survivors(Message):
    """To a device: whose masked vectors are in the sum, and the root of the model they saw.

    Attributes:
        pair_tags: in a sparse graph, from each survivor that the device drew, 16 bytes that tell it
            that they are masked with each other.
    """

    KIND: ClassVar[int] = 5
    context: Digest
    survivors: Bitmap
    root: Digest
    pair_tags: Annotated[bytes, Limits(bytes, 0, PAIR_TAG_BYTES * MAX_DEVICES)]


@dataclass(frozen=True)
class Confirmation(Message):
    """From a device: its signature over context, survivors and root."""

    KIND: ClassVar[int] = 6
    context: Digest
    signature: Signature


@dataclass(frozen=True)
class Quorum(Message):
    """To a device: who confirmed, each with its signature."""

    KIND: ClassVar[int] = 7
    context: Digest
    signers: Bitmap
    signatures: Annotated[bytes, Limits(bytes, 0, _SIGNATURE_BYTES * MAX_DEVICES)]


@dataclass(frozen=True, repr=False)
class Opening(Message):
    """From a device: its own seed, and of each dealer a share of what is needed.

    Attributes:
        seed: of the device's own self-mask.
        dealers: devices whose shares follow.
        shares: for each dealer that survived a share of its seed, and of each seed of noise that is
            in excess; for each other one of its mask key.
        noise: the device's own seeds of noise that is in excess, in the order of bands.
    """

    KIND: ClassVar[int] = 8
    context: Digest
    seed: Annotated[bytes, Limits(bytes, SECRET_BYTES, SECRET_BYTES)]
    dealers: Bitmap
    shares: Annotated[bytes, Limits(bytes, 0, _MAX_SHARES)]
    noise: Annotated[bytes, Limits(bytes, 0, MAX_BANDS * SECRET_BYTES)]


# The masked vector is no msgpack: header, context, then the raw entries, which so lie aligned, and
# in a sparse graph a tag for each device that drew the sender.
MASKED_KIND = 4
MASKED_START = HEADER_BYTES + DIGEST_BYTES


def word_type(ring_bits: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The type of an entry on the wire: unsigned, little-endian, of 32 or 16 bits."""
    return np.dtype("<u4") if ring_bits == 32 else np.dtype("<u2")


def masked_message(
    context: bytes, integers: np.ndarray, ring_bits: int, pair_tags: bytes
) -> tuple[bytearray, Words]:
    """A masked message that holds the plain entries still, and a view of them to be masked in.

    ``integers``, of any integer type, are left as they are; ``pair_tags`` follow the entries.
    """
    if integers.dtype.kind not in "iu" or integers.ndim != 1:
        raise UsageError(
            f"a vector of {integers.dtype} and {integers.ndim} dimensions: the secure sum takes "
            "one of integers; encode it first"
        )
    dtype = word_type(ring_bits)
    end = MASKED_START + len(integers) * dtype.itemsize
    message = bytearray(end + len(pair_tags))
    message[:MASKED_START], message[end:] = header(MASKED_KIND) + context, pair_tags
    entries = np.frombuffer(message, dtype, len(integers), MASKED_START)
    np.copyto(entries, integers, casting="unsafe")  # no second copy; wraps around
    return message, entries


def masked_entries(
    message: Buffer, context: bytes, length: int, ring_bits: int, pair_tags: int = 0
) -> tuple[Words, bytes]:
    """A view of the ``length`` entries of a :func:`masked_message`, and its ``pair_tags``, joined.

    A message of another round, or of more or less than these, is refused with ReleaseRefused.
    """
    dtype, view = word_type(ring_bits), memoryview(message)
    check_header(message, MASKED_KIND)
    if view[HEADER_BYTES:MASKED_START] != context:
        raise refused("a masked vector of another round, roster or configuration")
    end = MASKED_START + length * dtype.itemsize
    if len(view) != end + pair_tags * PAIR_TAG_BYTES:
        raise refused(
            f"a masked vector of {len(view) - MASKED_START} bytes, while the device's tier sends "
            f"{length} entries of {dtype.itemsize}, and {pair_tags} tags"
        )
    return np.frombuffer(message, dtype, length, MASKED_START), bytes(view[end:])
