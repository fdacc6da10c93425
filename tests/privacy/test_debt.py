"""What rows owe, against the sums and products written out."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privrec.errors import UsageError
from privrec.privacy.pending import LinearStep, PendingNoise, PendingSteps, factor

positive = st.floats(1e-12, 1e6)
updates = st.builds(
    LinearStep, st.floats(0, 1), st.floats(0, 0.99), st.floats(0, 0.5), nesterov=st.booleans()
)


@given(st.lists(st.floats(0, 1e12), max_size=40), st.data())
def test_a_debt_is_never_below_the_exact_sum_and_hardly_above(variances, data):
    debt = PendingNoise()
    for variance in variances:
        debt.append(variance)
    stamp = data.draw(st.integers(0, len(variances)))
    owed = Fraction(float(debt.since(np.array([stamp]))[0]))
    exact = sum(map(Fraction, variances[stamp:]), Fraction(0))
    whole = sum(map(Fraction, variances), Fraction(0))
    assert (
        exact <= owed <= exact + whole * Fraction(len(variances) + 2, 2**52) + Fraction(1, 2**999)
    )


def test_a_difference_that_falls_between_two_floats_is_rounded_up():
    debt = PendingNoise()
    for variance in (1.0, 2.0**53 - 1, 2.0):
        debt.append(variance)
    assert float(debt.since(np.array([1]))[0]) > 2.0**53


@given(st.lists(st.tuples(updates, positive), min_size=1, max_size=70))
def test_composed_blocks_are_the_product_written_out(steps):
    drift = PendingSteps()
    for update, variance in steps:
        drift.append(update, variance)
    stamps = np.arange(len(steps) + 1)
    drifts, noises = drift.since(stamps)
    F, Q = np.eye(2), np.zeros((2, 2))
    expected = [(F, Q)]
    for update, variance in reversed(steps):
        Q = Q + F @ (variance * np.outer(update.gain, update.gain)) @ F.T
        F = F @ update.matrix
        expected.append((F, Q))
    for stamp, (F, Q) in zip(stamps, reversed(expected), strict=True):
        np.testing.assert_allclose(drifts[stamp], F, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(noises[stamp], Q, rtol=1e-9, atol=1e-12 * (1 + Q.max()))


@given(st.lists(st.tuples(updates, positive), min_size=1, max_size=20))
def test_the_factor_gives_the_covariance_back(steps):
    drift = PendingSteps()
    for update, variance in steps:
        drift.append(update, variance)
    stamps = np.arange(len(steps))
    _, noise = drift.since(stamps)
    first, cross, rest = factor(noise)
    scale = 1 + noise.max(axis=(1, 2))
    for made, wanted in (
        (first**2, noise[:, 0, 0]),
        (first * cross, noise[:, 0, 1]),
        (cross**2 + rest**2, noise[:, 1, 1]),
    ):
        np.testing.assert_allclose(made / scale, wanted / scale, rtol=1e-9, atol=1e-9)


@given(st.lists(updates, min_size=1, max_size=12))
def test_an_update_is_the_step_of_torch(steps):
    value = torch.nn.Parameter(torch.tensor([1.5], dtype=torch.float64))
    optimizer = torch.optim.SGD([value], lr=0.1, momentum=0.5)
    state = np.array([1.5, 0.0])
    for number, update in enumerate(steps):
        for name in ("lr", "momentum", "weight_decay", "nesterov"):
            optimizer.param_groups[0][name] = getattr(update, name)
        gradient = float(np.cos(number))
        value.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        state = update.matrix @ state + update.gain * gradient
        assert value.item() == pytest.approx(state[0], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("field", ["lr", "momentum", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_malformed_update_is_refused(field, value):
    with pytest.raises(UsageError, match=field):
        LinearStep(**{"lr": 0.1, field: value})


def test_a_difference_of_sums_that_rounds_down_is_put_up():
    """The sums are exact here, and their difference lies halfway between two floats."""
    debt = PendingNoise()
    steps = [2.0**-53, 1 - 2.0**-53, 2.0**-52]
    for variance in steps:
        debt.append(variance)
    owed = Fraction(float(debt.since(np.array([1]))[0]))
    assert owed >= sum(map(Fraction, steps[1:]))
