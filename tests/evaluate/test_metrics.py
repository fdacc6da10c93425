from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from privrec.data.interactions import Interactions, ItemLists, Split, leave_last_out
from privrec.errors import DataError
from privrec.evaluate import metrics
from privrec.evaluate.metrics import Scores, evaluate, popularity_scores

BOTH = ("hr@10", "ndcg@10", "full_hr@10", "full_ndcg@10", "full_recall@10")


def split_of(n_users: int = 40, n_items: int = 200, length: int = 12, seed: int = 0) -> Split:
    rng = np.random.default_rng(seed)
    items = np.argsort(rng.random((n_users, n_items)), axis=1)[:, :length]
    users = np.repeat(np.arange(n_users), length)
    data = Interactions.from_pairs(users, items.ravel(), item_ids=np.arange(n_items))
    return leave_last_out(data, holdout="test")


def from_table(table: NDArray[Any]) -> Scores:
    def scores(users: NDArray[Any], candidates: NDArray[Any] | None, /) -> NDArray[Any]:
        rows = table[users]
        return rows if candidates is None else np.take_along_axis(rows, candidates, axis=1)

    return scores


def truth(split: Split) -> NDArray[np.float32]:
    table = np.zeros((split.train.n_users, split.train.n_items), np.float32)
    rows = np.repeat(np.arange(split.train.n_users), split.heldout.counts)
    table[rows, split.heldout.items] = 1
    return table


def test_a_perfect_ranking_earns_everything() -> None:
    split = split_of()
    noise = np.random.default_rng(1).random((40, 200), dtype=np.float32) * 0.5
    summary = evaluate(from_table(truth(split) + noise), split, seed=0).summary()
    assert summary == dict.fromkeys(BOTH, 1.0)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf])
def test_a_constant_score_earns_nothing(value: float) -> None:
    split = split_of()
    table = np.full((40, 200), value, np.float32)
    assert set(evaluate(from_table(table), split, seed=0).summary().values()) == {0.0}


def test_a_nan_for_the_target_or_an_item_before_it_counts_against() -> None:
    split = split_of(n_users=1, n_items=112, length=12)
    table = truth(split)
    table[truth(split) == 1] = np.nan
    assert evaluate(from_table(table), split, seed=0).summary()["full_hr@10"] == 0.0
    table = truth(split)
    unseen = np.setdiff1d(np.arange(112), [*split.train.history(0), *split.heldout.history(0)])
    table[0, unseen[:3]] = np.nan
    summary = evaluate(from_table(table), split, seed=0, k=(3, 4)).summary()
    assert (summary["hr@3"], summary["hr@4"]) == (0.0, 1.0)
    assert (summary["full_hr@3"], summary["full_hr@4"]) == (0.0, 1.0)
    assert summary["ndcg@4"] == pytest.approx(1 / np.log2(5))


def test_in_a_short_catalogue_a_score_that_is_no_number_is_not_a_hit() -> None:
    train = Interactions.from_pairs([0], [0], item_ids=np.arange(4))
    split = Split(train, ItemLists(np.array([0, 1]), np.array([2], np.int32)), None, "test")
    for value, hit in ((0.0, 1.0), (np.nan, 0.0), (-np.inf, 0.0)):
        table = np.array([[0.0, 1.0, value, 2.0]], np.float32)
        assert evaluate(from_table(table), split, seed=0).summary()["full_hr@10"] == hit


def by_hand(table: NDArray[Any], split: Split, k: int) -> dict[str, list[float]]:
    """Full ranking by sorting, with ties against the held-out items."""
    found: dict[str, list[float]] = {"hr": [], "ndcg": [], "recall": []}
    for user in range(split.train.n_users):
        targets = split.heldout.history(user).tolist()
        if not targets:
            continue
        open_items = set(range(split.train.n_items)) - set(split.train.history(user).tolist())
        ranks = [
            sum(table[user, other] >= table[user, item] for other in open_items) - 1
            for item in targets
        ]
        hits = [rank for rank in ranks if rank < k]
        ideal = sum(1 / np.log2(place + 2) for place in range(min(k, len(targets))))
        found["hr"].append(float(bool(hits)))
        found["ndcg"].append(sum(1 / np.log2(rank + 2) for rank in hits) / ideal)
        found["recall"].append(len(hits) / len(targets))
    return found


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    levels=st.integers(2, 60),
    n_items=st.integers(8, 60),
    k=st.integers(1, 12),
)
def test_full_ranking_is_what_sorting_gives(seed: int, levels: int, n_items: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    kept = rng.random((7, n_items)) < 0.5
    kept[:, 0] = True
    users, items = np.nonzero(kept)
    train = Interactions.from_pairs(users, items, item_ids=np.arange(n_items))
    held = ~kept & (rng.random(kept.shape) < 0.3)
    held[0, ~kept[0]] = True
    users, items = np.nonzero(held)
    indptr = np.concatenate(([0], np.cumsum(held.sum(axis=1))))
    split = Split(train, ItemLists(indptr, items.astype(np.int32)), None, "test")
    if not split.heldout.size:
        return
    table = rng.integers(0, levels, kept.shape).astype(np.float32)
    found = evaluate(from_table(table), split, seed=0, k=(k,), protocols=("full",))
    for name, values in by_hand(table, split, k).items():
        assert found.values[f"full_{name}@{k}"].tolist() == pytest.approx(values)


def negatives_of(split: Split, seed: int = 0) -> NDArray[np.int64]:
    return metrics._Candidates(split, seed).of(np.arange(split.train.n_users))


@pytest.mark.parametrize("n_items", [130, 400, 5000])
def test_negatives_are_distinct_and_unseen(n_items: int) -> None:
    split = split_of(n_users=60, n_items=n_items, length=30)
    drawn = negatives_of(split)
    assert drawn.shape == (60, 100)
    assert drawn[:, 0].tolist() == split.heldout.items.tolist()
    for user, row in enumerate(drawn):
        assert len(set(row.tolist())) == 100
        assert not set(row.tolist()) & set(split.train.history(user).tolist())
    assert negatives_of(split, 1).tolist() != drawn.tolist()


def test_a_short_catalogue_gives_all_it_has() -> None:
    split = split_of(n_users=5, n_items=60, length=20)
    drawn = negatives_of(split)
    for user, row in enumerate(drawn):
        left = set(range(60)) - set(split.train.history(user).tolist())
        assert set(row[row >= 0].tolist()) == left
        assert (row < 0).sum() == 59
    perfect = evaluate(from_table(truth(split)), split, seed=0).summary()
    assert perfect["hr@10"] == 1.0


@pytest.mark.statistical
@pytest.mark.parametrize("n_items", [130, 1000])
def test_negatives_are_uniform_over_the_unseen(n_items: int) -> None:
    n_users = 3000
    users = np.repeat(np.arange(n_users), 3)
    items = np.tile([4, 7, 9], n_users)
    data = Interactions.from_pairs(users, items, item_ids=np.arange(n_items))
    drawn = negatives_of(leave_last_out(data, holdout="test"))[:, 1:]
    counts = np.bincount(drawn.ravel(), minlength=n_items)
    assert counts[[4, 7, 9]].tolist() == [0, 0, 0]
    p = 99 / (n_items - 3)
    z = (np.delete(counts, [4, 7, 9]) - n_users * p) / np.sqrt(n_users * p * (1 - p))
    assert abs(z).max() < 5
    assert 0.8 < z.std() < 1.2


def test_a_user_has_the_same_negatives_in_every_call() -> None:
    split = split_of(n_users=30)
    table = np.random.default_rng(3).random((30, 200)).astype(np.float32)
    whole = evaluate(from_table(table), split, seed=5)
    parts = evaluate(from_table(table), split, seed=5, chunk=7)
    some = evaluate(from_table(table), split, seed=5, users=np.array([4, 21, 22]))
    for name, values in whole.values.items():
        assert parts.values[name].tolist() == values.tolist()
        assert some.values[name].tolist() == values[[4, 21, 22]].tolist()


@pytest.mark.parametrize("n_items", [105, 130, 1000])
def test_whoever_is_asked_for_has_the_negatives_of_the_whole_block(n_items: int) -> None:
    split, users = split_of(n_users=40, n_items=n_items), np.array([3, 4, 17, 39])
    some = metrics._Candidates(split, 0).of(users)
    assert some.tolist() == negatives_of(split)[users].tolist()


@pytest.mark.statistical
def test_who_is_measured_is_drawn_uniformly() -> None:
    users = np.flatnonzero(np.arange(100) % 3)
    drawn = [metrics.some(users, 20, seed) for seed in range(2000)]
    assert all(np.all(np.diff(each) > 0) for each in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=100)
    p = 20 / users.size
    z = (counts[users] - 2000 * p) / np.sqrt(2000 * p * (1 - p))
    assert abs(z).max() < 5
    assert counts.sum() == counts[users].sum() == 40_000
    assert metrics.some(users, 67, 0) is users
    assert drawn[7].tolist() == metrics.some(users, 20, 7).tolist()


def test_blocks_of_users_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_BLOCK", 8)
    split = split_of(n_users=30)
    drawn = negatives_of(split)
    for user, row in enumerate(drawn):
        assert not set(row.tolist()) & set(split.train.history(user).tolist())


def test_sampled_rank_is_that_among_the_candidates() -> None:
    split = split_of(n_users=25, n_items=300)
    table = np.random.default_rng(2).random((25, 300)).astype(np.float32)
    found = evaluate(from_table(table), split, seed=0, k=(50,), protocols=("sampled",))
    for user, row in enumerate(negatives_of(split)):
        rank = int((table[user, row[1:]] >= table[user, row[0]]).sum())
        gain = 1 / np.log2(rank + 2) if rank < 50 else 0.0
        assert found.values["hr@50"][user] == (rank < 50)
        assert found.values["ndcg@50"][user] == pytest.approx(gain)
    assert set(found.values) == {"hr@50", "ndcg@50"}


def published(split: Split, rows: NDArray[Any]) -> Split:
    return Split(split.train, split.heldout, rows.astype(np.int32), "test")


def test_published_negatives_are_used_and_own_items_left_out() -> None:
    split = split_of(n_users=2, n_items=300)
    rows = np.array(
        [np.setdiff1d(np.arange(300), [*split.train.history(u), *split.heldout.history(u)])[:99]
         for u in range(2)]
    )  # fmt: skip
    rows[0, :12] = [*split.train.history(0), split.heldout.history(0)[0]]
    table = np.zeros((2, 300), np.float32)
    table[0, rows[0, :11]] = 9.0  # the user's own items are ahead, and are no rivals
    table[np.arange(2), split.heldout.items] = 5.0
    table[1, rows[1, :10]] = 7.0  # ten true rivals are
    found = evaluate(from_table(table), published(split, rows), seed=0, protocols=("sampled",))
    assert found.values["hr@10"].tolist() == [1.0, 0.0]


def test_several_heldout_items_have_no_sampled_protocol() -> None:
    train = Interactions.from_pairs([0, 1], [0, 1], item_ids=np.arange(6))
    lists = ItemLists(np.array([0, 2, 3]), np.array([3, 4, 5], np.int32))
    table = np.arange(12, dtype=np.float32).reshape(2, 6)
    summary = evaluate(from_table(table), Split(train, lists, None, "test"), seed=0).summary()
    assert set(summary) == {"full_hr@10", "full_ndcg@10", "full_recall@10"}


def test_users_without_a_heldout_item_are_not_measured() -> None:
    data = Interactions.from_pairs([0, 1, 1], [0, 1, 2], item_ids=np.arange(5))
    split = leave_last_out(data, holdout="test")
    found = evaluate(popularity_scores(split.train), split, seed=0)
    assert found.users.tolist() == [1]
    with pytest.raises(DataError, match="no user holds out"):
        evaluate(popularity_scores(split.train), split, seed=0, users=np.array([0]))


def test_popularity_ranks_by_count_and_breaks_ties() -> None:
    train = Interactions.from_pairs([0, 1, 2, 0], [1, 1, 2, 3], item_ids=np.arange(5))
    scores = popularity_scores(train)
    row = np.asarray(scores(np.array([0]), None))[0]
    assert np.argsort(-row).tolist()[0] == 1
    assert len(set(row.tolist())) == 5
    candidates = np.array([[3, 1], [0, 2]])
    assert np.asarray(scores(np.array([0, 1]), candidates)).tolist() == row[candidates].tolist()


def test_scores_of_the_caller_are_not_changed() -> None:
    split = split_of()
    table = np.random.default_rng(0).random((40, 200)).astype(np.float32)
    before = table.copy()
    evaluate(lambda users, items: table if items is None else table[:, :100], split, seed=0)
    assert (table == before).all()


def test_intervals_repeat_and_hold_the_mean() -> None:
    split = split_of(n_users=300)
    found = evaluate(from_table(np.random.default_rng(5).random((300, 200))), split, seed=0)
    first, again = found.intervals(7), found.intervals(7)
    assert first == again
    assert first != found.intervals(8)
    for name, (low, high) in first.items():
        assert low <= found.summary()[name] <= high


@pytest.mark.statistical
def test_intervals_are_as_wide_as_the_normal_ones() -> None:
    rng = np.random.default_rng(0)
    values = (rng.random(2000) < 0.3).astype(np.float64)
    found = metrics.Evaluation(np.arange(2000), {"hr@10": values})
    low, high = found.intervals(0, draws=4000)["hr@10"]
    width = 2 * 1.96 * np.sqrt(values.var() / 2000)
    assert (high - low) / width == pytest.approx(1, abs=0.06)
    low, high = found.intervals(0, level=0.5, draws=4000)["hr@10"]
    assert (high - low) / width == pytest.approx(0.6745 / 1.96, abs=0.03)


def test_resampling_in_steps_is_resampling_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = metrics.Evaluation(np.arange(20), {"a": np.arange(20.0), "b": np.ones(20)})
    at_once = found.intervals(0, draws=7)
    monkeypatch.setattr(metrics, "_CELLS", 50)
    assert found.intervals(0, draws=7) == at_once
    assert at_once["a"][0] < 9.5 < at_once["a"][1]
