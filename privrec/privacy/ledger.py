"""The ledger: what was paid for, on disk before it is spent, and ε computed from nothing else.

``ledger.jsonl`` has one entry a line: a header, then charges and commits. A charge is flushed to
disk before :meth:`Ledger.charge` returns, hence before its round collects anything, so that a crash
can waste budget but never hide it. A commit says, before it is released, what the round releases.

Every entry carries its place and the hash of the entry before, so that an altered, removed or
reordered line shows. The chain alone cannot show that its end was cut away: ``ledger.head.json``
beside it holds the number of entries and the last hash, signed with the server's key. The same head
is kept beside that key, on the machine that charges, so an old ledger put back together with its
own old head is refused there, and so is a copy in another folder that was left behind. Entries
written after the last :meth:`Ledger.seal` are protected by the chain only.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privrec.errors import IntegrityError, ReleaseRefused, UsageError
from privrec.privacy import events
from privrec.privacy.events import Accountant, Adversary, RoundEvent
from privrec.privacy.ledger_index import (
    EXAMPLE,
    FORMAT,
    PREPARATION,
    REMEDY,
    START,
    Book,
    Charge,
    add,
    canonical,
    line_of,
    parsed,
    read,
)
from privrec.privacy.signed import hexadecimal, server_key, sign, verified
from privrec.storage import replace

__all__ = ["Charge", "Ledger", "head_path", "server_key"]

_HEAD = "ledger head"
_RESERVED = frozenset({"format", "unit", "adjacency", "public_key"})


class Ledger:
    """The charges and commits of one run; opened by :meth:`create` or :meth:`open`.

    Promise: whatever :meth:`charge` and :meth:`commit` returned from is on disk, and is found again
    by :meth:`open` after a crash at any moment; no method takes anything back. One process writes
    at a time. It is a context manager that closes the file.
    """

    def __init__(
        self, path: Path, book: Book, files: list[FileIO], key: _Keys, kept: Path | None
    ) -> None:
        self.path = path
        self.repaired: str | None = None
        self._book = book
        self._files = files
        self._keys = key
        self._kept = kept
        self._signed = 0

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

        Args:
            path: the new file, usually ``ledger.jsonl``; the head is ``ledger.head.json`` beside.
            header: what the charges are for, as plain JSON values: run id, hash of the privacy
                settings, delta, note on the population. Format, unit (``user``), adjacency
                (``zero-out``) and the public key are added.
            signing_key: the server's key; see :func:`server_key`.
            kept: where this machine keeps the last head that it signed, beside the key.

        Raises:
            UsageError: when ``path`` exists, cannot be written, or the header names what is added.
        """
        if taken := _RESERVED & set(header):
            raise UsageError(
                f"ledger header {sorted(taken)}: these the ledger adds; leave them out"
            )
        keys = _Keys(signing_key.public_key(), signing_key)
        own = {"format": FORMAT, "unit": "user", "adjacency": "zero-out", "public_key": keys.text}
        entry = {"kind": "header", "body": {**header, **own}}
        canonical(entry)  # refused before there is a file
        ledger = cls(path, Book(), _open(path, "xb+", kept), keys, kept)
        try:
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
        says so. A last line that lacks only its end is kept.

        Args:
            path: the file that :meth:`create` made.
            signing_key: the server's key; needed to :meth:`seal`.
            public_key: the key that the head must be signed with; by default the one of
                ``signing_key``, else the one that the header names (which shows damage, but not a
                ledger that was replaced as a whole).
            kept: where :meth:`create` was told to keep the last head; the ledger must go on from
                it, and no other copy of it may be open for writing.
            repair: open for writing and repair; ``False`` opens for reading alone, leaves the file
                as it is, and works while another process writes.

        Raises:
            IntegrityError: when a line was altered, removed or reordered, when the file is shorter
                than its signed head says, or the head is missing or signed by another key.
            UsageError: when the file cannot be opened, or something else has it open for writing.
        """
        files = _open(path, "rb+", kept) if repair else []
        try:
            # Before the lines, since a writer may add some in between.
            heads = {place: _head(place) for place in _places(path, kept)}
            content = _content(path)
            book, end = read(path, content)
            trusted = signing_key.public_key() if signing_key else public_key
            keys = _Keys(trusted or _named_key(path, book.header), signing_key)
            ledger = cls(path, book, files, keys, kept)
            ledger._signed = max(_check_head(path, *head, book, keys) for head in heads.items())
            ledger._mend(content, end)
        except BaseException:
            _close(files)
            raise
        return ledger

    @property
    def header(self) -> dict[str, Any]:
        """The header's values, with what :meth:`create` added."""
        return dict(self._book.header)

    @property
    def charges(self) -> list[Charge]:
        """Every charge, in the order in which they were made."""
        return list(self._book.charges.values())

    @property
    def counts(self) -> dict[RoundEvent, int]:
        """How often each event was charged."""
        return dict(self._book.counts)

    @property
    def entries(self) -> int:
        """Number of entries, the header included."""
        return len(self._book.hashes)

    @property
    def signed(self) -> int:
        """Number of entries that the signed head covered when the ledger was opened or sealed."""
        return self._signed

    @property
    def last_hash(self) -> str:
        """Hash of the last entry, on which a checkpoint can be bound; see :meth:`has`."""
        return self._book.hashes[-1]

    def has(self, entries: int, last_hash: str) -> bool:
        """Whether this ledger continues one of ``entries`` entries that ended in ``last_hash``."""
        return 0 < entries <= self.entries and self._book.hashes[entries - 1] == last_hash

    def charge(self, round: int, attempt: int, event: RoundEvent) -> bool:
        """Pay for one attempt at a round, on disk before this returns.

        Args:
            round: index of the round, from 0; ``PREPARATION`` for what is released before.
            attempt: index of the attempt at it, from 0, without gaps.
            event: what the attempt costs.

        Returns:
            True when it was charged now; False when this very attempt was paid for before, in which
            case only the same bits may be released again.

        Raises:
            IntegrityError: when the attempt was charged with another event, or skips attempts.
            ReleaseRefused: when the charge could not be written: nothing may be released.
        """
        known = self._book.charges.get((round, attempt))
        if known is None and self._book.end is not None:
            raise ReleaseRefused(
                f"{self.path}: the run has ended, and nothing more is charged to it; start a new "
                "run"
            )
        if known is not None:
            if known.event != event:
                raise IntegrityError(
                    f"{self.path}: round {round}, attempt {attempt} was charged as {known.event}, "
                    f"not as {event}; resume with the scenario that the run was started with"
                )
            return False
        if round < PREPARATION or attempt != self.attempts(round):
            raise IntegrityError(
                f"{self.path}: attempt {attempt} at round {round}, of which {self.attempts(round)} "
                f"were charged; the next one is attempt {self.attempts(round)}"
            )
        entry = {"kind": "charge", "round": round, "attempt": attempt, "event": event.to_json()}
        self._append(entry)
        return True

    def charge_examples(self, round: int, attempt: int, event: RoundEvent) -> bool:
        """Enter what an attempt costs each example of a device in it, on disk before this returns.

        The entry has a unit of its own, and comes before the attempt's :meth:`charge`.

        Args:
            round: index of the round, from 0.
            attempt: index of the attempt at it.
            event: what it costs one example of a device that takes part.

        Returns:
            True when it was entered now, False when it was there.

        Raises:
            IntegrityError: when another event was entered, or the attempt was charged without one.
            ReleaseRefused: when it could not be written, or the run has ended.
        """
        known = self._book.examples.get((round, attempt))
        if known is not None and known.event == event:
            return False
        if known is not None or (round, attempt) in self._book.charges:
            raise IntegrityError(
                f"{self.path}: round {round}, attempt {attempt} was charged as {known} at example "
                f"level, not as {event}; resume with the scenario that the run was started with"
            )
        if self._book.end is not None:
            raise ReleaseRefused(f"{self.path}: the run has ended; start a new run")
        entry = {"kind": "examples", "unit": EXAMPLE, "round": round, "attempt": attempt}
        self._append({**entry, "event": event.to_json()})
        return True

    @property
    def examples(self) -> dict[RoundEvent, int]:
        """How often each example-level event was entered; never part of :attr:`counts`."""
        return dict(Counter(charge.event for charge in self._book.examples.values()))

    def epsilon_of_examples(self, delta: float) -> float:
        """ε of one example against whoever sees every upload, of a device in every attempt."""
        return events.epsilon(self.examples, delta, "server")

    def commit(self, round: int, attempt: int, tag: bytes) -> None:
        """Say what an attempt releases, on disk before it is released.

        Args:
            round: index of a round that was charged.
            attempt: index of an attempt at it that was charged.
            tag: a keyed hash of what is released; see
                :meth:`~privrec.randomness.SecretRoot.tag`.

        Raises:
            ReleaseRefused: when the attempt was not charged, has another tag already (two different
                releases under one charge), or the commit could not be written.
        """
        known = self.committed(round, attempt)
        if known == tag:
            return
        if (round, attempt) not in self._book.charges:
            raise ReleaseRefused(
                f"{self.path}: round {round}, attempt {attempt} was not charged; charge it first"
            )
        if known is not None:
            raise ReleaseRefused(
                f"{self.path}: round {round}, attempt {attempt} released something else before; "
                "charge a new attempt with fresh noise"
            )
        self._append({"kind": "commit", "round": round, "attempt": attempt, "tag": tag.hex()})

    def committed(self, round: int, attempt: int) -> bytes | None:
        """The tag of what the attempt releases, or None when nothing was committed."""
        return self._book.commits.get((round, attempt))

    def end(self, model: bytes) -> None:
        """Say that the run is over and what it leaves, on disk before this returns.

        From here on nothing is charged. An older copy of the ledger, with the head that was signed
        then, lacks this entry: so it shows that it is not the whole.

        Args:
            model: digest of the model that is released last.

        Raises:
            ReleaseRefused: when the run ended with another model, or the entry could not be
                written.
        """
        if self._book.end == model:
            return
        if self._book.end is not None:
            raise ReleaseRefused(
                f"{self.path}: the run ended with another model; restore the directory as the run "
                "left it"
            )
        self._append({"kind": "end", "model": model.hex()})

    @property
    def ended(self) -> bytes | None:
        """Digest of the model that the run ended with, or None for one that goes on."""
        return self._book.end

    def attempts(self, round: int) -> int:
        """How many attempts at a round were charged."""
        count = 0
        while (round, count) in self._book.charges:
            count += 1
        return count

    def epsilon(self, delta: float, adversary: Adversary, accountant: Accountant = "pld") -> float:
        """ε of everything charged; see :func:`privrec.privacy.events.epsilon`."""
        return events.epsilon(self._book.counts, delta, adversary, accountant)

    def epsilon_after(
        self,
        event: RoundEvent,
        *,
        delta: float,
        adversary: Adversary,
        accountant: Accountant = "pld",
        times: int = 1,
    ) -> float:
        """ε as it would be after ``times`` more charges of ``event``; nothing is charged."""
        after = self._book.counts + Counter({event: times})
        return events.epsilon(after, delta, adversary, accountant)

    def would_exceed(
        self, event: RoundEvent, *, epsilon: float, delta: float, adversary: Adversary
    ) -> bool:
        """Whether one more charge of ``event`` would take ε above ``epsilon``."""
        return self.epsilon_after(event, delta=delta, adversary=adversary) > epsilon

    @property
    def public_key(self) -> Ed25519PublicKey:
        """The key that the signed head was checked with."""
        return self._keys.public

    def sign(self, kind: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return a record of the run, see :func:`privrec.privacy.signed.sign`.

        Raises:
            UsageError: when the ledger was opened without the signing key or for reading.
        """
        if self._keys.private is None or not self._files:
            raise UsageError(
                f"{self.path}: sealing needs the signing key and a ledger opened for writing; "
                "open it with signing_key and repair=True"
            )
        return sign(kind, facts, self._keys.private)

    def seal(self) -> None:
        """Sign the number of entries and the last hash, so that a cut end shows from here on.

        The head is replaced as a whole and durable before this returns.

        Raises:
            UsageError: when the ledger was opened without the signing key or for reading.
            ReleaseRefused: when the head could not be written.
        """
        head = {"format": FORMAT, "entries": self.entries, "last_hash": self.last_hash}
        record = canonical(self.sign(_HEAD, head)) + b"\n"
        for place in _places(self.path, self._kept):
            try:
                replace(place, record, mode=0o600 if place == self._kept else 0o666)
            except OSError as error:
                raise ReleaseRefused(
                    f"{place}: it could not be written ({error.strerror}); make room or mend the "
                    "disk, and resume"
                ) from error
        self._signed = self.entries

    def close(self) -> None:
        """Let go of the file; the ledger can still be read, but nothing charged any more."""
        _close(self._files)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, entry: dict[str, Any]) -> None:
        previous = self._book.hashes[-1] if self._book.hashes else START
        line = line_of({**entry, "index": self.entries, "previous": previous})
        self._write(line)
        add(self.path, self._book, line.removesuffix(b"\n"))

    def _write(self, line: bytes) -> None:
        if not self._files:
            raise ReleaseRefused(
                f"{self.path}: it is not open for writing, so nothing can be charged or released; "
                "open it again with repair=True"
            )
        try:
            _write_all(self._files[0], line)
            os.fsync(self._files[0].fileno())
        except OSError as error:
            # What reached the disk is unknown: only reading it again can tell.
            self.close()
            raise ReleaseRefused(
                f"{self.path}: the entry could not be written ({error.strerror}), so nothing was "
                "released; make room or mend the disk, and resume"
            ) from error

    def _mend(self, content: bytes, end: int) -> None:
        """Bring the file to the end of its last whole line."""
        if end < len(content):
            self.repaired = (
                f"a last line of {len(content) - end} bytes that a crash cut off was removed; "
                "it was never acknowledged"
            )
        elif not content.endswith(b"\n"):
            self.repaired = "the missing end of the last line was added"
        if self.repaired is None or not self._files:
            return
        file = self._files[0]
        file.truncate(end)
        file.seek(end)
        if not content[:end].endswith(b"\n"):
            _write_all(file, b"\n")
        os.fsync(file.fileno())


@dataclass(frozen=True)
class _Keys:
    public: Ed25519PublicKey
    private: Ed25519PrivateKey | None

    @property
    def text(self) -> str:
        return hexadecimal(self.public)


def head_path(path: Path) -> Path:
    """Where the signed head of the ledger at ``path`` lies."""
    return path.with_suffix(".head.json")


def _named_key(path: Path, header: Mapping[str, Any]) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(header["public_key"]))
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path}: its header names no key; {REMEDY}") from error


def _places(path: Path, kept: Path | None) -> list[Path]:
    """Where the signed head lies: beside the ledger, and beside the key."""
    return [head_path(path)] + ([] if kept is None else [kept])


def _head(place: Path) -> Mapping[str, Any] | None:
    """The signed head as it lies on disk, its signature not checked yet."""
    try:
        return parsed(place.read_bytes())
    except OSError as error:
        raise IntegrityError(
            f"{place}: the signed head could not be read ({error.strerror}); {REMEDY}"
        ) from error


def _check_head(
    path: Path, place: Path, head: Mapping[str, Any] | None, book: Book, keys: _Keys
) -> int:
    if book.header.get("public_key") != keys.text:
        raise IntegrityError(
            f"{path}: it belongs to the key {book.header.get('public_key')}, not to {keys.text}; "
            "use the signing key of this run, or bring back its ledger"
        )
    facts = verified(_HEAD, head, keys.public, place)
    entries, last_hash = int(facts["entries"]), facts["last_hash"]
    if entries > len(book.hashes):
        raise IntegrityError(
            f"{path}: {len(book.hashes)} entries, but {entries} were signed: its end was cut away; "
            f"{REMEDY}"
        )
    if entries < 1 or book.hashes[entries - 1] != last_hash:
        raise IntegrityError(f"{path}: line {entries} is not the one that was signed; {REMEDY}")
    return entries


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; name the ledger of a run") from error


def _open(path: Path, mode: Literal["xb+", "rb+"], kept: Path | None) -> list[FileIO]:
    """The ledger's file, at its end, and what keeps other processes off it and its copies."""
    files: list[FileIO] = []
    try:
        files.append(FileIO(path, mode))
        if kept is not None:  # the head itself is replaced, so that it can keep nobody off
            files.append(FileIO(kept.with_suffix(".lock"), "ab", opener=_own))
    except OSError as error:
        _close(files)
        place, why = error.filename, error.strerror
        raise UsageError(
            f"{place}: {why}; name the ledger of a run"
            if mode == "rb+"
            else f"{place}: a new ledger cannot be made here ({why}); resume the run that it "
            "belongs to, or choose another directory"
        ) from error
    for file in files:
        _lock(path, files, file)
    files[0].seek(0, os.SEEK_END)
    return files


def _own(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _lock(path: Path, files: list[FileIO], file: FileIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        _close(files)
        raise UsageError(
            f"{path}: another process writes to this run; wait for it or stop it"
        ) from error


def _write_all(file: FileIO, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def _close(files: list[FileIO]) -> None:
    while files:
        files.pop().close()
