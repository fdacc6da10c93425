"""The plan of a run: what all parties agree on before the first round, from public numbers alone.

It is made once and passed on. The header of the ledger declares it and is signed with the rest, so
that a report can be computed again from the ledger alone, and whoever edits a report afterwards can
be held to what was declared before the first round.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

import privrec
from privrec.data import Interactions
from privrec.data.corpus import Corpus
from privrec.device.tier import Federation
from privrec.device.update import Protection
from privrec.device.words import RowServer
from privrec.errors import IntegrityError, ScenarioError, UsageError
from privrec.models.layout import band_sizes
from privrec.models.losses import loss_of
from privrec.privacy.events import RoundEvent
from privrec.privacy.population import PopulationBalance
from privrec.randomness import SecretRoot, rng_for
from privrec.run.assembly import assign, cohorts_of, federation_of, local_lr
from privrec.run.privacy_plan import example_event, plan_privacy, release_event
from privrec.run.simulation import Simulation
from privrec.run.summing import Enrolled
from privrec.scenario.kinds import SERVER_OPTIMIZERS
from privrec.scenario.load import Scenario, Train
from privrec.secagg.client import Policy
from privrec.server.optimizer import Optimizer, Schedule
from privrec.server.server import Completion, Implicit, RoundPlan, Server


@dataclass(frozen=True)
class Plan:
    """A scenario for so many items and users: its tiers, its event and its protection.

    Attributes:
        items: size of the catalogue, or of the vocabulary.
        users: enrolled devices.
        members: devices of each tier that train, the strongest tier first.
        event: what each round is charged as.
    """

    scenario: Scenario
    items: int
    users: int
    federation: Federation
    members: tuple[int, ...]
    event: RoundEvent
    protection: Protection

    @classmethod
    def of(cls, scenario: Scenario, items: int, users: int) -> Plan:
        """Plan a scenario.

        Raises:
            UsageError: when a sum could wrap around, no noise meets the target, a band has too few
                devices, or the tiers do not nest in this catalogue.
        """
        return cls.over(scenario, federation_of(scenario, items), items, users)

    @classmethod
    def over(cls, scenario: Scenario, federation: Federation, items: int, users: int) -> Plan:
        """Plan a scenario whose tiers are made already; see :meth:`of`."""
        members = _members(federation, users)
        sizes = band_sizes(federation.layouts)
        event, protection = plan_privacy(scenario, sizes, _holders(members))
        return cls(scenario, items, users, federation, members, event, protection)

    @property
    def holders(self) -> list[int]:
        """Training devices that hold each band, the weakest tier's band first."""
        return _holders(self.members)

    @cached_property
    def assigned(self) -> NDArray[np.int64]:
        """The tier of each user, see :func:`privrec.run.assembly.assign`."""
        return assign(self.users, self.federation, self.scenario.run.seed)

    def check_tiers(self) -> None:
        """Refuse tiers that no user would be of.

        Raises:
            UsageError: when there is such a tier.
        """
        for tier in self.federation.tiers:
            if tier.index not in self.assigned:
                raise UsageError(
                    f"devices.tiers: the share {tier.share:g} of {self.users} users is nobody; "
                    "raise the share, or leave the tier out"
                )

    @property
    def charges(self) -> Counter[RoundEvent]:
        """All that a run of this plan charges when no round is made twice."""
        before = release_event(self.scenario)
        charges = Counter({self.event: self.scenario.train.rounds})
        return charges if before is None else charges + Counter([before])

    def server(self, run_id: str) -> Server:
        """Return the server of a run at its first round; ``run_id`` names the run's draws."""
        scenario, federation = self.scenario, self.federation
        rounds = RoundPlan(
            run_id,
            scenario.plan_hash(),
            self.event,
            self.protection,
            federation,
            expected_cohort=scenario.devices.sampling_rate * sum(self.members),
            average=scenario.train.average,
            examples=example_event(scenario),
        )
        # Gaussian item vectors (hence Gaussian coefficients), zero biases, Glorot dense weights.
        layout, rng = federation.layout, rng_for(scenario.run.seed, "weights")
        weights = np.zeros(layout.size, np.float32)
        layout.dense_of(weights)[...] = federation.tiers[0].model.model.initial_dense(rng)
        memory = layout.memory_of(weights)
        memory[...] = rng.normal(0, scenario.model.init_std, memory.shape)
        return Server(rounds, weights, self._completion(), _optimizer(scenario.train))

    def _completion(self) -> Completion:
        scenario, federation, train = self.scenario, self.federation, self.scenario.train
        implicit = None
        if loss_of(train.loss).implicit:
            implicit = Implicit(
                train.unobserved_weight,
                train.item_l2,
                train.gram_rate,
                tuple(local_lr(scenario, federation, tier) for tier in federation.tiers),
                train.server_optimizer == "newton",
            )
        return Completion(
            federation,
            implicit,
            by_contributors=scenario.devices.aggregation == "contributors",
            overwrites=scenario.devices.aggregation == "fair_averaging",
        )

    def simulate(
        self, train: Interactions | Corpus, devices: SecretRoot, served: RowServer | None = None
    ) -> Simulation:
        """Return devices that train on ``train`` in this process, with ``devices`` as their secret.

        ``served`` are the server's tables, where devices ask it for neurons.
        """
        scenario = self.scenario
        policy = Policy(scenario.devices.min_cohort, scenario.privacy.colluding_share)
        return Simulation(
            self.federation,
            cohorts_of(scenario, self.federation, train, self.assigned, served),
            self.users,
            self.protection,
            Enrolled(devices, policy),
            scenario.run.seed,
            scenario.devices.sampling_rate,
            scenario.devices.dropout_rate,
            scenario.run.engine,
            scenario.run.secure_sum,
        )

    def header(self, *, simulated: bool, standing: PopulationBalance) -> dict[str, Any]:
        """Return the entries of a ledger's header that :func:`read_header` gives back.

        Args:
            simulated: whether the devices are simulated.
            standing: where the run's population stands.
        """
        return {
            "scenario": json.loads(self.scenario.to_json()),
            "simulated": simulated,
            "version": privrec.__version__,
            "bands": list(band_sizes(self.federation.layouts)),
            "holders": self.holders,
            "capacities": [tier.capacity for tier in self.federation.tiers],
            "standing": standing.to_json(),
        }


def _members(federation: Federation, users: int) -> tuple[int, ...]:
    """Devices of each tier that train, as many as :func:`assign` gives it."""
    shares = [tier.share for tier in federation.tiers]
    counts = np.diff(np.rint(np.cumsum(shares) * users).astype(int), prepend=0)
    return tuple((counts * [tier.weight > 0 for tier in federation.tiers]).tolist())


def _holders(members: tuple[int, ...]) -> list[int]:
    holders: list[int] = np.cumsum(members)[::-1].tolist()
    return holders


def _optimizer(train: Train) -> Optimizer:
    kind = SERVER_OPTIMIZERS[train.server_optimizer]
    own = {key: getattr(train, key) for key in kind.config.model_fields}
    schedule = Schedule(train.schedule, train.rounds, train.warmup_rounds)
    optimizer: Optimizer = kind.load()(train.server_lr, schedule, train.weight_decay, **own)
    return optimizer


@dataclass(frozen=True)
class LedgerHeader:
    """What the header of a ledger declares and no charge tells.

    Attributes:
        version: of privrec.
        bands: coefficients of each band, the band that every device holds first.
        holders: training devices that hold each band.
        capacities: of the tiers, the strongest first.
        standing: where the run's population stood when it began.
    """

    scenario: Scenario
    simulated: bool
    version: str
    bands: tuple[int, ...]
    holders: tuple[int, ...]
    capacities: tuple[float, ...]
    standing: PopulationBalance

    @property
    def coefficients(self) -> int:
        """Length of the shared vector."""
        return sum(self.bands)


def read_header(header: Mapping[str, Any], where: str) -> LedgerHeader:
    """Read what the header of a ledger declares; errors call the ledger ``where``.

    Raises:
        IntegrityError: when the header declares nothing, or its parts contradict each other.
    """
    try:
        scenario = Scenario.model_validate(header["scenario"])
        found = LedgerHeader(
            scenario,
            _typed(header["simulated"], bool),
            _typed(header["version"], str),
            tuple(_typed(size, int) for size in header["bands"]),
            tuple(_typed(devices, int) for devices in header["holders"]),
            tuple(float(capacity) for capacity in header["capacities"]),
            PopulationBalance.from_json(header["standing"]),
        )
    except (KeyError, TypeError, ValueError, ScenarioError) as error:
        raise IntegrityError(
            f"{where}: its header does not declare what a report needs ({error!r}); it was made by "
            "another version of privrec, with which the report is to be made"
        ) from None
    hashes = {"scenario_hash": scenario.hash(), "privacy_hash": scenario.privacy_hash()}
    for name, own in hashes.items():
        if header.get(name) != own:
            raise IntegrityError(
                f"{where}: the header's {name} is not that of the scenario beside it; the ledger "
                "contradicts itself, rely on nothing in it"
            )
    return found


def _typed(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r}, where {kind.__name__} is wanted")
    return value
