"""The hash is a wire protocol: published outputs, and a bijection that stays one on every width."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privrec.embedding.subspace import finalise, permute, splitmix64

MASK = 2**64 - 1

# Published outputs of splitmix64.
PUBLISHED = {
    1234567: [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ],
    0: [16294208416658607535, 7960286522194355700, 487617019471545679],
}


def reference(seed: int, count: int) -> list[int]:
    """The generator as it is published: a state that steps, in exact integers."""
    outputs = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


@pytest.mark.parametrize("seed", PUBLISHED)
def test_published_vectors(seed: int) -> None:
    expected = PUBLISHED[seed]
    assert splitmix64(seed, np.arange(len(expected))).tolist() == expected


@given(st.integers(-(2**70), 2**70))
def test_any_position_is_reached_without_the_ones_before(seed: int) -> None:
    expected = reference(seed & MASK, 40)
    positions = np.array([39, 0, 7, 7, 20])
    assert splitmix64(seed, positions).tolist() == [expected[p] for p in positions]


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16, np.uint64])
def test_the_type_and_shape_of_positions_do_not_matter(kind: type) -> None:
    positions = np.arange(24, dtype=kind).reshape(2, 3, 4)
    kept = positions.copy()
    outputs = splitmix64(9, positions)
    assert outputs.shape == (2, 3, 4)
    assert outputs.ravel().tolist() == reference(9, 24)
    assert np.array_equal(positions, kept)


def test_every_input_bit_moves_about_half_of_the_output() -> None:
    words = splitmix64(3, np.arange(256))
    flipped = words[:, None] ^ (np.uint64(1) << np.arange(64, dtype=np.uint64))
    changed = finalise(words.copy())[:, None] ^ finalise(flipped.copy())
    share = np.unpackbits(changed.view(np.uint8).reshape(256, 64, 8), axis=2).mean(axis=(0, 2))
    assert np.all(np.abs(share - 0.5) < 0.05)


@pytest.mark.parametrize("bits", range(17))
def test_permute_is_a_bijection(bits: int) -> None:
    for key in (0, 1, 2**63 + 5, -7):
        images = permute(key, np.arange(1 << bits), bits)
        assert np.array_equal(np.sort(images), np.arange(1 << bits))


@given(
    bits=st.integers(17, 63),
    key=st.integers(0, MASK),
    raw=st.lists(st.integers(0, MASK), min_size=2, max_size=50),
)
def test_permute_stays_injective_and_in_range_when_wide(
    bits: int, key: int, raw: list[int]
) -> None:
    positions = np.unique(np.array(raw, np.uint64) & np.uint64((1 << bits) - 1))
    images = permute(key, positions, bits)
    assert len(np.unique(images)) == len(positions)
    assert int(images.max()) < 1 << bits


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_permute_depends_on_its_key(bits: int) -> None:
    one, two = (permute(key, np.arange(1 << bits), bits) for key in (1, 2))
    assert np.count_nonzero(one == two) < 12  # a random pair agrees in one place, on average
    assert np.count_nonzero(one == np.arange(1 << bits)) < 12


def test_permute_keeps_its_argument() -> None:
    positions = np.arange(16, dtype=np.uint64)
    permute(5, positions, 4)
    assert np.array_equal(positions, np.arange(16))
