"""The model of a finished run, which recommends to anybody: users of the data, or histories."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Self, cast

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from privrec.data import Split
from privrec.data.files import read_history
from privrec.data.interactions import position_of
from privrec.device.device import Draws
from privrec.device.local import LocalModel
from privrec.device.recommender import RecommenderLearner
from privrec.device.samples import Histories
from privrec.device.tier import Federation
from privrec.errors import UsageError
from privrec.evaluate.evaluator import scores_with
from privrec.models.ncf import NCF
from privrec.privacy.ledger import PREPARATION, Ledger
from privrec.randomness import ROOT_BYTES, SecretRoot, SecureStream, rng_for
from privrec.run import directory
from privrec.run.catalogue import Catalogue
from privrec.run.directory import Identity, public_key_of
from privrec.run.parties import learner_of
from privrec.run.plan import federation_of
from privrec.run.summary import read_model
from privrec.run.task import Recommending
from privrec.scenario.kinds import SELECTORS, Searching
from privrec.scenario.load import Scenario, load
from privrec.search.select import best, ranked, select

FloatArray = NDArray[np.float32]
Items = NDArray[np.int64]
Lists = tuple[Items, FloatArray]
CANDIDATES = 50
"""Candidates that are ranked exactly for each recommendation, where they are selected."""
NONE = -1
"""Stands in a list for the item that it does not have, with a score of minus infinity."""
_SCORES = 1 << 24  # scores of users over the whole catalogue held at a time
_USERS = 2048


@dataclass(frozen=True)
class Recommendation:
    """One recommended item, by the data set's own id; ``rank`` is 1 for the best.

    Scores are the model's: larger is better, comparable within one list only.
    """

    rank: int
    item_id: str
    title: str | None
    score: float


def recommend(
    run_dir: str | os.PathLike[str],
    *,
    user: str | None = None,
    history: Sequence[str] | Path | None = None,
    k: int = 10,
    data_dir: Path | None = None,
    selector: str = "scan",
) -> list[Recommendation]:
    """Return the ``k`` best items for a user of the data or for a history.

    What they have is left out: all items of the history, and of a user also what was held out. The
    user's vector is fitted to all of that from nothing, on this machine, as a device would: a
    history never seen in training is served just like one that was. Whoever asks more than once
    reads the model once, by :func:`privrec.load`.

    Args:
        run_dir: the run's directory; for a ``history`` it is all that is needed.
        history: ids of liked items, the latest last, or a file of them
            (:func:`privrec.data.files.read_history`).
        data_dir: where the data lies, before the place that the run remembers.
        selector: how the best are found in the memory (:mod:`privrec.search.select`): ``scan`` is
            exact; others find candidates, which are then ranked exactly. A model with a network,
            or with features of items, scores all of them.

    Raises:
        UnknownIdError: when the data set has no such user or item.
        UsageError: when not one of ``user`` and ``history`` is given, or another value is wrong.
    """
    if (user is None) == (history is None):
        raise UsageError("recommend: give one of --user ID and --history FILE")
    check(k, selector)
    model = TrainedModel.read(run_dir, data_dir=data_dir)
    asked = model.history(history or ()) if user is None else model.owned(model.users([user]))
    return next(model.named(model.lists(asked, k, selector=selector)))


def check(k: int, selector: str = "scan") -> None:
    """Raise UsageError for a length of lists, or a selector, that there is not."""
    if k < 1:
        raise UsageError(f"k = {k}: must be at least 1; ask for one recommendation or more")
    searching = [name for name, kind in SELECTORS.items() if issubclass(kind.config, Searching)]
    if selector not in searching:
        raise UsageError(
            f'--selector "{selector}": is none of {", ".join(searching)}; choose one of them'
        )


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """The released model of a finished run, with the list of its items: read once, to serve many.

    Neither holds a history. Those of the data's own users are read where they are asked for.

    Attributes:
        path: the run's directory.
        catalogue: which items the model has.
        weights: the released coefficients.
        key: the server's public key, by which the run's files are known.
        data_dir: where the data lies, or None.
        given: the data itself, in its own order, where it is in memory.
    """

    path: Path
    scenario: Scenario
    catalogue: Catalogue
    weights: FloatArray
    key: Ed25519PublicKey
    data_dir: Path | None = None
    given: Split | None = field(default=None, repr=False)

    @classmethod
    def read(
        cls,
        run_dir: str | os.PathLike[str],
        *,
        data_dir: Path | None = None,
        given: Split | None = None,
    ) -> Self:
        """Read the model of a finished run, which must be the one that its signed ledger ends with.

        Where the devices were at nodes of Flower the server has no list of the items, so the data
        is read for it.

        Raises:
            UsageError: when there is no finished run of a recommender.
            IntegrityError: when a file is not as the run left it.
        """
        path = Path(run_dir)
        identity, scenario = Identity.read(path), load(path / directory.SCENARIO)
        if scenario.model.learns != "interactions":
            raise UsageError(
                f"{path}: texts and labels have no items to recommend, and this is a model of "
                f'kind "{scenario.model.kind}"; name the run of a recommender'
            )
        key = public_key_of(identity.run_id)
        with Ledger.open(path / directory.LEDGER, public_key=key, repair=False) as ledger:
            directory.check_header(path, ledger.header, scenario, identity.bound)
        # An end that is not signed is not the run's.
        model = ledger.ended if ledger.signed == ledger.entries else None
        rounds = ((each.round, each.attempt) for each in ledger.charges if each.round > PREPARATION)
        if model is not None and not any(ledger.committed(*place) for place in rounds):
            raise UsageError(
                f"{path}: this run ended before one round released a sum, so it has no trained "
                "model; start another"
            )
        place, key = data_dir or identity.data_dir, ledger.public_key
        if identity.deployed:
            task = Recommending.load(scenario, place)
            given = given or task.split
            task.restore_numbers(path, key)
            catalogue = task.catalogue(None)
        else:
            catalogue = Catalogue.read(path, key)
        federation = federation_of(scenario, catalogue.size)
        weights = read_model(path, federation, model)
        return cls(path, scenario, catalogue, weights, key, place, given)

    # ------------------------------------------------------------------ the model

    @cached_property
    def _federation(self) -> Federation:
        return federation_of(self.scenario, self.catalogue.size)

    @cached_property
    def _learner(self) -> RecommenderLearner:
        parts, size = (self._federation, self._federation.tiers[0]), self.catalogue.size
        made = learner_of(self.scenario, *parts, size, None, features=self.catalogue.features)
        return cast(RecommenderLearner, made)

    @cached_property
    def local(self) -> LocalModel[NCF]:
        """The model as a device of the highest capacity holds it."""
        view = self._federation.tiers[0].view(self.weights)
        return LocalModel(self._learner.serving.view, view)

    @cached_property
    def vectors(self) -> FloatArray:
        """The vectors of the items that the model holds, ``(n, dim)``, all of them gathered."""
        return self.local.rows(np.arange(self.local.view.vectors.items))

    @cached_property
    def biases(self) -> FloatArray:
        """Their biases, ``(n,)``; zeros where the model has none."""
        return self.local.biases(np.arange(self.local.view.vectors.items))

    # ------------------------------------------------------------------ histories

    @cached_property
    def split(self) -> Split:
        """The data that the run learned from, read when it is first asked for."""
        if self.given is not None:
            task = Recommending(self.scenario, self.given)
        else:
            task = Recommending.load(self.scenario, self.data_dir)
        task.restore_numbers(self.path, self.key)
        return task.split

    def users(self, names: Iterable[int | str] | None = None) -> Items:
        """Return the positions of users of the data by their ids, or of all of them.

        An UnknownIdError names one that is none.
        """
        ids = self.split.train.user_ids
        if names is None:
            return np.arange(len(ids))
        wanted = [str(name) for name in names]
        if not wanted:
            raise UsageError("no user is named; name at least one, or none at all for everybody")
        for name in wanted:
            if name not in self._places:
                position_of(name, ids, "user")
        return np.array([self._places[name] for name in wanted], np.int64)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {str(name): row for row, name in enumerate(self.split.train.user_ids.tolist())}

    def histories(self, users: Items) -> Histories:
        """Return what users of the data, by their positions, have to learn from."""
        return _together(*self.split.train.rows_of(users), len(users))

    def owned(self, users: Items) -> Histories:
        """Return all that users of the data have, by their positions: what was held out as well."""
        parts = (each.rows_of(users) for each in (self.split.train, self.split.heldout))
        rows, items = (np.concatenate(each) for each in zip(*parts, strict=True))
        return _together(rows, items, len(users))

    def history(self, items: Iterable[int | str] | Path) -> Histories:
        """Return the history of one who likes some items, by their ids or a file of them.

        The last are taken for the latest. It needs no data. An UnknownIdError names an item that is
        none.
        """
        if isinstance(items, str):
            raise UsageError(
                f"a history of {items!r}: it is several ids, as in [{items!r}], or a pathlib.Path "
                "of a file of them"
            )
        if isinstance(items, Path):
            items = read_history(items, self.catalogue.rows)
        latest_first = dict.fromkeys(self.catalogue.positions(items)[::-1].tolist())
        if not latest_first:
            raise UsageError("the history is empty: it must name at least one item id, one a line")
        liked = np.array(list(latest_first)[::-1], np.int32)
        return _together(np.zeros(len(liked), np.int64), liked, 1)

    # ------------------------------------------------------------------ answers

    def fit(self, histories: Histories) -> FloatArray:
        """Fit private states to histories from nothing, ``(m, user_dim)``, as their devices would.

        A state depends on the history alone, not on whose it is or who else is asked; on its order
        only with ``train.serve_recency``. It is a user's vector, followed by the user's bias.
        """
        if not self.scenario.train.serve_recency:  # a fit draws its negatives by place
            rows = np.repeat(np.arange(len(histories.users)), histories.lengths)
            order = np.lexsort((histories.items, rows))
            histories = replace(histories, items=histories.items[order])
        key = int(rng_for(self.scenario.run.seed, "serving").integers(2**63))
        draws, learner = Draws(key, lambda _: _own_stream()), self._learner
        return learner.serve(self.local.weights, learner.held(histories), draws)

    def scores(self, states: FloatArray, items: Items | None = None) -> FloatArray:
        """Return the model's scores of items ``(k,)``, or all, for states: ``(m, k)``."""
        everybody = np.arange(len(states))
        scored = scores_with(self.local, everybody, states, self.catalogue.size)
        wanted = None if items is None else np.broadcast_to(items, (len(states), len(items)))
        return np.asarray(scored(everybody, wanted), np.float32)

    def lists(
        self,
        histories: Histories,
        k: int,
        *,
        filter_seen: bool = True,
        selector: str = "scan",
    ) -> Iterator[Lists]:
        """Yield the best items for each history and their scores, ``(m, k)`` each, in parts.

        With ``filter_seen`` the histories themselves are left out.

        A list that is shorter than ``k`` ends in :data:`NONE`; see :func:`recommend` for the rest.
        """
        check(k, selector)
        states, k = self.fit(histories), min(k, self.catalogue.size)
        exhaustive = self.local.view.network.tower or self.local.view.features is not None
        if not exhaustive and (selector != "scan" or len(states) == 1):
            for row, state in enumerate(states):
                seen = histories.of(row).astype(np.int64) if filter_seen else np.empty(0, np.int64)
                most = min(k, self.catalogue.size - len(seen))
                items, scores = np.full((1, k), NONE), np.full((1, k), -np.inf, np.float32)
                if most:
                    found, values = answer(self.local, state, most, seen, selector)
                    items[0, : len(found)], scores[0, : len(found)] = found, values
                yield items, scores
            return
        step = max(1, min(_USERS, _SCORES // self.catalogue.size))
        for start in range(0, len(states), step):
            part = np.arange(start, min(start + step, len(states)))
            table = self.scores(states[part])
            if filter_seen:
                own = histories.select(part)
                table[np.repeat(np.arange(len(part)), own.lengths), own.items] = -np.inf
            table[np.isnan(table)] = -np.inf
            scored, items = (each.numpy() for each in torch.topk(torch.from_numpy(table), k))
            items[np.isneginf(scored)] = NONE
            yield items, scored

    def named(self, lists: Iterable[Lists]) -> Iterator[list[Recommendation]]:
        """Yield lists by the ids and titles of their items."""
        ids, titles = self.catalogue.ids, self.catalogue.titles
        for items, scores in lists:
            for own, values in zip(items.tolist(), scores.tolist(), strict=True):
                yield [
                    Recommendation(rank, str(ids[item]), titles[item] if titles else None, score)
                    for rank, (item, score) in enumerate(zip(own, values, strict=True), 1)
                    if item != NONE
                ]

    def similar(self, name: int | str, k: int) -> Lists:
        """Return the ``k`` items nearest to one by the cosine of their vectors, and the cosines.

        Both are of the shape ``(1, k)``, as in :meth:`lists`.
        """
        check(k)
        (item,) = self.catalogue.positions([name]).tolist()
        if item >= len(self.vectors):
            raise UsageError(
                f"item {name}: no device holds a vector of it, since the "
                "model is of the most popular items alone; ask for one of those"
            )
        lengths = np.linalg.norm(self.vectors, axis=1)
        cosines = self.vectors @ self.vectors[item] / np.maximum(lengths * lengths[item], 1e-30)
        cosines[item] = -np.inf
        found = np.argsort(-cosines, kind="stable")[: min(k, len(cosines) - 1)]
        return found[None], cosines[found][None]


def _together(rows: NDArray[np.integer], items: NDArray[np.int32], m: int) -> Histories:
    """Histories by row, each in the order of its items here.

    All have the number 0, by which a device draws: a list is for a history, whosever it is.
    """
    bounds = np.append(0, np.cumsum(np.bincount(rows, minlength=m)))
    return Histories(np.zeros(m, np.int64), bounds, items[np.argsort(rows, kind="stable")])


def _own_stream() -> SecureStream:
    """For hash functions that nobody else draws, and that are forgotten with the answer."""
    return SecretRoot(secrets.token_bytes(ROOT_BYTES)).stream("lsh", "serving")


def answer(
    model: LocalModel[NCF], state: FloatArray, k: int, exclude: Items, selector: str = "scan"
) -> tuple[Items, FloatArray]:
    """Return the ``k`` best items of a model without a network, from its memory, and their scores.

    The private ``state`` has shape ``(user_dim,)``. They are fewer than ``k`` where a selector of
    tables found fewer.
    """
    items, search = model.items, model.search(selector)
    query = np.append(state[:-1], np.float32(1))[: items.dim]
    if selector == "scan":
        found, scores = best(search, query, k, exclude)
    else:
        budget = min(items.items, max(CANDIDATES * k, items.items // 100))
        near = select(selector, search, query[None], budget, _own_stream(), exclude=exclude)
        found, scores = ranked(items, query, near, k)
    return found, scores + state[-1]
