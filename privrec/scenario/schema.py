"""The tables of a scenario, and what must hold between their keys.

A rule yields the keys that break it, each with the rule and a remedy in words. It ends where a key
that it reads is malformed or of another kind, so that one mistake is reported once. Keys that only
some kind has, and what a kind needs of other keys, stand at the kind
(:mod:`privrec.scenario.kinds`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from privrec.scenario.kinds import (
    LOSSES,
    MODELS,
    READERS,
    REGISTRIES,
    SELECTORS,
    SERVER_OPTIMIZERS,
    Need,
    Problem,
    Section,
    SimHash,
    Table,
    Values,
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


# --------------------------------------------------------------------------- rules


def as_toml(value: object) -> str:
    """``value`` as one TOML value on one line; ``unset`` for None, which TOML cannot write."""
    if value is None:
        return "unset"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        pairs = (f"{as_toml(str(key))} = {as_toml(entry)}" for key, entry in value.items())
        return "{ " + ", ".join(pairs) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return str(value)


def shown(value: object, *, limit: int = 60) -> str:
    """``value`` as TOML, cut to ``limit`` characters, for a message."""
    text = as_toml(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def describe(path: str, value: object, rule: str, remedy: str) -> str:
    """The one form of a problem: ``path = value: rule; remedy``."""
    found = f"{path} is unset" if value is None else f"{path} = {shown(value)}"
    return f"{found}: {rule}; {remedy}"


def conflicts(values: Values) -> dict[str, str]:
    """Everything that is wrong between keys: a message by path."""
    chosen = [
        (registry.path, registry[values[registry.path]].config)
        for registry in REGISTRIES
        if values.get(registry.path) in registry
    ]
    rules = [*_RULES, *(config.conflicts for _, config in chosen)]
    needs = [(path, config.needs) for path, config in chosen]
    needs += [(path, of) for path, value, of in _NEEDS if values.get(path) == value]
    found: dict[str, str] = {}
    for problems in [*(rule(values) for rule in rules), *(_unmet(*each, values) for each in needs)]:
        with suppress(KeyError):
            for path, rule, remedy in problems:
                found.setdefault(path, describe(path, values[path], rule, remedy))
    return found


def _unmet(owner: str, needs: Sequence[Need], values: Values) -> Iterator[Problem]:
    """The first thing that is missing; a key that the chosen kinds do not have is as it must be."""
    for need in needs:
        value = values.get(need.path, need.options[0])
        if (tuple(value) if isinstance(value, list) else value) in need.options:
            continue
        rule = f"{owner} = {as_toml(values[owner])} does not go with it: {need.reason}"
        wanted = need.options[0]
        fix = (
            f"remove it (-s {need.path}=)"
            if wanted is None
            else f"set {need.path} = {as_toml(wanted)}"
        )
        nouns = [registry.noun for registry in REGISTRIES if registry.path == owner]
        yield need.path, rule, f"{fix}, or use another {(nouns or [owner])[0]}"
        return


_FAIR = "it is FAIR's plain average of item memories"
_ASKED = "the server sees who asks for what"
_NEEDS: tuple[tuple[str, str, tuple[Need, ...]], ...] = (
    (
        "devices.aggregation",
        "fair_averaging",
        (
            Need("model.kind", ("gmf",), _FAIR),
            Need("privacy.noise", ("none",), _FAIR),
            Need("train.server_optimizer", ("fedavg", "newton"), _FAIR),
            Need("devices.nesting", ("fold", None), "FAIR averages folded memories"),
            Need("devices.popularity", (None,), 'FAIR averages folded memories, nesting = "fold"'),
        ),
    ),
    (
        "privacy.local",
        "example",
        (
            Need("train.loss", ("bce", "bpr"), "each example has a loss of its own"),
            Need("train.selector", ("each",), "negatives must not depend on the history"),
            Need(
                "train.user_steps",
                (0,),
                "a user vector fitted without noise would show the examples",
            ),
            Need("train.max_samples", (None,), "a window of the history moves with every example"),
            Need("devices.aggregation", ("sum", "contributors"), "updates have noise everywhere"),
        ),
    ),
    (
        "train.scheme",
        "requested",
        (
            Need("model.kind", ("next_word",), _ASKED),
            Need("privacy.noise", ("none",), _ASKED),
            Need("run.secure_sum", ("exact",), _ASKED),
            Need("devices.tiers", ((),), _ASKED),
            Need("model.compression", (1.0,), _ASKED),
        ),
    ),
)
"""What goes only with some values of other keys, besides kinds."""


def _material(values: Values) -> Iterator[Problem]:
    """A model learns from what the reader gives."""
    source, kind = values["data.source"], values["model.kind"]
    gives = READERS[source].config.gives
    if gives == MODELS[kind].config.learns:
        return
    learners = [name for name in MODELS if MODELS[name].config.learns == gives]
    remedy = f"{gives} and model.kind = {' or '.join(map(as_toml, learners))} need each other"
    yield "model.kind", f"data.source = {as_toml(source)} has other data", f"{remedy}; change one"


def _sizes(values: Values) -> Iterator[Problem]:
    """Blocks divide a vector, and warming up ends before the run does."""
    dim, block = values["model.dim"], values["model.block"]
    divisors = [size for size in range(1, min(dim, block) + 1) if dim % size == 0]
    if dim % block:
        yield "model.block", f"must divide model.dim = {dim}", f"use {divisors[-1]}"
    elif values["model.compression"] > 1 and dim == block:
        rule = f"a compressed model.dim = {dim} needs two blocks or more, or whole items collide"
        yield "model.block", rule, f"use {divisors[-2]}" if dim > 1 else "raise model.dim"


def _course(values: Values) -> Iterator[Problem]:
    if values["train.warmup_rounds"] > (rounds := values["train.rounds"]):
        rule = f"must not exceed train.rounds = {rounds}"
        yield "train.warmup_rounds", rule, "lower it or train for longer"
    if len(cuts := set(values["run.top_k"])) < len(values["run.top_k"]):
        yield "run.top_k", "must not repeat a cut-off", f"use {as_toml(sorted(cuts))}"


def _noise(values: Values) -> Iterator[Problem]:
    """Noise has a bound on what it hides, and one of target and multiplier; without it, none."""
    for owner, prefix, whose, without in (
        ("privacy.noise", "privacy.", "update", "gives no guarantee at all"),
        ("privacy.local", "privacy.local_", "interaction", "protects no single interaction"),
    ):
        kind = f"{owner} = {as_toml(values[owner])}"
        clip, epsilon, multiplier = (
            prefix + name for name in ("clip_norm", "epsilon", "noise_multiplier")
        )
        if values[owner] == "none":
            # Updates are encoded within a bound without noise too; single interactions are not.
            given = (epsilon, multiplier, *([clip] if owner == "privacy.local" else []))
            for path in given:
                if values[path] is not None:
                    yield path, f"{kind} {without}", f"set {owner} or remove it (-s {path}=)"
            continue
        if values[clip] is None:
            yield clip, f"{kind} needs a bound on each {whose}", "set it, for example to 1.0"
        if values[epsilon] is None and values[multiplier] is None:
            remedy = f"set {epsilon}, for example to 8, or {multiplier}"
            yield epsilon, f"{kind} needs a target ε or a multiplier", remedy
        elif None not in (values[epsilon], values[multiplier]):
            rule = f"excludes {multiplier} = {values[multiplier]}, since each decides the other"
            yield epsilon, rule, "remove one of them"


def _tiers(values: Values) -> Iterator[Problem]:
    tiers = [
        tier if isinstance(tier, Mapping) else tier.model_dump() for tier in values["devices.tiers"]
    ]
    capacities = [tier["capacity"] for tier in tiers if tier.get("capacity") is not None]
    if not tiers:
        return
    if any((tier.get("capacity") is None) == (tier.get("memory_kib") is None) for tier in tiers):
        rule = "each tier has one of capacity and memory_kib"
    elif any(capacity and math.frexp(capacity)[0] != 0.5 for capacity in capacities):
        rule = "a capacity is a power of two, 1, 0.5, 0.25 and so on, or memories do not nest"
    elif len(set(capacities)) < len(capacities):
        rule = "two tiers of one capacity are the same tier"
    elif abs((total := sum(tier["share"] for tier in tiers)) - 1) > 1e-6:
        rule = f"the shares must add up to 1, and they give {total:g}"
    elif not any(tier.get("weight", 1.0) and tier.get("capacity") != 0 for tier in tiers):
        rule = "a tier of weight 0 or capacity 0 does not train, and then nobody does"
    else:
        return
    remedy = "for example [{capacity = 1.0, share = 0.5}, {capacity = 0.25, share = 0.5}]"
    yield "devices.tiers", rule, remedy


def _nesting(values: Values) -> Iterator[Problem]:
    path, popularity, kind = "devices.nesting", values["devices.popularity"], values["model.kind"]
    order = values[path] or ("fold" if popularity is None else "rows")
    # Words are in this order however they are nested; and sampling may draw by it.
    used = READERS[values["data.source"]].config.gives != "interactions"
    used = used or (values["train.selector"] == "popularity" and popularity == "public")
    if order == "rows" and popularity is None:
        remedy = 'set devices.popularity = "public" or "released"'
        yield path, "the order of the rows must come from somewhere", remedy
    elif order != "rows" and popularity is not None and not used:
        rule = f"devices.popularity = {as_toml(popularity)} orders rows, which are not used"
        yield path, rule, 'set nesting = "rows" or remove popularity (-s devices.popularity=)'
    elif order != "fold" and values["model.compression"] > 1:
        rule = f"model.compression = {values['model.compression']} needs a hashed memory"
        yield path, rule, 'use nesting = "fold", or model.compression = 1'
    elif order == "dims" and not MODELS[kind].config.inner_product:
        rule = f"the network of model.kind = {as_toml(kind)} has one input width"
        yield path, rule, 'use model.kind = "gmf", or nesting = "fold"'


def _release(values: Values) -> Iterator[Problem]:
    """Counts that are released have an ε of their own, and nothing else has."""
    path, released = "devices.popularity_epsilon", values["devices.popularity"] == "released"
    if released and values[path] is None:
        rule = 'devices.popularity = "released" is charged'
        yield path, rule, "set it, for example to 0.5"
    if not released and values[path] is not None:
        remedy = f'set devices.popularity = "released" or remove it (-s {path}=)'
        yield path, "there is no release to charge", remedy


_RULES: tuple[Callable[[Values], Iterator[Problem]], ...] = (
    _material,
    _sizes,
    _course,
    _noise,
    _tiers,
    _nesting,
    _release,
)
