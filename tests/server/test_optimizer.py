"""Server optimisers are torch's own, fed with minus the update, and schedules are as named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from privrec.server.optimizer import FedAdam, FedAvg, Optimizer, Schedule, Sgd

CONSTANT = Schedule("constant", 100, 0)
SIZE, ROUNDS = 40, 60


def updates() -> np.ndarray:
    rng = np.random.default_rng(1)
    scales = 10.0 ** rng.integers(-4, 2, SIZE)
    return (rng.normal(0.3, 1, (ROUNDS, SIZE)) * scales).astype(np.float32)


def run(optimizer: Optimizer) -> np.ndarray:
    weights = np.linspace(-1, 1, SIZE).astype(np.float32)
    for index, update in enumerate(updates()):
        optimizer.step(weights, update, index)
    return weights


def run_torch(kind: type[torch.optim.Optimizer], **options: Any) -> np.ndarray:
    weights = torch.nn.Parameter(torch.linspace(-1, 1, SIZE, dtype=torch.float64))
    optimizer = kind([weights], **options)
    for update in updates():
        weights.grad = -torch.from_numpy(update).double()
        optimizer.step()
    return weights.detach().numpy()


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.999), (0.0, 0.9)])
@pytest.mark.parametrize("eps", [1e-8, 1e-3, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_fedadam_is_adamw(betas: tuple[float, float], eps: float, decay: float) -> None:
    mine = FedAdam(0.05, CONSTANT, decay, beta1=betas[0], beta2=betas[1], adam_eps=eps)
    theirs = run_torch(torch.optim.AdamW, lr=0.05, betas=betas, eps=eps, weight_decay=decay)
    assert np.allclose(run(mine), theirs, rtol=1e-4, atol=1e-5)


def test_fedadam_without_decay_is_adam() -> None:
    mine = FedAdam(0.05, CONSTANT, beta1=0.9, beta2=0.99, adam_eps=1e-6)
    theirs = run_torch(torch.optim.Adam, lr=0.05, betas=(0.9, 0.99), eps=1e-6)
    assert np.allclose(run(mine), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs_with_momentum(momentum: float) -> None:
    mine = run(Sgd(0.05, CONSTANT, momentum=momentum))
    theirs = run_torch(torch.optim.SGD, lr=0.05, momentum=momentum)
    assert np.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_fedavg_adds_the_mean_update() -> None:
    weights, update = np.array([1.0, 2.0], np.float32), np.array([0.5, -1.0], np.float32)
    FedAvg(1.0, CONSTANT).step(weights, update, 0)
    assert weights.tolist() == [1.5, 1.0]
    assert run(FedAvg(0.05, CONSTANT)) == pytest.approx(
        run_torch(torch.optim.SGD, lr=0.05), rel=1e-4, abs=1e-4
    )


@pytest.mark.parametrize("kind", [FedAvg, Sgd, FedAdam])
def test_weight_decay_is_decoupled(kind: type[Optimizer]) -> None:
    """Without an update the weights shrink by ``rate * decay`` a round, whatever the optimiser."""
    weights, nothing = np.full(3, 2.0, np.float32), np.zeros(3, np.float32)
    optimizer = kind(0.1, CONSTANT, weight_decay=0.5)
    for index in range(4):
        optimizer.step(weights, nothing, index)
    assert np.allclose(weights, 2 * (1 - 0.05) ** 4)


@pytest.mark.parametrize("kind", [FedAvg, Sgd, FedAdam])
def test_a_step_leaves_the_update_as_it_is(kind: type[Optimizer]) -> None:
    weights, update = np.zeros(3, np.float32), np.ones(3, np.float32)
    kind(0.1, CONSTANT).step(weights, update, 0)
    assert update.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", [Sgd, FedAdam])
def test_an_optimiser_goes_on_from_its_moments(kind: type[Optimizer]) -> None:
    """What a checkpoint keeps is all there is."""
    expected = run(kind(0.05, CONSTANT))
    weights, first = np.linspace(-1, 1, SIZE).astype(np.float32), kind(0.05, CONSTANT)
    for index in range(20):
        first.step(weights, updates()[index], index)
    kept = {name: moment.copy() for name, moment in first.moments.items()}
    second = kind(0.05, CONSTANT, moments=kept)
    for index in range(20, ROUNDS):
        second.step(weights, updates()[index], index)
    assert np.array_equal(weights, expected)


def test_schedules_go_from_one_to_nearly_zero() -> None:
    assert [Schedule("constant", 4, 0).factor(t) for t in range(4)] == [1, 1, 1, 1]
    assert [Schedule("linear", 4, 0).factor(t) for t in range(4)] == [1, 0.75, 0.5, 0.25]
    cosine = [Schedule("cosine", 4, 0).factor(t) for t in range(4)]
    assert cosine == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_a_warm_up_rises_linearly_and_then_the_course_begins(kind: str) -> None:
    schedule = Schedule(kind, 13, 3)
    factors = [schedule.factor(t) for t in range(13)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[3:] == pytest.approx([Schedule(kind, 10, 0).factor(t) for t in range(10)])
    assert min(factors) > 0


@pytest.mark.parametrize("kind", [FedAvg, Sgd, FedAdam])
def test_the_schedule_scales_the_step_and_the_decay(kind: type[Optimizer]) -> None:
    half = Schedule("constant", 9, 1)  # the first of one round of warm-up runs at a half
    one, two = np.full(3, 2.0, np.float32), np.full(3, 2.0, np.float32)
    update = np.array([0.5, -0.25, 1.0], np.float32)
    kind(0.2, half, weight_decay=0.3).step(one, update, 0)
    kind(0.1, CONSTANT, weight_decay=0.3).step(two, update, 0)
    assert np.allclose(one, two, rtol=1e-6)


def test_an_unending_run_of_one_round_has_a_schedule() -> None:
    assert Schedule("cosine", 1, 1).factor(0) == 0.5
    assert Schedule("linear", 1, 0).factor(0) == 1
