"""Local training against a plain re-implementation: whole tables, torch.nn's autograd, loops."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from on_devices import trained_rows
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from privrec.device.device import Draws
from privrec.models.losses import item_gram, pack, unpack

CASES = list(itertools.product(["gmf", "mlp", "neumf"], ["bce", "bpr", "softmax", "full_softmax"]))


class Plain:
    """The whole recommender as one flat double vector, differentiated by autograd."""

    def __init__(self, here, user: int) -> None:
        self.parts, self.settings = here.learner.view, here.learner.settings
        batch = here.learner.sampler.draw(here.history(user), here.key)
        self.items = batch.items[0].tolist()
        self.valid = batch.valid[0].tolist()
        self.positives = batch.positives
        self.history = here.histories[user].tolist()

    @property
    def counts(self) -> dict[int, float]:
        """What each item of the history counts, the last 1."""
        latest_first = enumerate(reversed(self.history), 1)
        return {item: age**-self.settings.recency for age, item in latest_first}

    def scores(self, flat: Tensor, own: Tensor) -> Tensor:
        layout, model = self.parts.layout, self.parts.network
        memory = flat[layout.dense : layout.dense + layout.slots * layout.block]
        table = self._table(self.parts.vectors, memory.reshape(layout.slots, -1))
        scores = table[:, : model.dot] @ own[: model.dot] + own[-1]
        if model.tower:
            parts, start = [], 0
            for shape in model.shapes:
                size = int(np.prod(shape))
                parts.append(flat[start : start + size].reshape(shape))
                start += size
            both = [own[model.dot : -1].expand(len(table), -1), table[:, model.dot :]]
            hidden = torch.cat(both, dim=1)
            for weight, bias in zip(parts[:-1:2], parts[1:-1:2], strict=True):
                hidden = torch.relu(hidden @ weight + bias)
            scores = scores + hidden @ parts[-1]
        if self.parts.biases is not None:
            biases = flat[layout.size - layout.bias_slots :].reshape(-1, 1)
            scores = scores + self._table(self.parts.biases, biases)[:, 0]
        return scores

    def _table(self, subspace, memory: Tensor) -> Tensor:
        slots, signs = subspace.locate(np.arange(subspace.items))
        rows = memory[torch.from_numpy(slots)] * torch.from_numpy(signs).double()[..., None]
        return rows.reshape(subspace.items, -1)

    def loss(self, scores: Tensor) -> Tensor:
        if self.settings.loss == "full_softmax":
            logs = torch.log_softmax(scores, 0)
            return -sum(count * logs[item] for item, count in self.counts.items())
        p, per = self.positives, self.settings.negatives
        mine = [i for i in range(p) if self.valid[i]]
        fresh = [j for j in range(p, len(self.items)) if self.valid[j]]
        score = {place: scores[self.items[place]] for place in mine + fresh}
        count = {place: self.counts[self.items[place]] for place in mine}
        total = torch.zeros((), dtype=torch.float64)
        if self.settings.loss == "bce":
            total = total + sum(count[i] * softplus(-score[i]) for i in mine)
            return total + sum(count[(j - p) // per] * softplus(score[j]) for j in fresh)
        for i in mine:
            if self.settings.loss == "bpr":
                rivals = [j for j in fresh if (j - p) // per == i]
                total = total - count[i] * sum(logsigmoid(score[i] - score[j]) for j in rivals)
            elif fresh:
                every = torch.stack([score[i], *(score[j] for j in fresh)])
                total = total - count[i] * torch.log_softmax(every, 0)[0]
        return total

    def update(self, weights: np.ndarray, own: np.ndarray) -> np.ndarray:
        start = torch.from_numpy(weights).double()
        flat, own_state = start.clone(), torch.from_numpy(own).double()
        for _ in range(self.settings.local_steps):
            flat = flat.detach().requires_grad_()
            loss = self.loss(self.scores(flat, own_state))
            (slope,) = torch.autograd.grad(loss, flat)
            flat = flat - self.settings.local_lr * slope
        return (flat - start).detach().numpy()


@pytest.mark.parametrize("item_bias", [True, False])
@pytest.mark.parametrize("compression", [1.0, 8.0])
@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize(("kind", "loss"), CASES)
def test_the_update_is_gradient_descent_on_the_shared_vector(
    double_lab, vector, kind, loss, local_steps, compression, item_bias
) -> None:
    """30 items and over 30 negatives: items repeat, and blocks collide when compressed."""
    here = double_lab(kind, compression, loss=loss, local_steps=local_steps, item_bias=item_bias)
    for user in (3, 4):
        trained = here.alone(user)
        expected = Plain(here, user).update(here.weights, trained.states[0])
        found = vector(trained.update)
        scale = np.abs(expected).max()
        assert scale > 1e-3
        assert np.abs(found - expected).max() <= 1e-9 * scale


def test_the_update_has_the_norm_of_its_row(lab, vector) -> None:
    """Clipping sees the row of values: no block may be named twice with a value in it."""
    for compression in (1.0, 8.0):
        here = lab("neumf", compression, local_steps=2)
        for user in (3, 6):
            update = here.alone(user).update
            row = np.linalg.norm(update.values[0].astype(np.float64))
            assert np.linalg.norm(vector(update)) == pytest.approx(row, rel=1e-5)


def penalised(here, user: int, state: np.ndarray) -> tuple[float, np.ndarray]:
    """Loss and prior of a private state, and their slope, by autograd."""
    plain = Plain(here, user)
    own = torch.from_numpy(state).double().requires_grad_()
    loss = plain.loss(plain.scores(torch.from_numpy(here.weights).double(), own))
    loss = loss + here.learner.settings.user_l2 / 2 * (own[:-1] ** 2).sum()
    (slope,) = torch.autograd.grad(loss, own)
    return float(loss.detach()), slope.numpy()


@pytest.mark.parametrize("loss", ["bce", "bpr", "softmax", "full_softmax"])
@pytest.mark.parametrize("compression", [1.0, 8.0])
def test_many_steps_bring_the_private_state_to_its_optimum(lab, loss, compression) -> None:
    here = lab("gmf", compression, loss=loss, user_steps=200, user_l2=0.5)
    for user in (3, 7):
        start = np.abs(penalised(here, user, here.states[user])[1]).max()
        end = np.abs(penalised(here, user, here.alone(user).states[0])[1]).max()
        assert start > 0.5
        assert end < 2e-3


@pytest.mark.parametrize("loss", ["bce", "bpr", "softmax", "full_softmax"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 2.0, 4.0])
def test_fitting_never_raises_the_loss(lab, loss, scale) -> None:
    values = []
    for steps in range(7):
        here = lab("gmf", loss=loss, user_steps=steps, scale=scale)
        values.append([penalised(here, user, here.alone(user).states[0])[0] for user in (0, 3, 7)])
    assert np.all(np.diff(values, axis=0) <= 1e-4)
    assert np.all(np.array(values[0]) > np.array(values[-1]))


SHARED = {"loss": "full_softmax", "shared_curvature": True}


@pytest.mark.parametrize("scale", [0.1, 1.0, 2.0, 4.0])
def test_a_shared_curvature_never_raises_the_loss_either(lab, scale) -> None:
    losses = []
    for steps in range(12):
        here = lab("gmf", user_steps=steps, scale=scale, **SHARED)
        losses.append([penalised(here, user, here.alone(user).states[0])[0] for user in (0, 3, 7)])
    assert np.all(np.diff(losses, axis=0) <= 1e-4)
    assert np.all(np.array(losses[0]) > np.array(losses[-1]))


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_a_shared_curvature_leads_to_the_same_optimum(lab, scale) -> None:
    here = lab("gmf", user_steps=500, scale=scale, user_l2=0.5, **SHARED)
    for user in (3, 7):
        assert np.abs(penalised(here, user, here.alone(user).states[0])[1]).max() < 2e-3


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_user_lr_scales_the_step(lab, rate) -> None:
    full = lab(user_steps=1, user_lr=1.0)
    part = lab(user_steps=1, user_lr=rate)
    whole = full.alone(3).states[0] - full.states[3]
    assert np.allclose(part.alone(3).states[0] - part.states[3], rate * whole, atol=1e-6)


def test_the_loss_is_the_mean_over_samples_before_the_items_move(lab) -> None:
    here = lab("neumf", local_steps=3)
    plain, trained = Plain(here, 3), here.alone(3)
    own = torch.from_numpy(trained.states[0]).double()
    total = plain.loss(plain.scores(torch.from_numpy(here.weights).double(), own))
    assert trained.losses[0] == pytest.approx(float(total) / sum(plain.valid), rel=1e-4)


@pytest.mark.parametrize("kind", ["gmf", "mlp", "neumf"])
def test_serving_starts_from_nothing(lab, kind) -> None:
    here = lab(kind)
    served = here.serve(3)
    here.states[...] = 5
    assert np.array_equal(served, here.serve(3))
    assert served.shape == (here.learner.state_dim,)


def test_serving_finds_the_optimum_of_its_own_settings(lab) -> None:
    """More negatives than in training, and the whole history however long."""
    here = lab("gmf", serve_steps=200, max_samples=2)
    served = here.serve(3)
    assert np.abs(penalised(here, 3, served)[1]).max() > 0.1
    here.learner = here.learner.serving
    settings = here.learner.settings
    assert (settings.negatives, settings.max_samples) == (6, None)
    assert np.abs(penalised(here, 3, served)[1]).max() < 2e-3


@pytest.mark.parametrize("loss", ["bce", "bpr", "softmax", "full_softmax"])
def test_the_last_items_count_more_in_serving_alone(lab, vector, loss) -> None:
    here, plain = (lab("gmf", loss=loss, serve_steps=200, serve_recency=r) for r in (1.0, 0.0))
    assert np.array_equal(vector(here.alone(3).update), vector(plain.alone(3).update))
    served = here.serve(3)
    assert np.abs(served - plain.serve(3)).max() > 0.01
    here.learner = here.learner.serving
    assert np.abs(penalised(here, 3, served)[1]).max() < 2e-3


def test_places_looked_up_train_as_places_computed(lab, vector) -> None:
    for compression in (1.0, 8.0):
        here = lab("neumf", compression, local_steps=2)
        before = vector(here.alone(3).update)
        here.learner = replace(here.learner, view=here.learner.view.tabulated())
        assert np.array_equal(vector(here.alone(3).update), before)


# --------------------------------------------------------------------------- implicit ALS


def closed_form(here, user: int) -> np.ndarray:
    """The optimum of a user vector over its history and the whole catalogue."""
    parts, settings = here.learner.view, here.learner.settings
    memory = parts.layout.memory_of(here.weights).astype(np.float64)
    table = parts.vectors.gather(memory, np.arange(parts.vectors.items))
    mine = table[here.histories[user]]
    counts = np.arange(len(mine), 0, -1.0)[:, None] ** -settings.recency
    system = mine.T @ (counts * mine) + settings.unobserved_weight * table.T @ table
    return np.linalg.solve(system + settings.user_l2 * np.eye(len(system)), (counts * mine).sum(0))


@pytest.mark.parametrize("unobserved_weight", [0.01, 0.5])
@pytest.mark.parametrize("compression", [1.0, 8.0])
@pytest.mark.parametrize("recency", [0.0, 1.0])
def test_implicit_als_fits_a_user_in_closed_form(
    lab, compression, unobserved_weight, recency
) -> None:
    """From any start; one whole Newton step, but for the ridge, is the solution."""
    here = lab("gmf", compression, loss="ials", item_bias=False, user_steps=3, user_l2=0.5,
               unobserved_weight=unobserved_weight,
               recency=recency, serve_recency=recency)  # fmt: skip
    here.states[:, -1] = 0
    for user in here.users:
        expected = closed_form(here, int(user))
        for found in (here.alone(int(user)).states[0], here.serve(int(user))):
            assert np.allclose(found[:-1], expected, atol=2e-3)
            assert found[-1] == 0
        assert np.abs(expected).max() > 0.05 or not len(here.histories[user])


@pytest.mark.parametrize("newton", [False, True])
@pytest.mark.parametrize("compression", [1.0, 8.0])
def test_implicit_als_sends_the_slope_of_its_history(lab, vector, compression, newton) -> None:
    """Preconditioned where asked, and the packed ``u uᵀ``; nothing of items it has not seen."""
    here = lab("gmf", compression, loss="ials", item_bias=False, local_lr=0.3, newton=newton)
    here.states[:, -1] = 0
    parts, settings = here.learner.view, here.learner.settings
    layout, table = parts.layout, parts.vectors
    gram = unpack(layout.gram_of(here.weights).astype(np.float64), table.dim)
    system = settings.unobserved_weight * gram + settings.item_l2 * np.eye(table.dim)
    for user in here.users:
        trained, history = here.alone(int(user)), here.histories[user]
        own = trained.states[0, :-1].astype(np.float64)
        memory = layout.memory_of(here.weights).astype(np.float64)
        scores = table.gather(memory, history) @ own
        slopes = (scores - 1)[:, None] * own
        if newton:
            slopes = slopes @ np.linalg.inv(system)
        expected = np.zeros(layout.size)
        table.scatter_add(layout.memory_of(expected), history, -settings.local_lr * slopes)
        layout.gram_of(expected)[...] = pack(trained.states[:, :-1])[0]
        found = vector(trained.update)
        scale = max(float(np.abs(expected).max()), 1e-6)
        assert np.abs(found - expected).max() <= 1e-4 * scale
        if len(history):
            assert layout.memory_of(found).any()
            assert layout.gram_of(found).any()


@pytest.mark.parametrize("newton", [False, True])
def test_before_a_gram_matrix_is_known_nothing_is_preconditioned(lab, vector, newton) -> None:
    """Newton steps wait for it; plain ones need none."""
    here = lab("gmf", loss="ials", item_bias=False, newton=newton)
    layout = here.learner.view.layout
    layout.gram_of(here.weights)[...] = 0
    found = vector(here.alone(3).update)
    assert layout.gram_of(found).any()
    assert bool(layout.memory_of(found).any()) is not newton


def test_a_gram_matrix_of_items_is_computed_once_for_all_devices(lab, vector, monkeypatch) -> None:
    here = lab("gmf", 8.0, loss="ials", item_bias=False)
    counted: list[int] = []

    def once(table, memory):
        counted.append(len(memory))
        return item_gram(table, memory)

    monkeypatch.setattr("privrec.device.local.item_gram", once)
    list(trained_rows(here.cohort, here.weights, here.users, Draws(here.key)))
    assert len(counted) == 1
    model, double = here.model, here.model
    double.__dict__["gram"] = 2 * model.gram
    one, other = (here.device(3).train(known, Draws(here.key)).update for known in (model, double))
    assert np.array_equal(vector(one), vector(here.alone(3).update))
    assert not np.array_equal(vector(one), vector(other))
    counted.clear()
    for loss in ("bce", "bpr", "softmax", "full_softmax"):
        lab(loss=loss).alone(3)
    assert not counted


@pytest.mark.parametrize("loss", ["softmax", "full_softmax"])
def test_a_rank_weighs_the_gradient_of_its_item_and_nothing_else(double_lab, vector, loss) -> None:
    """Items named twice, as positive or negative, count once; the private state is as ever."""
    here = double_lab("gmf", 1.0, loss=loss, local_steps=1)
    weighted = replace(here.learner, settings=replace(here.learner.settings, rank_power=0.5))
    plain, ranked = here.alone(3), replace(here, learner=weighted).alone(3)
    np.testing.assert_array_equal(plain.states, ranked.states)
    view, items = here.learner.view, np.arange(here.learner.view.vectors.items)
    rows = []
    for trained in (plain, ranked):
        change, layout = vector(trained.update), view.layout
        vectors = view.vectors.gather(layout.memory_of(change), items)
        biases = view.biases.gather(layout.biases_of(change)[:, None], items)
        rows.append(np.concatenate((vectors, biases), axis=1))
    assert np.abs(rows[0]).max() > 1e-3
    expected = rows[0] * np.sqrt(1 + items / 100)[:, None]
    np.testing.assert_allclose(rows[1], expected, rtol=1e-6, atol=1e-9)


def with_features(here, features: np.ndarray):
    """The same devices, which know of features and begin without an opinion of them."""
    learner = replace(here.learner, view=here.learner.view.featured(features))
    *vector, bias = np.hsplit(here.states, [here.states.shape[1] - 1])
    weights = np.zeros((len(bias), features.shape[1]), bias.dtype)
    return replace(here, learner=learner, states=np.hstack((*vector, weights, bias)))


@pytest.mark.parametrize("loss", ["bce", "bpr", "softmax", "full_softmax"])
def test_features_of_nothing_change_nothing(double_lab, vector, loss) -> None:
    here = double_lab("gmf", 1.0, loss=loss, local_steps=2)
    items = here.learner.view.vectors.items
    blind = with_features(here, np.zeros((items, 3), here.weights.dtype))
    plain, other = here.alone(3), blind.alone(3)
    np.testing.assert_allclose(vector(plain.update), vector(other.update), atol=1e-12)
    assert other.states.shape[1] == plain.states.shape[1] + 3
    assert not other.states[:, -4:-1].any()


def test_a_user_weighs_features_and_the_update_has_learned_vectors_alone(
    double_lab, vector
) -> None:
    """The update is the gradient of the same loss, whose scores have a term that never moves."""
    here = double_lab("gmf", 1.0, loss="full_softmax", local_steps=1, user_steps=20)
    view = here.learner.view
    items, dim = view.vectors.items, view.vectors.dim
    liked = np.isin(np.arange(items), here.histories[3]).astype(here.weights.dtype)
    told = with_features(here, 2 * (liked - liked.mean())[:, None])
    trained = told.alone(3)
    state = trained.states[0]
    assert state[dim] > 0.5  # the feature says what is liked
    assert len(vector(trained.update)) == len(here.weights)
    memory = view.layout.memory_of(here.weights)
    rows = view.vectors.gather(memory, np.arange(items))
    biases = view.biases.gather(view.layout.biases_of(here.weights)[:, None], np.arange(items))
    scores = rows @ state[:dim] + 2 * (liked - liked.mean()) * state[dim] + biases[:, 0]
    expected = np.exp(scores - scores.max())
    residual = liked - liked.sum() * expected / expected.sum()
    change = vector(trained.update)
    found = view.vectors.gather(view.layout.memory_of(change), np.arange(items))
    scale = here.learner.settings.local_lr
    np.testing.assert_allclose(found, scale * residual[:, None] * state[:dim], atol=1e-8)
