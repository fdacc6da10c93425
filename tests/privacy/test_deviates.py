"""Block noise from the secure generator: its stream, its tail, and who may draw it."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest

from privrec.errors import ReleaseRefused
from privrec.privacy import pending as deviates
from privrec.privacy.pending import Normals, rounded_up
from privrec.randomness import STREAM_LIMIT, SecretRoot

ROOT = SecretRoot.known(b"deviates")


def drawn(source, rows, width, variances, dtype=np.float32):
    out = np.zeros((rows, width), dtype)
    source.add(out, np.asarray(variances, float))
    return out


@pytest.mark.parametrize("width", [1, 2, 7, 64, 40_001])
def test_one_root_one_noise_another_another(width):
    roots = (ROOT, ROOT, SecretRoot.known(b"others"))
    one, two, three = (drawn(Normals(root), 5, width, np.ones(5)) for root in roots)
    assert np.array_equal(one, two)
    assert not np.any(one == three)
    assert np.all(one != 0)
    assert len(np.unique(one)) > 0.99 * one.size


@pytest.mark.parametrize("spare", [deviates._SPARE, STREAM_LIMIT])
def test_draws_are_all_different(spare, monkeypatch):
    """Of one stream, and of streams that are used up."""
    monkeypatch.setattr(deviates, "_SPARE", spare)
    source = Normals(ROOT)
    assert not np.any(drawn(source, 3, 8, np.ones(3)) == drawn(source, 3, 8, np.ones(3)))


def test_sources_of_their_own_roots_differ():
    # LazyDP's fifth defect: the same noise in every process.
    one, two = (drawn(Normals(), 3, 8, np.ones(3)) for _ in range(2))
    assert not np.any(one == two)


def test_noise_is_added_with_the_variance_of_each_row():
    unit = drawn(Normals(ROOT), 3, 6, np.ones(3))
    out = np.full((3, 6), 10.0)
    Normals(ROOT).add(out, np.array([4.0, 0.0, 0.25]))
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


@pytest.mark.parametrize("before", [0, 1])
def test_after_a_fork_nothing_is_drawn(before):
    source = Normals(ROOT)
    for _ in range(before):
        drawn(source, 1, 1, np.ones(1))
    child = os.fork()
    if not child:
        try:
            drawn(source, 1, 1, np.ones(1))
        except ReleaseRefused:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
