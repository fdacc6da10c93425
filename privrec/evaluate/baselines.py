"""Recommenders to compare with, trained where all histories lie in one place.

They have no privacy and no devices; a federated model is judged by how near it comes to them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse
from scipy.sparse.linalg import svds

from privrec.data import Interactions
from privrec.errors import UsageError
from privrec.evaluate.metrics import Scores, popularity_scores
from privrec.randomness import rng_for

EASE_USERS = 12_000
"""Most users that EASE is solved for; it needs a matrix of their square."""

EASE_L2 = 300.0
"""Ridge penalty of EASE, in the middle of what its paper reports for catalogues of many sizes."""

FloatArray = NDArray[np.float32]


def check(name: str, train: Interactions, *, dim: int) -> None:
    """Refuse a baseline that cannot be had for this many users, items or dimensions.

    Raises:
        UsageError: ``pure_svd`` when ``dim`` is not below the smaller side of the matrix, ``ease``
            when there are more than :data:`EASE_USERS` users.
    """
    if name == "pure_svd" and dim >= min(train.n_users, train.n_items):
        raise UsageError(
            f"pure_svd of {dim} factors: {train.n_users} users and {train.n_items} items have no "
            "more; lower model.dim or leave it out of run.baselines"
        )
    if name == "ease" and train.n_users > EASE_USERS:
        raise UsageError(
            f"ease with {train.n_users} users: it is solved for at most {EASE_USERS}; "
            "leave it out of run.baselines"
        )


def scores_of(name: str, train: Interactions, *, dim: int, seed: int) -> Scores:
    """A baseline trained on some interactions.

    Args:
        name: ``"popularity"``, ``"pure_svd"`` or ``"ease"``.
        train: all histories.
        dim: factors of the SVD.
        seed: of the SVD's start.

    Raises:
        UsageError: as :func:`check`.
    """
    return _MAKERS[name](train, dim, seed)


def pure_svd(train: Interactions, dim: int, seed: int) -> Scores:
    """Truncated SVD of the 0/1 matrix (Cremonesi, Koren & Turrin, RecSys 2010)."""
    check("pure_svd", train, dim=dim)
    start = rng_for(seed, "baselines", "pure_svd").normal(size=min(train.n_users, train.n_items))
    left, values, right = svds(_matrix(train), k=dim, v0=start)
    return partial(_products, left * values, right)


def ease(train: Interactions) -> Scores:
    """EASE, the closed-form linear autoencoder (Steck, WWW 2019), by way of the users.

    With ``K = (X Xᵀ + λI)^-1``, ``X (XᵀX + λI)^-1 = K X``; so a catalogue of any size will do where
    users are few.
    """
    check("ease", train, dim=0)
    matrix = _matrix(train)
    kernel = (matrix @ matrix.T).toarray() + EASE_L2 * np.eye(train.n_users)
    inverse = linalg.inv(kernel, overwrite_a=True, check_finite=False)
    diagonal = (1 - matrix.multiply(inverse @ matrix).sum(axis=0)) / EASE_L2
    return partial(_linear, matrix, inverse, np.asarray(diagonal).ravel())


def _products(
    users_by_factor: NDArray[np.float64],
    factors: NDArray[np.float64],
    users: NDArray[np.integer],
    candidates: NDArray[np.integer] | None,
) -> FloatArray:
    return _chosen(users_by_factor[users] @ factors, candidates)


def _linear(
    matrix: sparse.csr_array,
    inverse: NDArray[np.float64],
    diagonal: NDArray[np.float64],
    users: NDArray[np.integer],
    candidates: NDArray[np.integer] | None,
) -> FloatArray:
    own = matrix[users].toarray()
    return _chosen(own - (inverse[users] @ matrix) / diagonal, candidates)


def _chosen(table: NDArray[np.float64], candidates: NDArray[np.integer] | None) -> FloatArray:
    chosen = table if candidates is None else np.take_along_axis(table, candidates, axis=1)
    return chosen.astype(np.float32)


def _matrix(train: Interactions) -> sparse.csr_array:
    ones = np.ones(train.size)
    return sparse.csr_array((ones, train.items, train.indptr), shape=(train.n_users, train.n_items))


_MAKERS: dict[str, Callable[[Interactions, int, int], Scores]] = {
    "popularity": lambda train, _dim, _seed: popularity_scores(train),
    "pure_svd": pure_svd,
    "ease": lambda train, _dim, _seed: ease(train),
}
