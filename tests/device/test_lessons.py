"""What a device learns from in a round: its labelled examples, to a budget of neurons."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from privrec.data.corpus import dealt, examples_in
from privrec.data.synthetic import Invented
from privrec.device.lessons import Bags, OutputBudget
from privrec.device.words import LocalSettings, WideModel, WordTrainer
from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable, Table
from privrec.models.extreme import WordBag
from privrec.models.layout import Layout
from privrec.randomness import rng_for

LABELS, DIM, FEATURES = 61, 8, 32
MODEL = WordBag(FEATURES, DIM)
PLAIN = PlainTable.of(LABELS, DIM, block=4)
HASHED = Subspace.sized(LABELS, DIM, block=4, key=9, compression=4)
TOKENS = dealt(
    Invented(500, LABELS - 1, words=7, labels_each=3, clusters=6).examples(12), 12
).tokens


def trainer(
    table: Table = PLAIN, share: float = 1.0, steps: int = 1, most: int | None = None
) -> WordTrainer:
    biases = PlainTable.of(LABELS, 1, block=1)
    layout = Layout(MODEL.dense, table.slots, 4, LABELS)
    language = WideModel(MODEL, table, biases, layout)
    return WordTrainer(language, OutputBudget(LABELS, share), LocalSettings(most, steps, 0.5, None))


def start(of: WideModel) -> np.ndarray:
    rng = rng_for(1, "weights")
    weights = rng.normal(0, 0.3, of.layout.size).astype(np.float32)
    of.layout.dense_of(weights)[...] = MODEL.initial_dense(rng)
    return weights


def by_autograd(of: WideModel, weights: np.ndarray, steps: int) -> np.ndarray:
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
    of = trainer(table, steps=steps)
    weights = start(of.language)
    update, _ = of.train(weights, TOKENS, 0, 0, None)
    changed = update._dense(update.values)[0]
    expected = by_autograd(of.language, weights, steps)
    assert np.abs(changed - expected).max() < 1e-5
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("key", range(5))
def test_all_labels_of_a_lesson_are_active_within_the_budget(key: int) -> None:
    of = trainer(share=0.3)
    lesson = of.lesson(TOKENS, 0, key)
    assert isinstance(lesson, Bags)
    assert 0 < len(lesson.own) <= of.output.budget
    weights = start(of.language)
    changed, _ = of.train(weights, TOKENS, 0, key, None)
    biases = of.language.layout.biases_of(changed._dense(changed.values)[0])
    assert (biases[lesson.own] != 0).all()
    assert (biases != 0).sum() == of.output.budget


def test_a_round_takes_some_examples_from_a_place_that_the_key_decides() -> None:
    of, whole = trainer(most=4), examples_in(TOKENS).hashed(FEATURES)
    firsts = set()
    for key in range(60):
        lesson = of.lesson(TOKENS, 3, key)
        assert isinstance(lesson, Bags)
        assert len(lesson) == lesson.positions == 4
        for first in range(9):
            some = whole.take(np.arange(first, first + 4))
            if np.array_equal(some.features, lesson.examples.features):
                firsts.add(first)
    assert firsts == set(range(9))


def test_an_example_of_too_many_labels_keeps_the_commonest() -> None:
    tokens = np.array([-1, -2, 9, 30, 4, 12, 7, -3, 5], np.int32)
    lesson = Bags.of(MODEL, tokens, 1, 3, 0)
    assert lesson.own.tolist() == [4, 7, 9]
    assert lesson.examples.label_ends.tolist() == [3]
    both = Bags.of(MODEL, tokens, None, 6, 0)
    assert both.own.tolist() == [4, 5, 7, 9, 12, 30]
    # The first alone fits five neurons; with the second there would be six.
    assert Bags.of(MODEL, tokens, None, 5, 0).own.tolist() == [4, 7, 9, 12, 30]


def test_an_example_without_a_label_teaches_nothing_and_breaks_nothing() -> None:
    of = trainer(share=0.2)
    weights = start(of.language)
    for tokens in ([-1, -2], [-1, 0], [-4, -4, -4], [], [0], [3, 4]):
        update, loss = of.train(weights, np.array(tokens, np.int32), 0, 0, None)
        assert loss == 0
        assert not update.values.any()
