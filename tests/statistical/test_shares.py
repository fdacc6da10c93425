"""The noise in a released sum has the variance that is stated, and would be caught if not."""

import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from privrec.privacy.discrete import discrete_gaussian
from privrec.privacy.mechanism import Band, Shares, noise_seeds
from privrec.randomness import SecretRoot

pytestmark = pytest.mark.statistical

LEVEL = 1e-4  # of each test; the draws are seeded, so that a pass is a pass for good
SIZE = 40_000
WRONG = (0.9, 1.1)
FULL, LEAST, COLLUDERS = 24, 17, 2


def seeds_of(device, bands=1, round=0):
    return noise_seeds(SecretRoot.known(b"device %d" % device), bands, "run", round, 0, device)


def variance_fits(sample, variance):
    """Chi-square test of the variance about zero."""
    ratio = float(sample.astype(float) @ sample) / float(variance)
    tail = stats.chi2.cdf(ratio, len(sample))
    return LEVEL / 2 < tail < 1 - LEVEL / 2


def shape_fits(sample, variance):
    """Kolmogorov-Smirnov test against the normal; a jitter undoes the grid, to its width."""
    jitter = SecretRoot.known(b"jitter").stream("jitter").uint64(len(sample)) / 2.0**64 - 0.5
    scale = float(variance + 1 / 12) ** 0.5
    return stats.kstest((sample + jitter) / scale, "norm").pvalue > LEVEL


def fits_only(sample, variance):
    """Both tests accept the variance and reject 0.9 and 1.1 times its root."""
    accepted = variance_fits(sample, variance) and shape_fits(sample, variance)
    refused = [
        variance_fits(sample, variance * wrong**2) or shape_fits(sample, variance * wrong**2)
        for wrong in WRONG
    ]
    return accepted and not any(refused)


def released(shares, survivors):
    """The noise in the sum of some survivors, after removal."""
    total = sum(shares.draw(seeds_of(device)).astype(np.int64) for device in survivors)
    revealed = [[seeds_of(device)[0] for device in shares.removed(0, survivors)]]
    return total - shares.excess(revealed)


@pytest.mark.parametrize("survivors", [FULL, 20, LEAST])
def test_a_sum_has_the_variance_of_its_survivors(survivors):
    shares = Shares(0.8, 10**6, (Band(SIZE, LEAST, COLLUDERS),))
    accounted = 0.8**2 * 10**6
    expected = survivors * accounted / (LEAST - COLLUDERS)
    assert fits_only(released(shares, range(survivors)), expected)
    assert float(shares.kept(0, survivors) * shares.share_variance(0)) == pytest.approx(expected)


@pytest.mark.parametrize("survivors", [FULL, 20, LEAST])
def test_without_excess_it_has_the_accounted_variance_itself(survivors):
    shares = Shares(0.8, 10**6, (Band(SIZE, LEAST),), remove_excess=True)
    assert fits_only(released(shares, range(survivors)), 0.8**2 * 10**6)


@pytest.mark.parametrize("survivors", [FULL, LEAST])
def test_what_stays_secret_from_colluders_has_the_accounted_variance(survivors):
    """The colluders know their shares and the removed ones; the rest is what is accounted."""
    shares = Shares(0.8, 10**6, (Band(SIZE, LEAST, COLLUDERS),), True)
    known = [shares.draw(seeds_of(device)).astype(np.int64) for device in range(COLLUDERS)]
    assert fits_only(released(shares, range(survivors)) - sum(known), 0.8**2 * 10**6)


@pytest.mark.parametrize("survivors", [FULL, LEAST])
def test_bands_have_their_own_variances(survivors):
    bands = (Band(SIZE, LEAST), Band(SIZE, 5, 1))
    shares = Shares(0.8, 10**6, bands)
    total = sum(shares.draw(seeds_of(d, 2)).astype(np.int64) for d in range(survivors))
    for band, part in enumerate((total[:SIZE], total[SIZE:])):
        assert fits_only(part, survivors * shares.share_variance(band))


def bins_fit(sample, law):
    """Chi-square test of the probability of each integer from -4 to 4, and of what is beyond."""
    edges = np.concatenate([[-np.inf], np.arange(-4, 6) - 0.5, [np.inf]])
    inner = [law(x) for x in range(-4, 5)]
    outside = (1 - sum(inner)) / 2
    found = np.histogram(sample, edges)[0]
    return stats.chisquare(found, np.array([outside, *inner, outside]) * len(sample)).pvalue > LEVEL


def gaussian_law(variance):
    x = np.arange(-60, 61)
    total = np.exp(-(x**2) / (2 * variance)).sum()
    return lambda place: np.exp(-(place**2) / (2 * variance)) / total


def skellam_law(variance):
    return lambda place: stats.skellam.pmf(place, variance / 2, variance / 2)


@pytest.mark.parametrize("variance", [1, 3])
def test_every_integer_has_its_probability(variance):
    from fractions import Fraction

    stream = SecretRoot.known(b"bins").stream("n")
    sample = discrete_gaussian(stream, Fraction(variance), 400_000)
    assert bins_fit(sample, gaussian_law(variance))
    assert not any(bins_fit(sample, gaussian_law(variance * wrong**2)) for wrong in WRONG)
    assert not bins_fit(sample, skellam_law(variance))


@pytest.mark.parametrize("bits", [20.5, 27, 34, 44])
def test_wide_gaussians_have_their_scale_and_shape(bits):
    from fractions import Fraction

    variance = Fraction(int(2**bits))
    sample = discrete_gaussian(SecretRoot.known(b"wide").stream("n"), variance, SIZE)
    assert fits_only(sample.astype(np.int64), variance)


@pytest.mark.parametrize("deviations", [3.0, 4.0, 5.0])
@pytest.mark.parametrize("variance", [10**6, 10**9])
def test_the_tail_is_there(deviations, variance):
    from fractions import Fraction

    size = 4_000_000
    sample = discrete_gaussian(SecretRoot.known(b"tail").stream("n"), Fraction(variance), size)
    beyond = np.count_nonzero(np.abs(sample) > deviations * variance**0.5)
    expected = 2 * stats.norm.sf((np.floor(deviations * variance**0.5) + 0.5) / variance**0.5)
    assert stats.binomtest(beyond, size, expected).pvalue > LEVEL


def correlated(one, two):
    return (
        stats.pearsonr(one, two).pvalue < LEVEL
        or stats.pearsonr(one.astype(float) ** 2, two.astype(float) ** 2).pvalue < LEVEL
    )


SHARES = Shares(1.0, 10**6, (Band(SIZE, 10), Band(SIZE, 10)))


def test_devices_rounds_and_bands_are_independent():
    base = SHARES.draw(seeds_of(1, 2))
    first, second = base[:SIZE], base[SIZE:]
    assert not correlated(first, second)
    for other in (seeds_of(2, 2), seeds_of(1, 2, round=1)):
        assert not correlated(first, SHARES.draw(other)[:SIZE])
    assert correlated(first, SHARES.draw(seeds_of(1, 2))[:SIZE])


@pytest.mark.parametrize("lag", [1, 2, 4, 32_768])
def test_coefficients_are_independent(lag):
    noise = SHARES.draw_band(0, seeds_of(1)[0])
    assert not correlated(noise[:-lag], noise[lag:])


PROCESS = """
import sys
from pathlib import Path
from privrec.privacy.mechanism import Band, Shares, noise_seeds
from privrec.randomness import SecretRoot
path = Path(sys.argv[1])
root = SecretRoot.load(path) if path.exists() else SecretRoot.create(path)
shares = Shares(1.0, 10**6, (Band(20_000, 10),))
sys.stdout.buffer.write(shares.draw(noise_seeds(root, 1, "run", 0, 0)).astype("<i4").tobytes())
"""


def test_processes_with_roots_of_their_own_are_independent_and_with_one_root_agree(tmp_path):
    """These roots are drawn afresh: one run in some 10^8 fails by chance."""

    def noise(name):
        command = [sys.executable, "-c", PROCESS, str(tmp_path / "state" / name)]
        done = subprocess.run(command, capture_output=True, check=True)
        return np.frombuffer(done.stdout, "<i4").astype(float)

    one, again, two = noise("one"), noise("one"), noise("two")
    assert np.array_equal(one, again)
    assert stats.pearsonr(one, two).pvalue > 1e-8
    assert 0.9 < one.std() / 1000 * 10**0.5 < 1.1
