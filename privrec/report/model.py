"""The report as data: what `report.json` holds, with its JSON Schema.

Models are frozen and refuse unknown fields, so a report that is read back is one that this version
could have written. No field holds a realised cohort size: ε against recipients is valid only while
those stay with the operator.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from privrec.run.record import OPERATOR_ONLY, OUTSIDE

SCHEMA: Final = "privrec-report-2"
"""Name and version of the schema; it changes when a field changes its meaning."""

STARRED: Final = (
    *("scope", "trust_model", "definition", "outputs"),
    *("mechanism", "sampling", "accounting", "outside_the_ledger"),
)
"""Parts without which no run is called private: filled from facts of the run, or left out."""

WORD: Final = ("accuracy", "cost", "data", "model", "rows", "segments", "tiers", "audit", "gaps")
"""Fields that no ledger tells; so do the curves that carry the stamp of private data."""

TOLD: Final = ("told", "told_signature")
"""Fields that no ledger of training elsewhere tells."""

Signature = Literal["server key", "key named in the ledger"]
Against = Literal["recipients", "server"]
Law = Literal["gaussian", "discrete_gaussian", "none", "other"]
Adjacency = Literal["zero-out", "add-or-remove", "replace-one"]
How = Literal["poisson", "everybody", "other"]
Delta = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Texts = Annotated[tuple[str, ...], Field(min_length=1)]
Scalar = str | int | float | bool | None


def _without_cohorts(values: dict[str, Scalar]) -> dict[str, Scalar]:
    # A nested key arrives here as "outer.inner".
    named = sorted(key for key in values if OPERATOR_ONLY & set(key.split(".")))
    if named:
        raise ValueError(f"{named[0]!r} names a realised cohort size, which no report may hold")
    return values


Flat = Annotated[dict[str, Scalar], AfterValidator(_without_cohorts)]
"""Flat facts by name, none of which is a realised cohort size."""


class Part(BaseModel):
    """Base of everything in a report: frozen, finite, nothing unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Point2(Part):
    """One point of a curve of two quantities."""

    x: float
    y: float


class Told(Part):
    """What the operator says of training that privrec did not do; null is what nobody said."""

    name: str | None = Field(None, description="What was trained, in a few words.")
    description: str | None = None
    operator: str | None = Field(None, description="Who did it, and whom to ask.")
    library: str | None = Field(None, description="What it was done with, and its version.")
    one_unit: str | None = Field(None, description="What one unit is: one row, one customer.")
    population: PositiveInt | None = Field(None, description="Number of units in the data.")
    clip_norm: PositiveFloat | None = Field(None, description="Largest norm of what one unit adds.")
    clipping: str | None = Field(None, description="How that bound is kept.")
    contributions: str | None = Field(None, description="What of the data one unit may be in.")
    data_domain: str | None = Field(None, description="What the data may be; what is public of it.")
    sampling: str | None = Field(None, description="How the units of a release were drawn.")
    randomness: str | None = Field(None, description="Which generator the noise is from.")
    floating_point: str | None = Field(None, description="What its rounding may tell.")
    releases: tuple[str, ...] = Field((), description="What leaves the operator.")
    runs_before: NonNegativeInt | None = Field(None, description="Other training on the same data.")
    tuning: str | None = None
    preprocessing: str | None = None
    early_stopping: str | None = None
    pre_training: str | None = None


class Scope(Part):
    """What the claim is about, and what it is not about."""

    protects: str = Field(description="Whose data is protected, in one sentence.")
    not_protected: Texts = Field(description="What stays unprotected.")


class Actor(Part):
    """Somebody who takes part, and what they are trusted with."""

    name: str
    sees: str = Field(description="What they observe.")
    trusted_with: str = Field(description="What the claim relies on them for.")
    epsilon: NonNegativeFloat | None = Field(None, description="ε against them; null is none.")


class Fallback(Part):
    """What is left of the claim when an assumption fails."""

    when: str
    epsilon: NonNegativeFloat | None = Field(None, description="ε that then holds; null is none.")
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
    unit: str
    adjacency: Adjacency
    neighbours: str = Field(description="Which two data sets are neighbours.")
    contribution_bounds: Texts
    data_domain: str = Field(description="What the data may be, and what is public of it.")
    unprotected_quantities: Texts


class Outputs(Part):
    """What may be released under the claim, and what may not."""

    covered: Texts
    not_covered: Texts


class NoiseBand(Part):
    """One band of the shared vector: the coefficients that one more tier holds."""

    capacity: Rate = Field(description="Capacity of the weakest tier that holds it.")
    coefficients: PositiveInt
    noise_std: PositiveFloat = Field(description="Accounted, per coefficient, in update units.")
    noise_norm: PositiveFloat = Field(description="Expected L2 norm of the noise in the band.")
    signal_norm: NonNegativeFloat = Field(description="Expected L2 norm of the sum, at most.")


class Mechanism(Part):
    """How one round's release is made."""

    law: Law
    clip_norm: PositiveFloat = Field(description="Largest L2 norm of one user's update, C.")
    clipping: str = Field(description="What C bounds, and why it bounds devices of all tiers.")
    scale_bits: PositiveFloat | None
    ring_bits: Literal[16, 32] | None
    squared_sensitivity: PositiveInt | None = Field(
        description="B²: squared norm of a user's integers."
    )
    quantisation: str
    bands: tuple[NoiseBand, ...] = Field(description="Noise by band; none without noise.")
    lazy_noise: str
    randomness: str
    floating_point: str


class Sampling(Part):
    """Who takes part in a round, as declared; realised sizes stay with the operator."""

    declared: How
    rate: Rate | None = Field(description="Chance of a user to be in a round; null, it varied.")
    population: PositiveInt = Field(description="Number of users that is accounted for.")
    expected_cohort: PositiveFloat | None
    realised: str = Field(description="What is said of realised cohorts: never their sizes.")
    amplification: str


class RenyiPoint(Part):
    """Rényi divergence of the whole run at one order."""

    order: int = Field(ge=2)
    recipients: NonNegativeFloat | None = Field(description="null: no bound at this order.")
    server: NonNegativeFloat | None


class Lifetime(Part):
    """The population's budget over several runs, as it stood when the run began."""

    population: str
    epsilon: PositiveFloat = Field(description="Lifetime limit.")
    delta: Delta
    against: Against
    runs_before: NonNegativeInt
    spent_before: NonNegativeFloat
    reserved: NonNegativeFloat = Field(description="Lifetime ε with all that this run may charge.")


class Accounting(Part):
    """How ε was computed, at which δ, and what is left of the budget."""

    accountant: str
    settings: str
    second: str = Field(description="The second accountant, by other mathematics.")
    delta: Delta
    why_delta: str
    curve: tuple[Point2, ...] = Field(description="δ(ε) against recipients: x is ε, y is δ.")
    curve_server: tuple[Point2, ...] = Field(description="The same, cohorts known.")
    renyi: tuple[RenyiPoint, ...] = Field(description="RDP of the whole run.")
    zcdp_server: NonNegativeFloat | None = Field(
        description="ρ of zCDP, if Gaussian; cohorts known."
    )
    remaining: NonNegativeFloat | None = Field(description="ε left of the run's own budget.")
    lifetime: Lifetime | None


class OutsideTheLedger(Part):
    """What no charge tells, and how it is dealt with."""

    runs_before: NonNegativeInt | None = Field(
        None, description="Other runs on this data in the run store; null, not known."
    )
    tuning: str
    preprocessing: str
    early_stopping: str
    pre_training: str


class Adversary(Part):
    """Somebody the guarantee is against, and the ε that holds against them."""

    name: Against
    epsilon: NonNegativeFloat | None = Field(description="PLD, rounded up; null is infinite.")
    epsilon_rdp: NonNegativeFloat | None = Field(description="By RDP; never below `epsilon`.")
    sees: str = Field(description="What this adversary observes.")
    assumes: str = Field(description="What must stay hidden for this ε to hold.")
    limits_run: bool = Field(description="Whether the budget is against this adversary.")


class Charged(Part):
    """A kind of event in the ledger and its count; the last five are of noise in shares alone.

    Of an `other` one dp-accounting's `event` says everything, and the numbers before it nothing.
    """

    mechanism: Law
    noise_multiplier: NonNegativeFloat
    sampling_rate: Rate
    count: PositiveInt
    event: str | None = Field(None, description="Of `other`: dp-accounting's, as JSON.")
    accounted_multiplier: NonNegativeFloat = Field(description="Of the Gaussian that is accounted.")
    hidden_rate: Rate = Field(description="Sampling that recipients do not see through.")
    squared_sensitivity: PositiveInt | None = Field(None, description="Of a device's integers.")
    dimension: PositiveInt | None = Field(None, description="Coefficients of the sum.")
    shares: PositiveInt | None = Field(None, description="Those secret whoever colludes.")
    excess_removed: bool | None = Field(None, description="Whether survivors' excess is taken off.")
    small_cohort_delta: NonNegativeFloat | None = Field(
        None, description="What a round adds to δ since small cohorts release nothing."
    )


class Privacy(Part):
    """The guarantee and everything its meaning depends on."""

    private: bool = Field(description="Whether any finite ε holds.")
    unit: str = Field(description="Whose whole contribution is protected.")
    adjacency: Adjacency = Field(
        description="`zero-out`: one user's history is replaced by none; enrolment is public."
    )
    delta: Delta | None = Field(description="δ; null without noise.")
    adversaries: tuple[Adversary, ...] = Field(description="One entry each; each ε names one.")
    trust: str = Field(description="Who must be trusted with what.")
    noise: Literal["central", "distributed", "none"]
    mechanism: str = Field(description="The mechanism, in words.")
    noise_multiplier: PositiveFloat | None = Field(description="Noise over sensitivity.")
    clip_norm: PositiveFloat | None = Field(description="Largest L2 norm of one user's update.")
    rounding_bound_ratio: PositiveFloat | None = Field(
        description="Sensitivity after integer rounding, over `clip_norm`."
    )
    sampling: How
    sampling_rate: Rate | None = Field(description="Chance to be in a round; null, it varied.")
    population: PositiveInt | None = Field(description="Declared number of users, public.")
    expected_cohort: NonNegativeFloat | None = Field(description="`population` × `sampling_rate`.")
    budget: PositiveFloat | None = Field(description="Largest ε allowed; null is no limit.")
    budget_against: Against
    noise_known: bool = Field(description="Whether the noise came from an injected root.")
    charges: NonNegativeInt = Field(description="Charged (round, attempt) pairs in the ledger.")
    events: tuple[Charged, ...] = Field(description="What was charged; order does not matter.")
    ledger_head: str = Field(description="Hash of the last ledger entry, in hex.")
    ledger_key: str = Field(description="Ed25519 public key of the signed head, in hex.")
    ledger_signature: Signature = Field(description="Whether that key was given, or only named.")


class ExampleLevel(Part):
    """The guarantee of single interactions, by noise on devices' steps or in shares in sums."""

    unit: Literal["example"] = "example"
    adjacency: Literal["one interaction removed or changed"] = "one interaction removed or changed"
    epsilon: NonNegativeFloat | None = Field(description="ε at example level; null is none.")
    delta: Delta = Field(description="δ of it, over interactions.")
    budget: PositiveFloat | None = Field(description="Largest ε allowed; null is no limit.")
    clip_norm: PositiveFloat = Field(description="Most that one moves a round's gradient sums.")
    noise_multiplier: PositiveFloat | None = Field(description="Noise over `clip_norm`.")
    charges: NonNegativeInt = Field(description="Entries of this unit in the ledger.")
    adversary: Literal["uploads", "sums"] = Field(description="What ε holds for whoever sees.")
    protects: str
    neighbours: str
    against: str
    mechanism: str
    sampling: str
    deferred: str = Field(description="How the noise is drawn lazily.")
    apart: str = Field(description="Why this ε is not added to the one of users.")


class Deployment(Part):
    """Whether it is real, and whether as many users as are accounted for."""

    simulated: bool
    accounted_population: PositiveInt | None
    text: str


class Reading(Part):
    """What the number means for somebody who is in the data."""

    odds: float | None = Field(ge=1, description="Most that the odds of a guess grow by.")
    advantage: Share = Field(description="Most that a membership test gains.")
    trade_off: tuple[Point2, ...] = Field(
        description="x: chance of a false alarm, y: least chance of a miss, for any test."
    )
    participation: str


class Notice(Part):
    """Something a reader must know before relying on the claim."""

    level: Literal["serious", "caution"]
    grade: Literal["critical", "theoretical", "negligible"] = Field(
        description="Critical: ε is wrong or beside the point in ordinary use."
    )
    title: str
    text: str


class OperatorsWord(Part):
    """Something that no verifier can see from the files."""

    title: str
    text: str


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
    lower_bound: NonNegativeFloat | None = Field(description="Empirical lower bound on ε.")
    confidence: Share | None
    claimed: NonNegativeFloat | None = Field(description="ε that the bound must not exceed.")
    method: str


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
    """How well the model recommends; within the guarantee by a charged secure sum alone."""

    note: Literal["outside the guarantee", "within the guarantee"] = OUTSIDE
    holdout: Literal["test", "validation"] | None = Field(description="null: nothing measured.")
    users: PositiveInt | None = Field(
        default=None, description="Most users or texts measured, drawn by the seed; null, all."
    )
    metrics: tuple[Metric, ...]


class Segment(Part):
    """Accuracy of a part of the users; outside the guarantee."""

    by: Literal["activity", "item popularity"]
    name: str
    share: Share = Field(description="Of the measured users, to two digits.")
    metrics: dict[str, float]


class TierCost(Part):
    """What devices of one capacity send, hold and get."""

    capacity: Share
    share: Share
    upload_bytes: NonNegativeInt | None
    download_bytes: NonNegativeInt | None
    device_peak_bytes: NonNegativeInt | None
    metrics: dict[str, float]


class Cost(Part):
    """What the run cost; memory and times follow from the private histories, without noise."""

    note: Literal["outside the guarantee"] = OUTSIDE
    upload_bytes: NonNegativeInt | None = Field(description="Bytes up, per device and round.")
    download_bytes: NonNegativeInt | None = Field(description="Bytes down, per device and round.")
    device_peak_bytes: NonNegativeInt | None = Field(description="Peak memory of a device.")
    cpu_s_per_device_round: NonNegativeFloat | None = Field(description="On this machine.")
    wall_s: NonNegativeFloat | None = Field(description="Seconds of the whole run, here.")
    noise_deferred: Share | None = Field(None, description="Of devices' own noise: never drawn.")


class Point(Part):
    """One point of a curve."""

    round: NonNegativeInt
    value: float


class Curve(Part):
    """A quantity by round."""

    key: str
    name: str
    note: str = Field(description="Empty, or the stamp of figures from private data.")
    points: tuple[Point, ...]


class Report(Part):
    """One run, as a reviewer reads it."""

    report_schema: Literal["privrec-report-2"] = SCHEMA
    simulated: bool = Field(description="Whether the devices were simulated on one machine.")
    scenario: str
    title: str
    description: str
    told: Told | None = Field(
        None, description="Of training that privrec accounted and did not do, else null."
    )
    told_signature: str | None = Field(
        None, description="Ed25519, by the ledger's key, of `told` and the ledger's last hash."
    )
    run_id: str
    version: str = Field(description="Version of privrec that trained the model, or charged it.")
    scenario_hash: str
    privacy_hash: str
    rounds: NonNegativeInt = Field(description="Rounds that were finished.")
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
    gaps: dict[str, str] = Field({}, description="What could not be measured, and why.")
    accuracy: Accuracy
    segments: tuple[Segment, ...] = Field(description="Accuracy by kind of user.")
    cost: Cost
    tiers: tuple[TierCost, ...] = Field(description="Costs and accuracy by capacity.")
    data: Flat
    model: Flat
    outside_the_guarantee: tuple[str, ...] = Field(
        ("accuracy", "segments", "cost", "tiers", "data", "rows"),
        description="Fields computed from private data without noise; curves carry notes.",
    )
    rows: tuple[Flat, ...] = Field(description="Settings compared by the scenario, if any.")
    curves: tuple[Curve, ...]
    warnings: tuple[Notice, ...]
    operators_word: tuple[OperatorsWord, ...]

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        lacking = [name for name in STARRED if getattr(self, name) is None]
        if list(self.missing) != lacking:
            raise ValueError(f"missing is {list(self.missing)}, and {lacking} are lacking")
        if self.privacy.private and lacking:
            raise ValueError(f"a run is called private, and its report lacks {', '.join(lacking)}")
        unknown = [name for name, value in self._of_runs() if value is None]
        if self.told is None and unknown:
            raise ValueError(f"a run knows {', '.join(unknown)}, and its report does not tell")
        return self

    def _of_runs(self) -> Iterator[tuple[str, Any]]:
        """What the report of a run tells, and that of training elsewhere may not know."""
        names = {
            "accuracy": ("holdout",),
            "privacy": ("sampling_rate",),
            "sampling": ("rate", "expected_cohort"),
            "mechanism": ("scale_bits", "ring_bits", "squared_sensitivity"),
            "outside_the_ledger": ("runs_before",),
        }
        for part, fields in names.items():
            if (found := getattr(self, part)) is not None:
                yield from ((f"{part}.{name}", getattr(found, name)) for name in fields)

    def adversary(self, name: Against) -> Adversary:
        """The guarantee against one adversary."""
        return next(each for each in self.privacy.adversaries if each.name == name)

    def metric(self, key: str) -> Metric | None:
        """A metric by its key, if it was measured."""
        return next((metric for metric in self.accuracy.metrics if metric.key == key), None)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that every ``report.json`` of this version satisfies."""
    private = {"properties": {"privacy": {"properties": {"private": {"const": True}}}}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:privrec:{SCHEMA}",
        **Report.model_json_schema(mode="serialization"),
        "if": private,
        "then": {"properties": {name: {"type": "object"} for name in STARRED}},
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
