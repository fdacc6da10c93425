"""GMF, MLP and NeuMF score as the paper's networks do, and differentiate as autograd does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from privrec.models.ncf import NCF

KINDS = ["gmf", "mlp", "neumf"]
DIM, HIDDEN = 6, (5, 4)
Inputs = tuple[NCF, Tensor, Tensor, Tensor]


def inputs(
    kind: str, m: int = 3, k: int = 7, seed: int = 0, hidden: tuple[int, ...] = HIDDEN
) -> Inputs:
    model = NCF.of(kind, DIM, hidden)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(seed)
    user = torch.randn(m, model.user_dim, generator=draw)
    rows = torch.randn(m, k, DIM, generator=draw)
    dense = torch.randn(m, model.dense, generator=draw)
    return model, user, rows, dense


def network(model: NCF, dense: Tensor) -> nn.Sequential:
    """The tower as torch.nn builds it, with ``dense`` as its weights."""
    layers: list[nn.Module] = []
    parts = iter(dense.split([int(np.prod(shape)) for shape in model.shapes]))
    widths = [2 * model.tower, *model.hidden]
    for a, b in zip(widths, widths[1:], strict=False):
        linear = nn.Linear(a, b)
        linear.weight.data = next(parts).reshape(a, b).T.clone()
        linear.bias.data = next(parts).clone()
        layers += [linear, nn.ReLU()]
    last = nn.Linear(widths[-1], 1, bias=False)
    last.weight.data = next(parts)[None].clone()
    return nn.Sequential(*layers, last)


def reference(
    model: NCF, user: Tensor, rows: Tensor, dense: Tensor, tower: nn.Sequential | None = None
) -> Tensor:
    """One user's scores: dot product, plus the tower over (user, item), plus the user's bias."""
    scores = rows[:, : model.dot] @ user[: model.dot] + user[-1]
    if model.tower:
        own = user[model.dot : -1].expand(len(rows), -1)
        tower = tower or network(model, dense)
        scores = scores + tower(torch.cat((own, rows[:, model.dot :]), dim=1))[:, 0]
    return scores


@pytest.mark.parametrize("hidden", [(5, 4), (3,), (8, 6, 4, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_published_network(kind: str, hidden: tuple[int, ...]) -> None:
    model, user, rows, dense = inputs(kind, hidden=hidden)
    expected = [reference(model, *each) for each in zip(user, rows, dense, strict=True)]
    found = model.forward(user, rows, dense).values
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)


def test_the_family_has_the_sizes_of_the_paper() -> None:
    gmf, mlp, neumf = (NCF.of(kind, 32, (64, 32, 16)) for kind in ("gmf", "mlp", "neumf"))
    assert (gmf.dot, gmf.tower, gmf.dense) == (32, 0, 0)
    assert (mlp.dot, mlp.tower) == (0, 32)
    assert mlp.dense == 64 * 64 + 64 + 64 * 32 + 32 + 32 * 16 + 16 + 16
    assert (neumf.dot, neumf.tower) == (16, 16)
    assert {model.dim for model in (gmf, mlp, neumf)} == {32}
    assert {model.user_dim for model in (gmf, mlp, neumf)} == {33}


@pytest.mark.parametrize("kind", KINDS)
def test_users_who_see_the_same_items_may_share_them(kind: str) -> None:
    model, user, rows, dense = inputs(kind)
    shared = rows[:1]
    expected = model.forward(user, shared.repeat(3, 1, 1), dense)
    found = model.forward(user, shared, dense)
    upstream = torch.linspace(-1, 1, 21).reshape(3, 7)
    jacobians = (each.user_jacobian().expand(3, -1, -1) for each in (expected, found))
    assert torch.allclose(expected.values, found.values, atol=1e-6)
    assert torch.allclose(*jacobians, atol=1e-6)
    for one, other in zip(
        expected.shared_gradient(upstream), found.shared_gradient(upstream), strict=True
    ):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_user_jacobian_is_that_of_autograd(kind: str) -> None:
    model, user, rows, dense = inputs(kind)
    found = model.forward(user, rows, dense).user_jacobian().expand(3, -1, -1)
    for i in range(3):

        def scores(own: Tensor, i: int = i) -> Tensor:
            return reference(model, own, rows[i], dense[i])

        expected = torch.autograd.functional.jacobian(scores, user[i])
        assert torch.allclose(found[i], expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_gradient_is_that_of_autograd(kind: str) -> None:
    model, user, rows, dense = inputs(kind)
    upstream = torch.linspace(-2, 1, 21).reshape(3, 7)
    on_rows, on_dense = model.forward(user, rows, dense).shared_gradient(upstream)
    assert on_dense.shape == (3, model.dense)
    for i in range(3):
        items = rows[i].clone().requires_grad_()
        tower = network(model, dense[i]) if model.tower else nn.Sequential()
        reference(model, user[i], items, dense[i], tower).backward(upstream[i])
        assert torch.allclose(on_rows[i], items.grad, atol=1e-5)
        weights = [p.grad.t().reshape(-1) for p in tower.parameters()]
        assert torch.allclose(on_dense[i], torch.cat([torch.zeros(0), *weights]), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_jacobian_and_gradient_may_be_asked_for_in_any_number(kind: str) -> None:
    model, user, rows, dense = inputs(kind)
    scored = model.forward(user, rows, dense)
    one, two = scored.user_jacobian(), scored.user_jacobian()
    assert torch.equal(one, two)
    assert scored.shared_gradient(torch.ones(3, 7))[0].shape == (3, 7, DIM)


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_its_inputs_as_they_are(kind: str) -> None:
    model, user, rows, dense = inputs(kind)
    kept = [part.clone() for part in (user, rows, dense)]
    scored = model.forward(user, rows, dense)
    scored.user_jacobian()
    scored.shared_gradient(torch.ones(3, 7))
    for before, after in zip(kept, (user, rows, dense), strict=True):
        assert torch.equal(before, after)
        assert not after.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_rank_scores_as_forward_does(kind: str) -> None:
    model, user, rows, dense = inputs(kind)
    table, weights = rows[0], dense[0]
    expected = model.forward(user, table[None], weights.expand(3, -1)).values
    assert torch.allclose(model.rank(user, table, weights), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_is_scored_by_its_own_weights_alone(kind: str) -> None:
    model, user, rows, dense = inputs(kind)
    before = model.forward(user, rows, dense).values
    for part in (user, rows, dense):
        part[1:] += 1
    after = model.forward(user, rows, dense).values
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1:], after[1:])


def test_initial_dense_is_glorot_with_zero_biases() -> None:
    model = NCF.of("mlp", 32, (64, 32, 16))
    vector = model.initial_dense(np.random.default_rng(0))
    assert vector.dtype == np.float32
    assert vector.shape == (model.dense,)
    parts = np.split(vector, np.cumsum([int(np.prod(s)) for s in model.shapes])[:-1])
    for part, shape in zip(parts[:-1], model.shapes[:-1], strict=True):
        if len(shape) == 1:
            assert not part.any()
        else:
            limit = np.sqrt(6 / sum(shape))
            assert 0.9 * limit < np.abs(part).max() <= limit
            assert part.std() == pytest.approx(limit / np.sqrt(3), rel=0.1)
    assert 0 < np.abs(parts[-1]).max() <= np.sqrt(6 / 17)


def test_initial_dense_of_gmf_is_empty() -> None:
    assert NCF.of("gmf", 8, ()).initial_dense(np.random.default_rng(0)).shape == (0,)
