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

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from privrec.errors import ReleaseRefused, UsageError
from privrec.secagg import sharing
from privrec.secagg.keys import (
    Binding,
    Mask,
    Prekey,
    agree,
    apply_masks,
    model_root,
    public_of,
)
from privrec.secagg.messages import (
    DIGEST_BYTES,
    MASKING,
    NOISE,
    PAIR_TAG_BYTES,
    SECRET_BYTES,
    SEED,
    SHARE_COMMITMENT_BYTES,
    Buffer,
    Confirmation,
    Deal,
    Opening,
    Quorum,
    Shares,
    Stage,
    Survivors,
    bitmap,
    masked_entries,
    members,
    refused,
    sealed_bytes,
    split,
    word_type,
)
from privrec.secagg.roster import Anchor, Call, Roster, Terms
from privrec.secagg.sharing import Graph

_QUORUMS = 8  # tried before a dealer is held to have dealt shares of no one secret


@dataclass(frozen=True)
class SecureSum:
    """What a round gives.

    Attributes:
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


@dataclass
class Deposit:
    """What the server holds of one device.

    Attributes:
        masked_with: numbers of those that the device drew to be masked with.
        share_commitments: holder's number to commitments to its share of each secret.
        sealed: holder's number to its sealed shares.
        pair_tags: in a sparse graph, number of one that drew the device to what it has to be told.
        own: kind of secret, as in ``seed_commitments``, to what the device gave itself at the end.
        opened: dealer's number and kind of secret to the share that the device returned.
    """

    masked_with: frozenset[int]
    seed_commitments: dict[int, bytes]
    share_commitments: dict[int, list[bytes]]
    sealed: dict[int, bytes]
    pair_tags: dict[int, bytes] = field(default_factory=dict)
    own: dict[int, bytes] = field(default_factory=dict, repr=False)
    opened: dict[tuple[int, int], bytes] = field(default_factory=dict, repr=False)


class ServerSession:
    """The server in one attempt at one round.

    Promise: :attr:`result` is the exact sum, modulo the ring, of the vectors that the devices in
    ``survivors`` put in, or there is none.

    Args:
        prekeys: one record of each device of the cohort, from its deposit; a record serves once.
        anchor: which devices are enrolled; an honest server checks as devices do.

    Raises:
        UsageError: when the terms contradict themselves.
        ReleaseRefused: when the roster is not sound, or a band has too few holders for the terms.
    """

    def __init__(
        self, terms: Terms, prekeys: Sequence[bytes], anchor: Anchor, graph: Graph | None = None
    ) -> None:
        self._graph = graph or Graph()
        self._call = Call.of(terms, [Prekey.unpack(record) for record in prekeys])
        if problem := self._call.problem():
            raise UsageError(f"a round of {problem}; lengths ascend, with one minimum for each")
        self._roster = self._call.roster
        self._roster.check(anchor)
        self._roster.check_bands(range(len(self._roster)), 1)
        self._binding = Binding.of(self._call.digest, self._graph)
        self._anchor = anchor
        self._numbers = {p.identity: number for number, p in enumerate(self._roster.prekeys)}
        self._deposits: dict[int, Deposit] = {}
        self._drawn_by: dict[int, list[int]] = {}
        self._signatures: dict[int, bytes] = {}
        self._model: tuple[bytes, ...] = ()
        self._total = np.zeros(terms.lengths[-1], word_type(terms.ring_bits))
        self._result: SecureSum | None = None
        self._survivors: tuple[int, ...] = ()
        self._present = b""  # devices that dealt, as a bitmap
        self._confirmed = b""  # what devices sign
        self._opened: Sequence[tuple[int, ...]] = []
        self.stage = Stage.SHARES  # what the server waits for
        self._due = tuple(range(len(self._roster)))
        self._answered: set[int] = set()

    @property
    def done(self) -> bool:
        """Whether the round is over, with a sum or without."""
        return self.stage is Stage.DONE

    @property
    def result(self) -> SecureSum:
        """The sum; ReleaseRefused is raised when the round is not over, or ended without one."""
        if self._result is None:
            raise ReleaseRefused("there is no sum: the round is not over, or it was given up")
        return self._result

    def publish(self, model: Sequence[bytes]) -> None:
        """Fix the model of the round, before masked vectors are asked for and for good.

        ``model`` has a 32-byte digest of each band, the band that all devices hold first.
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

    def outbox(self) -> dict[bytes, bytes]:
        """What to send now, by the identity of the device; those that answered are left out."""
        if self.done:
            return {}
        awaited = [number for number in self._due if number not in self._answered]
        if self.stage is Stage.SHARES:
            messages = dict.fromkeys(awaited, self._call.pack())
        elif self.stage is Stage.MASKED:
            if not self._model:
                raise UsageError("masked vectors are due but no model is published: call publish()")
            messages = {number: self._deal(number).pack() for number in awaited}
        elif self.stage is Stage.CONFIRM:
            messages = self._tidings(awaited)
        else:
            signers, signatures = zip(*sorted(self._signatures.items()), strict=True)
            quorum = Quorum(self._binding.context, self._bitmap(signers), b"".join(signatures))
            messages = dict.fromkeys(awaited, quorum.pack())
        return {self._roster.prekeys[n].identity: message for n, message in messages.items()}

    def receive(self, device: bytes, message: Buffer) -> None:
        """Take in the answer of a device, by the identity that the transport knows it by.

        An answer that is not what is due is refused; it changes nothing, and another may come.
        """
        number = self._numbers.get(device)
        if number is None or number not in self._due or number in self._answered:
            raise refused(f"an answer of {device.hex()[:16]}, from whom none is due")
        take = (self._take_shares, self._take_masked, self._take_confirmation, self._take_opening)
        take[self.stage](number, message)
        self._answered.add(number)

    def advance(self) -> None:
        """Go on without those that did not answer; without a sum when they are too many.

        The round is over with the ReleaseRefused that tells it, and nothing of the sum is kept.
        """
        if self.done:
            raise UsageError("the round is over; begin another session")
        answered = tuple(sorted(self._answered))
        try:
            if self.stage is Stage.UNMASK:
                self._unmask()
            else:
                self._close(answered)
        except ReleaseRefused:
            self._finish()
            raise
        if self.stage is Stage.UNMASK:
            self._finish()
        else:
            self.stage, self._due, self._answered = Stage(self.stage + 1), answered, set()

    # ------------------------------------------------------------------ what is sent

    def _deal(self, number: int) -> Deal:
        dealers = ((n, self._deposits[n].sealed) for n in self._drawn_by[number])
        sealed = {dealer: pieces[number] for dealer, pieces in dealers if number in pieces}
        return Deal(
            self._binding.context,
            present=self._present,
            dealers=self._bitmap(sealed),
            drawn_by=self._bitmap(self._drawn_by[number]),
            sealed=b"".join(sealed.values()),
            model=self._model,
        )

    def _tidings(self, numbers: Sequence[int]) -> dict[int, bytes]:
        context, survivors = self._binding.context, self._bitmap(self._survivors)
        told = Survivors(context, survivors, model_root(self._model), b"")
        if not self._is_sparse:
            return dict.fromkeys(numbers, told.pack())
        messages, alive = {}, set(self._survivors)
        for number in numbers:
            near = sorted(self._deposits[number].masked_with & alive)
            tags = b"".join(self._deposits[peer].pair_tags[number] for peer in near)
            messages[number] = replace(told, pair_tags=tags).pack()
        return messages

    # ------------------------------------------------------------------ what comes in

    def _take_shares(self, number: int, message: Buffer) -> None:
        shares = Shares.parse(message)
        self._check_context(shares.context)
        holders = members(shares.neighbours, len(self._roster))
        count = self._graph.neighbours(len(self._roster))
        if number in holders or len(holders) != count:
            raise refused(f"shares for {len(holders)} neighbours, where {count} others are due")
        masked_with = frozenset(members(shares.masked_with, len(self._roster)))
        if number in masked_with or not masked_with.issuperset(holders):
            raise refused("a set of masked devices that lacks a neighbour or has the sender")
        secrets = self._roster.secrets(number)
        sizes = [SHARE_COMMITMENT_BYTES] * secrets
        committed = split(shares.share_commitments, sizes * count)
        sealed = split(shares.sealed, [sealed_bytes(secrets)] * count)
        kinds = (SEED, *range(NOISE, secrets))
        if len(shares.seed_commitments) != len(kinds):
            raise refused(f"{len(shares.seed_commitments)} commitments to {len(kinds)} seeds")
        each = [committed[start : start + secrets] for start in range(0, len(committed), secrets)]
        self._deposits[number] = Deposit(
            masked_with,
            seed_commitments=dict(zip(kinds, shares.seed_commitments, strict=True)),
            share_commitments=dict(zip(holders, each, strict=True)),
            sealed=dict(zip(holders, sealed, strict=True)),
        )

    def _take_masked(self, number: int, message: Buffer) -> None:
        length = self._roster.length(number)
        drawn_by = self._drawn_by[number] if self._is_sparse else []
        entries, tags = masked_entries(
            message, self._binding.context, length, self._call.ring_bits, len(drawn_by)
        )
        pieces = split(tags, [PAIR_TAG_BYTES] * len(drawn_by))
        self._deposits[number].pair_tags = dict(zip(drawn_by, pieces, strict=True))
        self._total[:length] += entries

    def _take_confirmation(self, number: int, message: Buffer) -> None:
        confirmation = Confirmation.parse(message)
        self._check_context(confirmation.context)
        identity = self._roster.prekeys[number].identity
        if not self._anchor.verifier.check(identity, confirmation.signature, self._confirmed):
            raise refused(f"a wrong signature of device {identity.hex()[:16]}")
        self._signatures[number] = confirmation.signature

    def _take_opening(self, number: int, message: Buffer) -> None:
        opening = Opening.parse(message)
        self._check_context(opening.context)
        dealers = members(opening.dealers, len(self._roster))
        due, deposit = self._opened, self._deposits[number]
        named = [(dealer, kind) for dealer in dealers for kind in due[dealer]]
        shares = split(opening.shares, [SECRET_BYTES] * len(named))
        noise = split(opening.noise, [SECRET_BYTES] * len(due[number][1:]))
        own = dict(zip(due[number], (opening.seed, *noise), strict=True))
        for kind, seed in own.items():
            if self._binding.seed_commitment(kind, number, seed) != deposit.seed_commitments[kind]:
                raise refused("a seed that is not the one that its device committed to")
        deposit.own, deposit.opened = own, dict(zip(named, shares, strict=True))

    def _check_context(self, context: bytes) -> None:
        if context != self._binding.context:
            raise refused("an answer of another round, attempt, roster or configuration")

    # ------------------------------------------------------------------ ends of stages

    def _close(self, answered: tuple[int, ...]) -> None:
        """Go on with those that answered, if they are enough."""
        doing = ("sent shares", "sent masked vectors", "confirmed the survivors")[self.stage]
        least = self._graph.quorum(len(self._roster))
        if len(answered) < least:
            raise ReleaseRefused(
                f"{len(answered)} of {len(self._roster)} devices {doing}, and {least} must: too "
                "many dropped out; the round ends without a sum, and stays charged"
            )
        self._roster.check_bands(answered, 1)
        if self.stage is Stage.SHARES:
            self._present = self._bitmap(answered)
            self._drawn_by = {number: [] for number in range(len(self._roster))}
            for number in answered:
                for peer in self._deposits[number].masked_with:
                    self._drawn_by[peer].append(number)
        elif self.stage is Stage.MASKED:
            self._survivors, root = answered, model_root(self._model)
            self._confirmed = self._binding.confirmation(self._bitmap(answered), root)
        else:
            self._opened = self._roster.due(self._survivors, set(answered))

    def _unmask(self) -> None:
        root, threshold = model_root(self._model), self._graph.threshold(len(self._roster))
        recovery = Recovery(
            self._roster, self._binding, root, threshold, self._deposits, self._survivors
        )
        apply_masks(self._total, recovery.masks())
        prekeys, holders = self._roster.prekeys, self._roster.holders(self._survivors)
        self._result = SecureSum(
            self._total.view(self._total.dtype.str.replace("u", "i")),
            tuple(tuple(prekeys[number].identity for number in band) for band in holders),
            recovery.noise(self._opened),
            recovery.faults,
        )

    def _finish(self) -> None:
        """Forget what only this round needed; after a failure nothing of the sum is left."""
        self.stage = Stage.DONE
        self._deposits, self._signatures, self._due = {}, {}, ()
        self._total = np.zeros(0, self._total.dtype)

    @property
    def _is_sparse(self) -> bool:
        return not self._graph.is_complete(len(self._roster))

    def _bitmap(self, numbers: Collection[int]) -> bytes:
        return bitmap(tuple(numbers), len(self._roster))


@dataclass(frozen=True)
class Recovery:
    """The secrets of one round, from what devices deposited, and the masks that they take off.

    A survivor's own mask goes with its seed. A device that dropped out after it dealt shares left a
    mask in the vector of every survivor that it is masked with; these go with its mask key. Secrets
    come from shares, and each is checked against the commitment of the device that dealt it; what
    was wrong is in ``faults``. ReleaseRefused, when a secret cannot be had, ends the round.
    """

    roster: Roster
    binding: Binding
    root: bytes
    threshold: int
    deposits: dict[int, Deposit]
    survivors: Sequence[int]
    faults: dict[bytes, str] = field(default_factory=dict)

    def masks(self) -> Iterator[Mask]:
        """Every mask that is left in the sum, signed so that applying it takes it off."""
        for survivor in self.survivors:
            key = self.binding.self_key(self._seed(SEED, survivor), self.root)
            yield Mask(key, self.roster.length(survivor), negative=True)
        alive, deposits = set(self.survivors), self.deposits
        near = {gone: alive & deposits[gone].masked_with for gone in deposits.keys() - alive}
        for survivor in alive:
            for gone in deposits[survivor].masked_with & near.keys():
                near[gone].add(survivor)
        for dropped in sorted(near):
            private = X25519PrivateKey.from_private_bytes(self._secret(MASKING, dropped))
            for survivor in sorted(near[dropped]):
                agreed = agree(private, self.roster.prekeys[survivor].masking)
                key = self.binding.pair_key(agreed, self.root, survivor, dropped)
                length = min(self.roster.length(survivor), self.roster.length(dropped))
                # The survivor of the lower number added it.
                yield Mask(key, length, negative=survivor < dropped)

    def noise(self, due: Sequence[Collection[int]]) -> tuple[tuple[bytes, ...], ...]:
        """For each band the seeds of the noise that is taken off again, of what is ``due``."""
        kinds = range(NOISE, NOISE + len(self.roster.terms.lengths))
        return tuple(
            tuple(self._seed(kind, n) for n in self.survivors if kind in due[n]) for kind in kinds
        )

    def _seed(self, kind: int, survivor: int) -> bytes:
        return self.deposits[survivor].own.get(kind) or self._secret(kind, survivor)

    def _secret(self, kind: int, dealer: int) -> bytes:
        """A secret that its dealer is not there to give; other quorums are tried if one fails."""
        shares = self._shares(kind, dealer)
        if len(shares) < self.threshold:
            raise ReleaseRefused(
                f"{len(shares)} sound shares of a device that dropped out, and {self.threshold} "
                "give its secret back: too many dropped out; the round ends without a sum"
            )
        for start in range(min(_QUORUMS, len(shares) - self.threshold + 1)):
            quorum = shares[start : start + self.threshold]
            points = [holder + 1 for holder, _ in quorum]
            secret = sharing.combine_shares([share for _, share in quorum], points)
            if self._is_secret(kind, dealer, secret):
                return secret
        fault = "dealt shares that give no secret it committed to"
        self._blame(dealer, fault)
        raise ReleaseRefused(
            f"device {self.roster.prekeys[dealer].identity.hex()[:16]} {fault}; "
            "the round ends without a sum; leave the device out"
        )

    def _shares(self, kind: int, dealer: int) -> list[tuple[int, bytes]]:
        """The shares of a dealer that are what it committed to.

        Of any other share either its holder or its dealer is to blame; nobody can tell which.
        """
        shares = []
        for holder, committed in self.deposits[dealer].share_commitments.items():
            deposit = self.deposits.get(holder)
            share = deposit.opened.get((dealer, kind)) if deposit else None
            if share is None:
                continue
            commitment = self.binding.share_commitment(kind, dealer, holder, share)
            if sharing.in_field(share) and commitment == committed[kind]:
                shares.append((holder, share))
            else:
                name = self.roster.prekeys[dealer].identity.hex()[:16]
                self._blame(holder, f"returned a share that {name} did not commit to")
        return shares

    def _is_secret(self, kind: int, dealer: int, secret: bytes) -> bool:
        if kind != MASKING:
            commitment = self.binding.seed_commitment(kind, dealer, secret)
            return commitment == self.deposits[dealer].seed_commitments[kind]
        public = public_of(X25519PrivateKey.from_private_bytes(secret))
        return public == self.roster.prekeys[dealer].masking

    def _blame(self, number: int, what: str) -> None:
        self.faults[self.roster.prekeys[number].identity] = what
