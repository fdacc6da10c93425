"""From a scenario and a data set to the parts of a run: recommender, devices and server."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privrec.data import Interactions
from privrec.device.cohort import Cohort
from privrec.device.round import digest
from privrec.device.train import Recommender, Settings, Trainer
from privrec.embedding.subspace import Subspace
from privrec.models.layout import Layout
from privrec.models.ncf import NCF
from privrec.privacy.calibrate import noise_multiplier_for
from privrec.privacy.events import RoundEvent
from privrec.randomness import SecretRoot, rng_for
from privrec.scenario import Model, Scenario, Train
from privrec.secagg.ring import Encoding
from privrec.server.optimizer import Optimizer, Schedule
from privrec.server.server import Plan, Server
from privrec.transport.simulate import Simulation

LOOSE_CLIP_NORM = 100.0
"""Clip norm of a run without noise that names none: a range for the integers, rarely reached."""

TABULATED_ITEMS = 2**22
"""Largest catalogue whose places in the memory a simulation keeps in a table."""


@dataclass(frozen=True)
class Parts:
    """What a run consists of."""

    recommender: Recommender
    cohort: Cohort
    server: Server
    simulation: Simulation


def assemble(scenario: Scenario, train: Interactions, run_id: str, devices: SecretRoot) -> Parts:
    """The parts of a run at its first round.

    Args:
        scenario: what to run.
        train: every device's history.
        run_id: names the run's draws.
        devices: the devices' secret root.

    Raises:
        UsageError: when the sum of a full cohort could wrap around, or no noise meets the target.
    """
    recommender = recommender_of(scenario.model, train.n_items, scenario.run.seed)
    simulated = recommender.tabulated() if train.n_items <= TABULATED_ITEMS else recommender
    cohort = Cohort.of(trainer_of(simulated, scenario.train), train.indptr, train.items)
    encoding = encoding_of(scenario, recommender.layout)
    encoding.check_capacity(train.n_users)
    rate = scenario.devices.sampling_rate
    plan = Plan(
        run_id,
        scenario.hash(),
        event_of(scenario),
        encoding,
        rate * train.n_users,
        scenario.train.average,
    )
    weights = initial_weights(recommender, scenario.model.init_std, scenario.run.seed)
    server = Server(plan, weights, optimizer_of(scenario.train))
    seed, engine = scenario.run.seed, scenario.run.engine
    return Parts(
        recommender, cohort, server, Simulation(cohort, encoding, devices, seed, rate, engine)
    )


def recommender_of(model: Model, n_items: int, seed: int) -> Recommender:
    """The recommender that ``[model]`` describes, over a catalogue of ``n_items``."""
    ncf = NCF.of(model.kind, model.dim, tuple(model.hidden))
    keys = rng_for(seed, "subspace").integers(2**63, size=2)
    vectors = Subspace.sized(
        n_items, model.dim, block=model.block, key=int(keys[0]), compression=model.compression
    )
    biases = None
    if model.item_bias:
        biases = Subspace.sized(
            n_items, 1, block=1, key=int(keys[1]), compression=model.compression
        )
    layout = Layout(ncf.dense, vectors.slots, vectors.block, biases.slots if biases else 0)
    return Recommender(ncf, vectors, biases, layout)


def trainer_of(recommender: Recommender, train: Train) -> Trainer:
    """Local training as ``[train]`` describes it."""
    names = Settings.__dataclass_fields__
    return Trainer(recommender, Settings(**{name: getattr(train, name) for name in names}))


def encoding_of(scenario: Scenario, layout: Layout) -> Encoding:
    """Clip norm and integer grid of ``[privacy]``."""
    clip_norm = scenario.privacy.clip_norm or LOOSE_CLIP_NORM
    return Encoding(clip_norm, layout.size, scenario.privacy.scale_bits)


def event_of(scenario: Scenario) -> RoundEvent:
    """The privacy event of each round; a target ε is calibrated to the planned rounds."""
    privacy, rate = scenario.privacy, scenario.devices.sampling_rate
    if privacy.noise == "none":
        return RoundEvent("none", 0.0, rate)
    noise_multiplier = privacy.noise_multiplier
    if noise_multiplier is None and privacy.epsilon is not None:
        noise_multiplier = noise_multiplier_for(
            privacy.epsilon, privacy.delta, rate, scenario.train.rounds, privacy.budget_against
        )
    return RoundEvent("gaussian", noise_multiplier or 0.0, rate)


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


def initial_weights(recommender: Recommender, init_std: float, seed: int) -> NDArray[np.float32]:
    """Weights before the first round: Gaussian item vectors, zero biases, Glorot dense weights."""
    layout, rng = recommender.layout, rng_for(seed, "weights")
    weights = np.zeros(layout.size, np.float32)
    layout.dense_of(weights)[...] = recommender.model.initial_dense(rng)
    layout.memory_of(weights)[...] = rng.normal(0, init_std, (layout.slots, layout.block))
    return weights


def data_digest(train: Interactions) -> str:
    """Digest of the histories, to tell that a resumed run has the data it began with."""
    return (digest(train.indptr) + digest(train.items)).hex() + f"-{train.n_items}"
