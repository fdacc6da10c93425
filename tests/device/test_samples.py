"""The samples of a round: the device's own, fresh, uniform, and the same alone as in a cohort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from privrec.device.samples import Histories, NegativeBudget, Sampler, uniform
from privrec.search.memory import outside

LEVEL = 1e-4  # of each test; the draws are keyed, so that a pass is a pass for good


def histories_of(*lists: list[int]) -> Histories:
    indptr = np.cumsum([0, *map(len, lists)])
    items = np.array([item for history in lists for item in history], np.int32)
    return Histories(np.arange(len(lists)), indptr, items)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    n_items = draw(st.integers(1, 40))
    history = st.lists(st.integers(0, n_items - 1), unique=True, max_size=n_items)
    return draw(st.lists(history, min_size=1, max_size=6)), n_items


@given(cohorts(), st.integers(0, 2**63 - 1), st.integers(1, 5))
def test_positives_are_the_history_and_negatives_are_not(
    cohort: tuple[list[list[int]], int], key: int, negatives: int
) -> None:
    lists, n_items = cohort
    batch = Sampler(n_items, negatives, None).draw(histories_of(*lists), key)
    p = batch.positives
    assert batch.items.shape == batch.valid.shape == (len(lists), p * (1 + negatives))
    assert batch.items.min() >= 0
    assert batch.items.max() < n_items
    for row, history in enumerate(lists):
        real = batch.valid[row] > 0
        assert sorted(batch.items[row, :p][real[:p]]) == sorted(history)
        assert not set(batch.items[row, p:][real[p:]]) & set(history)
        # A negative belongs to a positive that is there.
        assert not (real[p:].reshape(p, -1) & ~real[:p, None]).any()


@given(cohorts(), st.sampled_from([1, 10**4, 10**7]), st.integers(0, 2**32))
def test_what_a_history_has_is_found_in_catalogues_of_any_size(
    cohort: tuple[list[list[int]], int], apart: int, seed: int
) -> None:
    lists, n_items = [[item * apart for item in history] for history in cohort[0]], cohort[1]
    asked = np.random.default_rng(seed).integers(0, n_items, (len(lists), 5)) * apart
    found = histories_of(*lists).have(asked, n_items * apart)
    assert found.tolist() == [
        [item in history for item in row] for row, history in zip(asked, lists, strict=True)
    ]


@given(cohorts(), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_a_budget_is_drawn_outside_of_each_history(
    cohort: tuple[list[list[int]], int], key: int, more: int
) -> None:
    lists, n_items = cohort
    n_items, everyone = n_items + more, histories_of(*lists)
    size = max(1, n_items // 3)
    if size > 100:
        size = 100
    budget = NegativeBudget(n_items, size, "uniform", 0.5)
    if size == n_items:
        return
    items, weights, valid = budget.draw(everyone, key)
    for row, history in enumerate(everyone.sets()):
        left = n_items - len(history)
        assert valid[row].all() == valid[row].any() == (left > 0)
        if left:
            places = uniform(key, everyone.users[[row]], size, left)[0]
            assert items[row].tolist() == outside(history, places).tolist()
            assert weights[row] == pytest.approx(np.log(left / size), abs=1e-6)


@given(cohorts(), st.integers(0, 2**63 - 1), st.sampled_from([None, 1, 3, 10]))
def test_a_device_alone_draws_what_it_draws_in_a_cohort(
    cohort: tuple[list[list[int]], int], key: int, most: int | None
) -> None:
    lists, n_items = cohort
    sampler, everyone = Sampler(n_items, 3, most), histories_of(*lists)
    together = sampler.draw(everyone, key)
    for row in range(len(lists)):
        alone = sampler.draw(everyone.select(np.array([row])), key)
        mine, theirs = alone.valid[0] > 0, together.valid[row] > 0
        assert alone.items[0][mine].tolist() == together.items[row][theirs].tolist()


@pytest.mark.statistical
def test_negatives_are_uniform() -> None:
    history = list(range(0, 50, 5))
    sampler, alone = Sampler(50, 40, None), histories_of(history)
    counts = np.zeros(50)
    for key in range(100):
        batch = sampler.draw(alone, key)
        negatives = batch.items[0, 10:][batch.valid[0, 10:] > 0]
        np.add.at(counts, negatives, 1)
    assert not counts[history].any()
    fresh = np.delete(counts, history)
    assert fresh.sum() == pytest.approx(100 * 400 * 0.8, rel=0.02)
    assert stats.chisquare(fresh).pvalue > LEVEL
    skewed = fresh * np.linspace(0.9, 1.1, len(fresh))
    assert stats.chisquare(skewed * fresh.sum() / skewed.sum()).pvalue < LEVEL


@pytest.mark.statistical
@pytest.mark.parametrize("n", [2, 7, 1000])
def test_draws_are_uniform_for_each_user_and_over_keys(n: int) -> None:
    by_user = uniform(3, np.arange(2000), 25, n)
    by_key = np.array([uniform(key, np.array([8]), 25, n)[0] for key in range(2000)])
    for draws in (by_user, by_key):
        counts = np.bincount(draws.ravel(), minlength=n)
        assert stats.chisquare(counts).pvalue > LEVEL
        for one, two in ((draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:])):
            assert stats.pearsonr(one.ravel(), two.ravel()).pvalue > LEVEL


def test_each_user_and_key_has_its_own_draws() -> None:
    draws = uniform(1, np.array([4, 5]), 20, 2**20)
    again = uniform(1, np.array([5]), 30, 2**20)
    assert np.array_equal(draws[1], again[0, :20])
    assert not np.intersect1d(draws[0], draws[1]).size
    assert not np.intersect1d(draws[0], uniform(2, np.array([4]), 20, 2**20)[0]).size


@pytest.mark.statistical
def test_a_long_history_is_seen_through_a_window_at_a_uniform_place() -> None:
    history = [3, 1, 4, 15, 9, 2, 6]
    sampler, starts = Sampler(20, 1, 3), []
    for key in range(2000):
        batch = sampler.draw(histories_of(history), key)
        assert batch.positives == 3
        window = batch.items[0, :3].tolist()
        start = history.index(window[0])
        assert window == [history[(start + step) % 7] for step in range(3)]
        starts.append(start)
    assert stats.chisquare(np.bincount(starts, minlength=7)).pvalue > LEVEL


def test_a_history_within_the_cap_is_seen_whole() -> None:
    batch = Sampler(20, 1, 3).draw(histories_of([5, 6, 7], [9]), 1)
    assert sorted(batch.items[0, :3]) == [5, 6, 7]
    assert batch.valid[:, :3].sum(1).tolist() == [3, 1]


def test_a_history_outside_the_window_gives_no_negatives() -> None:
    history = list(range(15))
    for key in range(30):
        batch = Sampler(20, 8, 2).draw(histories_of(history), key)
        negatives = batch.items[0, 2:][batch.valid[0, 2:] > 0]
        assert not set(negatives) & set(history)


def test_who_has_seen_everything_has_no_negatives() -> None:
    batch = Sampler(6, 3, None).draw(histories_of(list(range(6))), 5)
    assert batch.valid[0].tolist() == [1] * 6 + [0] * 18


def test_the_whole_catalogue_is_marked_by_the_history() -> None:
    batch = Sampler(8, 3, 2, whole=True).draw(histories_of([1, 5, 7], []), 5)
    assert batch.items.tolist() == [list(range(8))]
    assert batch.valid.tolist() == [[0, 1, 0, 0, 0, 1, 0, 1], [0] * 8]
    assert batch.positives == 0


@pytest.mark.parametrize("recency", [0.0, 0.5, 2.0])
def test_the_last_items_of_a_history_count_more(recency: float) -> None:
    """The k-th last counts ``k ** -recency``, drawn or whole, and its own negatives with it."""
    histories = histories_of([4, 6, 1], [2], [])
    expected = {(0, 4): 3, (0, 6): 2, (0, 1): 1, (1, 2): 1}
    expected = {place: k**-recency for place, k in expected.items()}
    whole = Sampler(8, 0, None, whole=True, recency=recency).draw(histories, 5).valid
    found = {(int(row), int(item)): whole[row, item] for row, item in np.argwhere(whole)}
    assert found == pytest.approx(expected)
    batch = Sampler(50, 2, None, recency=recency).draw(histories, 5)
    for row, history in enumerate(([4, 6, 1], [2], [])):
        positives, negatives = batch.valid[row, :3], batch.valid[row, 3:].reshape(3, 2)
        counted = dict(
            zip(batch.items[row, :3][positives > 0], positives[positives > 0], strict=True)
        )
        assert counted == pytest.approx({item: expected[row, item] for item in history})
        assert set((negatives - positives[:, None])[negatives > 0]) <= {0.0}
        assert not negatives[positives == 0].any()


def test_histories_are_selected_in_the_order_asked() -> None:
    chosen = histories_of([1, 2], [], [3], [4, 5, 6]).select(np.array([3, 1, 0]))
    assert chosen.users.tolist() == [3, 1, 0]
    assert chosen.lengths.tolist() == [3, 0, 2]
    assert chosen.items.tolist() == [4, 5, 6, 1, 2]
