"""Recommendations of a finished run, for a user of the data or for a history never seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec import catalogue, data
from privrec.assembly import trainer_of
from privrec.data import Interactions
from privrec.device.batch import Histories
from privrec.device.cohort import Cohort
from privrec.errors import UsageError
from privrec.identity import remembered_data_dir
from privrec.outcome import read_model
from privrec.randomness import rng_for
from privrec.scenario import Scenario, load
from privrec.scoring import Scorer


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
    history: Sequence[str] | None = None,
    k: int = 10,
    data_dir: Path | None = None,
) -> list[Recommendation]:
    """The ``k`` best items for a user, those of the history left out.

    The user's vector is fitted to the history from nothing, on this machine, as a device would: a
    history never seen in training is served just like one that was.

    Args:
        run_dir: a finished run.
        user: a user's id in the data set; or
        history: ids of liked items.
        k: how many, at least 1.
        data_dir: where the data lies, before the place that the run remembers.

    Raises:
        UnknownIdError: when the data set has no such user or item.
        UsageError: when neither or both of ``user`` and ``history`` are given, or ``k`` is below 1.
    """
    if (user is None) == (history is None):
        raise UsageError("recommend: give one of --user ID and --history FILE")
    if k < 1:
        raise UsageError(f"k = {k}: must be at least 1; ask for one recommendation or more")
    scenario, train = _data_of(run_dir, data_dir)
    if user is not None:
        liked = train.history(train.user_index(user))
    else:
        liked = _known_items(train, history or ())
    items = np.unique(liked)  # in one order, since the fit draws its negatives by place
    scores = _scores(run_dir, scenario, train, items)
    scores[items] = -np.inf
    best = np.argsort(-scores, kind="stable")[: min(k, train.n_items - len(items))]
    return [
        Recommendation(rank, str(train.item_ids[i]), _title(train, int(i)), float(scores[i]))
        for rank, i in enumerate(best, 1)
    ]


def _data_of(run_dir: Path, data_dir: Path | None) -> tuple[Scenario, Interactions]:
    data_dir = data_dir or remembered_data_dir(run_dir)
    scenario = load(run_dir / "scenario.toml")
    split = data.load(scenario.data, data_dir=data_dir)
    return scenario, catalogue.restored(run_dir, split).train


def _known_items(train: Interactions, ids: Sequence[str]) -> NDArray[np.int32]:
    if not ids:
        raise UsageError("the history is empty: it must name at least one item id, one a line")
    return np.array([train.item_index(item) for item in ids], np.int32)


def _scores(
    run_dir: Path, scenario: Scenario, train: Interactions, items: NDArray[np.int32]
) -> NDArray[np.float32]:
    federation, weights = read_model(run_dir, scenario, train)
    tier = federation.tiers[0]
    one = Histories(np.array([0]), np.array([0, len(items)]), items.astype(np.int32))
    cohort, view = Cohort.of(trainer_of(scenario, federation, tier), one), tier.view(weights)
    states = cohort.serve(view, int(rng_for(scenario.run.seed, "serving").integers(2**63)))
    scorer = Scorer(tier.recommender, view, states, train.n_items)
    scores: NDArray[np.float32] = scorer(np.array([0]), None)[0]
    return scores


def _title(train: Interactions, item: int) -> str | None:
    return None if train.titles is None else train.titles[item]
