"""The tables of a scenario: every key that all kinds share, with its type, range and meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from privrec.scenario.kinds import (
    LOSSES,
    MODELS,
    READERS,
    SELECTORS,
    SERVER_OPTIMIZERS,
    Section,
    SimHash,
    Table,
    as_tuple,
    setting,
)


class Heading(Section):
    """The keys above the tables."""

    name: str = setting(
        ...,
        "Short name; run folders are named after it.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
    )
    title: str = setting("", "Heading of the report.", max_length=200)
    description: str = setting("", "What the scenario shows.", max_length=10**4)


Cut = Annotated[int, Field(ge=1, le=1000)]
Baseline = Literal["popularity", "pure_svd", "ease"]


class Data(Table):
    """``[data]``: which interactions, and what is held out of them."""

    registries = (READERS,)

    source: Annotated[str, READERS] = setting(
        "synthetic", "Where interactions, texts or labels come from."
    )
    holdout: Literal["test", "validation"] = setting(
        "test", "What metrics are computed on; choose settings on `validation`."
    )


class Model(Table):
    """``[model]``: the recommender, or the language model, and the size of its shared memory."""

    registries = (MODELS,)

    kind: Annotated[str, MODELS] = setting("gmf", "Which model.")
    dim: int = setting(32, "Length of an item vector.", "[1, 4096] floats")
    block: int = setting(16, "Length of a hashed block; divides `dim`.", "[1, 4096] floats")
    compression: float = setting(
        1.0, "Item table over shared memory, in floats; 1, uncompressed.", "[1, 10^6] ratio"
    )
    init_std: float = setting(0.01, "Standard deviation of the initial item vectors.", "(0, 10]")


class DeviceTier(Section):
    """An entry of ``devices.tiers``: what devices of one capacity hold, and how many they are."""

    capacity: float | None = setting(
        None,
        "Memory over the whole one: 1, 0.5, 0.25, …; 0 for devices that take no part.",
        "[0, 1]",
    )
    memory_kib: int | None = setting(
        None, "Instead of `capacity`: room for the model.", "[1, 2^40] KiB"
    )
    share: float = setting(..., "Share of all devices.", "(0, 1]")
    weight: float = setting(
        1.0,
        "Public factor of the updates; 0 for devices that are served, but do not train.",
        "[0, 1]",
    )


EVERYBODY_ALIKE = DeviceTier(capacity=1.0, share=1.0)


class Devices(Section):
    """``[devices]``: how many there are, what they hold, and how a round's cohort is drawn."""

    population: int | None = setting(
        None,
        "Number of users, declared as public; checked against the data.",
        "[1, 10^10] users",
    )
    sampling: Literal["poisson", "everybody"] = setting(
        "poisson", "Each device by its own coin, or all of them every round."
    )
    sampling_rate: float = setting(
        0.05, "Chance of each device to be in a round; 1 with `everybody`.", "(0, 1] probability"
    )
    tiers: Annotated[tuple[DeviceTier, ...], BeforeValidator(as_tuple)] = setting(
        (),
        "Capacities of devices, as `{capacity = 0.25, share = 0.5}` each; none, all alike.",
        max_length=16,
    )
    nesting: Literal["fold", "rows", "dims"] | None = setting(
        None,
        "What a weak device holds: all items folded, the popular items in full, or the first "
        "dimensions; unset, `rows` where `popularity` is set, else `fold`.",
    )
    popularity: Literal["public", "released"] | None = setting(
        None,
        "Where the order of `rows`, or of words, comes from: the data's own counts, declared "
        "public, or counts released with noise.",
    )
    popularity_epsilon: float | None = setting(
        None, "`released`: ε of the counts, at `privacy.delta`.", "[0.0001, 1000] ε, user level"
    )
    popularity_items: int = setting(
        50, "`released`: most items of a user that are counted.", "[1, 10^6] items"
    )
    min_cohort: int = setting(
        20,
        "Fewest devices that a device is willing to be summed with, in every band: with "
        "`distributed` noise or the `full` secure sum.",
        "[2, 10^6] devices",
    )
    dropout_rate: float = setting(
        0.0,
        "Simulated: chance of a device of a cohort to fall silent in one of the four exchanges.",
        "[0, 1) probability",
    )
    aggregation: Literal["sum", "contributors", "fair_averaging"] = setting(
        "sum",
        "Mean over all devices, over those that hold a part, or FAIR's average of lifted weights.",
    )

    @property
    def chain(self) -> tuple[DeviceTier, ...]:
        """The tiers, of which there is at least one."""
        return self.tiers or (EVERYBODY_ALIKE,)

    @property
    def order(self) -> Literal["fold", "rows", "dims"]:
        """The coordinate system of the tiers."""
        return self.nesting or ("fold" if self.popularity is None else "rows")

    @model_validator(mode="before")
    @classmethod
    def _everybody_is_rate_one(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("sampling") == "everybody":
            return {**values, "sampling_rate": 1.0}
        return values


class Train(Table):
    """``[train]``: local training on a device, and the server's step."""

    registries = (LOSSES, SELECTORS, SERVER_OPTIMIZERS)

    rounds: int = setting(100, "Rounds of the run.", "[1, 10^6] rounds")
    loss: Annotated[str, LOSSES] = setting("bce", "What a device minimises.")
    selector: Annotated[str, SELECTORS] = setting(
        "each", "Which negatives, or output neurons, a device uses."
    )
    max_samples: int | None = setting(
        None,
        "Most positives, words or examples that a device uses in a round; unset, all.",
        "[1, ∞) interactions",
    )
    user_steps: int = setting(
        1, "Newton steps on the user vector before the item step.", "[0, 10^4] steps"
    )
    user_lr: float = setting(1.0, "Length of a Newton step; 1 is the whole step.", "(0, 10]")
    user_l2: float = setting(
        1.0, "L2 penalty on the user vector: the precision of its prior.", "[0, 10^6]"
    )
    serve_steps: int = setting(
        8,
        "Newton steps that fit a user vector from nothing, to evaluate and to recommend.",
        "[1, 10^5] steps",
    )
    local_steps: int = setting(1, "Steps on items and dense weights in a round.", "[1, 10^4] steps")
    local_lr: float = setting(1.0, "Step size for items and dense weights.", "(0, 10^4]")
    server_optimizer: Annotated[str, SERVER_OPTIMIZERS] = setting(
        "fedadam", "How the server applies the sum of the updates."
    )
    server_lr: float = setting(0.05, "Step size of the server.", "(0, 10^6]")
    weight_decay: float = setting(
        0.0, "Decoupled decay: each round, weights shrink by `server_lr` times this.", "[0, 1000]"
    )
    schedule: Literal["constant", "cosine", "linear", "inverse"] = setting(
        "constant",
        "Course of `server_lr` over the rounds; `inverse` is one over the rounds since the start.",
    )
    warmup_rounds: int = setting(
        0, "Rounds in which `server_lr` rises linearly.", "[0, 10^6] rounds"
    )
    average: float = setting(
        0.0, "Decay of the running mean of the weights that is released; 0 is off.", "[0, 1)"
    )

    @property
    def requested(self) -> bool:
        """Whether devices ask the server for output neurons, which tells it about their data."""
        return isinstance(self, SimHash) and self.scheme == "requested"


class Privacy(Section):
    """``[privacy]``: clipping, noise and the budget. ``noise`` has no default: choose."""

    noise: Literal["none", "central", "distributed"] = setting(
        ...,
        "`distributed`: every device adds a share of the noise; `central`: a trusted server adds "
        "Gaussian noise to the sum; `none`: no guarantee.",
    )
    remove_excess: bool = setting(
        True,
        "`distributed`: take off the noise of survivors beyond the fewest, by seeds that they "
        "reveal; else the sum has more noise than accounted.",
    )
    least_survivors: float = setting(
        0.67,
        "Fewest survivors of a round, as a share of the devices expected in each band; with fewer"
        " nothing is released.",
        "(0, 1) share of the expected cohort",
    )
    colluding_share: float = setting(
        0.05,
        "Devices assumed to tell the server their noise or masks; the others' noise alone is "
        "accounted.",
        "[0, 0.33) share of the expected cohort",
    )
    clip_norm: float | None = setting(
        None, "Largest L2 norm of one device's update; required with noise.", "(0, 10^6] L2 norm"
    )
    epsilon: float | None = setting(
        None,
        "Target and budget, with noise; excludes `noise_multiplier`.",
        "[0.0001, 1000] ε, user level",
    )
    noise_multiplier: float | None = setting(
        None,
        "Noise over sensitivity, with noise; excludes `epsilon`.",
        "(0, 10^6] standard deviations",
    )
    delta: float = setting(
        1e-5, "δ of the guarantee; well below one over the users.", "[1e-10, 1) probability"
    )
    budget_against: Literal["recipients", "server"] = setting(
        "recipients", "The adversary that `epsilon` is meant against, and that halts the run."
    )
    local: Literal["none", "example"] = setting(
        "none",
        "`example`: every local step on a device has noise of its own, which hides single "
        "interactions also from whoever sees the device's upload; with or without `noise`.",
    )
    local_clip_norm: float | None = setting(
        None,
        "`example`: the most that removing or changing one interaction moves a round's sum of "
        "gradients; required then.",
        "(0, 10^6] L2 norm",
    )
    local_epsilon: float | None = setting(
        None,
        "`example`: ε of single interactions; excludes `local_noise_multiplier`.",
        "[0.0001, 1000] ε, example level",
    )
    local_noise_multiplier: float | None = setting(
        None,
        "`example`: noise of a step over `local_clip_norm`; excludes `local_epsilon`.",
        "(0, 10^6] standard deviations",
    )
    local_delta: float = setting(
        1e-7,
        "δ of the example-level guarantee; well below one over all interactions.",
        "[1e-10, 1) probability",
    )
    scale_bits: float = setting(
        13.0,
        "An update is encoded in integers of scale 2^this / `clip_norm`; without noise, a finer "
        "grid loses less.",
        "[1, 20] bits",
    )
    ring_bits: Literal[32, 16] = setting(
        32,
        "Sums are taken modulo 2^this; 16 halves the upload, for cohorts of up to 1,000.",
        unit="bits",
    )


class Run(Section):
    """``[run]``: seed, evaluation, checkpoints, engine."""

    seed: int = setting(0, "Seed of everything that is not secret.", "[0, 2^63)")
    eval_every: int = setting(
        0, "Rounds between evaluations; 0, only at the end.", "[0, 10^6] rounds"
    )
    checkpoint_every: int = setting(10, "Rounds between checkpoints.", "[1, 10^6] rounds")
    engine: Literal["cohort", "device"] = setting(
        "cohort", "Many devices as one batch, or one device at a time."
    )
    secure_sum: Literal["exact", "full"] = setting(
        "exact",
        "`full` runs the secure aggregation of every round; `exact` adds the same integers "
        "without masks, for the same sum.",
    )
    top_k: Annotated[tuple[Cut, ...], BeforeValidator(as_tuple)] = setting(
        (10,), "Cut-offs of the metrics.", unit="items", min_length=1, max_length=10
    )
    seeds: int = setting(
        1,
        "Runs of each row, with seeds from `seed` on; figures are their means.",
        "[1, 100] runs",
    )
    baselines: Annotated[tuple[Baseline, ...], BeforeValidator(as_tuple)] = setting(
        ("popularity",), "Centralised recommenders to print beside.", max_length=3
    )
    footprint: bool = setting(
        True, "Measure the memory of a device of each tier, in a process of its own."
    )


class Row(Section):
    """``[[rows]]``: a named variant of the scenario; ``set`` maps dotted keys to values."""

    name: str = Field(min_length=1, max_length=200)
    set: dict[str, Any] = Field(default_factory=dict)


TABLES: dict[str, type[Section]] = {
    "": Heading, "data": Data, "model": Model, "devices": Devices, "train": Train,
    "privacy": Privacy, "run": Run,
}  # fmt: skip
"""The class of each table by name; that of the keys above all tables by the empty name."""
