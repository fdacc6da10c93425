"""The parties of a run, made from its plan: the server, devices in this process, and a learner.

What a plan agrees on is known without them, and without the libraries that they compute with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.data import Interactions
from privrec.data.corpus import Corpus
from privrec.data.item_features import centred, of_ranks
from privrec.device.device import Cohort, Learner, Settings
from privrec.device.example_shares import ExampleShares
from privrec.device.examples import ExampleNoise
from privrec.device.recommender import RecommenderLearner
from privrec.device.samples import Histories, popularity_of
from privrec.device.tier import Federation, Tier
from privrec.device.words import Ask, WordLearner
from privrec.privacy.events import RoundEvent
from privrec.randomness import SecretRoot, rng_for
from privrec.run.plan import Plan
from privrec.run.privacy_plan import encoding_of, reach_of
from privrec.run.simulation import Enrolled, Simulation
from privrec.scenario.kinds import SERVER_OPTIMIZERS, ImplicitALS
from privrec.scenario.load import Scenario, Train
from privrec.secagg.client import Policy
from privrec.server.optimizer import Optimizer, Schedule
from privrec.server.server import Completion, RoundPlan, Server

TABULATED_ITEMS = 2**22
"""Largest catalogue whose places in the memory a simulation keeps in a table."""


def server_of(plan: Plan, run_id: str) -> Server:
    """Return the server of a run at its first round; ``run_id`` names the run's draws."""
    scenario, federation = plan.scenario, plan.federation
    rounds = RoundPlan(
        run_id,
        plan.digest,
        plan.event,
        plan.protection,
        federation,
        expected_cohort=scenario.devices.sampling_rate * plan.holders[0],
        average=scenario.train.average,
        examples=plan.examples,
    )
    # Gaussian item vectors (hence Gaussian coefficients), zero biases, Glorot dense weights.
    layout, rng = federation.layout, rng_for(scenario.run.seed, "weights")
    weights = np.zeros(layout.size, np.float32)
    layout.dense_of(weights)[...] = federation.tiers[0].model.network.initial_dense(rng)
    memory = layout.memory_of(weights)
    memory[...] = rng.normal(0, scenario.model.init_std, memory.shape)
    completion = Completion(
        federation,
        scenario.train if isinstance(scenario.train, ImplicitALS) else None,
        scenario.devices.aggregation,
        tuple(local_lr(scenario, federation, tier) for tier in federation.tiers),
    )
    return Server(rounds, weights, completion, _optimizer(scenario.train))


def simulation_of(
    plan: Plan, train: Interactions | Corpus, devices: SecretRoot, ask: Ask | None = None
) -> Simulation:
    """Return devices that train on ``train`` in this process, with ``devices`` as their secret.

    ``ask`` is how devices ask the server for neurons, in the scheme ``"requested"``.
    """
    scenario, popularity, cohorts = plan.scenario, None, list[Cohort[Any]]()
    features = train.features if isinstance(train, Interactions) else None
    histories = Histories(np.arange(train.n_users), train.indptr, train.items)
    if scenario.train.selector == "popularity":
        popularity = popularity_of(train.item_counts())
    for tier in plan.federation.tiers:
        members = np.flatnonzero(plan.assigned == tier.index)
        if train.n_items <= TABULATED_ITEMS:
            tier = replace(tier, model=tier.model.tabulated())
        learner = learner_of(
            scenario, plan.federation, tier, train.n_items, plan.examples, popularity, ask, features
        )
        cohorts.append(Cohort.of(learner, histories.select(members)))
    return Simulation(
        plan.federation,
        tuple(cohorts),
        population=plan.users,
        protection=plan.protection,
        enrolled=enrolled_with(scenario, devices),
        seed=scenario.run.seed,
        sampling_rate=scenario.devices.sampling_rate,
        dropout_rate=scenario.devices.dropout_rate,
        engine=scenario.run.engine,
        secure_sum=scenario.run.secure_sum,
        workers=scenario.run.workers,
    )


def enrolled_with(scenario: Scenario, devices: SecretRoot) -> Enrolled:
    """Return the simulated devices, whose secret is ``devices``, as the protocol knows them."""
    policy = Policy(scenario.devices.min_cohort, scenario.privacy.colluding_share)
    return Enrolled(devices, policy)


def _optimizer(train: Train) -> Optimizer:
    kind = SERVER_OPTIMIZERS[train.server_optimizer]
    own = {key: getattr(train, key) for key in kind.config.model_fields}
    schedule = Schedule(train.schedule, train.rounds, train.warmup_rounds)
    optimizer: Optimizer = kind.load()(train.server_lr, schedule, train.weight_decay, **own)
    return optimizer


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
    n_items: int,
    examples: RoundEvent | None,
    popularity: NDArray[np.float64] | None = None,
    ask: Ask | None = None,
    features: NDArray[np.float32] | None = None,
) -> Learner:
    """Return local training as ``[train]`` describes it, in a tier's memory, of ``n_items``.

    ``examples`` is the plan's example-level event; without one no example is hidden. ``popularity``
    are public cumulative probabilities of the items, for popular negatives, and ``features`` those
    that the data has of all items, if any.
    """
    train, newton = scenario.train, scenario.train.server_optimizer == "newton"
    names = Settings.__dataclass_fields__.keys() & type(train).model_fields.keys()
    own = {name: getattr(train, name) for name in names - {"local_lr"}}
    lr = local_lr(scenario, federation, tier)
    settings = Settings(**own, newton=newton, local_lr=lr, config=train)
    if scenario.model.learns != "interactions":
        return WordLearner(tier.model, settings, ask)
    hidden = example_bound(scenario, examples, federation.layout.size)
    known = [] if features is None else [features]
    if getattr(scenario.model, "rank_features", False):
        known.append(centred(of_ranks(n_items)))
    view = tier.model
    if known:
        view = view.featured(np.concatenate(known, axis=1))
    if hidden is None:
        return RecommenderLearner(view, settings, popularity)
    # Bounds of single examples are of learned vectors alone; a fit that stays at home needs none.
    return RecommenderLearner(tier.model, settings, popularity, hidden, view)


def example_bound(
    scenario: Scenario, event: RoundEvent | None, dimension: int
) -> ExampleNoise | ExampleShares | None:
    """Return how devices hide single examples in rounds of this example-level event, if at all."""
    privacy = scenario.privacy
    if event is None or privacy.local_clip_norm is None:
        return None
    if event.grid is None:
        return ExampleNoise(privacy.local_clip_norm, event.noise_multiplier)
    scale = encoding_of(scenario, dimension).scale
    return ExampleShares(reach_of(scenario, dimension), scale, event.noise_multiplier)
