"""Clipping and adding up: what bounds one device's part of the sum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from on_devices import bounded

from privrec.device.update import Address, BoundedUpdate, RawUpdate, clip
from privrec.models.layout import Layout
from privrec.randomness import SecretRoot
from privrec.secagg.ring import Encoding

ROOT = SecretRoot.known(b"test")
FLOATS = st.floats(-1e6, 1e6, width=32)


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=FLOATS),
    st.floats(1e-3, 1e3),
)
def test_no_row_is_longer_than_the_clip_norm(values: np.ndarray, clip_norm: float) -> None:
    clipped = clip(values, clip_norm)
    wide, before = clipped.astype(np.float64), values.astype(np.float64)
    assert clipped.dtype == np.float32
    assert np.all(np.linalg.norm(wide, axis=1) <= clip_norm)
    for short, long in zip(wide, before, strict=True):
        length = np.linalg.norm(long)
        factor = min(1.0, clip_norm / length) if length else 1.0
        assert np.allclose(short, long * factor, rtol=1e-5, atol=1e-30 + 1e-6 * clip_norm)


def test_rows_that_are_hardly_too_long_are_clipped_all_the_same() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1000, 30))
    rows *= rng.uniform(0.95, 1.05, (1000, 1)) / np.linalg.norm(rows, axis=1, keepdims=True)
    clipped = clip(rows.astype(np.float32), 1.0).astype(np.float64)
    assert np.linalg.norm(clipped, axis=1).max() <= 1


def test_a_short_row_is_not_touched() -> None:
    values = np.array([[0.3, -0.4], [0.0, 0.0]], np.float32)
    assert np.array_equal(clip(values, 0.6), values)


def test_a_long_vector_fits_the_finest_grid_after_clipping() -> None:
    rng = np.random.default_rng(0)
    # Millions of numbers of many sizes: the worst for a sum in float32.
    values = rng.standard_normal((2, 2_000_000), np.float32) * rng.exponential(size=2_000_000) ** 3
    clipped = clip(values.astype(np.float32), 5.0)
    norms = np.sqrt(np.square(clipped.astype(np.float64)).sum(1))
    assert (norms <= 5.0).all()
    assert (norms > 5.0 * (1 - 1e-5)).all()
    encoding = Encoding(5.0, values.shape[1], 20)
    coins = SecretRoot.known(b"coins").stream("rounding")
    assert np.abs(encoding.encode(clipped[:1], coins)).max() > 0


def test_a_long_row_keeps_its_direction_and_gets_the_clip_norm() -> None:
    values = np.array([[30.0, -40.0], [3e-3, 4e-3]], np.float32)
    assert np.allclose(clip(values, 1e-3), [[6e-4, -8e-4], [6e-4, 8e-4]], rtol=1e-5)


def test_rows_are_clipped_one_by_one() -> None:
    values = np.array([[300.0, 0.0], [0.5, 0.0]], np.float32)
    assert np.allclose(clip(values, 1.0), [[1, 0], [0.5, 0]], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_becomes_zero(bad: float) -> None:
    values = np.array([[bad, 1.0], [0.5, 0.0]], np.float32)
    assert clip(values, 1.0).tolist() == [[0, 0], [0.5, 0]]


@pytest.mark.parametrize("size", [1e20, 1e30, 3e38])
def test_an_enormous_row_does_no_harm(size: float) -> None:
    clipped = clip(np.array([[size, size], [0.5, 0.0]], np.float32), 1.0)
    assert np.linalg.norm(clipped[0]) <= 1 + 1e-6
    assert clipped[1].tolist() == [0.5, 0]


def test_a_bounded_update_is_within_the_bound_whatever_came_in() -> None:
    layout = Layout(2, 4, 2, 3)
    address = Address(np.array([[0, 3]]), np.array([[1]]), layout)
    rows = np.array([[1e3] * 7, [np.nan] * 7, [0.1] * 7, [0] * 7], np.float32)
    found = bounded(RawUpdate(rows, address), Encoding(1.0, layout.size), ROOT.stream("a"))
    lengths = np.linalg.norm(found.integers.astype(float), axis=1)
    assert lengths.max() <= Encoding(1.0, layout.size).bound
    assert lengths[0] == pytest.approx(2**13, rel=1e-3)
    assert lengths[2] == pytest.approx(2**13 * 0.1 * 7**0.5, rel=1e-2)
    assert not found.integers[[1, 3]].any()


@pytest.mark.parametrize("shared", [False, True])
def test_updates_add_up_where_their_addresses_say(shared: bool) -> None:
    layout = Layout(2, 4, 2, 3)
    rng = np.random.default_rng(0)
    m = 5
    blocks = np.array([rng.permutation(4)[:3] for _ in range(1 if shared else m)])
    biases = np.array([rng.permutation(3)[:2] for _ in range(1 if shared else m)])
    most = 2**31 // m  # what the check of the ring's capacity lets through
    integers = rng.integers(-most, most, size=(m, 2 + 3 * 2 + 2)).astype(np.int32)
    address = Address(blocks, biases, layout)
    assert address.width == integers.shape[1]
    expected = np.zeros(layout.size, np.int64)
    for row in range(m):
        place = 0 if shared else row
        wide = integers[row].astype(np.int64)
        layout.dense_of(expected)[...] += wide[:2]
        for number, block in enumerate(blocks[place]):
            layout.memory_of(expected)[block] += wide[2 + 2 * number : 4 + 2 * number]
        for number, bias in enumerate(biases[place]):
            layout.biases_of(expected)[bias] += wide[8 + number]
    total = np.full(layout.size, 7, np.int64)
    BoundedUpdate(integers, address).add_to(total)
    assert np.array_equal(total - 7, expected)
    assert np.array_equal(BoundedUpdate(integers, address).vector(), expected)
