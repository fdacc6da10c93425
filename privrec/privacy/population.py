"""The lifetime budget of a population: several runs over the same users, one limit on ε.

A run knows its own ledger. What somebody learns who gets something from several runs over the same
users is bounded by the composition of all their events, whatever the runs were for: tuning counts.
A *population ledger* ties them together. Before a run touches any data it reserves all that it may
charge; a reservation that would take the lifetime ε over its limit is refused. A finished run gives
back what it did not use. What a crashed run reserved stays reserved.

The file lies beside the secrets (``state_dir()/populations/NAME.jsonl``), one entry a line, each
chained to the hash of the one before like a run's own ledger.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from privrec.errors import BudgetError, IntegrityError, UsageError
from privrec.privacy.book import REMEDY, START, line_of, parsed
from privrec.privacy.events import (
    Adversary,
    RoundEvent,
    check_adversary,
    check_delta,
    epsilon,
)
from privrec.randomness import state_dir, sync_directory

FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Counts = Counter[RoundEvent]


@dataclass(frozen=True)
class Standing:
    """Where a population stood when a run began, as the run's ledger keeps it.

    Args:
        population: name of the population ledger; None for a run that is tied to none.
        runs: runs over the same users before this one: of the population ledger, or, without one,
            those that this machine's store has of the same data.
        epsilon: lifetime limit; None without a population ledger.
        delta: δ of that limit.
        against: the adversary of that limit.
        spent: ε of all runs before this one, at ``delta``.
        reserved: ε with all that this run may charge.
    """

    population: str | None = None
    runs: int = 0
    epsilon: float | None = None
    delta: float | None = None
    against: Adversary | None = None
    spent: float | None = None
    reserved: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The standing as plain JSON values."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The standing that :meth:`to_json` wrote.

        Raises:
            TypeError: when a key is missing or unknown.
            ValueError: when a value is of another kind.
        """
        if set(values) != set(cls.__dataclass_fields__):
            raise TypeError(f"a standing with the keys {sorted(values)}")
        if type(values["runs"]) is not int or values["runs"] < 0:
            raise ValueError(f"{values['runs']!r} runs")
        return cls(**values)


@dataclass
class Population:
    """A population ledger.

    Args:
        path: its file.
        name: of the population.
        epsilon: lifetime limit on ε.
        delta: δ of that limit.
        against: whom the limit is against.
        runs: events reserved or charged, by run.
        hashes: of the entries.
    """

    path: Path
    name: str
    epsilon: float
    delta: float
    against: Adversary
    runs: dict[str, Counts] = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)

    @property
    def counts(self) -> Counts:
        """All events of all runs."""
        return sum(self.runs.values(), Counter())

    def spent(self) -> float:
        """ε of all runs so far, reservations included."""
        return epsilon(self.counts, self.delta, self.against)


def path_of(name: str) -> Path:
    """Where the ledger of a population lies.

    Raises:
        UsageError: when it is no name for one.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"population {name!r}: a name has up to 64 letters, digits, dots, dashes and "
            "underscores and begins with a letter or digit; choose another"
        )
    return state_dir() / "populations" / f"{name}.jsonl"


def create(name: str, *, epsilon: float, delta: float, against: Adversary) -> Population:
    """Begin the ledger of a population, durable before this returns.

    Args:
        name: of the population.
        epsilon: lifetime limit on ε, above 0.
        delta: δ of that limit, in [1e-10, 1).
        against: ``"recipients"`` or ``"server"``.

    Raises:
        UsageError: when there is one of that name, or a value is outside its range.
    """
    path = path_of(name)
    check_delta(delta)
    check_adversary(against)
    if not 0 < epsilon < float("inf"):
        raise UsageError(f"lifetime epsilon {epsilon}: it must be above 0 and finite; choose one")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UsageError(
            f"population {name!r}: it has a ledger already, and a limit is never taken back; see "
            f"it with: privrec population show {name}"
        ) from None
    entry = {
        "kind": "header", "format": FORMAT, "name": name, "epsilon": epsilon, "delta": delta,
        "against": against, "index": 0, "previous": START,
    }  # fmt: skip
    with os.fdopen(descriptor, "wb") as file:
        _append(file, entry)
    sync_directory(path.parent)
    return read(name)


def read(name: str) -> Population:
    """The ledger of a population as it stands.

    Raises:
        UsageError: when there is none of that name.
        IntegrityError: when it was altered.
    """
    path = path_of(name)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(
            f"population {name!r}: it has no ledger here; make one with: "
            f"privrec population create {name} --epsilon 8 --delta 1e-6"
        ) from None
    return _parsed(path, content)


def reserve(name: str, run_id: str, planned: Counts) -> Standing:
    """Set aside all that a run may charge, or refuse the run; durable before this returns.

    Called again for the same run (to resume it), it sets aside the larger of both.

    Args:
        name: of the population.
        run_id: the run.
        planned: the most that it may charge in all.

    Returns:
        Where the population stands, for the run's own ledger.

    Raises:
        BudgetError: when the lifetime ε would be exceeded; nothing is reserved.
        UsageError: when there is no such population.
        IntegrityError: when its ledger was altered.
    """
    with _locked(name) as (population, file):
        before = population.runs.pop(run_id, Counter())
        spent = population.spent()
        others, wanted = population.counts, before | planned
        after = epsilon(others + wanted, population.delta, population.against)
        if after > population.epsilon:
            raise BudgetError(
                f"population {name!r}: this run would bring its lifetime ε to {after:.4f}, and the "
                f"limit is {population.epsilon:g} ({len(population.runs)} runs spent {spent:.4f}); "
                "plan fewer rounds or more noise"
            )
        if wanted != before:
            _write(population, file, "reserve", run_id, wanted)
        return Standing(
            name, len(population.runs), population.epsilon, population.delta, population.against,
            spent, after,
        )  # fmt: skip


def settle(name: str, run_id: str, charged: Counts) -> None:
    """Replace what a finished run had set aside by what it charged.

    Raises:
        UsageError: when the run had set nothing aside, or there is no such population.
        IntegrityError: when the ledger was altered, or the run charged what it had not set aside.
    """
    with _locked(name) as (population, file):
        reserved = population.runs.get(run_id)
        if reserved is None:
            raise UsageError(f"population {name!r}: the run {run_id} set nothing aside in it")
        if charged - reserved:
            raise IntegrityError(
                f"population {name!r}: the run {run_id} charged more than it had set aside; its "
                f"ledger or that of the population was altered; {REMEDY}"
            )
        if charged != reserved:
            _write(population, file, "settle", run_id, charged)


@dataclass
class Tie:
    """What ties one run to its population: nothing is charged that is not set aside.

    Args:
        name: of the population.
        run_id: the run.
        reserved: what it has set aside.
    """

    name: str
    run_id: str
    reserved: Counts

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> Tie | None:
        """The tie that a run's ledger names, or None for a run of its own.

        Raises:
            UsageError: when the population's ledger is gone.
            IntegrityError: when it was altered.
        """
        name = header.get("standing", {}).get("population")
        if name is None:
            return None
        run_id = header["run_id"]
        return cls(name, run_id, read(name).runs.get(run_id, Counter()))

    def cover(self, counts: Counts) -> None:
        """Set more aside where ``counts`` go beyond it: rounds that had to be charged again.

        Raises:
            BudgetError: when the lifetime limit does not allow it.
        """
        if counts - self.reserved:
            reserve(self.name, self.run_id, counts)
            self.reserved |= counts

    def settle(self, counts: Mapping[RoundEvent, int]) -> None:
        """Give back what a finished run set aside and did not charge."""
        settle(self.name, self.run_id, Counter(counts))


@contextmanager
def _locked(name: str) -> Iterator[tuple[Population, Any]]:
    """A population that nobody else writes to, and its file, to append to."""
    path = read(name).path
    with path.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        population = _parsed(path, file.read())
        yield population, file


def _write(population: Population, file: Any, kind: str, run_id: str, counts: Counts) -> None:
    events = [[event.to_json(), count] for event, count in counts.items()]
    entry = {
        "kind": kind, "run": run_id, "events": events, "index": len(population.hashes),
        "previous": population.hashes[-1],
    }  # fmt: skip
    file.seek(0, os.SEEK_END)
    _append(file, entry)


def _append(file: Any, entry: Mapping[str, Any]) -> None:
    file.write(line_of(entry))
    file.flush()
    os.fsync(file.fileno())


def _parsed(path: Path, content: bytes) -> Population:
    lines = content.split(b"\n")
    # A last line that a crash cut off reserved nothing: its run never began.
    entries = [_entry(path, number, line) for number, line in enumerate(lines[:-1], 1)]
    try:
        header = entries[0]
        population = Population(
            path, header["name"], header["epsilon"], header["delta"], header["against"]
        )
        for entry in entries:
            _count(population, entry)
    except (IndexError, KeyError, TypeError, ValueError, UsageError) as error:
        raise IntegrityError(
            f"{path}: not the ledger of a population ({error!r}); {REMEDY}"
        ) from None
    if lines[-1]:
        raise IntegrityError(
            f"{path}: its last line was cut off by a crash; the run that it was for never began. "
            "Remove that line"
        )
    return population


def _entry(path: Path, number: int, line: bytes) -> dict[str, Any]:
    entry = parsed(line)
    if entry is None or line_of({k: v for k, v in entry.items() if k != "hash"}) != line + b"\n":
        raise IntegrityError(f"{path}: line {number} was altered; {REMEDY}")
    return entry


def _count(population: Population, entry: Mapping[str, Any]) -> None:
    previous = population.hashes[-1] if population.hashes else START
    if entry["index"] != len(population.hashes) or entry["previous"] != previous:
        raise ValueError(f"line {len(population.hashes) + 1} does not follow the one before")
    population.hashes.append(entry["hash"])
    if entry["kind"] == "header" and len(population.hashes) == 1:
        return
    if entry["kind"] not in ("reserve", "settle"):
        raise ValueError(f"an entry of the kind {entry['kind']!r}")
    population.runs[entry["run"]] = Counter(
        {RoundEvent.from_json(event): int(count) for event, count in entry["events"]}
    )
