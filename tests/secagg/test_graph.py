"""Neighbours are drawn uniformly, thresholds follow from the number of devices, bounds hold."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from privrec.errors import ReleaseRefused
from privrec.randomness import SecretRoot
from privrec.secagg import sharing as module
from privrec.secagg.sharing import MAX_FAILURE, Graph

ROOT = SecretRoot.known(b"graph")


@pytest.mark.parametrize(
    ("devices", "neighbours", "quorum", "threshold"),
    [(2, 1, 2, 2), (3, 2, 3, 3), (20, 19, 14, 14), (100, 99, 67, 67), (200, 199, 134, 134),
     (201, 100, 135, 68), (1000, 100, 667, 68)],
)  # fmt: skip
def test_numbers_follow_from_the_cohort(
    devices: int, neighbours: int, quorum: int, threshold: int
) -> None:
    graph = Graph()
    assert graph.neighbours(devices) == neighbours
    assert graph.quorum(devices) == quorum
    assert graph.threshold(devices) == threshold
    assert 3 * quorum > 2 * devices
    assert 3 * threshold > 2 * (neighbours + 1)


def test_in_a_small_cohort_everybody_is_a_neighbour() -> None:
    assert Graph().draw(2, range(5), ROOT.stream("draw")) == (0, 1, 3, 4)


@pytest.mark.statistical
def test_draws_are_uniform_and_never_name_the_device_itself() -> None:
    graph, devices = Graph(complete_up_to=3, degree=4), 12
    counts = np.zeros(devices)
    pairs = np.zeros((devices, devices))
    for number in range(4000):
        drawn = graph.draw(5, range(devices), ROOT.stream("draw", number))
        assert len(set(drawn)) == 4
        assert list(drawn) == sorted(drawn)
        counts[list(drawn)] += 1
        for a, b in itertools.combinations(drawn, 2):
            pairs[a, b] += 1
    assert counts[5] == 0
    others = np.delete(counts, 5)
    assert stats.chisquare(others).pvalue > 1e-3
    together = [pairs[a, b] for a, b in itertools.combinations([*range(5), *range(6, 12)], 2)]
    assert stats.chisquare(together).pvalue > 1e-3
    biased = others * np.where(np.arange(11) < 4, 1.1, 1.0)
    assert stats.chisquare(biased / biased.sum() * others.sum()).pvalue < 1e-3


def test_the_tail_is_that_of_the_hypergeometric_distribution() -> None:
    for population, marked, draws, least in ((999, 50, 100, 9), (30, 20, 10, 7), (30, 3, 10, 0)):
        ours = module._tail(population, marked, draws, least)
        reference = stats.hypergeom(population, marked, draws).sf(least - 1)
        assert math.exp(ours) == pytest.approx(reference, rel=1e-9)
    assert module._tail(30, 3, 10, 4) == -math.inf


@pytest.mark.statistical
def test_the_bound_on_bad_draws_holds_and_is_not_idle() -> None:
    """Share of cohorts in which some device drew too many colluders, against the bound."""
    graph, devices, corrupt, rng = Graph(5, 9), 24, 6, np.random.default_rng(0)
    threshold, bad, cohorts = graph.threshold(devices), 0, 3000
    for _ in range(cohorts):
        drawn = np.argsort(rng.random((devices - corrupt, devices - 1)), axis=1)[:, :9]
        bad += bool(((drawn < corrupt).sum(axis=1) >= 2 * threshold - 9).any())
    bound = math.exp(
        math.log(devices) + float(module._tail(devices - 1, corrupt, 9, 2 * threshold - 9))
    )
    assert 0.2 * bound < bad / cohorts < bound
    assert graph.failure(devices, corrupt) >= bad / cohorts


def closed_sets(edges: list[set[int]], honest: int, corrupt: set[int], least: int) -> bool:
    """Whether some half or less of the honest devices could stand apart from the rest."""
    return any(
        all(len(edges[i] & (set(chosen) | corrupt)) >= least for i in chosen)
        for size in range(1, honest // 2 + 1)
        for chosen in itertools.combinations(range(honest), size)
    )


@pytest.mark.statistical
def test_the_bound_covers_sets_that_stand_apart() -> None:
    graph, honest, corrupt, rng = Graph(3, 6), 9, 1, np.random.default_rng(0)
    devices, least = honest + corrupt, graph.threshold(10) - 1
    apart = 0
    for _ in range(400):
        edges = [
            set(rng.choice([j for j in range(devices) if j != i], 6, replace=False).tolist())
            for i in range(honest)
        ]
        apart += closed_sets(edges, honest, {9}, least)
    bound = graph.failure(devices, corrupt)
    assert 0 < apart / 400 <= bound + 3 * math.sqrt(bound / 400)  # a union bound is nearly met


def test_assumptions_that_do_not_hold_are_refused() -> None:
    graph = Graph()
    for devices in (20, 100, 200, 201, 500, 1000, 10_000):
        graph.check((devices,), 0.05)
        assert graph.failure(devices, devices // 20) <= MAX_FAILURE
    graph.check((20,), 0.3)  # seven of twenty: two quorums of 14 share 8
    with pytest.raises(ReleaseRefused, match="fewer than 8 may"):
        graph.check((20,), 0.4)
    with pytest.raises(ReleaseRefused, match="2\\^-35, above 2\\^-40"):
        graph.check((1000,), 0.1)
    graph.check((1000, 300, 100, 2), 0.05)
    graph.check((600, 100), 0.1)
    with pytest.raises(ReleaseRefused, match="2\\^-40, above"):
        graph.check((600,) * 4, 0.1)  # in each band neighbours are drawn once more


def test_a_complete_graph_never_fails_and_a_larger_share_fails_more() -> None:
    graph = Graph()
    assert graph.failure(200, 60) == 0
    chances = [graph.failure(1000, corrupt) for corrupt in (50, 80, 100, 150, 300)]
    assert chances == sorted(chances)
    assert chances[-1] <= 1
