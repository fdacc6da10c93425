"""Words and figures for people, the same on the console, in tables and in reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal

from privrec.run.record import Record, RunInfo

_ADVERSARIES = {
    "recipients": "recipients of the models",
    # With central noise no ε holds against the server itself, which has the sums before noise.
    "server": "somebody who knows every cohort",
}


REVEALED = (
    "Every device names the words of its text to the server, and the buckets that its hidden "
    "states fall into, and sends back which neurons it changed and how. Secure aggregation hides "
    "none of that and no noise was added: this scheme saves work and protects nothing."
)
"""What the server learns where devices ask it for output neurons."""

KEPT = (
    "Devices choose output neurons from their own copy of the model and ask for nothing; an update "
    "has the full length whatever they chose, so the server learns the sum alone."
)
"""The same where they choose for themselves."""


def adversary_text(name: str) -> str:
    """Say whom an ε holds against, in words, for "recipients" or "server"."""
    return _ADVERSARIES[name]


def epsilon_text(value: float | None, digits: int = 2) -> str:
    """Write ε rounded **up** to ``digits`` decimals, from 10^15 on to four digits; None is "∞"."""
    if value is None or math.isinf(value):
        return "∞"
    # In decimal, so that 1.24 stays 1.24 and anything above it, however little, becomes 1.25.
    exact = Decimal(repr(float(value)))
    long = exact.adjusted() >= 15
    unit = Decimal(1).scaleb(exact.adjusted() - 3 if long else -digits)
    return f"{exact.quantize(unit, ROUND_CEILING):{'.3e' if long else 'f'}}"


def opening_words(info: RunInfo) -> str:
    """Write the first line of a run: "Simulated run: …" where the devices are simulated."""
    kind = "Simulated run" if info.simulated else "Run"
    name = f"{info.name} ({info.title})" if info.title else info.name
    users = f", {info.population:,} devices" if info.population and info.simulated else ""
    resumed = f", going on after round {info.done}" if info.done else ""
    lost = " Its noise root is gone: rounds made again are charged again." if info.root_lost else ""
    return f"{kind}: {name}, {info.rounds:,} rounds{users}{resumed}. {_promise(info)}{lost}"


def _promise(info: RunInfo) -> str:
    if info.examples and not info.noise_known:
        limit = f", at most ε = {info.example_budget:g}" if info.example_budget else ""
        return f"{_users_promise(info)} Example-level privacy on the devices{limit}, a unit apart."
    return _users_promise(info)


def _users_promise(info: RunInfo) -> str:
    if not info.private and info.examples:
        return "No noise is added to the sums: no guarantee at user level."
    if not info.private:
        return "No noise is added: no privacy guarantee."
    if info.noise_known:
        return "The noise root is known: no privacy guarantee (ε = ∞)."
    if info.budget is None:
        return "User-level privacy without a limit on ε."
    adversary = adversary_text(info.budget_against)
    return f"User-level privacy, at most ε = {info.budget:g} against {adversary}."


def spent_text(info: RunInfo, record: Record) -> str:
    """Say ε spent, and of what budget, in a few characters: "ε 1.24 of 8", "no privacy"."""
    if not info.private:
        return "no privacy"
    if info.noise_known:
        return "ε ∞ (noise known)"
    spent = f"ε {epsilon_text(record.spent(info.budget_against))}"
    return spent if info.budget is None else f"{spent} of {info.budget:g}"


def headline_metric(metrics: Mapping[str, float]) -> str | None:
    """Pick the metric to show where there is room for one: HR of the sampled protocol, else any HR.

    Of next words it is the accuracy of the shortest list, of labels the precision.
    """

    def rank(name: str) -> tuple[bool, bool, bool, int, str]:
        depth = name.partition("@")[2]
        shortest = int(depth) if depth.isdigit() else 0
        return not name.startswith("hr@"), "hr@" not in name, "@" not in name, shortest, name

    return min(metrics, key=rank, default=None)


def metric_name(key: str) -> str:
    """Write a metric's key as people do: ``full_hr@10`` is "HR@10, full ranking"."""
    if key.startswith("own_"):
        return f"{metric_name(key[4:])}, own tier"
    base, ranking = (key[5:], ", full ranking") if key.startswith("full_") else (key, "")
    stem, at, depth = base.partition("@")
    names = {"hr": "HR", "ndcg": "NDCG"}
    return f"{names.get(stem, stem.capitalize())}{at}{depth}{ranking}"


def duration_text(seconds: float) -> str:
    """Write a span of time: "42 s", "3 min 05 s", "2 h 07 min"; under ten seconds "0.4 s"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
