"""The order of the items by popularity: released before the first round, and kept with the run.

It is charged before devices are asked and committed before it is used, as rounds are: a crash can
waste budget, never hide it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from privrec.device.counts import Counting, Order
from privrec.device.update import Round
from privrec.errors import BudgetError, IntegrityError, ReleaseRefused
from privrec.privacy.ledger import PREPARATION, Ledger
from privrec.privacy.population import PopulationCharge
from privrec.run.checkpoint import read_signed, write_signed
from privrec.run.directory import Identity
from privrec.run.loop import MOST_ATTEMPTS
from privrec.run.plan import Plan
from privrec.run.record import adversary_text
from privrec.server.server import released_sum

ORDER, _KIND = "catalogue.safetensors", "item order"


def released_order(
    plan: Plan,
    counting: Counting,
    ledger: Ledger,
    identity: Identity,
    collect: Callable[[Round], NDArray[np.int64]],
) -> Order:
    """Return the order of the noisy counts, of which another attempt is charged first.

    ``collect`` gives the sum of what devices count in an attempt, with the noise that they add.

    Raises:
        BudgetError: when an attempt would exceed the run's budget, or its population's.
        ReleaseRefused: when no attempt gave a sum.
    """
    root = identity.root("server")
    for attempt in range(ledger.attempts(PREPARATION), MOST_ATTEMPTS):
        _check_budgets(plan, counting, ledger)
        ledger.charge(PREPARATION, attempt, counting.event)
        round = counting.round(identity.run_id, attempt, plan.digest)
        try:
            total = collect(round)
        except ReleaseRefused:
            continue
        release = released_sum(round, total, counting.bound, root)
        ledger.commit(PREPARATION, attempt, release.tag)
        return by_counts(release.total)
    raise ReleaseRefused(
        f"{MOST_ATTEMPTS} counts of the items ended without a sum: there is no order to train by; "
        "see which devices drop out, and start a new run"
    )


def by_counts(counts: NDArray[np.integer]) -> Order:
    """Return the order of items by counts, the largest first."""
    return np.argsort(-counts, kind="stable")


def write_order(folder: Path, order: Order, identity: Identity) -> None:
    """Keep the order of a run, signed: by another one a model recommends other items."""
    write_signed(folder / ORDER, _KIND, {}, {"order": order}, identity.signing_key())


def read_order(folder: Path, items: int, key: Ed25519PublicKey) -> Order:
    """Return the order of the run in ``folder``; an IntegrityError says that it is not its own."""
    _, arrays = read_signed(folder / ORDER, _KIND, key)
    order = arrays.get("order", np.zeros(0))
    if order.dtype != np.int64 or not np.array_equal(np.sort(order), np.arange(items)):
        raise IntegrityError(
            f"{folder / ORDER}: no order of the {items} items of this catalogue; use the "
            "data that the run was started with, or restore the file"
        )
    return order


def _check_budgets(plan: Plan, counting: Counting, ledger: Ledger) -> None:
    privacy = plan.scenario.privacy
    if privacy.noise != "none" and privacy.epsilon is not None:
        against = privacy.budget_against
        spent = ledger.epsilon_after(counting.event, delta=privacy.delta, adversary=against)
        if spent > privacy.epsilon:
            raise BudgetError(
                f"another count of the items would bring ε to {spent:.4f} against "
                f"{adversary_text(against)}: the budget is {privacy.epsilon}. No order of the "
                "items was released, so there is no trained model"
            )
    if population := PopulationCharge.of(ledger.header, ended=False):
        population.cover(ledger.counts + Counter([counting.event]))
