"""Local training on a text: the gradient of the whole model, in whatever table its rows lie."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from on_devices import bounded, trained_rows
from torch.nn.functional import cross_entropy

from privrec.device.device import Cohort, Draws, Settings, Trained
from privrec.device.local import LocalModel
from privrec.device.samples import Histories
from privrec.device.tier import ModelView
from privrec.device.words import WordLearner
from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable, Table
from privrec.errors import UsageError
from privrec.models.words import NextWord, Sequences
from privrec.randomness import SecretRoot, SecureStream, rng_for
from privrec.secagg.ring import Encoding

WORDS, DIM = 120, 16
MODEL = NextWord(DIM, 2, 24, 1, 5)
PLAIN = PlainTable.of(WORDS, DIM, block=8)
HASHED = Subspace.sized(WORDS, DIM, block=8, key=9, compression=4)
TEXT = rng_for(0, "text").integers(0, 60, 41).astype(np.int32)


Find = Callable[[np.ndarray, int, np.ndarray], np.ndarray]


def learner(
    table: Table = PLAIN, share: float = 1.0, steps: int = 1, tokens: int | None = None,
    find: Find | None = None, selected: float = 0.0, frequent: float = 0.0,
) -> WordLearner:  # fmt: skip
    view = ModelView.of(MODEL, table, PlainTable.of(WORDS, 1, block=1))
    settings = Settings(
        loss="softmax", newton=False, max_samples=tokens, user_steps=1, user_lr=1.0, user_l2=1.0,
        serve_steps=1, local_steps=steps, local_lr=0.5,
        selector="scan", budget=share, selected=selected, frequent=frequent,
    )  # fmt: skip
    return WordLearner(view, settings, None if find is None else lambda *_: find)


def start(of: WordLearner) -> np.ndarray:
    layout, rng = of.view.layout, rng_for(1, "weights")
    weights = rng.normal(0, 0.3, layout.size).astype(np.float32)
    layout.dense_of(weights)[...] = MODEL.initial_dense(rng)
    return weights


def trained(of: WordLearner, weights: np.ndarray, key: int = 0) -> Trained:
    """What one device makes of its text."""
    states = np.zeros((1, 1), np.float32)
    return of.train(LocalModel(of.view, weights), Histories.alone(0, TEXT), states, Draws(key))


def change(of: WordLearner, weights: np.ndarray, key: int = 0) -> np.ndarray:
    """Its update as a whole vector."""
    update = trained(of, weights, key).update
    return update.dense(update.values)[0]


def by_autograd(of: ModelView[NextWord], weights: np.ndarray, steps: int) -> np.ndarray:
    """The change of plain gradient steps on the full softmax, every weight trained."""
    vector = torch.from_numpy(weights.copy()).requires_grad_()
    slots, signs = of.vectors.locate(np.arange(WORDS))
    layout = of.layout
    pieces = np.array_split(np.arange(8), steps)
    for piece in pieces:
        memory = vector[layout.head : layout.head + layout.slots * 8].reshape(-1, 8)
        rows = memory[torch.from_numpy(slots)] * torch.from_numpy(signs)[..., None]
        rows = rows.reshape(WORDS, DIM) * of.vectors.scale
        inputs = torch.from_numpy(TEXT[:-1].astype(np.int64).reshape(8, 5)[piece])
        targets = torch.from_numpy(TEXT[1:].astype(np.int64).reshape(8, 5)[piece])
        hidden = MODEL.hidden(rows[inputs], vector[: layout.dense]).reshape(-1, DIM)
        loss = cross_entropy(hidden @ rows.T + vector[layout.size - WORDS :], targets.ravel())
        (gradient,) = torch.autograd.grad(loss, vector)
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


@pytest.mark.parametrize("table", [PLAIN, HASHED])
def test_few_neurons_change_their_own_rows_alone(table: Table) -> None:
    def find(queries: np.ndarray, wanted: int, without: np.ndarray) -> np.ndarray:
        assert queries.shape[1] == DIM + 1
        assert (queries[:, -1] == 1).all()
        return np.setdiff1d(np.arange(WORDS), without)[-wanted:]

    of = learner(table, 0.6, find=find, selected=0.3, frequent=0.3)
    result, layout = trained(of, start(of)), of.view.layout
    changed = result.update.dense(result.update.values)[0]
    assert np.isfinite(result.losses).all()
    biases = layout.biases_of(changed)
    assert (biases != 0).sum() == 72
    assert (biases[np.unique(TEXT)] != 0).all()
    touched = np.flatnonzero(np.abs(layout.memory_of(changed)).sum(1))
    slots, _ = table.locate(np.flatnonzero(biases))
    assert set(touched) <= set(slots.ravel())
    assert np.abs(layout.dense_of(changed)).max() > 0


def test_no_block_is_named_twice() -> None:
    of = learner(HASHED, 0.5)
    update = trained(of, start(of)).update
    for names in (update.address.blocks, update.address.biases):
        assert len(np.unique(names)) == names.size


def windows(
    of: WordLearner, text: np.ndarray, user: int, key: int
) -> tuple[np.ndarray, np.ndarray]:
    batch = of.batch(text, user, key)
    assert isinstance(batch, Sequences)
    return batch.inputs, batch.following


def test_a_window_is_a_place_of_the_text_that_the_key_decides() -> None:
    of = learner(tokens=10)
    seen = set()
    for key in range(60):
        inputs, targets = windows(of, TEXT, 3, key)
        assert inputs.shape == targets.shape == (2, 5)
        flat = np.append(inputs.ravel(), targets[-1, -1])
        assert np.array_equal(inputs.ravel()[1:], targets.ravel()[:-1])
        starts = [s for s in range(31) if np.array_equal(TEXT[s : s + 11], flat)]
        seen.update(starts)
    assert len(seen) > 15
    assert np.array_equal(windows(of, TEXT, 3, 5)[0], windows(of, TEXT, 3, 5)[0])


def test_a_text_of_too_many_words_is_cut_to_what_its_neurons_hold() -> None:
    text = np.arange(41, dtype=np.int32)
    inputs, targets = windows(learner(share=0.15), text, 0, 0)  # 18 neurons, 41 words
    assert len(inputs) == 3  # of 16 words
    assert len(np.unique(np.append(inputs, targets))) <= 18
    # One sequence fits whatever its words; fewer neurons than that are refused at once.
    assert len(windows(learner(share=0.05), text, 0, 0)[0]) == 1
    with pytest.raises(UsageError, match=r"train\.budget"):
        learner(share=0.04)


def test_short_texts_train_as_far_as_they_go() -> None:
    for length in (2, 3, 5, 6, 7):
        inputs, targets = windows(learner(tokens=10), TEXT[:length], 0, 0)
        assert inputs.size == targets.size >= 1


def test_weights_that_are_not_numbers_give_an_update_that_is_zero_when_bound() -> None:
    def find(*_: object) -> np.ndarray:
        return pytest.fail("nothing to search with")

    of = learner(share=0.5, selected=0.5, find=find)
    weights = start(of)
    weights[0] = np.nan
    update = trained(of, weights).update
    found = bounded(update, Encoding(1.0, of.view.layout.size, 13.0), _stream())
    assert not found.integers.any()


def _stream() -> SecureStream:
    return SecretRoot.known(b"words").stream("test")


def test_selection_needs_secret_functions_of_the_devices_own() -> None:
    of = learner(share=0.5, selected=0.5)
    writers = Cohort.of(of, Histories.alone(4, TEXT))
    weights = start(of)
    with pytest.raises(UsageError, match="secret"):
        list(trained_rows(writers, weights, np.array([0]), Draws(0)))
    asked = []

    def functions(user: int) -> SecureStream:
        asked.append(user)
        return _stream()

    ((rows, result),) = trained_rows(writers, weights, np.array([0]), Draws(0, functions))
    assert asked == [4]
    assert rows.tolist() == [0]
    assert result.states.shape == (1, 1)


def test_the_same_key_gives_the_same_update_and_another_another() -> None:
    of = learner(share=0.5, tokens=10)
    weights = start(of)
    first, again, other = (change(of, weights, key) for key in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(weights, start(of))


def test_words_beyond_what_a_tier_holds_are_unknown_to_it() -> None:
    writers = Cohort.of(learner(), Histories.alone(0, np.array([1, 500, 2], np.int32)))
    assert writers.data.of(0).tolist() == [1, 0, 2]


def test_training_lowers_the_loss() -> None:
    of = learner(share=0.7, steps=2, frequent=0.5)
    weights = start(of)
    before = trained(of, weights).losses
    for key in range(30):
        weights += change(of, weights, key)
    assert trained(of, weights, 99).losses < before - 1
