"""Only what a schema describes in full is a message."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from typing import Annotated, ClassVar

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privrec.errors import ReleaseRefused
from privrec.secagg import messages
from privrec.secagg.messages import Digest, Limits, Message


@dataclass(frozen=True)
class Sample(Message):
    KIND: ClassVar[int] = 9
    name: Annotated[str, Limits(str, 1, 4)]
    digest: Digest
    count: Annotated[int, Limits(int, -2, 300)]
    items: Annotated[tuple[bytes, ...], Limits(bytes, 2, 2, most=3)]


GOOD = Sample("é2", bytes(32), 300, (b"ab", b"cd"))
START = b"PS\x01\x09"


def packed(*values: object) -> bytes:
    return START + msgpack.packb(values, use_bin_type=True)


FIELDS: tuple[object, ...] = ("a", bytes(32), 1, (b"ab",))


def test_a_message_survives_the_way() -> None:
    assert Sample.parse(GOOD.pack()) == GOOD
    assert Sample.parse(memoryview(bytearray(GOOD.pack()))) == GOOD
    assert GOOD.pack() == packed("é2", bytes(32), 300, (b"ab", b"cd"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, ""),
        (0, "12345"),
        (0, "ééé"),  # six bytes
        (0, b"a"),
        (0, 1),
        (0, None),
        (1, bytes(31)),
        (1, bytes(33)),
        (1, "a" * 32),
        (2, 301),
        (2, -3),
        (2, True),
        (2, 1.0),
        (2, b"1"),
        (2, 2**63),
        (3, ()),
        (3, (b"ab",) * 4),
        (3, (b"abc",)),
        (3, ("ab",)),
        (3, b"ab"),
        (3, {"a": 1}),
        (3, msgpack.ExtType(3, b"ab")),
        (3, msgpack.Timestamp(0)),
    ],
)
def test_a_field_outside_its_limits_is_refused(field: int, value: object) -> None:
    assert Sample.parse(packed(*FIELDS)) == Sample(*FIELDS)  # type: ignore[arg-type]
    with pytest.raises(ReleaseRefused):
        Sample.parse(packed(*FIELDS[:field], value, *FIELDS[field + 1 :]))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        START,
        START[:3],
        b"PX" + GOOD.pack()[2:],
        b"PS\x02" + GOOD.pack()[3:],
        GOOD.pack()[:3] + b"\x08" + GOOD.pack()[4:],
        GOOD.pack()[:-1],
        GOOD.pack() + b"\x00",
        packed(*FIELDS, "unknown"),
        packed(*FIELDS[:3]),
        START + msgpack.packb({"name": "a"}),
        START + msgpack.packb(dict(zip("abcd", FIELDS, strict=True))),
        START + b"\xc1",
        START + b"\x94\xa1\xff\xc4\x00\x01\x90",  # text that is no UTF-8
        START + b"\xdf\xff\xff\xff\xff",  # a map of 2^32 entries
        START + b"\xdd\xff\xff\xff\xff",  # an array of as many
        START + b"\xc6\xff\xff\xff\xff",  # bytes of as many
        START + b"\x91" * 100_000,  # nested without end
        START + b"\x81\x90\x90",  # a map whose key is an array
    ],
)
def test_what_is_no_message_is_refused(message: bytes) -> None:
    with pytest.raises(ReleaseRefused, match="refused"):
        Sample.parse(message)


def test_the_longest_message_of_a_kind_is_taken_and_a_longer_one_is_not_looked_at() -> None:
    longest = Sample("aaaa", bytes(32), 300, (b"ab",) * 3).pack()
    assert len(longest) <= Sample.limit() <= len(longest) + 60
    longer = longest + bytes(Sample.limit())
    with pytest.raises(ReleaseRefused, match=f"{len(longer)} bytes, where"):
        Sample.parse(longer)


@dataclass(frozen=True)
class Long(Message):
    KIND: ClassVar[int] = 10
    content: Annotated[bytes, Limits(bytes, 0, 1 << 22)]


@pytest.mark.parametrize("item", [b"\x90", b"\x80", b"\xc0", b"\xa0", b"\xd4\x01\x01"])
@pytest.mark.parametrize("kind", [b"\xdd", b"\xdf"])
def test_what_is_refused_takes_no_more_memory_than_it_is_long(kind: bytes, item: bytes) -> None:
    """A byte of msgpack can stand for an object of many."""
    count = 10**6
    assert refused_at_a_peak_of(kind + count.to_bytes(4, "big") + item * count) < 1.5 * count


def test_arrays_within_arrays_are_not_built() -> None:
    nested = b"\x90"
    for _ in range(4):
        nested = b"\xdc\0\x20" + nested * 32
    assert refused_at_a_peak_of(nested) < len(nested)


def refused_at_a_peak_of(body: bytes) -> int:
    message = b"PS\x01\x0a\x91" + body
    tracemalloc.start()
    try:
        with pytest.raises(ReleaseRefused):
            Long.parse(message)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@given(st.integers(1, 70).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_sets_of_devices_survive_the_way(case: tuple[int, set[int]]) -> None:
    devices, numbers = case
    bits = messages.bitmap(sorted(numbers), devices)
    assert len(bits) == -(-devices // 8)
    assert messages.members(bits, devices) == tuple(sorted(numbers))


def test_a_set_of_another_roster_is_refused() -> None:
    assert messages.members(b"\xff\x01", 9) == tuple(range(9))
    for bits, devices in ((b"\xff", 9), (b"\xff\x01\x00", 9), (b"\xff\x03", 9), (b"\x80", 7)):
        with pytest.raises(ReleaseRefused, match="set"):
            messages.members(bits, devices)


def test_joined_pieces_are_taken_apart() -> None:
    assert messages.split(b"aabbbc", [2, 3, 1]) == [b"aa", b"bbb", b"c"]
    assert messages.split(b"", []) == []
    for joined, count in ((b"aab", 2), (b"", 1), (b"aabb", 1)):
        with pytest.raises(ReleaseRefused, match=f"{count} pieces, {2 * count} bytes"):
            messages.split(joined, [2] * count)
