"""The loop: plan, charge, collect, release, apply, record; and how it stops and goes on.

Order is the promise: a round is charged on disk before anything is collected for it, and what it
releases is committed on disk before it is applied. So a crash can waste budget, never hide it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from privrec import catalogue, checkpoint, data, metrics, rundir
from privrec.assembly import Parts, assemble, check_tiers, data_digest
from privrec.checkpoint import Position
from privrec.data import Split
from privrec.device.round import Round
from privrec.device.update import Aggregate
from privrec.errors import BudgetError, Interrupted, ReleaseRefused
from privrec.identity import Identity
from privrec.outcome import result_of, write_model
from privrec.privacy.ledger import Ledger
from privrec.randomness import SecretRoot, sync_directory
from privrec.record import EventLog, Observer, Record, RunInfo
from privrec.scenario import Scenario, load
from privrec.scoring import Judge
from privrec.server.server import Release
from privrec.wording import adversary_text

MOST_ATTEMPTS = 20
"""Attempts at a round before a run is given up whose rounds keep ending without a sum."""


@dataclass(frozen=True)
class Result:
    """A finished run: its directory, and what ``result.json`` there holds."""

    path: Path
    payload: dict[str, Any]


def start(
    scenario: Scenario,
    *,
    out: Path,
    data_dir: Path | None = None,
    observer: Observer,
    unsafe_noise_key: bytes | None = None,
) -> Result:
    """Run a scenario from its beginning.

    Everything that can be refused is refused before ``out`` exists; ``out`` appears whole, with its
    ledger and first checkpoint.

    Args:
        scenario: what to run.
        out: the run's new directory.
        data_dir: where the data lies, before the scenario's own path.
        observer: is told of the start, every round and the end.
        unsafe_noise_key: a noise root that others know, for runs that must repeat bit for bit. The
            run then protects nobody and says so.

    Raises:
        UsageError: when ``out`` is taken or the scenario cannot be run on this data.
        DataError: when the data is malformed.
        BudgetError: when the budget ran out before the planned rounds; the run is finished as far
            as it came.
        Interrupted: on Ctrl-C, after a checkpoint.
    """
    rundir.refuse_taken(out)
    split = data.load(scenario.data, data_dir=data_dir)
    rundir.check_population(scenario, split.train.n_users)
    check_tiers(scenario, split.train)
    identity = Identity.new(scenario, split, data_dir, unsafe_noise_key)
    with identity.forgotten_unless(out), rundir.appearing(out) as folder:
        rundir.write_json(folder / "run.json", identity.to_json())
        checkpoint.replace(folder / "scenario.toml", scenario.to_toml().encode())
        header = {
            "run_id": identity.run_id,
            "scenario_hash": scenario.hash(),
            "privacy_hash": scenario.privacy_hash(),
            "delta": scenario.privacy.delta,
            "population": split.train.n_users,
            "noise_known": identity.known_key is not None,
            "noise_root": identity.root_tag(),
        }
        with Ledger.create(
            folder / "ledger.jsonl", header=header, signing_key=identity.signing_key(new=True)
        ) as ledger:
            server, devices = identity.root("server"), identity.root("devices")
            split = catalogue.numbered(scenario, split, ledger, folder, server, devices)
            parts = assemble(scenario, split.train, identity.run_id, devices)
            digest = data_digest(split.train)
            position = rundir.save(folder, parts, identity, scenario, ledger, digest)
        with EventLog(folder / "events.jsonl") as events:
            events.append("start", run_id=identity.run_id, simulated=True)
    sync_directory(out.parent)
    return _go_on(out, scenario, split, identity, parts, observer, position)


def resume(out: Path, *, data_dir: Path | None = None, observer: Observer) -> Result:
    """Go on with a run from its last checkpoint, or give the result of a finished one.

    With the noise root the run repeats its bits: rounds that were charged and lost are made again
    at no cost. Without it, or where a repeated round would release anything else, a new attempt is
    charged and gets fresh noise.

    Raises:
        UsageError: when ``out`` is no run directory, or the key that signs its ledger is gone.
        IntegrityError: when ledger, checkpoint and data do not belong together or were altered.
    """
    identity = Identity.read(out)
    if (payload := rundir.result(out)) is not None:
        (out / rundir.CHECKPOINT).unlink(missing_ok=True)
        return Result(out, payload)
    identity.signing_key()  # refused before a fresh root is drawn for a run that cannot go on
    scenario = load(out / "scenario.toml")
    split = data.load(scenario.data, data_dir=data_dir or identity.data_dir)
    split = catalogue.restored(out, split)
    parts = assemble(scenario, split.train, identity.run_id, identity.root("devices"))
    position, arrays = checkpoint.read(out / rundir.CHECKPOINT)
    rundir.check_same(out, position, identity, scenario, data_digest(split.train))
    rundir.restore(parts, position, arrays)
    return _go_on(out, scenario, split, identity, parts, observer, position, resumed=True)


def _go_on(
    out: Path,
    scenario: Scenario,
    split: Split,
    identity: Identity,
    parts: Parts,
    observer: Observer,
    position: Position,
    *,
    resumed: bool = False,
) -> Result:
    with (
        Ledger.open(out / "ledger.jsonl", signing_key=identity.signing_key()) as ledger,
        EventLog(out / "events.jsonl") as events,
        _one_thread(),
    ):
        rundir.check_ledger(out, ledger, identity, position)
        loop = _Loop(out, scenario, split, identity, parts, observer, ledger, events)
        loop.continue_clocks(position)
        info = loop.info()
        if resumed:
            events.append(
                "resume",
                round=position.index,
                repaired=ledger.repaired,
                noise_root_kept=not info.root_lost,
            )
        observer.started(info)
        return loop.run()


@dataclass
class _Loop:
    """One run from where it stands to its end."""

    out: Path
    scenario: Scenario
    split: Split
    identity: Identity
    parts: Parts
    observer: Observer
    ledger: Ledger
    events: EventLog
    root: SecretRoot = field(init=False)
    cpu_s: float = 0.0
    began: float = field(default_factory=time.perf_counter)
    evaluated: metrics.Evaluation | None = None

    def __post_init__(self) -> None:
        self.root = self.identity.root("server")

    @property
    def wall_s(self) -> float:
        """Seconds that the run took so far, over all sessions whose rounds are kept."""
        return time.perf_counter() - self.began

    def continue_clocks(self, position: Position) -> None:
        """Count on from the seconds that the checkpoint has."""
        self.began -= position.wall_s
        self.cpu_s += position.cpu_s

    def info(self) -> RunInfo:
        scenario, plan = self.scenario, self.parts.server.plan
        return RunInfo(
            name=scenario.name,
            title=scenario.title,
            rounds=scenario.train.rounds,
            done=self.parts.server.index,
            population=self.split.train.n_users,
            private=plan.event.is_private,
            noise_known=self.identity.known_key is not None,
            budget=scenario.privacy.epsilon,
            budget_against=scenario.privacy.budget_against,
            expected_cohort=plan.expected_cohort,
            hides_cohorts=plan.event.hides_cohorts,
            root_lost=self.ledger.header["noise_root"] != self.identity.root_tag(),
        )

    def run(self) -> Result:
        server, refused = self.parts.server, None
        with _interrupts() as stop:
            while server.index < self.scenario.train.rounds:
                try:
                    self._round()
                except BudgetError as error:
                    refused = error
                    break
                if stop:
                    self._save()
                    raise Interrupted(
                        f"stopped after round {server.index} of {self.scenario.train.rounds}; "
                        f"go on with: privrec resume {self.out}"
                    )
                if server.index % self.scenario.run.checkpoint_every == 0:
                    self._save()
        self._save()
        result = self._finish()
        self.observer.finished(result)
        if refused:
            raise refused
        return result

    def _round(self) -> None:
        began, cpu = time.perf_counter(), time.process_time()
        server = self.parts.server
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
            metrics=self._metrics_now(),
            cohort=cohort,
            **self._timing(began, cpu),
        )
        self.events.round(record)
        self.observer.round(record)

    def _release(self) -> tuple[Release, int, float | None, int]:
        """Charge, collect and commit the next round, with a new attempt where bits would differ."""
        server, ledger = self.parts.server, self.ledger
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
            return self.parts.simulation.collect(round, self.parts.server.weights)
        except ReleaseRefused:
            # How many devices were there is the operator's own knowledge: no reason is kept.
            self.events.append("aborted", round=round.index, attempt=round.attempt)
            if round.attempt + 1 >= MOST_ATTEMPTS:
                raise
            return None

    def _charge(self, attempt: int) -> None:
        server, privacy = self.parts.server, self.scenario.privacy
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
        self.ledger.charge(server.index, attempt, event)

    def _epsilon(self, adversary: Any) -> float | None:
        if not self.parts.server.plan.event.is_private or self.identity.known_key is not None:
            return None
        return self.ledger.epsilon(self.scenario.privacy.delta, adversary)

    def _timing(self, began: float, cpu: float) -> dict[str, float]:
        if self.parts.server.plan.event.hides_cohorts:
            return {}
        return {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}

    def _metrics_now(self) -> dict[str, float] | None:
        every, index = self.scenario.run.eval_every, self.parts.server.index
        if index == self.scenario.train.rounds:
            self.evaluated = self.evaluate(("sampled", "full"))
            return self.evaluated.summary()
        if every == 0 or index % every:
            return None
        protocols: metrics.Protocols = ("sampled",) if self.split.heldout.single else ("full",)
        return self.evaluate(protocols).summary()

    def evaluate(self, protocols: metrics.Protocols) -> metrics.Evaluation:
        """Metrics of the released weights, every user served by a vector fitted from nothing."""
        return self.judge.whole(self.parts.server.released, protocols)

    @property
    def judge(self) -> Judge:
        return Judge(self.parts, self.split, self.scenario.run)

    def _finish(self) -> Result:
        evaluated = self.evaluated or self.evaluate(("sampled", "full"))
        write_model(self.out, self.parts, self.scenario, self.split.train)
        payload = result_of(
            self.scenario, self.split, self.parts, self.ledger, evaluated,
            own=self._own(evaluated),
            identity=self.identity.to_json(), cpu_s=self.cpu_s, wall_s=self.wall_s,
        )  # fmt: skip
        rundir.write_json(self.out / "result.json", payload)
        # It holds what devices keep to themselves; a finished run has no more need of it.
        (self.out / rundir.CHECKPOINT).unlink()
        self.events.append("end", round=self.parts.server.index)
        return Result(self.out, payload)

    def _own(self, whole: metrics.Evaluation) -> tuple[metrics.Evaluation, ...]:
        if len(self.parts.federation.tiers) == 1 and not self.parts.federation.absent:
            return (whole,)
        return self.judge.own(self.parts.server.released, ("sampled", "full"))

    def _save(self) -> None:
        digest = data_digest(self.split.train)
        parts, spent = self.parts, (self.wall_s, self.cpu_s)
        rundir.save(self.out, parts, self.identity, self.scenario, self.ledger, digest, *spent)


@contextmanager
def _one_thread() -> Iterator[None]:
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
