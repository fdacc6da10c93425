from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from privrec.errors import UsageError
from privrec.models.sparse_output import RowAdam, SparseOutput
from privrec.randomness import SecretRoot

N, DIM = 50, 4


def sparse(rows: Any, values: Any) -> torch.Tensor:
    return torch.sparse_coo_tensor(rows, values, (N, DIM), check_invariants=True)


class OneNeuron:
    """Adam of a single row, written from the paper."""

    def __init__(self, row: np.ndarray) -> None:
        self.row, self.m, self.v, self.t = row.astype(np.float64), 0.0, 0.0, 0

    def step(self, gradient: np.ndarray) -> None:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        first, second = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        self.row = self.row - 0.01 * first / (np.sqrt(second) + 1e-8)


def test_each_row_has_an_adam_of_its_own_whatever_the_order_of_the_active_ones() -> None:
    rng = np.random.default_rng(0)
    weight = torch.nn.Parameter(torch.from_numpy(rng.standard_normal((N, DIM)).astype(np.float32)))
    alone = [OneNeuron(row) for row in weight.detach().numpy()]
    optimizer = RowAdam([weight], lr=0.01)
    for step in range(40):
        # Another number of rows, other rows, and another order each time.
        rows = rng.permutation(N)[: 3 + step % 9]
        gradients = rng.standard_normal((len(rows), DIM)) * (1 + rows[:, None])
        weight.grad = sparse(rows[None], gradients.astype(np.float32))
        optimizer.step()
        for row, gradient in zip(rows, gradients, strict=True):
            alone[row].step(gradient)
    wanted = np.stack([each.row for each in alone])
    np.testing.assert_allclose(weight.detach().numpy(), wanted, atol=2e-6)
    counts = optimizer.state[weight]["steps"]
    np.testing.assert_array_equal(counts, [each.t for each in alone])


def test_slots_stay_with_neurons_through_the_layer() -> None:
    """A neuron's steps are those it has alone, though its place in the active set changes."""
    layer = SparseOutput(N, DIM, share=0.3, selector="uniform", root=SecretRoot.known(b"slots"))
    optimizer, rng = RowAdam(layer.parameters(), lr=0.01), np.random.default_rng(1)
    alone = [OneNeuron(row) for row in layer.weight.detach().numpy()]
    for _ in range(25):
        hidden = torch.from_numpy(rng.standard_normal((5, DIM)).astype(np.float32))
        labels = torch.from_numpy(rng.integers(0, N, 5))
        optimizer.zero_grad()
        active = layer.active(hidden, labels)
        layer.loss(hidden, labels, active=active).backward()
        assert layer.weight.grad is not None
        dense = layer.weight.grad.to_dense().numpy()
        optimizer.step()
        for neuron in active.neurons.tolist():
            alone[neuron].step(dense[neuron].astype(np.float64))
    np.testing.assert_allclose(
        layer.weight.detach().numpy(), np.stack([each.row for each in alone]), atol=2e-5
    )


def test_rows_without_a_gradient_do_not_move() -> None:
    weight = torch.nn.Parameter(torch.ones(N, DIM))
    optimizer = RowAdam([weight])
    for rows in ([1, 4], [4, 9]):
        weight.grad = sparse(torch.tensor([rows]), torch.ones(2, DIM))
        optimizer.step()
    moved = (weight != 1).any(1).nonzero().ravel().tolist()
    assert moved == [1, 4, 9]


def test_repeated_rows_are_summed_first() -> None:
    twice, once = (torch.nn.Parameter(torch.ones(N, DIM)) for _ in range(2))
    rows, values = torch.tensor([[7, 7]]), torch.tensor([[1.0] * DIM, [-0.25] * DIM])
    twice.grad = sparse(rows, values)
    once.grad = sparse(rows[:, :1], values.sum(0, keepdim=True))
    for parameter in (twice, once):
        RowAdam([parameter]).step()
    torch.testing.assert_close(twice, once)


def test_a_dense_gradient_is_that_of_adam() -> None:
    mine, theirs = (torch.nn.Parameter(torch.linspace(0, 1, 12).view(3, 4)) for _ in range(2))
    optimizers = RowAdam([mine], lr=0.05), torch.optim.Adam([theirs], lr=0.05)
    for step in range(5):
        for parameter, optimizer in zip((mine, theirs), optimizers, strict=True):
            parameter.grad = torch.sin(parameter.detach() * (step + 1))
            optimizer.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"betas": (1.0, 0.9)}, {"eps": 0.0}])
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="must be above 0"):
        RowAdam([torch.nn.Parameter(torch.ones(2))], **settings)  # type: ignore[arg-type]
