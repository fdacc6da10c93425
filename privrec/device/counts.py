"""What a device says of its history before the first round: some of its items, for a count of all.

The counts are a secure sum like that of any round: of vectors of 0 and 1 of which no more than so
many entries are 1, each of them the same whole number of steps. Nothing is rounded, so the bound of
their norm is exact. The order of the items by the noisy counts is bound to all rounds that follow,
by their plan: a server that told two devices of two orders would have them in two rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from privrec.device.update import Address, BoundedUpdate, Protection, Round, digest
from privrec.errors import ReleaseRefused
from privrec.models.layout import Layout
from privrec.privacy.events import RoundEvent
from privrec.privacy.ledger import PREPARATION
from privrec.randomness import SecretRoot

if TYPE_CHECKING:
    from privrec.device.samples import Histories

Order = NDArray[np.int64]
"""For each place in the order the number of an item in the catalogue, shape ``(n,)``."""


@dataclass(frozen=True)
class Counting:
    """One count of the items of a catalogue, of which a user counts some.

    Args:
        items: size of the catalogue.
        most: items of a user that count.
        step: what an item counts, in steps of the integer grid: fine enough for noise in shares.
        event: what an attempt is charged as; everybody takes part.
        protection: of one band, that of the counts.
    """

    items: int
    most: int
    step: int
    event: RoundEvent
    protection: Protection

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Of the counts, which devices of all capacities send alike."""
        return (Layout(0, self.items, 1, 0),)

    @property
    def bound(self) -> float:
        """L2 sensitivity of the sum when one history is replaced by none."""
        return self.step * math.sqrt(self.most)

    def round(self, run_id: str, attempt: int, plan_digest: str) -> Round:
        """One attempt at the count, for which devices are sent no model."""
        return Round(run_id, PREPARATION, attempt, self.event, plan_digest, (digest(),))

    def bounded(self, data: Histories, root: SecretRoot, round: Round) -> BoundedUpdate:
        """What devices put into the sum, before their noise.

        Promise: an item counts once, whatever a history names twice; of a history that has more
        items than count, which do is uniform, and drawn from the devices' secret, for each user by
        itself.
        """
        pairs = data.pairs(self.items)
        rows, users = pairs // self.items, data.users.tolist()
        starts = np.searchsorted(rows, np.arange(len(users) + 1))
        for row in np.flatnonzero(np.diff(starts) > self.most).tolist():
            own = pairs[starts[row] : starts[row + 1]]
            lots = root.stream("popularity", *round.context, users[row]).uint64(len(own))
            own[:] = own[np.argsort(lots, kind="stable")]
        places = np.arange(len(pairs)) - starts[rows]
        counted = places < self.most
        width = min(self.most, int(np.diff(starts).max(initial=0)))
        blocks = np.zeros((len(users), width), np.int64)
        integers = np.zeros(blocks.shape, np.int32)
        blocks[rows[counted], places[counted]] = pairs[counted] % self.items
        integers[rows[counted], places[counted]] = self.step
        address = Address(blocks, np.zeros((1, 0), np.int64), self.layouts[0])
        return BoundedUpdate(integers, address)


def agreed_places(packed: bytes, items: int, told: bytes) -> NDArray[np.int32]:
    """The place of each item in the order that a device was sent, the bytes of an :data:`Order`.

    ReleaseRefused unless its digest is the one that the round is bound to: a server that gave each
    device another order could tell its part of a sum from the others'. Refused, too, is what is no
    order of the catalogue.
    """
    order = np.frombuffer(packed if len(packed) == 8 * items else b"", np.int64)
    if digest(order) != told or not np.array_equal(np.sort(order), np.arange(items)):
        raise ReleaseRefused(
            f"an order of the {items} items that is not the one that the round is bound to; "
            "nothing is answered"
        )
    places = np.empty(items, np.int32)
    places[order] = np.arange(items, dtype=np.int32)
    return places
