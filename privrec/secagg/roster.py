"""Who takes part in a round, on what terms, and how a device knows that they are real.

The server says who takes part; it is not believed. Every prekey must be signed by the identity that
it names, and every identity must be one that the device's own trust anchor knows: a list that the
device was given, or the key of somebody other than the server who enrols devices.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Protocol

import numpy as np

from privrec.errors import DataError, ReleaseRefused, UsageError
from privrec.secagg.keys import (
    RECORD_BYTES,
    DeviceKey,
    Prekey,
    Verifier,
    is_low_order,
    statement,
)
from privrec.secagg.messages import (
    MASKING,
    MAX_BANDS,
    MAX_DEVICES,
    NOISE,
    SEED,
    Buffer,
    Counter,
    Digest,
    Limits,
    Message,
    refused,
)

MAX_LENGTH = 1 << 28
"""Entries of a vector, 1 GiB of them: a message in Flower's serialisation takes less than 2 GiB."""


class Anchor(Protocol):
    """What a device trusts in place of the server."""

    verifier: Verifier

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for whom it knows; another anchor that has them knows the same."""

    def knows(self, prekey: Prekey) -> bool:
        """Whether the prekey's identity is that of an enrolled device."""


class ListedDevices:
    """A trust anchor that is a list of identities, handed to the device by someone it trusts."""

    def __init__(self, identities: Iterable[bytes]) -> None:
        self.verifier = Verifier()
        self._identities = frozenset(identities)

    @classmethod
    def read(cls, path: Path) -> ListedDevices:
        """A roster file: one identity a line, in hexadecimal; empty lines and ``#`` are skipped.

        UsageError is raised for a file that cannot be read, DataError for a line that is no key.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: the roster file could not be read ({error})") from None
        identities = []
        for number, line in enumerate(lines, 1):
            text = line.partition("#")[0].strip()
            if text and not re.fullmatch("[0-9a-fA-F]{64}", text):
                raise DataError(
                    f"{path}:{number}: {text[:80]!r} is no identity of 64 hexadecimal digits"
                )
            identities.append(bytes.fromhex(text))
        return cls(filter(None, identities))

    @functools.cached_property
    def digest(self) -> bytes:
        return statement("listed devices", b"".join(sorted(self._identities)))

    def knows(self, prekey: Prekey) -> bool:
        return prekey.identity in self._identities


class EnrolmentKey:
    """A trust anchor that is the Ed25519 key of an enrolment office, which is not the server."""

    def __init__(self, public: bytes) -> None:
        self.verifier = Verifier()
        self.digest = statement("enrolment key", public)
        self._public = public

    def knows(self, prekey: Prekey) -> bool:
        stated = _enrolment(prekey.identity)
        return self.verifier.check(self._public, prekey.certificate, stated)


def enrol(office: DeviceKey, identity: bytes) -> bytes:
    """The certificate that vouches for a device, for its :class:`~privrec.secagg.keys.PrekeyBook`.

    Devices hold the public half of the office's key as :class:`EnrolmentKey`.
    """
    return office.sign(_enrolment(identity))


@dataclass(frozen=True)
class Terms(Message):
    """What one attempt at one round is about; all of it is bound into every mask and signature.

    Attributes:
        round: counted from 0, or -1 for what is summed before the first; ``attempt`` from 0.
        plan: 32-byte digest of everything else that was agreed: scenario, privacy event.
        lengths: entries that a device of each tier sends, ascending: the weakest tier's first, the
            whole vector last. What one tier has more than the one before is a band. Where there is
            one length, devices of all tiers send that.
        minimums: fewest survivors that hold each band, the weakest tier's first.
        ring_bits: 32 or 16; sums are exact modulo ``2**ring_bits``.
        excess: whether survivors beyond a band's minimum give the seed of their noise in it away,
            so that as many shares of noise as the minimum are left
            (:mod:`privrec.privacy.mechanism`).
    """

    run: Annotated[str, Limits(str, 1, 256)]
    round: Annotated[int, Limits(int, -1, 2**63 - 1)]
    attempt: Counter
    plan: Digest
    lengths: Annotated[tuple[int, ...], Limits(int, 1, MAX_LENGTH, most=MAX_BANDS)]
    minimums: Annotated[tuple[int, ...], Limits(int, 1, MAX_DEVICES, most=MAX_BANDS)]
    ring_bits: Annotated[int, Limits(int, 16, 32)] = 32
    excess: Annotated[bool, Limits(bool, 0, 1)] = False

    def length(self, tier: int) -> int:
        """Entries that a device of a tier sends; tier 0 is the strongest."""
        return self.lengths[self.bands(tier) - 1]

    def bands(self, tier: int) -> int:
        """Bands that a device of a tier holds, counted from the one that all devices hold."""
        return len(self.lengths) - tier if len(self.lengths) > 1 else 1

    def problem(self) -> str | None:
        """The first field outside its limits, or what contradicts itself; None without either."""
        if problem := super().problem():
            return problem
        if len(self.lengths) != len(self.minimums):
            return f"{len(self.lengths)} bands with {len(self.minimums)} minimums"
        if any(longer <= shorter for shorter, longer in pairwise(self.lengths)):
            return "bands whose lengths do not ascend"
        return None if self.ring_bits in (16, 32) else f"a ring of {self.ring_bits} bits"


@dataclass(frozen=True)
class Call(Terms):
    """The first message of a round: its terms and its roster, the same for every device."""

    KIND: ClassVar[int] = 1
    records: Annotated[bytes, Limits(bytes, RECORD_BYTES, RECORD_BYTES * MAX_DEVICES)] = b""

    @classmethod
    def of(cls, terms: Terms, prekeys: Sequence[Prekey]) -> Call:
        """The call for a roster, which is put in the order of identities."""
        ordered = sorted(prekeys, key=lambda prekey: prekey.identity)
        records = b"".join(prekey.pack() for prekey in ordered)
        return cls(**vars(terms), records=records)

    @property
    def terms(self) -> Terms:
        """The terms alone."""
        return Terms(*(getattr(self, name) for name in Terms.__match_args__))

    @property
    def devices(self) -> int:
        """How many the roster names."""
        return len(self.records) // RECORD_BYTES

    @functools.cached_property
    def digest(self) -> bytes:
        """What stands for terms and roster in everything that is bound to them."""
        return statement("call", self.pack())

    @functools.cached_property
    def roster(self) -> Roster:
        """The devices that it names; nobody has checked who they are."""
        return Roster(self)

    @classmethod
    def parse(cls, message: Buffer) -> Call:
        """See :meth:`Message.parse`; devices hosted together have the same one, and its roster."""
        return cls._parsed(bytes(message))

    @classmethod
    @functools.lru_cache(maxsize=2)
    def _parsed(cls, message: bytes) -> Call:
        return super().parse(message)


class Roster:
    """The devices of a round, numbered in the order of their identities.

    Raises:
        ReleaseRefused: when terms contradict themselves, devices are named twice or out of order,
            or a tier does not exist.
    """

    def __init__(self, call: Call) -> None:
        if problem := call.problem():
            raise refused(f"a round of {problem}")
        count, rest = divmod(len(call.records), RECORD_BYTES)
        if rest:
            raise refused(f"a roster whose last prekey has {rest} of {RECORD_BYTES} bytes")
        starts = range(0, count * RECORD_BYTES, RECORD_BYTES)
        records = (call.records[start : start + RECORD_BYTES] for start in starts)
        self.terms = call.terms
        self.prekeys = tuple(map(Prekey.unpack, records))
        if any(a.identity >= b.identity for a, b in pairwise(self.prekeys)):
            raise refused("a roster that names devices twice or not in the order of identities")
        tiers = len(self.terms.lengths)
        if tiers > 1 and any(prekey.tier >= tiers for prekey in self.prekeys):
            raise refused(f"a roster with a tier beyond the {tiers} of this round")
        self._call = call
        self._numbers = {prekey.identity: n for n, prekey in enumerate(self.prekeys)}
        self._bands = np.array([self.terms.bands(prekey.tier) for prekey in self.prekeys], int)

    def __len__(self) -> int:
        return len(self.prekeys)

    def check(self, anchor: Anchor) -> None:
        """Refuse the roster unless every prekey is signed by a device that the anchor knows.

        By one anchor a roster is checked once, whichever of its devices asks.
        """

        def check() -> None:
            for prekey in self.prekeys:
                check_prekey(prekey, anchor)

        anchor.verifier.once(statement("roster", self._call.digest), check)

    def number(self, identity: bytes) -> int:
        """A device's number; ReleaseRefused is raised when the roster does not name it."""
        if identity not in self._numbers:
            raise refused(f"a roster without device {identity.hex()[:16]}")
        return self._numbers[identity]

    def length(self, number: int) -> int:
        """Entries that a device sends."""
        return self.terms.length(self.prekeys[number].tier)

    def bands(self, number: int) -> int:
        """Bands that a device holds."""
        return int(self._bands[number])

    @functools.cached_property
    def holding(self) -> tuple[tuple[int, ...], ...]:
        """The :meth:`holders` among all."""
        return self.holders(range(len(self)))

    def holders(self, members: Iterable[int]) -> tuple[tuple[int, ...], ...]:
        """For each band, the band that all hold first, the numbers of the members that hold it."""
        known = np.fromiter(members, int)
        held, bands = self._bands[known], range(len(self.terms.lengths))
        return tuple(tuple(known[held > band].tolist()) for band in bands)

    def secrets(self, number: int) -> int:
        """How many secrets a device deals in shares."""
        return NOISE + (self.bands(number) if self.terms.excess else 0)

    def due(self, survivors: Iterable[int], signers: Iterable[int]) -> Sequence[tuple[int, ...]]:
        """Which secrets of each device are opened at the end, by its number.

        Of a device that is not in the sum, its mask key. Of a survivor its seed and, where noise is
        taken off again, those of the bands in which it comes after as many signers as the band
        needs. The first of those who signed are so never opened, whichever part of the signatures
        a device is shown; were survivors counted, a server could name some that are not there.
        """
        return _due(self, tuple(sorted(survivors)), tuple(sorted(signers)))

    def check_bands(self, members: Iterable[int], minimum: int) -> None:
        """Refuse members of whom fewer than ``minimum``, or than the terms ask for, hold some band.

        A single seed opens all bands of a device, so that no band can be left out.
        """
        held = self._bands[np.fromiter(members, int)]
        counts = [int((held > band).sum()) for band in range(len(self.terms.lengths))]
        for band, count in enumerate(counts):
            least = max(minimum, self.terms.minimums[band])
            if count < least:
                found, remedy = f"{count} devices take part", "call more devices"
                if (bands := len(self.terms.lengths)) > 1:
                    found = f"band {band + 1} of {bands}: {count} devices hold it"
                    remedy = "sample more devices of this capacity, or drop the tier"
                raise ReleaseRefused(
                    f"{found}, and the least that hides them among each other is set to {least}; "
                    f"the round is given up; {remedy}"
                )


@functools.lru_cache(maxsize=4)
def _due(
    roster: Roster, alive: tuple[int, ...], signers: tuple[int, ...]
) -> Sequence[tuple[int, ...]]:
    """What :meth:`Roster.due` gives to each device, for devices that are hosted together once."""
    opened: list[tuple[int, ...]] = [(MASKING,)] * len(roster)
    for number in alive:
        opened[number] = (SEED,)
    if not roster.terms.excess:
        return opened
    signed = frozenset(signers)
    for band, holders in enumerate(roster.holders(alive)):
        least, before = roster.terms.minimums[band], 0
        for number in holders:
            if before >= least:
                opened[number] += (NOISE + band,)
            before += number in signed
    return opened


def check_prekey(prekey: Prekey, anchor: Anchor) -> None:
    """Refuse a prekey that no enrolled device made, or that has a point of low order."""
    signed = anchor.verifier.check(prekey.identity, prekey.signature, prekey.stated)
    if not (anchor.knows(prekey) and signed):
        raise ReleaseRefused(
            f"device {prekey.identity.hex()[:16]}: no enrolled device signed this prekey; "
            "somebody may have put a key of their own in its place; the round is refused"
        )
    if is_low_order(prekey.sealing) or is_low_order(prekey.masking):
        raise ReleaseRefused(
            f"device {prekey.identity.hex()[:16]}: a prekey of low order, from which everybody "
            "draws the same masks; leave this device out"
        )


def _enrolment(identity: bytes) -> bytes:
    return statement("enrolment", identity)
