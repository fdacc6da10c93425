"""A build with a fault fails, and it is the right check that fails."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from audit_scenarios import failed, scenario
from numpy.typing import NDArray

from privrec.audit import _findings, audit, examples, noise, rounds
from privrec.audit.harness import Harness
from privrec.device import example_shares, update
from privrec.device.example_shares import ExampleSums
from privrec.device.update import BoundedUpdate, Counting, Evaluating, Round
from privrec.privacy.lazy import LazyMemory
from privrec.privacy.mechanism import Shares, rounded_gaussian
from privrec.run import simulation
from privrec.run.simulation import Simulation
from privrec.secagg.ring import Encoding, Ring
from privrec.server import server

Patch = pytest.MonkeyPatch
KEY = b"faults"
WHOLE = "amount of noise, the whole vector"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: Patch) -> None:
    monkeypatch.setattr(noise, "MOST_SHARES", 60_000_000)


def found(probe: Any, kind: str, *more: str) -> set[str]:
    """What one kind of probes says no to; a part that refuses is a no as well."""
    harness = Harness.of(scenario(kind, *more), KEY)
    return {check.probe for check in _findings("refused", probe(harness)) if not check.passed}


def broken(kind: str, *more: str) -> set[str]:
    """The probes of updates that say no."""
    harness = Harness.of(scenario(kind, *more), KEY)
    all_of = {**rounds.PROBES, **rounds.SUMS}
    probes = [_findings(name, probe(harness)) for name, probe in all_of.items()]
    return {check.probe for found in probes for check in found if not check.passed}


# ------------------------------------------------------------------------------- noise


def scaled(factor: float) -> Any:
    return lambda stream, sigma, size: rounded_gaussian(stream, factor * sigma, size)


@pytest.mark.parametrize("factor", [0.9, 0.98, 1.02, 1.5])
def test_too_little_or_too_much_central_noise_fails(factor: float, monkeypatch: Patch) -> None:
    monkeypatch.setattr(server, "rounded_gaussian", scaled(factor))
    assert WHOLE in found(noise.probe, "central")


def test_too_narrow_shares_fail(monkeypatch: Patch) -> None:
    honest = Shares.share_variance
    narrow = Fraction(81, 100)
    monkeypatch.setattr(Shares, "share_variance", lambda self, band: honest(self, band) * narrow)
    assert {WHOLE, "amount of noise, a device's share, the whole vector"} <= found(
        noise.probe, "distributed"
    )


def test_shares_that_are_left_out_of_the_sum_fail(monkeypatch: Patch) -> None:
    honest = Shares.removed

    def removed(self: Shares, band: int, survivors: Any, signers: Any = None) -> Any:
        return (*survivors[:20], *honest(self, band, survivors, signers))

    monkeypatch.setattr(Shares, "removed", removed)
    names = found(noise.probe, "distributed")
    assert WHOLE in names
    assert "amount of noise, a device's share, the whole vector" not in names


def test_a_quiet_round_fails(monkeypatch: Patch) -> None:
    honest = server.Server.release

    def release(self: Any, round: Round, aggregate: Any, root: Any) -> Any:
        quiet = round.index == 5
        monkeypatch.setattr(server, "rounded_gaussian", scaled(0.6 if quiet else 1))
        return honest(self, round, aggregate, root)

    monkeypatch.setattr(server.Server, "release", release)
    assert found(noise.probe, "central") == {WHOLE}


@pytest.mark.parametrize(
    "pair", [(3, 7), (0, 1), (4, 9)], ids=["apart", "the first two", "the last"]
)
@pytest.mark.parametrize("kind", ["central", "distributed", "tiers"])
def test_noise_of_one_round_in_another_fails(
    kind: str, pair: tuple[int, int], monkeypatch: Patch
) -> None:
    first, second = pair
    honest = Round.context.fget

    def context(self: Round) -> tuple[str | int | bytes, ...]:
        run, index, *rest = honest(self)
        return (run, first if index == second else index, *rest)

    monkeypatch.setattr(Round, "context", property(context))
    names = found(noise.probe, kind, "privacy.scale_bits=13")
    assert "independence between rounds" in names


@pytest.mark.parametrize("place", [0, 1, 2], ids=["run", "round", "attempt"])
def test_a_context_that_forgets_something_fails(place: int, monkeypatch: Patch) -> None:
    honest = Round.context.fget

    def context(self: Round) -> tuple[str | int | bytes, ...]:
        parts = honest(self)
        return parts[:place] + parts[place + 1 :]

    monkeypatch.setattr(Round, "context", property(context))
    assert "independence between rounds" in found(noise.probe, "central")


def test_noise_that_does_not_depend_on_the_sum_fails(monkeypatch: Patch) -> None:
    monkeypatch.setattr(server, "digest", lambda array: b"the same")
    assert "independence between rounds" in found(noise.probe, "central")


def test_noise_that_repeats_within_a_round_fails(monkeypatch: Patch) -> None:
    def halves(stream: Any, sigma: float, size: int) -> NDArray[np.int64]:
        return np.tile(rounded_gaussian(stream, sigma, -(-size // 2)), 2)[:size]

    monkeypatch.setattr(server, "rounded_gaussian", halves)
    assert "independence within rounds" in found(noise.probe, "central")


def test_noise_that_is_drawn_anew_when_asked_again_fails(monkeypatch: Patch) -> None:
    draws = iter(range(10**6))
    monkeypatch.setattr(server, "digest", lambda array: bytes(str(next(draws)), "ascii"))
    assert "same input, same noise" in found(noise.probe, "central")


@pytest.mark.parametrize("band", [0, 1])
def test_a_band_without_noise_fails(band: int, monkeypatch: Patch) -> None:
    honest = Shares.draw_band

    def draw(self: Shares, number: int, seed: bytes) -> NDArray[np.int32]:
        return honest(self, number, seed) * np.int32(number != band)

    monkeypatch.setattr(Shares, "draw_band", draw)
    names = found(noise.probe, "mixed")
    assert f"amount of noise, band {band + 1} of 2" in names
    assert f"amount of noise, band {2 - band} of 2" not in names


@pytest.mark.parametrize("places", [slice(200, None), slice(0, 1)], ids=["a band", "one"])
def test_coefficients_without_central_noise_fail(places: slice, monkeypatch: Patch) -> None:
    def silent(stream: Any, sigma: float, size: int) -> NDArray[np.int64]:
        noise = rounded_gaussian(stream, sigma, size)
        noise[places] = 0
        return noise

    monkeypatch.setattr(server, "rounded_gaussian", silent)
    assert "noise in every coefficient" in found(noise.probe, "tiers")


def uniform(stream: Any, sigma: float, size: int) -> NDArray[np.int64]:
    words = stream.uint64(size) * 2.0**-64 - 0.5
    return np.rint(words * sigma * 12**0.5).astype(np.int64)


def cut(stream: Any, sigma: float, size: int) -> NDArray[np.int64]:
    noise, reach = rounded_gaussian(stream, sigma, size), int(3.5 * sigma)
    return noise.clip(-reach, reach)


@pytest.mark.parametrize("law", [uniform, cut])
def test_another_law_of_the_same_variance_fails(law: Any, monkeypatch: Patch) -> None:
    monkeypatch.setattr(server, "rounded_gaussian", law)
    assert "law of the noise" in found(noise.probe, "central")


# ----------------------------------------------------------------------------- updates


def skipping(monkeypatch: Patch) -> None:
    honest, seen = update.clip, [0]

    def clip(values: NDArray[np.float32], clip_norm: float) -> NDArray[np.float32]:
        clipped = honest(values, clip_norm).copy()
        for row in range(len(values)):
            seen[0] += 1
            with np.errstate(all="ignore"):
                norm = np.linalg.norm(values[row])
            if seen[0] % 100 == 37 and norm < 1e5 * clip_norm:
                clipped[row] = values[row]
        return clipped

    monkeypatch.setattr(update, "clip", clip)


MANY = ("data.users=2000", "devices.population=2000")


def test_one_in_a_hundred_unclipped_is_refused_by_the_encoding(monkeypatch: Patch) -> None:
    skipping(monkeypatch)
    assert "clip norm of every user" in broken("central", *MANY)


@pytest.mark.parametrize("kind", ["central", "tiers"])
def test_one_in_a_hundred_unclipped_fails(kind: str, monkeypatch: Patch) -> None:
    skipping(monkeypatch)
    nobody = np.zeros(0, np.intp)
    monkeypatch.setattr(Encoding, "_too_long", lambda self, integers: nobody)
    assert "clip norm of every user" in broken(kind, *MANY)


@pytest.mark.parametrize("user", [11, 271])
def test_a_single_user_unclipped_fails(user: int, monkeypatch: Patch) -> None:
    honest = Simulation.answers

    def answers(self: Simulation, *asked: Any) -> Any:
        for users, bounded, losses in honest(self, *asked):
            longer = np.where(users == user, 2, 1)[:, None].astype(np.int32)
            yield users, BoundedUpdate(bounded.integers * longer, bounded.address), losses

    monkeypatch.setattr(Simulation, "answers", answers)
    assert broken("central") == {"clip norm of every user"}


def test_a_tier_that_is_lifted_without_its_norm_fails(monkeypatch: Patch) -> None:
    # A bound that is checked before the weight is applied, and a weight that enlarges.
    from privrec.device.update import RawUpdate

    honest = RawUpdate.bound

    def bound(self: RawUpdate, *given: Any) -> BoundedUpdate:
        made = honest(self, *given)
        return BoundedUpdate(made.integers * 2, made.address)

    monkeypatch.setattr(RawUpdate, "bound", bound)
    assert "clip norm of every user" in broken("tiers")


def floored(self: Encoding, values: Any, coins: Any) -> NDArray[np.float32]:
    coins.uint16(values.size)
    return np.floor(values * np.float32(self.scale))


def nearest(self: Encoding, values: Any, coins: Any) -> NDArray[np.float32]:
    coins.uint16(values.size)
    return np.rint(values * np.float32(self.scale))


def leaning(self: Encoding, values: Any, coins: Any) -> NDArray[np.float32]:
    draws = coins.uint16(values.size).reshape(values.shape) * np.float32(2**-16)
    return np.floor(values * np.float32(self.scale) + draws + np.float32(0.005))


def inwards(self: Encoding, values: Any, coins: Any) -> NDArray[np.float32]:
    draws = coins.uint16(values.size).reshape(values.shape) * np.float32(2**-16)
    exact = values * np.float32(self.scale)
    return np.floor(exact + draws - np.sign(exact) * np.float32(0.005))


@pytest.mark.parametrize("rounding", [floored, nearest, leaning, inwards])
@pytest.mark.parametrize("kind", ["central", "mixed"])
def test_biased_rounding_fails(rounding: Any, kind: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Encoding, "_round", rounding)
    assert "rounding to integers" in broken(kind)


def test_a_sum_that_loses_something_fails(monkeypatch: Patch) -> None:
    honest = Ring.leave

    def leave(self: Ring, elements: Any) -> NDArray[np.int64]:
        left = honest(self, elements)
        left[-1] += 1
        return left

    monkeypatch.setattr(Ring, "leave", leave)
    assert "plain sum" in broken("central")


@pytest.mark.parametrize("kind", ["central", "mixed"])
def test_a_masked_sum_that_differs_fails(kind: str, monkeypatch: Patch) -> None:
    honest = simulation.unmask

    def opened(*asked: Any) -> NDArray[np.int64]:
        total = honest(*asked)
        total[3] -= 1
        return total

    monkeypatch.setattr(simulation, "unmask", opened)
    assert broken(kind) == {"secure sum"}


# ------------------------------------------------------------------------------- lazy noise


def settling(harness: Harness) -> Any:
    return noise.probe_lazy(harness.root)


def idle(*ignored: Any) -> None:
    return None


@pytest.mark.parametrize("name", ["settle", "_settle_all"])
def test_a_settlement_that_is_skipped_fails(name: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(LazyMemory, name, idle)
    assert "lazy noise settled before a read" in found(settling, "central")


@pytest.mark.parametrize("share", [20, 5])
def test_rows_that_are_left_out_of_a_settlement_fail(share: int, monkeypatch: Patch) -> None:
    honest = LazyMemory.settle

    def settle(self: Any, rows: Any = None) -> None:
        honest(self, None if rows is None else rows[np.arange(len(rows)) % share != 0])

    monkeypatch.setattr(LazyMemory, "settle", settle)
    assert "lazy noise settled before a read" in found(settling, "central")


# --------------------------------------------------------------------------------- sampling


def fixed(coins: NDArray[np.uint64], rate: float) -> NDArray[np.int64]:
    return np.sort(np.argsort(coins)[: int(rate * len(coins))])


def paired(coins: NDArray[np.uint64], rate: float) -> NDArray[np.int64]:
    together = np.repeat(coins[::2], 2)[: len(coins)]
    return np.flatnonzero(together < np.uint64(int(rate * 2**64)))


def without_the_first(coins: NDArray[np.uint64], rate: float) -> NDArray[np.int64]:
    return np.flatnonzero(coins[1:] < np.uint64(int(rate * 2**64))) + 1


@pytest.mark.parametrize(
    ("law", "probe"),
    [
        (fixed, "sizes of cohorts"),
        (paired, "chances of users"),
        (without_the_first, "chances of users"),
        (lambda coins, rate: np.arange(len(coins)), "sizes of cohorts"),
    ],
    ids=["a fixed size", "pairs", "one never", "everybody"],
)
def test_sampling_of_another_law_fails(law: Any, probe: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(simulation, "cohort", law)
    assert probe in found(rounds.probe_sampling, "poisson")


def test_the_same_cohort_again_fails(monkeypatch: Patch) -> None:
    honest = Round.context.fget

    def context(self: Round) -> tuple[str | int | bytes, ...]:
        run, index, *rest = honest(self)
        return (run, index // 2, *rest)

    monkeypatch.setattr(Round, "context", property(context))
    assert "cohorts of different rounds" in found(rounds.probe_sampling, "poisson")


def test_somebody_left_out_where_everybody_takes_part_fails(monkeypatch: Patch) -> None:
    monkeypatch.setattr(simulation, "cohort", lambda coins, rate: np.arange(1, len(coins)))
    assert "everybody takes part" in found(rounds.probe_sampling, "central")


# -------------------------------------------------------------------------------- canaries


@pytest.mark.parametrize("kind", ["central", "tiers"])
def test_canaries_see_half_of_the_noise(kind: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(server, "rounded_gaussian", scaled(0.5))
    result = audit(scenario(kind), canaries=200, key=KEY)
    assert "canaries, one shot" in failed(result)


def test_canaries_see_no_noise_at_all(monkeypatch: Patch) -> None:
    monkeypatch.setattr(server, "rounded_gaussian", scaled(1e-3))
    result = audit(scenario("central", "privacy.epsilon=1"), canaries=200, key=KEY)
    assert {"canaries, one shot", "canaries, one run"} <= failed(result)
    assert result.lower_bound is not None
    assert result.claimed is not None
    assert result.lower_bound > result.claimed


# ------------------------------------------------------------------------------- interactions


def of_interactions() -> set[str]:
    """The probes that say no of noise in shares against single interactions."""
    harness = Harness.of(scenario("examples"), KEY)
    probing = {**examples.PROBES, "noise": noise.probe, "accounting": rounds.probe_accounting}
    probes = [_findings(name, probe(harness)) for name, probe in probing.items()]
    return {check.probe for found in probes for check in found if not check.passed}


def test_an_honest_build_hides_interactions() -> None:
    assert of_interactions() == set()


def test_interactions_that_are_not_clipped_fail(monkeypatch: Patch) -> None:
    def unbounded(self: ExampleSums, raw: Any) -> Any:
        return honest(replace_reach(self, 2), raw)

    def replace_reach(made: ExampleSums, factor: int) -> ExampleSums:
        other = copy(made)
        other._bound = replace(made._bound, reach=factor * made._bound.reach)
        return other

    honest = ExampleSums.bounded
    monkeypatch.setattr(ExampleSums, "bounded", unbounded)
    assert of_interactions() == {"what an interaction moves"}


@pytest.mark.parametrize("factor", [1e-9, 2 / 3, 1.5])
def test_user_vectors_with_other_noise_fail(factor: float, monkeypatch: Patch) -> None:
    monkeypatch.setattr(example_shares, "rounded_gaussian", scaled(factor))
    assert of_interactions() == {"noise of user vectors"}


def test_a_share_of_interactions_that_is_missing_fails(monkeypatch: Patch) -> None:
    honest = Shares.removed

    def removed(self: Shares, band: int, survivors: Any, signers: Any = None) -> Any:
        return (*survivors[:20], *honest(self, band, survivors, signers))

    monkeypatch.setattr(Shares, "removed", removed)
    assert WHOLE in of_interactions()


# ------------------------------------------------------------------------------- order of items

ORDERS = (
    'devices.popularity="released"',
    "devices.popularity_epsilon=1.0",
    "devices.popularity_items=5",
    'devices.nesting="rows"',
)
NOISE, MOVED = "noise of the order of items", "what a history counts"


def uncapped(self: Counting, data: Any, *words: Any) -> Any:
    return COUNTED(replace(self, most=self.items), data, *words)


def louder(self: Counting, *words: Any) -> Any:
    """One of its items counts twice."""
    bounded = COUNTED(self, *words)
    bounded.integers[:, :1] *= 2
    return bounded


COUNTED = Counting.bounded


@pytest.mark.parametrize("kind", ["central", "distributed"])
@pytest.mark.parametrize("fault", [uncapped, louder])
def test_a_history_that_counts_too_much_fails(fault: Any, kind: str, monkeypatch: Patch) -> None:
    assert found(noise.probe_order, kind, *ORDERS) == set()
    monkeypatch.setattr(Counting, "bounded", fault)
    assert found(noise.probe_order, kind, *ORDERS) == {MOVED}


@pytest.mark.parametrize("factor", [0.5, 0.85, 1.15])
def test_an_order_with_other_noise_fails(factor: float, monkeypatch: Patch) -> None:
    honest, narrow = Shares.share_variance, Fraction(factor) ** 2
    monkeypatch.setattr(server, "rounded_gaussian", scaled(factor))
    monkeypatch.setattr(Shares, "share_variance", lambda self, band: honest(self, band) * narrow)
    for kind in ("central", "distributed"):
        assert found(noise.probe_order, kind, *ORDERS) == {NOISE}


# ------------------------------------------------------------------------------- evaluation

EVALUATED = ("privacy.evaluation_epsilon=1.0",)
FIGURES_MOVE, OF_FIGURES = "what a user's figures move", "noise of the evaluation"


def uncut(self: Evaluating, figures: NDArray[np.float64]) -> BoundedUpdate:
    """Cut at 8, not at 1."""
    return FOUND(replace(self, step=8 * self.step), figures / 8)


def twice(self: Evaluating, figures: NDArray[np.float64]) -> BoundedUpdate:
    bounded = FOUND(self, figures)
    bounded.integers[:, :1] *= 2
    return bounded


FOUND = Evaluating.bounded


@pytest.mark.parametrize("kind", ["central", "distributed"])
@pytest.mark.parametrize("fault", [uncut, twice])
def test_figures_that_are_not_clipped_fail(fault: Any, kind: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Evaluating, "bounded", fault)
    assert found(noise.probe_evaluation, kind, *EVALUATED) == {FIGURES_MOVE}


@pytest.mark.parametrize("factor", [0.01, 0.6, 1.6])
def test_an_evaluation_with_other_noise_fails(factor: float, monkeypatch: Patch) -> None:
    honest, narrow = Shares.share_variance, Fraction(factor) ** 2
    monkeypatch.setattr(server, "rounded_gaussian", scaled(factor))
    monkeypatch.setattr(Shares, "share_variance", lambda self, band: honest(self, band) * narrow)
    for kind in ("central", "distributed"):
        assert found(noise.probe_evaluation, kind, *EVALUATED) == {OF_FIGURES}
