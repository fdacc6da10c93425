"""What becomes of a model and of groups while an optimiser has them: frozen, thawed, changed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from privrec.errors import UsageError
from privrec.optim.lazy_dpsgd import LazyDPSGD
from privrec.optim.parameter import LazyParameter
from privrec.randomness import SecretRoot

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

ROWS = 50
NOISY = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 20}
EXACT = {"noise_multiplier": 0.0, "max_grad_norm": 1e9, "expected_batch_size": 20}
X = torch.randint(0, ROWS, (20, 3), generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] % 2).float()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.hidden, self.out = nn.Embedding(ROWS, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.more = nn.Identity()

    def forward(self, x):
        return self.out(torch.relu(self.hidden(self.more(self.table(x).mean(1)))))[:, 0]

    def inner(self):
        return [self.table.weight, *self.hidden.parameters()]


def of_opacus(model):
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    wrapped = GradSampleModule(model)
    return DPOptimizer(torch.optim.SGD(wrapped.parameters(), lr=1.0), **NOISY), wrapped


MADE = {
    "by itself": lambda m: LazyDPSGD(m, lr=1.0, **NOISY),
    "with all parameters": lambda m: LazyDPSGD(m, lr=1.0, params=m.parameters(), **NOISY),
    "replacing": lambda m: LazyDPSGD.replacing(
        torch.optim.SGD(m.parameters(), lr=1.0, momentum=0.5, weight_decay=0.1), m, **NOISY
    ),
    "replacing that of Opacus": lambda m: LazyDPSGD.replacing(*of_opacus(m)),
}


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        functional.binary_cross_entropy_with_logits(model(X), Y).backward()
        optimizer.step()


def values(parameters):
    return [p.detach().clone() for p in parameters]


def freeze(parameters, *, frozen=True):
    for parameter in parameters:
        parameter.requires_grad_(not frozen)


@pytest.mark.parametrize("how", MADE)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_frozen_stays_bit_for_bit(how, when):
    model = Model()
    if when == "before":
        freeze(model.inner())
    optimizer = MADE[how](model)
    if when == "after":
        train(model, optimizer, 2)
        freeze(model.inner())
    inner, outer = values(model.inner()), values(model.out.parameters())
    train(model, optimizer, 5)
    optimizer.step()
    assert all(map(torch.equal, inner, values(model.inner())))
    assert not any(map(torch.equal, outer, values(model.out.parameters())))
    freeze(model.inner(), frozen=False)
    if how == "by itself" and when == "before":
        optimizer.add_param_group({"params": model.inner()})
    optimizer.step()  # noise alone
    assert not any(map(torch.equal, inner, values(model.inner())))
    optimizer.close()


def noise_of(phases, *, lr=0.5):
    """Variance of a table that no example touches, after phases of steps and what comes first."""
    model = nn.ModuleDict({"table": nn.Embedding(2000, 16), "dense": nn.Linear(200, 160)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = LazyDPSGD(
        model, lr=lr, noise_multiplier=3.0, max_grad_norm=2.0, expected_batch_size=4,
        root=SecretRoot.known(b"following"),
    )  # fmt: skip
    for steps, change in phases:
        change(model, optimizer.param_groups[0])
        for step in range(steps):
            with torch.no_grad():
                model["table"](torch.arange(step * 10, step * 10 + 500))
            optimizer.step()
    found = [p.detach().double().square().mean().item() for p in model.parameters()]
    return found[0], found[1], (3.0 * 2.0 / 4) ** 2


def untouched(model, group):
    pass


@pytest.mark.statistical
def test_noise_of_steps_before_freezing_is_paid_and_no_more():
    table, dense, variance = noise_of(
        [
            (3, untouched),
            (5, lambda model, group: model.requires_grad_(False)),
            (2, lambda model, group: model.requires_grad_(True)),
        ]
    )
    for found in (table, dense):
        ratio = found / (0.25 * variance * 5)
        assert abs(ratio - 1) < 5 * np.sqrt(2 / 32000)
        for wrong in (2 / 3, 3 / 2):
            assert not abs(ratio * wrong - 1) < 5 * np.sqrt(2 / 32000)


@pytest.mark.statistical
def test_noise_is_exact_where_momentum_and_decay_begin_and_end():
    phases = [
        (3, {"momentum": 0.0, "weight_decay": 0.0}),
        (4, {"momentum": 0.8, "weight_decay": 0.1}),
        (2, {"momentum": 0.0, "weight_decay": 0.1}),
        (3, {"momentum": 0.5, "weight_decay": 0.0}),
    ]
    table, dense, variance = noise_of(
        [(steps, lambda model, group, c=change: group.update(c)) for steps, change in phases]
    )
    covariance = np.zeros((2, 2))
    for steps, change in phases:
        mu, decay = change["momentum"], change["weight_decay"]
        # As torch.optim.SGD has it: without momentum, the buffer is left alone.
        b = np.array([-0.5, float(mu > 0)])
        A = np.array([[1, -0.5 * mu], [0, mu or 1]]) + np.outer(b, [decay, 0])
        for _ in range(steps):
            covariance = A @ covariance @ A.T + variance * np.outer(b, b)
    for found in (table, dense):
        ratio = found / covariance[0, 0]
        assert abs(ratio - 1) < 5 * np.sqrt(2 / 32000)
        for wrong in (2 / 3, 3 / 2):
            assert not abs(ratio * wrong - 1) < 5 * np.sqrt(2 / 32000)


def test_changed_momentum_and_decay_are_those_of_sgd():
    model = Model()
    peer = copy.deepcopy(model)
    lazy = LazyDPSGD(model, lr=0.5, **EXACT)
    plain = torch.optim.SGD(peer.parameters(), lr=0.5)
    for momentum, decay in ((0.0, 0.0), (0.9, 0.0), (0.0, 0.1), (0.5, 0.1), (0.0, 0.0)):
        for optimizer, each in ((lazy, model), (plain, peer)):
            optimizer.param_groups[0].update(momentum=momentum, weight_decay=decay)
            train(each, optimizer, 3)
    for one, two in zip(values(model.parameters()), values(peer.parameters()), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_a_state_with_momentum_is_loaded_where_there_was_none():
    model = Model()
    one = LazyDPSGD(model, lr=0.5, momentum=0.9, **EXACT)
    train(model, one, 3)
    twin = Model()
    two = LazyDPSGD(twin, lr=0.1, **EXACT)
    twin.load_state_dict(model.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for each, optimizer in ((model, one), (twin, two)):
        train(each, optimizer, 2)
    for a, b in zip(values(model.parameters()), values(twin.parameters()), strict=True):
        torch.testing.assert_close(a, b)


def thaw(model):
    freeze(model.out.parameters())
    yield
    freeze(model.out.parameters(), frozen=False)


def thaw_table(model):
    freeze([model.table.weight])
    yield
    freeze([model.table.weight], frozen=False)


def add_layer(model):
    yield
    torch.manual_seed(1)
    model.more = nn.Linear(4, 4)


@pytest.mark.parametrize("change", [thaw, thaw_table, add_layer])
def test_what_is_thawed_or_added_later_learns_as_under_sgd(change):
    models = []
    for kind in ("sgd", "lazy", "forgotten"):
        model = Model()
        changes = change(model)
        next(changes)
        trained = [p for p in model.parameters() if p.requires_grad]
        if kind == "sgd":
            optimizer = torch.optim.SGD(trained, lr=0.5)
        else:
            optimizer = LazyDPSGD(model, lr=0.5, **EXACT)
        train(model, optimizer, 2)
        next(changes, None)
        known = {p for group in optimizer.param_groups for p in group["params"]}
        added = [p for p in model.parameters() if p.requires_grad and p not in known]
        if kind == "forgotten":
            name = {thaw: "out", thaw_table: "table", add_layer: "more"}[change]
            with pytest.raises(
                UsageError, match=rf"not given all.*{name}\.weight.*add_param_group"
            ):
                model(X)
            continue
        optimizer.add_param_group({"params": added})
        train(model, optimizer, 3)
        models.append(model)
    assert isinstance(models[1].table.weight, LazyParameter)
    for one, two in zip(*(values(m.parameters()) for m in models), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m, o: o.param_groups[0].update(maximize=True), "maximize=True"),
        (lambda m, o: o.param_groups[0].update(dampening=0.5), "dampening=0.5"),
        (lambda m, o: o.param_groups[0].update(lr=-1.0), "lr = -1.0"),
        (lambda m, o: o.param_groups[0].update(momentum=float("nan")), "momentum = nan"),
        (lambda m, o: o.add_param_group({"params": [nn.Parameter(torch.ones(3, 7))]}), r"\(3, 7\)"),
        (lambda m, o: setattr(o, "noise_multiplier", -1.0), "noise_multiplier = -1.0"),
        (lambda m, o: setattr(m, "hidden", nn.Bilinear(2, 2, 2)), "'hidden' .*Bilinear"),
        (lambda m, o: setattr(m.hidden, "weight", nn.Parameter(torch.ones(4, 4))), "not the model"),
        (lambda m, o: setattr(m, "other", nn.BatchNorm1d(3)), "'other' .*GroupNorm"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_moves(change, match):
    model = Model()
    optimizer = LazyDPSGD(model, lr=1.0, **NOISY)
    counted = []
    optimizer.attach_step_hook(counted.append)
    change(model, optimizer)
    before = values(model.parameters())
    with pytest.raises(UsageError, match=match):
        optimizer.step()
    assert not counted
    assert all(map(torch.equal, before, values(model.parameters())))


def test_a_model_that_was_refused_keeps_no_hooks():
    norm = nn.BatchNorm1d(4, affine=False)
    model = nn.Sequential(nn.Embedding(3, 4), norm, nn.Linear(4, 1))
    with pytest.raises(UsageError, match="GroupNorm"):
        LazyDPSGD(model, lr=1.0, **NOISY)
    norm.eval()
    optimizer = LazyDPSGD(model, lr=1.0, **NOISY)
    model(torch.tensor([0, 1, 2])).sum().backward()
    optimizer.step()
    optimizer.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_graph_from_before_a_step_shows_no_rows_that_owe_its_noise():
    model = nn.Sequential(nn.EmbeddingBag(ROWS, 4, mode="sum"), nn.Linear(4, 1))
    optimizer = LazyDPSGD(model, lr=1.0, **NOISY)
    weight = model[0].weight.requires_grad_(False)
    by = torch.ones(X.shape, requires_grad=True)
    found = functional.embedding_bag(X, weight, per_sample_weights=by, mode="sum")
    weight.requires_grad_(True)
    model(X).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()
