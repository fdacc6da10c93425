"""Block noise from the secure generator: its stream, its tail, and who may draw it."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest

from privrec.errors import ReleaseRefused
from privrec.privacy.lazy import stream as deviates
from privrec.privacy.lazy.stream import Normals, rounded_up
from privrec.randomness import SecretRoot

ROOT = SecretRoot.known(b"deviates")


def drawn(source, rows, width, variances, *context, dtype=np.float32):
    out = np.zeros((rows, width), dtype)
    source.begin(*context)
    source.add(out, np.asarray(variances, float))
    return out


@pytest.mark.parametrize("width", [1, 2, 7, 64, 40_001])
def test_one_context_one_noise_another_another(width):
    one, two, three = (drawn(Normals(ROOT), 5, width, np.ones(5), c) for c in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.any(one == three)
    assert np.all(one != 0)
    assert len(np.unique(one)) > 0.99 * one.size


def test_draws_without_context_are_all_different():
    source = Normals(ROOT)
    assert not np.any(drawn(source, 3, 8, np.ones(3)) == drawn(source, 3, 8, np.ones(3)))


def test_sources_of_their_own_roots_differ():
    # LazyDP's fifth defect: the same noise in every process.
    one, two = (drawn(Normals(), 3, 8, np.ones(3)) for _ in range(2))
    assert not np.any(one == two)


def test_noise_is_added_with_the_variance_of_each_row():
    unit = drawn(Normals(ROOT), 3, 6, np.ones(3), 1)
    out = np.full((3, 6), 10.0)
    source = Normals(ROOT)
    source.begin(1)
    source.add(out, np.array([4.0, 0.0, 0.25]))
    np.testing.assert_allclose(out - 10, unit * [[2.0], [0.0], [0.5]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("words", [[0, 1, 255, 256, 2**31, 2**32 - 1]])
def test_rare_words_are_continued_beyond_32_bits(words):
    stream = ROOT.stream("rare")
    out = deviates._log_uniform(np.array(words, np.uint32), stream).numpy()
    rest = (ROOT.stream("rare").uint64(3) + 0.5) * 2.0**-64
    wanted = np.log((np.array(words[:3]) + rest) * 2.0**-32)
    np.testing.assert_allclose(out[:3], wanted, rtol=1e-6)
    np.testing.assert_allclose(out[3:5], np.log(np.array(words[3:5]) / 2**32), rtol=1e-6)
    assert out[5] == 0
    assert np.all(np.isfinite(out))


def test_the_far_tail_is_reached(monkeypatch):
    class Zeros:
        def uint64(self, size):
            return np.zeros(size, np.uint64)

    out = deviates._log_uniform(np.zeros(1, np.uint32), Zeros())
    assert math.sqrt(-2 * out.item()) == pytest.approx(11.6, abs=0.1)


def test_variances_are_rounded_up():
    exact = np.array([0.1, 1.0, 1 + 2.0**-40, 3e-9, 0.0])
    short = rounded_up(exact)
    assert short.dtype == np.float32
    assert np.all(short >= exact)
    assert np.all(short <= exact * (1 + 2.0**-22))
    assert short[1] == 1.0


def test_after_a_fork_nothing_is_drawn():
    source = Normals(ROOT)
    source.begin()
    child = os.fork()
    if not child:
        try:
            source.begin()
        except ReleaseRefused:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_nothing_is_drawn_before_a_stream_is_opened():
    with pytest.raises(ReleaseRefused, match="begin"):
        Normals(ROOT).add(np.zeros((1, 1), np.float32), np.ones(1))


def test_whether_a_root_is_known():
    assert Normals(ROOT).is_known
    assert not Normals().is_known
