from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privrec.data.interactions import (
    Interactions,
    Split,
    hold_out_some,
    leave_last_out,
    position_of,
)
from privrec.errors import DataError, UnknownIdError, UsageError


def small() -> Interactions:
    users = [7, 3, 7, 3, 7, 9]
    items = [50, 40, 40, 60, 60, 40]
    times = [30, 10, 10, 20, 20, 5]
    return Interactions.from_pairs(users, items, times)


def heldout_of(split: Split) -> list[list[int]]:
    return [split.heldout.history(user).tolist() for user in range(split.train.n_users)]


def test_rows_are_sorted_by_user_and_time() -> None:
    data = small()
    assert data.user_ids.tolist() == [3, 7, 9]
    assert data.item_ids.tolist() == [40, 50, 60]
    assert [data.history(user).tolist() for user in range(3)] == [[0, 2], [0, 2, 1], [0]]
    assert data.times is not None
    assert data.times.tolist() == [10, 20, 10, 20, 30, 5]
    assert data.users.tolist() == [0, 0, 1, 1, 1, 2]
    assert (data.n_users, data.n_items, data.size) == (3, 3, 6)
    assert data.item_counts().tolist() == [3, 1, 2]


def test_dtypes_are_the_contract() -> None:
    data = small()
    assert (data.indptr.dtype, data.items.dtype) == (np.int64, np.int32)
    assert data.times is not None
    assert data.times.dtype == np.int64
    assert np.shares_memory(data.history(1), data.items)


def test_equal_times_keep_the_order_of_the_rows() -> None:
    data = Interactions.from_pairs([0, 0, 0, 0], [5, 3, 9, 1], [1, 0, 1, 1])
    assert data.item_ids[data.history(0)].tolist() == [3, 5, 9, 1]


def test_without_times_the_rows_are_the_order() -> None:
    data = Interactions.from_pairs([1, 0, 1, 0], [5, 3, 2, 1])
    assert data.times is None
    assert data.item_ids[data.items].tolist() == [3, 1, 5, 2]


def test_text_ids_and_listed_items() -> None:
    data = Interactions.from_pairs(
        ["b", "a"], ["y", "x"], item_ids=["z", "y", "x"], titles=("Z", "Y", "X")
    )
    assert data.user_ids.tolist() == ["a", "b"]
    assert data.items.tolist() == [2, 1]
    assert data.n_items == 3
    assert position_of("z", data.item_ids, "item") == 0


def test_small_and_large_integer_ids_are_numbered_alike() -> None:
    raw = np.array([9, 2, 9, 4])
    items = np.array([0, 0, 1, 0])
    near = Interactions.from_pairs(raw, items)
    far = Interactions.from_pairs(raw * 10**12, items)
    assert near.user_ids.tolist() == [2, 4, 9]
    assert (far.user_ids // 10**12).tolist() == [2, 4, 9]
    assert near.indptr.tolist() == far.indptr.tolist()
    assert near.items.tolist() == far.items.tolist()


@pytest.mark.parametrize(("wanted", "index"), [(7, 1), ("7", 1), (np.int64(9), 2)])
def test_ids_are_found_as_numbers_or_text(wanted: int | str, index: int) -> None:
    assert position_of(wanted, small().user_ids, "user") == index


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (8, "the nearest is 7"),
        (10**30, "the nearest is 9"),
        ("eight", "between 3 and 9"),
        ("", "between 3 and 9"),
        (-1, "the nearest is 3"),
    ],
)
def test_an_unknown_user_is_refused_with_a_remedy(wanted: int | str, said: str) -> None:
    with pytest.raises(UnknownIdError, match=said) as caught:
        position_of(wanted, small().user_ids, "user")
    assert str(wanted) in str(caught.value)


def test_an_unknown_text_id_suggests_one_like_it() -> None:
    data = Interactions.from_pairs([1, 1], ["alien", "heat"])
    with pytest.raises(UnknownIdError, match="'alien'"):
        position_of("aliens", data.item_ids, "item")


def test_a_repeated_pair_names_both_rows() -> None:
    with pytest.raises(DataError, match=r"row 4.*user 7, item 50.*row 1"):
        Interactions.from_pairs([7, 3, 7, 7], [50, 50, 40, 50])


def test_an_empty_table_and_a_stranger_are_refused() -> None:
    with pytest.raises(DataError, match="no interactions"):
        Interactions.from_pairs([], [])
    with pytest.raises(DataError, match="row 2: item 9 is not"):
        Interactions.from_pairs([0, 0], [1, 9], item_ids=[0, 1])


def test_most_recent_keeps_the_end_of_each_history() -> None:
    kept = small().most_recent(2)
    assert [kept.history(user).tolist() for user in range(3)] == [[0, 2], [2, 1], [0]]
    assert kept.n_items == 3


def test_rows_of_some_users() -> None:
    rows, items = small().rows_of(np.array([2, 1]))
    assert rows.tolist() == [0, 1, 1, 1]
    assert items.tolist() == [0, 0, 2, 1]


def test_leave_last_out_takes_the_latest() -> None:
    split = leave_last_out(small(), holdout="test")
    assert heldout_of(split) == [[2], [1], []]
    assert [split.train.history(user).tolist() for user in range(3)] == [[0], [0, 2], [0]]
    assert split.holdout == "test"
    assert split.heldout.single


def test_validation_never_sees_the_test_item() -> None:
    split = leave_last_out(small(), holdout="validation")
    assert heldout_of(split) == [[], [2], []]
    assert [split.train.history(user).tolist() for user in range(3)] == [[0], [0], [0]]


def test_an_unknown_holdout_is_refused() -> None:
    with pytest.raises(UsageError, match="'test' or 'validation'"):
        leave_last_out(small(), holdout="train")  # type: ignore[arg-type]


pairs = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=40, unique=True
)


@settings(deadline=None, max_examples=60)
@given(pairs, st.booleans())
def test_a_split_loses_and_invents_nothing(rows: list[tuple[int, int]], timed: bool) -> None:
    users, items = np.array(rows).T
    data = Interactions.from_pairs(users, items, users * 3 % 5 if timed else None)
    split = leave_last_out(data, holdout="test")
    for user in range(data.n_users):
        whole = [*split.train.history(user), *split.heldout.history(user)]
        assert whole == data.history(user).tolist()
        assert split.train.history(user).size >= 1
        assert split.heldout.history(user).size == (data.history(user).size >= 2)


def test_a_random_holdout_is_stable_uniform_and_leaves_one() -> None:
    users = np.repeat(np.arange(2000), 5)
    data = Interactions.from_pairs(users, np.tile(np.arange(5), 2000))
    split = hold_out_some(data, np.full(2000, 1))
    again = hold_out_some(data, np.full(2000, 1))
    assert split.heldout.items.tolist() == again.heldout.items.tolist()
    chosen = np.bincount(split.heldout.items, minlength=5)
    # 2000 draws over 5 places: 400 each with standard deviation 18.
    assert abs(chosen - 400).max() < 90
    assert hold_out_some(data, np.full(2000, 99)).train.counts.tolist() == [1] * 2000


def test_pairs_that_occur_are_told_from_others() -> None:
    found = small().contains(np.arange(3)[:, None], np.arange(3)[None, :])
    assert found.tolist() == [[True, False, True], [True, True, True], [True, False, False]]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(2, 12), st.integers(0, 2**32))
def test_renumbering_keeps_every_interaction_title_and_held_out_item(
    users: int, items: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pairs = [
        (u, i) for u in range(users) for i in rng.permutation(items)[: rng.integers(2, items + 1)]
    ]
    ids = np.arange(items) * 10
    whole = Interactions.from_pairs(
        [user for user, _ in pairs],
        [int(ids[item]) for _, item in pairs],
        rng.permutation(len(pairs)),
        item_ids=ids,
        titles=[f"title {number}" for number in ids],
    )
    split = leave_last_out(whole, holdout="test")
    negatives = rng.integers(-1, items, size=(split.train.n_users, 3)).astype(np.int32)
    split = Split(split.train, split.heldout, negatives, "test")
    order = rng.permutation(items)
    other = split.renumbered(order)
    assert np.array_equal(other.train.item_ids, ids[order])
    assert other.train.titles == tuple(f"title {number}" for number in ids[order])
    for user in range(users):
        mine, theirs = split.train.history(user), other.train.history(user)
        assert np.array_equal(split.train.item_ids[mine], other.train.item_ids[theirs])
        kept, moved = split.heldout.history(user), other.heldout.history(user)
        assert np.array_equal(split.train.item_ids[kept], other.train.item_ids[moved])
    assert other.negatives is not None
    missing = negatives < 0
    assert np.array_equal(other.negatives < 0, missing)
    names = other.train.item_ids[other.negatives[~missing]]
    assert np.array_equal(names, ids[negatives[~missing]])
    for before, after in (
        (split.train.times, other.train.times),
        (split.train.indptr, other.train.indptr),
        (split.train.user_ids, other.train.user_ids),
    ):
        assert np.array_equal(before, after)
    assert (other.train.items.dtype, other.negatives.dtype) == (np.int32, np.int32)
    for number in range(items):
        assert (
            other.train.item_ids[position_of(int(ids[number]), other.train.item_ids, "item")]
            == ids[number]
        )
