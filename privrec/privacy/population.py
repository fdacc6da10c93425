"""The lifetime budget of a population: several runs over the same users, one limit on ε.

Whoever gets something from several runs over the same users learns what the composition of all
their events allows, whatever the runs were for: tuning counts. A *population ledger* ties them
together. Before a run touches any data it reserves all that it may charge; a reservation that would
take the lifetime ε over its limit is refused. A finished run gives back what it did not use, and
that is final: a restored copy of it goes on no more. What a crashed run reserved stays reserved.

The file lies beside the secrets (``state_dir()/populations/NAME.jsonl``), chained like a run's own
ledger. Its last line is the head, signed with the population's key, and it is replaced as a whole,
so that no part of it passes for the whole. Every run keeps the head as it left it: in its own
signed header, and with its secrets. A ledger that does not continue all of these is older than they
are, or another one, and is refused. A state folder that was set back as a whole shows nowhere.
"""

from __future__ import annotations

import fcntl
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from privrec import storage
from privrec.errors import BudgetError, IntegrityError, UsageError
from privrec.privacy.events import Adversary, RoundEvent, check_adversary, check_delta, epsilon
from privrec.randomness import state_dir
from privrec.storage import REMEDY, START, linked, parsed, server_key, verified

FORMAT = 1
_HEAD = "population head"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Counts = Counter[RoundEvent]


@dataclass(frozen=True)
class PopulationBalance:
    """Where a population stood when a run began, as the run's ledger keeps it.

    Attributes:
        population: name of the population ledger; None, as all but ``runs``, for a run of its own.
        runs: runs over the same users before this one: of the population ledger, or, without one,
            those that this machine's store has of the same data.
        epsilon: lifetime limit on ε; ``spent`` by all runs before, and ``reserved`` with this one.
        entries: of the population ledger once this run was in it; ``last_hash`` is of the last.
    """

    population: str | None = None
    runs: int = 0
    epsilon: float | None = None
    delta: float | None = None
    against: Adversary | None = None
    spent: float | None = None
    reserved: float | None = None
    entries: int = 0
    last_hash: str | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The balance of a header; TypeError or ValueError where it is none."""
        if set(values) != set(cls.__dataclass_fields__):
            raise TypeError(f"a balance with the keys {sorted(values)}")
        if type(values["runs"]) is not int or values["runs"] < 0:
            raise ValueError(f"{values['runs']!r} runs")
        return cls(**values)


@dataclass
class Population:
    """A population ledger: its limit, and what its ``runs`` have set aside or charged.

    ``content`` are the entries as the file has them, without its head, and ``hashes`` theirs. What
    runs that are ``settled`` charged is final.
    """

    path: Path
    name: str
    epsilon: float
    delta: float
    against: Adversary
    content: bytes = b""
    runs: dict[str, Counts] = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)
    settled: set[str] = field(default_factory=set)

    @property
    def counts(self) -> Counts:
        """All events of all runs, reservations included."""
        return sum(self.runs.values(), Counter())

    def spent(self) -> float:
        """ε of all runs so far."""
        return epsilon(self.counts, self.delta, self.against)

    def check_continues(self, entries: int, last_hash: str | None, source: str) -> None:
        """Raise IntegrityError for a ledger that lacks a head which ``source`` knows as signed."""
        if not 0 < entries <= len(self.hashes) or self.hashes[entries - 1] != last_hash:
            raise IntegrityError(
                f"{self.path}: {source} knows it with {entries} entries, which this is not a "
                "continuation of: it was cut, set back or begun anew; bring back the latest copy. "
                "A limit over the same users is never begun twice"
            )


def path_of(name: str) -> Path:
    """Where the ledger of a population lies; UsageError when it is no name for one."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"population {name!r}: a name has up to 64 letters, digits, dots, dashes and "
            "underscores and begins with a letter or digit; choose another"
        )
    return state_dir() / "populations" / f"{name}.jsonl"


def create(name: str, *, epsilon: float, delta: float, against: Adversary) -> Population:
    """Begin the ledger of a population with its limit on ε, durable before this returns.

    UsageError when there is, or was, one of that name, or a value is outside its range.
    """
    path = path_of(name)
    check_delta(delta)
    check_adversary(against)
    if not 0 < epsilon < float("inf"):
        raise UsageError(f"lifetime epsilon {epsilon}: it must be above 0 and finite; choose one")
    server_key(path.with_suffix(".key"))
    with _alone(path):
        runs = list(_known(name))
        if path.exists() or runs:
            found = "a ledger already" if path.exists() else f"had one, which {runs[0][0]} knows"
            raise UsageError(
                f"population {name!r}: it has {found}, and a limit is never taken back; see it "
                f"with: privrec population show {name}, or bring back the ledger that is gone"
            )
        limit = {"epsilon": epsilon, "delta": delta, "against": against}
        header = {"kind": "header", "format": FORMAT, "name": name, **limit}
        _append(Population(path, name, epsilon, delta, against), header)
    return read(name)


def read(name: str) -> Population:
    """The ledger of a population as it stands.

    UsageError when there is none of that name, or its key is gone; IntegrityError when it was
    altered, or is older than a run knows it.
    """
    path = path_of(name)
    known = list(_known(name))  # before the file, since a run may be entered in between
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(
            f"population {name!r}: it has no ledger here; make one with: "
            f"privrec population create {name} --epsilon 8 --delta 1e-6"
        ) from None
    key = server_key(path.with_suffix(".key"), new=False).public_key()
    *lines, head = content.splitlines(keepends=True) or [b""]
    population = _counted(path, lines)
    for place, record in [*known, (path, parsed(head))]:
        facts = verified(_HEAD, record, key, place)
        population.check_continues(facts["entries"], facts["last_hash"], str(place))
    if (facts["population"], facts["entries"]) != (name, len(lines)):  # of the file's own head
        raise IntegrityError(f"{path}: it is not what was signed for this name; {REMEDY}")
    return population


def reserve(name: str, run_id: str, planned: Counts) -> PopulationBalance:
    """Set aside the most that a run may charge in all; durable before this returns.

    Called again for the same run (to resume it), it sets aside the larger of both. The balance is
    for the run's own ledger. BudgetError, and nothing set aside, when the lifetime ε would be
    exceeded.
    """
    with _alone(read(name).path):
        population = read(name)
        if run_id in population.settled:
            raise _final(name, run_id)
        before = population.runs.pop(run_id, Counter())
        spent, others = population.spent(), len(population.runs)
        wanted = before | planned
        after = epsilon(population.counts + wanted, population.delta, population.against)
        if after > population.epsilon:
            raise BudgetError(
                f"population {name!r}: this run would bring its lifetime ε to {after:.4f}, and the "
                f"limit is {population.epsilon:g} ({others} runs spent {spent:.4f}); "
                "plan fewer rounds or more noise"
            )
        if wanted != before:
            _enter(population, "reserve", run_id, wanted)
        limit = population.epsilon, population.delta, population.against
        hashes = population.hashes
        return PopulationBalance(
            name, others, *limit, spent, after, entries=len(hashes), last_hash=hashes[-1]
        )


def settle(name: str, run_id: str, charged: Counts) -> None:
    """Replace what a run that has ended had set aside by what it charged, once and for all."""
    with _alone(read(name).path):
        population = read(name)
        reserved = population.runs.get(run_id)
        if reserved is None:
            raise UsageError(f"population {name!r}: the run {run_id} set nothing aside in it")
        if run_id in population.settled:
            if charged != reserved:
                raise _final(name, run_id)
            return
        if charged - reserved:
            raise IntegrityError(
                f"population {name!r}: the run {run_id} charged more than it had set aside; its "
                f"ledger or that of the population was altered; {REMEDY}"
            )
        _enter(population, "settle", run_id, charged)


@dataclass
class PopulationCharge:
    """What ties one run to its population: nothing is charged that is not set aside."""

    name: str
    run_id: str
    reserved: Counts

    @classmethod
    def of(cls, header: Mapping[str, Any], *, ended: bool) -> PopulationCharge | None:
        """The tie that the header of a run's ledger names, or None for a run of its own.

        Refused is what :func:`read` refuses, and, unless the run's own ledger says that it has
        ``ended``, a run that the population knows as ended.
        """
        balance, run_id = PopulationBalance.from_json(header["standing"]), header["run_id"]
        if balance.population is None:
            return None
        population = read(balance.population)
        population.check_continues(balance.entries, balance.last_hash, f"run {run_id}")
        if run_id in population.settled and not ended:
            raise _final(population.name, run_id)
        return cls(population.name, run_id, population.runs[run_id])

    def cover(self, counts: Counts) -> None:
        """Set more aside where rounds charged again go beyond it, or raise BudgetError."""
        if counts - self.reserved:
            reserve(self.name, self.run_id, counts)
            self.reserved |= counts

    def settle(self, counts: Counts) -> None:
        """Give back what a finished run set aside and did not charge."""
        settle(self.name, self.run_id, counts)


def _final(name: str, run_id: str) -> IntegrityError:
    return IntegrityError(
        f"population {name!r}: the run {run_id} has ended, and what it charged is final; this is "
        "an older copy of it. Bring back the directory as the run left it, or start a new run"
    )


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other writers off; the ledger is replaced as a whole, so its key is what is locked."""
    with path.with_suffix(".key").open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _known(name: str) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """The heads of a population that this machine's runs know, and where each lies."""
    for place in sorted((state_dir() / "runs").glob("*/population.json")):
        record = parsed(place.read_bytes())
        if record is None or record.get("population") == name:
            yield place, record


def _enter(population: Population, kind: str, run_id: str, counts: Counts) -> None:
    """Enter what a run sets aside or charged, and keep the head with the run's secrets."""
    events = [[event.to_json(), count] for event, count in counts.items()]
    head = _append(population, {"kind": kind, "run": run_id, "events": events})
    kept = state_dir() / "runs" / run_id / "population.json"
    kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    storage.replace(kept, head, mode=0o600)


def _append(population: Population, entry: Mapping[str, Any]) -> bytes:
    """Replace the file by one that has one more entry; its head, which is returned."""
    path, hashes = population.path, population.hashes
    previous = hashes[-1] if hashes else START
    line = storage.line_of({**entry, "index": len(hashes), "previous": previous})
    hashes.append(linked(path, line, hashes)["hash"])
    facts = {"population": population.name, "entries": len(hashes), "last_hash": hashes[-1]}
    key = server_key(path.with_suffix(".key"), new=False)
    head = storage.canonical(storage.sign(_HEAD, facts, key)) + b"\n"
    storage.replace(path, population.content + line + head, mode=0o600)
    return head


def _counted(path: Path, lines: Sequence[bytes]) -> Population:
    """What the lines of a population ledger add up to, each checked to follow the one before."""
    try:
        entry = linked(path, lines[0], [])
        if entry["kind"] != "header":
            raise ValueError(f"an entry of the kind {entry['kind']!r}")
        limit = entry["epsilon"], entry["delta"], entry["against"]
        population = Population(path, entry["name"], *limit, content=b"".join(lines))
        population.hashes.append(entry["hash"])
        for line in lines[1:]:
            entry = linked(path, line, population.hashes)
            if entry["kind"] not in ("reserve", "settle") or entry["run"] in population.settled:
                raise ValueError(f"an entry of the kind {entry['kind']!r}")
            if entry["kind"] == "settle":
                population.settled.add(entry["run"])
            population.runs[entry["run"]] = Counter(
                {RoundEvent.from_json(event): int(count) for event, count in entry["events"]}
            )
            population.hashes.append(entry["hash"])
    except (IndexError, KeyError, TypeError, ValueError, UsageError) as error:
        why = f"{path}: not the ledger of a population ({error!r}); {REMEDY}"
        raise IntegrityError(why) from None
    return population
