"""Lazy noise against eager noise, exactly: every schedule, every order of readings."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lazy_basis import Basis, Silent

from privrec.errors import UsageError
from privrec.privacy import lazy
from privrec.privacy.lazy import MOST_STEPS, LazyMemory
from privrec.privacy.pending import LinearStep, PendingNoise

ROWS = 4
some_rows = st.lists(st.integers(0, ROWS - 1), max_size=6).map(lambda r: np.array(r, np.int64))


@dataclass(frozen=True)
class Step:
    variance: float
    update: LinearStep
    touched: np.ndarray
    read: np.ndarray
    everything: bool = False
    gradient: float = 0.0


def schedules(update):
    step = st.builds(
        Step,
        st.floats(1e-3, 10),
        update,
        some_rows,
        some_rows,
        st.integers(0, 9).map(lambda n: n == 0),
        st.floats(-2, 2),
    )
    return st.lists(step, min_size=1, max_size=12)


plain = st.builds(LinearStep, st.floats(0.01, 1))
moving = st.builds(
    LinearStep,
    st.floats(0.01, 1),
    st.floats(0, 0.95),
    st.floats(0, 0.2),
    nesterov=st.booleans(),
)


@dataclass
class Eager:
    """Noise added to every row in every step: the law to be met, as simply as it can be said."""

    width: int
    values: np.ndarray = field(init=False)
    used: int = 0

    def __post_init__(self):
        self.values = np.zeros((ROWS, self.width))
        self.speeds = np.zeros((ROWS, self.width))

    def step(self, step, *, noisy):
        u = step.update
        gradient = np.zeros_like(self.values)
        if not noisy:
            np.add.at(gradient, step.touched, step.gradient)
        else:
            for row in range(ROWS):
                gradient[row, self.used] = np.sqrt(step.variance)
                self.used += 1
        gradient += u.weight_decay * self.values
        if u.momentum:  # else torch.optim.SGD leaves its buffer alone
            self.speeds = u.momentum * self.speeds + gradient
        is_plain = u.nesterov or not u.momentum
        ahead = gradient + u.momentum * self.speeds if is_plain else self.speeds
        self.values = self.values - u.lr * ahead


def lazy_readings(steps, source, width, *, is_moving, start=0.0):
    memory = LazyMemory(np.full((ROWS, width), start), source, moving=is_moving)
    seen = []
    for step in steps:
        # In training, the rows of a batch are read before they get a gradient.
        seen.append(memory.settled(step.touched))
        gradients = np.full((len(step.touched), width), step.gradient)
        if is_moving:
            memory.step(step.touched, gradients, step.variance, step.update)
        else:
            lr = step.update.lr
            memory.step(step.touched, -lr * gradients, lr**2 * step.variance)
        if step.everything:
            memory.settle()
        seen.append(memory.settled(step.read))
    return np.concatenate([*seen, memory.settled()])


def eager_readings(steps, width, *, noisy, start=0.0):
    eager = Eager(width)
    eager.values += start
    seen = []
    for step in steps:
        seen.append(eager.values[step.touched])
        eager.step(step, noisy=noisy)
        seen.append(eager.values[step.read])
    return np.concatenate([*seen, eager.values])


def check_law(steps, *, is_moving):
    width = ROWS * len(steps) * 2 * 6
    drawn = lazy_readings(
        [Step(s.variance, s.update, s.touched, s.read, s.everything) for s in steps],
        Basis(width),
        width,
        is_moving=is_moving,
    )
    wanted = eager_readings(steps, ROWS * len(steps), noisy=True)
    np.testing.assert_allclose(drawn @ drawn.T, wanted @ wanted.T, rtol=1e-6, atol=1e-6)


def check_path(steps, *, is_moving):
    drawn = lazy_readings(steps, Silent(1), 1, is_moving=is_moving, start=1.5)
    wanted = eager_readings(steps, 1, noisy=False, start=1.5)
    np.testing.assert_allclose(drawn, wanted, rtol=1e-9, atol=1e-9)


@given(schedules(plain))
def test_plain_steps_have_the_covariance_of_eager_noise(steps):
    check_law(steps, is_moving=False)


@given(schedules(moving))
def test_momentum_and_decay_have_the_covariance_of_eager_noise(steps):
    check_law(steps, is_moving=True)


@given(schedules(plain))
def test_plain_steps_without_noise_are_sgd(steps):
    check_path(steps, is_moving=False)


@given(schedules(moving))
def test_momentum_and_decay_without_noise_are_sgd(steps):
    check_path(steps, is_moving=True)


def test_rows_that_nobody_read_step_from_where_they_drifted_to():
    update, eager = LinearStep(0.1, 0.9, 0.05), Eager(1)
    memory = LazyMemory(np.full((ROWS, 1), 1.5), Silent(1), moving=True)
    eager.values += 1.5
    for number in range(9):
        step = Step(1.0, update, np.array([number % 3]), np.array([]), gradient=0.3)
        memory.step(step.touched, np.full((1, 1), step.gradient), step.variance, update)
        eager.step(step, noisy=False)
    np.testing.assert_allclose(memory.settled(), eager.values, rtol=1e-9)


STEPS = [
    Step(1.0 + t, LinearStep(0.5 / (t + 1)), np.array([t % 2]), np.array([2] if t == 3 else [0]))
    for t in range(6)
]


class TestDefects:
    """The five defects of the released LazyDP, put back by hand: each one breaks the law."""

    def broken(self, memory_type):
        width = 200
        memory = memory_type(np.zeros((ROWS, width)), Basis(width))
        seen = []
        for step in STEPS:
            seen.append(memory.settled(step.touched))
            memory.step(
                step.touched,
                np.zeros((len(step.touched), width)),
                step.update.lr**2 * step.variance,
            )
        drawn = np.concatenate([*seen, memory.settled()])
        eager = Eager(ROWS * len(STEPS))
        wanted = []
        for step in STEPS:
            wanted.append(eager.values[step.touched])
            eager.step(step, noisy=True)
        wanted = np.concatenate([*wanted, eager.values])
        return not np.allclose(drawn @ drawn.T, wanted @ wanted.T, rtol=1e-6, atol=1e-9)

    def test_as_it_is_it_holds(self):
        assert not self.broken(LazyMemory)

    def test_never_flushing(self):
        class Unflushed(LazyMemory):
            def settle(self, rows=None):
                if rows is not None:
                    super().settle(rows)

        assert self.broken(Unflushed)

    def test_a_count_times_the_current_step_size(self, monkeypatch):
        def current(self, stamps):
            last = self._sums[self.steps] - self._sums[self.steps - 1]
            return (self.steps - stamps) * last

        monkeypatch.setattr("privrec.privacy.pending.PendingNoise.since", current)
        assert self.broken(LazyMemory)

    def test_plain_steps_under_momentum(self):
        steps = [Step(s.variance, LinearStep(s.update.lr, 0.9), s.touched, s.read) for s in STEPS]
        width = 400
        drawn = lazy_readings(steps, Basis(width), width, is_moving=False)
        wanted = eager_readings(steps, ROWS * len(steps), noisy=True)
        assert not np.allclose(drawn @ drawn.T, wanted @ wanted.T, rtol=1e-3, atol=1e-3)

    def test_a_checkpoint_without_its_history(self, monkeypatch):
        def forget(self):
            self._sum = PendingNoise()
            self._stamps.fill(0)

        monkeypatch.setattr(LazyMemory, "_settle_all", forget)
        assert self.broken(LazyMemory)

    # The fifth, the same noise in every process, is in test_deviates and tests/statistical.


def test_the_eager_path_has_the_same_law(monkeypatch):
    steps = [Step(1.0, LinearStep(0.1), np.arange(ROWS), np.arange(ROWS)) for _ in range(3)]
    orders = []
    settle_all = LazyMemory._settle_all
    monkeypatch.setattr(LazyMemory, "_settle_all", lambda m: (orders.append(1), settle_all(m))[1])
    check_law(steps, is_moving=False)
    assert orders
    monkeypatch.setattr(lazy, "EAGER_SHARE", 2.0)
    check_law(steps, is_moving=False)


def owing(rows, width, source):
    """A table of zeros, and the memory that took it over."""
    table = np.zeros((rows, width))
    return LazyMemory(table, source), table


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_blocks_do_not_change_what_is_owed(block):
    memory, table = owing(50, 60, Basis(60))
    memory._block = block
    memory.owe(2.0)
    memory.settle(np.array([7, 7, 30, 2]))
    memory.owe(1.0)
    memory.settle()
    np.testing.assert_allclose((table**2).sum(1), 3.0)
    assert np.allclose(table @ table.T, 3.0 * np.eye(50))


def test_four_bytes_a_row():
    memory = LazyMemory(np.zeros((1_000_000, 64), np.float32), Silent(1))
    assert memory._stamps.nbytes == 4_000_000
    arrays = [v for v in vars(memory).values() if isinstance(v, np.ndarray)]
    assert sum(a.nbytes for a in arrays) == 4_000_000
    memory.owe(1.0)
    memory.settle(np.arange(3000))
    assert sum(b.nbytes for b in memory._held) < 1 << 20


@pytest.mark.parametrize("row", [-1, 10, 1000])
def test_a_row_outside_of_the_table_is_refused_before_anything_is_paid(row: int) -> None:
    memory, table = owing(10, 40, Basis(40))
    memory.owe(1.0)
    with pytest.raises(UsageError, match="counted from 0"):
        memory.settle(np.array([3, row]))
    assert not table.any()
    memory.settle()
    np.testing.assert_allclose((table**2).sum(1), 1.0)


def test_an_interrupted_settle_owes_what_it_did_not_add(monkeypatch):
    memory, table = owing(10, 40, Basis(40))
    memory._block = 2
    memory.owe(1.0)
    add, calls = Basis.add, []

    def interrupted(self, out, variances):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(self, out, variances)

    monkeypatch.setattr(Basis, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memory.settle(np.arange(6))
    memory.settle()
    np.testing.assert_allclose((table**2).sum(1), 1.0)


def test_what_is_drawn_is_counted():
    memory, _ = owing(100, 4, Silent(1))
    for _ in range(5):
        memory.owe(1.0)
        memory.settle(np.array([1, 2, 2]))
    assert memory.drawn == 10
    memory.settle()
    assert memory.drawn == 10 + 98


def test_a_row_owes_what_came_since_it_was_settled():
    memory, table = owing(3, 40, Basis(40))
    memory.owe(1.0)
    memory.settle(np.array([1]))
    memory.owe(0.5)
    settled = table.copy()
    np.testing.assert_allclose(((memory.settled() - settled) ** 2).sum(1), [1.5, 0.5, 1.5])


def nothing(width):
    return np.zeros(0, np.int64), np.zeros((0, width))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: owing(0, 3, None), "with rows and columns"),
        (lambda: owing(3, 0, None), "with rows and columns"),
        (lambda: owing(3, 3, None)[0].owe(-1.0), "at least 0"),
        (lambda: owing(3, 3, None)[0].owe(float("nan")), "finite"),
        (
            lambda: owing(3, 3, None)[0].step(*nothing(3), 1.0, LinearStep(0.1)),
            "exactly where rows move",
        ),
        (lambda: LazyMemory(np.zeros((3, 3)), moving=True).owe(1.0), "exactly where rows move"),
    ],
)
def test_what_cannot_be_done_is_refused(call, match):
    with pytest.raises(UsageError, match=match):
        call()


@pytest.mark.parametrize("update", [None, LinearStep(0.1, 0.5)])
def test_more_steps_than_a_stamp_can_tell_are_refused(update):
    memory = LazyMemory(np.zeros((3, 2)), moving=update is not None)
    memory._sum.steps = memory._drift.steps = MOST_STEPS  # which take hours
    with pytest.raises(UsageError, match="settle everything"):
        memory.step(*nothing(2), 1.0, update)
