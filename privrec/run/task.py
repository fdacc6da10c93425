"""What is particular to recommending, to next words and to labels, with the data of one run.

A task is found by what the model learns from, in :data:`TASKS`. Everything else of a run
is the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from privrec import data
from privrec.data import Interactions, Split
from privrec.data.corpus import UNKNOWN_ID, Corpus, TextSplit
from privrec.device.local import LocalModel
from privrec.device.samples import Histories
from privrec.device.tier import Tier
from privrec.device.update import (
    BoundedUpdate,
    Evaluating,
    Order,
    Round,
    SideSum,
    by_counts,
    digest,
)
from privrec.errors import DataError, IntegrityError, UsageError
from privrec.evaluate import evaluator, metrics
from privrec.evaluate.evaluator import Evaluator, LabelQuestions, Questions, WordQuestions
from privrec.evaluate.metrics import Evaluation
from privrec.privacy.ledger import Ledger
from privrec.randomness import SecretRoot
from privrec.run import costs
from privrec.run.catalogue import CATALOGUE, Catalogue, read_order
from privrec.run.directory import Identity
from privrec.run.loop import released_order
from privrec.run.parties import enrolled_with, simulation_of
from privrec.run.plan import Plan
from privrec.run.record import KEPT, REVEALED
from privrec.run.simulation import Enrolled, Simulation, side_sum
from privrec.scenario.load import Scenario
from privrec.server.columns import ColumnServer

FloatArray = NDArray[np.float32]
S = TypeVar("S", Split, TextSplit)


@dataclass
class Task(ABC, Generic[S]):
    """One kind of learning, over the data of a scenario.

    ``columns`` is the server that hands out neurons, in the scheme ``"requested"``.
    """

    scenario: Scenario
    split: S
    columns: ColumnServer | None = field(default=None, init=False)

    @classmethod
    @abstractmethod
    def load(cls, scenario: Scenario, data_dir: Path | None) -> Self:
        """Read the data of a scenario; a :class:`DataError` says where it is malformed."""

    def check(self) -> None:
        """Refuse, before a charge, what cannot be run or measured on this data."""
        for tier in self.plan.federation.tiers:
            if tier.index not in self.plan.assigned:
                raise UsageError(
                    f"devices.tiers: the share {tier.share:g} of {self.plan.users} users is "
                    "nobody; raise the share, or leave the tier out"
                )

    @property
    def items(self) -> int:
        """Size of the catalogue, or of the vocabulary."""
        return self.split.train.n_items

    @cached_property
    def plan(self) -> Plan:
        """The scenario for data of this size, planned once."""
        declared, users = self.scenario.devices.population, self.split.train.n_users
        if declared is not None and declared != users:
            raise UsageError(
                f"devices.population = {declared}: the data has {users} users; declare that "
                "number, or leave the key out"
            )
        return Plan.of(self.scenario, self.items, users, catalogue=self.split.train.n_items)

    @cached_property
    def measured(self) -> NDArray[np.int64]:
        """Users, or texts held out, that metrics are of: all, or as many as ``run.eval_users``."""
        counts, run = self.split.heldout.counts, self.scenario.run
        if run.eval_users is None:
            return np.arange(counts.size)
        return metrics.some(np.flatnonzero(counts), run.eval_users, run.seed)

    @property
    def digest(self) -> str:
        """Digest of the histories, to tell that a resumed run has the data it began with."""
        train = self.split.train
        return (digest(train.indptr) + digest(train.items)).hex() + f"-{train.n_items}"

    # ------------------------------------------------------------------ the order of the items

    @property
    def is_ordered(self) -> bool:
        """Whether items are numbered by how popular they are."""
        return True

    @property
    @abstractmethod
    def counted(self) -> Interactions:
        """What a private count is made of: each device's items, each named once."""

    def number(self, folder: Path, ledger: Ledger, identity: Identity) -> None:
        """Number the items by popularity where that is needed, and write down which they are.

        The order is public, or released by :func:`~privrec.run.loop.released_order`. The list of
        the items is written to ``folder`` before a round, signed: by another one a model recommends
        other items.
        """
        order, plan = None, self.plan
        if self.is_ordered:
            if plan.counting is None:
                order = by_counts(self.split.train.item_counts())
            else:
                there = np.flatnonzero(plan.assigned < len(plan.federation.tiers))
                histories = Histories(
                    np.arange(plan.users), self.counted.indptr, self.counted.items
                )
                data, counting = histories.select(there), plan.counting
                enrolled = enrolled_with(self.scenario, identity.root("devices"))

                def collect(round: Round) -> NDArray[np.int64]:
                    def bounded(some: NDArray[np.int64]) -> BoundedUpdate:
                        return counting.bounded(data.select(some), enrolled.root, round)

                    return self._summed(counting, round, data.users, bounded, enrolled)

                order = released_order(plan, counting, ledger, identity, collect)
            order = self.arranged(order)
            self._renumber(order)
        self.catalogue(order).write(folder, identity.signing_key())

    def catalogue(self, order: Order | None) -> Catalogue:
        """Return what a run says of its items, which are numbered by ``order``, if by any."""
        return Catalogue(np.empty(0, np.int64), order=order)

    def arranged(self, order: Order) -> Order:
        """Return an order with what has a place of its own put there."""
        return order

    def restore_numbers(self, folder: Path, key: Ed25519PublicKey) -> None:
        """Number the items as in the run in ``folder``, whose key is ``key``.

        An IntegrityError says that the items of this data are not those of the run.
        """
        if not (folder / CATALOGUE).exists() and not self.is_ordered:
            return  # the devices are at nodes of Flower, and the server has no list
        listed = Catalogue.read(folder, key)
        if self.is_ordered:
            self._renumber(read_order(folder, self.split.train.n_items, key))
        # The server of a deployment keeps an order, and no ids.
        if listed.ids.size and not np.array_equal(listed.ids, self.catalogue(None).ids):
            raise IntegrityError(
                f"{folder / CATALOGUE}: its items are not those of this data; use the data that "
                "the run was started with"
            )

    def _renumber(self, order: Order) -> None:
        self.split = self.split.renumbered(order)
        if self.plan.counting is not None:  # all rounds are bound to it
            self.plan = replace(self.plan, order=digest(order))

    def _summed(
        self,
        wanted: SideSum,
        round: Round,
        users: NDArray[np.int64],
        bounded: Callable[[NDArray[np.int64]], BoundedUpdate],
        enrolled: Enrolled,
    ) -> NDArray[np.int64]:
        secure_sum, dropout_rate = self.scenario.run.secure_sum, self.scenario.devices.dropout_rate
        return side_sum(wanted, round, users, bounded, enrolled, secure_sum, dropout_rate)

    # ------------------------------------------------------------------ devices and figures

    def summed_figures(
        self, devices: Simulation, evaluating: Evaluating, round: Round, weights: FloatArray
    ) -> NDArray[np.int64]:
        """Sum what each device finds of released weights; ReleaseRefused when too few answer."""
        users, found = self.figures(devices, weights)

        def bounded(some: NDArray[np.int64]) -> BoundedUpdate:
            return evaluating.bounded(found[some])

        return self._summed(evaluating, round, users, bounded, devices.enrolled)

    def figures(
        self, devices: Simulation, weights: FloatArray
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return users with a device, and what each finds: recommenders alone have an answer."""
        raise UsageError("only recommenders are evaluated in a secure sum")

    def simulate(self, devices: SecretRoot) -> Simulation:
        """Return the simulated devices, which draw from the secret ``devices``."""
        ask = None if self.columns is None else self.columns.ask
        return simulation_of(self.plan, self.split.train, devices, ask)

    @abstractmethod
    def evaluate(self, devices: Simulation, weights: FloatArray, *, whole: bool) -> Evaluation:
        """Measure released weights; in the midst of a run not by everything that there is."""

    def evaluate_tiers(
        self, devices: Simulation, weights: FloatArray, whole: Evaluation
    ) -> tuple[Evaluation, ...]:
        """Measure what each tier's users get, and last those whose devices hold nothing, if any.

        ``whole`` is what all get with the whole memory.
        """
        return (Evaluation.nobody(),) * len(self.plan.federation.tiers)

    @abstractmethod
    def baseline(self, name: str) -> dict[str, float]:
        """Measure a baseline that is trained where all data lies in one place."""

    @abstractmethod
    def particulars(self, evaluated: Evaluation) -> dict[str, Callable[[], Any]]:
        """Return what makes further entries of ``result.json`` from the final metrics."""

    def cost(self, devices: Simulation, tier: Tier, weights: FloatArray) -> dict[str, Any]:
        """Return what one device of a tier holds, moves and needs in a round."""
        cohort, vectors = devices.cohorts[tier.index], tier.model.vectors
        peak = self._peak(devices, tier, weights) if self.scenario.run.footprint else None
        sight = None if self.columns is None else self.columns.sight
        return {
            **costs.of_tier(self.plan, tier, sight),
            "devices": len(cohort.states),
            "items": vectors.items,
            "dim": vectors.dim,
            "device_peak_bytes": peak,
        }

    def _peak(self, devices: Simulation, tier: Tier, weights: FloatArray) -> int | None:
        prefix = self.plan.federation.prefix(weights, tier)
        longest = costs.longest(devices.cohorts[tier.index])
        features = getattr(self.split.train, "features", None)
        described = 0 if features is None else features.shape[1]
        return costs.peak_bytes(self.plan, tier, prefix, longest, described)


class Recommending(Task[Split]):
    """Recommenders, which learn from histories of interactions."""

    @classmethod
    def load(cls, scenario: Scenario, data_dir: Path | None) -> Self:
        return cls(scenario, data.load(scenario.data, data_dir=data_dir))

    def check(self) -> None:
        super().check()
        metrics.holding_out(self.split.heldout, None)
        if self.scenario.train.serve_recency and self.split.train.times is None:
            raise UsageError(
                f"train.serve_recency = {self.scenario.train.serve_recency:g}: the data has no "
                "times, by which a user's last items would be known; use data with a column of "
                "times, or leave the key out"
            )
        for name in self.scenario.run.baselines:
            metrics.check(name, self.split.train, dim=self.scenario.model.dim)

    @property
    def is_ordered(self) -> bool:
        """Whether weak devices hold a prefix of the catalogue."""
        return self.scenario.devices.order == "rows"

    @property
    def counted(self) -> Interactions:
        return self.split.train

    def catalogue(self, order: Order | None) -> Catalogue:
        train = self.split.train
        return Catalogue(train.item_ids, train.titles, order, train.features)

    def evaluate(self, devices: Simulation, weights: FloatArray, *, whole: bool) -> Evaluation:
        """Measure users of all tiers with the whole memory, fitted from nothing."""
        protocols: metrics.Protocols = ("sampled", "full")
        if not whole:
            protocols = ("sampled",) if self.split.heldout.single else ("full",)
        return self._evaluator(devices).whole(weights, protocols)

    def evaluate_tiers(
        self, devices: Simulation, weights: FloatArray, whole: Evaluation
    ) -> tuple[Evaluation, ...]:
        if len(devices.cohorts) == 1 and not self.plan.federation.absent:
            return (whole,)
        return self._evaluator(devices).own(weights, ("sampled", "full"))

    def figures(
        self, devices: Simulation, weights: FloatArray
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        return self._evaluator(devices).figures(weights)

    def _evaluator(self, devices: Simulation) -> Evaluator:
        federation, run = self.plan.federation, self.scenario.run
        users = devices.absent, self.measured
        return Evaluator(federation, devices.cohorts, *users, self.split, run)

    def baseline(self, name: str) -> dict[str, float]:
        run, dim = self.scenario.run, self.scenario.model.dim
        scores = metrics.scores_of(name, self.split.train, dim=dim, seed=run.seed)
        return metrics.evaluate(
            scores, self.split, k=run.top_k, seed=run.seed, users=self.measured
        ).summary()

    def particulars(self, evaluated: Evaluation) -> dict[str, Callable[[], Any]]:
        return {"segments": lambda: metrics.by_segment(evaluated, self.split)}


@dataclass
class WideTask(Task[TextSplit]):
    """Wide outputs over texts, words numbered by how common they are."""

    questions: ClassVar[Questions]

    def __post_init__(self) -> None:
        if self.scenario.train.requested:
            self.columns = ColumnServer()

    @classmethod
    def load(cls, scenario: Scenario, data_dir: Path | None) -> Self:
        return cls(scenario, data.load_texts(scenario.data, data_dir=data_dir))

    def check(self) -> None:
        super().check()
        if not self.split.heldout.n_users:
            raise DataError(
                "no text or example is held out: metrics need one; use data that has some"
            )

    @property
    def items(self) -> int:
        return self.split.n_items

    @property
    def counted(self) -> Interactions:
        return self.split.train.distinct

    @property
    def heldout(self) -> Corpus:
        """The texts or examples that metrics are of."""
        return self.split.heldout.select(self.measured)

    def arranged(self, order: Order) -> Order:
        """Put the unknown word first."""
        return np.concatenate(([UNKNOWN_ID], order[order != UNKNOWN_ID]))

    def evaluate(self, devices: Simulation, weights: FloatArray, *, whole: bool) -> Evaluation:
        """Measure what was held out, by the whole softmax."""
        tier = self.plan.federation.tiers[0]
        view = tier.view(self.plan.federation.prefix(weights, tier))
        model, cuts = LocalModel(tier.model, view), self.scenario.run.top_k
        return evaluator.predict(self.questions, model, self.heldout, cuts)

    def baseline(self, name: str) -> dict[str, float]:
        """Measure the commonest words, which is what popularity comes to."""
        train, cuts = self.split.train, self.scenario.run.top_k
        return evaluator.commonest(self.questions, train, self.heldout, cuts)

    def particulars(self, evaluated: Evaluation) -> dict[str, Callable[[], Any]]:
        return {"reveals": self._reveals}

    def _reveals(self) -> dict[str, Any]:
        """What the server was told beside sums, counted."""
        if self.columns is None:
            return {"scheme": "private", "statement": KEPT}
        sight = self.columns.sight
        each = max(1, sight.requests)
        return {
            "scheme": "requested",
            "statement": REVEALED,
            "buckets_a_request": sight.buckets / each,
            "words_a_request": sight.words / each,
            "neurons_a_request": sight.neurons / each,
        }

    def cost(self, devices: Simulation, tier: Tier, weights: FloatArray) -> dict[str, Any]:
        """Add what the output layer takes."""
        cohort = devices.cohorts[tier.index]
        batch = cohort.learner.batch(costs.longest(cohort), 0, 0)
        positions = max(1, len(batch.targets(np.arange(len(batch)))))
        output = costs.of_output(cohort, self.scenario, positions)
        return super().cost(devices, tier, weights) | output

    def _peak(self, devices: Simulation, tier: Tier, weights: FloatArray) -> int | None:
        if self.columns is None:
            return super()._peak(devices, tier, weights)
        # A device that asks for neurons holds those alone: to it, they are a whole vocabulary.
        prefix = self.plan.federation.prefix(weights, tier)
        text = costs.longest(devices.cohorts[tier.index])
        neurons = round(self.scenario.train.budget * self.items)
        small = self.scenario.with_settings(
            {"train.scheme": None, "train.loss": "full_softmax", "train.selector": "each"}
        )
        asked = Plan.of(small, neurons, self.plan.users)
        (only,) = asked.federation.tiers
        return costs.peak_bytes(asked, only, np.resize(prefix, only.layout.size), text % neurons)


class NextWords(WideTask):
    """The next word of texts."""

    questions = WordQuestions()


class Labels(WideTask):
    """Labels of examples, of which there are very many."""

    questions = LabelQuestions()


TASKS: dict[str, type[Task[Any]]] = {
    "interactions": Recommending,
    "texts": NextWords,
    "labels": Labels,
}
"""The task of a model by what it learns from."""


def load_task(scenario: Scenario, data_dir: Path | None) -> Task[Any]:
    """Return the task of a scenario, items in the order of its data."""
    return TASKS[scenario.model.learns].load(scenario, data_dir)
