"""Example-level protection: no single interaction moves a round's sums by more than the bound."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from of_examples import DIM, ITEMS, recommender, settings_of

from privrec.device.device import Deferred, Draws, Settings
from privrec.device.examples import ExampleNoise, ExampleSteps, Gradients
from privrec.device.local import LocalModel
from privrec.device.recommender import RecommenderLearner
from privrec.device.samples import Histories
from privrec.device.tier import ModelView
from privrec.errors import UsageError
from privrec.models.ncf import NCF
from privrec.randomness import SecretRoot

BOUND = 0.7
ROOT = SecretRoot.known(b"examples")


def steps_of(
    parts: ModelView[NCF], seed: int = 0, *, scale: float = 1.0, loss: str = "bce", steps: int = 3,
    noise: float = 1.0, user: np.ndarray | None = None, rate: float = 0.1, key: int = 9,
) -> ExampleSteps:  # fmt: skip
    rng = np.random.default_rng(seed)
    weights = rng.normal(0, scale, parts.layout.size).astype(np.float32)
    state = rng.normal(0, scale, parts.network.user_dim).astype(np.float32)
    state = state if user is None else user
    return ExampleSteps(
        LocalModel(parts, weights), settings_of(loss, steps, rate), ExampleNoise(BOUND, noise),
        state, 4, key, ROOT,
    )  # fmt: skip


def whole(made: ExampleSteps, clipped: Gradients) -> np.ndarray:
    """The sum of a step as one vector over every parameter."""
    size = made.model.view.layout
    blocks, biases = np.zeros((size.slots, size.block)), np.zeros((size.bias_slots, 1))
    np.add.at(blocks, made.vectors.located.slots.ravel(), clipped.blocks.reshape(-1, size.block))
    np.add.at(biases, made.biases.located.slots.ravel(), clipped.biases.reshape(-1, 1))
    user, dense = clipped.user.numpy().sum(0), clipped.dense.numpy().sum(0)
    return np.concatenate([user, dense, blocks.ravel(), biases.ravel()])


def sums(made: ExampleSteps, history: np.ndarray) -> np.ndarray:
    """Sums of all steps from the same parameters, one row a step."""
    return np.stack([whole(made, made.gradients(turn)) for turn in made.turns(history)])


def moved(made: ExampleSteps, one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(sums(made, one) - sums(made, other)))


histories = st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=20, unique=True)


@settings(max_examples=60)
@given(
    history=histories, place=st.integers(0, 100), instead=st.integers(0, ITEMS - 1),
    seed=st.integers(0, 2**31), scale=st.sampled_from([0.01, 1.0, 30.0]),
    loss=st.sampled_from(["bce", "bpr"]), kind=st.sampled_from(["gmf", "neumf", "mlp"]),
    compressed=st.booleans(), turns=st.integers(1, 5),
)  # fmt: skip
def test_removing_or_changing_an_example_moves_the_sums_by_at_most_the_bound(
    history, place, instead, seed, scale, loss, kind, compressed, turns
):
    made = steps_of(
        recommender(kind, compressed=compressed), seed, scale=scale, loss=loss, steps=turns
    )
    items = np.array(history)
    place %= len(items)
    without = np.delete(items, place)
    assert moved(made, items, without) <= BOUND / 2 * (1 + 1e-4)
    if instead not in history:
        changed = items.copy()
        changed[place] = instead
        assert moved(made, items, changed) <= BOUND * (1 + 1e-4)


def test_no_rounding_takes_an_example_beyond_the_bound():
    for seed in range(20):
        clipped = steps_of(recommender(), seed, scale=5.0).gradients(np.arange(12))
        parts = (clipped.user, clipped.dense, clipped.blocks, clipped.biases)
        flat = np.concatenate([np.asarray(part).reshape(12, -1) for part in parts], axis=1)
        assert np.linalg.norm(flat.astype(np.float64), axis=1).max() <= BOUND / 2


def test_the_bound_is_reached():
    made = steps_of(recommender(), scale=5.0)
    items = np.arange(12)
    assert moved(made, items, items[1:]) > 0.49 * BOUND


def fitted(
    parts: ModelView[NCF], chosen: Settings, weights: np.ndarray, items: np.ndarray
) -> np.ndarray:
    """The user vector that ordinary local training fits to the history, without noise."""
    one = Histories.alone(4, items.astype(np.int32))
    return RecommenderLearner(parts, chosen).serve(weights, one, Draws(9))[0]


def test_a_user_vector_fitted_without_noise_breaks_the_bound(lab):
    chosen = lab().learner.settings
    parts, worst = recommender(), 0.0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        items = rng.permutation(ITEMS)[:12]
        weights = steps_of(parts, seed).model.weights
        both = []
        for history in (items, items[1:]):
            user = fitted(parts, chosen, weights, history)
            made = steps_of(parts, seed, user=user)
            both.append(sums(made, history))
        worst = max(worst, float(np.linalg.norm(both[0] - both[1])))
    assert worst > BOUND * 1.05


def test_an_example_stays_itself_whatever_the_others_are():
    made = steps_of(recommender())
    items = np.random.default_rng(0).permutation(ITEMS)
    together = {item: t for t, part in enumerate(made.turns(items)) for item in part}
    for place, item in enumerate(items):
        (alone,) = (t for t, part in enumerate(made.turns(items[place : place + 1])) if len(part))
        assert together[item] == alone
        negatives = made.negatives(items)[place : place + 1]
        assert np.array_equal(negatives, made.negatives(items[place : place + 1]))
    repeated = np.concatenate(made.turns(np.repeat(items, 2)))
    assert sorted(repeated) == sorted(items)


def test_negatives_are_uniform_over_all_items_the_history_included():
    parts = recommender()
    drawn = np.concatenate(
        [steps_of(parts, key=key).negatives(np.arange(ITEMS)).ravel() for key in range(200)]
    )
    counts = np.bincount(drawn, minlength=ITEMS)
    chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi < ITEMS - 1 + 5 * np.sqrt(2 * ITEMS)


def test_a_start_does_not_depend_on_the_data():
    nothing = np.zeros(DIM + 1, np.float32)
    one, two = (steps_of(recommender(), seed, user=nothing).state for seed in (0, 1))
    assert one.any()
    assert np.array_equal(one, two)


@pytest.mark.parametrize("kind", ["gmf", "neumf"])
def test_every_coefficient_of_the_update_and_the_state_has_the_noise_of_all_steps(kind):
    """Of a device without examples: what it gives is noise alone."""
    parts, steps, rate = recommender(kind), 4, 0.5
    update, states = [], []
    for number in range(400):
        nothing = np.zeros(parts.layout.size, np.float32)
        start = np.full(parts.network.user_dim, 1.0, np.float32)
        root = SecretRoot.known(b"noise %d" % number)
        made = ExampleSteps(
            LocalModel(parts, nothing), settings_of("bce", steps, rate), ExampleNoise(BOUND, 1.5),
            start, 1, 2, root,
        )  # fmt: skip
        made.run(np.zeros(0, np.int64))
        update.append(made.change())
        states.append(made.state - start)
    wanted = steps * (rate * 1.5 * BOUND) ** 2
    for values in (np.stack(update), np.stack(states)):
        each = (values.astype(np.float64) ** 2).mean(0) / wanted
        assert abs(each.mean() - 1) < 6 * np.sqrt(2 / values.size)  # rejects 2/3 and 3/2 of it
        assert np.all(abs(each - 1) < 6 * np.sqrt(2 / len(values)))
    assert abs(np.corrcoef(np.stack(update)[:, :8], rowvar=False) - np.eye(8)).max() < 0.3


def test_most_noise_of_a_round_is_deferred_and_all_of_it_settled():
    made = steps_of(recommender(), steps=4)
    made.run(np.array([2, 3]))
    before = made.vectors.memory.steps
    made.change()
    assert before == 4
    assert made.vectors.memory.steps == 0
    assert 0.3 < made.deferred.share < 1
    assert Deferred().share is None


def test_the_same_input_has_the_same_noise_and_any_other_its_own(lab):
    parts = recommender()
    noise = ExampleNoise(BOUND, 100.0)
    learner = RecommenderLearner(parts, lab().learner.settings, examples=noise)

    def change(history=(1, 2, 3), state=0.0, *context: int) -> np.ndarray:
        one = Histories.alone(4, np.array(history, np.int32))
        draws = Draws.of(ROOT, SimpleNamespace(context=context), 9)
        states = np.full((1, learner.state_dim), state, np.float32)
        return learner.train(steps_of(parts).model, one, states, draws).update.values

    once = change()
    assert np.array_equal(once, change())
    for other in (change((1, 2)), change((1, 2, 3), 0.1), change((1, 2, 3), 0.0, 1)):
        assert np.std(once - other) > np.std(once)


def test_a_broken_example_counts_as_none():
    made = steps_of(recommender(), scale=1e30)
    for part in (clipped := made.gradients(np.arange(4))).user, clipped.dense:
        assert bool(np.isfinite(part.numpy()).all())
    assert np.isfinite(clipped.blocks).all()


def test_without_a_secret_nothing_is_trained(lab):
    here = lab()
    here.learner = replace(here.learner, examples=ExampleNoise(1.0, 1.0))
    with pytest.raises(UsageError, match="secret"):
        here.device(0).train(here.model, Draws(3))
