"""A cohort trains as its devices would one by one, and nobody in it hears of the others."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from on_devices import trained_rows

from privrec.device.device import TOLERANCE, Draws
from privrec.device.recommender import SAMPLES_IN_BATCH
from privrec.device.samples import Histories

CASES = list(itertools.product(["gmf", "mlp", "neumf"], ["bce", "bpr", "softmax", "full_softmax"]))


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> bool:
    scale = max(float(np.abs(expected).max()), 1e-30)
    return float(np.abs(found - expected).max()) <= tolerance * scale


@pytest.mark.parametrize("max_samples", [None, 4])
@pytest.mark.parametrize("compression", [1.0, 8.0])
@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize(("kind", "loss"), CASES)
def test_a_cohort_agrees_with_each_device_alone(
    double_lab, vector, kind, loss, local_steps, compression, max_samples
) -> None:
    here = double_lab(
        kind, compression, loss=loss, local_steps=local_steps, max_samples=max_samples
    )
    together = here.together()
    assert sorted(together) == here.users.tolist()
    moved = 0
    for user in here.users:
        alone = here.alone(int(user))
        update, state, mean_loss = together[int(user)]
        expected = vector(alone.update)
        assert close(update, expected, 1e-9), f"user {user}"
        assert np.allclose(state, alone.states[0], rtol=1e-9, atol=1e-9)
        assert mean_loss == pytest.approx(alone.losses[0], rel=1e-9, abs=1e-9)
        moved += bool(np.abs(expected).max() > 1e-3)
    assert (
        moved >= len(here.users) - 1
    )  # all but the device without a history have something to say


@pytest.mark.parametrize(("kind", "loss"), CASES)
def test_they_agree_to_the_tolerance_in_single_precision(
    lab, vector, monkeypatch, kind, loss
) -> None:
    """Left out is whoever comes so near a kink that rounding may take it to the other side."""
    nearest, relu = np.inf, torch.relu

    def noted(values: torch.Tensor) -> torch.Tensor:
        nonlocal nearest
        nearest = min(nearest, float(values.detach().abs().min()))
        return relu(values)

    here = lab(kind, 8.0, loss=loss, local_steps=3)
    together, compared = here.together(), 0
    monkeypatch.setattr("torch.relu", noted)
    for user in here.users:
        nearest = np.inf
        alone = here.alone(int(user))
        if nearest < 1e-4:
            continue
        update, state, mean_loss = together[int(user)]
        assert close(update, vector(alone.update)), f"user {user}"
        assert np.allclose(state, alone.states[0], rtol=1e-3, atol=1e-4)
        assert mean_loss == pytest.approx(alone.losses[0], rel=1e-3, abs=1e-6)
        compared += 1
    assert compared >= len(here.users) / 2


@pytest.mark.parametrize("loss", ["ials", "full_softmax"])
@pytest.mark.parametrize("compression", [1.0, 8.0])
def test_a_cohort_agrees_with_each_device_alone_where_all_items_count(
    lab, vector, compression, loss
) -> None:
    """Implicit ALS: the Gram matrix that a cohort works out once, each device works out itself."""
    here = lab("gmf", compression, item_bias=False, loss=loss)
    together = here.together()
    for user in here.users:
        alone = here.alone(int(user))
        update, state, mean_loss = together[int(user)]
        assert close(update, vector(alone.update)), f"user {user}"
        assert np.allclose(state, alone.states[0], rtol=1e-3, atol=1e-4)
        assert mean_loss == pytest.approx(alone.losses[0], rel=1e-3, abs=1e-6)
        assert np.abs(update).max() > 1e-3 or not len(here.histories[user])


@pytest.mark.parametrize("held", [0, 1, 8, 29, 30])
def test_a_cohort_trains_on_what_its_memory_holds(lab, held) -> None:
    """Items are dropped by number, none moves to another user, nobody is lost."""
    here = lab()
    indptr = np.cumsum([0, *map(len, here.histories)])
    everyone = Histories(here.users, indptr, np.concatenate(here.histories))
    left = everyone.below(held)
    assert np.array_equal(left.users, here.users)
    for user, history in enumerate(here.histories):
        kept = left.items[left.indptr[user] : left.indptr[user + 1]]
        assert kept.tolist() == [item for item in history if item < held]
    assert left.indptr[-1] == len(left.items)


@pytest.mark.parametrize("compression", [1.0, 8.0])
def test_nothing_of_another_device_moves_a_device(lab, compression) -> None:
    here = lab("neumf", compression, local_steps=2)
    before = here.together()
    me = 3
    here.states[np.arange(len(here.users)) != me] += 1
    for user in here.users:
        if user != me:  # of the same length, so that not even the padding changes
            here.histories[user] = (29 - here.histories[user]).astype(np.int32)
    after = here.together()
    for one, two in zip(before[me], after[me], strict=True):
        assert np.array_equal(one, two)
    assert not np.array_equal(before[0][0], after[0][0])


def test_a_device_in_smaller_company_trains_the_same(lab) -> None:
    here = lab("gmf", 8.0)
    everyone = here.together()
    here.histories[6] = here.histories[6][:1]  # the longest, which sets the padding
    fewer = here.together()
    for user in (0, 3, 5):
        assert close(fewer[user][0], everyone[user][0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("kind", ["gmf", "neumf"])
def test_a_broken_device_breaks_no_other(lab, kind, bad) -> None:
    here = lab(kind)
    sound = here.together()
    here.states[3, 0] = bad
    found = here.together()
    for user in here.users:
        if user != 3:
            assert close(found[int(user)][0], sound[int(user)][0])


def test_training_changes_neither_weights_nor_states(lab) -> None:
    here = lab("neumf", 8.0, local_steps=2)
    weights, cohort = here.weights.copy(), here.cohort
    for _ in trained_rows(cohort, here.weights, here.users, Draws(here.key)):
        pass
    assert np.array_equal(here.weights, weights)
    assert np.array_equal(cohort.states, here.states)


def test_batches_hold_every_user_once_within_the_cache(lab) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 30, size=1000)
    histories = [rng.permutation(30)[:n].astype(np.int32) for n in lengths]
    cohort = lab(histories=histories, negatives=50).cohort
    users = rng.permutation(1000)[:900]
    batches = [users[places] for places in cohort.learner.batches(lengths[users])]
    assert len(batches) > 2
    assert sorted(np.concatenate(batches)) == sorted(users)
    for batch in batches:
        padded = len(batch) * cohort.learner.sampler.width(lengths[batch]).max()
        assert padded <= SAMPLES_IN_BATCH or len(batch) == 1


def test_a_cohort_of_nobody_has_no_batches(lab) -> None:
    here = lab()
    assert list(trained_rows(here.cohort, here.weights, np.zeros(0, np.int64), Draws(1))) == []


def test_serving_in_a_cohort_is_serving_alone(lab) -> None:
    here = lab("neumf")
    cohort = here.cohort
    served = here.learner.serve(here.weights, cohort.data, Draws(here.key))
    assert served.shape == cohort.states.shape
    assert np.array_equal(cohort.states, here.states)  # a fit of its own
    for user in here.users:
        alone = here.serve(int(user))
        assert np.allclose(served[user], alone, rtol=1e-3, atol=1e-4)
        assert np.abs(alone).max() > 0.01 or not len(here.histories[user])
