"""The parts of a report that a reviewer signs for, one by one.

The starred ones (:data:`STARRED`) are those without which no run is called private. Each is filled
from facts of the run or left out; a report with one left out makes no claim.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

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
    epsilon: float | None = Field(ge=0, description="ε that holds against them; null is none.")


class Fallback(Part):
    """What is left of the claim when an assumption fails."""

    when: str
    epsilon: float | None = Field(ge=0, description="ε that then holds; null is none.")
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
