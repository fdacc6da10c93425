"""Scores of items for users whose private states were fitted to the released weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from privrec.data import Split
from privrec.device.device import Cohort, Draws
from privrec.device.recommender import RecommenderLearner
from privrec.device.samples import Functions
from privrec.device.tier import Federation, LocalModel, Tier
from privrec.evaluate import metrics
from privrec.models.ncf import NCF
from privrec.randomness import SecretRoot, rng_for
from privrec.scenario.load import Run

FloatArray = NDArray[np.float32]
_ITEMS_AT_ONCE = 8192


def evaluation_functions(seed: int) -> Functions:
    """Hash functions of the users that an evaluation plays, by user: its figures must repeat.

    Nothing is sent in an evaluation, so nothing rests on their being secret.
    """
    known = SecretRoot.known(b"evaluation")
    return lambda user: known.stream("lsh", "evaluation", seed, user)


@dataclass(frozen=True)
class Scorer:
    """Scores with one set of weights; the table is gathered in parts and never held.

    Args:
        model: with its weights.
        states: private states by user, shape ``(users, user_dim)``.
        n_items: size of the catalogue; items that the recommender does not hold come last.
    """

    model: LocalModel[NCF]
    states: FloatArray
    n_items: int

    def __call__(
        self, users: NDArray[np.integer], candidates: NDArray[np.integer] | None
    ) -> FloatArray:
        """Scores of each user's candidates ``(m, c)``, or of all items when there are none."""
        parts = [self._part(users, items) for items in self._items()]
        missing = self.n_items - self.model.view.vectors.items
        parts.append(np.full((len(users), missing), -np.inf, np.float32))
        full = np.concatenate(parts, axis=1)
        return full if candidates is None else np.take_along_axis(full, candidates, axis=1)

    def _items(self) -> Iterator[NDArray[np.int64]]:
        n_items = self.model.view.vectors.items
        for start in range(0, n_items, _ITEMS_AT_ONCE):
            yield np.arange(start, min(n_items, start + _ITEMS_AT_ONCE))

    def _part(self, users: NDArray[np.integer], items: NDArray[np.int64]) -> FloatArray:
        table, dense = torch.from_numpy(self.model.rows(items)), torch.from_numpy(self.model.dense)
        own = torch.from_numpy(self.states[users])
        scores: FloatArray = self.model.view.model.rank(own, table, dense).numpy()
        scores += self.model.biases(items)
        return scores


@dataclass(frozen=True)
class Evaluator:
    """Measures released weights on what a split holds out, every user fitted from nothing.

    Args:
        federation: the tiers.
        everyone: all users with the whole memory.
        cohorts: the devices of each tier.
        absent: users whose devices hold nothing.
        split: what to measure on.
        run: seed and lengths of the lists.
    """

    federation: Federation
    everyone: Cohort[RecommenderLearner]
    cohorts: tuple[Cohort[RecommenderLearner], ...]
    absent: NDArray[np.int64]
    split: Split
    run: Run

    def whole(self, weights: FloatArray, protocols: metrics.Protocols) -> metrics.Evaluation:
        """Metrics of all users with the whole memory.

        Args:
            weights: released coefficients.
            protocols: those of :func:`privrec.evaluate.metrics.evaluate`.
        """
        return self._measured(self.federation.tiers[0], self.everyone, weights, protocols)

    def own(
        self, weights: FloatArray, protocols: metrics.Protocols
    ) -> tuple[metrics.Evaluation, ...]:
        """Metrics of the users of each tier with what their tier holds of the weights.

        Those of devices that hold nothing come last: they recommend what is popular. Users of a
        tier none of whom holds out an item have no metrics.
        """
        cohorts = zip(self.federation.tiers, self.cohorts, strict=True)
        nobody, holds_out = metrics.Evaluation.nobody(), self.split.heldout.counts > 0
        measured = [
            self._measured(tier, cohort, weights, protocols)
            if holds_out[cohort.users].any()
            else nobody
            for tier, cohort in cohorts
        ]
        if self.federation.absent:
            absent, scores = self.absent, metrics.popularity_scores
            measured.append(
                self._evaluated(scores(self.split.train), protocols, absent)
                if holds_out[absent].any()
                else nobody
            )
        return tuple(measured)

    def _measured(
        self,
        tier: Tier,
        cohort: Cohort[RecommenderLearner],
        weights: FloatArray,
        protocols: metrics.Protocols,
    ) -> metrics.Evaluation:
        view = tier.view(self.federation.prefix(weights, tier))
        key = int(rng_for(self.run.seed, "serving").integers(2**63))
        draws = Draws(key, evaluation_functions(self.run.seed))
        fitted = cohort.learner.serve(view, cohort.data, draws)
        train, users = self.split.train, cohort.users
        states = np.zeros((train.n_users, fitted.shape[1]), np.float32)
        states[users] = fitted
        scorer = Scorer(LocalModel(cohort.learner.view, view), states, train.n_items)
        return self._evaluated(scorer, protocols, users)

    def _evaluated(
        self, scores: metrics.Scores, protocols: metrics.Protocols, users: NDArray[np.int64]
    ) -> metrics.Evaluation:
        return metrics.evaluate(
            scores,
            self.split,
            k=self.run.top_k,
            protocols=protocols,
            seed=self.run.seed,
            users=users,
        )
