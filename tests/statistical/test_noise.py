"""The noise has the scale and the shape that are accounted, and would be caught if it had not."""

import numpy as np
import pytest
from scipy import stats

from privrec.privacy.mechanism import rounded_gaussian
from privrec.randomness import SecretRoot

pytestmark = pytest.mark.statistical

ROOT = SecretRoot.known(b"statistical tests")
SIZE = 100_000
LEVEL = 1e-4  # of each test; the draws are seeded, so that a pass is a pass for good
WRONG = [2 / 3, 0.97, 1.03, 3 / 2]


def noise(sigma, *context, size=SIZE):
    return rounded_gaussian(ROOT.stream("noise", *context), sigma, size)


def variance_fits(sample, sigma):
    """Chi-square test of the variance about zero, rounding included."""
    ratio = float(sample.astype(float) @ sample) / (sigma**2 + 1 / 12)
    tail = stats.chi2.cdf(ratio, len(sample))
    return LEVEL / 2 < tail < 1 - LEVEL / 2


def shape_fits(sample, sigma):
    """Kolmogorov-Smirnov test; a jitter over each step undoes the rounding, to its width."""
    jitter = ROOT.stream("jitter").uint64(len(sample)) / 2.0**64 - 0.5
    scale = np.hypot(sigma, np.sqrt(1 / 12))
    return stats.kstest((sample + jitter) / scale, "norm").pvalue > LEVEL


@pytest.mark.parametrize("sigma", [3.0, 1e4, 3e9])
def test_scale(sigma):
    assert variance_fits(noise(sigma, "scale"), sigma)
    assert not any(variance_fits(noise(sigma * wrong, "scale"), sigma) for wrong in WRONG)


@pytest.mark.parametrize("sigma", [20.0, 1e4, 3e9])
def test_shape(sigma):
    assert shape_fits(noise(sigma, "shape"), sigma)
    assert not any(shape_fits(noise(sigma * wrong, "shape"), sigma) for wrong in WRONG)


def test_other_shapes_of_the_same_variance_are_rejected():
    sigma = 1e4
    uniform = (ROOT.stream("u").uint64(SIZE) / 2.0**64 - 0.5) * np.sqrt(12) * sigma
    signs = np.where(ROOT.stream("s").uint16(SIZE) % 2, sigma, -sigma)
    assert not shape_fits(uniform, sigma)
    assert not shape_fits(signs, sigma)


def bins_fit(sample, sigma):
    """Chi-square test of the probability of each integer."""
    edges = np.arange(-4, 5) + 0.5
    cells = np.diff(np.concatenate([[0], stats.norm.cdf(edges / sigma), [1]]))
    found = np.histogram(sample, np.concatenate([[-np.inf], edges, [np.inf]]))[0]
    return stats.chisquare(found, cells * len(sample)).pvalue > LEVEL


@pytest.mark.parametrize("sigma", [0.8, 1.5])
def test_every_integer_has_its_probability(sigma):
    assert bins_fit(noise(sigma, "bins"), sigma)
    assert not any(bins_fit(noise(sigma * wrong, "bins"), sigma) for wrong in WRONG)
    truncated = np.trunc(sigma * ROOT.stream("noise", "bins").normal(SIZE))
    assert not bins_fit(truncated, sigma)


@pytest.mark.parametrize("deviations", [3.0, 4.0, 5.0])
def test_the_tail_is_there(deviations):
    size = 4_000_000
    beyond = np.count_nonzero(np.abs(noise(1e4, "tail", size=size)) > deviations * 1e4)
    expected = 2 * stats.norm.sf(deviations)
    assert stats.binomtest(beyond, size, expected).pvalue > LEVEL


def correlated(one, two):
    return stats.pearsonr(one, two).pvalue < LEVEL


def test_draws_are_independent():
    draw = noise(1e4, "round", 1)
    for other in (noise(1e4, "round", 2), noise(1e4, "other", 1), draw[::-1]):
        assert not correlated(draw, other)
        assert not correlated(draw.astype(float) ** 2, other.astype(float) ** 2)
    assert correlated(draw, noise(1e4, "round", 1))


@pytest.mark.parametrize("lag", [1, 2, 4096, 8192, 65_536])
def test_coefficients_are_independent(lag):
    # 4,096 apart lie the sine and cosine of one Box-Muller pair.
    draw = noise(1e4, "lags", size=4 * SIZE).astype(float)
    assert not correlated(draw[:-lag], draw[lag:])
    assert not correlated(draw[:-lag] ** 2, draw[lag:] ** 2)


def test_sum_of_rounds_has_the_variance_of_all():
    total = sum(noise(1e4, "sum", index) for index in range(9))
    assert variance_fits(total, 3e4)
    reused = 9 * noise(1e4, "sum", 0)
    assert not variance_fits(reused, 3e4)


def words_fit(words, bits):
    counts = np.bincount((words >> (bits - 8)).astype(np.int64), minlength=256)
    return stats.chisquare(counts).pvalue > LEVEL


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_words_are_uniform(bits):
    words = getattr(ROOT.stream("words", bits), f"uint{bits}")(SIZE)
    assert words_fit(words, bits)
    assert not words_fit(np.minimum(words, words[::-1]), bits)
    ones = sum(int(np.count_nonzero(words >> bit & 1)) for bit in range(bits))
    assert stats.binomtest(ones, bits * SIZE, 0.5).pvalue > LEVEL
