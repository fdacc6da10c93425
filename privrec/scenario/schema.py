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

    name: str = setting(..., pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Short name; run folders are named after it."""
    title: str = setting("", max_length=200)
    """Heading of the report."""
    description: str = setting("", max_length=10**4)
    """What the scenario shows."""


Cut = Annotated[int, Field(ge=1, le=1000)]
Baseline = Literal["popularity", "pure_svd", "ease"]


class Data(Table):
    """``[data]``: which interactions, and what is held out of them."""

    registries = (READERS,)

    source: Annotated[str, READERS] = "synthetic"
    """Where interactions, texts or labels come from."""
    holdout: Literal["test", "validation"] = "test"
    """What metrics are computed on; choose settings on `validation`."""


class Model(Table):
    """``[model]``: the recommender, or the language model, and the size of its shared memory."""

    registries = (MODELS,)

    kind: Annotated[str, MODELS] = "gmf"
    """Which model."""
    dim: int = setting(32, "[1, 4096] floats")
    """Length of an item vector."""
    block: int = setting(16, "[1, 4096] floats")
    """Length of a hashed block; divides `dim`."""
    compression: float = setting(1.0, "[1, 10^6] ratio")
    """Item table over shared memory, in floats; 1, uncompressed."""
    init_std: float = setting(0.01, "(0, 10]")
    """Standard deviation of the initial item vectors."""


class DeviceTier(Section):
    """An entry of ``devices.tiers``: what devices of one capacity hold, and how many they are."""

    capacity: float | None = setting(None, "[0, 1]")
    """Memory over the whole one: 1, 0.5, 0.25, …; 0 for devices that take no part."""
    memory_kib: int | None = setting(None, "[1, 2^40] KiB")
    """Instead of `capacity`: room for the model."""
    share: float = setting(..., "(0, 1]")
    """Share of all devices."""
    weight: float = setting(1.0, "[0, 1]")
    """Public factor of the updates; 0 for devices that are served, but do not train."""


EVERYBODY_ALIKE = DeviceTier(capacity=1.0, share=1.0)


class Devices(Section):
    """``[devices]``: how many there are, what they hold, and how a round's cohort is drawn."""

    population: int | None = setting(None, "[1, 10^10] users")
    """Number of users, declared as public; checked against the data."""
    sampling: Literal["poisson", "everybody"] = "poisson"
    """Each device by its own coin, or all of them every round."""
    sampling_rate: float = setting(0.05, "(0, 1] probability")
    """Chance of each device to be in a round; 1 with `everybody`."""
    tiers: Annotated[tuple[DeviceTier, ...], BeforeValidator(as_tuple)] = setting((), max_length=16)
    """Capacities of devices, as `{capacity = 0.25, share = 0.5}` each; none, all alike."""
    nesting: Literal["fold", "rows", "dims"] | None = None
    """What a weak device holds: all items folded, the popular items in full, or the first
    dimensions; unset, `rows` where `popularity` is set, else `fold`.
    """
    popularity: Literal["public", "released"] | None = None
    """Where the order of `rows`, or of words, comes from: the data's own counts, declared public,
    or counts released with noise.
    """
    popularity_epsilon: float | None = setting(None, "[0.0001, 1000] ε, user level")
    """`released`: ε of the counts, at `privacy.delta`."""
    popularity_items: int = setting(50, "[1, 10^6] items")
    """`released`: most items of a user that are counted."""
    min_cohort: int = setting(20, "[2, 10^6] devices")
    """Fewest devices that a device is willing to be summed with, in every band: with `distributed`
    noise or the `full` secure sum.
    """
    dropout_rate: float = setting(0.0, "[0, 1) probability")
    """Simulated: chance of a device of a cohort to fall silent in one of the four exchanges."""
    aggregation: Literal["sum", "contributors", "fair_averaging"] = "sum"
    """Mean over all devices, over those that hold a part, or FAIR's average of lifted weights."""

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

    rounds: int = setting(100, "[1, 10^6] rounds")
    """Rounds of the run."""
    loss: Annotated[str, LOSSES] = "bce"
    """What a device minimises."""
    selector: Annotated[str, SELECTORS] = "each"
    """Which negatives, or output neurons, a device uses."""
    max_samples: int | None = setting(None, "[1, ∞) interactions")
    """Most positives, words or examples that a device uses in a round; unset, all."""
    user_steps: int = setting(1, "[0, 10^4] steps")
    """Newton steps on the user vector before the item step."""
    user_lr: float = setting(1.0, "(0, 10]")
    """Length of a Newton step; 1 is the whole step."""
    user_l2: float = setting(1.0, "[0, 10^6]")
    """L2 penalty on the user vector: the precision of its prior."""
    serve_steps: int = setting(8, "[1, 10^5] steps")
    """Newton steps that fit a user vector from nothing, to evaluate and to recommend."""
    serve_recency: float = setting(0.0, "[0, 2]")
    """With times of interactions: the k-th last item of a history counts k^-this in that fit; at 0
    all count alike.
    """
    local_steps: int = setting(1, "[1, 10^4] steps")
    """Steps on items and dense weights in a round."""
    local_lr: float = setting(1.0, "(0, 10^4]")
    """Step size for items and dense weights."""
    server_optimizer: Annotated[str, SERVER_OPTIMIZERS] = "fedadam"
    """How the server applies the sum of the updates."""
    server_lr: float = setting(0.05, "(0, 10^6]")
    """Step size of the server."""
    weight_decay: float = setting(0.0, "[0, 1000]")
    """Decoupled decay: each round, weights shrink by `server_lr` times this."""
    schedule: Literal["constant", "cosine", "linear", "inverse"] = "constant"
    """Course of `server_lr` over the rounds; `inverse` is one over the rounds since the start."""
    warmup_rounds: int = setting(0, "[0, 10^6] rounds")
    """Rounds in which `server_lr` rises linearly."""
    average: float = setting(0.0, "[0, 1)")
    """Decay of the running mean of the weights that is released; 0 is off."""

    @property
    def requested(self) -> bool:
        """Whether devices ask the server for output neurons, which tells it about their data."""
        return isinstance(self, SimHash) and self.scheme == "requested"


class Privacy(Section):
    """``[privacy]``: clipping, noise and the budget. ``noise`` has no default: choose."""

    noise: Literal["none", "central", "distributed"]
    """`distributed`: every device adds a share of the noise; `central`: a trusted server adds
    Gaussian noise to the sum; `none`: no guarantee.
    """
    remove_excess: bool = True
    """`distributed`: take off the noise of survivors beyond the fewest, by seeds that they reveal;
    else the sum has more noise than accounted.
    """
    least_survivors: float = setting(0.67, "(0, 1) share of the expected cohort")
    """Fewest survivors of a round, as a share of the devices expected in each band; with fewer
    nothing is released.
    """
    colluding_share: float = setting(0.05, "[0, 0.33) share of the expected cohort")
    """Devices assumed to tell the server their noise or masks; the others' noise alone is
    accounted.
    """
    clip_norm: float | None = setting(None, "(0, 10^6] L2 norm")
    """Largest L2 norm of one device's update, or with `shares` its largest coefficient; required
    with noise.
    """
    epsilon: float | None = setting(None, "[0.0001, 1000] ε, user level")
    """Target and budget, with noise; excludes `noise_multiplier`."""
    noise_multiplier: float | None = setting(None, "(0, 10^6] standard deviations")
    """Noise over sensitivity, with noise; excludes `epsilon`."""
    delta: float = setting(1e-5, "[1e-10, 1) probability")
    """δ of the guarantee; well below one over the users."""
    spare_attempts: int = setting(0, "[0, 10^6] attempts")
    """Attempts beyond one for each round that a target ε has room for: one that drop-outs, a stop
    or a crash end without a sum is charged too, and without a spare one the last round is lost.
    """
    evaluation_epsilon: float | None = setting(None, "[0.0001, 1000] ε, user level")
    """ε, at `delta`, of a secure sum of every user's loss and hits after the last round, which
    `epsilon` covers; unset, none is released. It is the accuracy that a deployment has.
    """
    budget_against: Literal["recipients", "server"] = "recipients"
    """The adversary that `epsilon` is meant against, and that halts the run."""
    local: Literal["none", "example", "shares"] = "none"
    """Hides single interactions. `example`: every local step on a device has all the noise, also
    against whoever sees the device's upload; with or without `noise`. `shares`: user vectors have
    it all and sums have it in shares, against whoever sees sums alone; without `noise`.
    """
    local_clip_norm: float | None = setting(None, "(0, 10^6] L2 norm")
    """`local`: the most that removing or changing one interaction moves a round's sum of gradients;
    required then.
    """
    local_epsilon: float | None = setting(None, "[0.0001, 1000] ε, example level")
    """`local`: ε of single interactions; excludes `local_noise_multiplier`."""
    local_noise_multiplier: float | None = setting(None, "(0, 10^6] standard deviations")
    """`local`: noise over `local_clip_norm`; excludes `local_epsilon`."""
    local_delta: float = setting(1e-7, "[1e-10, 1) probability")
    """δ of the example-level guarantee; well below one over all interactions."""
    scale_bits: float = setting(13.0, "[1, 20] bits")
    """An update is encoded in integers of scale 2^this / `clip_norm`; without noise, a finer grid
    loses less.
    """
    ring_bits: Literal[32, 16] = setting(32, unit="bits")
    """Sums are taken modulo 2^this; 16 halves the upload, for cohorts of up to 1,000."""

    @property
    def in_shares(self) -> bool:
        """Whether devices add noise in shares, of users or of interactions."""
        return self.noise == "distributed" or self.local == "shares"


class Run(Section):
    """``[run]``: seed, evaluation, checkpoints, engine."""

    seed: int = setting(0, "[0, 2^63)")
    """Seed of everything that is not secret."""
    eval_every: int = setting(0, "[0, 10^6] rounds")
    """Rounds between evaluations; 0, only at the end."""
    eval_users: int | None = setting(None, "[1, ∞) users or texts")
    """Most users, or texts, that metrics are of, chosen by the seed; unset, all."""
    checkpoint_every: int = setting(10, "[1, 10^6] rounds")
    """Rounds between checkpoints."""
    engine: Literal["cohort", "device"] = "cohort"
    """Many devices as one batch, or one device at a time."""
    workers: int = setting(1, "[1, 256] processes")
    """Processes that train and measure devices; any number gives the same bits."""
    secure_sum: Literal["exact", "full"] = "exact"
    """`full` runs the secure aggregation of every round; `exact` adds the same integers without
    masks, for the same sum.
    """
    top_k: Annotated[tuple[Cut, ...], BeforeValidator(as_tuple)] = setting(
        (10,), unit="items", min_length=1, max_length=10
    )
    """Cut-offs of the metrics."""
    seeds: int = setting(1, "[1, 100] runs")
    """Runs of each row, with seeds from `seed` on; figures are their means."""
    baselines: Annotated[tuple[Baseline, ...], BeforeValidator(as_tuple)] = setting(
        ("popularity",), max_length=3
    )
    """Centralised recommenders to print beside."""
    footprint: bool = True
    """Measure the memory of a device of each tier, in a process of its own."""


class Row(Section):
    """``[[rows]]``: a named variant of the scenario; ``set`` maps dotted keys to values."""

    name: str = Field(min_length=1, max_length=200)
    set: dict[str, Any] = Field(default_factory=dict)


TABLES: dict[str, type[Section]] = {"": Heading} | {
    each.__name__.lower(): each for each in (Data, Model, Devices, Train, Privacy, Run)
}
"""The class of each table by name; that of the keys above all tables by the empty name."""
