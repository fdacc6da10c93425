import math

import numpy as np
import pytest

from privrec.errors import UsageError
from privrec.privacy.mechanism import rounded_gaussian
from privrec.randomness import SecretRoot

ROOT = SecretRoot.known(b"noise")


@pytest.mark.parametrize("size", [0, 1, 7, 65_536, 200_001])
def test_is_the_rounded_normal_of_the_stream(size):
    noise = rounded_gaussian(ROOT.stream("n"), 1234.5, size)
    assert noise.dtype == np.int64
    assert np.array_equal(noise, np.rint(1234.5 * ROOT.stream("n").normal(size)))


def test_same_stream_same_noise_and_another_another():
    first = rounded_gaussian(ROOT.stream("n", 1), 100.0, 50)
    assert np.array_equal(first, rounded_gaussian(ROOT.stream("n", 1), 100.0, 50))
    assert not np.array_equal(first, rounded_gaussian(ROOT.stream("n", 2), 100.0, 50))


def test_a_stream_is_not_read_twice():
    stream = ROOT.stream("n")
    one, two = (rounded_gaussian(stream, 1000.0, 1000) for _ in range(2))
    assert np.count_nonzero(one == two) < 20


def test_largest_sigma():
    noise = rounded_gaussian(ROOT.stream("n"), 2.0**40, 10_000)
    assert 0.95 < noise.std() / 2.0**40 < 1.05


def test_small_sigma_is_allowed():
    assert not rounded_gaussian(ROOT.stream("n"), 0.01, 1000).any()


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, 2.0**41])
def test_sigma_outside_its_range(sigma):
    with pytest.raises(UsageError, match=r"privacy\.noise_multiplier"):
        rounded_gaussian(ROOT.stream("n"), sigma, 10)
