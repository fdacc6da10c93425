"""Messages as bytes: a version, a kind, and one msgpack array that a schema describes in full.

A message is a dataclass whose fields carry their limits (:class:`Size`, :class:`Range`,
:class:`Each`). What does not match in type, number or length is refused before anything else looks
at it, so the rest of the protocol handles well-formed values only. Packing is canonical: equal
messages are equal bytes, which is what digests and signatures are made over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from typing import Annotated, Any, ClassVar, Protocol, Self, get_type_hints

import msgpack
import numpy as np

from privrec.errors import ReleaseRefused

MAGIC = b"PS"
VERSION = 1
HEADER_BYTES = 4
MAX_DEVICES = 1 << 16
_MAX_ITEMS = 64  # in any array of any message

Buffer = bytes | bytearray | memoryview
_HEAD_BYTES = 9  # that msgpack spends at most on an integer, or on type and length of anything


class Check(Protocol):
    """What a field of a message must satisfy."""

    def problem(self, value: object) -> str | None:
        """What is wrong with a value, or None."""
        ...

    def limit(self) -> int:
        """Bytes that a packed value takes at most."""
        ...


@dataclass(frozen=True)
class Size:
    """Bytes, or text in UTF-8, of ``low`` to ``high`` bytes; exactly ``low`` without ``high``."""

    low: int
    high: int | None = None
    kind: type = bytes

    def problem(self, value: object) -> str | None:
        if type(value) is not self.kind or not isinstance(value, bytes | str):
            return f"{type(value).__name__} instead of {self.kind.__name__}"
        size = len(value.encode() if isinstance(value, str) else value)
        low, high = self._range()
        return None if low <= size <= high else f"{size} bytes, not {low} to {high}"

    def limit(self) -> int:
        return _HEAD_BYTES + self._range()[1]

    def _range(self) -> tuple[int, int]:
        return self.low, self.low if self.high is None else self.high


@dataclass(frozen=True)
class Range:
    """An integer from ``low`` to ``high``, both included."""

    low: int
    high: int

    def problem(self, value: object) -> str | None:
        if type(value) is not int:
            return f"{type(value).__name__} instead of int"
        return None if self.low <= value <= self.high else f"{value} outside its range"

    def limit(self) -> int:
        return _HEAD_BYTES


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def problem(self, value: object) -> str | None:
        return None if type(value) is bool else f"{type(value).__name__} instead of bool"

    def limit(self) -> int:
        return 1


@dataclass(frozen=True)
class Each:
    """1 to ``most`` items that all satisfy ``check``."""

    check: Check
    most: int

    def problem(self, value: object) -> str | None:
        if type(value) is not tuple or not 1 <= len(value) <= self.most:
            return f"not an array of 1 to {self.most} items"
        return next(filter(None, map(self.check.problem, value)), None)

    def limit(self) -> int:
        return _HEAD_BYTES + self.most * self.check.limit()


DIGEST_BYTES = 32
Digest = Annotated[bytes, Size(DIGEST_BYTES)]
Bitmap = Annotated[bytes, Size(1, MAX_DEVICES // 8)]
Counter = Annotated[int, Range(0, 2**63 - 1)]


class Message:
    """A dataclass that travels; subclasses set ``KIND`` and annotate every field with a check."""

    KIND: ClassVar[int]

    def __repr__(self) -> str:
        """Without the fields, some of which are secret: a message may end up in a log."""
        return f"{type(self).__name__}({len(self.pack())} bytes)"

    def pack(self) -> bytes:
        """The message as bytes; equal messages give equal bytes."""
        values = [getattr(self, name) for name, _ in _schema(type(self))]
        return header(self.KIND) + packed(values)

    @classmethod
    def parse(cls, message: Buffer) -> Self:
        """The message that :meth:`pack` made.

        Raises:
            ReleaseRefused: when the bytes are no such message of this version, or a field is
                missing, unknown, of another type or outside its limits.
        """
        if len(message) > cls.limit():
            raise refused(f"{len(message)} bytes, where messages have {cls.limit()} at most")
        check_header(message, cls.KIND)
        values = _unpacked(memoryview(message)[HEADER_BYTES:])
        fields_due = len(_schema(cls))
        if type(values) is not tuple or len(values) != fields_due:
            raise refused(f"a message of kind {cls.KIND} must be an array of {fields_due} fields")
        parsed = cls(*values)
        if problem := parsed.problem():
            raise refused(problem)
        return parsed

    def problem(self) -> str | None:
        """The first field outside its limits, or None."""
        for name, check in _schema(type(self)):
            if problem := check.problem(getattr(self, name)):
                return f"{type(self).__name__}.{name} is {problem}"
        return None

    @classmethod
    def limit(cls) -> int:
        """Bytes that a message of this kind takes at most; a transport need not take in more."""
        return HEADER_BYTES + _HEAD_BYTES + sum(check.limit() for _, check in _schema(cls))


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
    """Refuse what is not a message of this version and ``kind``.

    Raises:
        ReleaseRefused: as said.
    """
    start = bytes(memoryview(message)[:HEADER_BYTES])
    if len(start) < HEADER_BYTES or start[:2] != MAGIC:
        raise refused(f"{len(message)} bytes that are no message of secure aggregation")
    if start[2] != VERSION:
        raise refused(f"a message of version {start[2]}, while this is version {VERSION}")
    if start[3] != kind:
        raise refused(f"a message of kind {start[3]} where kind {kind} is due")


def packed(values: object) -> bytes:
    """Values as msgpack, each with its type and length: no other values have the same bytes."""
    encoded: bytes = msgpack.packb(values, use_bin_type=True)
    return encoded


def bitmap(members: Sequence[int], devices: int) -> bytes:
    """A set of device numbers as bits, the lowest first.

    Args:
        members: numbers from 0 to ``devices - 1``.
        devices: how many devices the roster has.
    """
    bits = np.zeros(devices, np.uint8)
    bits[list(members)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def members(bits: bytes, devices: int) -> tuple[int, ...]:
    """The device numbers of a :func:`bitmap`, ascending.

    Raises:
        ReleaseRefused: when the bitmap is of another length or names a device beyond the last.
    """
    if len(bits) != -(-devices // 8):
        raise refused(f"a set of devices in {len(bits)} bytes, while the roster has {devices}")
    flags = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
    if flags[devices:].any():
        raise refused(f"a set that names a device beyond the {devices} of the roster")
    return tuple(np.flatnonzero(flags).tolist())


def split(joined: bytes, sizes: Sequence[int]) -> list[bytes]:
    """Pieces of these sizes, in bytes.

    Raises:
        ReleaseRefused: when ``joined`` is not as long as they are together.
    """
    ends = list(accumulate(sizes, initial=0))
    if len(joined) != ends[-1]:
        raise refused(f"{len(joined)} bytes where {len(sizes)} pieces, {ends[-1]} bytes, are due")
    return [joined[start:end] for start, end in pairwise(ends)]


def _unpacked(body: Buffer) -> object:
    try:
        return msgpack.unpackb(
            body, raw=False, use_list=False, list_hook=_shallow, strict_map_key=True,
            max_array_len=_MAX_ITEMS, max_map_len=0, max_ext_len=0,
        )  # fmt: skip
    # msgpack lets its own errors, those of UTF-8 and, for a bad map key, a TypeError through.
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise refused(f"a message that is no msgpack ({type(error).__name__})") from None


def _shallow(array: tuple[object, ...]) -> tuple[object, ...]:
    """Refuse arrays in arrays in an array: each byte of them becomes an object of many."""
    if any(type(inner) is tuple for item in array if type(item) is tuple for inner in item):
        raise ValueError("arrays within arrays")
    return array


def _schema(message: type[Message]) -> tuple[tuple[str, Check], ...]:
    if message not in _SCHEMAS:
        hints = get_type_hints(message, include_extras=True)
        names: Any = fields(message)  # type: ignore[arg-type]
        checks = ((field.name, hints[field.name].__metadata__[0]) for field in names)
        _SCHEMAS[message] = tuple(checks)
    return _SCHEMAS[message]


_SCHEMAS: dict[type[Message], tuple[tuple[str, Check], ...]] = {}
