"""The server app: the loop of a run, with a transport that reaches devices over Flower's grid."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from logging import ERROR, INFO, WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from privrec.device.update import (
    Aggregate,
    Counting,
    Evaluating,
    Order,
    Protection,
    Round,
    digest,
    model_digests,
)
from privrec.errors import BudgetError, Interrupted, PrivrecError, UsageError
from privrec.flower.app import out_of, population_of, scenario_of
from privrec.flower.enrolment import Anyone, anchor_of
from privrec.flower.exchange import EXCHANGES, MASKED, SHARES, Member, Registry
from privrec.models.layout import Layout
from privrec.privacy.ledger import Ledger
from privrec.randomness import SecretRoot, rng_for
from privrec.report.build import build
from privrec.report.render import write
from privrec.run import checkpoint, directory
from privrec.run.catalogue import CATALOGUE, read_order, write_order
from privrec.run.directory import Identity
from privrec.run.loop import Loop, released_order
from privrec.run.parties import server_of
from privrec.run.plan import Plan
from privrec.run.privacy_plan import attempts_of, known_items
from privrec.run.record import (
    EventLog,
    Observer,
    Record,
    Result,
    RunInfo,
    opening_words,
    read_rounds,
)
from privrec.run.simulation import cohort, unmask
from privrec.scenario.load import Scenario, load
from privrec.secagg.roster import Anchor
from privrec.secagg.server import ServerSession


@dataclass
class Flower:
    """A round over Flower's grid: four exchanges with the devices of all connected nodes.

    ``root`` is the server's secret, for the coins of sampling; ``order`` are the items by
    popularity, where their order was released.
    """

    registry: Registry
    plan: Plan
    root: SecretRoot
    order: Order | None = None

    def collect(self, round: Round, weights: NDArray[np.float32]) -> Aggregate:
        """See :meth:`privrec.run.loop.Transport.collect`."""
        samples = rng_for(self.plan.scenario.run.seed, "samples", round.index)
        told = self._told(round.model_digests, weights)
        told[MASKED]["key"] = int(samples.integers(2**63))
        called, layouts = self._called(round), self.plan.federation.layouts
        total = self._sum(round, called, self.plan.protection, layouts, told)
        return Aggregate(total, len(called), None)

    def _told(
        self, model: Sequence[bytes], weights: NDArray[np.float32]
    ) -> dict[str, dict[str, Any]]:
        """What devices are told of a model, and of the order of its items."""
        order = b"" if self.order is None else self.order.tobytes()
        return {
            SHARES: {"model": list(model), "order": self.plan.order},
            MASKED: {"weights": weights.tobytes(), "order": order},
        }

    def evaluate(
        self, evaluating: Evaluating, round: Round, weights: NDArray[np.float32]
    ) -> NDArray[np.int64]:
        """Sum what devices find of a model; ReleaseRefused when too few answer."""
        told = self._told(model_digests(weights, self.plan.federation.layouts), weights)
        called = self._ready(self._members())
        return self._sum(round, called, evaluating.protection, evaluating.layouts, told)

    def count(self, counting: Counting, round: Round) -> NDArray[np.int64]:
        """Sum what devices count before the first round; ReleaseRefused when too few answer."""
        called = self._ready(self._members())
        return self._sum(round, called, counting.protection, counting.layouts, {})

    def _sum(
        self,
        round: Round,
        called: Sequence[Member],
        protection: Protection,
        layouts: Sequence[Layout],
        told: Mapping[str, Mapping[str, Any]],
    ) -> NDArray[np.int64]:
        """The four exchanges with the devices that are called, told more in some of them."""
        prekeys = [member.prekeys.pop(0) for member in called]
        session = ServerSession(protection.terms(round, layouts), prekeys, self.registry.anchor)
        session.publish(round.model_digests)
        for stage in EXCHANGES:
            self.registry.exchange(stage, session, **told.get(stage, {}))
            session.advance()
        return unmask(session.result, protection, layouts)

    def _members(self) -> list[Member]:
        """The devices of all nodes that are connected.

        With a quarter of them at a node that is gone, each further attempt would fail as well.
        """
        registry = self.registry
        registry.greet_newcomers()
        here = set(registry.grid.get_node_ids())
        members = (member for member in registry.members.values() if member.node in here)
        return sorted(members, key=lambda each: (each.number, each.name))

    def _called(self, round: Round) -> list[Member]:
        """The round's cohort: those who are sampled, train, and have prekeys left."""
        scenario, members = self.plan.scenario, self._members()
        if round.event.is_private:
            coins = self.root.stream("cohort", *round.context).uint64(len(members))
        else:
            seeded = rng_for(scenario.run.seed, "cohort", round.index)
            coins = seeded.integers(0, 2**64, len(members), dtype=np.uint64)
        chosen = [members[place] for place in cohort(coins, scenario.devices.sampling_rate)]
        tiers = self.plan.federation.tiers
        return self._ready([member for member in chosen if tiers[member.tier].weight > 0])

    def _ready(self, called: Sequence[Member]) -> list[Member]:
        """Those of the members that have prekeys left, or made new ones."""
        registry = self.registry
        registry.greet({member.node for member in called if not member.prekeys})
        refilled = (registry.members[member.name] for member in called)
        return [member for member in refilled if member.prekeys]


class Deployed(Loop):
    """A run whose devices are at nodes: what they find of the model is known by a sum alone."""

    transport: Flower

    def summed_figures(self, evaluating: Evaluating, round: Round) -> NDArray[np.int64]:
        return self.transport.evaluate(evaluating, round, self.server.released)


def deploy(
    scenario: Scenario,
    grid: Grid,
    *,
    out: Path,
    items: int,
    anchor: Anchor | None = None,
    unsafe_noise_key: bytes | None = None,
    wait_s: float = 60.0,
    timeout_s: float = 600.0,
) -> Result:
    """Run a scenario over the devices of a grid, or go on with what ``out`` has of it.

    Args:
        items: size of the catalogue.
        anchor: whom the server takes for a device; anybody by default.
        unsafe_noise_key: a root that others know, for comparisons; the run protects nobody then.
        wait_s: how long nodes are waited for; ``timeout_s``, how long an exchange may take.

    Raises:
        UsageError: when the scenario cannot be deployed.
        BudgetError: when the budget ran out; the run is finished as far as it came.
        ReleaseRefused: when rounds keep ending without a sum.
        IntegrityError: when ``out`` was altered.
    """
    population = population_of(scenario)
    plan = Plan.of(scenario, items, population)
    prekeys = attempts_of(scenario) + 8  # beyond one for each round: for more attempts, and before
    tiers, agreed = len(plan.federation.tiers), {"plan": scenario.plan_hash(), "items": items}
    registry = Registry(grid, anchor or Anyone(), prekeys, timeout_s, wait_s, tiers, agreed)
    data = {"source": scenario.data.source, "items": items, "users": population}
    if (out / "run.json").exists():
        identity = Identity.read(out)
        if load(out / directory.SCENARIO).hash() != scenario.hash():
            raise UsageError(
                f"{out}: a run of another scenario lies there; give the run-config that it was "
                "started with, or another out"
            )
        if not identity.deployed or identity.data != data:
            what = f"a deployment over {identity.data}" if identity.deployed else "a simulated run"
            raise UsageError(
                f"{out}: {what} lies there, and this is a deployment over {data}; give the "
                "run-config that it was started with, or another out"
            )
        payload = directory.read_result(out, identity, scenario)
        with directory.open_ledger(out, identity, scenario, repair=False) as found:
            ended = found.ended is not None
        if ended:
            said = "privrec: %s has the finished run of this scenario, which is shown as it is: "
            said += "nothing is trained. For another run name another out"
            log(WARNING, said, out)
        else:
            registry.register(population)
        if payload is not None:
            return Result(out, payload)
        ledger = directory.open_ledger(out, identity, scenario)
    else:
        directory.refuse_taken(out)
        registry.register(population)
        where = {"simulated": registry.simulated, "deployed": True}
        identity = Identity.new(scenario, data, None, unsafe_noise_key, **where)
        with directory.beginning(out, plan, identity) as (folder, ledger):
            checkpoint.save(folder, identity, ledger, server_of(plan, identity.run_id))
    flower = Flower(registry, plan, identity.root("server"))
    with ledger, EventLog(out / directory.EVENTS) as events:
        resumed = bool(ledger.charges)
        if plan.counting is not None:
            flower = _ordered(flower, plan.counting, out, ledger, identity)
        server = server_of(flower.plan, identity.run_id)
        position = checkpoint.restore(out, identity, server)
        loop = Deployed(out, flower.plan, identity, server, flower, _Log(), ledger, events)
        return loop.run(position, resumed=resumed)


def _ordered(
    flower: Flower, counting: Counting, out: Path, ledger: Ledger, identity: Identity
) -> Flower:
    """The same with the order of the items of the run in ``out``, which is released if it is not.

    What a crash left without the file of its order was used by nobody: it is counted anew.
    """
    plan = flower.plan
    if (out / CATALOGUE).exists():
        order = read_order(out, plan.items, identity.signing_key().public_key())
    else:
        collect = partial(flower.count, counting)
        order = released_order(plan, counting, ledger, identity, collect)
        write_order(out, order, identity.signing_key())
    return replace(flower, plan=replace(plan, order=digest(order)), order=order)


class _Log(Observer):
    """Lines in Flower's log."""

    def started(self, info: RunInfo) -> None:
        log(INFO, "privrec: %s", opening_words(info))

    def round(self, record: Record) -> None:
        spent = "no privacy" if record.epsilon is None else f"ε {record.epsilon:.2f}"
        log(INFO, "privrec: round %d/%d · %s", record.round, record.rounds, spent)


def server_app(folder: Path) -> ServerApp:
    """Make a Flower ServerApp that trains the scenario of the app in ``folder`` over all nodes.

    Its run-config has ``scenario``, ``set``, ``out`` (the run's directory on the server), ``items``
    (size of the catalogue, for data that the scenario does not describe), ``wait-s``, ``timeout-s``
    and, for the server's own check of devices, ``roster`` or ``enrolment-key``.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]  # Flower may be absent
    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        try:
            out = out_of(config)
            scenario = scenario_of(folder, config)
            items = int(config.get("items", 0)) or known_items(scenario)
            if not items:
                raise UsageError("items is unset: say the size of the catalogue in the run-config")
            deploy(
                scenario,
                grid,
                out=out,
                items=items,
                anchor=anchor_of(config),
                wait_s=float(config.get("wait-s", 60)),
                timeout_s=float(config.get("timeout-s", 600)),
            )
        except BudgetError as error:
            log(ERROR, "privrec: %s", error)
            _reported(out)  # the run is finished as far as it came
            if not read_rounds(out / directory.EVENTS):
                raise
            return
        except Interrupted as error:
            log(WARNING, "privrec: %s", error)
            signal.raise_signal(signal.SIGINT)  # to Flower, which listens again and ends the app
            raise
        except PrivrecError as error:
            log(ERROR, "privrec: %s", error)
            raise
        _reported(out)

    return app


def _reported(directory: Path) -> None:
    """Write the report; where that fails the run is finished all the same."""
    try:
        write(build(directory), directory)
    except Exception as error:
        said = "privrec: the run is finished and is in %s; its report could not be written (%r). "
        said += "Write it by: privrec report %s"
        log(WARNING, said, directory, error, directory)
    else:
        log(INFO, "privrec: the run and its report are in %s", directory)
