"""The report as data: what `report.json` holds, with its JSON Schema.

Every field says what it is and in which unit. Models are frozen and refuse unknown fields, so a
report that is read back is one that this version could have written. No field holds a realised
cohort size: ε against recipients is valid only while those stay with the operator.

The starred parts (:data:`STARRED`) are those without which no run is called private. Each is filled
from facts of the run or left out; a report with one left out makes no claim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from privrec.run.record import OPERATOR_ONLY, OUTSIDE

STARRED: Final = (
    "scope",
    "trust_model",
    "definition",
    "outputs",
    "mechanism",
    "sampling",
    "accounting",
    "outside_the_ledger",
)
"""Parts without which a report refuses to call a run private."""

Signature = Literal["server key", "key named in the ledger"]
Grade = Literal["critical", "theoretical", "negligible"]


class Part(BaseModel):
    """Base of everything in a report: frozen, finite, nothing unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Point2(Part):
    """One point of a curve of two quantities."""

    x: float
    y: float


class Scope(Part):
    """What the claim is about, and what it is not about."""

    protects: str = Field(description="Whose data is protected, in one sentence.")
    not_protected: tuple[str, ...] = Field(min_length=1, description="What stays unprotected.")


class Actor(Part):
    """Somebody who takes part, and what they are trusted with."""

    name: str
    sees: str = Field(description="What they observe.")
    trusted_with: str = Field(description="What the claim relies on them for.")
    epsilon: float | None = Field(
        default=None, ge=0, description="ε that holds against them; null is none."
    )


class Fallback(Part):
    """What is left of the claim when an assumption fails."""

    when: str
    epsilon: float | None = Field(
        default=None, ge=0, description="ε that then holds; null is none."
    )
    means: str


class TrustModel(Part):
    """Who is trusted, what happens when they collude or drop out, and what is left then."""

    kind: Literal["trusted server", "devices", "nobody is relied on"]
    actors: tuple[Actor, ...] = Field(min_length=1)
    collusion: str
    drop_outs: str
    fallbacks: tuple[Fallback, ...] = Field(description="ε when an assumption fails.")


class Definition(Part):
    """The exact statement that ε and δ are about."""

    variant: Literal["(ε, δ)-differential privacy"] = "(ε, δ)-differential privacy"
    unit: Literal["user"]
    adjacency: Literal["zero-out"]
    neighbours: str = Field(description="Which two data sets are neighbours.")
    contribution_bounds: tuple[str, ...] = Field(min_length=1)
    data_domain: str = Field(description="What the data may be, and what is public of it.")
    unprotected_quantities: tuple[str, ...] = Field(min_length=1)


class ExampleLevel(Part):
    """The guarantee of single interactions, by noise that devices add to their own steps."""

    unit: Literal["example"] = "example"
    adjacency: Literal["one interaction removed or changed"] = "one interaction removed or changed"
    epsilon: float | None = Field(ge=0, description="ε at example level; null is none.")
    delta: float = Field(gt=0, lt=1, description="δ of it, over interactions.")
    budget: float | None = Field(gt=0, description="Largest ε allowed; null is no limit.")
    clip_norm: float = Field(
        gt=0, description="Most that one interaction moves a round's sums of gradients."
    )
    noise_multiplier: float | None = Field(gt=0, description="Noise over `clip_norm`.")
    charges: int = Field(ge=0, description="Entries of this unit in the ledger.")
    protects: str
    neighbours: str
    against: str
    mechanism: str
    sampling: str
    deferred: str = Field(description="How the noise is drawn lazily.")
    apart: str = Field(description="Why this ε is not added to the one of users.")


class Outputs(Part):
    """What may be released under the claim, and what may not."""

    covered: tuple[str, ...] = Field(min_length=1)
    not_covered: tuple[str, ...] = Field(min_length=1)


class NoiseBand(Part):
    """One band of the shared vector: the coefficients that one more tier holds."""

    capacity: float = Field(gt=0, le=1, description="Capacity of the weakest tier that holds it.")
    coefficients: int = Field(ge=1)
    noise_std: float = Field(gt=0, description="Accounted noise per coefficient, in update units.")
    noise_norm: float = Field(gt=0, description="Expected L2 norm of the noise in the band.")
    signal_norm: float = Field(
        ge=0, description="Largest expected L2 norm of the sum: every update of full length, alike."
    )


class Mechanism(Part):
    """How one round's release is made."""

    law: Literal["gaussian", "discrete_gaussian", "none"]
    clip_norm: float = Field(gt=0, description="Largest L2 norm of one user's update, C.")
    clipping: str = Field(description="What C bounds, and why it bounds devices of all tiers.")
    scale_bits: float = Field(gt=0)
    ring_bits: Literal[16, 32]
    squared_sensitivity: int = Field(ge=1, description="B²: squared norm of a user's integers.")
    quantisation: str
    bands: tuple[NoiseBand, ...] = Field(description="Noise by band; none without noise.")
    lazy_noise: str
    randomness: str
    floating_point: str


class Sampling(Part):
    """Who takes part in a round, as declared; realised sizes stay with the operator."""

    declared: Literal["poisson", "everybody"]
    rate: float = Field(gt=0, le=1, description="Chance of a user to be in a round.")
    population: int = Field(ge=1, description="Number of users that is accounted for.")
    expected_cohort: float = Field(gt=0)
    realised: str = Field(description="What is said of realised cohorts: never their sizes.")
    amplification: str


class RenyiPoint(Part):
    """Rényi divergence of the whole run at one order."""

    order: int = Field(ge=2)
    recipients: float | None = Field(ge=0, description="null: no bound at this order.")
    server: float | None = Field(ge=0)


class Lifetime(Part):
    """The population's budget over several runs, as it stood when the run began."""

    population: str
    epsilon: float = Field(gt=0, description="Lifetime limit.")
    delta: float = Field(gt=0, lt=1)
    against: Literal["recipients", "server"]
    runs_before: int = Field(ge=0)
    spent_before: float = Field(ge=0)
    reserved: float = Field(ge=0, description="Lifetime ε with all that this run may charge.")


class Accounting(Part):
    """How ε was computed, at which δ, and what is left of the budget."""

    accountant: str
    settings: str
    second: str = Field(description="The second accountant, by other mathematics.")
    delta: float = Field(gt=0, lt=1)
    why_delta: str
    curve: tuple[Point2, ...] = Field(description="δ(ε) against recipients: x is ε, y is δ.")
    curve_server: tuple[Point2, ...] = Field(description="The same, cohorts known.")
    renyi: tuple[RenyiPoint, ...] = Field(description="RDP of the whole run.")
    zcdp_server: float | None = Field(
        ge=0, description="ρ of zCDP, cohorts known; null where the noise is not Gaussian."
    )
    remaining: float | None = Field(ge=0, description="ε left of the run's own budget.")
    lifetime: Lifetime | None


class OutsideTheLedger(Part):
    """What no charge tells, and how it is dealt with."""

    runs_before: int = Field(ge=0, description="Other runs on this data in the run store.")
    tuning: str
    preprocessing: str
    early_stopping: str
    pre_training: str


class Deployment(Part):
    """Whether it is real, and whether as many users as are accounted for."""

    simulated: bool
    accounted_population: int | None = Field(ge=1)
    text: str


class Reading(Part):
    """What the number means for somebody who is in the data."""

    odds: float | None = Field(ge=1, description="Most that the odds of a guess grow by.")
    advantage: float = Field(ge=0, le=1, description="Most that a membership test gains.")
    trade_off: tuple[Point2, ...] = Field(
        description="x: chance of a false alarm, y: least chance of a miss, for any test."
    )
    participation: str


class Checked(Part):
    """One probe of the audit of this build."""

    probe: str
    passed: bool
    found: str
    expected: str


class AuditPart(Part):
    """What `privrec audit` found on this build with this scenario."""

    version: str
    scenario_hash: str
    passed: bool
    checks: tuple[Checked, ...]
    lower_bound: float | None = Field(ge=0, description="Empirical lower bound on ε.")
    confidence: float | None = Field(ge=0, le=1)
    claimed: float | None = Field(ge=0, description="ε that the bound must not exceed.")
    method: str


class Segment(Part):
    """Accuracy of a part of the users; outside the guarantee."""

    by: Literal["activity", "item popularity"]
    name: str
    share: float = Field(ge=0, le=1, description="Of the measured users, to two digits.")
    metrics: dict[str, float]


class TierCost(Part):
    """What devices of one capacity send, hold and get."""

    capacity: float = Field(ge=0, le=1)
    share: float = Field(ge=0, le=1)
    upload_bytes: int | None = Field(ge=0)
    download_bytes: int | None = Field(ge=0)
    device_peak_bytes: int | None = Field(ge=0)
    metrics: dict[str, float]


class OperatorsWord(Part):
    """Something that no verifier can see from the files."""

    title: str
    text: str


SCHEMA: Final = "privrec-report-2"
"""Name and version of the schema; it changes when a field changes its meaning."""

Scalar = str | int | float | bool | None


def _without_cohorts(values: dict[str, Scalar]) -> dict[str, Scalar]:
    # A nested key arrives here as "outer.inner".
    named = sorted(key for key in values if OPERATOR_ONLY & set(key.split(".")))
    if named:
        raise ValueError(f"{named[0]!r} names a realised cohort size, which no report may hold")
    return values


Flat = Annotated[dict[str, Scalar], AfterValidator(_without_cohorts)]
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


WORD: Final = ("accuracy", "cost", "data", "model", "rows", "segments", "tiers", "audit", "gaps")
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
    data: Flat
    model: Flat
    outside_the_guarantee: tuple[str, ...] = Field(
        default=("accuracy", "segments", "cost", "tiers", "data", "rows"),
        description="Fields computed from private data without noise; curves carry notes.",
    )
    rows: tuple[Flat, ...] = Field(description="Settings compared by the scenario, if any.")
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
    found: dict[str, Scalar] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": each for inner, each in flat(value).items()}
        elif isinstance(value, list | tuple):
            found[key] = ", ".join(str(item) for item in value)
        else:
            found[key] = value
    return found
