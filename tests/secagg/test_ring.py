"""Integers of a checked norm: unbiased, never longer than the bound, refused when not clipped."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from privrec.device.update import clip
from privrec.errors import ReleaseRefused, UsageError
from privrec.randomness import SecretRoot
from privrec.secagg.ring import Encoding, Load, Ring, Rotation, spread, squared_norms

ROOT = SecretRoot.known(b"test")
UNIT = st.floats(-1, 1, width=32)


class Fixed:
    """Coins that are all the same: the most and the least that rounding can add."""

    def __init__(self, word: int) -> None:
        self.word = word

    def uint16(self, size: int) -> np.ndarray:
        return np.full(size, self.word, np.uint16)


def squared(integers: np.ndarray) -> int:
    return sum(int(value) ** 2 for value in integers.ravel())


def by_formula(scale_bits: int, k: int) -> float:
    """The smaller bound on the squared norm of Kairouz et al., with beta = exp(-1/2)."""
    r = 2.0**scale_bits
    return min((r + math.sqrt(k)) ** 2, r**2 + k / 4 + math.sqrt(2 * 0.5) * (r + math.sqrt(k) / 2))


@pytest.mark.parametrize("dimension", [1, 2, 50, 3_000, 200_000, 10**7])
@pytest.mark.parametrize("scale_bits", [1, 4, 8, 13, 20])
@pytest.mark.parametrize("clip_norm", [1e-3, 1.0, 77.7])
def test_the_bound_is_the_published_one(dimension: int, scale_bits: int, clip_norm: float) -> None:
    encoding = Encoding(clip_norm, dimension, scale_bits)
    assert encoding.squared_bound == math.floor(by_formula(scale_bits, dimension))
    assert encoding.bound**2 == pytest.approx(encoding.squared_bound, rel=1e-12)
    assert encoding.scale * clip_norm == pytest.approx(2**scale_bits)


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=UNIT),
    st.floats(1e-2, 1e2),
    st.integers(1, 20),
    st.binary(min_size=1, max_size=4),
)
def test_no_encoded_vector_is_longer_than_the_bound(
    values: np.ndarray, clip_norm: float, scale_bits: int, name: bytes
) -> None:
    encoding = Encoding(clip_norm, values.shape[1], scale_bits)
    clipped = clip(values * np.float32(3 * clip_norm), clip_norm)
    integers = encoding.encode(clipped, ROOT.stream("rounding", name))
    assert integers.dtype == np.int32
    assert integers.shape == values.shape
    for row, real in zip(integers, clipped, strict=True):
        assert squared(row) <= encoding.squared_bound
        assert np.abs(row - real.astype(np.float64) * encoding.scale).max() <= 1 + 2**-3
    assert not integers[clipped == 0].any()


def adversaries(k: int) -> dict[str, np.ndarray]:
    """Vectors of length 1 whose rounding could add most."""
    half = np.full(k, 0.5) / 2**13
    half[0] = math.sqrt(max(0.0, 1 - float(half[1:] @ half[1:])))
    tiny = np.full(k, 1e-9)
    tiny[0] = 1
    rng = np.random.default_rng(0)
    normal = rng.normal(size=k)
    signs = np.where(np.arange(k) % 2, -1.0, 1.0)
    return {
        "flat": np.ones(k) / math.sqrt(k),
        "alternating": signs / math.sqrt(k),
        "one": np.eye(1, k)[0],
        "halves": half,
        "tiny": tiny,
        "normal": normal / np.linalg.norm(normal),
    }


@pytest.mark.parametrize("name", ["flat", "alternating", "one", "halves", "tiny", "normal"])
@pytest.mark.parametrize("k", [2, 100, 30_000])
@pytest.mark.parametrize("scale_bits", [6, 13])
def test_vectors_at_the_clip_norm_are_encoded_within_the_bound(
    name: str, k: int, scale_bits: int
) -> None:
    encoding = Encoding(2.5, k, scale_bits)
    values = clip(np.tile(2.5 * adversaries(k)[name], (20, 1)).astype(np.float32), 2.5)
    integers = encoding.encode(values, ROOT.stream("adversary", name, k))
    lengths = [squared(row) for row in integers]
    assert max(lengths) <= encoding.squared_bound
    assert min(lengths) > 0.5 * 4**scale_bits


def test_the_finest_grid_keeps_its_bound_though_float32_cannot_tell() -> None:
    """Integers of squared norms about 2^40, where neighbours in float32 are 2^17 apart."""
    encoding = Encoding(1.0, 1000, 20)
    rows = np.random.default_rng(0).standard_normal((1000, 1000))
    values = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    integers = encoding.encode(values, ROOT.stream("finest"))
    assert max(map(squared, integers)) <= encoding.squared_bound


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 70_000), (3, 1 << 16), (2_185, 30)])
def test_squared_norms_of_integers_are_exact(shape: tuple[int, int]) -> None:
    """In parts of the rows, of which the last may be shorter."""
    integers = np.random.default_rng(1).integers(-(2**17), 2**17, shape)
    expected = [sum(number * number for number in row) for row in integers.tolist()]
    assert squared_norms(integers.astype(np.float32)).tolist() == expected


def test_a_rounding_that_is_too_long_is_drawn_again() -> None:
    """Halves everywhere: one draw in some forty exceeds the bound, and no result ever does."""
    encoding = Encoding(1.0, 4096, 5)
    values = np.full((1000, 4096), 1 / 64, np.float32)
    coins = ROOT.stream("retries").uint16(values.size).reshape(values.shape) / 65536
    once = np.floor(values * encoding.scale + coins)
    assert 0.005 < np.mean((once**2).sum(1) > encoding.squared_bound) < 0.1
    integers = encoding.encode(values, ROOT.stream("retries")).astype(np.int64)
    lengths = (integers**2).sum(1)
    assert lengths.max() <= encoding.squared_bound
    assert lengths.max() > 0.99 * encoding.squared_bound
    assert lengths.min() > 0.8 * encoding.squared_bound


@pytest.mark.statistical
@pytest.mark.parametrize("fraction", [0.0, 2**-10, 0.1, 0.5, 0.9, -0.3, -0.999])
def test_rounding_is_unbiased(fraction: float) -> None:
    trials = 200_000
    encoding = Encoding(1.0, 1, 13)
    values = np.full((trials, 1), (100 + fraction) / encoding.scale, np.float32)
    integers = encoding.encode(values, ROOT.stream("unbiased", str(fraction)))
    exact = float(values[0, 0]) * encoding.scale
    below = math.floor(exact)
    assert set(np.unique(integers)) <= {below, below + 1}
    deviation = math.sqrt(max((exact - below) * (below + 1 - exact), 1e-4) / trials)
    assert abs(integers.mean() - exact) < 4 * deviation + 2**-15


@pytest.mark.statistical
def test_coordinates_are_rounded_independently() -> None:
    encoding = Encoding(1.0, 2, 13)
    values = np.full((100_000, 2), 10.5 / encoding.scale, np.float32)
    integers = encoding.encode(values, ROOT.stream("independent"))
    both = np.corrcoef(integers.T)[0, 1]
    rows = np.corrcoef(integers[:-1, 0], integers[1:, 0])[0, 1]
    assert abs(both) < 0.015
    assert abs(rows) < 0.015


@pytest.mark.parametrize("word", [0, 65535])
def test_zeros_stay_zeros_whatever_the_coins(word: int) -> None:
    encoding = Encoding(1.0, 6, 13)
    assert not encoding.encode(np.zeros((3, 6), np.float32), Fixed(word)).any()


@pytest.mark.parametrize("word", [0, 65535])
def test_integers_stay_what_they_are(word: int) -> None:
    encoding = Encoding(1.0, 3, 10)
    exact = np.array([[5, -7, 60]])
    values = (exact / encoding.scale).astype(np.float32)
    assert np.array_equal(encoding.encode(values, Fixed(word)), exact)


def test_coins_decide_the_rounding_and_nothing_else_does() -> None:
    encoding = Encoding(1.0, 50, 13)
    values = clip(np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32), 1.0)
    one, two, other = (encoding.encode(values, ROOT.stream("coins", n)) for n in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    assert np.abs(one - other).max() == 1


@pytest.mark.parametrize("length", [1.1, 2.0, 1e4])
def test_a_vector_that_was_not_clipped_is_refused(length: float) -> None:
    values = np.zeros((2, 40), np.float32)
    values[1] = length / math.sqrt(40)
    with pytest.raises(ReleaseRefused, match="clip before encoding"):
        Encoding(1.0, 40, 13).encode(values, ROOT.stream("long"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_nothing_that_is_not_finite_gets_through(bad: float) -> None:
    encoding, values = Encoding(1.0, 4, 13), np.array([[bad, 0.1, 0, 0]], np.float32)
    with np.errstate(invalid="ignore", over="ignore"), pytest.raises(ReleaseRefused):
        encoding.encode(values, ROOT.stream("bad"))


def test_the_public_dimension_bounds_a_sparse_vector_no_less() -> None:
    """A device sends few coefficients; the bound is that of all and tells nothing of how many."""
    wide, narrow = Encoding(1.0, 10**6), Encoding(1.0, 4)
    values = np.full((1, 4), 0.5, np.float32)
    assert wide.bound > narrow.bound
    assert squared(wide.encode(values, ROOT.stream("sparse"))) <= wide.squared_bound


@given(st.floats(1e-6, 1e6), st.integers(1, 20), st.integers(-(2**40), 2**40))
def test_decode_gives_back_the_units(clip_norm: float, scale_bits: int, integer: int) -> None:
    encoding = Encoding(clip_norm, 10, scale_bits)
    decoded = encoding.decode(np.array([integer, 2**scale_bits]))
    assert decoded.dtype == np.float64
    assert decoded[0] * encoding.scale == pytest.approx(integer, rel=1e-12)
    assert decoded[1] == pytest.approx(clip_norm, rel=1e-12)


@pytest.mark.parametrize("bits", [16, 32])
def test_sums_in_a_ring_are_exact_within_it(bits: int) -> None:
    small = Ring(bits)
    rng = np.random.default_rng(0)
    values = rng.integers(-small.half // 8, small.half // 8, size=(8, 1000))
    total = small.enter(values).sum(0, dtype=small.dtype)
    assert total.dtype == small.dtype
    assert small.dtype.itemsize == bits // 8
    assert np.array_equal(small.leave(total), values.sum(0))
    assert small.leave(total).dtype == np.int64


@pytest.mark.parametrize("bits", [16, 32])
def test_outside_it_they_wrap_around(bits: int) -> None:
    small = Ring(bits)
    edge = np.array([-small.half, -1, 0, small.half - 1])
    assert np.array_equal(small.leave(small.enter(edge)), edge)
    beyond = np.array([small.half, -small.half - 1])
    assert np.array_equal(small.leave(small.enter(beyond)), [-small.half, small.half - 1])


@given(st.integers(-(2**40), 2**40), st.sampled_from([16, 32]))
def test_wrapping_is_a_multiple_of_the_ring(integer: int, bits: int) -> None:
    small = Ring(bits)
    found = int(small.leave(small.enter(np.array([integer])))[0])
    assert (integer - found) % 2**bits == 0
    assert -small.half <= found < small.half


def largest_sums(encoding: Encoding, load: Load, trials: int) -> np.ndarray:
    """The largest coefficient of noisy sums of one worst update, turned anew each time."""
    rng, found = np.random.default_rng(1), []
    for trial in range(trials):
        seed = hashlib.sha256(b"%d" % trial).digest()
        update = np.full((1, load.size), encoding.clip_norm / math.sqrt(load.size), np.float32)
        if load.spread == 1:
            update = np.eye(1, load.size, dtype=np.float32) * np.float32(encoding.clip_norm)
        else:
            update = Rotation((load.size,), seed).apply(update)
        total = load.devices * update[0].astype(np.float64) * encoding.scale
        noise = rng.normal(size=load.size) * math.sqrt(load.noise * encoding.squared_bound)
        found.append(np.abs(total + noise).max())
    return np.array(found)


@pytest.mark.parametrize(("size", "scale_bits"), [(1024, 8.0), (1000, 8.0), (1024, 8.75)])
def test_the_wrap_probability_is_an_upper_bound(size: int, scale_bits: float) -> None:
    encoding = Encoding(1.0, size, scale_bits)
    load = Load(size, 900, 9.0, spread(size))
    bound = Ring(16).wrap_probability(encoding, load)
    found = np.mean(largest_sums(encoding, load, 200) >= 2**15)
    assert found <= bound
    if scale_bits > 8.5:
        assert found > 0.0
        with pytest.raises(UsageError, match=r"could wrap around in the 2\^16 ring"):
            Ring(16).check(encoding, load)


def test_the_wrap_probability_is_hoeffdings() -> None:
    encoding, load = Encoding(1.0, 1000, 7), Load(1000, 900, 2.0, 768)
    variance = (900 * 128 * (1 + 1e-4)) ** 2 / 768 + 2 * encoding.squared_bound
    room = 2**15 - 1 - 900 * 1.125
    expected = 2 * 1000 * math.exp(-(room**2) / (2 * variance))
    assert Ring(16).wrap_probability(encoding, load) == pytest.approx(expected, rel=1e-9)


def test_without_rotation_one_coefficient_may_hold_everything() -> None:
    encoding = Encoding(1.0, 1024, 7)
    flat = Load(1024, 300, 0.0)
    assert Ring(16).wrap_probability(encoding, flat) == 1
    assert largest_sums(encoding, flat, 1)[0] > 2**15
    turned = Load(1024, 300, 0.0, spread(1024))
    assert Ring(16).wrap_probability(encoding, turned) < 1e-9
    assert largest_sums(encoding, turned, 50).max() < 2**15
    few = Load(1024, 200, 0.0)
    assert Ring(16).wrap_probability(encoding, few) == 0  # 200 times the bound fits for sure


def test_noise_is_counted() -> None:
    encoding = Encoding(1.0, 2**17, 13)
    calm, loud = (Load(2**17, 1000, noise) for noise in (1.0, 6e7))
    assert Ring().wrap_probability(encoding, calm) == 0
    assert 0 < Ring().wrap_probability(encoding, loud) < 1


def test_a_refusal_names_a_scale_that_fits() -> None:
    encoding, load = Encoding(1.0, 2**16, 13), Load(2**16, 1000, 1.5, spread(2**16))
    with pytest.raises(UsageError) as refused:
        Ring(16).check(encoding, load)
    fitting = Ring(16).fitting_scale_bits(encoding, load)
    assert 9 < fitting < 10
    assert f"lower privacy.scale_bits to {fitting:g}, or use the ring of 2^32" in str(refused.value)
    Ring(16).check(replace(encoding, scale_bits=fitting), load)
    with pytest.raises(UsageError):
        Ring(16).check(replace(encoding, scale_bits=fitting + 1 / 8), load)


def test_where_no_scale_fits_fewer_devices_do() -> None:
    load = Load(16, 40_000, 1.0, 16)
    assert Ring(16).fitting_scale_bits(Encoding(1.0, 16), load) == 0
    with pytest.raises(UsageError, match="take fewer devices"):
        Ring(16).check(Encoding(1.0, 16), load)


def test_a_scale_need_not_be_whole() -> None:
    encoding = Encoding(2.0, 100, 9.625)
    assert encoding.scale == pytest.approx(2**9.625 / 2)
    values = clip(np.random.default_rng(0).normal(size=(5, 100)).astype(np.float32), 2.0)
    integers = encoding.encode(values, ROOT.stream("fraction"))
    assert max(squared(row) for row in integers) <= encoding.squared_bound
    assert np.abs(integers - values * encoding.scale).max() <= 1 + 2**-3


def test_a_turned_sum_comes_back_through_the_small_ring() -> None:
    """The whole way: clip, turn, round, enter, sum, leave, decode, turn back."""
    devices, sizes = 40, (700, 300)
    encoding, turn = Encoding(1.0, 1000, 8), Rotation(sizes, bytes(32))
    values = clip(np.random.default_rng(3).normal(size=(devices, 1000)).astype(np.float32), 1.0)
    values[::3] = values[0]
    integers = encoding.encode(turn.apply(values), ROOT.stream("whole"))
    total = Ring(16).enter(integers).sum(0, dtype=np.uint16)
    back = turn.undo(encoding.decode(Ring(16).leave(total))[None])[0]
    error = np.abs(back - values.sum(0, dtype=np.float64)).max()
    assert error < 6 * math.sqrt(devices / 4) / encoding.scale


@pytest.mark.parametrize("scale_bits", [4, 13, 20])
def test_a_cohort_that_could_wrap_around_is_refused(scale_bits: int) -> None:
    encoding = Encoding(1.0, 100_000, scale_bits)
    most = int(2**31 / encoding.bound)
    Ring().check(encoding, Load(100_000, most * 99 // 100, noise=0))
    with pytest.raises(UsageError, match=r"could wrap .* 2\^32 ring .*lower privacy"):
        Ring().check(encoding, Load(100_000, most + 1, noise=0))


def test_the_ring_holds_the_devices_that_the_design_promises() -> None:
    Ring().check(Encoding(1.0, 118_000), Load(118_000, 250_000, noise=0))
