"""Shares of the noise: seeds, prefixes, and what is removed again."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privrec.errors import ReleaseRefused, UsageError
from privrec.privacy.discrete import discrete_gaussian
from privrec.privacy.events import epsilon
from privrec.privacy.ledger import Ledger
from privrec.privacy.mechanism import Band, Shares, noise_seeds
from privrec.randomness import SecretRoot, SecureStream
from privrec.storage import server_key

ROOT = SecretRoot.known(b"shares")
BANDS = (Band(50, 7, 2), Band(30, 4, 1), Band(20, 3))
SHARES = Shares(1.5, 10**6, BANDS, remove_excess=True)


def seeds_of(device, bands=3, round=0):
    return noise_seeds(SecretRoot.known(b"device %d" % device), bands, "run", round, 0)


def test_variances_are_exact():
    assert SHARES.variance == Fraction(9, 4) * 10**6
    assert [SHARES.share_variance(b) for b in range(3)] == [
        SHARES.variance / 5,
        SHARES.variance / 3,
        SHARES.variance / 3,
    ]
    thirds = Shares(0.1, 10**6, BANDS)
    assert thirds.share_variance(0) == Fraction(0.1) ** 2 * 10**6 / 5


def test_seeds_are_independent_by_band_and_context():
    seeds = noise_seeds(ROOT, 4, "run", 1, 0)
    assert {len(seed) for seed in seeds} == {32}
    assert noise_seeds(ROOT, 2, "run", 1, 0) == seeds[:2]
    others = [
        noise_seeds(ROOT, 4, "run", 2, 0),
        noise_seeds(ROOT, 4, "run", 1, 1),
        noise_seeds(ROOT, 4, "run", 1, 0, b"input"),
        noise_seeds(SecretRoot.known(b"other"), 4, "run", 1, 0),
    ]
    assert len({seed for group in (seeds, *others) for seed in group}) == 20


def test_a_share_is_the_draw_of_its_seeds_band_by_band():
    seeds = seeds_of(1)
    share = SHARES.draw(seeds)
    assert share.dtype == np.int32
    assert share.shape == (100,)
    for band, (start, end) in enumerate(((0, 50), (50, 80), (80, 100))):
        alone = discrete_gaussian(
            SecureStream(seeds[band]), SHARES.share_variance(band), end - start
        )
        assert np.array_equal(share[start:end], alone)
        assert np.array_equal(SHARES.draw_band(band, seeds[band]), alone)


def test_a_weaker_device_draws_a_prefix():
    assert np.array_equal(SHARES.draw(seeds_of(1, 2)), SHARES.draw(seeds_of(1))[:80])
    assert len(SHARES.draw(())) == 0


@settings(max_examples=60)
@given(st.integers(3, 12), st.data())
def test_removal_leaves_the_shares_of_exactly_the_fewest(survivors, data):
    """Any number of survivors, any tiers: what is left is the sum of ``t`` shares a band."""
    tiers = data.draw(st.lists(st.integers(1, 3), min_size=survivors, max_size=survivors))
    holders = [[d for d in range(survivors) if tiers[d] > band] for band in range(3)]
    held = [len(names) for names in holders]
    total = np.zeros(100, np.int64)
    for device, bands in enumerate(tiers):
        share = SHARES.draw(seeds_of(device, bands))
        total[: len(share)] += share
    short = [band for band in range(3) if held[band] < BANDS[band].least]
    if short:
        with pytest.raises(ReleaseRefused, match="nothing is released"):
            SHARES.removed(short[0], holders[short[0]])
        return
    named = [SHARES.removed(band, holders[band]) for band in range(3)]
    revealed = [[seeds_of(d)[band] for d in named[band]] for band in range(3)]
    left = total - SHARES.excess(revealed)
    for band, (start, end) in enumerate(((0, 50), (50, 80), (80, 100))):
        assert len(named[band]) == held[band] - BANDS[band].least
        kept = [d for d in holders[band] if d not in named[band]]
        expected = sum(SHARES.draw_band(band, seeds_of(d)[band]).astype(int) for d in kept)
        assert np.array_equal(left[start:end], expected)
        variance = BANDS[band].least * SHARES.share_variance(band)
        assert SHARES.kept(band, held[band]) * SHARES.share_variance(band) == variance


def test_never_fewer_honest_shares_than_accounted():
    """Whoever colludes, and whoever of the colluders only pretends to be there."""
    survivors = list("abcdefghi")
    left = set(survivors) - set(SHARES.removed(0, survivors))
    assert len(left) == 7
    honest = min(len(left - {one, two}) for one in survivors for two in survivors)
    assert honest * SHARES.share_variance(0) == SHARES.variance
    silent = survivors[0]  # it may never have been there, and its share with it
    assert SHARES.removed(0, survivors, set(survivors) - {silent}) == ("i",)


def test_without_removal_nothing_is_named_and_all_noise_stays():
    shares = Shares(1.5, 10**6, BANDS)
    assert shares.removed(0, list(range(12))) == ()
    assert shares.kept(0, 12) * shares.share_variance(0) == Fraction(12, 5) * shares.variance
    assert not shares.excess([[], [], []]).any()


def test_nobody_reveals_anything_for_a_list_that_is_no_set():
    with pytest.raises(ReleaseRefused, match="named twice"):
        SHARES.removed(2, [1, 2, 3, 3])


def test_the_event_is_of_the_narrowest_band():
    event = SHARES.event(0.25)
    assert event.mechanism == "discrete_gaussian"
    assert (event.noise_multiplier, event.sampling_rate) == (1.5, 0.25)
    assert event.grid.squared_sensitivity == 10**6
    assert event.grid.dimension == 100
    assert event.grid.shares == 5
    assert event.grid.excess_removed is True
    assert Shares(1.5, 10**6, BANDS).event(1.0).grid.excess_removed is False


def test_a_ledger_keeps_and_accounts_for_it(tmp_path):
    event, key = Shares(1.5, 10**6, BANDS, True).event(0.2), server_key(tmp_path / "key")
    with Ledger.create(tmp_path / "ledger.jsonl", header={}, signing_key=key) as ledger:
        for round in range(3):
            ledger.charge(event, round, 0)
        ledger.seal()
    with Ledger.open(tmp_path / "ledger.jsonl", signing_key=key) as ledger:
        assert ledger.counts == {event: 3}
        for adversary in ("recipients", "server"):
            assert ledger.epsilon(adversary, 1e-5) == epsilon({event: 3}, 1e-5, adversary)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shares(1.0, 100, (Band(0, 3),)), "dimension 0"),
        (lambda: Band(5, 3, 3), "3 colluders among 3"),
        (lambda: Band(5, 3, -1), "-1 colluders"),
        (lambda: Shares(0.1, 100, (Band(9, 50),)), "raise privacy.scale_bits"),
        (lambda: Shares(0.0, 100, BANDS), "noise_multiplier 0.0"),
        (lambda: Shares(math.nan, 100, BANDS), "noise_multiplier nan"),
        (lambda: Shares(1e6, 2**44, BANDS), "privacy.noise_multiplier"),
        (lambda: SHARES.draw(seeds_of(1, 4)), "for band 3"),
        (lambda: SHARES.draw([b"short"]), "seed of 5 bytes"),
        (lambda: SHARES.excess([[], [], [b""]]), "seed of 0 bytes"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_too_few_survivors_are_refused():
    with pytest.raises(ReleaseRefused, match="6 survivors in band 0, and at least 7"):
        SHARES.kept(0, 6)
