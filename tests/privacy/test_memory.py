"""A table with debt can be read in no way that shows a value without its noise."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from lazy_basis import Silent

from privrec.errors import UsageError
from privrec.privacy import lazy
from privrec.privacy.lazy import LazyMemory
from privrec.privacy.pending import LinearStep, Normals

ROWS, WIDTH, VARIANCE = 6, 200, 9.0


def indebted(**options):
    memory = LazyMemory(np.zeros((ROWS, WIDTH), np.float32), **options)
    memory.owe(VARIANCE / 2)
    memory.owe(VARIANCE / 2)
    return memory


WAYS_OUT = {
    "settled": lambda m: m.settled(),
    "settled rows": lambda m: m.settled(np.arange(ROWS)),
    "array": np.asarray,
    "array of a type": lambda m: np.asarray(m, np.float64),
    "an operation": lambda m: np.add(m, 0),
    "item": lambda m: np.stack([m[i] for i in range(ROWS)]),
    "negative item": lambda m: np.stack([m[i - ROWS] for i in range(ROWS)]),
    "slice": lambda m: m[:],
    "mask": lambda m: m[np.ones(ROWS, bool)],
    "rows and columns": lambda m: m[:, ::1],
    "iteration": lambda m: np.stack(list(m)),
    "copy": copy.copy,
    "deep copy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),  # noqa: S301
    "a norm": lambda m: np.full((ROWS, WIDTH), np.linalg.norm(m) / np.sqrt(ROWS * WIDTH)),
    "list": lambda m: np.array(np.asarray(m).tolist()),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_every_way_out_settles(way):
    shown = WAYS_OUT[way](indebted())
    assert shown.shape == (ROWS, WIDTH)
    each = (np.asarray(shown, float) ** 2).mean(1)
    assert np.all((each > VARIANCE / 2) & (each < VARIANCE * 2)), each


@pytest.mark.parametrize("way", WAYS_OUT)
def test_what_is_shown_twice_is_shown_alike(way):
    memory = indebted()
    first = np.array(WAYS_OUT[way](memory), float)
    assert np.array_equal(first, np.array(WAYS_OUT[way](memory), float))


@pytest.mark.parametrize("way", ["settled", "array", "copy", "slice"])
def test_what_is_shown_is_no_view(way):
    memory = indebted()
    shown = WAYS_OUT[way](memory)
    before = memory.settled()
    shown[:] = 123
    assert np.array_equal(memory.settled(), before)


def test_velocities_settle():
    memory = LazyMemory(np.zeros((ROWS, WIDTH), np.float32), moving=True)
    memory.step(np.zeros(0, int), np.zeros((0, WIDTH), np.float32), 4.0, LinearStep(0.1, 0.9))
    assert (memory.velocities() ** 2).mean() == pytest.approx(4.0, rel=0.3)


def test_a_view_is_refused():
    with pytest.raises(ValueError, match="copy it"):
        np.array(indebted(), copy=False)


def test_the_text_of_a_memory_shows_no_value():
    assert repr(indebted()) == "LazyMemory(6 x 200, 2 steps owed)"


def test_state_goes_round_trip():
    memory = LazyMemory(np.zeros((ROWS, 3)), Silent(1), moving=True)
    update = LinearStep(0.1, 0.5)
    rows, gradients = np.array([1, 1, 4]), np.ones((3, 3))
    memory.step(rows, gradients, 0.0, update)
    other = LazyMemory(memory.settled(), Silent(1), moving=True)
    other.load_velocities(memory.velocities())
    for each in (memory, other):
        each.step(rows, gradients, 0.0, update)
    np.testing.assert_allclose(other.settled(), memory.settled())


def test_repeated_rows_add_up():
    memory = LazyMemory(np.zeros((3, 2)), Silent(1))
    memory.step(np.array([1, 1, 2]), np.array([[1.0, 2], [3, 4], [5, 6]]), 0.0)
    assert memory.settled().tolist() == [[0, 0], [4, 6], [5, 6]]


def table():
    return LazyMemory(np.zeros((3, 2), np.float32))


ONES = np.ones((1, 2), np.float32)


class Adam:
    lr = 0.1


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: LazyMemory(np.zeros(3)), "rows and columns"),
        (lambda: LazyMemory(np.zeros((3, 4))[:, ::2]), "contiguous"),
        (lambda: LazyMemory(np.zeros((3, 4), complex)), "contiguous, of floats"),
        (lambda: LazyMemory(np.zeros((3, 4), int)), "contiguous, of floats"),
        (lambda: table().step(np.array([3]), ONES, 1.0), "counted from 0"),
        (lambda: table().step(np.array([-1]), ONES, 1.0), "counted from 0"),
        (lambda: table().step(np.array([1.0]), ONES, 1.0), "list of integers"),
        (lambda: table().step(np.array([1, 2]), ONES, 1.0), "must be float32"),
        (lambda: table().step(np.array([1]), ONES.astype(float), 1.0), "must be float32"),
        (lambda: table().step(np.array([1]), ONES, -1.0), "at least 0"),
        (lambda: table().step(np.array([1]), ONES, 1.0, LinearStep(0.1)), "exactly where"),
        (lambda: table().step(np.array([1]), ONES, 1.0, Adam()), "adaptive steps depend"),
        (lambda: table().settle(np.array([7])), "counted from 0"),
        (lambda: table().owe(float("inf")), "finite"),
    ],
)
def test_what_cannot_be_done_is_refused(call, match):
    with pytest.raises(UsageError, match=match):
        call()


def test_a_refused_step_changes_nothing():
    memory = LazyMemory(np.zeros((3, 2)), Normals())
    with pytest.raises(UsageError):
        memory.step(np.array([1]), np.ones((1, 2)), float("nan"))
    assert not memory.settled().any()


def test_a_step_whose_noise_is_refused_shows_no_gradient(monkeypatch):
    monkeypatch.setattr(lazy, "MOST_STEPS", 0)
    memory = LazyMemory(np.zeros((ROWS, WIDTH)), Normals())
    with pytest.raises(UsageError, match="steps are owed"):
        memory.step(np.array([1]), np.ones((1, WIDTH)), 1.0)
    assert not memory.settled().any()


def test_a_step_that_is_interrupted_has_its_noise(monkeypatch):
    accumulate = lazy._accumulate

    def interrupted(*given):
        accumulate(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(lazy, "_accumulate", interrupted)
    memory = LazyMemory(np.zeros((ROWS, WIDTH)), Normals())
    with pytest.raises(KeyboardInterrupt):
        memory.step(np.array([1]), np.ones((1, WIDTH)), VARIANCE)
    shown = memory.settled() - np.eye(ROWS)[1][:, None]
    assert (shown**2).mean() == pytest.approx(VARIANCE, rel=0.3)
