"""Masks are AES-128-CTR keystreams over prefixes, whatever the pieces they are added in."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from privrec.secagg import keys
from privrec.secagg.keys import Mask, apply_masks
from privrec.secagg.messages import word_type


def keystream(key: bytes, length: int, ring_bits: int) -> np.ndarray:
    cipher = Cipher(algorithms.AES128(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(cipher.update(bytes(length * ring_bits // 8)), word_type(ring_bits))


def sample(count: int, longest: int) -> list[Mask]:
    rng = np.random.default_rng(count)
    lengths = [longest, *rng.integers(1, longest + 1, count - 1).tolist()]
    return [Mask(rng.bytes(16), n, bool(rng.integers(2))) for n in lengths]


@pytest.mark.parametrize("ring_bits", [16, 32])
@pytest.mark.parametrize("longest", [1, 5, 16_384, 16_385, 70_001])
@pytest.mark.parametrize("count", [1, 9])
def test_every_mask_covers_its_prefix(ring_bits: int, longest: int, count: int) -> None:
    rng = np.random.default_rng(0)
    vector = rng.integers(0, 2**ring_bits, longest + 3).astype(word_type(ring_bits))
    expected = vector.copy()
    chosen = sample(count, longest)
    for mask in chosen:
        stream = keystream(mask.key, mask.length, ring_bits)
        part = expected[: mask.length]
        part[:] = part - stream if mask.negative else part + stream
    apply_masks(vector, iter(chosen))
    np.testing.assert_array_equal(vector, expected)


def test_memory_of_open_keystreams_is_bounded_and_batches_add_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = sample(25, 100)
    whole, parts = np.zeros(100, np.uint32), np.zeros(100, np.uint32)
    apply_masks(whole, chosen)
    monkeypatch.setattr(keys, "_BATCH", 4)
    apply_masks(parts, chosen)
    np.testing.assert_array_equal(whole, parts)


def test_opposite_masks_cancel_and_none_is_nothing() -> None:
    vector = np.arange(50, dtype=np.uint16)
    key = bytes(range(16))
    apply_masks(vector, [])
    apply_masks(vector, [Mask(key, 40, False), Mask(key, 40, True)])
    np.testing.assert_array_equal(vector, np.arange(50))
    assert "key" not in repr(Mask(key, 40, False))
