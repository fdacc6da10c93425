"""Local training on a text: the gradient of the whole model, in whatever table its rows lie."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from privrec.device.batch import Histories
from privrec.device.lessons import OutputBudget, Sequences
from privrec.device.update import RawUpdate
from privrec.device.words import LocalSettings, TextCohort, WideModel, WordTrainer
from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable, Table
from privrec.errors import UsageError
from privrec.models.layout import Layout
from privrec.models.words import NextWord
from privrec.randomness import SecretRoot, SecureStream, rng_for
from privrec.secagg.ring import Encoding

WORDS, DIM = 120, 16
MODEL = NextWord(DIM, 2, 24, 1, 5)
PLAIN = PlainTable.of(WORDS, DIM, block=8)
HASHED = Subspace.sized(WORDS, DIM, block=8, key=9, compression=4)
TEXT = rng_for(0, "text").integers(0, 60, 41).astype(np.int32)


def language(table: Table = PLAIN) -> WideModel:
    biases = PlainTable.of(WORDS, 1, block=1)
    return WideModel(MODEL, table, biases, Layout(MODEL.dense, table.slots, 8, WORDS))


def start(of: WideModel) -> np.ndarray:
    rng = rng_for(1, "weights")
    weights = rng.normal(0, 0.3, of.layout.size).astype(np.float32)
    of.layout.dense_of(weights)[...] = MODEL.initial_dense(rng)
    return weights


def trainer(
    table: Table = PLAIN, share: float = 1.0, steps: int = 1, tokens: int | None = None,
    **output: float,
) -> WordTrainer:  # fmt: skip
    practice = LocalSettings(tokens, steps, 0.5, "scan")
    return WordTrainer(language(table), OutputBudget(WORDS, share, **output), practice)


def lifted(update: RawUpdate) -> np.ndarray:
    """The update as a whole vector."""
    return update._dense(update.values)[0]


def by_autograd(of: WideModel, weights: np.ndarray, steps: int) -> np.ndarray:
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
    of = trainer(table, steps=steps)
    weights = start(of.language)
    update, _ = of.train(weights, TEXT, 0, 0, None)
    expected = by_autograd(of.language, weights, steps)
    assert np.abs(lifted(update) - expected).max() < 1e-5
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("table", [PLAIN, HASHED])
def test_few_neurons_change_their_own_rows_alone(table: Table) -> None:
    of = trainer(table, 0.6, selected=0.3, frequent=0.3)
    weights = start(of.language)

    def find(queries: np.ndarray, wanted: int, without: np.ndarray) -> np.ndarray:
        assert queries.shape[1] == DIM + 1
        assert (queries[:, -1] == 1).all()
        return np.setdiff1d(np.arange(WORDS), without)[-wanted:]

    update, loss = of.train(weights, TEXT, 0, 0, find)
    changed = lifted(update)
    layout = of.language.layout
    assert np.isfinite(loss)
    biases = layout.biases_of(changed)
    assert (biases != 0).sum() == 72
    assert (biases[np.unique(TEXT)] != 0).all()
    touched = np.flatnonzero(np.abs(layout.memory_of(changed)).sum(1))
    slots, _ = table.locate(np.flatnonzero(biases))
    assert set(touched) <= set(slots.ravel())
    assert np.abs(layout.dense_of(changed)).max() > 0


def test_no_block_is_named_twice() -> None:
    update, _ = trainer(HASHED, 0.5).train(start(language(HASHED)), TEXT, 0, 0, None)
    for names in (update.address.blocks, update.address.biases):
        assert len(np.unique(names)) == names.size


def windows(
    of: WordTrainer, text: np.ndarray, user: int, key: int
) -> tuple[np.ndarray, np.ndarray]:
    lesson = of.lesson(text, user, key)
    assert isinstance(lesson, Sequences)
    return lesson.inputs, lesson.targets


def test_a_window_is_a_place_of_the_text_that_the_key_decides() -> None:
    of = trainer(tokens=10)
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
    inputs, targets = windows(trainer(share=0.15), text, 0, 0)  # 18 neurons, 41 words
    assert len(inputs) == 3  # of 16 words
    assert len(np.unique(np.append(inputs, targets))) <= 18
    # One sequence fits whatever its words; fewer neurons than that are refused at once.
    assert len(windows(trainer(share=0.05), text, 0, 0)[0]) == 1
    with pytest.raises(UsageError, match=r"train\.budget"):
        trainer(share=0.04)


def test_short_texts_train_as_far_as_they_go() -> None:
    for length in (2, 3, 5, 6, 7):
        inputs, targets = windows(trainer(tokens=10), TEXT[:length], 0, 0)
        assert inputs.size == targets.size >= 1


def test_weights_that_are_not_numbers_give_an_update_that_is_zero_when_bound() -> None:
    of = trainer(share=0.5, selected=0.5)
    weights = start(of.language)
    weights[0] = np.nan
    update, _ = of.train(weights, TEXT, 0, 0, lambda *_: pytest.fail("nothing to search with"))
    bounded = update.bound(Encoding(1.0, of.language.layout.size, 13.0), _stream())
    assert not bounded.integers.any()


def _stream() -> SecureStream:
    return SecretRoot.known(b"words").stream("test")


def test_selection_needs_secret_functions_of_the_devices_own() -> None:
    of = replace(trainer(share=0.5, selected=0.5))
    writers = TextCohort(of, Histories(np.array([4]), np.array([0, 41]), TEXT))
    weights = start(of.language)
    with pytest.raises(UsageError, match="secret"):
        list(writers.train(weights, np.array([0]), 0))
    asked = []

    def functions(user: int) -> SecureStream:
        asked.append(user)
        return _stream()

    ((rows, trained),) = writers.train(weights, np.array([0]), 0, functions)
    assert asked == [4]
    assert rows.tolist() == [0]
    assert trained.states.shape == (1, 1)


def test_the_same_key_gives_the_same_update_and_another_another() -> None:
    of = trainer(share=0.5, tokens=10)
    weights = start(of.language)
    first, again, other = (lifted(of.train(weights, TEXT, 0, k, None)[0]) for k in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(weights, start(of.language))


def test_words_beyond_what_a_tier_holds_are_unknown_to_it() -> None:
    of = trainer()
    writers = TextCohort(
        of, Histories(np.array([0]), np.array([0, 3]), np.array([1, 500, 2], np.int32))
    )
    assert writers._text(0).tolist() == [1, 0, 2]


def test_training_lowers_the_loss() -> None:
    of = trainer(share=0.7, steps=2, frequent=0.5)
    weights = start(of.language)
    _, before = of.train(weights, TEXT, 0, 0, None)
    for key in range(30):
        weights += lifted(of.train(weights, TEXT, 0, key, None)[0])
    assert of.train(weights, TEXT, 0, 99, None)[1] < before - 1
