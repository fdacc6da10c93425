"""Recommendations of a finished run, for a user of the data or for a history never seen."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from privrec.data.files import read_history
from privrec.device.device import Draws
from privrec.device.local import LocalModel
from privrec.device.recommender import RecommenderLearner
from privrec.device.samples import Histories
from privrec.errors import UsageError
from privrec.evaluate.evaluator import scores_with
from privrec.models.ncf import NCF
from privrec.privacy.ledger import PREPARATION, Ledger
from privrec.randomness import ROOT_BYTES, SecretRoot, SecureStream, rng_for
from privrec.run import directory
from privrec.run.directory import Identity, kept_key
from privrec.run.parties import learner_of
from privrec.run.plan import federation_of
from privrec.run.summary import read_model
from privrec.run.task import Recommending
from privrec.scenario.kinds import SELECTORS, Searching
from privrec.scenario.load import load
from privrec.search.select import best, ranked, select

FloatArray = NDArray[np.float32]
Items = NDArray[np.int64]
CANDIDATES = 50
"""Candidates that are ranked exactly for each recommendation, where they are selected."""


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
    run_dir: Path,
    *,
    user: str | None = None,
    history: Sequence[str] | Path | None = None,
    k: int = 10,
    data_dir: Path | None = None,
    selector: str = "scan",
) -> list[Recommendation]:
    """Return the ``k`` best items for a user of the data or for a history, which are left out.

    The user's vector is fitted to the history from nothing, on this machine, as a device would: a
    history never seen in training is served just like one that was.

    Args:
        history: ids of liked items, or a file of them (:func:`privrec.data.files.read_history`).
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
    if k < 1:
        raise UsageError(f"k = {k}: must be at least 1; ask for one recommendation or more")
    searching = [name for name, kind in SELECTORS.items() if issubclass(kind.config, Searching)]
    if selector not in searching:
        raise UsageError(
            f'--selector "{selector}": is none of {", ".join(searching)}; choose one of them'
        )
    task, model_digest = _opened(run_dir, data_dir)
    train = task.split.train
    if user is not None:
        liked = train.history(train.user_index(user))
    else:
        if isinstance(history, Path):
            history = read_history(history, {str(item) for item in train.item_ids.tolist()})
        if not history:
            raise UsageError("the history is empty: it must name at least one item id, one a line")
        liked = np.array([train.item_index(item) for item in history], np.int32)
    items = np.unique(liked)  # in one order, since the fit draws its negatives by place
    federation = federation_of(task.scenario, train.n_items)
    weights = read_model(run_dir, federation, model_digest)
    tier = federation.tiers[0]
    made = learner_of(task.scenario, federation, tier, None, features=train.features)
    learner = cast(RecommenderLearner, made)
    view = tier.view(weights)
    key = int(rng_for(task.scenario.run.seed, "serving").integers(2**63))
    draws = Draws(key, lambda _: _own_stream())
    states = learner.serve(view, learner.held(Histories.alone(0, items)), draws)
    model, k = LocalModel(learner.serving.view, view), min(k, train.n_items - len(items))
    if k < 1:
        return []
    if learner.view.network.tower or model.view.features is not None:
        alone = np.array([0])
        every = scores_with(model, alone, states, train.n_items)(alone, None)[0]
        every[items] = -np.inf
        found = np.argsort(-every, kind="stable")[:k]
        scores = every[found]
    else:
        found, scores = answer(model, states[0], k, items.astype(np.int64), selector)
    titles = train.titles
    return [
        Recommendation(rank, str(train.item_ids[item]), titles[item] if titles else None, score)
        for rank, (item, score) in enumerate(zip(found, scores.tolist(), strict=True), 1)
    ]


def _opened(run_dir: Path, data_dir: Path | None) -> tuple[Recommending, bytes | None]:
    """The task with its data, and the digest of the model that the signed ledger ends with."""
    identity, scenario = Identity.read(run_dir), load(run_dir / directory.SCENARIO)
    key = kept_key(identity.run_id)
    with Ledger.open(run_dir / directory.LEDGER, public_key=key, repair=False) as ledger:
        directory.check_header(run_dir, ledger.header, scenario, identity.bound)
    # An end that is not signed is not the run's.
    model = ledger.ended if ledger.signed == ledger.entries else None
    rounds = ((each.round, each.attempt) for each in ledger.charges if each.round > PREPARATION)
    if model is not None and not any(ledger.committed(*place) for place in rounds):
        raise UsageError(
            f"{run_dir}: this run ended before one round released a sum, so it has no trained "
            "model; start another"
        )
    task = Recommending.load(scenario, data_dir or identity.data_dir)
    task.restore_numbers(run_dir, ledger.public_key)
    return task, model


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
