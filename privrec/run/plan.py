"""The plan of a run: what all parties agree on before the first round, from public numbers alone.

It is made once and passed on. The signed header of the ledger declares it, so that a report can be
computed again from the ledger alone, and whoever edits one can be held to what was declared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PlainValidator, StrictBool, StrictInt, StrictStr

import privrec
from privrec.device.tier import Federation, ModelView, Tier
from privrec.device.update import Counting, Evaluating, Protection
from privrec.embedding.table import Table
from privrec.errors import IntegrityError, ScenarioError, UsageError
from privrec.models.layout import band_sizes, packed_size
from privrec.privacy.events import RoundEvent
from privrec.privacy.population import PopulationBalance
from privrec.randomness import rng_for
from privrec.run.privacy_plan import (
    Coordinates,
    coordinates_of,
    counting_of,
    enrolled,
    evaluating_of,
    plan_privacy,
    tables_of,
)
from privrec.scenario.kinds import MODELS, ImplicitALS
from privrec.scenario.load import DeviceTier, Scenario
from privrec.secagg.keys import statement

BYTES_A_COEFFICIENT = 4
_MOST_HALVINGS = 48


@dataclass(frozen=True)
class Plan:
    """A scenario for so many items and users: its tiers, its event and its protection.

    Attributes:
        items: size of the catalogue, or of the vocabulary; ``catalogue`` has words beyond it too.
        devices: of the ``users``, those that have a device of some capacity.
        holders: training devices that hold each band, the weakest tier's band first.
        event: what each round is charged as, and ``examples`` as what at example level, if at all.
        counting: how the order of the items is released before the first round, if it is.
        evaluating: how the accuracy of the model is released after the last round, if it is.
        order: digest of that order, once it is known.
    """

    scenario: Scenario
    items: int
    catalogue: int
    users: int
    devices: int
    federation: Federation
    holders: tuple[int, ...]
    event: RoundEvent
    examples: RoundEvent | None
    protection: Protection
    counting: Counting | None
    evaluating: Evaluating | None
    order: bytes = b""

    @classmethod
    def of(
        cls,
        scenario: Scenario,
        items: int,
        users: int,
        federation: Federation | None = None,
        calibrated: float | None = None,
        catalogue: int | None = None,
    ) -> Plan:
        """Plan a scenario, whose tiers may be made already; see :func:`plan_privacy`.

        The ``catalogue`` has as many ``items`` unless a vocabulary has no room for all words.
        """
        catalogue = catalogue or items
        federation = federation or federation_of(scenario, items)
        shares = np.cumsum([tier.share for tier in federation.tiers])
        # As many as :func:`assign` gives each tier.
        counts = np.diff(np.rint(shares * users).astype(int), prepend=0)
        training = np.cumsum(counts * [tier.weight > 0 for tier in federation.tiers])
        holders = tuple(training[::-1].tolist())
        sizes = band_sizes(federation.layouts)
        devices = enrolled(scenario, users)
        sums = counting_of(scenario, catalogue, devices), evaluating_of(scenario, devices)
        beside = [each.event for each in sums if each]
        planned = plan_privacy(scenario, sizes, holders, calibrated, beside)
        sizes_of = items, catalogue, users, devices
        return cls(scenario, *sizes_of, federation, holders, *planned, *sums)

    @property
    def beside(self) -> tuple[RoundEvent, ...]:
        """What is charged once, before the first round and after the last."""
        return tuple(each.event for each in (self.counting, self.evaluating) if each)

    @property
    def digest(self) -> str:
        """What devices agree to, in hex: the scenario, and the order of items that was released."""
        agreed = self.scenario.plan_hash()
        return statement("ordered plan", agreed, self.order).hex() if self.order else agreed

    @cached_property
    def assigned(self) -> NDArray[np.int64]:
        """The tier of each user, see :func:`assign`."""
        return assign(self.users, self.federation, self.scenario.run.seed)

    def header(self, standing: PopulationBalance) -> dict[str, Any]:
        """Return what the header of a run's ledger says of its plan; see :class:`LedgerHeader`."""
        return {
            "scenario": self.scenario.document(),
            "version": privrec.__version__,
            "items": self.catalogue,
            "devices": self.devices,
            "bands": list(band_sizes(self.federation.layouts)),
            "holders": list(self.holders),
            "capacities": [tier.capacity for tier in self.federation.tiers],
            "standing": asdict(standing),
        }


# -------------------------- tiers


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
    model, gram = scenario.model, 0
    if isinstance(scenario.train, ImplicitALS):
        gram = packed_size(table.dim)

    def network() -> Any:
        return MODELS[model.kind].load().configured(model, table.dim)

    return ModelView(model.dense_weights(table.dim), network, table, small, gram)


def assign(n_users: int, federation: Federation, seed: int) -> NDArray[np.int64]:
    """Draw each user's tier by the seed, or the number of tiers for a device without part.

    Every tier has its share to within one device.
    """
    shares = [*(tier.share for tier in federation.tiers), federation.absent]
    labels = np.searchsorted(np.rint(np.cumsum(shares) * n_users), np.arange(n_users), side="right")
    most = len(federation.tiers) - (federation.absent == 0)
    return rng_for(seed, "tiers").permutation(labels.clip(max=most))


# -------------------------- the header of the ledger


class LedgerHeader(BaseModel):
    """What the header of a ledger declares and no charge tells.

    ``items`` and ``devices`` are those of a count of items; ``bands`` are coefficients of each, the
    band that every device holds first; ``standing`` is where the run's population stood when it
    began.
    """

    model_config = ConfigDict(frozen=True)

    scenario: Annotated[Scenario, PlainValidator(Scenario.model_validate)]
    simulated: StrictBool
    version: StrictStr
    items: StrictInt
    devices: StrictInt
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
