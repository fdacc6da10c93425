"""Plain tables are their own memory; what all tables share holds for hashed and plain ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable, Table, add_rows
from privrec.errors import UsageError


@st.composite
def plain_tables(draw: st.DrawFn) -> PlainTable:
    block, parts = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    items = draw(st.integers(1, 30))
    return PlainTable.of(items, block * parts, block=block, by_part=draw(st.booleans()))


@st.composite
def tables(draw: st.DrawFn) -> Table:
    if draw(st.booleans()):
        return draw(plain_tables())
    block, parts, power = (draw(st.integers(1, 4)) for _ in range(3))
    slots = 1 << power
    key = draw(st.integers(0, 2**63))
    hashed = Subspace(draw(st.integers(1, 30)), block * parts, block, slots, key)
    return hashed.folded(draw(st.integers(0, power)))


def memory_of(table: Table, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(table.slots, table.block))


def by_definition(table: Table, memory: np.ndarray) -> np.ndarray:
    """Row by row and part by part: ``scale * sign * memory[slot]``."""
    slots, signs = table.locate(np.arange(table.items))
    rows = np.zeros((table.items, table.dim))
    for item in range(table.items):
        for part in range(table.parts):
            block = table.scale * float(signs[item, part]) * memory[slots[item, part]]
            rows[item, part * table.block : (part + 1) * table.block] = block
    return rows


@given(plain_tables(), st.integers(0, 2**32))
def test_a_plain_table_is_its_memory(table: PlainTable, seed: int) -> None:
    """Item by item, or the first parts of all items first."""
    memory = memory_of(table, seed)
    rows = table.gather(memory, np.arange(table.items))
    if table.by_part:
        expected = memory.reshape(table.parts, table.items, table.block).transpose(1, 0, 2)
        assert np.array_equal(rows, expected.reshape(table.items, table.dim))
    else:
        assert np.array_equal(rows, memory.reshape(table.items, table.dim))
    assert table.injective
    assert (table.scale, table.compression) == (1, 1)
    assert table.tabulated() is table


@given(tables(), st.integers(0, 2**32))
def test_gather_and_scatter_add_are_adjoint_in_both_precisions(table: Table, seed: int) -> None:
    memory, rng = memory_of(table, seed), np.random.default_rng(seed + 1)
    items = rng.integers(table.items, size=(3, 4))
    rows = rng.normal(size=(3, 4, table.dim))
    assert np.allclose(table.gather(memory, items), by_definition(table, memory)[items], atol=1e-14)
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-5)):
        own, upstream = memory.astype(dtype), rows.astype(dtype)
        gathered, pushed = table.gather(own, items), np.zeros_like(own)
        table.scatter_add(pushed, items, upstream)
        assert gathered.dtype == pushed.dtype == dtype
        there, back = (gathered * upstream).sum(), (own * pushed).sum()
        size = float(np.linalg.norm(gathered) * np.linalg.norm(upstream)) + 1e-30
        assert abs(there - back) <= tolerance * size


@given(st.integers(1, 300), st.integers(0, 40), st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_rows_add_up_whether_few_or_many_change(
    size: int, count: int, signed: bool, whole: bool, seed: int
) -> None:
    """Also into a view of a longer vector, as the memory of a layout is."""
    rng = np.random.default_rng(seed)
    index = rng.integers(size, size=count)
    rows = rng.integers(-9, 9, size=(count, 3)).astype(np.int64 if whole else np.float64)
    signs = rng.choice([-1.0, 1.0], size=count).astype(np.float32) if signed else None
    vector = rng.integers(-9, 9, size=size * 3 + 2).astype(rows.dtype)
    expected, target = vector.copy(), vector[1:-1].reshape(size, 3)
    weighted = rows if signs is None else (rows * signs[:, None]).astype(rows.dtype)
    np.add.at(expected[1:-1].reshape(size, 3), index, weighted)
    add_rows(target, index, rows, signs)
    assert np.array_equal(vector, expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"items": 0}, "items = 0"),
        ({"dim": 6}, "dim = 6: must be a positive multiple of block = 4"),
        ({"dim": 0}, "dim = 0"),
        ({"block": 0}, "block = 0"),
    ],
)
def test_bad_sizes_are_refused(change: dict[str, int], says: str) -> None:
    right: dict[str, Any] = {"items": 5, "dim": 8, "block": 4}
    assert PlainTable.of(**right).slots == 10
    with pytest.raises(UsageError, match=says):
        PlainTable.of(**{**right, **change})
