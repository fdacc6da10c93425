"""The loop: plan, charge, collect, release, apply, record; and how it stops and goes on.

Order is the promise: a round is charged on disk before anything is collected for it, and what it
releases is committed on disk before it is applied. So a crash can waste budget, never hide it.
"""

from __future__ import annotations

import logging
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from privrec.device.update import Aggregate, Counting, Order, Round, by_counts, digest
from privrec.errors import BudgetError, Interrupted, PrivrecError, ReleaseRefused
from privrec.privacy.events import Adversary, RoundEvent, epsilon
from privrec.privacy.ledger import PREPARATION, Ledger
from privrec.privacy.population import PopulationCharge
from privrec.randomness import SecretRoot
from privrec.run import checkpoint, costs, directory, summary
from privrec.run.checkpoint import Position
from privrec.run.directory import Identity
from privrec.run.plan import Plan
from privrec.run.privacy_plan import EXAMPLE_ADVERSARIES
from privrec.run.record import EventLog, Observer, Record, Result, RunInfo, adversary_text
from privrec.scenario.schema import Privacy
from privrec.server.server import Release, Server, released_sum
from privrec.workers import cpu_s

T = TypeVar("T")

MOST_ATTEMPTS = 20
"""Attempts at a round before a run is given up whose rounds keep ending without a sum."""

_LOG = logging.getLogger(__name__)


class Transport(Protocol):
    """Carries a round to the devices and brings back their sum."""

    def collect(self, round: Round, weights: NDArray[np.float32]) -> Aggregate:
        """Return the sum of the bounded updates of the round's cohort, and nothing per device.

        Asked for a round again, also for another attempt, it starts from the same private states.
        """


@dataclass
class Loop:
    """One run in ``out`` to its end, wherever its devices are: nothing is measured."""

    out: Path
    plan: Plan
    identity: Identity
    server: Server
    transport: Transport
    observer: Observer
    ledger: Ledger
    events: EventLog
    root: SecretRoot = field(init=False)
    cpu_s: float = field(default=0.0, init=False)
    gaps: dict[str, str] = field(default_factory=dict, init=False)
    began: float = field(default_factory=time.perf_counter, init=False)

    def __post_init__(self) -> None:
        self.root = self.identity.root("server")

    @property
    def wall_s(self) -> float:
        """Seconds of all sessions whose rounds are kept."""
        return time.perf_counter() - self.began

    @property
    def checkpoint_every(self) -> int:
        """Rounds between checkpoints: devices go on, and would refuse to go back."""
        return 1

    @property
    def stops_at_once(self) -> bool:
        """Whether Ctrl-C ends a round: what carries it over a network may have been stopped too."""
        return True

    def save(self) -> None:
        """Seal the ledger and write a checkpoint."""
        parts = self.identity, self.ledger, self.server
        checkpoint.save(self.out, *parts, wall_s=self.wall_s, cpu_s=self.cpu_s)

    def accuracy(self) -> dict[str, float] | None:
        """Return what is known of the accuracy after this round."""
        return None

    def payload(self) -> dict[str, Any]:
        """Return the content of ``result.json``; what is measured goes through :meth:`attempt`."""
        tiers = [costs.of_tier(self.plan, tier) for tier in self.plan.federation.tiers]
        parts = self.plan, self.server, self.ledger, self.identity
        return summary.result_of(*parts, tiers, wall_s=self.wall_s)

    def attempt(self, what: str, compute: Callable[[], T]) -> T | None:
        """Return what ``compute`` returns; None where it fails, and the gap is stated.

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

    def run(self, position: Position, *, resumed: bool = False) -> Result:
        """Go on from ``position`` to the end, or to an interrupt (Interrupted, with a checkpoint).

        Where a budget runs out before, the run is finished as far as it came; then a BudgetError.
        """
        server, ledger, rounds = self.server, self.ledger, self.plan.scenario.train.rounds
        position.check(ledger, self.out / checkpoint.FILE)
        self.began -= position.wall_s
        self.cpu_s += position.cpu_s
        info = self._info()
        if resumed:
            found = {"repaired": ledger.repaired, "noise_root_kept": not info.root_lost}
            self.events.append("resume", round=server.index, **found)
        self.observer.started(info)
        population = PopulationCharge.of(ledger.header, ended=ledger.ended is not None)
        refused: PrivrecError | OSError | None = None
        with self._interrupts() as stop:
            while server.index < rounds and ledger.ended != digest(server.released):
                try:
                    self._round(population)
                except BudgetError as error:
                    refused = error
                    break
                if stop:
                    self.save()
                    raise self._interrupted()
                if server.index % self.checkpoint_every == 0:
                    self.save()
        # Each step leaves enough for the next one: what has ended can be finished without a round.
        self.save()
        ledger.end(digest(server.released))
        try:
            if population:
                population.settle(ledger.counts)
        except (PrivrecError, OSError) as error:  # all that was set aside then counts as spent
            self.gaps["settlement with the population"] = str(error)
            refused = error
        result = self.finish()
        self.observer.finished(result)
        if refused:
            raise refused
        return result

    def finish(self) -> Result:
        """Write what a finished run leaves behind."""
        summary.write_model(self.out, self.server, self.plan.scenario)
        payload = self.payload() | {"gaps": self.gaps}
        payload = directory.write_result(self.out, payload, self.identity)
        self.events.append("end", round=self.server.index)
        return Result(self.out, payload)

    def _info(self) -> RunInfo:
        scenario, event = self.plan.scenario, self.plan.event
        return RunInfo(
            name=scenario.name,
            title=scenario.title,
            rounds=scenario.train.rounds,
            done=self.server.index,
            population=self.plan.users,
            simulated=self.identity.simulated,
            private=event.is_private,
            noise_known=self.identity.noise_known,
            budget=scenario.privacy.epsilon,
            budget_against=scenario.privacy.budget_against,
            expected_cohort=self.server.plan.expected_cohort,
            hides_cohorts=event.hides_cohorts,
            examples=EXAMPLE_ADVERSARIES.get(scenario.privacy.local),
            example_budget=scenario.privacy.local_epsilon,
            root_lost=self.ledger.header["noise_root"] != self.identity.root_tag(),
        )

    def _round(self, population: PopulationCharge | None) -> None:
        """Charge, collect and commit the next round, then apply and record it.

        Where it ends without a sum, or differs from what was committed, another attempt is charged.
        """
        began, cpu = time.perf_counter(), cpu_s()
        server, ledger = self.server, self.ledger
        attempt = max(0, ledger.attempts(server.index) - 1)
        release: Release | None = None
        while release is None:
            if attempt == ledger.attempts(server.index):  # it is not paid yet
                self._check_budgets(population)
            ledger.charge(server.plan.event, server.index, attempt, server.plan.examples)
            round = server.next_round(attempt)
            try:
                aggregate = self.transport.collect(round, server.weights)
            except ReleaseRefused:
                # How many devices were there is the operator's own knowledge: no reason is kept.
                self.events.append("aborted", round=round.index, attempt=attempt)
                if attempt + 1 >= MOST_ATTEMPTS:
                    raise
            else:
                made = server.release(round, aggregate, self.root)
                if ledger.committed(server.index, attempt) in (None, made.tag):
                    ledger.commit(server.index, attempt, made.tag)
                    release = made
            if release is None:
                attempt = ledger.attempts(server.index)
        server.apply(release)
        self.cpu_s += cpu_s() - cpu
        hides = server.plan.event.hides_cohorts
        metrics = self.attempt(f"accuracy after round {server.index}", self.accuracy)
        record = Record(
            round=server.index,
            rounds=self.plan.scenario.train.rounds,
            attempt=attempt,
            epsilon=self._epsilon("recipients"),
            epsilon_server=self._epsilon("server"),
            loss=None if hides else aggregate.loss,
            metrics=metrics,
            cohort=aggregate.cohort,
            wall_s=0.0 if hides else time.perf_counter() - began,
            cpu_s=0.0 if hides else cpu_s() - cpu,
        )
        self.events.round(record)
        self.observer.round(record)

    @contextmanager
    def _interrupts(self) -> Iterator[list[int]]:
        """A list that gets an entry at the first Ctrl-C; the second, or it, stops at once."""
        seen: list[int] = []

        def note(number: int, _: FrameType | None) -> None:
            seen.append(number)
            if self.stops_at_once or len(seen) > 1:
                raise KeyboardInterrupt

        try:
            before = signal.signal(signal.SIGINT, note)
        except ValueError:  # only the main thread may listen; elsewhere Ctrl-C is not ours
            yield seen
            return
        try:
            yield seen
        except KeyboardInterrupt:
            if not self.stops_at_once:
                raise
            # Whatever it ended in the midst of: the last checkpoint is whole.
            raise self._interrupted() from None
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupted(self) -> Interrupted:
        return Interrupted(
            f"stopped after round {self.server.index} of {self.plan.scenario.train.rounds}; "
            f"go on with: {directory.going_on(self.out)}"
        )

    def _check_budgets(self, population: PopulationCharge | None) -> None:
        plan, ledger, privacy = self.server.plan, self.ledger, self.plan.scenario.privacy
        done = self.server.index
        stopped = f"Stopped after {done} rounds; the model so far is in {self.out}"
        if not done:
            stopped = "No round released a sum, so there is no trained model"
        _check_budget(privacy, ledger, plan.event, f"round {done + 1}", stopped)
        if plan.examples is not None and privacy.local_epsilon is not None:
            # The cost of examples is never added to that of users.
            after = ledger.examples + Counter([plan.examples])
            spent = epsilon(after, privacy.local_delta, "server")
            if spent > privacy.local_epsilon:
                raise BudgetError(
                    f"round {done + 1} would bring the example-level ε to {spent:.4f}: "
                    f"privacy.local_epsilon is {privacy.local_epsilon}. {stopped}"
                )
        if population:
            population.cover(ledger.counts + Counter([plan.event]))

    def _epsilon(self, adversary: Adversary) -> float | None:
        if not self.plan.event.is_private or self.identity.noise_known:
            return None
        return self.ledger.epsilon(adversary, self.plan.scenario.privacy.delta)


def released_order(
    plan: Plan,
    counting: Counting,
    ledger: Ledger,
    identity: Identity,
    collect: Callable[[Round], NDArray[np.int64]],
) -> Order:
    """Release the order of the items by popularity, of which another attempt is charged first.

    As in a round, an attempt is charged before devices are asked, and committed before the order is
    used. ``collect`` gives the sum of what devices count in an attempt, with noise that they add.

    Raises:
        BudgetError: when an attempt would exceed the run's budget, or its population's.
        ReleaseRefused: when no attempt gave a sum.
    """
    root = identity.root("server")
    for attempt in range(ledger.attempts(PREPARATION), MOST_ATTEMPTS):
        lost = "No order of the items was released, so there is no trained model"
        privacy = plan.scenario.privacy
        _check_budget(privacy, ledger, counting.event, "another count of the items", lost)
        if population := PopulationCharge.of(ledger.header, ended=False):
            population.cover(ledger.counts + Counter([counting.event]))
        ledger.charge(counting.event, PREPARATION, attempt)
        round = counting.round(identity.run_id, attempt, plan.digest)
        try:
            total = collect(round)
        except ReleaseRefused:
            continue
        release = released_sum(round, total, counting.bound, root)
        ledger.commit(PREPARATION, attempt, release.tag)
        return by_counts(release.total)
    raise ReleaseRefused(
        f"{MOST_ATTEMPTS} counts of the items ended without a sum: there is no order to train by; "
        "see which devices drop out, and start a new run"
    )


def _check_budget(
    privacy: Privacy, ledger: Ledger, event: RoundEvent, what: str, stopped: str
) -> None:
    """Refuse what would exceed the run's own budget, before it is charged."""
    if not event.is_private or privacy.epsilon is None:
        return
    against = privacy.budget_against
    spent = ledger.epsilon_after(event, delta=privacy.delta, adversary=against)
    if spent > privacy.epsilon:
        raise BudgetError(
            f"{what} would bring ε to {spent:.4f} against {adversary_text(against)}: the budget is "
            f"{privacy.epsilon}. {stopped}"
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: batches fit one core's cache, and sums must not depend on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
