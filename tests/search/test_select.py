"""Selectors against brute force, the mixture's weights, and the choice by cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable
from privrec.errors import UsageError
from privrec.randomness import SecretRoot, SecureStream
from privrec.search.index import Sketch
from privrec.search.memory import ItemMemory, outside
from privrec.search.select import Search, best, cheapest, mix, select

N, DIM, BUDGET = 4000, 32, 200
EVERY: tuple[str, ...] = (
    "pghash", "simhash", "block_sign", "hamming", "sketch", "scan", "uniform", "auto",
)  # fmt: skip
GOOD: tuple[str, ...] = ("hamming", "sketch", "scan", "auto")


def stream(*context: str | int) -> SecureStream:
    return SecretRoot.known(b"a device of the tests").stream("lsh", *context)


@pytest.fixture(scope="module")
def search() -> Search:
    """Clustered items with biases, in a quarter of the memory that they would fill."""
    rng = np.random.default_rng(0)
    table = Subspace.sized(N, DIM, block=8, key=5, compression=4)
    memory = rng.standard_normal((table.slots, 8)).astype(np.float32)
    memory[:, 0] += 1
    small = Subspace.sized(N, 1, block=1, key=6)
    biases = small, rng.standard_normal((small.slots, 1)).astype(np.float32)
    items = ItemMemory(table, memory, biases)
    return Search(items, Sketch.of(items))


def query(seed: int, count: int = 1) -> np.ndarray:
    made = np.random.default_rng(seed).standard_normal((count, DIM + 1)).astype(np.float32)
    made[:, -1] = 1
    return made


def exact(search: Search, queries: np.ndarray) -> np.ndarray:
    rows = search.items.rows(np.arange(N)).astype(np.float64) - search.items.centre
    return (rows @ queries.T).max(1)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("selector", EVERY)
def test_every_selector_keeps_to_its_budget_and_leaves_out_the_history(
    selector: str, count: int, search: Search
) -> None:
    queries = query(1, count)
    history = np.argsort(-exact(search, queries))[:30]
    found = select(selector, search, queries, BUDGET, stream(selector), exclude=history)
    assert found.dtype == np.int64
    assert len(np.unique(found)) == len(found) <= BUDGET
    assert np.all(np.diff(found) > 0)
    assert not np.isin(found, history).any()
    assert len(found) == BUDGET or (selector not in (*GOOD, "uniform") and len(found) > 0)


@pytest.mark.statistical
def test_good_selectors_find_the_best_and_the_others_less(search: Search) -> None:
    best = [np.argsort(-exact(search, query(s)))[:10] for s in range(30)]
    recalls = {
        name: np.mean([
            np.isin(best[s], select(name, search, query(s), BUDGET, stream(name, s)))
            for s in range(30)
        ])
        for name in EVERY
    }  # fmt: skip
    assert recalls["scan"] == 1
    assert recalls["sketch"] > 0.95
    assert recalls["hamming"] > 0.85
    assert recalls["uniform"] == pytest.approx(BUDGET / N, abs=0.04)
    for name in ("simhash", "block_sign"):
        assert 2 * recalls["uniform"] < recalls[name] < recalls["hamming"]
    assert recalls["pghash"] > recalls["uniform"]


@pytest.mark.parametrize("selector", ["scan", "sketch", "hamming"])
def test_what_all_items_share_with_one_query_hides_no_other(selector: str) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((N, 16)).astype(np.float32)
    rows[:, 0] = 50
    items = ItemMemory(PlainTable.of(N, 16, block=8), rows.reshape(-1, 8))
    queries = rng.standard_normal((2, 16)).astype(np.float32)
    queries[:, 0] = 0, 10
    found = select(selector, Search(items, Sketch.of(items)), queries, 200, stream("both"))
    best = np.argsort(-(rows @ queries[0]))[:10]
    assert np.isin(best, found).mean() > 0.6


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_scan_is_brute_force(count: int, search: Search) -> None:
    queries = query(3, count)
    found = select("scan", search, queries, 50, stream("scan"))
    np.testing.assert_array_equal(found, np.sort(np.argsort(-exact(search, queries))[:50]))


def test_the_best_are_those_of_brute_force_in_order(search: Search) -> None:
    for seed in range(20):
        asked = query(seed)
        scores = search.items.rows(np.arange(N)).astype(np.float64) @ asked[0]
        history = np.argsort(-scores)[:5]
        items, values = best(search, asked[0], 10, history)
        scores[history] = -np.inf
        np.testing.assert_array_equal(items, np.argsort(-scores)[:10])
        np.testing.assert_allclose(values, scores[items], rtol=1e-4)


def test_the_same_secret_chooses_the_same_and_another_does_not(search: Search) -> None:
    for name in ("pghash", "hamming", "uniform"):
        first, again = (select(name, search, query(1), 50, stream(name)) for _ in range(2))
        other = select(name, search, query(1), 50, stream(name, "other"))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)


@pytest.mark.parametrize("budget", [10, 1900, 2500, 3990, 9999])
def test_uniform_items_are_distinct_and_even(budget: int, search: Search) -> None:
    history = np.arange(0, 20, 2)
    found = select("uniform", search, query(1), budget, stream(budget), exclude=history)
    assert len(np.unique(found)) == min(budget, N - 10)
    assert not np.isin(found, history).any()
    if budget == 1900:
        halves = np.bincount(found // 500, minlength=8)
        assert halves.min() > 190
        assert halves.max() < 285


def test_places_outside_count_only_what_is_left() -> None:
    excluded = np.array([0, 1, 4, 9])
    left = [i for i in range(12) if i not in excluded]
    assert outside(excluded, np.arange(8)).tolist() == left
    assert outside(np.zeros(0, np.int64), np.arange(3)).tolist() == [0, 1, 2]


@pytest.mark.statistical
@pytest.mark.parametrize("wrong", [1.0, 2 / 3, 3 / 2])
def test_the_mixture_sums_to_the_whole_catalogue(wrong: float) -> None:
    rng, n = np.random.default_rng(0), 500
    values = rng.exponential(size=n)
    positives = np.array([3, 77, 200])
    values[positives] = 50  # would show if they were counted
    left = np.setdiff1d(np.arange(n), positives)
    selected = np.sort(left[np.argsort(-values[left])[:20]])
    sums = []
    for _ in range(4000):
        items, weights = mix(selected, positives, rng.integers(0, n - 23, 20), n)
        assert len(items) == len(weights) == 40
        sums.append((values[items] * np.exp(weights) * np.where(weights > 0, wrong, 1)).sum())
    error = abs(np.mean(sums) - values[left].sum()) / (np.std(sums) / np.sqrt(len(sums)))
    assert bool(error < 4.5) is (wrong == 1.0)


def test_a_mixture_leaves_out_what_is_taken() -> None:
    items, weights = mix(np.array([5, 9]), np.array([2]), np.arange(7), 10)
    assert sorted(items.tolist()) == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert weights[:2].tolist() == [0, 0]
    assert weights[2:].tolist() == [0.0] * 7  # 7 of 7: each stands for itself


def large(rank: int | None = None) -> Search:
    """A catalogue of 670,000 items, with a perfect sketch where it has a rank."""
    table = Subspace.sized(670_000, 128, block=32, key=1, compression=64)
    items = ItemMemory(table, np.zeros((table.slots, 32), np.float32))
    sketch = None
    if rank is not None:
        basis = np.zeros((128, rank), np.float32)
        sketch = Sketch(np.zeros((1, rank), np.int8), basis, 1.0, np.zeros(128, np.float32))
    return Search(items, sketch)


def test_the_fastest_is_chosen() -> None:
    assert cheapest(large(), 1) == "scan"
    assert cheapest(large(32), 1) == "sketch"
    assert cheapest(large(2048), 1) == "scan"  # a sketch that is slower to read
    assert cheapest(large(), 200) == "scan"


def test_a_poor_sketch_is_not_taken_for_a_scan() -> None:
    rng = np.random.default_rng(0)
    table = Subspace.sized(N, 64, block=8, key=5)
    items = ItemMemory(table, rng.standard_normal((table.slots, 8)).astype(np.float32))
    poor = Sketch.of(items, rank=4)
    assert poor.recall < 0.9
    asked = rng.standard_normal((1, 64)).astype(np.float32)
    assert cheapest(Search(items, poor), 1) == "scan"
    automatic, scanned = (
        select(name, Search(items, poor), asked, 20, stream("auto")) for name in ("auto", "scan")
    )
    np.testing.assert_array_equal(automatic, scanned)


@pytest.mark.parametrize(
    ("selector", "queries", "budget", "words"),
    [
        ("scan", np.ones((1, DIM + 1), np.float32), 0, "budget = 0"),
        ("scan", np.ones((1, DIM), np.float32), 5, "rows have 33 numbers"),
        ("scan", np.ones((0, DIM + 1), np.float32), 5, "rows have 33 numbers"),
        ("sketch", np.ones((1, DIM + 1), np.float32), 5, "Sketch.of"),
    ],
)
def test_what_cannot_be_selected_is_refused(
    selector: str, queries: np.ndarray, budget: int, words: str, search: Search
) -> None:
    with pytest.raises(UsageError, match=words):
        select(selector, replace(search, sketch=None), queries, budget, stream("bad"))
