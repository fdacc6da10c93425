"""From a scenario and a data set to the parts of a run: recommender, devices and server.

The parts of a run that learns from texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from privrec.data import Interactions
from privrec.data.text import Corpus
from privrec.device.batch import Histories
from privrec.device.cohort import Cohort
from privrec.device.examples import ExampleNoise
from privrec.device.lessons import Network, OutputBudget
from privrec.device.negatives import popularity_of
from privrec.device.round import Protection, digest
from privrec.device.tier import Federation, ModelView, Tier
from privrec.device.train import Recommender, Settings, Trainer
from privrec.device.words import LocalSettings, RowServer, TextCohort, WideModel, WordTrainer
from privrec.embedding.nested import Nested, nested
from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable, Table
from privrec.errors import UsageError
from privrec.models.extreme import WordBag
from privrec.models.layout import Layout, band_sizes
from privrec.models.losses import IMPLICIT, packed_size
from privrec.models.ncf import NCF
from privrec.models.next_word import NextWord
from privrec.privacy.events import RoundEvent
from privrec.randomness import SecretRoot, rng_for
from privrec.run.privacy_plan import example_event, plan_privacy
from privrec.run.simulation import Simulation
from privrec.run.summing import Enrolled
from privrec.scenario.load import DeviceTier, Model, Scenario, Train
from privrec.secagg.client import Policy
from privrec.server.columns import ColumnServer
from privrec.server.completion import Completion, Implicit
from privrec.server.optimizer import Optimizer, Schedule
from privrec.server.server import Plan, Server

TABULATED_ITEMS = 2**22
"""Largest catalogue whose places in the memory a simulation keeps in a table."""


BYTES_A_COEFFICIENT = 4
_MOST_HALVINGS = 48


@dataclass(frozen=True)
class Parts:
    """What a run consists of.

    Args:
        federation: the tiers of devices.
        everyone: all users with the whole memory, for evaluation.
        server: the server at its first round.
        simulation: the devices, each in its tier.
    """

    federation: Federation
    everyone: Cohort
    server: Server
    simulation: Simulation[Cohort]

    @property
    def states(self) -> tuple[NDArray[np.float32], ...]:
        """Private states of the simulated devices, by tier."""
        return tuple(cohort.states for cohort in self.simulation.cohorts)


def assemble(scenario: Scenario, train: Interactions, run_id: str, devices: SecretRoot) -> Parts:
    """The parts of a run at its first round.

    Args:
        scenario: what to run.
        train: every device's history.
        run_id: names the run's draws.
        devices: the devices' secret root.

    Raises:
        UsageError: when a sum could wrap around, no noise meets the target, a band has too few
            devices, or the tiers do not nest in this catalogue.
    """
    federation = federation_of(scenario, train.n_items)
    histories = Histories(np.arange(train.n_users), train.indptr, train.items)
    popularity = None
    if scenario.train.selector == "popularity":
        popularity = popularity_of(train.item_counts())
    everyone, *cohorts = _cohorts(scenario, federation, histories, train.n_items, popularity)
    server = server_of(scenario, federation, train.n_users, run_id)
    policy = Policy(scenario.devices.min_cohort, scenario.privacy.colluding_share)
    simulation = Simulation(
        federation,
        tuple(cohorts),
        train.n_users,
        server.plan.protection,
        Enrolled(devices, policy),
        scenario.run.seed,
        scenario.devices.sampling_rate,
        scenario.devices.dropout_rate,
        scenario.run.engine,
        scenario.run.secure_sum,
    )
    return Parts(federation, everyone, server, simulation)


def server_of(scenario: Scenario, federation: Federation, population: int, run_id: str) -> Server:
    """The server of a run at its first round; it needs to know how many devices there are.

    Args:
        scenario: what to run.
        federation: the tiers.
        population: enrolled devices.
        run_id: names the run's draws.

    Raises:
        UsageError: as :func:`assemble`.
    """
    event, protection = agreement_of(scenario, federation, population)
    training = sum(_members(population, federation))
    plan = Plan(
        run_id,
        scenario.plan_hash(),
        event,
        protection,
        federation,
        scenario.devices.sampling_rate * training,
        scenario.train.average,
        example_event(scenario),
    )
    weights = initial_weights(federation, scenario.model.init_std, scenario.run.seed)
    completion = completion_of(scenario, federation)
    return Server(plan, weights, completion, optimizer_of(scenario.train))


def agreement_of(
    scenario: Scenario, federation: Federation, population: int
) -> tuple[RoundEvent, Protection]:
    """What server and devices agree on: the event of each round, and how updates are protected."""
    return plan_privacy(
        scenario, band_sizes(federation.layouts), holders_of(population, federation)
    )


def holders_of(population: int, federation: Federation) -> list[int]:
    """Training devices that hold each band, the weakest tier's band first; public numbers alone."""
    held: list[int] = np.cumsum(_members(population, federation))[::-1].tolist()
    return held


def _members(population: int, federation: Federation) -> list[int]:
    """Devices of each tier that train; a function of public numbers alone, as :func:`assign`."""
    shares = [tier.share for tier in federation.tiers]
    counts = np.diff(np.rint(np.cumsum(shares) * population).astype(int), prepend=0)
    training = [tier.weight > 0 for tier in federation.tiers]
    members: list[int] = (counts * training).tolist()
    return members


def _cohorts(
    scenario: Scenario, federation: Federation, histories: Histories, n_items: int,
    popularity: NDArray[np.float64] | None,
) -> Iterator[Cohort]:  # fmt: skip
    """Everybody with the whole memory, then the devices of each tier."""
    n_users, tiers = len(histories.users), federation.tiers
    assigned = assign(n_users, federation, scenario.run.seed)
    members = [np.arange(n_users), *(np.flatnonzero(assigned == tier.index) for tier in tiers)]
    for tier, users in zip((tiers[0], *tiers), members, strict=True):
        trainer = replace(trainer_of(scenario, federation, tier), popularity=popularity)
        if n_items <= TABULATED_ITEMS:
            trainer = replace(trainer, recommender=trainer.recommender.tabulated())
        yield Cohort.of(trainer, histories.select(users))


def assign(n_users: int, federation: Federation, seed: int) -> NDArray[np.int64]:
    """The tier of each user, drawn by the seed; every tier has its share to within one device.

    Returns:
        Index of the tier, or the number of tiers for a device without part, shape ``(n_users,)``.
    """
    shares = [*(tier.share for tier in federation.tiers), federation.absent]
    labels = np.searchsorted(np.rint(np.cumsum(shares) * n_users), np.arange(n_users), side="right")
    most = len(federation.tiers) - (federation.absent == 0)
    return rng_for(seed, "tiers").permutation(labels.clip(max=most))


def check_tiers(scenario: Scenario, n_users: int, n_items: int) -> None:
    """Refuse tiers that do not nest in a catalogue, or that no user would be of.

    Args:
        scenario: what is to be run.
        n_users: number of users.
        n_items: size of the catalogue, or of the vocabulary.

    Raises:
        UsageError: when there is such a tier.
    """
    federation = federation_of(scenario, n_items)
    assigned = assign(n_users, federation, scenario.run.seed)
    for tier in federation.tiers:
        if tier.index not in assigned:
            raise UsageError(
                f"devices.tiers: the share {tier.share:g} of {n_users} users is nobody; "
                "raise the share, or leave the tier out"
            )


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


def trainer_of(scenario: Scenario, federation: Federation, tier: Tier) -> Trainer:
    """Local training as ``[train]`` describes it, in a tier's memory."""
    train, newton = scenario.train, scenario.train.server_optimizer == "newton"
    names = Settings.__dataclass_fields__.keys() - {"newton"}
    settings = Settings(**{name: getattr(train, name) for name in names}, newton=newton)
    if scenario.devices.aggregation == "fair_averaging" and not newton:
        # FAIR's devices step on a folded memory as it is, where a gradient step in isometric
        # coordinates is as many times shorter as slots are folded into one.
        gain = federation.tiers[0].capacity / tier.capacity
        settings = replace(settings, local_lr=settings.local_lr * gain)
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
    """What the server makes of a released sum before its step."""
    aggregation, train = scenario.devices.aggregation, scenario.train
    implicit = None
    if train.loss in IMPLICIT:
        implicit = Implicit(
            train.unobserved_weight,
            train.item_l2,
            train.gram_rate,
            tuple(trainer_of(scenario, federation, t).settings.local_lr for t in federation.tiers),
            train.server_optimizer == "newton",
        )
    return Completion(
        federation,
        implicit,
        by_contributors=aggregation == "contributors",
        overwrites=aggregation == "fair_averaging",
    )


def optimizer_of(train: Train) -> Optimizer:
    """The server's optimiser as ``[train]`` describes it."""
    return Optimizer(
        train.server_optimizer,
        train.server_lr,
        Schedule(train.schedule, train.rounds, train.warmup_rounds),
        momentum=train.momentum,
        betas=(train.beta1, train.beta2),
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
    )


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


def data_digest(train: Interactions | Corpus) -> str:
    """Digest of the histories, to tell that a resumed run has the data it began with."""
    return (digest(train.indptr) + digest(train.items)).hex() + f"-{train.n_items}"


@dataclass(frozen=True)
class TextParts:
    """What a run over texts consists of.

    Args:
        federation: the tiers of devices.
        server: the server at its first round.
        simulation: the devices, each in its tier.
        columns: the server that hands out neurons, in the scheme ``"requested"``; else None.
    """

    federation: Federation
    server: Server
    simulation: Simulation[TextCohort]
    columns: ColumnServer | None

    @property
    def language(self) -> WideModel:
        """What the shared vector means."""
        return language_of(self.federation.tiers[0])

    @property
    def states(self) -> tuple[NDArray[np.float32], ...]:
        """Private states of the simulated devices, by tier."""
        return tuple(cohort.states for cohort in self.simulation.cohorts)


def assemble_texts(
    scenario: Scenario, train: Corpus, run_id: str, devices: SecretRoot
) -> TextParts:
    """The parts of a run over texts at its first round.

    Args:
        scenario: what to run.
        train: every device's text, words numbered by how common they are.
        run_id: names the run's draws.
        devices: the devices' secret root.

    Raises:
        UsageError: as :func:`privrec.run.assembly.assemble`.
    """
    federation = federation_of(scenario, train.n_items)
    server = server_of(scenario, federation, train.n_users, run_id)
    columns = ColumnServer() if scenario.train.scheme == "requested" else None
    histories = Histories(np.arange(train.n_users), train.indptr, train.tokens)
    assigned = assign(train.n_users, federation, scenario.run.seed)
    cohorts = tuple(
        writers_of(
            scenario, tier, histories.select(np.flatnonzero(assigned == tier.index)), columns
        )
        for tier in federation.tiers
    )
    policy = Policy(scenario.devices.min_cohort, scenario.privacy.colluding_share)
    simulation = Simulation(
        federation, cohorts, train.n_users, server.plan.protection, Enrolled(devices, policy),
        scenario.run.seed, scenario.devices.sampling_rate, scenario.devices.dropout_rate,
        "cohort", scenario.run.secure_sum,
    )  # fmt: skip
    return TextParts(federation, server, simulation, columns)


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
    practice = LocalSettings(train.max_samples, train.local_steps, train.local_lr, selector)
    return TextCohort(WordTrainer(language, output, practice), texts, served)


def language_of(tier: Tier) -> WideModel:
    """The wide model of a tier.

    Raises:
        UsageError: when it has another one.
    """
    if not isinstance(tier.recommender, WideModel):
        raise UsageError('model.kind: set "next_word" for texts, or "extreme" for labels')
    return tier.recommender
