"""Recommendations of a finished run, for a user of the data or for a history never seen."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec import data
from privrec.data import Interactions
from privrec.data.listed import read_history
from privrec.device.batch import Histories
from privrec.device.cohort import Cohort
from privrec.device.tier import Federation
from privrec.device.train import Recommender
from privrec.errors import UsageError
from privrec.evaluate.evaluator import Scorer
from privrec.privacy.ledger import Ledger
from privrec.randomness import ROOT_BYTES, SecretRoot, SecureStream, rng_for
from privrec.run import directory, popularity
from privrec.run.assembly import trainer_of
from privrec.run.identity import Identity, kept_key
from privrec.run.summary import read_model
from privrec.scenario.load import Scenario, load
from privrec.search.index import Sketch
from privrec.search.select import Search, Selector, best, ranked, select

FloatArray = NDArray[np.float32]
Items = NDArray[np.int64]
CANDIDATES = 50
"""Candidates that are ranked exactly for each recommendation, where they are selected."""


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Args:
        rank: 1 for the best.
        item_id: the data set's own id.
        title: its title where the data has titles.
        score: the model's score; larger is better, comparable within one list only.
    """

    rank: int
    item_id: str
    title: str | None
    score: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def recommend(
    run_dir: Path,
    *,
    user: str | None = None,
    history: Sequence[str] | Path | None = None,
    k: int = 10,
    data_dir: Path | None = None,
    selector: Selector = "scan",
) -> list[Recommendation]:
    """The ``k`` best items for a user, those of the history left out.

    The user's vector is fitted to the history from nothing, on this machine, as a device would: a
    history never seen in training is served just like one that was.

    Args:
        run_dir: a finished run.
        user: a user's id in the data set; or
        history: ids of liked items, or a file that lists them, see
            :func:`privrec.data.listed.read_history`.
        k: how many, at least 1.
        data_dir: where the data lies, before the place that the run remembers.
        selector: how the best are found in the memory (:mod:`privrec.search.select`): ``scan`` is
            exact; others find candidates, which are then ranked exactly. A model with a network
            has no nearest items, and scores all of them.

    Raises:
        UnknownIdError: when the data set has no such user or item.
        UsageError: when neither or both of ``user`` and ``history`` are given, or ``k`` is below 1.
    """
    if (user is None) == (history is None):
        raise UsageError("recommend: give one of --user ID and --history FILE")
    if k < 1:
        raise UsageError(f"k = {k}: must be at least 1; ask for one recommendation or more")
    scenario, train, model = _data_of(run_dir, data_dir)
    if user is not None:
        liked = train.history(train.user_index(user))
    else:
        if isinstance(history, Path):
            history = read_history(history, {str(item) for item in train.item_ids.tolist()})
        liked = _known_items(train, history or ())
    items = np.unique(liked)  # in one order, since the fit draws its negatives by place
    k = min(k, train.n_items - len(items))
    federation, weights = read_model(run_dir, scenario, train, model)
    found, scores = _best(federation, weights, scenario, train, items, k, selector)
    return [
        Recommendation(rank, str(train.item_ids[i]), _title(train, int(i)), float(score))
        for rank, (i, score) in enumerate(zip(found, scores, strict=True), 1)
    ]


def answer(
    recommender: Recommender,
    weights: FloatArray,
    state: FloatArray,
    k: int,
    exclude: Items,
    selector: Selector = "scan",
) -> tuple[Items, FloatArray]:
    """The ``k`` best items of a model without a network, from its memory; no table is made.

    Args:
        recommender: the meaning of the weights.
        weights: its vector, in memory form.
        state: a private state, shape ``(user_dim,)``.
        k: how many, at least 1.
        exclude: items to leave out.
        selector: see :func:`recommend`.

    Returns:
        Items, the best first, and their scores; fewer than ``k`` where a selector of tables found
        fewer.
    """
    items = recommender.searched(weights)
    search, query = Search(items), np.append(state[:-1], np.float32(1))[: items.dim]
    if selector == "sketch":
        search = replace(search, sketch=Sketch.of(items))
    if selector == "scan":
        found, scores = best(search, query, k, exclude)
        return found, scores + state[-1]
    budget = min(items.items, max(CANDIDATES * k, items.items // 100))
    near = select(selector, search, query[None], budget, _own_stream(), exclude=exclude).items
    found, scores = ranked(items, query, near, k)
    return found, scores + state[-1]


def _data_of(run_dir: Path, data_dir: Path | None) -> tuple[Scenario, Interactions, bytes | None]:
    """The scenario, the data and the model's digest, as far as the run's ledger declares them."""
    identity, scenario = Identity.read(run_dir), load(run_dir / "scenario.toml")
    key = kept_key(identity.run_id)
    with Ledger.open(run_dir / "ledger.jsonl", public_key=key, repair=False) as ledger:
        directory.check_header(run_dir, ledger, scenario, identity)
    # An end that is not signed is not the run's.
    model = ledger.ended if ledger.signed == ledger.entries else None
    split = data.load(scenario.data, data_dir=data_dir or identity.data_dir)
    return scenario, popularity.restored(run_dir, split, ledger.public_key).train, model


def _known_items(train: Interactions, ids: Sequence[str]) -> NDArray[np.int32]:
    if not ids:
        raise UsageError("the history is empty: it must name at least one item id, one a line")
    return np.array([train.item_index(item) for item in ids], np.int32)


def _own_stream() -> SecureStream:
    """For hash functions that nobody else draws, and that are forgotten with the answer."""
    return SecretRoot(secrets.token_bytes(ROOT_BYTES)).stream("lsh", "serving")


def _best(
    federation: Federation, weights: FloatArray, scenario: Scenario, train: Interactions,
    items: NDArray[np.int32], k: int, selector: Selector,
) -> tuple[Items, FloatArray]:  # fmt: skip
    """The best items and their scores, by a state fitted to the history."""
    tier = federation.tiers[0]
    one = Histories(np.array([0]), np.array([0, len(items)]), items.astype(np.int32))
    cohort, view = Cohort.of(trainer_of(scenario, federation, tier), one), tier.view(weights)
    key = int(rng_for(scenario.run.seed, "serving").integers(2**63))
    states = cohort.serve(view, key, lambda _: _own_stream())
    if k < 1:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    recommender = cohort.trainer.recommender
    if not recommender.model.tower:
        return answer(recommender, view, states[0], k, items.astype(np.int64), selector)
    scores = Scorer(recommender, view, states, train.n_items)(np.array([0]), None)[0]
    scores[items] = -np.inf
    order = np.argsort(-scores, kind="stable")[:k]
    return order, scores[order]


def _title(train: Interactions, item: int) -> str | None:
    return None if train.titles is None else train.titles[item]
