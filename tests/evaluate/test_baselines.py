"""Centralised recommenders to compare with: each is its closed form."""

from __future__ import annotations

import numpy as np
import pytest

from privrec.data import Interactions
from privrec.errors import UsageError
from privrec.evaluate import metrics
from privrec.evaluate.metrics import popularity_scores

USERS, ITEMS = 30, 50


@pytest.fixture(scope="module")
def train() -> Interactions:
    rng = np.random.default_rng(5)
    likes = rng.random((USERS, ITEMS)) < np.linspace(0.5, 0.05, ITEMS)
    likes[:, 0] |= ~likes.any(1)
    users, items = np.nonzero(likes)
    return Interactions.from_pairs(users, items, item_ids=np.arange(ITEMS))


def dense(train: Interactions) -> np.ndarray:
    matrix = np.zeros((USERS, ITEMS))
    matrix[train.users, train.items] = 1
    return matrix


def test_ease_is_the_ridge_regression_of_each_item_on_the_others(train: Interactions) -> None:
    matrix = dense(train)
    inverse = np.linalg.inv(matrix.T @ matrix + metrics.EASE_L2 * np.eye(ITEMS))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    found = metrics.ease(train)(np.arange(USERS), None)
    assert np.allclose(found, matrix @ weights, atol=1e-6)
    # By its definition: no item helps to predict itself.
    one = 7
    others = np.delete(matrix, one, axis=1)
    ridge = others.T @ others + metrics.EASE_L2 * np.eye(ITEMS - 1)
    by_hand = others @ np.linalg.solve(ridge, others.T @ matrix[:, one])
    assert np.allclose(found[:, one], by_hand, atol=1e-6)


def test_pure_svd_is_the_best_approximation_of_its_rank(train: Interactions) -> None:
    left, values, right = np.linalg.svd(dense(train), full_matrices=False)
    best = (left[:, :4] * values[:4]) @ right[:4]
    found = metrics.pure_svd(train, 4, 0)(np.arange(USERS), None)
    assert np.allclose(found, best, atol=1e-5)


@pytest.mark.parametrize("name", ["popularity", "pure_svd", "ease"])
def test_candidates_are_scored_as_in_the_whole_catalogue(name: str, train: Interactions) -> None:
    scores = metrics.scores_of(name, train, dim=4, seed=0)
    users = np.array([3, 0, 29])
    candidates = np.array([[1, 2], [49, 0], [7, 7]])
    whole = np.asarray(scores(users, None))
    assert np.allclose(scores(users, candidates), np.take_along_axis(whole, candidates, axis=1))


def test_popularity_is_that_of_the_metrics(train: Interactions) -> None:
    users = np.arange(3)
    ours = metrics.scores_of("popularity", train, dim=4, seed=0)
    assert np.array_equal(ours(users, None), popularity_scores(train)(users, None))


def test_what_cannot_be_had_is_refused(
    train: Interactions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="30 factors"):
        metrics.scores_of("pure_svd", train, dim=30, seed=0)
    monkeypatch.setattr(metrics, "EASE_USERS", 29)
    with pytest.raises(UsageError, match="30 users"):
        metrics.scores_of("ease", train, dim=4, seed=0)
