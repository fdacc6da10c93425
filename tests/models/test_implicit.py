"""Two small Gram matrices stand for sums over all items and over all users."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable, Table
from privrec.models.layout import packed_size
from privrec.models.losses import curvature, item_gram, pack, pressure, unpack

TABLES = {
    "plain": PlainTable.of(50, 6, block=2),
    "by part": PlainTable.of(50, 6, block=2, by_part=True),
    "bijection": Subspace.sized(50, 6, block=2, key=4),
    "collisions": Subspace.sized(50, 6, block=2, key=4, compression=8.0),
    "folded": Subspace.sized(50, 6, block=2, key=4).folded(3),
    "parts": PlainTable.of(20_000, 2, block=2),
}


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**32))
def test_packing_keeps_the_matrix_and_its_norm(m: int, dim: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(m, dim)).astype(np.float32)
    packed = pack(vectors)
    assert packed.shape == (m, packed_size(dim))
    assert packed.dtype == np.float32
    for row, vector in zip(packed, vectors, strict=True):
        outer = np.outer(vector, vector)
        assert np.allclose(unpack(row, dim), outer, atol=1e-5 * np.abs(outer).max())
        assert np.linalg.norm(row) == pytest.approx(float(vector @ vector), rel=1e-5)


@given(st.integers(1, 9), st.integers(0, 2**32), st.data())
def test_shorter_vectors_pack_to_prefixes(dim: int, seed: int, data: st.DataObject) -> None:
    vectors = np.random.default_rng(seed).normal(size=(2, dim)).astype(np.float32)
    fewer = data.draw(st.integers(1, dim))
    packed, short = pack(vectors), pack(vectors[:, :fewer])
    assert np.array_equal(packed[:, : packed_size(fewer)], short)
    whole, part = unpack(packed[0], dim), unpack(packed[0], fewer)
    assert np.array_equal(whole[:fewer, :fewer], part)


def test_packed_sums_are_the_sums_of_matrices() -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    assert np.allclose(unpack(pack(vectors).sum(0), 5), vectors.T @ vectors, atol=1e-4)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_items_gram_matrix_is_over_every_item(table: Table) -> None:
    memory = np.random.default_rng(1).normal(size=(table.slots, table.block)).astype(np.float32)
    rows = table.gather(memory.astype(np.float64), np.arange(table.items))
    found = item_gram(table, memory)
    assert found.dtype == np.float32
    assert np.allclose(found, rows.T @ rows, rtol=1e-4, atol=1e-3)
    assert np.allclose(item_gram(table.tabulated(), memory), found, rtol=1e-6)


@given(st.integers(1, 8), st.floats(0.01, 10), st.floats(1e-3, 10), st.integers(0, 2**32))
def test_the_curvature_is_that_of_the_loss_over_all_items(
    dim: int, unobserved: float, item_l2: float, seed: int
) -> None:
    vectors = np.random.default_rng(seed).normal(size=(3 * dim, dim)).astype(np.float32)
    packed = pack(vectors).mean(0)
    found = curvature(packed, dim, unobserved, item_l2)
    assert found.dtype == np.float32
    expected = unobserved * unpack(packed.astype(np.float64), dim) + item_l2 * np.eye(dim)
    assert np.allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_noise_that_makes_no_gram_matrix_does_no_harm() -> None:
    """Eigenvalues below zero count as none, so that no step goes up the loss or blows up."""
    noise = np.random.default_rng(2).normal(0, 5, packed_size(6)).astype(np.float32)
    values = np.linalg.eigvalsh(curvature(noise, 6, 0.5, 0.1).astype(np.float64))
    raw = np.linalg.eigvalsh(unpack(noise, 6).astype(np.float64))
    assert raw.min() < -1
    assert np.allclose(values, 0.5 * raw.clip(min=0) + 0.1, atol=1e-4)


def test_a_part_of_a_larger_matrix_serves_fewer_dimensions() -> None:
    packed = pack(np.random.default_rng(3).normal(size=(30, 6)).astype(np.float32)).mean(0)
    found, alone = (curvature(part, 4, 0.5, 0.1) for part in (packed, packed[: packed_size(4)]))
    assert np.array_equal(found, alone)


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_pressure_adds_up_what_every_item_asks(table: Table, identity: bool) -> None:
    rng = np.random.default_rng(4)
    memory = rng.normal(size=(table.slots, table.block)).astype(np.float32)
    before = memory.copy()
    matrix = None if identity else rng.normal(size=(table.dim, table.dim)).astype(np.float32)
    rows = table.gather(memory.astype(np.float64), np.arange(table.items))
    expected = np.zeros((table.slots, table.block))
    asked = rows if matrix is None else rows @ matrix
    table.scatter_add(expected, np.arange(table.items), asked)
    found = pressure(table, memory, matrix)
    assert np.allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert found.dtype == np.float32
    assert np.array_equal(memory, before)
