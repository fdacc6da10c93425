from __future__ import annotations

import time

import numpy as np
import pytest
from data_of import data_of
from oracle import expected_hr, oracle_of
from small_runs import make_scenario

from privrec.data.interactions import leave_last_out
from privrec.data.synthetic import Planted, generate
from privrec.errors import ScenarioError
from privrec.evaluate.metrics import evaluate, popularity_scores

SIZES = {"users": 400, "items": 300, "clusters": 8, "interactions_per_user": 30}


def planted(seed: int = 0, **sizes: int) -> Planted:
    return generate(data_of("synthetic", seed=seed, **(SIZES | sizes)))


def test_the_same_seed_gives_the_same_data_and_another_gives_other_data() -> None:
    first, again, other = planted(1), planted(1), planted(2)
    assert first.interactions.items.tolist() == again.interactions.items.tolist()
    assert first.interactions.times is not None
    assert again.interactions.times is not None
    assert first.interactions.times.tolist() == again.interactions.times.tolist()
    assert first.interactions.items.tolist() != other.interactions.items.tolist()


def test_histories_are_as_asked() -> None:
    data = planted().interactions
    assert (data.n_users, data.n_items) == (400, 300)
    assert data.counts.min() >= 2
    assert 27 < data.counts.mean() < 33
    assert data.times is not None
    steps = np.diff(data.times)[np.diff(data.users) == 0]
    assert (steps > 0).all()
    assert data.titles is not None
    assert len(data.titles) == len(set(data.titles)) == 300


def test_popularity_is_a_power_law_and_groups_are_even() -> None:
    made = planted(users=4000)
    counts = np.sort(made.interactions.item_counts())[::-1]
    assert counts[:30].sum() > 0.25 * counts.sum()
    assert np.bincount(made.item_groups).min() >= 300 // 8
    own = made.user_groups[made.interactions.users] == made.item_groups[made.interactions.items]
    assert 0.5 < own.mean() < 0.8


def test_chunks_of_users_do_not_change_the_first_items(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = planted()
    monkeypatch.setattr("privrec.data.synthetic._DRAWS", 300)
    assert planted().interactions.items.tolist() == whole.interactions.items.tolist()


@pytest.mark.statistical
def test_the_oracle_reaches_its_expected_hit_ratio_and_nothing_else_does() -> None:
    made = planted(users=4000)
    split = leave_last_out(made.interactions, holdout="test")
    expected = expected_hr(made, split, 10)
    reached = evaluate(oracle_of(made), split, seed=0, protocols=("full",)).summary()["full_hr@10"]
    # A mean of 4,000 independent hits: standard deviation below 0.0079.
    assert abs(reached - expected) < 4 * 0.0079
    popular = evaluate(popularity_scores(split.train), split, seed=0, protocols=("full",))
    assert popular.summary()["full_hr@10"] < expected - 0.1


@pytest.mark.statistical
@pytest.mark.parametrize("clusters", [1, 2])
def test_the_order_of_a_history_is_that_of_successive_draws(clusters: int) -> None:
    made = planted(3, users=60_000, items=4, clusters=clusters, interactions_per_user=2)
    data = made.interactions
    first, second = data.items[data.indptr[:-1]], data.items[data.indptr[:-1] + 1]
    for group in range(clusters):
        own = made.user_groups == group
        weights = made.weights(np.flatnonzero(own)[:1])[0]
        p = weights / weights.sum()
        for a in range(4):
            for b in range(4):
                chance = 0.0 if a == b else p[a] * p[b] / (1 - p[a])
                share = ((first == a) & (second == b))[own].mean()
                assert abs(share - chance) < 5 * np.sqrt(0.25 / own.sum())


def test_no_history_has_an_item_twice_however_much_of_the_catalogue_it_takes() -> None:
    data = planted(1, users=50, items=200, interactions_per_user=100).interactions
    pairs = data.users * 200 + data.items
    assert np.unique(pairs).size == data.size
    assert data.counts.max() == 100


def test_the_work_is_linear_in_interactions_whatever_the_catalogue() -> None:
    begin = time.process_time()
    sizes = {"users": 20_000, "items": 1_000_000, "clusters": 1000, "interactions_per_user": 20}
    data = planted(**sizes).interactions
    # A draw for each of the 2 * 10^10 pairs would take minutes.
    assert time.process_time() - begin < 20
    assert (data.n_users, data.n_items) == (20_000, 1_000_000)


def test_expected_hit_ratio_by_hand() -> None:
    made = planted(users=50)
    split = leave_last_out(made.interactions, holdout="test")
    total = 0.0
    for user in range(50):
        weights = made.weights(np.array([user]))[0]
        weights[split.train.history(user)] = 0
        total += np.sort(weights)[-5:].sum() / weights.sum()
    assert expected_hr(made, split, 5) == pytest.approx(total / 50)
    assert expected_hr(made, split, 300) == pytest.approx(1.0)


def test_oracle_scores_of_candidates_are_those_of_the_catalogue() -> None:
    made = planted(users=50)
    users, candidates = np.array([4, 9]), np.array([[5, 0, 17], [2, 2, 299]])
    whole = oracle_of(made)(users, None)
    assert whole.shape == (2, 300)
    picked = np.take_along_axis(whole, candidates, axis=1)
    assert oracle_of(made)(users, candidates).tolist() == picked.tolist()


@pytest.mark.parametrize(
    "wrong",
    [
        {"clusters": 0},
        {"clusters": 301},
        {"users": 0},
        {"interactions_per_user": 1},
        {"interactions_per_user": 151},
    ],
)
def test_numbers_that_do_not_fit_are_refused(wrong: dict[str, int]) -> None:
    changes = [f"data.{key}={value}" for key, value in (SIZES | wrong).items()]
    with pytest.raises(ScenarioError, match=rf"data\.{next(iter(wrong))} = "):
        make_scenario('name = "plain"\n[privacy]\nnoise = "none"\n', *changes)
