"""The server app: the loop of a run, with a transport that reaches devices over Flower's grid."""

from __future__ import annotations

from dataclasses import dataclass
from logging import ERROR, INFO, WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from privrec.device.tier import Federation
from privrec.device.update import Aggregate, Protection, Round
from privrec.errors import BudgetError, PrivrecError, UsageError
from privrec.flower.app import population_of, scenario_of
from privrec.flower.enrolment import Anyone, anchor_of
from privrec.flower.exchange import EXCHANGES, MASKED, SHARES, Member, Registry
from privrec.randomness import SecretRoot, rng_for
from privrec.report.build import build
from privrec.report.render import write
from privrec.run import checkpoint, directory
from privrec.run.directory import Identity
from privrec.run.loop import Loop
from privrec.run.plan import Plan
from privrec.run.privacy_plan import known_items
from privrec.run.record import EventLog, Observer, Record, Result, RunInfo, opening_words
from privrec.run.simulation import cohort, unmask
from privrec.scenario.load import Scenario, load
from privrec.secagg.roster import Anchor
from privrec.secagg.server import ServerSession

SPARE_PREKEYS = 8
"""Prekeys that a device is asked for beyond one for each round."""


@dataclass
class Flower:
    """A round over Flower's grid: four exchanges with the devices of all connected nodes.

    ``root`` is the server's secret, for the coins of sampling; ``seed`` is that of samples.
    """

    registry: Registry
    federation: Federation
    protection: Protection
    root: SecretRoot
    seed: int
    sampling_rate: float

    def collect(self, round: Round, weights: NDArray[np.float32]) -> Aggregate:
        """See :meth:`privrec.run.loop.Transport.collect`."""
        called = self._called(round)
        session = ServerSession(
            self.protection.terms(round, self.federation.layouts),
            [member.prekeys.pop(0) for member in called],
            self.registry.anchor,
        )
        session.publish(round.model_digests)
        key = int(rng_for(self.seed, "samples", round.index).integers(2**63))
        told: dict[str, dict[str, Any]] = {
            SHARES: {"model": list(round.model_digests)},
            MASKED: {"weights": weights.tobytes(), "key": key},
        }
        for stage in EXCHANGES:
            self.registry.exchange(stage, session, **told.get(stage, {}))
            session.advance()
        total = unmask(session.result, self.protection, self.federation)
        return Aggregate(total, len(called), None)

    def _called(self, round: Round) -> list[Member]:
        """The round's cohort: those who are sampled, train, and have prekeys left."""
        registry, tiers = self.registry, self.federation.tiers
        registry.greet_newcomers()
        members = sorted(registry.members.values(), key=lambda each: (each.number, each.name))
        if round.event.is_private:
            coins = self.root.stream("cohort", *round.context).uint64(len(members))
        else:
            seeded = rng_for(self.seed, "cohort", round.index)
            coins = seeded.integers(0, 2**64, len(members), dtype=np.uint64)
        chosen = [members[place] for place in cohort(coins, self.sampling_rate)]
        called = [member for member in chosen if tiers[member.tier].weight > 0]
        registry.greet({member.node for member in called if not member.prekeys})
        refilled = (registry.members[member.name] for member in called)
        return [member for member in refilled if member.prekeys]


def deploy(
    scenario: Scenario,
    grid: Grid,
    *,
    out: Path,
    items: int,
    anchor: Anchor | None = None,
    observer: Observer | None = None,
    unsafe_noise_key: bytes | None = None,
    wait_s: float = 60.0,
    timeout_s: float = 600.0,
) -> Result:
    """Run a scenario over the devices of a grid, or go on with what ``out`` has of it.

    Args:
        items: size of the catalogue.
        anchor: whom the server takes for a device; anybody by default.
        unsafe_noise_key: a root that others know, for comparisons; the run protects nobody then.
        wait_s: how long nodes are waited for.
        timeout_s: how long an exchange may take.

    Raises:
        UsageError: when the scenario cannot be deployed.
        BudgetError: when the budget ran out; the run is finished as far as it came.
        ReleaseRefused: when rounds keep ending without a sum.
        IntegrityError: when ``out`` was altered.
    """
    population = population_of(scenario)
    plan = Plan.of(scenario, items, population)
    prekeys, tiers = scenario.train.rounds + SPARE_PREKEYS, len(plan.federation.tiers)
    agreed = {"plan": scenario.plan_hash(), "items": items}
    registry = Registry(grid, anchor or Anyone(), prekeys, timeout_s, wait_s, tiers, agreed)
    if (out / "run.json").exists():
        identity = Identity.read(out)
        if load(out / directory.SCENARIO).hash() != scenario.hash():
            raise UsageError(
                f"{out}: a run of another scenario lies there; give the run-config that it was "
                "started with, or another out"
            )
        if (payload := directory.read_result(out, identity, scenario)) is not None:
            return Result(out, payload)
        registry.register(population)
        server = plan.server(identity.run_id)
        position = checkpoint.restore(out, identity, server)
        ledger = directory.open_ledger(out, identity, scenario)
    else:
        directory.refuse_taken(out)
        registry.register(population)
        described = {"source": scenario.data.source, "items": items, "users": population}
        simulated = registry.simulated
        identity = Identity.new(scenario, described, None, unsafe_noise_key, simulated=simulated)
        with directory.beginning(out, plan, identity) as (folder, ledger):
            server = plan.server(identity.run_id)
            position = checkpoint.save(folder, identity, ledger, server)
    root, rate = identity.root("server"), scenario.devices.sampling_rate
    flower = Flower(registry, plan.federation, plan.protection, root, scenario.run.seed, rate)
    with ledger, EventLog(out / directory.EVENTS) as events:
        observer = observer or Observer()
        loop = Loop(out, plan, identity, server, flower, observer, ledger, events)
        return loop.run(position, resumed=bool(position.index or ledger.charges))


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
        out = Path(str(config.get("out", "run")))
        try:
            scenario = scenario_of(folder, config)
            items = int(config.get("items", 0)) or known_items(scenario)
            if not items:
                raise UsageError("items is unset: say the size of the catalogue in the run-config")
            result = deploy(
                scenario, grid,
                out=out,
                items=items,
                anchor=anchor_of(config),
                observer=_Log(),
                wait_s=float(config.get("wait-s", 60)),
                timeout_s=float(config.get("timeout-s", 600)),
            )  # fmt: skip
        except PrivrecError as error:
            log(ERROR, "privrec: %s", error)
            if isinstance(error, BudgetError):  # the run is finished as far as it came
                _reported(out)
            raise
        _reported(result.path)

    return app


def _reported(directory: Path) -> None:
    """Write the report; where that fails the run is finished all the same."""
    try:
        write(build(directory), directory)
    except Exception as error:
        log(
            WARNING,
            "privrec: the run is finished and is in %s; its report could not be written (%s: %s). "
            "Write it by: privrec report %s",
            directory, type(error).__name__, error, directory,
        )  # fmt: skip
    else:
        log(INFO, "privrec: the run and its report are in %s", directory)
