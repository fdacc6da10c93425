"""The parts of a run that learns from texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privrec.data.text import Corpus
from privrec.device.batch import Histories
from privrec.device.lessons import Output
from privrec.device.tier import Federation, Tier
from privrec.device.words import Language, Practice, Served, WordTrainer, Writers
from privrec.errors import UsageError
from privrec.randomness import SecretRoot
from privrec.run.assembly import assign, federation_of, server_of
from privrec.run.simulation import Simulation
from privrec.run.summing import Enrolled
from privrec.scenario.load import Scenario
from privrec.secagg.client import Policy
from privrec.server.columns import ColumnServer
from privrec.server.server import Server


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
    simulation: Simulation[Writers]
    columns: ColumnServer | None

    @property
    def language(self) -> Language:
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
    scenario: Scenario, tier: Tier, texts: Histories, served: Served | None = None
) -> Writers:
    """Devices of a tier with their texts, and local training as ``[train]`` describes it."""
    train, language = scenario.train, language_of(tier)
    sparse = train.loss == "softmax"
    selects = sparse and train.selector != "uniform"
    output = Output(
        language.vectors.items,
        train.budget if sparse else 1.0,
        train.selected if selects else 0.0,
        train.frequent if sparse else 0.0,
    )
    selector = train.selector if selects else None
    practice = Practice(train.max_samples, train.local_steps, train.local_lr, selector)  # type: ignore[arg-type]
    return Writers(WordTrainer(language, output, practice), texts, served)


def language_of(tier: Tier) -> Language:
    """The wide model of a tier.

    Raises:
        UsageError: when it has another one.
    """
    if not isinstance(tier.recommender, Language):
        raise UsageError('model.kind: set "next_word" for texts, or "extreme" for labels')
    return tier.recommender
