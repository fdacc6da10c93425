"""What a model is worth on what its data holds out: a recommender, next words, or labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privrec.data import Split
from privrec.data.corpus import UNKNOWN_ID, Corpus, examples_in
from privrec.device.device import Cohort, Draws
from privrec.device.local import LocalModel
from privrec.device.recommender import RecommenderLearner
from privrec.device.samples import Histories
from privrec.device.tier import Federation, Tier
from privrec.evaluate import metrics
from privrec.evaluate.metrics import Evaluation
from privrec.models.ncf import NCF
from privrec.models.words import NextWord, WordBag
from privrec.randomness import SecretRoot, rng_for
from privrec.scenario.load import Run
from privrec.workers import forked

FloatArray = NDArray[np.float32]
Int64Array = NDArray[np.int64]
_ITEMS_AT_ONCE = 8192
_SCORES = 1 << 24  # scores of users over the whole catalogue held at a time
_SEQUENCES = 8  # at a time, so that their scores stay in a cache
_EXAMPLES = 16  # likewise, of labels


def scores_with(
    model: LocalModel[NCF], users: Int64Array, states: FloatArray, n_items: int
) -> metrics.Scores:
    """Scores of private ``states``, ``(m, user_dim)``, of ``users``, who ascend.

    The table is never held as a whole. A device that holds only the most popular of the ``n_items``
    scores the others by public features, where it has some, and by their rank: what features leave
    of a user's own scores is extended on its line over the logarithm of the rank, which never
    rises.
    """
    network, dense = model.view.network, torch.from_numpy(model.dense)
    features = model.view.features
    held, ranks = model.view.vectors.items, np.log1p(np.arange(n_items, dtype=np.float32))
    fit = np.linalg.pinv(np.stack((np.ones(held, np.float32), ranks[:held]), axis=1))

    def full(own: Tensor) -> FloatArray:
        scores = np.empty((len(own), n_items), np.float32)
        for items in model.view.vectors.in_parts(_ITEMS_AT_ONCE):
            ranked = network.rank(own, torch.from_numpy(model.rows(items)), dense)
            scores[:, items] = ranked.numpy() + model.biases(items)
        if held < n_items:
            told = np.zeros((1, n_items), np.float32)
            if features is not None:
                told = network.feature_scores(own, features)
            level, slope = ((scores[:, :held] - told[:, :held]) @ fit.T).T[:, :, None]
            scores[:, held:] = level + np.minimum(slope, 0) * ranks[held:] + told[:, held:]
        return scores

    def scores(asked: NDArray[np.integer], candidates: NDArray[np.integer] | None) -> FloatArray:
        own = torch.from_numpy(states[np.searchsorted(users, asked)])
        if candidates is None:
            return full(own)
        if candidates.size >= held or held < n_items:
            return np.take_along_axis(full(own), candidates, axis=1)
        rows, weights = torch.from_numpy(model.rows(candidates)), dense.expand(len(own), -1)
        scored = network.forward(own, rows, weights).values.numpy()
        return np.asarray(scored + model.biases(candidates), np.float32)

    return scores


@dataclass(frozen=True)
class Evaluator:
    """Measures released weights on what a split holds out, every user fitted from nothing.

    ``absent`` are users whose devices hold nothing, and ``measured`` those that are looked at.
    """

    federation: Federation
    cohorts: tuple[Cohort[RecommenderLearner], ...]
    absent: Int64Array
    measured: Int64Array
    split: Split
    run: Run

    def whole(self, weights: FloatArray, protocols: metrics.Protocols) -> Evaluation:
        """Measure users of all tiers with the whole memory."""
        train, learner = self.split.train, self.cohorts[0].learner
        histories = Histories(np.arange(train.n_users), train.indptr, train.items)
        return self._evaluated(self.federation.tiers[0], learner, histories, weights, protocols)

    def own(self, weights: FloatArray, protocols: metrics.Protocols) -> tuple[Evaluation, ...]:
        """Measure the users of each tier with what their tier holds of the weights.

        Those of devices that hold nothing come last: they recommend what is popular. A tier none of
        whose users holds out an item has no metrics.
        """
        measured = [
            self._evaluated(tier, cohort.learner, cohort.data, weights, protocols)
            for tier, cohort in zip(self.federation.tiers, self.cohorts, strict=True)
        ]
        if self.federation.absent:
            popular = metrics.popularity_scores(self.split.train)
            asked = np.intersect1d(self.absent, self.measured)
            measured.append(self._scored(popular, protocols, asked))
        return tuple(measured)

    def figures(self, weights: FloatArray) -> tuple[Int64Array, NDArray[np.float64]]:
        """Users that have a device, ascending, and the :func:`figures` of each."""
        train, held, run = self.split.train, self.split.heldout, self.run
        rows = np.arange(train.n_users)
        seen, wanted = (Histories(rows, each.indptr, each.items) for each in (train, held))
        found = np.zeros((train.n_users, 3))
        for tier, cohort in zip(self.federation.tiers, self.cohorts, strict=True):
            view, users = tier.view(self.federation.prefix(weights, tier)), cohort.users
            alone = run.engine == "device"
            for mine in users[:, None] if alone else [users]:
                data, heldout = seen.select(mine), wanted.select(mine)
                found[mine] = figures(cohort.learner, view, data, heldout, train.n_items, run)
        users = np.sort(np.concatenate([cohort.users for cohort in self.cohorts]))
        return users, found[users]

    def _evaluated(
        self,
        tier: Tier,
        learner: RecommenderLearner,
        data: Histories,
        weights: FloatArray,
        protocols: metrics.Protocols,
    ) -> Evaluation:
        asked = data.select(np.flatnonzero(np.isin(data.users, self.measured)))
        view = tier.view(self.federation.prefix(weights, tier))
        scores = _served(learner, view, asked, self.split.train.n_items, self.run)
        return self._scored(scores, protocols, asked.users)

    def _scored(
        self, scores: metrics.Scores, protocols: metrics.Protocols, users: Int64Array
    ) -> Evaluation:
        split, cuts, seed = self.split, self.run.top_k, self.run.seed
        if not split.heldout.counts[users].any():
            return Evaluation.nobody()
        workers = self.run.workers
        return metrics.evaluate(
            scores, split, k=cuts, protocols=protocols, seed=seed, users=users, workers=workers
        )


def _served(
    learner: RecommenderLearner, view: FloatArray, data: Histories, n_items: int, run: Run
) -> metrics.Scores:
    """Scores of users who are fitted from nothing to what their tier holds, ``view``."""
    asked, seed = learner.held(data), run.seed
    key = int(rng_for(seed, "serving").integers(2**63))
    # Figures must repeat; and nothing is sent, so hash functions need not be secret.
    known = SecretRoot.known(b"evaluation")
    draws = Draws(key, lambda user: known.stream("lsh", "evaluation", seed, user))
    # Each worker fits some of the batches, and leaves the other states zeros.
    fitted = forked(run.workers, partial(learner.serve, view, asked, draws))
    model = LocalModel(learner.serving.view, view)
    return scores_with(model, asked.users, np.sum(fitted, axis=0), n_items)


def figures(
    learner: RecommenderLearner,
    view: FloatArray,
    data: Histories,
    heldout: Histories,
    n_items: int,
    run: Run,
) -> NDArray[np.float64]:
    """What a secure sum has of each user, see :func:`privrec.evaluate.metrics.figures`.

    ``heldout`` is of the users of ``data``; ``view`` is what their devices hold, as memory.
    """
    scores = _served(learner, view, data, n_items, run)
    step, parts = max(1, _SCORES // n_items), []
    for at in range(0, len(data.users), step):
        rows = np.arange(at, min(at + step, len(data.users)))
        some = [each.select(rows) for each in (data, heldout)]
        seen, wanted = ((np.repeat(np.arange(len(rows)), e.lengths), e.items) for e in some)
        table = np.array(scores(data.users[rows], None), np.float32, order="C")
        parts.append(metrics.figures(table, seen, wanted, run.top_k[0]))
    return np.concatenate(parts) if parts else np.zeros((0, 3))


# ------------------------------------------------------------------ next words and labels

Asked = Iterator[tuple[Tensor, Tensor]]


class Questions(ABC):
    """What texts or examples that were held out ask a model, and what the answers count for.

    ``metric`` names the share of answers among the best ``k``.
    """

    metric: str

    @abstractmethod
    def ask(self, model: Any, tokens: Int64Array, table: Tensor, dense: Tensor) -> Asked:
        """Go through one device's data, some positions at a time, by the vectors of all neurons.

        Of positions that count it yields hidden vectors, ``(p, dim)``, and the neurons wanted
        there, ``(p, most)``, filled up by -1.
        """

    @abstractmethod
    def wanted(self, texts: Corpus) -> tuple[NDArray[np.integer], int]:
        """Return all neurons that are wanted, one after the other, and the number of positions."""

    def value(self, hits: NDArray[np.float64], cut: int) -> NDArray[np.float64]:
        """Return what so many hits among the best ``cut`` count for."""
        return hits


class WordQuestions(Questions):
    """The word after each position of a text, in windows of the model's context."""

    metric = "accuracy"

    def ask(self, model: NextWord, tokens: Int64Array, table: Tensor, dense: Tensor) -> Asked:
        """See :meth:`Questions.ask`."""
        context = model.context
        whole = (len(tokens) - 1) // context
        ends = [*range(0, whole, _SEQUENCES), whole]
        windows = [
            (tokens[a * context : b * context], tokens[a * context + 1 : b * context + 1], context)
            for a, b in pairwise(ends)
        ]
        rest = tokens[whole * context :]
        if len(rest) > 1:
            windows.append((rest[:-1], rest[1:], len(rest) - 1))
        for inputs, targets, length in windows:
            wanted = torch.from_numpy(targets)
            counts = wanted != UNKNOWN_ID
            vectors = table[torch.from_numpy(inputs.reshape(-1, length))]
            yield model.hidden(vectors, dense).flatten(0, 1)[counts], wanted[counts, None]

    def wanted(self, texts: Corpus) -> tuple[NDArray[np.integer], int]:
        """See :meth:`Questions.wanted`."""
        asked = texts.items != UNKNOWN_ID
        asked[texts.indptr[:-1][texts.counts > 0]] = False  # nothing comes before a first word
        return texts.items[asked], int(asked.sum())


class LabelQuestions(Questions):
    """The labels of each example that has one."""

    metric = "precision"

    def ask(self, model: WordBag, tokens: Int64Array, table: Tensor, dense: Tensor) -> Asked:
        """See :meth:`Questions.ask`."""
        for part in examples_in(tokens).hashed(model.features).batches(_EXAMPLES):
            wanted = torch.from_numpy(part.padded_labels())
            counts = (wanted >= 0).any(1)
            yield model.hidden(part, dense)[counts], wanted[counts]

    def wanted(self, texts: Corpus) -> tuple[NDArray[np.integer], int]:
        """See :meth:`Questions.wanted`."""
        examples = examples_in(texts.items)
        return examples.labels, int((np.diff(examples.label_ends, prepend=0) > 0).sum())

    def value(self, hits: NDArray[np.float64], cut: int) -> NDArray[np.float64]:
        """Share of the best ``cut`` that are an example's own."""
        return hits / cut


def predict(
    questions: Questions, model: LocalModel[Any], texts: Corpus, cuts: Sequence[int]
) -> Evaluation:
    """Answer all questions of some texts or examples by the ``cuts`` best of all neurons.

    All are looked at, whatever part of them devices train. The unknown word is never predicted and
    never counted: no keyboard could offer it.
    """
    words = model.view.vectors.items
    table = torch.from_numpy(model.rows(np.arange(words)))
    biases = torch.from_numpy(model.biases(np.arange(words)))
    dense = torch.from_numpy(model.dense.copy())
    most = min(max(cuts), words)
    positions, losses = np.zeros(texts.n_users, np.int64), np.zeros(texts.n_users)
    ranked = np.zeros((texts.n_users, most))
    with torch.no_grad():
        for text in range(texts.n_users):
            tokens = texts.history(text).astype(np.int64)
            tokens[tokens >= words] = UNKNOWN_ID
            for hidden, wanted in questions.ask(model.view.network, tokens, table, dense):
                scores = torch.addmm(biases, hidden, table.T)
                scores[:, UNKNOWN_ID] = -torch.inf
                found, loss = _found(scores, wanted, most)
                ranked[text] += found
                positions[text] += len(wanted)
                losses[text] += loss
    within = np.cumsum(ranked, axis=1)
    values = {
        f"{questions.metric}@{cut}": questions.value(within[:, min(cut, words) - 1], cut)
        for cut in cuts
    }
    losses = np.nan_to_num(losses, nan=np.inf)
    return Evaluation(np.arange(texts.n_users), values, positions, losses)


def commonest(
    questions: Questions, train: Corpus, heldout: Corpus, cuts: Sequence[int]
) -> dict[str, float]:
    """Score always predicting the commonest words, which is what popularity comes to."""
    counts = train.item_counts()
    counts[UNKNOWN_ID] = -1
    best = np.argsort(-counts, kind="stable")
    wanted, size = questions.wanted(heldout)
    hits = {cut: np.isin(wanted, best[:cut]).sum() for cut in cuts}
    return {
        f"{questions.metric}@{cut}": float(questions.value(found, cut) / max(1, size))
        for cut, found in hits.items()
    }


def _found(scores: Tensor, wanted: Tensor, most: int) -> tuple[NDArray[np.float64], float]:
    """How many positions have a wanted neuron at each rank, and the summed loss of the wanted."""
    real = wanted >= 0
    own = scores.gather(1, wanted.clamp(min=0)).masked_fill(~real, -torch.inf)
    # Of the best, one more than is asked; a tie or what is no number counts against its neuron.
    best = torch.topk(scores, min(most + 1, scores.shape[1]), sorted=False).values
    better = (~(best[:, None, :] < own[:, :, None])).sum(2).clamp(min=1) - 1
    found = np.bincount(better[real].numpy(), minlength=most + 1)[:most].astype(np.float64)
    logs = torch.logsumexp(scores, 1) - own.masked_fill(~real, 0.0).sum(1) / real.sum(1)
    return found, float(logs.sum())
