"""How the updates of a simulated cohort become a sum: as plain integers, or by the whole protocol.

Both take the same integers and the same noise, so that both give the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from privrec.device.tier import Federation, Tier
from privrec.device.update import BoundedUpdate, Protection, Round
from privrec.errors import ReleaseRefused
from privrec.models.layout import from_wire
from privrec.privacy.mechanism import noise_seeds
from privrec.randomness import SecretRoot
from privrec.secagg.client import ClientSession, Policy
from privrec.secagg.keys import DeviceKey, PrekeyBook
from privrec.secagg.messages import Stage
from privrec.secagg.roster import ListedDevices
from privrec.secagg.server import SecureSum, ServerSession
from privrec.secagg.sharing import Graph

Integers = NDArray[np.int64]
_WIDE = np.dtype(np.int64)


@dataclass(frozen=True)
class Participant:
    """A device of a round's cohort; ``leaves`` is the exchange that it does not answer any more."""

    user: int
    tier: Tier
    leaves: Stage = Stage.DONE

    @property
    def survives(self) -> bool:
        """Whether its update is in the sum."""
        return self.leaves > Stage.MASKED


@dataclass
class Enrolled:
    """The simulated devices as the protocol knows them, by their secret: identities, prekeys."""

    root: SecretRoot
    policy: Policy
    _books: dict[int, PrekeyBook] = field(default_factory=dict, init=False)

    def book(self, user: int) -> PrekeyBook:
        """The keys of one device, made when it is first asked for."""
        if user not in self._books:
            self._books[user] = PrekeyBook(DeviceKey.derive(self.root, "user", user), self.root)
        return self._books[user]

    def identity(self, user: int) -> bytes:
        """The public key that a device is known by."""
        return self.book(user).key.public


@dataclass
class Summing(ABC):
    """One round's sum in the making; the order of identities decides whose noise is taken off.

    Raises:
        ReleaseRefused: when too few devices answer.
    """

    round: Round
    federation: Federation
    protection: Protection
    cohort: Sequence[Participant]
    enrolled: Enrolled

    @abstractmethod
    def __post_init__(self) -> None:
        """Go up to where updates are due."""

    @abstractmethod
    def add(self, tier: Tier, users: NDArray[np.int64], update: BoundedUpdate) -> None:
        """Put in the updates of survivors of a tier, in the order of ``users``."""

    @abstractmethod
    def total(self) -> Integers:
        """The sum over all survivors, int64 in the layout of the shared vector.

        Raises:
            ReleaseRefused: when too few devices answered up to the end.
        """

    def bands(self, device: Participant) -> int:
        """How many bands a device holds, counted from the one that all hold."""
        return len(self.federation.layouts) - device.tier.index


class Plain(Summing):
    """The sum of the same integers without masks: fast, and no secret to the server.

    Rounds end without a sum as they do in the protocol when too few devices are left. Not looked at
    are neighbourhoods of the sparse graph, in which a device may miss more than in the whole.
    """

    def __post_init__(self) -> None:
        self._sum = np.zeros(self.federation.layout.size, _WIDE)
        if self.protection.minimums:
            self._check_turnout()
        self._noise = self._noise_of([p for p in self.cohort if p.survives])

    def add(self, tier: Tier, users: NDArray[np.int64], update: BoundedUpdate) -> None:
        """See :meth:`Summing.add`."""
        update.add_to(self._sum, self.federation.layout)

    def total(self) -> Integers:
        """See :meth:`Summing.total`."""
        ring, layouts = self.protection.ring, self.federation.layouts
        whole = self._sum + from_wire(self._noise, layouts) if len(self._noise) else self._sum
        return ring.leave(ring.enter(whole))

    def _check_turnout(self) -> None:
        """Refuse a round that the protocol would end without a sum."""
        quorum, bands = Graph().quorum(len(self.cohort)), range(len(self.federation.layouts))
        for stage in (Stage.SHARES, Stage.MASKED, Stage.CONFIRM, Stage.UNMASK):
            held = [self.bands(p) for p in self.cohort if p.leaves > stage]
            counts = [sum(each > band for each in held) for band in bands]
            # Once survivors are confirmed, only as many are needed as give secrets back.
            least = self.protection.minimums if stage < Stage.UNMASK else (0 for _ in bands)
            if len(held) < quorum or any(c < few for c, few in zip(counts, least, strict=True)):
                raise ReleaseRefused(
                    "too few devices are left of a round's cohort, or of a band's holders; the "
                    "round ends without a sum, and stays charged"
                )

    def _noise_of(self, survivors: Sequence[Participant]) -> Integers:
        """The shares that are left in the sum, in the order of the wire."""
        shares, root, context = self.protection.shares, self.enrolled.root, self.round.context
        if shares is None:
            return np.zeros(0, _WIDE)
        if shares.remove_excess:
            survivors = sorted(survivors, key=lambda each: self.enrolled.identity(each.user))
        parts = []
        for band in range(len(self.federation.layouts)):
            holders = [p for p in survivors if self.bands(p) > band]
            signed = {p.user for p in holders if p.leaves > Stage.CONFIRM}
            removed = set(shares.removed(band, [p.user for p in holders], signed))
            total = np.zeros(shares.bands[band].size, _WIDE)
            for user in (p.user for p in holders if p.user not in removed):
                seed = noise_seeds(root, band + 1, *context, user)[band]
                total += shares.draw_band(band, seed)
            parts.append(total)
        return np.concatenate(parts)


class Secure(Summing):
    """The whole protocol with a session for every device; the server sees masked vectors alone."""

    def __post_init__(self) -> None:
        enrolled, terms = self.enrolled, self.protection.terms(self.round, self.federation.layouts)
        self._devices = {enrolled.identity(p.user): p for p in self.cohort}
        self._names = {p.user: name for name, p in self._devices.items()}
        anchor, agreed = ListedDevices(self._devices), replace(enrolled.policy, agreed=terms)
        books = {name: enrolled.book(p.user) for name, p in self._devices.items()}
        self._clients = {name: ClientSession(book, anchor, agreed) for name, book in books.items()}
        prekeys = [books[name].issue(1, p.tier.index)[0] for name, p in self._devices.items()]
        self._server = ServerSession(terms, prekeys, anchor)
        self._server.publish(self.round.model_digests)
        for name, message in self._asked():
            dealt = self._seeds(name) if self.protection.removes_excess else ()
            self._server.receive(name, self._clients[name].shares(message, dealt))
        self._server.advance()
        self._deals = dict(self._asked())

    def add(self, tier: Tier, users: NDArray[np.int64], update: BoundedUpdate) -> None:
        """See :meth:`Summing.add`."""
        layouts = self.federation.layouts_of(tier)
        seen = self.round.model_digests[: len(layouts)]
        for user, mine in zip(users.tolist(), update.rows(), strict=True):
            name = self._names[user]
            upload = mine.upload(layouts, self.protection.shares, self._seeds(name))
            masked = self._clients[name].masked(self._deals.pop(name), upload.integers, seen)
            self._server.receive(name, masked)

    def total(self) -> Integers:
        """See :meth:`Summing.total`."""
        server = self._server
        server.advance()
        for name, message in self._asked():
            server.receive(name, self._clients[name].confirm(message))
        server.advance()
        for name, message in self._asked():
            server.receive(name, self._clients[name].unmask(message))
        server.advance()
        return unmask(server.result, self.protection, self.federation)

    def _asked(self) -> Iterator[tuple[bytes, bytes]]:
        """The devices that are still there, and what they are sent."""
        for name, message in self._server.outbox().items():
            if self._devices[name].leaves > self._server.stage:
                yield name, message

    def _seeds(self, name: bytes) -> Sequence[bytes]:
        if self.protection.shares is None:
            return ()
        device = self._devices[name]
        held = self.bands(device)
        return noise_seeds(self.enrolled.root, held, *self.round.context, device.user)


def unmask(result: SecureSum, protection: Protection, federation: Federation) -> Integers:
    """The sum that the protocol gave, less noise in excess, in the layout of the shared vector."""
    total = result.total.astype(_WIDE)
    if protection.shares is not None and protection.removes_excess:
        total -= protection.shares.excess(result.excess)
    ring = protection.ring
    return from_wire(ring.leave(ring.enter(total)), federation.layouts)


SUMMING: Mapping[str, type[Plain] | type[Secure]] = {"exact": Plain, "full": Secure}
