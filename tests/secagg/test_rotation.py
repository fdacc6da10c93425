"""Rotations keep norms and prefixes, come undone, and leave no coefficient standing out."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privrec.errors import UsageError
from privrec.secagg import ring
from privrec.secagg.ring import Rotation, spread

SEED = bytes(range(32))


def normals(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(1, 3))
def test_keeps_norms_and_comes_undone(sizes: list[int], rows: int) -> None:
    turn, values = Rotation(tuple(sizes), SEED), normals(rows, sum(sizes))
    turned = turn.apply(values)
    assert turned.dtype == np.float32
    assert np.linalg.norm(turned, axis=1) == pytest.approx(np.linalg.norm(values, axis=1), rel=1e-5)
    assert np.abs(turn.undo(turned.astype(np.float64)) - values).max() < 1e-5


@pytest.mark.parametrize("size", [1, 2, 12, 20, 37, 96, 160, 1000])
def test_is_linear_and_orthonormal(size: int) -> None:
    matrix = Rotation((size,), SEED).apply(np.eye(size, dtype=np.float32)).astype(np.float64)
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 1e-5
    values = normals(2, size)
    assert np.abs(Rotation((size,), SEED).apply(values) - values @ matrix).max() < 1e-4


def test_a_prefix_is_turned_as_in_the_whole() -> None:
    turn, values = Rotation((40, 24, 100), SEED), normals(3, 164)
    whole = turn.apply(values)
    for end in (40, 64):
        assert np.array_equal(turn.apply(values[:, :end]), whole[:, :end])
    sums = turn.undo(whole.sum(0, keepdims=True, dtype=np.float64))
    assert np.abs(sums - values.sum(0)).max() < 1e-4


def test_values_are_left_as_they_were() -> None:
    values = normals(2, 50)
    before = values.copy()
    Rotation((50,), SEED).apply(values)
    assert np.array_equal(values, before)


@pytest.mark.parametrize("order", [2, 8, 12, 16, 20])
def test_hadamard_matrices(order: int) -> None:
    matrix = ring._hadamard(order).astype(int)
    assert set(np.unique(matrix)) == {-1, 1}
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order, dtype=int))


def test_spreads_over_three_quarters_at_least() -> None:
    assert [spread(size) for size in (1, 2, 3, 11, 12, 19, 20, 23, 24)] == [
        1, 2, 2, 8, 12, 16, 20, 20, 24,
    ]  # fmt: skip
    assert all(3 * size <= 4 * spread(size) <= 4 * size for size in range(12, 5000))
    assert spread(2**17) == 2**17
    assert spread(2**17 - 1) == 3 * 2**15


@pytest.mark.parametrize("size", [64, 100, 127, 1000])
def test_every_coefficient_is_spread(size: int) -> None:
    """The variance of each turned coefficient over the signs is at most ``‖x‖² / spread``."""
    seeds = [hashlib.sha256(bytes([n, 1])).digest() for n in range(200)]
    for place in (0, size // 2, size - 1):
        peak = np.zeros((1, size), np.float32)
        peak[0, place] = 1
        turned = np.concatenate([Rotation((size,), seed).apply(peak) for seed in seeds])
        assert np.abs(turned).max() <= 1
        assert (turned**2).mean(0).max() < 1.35 / spread(size)


def test_signs_depend_on_seed_band_and_window() -> None:
    turn = Rotation((100, 100), SEED)
    drawn = [turn._signs(b, w, 96) for b in (0, 1) for w in (0, 1)]
    drawn.append(Rotation((100, 100), bytes(32))._signs(0, 0, 96))
    assert all(set(np.unique(signs)) == {-1, 1} for signs in drawn)
    for one in range(5):
        for two in range(one):
            assert 20 < np.count_nonzero(drawn[one] != drawn[two]) < 76


def test_is_the_same_on_every_platform() -> None:
    signs = Rotation((1000,), SEED)._signs(0, 0, 768)
    assert hashlib.sha256(signs.tobytes()).hexdigest()[:16] == "ae6df4f71b86af4c"


@pytest.mark.parametrize("sizes", [(), (3, 0), (-1,)])
def test_bands_without_coefficients_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="each must have at least 1"):
        Rotation(sizes, SEED)


def test_seeds_of_another_length_are_refused() -> None:
    with pytest.raises(UsageError, match="seed of 5 bytes"):
        Rotation((3,), b"short")


def test_vectors_that_end_inside_a_band_are_refused() -> None:
    with pytest.raises(UsageError, match=r"51 coefficients.*\[40, 64\]"):
        Rotation((40, 24), SEED).apply(normals(1, 51))
