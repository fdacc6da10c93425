"""Ledgers in the words of other accountants: dp-accounting's events and Opacus' state.

Both say what was done, round by round, as one adversary sees it; neither knows adjacency by
zero-out, shares of noise, or that cohorts are hidden from some only. What they cannot say is
refused rather than approximated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from privrec.errors import UsageError
from privrec.privacy.events import Adversary, RoundEvent

Counts = Counter[RoundEvent]
OpacusMechanism = Literal["rdp", "prv"]


def to_dp_event(counts: Mapping[RoundEvent, int], adversary: Adversary) -> Any:
    """What was charged, as one composed ``dp_accounting.DpEvent``.

    Promise: its ε by a ``PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)`` is that of the
    ledger but for the grid, where the noise is the server's. Noise in shares is the Gaussian that
    it is accounted as, without what the ledger adds to δ for the shares' own slack.

    Args:
        counts: events and how often each was charged, as ``Ledger.counts``.
        adversary: who sees it.

    Raises:
        UsageError: for Skellam noise, which dp-accounting has no event for.
    """
    from dp_accounting import dp_event

    return dp_event.ComposedDpEvent(
        [
            dp_event.SelfComposedDpEvent(event.dp_event(adversary), count)
            for event, count in counts.items()
        ]
    )


def from_dp_event(event: Any) -> Counts:
    """The rounds that a ``dp_accounting.DpEvent`` is made of.

    Args:
        event: Gaussian events, Poisson-sampled or not, composed and self-composed at will.

    Returns:
        Events and how often each is in it.

    Raises:
        UsageError: when there is an event of another kind in it.
    """
    from dp_accounting import dp_event

    if isinstance(event, dp_event.ComposedDpEvent):
        return sum((from_dp_event(each) for each in event.events), Counter())
    if isinstance(event, dp_event.SelfComposedDpEvent):
        inner = from_dp_event(event.event)
        return Counter({each: times * int(event.count) for each, times in inner.items()})
    if isinstance(event, dp_event.NoOpDpEvent):
        return Counter()
    if isinstance(event, dp_event.NonPrivateDpEvent):
        return Counter({RoundEvent("none", 0.0): 1})
    rate = 1.0
    if isinstance(event, dp_event.PoissonSampledDpEvent):
        rate, event = float(event.sampling_probability), event.event
    if isinstance(event, dp_event.GaussianDpEvent):
        return Counter({RoundEvent("gaussian", float(event.noise_multiplier), rate): 1})
    raise UsageError(
        f"{type(event).__name__}: a ledger holds Gaussian rounds, Poisson-sampled or not; account "
        "for other mechanisms with dp-accounting itself"
    )


def to_opacus(
    counts: Mapping[RoundEvent, int], adversary: Adversary, mechanism: OpacusMechanism = "prv"
) -> dict[str, Any]:
    """What was charged, as the ``state_dict`` of an Opacus accountant.

    Opacus accounts for adding or removing one record, where a ledger is about replacing a user's
    history by none; for the Gaussian mechanism under Poisson sampling both give the same ε.

    Args:
        counts: events and how often each was charged, as ``Ledger.counts``.
        adversary: who sees it.
        mechanism: which of Opacus' accountants is to load it.

    Raises:
        UsageError: for noise in shares or no noise, which Opacus cannot state.
    """
    for event in counts:
        if event.mechanism != "gaussian":
            raise UsageError(
                f"mechanism {event.mechanism!r}: Opacus' accountants know Gaussian noise alone; "
                "export to dp-accounting, or take ε from privrec"
            )
    history = [
        (event.noise_multiplier, event.rate_against(adversary), count)
        for event, count in counts.items()
    ]
    return {"history": history, "mechanism": mechanism}


def from_opacus(state: Mapping[str, Any]) -> Counts:
    """The rounds that the ``state_dict`` of an Opacus accountant holds.

    Raises:
        UsageError: when it is of an accountant that does not sample by Poisson, or malformed.
    """
    if state.get("mechanism") not in ("rdp", "prv"):
        raise UsageError(
            f"mechanism {state.get('mechanism')!r}: it must be 'rdp' or 'prv', whose steps are "
            "Gaussian with Poisson sampling; account for others with Opacus"
        )
    counts: Counts = Counter()
    try:
        for noise_multiplier, sample_rate, steps in state["history"]:
            counts[RoundEvent("gaussian", float(noise_multiplier), float(sample_rate))] += int(
                steps
            )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"history: {error!r}; it must be a list of (noise multiplier, sample rate, steps), as "
            "accountant.state_dict() gives it"
        ) from None
    return counts
