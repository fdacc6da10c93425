"""From a scenario to its federation: tiers, their models, and the devices' local training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.data import Interactions
from privrec.data.corpus import Corpus
from privrec.device.device import Cohort, Learner, Settings
from privrec.device.examples import ExampleNoise
from privrec.device.recommender import RecommenderLearner
from privrec.device.samples import Histories, popularity_of
from privrec.device.tier import Federation, ModelView, Tier
from privrec.device.words import RowServer, WordLearner
from privrec.embedding.nested import Nested, nested
from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable, Table
from privrec.errors import UsageError
from privrec.models.losses import loss_of, packed_size
from privrec.randomness import rng_for
from privrec.run.privacy_plan import example_event
from privrec.scenario.kinds import MODELS
from privrec.scenario.load import DeviceTier, Scenario

TABULATED_ITEMS = 2**22
"""Largest catalogue whose places in the memory a simulation keeps in a table."""

BYTES_A_COEFFICIENT = 4
_MOST_HALVINGS = 48

Coordinates = tuple[Nested, Nested | None]


def federation_of(scenario: Scenario, n_items: int) -> Federation:
    """Return the tiers that ``[devices]`` describes, over the model of ``[model]``.

    Raises:
        UsageError: when the tiers do not nest in a catalogue of so many items.
    """
    devices, tables = scenario.devices, _tables(scenario, n_items)
    present = [tier for tier in devices.chain if tier.capacity != 0]
    described = sorted(
        [(_halving(scenario, tier, tables), tier) for tier in present], key=lambda pair: pair[0]
    )
    halvings = [halving for halving, _ in described]
    if len(set(halvings)) < len(halvings):
        raise UsageError(
            f"devices.tiers: capacities {[2.0**-h for h in halvings]} for this catalogue; two "
            "tiers of the same capacity are one: put their shares together"
        )
    chain = _coordinates(scenario, tables, halvings)
    tiers = []
    for index, (halving, tier) in enumerate(described):
        view = _view(scenario, chain, index)
        tiers.append(Tier(index, 2.0**-halving, tier.share, tier.weight, view, *chain))
    return Federation(tuple(tiers), sum(t.share for t in devices.chain if t.capacity == 0))


def _tables(scenario: Scenario, n_items: int) -> tuple[Table, Table | None]:
    """Tables of item vectors and biases at capacity 1."""
    model, order = scenario.model, scenario.devices.order
    keys = rng_for(scenario.run.seed, "subspace").integers(2**63, size=2).tolist()

    def table(dim: int, block: int, key: int) -> Table:
        if order != "fold":
            return PlainTable.of(n_items, dim, block=block, by_part=order == "dims")
        return Subspace.sized(n_items, dim, block=block, key=key, compression=model.compression)

    return table(model.dim, model.block, keys[0]), table(1, 1, keys[1]) if model.item_bias else None


def _halving(scenario: Scenario, tier: DeviceTier, tables: tuple[Table, Table | None]) -> int:
    """``h`` of a tier of capacity ``2^-h``; the largest that fits its memory."""
    if tier.capacity is not None:
        return round(-math.log2(tier.capacity))
    room = 1024 * (tier.memory_kib or 0)
    for halving in range(_MOST_HALVINGS):
        layout = _view(scenario, _coordinates(scenario, tables, [halving]), 0).layout
        if layout.size * BYTES_A_COEFFICIENT <= room:
            return halving
    raise UsageError(
        f"devices.tiers: memory_kib = {tier.memory_kib} holds no part of this model; "
        "raise it, or leave the tier out"
    )


def _coordinates(
    scenario: Scenario, tables: tuple[Table, Table | None], halvings: list[int]
) -> Coordinates:
    """Nested coordinates of item vectors and biases."""
    (vectors, biases), order = tables, scenario.devices.order
    # Item biases of the first dimensions are those of all items.
    same = [0] * len(halvings) if order == "dims" else halvings
    chain = nested(vectors, order, halvings)
    return chain, None if biases is None else nested(biases, order, same)


def _view(scenario: Scenario, chain: Coordinates, index: int) -> ModelView[Any]:
    vectors, biases = chain
    table, small = vectors.tables[index], None if biases is None else biases.tables[index]
    network = MODELS[scenario.model.kind].load().configured(scenario.model, table.dim)
    gram = packed_size(table.dim) if loss_of(scenario.train.loss).implicit else 0
    return ModelView.of(network, table, small, gram)


def assign(n_users: int, federation: Federation, seed: int) -> NDArray[np.int64]:
    """Draw the tier of each user by the seed; every tier has its share to within one device.

    Returns:
        Index of the tier, or the number of tiers for a device without part, shape ``(n_users,)``.
    """
    shares = [*(tier.share for tier in federation.tiers), federation.absent]
    labels = np.searchsorted(np.rint(np.cumsum(shares) * n_users), np.arange(n_users), side="right")
    most = len(federation.tiers) - (federation.absent == 0)
    return rng_for(seed, "tiers").permutation(labels.clip(max=most))


def local_lr(scenario: Scenario, federation: Federation, tier: Tier) -> float:
    """Return the step size of a tier's devices."""
    train = scenario.train
    if scenario.devices.aggregation == "fair_averaging" and train.server_optimizer != "newton":
        # FAIR's devices step on a folded memory as it is, where a gradient step in isometric
        # coordinates is as many times shorter as slots are folded into one.
        return train.local_lr * (federation.tiers[0].capacity / tier.capacity)
    return train.local_lr


def learner_of(
    scenario: Scenario,
    federation: Federation,
    tier: Tier,
    popularity: NDArray[np.float64] | None = None,
    served: RowServer | None = None,
) -> Learner:
    """Return local training as ``[train]`` describes it, in a tier's memory.

    Args:
        scenario: what to run.
        federation: the tiers.
        tier: one of them.
        popularity: public cumulative probabilities of the items, for popular negatives.
        served: a server that hands out output neurons, in the scheme ``"requested"``.
    """
    train, newton = scenario.train, scenario.train.server_optimizer == "newton"
    names = Settings.__dataclass_fields__.keys() & type(train).model_fields.keys()
    own = {name: getattr(train, name) for name in names - {"local_lr"}}
    settings = Settings(**own, newton=newton, local_lr=local_lr(scenario, federation, tier))
    if scenario.model.learns != "interactions":
        return WordLearner(tier.model, settings, served)
    event, bound = example_event(scenario), scenario.privacy.local_clip_norm
    noise = None if not event or bound is None else ExampleNoise(bound, event.noise_multiplier)
    return RecommenderLearner(tier.model, settings, popularity, noise)


def cohorts_of(
    scenario: Scenario,
    federation: Federation,
    train: Interactions | Corpus,
    assigned: NDArray[np.int64],
    served: RowServer | None = None,
) -> tuple[Cohort[Any], ...]:
    """Return the devices of each tier.

    Args:
        scenario: what to run.
        federation: its tiers.
        train: what each device trains on.
        assigned: the tier of each user.
        served: as :func:`learner_of`.
    """
    histories = Histories(np.arange(train.n_users), train.indptr, train.items)
    popularity = None
    if scenario.train.selector == "popularity":
        popularity = popularity_of(train.item_counts())
    cohorts = []
    for tier in federation.tiers:
        members = np.flatnonzero(assigned == tier.index)
        if train.n_items <= TABULATED_ITEMS:
            tier = replace(tier, model=tier.model.tabulated())
        learner = learner_of(scenario, federation, tier, popularity, served)
        cohorts.append(Cohort.of(learner, histories.select(members)))
    return tuple(cohorts)
