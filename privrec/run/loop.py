"""The loop: plan, charge, collect, release, apply, record; and how it stops and goes on.

Order is the promise: a round is charged on disk before anything is collected for it, and what it
releases is committed on disk before it is applied. So a crash can waste budget, never hide it.
"""

from __future__ import annotations

import logging
import signal
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from privrec.device.update import Aggregate, Round, digest
from privrec.errors import BudgetError, Interrupted, PrivrecError, ReleaseRefused
from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.ledger import Ledger
from privrec.privacy.population import PopulationCharge
from privrec.randomness import SecretRoot
from privrec.run import directory
from privrec.run.checkpoint import Position
from privrec.run.identity import Identity
from privrec.run.record import EventLog, Observer, Record, RunInfo
from privrec.run.simulation import Transport
from privrec.run.summary import write_model
from privrec.run.wording import adversary_text
from privrec.scenario.load import Scenario
from privrec.server.server import Release, Server

T = TypeVar("T")

MOST_ATTEMPTS = 20
"""Attempts at a round before a run is given up whose rounds keep ending without a sum."""


_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """A finished run: its directory, and what ``result.json`` there holds."""

    path: Path
    payload: dict[str, Any]


@dataclass
class Loop(ABC):
    """One run from where it stands to its end.

    Args:
        out: the run's directory.
        scenario: what is run.
        population: devices that are enrolled, public.
        identity: name and secrets of the run.
        server: at its next round.
        transport: reaches the devices.
        observer: is told of the start, every round and the end.
        ledger: is charged before each round.
        events: what happened, in order.
    """

    out: Path
    scenario: Scenario
    population: int
    identity: Identity
    server: Server
    transport: Transport
    observer: Observer
    ledger: Ledger
    events: EventLog
    root: SecretRoot = field(init=False)
    tie: PopulationCharge | None = field(init=False)
    cpu_s: float = 0.0
    gaps: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.root = self.identity.root("server")
        self.tie = PopulationCharge.of(self.ledger.header, ended=self.ledger.ended is not None)

    @property
    def wall_s(self) -> float:
        """Seconds that the run took so far, over all sessions whose rounds are kept."""
        return time.perf_counter() - self.began

    def continue_clocks(self, position: Position) -> None:
        """Count on from the seconds that the checkpoint has."""
        self.began -= position.wall_s
        self.cpu_s += position.cpu_s

    def info(self) -> RunInfo:
        """What is told at the start."""
        scenario, plan = self.scenario, self.server.plan
        return RunInfo(
            name=scenario.name,
            title=scenario.title,
            rounds=scenario.train.rounds,
            done=self.server.index,
            population=self.population,
            simulated=self.identity.simulated,
            private=plan.event.is_private,
            noise_known=self.identity.known_key is not None,
            budget=scenario.privacy.epsilon,
            budget_against=scenario.privacy.budget_against,
            expected_cohort=plan.expected_cohort,
            hides_cohorts=plan.event.hides_cohorts,
            examples=plan.examples is not None,
            example_budget=scenario.privacy.local_epsilon,
            root_lost=self.ledger.header["noise_root"] != self.identity.root_tag(),
        )

    @property
    def checkpoint_every(self) -> int:
        """Rounds between checkpoints."""
        return self.scenario.run.checkpoint_every

    @abstractmethod
    def accuracy(self) -> dict[str, float] | None:
        """What is known of the accuracy after this round."""

    @abstractmethod
    def save(self) -> None:
        """Seal the ledger and write a checkpoint."""

    @abstractmethod
    def payload(self) -> dict[str, Any]:
        """The content of ``result.json``; what only measures goes through :meth:`attempt`."""

    def attempt(self, what: str, compute: Callable[[], T]) -> T | None:
        """What ``compute`` returns; None where it fails, and the gap is stated.

        The budget is spent by then: a figure that cannot be had must not take the model with it.
        Only the type of an unforeseen error is kept, since its text may quote private data.
        """
        try:
            found = compute()
        except Exception as error:
            foreseen = isinstance(error, PrivrecError)
            self.gaps[what] = str(error) if foreseen else type(error).__name__
            _LOG.warning("%s is missing: %s", what, self.gaps[what], exc_info=not foreseen)
            return None
        self.gaps.pop(what, None)
        return found

    def finish(self) -> Result:
        """Write what a finished run leaves behind.

        With gaps the checkpoint stays, so that ``resume`` can try again to fill them.
        """
        write_model(self.out, self.server, self.scenario)
        payload = {**self.payload(), "gaps": self.gaps}
        payload = directory.leave(self.out, payload, self.identity)
        self.events.append("end", round=self.server.index)
        return Result(self.out, payload)

    def run(self) -> Result:
        """Go on to the end, the budget or an interrupt; a checkpoint is written in any case."""
        server = self.server
        refused: PrivrecError | OSError | None = None
        with _interrupts() as stop:
            while server.index < self.scenario.train.rounds and not self._at_end():
                try:
                    self._round()
                except BudgetError as error:
                    refused = error
                    break
                if stop:
                    self.save()
                    raise Interrupted(
                        f"stopped after round {server.index} of {self.scenario.train.rounds}; "
                        f"go on with: privrec resume {self.out}"
                    )
                if server.index % self.checkpoint_every == 0:
                    self.save()
        # Each step leaves enough for the next one: what has ended can be finished without a round.
        self.save()
        self.ledger.end(digest(server.released))
        self.ledger.seal()
        try:
            if self.tie:
                self.tie.settle(self.ledger.counts)
        except (PrivrecError, OSError) as error:  # all that was set aside then counts as spent
            self.gaps["settlement with the population"] = str(error)
            refused = error
        result = self.finish()
        self.observer.finished(result)
        if refused:
            raise refused
        return result

    def _at_end(self) -> bool:
        """Whether the run ended here before, at its last round or at its budget."""
        return self.ledger.ended == digest(self.server.released)

    def _round(self) -> None:
        began, cpu = time.perf_counter(), time.process_time()
        server = self.server
        release, cohort, loss, attempt = self._release()
        server.apply(release)
        self.cpu_s += time.process_time() - cpu
        record = Record(
            round=server.index,
            rounds=self.scenario.train.rounds,
            attempt=attempt,
            epsilon=self._epsilon("recipients"),
            epsilon_server=self._epsilon("server"),
            loss=None if server.plan.event.hides_cohorts else loss,
            metrics=self.attempt(f"accuracy after round {server.index}", self.accuracy),
            cohort=cohort,
            **self._timing(began, cpu),
        )
        self.events.round(record)
        self.observer.round(record)

    def _release(self) -> tuple[Release, int, float | None, int]:
        """Charge, collect and commit the next round, with a new attempt where bits would differ."""
        server, ledger = self.server, self.ledger
        attempt = max(0, ledger.attempts(server.index) - 1)
        while True:
            self._charge(attempt)
            round = server.next_round(attempt)
            if aggregate := self._collect(round):
                release = server.release(round, aggregate, self.root)
                if ledger.committed(server.index, attempt) in (None, release.tag):
                    ledger.commit(server.index, attempt, release.tag)
                    return release, aggregate.cohort, aggregate.loss, attempt
            attempt = ledger.attempts(server.index)

    def _collect(self, round: Round) -> Aggregate | None:
        """The round's sum, or None when it ended without one; it stays charged."""
        try:
            return self.transport.collect(round, self.server.weights)
        except ReleaseRefused:
            # How many devices were there is the operator's own knowledge: no reason is kept.
            self.events.append("aborted", round=round.index, attempt=round.attempt)
            if round.attempt + 1 >= MOST_ATTEMPTS:
                raise
            return None

    def _charge(self, attempt: int) -> None:
        server, privacy = self.server, self.scenario.privacy
        event = server.plan.event
        paid = attempt < self.ledger.attempts(server.index)
        if not paid and event.is_private and privacy.epsilon is not None:
            spent = self.ledger.epsilon_after(
                event, delta=privacy.delta, adversary=privacy.budget_against
            )
            if spent > privacy.epsilon:
                raise BudgetError(
                    f"round {server.index + 1} would bring ε to {spent:.4f} against "
                    f"{adversary_text(privacy.budget_against)}: the budget is {privacy.epsilon}. "
                    f"Stopped after {server.index} rounds; the model so far is in {self.out}"
                )
        examples = server.plan.examples
        if examples is not None:
            self._charge_examples(attempt, examples, paid)
        if not paid and self.tie:
            self.tie.cover(Counter(self.ledger.counts) + Counter([event]))
        self.ledger.charge(server.index, attempt, event)

    def _charge_examples(self, attempt: int, event: RoundEvent, paid: bool) -> None:
        """Enter the example-level cost, within its own budget; it is never added to the other."""
        index, privacy = self.server.index, self.scenario.privacy
        if not paid and privacy.local_epsilon is not None:
            after = Counter(self.ledger.examples) + Counter([event])
            spent = epsilon(after, privacy.local_delta, "server")
            if spent > privacy.local_epsilon:
                raise BudgetError(
                    f"round {index + 1} would bring the example-level ε to {spent:.4f}: "
                    f"privacy.local_epsilon is {privacy.local_epsilon}. Stopped after {index} "
                    f"rounds; the model so far is in {self.out}"
                )
        self.ledger.charge_examples(index, attempt, event)

    def _epsilon(self, adversary: Any) -> float | None:
        if not self.server.plan.event.is_private or self.identity.known_key is not None:
            return None
        return self.ledger.epsilon(self.scenario.privacy.delta, adversary)

    def _timing(self, began: float, cpu: float) -> dict[str, float]:
        if self.server.plan.event.hides_cohorts:
            return {}
        return {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}


@contextmanager
def one_thread() -> Iterator[None]:
    """Batches fit one core's cache, and sums must not depend on how threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that gets an entry at the first Ctrl-C; the second one stops at once."""
    seen: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # only the main thread may listen; elsewhere Ctrl-C is not ours
        yield seen
        return
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
