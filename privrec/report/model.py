"""The report as data: what `report.json` holds, with its JSON Schema.

Every field says what it is and in which unit. Models are frozen and refuse unknown fields, so a
report that is read back is one that this version could have written. No field holds a realised
cohort size: ε against recipients is valid only while those stay with the operator.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from privrec.report.parts import (
    STARRED,
    Accounting,
    AuditPart,
    Definition,
    Deployment,
    ExampleLevel,
    Grade,
    Mechanism,
    OperatorsWord,
    Outputs,
    OutsideTheLedger,
    Part,
    Reading,
    Sampling,
    Scope,
    Segment,
    TierCost,
    TrustModel,
)
from privrec.report.spending import Signature
from privrec.run.record import OPERATOR_ONLY, OUTSIDE

SCHEMA: Final = "privrec-report-2"
"""Name and version of the schema; it changes when a field changes its meaning."""

Scalar = str | int | float | bool | None


def _without_cohorts(values: dict[str, Scalar]) -> dict[str, Scalar]:
    # A nested key arrives here as "outer.inner".
    named = sorted(key for key in values if OPERATOR_ONLY & set(key.split(".")))
    if named:
        raise ValueError(f"{named[0]!r} names a realised cohort size, which no report may hold")
    return values


Facts = Annotated[dict[str, Scalar], AfterValidator(_without_cohorts)]
"""Flat facts by name, none of which is a realised cohort size."""


class Adversary(Part):
    """Somebody the guarantee is against, and the ε that holds against them."""

    name: Literal["recipients", "server"]
    epsilon: float | None = Field(ge=0, description="PLD, rounded up; null is infinite.")
    epsilon_rdp: float | None = Field(ge=0, description="RDP cross-check; never below `epsilon`.")
    sees: str = Field(description="What this adversary observes.")
    assumes: str = Field(description="What must stay hidden for this ε to hold.")
    limits_run: bool = Field(description="Whether the budget is against this adversary.")


class Charged(Part):
    """One kind of privacy event in the ledger, and how often it was charged."""

    mechanism: Literal["gaussian", "discrete_gaussian", "none"]
    noise_multiplier: float = Field(ge=0)
    sampling_rate: float = Field(gt=0, le=1)
    count: int = Field(ge=1)
    accounted_multiplier: float = Field(
        ge=0, description="Noise multiplier of the Gaussian mechanism that is accounted."
    )
    hidden_rate: float = Field(
        gt=0, le=1, description="Sampling that recipients of the models do not see through."
    )
    squared_sensitivity: int | None = Field(
        default=None, ge=1, description="Squared norm of a device's integers; shares of noise only."
    )
    dimension: int | None = Field(default=None, ge=1, description="Coefficients of the sum.")
    shares: int | None = Field(
        default=None, ge=1, description="Shares of noise that are secret whoever colludes."
    )
    excess_removed: bool | None = Field(
        default=None, description="Whether the noise of survivors beyond the fewest is taken off."
    )
    small_cohort_delta: float | None = Field(
        default=None,
        ge=0,
        description="What a round adds to δ since small cohorts release nothing.",
    )


class Privacy(Part):
    """The guarantee and everything its meaning depends on."""

    private: bool = Field(description="Whether any finite ε holds.")
    unit: Literal["user"] = Field(description="Whose whole contribution is protected.")
    adjacency: Literal["zero-out"] = Field(
        description="One user's history is replaced by none; enrolment is public."
    )
    delta: float | None = Field(gt=0, lt=1, description="δ; null without noise.")
    adversaries: tuple[Adversary, ...] = Field(description="One entry each; each ε names one.")
    trust: str = Field(description="Who must be trusted with what.")
    noise: Literal["central", "distributed", "none"]
    mechanism: str = Field(description="The mechanism, in words.")
    noise_multiplier: float | None = Field(gt=0, description="Noise over sensitivity.")
    clip_norm: float | None = Field(gt=0, description="Largest L2 norm of one user's update.")
    rounding_bound_ratio: float | None = Field(
        gt=0, description="Sensitivity after integer rounding, over `clip_norm`."
    )
    sampling: Literal["poisson", "everybody"]
    sampling_rate: float = Field(gt=0, le=1, description="Chance of a user to be in a round.")
    population: int | None = Field(ge=1, description="Declared number of users, public.")
    expected_cohort: float | None = Field(ge=0, description="`population` × `sampling_rate`.")
    budget: float | None = Field(gt=0, description="Largest ε allowed; null is no limit.")
    budget_against: Literal["recipients", "server"]
    noise_known: bool = Field(description="Whether the noise came from an injected root.")
    charges: int = Field(ge=0, description="Charged (round, attempt) pairs in the ledger.")
    events: tuple[Charged, ...] = Field(description="What was charged; order does not matter.")
    ledger_head: str = Field(description="Hash of the last ledger entry, in hex.")
    ledger_key: str = Field(description="Ed25519 public key of the signed head, in hex.")
    ledger_signature: Signature = Field(
        description="Whether that key was given, or is the one that the ledger itself names."
    )


class Metric(Part):
    """One line of the accuracy table."""

    key: str = Field(description="Name in result.json, such as `hr@10`.")
    name: str
    protocol: str = Field(description="What the held-out item is ranked among.")
    value: float
    low: float | None = Field(description="Lower end of the 95 % bootstrap interval over users.")
    high: float | None = Field(description="Upper end of that interval.")
    baselines: dict[str, float] = Field(description="The same metric of simple baselines, by name.")


class Accuracy(Part):
    """How well the model recommends, from private data."""

    note: Literal["outside the guarantee"] = Field(
        default=OUTSIDE, description="These figures are computed from private data without noise."
    )
    holdout: Literal["test", "validation"]
    metrics: tuple[Metric, ...]


class Cost(Part):
    """What the run cost a device and this machine; some of it follows from private data."""

    note: Literal["outside the guarantee"] = Field(
        default=OUTSIDE, description="Memory and times follow from the histories, without noise."
    )
    upload_bytes: int | None = Field(ge=0, description="Bytes up, per device and round.")
    download_bytes: int | None = Field(ge=0, description="Bytes down, per device and round.")
    device_peak_bytes: int | None = Field(ge=0, description="Peak memory of one device, bytes.")
    cpu_s_per_device_round: float | None = Field(
        ge=0, description="CPU seconds of one device in one round, on this machine."
    )
    wall_s: float | None = Field(ge=0, description="Seconds of the whole run on this machine.")
    noise_deferred: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of the devices' own noise that lazy noise did not have to draw.",
    )


class Point(Part):
    """One point of a curve."""

    round: int = Field(ge=0)
    value: float


class Curve(Part):
    """A quantity by round."""

    key: str
    name: str
    note: str = Field(description="Empty, or the stamp of figures from private data.")
    points: tuple[Point, ...]


class Notice(Part):
    """Something a reader must know before relying on the claim."""

    level: Literal["serious", "caution"]
    grade: Grade = Field(description="Critical: ε is wrong or beside the point in ordinary use.")
    title: str
    text: str


WORD: Final = (
    "accuracy", "cost", "data", "model", "rows", "segments", "tiers", "audit", "gaps",
)  # fmt: skip
"""Fields that no ledger tells; so do the curves that carry the stamp of private data."""


class Report(Part):
    """One run, as a reviewer reads it."""

    report_schema: Literal["privrec-report-2"] = Field(default=SCHEMA)
    simulated: bool = Field(description="Whether the devices were simulated on one machine.")
    scenario: str
    title: str
    description: str
    run_id: str
    version: str = Field(description="Version of privrec that trained the model.")
    scenario_hash: str
    privacy_hash: str
    rounds: int = Field(ge=0, description="Rounds that were finished.")
    claim: str = Field(description="The guarantee, in one sentence or two.")
    missing: tuple[str, ...] = Field(description="Starred parts that the run has no facts for.")
    privacy: Privacy
    scope: Scope | None
    trust_model: TrustModel | None
    definition: Definition | None
    outputs: Outputs | None
    mechanism: Mechanism | None
    sampling: Sampling | None
    accounting: Accounting | None
    examples: ExampleLevel | None = Field(
        description="The guarantee of single interactions, a unit of its own; null where devices "
        "add no noise to their steps."
    )
    outside_the_ledger: OutsideTheLedger | None
    deployment: Deployment
    reading: Reading
    audit: AuditPart | None
    gaps: dict[str, str] = Field(
        default={}, description="What could not be measured after training, and why."
    )
    accuracy: Accuracy
    segments: tuple[Segment, ...] = Field(description="Accuracy by kind of user.")
    cost: Cost
    tiers: tuple[TierCost, ...] = Field(description="Costs and accuracy by capacity.")
    data: Facts
    model: Facts
    outside_the_guarantee: tuple[str, ...] = Field(
        default=("accuracy", "segments", "cost", "tiers", "data", "rows"),
        description="Fields computed from private data without noise; curves carry notes.",
    )
    rows: tuple[Facts, ...] = Field(description="Settings compared by the scenario, if any.")
    curves: tuple[Curve, ...]
    warnings: tuple[Notice, ...]
    operators_word: tuple[OperatorsWord, ...] = Field(
        description="What no verifier can see from the files."
    )

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        """No run is private whose report lacks a starred part."""
        lacking = [name for name in STARRED if getattr(self, name) is None]
        if list(self.missing) != lacking:
            raise ValueError(
                f"missing is {list(self.missing)}, and the parts lacking are {lacking}"
            )
        if self.privacy.private and lacking:
            raise ValueError(f"a run is called private, and its report lacks {', '.join(lacking)}")
        return self

    def adversary(self, name: str) -> Adversary:
        """The adversary of that name.

        Raises:
            KeyError: The report has none of that name.
        """
        found = {adversary.name: adversary for adversary in self.privacy.adversaries}
        return found[name]  # type: ignore[index]

    def curve(self, key: str) -> Curve | None:
        """The curve of that key, or None where the run has no such points."""
        return next((curve for curve in self.curves if curve.key == key), None)

    def metric(self, key: str) -> Metric | None:
        """The metric of that key, or None."""
        return next((metric for metric in self.accuracy.metrics if metric.key == key), None)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that every ``report.json`` of this version satisfies."""
    schema = Report.model_json_schema(mode="serialization")
    private = {"properties": {"privacy": {"properties": {"private": {"const": True}}}}}
    whole = {"properties": {name: {"type": "object"} for name in STARRED}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:privrec:{SCHEMA}",
        **schema,
        "if": private,
        "then": whole,
    }


def schema_text() -> str:
    """The JSON Schema as text, with a fixed order of keys."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def flat(values: Mapping[str, Any]) -> dict[str, Scalar]:
    """Nested facts as one level, with keys joined by dots; lists become comma-separated text."""
    return dict(_leaves(values, ""))


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Scalar]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", ", ".join(str(item) for item in value)
        else:
            yield f"{prefix}{key}", value
