"""The tables of a scenario: every key with its type, range, default, unit and meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def as_tuple(value: object) -> object:
    """A TOML list as the tuple that a frozen model holds; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def setting(default: Any, meaning: str, *, unit: str = "", **rules: Any) -> Any:
    """A field with its meaning and unit, which errors and documentation read off the schema."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit}, **rules)


class Section(BaseModel):
    """A frozen table that refuses unknown keys, conversions and values that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Width = Annotated[int, Field(ge=1, le=4096)]
Cut = Annotated[int, Field(ge=1, le=1000)]
Column = Annotated[str, Field(min_length=1, max_length=200)] | Annotated[int, Field(ge=1, le=10**5)]
Baseline = Literal["popularity", "pure_svd", "ease"]


class Data(Section):
    """``[data]``: which interactions, and what is held out of them."""

    source: Literal[
        "synthetic", "ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ncf", "lightgcn", "table",
        "text", "synthetic_text", "labels", "synthetic_labels",
    ] = setting("synthetic", "Where interactions, texts or labels come from.")  # fmt: skip
    path: str | None = setting(
        None,
        "File or folder of the data; `--data` and `PRIVREC_DATA` come first.",
        min_length=1,
        max_length=4096,
    )
    holdout: Literal["test", "validation"] = setting(
        "test", "What metrics are computed on; choose settings on `validation`."
    )
    max_history: int | None = setting(
        None, "The most recent interactions kept of each user.", unit="interactions", ge=1
    )
    users: int = setting(
        400, "Synthetic only: number of users that train.", unit="users", ge=2, le=10**7
    )
    items: int = setting(
        300, "Synthetic only: size of the catalogue, or words or labels with the unknown one.",
        unit="items", ge=4, le=10**7,
    )  # fmt: skip
    clusters: int = setting(
        8, "Synthetic only: planted groups of taste, or topics.", unit="clusters", ge=1, le=10**4
    )
    interactions_per_user: int = setting(
        30, "Synthetic only: mean length of a history, or words of a text; of all labels, examples "
        "of a device.", unit="interactions", ge=2, le=10**5,
    )  # fmt: skip
    features: int = setting(
        10_000, "`synthetic_labels` only: words of the world.", unit="words", ge=1, le=2**31 - 2
    )
    labels_each: float = setting(
        3.0, "`synthetic_labels` only: mean labels of an example.", unit="labels", ge=1, le=1000
    )
    seed: int = setting(
        0, "Seed of the synthetic generator, and of how labels are dealt.", ge=0, le=2**63 - 1
    )
    words: str | None = setting(
        None, "`text` only: file of a public vocabulary, a word a line; unset, all of the text.",
        min_length=1, max_length=4096,
    )  # fmt: skip
    vocabulary: int | None = setting(
        None, "Texts, labels: most of them, the commonest; others are unknown.", unit="words", ge=2,
        le=10**7,
    )  # fmt: skip
    user_column: Column = setting(
        "user", "`table` only: column of user ids; numbers, from 1, where text has no header."
    )
    item_column: Column = setting("item", "`table` only: column of item ids.")
    time_column: Column | None = setting(None, "`table` only: column of times; unset, file order.")
    separator: str | None = setting(
        None,
        "`table` only: field separator; unset, a tab for `.tsv` and a comma otherwise.",
        min_length=1,
        max_length=1,
    )
    encoding: str = setting(
        "utf-8", "`table` only: encoding of the file.", min_length=1, max_length=40
    )
    duplicates: Literal["refuse", "first", "last"] = setting(
        "refuse", "`table` only: which row is kept, in time, of a user and item that occur again."
    )


class Model(Section):
    """``[model]``: the recommender, or the language model, and the size of its shared memory."""

    kind: Literal["gmf", "mlp", "neumf", "next_word", "extreme"] = setting(
        "gmf", "Which model of the NCF paper; `next_word`, a small Transformer over words; "
        "`extreme`, a bag of words over very many labels.",
    )  # fmt: skip
    dim: int = setting(32, "Length of an item vector.", unit="floats", ge=1, le=4096)
    block: int = setting(
        16, "Length of a hashed block; divides `dim`.", unit="floats", ge=1, le=4096
    )
    compression: float = setting(
        1.0, "Item table over shared memory, both in floats; 1 is uncompressed.", unit="ratio",
        ge=1, le=10**6,
    )  # fmt: skip
    hidden: Annotated[tuple[Width, ...], BeforeValidator(as_tuple)] = setting(
        (64, 32, 16), "`mlp`, `neumf`: widths of the hidden layers.", unit="neurons",
        min_length=1, max_length=8,
    )  # fmt: skip
    init_std: float = setting(0.01, "Standard deviation of the initial item vectors.", gt=0, le=10)
    item_bias: bool = setting(True, "Whether each item has a bias of its own.")
    ffn: int = setting(
        1536, "`next_word`: width of the feed-forward layer.", unit="neurons", ge=1, le=10**6
    )
    heads: int = setting(8, "`next_word`: heads of the attention; they divide `dim`.", ge=1, le=256)
    layers: int = setting(1, "`next_word`: layers of the Transformer.", ge=1, le=64)
    context: int = setting(
        20, "`next_word`: words that a prediction looks back at.", unit="words", ge=1, le=4096
    )
    features: int = setting(
        8192, "`extreme`: vocabulary that input words are hashed to.", unit="words", ge=1, le=10**7
    )


class DeviceTier(Section):
    """An entry of ``devices.tiers``: what devices of one capacity hold, and how many they are."""

    capacity: float | None = setting(
        None, "Memory over the whole one: 1, 0.5, 0.25, …; 0 for devices that take no part.", ge=0,
        le=1,
    )  # fmt: skip
    memory_kib: int | None = setting(
        None, "Instead of `capacity`: room for the model.", unit="KiB", ge=1, le=2**40
    )
    share: float = setting(..., "Share of all devices.", gt=0, le=1)
    weight: float = setting(
        1.0, "Public factor of the updates; 0 for devices that are served, but do not train.",
        ge=0, le=1,
    )  # fmt: skip


EVERYBODY_ALIKE = DeviceTier(capacity=1.0, share=1.0)


class Devices(Section):
    """``[devices]``: how many there are, what they hold, and how a round's cohort is drawn."""

    population: int | None = setting(
        None,
        "Number of users, declared as public; checked against the data.",
        unit="users",
        ge=1,
        le=10**10,
    )
    sampling: Literal["poisson", "everybody"] = setting(
        "poisson", "Each device by its own coin, or all of them every round."
    )
    sampling_rate: float = setting(
        0.05,
        "Chance of each device to be in a round; 1 with `everybody`.",
        unit="probability",
        gt=0,
        le=1,
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
        None, "`released`: ε of the counts, at `privacy.delta`.", unit="ε, user level",
        ge=0.0001, le=1000,
    )  # fmt: skip
    popularity_items: int = setting(
        50, "`released`: most items of a user that are counted.", unit="items", ge=1, le=10**6
    )
    min_cohort: int = setting(
        20,
        "Fewest devices that a device is willing to be summed with, in every band: with "
        "`distributed` noise or the `full` secure sum.",
        unit="devices",
        ge=2,
        le=10**6,
    )
    dropout_rate: float = setting(
        0.0,
        "Simulated: chance of a device of a cohort to fall silent in one of the four exchanges.",
        unit="probability",
        ge=0,
        lt=1,
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


class Train(Section):
    """``[train]``: local training on a device, and the server's step."""

    rounds: int = setting(100, "Rounds of the run.", unit="rounds", ge=1, le=10**6)
    loss: Literal["bce", "bpr", "softmax", "full_softmax", "ials"] = setting(
        "bce",
        "Binary cross-entropy, Bayesian ranking, sampled softmax, softmax over all items, or "
        "implicit ALS.",
    )
    unobserved_weight: float = setting(
        0.1,
        "`ials`: weight of each item of the catalogue beside those of the history.",
        gt=0,
        le=1000,
    )
    item_l2: float = setting(
        1e-5, "`ials`: L2 penalty on item vectors, in the mean over users.", gt=0, le=1000
    )
    gram_rate: float = setting(
        1.0, "`ials`: how fast the users' Gram matrix follows that of the round.", gt=0, le=1
    )
    negatives: int = setting(4, "Sampled negatives for each positive.", unit="items", ge=1, le=1000)
    selector: Literal[
        "each", "uniform", "popularity", "scan", "hamming", "sketch", "simhash", "pghash",
        "block_sign", "auto",
    ] = setting(
        "each",
        "`each`: `negatives` for each positive. Otherwise all positives of a device share a budget "
        "(softmax): drawn by chance, or partly selected from the memory by the device itself.",
    )  # fmt: skip
    budget: float = setting(
        0.01,
        "With a `selector`: negatives of a device; of texts, its active output neurons, those of "
        "its own words included.",
        unit="share of the catalogue",
        gt=0,
        le=1,
    )
    selected: float = setting(
        0.5, "Share of the budget that is selected; the rest stays uniform.", unit="share", ge=0,
        le=0.9,
    )  # fmt: skip
    frequent: float = setting(
        0.0, "Texts, labels: share of the budget that is the commonest.", unit="share", ge=0, le=0.9
    )
    scheme: Literal["private", "requested"] = setting(
        "private",
        "Texts: devices select neurons from their own copy, or ask the server for buckets of "
        "neurons, which tells it about their text.",
    )
    max_samples: int | None = setting(
        None,
        "Most positives, words or examples that a device uses in a round; unset, all.",
        unit="interactions",
        ge=1,
    )
    user_steps: int = setting(
        1, "Newton steps on the user vector before the item step.", unit="steps", ge=0, le=10**4
    )
    user_lr: float = setting(1.0, "Length of a Newton step; 1 is the whole step.", gt=0, le=10)
    user_l2: float = setting(
        1.0, "L2 penalty on the user vector: the precision of its prior.", ge=0, le=10**6
    )
    serve_steps: int = setting(
        8,
        "Newton steps that fit a user vector from nothing, to evaluate and to recommend.",
        unit="steps",
        ge=1,
        le=10**5,
    )
    serve_negatives: int = setting(
        8, "Sampled negatives for each positive in that fit.", unit="items", ge=1, le=1000
    )
    serve_budget: float | None = setting(
        None, "With a `selector`: negatives of a device in that fit; 1 takes every item once and "
        "samples nothing. Unset, those of training.", unit="share of the catalogue", gt=0, le=1,
    )  # fmt: skip
    local_steps: int = setting(
        1, "Steps on items and dense weights in a round.", unit="steps", ge=1, le=10**4
    )
    local_lr: float = setting(1.0, "Step size for items and dense weights.", gt=0, le=10**4)
    server_optimizer: Literal["fedavg", "fedadam", "sgd", "newton"] = setting(
        "fedadam",
        "How the server applies the sum of the updates; `newton`, for `ials`, averages steps that "
        "devices precondition by the users' Gram matrix.",
    )
    server_lr: float = setting(0.05, "Step size of the server.", gt=0, le=10**6)
    momentum: float = setting(0.9, "`sgd`: momentum.", ge=0, lt=1)
    beta1: float = setting(0.9, "`fedadam`: decay of the first moment.", ge=0, lt=1)
    beta2: float = setting(0.99, "`fedadam`: decay of the second moment.", ge=0, lt=1)
    adam_eps: float = setting(
        1e-8, "`fedadam`: added to the root of the second moment.", gt=0, le=1
    )
    weight_decay: float = setting(
        0.0, "Decoupled decay: each round, weights shrink by `server_lr` times this.", ge=0, le=1000
    )
    schedule: Literal["constant", "cosine", "linear", "inverse"] = setting(
        "constant",
        "Course of `server_lr` over the rounds; `inverse` is one over the rounds since the start.",
    )
    warmup_rounds: int = setting(
        0, "Rounds in which `server_lr` rises linearly.", unit="rounds", ge=0, le=10**6
    )
    average: float = setting(
        0.0, "Decay of the running mean of the weights that is released; 0 is off.", ge=0, lt=1
    )


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
        "Fewest survivors of a round, as a share of the devices expected in each band; with fewer "
        "nothing is released.",
        unit="share of the expected cohort",
        gt=0,
        lt=1,
    )
    colluding_share: float = setting(
        0.05,
        "Devices assumed to tell the server their noise or masks; the others' noise alone is "
        "accounted.",
        unit="share of the expected cohort",
        ge=0,
        lt=0.33,
    )
    clip_norm: float | None = setting(
        None,
        "Largest L2 norm of one device's update; required with noise.",
        unit="L2 norm",
        gt=0,
        le=10**6,
    )
    epsilon: float | None = setting(
        None,
        "Target and budget, with noise; excludes `noise_multiplier`.",
        unit="ε, user level",
        ge=0.0001,
        le=1000,
    )
    noise_multiplier: float | None = setting(
        None,
        "Noise over sensitivity, with noise; excludes `epsilon`.",
        unit="standard deviations",
        gt=0,
        le=10**6,
    )
    delta: float = setting(
        1e-5,
        "δ of the guarantee; well below one over the users.",
        unit="probability",
        ge=1e-10,
        lt=1,
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
        unit="L2 norm",
        gt=0,
        le=10**6,
    )
    local_epsilon: float | None = setting(
        None,
        "`example`: ε of single interactions; excludes `local_noise_multiplier`.",
        unit="ε, example level",
        ge=0.0001,
        le=1000,
    )
    local_noise_multiplier: float | None = setting(
        None,
        "`example`: noise of a step over `local_clip_norm`; excludes `local_epsilon`.",
        unit="standard deviations",
        gt=0,
        le=10**6,
    )
    local_delta: float = setting(
        1e-7,
        "δ of the example-level guarantee; well below one over all interactions.",
        unit="probability",
        ge=1e-10,
        lt=1,
    )
    scale_bits: float = setting(
        13.0, "An update is encoded in integers of scale 2^this / `clip_norm`; without noise, a "
        "finer grid loses less.", unit="bits", ge=1, le=20,
    )  # fmt: skip
    ring_bits: Literal[32, 16] = setting(
        32, "Sums are taken modulo 2^this; 16 halves the upload, for cohorts of up to 1,000.",
        unit="bits",
    )  # fmt: skip


class Run(Section):
    """``[run]``: seed, evaluation, checkpoints, engine."""

    seed: int = setting(0, "Seed of everything that is not secret.", ge=0, le=2**63 - 1)
    eval_every: int = setting(
        0, "Rounds between evaluations; 0, only at the end.", unit="rounds", ge=0, le=10**6
    )
    checkpoint_every: int = setting(
        10, "Rounds between checkpoints.", unit="rounds", ge=1, le=10**6
    )
    engine: Literal["cohort", "device"] = setting(
        "cohort", "Many devices as one batch, or one device at a time."
    )
    secure_sum: Literal["exact", "full"] = setting(
        "exact",
        "`full` runs the secure aggregation of every round; `exact` adds the same integers without "
        "masks, for the same sum.",
    )
    top_k: Annotated[tuple[Cut, ...], BeforeValidator(as_tuple)] = setting(
        (10,), "Cut-offs of the metrics.", unit="items", min_length=1, max_length=10
    )
    seeds: int = setting(
        1, "Runs of each row, with seeds from `seed` on; figures are their means.", unit="runs",
        ge=1, le=100,
    )  # fmt: skip
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
