"""The parts of a run at its first round, for tests that drive rounds by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from privrec.device.device import Cohort
from privrec.device.samples import Histories
from privrec.device.tier import Federation
from privrec.randomness import SecretRoot
from privrec.run.parties import server_of, simulation_of
from privrec.run.plan import Plan
from privrec.run.simulation import Simulation
from privrec.scenario.load import Scenario
from privrec.server.server import Server


@dataclass(frozen=True)
class Parts:
    """A plan, its server, and devices with the data that they train on."""

    plan: Plan
    server: Server
    simulation: Simulation
    train: Any

    @property
    def federation(self) -> Federation:
        """The tiers."""
        return self.plan.federation

    @property
    def everyone(self) -> Cohort[Any]:
        """All users with the whole memory, as an evaluation has them."""
        train = self.train
        histories = Histories(np.arange(train.n_users), train.indptr, train.items)
        return Cohort.of(self.simulation.cohorts[0].learner, histories)


def assemble(
    scenario: Scenario, train: Any, run_id: str, devices: SecretRoot, served: Any = None
) -> Parts:
    """Return the parts of a run of a scenario on histories or texts."""
    plan = Plan.of(scenario, train.n_items, train.n_users)
    return Parts(plan, server_of(plan, run_id), simulation_of(plan, train, devices, served), train)
