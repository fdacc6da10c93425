"""What a device learns from in a round: its labelled examples, to a budget of neurons."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from privrec.data.corpus import dealt, examples_in
from privrec.data.synthetic import Invented
from privrec.device.device import Draws, Settings, Trained
from privrec.device.local import LocalModel
from privrec.device.samples import Histories
from privrec.device.tier import ModelView
from privrec.device.words import WordLearner
from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable, Table
from privrec.models.words import Bags, WordBag
from privrec.randomness import rng_for

LABELS, DIM, FEATURES = 61, 8, 32
MODEL = WordBag(FEATURES, DIM)
PLAIN = PlainTable.of(LABELS, DIM, block=4)
HASHED = Subspace.sized(LABELS, DIM, block=4, key=9, compression=4)
TOKENS = dealt(Invented(500, LABELS - 1, words=7, labels_each=3, clusters=6).examples(12), 12).items


def learner(
    table: Table = PLAIN, share: float = 1.0, steps: int = 1, most: int | None = None
) -> WordLearner:
    view = ModelView.of(MODEL, table, PlainTable.of(LABELS, 1, block=1))
    settings = Settings(
        loss="softmax", newton=False, max_samples=most, user_steps=1, user_lr=1.0, user_l2=1.0,
        serve_steps=1, local_steps=steps, local_lr=0.5,
        selector="uniform", budget=share,
    )  # fmt: skip
    return WordLearner(view, settings)


def start(of: WordLearner) -> np.ndarray:
    layout, rng = of.view.layout, rng_for(1, "weights")
    weights = rng.normal(0, 0.3, layout.size).astype(np.float32)
    layout.dense_of(weights)[...] = MODEL.initial_dense(rng)
    return weights


def trained(
    of: WordLearner, weights: np.ndarray, key: int = 0, tokens: np.ndarray = TOKENS
) -> Trained:
    """What one device makes of its examples."""
    states = np.zeros((1, 1), np.float32)
    return of.train(LocalModel(of.view, weights), Histories.alone(0, tokens), states, Draws(key))


def change(of: WordLearner, weights: np.ndarray, key: int = 0) -> np.ndarray:
    """Its update as a whole vector."""
    update = trained(of, weights, key).update
    return update.dense(update.values)[0]


def by_autograd(of: ModelView[WordBag], weights: np.ndarray, steps: int) -> np.ndarray:
    """The change of plain gradient steps on the full softmax, example by example."""
    vector = torch.from_numpy(weights.copy()).requires_grad_()
    slots, signs = of.vectors.locate(np.arange(LABELS))
    layout, examples = of.layout, examples_in(TOKENS).hashed(FEATURES)
    for piece in np.array_split(np.arange(len(examples)), steps):
        memory = vector[layout.head : layout.head + layout.slots * 4].reshape(-1, 4)
        rows = memory[torch.from_numpy(slots)] * torch.from_numpy(signs)[..., None]
        rows = rows.reshape(LABELS, DIM) * of.vectors.scale
        words = vector[: FEATURES * DIM].view(FEATURES, DIM)
        shift, losses = vector[FEATURES * DIM : layout.dense], []
        for one in piece:
            example = examples.take(np.array([one]))
            read = words[torch.from_numpy(example.features)].sum(0) / len(example.features) ** 0.5
            scores = rows @ torch.relu(read + shift) + vector[layout.size - LABELS :]
            losses.append(-torch.log_softmax(scores, 0)[example.labels].mean())
        (gradient,) = torch.autograd.grad(torch.stack(losses).mean(), vector)
        with torch.no_grad():
            vector -= 0.5 * gradient
    return vector.detach().numpy() - weights


@pytest.mark.parametrize("table", [PLAIN, HASHED, HASHED.folded(1)])
@pytest.mark.parametrize("steps", [1, 3])
def test_with_all_neurons_the_update_is_plain_gradient_descent(table: Table, steps: int) -> None:
    of = learner(table, steps=steps)
    weights = start(of)
    expected = by_autograd(of.view, weights, steps)
    assert np.abs(change(of, weights) - expected).max() < 1e-5
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("key", range(5))
def test_all_labels_of_a_batch_are_active_within_the_budget(key: int) -> None:
    of = learner(share=0.3)
    batch = of.batch(TOKENS, 0, key)
    assert isinstance(batch, Bags)
    assert 0 < len(batch.own) <= of.output.size
    biases = of.view.layout.biases_of(change(of, start(of), key))
    assert (biases[batch.own] != 0).all()
    assert (biases != 0).sum() == of.output.size


def test_a_round_takes_some_examples_from_a_place_that_the_key_decides() -> None:
    of, whole = learner(most=4), examples_in(TOKENS).hashed(FEATURES)
    firsts = set()
    for key in range(60):
        batch = of.batch(TOKENS, 3, key)
        assert isinstance(batch, Bags)
        assert len(batch) == len(batch.targets(np.arange(4))) == 4
        for first in range(9):
            some = whole.take(np.arange(first, first + 4))
            if np.array_equal(some.features, batch.examples.features):
                firsts.add(first)
    assert firsts == set(range(9))


def test_an_example_of_too_many_labels_keeps_the_commonest() -> None:
    tokens = np.array([-1, -2, 9, 30, 4, 12, 7, -3, 5], np.int32)
    batch = MODEL.batch(tokens, 1, 3, 0)
    assert batch.own.tolist() == [4, 7, 9]
    assert batch.examples.label_ends.tolist() == [3]
    both = MODEL.batch(tokens, None, 6, 0)
    assert both.own.tolist() == [4, 5, 7, 9, 12, 30]
    # The first alone fits five neurons; with the second there would be six.
    assert MODEL.batch(tokens, None, 5, 0).own.tolist() == [4, 7, 9, 12, 30]


def test_an_example_without_a_label_teaches_nothing_and_breaks_nothing() -> None:
    of = learner(share=0.2)
    weights = start(of)
    for tokens in ([-1, -2], [-1, 0], [-4, -4, -4], [], [0], [3, 4]):
        result = trained(of, weights, 0, np.array(tokens, np.int32))
        assert result.losses == 0
        assert not result.update.values.any()
