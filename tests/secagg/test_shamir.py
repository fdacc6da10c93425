"""Any quorum of shares gives the secret, and one share less says nothing about it."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privrec.errors import UsageError
from privrec.randomness import SecretRoot
from privrec.secagg import sharing
from privrec.secagg.sharing import PRIME

ROOT = SecretRoot.known(b"shares")
SECRETS = st.integers(0, PRIME - 1).map(lambda value: value.to_bytes(32, "little"))


def evaluated(coefficients: list[int], point: int) -> bytes:
    value = sum(c * pow(point, i, PRIME) for i, c in enumerate(coefficients)) % PRIME
    return value.to_bytes(32, "little")


@given(st.data())
def test_every_quorum_gives_every_secret_back(data: st.DataObject) -> None:
    secrets = data.draw(st.lists(SECRETS, min_size=1, max_size=3))
    points = data.draw(st.lists(st.integers(1, 2**32), min_size=1, max_size=12, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    dealt = sharing.split_secrets(secrets, threshold, points, ROOT.stream("test"))
    chosen = data.draw(st.permutations(range(len(points))))[:threshold]
    for secret, shares in zip(secrets, dealt, strict=True):
        assert all(map(sharing.in_field, shares))
        quorum = [shares[i] for i in chosen]
        assert sharing.combine_shares(quorum, [points[i] for i in chosen]) == secret


def test_shares_are_values_of_a_random_polynomial_over_the_prime_field() -> None:
    secret = bytes(31) + b"\xff"
    stream = ROOT.stream("polynomial")
    words = [int.from_bytes(stream.bytes(32), "little") % PRIME for _ in range(4)]
    coefficients = [int.from_bytes(secret, "little"), *reversed(words)]
    (shares,) = sharing.split_secrets([secret], 5, [1, 7, 2**32], ROOT.stream("polynomial"))
    assert shares == [evaluated(coefficients, x) for x in (1, 7, 2**32)]


def test_the_modulus_is_prime() -> None:
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 60):  # Miller and Rabin: wrong with a chance of 4^-58
        powers = [pow(base, odd << i, PRIME) for i in range(twos)]
        assert powers[0] == 1 or PRIME - 1 in powers
    assert PRIME.bit_length() == 256


def test_one_share_less_fits_every_secret() -> None:
    """For any secret some polynomial goes through the shares: they say nothing about it."""
    (shares,) = sharing.split_secrets([bytes(32)], 4, [1, 2, 3, 4], ROOT.stream("hiding"))
    known = [int.from_bytes(share, "little") for share in shares[:3]]
    for other in (0, 1, PRIME - 1, 12345):
        # The value at 4 that makes the secret `other`, by the weights at zero of 1, 2, 3, 4.
        w = [Fraction(4), Fraction(-6), Fraction(4), Fraction(-1)]
        last = (sum(int(a) * b for a, b in zip(w, known, strict=False)) - other) % PRIME
        forged = [*shares[:3], last.to_bytes(32, "little")]
        assert sharing.combine_shares(forged, [1, 2, 3, 4]) == other.to_bytes(32, "little")


def test_too_few_or_altered_shares_give_something_else() -> None:
    secret = b"\x07" * 32
    (shares,) = sharing.split_secrets([secret], 3, [1, 2, 3], ROOT.stream("few"))
    assert sharing.combine_shares(shares, [1, 2, 3]) == secret
    assert sharing.combine_shares(shares[:2], [1, 2]) != secret
    altered = bytes([shares[0][0] ^ 1]) + shares[0][1:]
    assert sharing.combine_shares([altered, *shares[1:]], [1, 2, 3]) != secret


def test_the_field_ends_below_the_prime() -> None:
    assert sharing.in_field((PRIME - 1).to_bytes(32, "little"))
    for beyond in (PRIME, 2**256 - 1):
        assert not sharing.in_field(beyond.to_bytes(32, "little"))
        with pytest.raises(UsageError, match="no element"):
            sharing.split_secrets([beyond.to_bytes(32, "little")], 2, [1, 2], ROOT.stream("beyond"))
