"""The server releases what is accounted, and takes steps on what it released."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from privrec.device.tier import Federation, ModelView, Tier
from privrec.device.update import Aggregate, Protection, Round
from privrec.embedding.nested import nested
from privrec.embedding.table import PlainTable
from privrec.models.ncf import NCF
from privrec.privacy.events import RoundEvent
from privrec.randomness import SecretRoot
from privrec.secagg.ring import Encoding
from privrec.server.optimizer import FedAvg, Optimizer, Schedule
from privrec.server.server import Completion, Release, RoundPlan, Server

ROOT, OTHER = SecretRoot.known(b"one"), SecretRoot.known(b"two")
LEVEL = 1e-4  # of each test; the draws are keyed, so that a pass is a pass for good
NOISY, QUIET = RoundEvent("gaussian", 1.7, 0.1), RoundEvent("none", 0.0, 0.1)
SIZE = 40_000


def make_server(
    event: RoundEvent = NOISY,
    *,
    size: int = SIZE,
    average: float = 0.0,
    kind: type[Optimizer] = FedAvg,
    rate: float = 1.0,
    clip_norm: float = 2.0,
) -> Server:
    federation = plain_federation(size)
    plan = RoundPlan(
        "run", "digest", event, Protection(Encoding(clip_norm, size)), federation, 25.0, average
    )
    optimizer = kind(rate, Schedule("constant", 10, 0))
    return Server(plan, np.zeros(size, np.float32), nothing_to_add(federation), optimizer)


def plain_federation(size: int) -> Federation:
    """One tier, whose vector is a memory of so many numbers."""
    table = PlainTable.of(size, 1, block=1)
    parts = ModelView.of(NCF.of("gmf", 1, ()), table, None)
    return Federation((Tier(0, 1.0, 1.0, 1.0, parts, nested(table, [0]), None),))


def nothing_to_add(federation: Federation) -> Completion:
    return Completion(federation, None, "sum")


def sum_of(size: int = SIZE, seed: int = 0) -> Aggregate:
    total = np.random.default_rng(seed).integers(-(2**20), 2**20, size)
    return Aggregate(total, 25, None)


def noise_of(server: Server, aggregate: Aggregate, round: Round | None = None) -> np.ndarray:
    round = round or server.next_round(0)
    return server.release(round, aggregate, ROOT).total - aggregate.total


def scale_fits(noise: np.ndarray, sigma: float) -> bool:
    """Chi-square test of the variance about zero, rounding included."""
    ratio = float((noise.astype(float) ** 2).sum()) / (sigma**2 + 1 / 12)
    return bool(LEVEL / 2 < stats.chi2.cdf(ratio, len(noise)) < 1 - LEVEL / 2)


@pytest.mark.statistical
@pytest.mark.parametrize("noise_multiplier", [0.3, 1.7, 40.0])
@pytest.mark.parametrize("scale_bits", [8, 13])
def test_the_noise_is_as_accounted(noise_multiplier: float, scale_bits: int) -> None:
    server = make_server(RoundEvent("gaussian", noise_multiplier, 0.1))
    server.plan = replace(server.plan, protection=Protection(Encoding(2.0, SIZE, scale_bits)))
    noise = noise_of(server, sum_of())
    sigma = noise_multiplier * server.plan.protection.encoding.bound
    assert scale_fits(noise, sigma)
    assert not any(scale_fits(noise, sigma * wrong) for wrong in (2 / 3, 0.95, 1.05, 3 / 2))
    assert not scale_fits(noise // 2, sigma)
    assert stats.kstest(noise / sigma, "norm").pvalue > LEVEL


@pytest.mark.statistical
def test_the_noise_is_that_of_the_charged_round() -> None:
    server = make_server()
    charged = replace(server.next_round(0), event=RoundEvent("gaussian", 3.4, 0.1))
    assert scale_fits(
        noise_of(server, sum_of(), charged), 3.4 * server.plan.protection.encoding.bound
    )


@pytest.mark.statistical
def test_an_empty_cohort_is_noised_all_the_same() -> None:
    server = make_server()
    nobody = Aggregate(np.zeros(SIZE, np.int64), 0, None)
    assert scale_fits(noise_of(server, nobody), 1.7 * server.plan.protection.encoding.bound)


def test_the_same_input_gets_the_same_noise() -> None:
    server = make_server()
    one, two = (server.release(server.next_round(0), sum_of(), ROOT) for _ in range(2))
    assert np.array_equal(one.total, two.total)
    assert one.tag == two.tag


@pytest.mark.statistical
@pytest.mark.parametrize(
    "change",
    [
        {"run_id": "other"},
        {"index": 1},
        {"attempt": 1},
        {"plan_digest": "other"},
        {"model_digests": (b"other",)},
    ],
)
def test_another_round_gets_independent_noise(change: dict[str, object]) -> None:
    server = make_server()
    round = server.next_round(0)
    one, two = noise_of(server, sum_of()), noise_of(server, sum_of(), replace(round, **change))
    assert np.mean(one == two) < 0.01
    assert stats.pearsonr(one, two).pvalue > LEVEL


@pytest.mark.statistical
def test_another_sum_gets_independent_noise_even_when_it_differs_by_one() -> None:
    server, one, two = make_server(), sum_of(), sum_of()
    two.total[7] += 1
    assert stats.pearsonr(noise_of(server, one), noise_of(server, two)).pvalue > LEVEL


@pytest.mark.statistical
def test_another_root_gives_independent_noise() -> None:
    server, total = make_server(), sum_of()
    round = server.next_round(0)
    one, two = (server.release(round, total, root) for root in (ROOT, OTHER))
    assert one.tag != two.tag
    assert stats.pearsonr(one.total - total.total, two.total - total.total).pvalue > LEVEL


def test_without_noise_the_sum_is_exact() -> None:
    server, aggregate = make_server(QUIET), sum_of()
    release = server.release(server.next_round(0), aggregate, ROOT)
    assert np.array_equal(release.total, aggregate.total)


@pytest.mark.parametrize("event", [NOISY, QUIET])
def test_the_tag_tells_releases_apart(event: RoundEvent) -> None:
    server = make_server(event)
    round = server.next_round(0)
    rounds = [round, replace(round, attempt=1), replace(round, index=1)]
    tags = {server.release(each, sum_of(seed=s), ROOT).tag for each in rounds for s in (0, 1)}
    assert len(tags) == 6


def test_releasing_leaves_the_sum_as_it_is() -> None:
    server, aggregate = make_server(), sum_of()
    server.release(server.next_round(0), aggregate, ROOT)
    assert np.array_equal(aggregate.total, sum_of().total)


def test_the_sum_is_divided_by_the_expected_cohort() -> None:
    server = make_server(QUIET, size=3)
    total = np.array([2**13, -(2**12), 0]) * 25
    server.apply(Release(server.next_round(0), total, b""))
    assert server.weights.tolist() == [2.0, -1.0, 0.0]  # clip norm, half of it, nothing
    assert server.index == 1


def test_rounds_name_the_model_and_follow_each_other() -> None:
    server = make_server(size=3)
    first = server.next_round(0)
    assert (first.run_id, first.index, first.attempt) == ("run", 0, 0)
    assert first.event == NOISY
    assert server.next_round(2).attempt == 2
    server.apply(Release(server.next_round(0), np.array([1, 2, 3]) * 2**13, b""))
    second = server.next_round(0)
    assert second.index == 1
    assert second.model_digests != first.model_digests


@pytest.mark.parametrize("average", [0.0, 0.5, 0.9])
def test_what_is_released_is_the_running_mean(average: float) -> None:
    server = make_server(QUIET, size=4, average=average, rate=0.5)
    seen = []
    rng = np.random.default_rng(2)
    assert np.array_equal(server.released, server.weights)
    for _ in range(12):
        server.apply(Release(server.next_round(0), rng.integers(-(2**16), 2**16, 4), b""))
        seen.append(server.weights.astype(np.float64))
        shares = average ** np.arange(len(seen))[::-1]
        expected = (shares[:, None] * seen).sum(0) / shares.sum()
        assert np.allclose(server.released, expected, rtol=1e-4, atol=1e-5)
