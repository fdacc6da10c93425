"""What a run tells while it goes: records, the log ``events.jsonl``, and who may watch.

`run.py` makes one `Record` a round and hands it to an `EventLog` (the file the report is built
from) and to an `Observer` (what somebody watches, see `console` and `tracking`). Losses and metrics
come from private data and are named "outside the guarantee" wherever they are kept. The realised
size of a cohort is written nowhere: amplification by sampling holds only while those sizes stay
with the operator.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Protocol, Self

from privrec.errors import DataError, ReleaseRefused

_LOG = logging.getLogger(__name__)

OUTSIDE: Final = "outside the guarantee"
"""The stamp of every loss and metric that is computed from private data without noise."""

OPERATOR_ONLY = frozenset({"cohort", "cohort_size", "cohorts"})
"""Names that no file and no tracking service may ever be given."""


@dataclass(frozen=True)
class RunInfo:
    """What is known before the first round, all of it public.

    Args:
        name: The scenario's name.
        title: One line for people; may be empty.
        rounds: Rounds of the whole run, at least 1.
        done: Rounds finished before this start (0, or more after a resume).
        population: Declared number of users.
        private: Whether noise is added at all.
        noise_known: Whether the noise comes from an injected root (then no ε holds).
        budget: The largest ε allowed, or None where the run has no limit.
        budget_against: The adversary whose ε the budget limits: "recipients" or "server".
        expected_cohort: Population times sampling rate; public, unlike the realised size.
        hides_cohorts: Whether ε rests on nobody knowing how many were in a round. Then no observer
            shows or keeps a realised size, or anything that tells a round's duration.
        simulated: Whether the devices are simulated.
        root_lost: Whether the noise root that the run began with is gone, so that rounds which are
            repeated get fresh noise and are charged again.
        examples: Whether devices add noise that hides single examples.
        example_budget: The largest example-level ε allowed, or None without a limit.
    """

    name: str
    rounds: int
    title: str = ""
    done: int = 0
    population: int | None = None
    private: bool = True
    noise_known: bool = False
    budget: float | None = None
    budget_against: str = "recipients"
    expected_cohort: float | None = None
    hides_cohorts: bool = True
    root_lost: bool = False
    examples: bool = False
    example_budget: float | None = None
    simulated: bool = True


@dataclass(frozen=True)
class Record:
    """One finished round.

    Args:
        round: Number of the round, counted from 1, so that the last one equals ``rounds``.
        rounds: Rounds of the whole run.
        attempt: Attempt at this round, counted from 0.
        epsilon: ε spent so far against the recipients of the models; None is infinite.
        epsilon_server: ε spent so far against somebody who knows every cohort; None is infinite.
        loss: Mean training loss of the cohort, or None. Outside the guarantee; a run that hides its
            cohorts has none.
        metrics: Metrics where this round was evaluated, such as ``hr@10``; else None.
            Outside the guarantee.
        wall_s: Wall-clock seconds of this round; 0 in a run that hides its cohorts.
        cpu_s: CPU seconds of this round; 0 likewise.
        cohort: Realised size of the cohort. Never written.
    """

    round: int
    rounds: int
    attempt: int = 0
    epsilon: float | None = None
    epsilon_server: float | None = None
    loss: float | None = None
    metrics: Mapping[str, float] | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0
    cohort: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as an event, without the cohort; what is not finite becomes null."""
        kept = {key: value for key, value in asdict(self).items() if key not in OPERATOR_ONLY}
        return {"type": "round", **{key: _finite(value) for key, value in kept.items()}}

    @classmethod
    def from_json(cls, event: Mapping[str, Any]) -> Self:
        """The record that `to_json` wrote; keys of later versions are ignored."""
        names = _read_names()
        return cls(**{key: value for key, value in event.items() if key in names})

    def spent(self, against: str) -> float | None:
        """ε spent so far against one adversary, "recipients" or "server"; None is infinite."""
        return self.epsilon_server if against == "server" else self.epsilon


@cache
def _read_names() -> frozenset[str]:
    return frozenset(field.name for field in fields(Record)) - OPERATOR_ONLY


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# --------------------------------------------------------------------------- the event log


class EventLog:
    """``events.jsonl``: one JSON object a line, appended and handed to the system at once.

    It is a log for people and for the report's plots; what was spent stands in the ledger. Opening
    a log whose last line was cut off by a crash drops that line.

    Args:
        path: The file; made when absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _drop_cut_off_tail(path)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def append(self, kind: str, **values: Any) -> None:
        """Write one event ``{"type": kind, …}``.

        Raises:
            ReleaseRefused: A value is named like a realised cohort size.
        """
        _refuse_operator_only(values)
        event = {"type": kind, **{key: _finite(value) for key, value in values.items()}}
        self._file.write(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def round(self, record: Record) -> None:
        """Write one round, without its cohort."""
        event = record.to_json()
        self.append(event.pop("type"), **event)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a log, oldest first; a last line cut off by a crash is left out.

    Raises:
        DataError: The file is absent, or a line other than the last is not a JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise DataError(
            f"{path}: there is no event log; a run directory holds one from its first round on. "
            "Name the directory that `privrec run` printed."
        ) from None
    *whole, tail = lines
    events = [_event(path, number, line) for number, line in enumerate(whole, 1) if line.strip()]
    return events + _complete(tail)


def read_rounds(path: Path) -> list[Record]:
    """The rounds of a log in order; of a round written twice (after a resume) the later line.

    Raises:
        DataError: As `read_events`, or a round event lacks its number.
    """
    latest: dict[int, Record] = {}
    for event in read_events(path):
        if event.get("type") == "round":
            record = _record(path, event)
            latest[record.round] = record
    return [latest[number] for number in sorted(latest)]


def _record(path: Path, event: Mapping[str, Any]) -> Record:
    try:
        return Record.from_json(event)
    except TypeError:
        raise DataError(
            f"{path}: the round event {dict(event)!r} lacks its round or rounds; "
            "events.jsonl is written by privrec alone. Restore the file, or resume the run."
        ) from None


def _event(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise DataError(
            f"{path}, line {number}: {line[:60]!r} is not a JSON object; each line is one event. "
            "Restore the file, or delete the line to lose that event from the plots."
        )
    return event


def _complete(tail: bytes) -> list[dict[str, Any]]:
    try:
        event = json.loads(tail)
    except ValueError:
        return []
    return [event] if isinstance(event, dict) else []


def _drop_cut_off_tail(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _refuse_operator_only(values: Mapping[str, Any]) -> None:
    named = sorted(OPERATOR_ONLY & values.keys())
    if named:
        raise ReleaseRefused(
            f"the event holds {named[0]!r}: realised cohort sizes are never written, since ε "
            "against recipients holds only while they are unknown. Leave the value out."
        )


# --------------------------------------------------------------------------- observers


class Finished(Protocol):
    """What `loop.Result` offers an observer at the end."""

    @property
    def path(self) -> Path:
        """The run directory."""
        ...

    @property
    def payload(self) -> Mapping[str, Any]:
        """The content of ``result.json``."""
        ...


class Observer(Protocol):
    """Something that watches a run. `close` is called last, whether the run ended well or not."""

    def started(self, info: RunInfo) -> None:
        """Called once, before the first round."""

    def round(self, record: Record) -> None:
        """Called after each round was recorded."""

    def finished(self, result: Finished) -> None:
        """Called once, after ``result.json`` was written."""

    def close(self) -> None:
        """Called last, also after an error; calling it twice is harmless."""


class NullObserver:
    """Watches nothing; also the base of observers that care for a part only."""

    def started(self, info: RunInfo) -> None:
        """Called once, before the first round."""

    def round(self, record: Record) -> None:
        """Called after each round was recorded."""

    def finished(self, result: Finished) -> None:
        """Called once, after ``result.json`` was written."""

    def close(self) -> None:
        """Called last, also after an error; calling it twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Observers(NullObserver):
    """Several observers as one, called in the order given."""

    def __init__(self, *observers: Observer) -> None:
        self._observers: Sequence[Observer] = observers

    def started(self, info: RunInfo) -> None:
        """Tell all of them that the run starts."""
        self._tell(lambda observer: observer.started(info))

    def round(self, record: Record) -> None:
        """Hand the round to all of them."""
        self._tell(lambda observer: observer.round(record))

    def finished(self, result: Finished) -> None:
        """Tell all of them that the run is done."""
        self._tell(lambda observer: observer.finished(result))

    def close(self) -> None:
        """Close all of them."""
        self._tell(lambda observer: observer.close())

    def _tell(self, news: Callable[[Observer], None]) -> None:
        """Tell all of them; one that fails is closed and left out, since the run has its ledger."""
        for observer in self._observers:
            try:
                news(observer)
            except (Exception, SystemExit) as error:  # rich exits where a pipe is closed
                self._observers = [each for each in self._observers if each is not observer]
                name, what = type(observer).__name__, type(error).__name__
                _LOG.warning("%s failed (%s: %s); the run goes on without it", name, what, error)
                with suppress(Exception, SystemExit):
                    observer.close()
