"""Lazy noise against eager noise, exactly: every schedule, every order of readings."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lazy_basis import Basis, Silent

from privrec.errors import UsageError
from privrec.privacy.lazy import noise as lazy
from privrec.privacy.lazy.memory import LazyMemory
from privrec.privacy.lazy.noise import MOST_STEPS, LazyNoise
from privrec.privacy.lazy.pending import LinearStep

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

        monkeypatch.setattr("privrec.privacy.lazy.pending.PendingNoise.since", current)
        assert self.broken(LazyMemory)

    def test_plain_steps_under_momentum(self):
        steps = [Step(s.variance, LinearStep(s.update.lr, 0.9), s.touched, s.read) for s in STEPS]
        width = 400
        drawn = lazy_readings(steps, Basis(width), width, is_moving=False)
        wanted = eager_readings(steps, ROWS * len(steps), noisy=True)
        assert not np.allclose(drawn @ drawn.T, wanted @ wanted.T, rtol=1e-3, atol=1e-3)

    def test_a_checkpoint_without_its_history(self, monkeypatch):
        def forget(self, tables, *context):
            self._sum.clear()
            self._stamps.fill(0)

        monkeypatch.setattr(LazyNoise, "settle_all", forget)
        assert self.broken(LazyMemory)

    # The fifth, the same noise in every process, is in test_deviates and tests/statistical.


def test_the_eager_path_has_the_same_law(monkeypatch):
    steps = [Step(1.0, LinearStep(0.1), np.arange(ROWS), np.arange(ROWS)) for _ in range(3)]
    orders = []
    settle_all = LazyNoise.settle_all
    monkeypatch.setattr(LazyNoise, "settle_all", lambda *a: (orders.append(1), settle_all(*a))[1])
    check_law(steps, is_moving=False)
    assert orders
    monkeypatch.setattr(lazy, "EAGER_SHARE", 2.0)
    check_law(steps, is_moving=False)


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_blocks_do_not_change_what_is_owed(block):
    noise, width = LazyNoise(50, 60, Basis(60)), 60
    noise._block = block
    table = np.zeros((50, width))
    noise.owe(2.0)
    noise.settle((table,), np.array([7, 7, 30, 2]))
    noise.owe(1.0)
    noise.settle_all((table,))
    np.testing.assert_allclose((table**2).sum(1), 3.0)
    assert np.allclose(table @ table.T, 3.0 * np.eye(50))


def test_four_bytes_a_row():
    noise = LazyNoise(1_000_000, 64, Silent(1))
    assert noise._stamps.nbytes == 4_000_000
    arrays = [v for v in vars(noise).values() if isinstance(v, np.ndarray)]
    assert sum(a.nbytes for a in arrays) == 4_000_000
    noise.owe(1.0)
    noise.settle((np.zeros((1_000_000, 64), np.float32),), np.arange(3000))
    assert sum(b.nbytes for b in noise._held) < 1 << 20


@pytest.mark.parametrize("row", [-1, 10, 1000])
def test_a_row_outside_of_the_table_is_refused_before_anything_is_paid(row: int) -> None:
    noise, table = LazyNoise(10, 40, Basis(40)), np.zeros((10, 40))
    noise.owe(1.0)
    with pytest.raises(UsageError, match="counted from 0"):
        noise.settle((table,), np.array([3, row]))
    assert not table.any()
    assert np.all(noise.variances(np.arange(10)) >= 1.0)


def test_an_interrupted_settle_owes_what_it_did_not_add(monkeypatch):
    noise, table = LazyNoise(10, 40, Basis(40)), np.zeros((10, 40))
    noise._block = 2
    noise.owe(1.0)
    add, calls = Basis.add, []

    def interrupted(self, out, variances):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(self, out, variances)

    monkeypatch.setattr(Basis, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        noise.settle((table,), np.arange(6))
    noise.settle_all((table,))
    np.testing.assert_allclose((table**2).sum(1), 1.0)


def test_what_is_drawn_is_counted():
    noise, table = LazyNoise(100, 4, Silent(1)), np.zeros((100, 4))
    for _ in range(5):
        noise.owe(1.0)
        noise.settle((table,), np.array([1, 2, 2]))
    assert noise.drawn == 10
    noise.settle_all((table,))
    assert noise.drawn == 10 + 98


def test_variances_say_what_is_owed():
    noise, table = LazyNoise(3, 4, Silent(1)), np.zeros((3, 4))
    noise.owe(1.0)
    noise.settle((table,), np.array([1]))
    noise.owe(0.5)
    np.testing.assert_allclose(noise.variances(np.arange(3)), [1.5, 0.5, 1.5])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: LazyNoise(0, 3), "at least 1"),
        (lambda: LazyNoise(3, 0), "at least 1"),
        (lambda: LazyNoise(3, 3).owe(-1.0), "at least 0"),
        (lambda: LazyNoise(3, 3).owe(float("nan")), "finite"),
        (lambda: LazyNoise(3, 3).owe(1.0, LinearStep(0.1)), "exactly where rows move"),
        (lambda: LazyNoise(3, 3, moving=True).owe(1.0), "exactly where rows move"),
    ],
)
def test_what_cannot_be_done_is_refused(call, match):
    with pytest.raises(UsageError, match=match):
        call()


def test_more_steps_than_a_stamp_can_tell_are_refused():
    noise = LazyNoise(3, 2)
    noise._sum.steps = MOST_STEPS  # which take hours
    with pytest.raises(UsageError, match="settle everything"):
        noise.owe(1.0)
