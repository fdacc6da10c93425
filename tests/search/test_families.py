"""Hash families: measured collision rates against their formulas, which must be able to fail."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest

from privrec.errors import UsageError
from privrec.randomness import SecretRoot, SecureStream
from privrec.search.hashing import (
    FAMILIES,
    Family,
    Shape,
    draw,
    own_shape,
    projection,
    signature,
)

DIM, DRAWS = 64, 10_000
ANGLES = (0.15, 0.5, 1.0, 1.6, 2.4)
ALPHA = 1e-6  # of all intervals together, some 100 of them


def stream(*context: str | int) -> SecureStream:
    return SecretRoot.known(b"a device of the tests").stream("lsh", *context)


def pair(angle: float, seed: int, dim: int = DIM) -> tuple[np.ndarray, np.ndarray]:
    """Two vectors at an angle, of different lengths."""
    rng = np.random.default_rng(seed)
    plane = np.linalg.qr(rng.standard_normal((dim, 2)))[0]
    x, y = plane[:, 0], np.cos(angle) * plane[:, 0] + np.sin(angle) * plane[:, 1]
    return (3 * x).astype(np.float32), (0.5 * y).astype(np.float32)


def collisions(family: Family, x: np.ndarray, y: np.ndarray, shape: Shape, seed: int) -> int:
    """In how many independent tables two vectors share their bucket."""
    many = Shape(shape.bits, DRAWS, shape.fold, shape.block)
    codes = draw(family, len(x), many, stream(family, shape.bits, seed)).codes(np.stack((x, y)))
    return int((codes[0] == codes[1]).sum())


def collision(family: Family, x: np.ndarray, y: np.ndarray, shape: Shape) -> float:
    """Probability, over the draw, that two vectors have the same code in one table.

    ``simhash``: ``(1 - angle(x, y) / π)^k``. ``pghash``: ``(1 - angle(F x, F y) / π)^k``.
    ``block_sign``: the mean of ``1 - angle(F_s x, F_s y) / π`` over all patterns ``s`` of block
    signs, with ``F_s = [s_1 I s_2 I ...]``, to the power ``k``.

    Args:
        family: one of :data:`FAMILIES`.
        x: shape ``(dim,)``, not zero.
        y: likewise.
        shape: of the codes.
    """
    if family == "simhash":
        return _same_sign(x, y) ** shape.bits
    fold = min(shape.block if family == "block_sign" else shape.fold, len(x))
    if family == "pghash":
        return _same_sign(*folded_to(np.stack((x, y)), fold)) ** shape.bits
    short = -len(x) % fold
    blocks = np.pad(np.stack((x, y)), ((0, 0), (0, short))).reshape(2, -1, fold)
    # The sign of all blocks together changes nothing, so the first one is held.
    patterns = product((1.0,), *((1.0, -1.0) for _ in range(blocks.shape[1] - 1)))
    chances = [_same_sign(*np.tensordot(blocks, np.array(p), ((1,), (0,)))) for p in patterns]
    return float(np.mean(chances)) ** shape.bits


def folded_to(rows: np.ndarray, fold: int) -> np.ndarray:
    """``F x`` with ``F = [I_c I_c ...]``: coordinates ``c`` apart added up, shape ``(m, c)``."""
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % fold)))
    return padded.reshape(len(rows), -1, fold).sum(axis=1)


def _same_sign(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    cosine = x @ y / np.sqrt((x @ x) * (y @ y))
    return float(1 - np.arccos(np.clip(cosine, -1, 1)) / np.pi)


def rejects(count: int, probability: float) -> bool:
    return binomtest(count, DRAWS, min(1.0, probability)).pvalue < ALPHA / 100


@pytest.mark.statistical
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_collide_as_often_as_the_formula_says(family: Family, bits: int) -> None:
    shape = Shape(bits, 1, fold=16, block=16)
    for number, angle in enumerate(ANGLES):
        x, y = pair(angle, number)
        count = collisions(family, x, y, shape, number)
        right = collision(family, x, y, shape)
        assert not rejects(count, right), (family, bits, angle, count / DRAWS, right)


def telling_pair(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Of many pairs, the one that tells the families' formulas apart best."""
    rng = np.random.default_rng(0)
    # Blocks of a vector that resemble each other are what folds and block signs are blind to.
    base = rng.standard_normal((200, 1, 16))
    weights, noise = rng.standard_normal((200, 2, 4, 1)), rng.standard_normal((200, 2, 4, 16))
    rows = (weights * base[:, None] + 0.7 * noise).reshape(200, 2, DIM).astype(np.float32)
    pairs = [(x, y) for x, y in rows]

    def gap(x: np.ndarray, y: np.ndarray) -> float:
        chances = sorted(collision(family, x, y, shape) for family in FAMILIES)
        return min(np.diff(chances))

    return max(pairs, key=lambda vectors: gap(*vectors))


@pytest.mark.statistical
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_formula_fails(family: Family) -> None:
    shape = Shape(2, 1, fold=16, block=16)
    x, y = telling_pair(shape)
    count = collisions(family, x, y, shape, 1)
    right = collision(family, x, y, shape)
    assert not rejects(count, right)
    # One function less or more, and 2/3 and 3/2 of them.
    for wrong in (right ** (1 / 2), right ** (2 / 3), right ** (3 / 2), right**2):
        assert rejects(count, wrong), (family, wrong, count / DRAWS)
    # The formula of another family is a wrong formula.
    for other in set(FAMILIES) - {family}:
        foreign = collision(other, x, y, shape)
        assert rejects(count, foreign), (family, other, foreign, count / DRAWS)


@pytest.mark.statistical
def test_a_fold_to_the_whole_length_is_simhash() -> None:
    x, y = pair(0.8, 3)
    whole, plain = Shape(6, fold=DIM), Shape(6)
    assert collision("pghash", x, y, whole) == pytest.approx(collision("simhash", x, y, plain))
    assert not rejects(collisions("pghash", x, y, whole, 5), collision("simhash", x, y, plain))


def shares_that_differ(angle: float, functions: list[np.ndarray]) -> np.ndarray:
    x, y = pair(angle, 5, dim=len(functions[0]))
    return np.array([((x @ f > 0) != (y @ f > 0)).mean() for f in functions])


@pytest.mark.statistical
@pytest.mark.parametrize("dim", [4, 16, 300])
@pytest.mark.parametrize("angle", [0.4, 1.0, 1.57, 2.4])
def test_each_bit_of_a_signature_differs_as_often_as_the_angle_says(dim: int, angle: float) -> None:
    draws = [signature(dim, 256, stream(dim, number)).matrix for number in range(120)]
    shares = shares_that_differ(angle, draws)
    error = shares.std() / np.sqrt(len(shares))
    assert abs(shares.mean() - angle / np.pi) < 4.5 * error
    for wrong in (2 / 3, 3 / 2):
        assert abs(shares.mean() - wrong * angle / np.pi) > 4.5 * error


@pytest.mark.statistical
def test_orthogonal_vectors_tell_an_angle_better_than_independent_ones() -> None:
    angle, shape = 1.2, Shape(256)
    rate = angle / np.pi
    ours = [signature(16, 256, stream("ours", n)).matrix for n in range(300)]
    plain = [projection("simhash", 16, shape, stream("plain", n)) for n in range(300)]
    independent = rate * (1 - rate) / 256
    assert shares_that_differ(angle, ours).var() < 0.7 * independent
    assert shares_that_differ(angle, plain).var() > 0.75 * independent


@pytest.mark.parametrize(("dim", "bits"), [(16, 256), (100, 256), (300, 256), (1, 8)])
def test_vectors_of_a_signature_are_orthogonal_in_groups(dim: int, bits: int) -> None:
    matrix = signature(dim, bits, stream("groups")).matrix
    assert matrix.shape == (dim, bits)
    for start in range(0, bits, dim):
        group = matrix[:, start : start + dim].astype(np.float64)
        np.testing.assert_allclose(group.T @ group, np.eye(group.shape[1]), atol=1e-6)


@pytest.mark.statistical
@pytest.mark.parametrize("fold", [8, 16, 32])
def test_folding_distorts_a_cosine_by_the_root_of_one_over_c_less_one_over_d(fold: int) -> None:
    rng, dim = np.random.default_rng(fold), 128
    x = rng.standard_normal((20_000, dim)).astype(np.float32)
    y = (0.3 * x + np.sqrt(1 - 0.09) * rng.standard_normal(x.shape)).astype(np.float32)

    def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))

    # A random direction's cosine in a fold scatters about its own by this, times 1 - cos^2.
    error = (cosines(folded_to(x, fold), folded_to(y, fold)) - cosines(x, y)).std()
    right = np.sqrt(1 / fold - 1 / dim) * (1 - 0.3**2)
    assert error == pytest.approx(right, rel=0.06)
    assert error != pytest.approx(right * 2 / 3, rel=0.06)
    assert error != pytest.approx(right * 3 / 2, rel=0.06)


@pytest.mark.statistical
def test_changing_one_item_changes_a_bit_as_often_as_its_angle_says() -> None:
    """Sensitivity: the hash of an item moves with its angle, that of the others not at all."""
    x, y = pair(0.2, 9)
    hashed = draw("simhash", DIM, Shape(16, 4000), stream("sensitivity"))
    others = np.random.default_rng(0).standard_normal((20, DIM)).astype(np.float32)
    before = hashed.codes(np.concatenate((others, x[None])))
    after = hashed.codes(np.concatenate((others, y[None])))
    np.testing.assert_array_equal(before[:-1], after[:-1])
    flipped = np.unpackbits((before[-1] ^ after[-1]).view(np.uint8)).sum()
    assert binomtest(int(flipped), 64_000, 0.2 / np.pi).pvalue > ALPHA
    assert binomtest(int(flipped), 64_000, 0.3 / np.pi).pvalue < ALPHA


@pytest.mark.parametrize("family", FAMILIES)
def test_two_devices_never_share_a_function(family: Family) -> None:
    shape = Shape(8, 4, fold=16, block=16)
    roots = [SecretRoot(bytes([number]) * 32) for number in (1, 2)]
    x = np.random.default_rng(0).standard_normal((500, DIM)).astype(np.float32)
    drawn = [draw(family, DIM, shape, each.stream("lsh", "run", 0, 7)).codes(x) for each in roots]
    again = draw(family, DIM, shape, roots[0].stream("lsh", "run", 0, 7)).codes(x)
    other = draw(family, DIM, shape, roots[0].stream("lsh", "run", 0, 8)).codes(x)
    np.testing.assert_array_equal(drawn[0], again)
    for foreign in (drawn[1], other):
        assert all((drawn[0][:, t] != foreign[:, t]).any() for t in range(4))


def test_no_two_of_many_devices_draw_one_vector_or_all_one_shape() -> None:
    root = SecretRoot.known(b"many")
    columns = np.concatenate(
        [projection("simhash", 8, Shape(16), root.stream("lsh", user)).T for user in range(200)]
    )
    assert len(np.unique(columns, axis=0)) == len(columns)
    shapes = {own_shape(10_000, 100, root.stream("lsh shape", user), 16) for user in range(200)}
    assert len(shapes) > 20
    assert {shape.bits for shape in shapes} >= {8, 9, 10}


def test_codes_take_the_centre_off() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((200, DIM)).astype(np.float32)
    centre = 5 * rng.standard_normal(DIM).astype(np.float32)
    for family in FAMILIES:
        hashed = draw(family, DIM, Shape(8, 3, 16, 16), stream("centre"))
        shifted = hashed.codes(x + centre, centre)
        assert (shifted == hashed.codes(x)).mean() > 0.99  # but for rounding at a threshold
        assert (hashed.codes(x + centre) == hashed.codes(x)).mean() < 0.9


def test_vectors_that_no_fold_divides_are_padded() -> None:
    x = np.arange(1, 36, dtype=np.float32)[None]
    for family in FAMILIES:
        assert draw(family, 35, Shape(8, 2, 16, 16), stream("odd")).codes(x).shape == (1, 2)


@pytest.mark.parametrize(
    ("family", "shape", "words"),
    [
        ("simhash", {"bits": 17}, "at most 16"),
        ("simhash", {"bits": 0}, "bits = 0"),
        ("simhash", {"bits": 8, "tables": 0}, "tables = 0"),
    ],
)
def test_shapes_that_cannot_be_are_refused(
    family: Family, shape: dict[str, int], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        draw(family, DIM, Shape(**shape), stream("bad"))
