"""A table in a small memory: adjoint maps, no collision where none is allowed, nested folds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privrec.embedding.subspace import Subspace
from privrec.embedding.table import add_rows
from privrec.errors import UsageError
from privrec.models.sparse_output import SubspaceEmbedding

GOLDEN_BIJECTION = [[5, 10], [4, 6], [13, 12], [7, 8], [9, 2], [11, 15]]
GOLDEN_SIGNS = [[-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]
GOLDEN_HASHED = [[250, 121], [203, 68], [120, 147], [53, 70], [224, 109]]
GOLDEN_HASHED_SIGNS = [[-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]]


@st.composite
def subspaces(draw: st.DrawFn) -> Subspace:
    block = draw(st.integers(1, 5))
    parts = draw(st.integers(1, 4))
    slots = 1 << draw(st.integers(0, 8))
    whole = Subspace(
        draw(st.integers(1, 60)), block * parts, block, slots, draw(st.integers(0, 2**63))
    )
    return whole.folded(draw(st.integers(0, slots.bit_length() - 1)))


def table_by_definition(subspace: Subspace, memory: np.ndarray) -> np.ndarray:
    slots, signs = subspace.locate(np.arange(subspace.items))
    rows = [
        np.concatenate([signs[i, b] * memory[slots[i, b]] for b in range(subspace.parts)])
        for i in range(subspace.items)
    ]
    return np.array(rows) * np.float32(2 ** (-subspace.folds / 2))


@given(subspaces(), st.integers(0, 2**32))
def test_gather_is_the_signed_blocks(subspace: Subspace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    memory = rng.normal(size=(subspace.slots, subspace.block)).astype(np.float32)
    items = rng.integers(subspace.items, size=(3, 5))
    rows = subspace.gather(memory, items)
    assert rows.shape == (3, 5, subspace.dim)
    assert np.allclose(rows, table_by_definition(subspace, memory)[items], rtol=1e-6, atol=0)


@given(subspaces(), st.integers(0, 2**32))
def test_gather_and_scatter_add_are_adjoint(subspace: Subspace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    memory = rng.normal(size=(subspace.slots, subspace.block))
    items = rng.integers(subspace.items, size=(2, 7))  # items repeat
    rows = rng.normal(size=(2, 7, subspace.dim))
    lifted = np.zeros_like(memory)
    subspace.scatter_add(lifted, items, rows)
    there = float((subspace.gather(memory, items) * rows).sum())
    back = float((memory * lifted).sum())
    assert there == pytest.approx(back, rel=1e-9, abs=1e-9)


@given(subspaces(), st.integers(0, 2**32))
def test_scatter_add_adds_to_what_is_there(subspace: Subspace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(subspace.slots, subspace.block))
    items = rng.integers(subspace.items, size=9)
    rows = rng.normal(size=(9, subspace.dim))
    memory = before.copy()
    subspace.scatter_add(memory, items, rows)
    slots, signs = subspace.locate(items)
    blocks = rows.reshape(*slots.shape, subspace.block) * 2.0 ** (-subspace.folds / 2)
    np.add.at(before, slots, blocks * signs[..., None])
    assert np.allclose(memory, before, atol=1e-12)


def test_scatter_add_of_integers_is_exact() -> None:
    target = np.zeros((3, 1), np.int64)
    large = np.array([[2**31 - 1], [2**31 - 1], [-5]], np.int64)
    add_rows(target, np.array([1, 1, 2]), large)
    assert target.ravel().tolist() == [0, 2 * (2**31 - 1), -5]


@given(
    items=st.integers(1, 300),
    block=st.integers(1, 8),
    parts=st.integers(1, 5),
    key=st.integers(0, 2**63),
)
def test_nothing_collides_when_nothing_is_compressed(
    items: int, block: int, parts: int, key: int
) -> None:
    subspace = Subspace.sized(items, block * parts, block=block, key=key)
    slots, _ = subspace.locate(np.arange(items))
    assert subspace.injective
    assert len(np.unique(slots)) == items * parts
    assert slots.min() >= 0
    assert slots.max() < subspace.slots
    # No more than the next power of two is spent on it.
    assert subspace.slots < 2 * items * parts or items * parts == 1


@pytest.mark.parametrize("compression", [1.5, 2.0, 10.0, 64.0, 1e6])
def test_compression_is_met_to_the_nearest_power_of_two(compression: float) -> None:
    subspace = Subspace.sized(5000, 32, block=16, key=1, compression=compression)
    wanted = max(1.0, 5000 * 2 / compression)
    assert 2**-0.5 <= subspace.slots / wanted <= 2**0.5
    assert subspace.compression == 5000 * 32 / subspace.size


def test_a_compressed_table_spreads_evenly() -> None:
    subspace = Subspace.sized(20_000, 32, block=16, key=1, compression=100.0)
    slots, signs = subspace.locate(np.arange(20_000))
    counts = np.bincount(slots.ravel(), minlength=subspace.slots)
    mean = counts.mean()
    assert ((counts - mean) ** 2 / mean).sum() == pytest.approx(
        subspace.slots, abs=5 * (2 * subspace.slots) ** 0.5
    )
    assert abs(signs.mean()) < 5 / signs.size**0.5
    assert set(np.unique(signs)) == {-1.0, 1.0}
    # The parts of an item are placed apart: both in the slot and in the sign.
    assert abs(np.corrcoef(slots[:, 0], slots[:, 1])[0, 1]) < 0.03
    assert abs((signs[:, 0] * signs[:, 1]).mean()) < 0.04


@given(subspaces(), st.data())
def test_folds_nest(subspace: Subspace, data: st.DataObject) -> None:
    times = data.draw(st.integers(0, subspace.slots.bit_length() - 1))
    items = np.arange(subspace.items)
    slots, signs = subspace.locate(items)
    small = subspace.folded(times)
    folded, same = small.locate(items)
    assert small.slots == subspace.slots >> times
    assert np.array_equal(folded, slots % small.slots)
    assert np.array_equal(same, signs)


def test_folding_twice_is_folding_at_once() -> None:
    subspace = Subspace.sized(100, 32, block=16, key=3)
    assert subspace.folded(1).folded(2) == subspace.folded(3)
    assert subspace.folded(0) == subspace
    assert not subspace.folded(1).injective


@pytest.mark.parametrize("times", [1, 3, 5])
def test_folding_scatters_the_blocks_of_an_item(times: int) -> None:
    """Items that share one block after a fold do not share all (whole items would collide)."""
    subspace = Subspace.sized(4096, 64, block=16, key=8).folded(times)
    slots, _ = subspace.locate(np.arange(4096))
    assert len(np.unique(slots, axis=0)) > 0.99 * 4096
    # Neighbouring items are no more often together than chance has it.
    together = np.mean(slots[:-1] == slots[1:])
    assert together < 4 / subspace.slots + 5 * (1 / subspace.slots / slots.size) ** 0.5


def test_places_never_change() -> None:
    """Golden values of the wire protocol: a change here breaks every memory ever released."""
    bijection = Subspace.sized(6, 8, block=4, key=0xC0FFEE)
    slots, signs = bijection.locate(np.arange(6))
    assert slots.tolist() == GOLDEN_BIJECTION
    assert signs.tolist() == GOLDEN_SIGNS
    hashed = Subspace(1000, 8, 4, 256, 0xC0FFEE)
    slots, signs = hashed.locate(np.array([0, 1, 2, 500, 999]))
    assert slots.tolist() == GOLDEN_HASHED
    assert signs.tolist() == GOLDEN_HASHED_SIGNS
    assert hashed.folded(4).locate(np.array([999]))[0].tolist() == [
        [s % 16 for s in GOLDEN_HASHED[-1]]
    ]


def test_another_key_is_another_map() -> None:
    one, two = (Subspace(500, 16, 4, 64, key).locate(np.arange(500)) for key in (1, 2))
    assert np.mean(one[0] == two[0]) < 0.05
    assert np.mean(one[1] == two[1]) < 0.6


@given(subspaces())
def test_a_table_of_places_is_the_same_map(subspace: Subspace) -> None:
    tabulated = subspace.tabulated()
    items = np.arange(subspace.items)[::-1].reshape(1, -1)
    for expected, found in zip(subspace.locate(items), tabulated.locate(items), strict=True):
        assert np.array_equal(expected, found)
        assert expected.dtype == found.dtype
    assert tabulated.looked_up
    for name in ("injective", "size", "scale", "parts", "compression"):
        assert getattr(tabulated, name) == getattr(subspace, name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"items": 0}, "items = 0"),
        ({"items": -3}, "items = -3"),
        ({"block": 0}, "block = 0"),
        ({"dim": 0}, "dim = 0"),
        ({"dim": 10}, "multiple of block = 4"),
        ({"dim": 2}, "multiple of block = 4"),
        ({"slots": 0}, "slots = 0"),
        ({"slots": 48}, "power of two"),
        ({"slots": -8}, "slots = -8"),
    ],
)
def test_bad_sizes_are_refused(change: dict[str, int], says: str) -> None:
    right: dict[str, Any] = {"items": 5, "dim": 8, "block": 4, "slots": 16, "key": 0}
    Subspace(**right)
    with pytest.raises(UsageError, match=says):
        Subspace(**{**right, **change})


@pytest.mark.parametrize("compression", [0.99, 0.0, -1.0, float("nan")])
def test_a_table_cannot_be_expanded(compression: float) -> None:
    with pytest.raises(UsageError, match="compression"):
        Subspace.sized(10, 8, block=4, key=0, compression=compression)


@pytest.mark.parametrize(("items", "dim", "block"), [(0, 8, 4), (5, 8, 0), (5, 6, 4), (5, 2, 4)])
def test_sized_refuses_what_the_class_refuses(items: int, dim: int, block: int) -> None:
    with pytest.raises(UsageError):
        Subspace.sized(items, dim, block=block, key=0)


@pytest.mark.parametrize("times", [-1, 5, 64])
def test_a_memory_has_only_so_many_halves(times: int) -> None:
    with pytest.raises(UsageError, match="0 to 4 for 16 slots"):
        Subspace(5, 8, 4, 16, 0).folded(times)


def test_a_layer_of_pytorch_reads_and_writes_as_the_subspace_does() -> None:
    layer = SubspaceEmbedding(100, 8, compression=4, block=4, key=7)
    table = Subspace.sized(100, 8, block=4, key=7, compression=4)
    items = np.array([[3, 99], [3, 0]])
    found = layer(torch.from_numpy(items))
    assert np.array_equal(
        found.detach().numpy(), table.gather(layer.memory.detach().numpy(), items)
    )
    rows = np.random.default_rng(0).normal(size=found.shape).astype(np.float32)
    found.backward(torch.from_numpy(rows))
    expected = np.zeros((table.slots, 4), np.float32)
    table.scatter_add(expected, items, rows)
    assert np.allclose(layer.memory.grad, expected, atol=1e-6)
    assert layer.memory.numel() * 4 <= 100 * 8 * 2
    again = SubspaceEmbedding(100, 8, compression=4, block=4, key=7)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(torch.from_numpy(items)), found)
    assert layer(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, 8)


@pytest.mark.parametrize("wrong", [-1, 100])
def test_a_layer_refuses_ids_that_its_table_does_not_have(wrong: int) -> None:
    with pytest.raises(UsageError, match=f"id {wrong}: the table has rows 0 to 99"):
        SubspaceEmbedding(100, 8)(torch.tensor([5, wrong]))
