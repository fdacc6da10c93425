"""The plan of a run: what all parties agree on before the first round, from public numbers alone.

It is made once and passed on. The signed header of the ledger declares it, so that a report can be
computed again from the ledger alone, and whoever edits one can be held to what was declared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PlainValidator, StrictBool, StrictInt, StrictStr

import privrec
from privrec.data import Interactions
from privrec.data.corpus import Corpus
from privrec.device.device import Cohort, Learner, Settings
from privrec.device.recommender import RecommenderLearner
from privrec.device.samples import Histories, popularity_of
from privrec.device.tier import Federation, ModelView, Tier
from privrec.device.update import Protection
from privrec.device.words import Ask, WordLearner
from privrec.embedding.table import Table
from privrec.errors import IntegrityError, ScenarioError, UsageError
from privrec.models.layout import band_sizes
from privrec.models.losses import loss_of, packed_size
from privrec.privacy.events import RoundEvent
from privrec.privacy.population import PopulationBalance
from privrec.randomness import SecretRoot, rng_for
from privrec.run.privacy_plan import (
    Coordinates,
    coordinates_of,
    example_bound,
    plan_privacy,
    tables_of,
)
from privrec.run.simulation import Enrolled, Simulation
from privrec.scenario.kinds import MODELS, SERVER_OPTIMIZERS
from privrec.scenario.load import DeviceTier, Scenario, Train
from privrec.secagg.client import Policy
from privrec.server.optimizer import Optimizer, Schedule
from privrec.server.server import Completion, RoundPlan, Server

TABULATED_ITEMS = 2**22
"""Largest catalogue whose places in the memory a simulation keeps in a table."""

BYTES_A_COEFFICIENT = 4
_MOST_HALVINGS = 48


@dataclass(frozen=True)
class Plan:
    """A scenario for so many items and users: its tiers, its event and its protection.

    Attributes:
        items: size of the catalogue, or of the vocabulary.
        holders: training devices that hold each band, the weakest tier's band first.
        event: what each round is charged as, and ``examples`` as what at example level, if at all.
    """

    scenario: Scenario
    items: int
    users: int
    federation: Federation
    holders: tuple[int, ...]
    event: RoundEvent
    examples: RoundEvent | None
    protection: Protection

    @classmethod
    def of(
        cls, scenario: Scenario, items: int, users: int, federation: Federation | None = None
    ) -> Plan:
        """Plan a scenario, whose tiers may be made already; see :func:`plan_privacy`."""
        federation = federation or federation_of(scenario, items)
        shares = np.cumsum([tier.share for tier in federation.tiers])
        # As many as :func:`assign` gives each tier.
        counts = np.diff(np.rint(shares * users).astype(int), prepend=0)
        training = np.cumsum(counts * [tier.weight > 0 for tier in federation.tiers])
        holders = tuple(training[::-1].tolist())
        planned = plan_privacy(scenario, band_sizes(federation.layouts), holders)
        return cls(scenario, items, users, federation, holders, *planned)

    @cached_property
    def assigned(self) -> NDArray[np.int64]:
        """The tier of each user, see :func:`assign`."""
        return assign(self.users, self.federation, self.scenario.run.seed)

    def server(self, run_id: str) -> Server:
        """Return the server of a run at its first round; ``run_id`` names the run's draws."""
        scenario, federation = self.scenario, self.federation
        rounds = RoundPlan(
            run_id,
            scenario.plan_hash(),
            self.event,
            self.protection,
            federation,
            expected_cohort=scenario.devices.sampling_rate * self.holders[0],
            average=scenario.train.average,
            examples=self.examples,
        )
        # Gaussian item vectors (hence Gaussian coefficients), zero biases, Glorot dense weights.
        layout, rng = federation.layout, rng_for(scenario.run.seed, "weights")
        weights = np.zeros(layout.size, np.float32)
        layout.dense_of(weights)[...] = federation.tiers[0].model.network.initial_dense(rng)
        memory = layout.memory_of(weights)
        memory[...] = rng.normal(0, scenario.model.init_std, memory.shape)
        completion = Completion(
            federation,
            scenario.train if loss_of(scenario.train.loss).implicit else None,
            scenario.devices.aggregation,
            tuple(local_lr(scenario, federation, tier) for tier in federation.tiers),
        )
        return Server(rounds, weights, completion, _optimizer(scenario.train))

    def simulate(
        self, train: Interactions | Corpus, devices: SecretRoot, ask: Ask | None = None
    ) -> Simulation:
        """Return devices that train on ``train`` in this process, with ``devices`` as their secret.

        ``ask`` is how devices ask the server for neurons, in the scheme ``"requested"``.
        """
        scenario, popularity, cohorts = self.scenario, None, list[Cohort[Any]]()
        histories = Histories(np.arange(train.n_users), train.indptr, train.items)
        if scenario.train.selector == "popularity":
            popularity = popularity_of(train.item_counts())
        for tier in self.federation.tiers:
            members = np.flatnonzero(self.assigned == tier.index)
            if train.n_items <= TABULATED_ITEMS:
                tier = replace(tier, model=tier.model.tabulated())
            learner = learner_of(scenario, self.federation, tier, self.examples, popularity, ask)
            cohorts.append(Cohort.of(learner, histories.select(members)))
        policy = Policy(scenario.devices.min_cohort, scenario.privacy.colluding_share)
        return Simulation(
            self.federation,
            tuple(cohorts),
            population=self.users,
            protection=self.protection,
            enrolled=Enrolled(devices, policy),
            seed=scenario.run.seed,
            sampling_rate=scenario.devices.sampling_rate,
            dropout_rate=scenario.devices.dropout_rate,
            engine=scenario.run.engine,
            secure_sum=scenario.run.secure_sum,
            workers=scenario.run.workers,
        )

    def header(self, standing: PopulationBalance) -> dict[str, Any]:
        """Return what the header of a run's ledger says of its plan; see :class:`LedgerHeader`."""
        return {
            "scenario": self.scenario.document(),
            "version": privrec.__version__,
            "bands": list(band_sizes(self.federation.layouts)),
            "holders": list(self.holders),
            "capacities": [tier.capacity for tier in self.federation.tiers],
            "standing": asdict(standing),
        }


def _optimizer(train: Train) -> Optimizer:
    kind = SERVER_OPTIMIZERS[train.server_optimizer]
    own = {key: getattr(train, key) for key in kind.config.model_fields}
    schedule = Schedule(train.schedule, train.rounds, train.warmup_rounds)
    optimizer: Optimizer = kind.load()(train.server_lr, schedule, train.weight_decay, **own)
    return optimizer


# -------------------------- tiers and local training


def federation_of(scenario: Scenario, n_items: int) -> Federation:
    """Return the tiers of ``[devices]``, which must nest in a catalogue of so many items."""
    devices, tables = scenario.devices, tables_of(scenario, n_items)
    present = [tier for tier in devices.chain if tier.capacity != 0]
    halved = [(_halving(scenario, tier, tables), tier) for tier in present]
    described = sorted(halved, key=lambda pair: pair[0])
    halvings = [halving for halving, _ in described]
    if len(set(halvings)) < len(halvings):
        raise UsageError(
            f"devices.tiers: capacities {[2.0**-h for h in halvings]} for this catalogue; two "
            "tiers of the same capacity are one: put their shares together"
        )
    chain = coordinates_of(scenario, tables, halvings)
    tiers = tuple(
        Tier(index, 2.0**-halving, tier.share, tier.weight, _view(scenario, chain, index), *chain)
        for index, (halving, tier) in enumerate(described)
    )
    return Federation(tiers, sum(tier.share for tier in devices.chain if tier.capacity == 0))


def _halving(scenario: Scenario, tier: DeviceTier, tables: tuple[Table, Table | None]) -> int:
    """``h`` of a tier of capacity ``2^-h``; the largest that fits its memory."""
    if tier.capacity is not None:
        return round(-math.log2(tier.capacity))
    room = 1024 * (tier.memory_kib or 0)
    for halving in range(_MOST_HALVINGS):
        layout = _view(scenario, coordinates_of(scenario, tables, [halving]), 0).layout
        if layout.size * BYTES_A_COEFFICIENT <= room:
            return halving
    raise UsageError(
        f"devices.tiers: memory_kib = {tier.memory_kib} holds no part of this model; "
        "raise it, or leave the tier out"
    )


def _view(scenario: Scenario, chain: Coordinates, index: int) -> ModelView[Any]:
    vectors, biases = chain
    table, small = vectors.tables[index], None if biases is None else biases.tables[index]
    network = MODELS[scenario.model.kind].load().configured(scenario.model, table.dim)
    gram = packed_size(table.dim) if loss_of(scenario.train.loss).implicit else 0
    return ModelView(network, table, small, gram)


def assign(n_users: int, federation: Federation, seed: int) -> NDArray[np.int64]:
    """Draw each user's tier by the seed, or the number of tiers for a device without part.

    Every tier has its share to within one device.
    """
    shares = [*(tier.share for tier in federation.tiers), federation.absent]
    labels = np.searchsorted(np.rint(np.cumsum(shares) * n_users), np.arange(n_users), side="right")
    most = len(federation.tiers) - (federation.absent == 0)
    return rng_for(seed, "tiers").permutation(labels.clip(max=most))


def local_lr(scenario: Scenario, federation: Federation, tier: Tier) -> float:
    """Return the step size of a tier's devices."""
    train = scenario.train
    if scenario.devices.aggregation == "fair_averaging" and train.server_optimizer != "newton":
        # FAIR's devices step on a folded memory as it is, where a gradient step in isometric
        # coordinates is as many times shorter as slots are folded into one.
        return train.local_lr * (federation.tiers[0].capacity / tier.capacity)
    return train.local_lr


def learner_of(
    scenario: Scenario,
    federation: Federation,
    tier: Tier,
    examples: RoundEvent | None,
    popularity: NDArray[np.float64] | None = None,
    ask: Ask | None = None,
) -> Learner:
    """Return local training as ``[train]`` describes it, in a tier's memory.

    ``examples`` is the plan's example-level event; without one no example is hidden. ``popularity``
    are public cumulative probabilities of the items, for popular negatives.
    """
    train, newton = scenario.train, scenario.train.server_optimizer == "newton"
    names = Settings.__dataclass_fields__.keys() & type(train).model_fields.keys()
    own = {name: getattr(train, name) for name in names - {"local_lr"}}
    lr = local_lr(scenario, federation, tier)
    settings = Settings(**own, newton=newton, local_lr=lr, config=train)
    if scenario.model.learns != "interactions":
        return WordLearner(tier.model, settings, ask)
    hidden = example_bound(scenario, examples, federation.layout.size)
    return RecommenderLearner(tier.model, settings, popularity, hidden)


# -------------------------- the header of the ledger


class LedgerHeader(BaseModel):
    """What the header of a ledger declares and no charge tells.

    ``bands`` are coefficients of each, the band that every device holds first; ``standing`` is
    where the run's population stood when it began.
    """

    model_config = ConfigDict(frozen=True)

    scenario: Annotated[Scenario, PlainValidator(Scenario.model_validate)]
    simulated: StrictBool
    version: StrictStr
    bands: tuple[StrictInt, ...]
    holders: tuple[StrictInt, ...]
    capacities: tuple[float, ...]
    standing: Annotated[PopulationBalance, PlainValidator(PopulationBalance.from_json)]

    @property
    def coefficients(self) -> int:
        """Length of the shared vector."""
        return sum(self.bands)


def read_header(header: Mapping[str, Any], where: str) -> LedgerHeader:
    """Read what the header of a ledger declares, free of contradictions; errors name ``where``."""
    try:
        found = LedgerHeader.model_validate(dict(header))
    except (KeyError, TypeError, ValueError, ScenarioError) as error:
        raise IntegrityError(
            f"{where}: its header does not declare what a report needs ({error!r}); it was made by "
            "another version of privrec, with which the report is to be made"
        ) from None
    scenario = found.scenario
    hashes = {"scenario_hash": scenario.hash(), "privacy_hash": scenario.privacy_hash()}
    for name, own in hashes.items():
        if header.get(name) != own:
            raise IntegrityError(
                f"{where}: the header's {name} is not that of the scenario beside it; the ledger "
                "contradicts itself, rely on nothing in it"
            )
    return found
