"""What a report says of single interactions: a second guarantee, in a unit of its own.

Devices that add noise to their own steps protect an example from whoever sees their upload. That ε
stands beside the one of users and is never added to it: they bound different changes of the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from privrec.privacy.events import RoundEvent, epsilon
from privrec.report.figures import delta_text
from privrec.report.model import ExampleLevel
from privrec.report.sections import Section
from privrec.run.plan import LedgerHeader
from privrec.run.wording import epsilon_text


def example_level(
    charged: Mapping[RoundEvent, int], declaration: LedgerHeader, *, noise_known: bool
) -> ExampleLevel | None:
    """The guarantee of the ledger's example-level entries; None where devices add no such noise.

    Args:
        charged: how often each event was entered for examples.
        declaration: of the ledger's header.
        noise_known: whether others know the devices' secrets.
    """
    privacy = declaration.scenario.privacy
    if privacy.local == "none" or privacy.local_clip_norm is None:
        return None
    value = epsilon(charged, privacy.local_delta, "server")
    holds = not noise_known and math.isfinite(value) and bool(charged)
    return ExampleLevel(
        epsilon=value if holds else None,
        delta=privacy.local_delta,
        budget=privacy.local_epsilon,
        clip_norm=privacy.local_clip_norm,
        noise_multiplier=min((event.noise_multiplier for event in charged), default=None),
        charges=sum(charged.values()),
        protects="Each single interaction of an enrolled user: whether it is in the history, and "
        "which item it is of.",
        neighbours="Two histories are neighbours when one interaction in the one is missing in the "
        "other, or is of another item there. That the user has a history, and whatever several of "
        "its interactions show together, is not what this ε is about.",
        against="Whoever sees what a device uploads, the server and its operator included.",
        mechanism=f"Gaussian noise in every local step, on user vector, item memory and dense "
        "weights as one vector. Each interaction is in one step of a round, and its gradient is "
        f"clipped to {privacy.local_clip_norm / 2:g}, so that removing or changing one moves the "
        f"sums of a round by at most {privacy.local_clip_norm:g} in L2.",
        sampling="No amplification is counted: a device that takes part moves a sum by more than "
        "one interaction. A user is accounted for as taking part in every charged round.",
        deferred="Noise of item blocks that no step reads is owed, and drawn at once when a step "
        "reads them or before the upload; the law is that of noise in every step.",
        apart="This ε and the one at user level bound different changes of the data. They hold at "
        "once, and are never added.",
    )


def section(part: ExampleLevel) -> Section:
    """The guarantee as pairs, for the page and for Markdown."""
    spent = "∞: no guarantee" if part.epsilon is None else epsilon_text(part.epsilon)
    limit = f"; the run halts before it exceeds {part.budget:g}" if part.budget else ""
    return Section(
        "examples",
        "Single interactions: a guarantee of another unit",
        (
            ("Unit", "One interaction (example level)."),
            ("ε", f"{spent} at δ = {delta_text(part.delta)}{limit}."),
            ("Protected", part.protects),
            ("Neighbours", part.neighbours),
            ("Against", part.against),
            ("Mechanism", part.mechanism),
            (
                "Noise multiplier",
                f"{part.noise_multiplier:.4g} standard deviations per unit of sensitivity, "
                f"{part.charges:,} charges"
                if part.noise_multiplier
                else "none",
            ),
            ("Lazy noise", part.deferred),
            ("Sampling", part.sampling),
            ("Beside the user level", part.apart),
        ),
    )


def sentence(epsilon_of_examples: float | None, delta: float | None) -> str:
    """The sentence that a claim ends with where devices protect examples."""
    if delta is None:
        return ""
    if epsilon_of_examples is None:
        return " At example level there is no guarantee either: the devices’ noise can be known."
    return (
        f" In another unit, and not to be added: it is ({epsilon_text(epsilon_of_examples)}, "
        f"{delta_text(delta)})-differentially private at example level, where neighbours differ in "
        "one interaction, against whoever sees a device’s uploads."
    )
