"""Noise of examples in shares: no single example moves the integers by more than the bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from of_examples import ITEMS, recommender, settings_of

from privrec.device import example_shares
from privrec.device.device import Draws
from privrec.device.example_shares import ExampleShares, ExampleSums
from privrec.device.local import LocalModel
from privrec.device.recommender import RecommenderLearner
from privrec.device.samples import Histories
from privrec.device.tier import ModelView
from privrec.device.update import Address, Protection, SummedExamples
from privrec.errors import UsageError
from privrec.models.ncf import NCF
from privrec.randomness import SecretRoot
from privrec.secagg.ring import Encoding

REACH, RATE = 200, 0.1
SCALE = 2 * REACH / RATE  # a clip norm of 1
DRAWS = Draws(9, noise=lambda user, given: SecretRoot.known(b"%d" % user + given))


def sums_of(
    parts: ModelView[NCF], *histories: np.ndarray, seed: int = 0, scale: float = 1.0,
    loss: str = "bce", steps: int = 3, noise: float = 1.0, weights: np.ndarray | None = None,
    states: np.ndarray | None = None, draws: Draws = DRAWS,
) -> ExampleSums:  # fmt: skip
    """Sums of devices that differ in their histories, and else do not depend on them."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(0, scale, parts.layout.size).astype(np.float32)
    private = rng.normal(0, scale, (1, parts.network.user_dim)).astype(np.float32)
    indptr = np.cumsum([0, *map(len, histories)])
    items = np.concatenate([np.zeros(0, np.int32), *histories]).astype(np.int32)
    data = Histories(np.arange(4, 4 + len(histories)), indptr, items)
    return ExampleSums(
        LocalModel(parts, drawn if weights is None else weights),
        settings_of(loss, steps, RATE), ExampleShares(REACH, SCALE, noise), data,
        np.repeat(private, len(histories), 0) if states is None else states, draws,
    )  # fmt: skip


def outputs(made: ExampleSums, most: float = 20.0) -> np.ndarray:
    """All that a round's noise is added to, of the first device: user vectors, then the sum.

    The states stay, as they do given what came before.
    """
    users = [made.add(np.flatnonzero(made.turns == step)) for step in range(3)]
    address = Address.whole(made._model.view.layout)
    protection = Protection(Encoding(1.0, address.layout.size, most))
    bounded = SummedExamples(made.shared(), address).bound(protection, None, (), None)
    assert np.abs(bounded.integers).max() <= 2**most
    return np.concatenate([*(each[0] for each in users), bounded.integers[0]]).astype(np.int64)


def squared(one: np.ndarray, other: np.ndarray) -> int:
    return int(((one - other) ** 2).sum())


histories = st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=20, unique=True)


@settings(max_examples=60, deadline=None)
@given(
    history=histories, place=st.integers(0, 100), instead=st.integers(0, ITEMS - 1),
    seed=st.integers(0, 2**31), scale=st.sampled_from([0.01, 1.0, 30.0]),
    loss=st.sampled_from(["bce", "bpr"]), kind=st.sampled_from(["gmf", "neumf", "mlp"]),
    compressed=st.booleans(), most=st.sampled_from([3.0, 6.0, 20.0]),
)  # fmt: skip
def test_removing_or_changing_an_example_moves_all_integers_by_at_most_the_bound(
    history, place, instead, seed, scale, loss, kind, compressed, most
):
    parts, items = recommender(kind, compressed=compressed), np.array(history)
    place %= len(items)

    def of(items: np.ndarray) -> np.ndarray:
        return outputs(sums_of(parts, items, seed=seed, scale=scale, loss=loss), most)

    whole = of(items)
    assert squared(whole, of(np.delete(items, place))) <= REACH**2
    if instead not in history:
        changed = items.copy()
        changed[place] = instead
        assert squared(whole, of(changed)) <= (2 * REACH) ** 2


def test_the_bound_is_reached_and_no_rounding_goes_beyond_it():
    largest = []
    for seed in range(20):
        whole, without = (
            outputs(sums_of(recommender(), np.arange(start, 12), seed=seed)) for start in (0, 1)
        )
        largest.append(squared(whole, without))
    assert 0.9 * REACH**2 < max(largest) <= REACH**2


def test_an_example_that_is_too_long_after_rounding_counts_as_none():
    """Whatever floats do: what is bounded is looked at as integers."""
    made = sums_of(recommender(), np.arange(12))
    raw = made._gradients(np.arange(12))
    assert made.bounded(raw).any(axis=1).all()
    raw.user[3] = np.nan
    raw.blocks[5] = np.inf
    bounded = made.bounded(raw)
    assert not bounded[[3, 5]].any()
    assert np.count_nonzero(bounded.any(axis=1)) == 10


def test_every_clipped_example_survives_its_rounding():
    """Clipping leaves room for rounding, so that no honest example is lost to the check."""
    for seed in range(20):
        made = sums_of(recommender(), np.arange(ITEMS), seed=seed)
        raw = made._gradients(np.arange(ITEMS))
        said = np.abs(raw.user.numpy()).max(axis=1) > 1e-2
        assert made.bounded(raw)[said].any(axis=1).all()


def test_what_floats_get_wrong_is_seen_in_the_integers(monkeypatch):
    """Clipped to twice the bound, as if norms were off by that much, no example gets through."""
    monkeypatch.setattr(example_shares, "_SLACK", 2.0)
    made = sums_of(recommender(), np.arange(12))
    bounded = made.bounded(made._gradients(np.arange(12)))
    assert (bounded**2).sum(axis=1).max() <= REACH**2
    assert not bounded.any(axis=1).all()


def test_weights_that_are_no_numbers_move_nothing_but_noise():
    parts = recommender()
    broken = np.full(parts.layout.size, np.nan, np.float32)
    made = sums_of(parts, np.arange(5), weights=broken)
    trained = made.run()
    assert np.isfinite(trained.states).all()
    assert not trained.update.values.any()


def test_examples_are_the_same_alone_and_among_others():
    """Of a device and of an example: what others say enters nowhere."""
    parts, rng = recommender(compressed=True), np.random.default_rng(0)
    lists = [rng.permutation(ITEMS)[:n] for n in (7, 0, 24, 1)]
    together = sums_of(parts, *lists).run()
    for row, items in enumerate(lists):
        data = Histories(np.array([4 + row]), np.array([0, len(items)]), items.astype(np.int32))
        made = sums_of(parts, *lists)
        alone = ExampleSums(
            made._model, made._settings, made._bound, data, made.states[:1].copy(), DRAWS
        ).run()  # fmt: skip
        assert np.abs(alone.update.values[0] - together.update.values[row]).max() <= 2
        assert np.abs(alone.states[0] - together.states[row]).max() <= 3 / SCALE
    made = sums_of(parts, np.arange(ITEMS))
    every = made.bounded(made._gradients(np.arange(ITEMS)))
    for place in range(ITEMS):
        assert np.abs(made.bounded(made._gradients(np.array([place]))) - every[place]).max() <= 1


def test_an_item_that_is_there_twice_is_one_example():
    parts = recommender()
    once, twice = (outputs(sums_of(parts, np.tile(np.arange(9), n))) for n in (1, 2))
    assert np.array_equal(once, twice)


def test_gradients_are_of_the_released_weights_in_every_step():
    """Or shared parameters would be read before they have noise."""
    parts, items = recommender("neumf"), np.arange(20)
    made = sums_of(parts, items)
    for step in range(3):
        places = np.flatnonzero(made.turns == step)
        fresh = sums_of(parts, items, states=made.states.copy())
        before = made.shared()
        expected = fresh.add(places), fresh.shared()
        assert np.array_equal(made.add(places), expected[0])
        assert np.array_equal(made.shared() - before, expected[1])
        assert len(places)
        made.states -= 0.1


@pytest.mark.parametrize("wrong", [1.0, 2 / 3, 1.5])
def test_user_vectors_have_all_the_noise_of_every_step(wrong):
    """Of devices without examples, two-sided: two thirds of it and half too much are refused."""
    parts, steps, devices, z = recommender(), 4, 400, 1.5 * wrong
    nothing = [np.zeros(0, np.int32)] * devices
    made = sums_of(parts, *nothing, steps=steps, noise=z)
    before = made.states.copy()
    trained = made.run()
    assert not trained.update.values.any()
    wanted = steps * (1.5 * 2 * REACH / SCALE) ** 2
    each = ((trained.states - before).astype(np.float64) ** 2).mean(0) / wanted
    fits = abs(each.mean() - 1) < 5 * np.sqrt(2 / before.size)
    assert fits == (wrong == 1.0)
    if fits:
        assert np.all(abs(each - 1) < 5 * np.sqrt(2 / devices))


def test_the_same_input_has_the_same_noise_and_any_other_its_own():
    parts = recommender()

    def states(items: np.ndarray, state: float = 0.5, steps: int = 1) -> np.ndarray:
        private = np.full((1, parts.network.user_dim), state, np.float32)
        return sums_of(parts, items, states=private, steps=steps, noise=100.0).run().states - state

    once = states(np.arange(3))
    assert np.array_equal(once, states(np.arange(3)))
    for other in (states(np.arange(2)), states(np.arange(3), 0.6), states(np.arange(3), steps=2)):
        assert np.std(once - other) > np.std(once) / 2
    (two,) = states(np.arange(3), steps=2)
    assert not np.allclose(two, 2 * once, rtol=0.1)  # each step has noise of its own


def test_a_start_does_not_depend_on_the_data():
    nothing = np.zeros((2, recommender().network.user_dim), np.float32)
    made = sums_of(recommender(), np.arange(3), np.arange(9), states=nothing)
    again = sums_of(recommender(), np.arange(20), np.arange(1), states=nothing, seed=4)
    assert made.states.any(axis=1).all()
    assert np.array_equal(made.states, again.states)
    assert not np.array_equal(made.states[0], made.states[1])


def test_half_of_the_draws_of_two_steps_are_deferred():
    trained = sums_of(recommender(), np.arange(5), steps=2, states=None).run()
    assert trained.deferred.share == 0.5


def test_without_a_secret_nothing_is_trained():
    learner = RecommenderLearner(
        recommender(), settings_of("bce", 1, RATE), examples=ExampleShares(REACH, SCALE, 1.0)
    )
    one = Histories.alone(4, np.arange(3, dtype=np.int32))
    model = sums_of(recommender(), np.arange(3))._model
    with pytest.raises(UsageError, match="secret"):
        learner.train(model, one, np.zeros((1, learner.state_dim), np.float32), Draws(9))
