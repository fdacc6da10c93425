"""Mutated messages end in a clean error, or change nothing that matters; never anything else.

Each message of a round, in both directions, is damaged in many ways: bits, cuts, insertions, fields
of other types and sizes, pieces of other messages, and copies from another round. A refused message
must leave the session able to go on. One that is taken must leave the round with the exact sum or
with a refusal: damaged shares may be tolerated, a damaged sum may not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import pytest
from secagg_rounds import Cohort, answer, model, plain_sum, terms

from privrec.errors import IntegrityError, ReleaseRefused
from privrec.secagg.client import ClientSession, Policy
from privrec.secagg.keys import PrekeyBook
from privrec.secagg.messages import MASKED_START, Stage
from privrec.secagg.roster import Terms
from privrec.secagg.server import ServerSession
from privrec.secagg.sharing import Graph

TIERS = (0, 0, 1, 0, 1)
BAND = 2


class Sparse(Graph):
    """Of five devices each draws three, which no device would think safe."""

    def check(self, holders: Sequence[int], corrupt_share: float) -> None:
        """Never too unsafe."""


@dataclass(frozen=True)
class Kind:
    """A kind of round: of a complete graph, or sparse and with noise that is taken off again."""

    agreed: Terms
    policy: Policy

    def seeds(self, i: int) -> list[bytes]:
        """Of a device's noise."""
        return [bytes([i + 1, band] * 16) for band in range((BAND - TIERS[i]) * self.agreed.excess)]


DENSE = Kind(terms((2, 3)), Policy(minimum=2, corrupt_share=0.0))
SPARSE = Kind(
    terms((2, 3), excess=True, minimums=(3, 2)),
    Policy(minimum=2, corrupt_share=0.0, graph=Sparse(complete_up_to=2, degree=3)),
)
VECTORS = [np.full(DENSE.agreed.length(tier), 11 * i + 1, np.int32) for i, tier in enumerate(TIERS)]


@dataclass
class Target:
    """A session that waits for one message, and how to go on from there."""

    kind: Kind
    stage: Stage
    is_server: bool
    message: bytes  # the right one
    cohort: Cohort
    server: ServerSession
    clients: list[ClientSession]

    def feed(self, message: bytes) -> bool:
        """Whether a message was taken; anything but a clean refusal is an error of the test."""
        try:
            if self.is_server:
                self.server.receive(self.cohort.ids[0], message)
            else:
                self.reply = self._answer(self.clients[0], message, 0)
        except ReleaseRefused:
            return False
        return True

    def finish(self) -> np.ndarray | None:
        """The sum that the rest of the round gives, or None when it is refused."""
        try:
            if not self.is_server:
                self.server.receive(self.cohort.ids[0], self.reply)
            for i in range(1, len(TIERS)):
                self._exchange(i)
            self.server.advance()
            while not self.server.done:
                for i in range(len(TIERS)):
                    self._exchange(i)
                self.server.advance()
            return self.server.result.total
        except ReleaseRefused:
            return None

    def _exchange(self, i: int) -> None:
        device = self.cohort.ids[i]
        message = self.server.outbox().get(device)
        if message is None:
            return
        try:
            self.server.receive(device, self._answer(self.clients[i], message, i))
        except ReleaseRefused:
            return

    def _answer(self, client: ClientSession, message: bytes, i: int) -> bytes:
        digests = model(BAND)[: BAND - TIERS[i]]
        if self.server.stage is Stage.SHARES:
            return client.shares(message, self.kind.seeds(i))
        return bytes(answer(client, self.server.stage, message, VECTORS[i], digests))


def waiting(kind: Kind, stage: Stage, is_server: bool) -> Target:
    """A round up to the message that is to be damaged; the same each time."""
    cohort = Cohort(TIERS, kind.policy)
    server, clients = cohort.server(kind.agreed), cohort.clients()
    target = Target(kind, stage, is_server, b"", cohort, server, clients)
    while server.stage < stage:
        for i in range(len(TIERS)):
            target._exchange(i)
        if server.stage is Stage.CONFIRM:  # one device is gone at the end: its shares matter
            target.server._answered.discard(4)
            target.server._signatures.pop(4, None)
        server.advance()
    message = server.outbox()[cohort.ids[0]]
    target.message = target._answer(clients[0], message, 0) if is_server else message
    return target


# ---------------------------------------------------------------- damage


def mutations(right: bytes, others: list[bytes], rng: np.random.Generator) -> Iterator[bytes]:
    """Damaged versions of a message, without end."""
    makers = (flipped, cut, inserted, spliced, restructured, restructured, resized)
    while True:
        yield makers[rng.integers(len(makers))](right, others, rng)


def flipped(right: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    damaged = bytearray(right)
    for _ in range(rng.integers(1, 4)):
        # Half of the flips hit the front, where the structure lies.
        limit = len(damaged) if rng.integers(2) else min(len(damaged), 90)
        damaged[rng.integers(limit)] ^= 1 << rng.integers(8)
    return bytes(damaged)


def cut(right: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    start, end = sorted(rng.integers(0, len(right) + 1, 2))
    return right[:start] if rng.integers(2) else right[:start] + right[end:]


def inserted(right: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    place = rng.integers(len(right) + 1)
    return right[:place] + rng.bytes(int(rng.integers(1, 9))) + right[place:]


def spliced(right: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    other = others[rng.integers(len(others))]
    if rng.integers(2):
        return other
    place = rng.integers(min(len(right), len(other)))
    return right[:place] + other[place:]


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 1.5, "", "text", b"", bytes(32), [], [b"x"], [0] * 40, {}, {"a": 1},
    msgpack.ExtType(1, b"x"), msgpack.Timestamp(1), bytes(64), b"\xff" * 4096, [[[[]]]],
)  # fmt: skip


def restructured(right: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """Well-formed msgpack whose fields are not what they should be."""
    try:
        fields = list(msgpack.unpackb(right[4:], use_list=True))
    except (ValueError, TypeError):
        return flipped(right, others, rng)
    place, kind = int(rng.integers(len(fields))), rng.integers(4)
    if kind == 0:
        fields[place] = ODD[rng.integers(len(ODD))]
    elif kind == 1:
        fields[place] = altered(fields[place], rng)
    elif kind == 2:
        fields.insert(place, ODD[rng.integers(len(ODD))])
    else:
        del fields[place]
    return right[:4] + msgpack.packb(fields, use_bin_type=True)


def altered(value: Any, rng: np.random.Generator) -> Any:
    """A value of the same type that is another one."""
    if isinstance(value, bytes) and value:
        place = int(rng.integers(len(value)))
        if rng.integers(2):
            return (
                value[:place]
                + bytes([value[place] ^ (1 << int(rng.integers(8)))])
                + value[place + 1 :]
            )
        return value[:place] if rng.integers(2) else value + value[place:]
    if isinstance(value, int):
        return value + int(rng.integers(-2, 3))
    if isinstance(value, list) and value:
        place = int(rng.integers(len(value)))
        return [*value[:place], altered(value[place], rng), *value[place + 1 :]]
    return ODD[rng.integers(len(ODD))]


def resized(right: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """Lengths of msgpack's own, made large: they must not be believed."""
    damaged = bytearray(right)
    place = int(rng.integers(4, min(len(damaged), 120)))
    damaged[place : place + 5] = bytes([0xC4 + rng.integers(30)]) + rng.bytes(4)
    return bytes(damaged)


# ---------------------------------------------------------------- the tests


ALL = [
    (kind, stage, is_server)
    for kind in (DENSE, SPARSE)
    for stage in list(Stage)[:4]
    for is_server in (False, True)
]
NAMES = [
    f"{'sparse' if kind is SPARSE else 'dense'} {stage.name} {'server' if is_server else 'device'}"
    for kind, stage, is_server in ALL
]


@functools.cache
def foreign() -> list[bytes]:
    """Every message of a round of each kind."""
    return [waiting(*which).message for which in ALL]


def fuzz(kind: Kind, stage: Stage, is_server: bool, count: int, seed: int) -> tuple[int, int]:
    """How many of ``count`` damaged messages were refused and how many tolerated."""
    rng = np.random.default_rng(seed)
    target, others = waiting(kind, stage, is_server), foreign()
    refused = tolerated = 0
    for message in mutations(target.message, others, rng):
        if refused + tolerated == count:
            break
        if message == target.message or is_own_value(target, message):
            continue
        if not target.feed(message):
            refused += 1
            continue
        tolerated += 1
        check_outcome(target)
        target = waiting(kind, stage, is_server)
    assert target.feed(target.message), "refused messages must leave the session as it was"
    check_outcome(target)
    return refused, tolerated


def is_own_value(target: Target, message: bytes) -> bool:
    """A masked vector of the right form is a value that the device may send: nobody can tell."""
    right = target.message
    if not (target.is_server and target.stage is Stage.MASKED and len(message) == len(right)):
        return False
    return message[:MASKED_START] == right[:MASKED_START]


def check_outcome(target: Target) -> None:
    total = target.finish()
    if total is not None:
        survivors = target.server.result.survivors[0]
        chosen = [VECTORS[target.cohort.ids.index(device)] for device in survivors]
        np.testing.assert_array_equal(total, plain_sum(chosen, target.kind.agreed))


@pytest.mark.parametrize(("kind", "stage", "is_server"), ALL, ids=NAMES)
def test_damaged_messages_end_in_a_clean_error(kind: Kind, stage: Stage, is_server: bool) -> None:
    refused, tolerated = fuzz(kind, stage, is_server, 400, seed=8 * stage + is_server)
    assert refused > 100
    if (stage, is_server) == (Stage.MASKED, False):
        assert tolerated > 0  # a share that does not open is no reason to drop out


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage", "is_server"), ALL, ids=NAMES)
def test_a_hundred_thousand_damaged_messages(kind: Kind, stage: Stage, is_server: bool) -> None:
    refused, tolerated = fuzz(kind, stage, is_server, 6_500, seed=100 + 8 * stage + is_server)
    assert refused + tolerated == 6_500


@pytest.mark.parametrize("length", [0, 1, 3, 4, 36, 37, 1000, 100_000])
def test_noise_is_no_message(length: int) -> None:
    noise = np.random.default_rng(length).bytes(length)
    for kind, stage, is_server in ALL:
        target = waiting(kind, stage, is_server)
        for start in (b"", target.message[:4]):
            assert not target.feed((start + noise)[: max(length, 1)])


def test_broken_progress_is_refused() -> None:
    target = waiting(DENSE, Stage.CONFIRM, False)
    saved = target.cohort.saved[target.cohort.ids[0]]
    rng = np.random.default_rng(0)
    book: PrekeyBook = target.cohort.books[0]
    for message, _ in zip(mutations(saved, [saved[::-1]], rng), range(300), strict=False):
        try:
            saved = {"progress": message, "call": target.cohort.call}
            ClientSession(book, target.cohort.anchor, DENSE.policy, **saved)
        except (ReleaseRefused, IntegrityError):
            continue
