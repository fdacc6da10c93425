"""The documented example beside Opacus: the same accuracy and the same epsilon."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from privrec.optim.lazy_dpsgd import LazyDPSGD, poisson_loader

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Full backward hook is firing")]

ITEMS, RATE, STEPS = 60, 0.05, 240


def data(seed):
    rng = np.random.default_rng(seed)
    effect = np.random.default_rng(0).normal(0, 2, ITEMS)
    rows = np.stack([rng.choice(ITEMS, 4, replace=False) for _ in range(3000)])
    clicks = rng.random(3000) < 1 / (1 + np.exp(-effect[rows].sum(1) / 2))
    return TensorDataset(torch.from_numpy(rows), torch.from_numpy(clicks.astype(np.float32)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.EmbeddingBag(ITEMS, 8, mode="sum"), nn.Linear(8, 1)

    def forward(self, rows):
        return self.out(self.table(rows.reshape(-1), torch.arange(len(rows)) * 4))[:, 0]


def trained(seed, *, lazy):
    from opacus import GradSampleModule
    from opacus.accountants import RDPAccountant
    from opacus.optimizers import DPOptimizer

    torch.manual_seed(seed)
    model, accountant = Model(), RDPAccountant()
    options = {"noise_multiplier": 1.5, "max_grad_norm": 1.0, "expected_batch_size": 150}
    if lazy:
        optimizer = LazyDPSGD(model, lr=2.0, **options)
    else:
        model = GradSampleModule(model)
        optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=2.0), **options)
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=RATE))
    for rows, clicks in poisson_loader(data(seed), RATE, STEPS):
        optimizer.zero_grad()
        functional.binary_cross_entropy_with_logits(model(rows), clicks).backward()
        optimizer.step()
    test = data(10**6).tensors
    with torch.no_grad():
        hits = (model(test[0]) > 0) == (test[1] > 0)
    return float(hits.float().mean()), accountant.get_epsilon(delta=1e-5)


def test_accuracy_and_epsilon_are_those_of_opacus():
    lazy = [trained(seed, lazy=True) for seed in range(6)]
    eager = [trained(seed, lazy=False) for seed in range(6)]
    assert {e for _, e in lazy} == {e for _, e in eager}
    one, two = (np.array([a for a, _ in each]) for each in (lazy, eager))
    assert one.mean() > 0.7  # guessing gives 0.5
    spread = np.sqrt(one.var(ddof=1) / 6 + two.var(ddof=1) / 6)
    assert abs(one.mean() - two.mean()) < 4 * spread + 0.005
