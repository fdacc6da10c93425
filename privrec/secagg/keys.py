"""Keys of a device: its identity, its one-time prekeys, and the masks that two derive from theirs.

A device signs prekeys in advance and leaves them with the server: two X25519 keys each, one under
which others encrypt shares to it, one from which pairs of devices draw masks. The mask key may be
reconstructed after a drop-out, so that a prekey serves one attempt at one round and is then burned.
Sources: RFC 7748 (X25519), RFC 8032 (Ed25519), RFC 5869 (HKDF).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from privrec.errors import IntegrityError, ReleaseRefused, UsageError
from privrec.randomness import SecretRoot
from privrec.secagg.messages import (
    PAIR_TAG_BYTES,
    SHARE_COMMITMENT_BYTES,
    Words,
    packed,
    refused,
)
from privrec.secagg.sharing import Graph

KEY_BYTES = 32
SIGNATURE_BYTES = 64
_RECORD = struct.Struct("<32s64sQB32s32s64s")
RECORD_BYTES = _RECORD.size
LAST_TIER = 255
_SALT = b"privrec secure aggregation, version 1"
_FIELD = 2**255 - 19
_LOW_ORDER = {
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    _FIELD - 1,
    _FIELD,
    _FIELD + 1,
}
_REMEMBERED, _REMEMBERED_CHECKS = 1 << 16, 8
MASK_KEY_BYTES = 16
_PIECE_BYTES = 1 << 16
_ZEROS = memoryview(bytes(_PIECE_BYTES))
_CIPHER_TAIL = 15  # update_into asks for a block less one byte more than it writes
_BATCH = 512  # keystreams open at a time


def statement(label: str, *parts: bytes | int | str) -> bytes:
    """32 bytes that stand for a label and its parts, and for no other list of parts.

    Each purpose has a label of its own, so that a signature under one is never valid under another.
    Integers are not negative.
    """
    return hashlib.sha256(_SALT + packed((label, *parts))).digest()


def derive(secret: bytes, label: str, *parts: bytes | int | str) -> bytes:
    """A 32-byte key from a secret (HKDF-SHA256), bound to all that :func:`statement` covers."""
    extracted = hmac.digest(_SALT, secret, "sha256")
    return hmac.digest(extracted, statement(label, *parts) + b"\x01", "sha256")


class DeviceKey:
    """The identity of a device: an Ed25519 key, of 32 secret bytes, that others know it by."""

    def __init__(self, seed: bytes) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self._private.public_key().public_bytes_raw()

    @classmethod
    def derive(cls, root: SecretRoot, *names: str | int) -> DeviceKey:
        """The identity that a root gives to the device of these names."""
        return cls(root.tag("device identity", *names))

    def sign(self, stated: bytes) -> bytes:
        """64 bytes that only this device can make over a :func:`statement`."""
        return self._private.sign(stated)


class Verifier:
    """Checks signatures, and remembers good ones, so that devices hosted together check once."""

    def __init__(self) -> None:
        self._good: set[tuple[bytes, bytes, bytes]] = set()
        self._passed: deque[bytes] = deque(maxlen=_REMEMBERED_CHECKS)

    def once(self, name: bytes, check: Callable[[], None]) -> None:
        """Run a ``check`` that raises where anything is wrong, unless one of that name was passed.

        ``name`` is a :func:`statement` over all that the check looks at.
        """
        if name not in self._passed:
            check()
            self._passed.append(name)

    def check(self, public: bytes, signature: bytes, stated: bytes) -> bool:
        """Whether the Ed25519 key ``public`` signed the :func:`statement`."""
        name = (public, signature, stated)  # joined, bytes of one could pass for the next one's
        if name in self._good:
            return True
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(signature, stated)
        except (InvalidSignature, ValueError):
            return False
        if len(self._good) >= _REMEMBERED:
            self._good.clear()
        self._good.add(name)
        return True


@dataclass(frozen=True)
class Prekey:
    """The public half of a one-time prekey, as it lies with the server and in a roster.

    Attributes:
        identity: the device's Ed25519 key.
        certificate: signature of an enrolment key over ``identity``; zeros where devices keep a
            list of identities instead.
        tier: capacity of the device, 0 for the strongest. Signed here, so that a server cannot
            fill a band with devices that do not hold it.
        sealing: X25519 key that shares for the device are encrypted to.
        masking: X25519 key that masks are drawn from.
        signature: of ``identity`` over all of these but the certificate.
    """

    identity: bytes
    certificate: bytes
    serial: int
    tier: int
    sealing: bytes
    masking: bytes
    signature: bytes

    @property
    def stated(self) -> bytes:
        """What the device signed."""
        return statement("prekey", self.serial, self.tier, self.sealing, self.masking)

    def pack(self) -> bytes:
        """The :data:`RECORD_BYTES` bytes of this prekey."""
        return _RECORD.pack(*(getattr(self, name) for name in self.__match_args__))

    @classmethod
    def unpack(cls, record: bytes) -> Prekey:
        """The prekey in a record; nothing about it is checked but its length."""
        if len(record) != RECORD_BYTES:
            raise refused(f"a prekey of {len(record)} bytes, which takes {RECORD_BYTES}")
        return cls(*_RECORD.unpack(record))


class SecretPrekey:
    """The secret half of a :class:`Prekey`; ``masking_bytes`` are what is dealt in shares."""

    def __init__(self, sealing: bytes, masking: bytes) -> None:
        self.sealing = X25519PrivateKey.from_private_bytes(sealing)
        self.masking = X25519PrivateKey.from_private_bytes(masking)
        self.masking_bytes = masking


class PrekeyBook:
    """The one-time prekeys of a device, and the attempts at rounds that it took part in.

    Promise: a prekey is taken once, an attempt is joined once and never after a later one, and the
    session of an attempt goes on from its latest progress alone, across restarts too, provided that
    ``save`` is durable: it is called before anything that depends on the new state leaves the
    device.

    Args:
        root: private keys are derived from it, never stored.
        certificate: signature of the enrolment key over the identity, empty if there is none.
        save: keeps the state, which is not secret but must not be rolled back.
        state: what ``save`` was last given, or IntegrityError is raised; None for a new device.
            Never None with the root and key of a device that was there before: it would issue the
            same prekeys once more.
    """

    def __init__(
        self,
        key: DeviceKey,
        root: SecretRoot,
        *,
        certificate: bytes = b"",
        save: Callable[[bytes], None] = lambda state: None,
        state: bytes | None = None,
    ) -> None:
        self.key = key
        self.root = root
        self._certificate = certificate or bytes(SIGNATURE_BYTES)
        self._save = save
        self._issued, self._unused, self._joined = _restored(state)

    def issue(self, count: int, tier: int) -> list[bytes]:
        """Make records of fresh prekeys, for the server to keep; each serves one attempt.

        ``tier`` is the capacity that the device will take part with, from 0, the strongest, to 255.
        """
        if count < 0 or not 0 <= tier <= LAST_TIER:
            raise UsageError(
                f"{count} prekeys for tier {tier}: issue 0 or more, for tiers 0 to {LAST_TIER}"
            )
        serials = range(self._issued, self._issued + count)
        self._issued += count
        self._unused.update(serials)
        self._keep()
        records = []
        for serial in serials:
            secret = self.secret(serial)
            keys = public_of(secret.sealing), public_of(secret.masking)
            signature = self.key.sign(statement("prekey", serial, tier, *keys))
            prekey = Prekey(self.key.public, self._certificate, serial, tier, *keys, signature)
            records.append(prekey.pack())
        return records

    def enter(self, serial: int, run: str, round: int, attempt: int) -> SecretPrekey:
        """Enter an attempt at a round with a prekey, which is burned by this.

        Neither happens twice. A mask key of an earlier attempt may be known. And two sums of one
        attempt over different survivors would carry the same noise, so that their difference would
        show single devices without any. Attempts are in the order of (round, attempt).
        """
        self._check_fresh(serial)
        self._check_order(run, round, attempt)
        self._unused.remove(serial)
        self._joined[run] = (round, attempt, "")
        self._keep()
        return self.secret(serial)

    def check_latest(self, run: str, progress: bytes) -> None:
        """Raise IntegrityError for progress, empty after :meth:`enter`, that is not the latest.

        A session that was set back alone would answer a message again, under the same masks; one
        that the book is behind of shows that the book was set back, and would reuse its prekeys.
        """
        if self._joined.get(run, (0, 0, None))[2] != _digest(progress):
            raise IntegrityError(
                f"a session of run {run} that is not where this device's book of prekeys saw it "
                "last: one of the two was set back to an earlier state, or the session was worked "
                "on twice; give this round up, and if the book was set back enrol the device anew"
            )

    def advance(self, run: str, before: bytes, after: bytes) -> None:
        """Follow a session from its latest progress to the next, before the answer to it leaves."""
        self.check_latest(run, before)
        self._joined[run] = (*self._joined[run][:2], _digest(after))
        self._keep()

    def secret(self, serial: int) -> SecretPrekey:
        """The secret half of a prekey."""
        stream = self.root.stream("prekey", self.key.public, serial)
        return SecretPrekey(stream.bytes(KEY_BYTES), stream.bytes(KEY_BYTES))

    def _check_fresh(self, serial: int) -> None:
        if serial not in self._unused:
            raise ReleaseRefused(
                f"prekey {serial} of this device was used before or never issued: a prekey serves "
                "one attempt at one round; the server must take another one from its deposit"
            )

    def _check_order(self, run: str, round: int, attempt: int) -> None:
        last = self._joined.get(run)
        if last is not None and (round, attempt) <= last:
            raise ReleaseRefused(
                f"attempt {attempt} at round {round} of run {run}: this device took part in "
                f"attempt {last[1]} at round {last[0]}; the server must plan, and charge, a new one"
            )

    def _keep(self) -> None:
        state = {"issued": self._issued, "unused": sorted(self._unused), "joined": self._joined}
        self._save(json.dumps(state).encode())


def _digest(progress: bytes) -> str:
    """What the book keeps of a session's progress, which is secret."""
    return statement("progress", progress).hex() if progress else ""


def _restored(state: bytes | None) -> tuple[int, set[int], dict[str, tuple[int, int, str]]]:
    if state is None:
        return 0, set(), {}
    try:
        stored = json.loads(state)
        joined = {run: (int(r), int(a), str(m)) for run, (r, a, m) in stored["joined"].items()}
        return int(stored["issued"]), set(map(int, stored["unused"])), joined
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"the state of a device's prekeys is not what was saved ({error!r}); restore it, or "
            "enrol the device anew under another identity"
        ) from None


def is_low_order(public: bytes) -> bool:
    """Whether an X25519 key has order 1, 2, 4 or 8 on the curve or its twist (RFC 7748, 6.1)."""
    return int.from_bytes(public, "little") % 2**255 in _LOW_ORDER


def public_of(private: X25519PrivateKey) -> bytes:
    """The 32 bytes of the public key."""
    return private.public_key().public_bytes_raw()


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """The 32 bytes that two devices share; a public key of low order would fix them: refused."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise ReleaseRefused(
            f"the X25519 key {public.hex()} gives every device the same secret; "
            "leave the device that issued it out of the round"
        ) from None


def model_root(digests: Sequence[bytes]) -> bytes:
    """What stands for the model: a digest over those of its bands, the band that all hold first."""
    return statement("model", *digests)


@dataclass(frozen=True)
class Binding:
    """Keys, commitments and statements of one attempt at one round, bound to all that was agreed.

    Two devices that were told different things (another roster, configuration, run, round, attempt
    or model) derive different keys: their masks do not cancel, their shares do not open, and their
    signatures do not count for each other. A server gains nothing by telling them different things.

    ``agreed`` is what the keys of two devices agree on, those for masking in :meth:`pair_key` and
    those for sealing elsewhere; ``root`` is the :func:`model_root`; devices go by their numbers.
    ``context`` is the digest of all that was agreed on before the model. Labels are part of the
    protocol: keys derive from them.
    """

    context: bytes

    @classmethod
    def of(cls, call_digest: bytes, graph: Graph) -> Binding:
        """The binding to a call and to the constants of the protocol."""
        return cls(statement("context", call_digest, graph.complete_up_to, graph.degree))

    def sealing_key(self, agreed: bytes, sender: int, receiver: int) -> bytes:
        """The AES-GCM key of the one message from a device to another; 32 bytes."""
        return derive(agreed, "sealing", self.context, sender, receiver)

    def pair_key(self, agreed: bytes, root: bytes, one: int, other: int) -> bytes:
        """The key of the mask between two devices, the same for both; 16 bytes."""
        low, high = sorted((one, other))
        return derive(agreed, "pair mask", self.context, root, low, high)[:MASK_KEY_BYTES]

    def self_key(self, seed: bytes, root: bytes) -> bytes:
        """The key of a device's own mask; 16 bytes."""
        return derive(seed, "self mask", self.context, root)[:MASK_KEY_BYTES]

    def pair_tag(self, agreed: bytes, root: bytes, sender: int, receiver: int) -> bytes:
        """What one device sends to another that drew it, once it is masked with it; 16 bytes."""
        return derive(agreed, "pledge", self.context, root, sender, receiver)[:PAIR_TAG_BYTES]

    def seed_commitment(self, kind: int, dealer: int, seed: bytes) -> bytes:
        """A commitment to a seed; 32 bytes, which hide it since it is random."""
        return statement("seed mark", self.context, kind, dealer, seed)

    def share_commitment(self, kind: int, dealer: int, holder: int, share: bytes) -> bytes:
        """A commitment to one share; 16 bytes, which hide it since it is random.

        A holder that alters its share would need a second preimage of 128 bits. A dealer could make
        two shares of one commitment, and could as well deal wrong ones.
        """
        stated = statement("share mark", self.context, kind, dealer, holder, share)
        return stated[:SHARE_COMMITMENT_BYTES]

    def confirmation(self, survivors: bytes, root: bytes) -> bytes:
        """What devices sign when they confirm the survivors (a bitmap) and the model they saw."""
        return statement("confirmation", self.context, root, survivors)


@dataclass(frozen=True)
class Mask:
    """One AES-128-CTR keystream over the first ``length`` entries, of a key for it alone."""

    key: bytes = field(repr=False)
    length: int
    negative: bool


def apply_masks(vector: Words, masks: Iterable[Mask]) -> None:
    """Add or subtract every mask, in place and modulo the ring; memory does not grow with masks.

    ``vector`` is contiguous, of a :func:`~privrec.secagg.messages.word_type`, and as long as any
    mask. It is walked in pieces that stay in the cache, each under all masks before the next, so
    that memory is read once however many masks there are.
    """
    pending = iter(masks)
    while batch := list(islice(pending, _BATCH)):
        # Longest first, so that the masks that still cover a piece come before all others.
        _apply(vector, sorted(batch, key=lambda mask: -mask.length))


def _apply(vector: Words, masks: Sequence[Mask]) -> None:
    step = _PIECE_BYTES // vector.itemsize
    buffer = np.empty(_PIECE_BYTES + _CIPHER_TAIL, np.uint8)
    target, words = buffer.data, buffer[:_PIECE_BYTES].view(vector.dtype)
    streams = [
        (_keystream(mask.key), mask.length, np.subtract if mask.negative else np.add)
        for mask in masks
    ]
    for start in range(0, masks[0].length, step):
        piece = vector[start : start + step]
        for stream, length, operation in streams:
            count = min(length - start, len(piece))
            if count <= 0:
                break
            stream.update_into(_ZEROS[: count * vector.itemsize], target)
            operation(piece[:count], words[:count], out=piece[:count])


def _keystream(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES128(key), modes.CTR(bytes(16))).encryptor()
