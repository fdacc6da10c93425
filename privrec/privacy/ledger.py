"""The ledger: what was paid for, on disk before it is spent, and ε computed from nothing else.

It is that of a run, or of training that is not ours: ``privrec.Ledger`` for any loop.

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
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privrec import __version__, storage
from privrec.errors import BudgetError, IntegrityError, ReleaseRefused, UsageError
from privrec.privacy import events
from privrec.privacy.events import Accountant, Adjacency, Adversary, RoundEvent
from privrec.randomness import KEPT, KEY, kept_key, secrets_of, state_dir
from privrec.storage import REMEDY, START

FORMAT = 1
PREPARATION = -1
"""The round of what is released before the first one."""
EXAMPLE = "example"
"""The unit of what devices' own noise protects: one interaction, never added to a user's ε."""
_HEAD = "ledger head"
_SEAL_EVERY = 256


@dataclass(frozen=True)
class Charge:
    """One paid attempt at a round; ``examples`` is its cost in the unit :data:`EXAMPLE`, if any.

    ``expected_batch`` is the number of units that the training expected in it, where it told.
    """

    round: int
    attempt: int
    event: RoundEvent
    examples: RoundEvent | None = None
    expected_batch: float | None = None


class Ledger:
    """What training spends of a privacy budget; made by :meth:`create`, gone on with by `resume`.

    Any loop can use it: it charges an event before each release, and an event that would bring ε
    above the budget is refused. ``privrec report LEDGER`` makes a report that others can verify.

    Examples:
        >>> import privrec
        >>> from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
        >>> event = PoissonSampledDpEvent(0.01, GaussianDpEvent(1.1))
        >>> with privrec.Ledger.create(
        ...     "ledger.jsonl", unit="example", adjacency="add-or-remove", delta=1e-5, budget=2.0
        ... ) as ledger:
        ...     for step in range(100):
        ...         charged = ledger.charge(event)  # then release the step
        ...     ledger.end()
        ...     round(ledger.epsilon(), 2)
        0.55

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
        self._next = 0
        self._within: Counter[RoundEvent] = Counter()
        self._seals = False  # by itself: charges were made without naming their rounds

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        unit: str = "user",
        adjacency: Adjacency = "zero-out",
        delta: float | None = None,
        budget: float | None = None,
        against: Adversary = "recipients",
        header: Mapping[str, Any] | None = None,
        signing_key: Ed25519PrivateKey | None = None,
        kept: Path | None = None,
    ) -> Ledger:
        """Begin a ledger with its header and its first signed head, durable before this returns.

        Args:
            unit: whose data two neighbours differ in, in a word: ``"user"``, ``"example"``.
            adjacency: how: the unit's data is replaced by nothing (``"zero-out"``), the unit is
                there or not (``"add-or-remove"``), or another one is in its place
                (``"replace-one"``).
            delta: δ of the ε that is computed and limited.
            budget: largest ε; None for no limit.
            against: who that ε is against: ``"recipients"`` of what is released, who do not know
                which units were sampled, or ``"server"``, who does.
            header: what else the charges are for, as plain JSON values.
            signing_key: signs the ledger; by default a new one, which this machine keeps, with the
                last head that it signed, under PRIVREC_STATE.
            kept: where it keeps that head, for a key that was given.

        Raises:
            UsageError: when a value makes no sense, or ``path`` exists or cannot be written.
        """
        events.check_terms(unit, adjacency, delta, budget, against)
        said = dict(header or {})
        if signing_key is None:
            if delta is None:
                raise UsageError("delta is not given: choose one below 1 / number of units")
            said |= {"run_id": secrets.token_hex(8), "version": __version__, "against": against}
            said |= {"delta": float(delta), "budget": budget}
            folder = state_dir() / "runs" / said["run_id"]
            signing_key, kept = storage.server_key(folder / KEY), folder / KEPT
        ledger = cls(Path(path), signing_key, kept)
        ledger.public_key = signing_key.public_key()
        public = ledger.public_key.public_bytes_raw().hex()
        own = {"format": FORMAT, "unit": unit, "adjacency": adjacency, "public_key": public}
        entry = {"kind": "header", "body": {**said, **own}}
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
        path: str | os.PathLike[str],
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
        ledger = cls(Path(path), signing_key, kept)
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

    @classmethod
    def resume(cls, path: str | os.PathLike[str]) -> Ledger:
        """Open a ledger of :meth:`create` to go on with it, on the machine that keeps its key.

        UsageError where that is not this one; otherwise as :meth:`open`.
        """
        path = Path(path)
        with cls.open(path, repair=False) as found:
            run_id = str(found.header.get("run_id", ""))
        folder, key = secrets_of(run_id), kept_key(run_id)
        if folder is None or key is None:
            raise UsageError(
                f"{path}: this machine keeps no key of it; go on where it was begun, or set "
                "PRIVREC_STATE to the folder that has its secrets"
            )
        return cls.open(path, signing_key=key, kept=folder / KEPT)

    @property
    def adjacency(self) -> Adjacency:
        """Which data sets are neighbours, as the header declares."""
        declared: Adjacency = self.header.get("adjacency", "zero-out")
        return declared

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

    def epsilon(
        self,
        adversary: Adversary = "recipients",
        delta: float | None = None,
        accountant: Accountant = "pld",
    ) -> float:
        """ε of everything charged; see :func:`privrec.privacy.events.epsilon`.

        Args:
            adversary: ``"recipients"`` of what was released, who do not know which units were
                sampled, or ``"server"``: somebody who does.
            delta: by default the header's.
            accountant: ``"pld"``, or ``"rdp"``, which is looser.
        """
        delta = self.header["delta"] if delta is None else delta
        return events.epsilon(self.counts, delta, adversary, accountant, self.adjacency)

    def epsilon_after(self, event: RoundEvent, *, delta: float, adversary: Adversary) -> float:
        """ε as it would be after one more charge of ``event``; nothing is charged."""
        after = self.counts + Counter([event])
        return events.epsilon(after, delta, adversary, adjacency=self.adjacency)

    def charge(
        self,
        event: Any,
        round: int | None = None,
        attempt: int = 0,
        examples: RoundEvent | None = None,
        expected_batch: float | None = None,
    ) -> bool:
        """Pay for a release, on disk before this returns; call it before the release.

        Args:
            event: a :class:`~privrec.privacy.events.RoundEvent`, or any event of dp-accounting.
            round: the next one by default; the ledger then signs by itself, every 256 charges, at
                its end and when it is closed. Else attempts at a round are numbered from 0, without
                gaps, and :meth:`seal` signs.
            examples: what the attempt costs each example of a device in it. It is entered first, in
                a unit of its own, and counts from the charge on: what a crash left without one was
                never collected.
            expected_batch: units that the training expects in the release; a report warns where
                that is more than the sampling rate of their number.

        Returns:
            False when this very attempt was paid for before: only the same bits may be released.

        Raises:
            BudgetError: when ε would be above the ledger's budget; nothing was charged.
            IntegrityError: for another charge of the attempt, or a gap.
            ReleaseRefused: when it could not be written, or the ledger has ended: nothing may be
                released.
        """
        event = RoundEvent.of(event)
        alone, round = round is None, self._next if round is None else round
        place, wanted = (round, attempt), Charge(round, attempt, event, examples, expected_batch)
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
        self._check_budget(event)
        if alone:
            self._check_writable()
            self._seals = True
        named = {"round": round, "attempt": attempt}
        if examples is not None and entered is None:
            own = {"kind": "examples", "unit": EXAMPLE, "event": examples.to_json()}
            self._append({**own, **named})
        batch = {} if expected_batch is None else {"expected_batch": float(expected_batch)}
        self._append({"kind": "charge", **named, "event": event.to_json(), **batch})
        if alone and self.entries - self.signed >= _SEAL_EVERY:
            self.seal()
        return True

    def attach(self, optimizer: Any, *, sample_rate: float) -> None:
        """Charge each step of a DP-SGD optimiser before its noisy gradient moves the model.

        It is for Opacus' ``DPOptimizer`` and for :class:`privrec.LazyDPSGD`. A hook that is there,
        such as that of a ``PrivacyEngine``, is called after the charge. A step that cannot be paid
        for raises, and leaves model and gradients without it.

        Charges record the optimiser's ``expected_batch_size``, by which a report sees that the rate
        is too low. A UserWarning says that Opacus' batches look like ones of a fixed size.

        Args:
            sample_rate: chance with which each unit is in a batch, by a coin of its own; 1 for
                batches that are drawn in any other way, where nothing is gained by sampling.

        Raises:
            UsageError: when a ``PrivacyEngine`` counts a higher rate for the optimiser.
        """
        steps = events.Steps(optimizer, sample_rate, self.adjacency)
        before: Callable[[Any], None] | None = optimizer.step_hook

        def hook(stepping: Any) -> None:
            try:
                event, batch = steps.cost(stepping)
                self.charge(event, expected_batch=batch)
            except BaseException:
                stepping.zero_grad()
                raise
            if before is not None:
                before(stepping)

        optimizer.attach_step_hook(hook)

    def _check_budget(self, event: RoundEvent) -> None:
        """Refuse an event that no accountant knows, or that would pass the header's budget."""
        if event.other is not None:
            for each in get_args(Adversary):
                events.epsilon([event], 1e-5, each, adjacency=self.adjacency)
        if self.header.get("budget") is None:
            return
        budget, delta = float(self.header["budget"]), float(self.header["delta"])
        after = self.counts + Counter([event])
        # More of the same fits in most cases, and then the next ones need no computation.
        more = self.counts[event] // 8
        while not after <= self._within:
            ahead = after + Counter({event: more})
            against, adjacency = self.header["against"], self.adjacency
            spent = events.epsilon(ahead, delta, against, adjacency=adjacency)
            if spent <= budget:
                self._within = ahead
            elif more:
                more //= 4
            else:
                raise BudgetError(
                    f"{self.path}: one more {event.mechanism} event would bring ε to {spent:g} at "
                    f"δ = {delta:g}, above the budget of {budget:g}; nothing was charged, so "
                    "release nothing more: what was released before stays within the budget"
                )

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

    def end(self, model: bytes = b"") -> None:
        """Say that the run is over and the digest of its last model, on disk before this returns.

        Without a digest nothing is said of what was released. From here on nothing is charged. An
        older copy of the ledger, with the head that was signed then, lacks this entry: so it shows
        that it is not the whole.
        """
        if self.ended not in (None, model):
            raise ReleaseRefused(
                f"{self.path}: the run ended with another model; restore the directory as it was"
            )
        if self.ended is None:
            self._append({"kind": "end", "model": model.hex()})
        if self.signed < self.entries:
            self.seal()

    def seal(self) -> None:
        """Sign the number of entries and the last hash, so that a cut end shows from here on.

        The head is replaced as a whole and durable before this returns, or ReleaseRefused raised.
        UsageError without the key, or when the ledger is open for reading only.
        """
        head = {"format": FORMAT, "entries": self.entries, "last_hash": self.last_hash}
        record = storage.canonical(storage.sign(_HEAD, head, self._check_writable())) + b"\n"
        for place in self._heads():
            try:
                storage.replace(place, record, mode=0o600 if place == self._kept else 0o666)
            except OSError as error:
                raise ReleaseRefused(
                    f"{place}: it could not be written ({error.strerror}); make room or mend the "
                    "disk, and resume"
                ) from error
        self.signed = self.entries

    def _check_writable(self) -> Ed25519PrivateKey:
        if self._key is None or not self._files:
            raise UsageError(
                f"{self.path}: sealing needs the signing key and a ledger opened for writing; "
                "open it with signing_key and repair=True"
            )
        return self._key

    def close(self) -> None:
        """Close the file; the ledger can still be read, but nothing charged any more."""
        if self._seals and self._files and self.signed < self.entries:
            self.seal()
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
            self._seals = False
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
            events.check_adjacency(self.adjacency)
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
            event, batch = RoundEvent.from_json(entry["event"]), entry.get("expected_batch")
            batch = None if batch is None else float(batch)
            charge = Charge(*key, event, self._examples.get(key), batch)
            self._charges[key] = charge
            self._next = max(self._next, charge.round + 1)
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
