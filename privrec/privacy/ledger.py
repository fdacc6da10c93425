"""The ledger: what was paid for, on disk before it is spent, and ε computed from nothing else.

``ledger.jsonl`` has one entry a line: a header, then charges and commits. A charge is flushed to
disk before :meth:`Ledger.charge` returns, hence before its round collects anything, so that a crash
can waste budget but never hide it. A commit says, before it is released, what the round releases.

The lines are a chain (:mod:`privrec.storage`), so that an altered, removed or reordered one shows.
The chain alone cannot show that its end was cut away: ``ledger.head.json`` beside it holds the
number of entries and the last hash, signed with the server's key. The same head is kept beside that
key, on the machine that charges, so an old ledger put back together with its own old head is
refused there, and so is a copy in another folder that was left behind. Entries written after the
last :meth:`Ledger.seal` are protected by the chain only.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privrec import storage
from privrec.errors import IntegrityError, ReleaseRefused, UsageError
from privrec.privacy import events
from privrec.privacy.events import Accountant, Adversary, RoundEvent
from privrec.storage import REMEDY, START

FORMAT = 1
PREPARATION = -1
"""The round of what is released before the first one."""
EXAMPLE = "example"
"""The unit of what devices' own noise protects: one interaction, never added to a user's ε."""

_HEAD = "ledger head"


@dataclass(frozen=True)
class Charge:
    """One paid attempt at a round; ``examples`` is its cost in the unit :data:`EXAMPLE`, if any."""

    round: int
    attempt: int
    event: RoundEvent
    examples: RoundEvent | None = None


class Ledger:
    """The charges and commits of one run; opened by :meth:`create` or :meth:`open`.

    Promise: whatever :meth:`charge` and :meth:`commit` returned from is on disk, and is found again
    by :meth:`open` after a crash at any moment; no method takes anything back. One process writes
    at a time. It is a context manager that closes the file.

    Attributes:
        public_key: the key that the signed head is checked with.
        signed: entries that the signed head covered when it was last read or written.
        header: the header's values, with what :meth:`create` added.
        counts: how often each event was charged; ``examples`` has the example-level ones apart.
        ended: digest of the model that the run ended with, or None for one that goes on.
    """

    public_key: Ed25519PublicKey

    def __init__(self, path: Path, key: Ed25519PrivateKey | None, kept: Path | None) -> None:
        self.path = path
        self.repaired: str | None = None
        self.signed = 0
        self.header: dict[str, Any] = {}
        self.counts: Counter[RoundEvent] = Counter()
        self.examples: Counter[RoundEvent] = Counter()
        self.ended: bytes | None = None
        self._key = key
        self._kept = kept
        self._files: list[FileIO] = []
        self._hashes: list[str] = []
        self._charges: dict[tuple[int, int], Charge] = {}
        self._examples: dict[tuple[int, int], RoundEvent] = {}
        self._commits: dict[tuple[int, int], bytes] = {}

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        header: Mapping[str, Any],
        signing_key: Ed25519PrivateKey,
        kept: Path | None = None,
    ) -> Ledger:
        """Begin a ledger with its header and its first signed head, durable before this returns.

        ``header`` says what the charges are for, as plain JSON values; format, unit (``user``),
        adjacency (``zero-out``) and public key are always the ledger's own. This machine keeps the
        last head that it signed in ``kept``, beside the key. UsageError when ``path`` exists or
        cannot be written.
        """
        ledger = cls(path, signing_key, kept)
        ledger.public_key = signing_key.public_key()
        public = ledger.public_key.public_bytes_raw().hex()
        own = {"format": FORMAT, "unit": "user", "adjacency": "zero-out", "public_key": public}
        entry = {"kind": "header", "body": {**header, **own}}
        storage.canonical(entry)  # refused before there is a file
        try:
            ledger._open_files("xb+")
            ledger._append(entry)
            ledger.seal()
        except BaseException:
            ledger.close()
            raise
        return ledger

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        signing_key: Ed25519PrivateKey | None = None,
        public_key: Ed25519PublicKey | None = None,
        kept: Path | None = None,
        repair: bool = True,
    ) -> Ledger:
        """Read a ledger back, and check every line of it and its signed head.

        A last line that a crash cut off was never acknowledged: it is removed, and ``repaired``
        says so. One that lacks only its end is kept.

        Args:
            signing_key: the server's; needed to :meth:`seal`.
            public_key: must have signed the head; by default that of ``signing_key``, else the one
                that the header names (which shows damage, but no ledger replaced as a whole).
            kept: as for :meth:`create`; the ledger must go on from that head.
            repair: whether to open for writing and repair; else it only reads, also while another
                process writes.

        Raises:
            IntegrityError: when a line was altered, removed or reordered, the file is shorter than
                its signed head says, or the head is missing or signed by another key.
            UsageError: when it cannot be opened, or it or a copy of it is open for writing.
        """
        ledger = cls(path, signing_key, kept)
        try:
            if repair:
                ledger._open_files("rb+")
            # Before the lines, since a writer may add some in between.
            heads = {place: _head(place) for place in ledger._heads()}
            content, end = ledger._read()
            ledger._check_key(signing_key.public_key() if signing_key else public_key)
            ledger.signed = max(ledger._check_head(*head) for head in heads.items())
            ledger._mend(content, end)
        except BaseException:
            ledger.close()
            raise
        return ledger

    @property
    def charges(self) -> list[Charge]:
        """Every charge, in the order in which they were made."""
        return list(self._charges.values())

    @property
    def entries(self) -> int:
        """Number of entries, the header included."""
        return len(self._hashes)

    @property
    def last_hash(self) -> str:
        """Hash of the last entry, on which a checkpoint can be bound; see :meth:`has`."""
        return self._hashes[-1]

    def has(self, entries: int, last_hash: str) -> bool:
        """Whether this ledger continues one of ``entries`` entries that ended in ``last_hash``."""
        return 0 < entries <= self.entries and self._hashes[entries - 1] == last_hash

    def attempts(self, round: int) -> int:
        """How many attempts at a round were charged."""
        return next(n for n in count() if (round, n) not in self._charges)

    def committed(self, round: int, attempt: int) -> bytes | None:
        """The tag of what the attempt releases, or None when nothing was committed."""
        return self._commits.get((round, attempt))

    def epsilon(self, delta: float, adversary: Adversary, accountant: Accountant = "pld") -> float:
        """ε of everything charged; see :func:`privrec.privacy.events.epsilon`."""
        return events.epsilon(self.counts, delta, adversary, accountant)

    def epsilon_after(self, event: RoundEvent, *, delta: float, adversary: Adversary) -> float:
        """ε as it would be after one more charge of ``event``; nothing is charged."""
        return events.epsilon(self.counts + Counter([event]), delta, adversary)

    def charge(
        self, round: int, attempt: int, event: RoundEvent, examples: RoundEvent | None = None
    ) -> bool:
        """Pay for one attempt at a round, on disk before this returns.

        Attempts at a round are numbered from 0, without gaps. False says that this very attempt was
        paid for before: only the same bits may be released again. ``examples`` is what the attempt
        costs each example of a device in it. It is entered first, in a unit of its own, and counts
        from the charge on: what a crash left without one was never collected.

        IntegrityError for another charge of the attempt, or a gap; ReleaseRefused when it could not
        be written, or the run has ended: nothing may be released.
        """
        place, wanted = (round, attempt), Charge(round, attempt, event, examples)
        known, next_one = self._charges.get(place), self.attempts(round)
        if known is None and self.ended is not None:
            raise ReleaseRefused(
                f"{self.path}: the run has ended, and takes no more charges; start a new run"
            )
        if known is None and (round < PREPARATION or attempt != next_one):
            raise IntegrityError(
                f"{self.path}: attempt {attempt} at round {round}, of which {next_one} were "
                f"charged; the next one is attempt {next_one}"
            )
        entered = self._examples.get(place)
        if (known or wanted) != wanted or (entered or examples) != examples:
            raise IntegrityError(
                f"{self.path}: round {round}, attempt {attempt} was charged as "
                f"{known and known.event} ({entered} at example level), not as {event} "
                f"({examples}); resume with the scenario that the run was started with"
            )
        if known is not None:
            return False
        named = {"round": round, "attempt": attempt}
        if examples is not None and entered is None:
            own = {"kind": "examples", "unit": EXAMPLE, "event": examples.to_json()}
            self._append({**own, **named})
        self._append({"kind": "charge", **named, "event": event.to_json()})
        return True

    def commit(self, round: int, attempt: int, tag: bytes) -> None:
        """Say what an attempt that was charged releases, on disk before it is released.

        ``tag`` is a keyed hash of it (:meth:`~privrec.randomness.SecretRoot.tag`). ReleaseRefused
        when it was not charged, or for two different releases under one charge.
        """
        known = self.committed(round, attempt)
        if known == tag:
            return
        if (round, attempt) not in self._charges:
            raise ReleaseRefused(
                f"{self.path}: round {round}, attempt {attempt} was not charged; charge it first"
            )
        if known is not None:
            raise ReleaseRefused(
                f"{self.path}: round {round}, attempt {attempt} released something else before; "
                "charge a new attempt with fresh noise"
            )
        self._append({"kind": "commit", "round": round, "attempt": attempt, "tag": tag.hex()})

    def end(self, model: bytes) -> None:
        """Say that the run is over and the digest of its last model, on disk before this returns.

        From here on nothing is charged. An older copy of the ledger, with the head that was signed
        then, lacks this entry: so it shows that it is not the whole.
        """
        if self.ended == model:
            return
        if self.ended is not None:
            raise ReleaseRefused(
                f"{self.path}: the run ended with another model; restore the directory as it was"
            )
        self._append({"kind": "end", "model": model.hex()})

    def seal(self) -> None:
        """Sign the number of entries and the last hash, so that a cut end shows from here on.

        The head is replaced as a whole and durable before this returns, or ReleaseRefused raised.
        UsageError without the key, or when the ledger is open for reading only.
        """
        if self._key is None or not self._files:
            raise UsageError(
                f"{self.path}: sealing needs the signing key and a ledger opened for writing; "
                "open it with signing_key and repair=True"
            )
        head = {"format": FORMAT, "entries": self.entries, "last_hash": self.last_hash}
        record = storage.canonical(storage.sign(_HEAD, head, self._key)) + b"\n"
        for place in self._heads():
            try:
                storage.replace(place, record, mode=0o600 if place == self._kept else 0o666)
            except OSError as error:
                raise ReleaseRefused(
                    f"{place}: it could not be written ({error.strerror}); make room or mend the "
                    "disk, and resume"
                ) from error
        self.signed = self.entries

    def close(self) -> None:
        """Close the file; the ledger can still be read, but nothing charged any more."""
        while self._files:
            self._files.pop().close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, entry: Mapping[str, Any]) -> None:
        previous = self._hashes[-1] if self._hashes else START
        line = storage.line_of({**entry, "index": self.entries, "previous": previous})
        if not self._files:
            raise ReleaseRefused(
                f"{self.path}: it is not open for writing, so nothing can be charged or released; "
                "open it again with repair=True"
            )
        try:
            self._write(line)
        except OSError as error:
            self.close()  # what reached the disk is unknown: only reading it again can tell
            raise ReleaseRefused(
                f"{self.path}: the entry could not be written ({error.strerror}), so nothing was "
                "released; make room or mend the disk, and resume"
            ) from error
        self._add(line)

    def _write(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            left = left[self._files[0].write(left) :]
        os.fsync(self._files[0].fileno())

    def _read(self) -> tuple[bytes, int]:
        """Count all whole lines of the file; its content, and where in it they end."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}; name the ledger of a run") from error
        end = 0
        for line in content.splitlines(keepends=True):
            is_last = end + len(line) == len(content)
            # A crash leaves part of an entry, which is no JSON, or blocks that were never written.
            # A whole entry with other content is one that was altered.
            is_torn = not line.endswith(b"\n") or b"\0" in line
            if is_last and is_torn and storage.parsed(line) is None:
                break
            self._add(line.removesuffix(b"\n") + b"\n")
            end += len(line)
        if not self._hashes:
            raise IntegrityError(f"{self.path}: it has no header line; {REMEDY}")
        return content, end

    def _add(self, line: bytes) -> None:
        """Count a line that is to the byte the next entry of the chain."""
        entry = storage.linked(self.path, line, self._hashes)
        try:
            self._count(entry)
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise IntegrityError(
                f"{self.path}: line {self.entries + 1} is no entry that this version writes "
                f"({error}); {REMEDY}"
            ) from error
        self._hashes.append(entry["hash"])

    def _count(self, entry: Mapping[str, Any]) -> None:
        """Enter what a line says; raises whatever a line of another shape leads to."""
        if not self._hashes:
            self.header = dict(entry["body"])
            if entry["kind"] != "header" or self.header["format"] != FORMAT:
                raise ValueError(
                    f"a header of format {self.header['format']}, and {FORMAT} is read here"
                )
            return
        if self.ended is not None:
            raise ValueError("an entry after the one that ends a run")
        if entry["kind"] == "end":
            self.ended = bytes.fromhex(entry["model"])
            return
        key = entry["round"], entry["attempt"]
        if set(map(type, key)) != {int} or key[0] < PREPARATION or key[1] < 0:
            raise ValueError(f"round {key[0]!r}, attempt {key[1]!r}")
        if entry["kind"] == "examples" and key not in self._examples | self._charges:
            if entry["unit"] != EXAMPLE:
                raise ValueError(f"a charge for the unit {entry['unit']!r}")
            self._examples[key] = RoundEvent.from_json(entry["event"])
        elif entry["kind"] == "commit" and key in self._charges:
            self._commits[key] = bytes.fromhex(entry["tag"])
        elif entry["kind"] == "charge" and key not in self._charges:
            charge = Charge(*key, RoundEvent.from_json(entry["event"]), self._examples.get(key))
            self._charges[key] = charge
            self.counts[charge.event] += 1
            if charge.examples is not None:
                self.examples[charge.examples] += 1
        else:
            raise ValueError(f"{entry['kind']} of round {key[0]}, attempt {key[1]}")

    def _mend(self, content: bytes, end: int) -> None:
        """Bring the file to the end of its last whole line."""
        if end < len(content):
            self.repaired = (
                f"a last line of {len(content) - end} bytes that a crash cut off was removed; "
                "it was never acknowledged"
            )
        elif not content.endswith(b"\n"):
            self.repaired = "the missing end of the last line was added"
        if self.repaired and self._files:
            self._files[0].truncate(end)
            self._files[0].seek(end)
            self._write(b"" if content[:end].endswith(b"\n") else b"\n")

    def _heads(self) -> list[Path]:
        """Where the signed head lies: beside the ledger, and beside the key."""
        return [head_path(self.path)] + ([] if self._kept is None else [self._kept])

    def _check_key(self, trusted: Ed25519PublicKey | None) -> None:
        """Settle which key must have signed the head, and that the header names it."""
        named = self.header.get("public_key")
        try:
            own = bytes.fromhex(named)  # type: ignore[arg-type]
            self.public_key = trusted or Ed25519PublicKey.from_public_bytes(own)
        except (TypeError, ValueError) as error:
            raise IntegrityError(f"{self.path}: its header names no key; {REMEDY}") from error
        if own != self.public_key.public_bytes_raw():
            raise IntegrityError(
                f"{self.path}: it belongs to the key {named}, not to "
                f"{self.public_key.public_bytes_raw().hex()}; use the signing key of this run, or "
                "bring back its ledger"
            )

    def _check_head(self, place: Path, head: Mapping[str, Any] | None) -> int:
        """Number of entries that a head covers, which this ledger must have."""
        facts = storage.verified(_HEAD, head, self.public_key, place)
        entries, last_hash = int(facts["entries"]), facts["last_hash"]
        if entries > self.entries:
            raise IntegrityError(
                f"{self.path}: {self.entries} entries, but {entries} were signed: its end was cut "
                f"away; {REMEDY}"
            )
        if not self.has(entries, last_hash):
            raise IntegrityError(
                f"{self.path}: line {entries} is not the one that was signed; {REMEDY}"
            )
        return entries

    def _open_files(self, mode: Literal["xb+", "rb+"]) -> None:
        """Open the file at its end, and keep other processes off it and its copies."""
        try:
            self._files.append(FileIO(self.path, mode))
            if self._kept is not None:  # the head itself is replaced, so it can keep nobody off
                lock = self._kept.with_suffix(".lock")
                self._files.append(FileIO(lock, "ab", opener=lambda p, f: os.open(p, f, 0o600)))
            for file in self._files:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{self.path}: another process writes to this run; wait for it or stop it"
            ) from error
        except OSError as error:
            place, why = error.filename or self.path, error.strerror
            raise UsageError(
                f"{place}: {why}; name the ledger of a run"
                if mode == "rb+"
                else f"{place}: a new ledger cannot be made here ({why}); resume the run that it "
                "belongs to, or choose another directory"
            ) from error
        self._files[0].seek(0, os.SEEK_END)


def head_path(path: Path) -> Path:
    """Where the signed head of the ledger at ``path`` lies."""
    return path.with_suffix(".head.json")


def _head(place: Path) -> dict[str, Any] | None:
    """The signed head as it lies on disk, its signature not checked yet."""
    try:
        return storage.parsed(place.read_bytes())
    except OSError as error:
        why = f"{place}: the signed head could not be read ({error.strerror}); {REMEDY}"
        raise IntegrityError(why) from error
