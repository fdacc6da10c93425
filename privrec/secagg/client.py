"""A device's side of one secure sum: four messages in, four messages out.

A pure state machine: no network, no clock; all that is random comes from the device's root, bound
to the round. A message that fails any check is refused with ReleaseRefused, changes nothing and is
not answered. What each check is there for is told in ``docs/protocol.md``.
Source: Bonawitz et al. (CCS 2017), the protocol against active adversaries.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hmac import compare_digest
from itertools import chain
from typing import Annotated, Any, ClassVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from privrec.errors import ReleaseRefused, UsageError
from privrec.randomness import SecureStream
from privrec.secagg import sharing
from privrec.secagg.keys import (
    SIGNATURE_BYTES,
    Binding,
    Mask,
    PrekeyBook,
    SecretPrekey,
    agree,
    apply_masks,
    model_root,
    statement,
)
from privrec.secagg.messages import (
    MAX_BANDS,
    NOISE,
    PAIR_TAG_BYTES,
    SECRET_BYTES,
    SEED,
    Bitmap,
    Buffer,
    Confirmation,
    Deal,
    Digest,
    Limits,
    Message,
    Opening,
    Quorum,
    Shares,
    Stage,
    Survivors,
    bitmap,
    masked_message,
    members,
    refused,
    sealed_bytes,
    split,
)
from privrec.secagg.roster import Anchor, Call, Roster, Terms
from privrec.secagg.sharing import Graph

WARN_BELOW = 100
"""Cohorts below this are reported: one device is hidden among few."""
_NONCE = bytes(12)  # every sealing key encrypts one message


@dataclass(frozen=True)
class Policy:
    """What a device insists on, whatever a server asks for.

    Attributes:
        minimum: fewest devices that it is willing to be summed with, itself included, in the
            cohort and in every band; at least 2.
        corrupt_share: share of a cohort that it assumes to collude with the server, below 1/3.
        agreed: the terms that every round must have but for round and attempt, or a server could
            lower what noise is left. None leaves the comparison to whoever reads
            :attr:`ClientSession.terms`.
    """

    minimum: int = 20
    corrupt_share: float = 0.05
    agreed: Terms | None = None
    graph: Graph = field(default_factory=Graph)

    def __post_init__(self) -> None:
        if self.minimum < 2:
            raise UsageError(f"a minimum of {self.minimum} devices: a sum of one hides nobody")
        if not 0 <= self.corrupt_share < 1 / 3:
            raise UsageError(
                f"a corrupt share of {self.corrupt_share}: no quorum stands against a third"
            )


@dataclass(frozen=True)
class _Round:
    """What a device knows of its round once it was called."""

    call: Call
    roster: Roster
    own: int
    prekey: SecretPrekey
    binding: Binding
    graph: Graph
    drawn: tuple[tuple[int, ...], ...]
    """For each band that the device holds, others that hold it, whom it is masked with."""

    @property
    def neighbours(self) -> tuple[int, ...]:
        """Who holds this device's shares."""
        return self.drawn[0]

    @property
    def masked_with(self) -> set[int]:
        return set(chain.from_iterable(self.drawn))

    @property
    def devices(self) -> int:
        return len(self.roster)

    @property
    def is_sparse(self) -> bool:
        return not self.graph.is_complete(self.devices)

    def check_quorum(
        self, present: Collection[int], doing: str, heard: Collection[int] | None = None
    ) -> None:
        """Refuse when too few devices did something: of all, or of those drawn and heard from.

        In a band whose holders are all masked with each other, any of them will do.
        """
        known, least = set(present), self.graph.quorum(self.devices)
        near = known if heard is None else known.intersection(heard)
        for band, drawn in enumerate(self.drawn):
            holders = len(self.roster.holding[band])
            count, least_near = len(near.intersection(drawn)) + 1, self.graph.threshold(holders)
            is_thin = count < least_near and not (band and self.graph.is_complete(holders))
            if len(known) < least or is_thin:
                where = f" in band {band + 1}" if len(self.drawn) > 1 else ""
                raise ReleaseRefused(
                    f"{len(known)} of {self.devices} devices {doing}, {count} of this device's own "
                    f"neighbourhood{where}; at least {least} and {least_near} must; the round is "
                    "given up"
                )


@dataclass(frozen=True, repr=False)
class _Progress(Message):
    """What a device has to remember between two messages; secret, since it holds others' shares."""

    KIND: ClassVar[int] = 64
    anchor: Digest
    """By which the call was checked; signatures that are good stay so."""
    stage: Annotated[int, Limits(int, Stage.MASKED, Stage.DONE)]
    call: Digest
    noise: Annotated[bytes, Limits(bytes, 0, MAX_BANDS * SECRET_BYTES)]
    present: Bitmap
    dealers: Bitmap
    survivors: Bitmap
    heard: Bitmap
    held: Annotated[bytes, Limits(bytes, 0, 1 << 26)] = b""
    root: Digest = bytes(32)


class ClientSession:
    """One device in one attempt at one round, held to ``policy``; ``anchor`` says who is a device.

    Promise: nothing is sent but for one answer to each of the four messages, in their order; the
    device's vector is covered by a mask of its own, and by one shared with every neighbour, of
    which it learned from an enrolled device's signature; of each dealer a share of either the
    seed or the mask key is handed out, never both, and of seeds of noise only where the confirmed
    survivors carry more of it than their band needs; and its own seed is handed out only after a
    quorum signed the same survivors, model and terms, in numbers that satisfy its own policy.

    Args:
        book: the device's identity, root and one-time prekeys; it follows the session, so that none
            that was set back, copied or overtaken by a later attempt answers.
        save: keeps the session's progress, as secret as the root since it holds shares of others;
            it is called before each answer is given, and after the book was saved. A device whose
            process may end between two messages needs it, or it drops out of the round.
        progress: what ``save`` was last given, to go on from there under the policy and anchor of
            now; None for a session that was not called yet.
        call: beside ``progress``, the message that the session was called by, which is no secret.

    Raises:
        ReleaseRefused: when ``progress`` is no progress or of another call, or its round is none
            that the policy and the anchor let a device take part in.
        IntegrityError: when the book saw another progress last: one of the two was set back.
    """

    def __init__(
        self,
        book: PrekeyBook,
        anchor: Anchor,
        policy: Policy | None = None,
        save: Callable[[bytes], None] = lambda progress: None,
        progress: bytes | None = None,
        call: Buffer = b"",
    ) -> None:
        self._book = book
        self._save = save
        self._anchor = anchor
        self._policy = policy or Policy()
        self._round: _Round | None = None
        self._progress: _Progress | None = None
        self._agreed: dict[int, bytes] = {}
        if progress is not None:
            recalled, called = _Progress.parse(progress), Call.parse(call)
            if called.digest != recalled.call:
                raise refused("the progress of a session that another call began")
            book.check_latest(called.run, progress)
            # What the book vouches for is the device's own, with the roster that it has checked.
            roster, own = self._checked(called, recalled.anchor)
            self._round = self._enter(called, roster, own, book.secret(roster.prekeys[own].serial))
            self._progress = recalled

    @property
    def terms(self) -> Terms:
        """The terms of the round, once called."""
        return self._called().roster.terms

    @property
    def length(self) -> int:
        """Entries that this device sends: what the terms say for its tier."""
        round = self._called()
        return round.roster.length(round.own)

    @property
    def warning(self) -> str | None:
        """That the cohort is small though not below the minimum, or None."""
        least = min(map(len, self._called().roster.holding))
        return f"a sum of {least} devices hides each among few" if least < WARN_BELOW else None

    # ------------------------------------------------------------------ the four exchanges

    def shares(self, message: Buffer, noise: Sequence[bytes] = ()) -> bytes:
        """Answer a :class:`~privrec.secagg.roster.Call` with this device's secrets in shares.

        ``noise`` are the seeds of its noise in this attempt, 32 bytes for each band that it holds,
        if the terms take noise off again; see :func:`~privrec.privacy.mechanism.noise_seeds`.
        """
        self._due(Stage.SHARES)
        call = Call.parse(message)
        roster, own = self._checked(call)
        due = roster.secrets(own) - NOISE
        if [len(seed) for seed in noise] != [SECRET_BYTES] * due:
            raise ReleaseRefused(
                f"{len(noise)} seeds of noise, where the terms of this round ask for {due} of "
                f"{SECRET_BYTES} bytes; give one for each band if the device agreed to have "
                "noise taken off again, and none if not"
            )
        prekey = self._book.enter(roster.prekeys[own].serial, call.run, call.round, call.attempt)
        self._round = self._enter(call, roster, own, prekey)
        nobody = [self._bitmap(())] * 4
        checked, seeds = self._anchor.digest, b"".join(noise)
        self._keep(_Progress(checked, Stage.MASKED, call.digest, seeds, *nobody))
        return self._dealt(self._round, noise).pack()

    def masked(self, message: Buffer, integers: NDArray[Any], model: Sequence[bytes]) -> bytearray:
        """Answer a :class:`~privrec.secagg.messages.Deal` with this device's vector under masks.

        Args:
            integers: the vector, :attr:`length` integers of any integer type, or UsageError is
                raised; left as it is. They are summed modulo ``2**ring_bits``.
            model: 32-byte digests of the bands that the device holds, as it computed them itself.
        """
        self._due(Stage.MASKED)
        round = self._called()
        deal = Deal.parse(message)
        self._check_context(deal.context)
        present, dealers, drawn_by = self._check_present(deal)
        self._check_model(deal.model, model)
        if len(integers) != self.length:
            raise UsageError(
                f"a vector of {len(integers)} entries; this device's tier sends {self.length}"
            )
        sizes = [sealed_bytes(round.roster.secrets(dealer)) for dealer in dealers]
        pieces = split(deal.sealed, sizes)
        root = model_root(deal.model)
        # In a sparse graph, what tells each device that drew this one that they are masked.
        tags = b"".join(
            round.binding.pair_tag(self._agree(peer), root, round.own, peer)
            for peer in (drawn_by if round.is_sparse else ())
        )
        context, ring_bits = round.binding.context, round.call.ring_bits
        answer, entries = masked_message(context, integers, ring_bits, tags)
        apply_masks(entries, self._masks(present, drawn_by, root))
        shares = dict(self._opened(dealers, pieces))
        known, held = self._bitmap(shares), b"".join(shares.values())
        stage = Stage.CONFIRM
        self._advance(stage=stage, present=deal.present, dealers=known, held=held, root=root)
        return answer

    def confirm(self, message: Buffer) -> bytes:
        """Answer :class:`~privrec.secagg.messages.Survivors` with a signature over them."""
        self._due(Stage.CONFIRM)
        round = self._called()
        told = Survivors.parse(message)
        self._check_context(told.context)
        survivors = members(told.survivors, round.devices)
        heard = self._check_survivors(survivors, told)
        self._advance(stage=Stage.UNMASK, survivors=told.survivors, heard=self._bitmap(heard))
        signature = self._book.key.sign(round.binding.confirmation(told.survivors, told.root))
        return Confirmation(round.binding.context, signature).pack()

    def unmask(self, message: Buffer) -> bytes:
        """Answer a :class:`~privrec.secagg.messages.Quorum` with an own seed and others' shares."""
        self._due(Stage.UNMASK)
        quorum = Quorum.parse(message)
        self._check_context(quorum.context)
        self._check_signers(quorum)
        opening = self._opening(members(quorum.signers, self._called().devices))
        self._advance(stage=Stage.DONE, held=b"", dealers=self._bitmap(()), noise=b"")
        return opening.pack()

    # ------------------------------------------------------------------ checks

    def _checked(self, call: Call, before: bytes = b"") -> tuple[Roster, int]:
        """The roster of a call, held to the device's own anchor, terms and minimum; its number.

        ``before`` is the digest of an anchor that it was checked by earlier in the round.
        """
        anchor, roster = self._anchor, call.roster
        if before != anchor.digest:
            roster.check(anchor)
        own = roster.number(self._book.key.public)
        agreed, told = self._policy.agreed, roster.terms
        if agreed and replace(agreed, round=told.round, attempt=told.attempt) != told:
            raise ReleaseRefused(
                f"terms of run {told.run} with plan {told.plan.hex()[:16]}: this device agreed to "
                "other ones; show its owner what has changed, and have it agreed to anew"
            )
        roster.check_bands(range(len(roster)), self._policy.minimum)
        self._policy.graph.check(tuple(map(len, roster.holding)), self._policy.corrupt_share)
        return roster, own

    def _check_context(self, context: bytes) -> None:
        if context != self._called().binding.context:
            raise refused("a message of another round, attempt, roster or configuration")

    def _check_present(self, deal: Deal) -> list[tuple[int, ...]]:
        """Who is present, who of them dealt to this device, and who drew it."""
        round, sets = self._called(), (deal.present, deal.dealers, deal.drawn_by)
        named = [members(bits, round.devices) for bits in sets]
        present, dealers, drawn_by = named
        nested = set(dealers) <= set(drawn_by) <= set(present)
        if round.own not in present or round.own in drawn_by or not nested:
            raise refused(
                "a deal that leaves this device out, or names others that are not present"
            )
        round.check_quorum(present, "sent shares")
        round.roster.check_bands(present, self._policy.minimum)
        return named

    def _check_model(self, told: Sequence[bytes], seen: Sequence[bytes]) -> None:
        """All devices are told the digests of all bands, and each compares those it holds."""
        round = self._called()
        held = round.roster.bands(round.own)
        if len(told) != len(round.roster.terms.lengths) or len(seen) != held:
            raise refused(f"digests of {len(told)} bands told and {len(seen)} seen, of {held} held")
        if tuple(told[:held]) != tuple(seen):
            raise ReleaseRefused(
                "the model that this device was sent is not the one that all devices are told of; "
                "a server could set apart the update of a device that sees another model"
            )

    def _check_survivors(self, survivors: Sequence[int], told: Survivors) -> Collection[int]:
        """The neighbours that count are those that are known to be masked with this device."""
        round, present = self._called(), self._members("present")
        if round.own not in survivors or not set(survivors) <= set(present):
            raise refused("survivors that lack this device, or were never present")
        if told.root != self._recalled().root:
            raise refused("survivors of a round with another model")
        heard = self._heard(sorted(round.masked_with.intersection(survivors)), told.pair_tags)
        round.check_quorum(survivors, "survived", heard)
        round.roster.check_bands(survivors, self._policy.minimum)
        return heard

    def _heard(self, near: Sequence[int], pair_tags: bytes) -> Sequence[int]:
        """The neighbours from which tags came; in a complete graph all are masked with all."""
        round, root = self._called(), self._recalled().root
        pieces = split(pair_tags, [PAIR_TAG_BYTES] * (len(near) if round.is_sparse else 0))
        if not round.is_sparse:
            return near
        heard = []
        for peer, piece in zip(near, pieces, strict=True):
            tag = round.binding.pair_tag(self._agree(peer), root, peer, round.own)
            if compare_digest(piece, tag):
                heard.append(peer)
        return heard

    def _check_signers(self, quorum: Quorum) -> None:
        """Counts are taken over signatures: a server could name devices that are not there."""
        round, survivors = self._called(), self._members("survivors")
        signers = members(quorum.signers, round.devices)
        signatures = split(quorum.signatures, [SIGNATURE_BYTES] * len(signers))
        if not set(signers) <= set(survivors):
            raise refused("confirmations of devices that did not survive")
        round.check_quorum(signers, "confirmed the survivors", self._members("heard"))
        round.roster.check_bands(signers, self._policy.minimum)
        confirmed = self._recalled()
        stated = round.binding.confirmation(confirmed.survivors, confirmed.root)
        verifier = self._anchor.verifier

        def check() -> None:
            for signer, signature in zip(signers, signatures, strict=True):
                public = round.roster.prekeys[signer].identity
                if not verifier.check(public, signature, stated):
                    raise ReleaseRefused(
                        f"device {public.hex()[:16]} did not confirm the survivors and the model "
                        "that this device confirmed; somebody is told something else; nothing is "
                        "unmasked"
                    )

        verifier.once(statement("quorum", stated, quorum.signers, quorum.signatures), check)

    # ------------------------------------------------------------------ answers

    def _enter(self, call: Call, roster: Roster, own: int, prekey: SecretPrekey) -> _Round:
        graph = self._policy.graph
        binding = Binding.of(call.digest, graph)
        # Drawn now that the roster is fixed, from this device's own secrets: see sharing.py.
        lots = self._stream("neighbours", binding)
        held = roster.holding[: roster.bands(own)]
        drawn = tuple(graph.draw(own, holders, lots) for holders in held)
        return _Round(call, roster, own, prekey, binding, graph, drawn)

    def _stream(self, purpose: str, binding: Binding) -> SecureStream:
        name = f"secure sum {purpose}"
        return self._book.root.stream(name, self._book.key.public, binding.context)

    def _seed(self) -> bytes:
        return self._stream("seed", self._called().binding).bytes(SECRET_BYTES)

    def _dealt(self, round: _Round, noise: Sequence[bytes]) -> Shares:
        seed, binding, neighbours = self._seed(), round.binding, round.neighbours
        threshold = round.graph.threshold(round.devices)
        points = [number + 1 for number in neighbours]
        secrets = (seed, round.prekey.masking_bytes, *noise)
        dealt = sharing.split_secrets(secrets, threshold, points, self._stream("shares", binding))
        commitments, sealed = [], []
        for holder, *mine in zip(neighbours, *dealt, strict=True):
            commitments += [
                binding.share_commitment(kind, round.own, holder, share)
                for kind, share in enumerate(mine)
            ]
            key = binding.sealing_key(self._agree(holder), round.own, holder)
            sealed.append(AESGCM(key).encrypt(_NONCE, b"".join(mine), None))
        seeds = ((SEED, seed), *enumerate(noise, NOISE))
        committed = (binding.seed_commitment(kind, round.own, each) for kind, each in seeds)
        return Shares(
            binding.context,
            neighbours=self._bitmap(neighbours),
            masked_with=self._bitmap(round.masked_with),
            seed_commitments=tuple(committed),
            share_commitments=b"".join(commitments),
            sealed=b"".join(sealed),
        )

    def _masks(
        self, present: Sequence[int], drawn_by: Sequence[int], root: bytes
    ) -> Iterator[Mask]:
        """The own mask, and one with each device that drew this one or was drawn by it.

        Of two devices the one of the lower number adds and the other one subtracts.
        """
        round = self._called()
        yield Mask(round.binding.self_key(self._seed(), root), self.length, negative=False)
        for peer in sorted(round.masked_with.union(drawn_by).intersection(present)):
            agreed = agree(round.prekey.masking, round.roster.prekeys[peer].masking)
            key = round.binding.pair_key(agreed, root, round.own, peer)
            length = min(self.length, round.roster.length(peer))
            yield Mask(key, length, negative=round.own > peer)

    def _opened(
        self, dealers: Sequence[int], pieces: Sequence[bytes]
    ) -> Iterator[tuple[int, bytes]]:
        """The shares that open; a device that sealed rubbish must not make others drop out."""
        round = self._called()
        for dealer, piece in zip(dealers, pieces, strict=True):
            key = round.binding.sealing_key(self._agree(dealer), dealer, round.own)
            try:
                yield dealer, AESGCM(key).decrypt(_NONCE, piece, None)
            except InvalidTag:
                continue

    def _opening(self, signers: Sequence[int]) -> Opening:
        """Hand out what is due of each dealer and of this device, by who confirmed which set."""
        dealers, round, progress = self._members("dealers"), self._called(), self._recalled()
        due = round.roster.due(self._members("survivors"), signers)
        size = SECRET_BYTES
        pieces = split(progress.held, [size * round.roster.secrets(dealer) for dealer in dealers])
        shares = (
            piece[size * kind : size * (kind + 1)]
            for dealer, piece in zip(dealers, pieces, strict=True)
            for kind in due[dealer]
        )
        own = (progress.noise[size * (kind - NOISE) :][:size] for kind in due[round.own][1:])
        context, named = round.binding.context, self._bitmap(dealers)
        return Opening(context, self._seed(), named, b"".join(shares), b"".join(own))

    def _agree(self, peer: int) -> bytes:
        round = self._called()
        if peer not in self._agreed:
            self._agreed[peer] = agree(round.prekey.sealing, round.roster.prekeys[peer].sealing)
        return self._agreed[peer]

    # ------------------------------------------------------------------ progress

    def _due(self, stage: int) -> None:
        now = self._progress.stage if self._progress else Stage.SHARES
        if now != stage:
            raise refused(f"message {stage + 1} of a round, where message {now + 1} is due")

    def _called(self) -> _Round:
        if self._round is None:
            raise refused("a session that was not called yet")
        return self._round

    def _recalled(self) -> _Progress:
        if self._progress is None:
            raise refused("a session that was not called yet")
        return self._progress

    def _advance(self, **changes: Any) -> None:
        self._keep(replace(self._recalled(), **changes))

    def _keep(self, progress: _Progress) -> None:
        before = self._progress.pack() if self._progress else b""
        after = progress.pack()
        # The book first: after a crash between the two the device drops out and answers nothing.
        self._book.advance(self._called().call.run, before, after)
        self._progress = progress
        self._save(after)

    def _members(self, name: str) -> tuple[int, ...]:
        return members(getattr(self._recalled(), name), self._called().devices)

    def _bitmap(self, numbers: Collection[int]) -> bytes:
        return bitmap(tuple(numbers), self._called().devices)
