"""Local training of a recommender: what one device, or a batch of devices, does in a round.

The device fits its private state (user vector and bias) with the items fixed, then takes gradient
steps on the item blocks, item biases and dense weights that its samples touch. The difference is
its update. Only the touched blocks are copied: nothing of the table's size, nor of the memory's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privrec.device.device import MANY, Deferred, Draws, Learner, Settings, Trained
from privrec.device.example_shares import ExampleShares, ExampleSums
from privrec.device.examples import ExampleNoise, ExampleSteps
from privrec.device.local import LocalModel, Located
from privrec.device.samples import (
    EACH,
    Batch,
    Histories,
    Items,
    NegativeBudget,
    Sampler,
)
from privrec.device.tier import ModelView
from privrec.device.update import Address, RawUpdate, digest
from privrec.embedding.table import Table, flattened, merged, representatives
from privrec.models.losses import Graded, Samples, curvature, loss_of, pack
from privrec.models.ncf import NCF, Scored
from privrec.workers import Take

FloatArray = NDArray[np.float32]

SAMPLES_IN_BATCH = 12288
"""Samples trained at once, so that a batch's tensors stay in a core's cache."""
SHARED_SAMPLES_IN_BATCH = 131072
"""The same where all devices look at the whole catalogue, whose part of the work they share."""
COEFFICIENTS_IN_BATCH = 1 << 20
"""Coefficients of the updates made at once where every device's update has noise everywhere."""

_HEAD = 100  # ranks up to which items are about equally popular
_RIDGE = 1e-4  # keeps the Newton system of a device with few samples solvable


@dataclass(frozen=True)
class RecommenderLearner(Learner):
    """Local training of one recommender with one set of hyper-parameters.

    ``popularity`` is that of :func:`~privrec.device.samples.popularity_of`, where negatives ask for
    it; ``examples`` is how single examples are hidden, if they are: in every upload by noise of
    every local step, or in sums by shares of noise; ``served`` is the model that users are fitted
    to for recommendations, where it has features that training does without.
    """

    view: ModelView[NCF]
    settings: Settings
    popularity: NDArray[np.float64] | None = None
    examples: ExampleNoise | ExampleShares | None = None
    served: ModelView[NCF] | None = None

    @property
    def state_dim(self) -> int:
        """User vector and user bias."""
        return self.view.network.user_dim

    @cached_property
    def serving(self) -> RecommenderLearner:
        """The same for fitting user vectors alone to whole histories, without any noise."""
        own = self.settings
        budget, negatives = own.serve_budget or own.budget, own.serve_negatives
        settings = replace(
            own, budget=budget, negatives=negatives, user_steps=own.serve_steps,
            recency=own.serve_recency,
            shared_curvature=False,  # once, exactly
        )  # fmt: skip
        # Popular negatives are for training: a fit is to all items alike.
        return RecommenderLearner(self.served or self.view, replace(settings, max_samples=None))

    @cached_property
    def sampler(self) -> Sampler:
        """How a device draws its samples."""
        settings, n_items = self.settings, self.view.vectors.items
        loss = loss_of(settings.loss)
        negatives = 0 if loss.implicit else settings.negatives
        budget = None
        if settings.selector != EACH:
            popularity, size = self.popularity, max(1, round(settings.budget * n_items))
            if popularity is not None and len(popularity) > n_items:
                popularity = popularity[:n_items] / popularity[n_items - 1]
            budget = NegativeBudget(n_items, size, settings.selector, settings.selected, popularity)
        whole = loss.whole_catalogue and budget is None
        most, recency = settings.max_samples, settings.recency
        return Sampler(n_items, negatives, most, whole, budget, recency)

    def held(self, data: Histories) -> Histories:
        """Histories less the items that the tier does not hold."""
        return data.below(self.view.vectors.items)

    def batches(self, lengths: Items) -> Iterator[Items]:
        """Places by length of history, cut where a padded batch would outgrow the cache."""
        order = np.argsort(lengths, kind="stable")
        widths = self.sampler.width(lengths[order])
        most = SHARED_SAMPLES_IN_BATCH if self.sampler.whole else SAMPLES_IN_BATCH
        if self.examples is not None:
            # Each device's update is as long as the vector.
            most, widths = COEFFICIENTS_IN_BATCH, np.full_like(widths, self.view.layout.size)
        start = 0
        while start < len(order):
            # Sorted by length, the last device of a batch sets its width.
            ahead = widths[start : start + most]
            padded = ahead * np.arange(1, len(ahead) + 1)
            size = max(1, int(np.searchsorted(padded, most, side="right")))
            yield order[start : start + size]
            start += size

    def train(
        self, model: LocalModel[NCF], data: Histories, states: FloatArray, draws: Draws
    ) -> Trained:
        """See :meth:`Learner.train`."""
        if isinstance(self.examples, ExampleShares):
            return ExampleSums(model, self.settings, self.examples, data, states, draws).run()
        if self.examples is not None:
            return self._noisy(model, data, states, draws, self.examples)
        local, user = self._fitted(model, data, torch.from_numpy(states), draws)
        losses = local.descend(user)
        new, update = user.numpy(), RawUpdate(local.change(user.numpy()), local.address)
        kept = np.where(np.isfinite(new).all(1, keepdims=True), new, states)
        return Trained(update, kept, losses.numpy())

    def serve(
        self, weights: FloatArray, data: Histories, draws: Draws, take: Take = enumerate
    ) -> FloatArray:
        """Private states fitted from nothing to fixed items, shape ``(m, state_dim)``.

        It is how recommendations are made, for users seen in training and for others alike.
        Batches are shared out by ``take``; states of those that others take stay zeros.
        """
        model = LocalModel(self.serving.view, weights, resident=len(data.users) >= MANY)
        fitted = np.zeros((len(data.users), self.serving.state_dim), np.float32)
        for _, places in take(list(self.serving.batches(data.lengths))):
            nothing = torch.zeros(len(places), self.serving.state_dim)
            _, user = self.serving._fitted(model, data.select(places), nothing, draws)
            fitted[places] = user.numpy()
        return fitted

    def _fitted(
        self, model: LocalModel[NCF], data: Histories, user: Tensor, draws: Draws
    ) -> tuple[_Local, Tensor]:
        """What the samples touch, and private states fitted to them."""
        batch, budget = self.sampler.draw(data, draws.key), self.sampler.budget
        local = _Local(model, batch, self.settings)
        user = local.fit(user)
        if budget is not None and budget.is_selective:
            search = model.search(budget.selector, self.settings.config)
            queries = user.numpy()[:, : search.items.dim].copy()
            if search.items.biases is not None:
                queries[:, -1] = 1
            batch = budget.refine(batch, data, queries, search, draws.functions, draws.key)
            local = _Local(model, batch, self.settings)
            user = local.fit(user)
        return local, user

    def _noisy(
        self,
        model: LocalModel[NCF],
        data: Histories,
        states: FloatArray,
        draws: Draws,
        bound: ExampleNoise,
    ) -> Trained:
        """Noisy local steps, device by device, since each has a noisy memory of its own."""
        m, layout = len(data.users), self.view.layout
        changes, users = np.empty((m, layout.size), np.float32), np.empty_like(states)
        losses, deferred = np.zeros(m, np.float32), Deferred()
        for row, user in enumerate(data.users.tolist()):
            items = data.of(row)
            root = draws.noise(user, digest(states[row]) + digest(items))
            steps = ExampleSteps(model, self.settings, bound, states[row], user, draws.key, root)
            losses[row] = steps.run(items.astype(np.int64))
            changes[row], users[row] = steps.change(), steps.state
            deferred += steps.deferred
        return Trained(RawUpdate(changes, Address.whole(layout)), users, losses, deferred)


class _Local:
    """The devices' copies of what their samples touch, and the change they make to it."""

    def __init__(self, model: LocalModel[NCF], batch: Batch, settings: Settings) -> None:
        view, self._settings, self._source = model.view, settings, model
        self._model, self._loss = view.network, loss_of(settings.loss)
        self._unobserved: Tensor | None = None
        if self._loss.implicit:
            weighted = model.gram * np.float32(settings.unobserved_weight)
            self._unobserved = torch.from_numpy(weighted)
        self._preconditioner: Tensor | None = None
        if settings.newton:  # ``P`` of privrec.models.losses; zeros in the first round, to find S
            users, dim = view.layout.gram_of(model.weights), view.vectors.dim
            self._preconditioner = torch.zeros(dim, dim)
            if users.any():
                matrix = curvature(users, dim, settings.unobserved_weight, settings.item_l2)
                self._preconditioner = torch.from_numpy(np.linalg.inv(matrix))
        logs = None if batch.weights is None else torch.from_numpy(batch.weights)
        self._samples = Samples(torch.from_numpy(batch.valid), batch.positives, logs)
        self._first = None if batch.first is None else torch.from_numpy(batch.first)
        self._ranked: Tensor | None = None
        if settings.rank_power:
            ranked = (1 + batch.items / _HEAD) ** settings.rank_power
            self._ranked = torch.from_numpy(ranked.astype(np.float32))
        self._vectors = _Touched(view.vectors, model.memory, batch, view.features)
        self._biases: _Touched | None = None
        if view.biases is not None:
            self._biases = _Touched(view.biases, model.bias_memory, batch)
        self._dense = torch.from_numpy(model.dense).expand(len(batch.valid), -1)
        self._dense_change = torch.zeros(self._dense.shape)
        slots = self._vectors.slots
        named = slots[:, :0] if self._biases is None else self._biases.slots
        self.address = Address(slots, named, view.layout)

    def fit(self, user: Tensor) -> Tensor:
        """Newton steps on the private states."""
        if self._settings.shared_curvature:
            return self._fit_together(user)
        for _ in range(self._settings.user_steps):
            user = user - self._settings.user_lr * self._newton(user)
        return user

    def _newton(self, user: Tensor) -> Tensor:
        """Newton step under the loss's curvature and a Gaussian prior on the vector alone."""
        scored, (_, gradient, curvature) = self._graded(user)
        jacobian = scored.user_jacobian()
        if self._unobserved is not None:
            # Squares over all items would have the bias fit their common level, which ranks none.
            jacobian[..., -1] = 0
        prior = torch.full((user.shape[1],), self._settings.user_l2)
        prior[-1] = 0
        shared = len(jacobian) == 1
        if shared and len(user) > 1:
            hessian = _unfolded(curvature @ self._source.products, user.shape[1])
        else:
            hessian = torch.bmm((jacobian * curvature.unsqueeze(2)).transpose(1, 2), jacobian)
        hessian += torch.diag(prior + _RIDGE)
        slope = gradient @ jacobian[0] if shared else (gradient[:, None] @ jacobian)[:, 0]
        slope = slope + prior * user
        if self._unobserved is not None:
            hessian[:, :-1, :-1] += self._unobserved
            slope[:, :-1] += user[:, :-1] @ self._unobserved
        # Not finite gives a state, hence an update, that is not finite: it is zeroed when clipped.
        factor = torch.linalg.cholesky_ex(hessian)[0]
        step = torch.cholesky_solve(slope.unsqueeze(2), factor).squeeze(2)
        if not self._loss.damped:
            return step
        shifts = step @ jacobian[0].T if shared else (jacobian @ step[:, :, None])[..., 0]
        # Padding and negatives that are in the history have neither; the loss does not see them.
        unseen = (curvature == 0) & (gradient == 0)
        low, high = (shifts.masked_fill(unseen, end) for end in (torch.inf, -torch.inf))
        return step * _damping(low, high)

    def _fit_together(self, user: Tensor) -> Tensor:
        """Steps under the curvature of a user of whom nothing is known, the same for all.

        Where a user's own is larger such a step may lead too far: one that raises the loss is
        taken back and halved, so that no fit ends above where it began.
        """
        prior = torch.full((user.shape[1],), self._settings.user_l2)
        prior[-1] = 0
        (values, vectors), inputs = self._source.curvature, self._source.inputs
        best, step, rate = user, torch.zeros_like(user), torch.ones(len(user), 1)
        least = torch.full((len(user), 1), torch.inf)
        for _ in range(self._settings.user_steps + 1):
            _, (losses, gradient, curvature) = self._graded(user)
            loss = (losses + (prior * user.square()).sum(1) / 2)[:, None]
            better = loss <= least
            slope = gradient @ inputs + prior * user
            ahead = curvature.sum(1, keepdim=True) * values + self._settings.user_l2 + _RIDGE
            found = (slope @ vectors / ahead) @ vectors.T
            moved = found @ inputs.T
            found = self._settings.user_lr * found * _damping(moved, moved)
            best, step = torch.where(better, user, best), torch.where(better, found, step)
            rate = torch.where(better, (2 * rate).clamp_max(1), rate / 2)
            least = torch.where(better, loss, least)
            user = best - rate * step
        return best

    def descend(self, user: Tensor) -> Tensor:
        """Gradient steps of the summed loss on the shared parameters; gives the first mean loss."""
        first, steps, rate = torch.zeros(0), self._settings.local_steps, self._settings.local_lr
        for step in range(steps):
            scored, (losses, gradient, _) = self._graded(user)
            if step == 0:
                first = losses / self._samples.valid.sum(1).clamp_min(1)
            if self._ranked is not None:
                gradient = gradient * self._ranked
            if self._first is not None:
                # Equal items together, so that each changes once.
                gradient = torch.zeros_like(gradient).scatter_add_(1, self._first, gradient)
            rows, dense = scored.shared_gradient(-rate * gradient)
            if self._preconditioner is not None:
                rows = rows @ self._preconditioner
            last = step == steps - 1
            self._vectors.move(rows, last=last)
            self._dense_change += dense
            if self._biases is not None:
                self._biases.move(-rate * gradient.unsqueeze(2), last=last)
        return first

    def change(self, user: FloatArray) -> FloatArray:
        """New minus old coefficients, in the order of :attr:`address`, and ``u uᵀ`` if wanted."""
        parts = [self._dense_change.numpy()]
        if self._unobserved is not None:
            parts.append(pack(user[:, :-1]))
        parts.append(self._vectors.change)
        if self._biases is not None:
            parts.append(self._biases.change)
        return np.concatenate(parts, axis=1)

    def _graded(self, user: Tensor) -> tuple[Scored, Graded]:
        dense = self._dense + self._dense_change
        scored = self._model.forward(user, self._vectors.rows, dense)
        scores = scored.values
        if self._biases is not None:
            scores = scores + self._biases.rows.squeeze(2)
        return scored, self._loss.grade(scores, self._samples)


def _unfolded(lower: Tensor, width: int) -> Tensor:
    """Symmetric matrices ``(m, u, u)`` with these lower halves, which is what Cholesky reads."""
    found = lower.new_zeros(len(lower), width, width)
    found[:, *torch.tril_indices(width, width)] = lower
    return found


def _damping(low: Tensor, high: Tensor) -> Tensor:
    """Share of a softmax's Newton step that is sure to descend, shape ``(m, 1)``.

    It is ``log(1 + b) / b`` where the step moves scores apart by ``b``, the largest of ``high``
    less the least of ``low``: Sun & Tran-Dinh, "Generalized self-concordant functions"
    (Mathematical Programming 2019), theorem 2.
    """
    spread = (high.amax(1, keepdim=True) - low.amin(1, keepdim=True)).clamp_min(1e-6)
    return torch.log1p(spread) / spread


class _Touched(Located):
    """The blocks of a memory that the samples of each device touch.

    Items that collide share a block here too: one of them owns it, and its copy is the one that
    changes, which keeps the update's norm the true one.
    """

    def __init__(
        self, table: Table, memory: FloatArray, batch: Batch, features: FloatArray | None = None
    ) -> None:
        super().__init__(table, batch.items, features)
        # Samples of one item come merged already; only items that collide are left to merge.
        self._merges = not table.injective
        if self._merges:
            self._owner = representatives(self.slots, table.slots)
        else:
            first = batch.first
            places = np.arange(batch.items.shape[1])[None] if first is None else first
            owner = places[:, :, None] * table.parts + np.arange(table.parts)
            self._owner = owner.reshape(len(places), -1)
        self._blocks = torch.from_numpy(np.take(memory, self.slots, axis=0))
        self._rows: Tensor | None = None
        self._change: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """Item vectors (or biases) as the samples see them now, ``(m or 1, samples, dim)``."""
        if self._rows is None:
            self._rows = self.read(self._blocks)
        return self._rows

    @property
    def change(self) -> FloatArray:
        """Change of each named block, shape ``(m, k_blocks * block)``; zero but for its owner."""
        if self._change is None:
            return np.zeros((len(self.slots), self.slots.shape[1] * self.block), np.float32)
        return self._change.reshape(len(self._change), -1).numpy()

    def move(self, rows: Tensor, *, last: bool) -> None:
        """Add the change of each sample's row; after the ``last`` :attr:`rows` stay as they are."""
        changed = self.spread(rows)
        if self._merges:
            changed = torch.from_numpy(merged(changed.numpy(), self._owner))
        self._change = changed if self._change is None else self._change + changed
        if not last:
            index = torch.from_numpy(flattened(self._owner, len(rows)))
            step = changed.reshape(-1, self.block)[index].reshape(changed.shape)
            self._blocks, self._rows = self._blocks + step, None
