"""Nested coordinates: every tier's memory is a prefix, and prefixes add up to one whole memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from on_devices import collapse, lift

from privrec.embedding.nested import Nested, nested
from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable, Table
from privrec.errors import UsageError

PRECISIONS: list[tuple[Any, float]] = [(np.float64, 1e-10), (np.float32, 1e-5)]
SYSTEMS = ["fold", "rows", "dims"]


@dataclass(frozen=True)
class Chain:
    """Tiers of one system, with what they are by definition."""

    system: str
    table: Table
    halvings: tuple[int, ...]
    seed: int

    @property
    def nested(self) -> Nested:
        return nested(self.table, self.halvings)

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def memory(self, tier: int, dtype: Any = np.float64) -> np.ndarray:
        table = self.nested.tables[tier]
        return self.rng.normal(size=(table.slots, table.block)).astype(dtype)

    def collapsed(self, whole: np.ndarray, tier: int) -> np.ndarray:
        """A tier's memory of a whole one: sums over classes, first items, or first dimensions."""
        own, halving = self.nested.tables[tier], self.halvings[tier] - self.halvings[0]
        if self.system == "fold":
            classes = whole.reshape(1 << halving, own.slots, -1)
            return classes.sum(0) / 2 ** (halving / 2)
        rows = self.nested.tables[0].gather(whole, np.arange(own.items))[:, : own.dim]
        parts = rows.reshape(own.items, own.parts, own.block)
        return (parts if self.system == "rows" else parts.swapaxes(0, 1)).reshape(-1, own.block)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.halvings)))


@st.composite
def chains(draw: st.DrawFn, system: str | None = None) -> Chain:
    """Of every system, with any block, also without a tier of capacity 1."""
    system = system or draw(st.sampled_from(SYSTEMS))
    block = draw(st.integers(1, 3))
    if system == "fold":
        power = draw(st.integers(1, 6))
        table: Table = Subspace(
            draw(st.integers(1, 40)), 2 * block, block, 1 << power, draw(st.integers(0, 2**63))
        )
    else:
        power = draw(st.integers(1, 3))
        dim = block << power if system == "dims" else block * draw(st.integers(1, 3))
        items = draw(st.integers(8, 40))
        table = PlainTable.of(items, dim, block=block, by_part=system == "dims")
    halvings = draw(st.sets(st.integers(0, power), min_size=1, max_size=4))
    return Chain(system, table, tuple(sorted(halvings)), draw(st.integers(0, 2**32)))


def near(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    size = max(float(np.abs(expected).max(initial=0)), 1e-30)
    return float(np.abs(found - expected).max(initial=0)) <= tolerance * size


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@given(chains())
def test_synthesis_undoes_analysis_and_keeps_lengths(
    dtype: Any, tolerance: float, chain: Chain
) -> None:
    for tier in chain:
        memory = chain.memory(tier, dtype)
        coefficients = memory.copy()
        chain.nested.to_coefficients(coefficients, tier)
        assert coefficients.dtype == dtype
        assert np.linalg.norm(coefficients) == pytest.approx(np.linalg.norm(memory), rel=tolerance)
        back = coefficients.copy()
        chain.nested.to_memory(back, tier)
        assert near(back, memory, tolerance)
        forth = memory.copy()
        chain.nested.to_memory(forth, tier)
        chain.nested.to_coefficients(forth, tier)
        assert near(forth, memory, tolerance)


@given(chains())
def test_the_coordinates_are_orthonormal(chain: Chain) -> None:
    for tier in chain:
        system = np.eye(chain.nested.tables[tier].slots)
        chain.nested.to_coefficients(system, tier)
        assert np.allclose(system @ system.T, np.eye(len(system)), atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@given(chains())
def test_a_prefix_rebuilds_the_tiers_memory(dtype: Any, tolerance: float, chain: Chain) -> None:
    """From the prefix alone: whatever follows it has no part in the tier's memory."""
    whole = chain.memory(0, dtype)
    coefficients = whole.copy()
    chain.nested.to_coefficients(coefficients, 0)
    for tier in chain:
        own = chain.nested.tables[tier].slots
        rebuilt = coefficients[:own].copy()
        chain.nested.to_memory(rebuilt, tier)
        assert near(rebuilt, chain.collapsed(whole, tier), tolerance)
        assert near(collapse(chain.nested, whole, tier), rebuilt, tolerance)
        other = coefficients.copy()
        other[own:] = 7
        chain.nested.to_memory(other, 0)
        assert near(collapse(chain.nested, other, tier), rebuilt, 100 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@given(chains())
def test_lifting_is_isometric_and_collapsing_takes_it_back(
    dtype: Any, tolerance: float, chain: Chain
) -> None:
    for tier in chain:
        memory = chain.memory(tier, dtype)
        lifted = lift(chain.nested, memory, tier)
        assert lifted.dtype == dtype
        assert lifted.shape == (chain.nested.tables[0].slots, chain.table.block)
        assert np.linalg.norm(lifted) == pytest.approx(np.linalg.norm(memory), rel=tolerance)
        assert near(collapse(chain.nested, lifted, tier), memory, tolerance)
        assert np.array_equal(memory, chain.memory(tier, dtype))  # a copy, not in place


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@given(chains("fold"))
def test_a_lifted_fold_is_constant_on_its_classes(
    dtype: Any, tolerance: float, chain: Chain
) -> None:
    """``lift(a)[s] = a[s mod n_j] / 2^(j/2)``, FAIR's lift in isometric scale."""
    for tier in chain:
        memory = chain.memory(tier, dtype)
        times = chain.halvings[tier] - chain.halvings[0]
        expected = np.tile(memory, (1 << times, 1)) / 2 ** (times / 2)
        assert near(lift(chain.nested, memory, tier), expected, tolerance)


@given(chains())
def test_a_lifted_memory_says_the_same_of_every_item_that_the_tier_holds(chain: Chain) -> None:
    """And nothing of all others, nor of dimensions that it has not."""
    for tier in chain:
        memory, own = chain.memory(tier), chain.nested.tables[tier]
        lifted = lift(chain.nested, memory, tier)
        rows = chain.nested.tables[0].gather(lifted, np.arange(chain.nested.tables[0].items))
        expected = np.zeros_like(rows)
        expected[: own.items, : own.dim] = own.gather(memory, np.arange(own.items))
        assert near(rows, expected, 1e-10)


@given(chains("fold"))
def test_a_collapsed_fold_holds_the_means_of_its_classes(chain: Chain) -> None:
    """FAIR's collapse, item by item: the block of an item is the mean over its slot's class."""
    unfolded = Chain(chain.system, chain.table, (0, *range(1, 1 + max(chain.halvings))), chain.seed)
    whole = unfolded.memory(0)
    slots, signs = chain.table.locate(np.arange(chain.table.items))
    for tier in unfolded:
        own = unfolded.nested.tables[tier]
        means = whole.reshape(-1, own.slots, own.block).mean(0)
        expected = means[slots % own.slots] * signs[..., None]
        rows = own.gather(collapse(unfolded.nested, whole, tier), np.arange(own.items))
        assert near(rows, expected.reshape(rows.shape), 1e-10)


@given(chains())
def test_collapse_then_lift_is_the_orthogonal_projection(chain: Chain) -> None:
    one, other = (
        chain.memory(0),
        np.random.default_rng(chain.seed + 1).normal(
            size=(chain.nested.tables[0].slots, chain.table.block)
        ),
    )
    for tier in chain:
        first, second = (
            lift(chain.nested, collapse(chain.nested, memory, tier), tier)
            for memory in (one, other)
        )
        again = lift(chain.nested, collapse(chain.nested, first, tier), tier)
        assert near(again, first, 1e-10)
        assert (first * other).sum() == pytest.approx((one * second).sum(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@given(chains())
def test_prefixes_padded_with_zeros_sum_to_the_sum_of_lifted_memories(
    dtype: Any, tolerance: float, chain: Chain
) -> None:
    """The one vector sum that serves all capacities."""
    total = np.zeros((chain.nested.tables[0].slots, chain.table.block), dtype)
    expected = np.zeros_like(total, np.float64)
    for step in range(3):
        for tier in chain:
            change = Chain(chain.system, chain.table, chain.halvings, chain.seed + step).memory(
                tier, dtype
            )
            expected += lift(chain.nested, change.astype(np.float64), tier)
            chain.nested.to_coefficients(change, tier)
            total[: len(change)] += change
    chain.nested.to_memory(total, 0)
    assert near(total, expected, tolerance)


@given(chains(), st.data())
def test_a_spread_change_is_the_analysis_of_the_dense_change(
    chain: Chain, data: st.DataObject
) -> None:
    for tier in chain:
        size = chain.nested.tables[tier].slots
        slots = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6)))
        change = chain.rng.normal(size=(len(slots), chain.table.block))
        dense = np.zeros((size, chain.table.block))
        np.add.at(dense, slots, change)
        chain.nested.to_coefficients(dense, tier)
        spread = chain.nested.spread(slots, tier)
        names, factors = spread or (slots[:, None], np.ones((len(slots), 1)))
        found = np.zeros_like(dense)
        np.add.at(found, names, change[:, None] * factors[..., None])
        assert near(found, dense, 1e-10)
        assert np.allclose((factors**2).sum(-1), 1, atol=1e-12)
        assert all(len(set(row)) == len(row) for row in names.tolist())


@given(chains("fold"))
def test_a_spread_keeps_the_shape_of_its_slots(chain: Chain) -> None:
    for tier in chain:
        slots = chain.rng.integers(chain.nested.tables[tier].slots, size=(3, 4))
        spread = chain.nested.spread(slots, tier)
        reach = 1 + chain.halvings[-1] - chain.halvings[tier]
        assert (spread is None) is (reach == 1)
        if spread is not None:
            names, factors = spread
            assert names.shape == factors.shape == (3, 4, reach)
            flat = chain.nested.spread(slots.ravel(), tier)
            assert flat is not None
            assert np.array_equal(flat[0], names.reshape(-1, reach))


@given(chains())
def test_a_tiers_gradient_is_the_projected_gradient_of_the_whole_memory(chain: Chain) -> None:
    """A plain step on a folded memory would overshoot it ``2^j`` times; this one does not.

    The loss looks at items of the tier; its gradient on their rows is scattered into the tier's
    memory, and into the whole memory that says the same, of which the tier can only move its part.
    """
    for tier in chain:
        own, whole = chain.nested.tables[tier], chain.nested.tables[0]
        items = chain.rng.integers(own.items, size=9)
        slope = chain.rng.normal(size=(9, own.dim))
        padded = np.zeros((9, whole.dim))
        padded[:, : own.dim] = slope
        mine = np.zeros((own.slots, own.block))
        own.scatter_add(mine, items, slope)
        everywhere = np.zeros((whole.slots, whole.block))
        whole.scatter_add(everywhere, items, padded)
        assert near(mine, collapse(chain.nested, everywhere, tier), 1e-10)


def test_the_haar_steps_are_those_of_the_definition() -> None:
    """A chain with gaps: halvings that no tier stops at are steps all the same."""
    chain = nested(Subspace(8, 2, 1, 8, 5), [0, 3])
    memory = np.arange(1.0, 9)[:, None]
    once = np.concatenate((memory[:4] + memory[4:], memory[:4] - memory[4:])) / np.sqrt(2)
    twice = np.concatenate((once[:2] + once[2:4], once[:2] - once[2:4])) / np.sqrt(2)
    thrice = np.concatenate((twice[:1] + twice[1:2], twice[:1] - twice[1:2])) / np.sqrt(2)
    expected = np.concatenate((thrice, twice[2:], once[4:]))  # [A | D_3 | D_2 | D_1]
    chain.to_coefficients(memory, 0)
    assert np.allclose(memory, expected, atol=1e-12)


def test_one_fold_alone_is_its_own_coordinates() -> None:
    """Without a weaker tier nothing is turned, so that a run is the run without tiers."""
    chain = nested(Subspace(8, 2, 1, 16, 5), [2])
    memory = np.random.default_rng(0).normal(size=(4, 1))
    before = memory.copy()
    chain.to_coefficients(memory, 0)
    chain.to_memory(memory, 0)
    assert np.array_equal(memory, before)
    assert chain.spread(np.array([0, 3]), 0) is None


@pytest.mark.parametrize("width", [1, 16])
def test_large_memories_are_turned_in_parts_of_the_cache(width: int) -> None:
    chain = nested(Subspace(8, width, width, 1 << 17, 5), [0, 1])
    memory = np.random.default_rng(1).normal(size=(1 << 17, width))
    top, bottom = memory[: 1 << 16].copy(), memory[1 << 16 :].copy()
    chain.to_coefficients(memory, 0)
    assert np.allclose(memory[: 1 << 16], (top + bottom) / np.sqrt(2), atol=1e-12)
    assert np.allclose(memory[1 << 16 :], (top - bottom) / np.sqrt(2), atol=1e-12)


def test_coordinates_are_changed_in_place_and_copy_no_memory() -> None:
    import tracemalloc

    chain = nested(Subspace(8, 16, 16, 1 << 16, 5), [0, 4])
    memory = np.zeros((1 << 16, 16), np.float32)  # 4 MiB
    tracemalloc.start()
    chain.to_coefficients(memory, 0)
    chain.to_memory(memory, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < memory.nbytes / 8


@pytest.mark.parametrize("items", [7, 37, 40_981])
def test_odd_catalogues_nest(items: int) -> None:
    """The trap of sizes that do not divide: a hashed memory is padded, rows are cut whole."""
    folded = nested(Subspace.sized(items, 4, block=2, key=1), [0, 1, 2])
    slots = [table.locate(np.arange(items))[0] for table in folded.tables]
    assert folded.tables[0].slots >= 2 * items
    for tier, own in enumerate(slots):
        assert folded.tables[tier].slots << tier == folded.tables[0].slots
        assert np.array_equal(own, slots[0] % folded.tables[tier].slots)
    rows = nested(PlainTable.of(items, 4, block=2), [0, 1, 2])
    assert [table.items for table in rows.tables] == [items, items // 2, items // 4]
    for table in rows.tables:
        own, whole = (each.locate(np.arange(table.items))[0] for each in (table, rows.tables[0]))
        assert np.array_equal(own, whole)


@pytest.mark.parametrize(
    ("table", "halvings", "says"),
    [
        (Subspace(8, 2, 1, 8, 0), [0, 4], "times = 4: must be 0 to 3 for 8 slots"),
        (PlainTable.of(7, 4, block=2), [0, 3], "capacity 1/8 of 7 items"),
        (PlainTable.of(7, 4, block=2, by_part=True), [0, 2], "capacity 1/4 of dim = 4"),
        (PlainTable.of(7, 6, block=2, by_part=True), [0, 1], "multiple of block = 2"),
    ],
)
def test_what_does_not_nest_is_refused(table: Table, halvings: list[int], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        nested(table, halvings)
