"""Whole rounds in one process: devices with keys, and the loop that carries the messages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from privrec.errors import ReleaseRefused
from privrec.randomness import SecretRoot
from privrec.secagg.client import ClientSession, Policy
from privrec.secagg.keys import DeviceKey, PrekeyBook
from privrec.secagg.messages import Stage
from privrec.secagg.roster import ListedDevices, Terms
from privrec.secagg.server import SecureSum, ServerSession
from privrec.secagg.sharing import Graph

LENGTHS = (4, 11, 30)
SMALL = Policy(minimum=2, corrupt_share=0.0)
PLAN = bytes(range(32))
STAGES = ("shares", "masked", "confirm", "unmask")


def terms(lengths: Sequence[int] = LENGTHS, **changes: Any) -> Terms:
    """Terms of a round with as many bands as there are lengths."""
    values: dict[str, Any] = {
        "run": "run",
        "round": 0,
        "attempt": 0,
        "plan": PLAN,
        "lengths": tuple(lengths),
        "minimums": (1,) * len(lengths),
    }
    return Terms(**values | changes)


def model(bands: int, name: bytes = b"model") -> tuple[bytes, ...]:
    """Digests of the bands of some model."""
    return tuple((name + bytes([band])).ljust(32, b"-") for band in range(bands))


@dataclass
class Cohort:
    """Enrolled devices with their books, in the order of the roster."""

    tiers: tuple[int, ...]
    policy: Policy = SMALL
    name: str = "cohort"
    books: list[PrekeyBook] = field(init=False)
    saved: dict[bytes, bytes] = field(default_factory=dict)
    """What the session of each device saved last."""
    call: bytes = field(default=b"", init=False)
    """Of the last round."""

    def __post_init__(self) -> None:
        roots = [SecretRoot.known(f"{self.name} {i}".encode()) for i in range(len(self.tiers))]
        books = [PrekeyBook(DeviceKey.derive(root, "device"), root) for root in roots]
        self.books = sorted(books, key=lambda book: book.key.public)
        self.anchor = ListedDevices(self.ids)

    @property
    def ids(self) -> list[bytes]:
        return [book.key.public for book in self.books]

    def prekeys(self) -> list[bytes]:
        """A fresh record of each device."""
        pairs = zip(self.books, self.tiers, strict=True)
        return [book.issue(1, tier)[0] for book, tier in pairs]

    def clients(self, made: Callable[..., ClientSession] = ClientSession) -> list[ClientSession]:
        return [
            made(book, self.anchor, self.policy, partial(self.saved.__setitem__, book.key.public))
            for book in self.books
        ]

    def resumed(self, number: int) -> ClientSession:
        """A session that goes on from what the one of this device saved last."""
        book = self.books[number]
        device = book.key.public
        save, saved = partial(self.saved.__setitem__, device), self.saved[device]
        return ClientSession(book, self.anchor, self.policy, save, saved, self.call)

    def server(
        self, agreed: Terms | None = None, made: Callable[..., ServerSession] = ServerSession
    ) -> ServerSession:
        agreed = agreed or terms()
        session = made(agreed, self.prekeys(), self.anchor, self.policy.graph)
        session.publish(model(len(agreed.lengths)))
        self.call = session._call.pack()
        return session

    def vectors(self, agreed: Terms, rng: np.random.Generator) -> list[np.ndarray]:
        """Whole-range integers: sums wrap around."""
        dtype = np.int32 if agreed.ring_bits == 32 else np.int16
        info = np.iinfo(dtype)
        lengths = (agreed.length(tier) for tier in self.tiers)
        return [rng.integers(info.min, info.max, n, dtype, endpoint=True) for n in lengths]


def plain_sum(vectors: Sequence[np.ndarray], agreed: Terms) -> np.ndarray:
    """The sum of zero-padded vectors modulo the ring."""
    total = np.zeros(agreed.lengths[-1], np.int64)
    for vector in vectors:
        total[: len(vector)] += vector
    return total.astype(np.int32 if agreed.ring_bits == 32 else np.int16)


def answer(
    client: ClientSession,
    stage: Stage,
    message: bytes,
    vector: np.ndarray,
    digests: Sequence[bytes] | None = None,
) -> bytes | bytearray:
    """What a device answers in a stage."""
    if stage is Stage.SHARES:
        return client.shares(message)
    if stage is Stage.MASKED:
        bands = client.terms.lengths.index(len(vector)) + 1
        seen = model(bands) if digests is None else digests
        return client.masked(message, vector, seen[:bands])
    if stage is Stage.CONFIRM:
        return client.confirm(message)
    return client.unmask(message)


def drive(
    server: ServerSession,
    clients: Mapping[bytes, ClientSession],
    vectors: Mapping[bytes, np.ndarray],
    drops: Mapping[Stage, Collection[bytes]] | None = None,
) -> SecureSum:
    """A round from the first message to the sum.

    Args:
        server: at its first stage, with a model published.
        clients: by identity.
        vectors: by identity.
        drops: who stops answering at a stage, for good.
    """
    gone: set[bytes] = set()
    while not server.done:
        gone |= set((drops or {}).get(server.stage, ()))
        for device, message in server.outbox().items():
            if device in gone:
                continue
            try:
                reply = answer(clients[device], server.stage, message, vectors[device])
            except ReleaseRefused:
                continue
            server.receive(device, reply)
        server.advance()
    return server.result


def round_of(
    cohort: Cohort,
    agreed: Terms | None = None,
    drops: Mapping[Stage, Collection[int]] | None = None,
    seed: int = 0,
) -> tuple[SecureSum, np.ndarray]:
    """The secure sum of random vectors, and the plain one over its survivors."""
    agreed = agreed or terms()
    vectors = dict(
        zip(cohort.ids, cohort.vectors(agreed, np.random.default_rng(seed)), strict=True)
    )
    named = {
        stage: [cohort.ids[number] for number in numbers]
        for stage, numbers in (drops or {}).items()
    }
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    result = drive(cohort.server(agreed), clients, vectors, named)
    return result, plain_sum([vectors[device] for device in result.survivors[0]], agreed)


SPARSE = Graph(complete_up_to=5, degree=12)
