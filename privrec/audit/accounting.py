"""Probes of what is charged: that it is what runs, and that it meets the budget."""

from __future__ import annotations

import math
from collections.abc import Iterator

from privrec.audit.bench import Harness
from privrec.audit.judging import CheckResult

_TOLERANCE = 1e-3  # of the looser accountant below the tighter, which rounding alone explains


def probe(bench: Harness) -> Iterator[CheckResult]:
    """All probes of the accounting of a scenario with noise."""
    yield _charged(bench)
    yield _budget(bench)


def _charged(bench: Harness) -> CheckResult:
    """The event names the mechanism, noise and sampling that server and devices use."""
    event, shares = bench.event, bench.protection.shares
    noise = "gaussian" if shares is None else "discrete_gaussian"
    multiplier = event.noise_multiplier if shares is None else shares.noise_multiplier
    grid = event.grid
    same = (
        event.mechanism == noise
        and event.noise_multiplier == multiplier
        and event.sampling_rate == bench.simulation.sampling_rate
        and (shares is None) == (grid is None)
    )
    if shares is not None and grid is not None:
        same &= grid.shares == max(b.least - b.colluders for b in shares.bands)
        same &= grid.dimension == sum(bench.sizes)
        same &= grid.squared_sensitivity == bench.protection.encoding.squared_bound
        same &= grid.excess_removed == shares.remove_excess
    return CheckResult(
        "what is charged is what runs",
        bool(same),
        f"{event.mechanism}, noise {event.noise_multiplier:.4f} of the sensitivity, sampling "
        f"{event.sampling_rate:g}",
        f"{noise}, {multiplier:.4f}, {bench.simulation.sampling_rate:g}",
    )


def _budget(bench: Harness) -> CheckResult:
    """ε of the planned rounds is within the budget, and a second accountant does not object."""
    privacy = bench.scenario.privacy
    against = privacy.budget_against
    first, second = bench.epsilon(against), bench.epsilon(against, "rdp")
    budget = math.inf if privacy.epsilon is None else privacy.epsilon
    agree = second >= first * (1 - _TOLERANCE)
    return CheckResult(
        "ε of the planned rounds",
        first <= budget and agree,
        f"{first:.4f} by loss distributions, {second:.4f} by Rényi divergences, at δ = "
        f"{privacy.delta:g} against {against}",
        "no budget; the latter is the looser" if budget == math.inf else f"at most {budget:g}",
    )
