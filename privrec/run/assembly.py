"""From a scenario to its tiers, their models and learners, and the server's half of training."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from privrec.data import Interactions
from privrec.data.text import Corpus
from privrec.device.batch import Histories
from privrec.device.cohort import Cohort
from privrec.device.examples import ExampleNoise
from privrec.device.lessons import Network, OutputBudget
from privrec.device.negatives import popularity_of
from privrec.device.tier import Federation, ModelView, Tier
from privrec.device.train import Recommender, Settings, Trainer
from privrec.device.words import LocalSettings, RowServer, TextCohort, WideModel, WordTrainer
from privrec.embedding.nested import Nested, nested
from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable, Table
from privrec.errors import UsageError
from privrec.models.extreme import WordBag
from privrec.models.layout import Layout
from privrec.models.losses import IMPLICIT, packed_size
from privrec.models.ncf import NCF
from privrec.models.next_word import NextWord
from privrec.randomness import rng_for
from privrec.run.privacy_plan import example_event
from privrec.scenario.load import DeviceTier, Model, Scenario, Train
from privrec.server.optimizer import OPTIMIZERS, FedAdam, Optimizer, Schedule, Sgd
from privrec.server.server import Completion, Implicit

TABULATED_ITEMS = 2**22
"""Largest catalogue whose places in the memory a simulation keeps in a table."""

BYTES_A_COEFFICIENT = 4
_MOST_HALVINGS = 48


def cohorts_of(
    scenario: Scenario,
    federation: Federation,
    train: Interactions | Corpus,
    assigned: NDArray[np.int64],
    served: RowServer | None = None,
) -> tuple[Cohort | TextCohort, ...]:
    """Return the devices of each tier.

    Args:
        scenario: what to run.
        federation: its tiers.
        train: what each device trains on.
        assigned: the tier of each user.
        served: the server's tables, where devices ask it for neurons.
    """
    histories = Histories(np.arange(train.n_users), train.indptr, train.items)
    popularity = None
    if scenario.train.selector == "popularity":
        popularity = popularity_of(train.item_counts())
    cohorts: list[Cohort | TextCohort] = []
    for tier in federation.tiers:
        mine = histories.select(np.flatnonzero(assigned == tier.index))
        if isinstance(tier.recommender, WideModel):
            cohorts.append(writers_of(scenario, tier, mine, served))
            continue
        trainer = replace(trainer_of(scenario, federation, tier), popularity=popularity)
        if train.n_items <= TABULATED_ITEMS:
            trainer = replace(trainer, recommender=trainer.recommender.tabulated())
        cohorts.append(Cohort.of(trainer, mine))
    return tuple(cohorts)


def assign(n_users: int, federation: Federation, seed: int) -> NDArray[np.int64]:
    """The tier of each user, drawn by the seed; every tier has its share to within one device.

    Returns:
        Index of the tier, or the number of tiers for a device without part, shape ``(n_users,)``.
    """
    shares = [*(tier.share for tier in federation.tiers), federation.absent]
    labels = np.searchsorted(np.rint(np.cumsum(shares) * n_users), np.arange(n_users), side="right")
    most = len(federation.tiers) - (federation.absent == 0)
    return rng_for(seed, "tiers").permutation(labels.clip(max=most))


def federation_of(scenario: Scenario, n_items: int) -> Federation:
    """The tiers that ``[devices]`` describes, over the model of ``[model]``.

    Args:
        scenario: what to run.
        n_items: size of the catalogue.

    Raises:
        UsageError: when the tiers do not nest in this catalogue.
    """
    model, devices = scenario.model, scenario.devices
    vectors, biases = _tables(model, devices.order, n_items, scenario.run.seed)
    present = [tier for tier in devices.chain if tier.capacity != 0]
    described = [(_halving(scenario, tier, vectors, biases), tier) for tier in present]
    described.sort(key=lambda pair: pair[0])
    halvings = [halving for halving, _ in described]
    if len(set(halvings)) < len(halvings):
        raise UsageError(
            f"devices.tiers: capacities {[2.0**-h for h in halvings]} for this catalogue; two "
            "tiers of the same capacity are one: put their shares together"
        )
    chain, small = _coordinates(scenario, vectors, biases, halvings)
    tiers = [
        Tier(index, 2.0**-halving, tier.share, tier.weight,
             _recommender(scenario, chain, small, index), chain, small)
        for index, (halving, tier) in enumerate(described)
    ]  # fmt: skip
    return Federation(tuple(tiers), sum(t.share for t in devices.chain if t.capacity == 0))


def _tables(model: Model, order: str, n_items: int, seed: int) -> tuple[Table, Table | None]:
    """Tables of item vectors and biases at capacity 1."""
    keys = rng_for(seed, "subspace").integers(2**63, size=2)

    def table(dim: int, block: int, key: int) -> Table:
        if order != "fold":
            return PlainTable.of(n_items, dim, block=block, by_part=order == "dims")
        return Subspace.sized(n_items, dim, block=block, key=key, compression=model.compression)

    vectors = table(model.dim, model.block, int(keys[0]))
    return vectors, table(1, 1, int(keys[1])) if model.item_bias else None


def _halving(scenario: Scenario, tier: DeviceTier, vectors: Table, biases: Table | None) -> int:
    """``h`` of a tier of capacity ``2^-h``; the largest that fits its memory."""
    if tier.capacity is not None:
        return round(-math.log2(tier.capacity))
    room = 1024 * (tier.memory_kib or 0)
    for halving in range(_MOST_HALVINGS):
        chain, small = _coordinates(scenario, vectors, biases, [halving])
        layout = _recommender(scenario, chain, small, 0).layout
        if layout.size * BYTES_A_COEFFICIENT <= room:
            return halving
    raise UsageError(
        f"devices.tiers: memory_kib = {tier.memory_kib} holds no part of this model; "
        "raise it, or leave the tier out"
    )


def _coordinates(
    scenario: Scenario, vectors: Table, biases: Table | None, halvings: list[int]
) -> tuple[Nested, Nested | None]:
    """Nested coordinates of item vectors and biases."""
    order = scenario.devices.order
    # Item biases of the first dimensions are those of all items.
    same = [0] * len(halvings) if order == "dims" else halvings
    chain = nested(vectors, order, halvings)
    return chain, None if biases is None else nested(biases, order, same)


def _recommender(
    scenario: Scenario, vectors: Nested, biases: Nested | None, index: int
) -> ModelView:
    table, small = vectors.tables[index], None if biases is None else biases.tables[index]
    model = scenario.model
    if model.kind == "next_word":
        network = NextWord(table.dim, model.heads, model.ffn, model.layers, model.context)
        return _wide(network, table, small)
    if model.kind == "extreme":
        return _wide(WordBag(model.features, table.dim), table, small)
    ncf = NCF.of(model.kind, table.dim, tuple(model.hidden))
    gram = packed_size(table.dim) if scenario.train.loss in IMPLICIT else 0
    layout = Layout(ncf.dense, table.slots, table.block, 0 if small is None else small.slots, gram)
    return Recommender(ncf, table, small, layout)


def _wide(network: Network, table: Table, biases: Table | None) -> WideModel:
    if biases is None:
        raise UsageError("model.item_bias = false: an output neuron has a bias; set it")
    layout = Layout(network.dense, table.slots, table.block, biases.slots)
    return WideModel(network, table, biases, layout)


def local_lr(scenario: Scenario, federation: Federation, tier: Tier) -> float:
    """Return the step size of a tier's devices."""
    train = scenario.train
    if scenario.devices.aggregation == "fair_averaging" and train.server_optimizer != "newton":
        # FAIR's devices step on a folded memory as it is, where a gradient step in isometric
        # coordinates is as many times shorter as slots are folded into one.
        return train.local_lr * (federation.tiers[0].capacity / tier.capacity)
    return train.local_lr


def trainer_of(scenario: Scenario, federation: Federation, tier: Tier) -> Trainer:
    """Local training as ``[train]`` describes it, in a tier's memory."""
    train, newton = scenario.train, scenario.train.server_optimizer == "newton"
    names = Settings.__dataclass_fields__.keys() - {"newton"}
    settings = Settings(**{name: getattr(train, name) for name in names}, newton=newton)
    settings = replace(settings, local_lr=local_lr(scenario, federation, tier))
    if not isinstance(tier.recommender, Recommender):
        raise UsageError(
            f'model.kind = "{scenario.model.kind}": it learns from texts or labels; this is for '
            "recommenders of items alone"
        )
    return Trainer(tier.recommender, settings, examples=_example_noise(scenario))


def _example_noise(scenario: Scenario) -> ExampleNoise | None:
    event, bound = example_event(scenario), scenario.privacy.local_clip_norm
    return None if event is None or bound is None else ExampleNoise(bound, event.noise_multiplier)


def completion_of(scenario: Scenario, federation: Federation) -> Completion:
    """Return what the server makes of a released sum before its step."""
    aggregation, train = scenario.devices.aggregation, scenario.train
    implicit = None
    if train.loss in IMPLICIT:
        implicit = Implicit(
            train.unobserved_weight,
            train.item_l2,
            train.gram_rate,
            tuple(local_lr(scenario, federation, tier) for tier in federation.tiers),
            train.server_optimizer == "newton",
        )
    return Completion(
        federation,
        implicit,
        by_contributors=aggregation == "contributors",
        overwrites=aggregation == "fair_averaging",
    )


def optimizer_of(train: Train) -> Optimizer:
    """Return the server's optimiser as ``[train]`` describes it."""
    kind = OPTIMIZERS[train.server_optimizer]
    own: dict[type[Optimizer], dict[str, float]] = {
        Sgd: {"momentum": train.momentum},
        FedAdam: {"beta1": train.beta1, "beta2": train.beta2, "eps": train.adam_eps},
    }
    schedule = Schedule(train.schedule, train.rounds, train.warmup_rounds)
    return kind(train.server_lr, schedule, train.weight_decay, **own.get(kind, {}))


def initial_weights(federation: Federation, init_std: float, seed: int) -> NDArray[np.float32]:
    """Coefficients before the first round.

    Gaussian item vectors (hence Gaussian coefficients), zero biases, Glorot dense weights.
    """
    layout, rng = federation.layout, rng_for(seed, "weights")
    weights = np.zeros(layout.size, np.float32)
    layout.dense_of(weights)[...] = federation.tiers[0].recommender.model.initial_dense(rng)
    memory = layout.memory_of(weights)
    memory[...] = rng.normal(0, init_std, memory.shape)
    return weights


def writers_of(
    scenario: Scenario, tier: Tier, texts: Histories, served: RowServer | None = None
) -> TextCohort:
    """Devices of a tier with their texts, and local training as ``[train]`` describes it."""
    train, language = scenario.train, language_of(tier)
    sparse = train.loss == "softmax"
    selects = sparse and train.selector != "uniform"
    output = OutputBudget(
        language.vectors.items,
        train.budget if sparse else 1.0,
        train.selected if selects else 0.0,
        train.frequent if sparse else 0.0,
    )
    selector = train.selector if selects else None
    practice = LocalSettings(train.max_samples, train.local_steps, train.local_lr, selector)  # type: ignore[arg-type]
    return TextCohort(WordTrainer(language, output, practice), texts, served)


def language_of(tier: Tier) -> WideModel:
    """The wide model of a tier.

    Raises:
        UsageError: when it has another one.
    """
    if not isinstance(tier.recommender, WideModel):
        raise UsageError('model.kind: set "next_word" for texts, or "extreme" for labels')
    return tier.recommender
