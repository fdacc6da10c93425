"""A draft entry for a public registry of deployments of differential privacy.

It follows the fields of the OpenDP deployments registry, tier 3: everything that a reader needs to
judge the deployment, down to the accountant. It is a draft: what only the operator knows is marked
as such, and a simulated run says that it is no deployment.
Source: OpenDP, "Differential Privacy Deployments Registry" (2025).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from privrec.report.model import Report
from privrec.run.wording import epsilon_text

TIER = 3
OPEN = "(the operator fills this in)"


def to_registry(report: Report) -> str:
    """The draft as YAML (of the kind that JSON strings are part of), ending in a line end."""
    note = (
        "# Draft. This run is SIMULATED: it is not a deployment, and not to be registered.\n"
        if report.simulated
        else "# Draft. Fill in what only the operator knows before it is sent.\n"
    )
    return note + "\n".join(_lines(_entry(report), 0)) + "\n"


def _entry(report: Report) -> dict[str, Any]:
    privacy, definition = report.privacy, report.definition
    return {
        "tier": TIER,
        "status": "simulated" if report.simulated else "deployed",
        "name": report.title or report.scenario,
        "description": report.description or OPEN,
        "data_curator": OPEN,
        "intended_use": "Training of a recommender over users' own devices",
        "publication_date": OPEN,
        "data_product": {
            "type": "machine learning model",
            "releases": report.rounds,
            "covered": list(report.outputs.covered) if report.outputs else [],
        },
        "dp_flavor": {
            "name": "approximate differential privacy",
            "definition": definition.variant if definition else None,
            "unit": privacy.unit,
            "adjacency": privacy.adjacency,
            "neighbours": definition.neighbours if definition else None,
            "bounds": list(definition.contribution_bounds) if definition else [],
            "unprotected": list(definition.unprotected_quantities) if definition else [],
        },
        "model": {
            "kind": report.trust_model.kind if report.trust_model else None,
            "actors": [actor.name for actor in report.trust_model.actors]
            if report.trust_model
            else [],
        },
        "privacy_loss": {
            "private": privacy.private,
            "delta": privacy.delta,
            **{f"epsilon_{each.name}": _loss(each.epsilon) for each in privacy.adversaries},
            "lifetime_budget": report.accounting.lifetime.epsilon
            if report.accounting and report.accounting.lifetime
            else None,
        },
        "mechanism": {
            "law": report.mechanism.law if report.mechanism else None,
            "noise_multiplier": privacy.noise_multiplier,
            "clip_norm": privacy.clip_norm,
            "sampling": privacy.sampling,
            "sampling_rate": privacy.sampling_rate,
            "population": privacy.population,
        },
        "accounting": {
            "accountant": report.accounting.accountant if report.accounting else None,
            "post_processing": "none that looks at the data again",
        },
        "implementation": {"library": "privrec", "version": report.version, "open_source": True},
        "justification": report.accounting.why_delta if report.accounting else None,
        "verification": {
            "report": "report.json",
            "run": report.run_id,
            "ledger_head": privacy.ledger_head,
            "server_key": privacy.ledger_key,
        },
    }


def _loss(value: float | None) -> str:
    return "infinite" if value is None else epsilon_text(value)


def _lines(value: Mapping[str, Any], depth: int) -> Iterator[str]:
    """Block YAML, whose leaves are JSON: every JSON string, number and null is YAML too."""
    margin = "  " * depth
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield f"{margin}{name}:"
            yield from _lines(inner, depth + 1)
        elif isinstance(inner, Sequence) and not isinstance(inner, str) and inner:
            yield f"{margin}{name}:"
            yield from (f"{margin}  - {_leaf(each)}" for each in inner)
        else:
            yield f"{margin}{name}: {_leaf(inner)}"


def _leaf(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
