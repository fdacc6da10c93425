"""A run and the lifetime budget of its population: refused before any data is touched, or reserved.

:mod:`privrec.privacy.population` keeps the budget; here it is asked about a scenario.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from privrec.errors import BudgetError, UsageError
from privrec.privacy import population
from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.ledger import Ledger
from privrec.privacy.population import PopulationBalance
from privrec.run.assembly import agreement_of, federation_of
from privrec.run.identity import Identity
from privrec.run.popularity import known_items, release_event
from privrec.run.privacy_plan import event_without_shares
from privrec.scenario.load import Scenario


def check(name: str | None, scenario: Scenario, *, known: bool = False) -> None:
    """Refuse a run that the lifetime budget does not allow, before its data is touched.

    Args:
        name: of the population, or None for a run that is tied to none.
        scenario: what is to be run.
        known: whether others know its noise.

    Raises:
        UsageError: when there is no such population, or others know the noise.
        BudgetError: when the lifetime limit would be exceeded.
    """
    if name is None:
        return
    if known:
        raise UsageError(
            f"population {name!r}: noise that others know protects nobody, so no limit holds; "
            "leave out unsafe_noise_key or --population"
        )
    tied = population.read(name)
    planned = _planned(scenario, known_items(scenario), scenario.population())
    after = epsilon(tied.counts + planned, tied.delta, tied.against)
    if after > tied.epsilon:
        raise BudgetError(
            f"population {name!r}: this run would bring its lifetime ε to {after:.4f}, and the "
            f"limit is {tied.epsilon:g} ({len(tied.runs)} runs spent {tied.spent():.4f}); nothing "
            "was read or charged. Plan fewer rounds or more noise"
        )


def reserve(name: str | None, scenario: Scenario, identity: Identity) -> PopulationBalance | None:
    """Set aside all that a run may charge; None for a run that is tied to no population.

    Raises:
        BudgetError: when another run has meanwhile reserved what this one would need.
    """
    if name is None:
        return None
    data = identity.data
    planned = _planned(scenario, data["items"], data["users"])
    return population.reserve(name, identity.run_id, planned)


def population_of(directory: Path) -> str | None:
    """The population that the run in a directory is tied to, or None."""
    with Ledger.open(directory / "ledger.jsonl", repair=False) as ledger:
        name = ledger.header.get("standing", {}).get("population")
    return name if isinstance(name, str) else None


def _planned(scenario: Scenario, items: int | None, users: int | None) -> Counter[RoundEvent]:
    """All that a run plans to charge.

    Where the sizes are not public before the data is read, shares of noise are taken for the
    Gaussian noise that they come near to; :func:`reserve` takes them for what they are.
    """
    if items is None or users is None:
        event = event_without_shares(scenario)
    else:
        event, _ = agreement_of(scenario, federation_of(scenario, items), users)
    before = release_event(scenario)
    return Counter({event: scenario.train.rounds}) + Counter([] if before is None else [before])
