"""Implicit ALS without sampled negatives, by way of two small Gram matrices.

The loss of a user ``u`` is ``½ Σ_history (u·v_i - 1)² + ½ α Σ_all (u·v_i)²``, and item vectors have
a penalty ``½ ρ |v_i|²``. Both sums over all items are short. The user's share needs only
``G = Σ_i v_i v_iᵀ``. In the mean over users, the item gradient is ``v_i (α S + ρ I)`` less what
the histories say, with ``S`` the mean of ``u uᵀ``. So devices send their histories' gradient and
``u uᵀ``, the server works out the rest for every item, touched or not, and no negative is ever
sampled or sent.

Since the mean of ``u uᵀ`` is public once it is released, devices may multiply their gradient by
``P = (α S + ρ I)^-1``: a Newton step in all but each item's own history, which converges where that
part is small (large ``α``), and may not elsewhere. What is left for the server is then ``v_i``.
Source: Hu, Koren & Volinsky, "Collaborative Filtering for Implicit Feedback Datasets" (ICDM 2008);
Rendle et al., "iALS++" (2021), for the form of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.embedding.table import Table

Array = NDArray[Any]
_ITEMS_AT_ONCE = 8192


def packed_size(dim: int) -> int:
    """Coefficients of a packed symmetric ``dim × dim`` matrix."""
    return dim * (dim + 1) // 2


def pack(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """``u uᵀ`` of each row ``u``, packed row by row below the diagonal.

    Promise: the packed row has the matrix's Frobenius norm, ``|u|²``; and packing the first
    coordinates of ``u`` gives a prefix, so that vectors of several lengths share one section.

    Args:
        vectors: shape ``(m, dim)``.

    Returns:
        float32 of shape ``(m, packed_size(dim))``.
    """
    rows, columns, factors = _places(vectors.shape[1])
    packed = vectors[:, rows] * vectors[:, columns]
    packed *= factors
    return packed


def unpack(packed: Array, dim: int) -> Array:
    """The symmetric matrix, shape ``(dim, dim)``, of a packed one that is at least as large."""
    rows, columns, factors = _places(dim)
    matrix = np.empty((dim, dim), packed.dtype)
    matrix[rows, columns] = packed[: len(rows)] / factors
    matrix[columns, rows] = matrix[rows, columns]
    return matrix


def item_gram(table: Table, memory: NDArray[np.float32]) -> NDArray[np.float32]:
    """``Σ_i v_i v_iᵀ`` over all items of a table, shape ``(dim, dim)``, in parts."""
    gram = np.zeros((table.dim, table.dim))
    for items in _parts(table):
        rows = table.gather(memory, items)
        gram += rows.T @ rows
    return gram.astype(np.float32)


def curvature(
    users: NDArray[np.float32], dim: int, unobserved_weight: float, item_l2: float
) -> NDArray[np.float32]:
    """``α S + ρ I``, shape ``(dim, dim)``: what the loss over all items multiplies each item by.

    Args:
        users: ``S``, packed; what noise made of it is taken as if it were a Gram matrix.
        dim: of the vectors, at most those in ``S``.
        unobserved_weight: ``α``.
        item_l2: ``ρ``, above 0.
    """
    values, vectors = np.linalg.eigh(unpack(users, dim).astype(np.float64))
    weighted = vectors * (unobserved_weight * values.clip(min=0) + item_l2)
    matrix: NDArray[np.float32] = (weighted @ vectors.T).astype(np.float32)
    return matrix


def pressure(
    table: Table, memory: NDArray[np.float32], matrix: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """``v_i M`` for every item, added up in the memory's blocks, in parts.

    Args:
        table: a table.
        memory: its memory, shape ``(slots, block)``.
        matrix: ``M``, shape ``(dim, dim)``; None for the identity.

    Returns:
        float32 of the memory's shape.
    """
    if matrix is None:
        return memory * table.load[:, None]
    pushed = np.zeros_like(memory)
    for items in _parts(table):
        table.scatter_add(pushed, items, table.gather(memory, items) @ matrix)
    return pushed


def _parts(table: Table) -> Iterator[NDArray[np.int64]]:
    for start in range(0, table.items, _ITEMS_AT_ONCE):
        yield np.arange(start, min(table.items, start + _ITEMS_AT_ONCE))


@cache
def _places(dim: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    rows, columns = np.tril_indices(dim)
    # Each entry off the diagonal stands for two equal ones.
    factors = np.where(rows == columns, 1, np.sqrt(2)).astype(np.float32)
    return rows, columns, factors
