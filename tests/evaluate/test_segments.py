"""Metrics by kind of user."""

from __future__ import annotations

import numpy as np
import pytest

from privrec import data
from privrec.data import Split
from privrec.evaluate.metrics import FEWEST, Evaluation, by_segment
from privrec.scenario.load import Scenario


@pytest.fixture(scope="module")
def split() -> Split:
    text = '[data]\nsource = "synthetic"\nusers = 300\nitems = 80\n[privacy]\nnoise = "none"\n'
    return data.load(Scenario.from_toml(f'name = "x"\n{text}').data)


def evaluated(split: Split, users: np.ndarray) -> Evaluation:
    lengths = np.diff(split.train.indptr)[users]
    return Evaluation(users, {"hr@10": lengths.astype(np.float64)})


def test_activity_is_cut_in_thirds_that_cover_everybody(split: Split) -> None:
    users = np.flatnonzero(np.diff(split.heldout.indptr))
    found = [
        each for each in by_segment(evaluated(split, users), split) if each["by"] == "activity"
    ]
    lengths = np.diff(split.train.indptr)[users]
    light, medium, heavy = (each["metrics"]["hr@10"] for each in found)
    assert light < medium < heavy
    assert sum(each["share"] for each in found) == pytest.approx(1, abs=0.02)
    mean = sum(each["share"] * each["metrics"]["hr@10"] for each in found)
    assert mean == pytest.approx(lengths.mean(), rel=0.02)


def test_popular_items_are_few_and_have_most_interactions(split: Split) -> None:
    users = np.flatnonzero(np.diff(split.heldout.indptr))
    counts = split.train.item_counts()
    first = split.heldout.items[split.heldout.indptr[users]]
    measured = Evaluation(users, {"count": counts[first].astype(np.float64)})
    popular, rare = (each for each in by_segment(measured, split) if each["by"] != "activity")
    assert popular["metrics"]["count"] > rare["metrics"]["count"]
    assert popular["share"] + rare["share"] == pytest.approx(1, abs=0.011)


def test_segments_of_a_few_users_are_left_out(split: Split) -> None:
    users = np.flatnonzero(np.diff(split.heldout.indptr))[: FEWEST - 1]
    assert by_segment(evaluated(split, users), split) == []
