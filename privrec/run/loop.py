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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from privrec.device.update import (
    Aggregate,
    Counting,
    Evaluating,
    Order,
    Round,
    SideSum,
    by_counts,
    digest,
    model_digests,
)
from privrec.errors import BudgetError, Interrupted, PrivrecError, ReleaseRefused
from privrec.privacy.events import Adversary, RoundEvent, epsilon
from privrec.privacy.ledger import Ledger
from privrec.privacy.population import PopulationCharge
from privrec.randomness import SecretRoot
from privrec.run import checkpoint, costs, directory, summary
from privrec.run.checkpoint import Position
from privrec.run.directory import Identity
from privrec.run.plan import Plan
from privrec.run.privacy_plan import EXAMPLE_ADVERSARIES
from privrec.run.record import (
    EventLog,
    Observer,
    Record,
    Result,
    RunInfo,
    adversary_text,
    last_event,
)
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
class Loop(ABC):
    """One run in ``out`` to its end, wherever its devices are: nothing is measured.

    ``figures`` are those of the secure sum of an evaluation, where one was released.
    """

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
    figures: list[float] | None = field(default=None, init=False)
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

    @abstractmethod
    def summed_figures(self, evaluating: Evaluating, round: Round) -> NDArray[np.int64]:
        """Return the sum of what devices find of the released model; ReleaseRefused without one."""

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
        metrics, intervals = self.summed()
        measured = {"metrics": metrics, "intervals": intervals}
        return summary.result_of(*parts, tiers, wall_s=self.wall_s) | measured

    def summed(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Return the metrics that were released, and what noise leaves open; none is no error."""
        plan, figures = self.plan, self.figures
        nothing = dict[str, float](), dict[str, list[float]]()
        if figures is None or plan.evaluating is None:
            return nothing
        found = partial(summary.summed_metrics, plan, plan.evaluating, figures)
        return self.attempt("metrics of the secure sum", found) or nothing

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
            # Each step leaves enough for the next one: what has ended can be finished without any.
            self.save()
            if (evaluating := self.plan.evaluating) is not None and server.index:
                release = partial(self._evaluation, evaluating, population)
                self.figures = self.attempt("the secure sum of metrics", release)
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

    def _evaluation(
        self, evaluating: Evaluating, population: PopulationCharge | None
    ) -> list[float]:
        """Release the figures of the last model, if the run did not before it was interrupted."""
        found = last_event(self.out / directory.EVENTS, "evaluation")
        if found is None:
            plan, server, ledger = self.plan, self.server, self.ledger
            if ledger.ended is not None:
                raise ReleaseRefused("the run ended without it, and is charged no more")
            model = model_digests(server.released, plan.federation.layouts)

            def round(attempt: int) -> Round:
                return evaluating.round(self.identity.run_id, attempt, plan.digest, model)

            collect = partial(self.summed_figures, evaluating)
            what = "the evaluation", "The model is there, and its accuracy is not known"
            sides = evaluating, round, collect, what
            parts = plan, ledger, self.identity, population
            found = {"sums": (released_beside(*parts, *sides) / evaluating.step).tolist()}
            self.events.append("evaluation", round=server.index, **found)
        return [float(each) for each in found["sums"]]

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
        kept = self._kept_back()
        _check_budget(privacy, ledger, [plan.event, *kept], f"round {done + 1}", stopped)
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
            population.cover(ledger.counts + Counter([plan.event, *kept]))

    def _kept_back(self) -> list[RoundEvent]:
        """What rounds leave of the budget for the evaluation after them."""
        evaluating = self.plan.evaluating
        due = evaluating and not self.ledger.attempts(evaluating.index)
        return [evaluating.event] if evaluating and due else []

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
    """Release the order of the items by popularity; see :func:`released_beside`."""
    what = "another count of the items", "There is no order of the items to train by"
    population = PopulationCharge.of(ledger.header, ended=False)

    def round(attempt: int) -> Round:
        return counting.round(identity.run_id, attempt, plan.digest)

    sides = counting, round, collect, what
    return by_counts(released_beside(plan, ledger, identity, population, *sides))


def released_beside(
    plan: Plan,
    ledger: Ledger,
    identity: Identity,
    population: PopulationCharge | None,
    wanted: SideSum,
    round_of: Callable[[int], Round],
    collect: Callable[[Round], NDArray[np.int64]],
    said: tuple[str, str],
) -> NDArray[np.int64]:
    """Release a sum beside the rounds, of which another attempt is charged first.

    As in a round, an attempt is charged before devices are asked, and committed before the sum is
    used. ``collect`` gives what devices put in in an attempt, with noise that they add; ``said``
    are words for the sum and for what is lost without it.

    Raises:
        BudgetError: when an attempt would exceed the run's budget, or its population's.
        ReleaseRefused: when no attempt gave a sum.
    """
    root, index, (what, lost) = identity.root("server"), round_of(0).index, said
    for attempt in range(ledger.attempts(index), MOST_ATTEMPTS):
        _check_budget(plan.scenario.privacy, ledger, [wanted.event], what, lost)
        if population:
            population.cover(ledger.counts + Counter([wanted.event]))
        ledger.charge(wanted.event, index, attempt)
        round = round_of(attempt)
        try:
            total = collect(round)
        except ReleaseRefused:
            continue
        release = released_sum(round, total, wanted.bound, root)
        ledger.commit(index, attempt, release.tag)
        return release.total
    raise ReleaseRefused(
        f"{MOST_ATTEMPTS} attempts at {what} ended without a sum. {lost}: see which devices drop "
        "out, and start a new run"
    )


def _check_budget(
    privacy: Privacy, ledger: Ledger, events: Sequence[RoundEvent], what: str, stopped: str
) -> None:
    """Refuse what would exceed the run's own budget, before it is charged."""
    if not events[0].is_private or privacy.epsilon is None:
        return
    against = privacy.budget_against
    spent = epsilon(ledger.counts + Counter(events), privacy.delta, against)
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
