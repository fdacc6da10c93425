"""The audit: what this build does with a scenario, measured against what is accounted for it.

It drives the parts that a run drives, on stand-in histories, so it touches no data and costs no
budget. Most of it looks from inside, since black boxes hide ordinary mistakes: a third too little
noise goes unseen by the best attack, and 1 % is seen by counting.
"""

from __future__ import annotations

from collections.abc import Iterator

import privrec
from privrec.audit import examples, noise, rounds
from privrec.audit.canaries import CONFIDENCE, Attack
from privrec.audit.harness import Harness, checked
from privrec.errors import PrivrecError, UsageError
from privrec.report.model import AuditPart, Checked
from privrec.run.loop import one_thread
from privrec.scenario.load import Scenario

_NO_NOISE = (
    "The scenario adds no noise, so there is no ε to hold it to: an attacker who sees a sum may "
    "learn anything of a user. Clipping, rounding and sums were checked all the same."
)
_INTERACTIONS = (
    "The noise hides single interactions, not users, so no canary is a user: what one interaction "
    "moves, the noise of user vectors and that of sums were looked at from inside."
)
_NO_CANARIES = "Canaries were left out; the checks look from inside."


def audit(scenario: Scenario, *, canaries: int = 1000, key: bytes | None = None) -> AuditPart:
    """Measure this build against what is accounted for a scenario.

    Promise: no data is looked at, nothing is written, and no budget is spent. An honest build
    fails with a probability below one in a million. What each probe sees is in ``docs/audit.md``.

    Args:
        scenario: its numbers that are not public are made up; UsageError when it cannot be run, or
            learns from texts or labels.
        canaries: at most so many for the empirical bounds; below 2 leaves them out.
        key: what all secrets of the audit derive from, for tests that repeat; by default the
            operating system gives one.

    Returns:
        All checks; the audit passed when every one did. ``lower_bound`` is that of the one-run
        audit, None without noise or without canaries.
    """
    with one_thread():
        harness = Harness.of(scenario, key)
        private, attack = harness.plan.event.is_private, Attack(harness, canaries)
        first = {"accounting": rounds.probe_accounting, "noise": noise.probe}
        probing = {**rounds.PROBES, **rounds.SUMS}
        if private:
            probing = {**first, "sampling": rounds.probe_sampling, **probing}
        elif harness.of_examples:
            probing = {**first, **examples.PROBES, **rounds.SUMS}
        probing["order of items"] = noise.probe_order
        probing["evaluation"] = noise.probe_evaluation
        probes = {name: probe(harness) for name, probe in probing.items()}
        probes["lazy noise"] = noise.probe_lazy(harness.root)
        if private and canaries >= 2:
            probes["canaries"] = attack.probe()
        checks = [check for name, probe in probes.items() for check in _findings(name, probe)]
    bare = _INTERACTIONS if harness.of_examples else _NO_NOISE
    method = bare if not private else attack.method or _NO_CANARIES
    if harness.stand_ins:
        method += (
            " An audit reads no data. It stands in for what the scenario does not tell of it: "
            f"{harness.stand_ins}."
        )
    return AuditPart(
        version=privrec.__version__,
        scenario_hash=scenario.hash(),
        passed=all(check.passed for check in checks),
        checks=tuple(checks),
        lower_bound=attack.lower_bound,
        confidence=None if attack.lower_bound is None else CONFIDENCE,
        # An auditor of sums sees what recipients see.
        claimed=harness.epsilon("recipients") if private else None,
        method=method,
    )


def _findings(name: str, probe: Iterator[Checked]) -> Iterator[Checked]:
    """What a probe finds; a part that refuses to work has not done what is accounted."""
    try:
        yield from probe
    except UsageError:
        raise
    except PrivrecError as error:
        yield checked(name, False, f"refused: {error}", "does its work")
