"""How the updates of a simulated cohort become a sum: as plain integers, or by the whole protocol.

Both take the same integers and the same noise, so that both give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privrec.device.tier import Federation, Tier
from privrec.device.update import BoundedUpdate, Protection, Round
from privrec.errors import ReleaseRefused
from privrec.models.layout import from_wire
from privrec.privacy.mechanism import noise_seeds
from privrec.randomness import SecretRoot
from privrec.secagg.client import ClientSession, Policy
from privrec.secagg.graph import Graph
from privrec.secagg.keys import DeviceKey, PrekeyBook
from privrec.secagg.roster import ListedDevices
from privrec.secagg.server import SecureSum, ServerSession, Stage

Integers = NDArray[np.int64]
_WIDE = np.dtype(np.int64)


@dataclass(frozen=True)
class Participant:
    """A device of a round's cohort.

    Args:
        user: its index.
        tier: what it holds.
        leaves: the exchange that it does not answer any more; ``Stage.DONE`` for one that stays.
    """

    user: int
    tier: Tier
    leaves: Stage = Stage.DONE

    @property
    def survives(self) -> bool:
        """Whether its update is in the sum."""
        return self.leaves > Stage.MASKED


class Summing(Protocol):
    """One round's sum in the making."""

    def add(self, tier: Tier, users: NDArray[np.int64], update: BoundedUpdate) -> None:
        """Put in the updates of survivors of a tier, in the order of ``users``."""
        ...

    def total(self) -> Integers:
        """The sum over all survivors, int64 in the layout of the shared vector.

        Raises:
            ReleaseRefused: when too few devices answered up to the end.
        """
        ...


@dataclass
class Enrolled:
    """The simulated devices as the protocol knows them: identities, books of prekeys, one anchor.

    Args:
        root: the devices' secret.
        policy: what every device insists on.
    """

    root: SecretRoot
    policy: Policy
    _books: dict[int, PrekeyBook] = field(default_factory=dict, init=False)

    def book(self, user: int) -> PrekeyBook:
        """The keys of one device, made when it is first asked for."""
        if user not in self._books:
            key = DeviceKey.derive(self.root, "user", user)
            self._books[user] = PrekeyBook(key, self.root)
        return self._books[user]

    def identity(self, user: int) -> bytes:
        """The public key that a device is known by."""
        return self.book(user).key.public


class Plain:
    """The sum of the same integers without masks: fast, and no secret to the server.

    Rounds end without a sum as they do in the protocol when too few devices are left. Not looked at
    are neighbourhoods of the sparse graph, in which a device may miss more than in the whole.

    Args:
        round: the round.
        federation: the tiers.
        protection: bounds, ring and noise.
        cohort: who takes part.
        enrolled: for the order of identities, which decides whose noise is taken off.

    Raises:
        ReleaseRefused: when too few devices answer an exchange.
    """

    def __init__(
        self, round: Round, federation: Federation, protection: Protection,
        cohort: Sequence[Participant], enrolled: Enrolled,
    ) -> None:  # fmt: skip
        self._round, self._federation, self._protection = round, federation, protection
        self._sum = np.zeros(federation.layout.size, _WIDE)
        if protection.minimums:
            _check_turnout(cohort, federation, protection)
        self._noise = self._noise_of([p for p in cohort if p.survives], enrolled)

    def add(self, tier: Tier, users: NDArray[np.int64], update: BoundedUpdate) -> None:
        """See :meth:`Summing.add`."""
        update.add_to(self._sum, self._federation.layout)

    def total(self) -> Integers:
        """See :meth:`Summing.total`."""
        ring, layouts = self._protection.ring, self._federation.layouts
        whole = self._sum + from_wire(self._noise, layouts) if len(self._noise) else self._sum
        return ring.leave(ring.enter(whole))

    def _noise_of(self, survivors: Sequence[Participant], enrolled: Enrolled) -> Integers:
        """The shares that are left in the sum, in the order of the wire."""
        shares, bands = self._protection.shares, len(self._federation.layouts)
        if shares is None:
            return np.zeros(0, _WIDE)
        root, context, parts = enrolled.root, self._round.context, []
        if shares.remove_excess:
            survivors = sorted(survivors, key=lambda each: enrolled.identity(each.user))
        for band in range(bands):
            holders = [p for p in survivors if bands - p.tier.index > band]
            signed = {p.user for p in holders if p.leaves > Stage.CONFIRM}
            removed = shares.removed(band, [p.user for p in holders], signed)
            total = np.zeros(shares.bands[band].size, _WIDE)
            for user in [p.user for p in holders if p.user not in set(removed)]:
                seed = noise_seeds(root, band + 1, *context, user)[band]
                total += shares.draw_band(band, seed)
            parts.append(total)
        return np.concatenate(parts)


class Secure:
    """The whole protocol with a session for every device; the server sees masked vectors alone.

    Args:
        round: the round.
        federation: the tiers.
        protection: bounds, ring and noise.
        cohort: who takes part.
        enrolled: the devices' keys.

    Raises:
        ReleaseRefused: when too few devices answer the first exchange.
    """

    def __init__(
        self, round: Round, federation: Federation, protection: Protection,
        cohort: Sequence[Participant], enrolled: Enrolled,
    ) -> None:  # fmt: skip
        self._round, self._federation, self._protection = round, federation, protection
        self._root = enrolled.root
        self._terms = protection.terms(round, federation.layouts)
        self._cohort = {enrolled.identity(p.user): p for p in cohort}
        self._names = {p.user: name for name, p in self._cohort.items()}
        anchor = ListedDevices(self._cohort)
        agreed = Policy(enrolled.policy.minimum, enrolled.policy.corrupt_share, self._terms)
        books = {name: enrolled.book(p.user) for name, p in self._cohort.items()}
        self._clients = {name: ClientSession(book, anchor, agreed) for name, book in books.items()}
        prekeys = [books[name].issue(1, p.tier.index)[0] for name, p in self._cohort.items()]
        self._server = ServerSession(self._terms, prekeys, anchor)
        self._server.publish(round.model_digests)
        for name, message in self._asked():
            self._server.receive(name, self._clients[name].shares(message, self._dealt(name)))
        self._server.advance()
        self._deals = dict(self._asked())

    def add(self, tier: Tier, users: NDArray[np.int64], update: BoundedUpdate) -> None:
        """See :meth:`Summing.add`."""
        layouts = (tier.layout, *self._federation.weaker(tier))
        seen = self._round.model_digests[: len(layouts)]
        for user, mine in zip(users.tolist(), update.rows(), strict=True):
            name = self._names[user]
            upload = mine.upload(layouts, self._protection.shares, self._seeds(name))
            client = self._clients[name]
            masked = client.masked(self._deals.pop(name), upload.integers, seen)
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
        return unmask(server.result, self._protection, self._federation)

    def _asked(self) -> Iterator[tuple[bytes, bytes]]:
        """The devices that are still there, and what they are sent."""
        for name, message in self._server.outbox().items():
            if self._cohort[name].leaves > self._server.stage:
                yield name, message

    def _seeds(self, name: bytes) -> Sequence[bytes]:
        if self._protection.shares is None:
            return ()
        user, tier = self._cohort[name].user, self._cohort[name].tier
        held = len(self._federation.layouts) - tier.index
        return noise_seeds(self._root, held, *self._round.context, user)

    def _dealt(self, name: bytes) -> Sequence[bytes]:
        return self._seeds(name) if self._protection.removes_excess else ()


def unmask(result: SecureSum, protection: Protection, federation: Federation) -> Integers:
    """The sum that the protocol gave, less noise in excess, in the layout of the shared vector."""
    total = result.total.astype(_WIDE)
    if protection.shares is not None and protection.removes_excess:
        total -= protection.shares.excess(result.excess)
    ring = protection.ring
    return from_wire(ring.leave(ring.enter(total)), federation.layouts)


SUMMING: Mapping[str, type[Plain] | type[Secure]] = {"exact": Plain, "full": Secure}


def _check_turnout(
    cohort: Sequence[Participant], federation: Federation, protection: Protection
) -> None:
    """Refuse a round that the protocol would end without a sum."""
    quorum, bands = Graph().quorum(len(cohort)), len(federation.layouts)
    for stage in (Stage.SHARES, Stage.MASKED, Stage.CONFIRM, Stage.UNMASK):
        held = [bands - p.tier.index for p in cohort if p.leaves > stage]
        counts = [sum(each > band for each in held) for band in range(bands)]
        # Once survivors are confirmed, only as many are needed as give secrets back.
        least = protection.minimums if stage < Stage.UNMASK else (0,) * bands
        if len(held) < quorum or any(c < few for c, few in zip(counts, least, strict=True)):
            raise ReleaseRefused(
                "too few devices are left of a round's cohort, or of a band's holders; the round "
                "ends without a sum, and stays charged"
            )
