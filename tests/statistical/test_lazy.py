"""Lazy noise drawn for real: scale and shape by delay, and what readings share."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from privrec.privacy.lazy import LazyMemory
from privrec.privacy.pending import LinearStep, Normals
from privrec.randomness import SecretRoot

pytestmark = pytest.mark.statistical

ROOT = SecretRoot.known(b"statistical tests of lazy noise")
ROWS, WIDTH = 400, 250
LEVEL = 1e-4
WRONG = [2 / 3, 0.97, 1.03, 3 / 2]
EVERY = np.arange(ROWS)


def table(*, moving=False):
    return LazyMemory(np.zeros((ROWS, WIDTH)), Normals(ROOT), moving=moving)


def variance_fits(sample, sigma):
    """Chi-square test of the variance about zero."""
    tail = stats.chi2.cdf(float(sample.ravel() @ sample.ravel()) / sigma**2, sample.size)
    return LEVEL / 2 < tail < 1 - LEVEL / 2


def shape_fits(sample, sigma):
    return stats.kstest(sample.ravel() / sigma, "norm").pvalue > LEVEL


def uncorrelated(one, two):
    """Whether the sample correlation is what independent samples have."""
    found = float(np.corrcoef(one.ravel(), two.ravel())[0, 1])
    return abs(found) * np.sqrt(one.size) < stats.norm.isf(LEVEL / 2)


@pytest.mark.parametrize("delay", [1, 2, 7, 100, 1025])
def test_each_delay_has_its_scale_and_shape(delay):
    memory = table()
    steps = [0.5 + (t % 3) for t in range(delay)]
    for variance in steps:
        memory.owe(variance)
    sigma, sample = np.sqrt(sum(steps)), memory.settled(EVERY[:300])
    assert variance_fits(sample, sigma)
    assert shape_fits(sample, sigma)
    assert not any(variance_fits(sample * wrong, sigma) for wrong in WRONG)
    assert not any(shape_fits(sample * wrong, sigma) for wrong in (2 / 3, 3 / 2))


@pytest.mark.parametrize("delay", [1, 5, 64])
def test_momentum_has_its_scale_in_value_and_velocity(delay):
    memory, update = table(moving=True), LinearStep(0.5, 0.9, 0.01)
    covariance = np.zeros((2, 2))
    for _ in range(delay):
        memory.step(EVERY[:0], np.zeros((0, WIDTH)), 2.0, update)
        A, b = update.matrix, update.gain
        covariance = A @ covariance @ A.T + 2.0 * np.outer(b, b)
    value, speed = memory.settled(), memory.velocities()
    assert variance_fits(value, np.sqrt(covariance[0, 0]))
    assert variance_fits(speed, np.sqrt(covariance[1, 1]))
    both = value / np.sqrt(covariance[0, 0]) + speed / np.sqrt(covariance[1, 1])
    correlation = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    assert variance_fits(both, np.sqrt(max(2 + 2 * correlation, 1e-12))) or correlation < -0.99
    assert not variance_fits(value * 2 / 3, np.sqrt(covariance[0, 0]))
    assert not variance_fits(value * 3 / 2, np.sqrt(covariance[0, 0]))


def test_two_readings_share_the_smaller_variance():
    memory = table()
    for _ in range(4):
        memory.owe(1.0)
    first = memory.settled(EVERY)
    for _ in range(5):
        memory.owe(1.0)
    second = memory.settled(EVERY)
    covariance = float((first * second).mean())
    # The product's variance is v1 v2 + c² for Gaussians.
    assert abs(covariance - 4.0) < 4 * np.sqrt((4 * 9 + 16) / first.size)
    assert variance_fits(second - first, np.sqrt(5))
    assert uncorrelated(first, second - first)
    assert not uncorrelated(first, second)


def test_rows_columns_and_rounds_are_independent():
    memory, rounds = table(), []
    before = memory.settled()
    for _ in range(3):
        memory.owe(1.0)
        after = memory.settled()
        rounds.append(after - before)
        before = after
    for sample in rounds:
        assert uncorrelated(sample[:-1], sample[1:])
        assert uncorrelated(sample[:, :-1], sample[:, 1:])
        # Cosine and sine of one angle stand half a row apart.
        assert uncorrelated(sample[:, : WIDTH // 2] ** 2, sample[:, WIDTH // 2 :] ** 2)
        sums = sample.sum(1) / np.sqrt(WIDTH)
        assert stats.kstest(sums, "norm").pvalue > LEVEL
    assert uncorrelated(rounds[0], rounds[1])
    assert uncorrelated(rounds[1], rounds[2])


PROGRAM = """
import numpy as np
from privrec.privacy.lazy import LazyMemory
memory = LazyMemory(np.zeros((50, 40), np.float32))
memory.owe(1.0)
print(*memory.settled().ravel())
"""


def test_processes_are_independent():
    samples = []
    for _ in range(2):
        run = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
        samples.append(np.array(done.stdout.split(), float))
    assert uncorrelated(*samples)
    assert not np.any(samples[0] == samples[1])


def test_a_scale_that_halves_the_variance_is_rejected(monkeypatch):
    monkeypatch.setattr("privrec.privacy.pending.rounded_up", lambda v: (v / 2).astype(np.float32))
    memory = table()
    memory.owe(1.0)
    assert not variance_fits(memory.settled(), 1.0)


def test_skipping_a_settle_is_rejected():
    memory = table()
    memory.owe(1.0)
    memory._stamps[:] = 1  # as if everything had been settled already
    memory.owe(1.0)
    assert not variance_fits(memory.settled(), np.sqrt(2))
