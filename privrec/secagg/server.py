"""The server's side of one secure sum: whom to send what, and at the end the sum or an error.

A pure state machine, driven by whatever carries the messages::

    while not server.done:
        for device, message in server.outbox().items():
            ...                                     # send it; when an answer comes:
            server.receive(device, answer)          # ReleaseRefused: it counts as no answer
        server.advance()                            # ReleaseRefused: the round is over
    result = server.result

Devices that have not answered when :meth:`ServerSession.advance` is called have dropped out. Masked
vectors are summed as they come in, so that one vector is all the memory that they take.
Source: Bonawitz et al. (CCS 2017); see ``docs/protocol.md``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.errors import ReleaseRefused, UsageError
from privrec.secagg.graph import Graph
from privrec.secagg.keys import Prekey
from privrec.secagg.masks import apply_masks, word_type
from privrec.secagg.messages import (
    PLEDGE_BYTES,
    SHARE_MARK_BYTES,
    Confirmation,
    Deal,
    Opening,
    Quorum,
    Shares,
    Survivors,
    masked_entries,
    sealed_bytes,
)
from privrec.secagg.recovery import Binding, Deposit, Recovery, model_root
from privrec.secagg.roster import NOISE, SEED, Anchor, Call, Roster, Terms
from privrec.secagg.shamir import SECRET_BYTES
from privrec.secagg.wire import DIGEST_BYTES, Buffer, bitmap, members, refused, split


class Stage(IntEnum):
    """What the server waits for."""

    SHARES = 0
    MASKED = 1
    CONFIRM = 2
    UNMASK = 3
    DONE = 4


@dataclass(frozen=True)
class SecureSum:
    """What a round gives.

    Args:
        total: the sum over the survivors, each padded with zeros to the whole vector; signed
            integers of the ring's width, shape ``(lengths[-1],)``.
        survivors: for each band, the band that all hold first, the identities of the devices in the
            sum that hold it, in the roster's order.
        excess: for each band the seeds of the noise that is still in ``total`` and is to be taken
            off; empty where the terms say that none is.
        faults: what devices did that they should not have, by identity.
    """

    total: NDArray[np.signedinteger[Any]]
    survivors: tuple[tuple[bytes, ...], ...]
    excess: tuple[tuple[bytes, ...], ...]
    faults: Mapping[bytes, str]


class ServerSession:
    """The server in one attempt at one round.

    Promise: :attr:`result` is the exact sum, modulo the ring, of the vectors that the devices in
    ``survivors`` put in, or there is none.

    Args:
        terms: of the round.
        prekeys: one record of each device of the cohort, from its deposit; a record serves once.
        anchor: which devices are enrolled; an honest server checks as devices do.
        graph: constants of the protocol.

    Raises:
        UsageError: when the terms contradict themselves.
        ReleaseRefused: when a prekey is not that of an enrolled device, two are of the same one, or
            a band has fewer holders than the terms ask for.
    """

    def __init__(
        self, terms: Terms, prekeys: Sequence[bytes], anchor: Anchor, graph: Graph | None = None
    ) -> None:
        self._graph = graph or Graph()
        self._call = Call.of(terms, [Prekey.unpack(record) for record in prekeys])
        if problem := terms.problem() or self._call.problem():
            raise UsageError(f"a round of {problem}; lengths ascend, with one minimum for each")
        self._roster = Roster(self._call, anchor)
        self._roster.check_bands(range(len(self._roster)), 1)
        self._binding = Binding.of(self._call, self._graph)
        self._verifier = anchor.verifier
        self._numbers = {p.identity: number for number, p in enumerate(self._roster.prekeys)}
        self._deposits: dict[int, Deposit] = {}
        self._drawers: dict[int, list[int]] = {}
        self._signatures: dict[int, bytes] = {}
        self._faults: dict[bytes, str] = {}
        self._model: tuple[bytes, ...] = ()
        self._total = np.zeros(terms.lengths[-1], word_type(terms.ring_bits))
        self._following: ServerSession | None = None
        self._result: SecureSum | None = None
        self._survivors: tuple[int, ...] = ()
        self._opened: list[tuple[int, ...]] = []
        self._stage = Stage.SHARES
        self._due = tuple(range(len(self._roster)))
        self._answered: set[int] = set()

    @property
    def stage(self) -> Stage:
        """What the server waits for."""
        return self._stage

    @property
    def done(self) -> bool:
        """Whether the round is over, with a sum or without."""
        return self._stage is Stage.DONE

    @property
    def result(self) -> SecureSum:
        """The sum.

        Raises:
            ReleaseRefused: when the round is not over, or ended without one.
        """
        if self._result is None:
            raise ReleaseRefused("there is no sum: the round is not over, or it was given up")
        return self._result

    def publish(self, model: Sequence[bytes]) -> None:
        """Fix the model of the round; due before masked vectors are asked for.

        Args:
            model: 32-byte digest of each band, the band that all devices hold first.

        Raises:
            UsageError: when there is not one digest for each band, or another model was published.
        """
        if len(model) != len(self._call.lengths):
            raise UsageError(
                f"digests of {len(model)} bands of a model that has {len(self._call.lengths)}"
            )
        if wrong := [digest for digest in model if len(digest) != DIGEST_BYTES]:
            raise UsageError(f"a digest of {len(wrong[0])} bytes: use SHA-256, of {DIGEST_BYTES}")
        if self._model not in ((), tuple(model)):
            raise UsageError("another model was published: devices may have it; begin a new round")
        self._model = tuple(model)

    def follow(self, session: ServerSession) -> None:
        """Let the first exchange of another round ride on the last one of this round.

        Args:
            session: of the next round, with devices of this cohort among its own. Devices that do
                not answer here stay in its :meth:`outbox`.
        """
        self._following = session

    def outbox(self) -> dict[bytes, bytes]:
        """What to send now, by the identity of the device; those that answered are left out.

        Raises:
            UsageError: when masked vectors are due and no model was published.
        """
        awaited = [number for number in self._due if number not in self._answered]
        if self.done:
            return {}
        make = (self._calls, self._deals, self._tidings, self._quorums)
        messages = make[self._stage](awaited)
        return {self._roster.prekeys[n].identity: message for n, message in messages.items()}

    def receive(self, device: bytes, message: Buffer) -> None:
        """Take in the answer of one device.

        Args:
            device: the identity that the transport knows the sender by.
            message: its answer to what :meth:`outbox` had for it.

        Raises:
            ReleaseRefused: when the answer is not what is due from this device; it changes nothing,
                and the device may still answer.
        """
        number = self._numbers.get(device)
        if number is None or number not in self._due or number in self._answered:
            raise refused(f"an answer of {device.hex()[:16]}, from whom none is due")
        take = (self._take_shares, self._take_masked, self._take_confirmation, self._take_opening)
        take[self._stage](number, message)
        self._answered.add(number)

    def advance(self) -> None:
        """Go on without those that did not answer.

        Raises:
            ReleaseRefused: when too few devices are left, or a secret could not be recovered. The
                round is over then, and nothing of the sum is kept.
        """
        close = (self._close_shares, self._close_masked, self._close_confirm, self._close_unmask)
        if self.done:
            raise UsageError("the round is over; begin another session")
        try:
            close[self._stage](tuple(sorted(self._answered)))
        except ReleaseRefused:
            self._finish()
            raise
        self._answered = set()
        if self._result is None:
            self._stage = Stage(self._stage + 1)
        else:
            self._finish()

    # ------------------------------------------------------------------ what is sent

    def _calls(self, numbers: Sequence[int]) -> dict[int, bytes]:
        return dict.fromkeys(numbers, self._call.pack())

    def _deals(self, numbers: Sequence[int]) -> dict[int, bytes]:
        if not self._model:
            raise UsageError("masked vectors are due, but no model was published: call publish()")
        return {number: self._deal(number).pack() for number in numbers}

    def _deal(self, number: int) -> Deal:
        dealers = ((n, self._deposits[n].sealed) for n in self._drawers[number])
        sealed = {dealer: pieces[number] for dealer, pieces in dealers if number in pieces}
        present, recipients = self._bitmap(self._deposits), self._bitmap(sealed)
        joined = b"".join(sealed.values())
        drawers = self._bitmap(self._drawers[number])
        return Deal(self._binding.context, present, recipients, drawers, joined, self._model)

    def _tidings(self, numbers: Sequence[int]) -> dict[int, bytes]:
        context, survivors = self._binding.context, self._bitmap(self._survivors)
        told = Survivors(context, survivors, model_root(self._model), b"")
        if not self._is_sparse:
            return dict.fromkeys(numbers, told.pack())
        return {
            number: replace(told, pledges=self._pledges_to(number)).pack() for number in numbers
        }

    def _pledges_to(self, number: int) -> bytes:
        drawn = self._deposits[number].partners
        near = (self._deposits[peer] for peer in self._survivors if peer in drawn)
        return b"".join(deposit.pledges[number] for deposit in near)

    def _quorums(self, numbers: Sequence[int]) -> dict[int, bytes]:
        calls = self._following.outbox() if self._following else {}
        packed = {call: self._quorum(call) for call in {b"", *calls.values()}}
        names = [self._roster.prekeys[number].identity for number in numbers]
        return {n: packed[calls.get(name, b"")] for n, name in zip(numbers, names, strict=True)}

    def _quorum(self, call: bytes) -> bytes:
        signed = sorted(self._signatures)
        joined = b"".join(self._signatures[number] for number in signed)
        return Quorum(self._binding.context, self._bitmap(signed), joined, call).pack()

    # ------------------------------------------------------------------ what comes in

    def _take_shares(self, number: int, message: Buffer) -> None:
        shares = Shares.parse(message)
        self._check_context(shares.context)
        holders = members(shares.neighbours, len(self._roster))
        count = self._graph.neighbours(len(self._roster))
        if number in holders or len(holders) != count:
            raise refused(f"shares for {len(holders)} neighbours, where {count} others are due")
        partners = frozenset(members(shares.partners, len(self._roster)))
        if number in partners or not partners.issuperset(holders):
            raise refused("partners that lack a neighbour, or include the device itself")
        secrets = self._roster.secrets(number)
        marks = split(shares.share_marks, [SHARE_MARK_BYTES] * secrets * count)
        sealed = split(shares.sealed, [sealed_bytes(secrets)] * count)
        kinds = (SEED, *range(NOISE, secrets))
        if len(shares.seed_marks) != len(kinds):
            raise refused(f"{len(shares.seed_marks)} commitments to {len(kinds)} seeds")
        each = [marks[start : start + secrets] for start in range(0, len(marks), secrets)]
        self._deposits[number] = Deposit(
            partners,
            dict(zip(kinds, shares.seed_marks, strict=True)),
            dict(zip(holders, each, strict=True)),
            dict(zip(holders, sealed, strict=True)),
        )

    def _take_masked(self, number: int, message: Buffer) -> None:
        length = self._roster.length(number)
        ring_bits = self._call.ring_bits
        drawers = self._drawers[number] if self._is_sparse else []
        entries, pledges = masked_entries(
            message, self._binding.context, length, ring_bits, len(drawers)
        )
        pieces = split(pledges, [PLEDGE_BYTES] * len(drawers))
        self._deposits[number].pledges = dict(zip(drawers, pieces, strict=True))
        self._total[:length] += entries

    def _take_confirmation(self, number: int, message: Buffer) -> None:
        confirmation = Confirmation.parse(message)
        self._check_context(confirmation.context)
        root = model_root(self._model)
        stated = self._binding.confirmation(self._bitmap(self._survivors), root)
        identity = self._roster.prekeys[number].identity
        if not self._verifier.check(identity, confirmation.signature, stated):
            raise refused(f"a wrong signature of device {identity.hex()[:16]}")
        self._signatures[number] = confirmation.signature

    def _take_opening(self, number: int, message: Buffer) -> None:
        opening = Opening.parse(message)
        self._check_context(opening.context)
        recipients = members(opening.recipients, len(self._roster))
        due, deposit = self._opened, self._deposits[number]
        named = [(recipient, kind) for recipient in recipients for kind in due[recipient]]
        shares = split(opening.shares, [SECRET_BYTES] * len(named))
        noise = split(opening.noise, [SECRET_BYTES] * len(due[number][1:]))
        own = dict(zip(due[number], (opening.seed, *noise), strict=True))
        for kind, seed in own.items():
            if self._binding.seed_mark(kind, number, seed) != deposit.seed_marks[kind]:
                raise refused("a seed that is not the one that its device committed to")
        deposit.own, deposit.opened = own, dict(zip(named, shares, strict=True))
        self._pass_on(number, opening.following)

    def _pass_on(self, number: int, answer: bytes) -> None:
        """A bad answer to the next call must not spoil a good one to this round."""
        if not (answer and self._following):
            return
        identity = self._roster.prekeys[number].identity
        try:
            self._following.receive(identity, answer)
        except ReleaseRefused as error:
            self._faults[identity] = str(error)

    def _check_context(self, context: bytes) -> None:
        if context != self._binding.context:
            raise refused("an answer of another round, attempt, roster or configuration")

    # ------------------------------------------------------------------ ends of stages

    def _close_shares(self, answered: tuple[int, ...]) -> None:
        self._check_enough(answered, "sent shares")
        self._due = answered
        self._drawers = {number: [] for number in range(len(self._roster))}
        for number in answered:
            for partner in self._deposits[number].partners:
                self._drawers[partner].append(number)

    def _close_masked(self, answered: tuple[int, ...]) -> None:
        self._check_enough(answered, "sent masked vectors")
        self._due = self._survivors = answered

    def _close_confirm(self, answered: tuple[int, ...]) -> None:
        self._check_enough(answered, "confirmed the survivors")
        self._due = answered
        self._opened = self._roster.due(self._survivors, set(answered))

    def _close_unmask(self, _: tuple[int, ...]) -> None:
        threshold = self._graph.threshold(len(self._roster))
        recovery = Recovery(
            self._roster, self._binding, model_root(self._model), threshold,
            self._deposits, self._survivors, self._faults,
        )  # fmt: skip
        apply_masks(self._total, recovery.masks())
        self._result = SecureSum(
            self._total.view(self._total.dtype.str.replace("u", "i")),
            self._roster.identities(self._survivors),
            tuple(map(tuple, recovery.noise(self._opened))),
            self._faults,
        )

    def _check_enough(self, numbers: Collection[int], doing: str) -> None:
        least = self._graph.quorum(len(self._roster))
        if len(numbers) < least:
            raise ReleaseRefused(
                f"{len(numbers)} of {len(self._roster)} devices {doing}, and {least} must: too "
                "many dropped out; the round ends without a sum, and stays charged"
            )
        self._roster.check_bands(numbers, 1)

    def _finish(self) -> None:
        """Forget what only this round needed; after a failure nothing of the sum is left."""
        self._stage = Stage.DONE
        self._deposits, self._signatures, self._due = {}, {}, ()
        self._total = np.zeros(0, self._total.dtype)

    @property
    def _is_sparse(self) -> bool:
        return not self._graph.is_complete(len(self._roster))

    def _bitmap(self, numbers: Collection[int]) -> bytes:
        return bitmap(tuple(numbers), len(self._roster))
