"""What the header of a ledger declares, so that a report can be recomputed from the ledger alone.

The header is signed with the rest of the ledger. So whoever edits a report afterwards can be held
to what was declared before the first round: the whole scenario, whether devices are simulated, how
the shared vector is divided into bands, and how many runs the same machine made before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import privrec
from privrec.errors import IntegrityError, ScenarioError
from privrec.models.layout import band_sizes
from privrec.privacy.population import PopulationBalance
from privrec.run.assembly import federation_of, holders_of
from privrec.scenario.load import Scenario


@dataclass(frozen=True)
class LedgerHeader:
    """The facts of a header that no charge tells.

    Args:
        scenario: what was to be run.
        simulated: whether the devices were simulated.
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


def ledger_header(
    scenario: Scenario, *, items: int, users: int, simulated: bool, standing: PopulationBalance
) -> dict[str, Any]:
    """The entries of a header that :func:`read` gives back.

    Args:
        scenario: what is to be run.
        items: size of the catalogue, public.
        users: how many are enrolled, public.
        simulated: whether the devices are simulated.
        standing: where the run's population stands.
    """
    federation = federation_of(scenario, items)
    return {
        "scenario": json.loads(scenario.to_json()),
        "simulated": simulated,
        "version": privrec.__version__,
        "bands": list(band_sizes(federation.layouts)),
        "holders": holders_of(users, federation),
        "capacities": [tier.capacity for tier in federation.tiers],
        "standing": standing.to_json(),
    }


def read(header: Mapping[str, Any], where: str) -> LedgerHeader:
    """What a header declares.

    Args:
        header: of a ledger.
        where: what to call the ledger in errors.

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
    for name, own in (
        ("scenario_hash", scenario.hash()),
        ("privacy_hash", scenario.privacy_hash()),
    ):
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
