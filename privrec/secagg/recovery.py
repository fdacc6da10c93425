"""What the server takes off the sum at the end: the masks of survivors and those of drop-outs.

A survivor's own mask goes with its seed. A device that dropped out after it dealt shares left a
mask in the vector of every survivor that is its neighbour; these go with its mask key. Secrets come
from shares, and each is checked against the commitment of the device that dealt it.

Everything that is derived for one attempt at one round, bound to all that was agreed on.

Two devices that were told different things (another roster, configuration, run, round, attempt or
model) derive different keys: their masks do not cancel, their shares do not open, and their
signatures do not count for each other. A server gains nothing by telling them different things.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privrec.errors import ReleaseRefused
from privrec.secagg import shamir
from privrec.secagg.graph import Graph
from privrec.secagg.keys import agree, derive, public_of, statement
from privrec.secagg.masks import MASK_KEY_BYTES, Mask
from privrec.secagg.messages import PLEDGE_BYTES, SHARE_MARK_BYTES
from privrec.secagg.roster import MASKING, NOISE, SEED, Call, Roster


@dataclass(frozen=True)
class Binding:
    """Keys, commitments and statements of one attempt.

    Args:
        context: digest of all that was agreed on before the model.
    """

    context: bytes

    @classmethod
    def of(cls, call: Call, graph: Graph) -> Binding:
        """The binding to a call and to the constants of the protocol."""
        return cls(statement("context", call.digest, graph.complete_up_to, graph.degree))

    def sealing_key(self, agreed: bytes, sender: int, receiver: int) -> bytes:
        """The AES-GCM key of the one message from a device to another; 32 bytes.

        Args:
            agreed: what their sealing keys agree on.
            sender: device number.
            receiver: device number.
        """
        return derive(agreed, "sealing", self.context, sender, receiver)

    def pair_key(self, agreed: bytes, root: bytes, one: int, other: int) -> bytes:
        """The key of the mask between two devices, the same for both; 16 bytes.

        Args:
            agreed: what their masking keys agree on.
            root: of the model, see :func:`model_root`.
            one: device number.
            other: device number.
        """
        low, high = sorted((one, other))
        return derive(agreed, "pair mask", self.context, root, low, high)[:MASK_KEY_BYTES]

    def self_key(self, seed: bytes, root: bytes) -> bytes:
        """The key of a device's own mask; 16 bytes."""
        return derive(seed, "self mask", self.context, root)[:MASK_KEY_BYTES]

    def pledge(self, agreed: bytes, root: bytes, sender: int, receiver: int) -> bytes:
        """What one device sends to another that drew it, once it is masked with it; 16 bytes.

        Args:
            agreed: what their sealing keys agree on.
            root: of the model.
            sender: device number.
            receiver: device number.
        """
        return derive(agreed, "pledge", self.context, root, sender, receiver)[:PLEDGE_BYTES]

    def seed_mark(self, kind: int, dealer: int, seed: bytes) -> bytes:
        """A commitment to a seed; 32 bytes, which hide it since it is random."""
        return statement("seed mark", self.context, kind, dealer, seed)

    def share_mark(self, kind: int, dealer: int, holder: int, share: bytes) -> bytes:
        """A commitment to one share; 16 bytes, which hide it since it is random.

        A holder that alters its share would need a second preimage of 128 bits. A dealer could make
        two shares of one mark, and could as well deal wrong ones.
        """
        stated = statement("share mark", self.context, kind, dealer, holder, share)
        return stated[:SHARE_MARK_BYTES]

    def confirmation(self, survivors: bytes, root: bytes) -> bytes:
        """What devices sign when they confirm the survivors (a bitmap) and the model they saw."""
        return statement("confirmation", self.context, root, survivors)


def model_root(digests: Sequence[bytes]) -> bytes:
    """What stands for the model: a digest over those of its bands.

    Args:
        digests: 32 bytes for each band, the band that all devices hold first.
    """
    return statement("model", *digests)


_QUORUMS = 8  # tried before a dealer is held to have dealt shares of no one secret


@dataclass
class Deposit:
    """What the server holds of one device.

    Args:
        seed_marks: kind of secret to the commitment to it.
        partners: numbers of those that the device drew to be masked with.
        share_marks: holder's number to commitments to its share of each secret.
        sealed: holder's number to its sealed shares.
        pledges: in a sparse graph, number of one that drew the device to what it has to be told.
        own: kind of secret to what the device itself gave in the last exchange, if it answered.
        opened: recipient's number and kind of secret to the share that the device returned.
    """

    partners: frozenset[int]
    seed_marks: dict[int, bytes]
    share_marks: dict[int, list[bytes]]
    sealed: dict[int, bytes]
    pledges: dict[int, bytes] = field(default_factory=dict)
    own: dict[int, bytes] = field(default_factory=dict, repr=False)
    opened: dict[tuple[int, int], bytes] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Recovery:
    """The secrets of one round, from what devices deposited.

    Args:
        roster: of the round.
        binding: of the round.
        root: of the model.
        threshold: shares that give a secret back.
        deposits: of every device that sent shares, by number.
        survivors: numbers of the devices in the sum.
        faults: filled with what was wrong, by identity.
    """

    roster: Roster
    binding: Binding
    root: bytes
    threshold: int
    deposits: dict[int, Deposit]
    survivors: Sequence[int]
    faults: dict[bytes, str]

    def masks(self) -> Iterator[Mask]:
        """Every mask that is left in the sum, signed so that applying it takes it off.

        Raises:
            ReleaseRefused: when a secret cannot be had: the round is over.
        """
        for survivor in self.survivors:
            key = self.binding.self_key(self._seed(SEED, survivor), self.root)
            yield Mask(key, self.roster.length(survivor), negative=True)
        for dropped in sorted(self.deposits.keys() - set(self.survivors)):
            yield from self._masks_of(dropped)

    def noise(self, due: Sequence[Collection[int]]) -> list[list[bytes]]:
        """For each band the seeds of the noise that is taken off again.

        Args:
            due: what is opened of each device, :meth:`~privrec.secagg.roster.Roster.due`.

        Raises:
            ReleaseRefused: when one cannot be had: the round is over.
        """
        return [
            [self._seed(NOISE + band, n) for n in self.survivors if NOISE + band in due[n]]
            for band in range(len(self.roster.terms.lengths))
        ]

    def _masks_of(self, dropped: int) -> Iterator[Mask]:
        """What a drop-out left in the vectors of survivors that are its partners."""
        own = self.deposits[dropped].partners
        near = [s for s in self.survivors if s in own or dropped in self.deposits[s].partners]
        private = X25519PrivateKey.from_private_bytes(self._secret(MASKING, dropped))
        for survivor in near:
            agreed = agree(private, self.roster.prekeys[survivor].masking)
            key = self.binding.pair_key(agreed, self.root, survivor, dropped)
            length = min(self.roster.length(survivor), self.roster.length(dropped))
            # The survivor of the lower number added it.
            yield Mask(key, length, negative=survivor < dropped)

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
            secret = shamir.combine([share for _, share in quorum], points)
            if self._is_secret(kind, dealer, secret):
                return secret
        self._blame(dealer, "dealt shares that give no secret it committed to")
        raise ReleaseRefused(
            f"device {self.roster.prekeys[dealer].identity.hex()[:16]} dealt shares that give no "
            "secret it committed to; the round ends without a sum; leave the device out"
        )

    def _shares(self, kind: int, dealer: int) -> list[tuple[int, bytes]]:
        """The shares of a dealer that are what it committed to.

        Of any other share either its holder or its dealer is to blame; nobody can tell which.
        """
        shares = []
        for holder, marks in self.deposits[dealer].share_marks.items():
            if holder not in self.deposits:
                continue
            share = self.deposits[holder].opened.get((dealer, kind))
            if share is None:
                continue
            mark = self.binding.share_mark(kind, dealer, holder, share)
            if shamir.in_field(share) and mark == marks[kind]:
                shares.append((holder, share))
            else:
                name = self.roster.prekeys[dealer].identity.hex()[:16]
                self._blame(holder, f"returned a share that {name} did not commit to")
        return shares

    def _is_secret(self, kind: int, dealer: int, secret: bytes) -> bool:
        if kind != MASKING:
            mark = self.binding.seed_mark(kind, dealer, secret)
            return mark == self.deposits[dealer].seed_marks[kind]
        public = public_of(X25519PrivateKey.from_private_bytes(secret))
        return public == self.roster.prekeys[dealer].masking

    def _blame(self, number: int, what: str) -> None:
        self.faults[self.roster.prekeys[number].identity] = what
