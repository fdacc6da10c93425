"""Integer noise has its exact distribution: checked against decimals, not against itself."""

import hashlib
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from privrec.errors import UsageError
from privrec.privacy import discrete
from privrec.privacy.discrete import SLACK, AliasTable, discrete_gaussian
from privrec.randomness import SecretRoot

ROOT = SecretRoot.known(b"discrete")
ALL = 1 << 256


def masses_of(table):
    """What each outcome of a table has, in units of 2^-256, read off its columns."""
    columns = len(table._marks)
    full = ALL // columns
    found = {}
    for column in range(columns):
        rest = int.from_bytes(table._rests[28 * column : 28 * column + 28], "little")
        own = ((int(table._marks[column]) - (column << table._shift)) << 224) + rest
        for outcome, mass in zip(
            table._outcomes[2 * column : 2 * column + 2].tolist(), (full - own, own), strict=True
        ):
            found[outcome] = found.get(outcome, 0) + mass
    return {outcome: mass for outcome, mass in found.items() if mass}


def normalised(weights):
    total = sum(weights.values())
    return {outcome: weight / total for outcome, weight in weights.items()}


def gaussian_law(variance):
    reach = math.ceil(21 * math.sqrt(variance)) + 3
    two = 2 * Decimal(variance.numerator) / Decimal(variance.denominator)
    return normalised({x: (-Decimal(x * x) / two).exp() for x in range(-reach, reach + 1)})


def variation(masses, law):
    off = sum(abs(Decimal(masses.get(x, 0)) / ALL - law.get(x, 0)) for x in {*masses, *law})
    return off / 2


@pytest.mark.parametrize("variance", [Fraction(1, 16), Fraction(1), Fraction(22, 7), Fraction(900)])
def test_a_gaussian_table_is_within_its_slack(variance):
    with localcontext() as context:
        context.prec = 110
        masses = masses_of(discrete._gaussian_table(variance))
        assert sum(masses.values()) == ALL
        assert 0 < variation(masses, gaussian_law(variance)) < Decimal(SLACK)
        # Another variance, off by 2^-200, would show: the bound is not an empty one.
        other = gaussian_law(variance + Fraction(1, 2**200))
        assert variation(masses, other) > Decimal(SLACK)


def parts_of(variance):
    """The sampler of a variance, with what narrow parts it is made of."""
    made = []
    table = discrete._gaussian_table
    try:
        discrete._gaussian_table = lambda v: made.append(v) or None
        sampler = discrete._parts.__wrapped__(variance)
    finally:
        discrete._gaussian_table = table
    return [(factor, v) for (factor, _), v in zip(sampler, made, strict=True)]


@pytest.mark.parametrize(
    "variance", [Fraction(2**20) + Fraction(1, 3), Fraction(2**26), Fraction(2**44), 3 * 10**9]
)
def test_a_wide_gaussian_is_a_sum_of_narrow_ones_within_the_slack(variance):
    parts = parts_of(Fraction(variance))
    assert len(parts) > 1
    assert sum(factor**2 * v for factor, v in parts) == variance
    for (factor, v), (following, _) in zip(parts, parts[1:], strict=False):
        assert v <= 2**20
        step = following // factor
        rest = sum((f // following) ** 2 * w for f, w in parts if f >= following)
        tau = v * rest / (v + step**2 * rest)
        with localcontext() as context:
            context.prec = 90
            ripple = 2 * (-2 * Decimal(math.pi) ** 2 * Decimal(float(tau))).exp()
            assert ripple < Decimal(2) ** -254


def test_the_sum_of_two_parts_has_the_law_of_the_whole():
    """The theorem that wide draws rest on, by convolution, where e is large enough to see."""

    def law(variance):
        x = np.arange(-400, 401)
        weights = np.exp(-(x**2) / (2 * variance))
        return weights / weights.sum()

    def distance(ratio, step, rest):
        strided = np.zeros(800 * step + 1)
        strided[::step] = law(rest)
        total = np.convolve(law(ratio * step**2), strided)
        x = np.arange(len(total)) - len(total) // 2
        whole = np.exp(-(x**2) / (2 * step**2 * (ratio + rest)))
        inside = np.abs(x) < 60
        return np.abs(total[inside] / (whole / whole.sum())[inside] - 1).max()

    assert distance(9, 4, 100.0) < 1e-12
    for ratio in (0.3, 0.6):
        tau = ratio * 100 / (ratio + 100)
        assert 0.4 < distance(ratio, 4, 100.0) / (2 * math.exp(-2 * math.pi**2 * tau)) <= 2


class Words:
    """A stream that says what it is told to."""

    def __init__(self, words, tie=b""):
        self.words, self.tie = words, tie

    def uint32(self, size):
        return np.array(self.words[:size], np.uint32)

    def bytes(self, n):
        taken, self.tie = self.tie[:n], self.tie[n:]
        return taken


def drawn(table, words, tie=b""):
    out = np.empty(len(words), np.int32)
    table.draw(Words(words, tie), out)
    return out.tolist()


def test_a_tie_is_settled_by_the_bits_of_the_threshold():
    third = ALL // 3
    table = AliasTable(7, [third, ALL - third])  # two columns; the first has all of the small mass
    mark = int(table._marks[0])
    assert drawn(table, [0, mark - 1, mark + 1, 2**31 - 1, 2**31, 2**32 - 1]) == [7, 7, 8, 8, 8, 8]
    rest = third % 2**224
    assert drawn(table, [mark], (rest - 1).to_bytes(28, "little")) == [7]
    assert drawn(table, [mark], rest.to_bytes(28, "little")) == [8]
    both = (rest - 1).to_bytes(28, "little") + rest.to_bytes(28, "little")
    assert drawn(table, [mark, 5, mark], both) == [7, 7, 8]


def test_a_certain_outcome_is_certain():
    table = AliasTable(-3, [0, ALL, 0])
    assert set(drawn(table, [0, 1, 2**30, 2**31, 2**32 - 1], bytes(2800))) == {-2}


@pytest.mark.parametrize("size", [0, 1, 32_768, 100_001])
def test_same_stream_same_noise_and_another_another(size):
    draw = discrete_gaussian
    first = draw(ROOT.stream("n", 1), Fraction(10**5), size)
    assert first.dtype == np.int32
    assert first.shape == (size,)
    assert np.array_equal(first, draw(ROOT.stream("n", 1), Fraction(10**5), size))
    if size > 1:
        assert not np.array_equal(first, draw(ROOT.stream("n", 2), Fraction(10**5), size))


@pytest.mark.parametrize(
    ("variance", "digest"),
    [
        (Fraction(3, 7), "87b65292999cde76"),
        (Fraction(12345), "c58e93d4ea04cbb1"),
        (Fraction(2**33, 3), "bec8379ae58f0af2"),
    ],
)
def test_draws_are_a_protocol_that_never_changes(variance, digest):
    """A server draws a device's share again, on another machine, to take it off."""
    noise = discrete_gaussian(ROOT.stream("protocol"), variance, 100_000).astype("<i4").tobytes()
    assert hashlib.sha256(noise).hexdigest()[:16] == digest


def test_a_stream_is_not_read_twice():
    stream = ROOT.stream("n")
    one, two = (discrete_gaussian(stream, Fraction(10**6), 1000) for _ in range(2))
    assert np.count_nonzero(one == two) < 20


@pytest.mark.parametrize("variance", [Fraction(0), Fraction(-1), Fraction(1, 17), Fraction(2**45)])
def test_variance_outside_its_range(variance):
    with pytest.raises(UsageError, match=r"privacy\.scale_bits"):
        discrete_gaussian(ROOT.stream("n"), variance, 10)
