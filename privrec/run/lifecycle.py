"""Simulated runs: from a scenario to a directory with model, ledger and result; and resuming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from privrec import data, storage
from privrec.data import Interactions, Split
from privrec.evaluate import metrics
from privrec.evaluate.evaluator import Evaluator
from privrec.privacy.ledger import Ledger
from privrec.randomness import SecretRoot
from privrec.run import checkpoint, directory, popularity, population_budget
from privrec.run.assembly import Parts, assemble, check_tiers, data_digest
from privrec.run.checkpoint import Position
from privrec.run.identity import Identity
from privrec.run.loop import Loop, Result, one_thread
from privrec.run.record import EventLog, Observer
from privrec.run.summary import result_of
from privrec.run.texts import Texts
from privrec.scenario.load import Scenario, load


def start(
    scenario: Scenario,
    *,
    out: Path,
    data_dir: Path | None = None,
    observer: Observer,
    unsafe_noise_key: bytes | None = None,
    population: str | None = None,
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
        population: name of the population ledger that the run is tied to; see
            :mod:`privrec.privacy.population`.

    Raises:
        UsageError: when ``out`` is taken or the scenario cannot be run on this data.
        DataError: when the data is malformed.
        BudgetError: when the lifetime budget of the population does not allow the run, which then
            touches no data; or when the run's own budget ran out before the planned rounds, and it
            is finished as far as it came.
        Interrupted: on Ctrl-C, after a checkpoint.
    """
    directory.refuse_taken(out)
    population_budget.check(population, scenario, known=unsafe_noise_key is not None)
    kind = _kind_of(scenario)
    split = _checked(scenario, data_dir)
    identity = Identity.new(scenario, kind.describe(split), data_dir, unsafe_noise_key)
    with identity.forgotten_unless(out), directory.appearing(out) as folder:
        directory.write_json(folder / "run.json", identity.to_json())
        storage.replace(folder / "scenario.toml", scenario.to_toml().encode())
        users, standing = (
            split.train.n_users,
            population_budget.reserve(population, scenario, identity),
        )
        with directory.new_ledger(folder, scenario, identity, users, standing) as ledger:
            server, devices = identity.root("server"), identity.root("devices")
            split = kind.numbered(scenario, split, ledger, folder, server, devices)
            parts = kind.assemble(scenario, split.train, identity.run_id, devices)
            digest = data_digest(split.train)
            position = directory.save(folder, parts.server, parts.states, identity, ledger, digest)
        with EventLog(folder / "events.jsonl") as events:
            events.append("start", run_id=identity.run_id, simulated=True)
    storage.sync_directory(out.parent)
    return _go_on(out, scenario, split, identity, parts, observer, position)


def check(scenario: Scenario, data_dir: Path | None) -> None:
    """Refuse, before anything is charged, a scenario that cannot be run or measured on its data.

    Raises:
        UsageError: when a baseline cannot be had, or the data is not of the declared size.
        DataError: when the data is malformed, or holds out nothing to measure on.
    """
    _checked(scenario, data_dir)


def _checked(scenario: Scenario, data_dir: Path | None) -> Any:
    kind = _kind_of(scenario)
    split = kind.load(scenario, data_dir)
    directory.check_population(scenario, split.train.n_users)
    kind.check(scenario, split)
    return split


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
    scenario = load(out / "scenario.toml")
    # What cannot go on is refused before a fresh root is drawn for it.
    if (payload := directory.left(out, identity, scenario)) is not None:
        return Result(out, payload)
    kind = _kind_of(scenario)
    key = identity.signing_key().public_key()
    split = kind.restored(out, kind.load(scenario, data_dir or identity.data_dir), key)
    parts = kind.assemble(scenario, split.train, identity.run_id, identity.root("devices"))
    position, arrays = checkpoint.read(out / directory.CHECKPOINT, key)
    directory.check_same(out, position, identity, data_digest(split.train))
    directory.restore(parts.server, parts.states, position, arrays)
    return _go_on(out, scenario, split, identity, parts, observer, position, resumed=True)


def _go_on(
    out: Path,
    scenario: Scenario,
    split: Any,
    identity: Identity,
    parts: Any,
    observer: Observer,
    position: Position,
    *,
    resumed: bool = False,
) -> Result:
    with (
        directory.open_ledger(out, identity, scenario) as ledger,
        EventLog(out / "events.jsonl") as events,
        one_thread(),
    ):
        directory.check_position(out, ledger, position)
        loop = _kind_of(scenario).loop(
            out, scenario, split.train.n_users, identity, parts.server, parts.simulation, observer,
            ledger, events, split=split, parts=parts,
        )  # fmt: skip
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


class Kind(Protocol):
    """What runs of one kind of data are made of; nothing else tells the kinds apart.

    A split has ``train`` with ``n_users``, ``indptr`` and ``items``; parts have ``server``,
    ``simulation`` and ``states``. Both are the kind's own and go from one method to the next.
    """

    @property
    def loop(self) -> Callable[..., Loop]: ...
    def load(self, scenario: Scenario, data_dir: Path | None) -> Any: ...
    def check(self, scenario: Scenario, split: Any) -> None: ...
    def describe(self, split: Any) -> dict[str, Any]: ...
    def numbered(
        self, scenario: Scenario, split: Any, ledger: Ledger, folder: Path, server: SecretRoot,
        devices: SecretRoot,
    ) -> Any: ...  # fmt: skip
    def restored(self, folder: Path, split: Any, key: Ed25519PublicKey) -> Any: ...
    def assemble(
        self, scenario: Scenario, train: Any, run_id: str, devices: SecretRoot
    ) -> Any: ...  # fmt: skip


class _Histories:
    """Recommenders, trained on histories of interactions."""

    @property
    def loop(self) -> type[_Simulated]:
        return _Simulated

    def load(self, scenario: Scenario, data_dir: Path | None) -> Split:
        split = data.load(scenario.data, data_dir=data_dir)
        check_tiers(scenario, split.train.n_users, split.train.n_items)
        return split

    def check(self, scenario: Scenario, split: Split) -> None:
        metrics.holding_out(split.heldout, None)
        for name in scenario.run.baselines:
            metrics.check(name, split.train, dim=scenario.model.dim)

    def describe(self, split: Split) -> dict[str, Any]:
        return split.describe()

    def numbered(
        self, scenario: Scenario, split: Split, ledger: Ledger, folder: Path, server: SecretRoot,
        devices: SecretRoot,
    ) -> Split:  # fmt: skip
        return popularity.numbered(scenario, split, ledger, folder, server, devices)

    def restored(self, folder: Path, split: Split, key: Ed25519PublicKey) -> Split:
        return popularity.restored(folder, split, key)

    def assemble(
        self, scenario: Scenario, train: Interactions, run_id: str, devices: SecretRoot
    ) -> Parts:
        return assemble(scenario, train, run_id, devices)


def _kind_of(scenario: Scenario) -> Kind:
    return Texts() if scenario.model.learns != "interactions" else _Histories()


@dataclass(kw_only=True)
class _Simulated(Loop):
    """A run whose devices are here, so that what they get can be measured."""

    split: Split
    parts: Parts
    evaluated: metrics.Evaluation | None = field(default=None, init=False)

    def accuracy(self) -> dict[str, float] | None:
        """See :meth:`Loop.accuracy`."""
        every, index = self.scenario.run.eval_every, self.server.index
        if index == self.scenario.train.rounds:
            # Another try is made at the end, where the gap would be stated as the whole run's.
            self.evaluated = self.evaluate(("sampled", "full"))
            return self.evaluated.summary()
        if every == 0 or index % every:
            return None
        protocols: metrics.Protocols = ("sampled",) if self.split.heldout.single else ("full",)
        return self.evaluate(protocols).summary()

    def evaluate(self, protocols: metrics.Protocols) -> metrics.Evaluation:
        """Metrics of the released weights, every user served by a vector fitted from nothing."""
        return self.judge.whole(self.server.released, protocols)

    @property
    def judge(self) -> Evaluator:
        devices = self.parts.simulation
        return Evaluator(
            self.parts.federation, self.parts.everyone, devices.cohorts, devices.absent,
            self.split, self.scenario.run,
        )  # fmt: skip

    def payload(self) -> dict[str, Any]:
        """See :meth:`Loop.payload`."""
        every: metrics.Protocols = ("sampled", "full")
        none = metrics.Evaluation.nobody()
        whole = self.evaluated or self.attempt("accuracy", lambda: self.evaluate(every)) or none
        federation = self.parts.federation
        own: tuple[metrics.Evaluation, ...] = (whole,)
        if len(federation.tiers) > 1 or federation.absent:
            judged = self.attempt(
                "accuracy by tier", lambda: self.judge.own(self.server.released, every)
            )
            own = judged or (none,) * (len(federation.tiers) + bool(federation.absent))
        return result_of(
            self.scenario, self.split, self.parts, self.ledger, whole,
            own=own, attempt=self.attempt,
            identity=self.identity.to_json(), cpu_s=self.cpu_s, wall_s=self.wall_s,
        )  # fmt: skip

    def save(self) -> None:
        """See :meth:`Loop.save`."""
        digest, spent = data_digest(self.split.train), (self.wall_s, self.cpu_s)
        server, states = self.parts.server, self.parts.states
        directory.save(self.out, server, states, self.identity, self.ledger, digest, *spent)
