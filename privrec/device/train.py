"""Local training: what one device, or a batch of devices, does in a round.

The device fits its private state (user vector and bias) with the items fixed, then takes gradient
steps on the item blocks, item biases and dense weights that its samples touch. The difference is
its update. Only the touched blocks are copied: nothing of the table's size, nor of the memory's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privrec.device.batch import (
    Batch,
    Histories,
    Sampler,
    flattened,
    merged,
    representatives,
)
from privrec.device.examples import (
    Deferred,
    ExampleNoise,
    ExampleSchedule,
    ExampleSteps,
    NoiseRoots,
)
from privrec.device.negatives import EACH, Functions, NegativeBudget
from privrec.device.round import digest
from privrec.device.update import Address, RawUpdate
from privrec.embedding.table import Table
from privrec.errors import UsageError
from privrec.models.layout import Layout
from privrec.models.losses import (
    DAMPED,
    IMPLICIT,
    LOSSES,
    WHOLE_CATALOGUE,
    Graded,
    Samples,
    curvature,
    item_gram,
    pack,
)
from privrec.models.ncf import NCF, Scored
from privrec.search.index import Sketch
from privrec.search.memory import ItemMemory
from privrec.search.select import Search

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Recommender:
    """The shared parameters' meaning: a model over item vectors in a subspace.

    Args:
        model: the scorer.
        vectors: where item vectors lie.
        biases: where item biases lie, or None.
        layout: sections of the shared vector.
    """

    model: NCF
    vectors: Table
    biases: Table | None
    layout: Layout

    def searched(self, weights: FloatArray) -> ItemMemory:
        """The catalogue as a device searches it.

        Args:
            weights: the shared vector in memory form.
        """
        biases = None
        if self.biases is not None:
            biases = self.biases, self.layout.biases_of(weights)[:, None]
        return ItemMemory(self.vectors, self.layout.memory_of(weights), biases)

    def tabulated(self) -> Recommender:
        """The same with its places looked up, for a machine that plays many devices."""
        biases = None if self.biases is None else self.biases.tabulated()
        return replace(self, vectors=self.vectors.tabulated(), biases=biases)


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of local training, those of the scenario's ``[train]`` table."""

    loss: str
    negatives: int
    unobserved_weight: float
    item_l2: float
    newton: bool
    max_samples: int | None
    user_steps: int
    user_lr: float
    user_l2: float
    serve_steps: int
    serve_negatives: int
    local_steps: int
    local_lr: float
    selector: str = EACH
    budget: float = 0.01
    selected: float = 0.5
    serve_budget: float | None = None

    def serving(self) -> Settings:
        """These, for fitting a user vector to a whole history with more negatives."""
        budget = self.serve_budget or self.budget
        return replace(self, negatives=self.serve_negatives, budget=budget, max_samples=None)


_RIDGE = 1e-4
"""Keeps the Newton system of a device with few samples solvable."""


@dataclass(frozen=True)
class Trained:
    """What a batch of devices has after its local steps.

    Args:
        update: the change of the shared parameters; private until it is bounded.
        states: new private states, shape ``(m, user_dim)``; they stay on the devices.
        losses: mean loss of each device before its item step, shape ``(m,)``; private.
        deferred: noise that was owed between the devices' own steps; private.
    """

    update: RawUpdate
    states: FloatArray
    losses: FloatArray
    deferred: Deferred = field(default_factory=Deferred)


@dataclass(frozen=True)
class Trainer:
    """Local training of one recommender with one set of hyper-parameters.

    Args:
        recommender: what is trained.
        settings: how.
        popularity: public cumulative probabilities of the items, see
            :func:`~privrec.device.negatives.popularity_of`; None where nothing asks for them.
        examples: noise that hides single examples, of which then every local step has its own; None
            for steps without.
    """

    recommender: Recommender
    settings: Settings
    popularity: NDArray[np.float64] | None = None
    examples: ExampleNoise | None = None

    @property
    def serving(self) -> Trainer:
        """The same for fitting user vectors alone, which adds no noise to anything."""
        return replace(self, settings=self.settings.serving(), examples=None)

    @property
    def sampler(self) -> Sampler:
        """How a device draws its samples."""
        settings, n_items = self.settings, self.recommender.vectors.items
        negatives = 0 if settings.loss in IMPLICIT else settings.negatives
        whole = settings.loss in WHOLE_CATALOGUE
        shared = 0 if self.budget is None else self.budget.size
        return Sampler(n_items, negatives, settings.max_samples, whole, shared)

    @property
    def budget(self) -> NegativeBudget | None:
        """The negatives that a device's positives share; None where each has its own."""
        settings, n_items = self.settings, self.recommender.vectors.items
        if settings.selector == EACH:
            return None
        size = max(1, round(settings.budget * n_items))
        popularity = self.popularity
        if popularity is not None and len(popularity) > n_items:
            popularity = popularity[:n_items] / popularity[n_items - 1]
        return NegativeBudget(n_items, size, settings.selector, settings.selected, popularity)

    def search(self, weights: FloatArray, *, resident: bool = False) -> Search | None:
        """What negatives are selected from; None where they are drawn by chance.

        Args:
            weights: the shared vector in memory form.
            resident: gather all rows once, for a machine that plays many devices.
        """
        if self.budget is None or not self.budget.is_selective:
            return None
        items = self.recommender.searched(weights)
        if resident:
            items = items.unfolded()
        sketch = Sketch.of(items) if self.settings.selector == "sketch" else None
        return Search(items, sketch)

    def unobserved(self, weights: FloatArray) -> FloatArray | None:
        """What the loss says of all items at once: their weighted Gram matrix.

        Returns:
            Shape ``(dim, dim)``; None for a loss that looks at samples alone.
        """
        if self.settings.loss not in IMPLICIT:
            return None
        parts = self.recommender
        gram = item_gram(parts.vectors, parts.layout.memory_of(weights))
        return gram * np.float32(self.settings.unobserved_weight)

    def train(
        self,
        weights: FloatArray,
        histories: Histories,
        states: FloatArray,
        key: int,
        unobserved: FloatArray | None = None,
        search: Search | None = None,
        functions: Functions | None = None,
        noise: NoiseRoots | None = None,
    ) -> Trained:
        """One round's training on ``m`` devices, each on its own copy of what it touches.

        Args:
            weights: the shared vector, float32 of ``layout.size``; not changed.
            histories: the devices' data.
            states: their private states, shape ``(m, user_dim)``.
            key: decides the samples, see :class:`~privrec.device.batch.Sampler`.
            unobserved: as :meth:`unobserved` gives it, where that was computed before.
            search: as :meth:`search` gives it, likewise.
            functions: the devices' secret streams, where negatives are selected.
            noise: the devices' secrets, where examples are protected.

        Raises:
            UsageError: when examples are to be protected and there are no secrets.
        """
        if self.examples is not None:
            return self._examples(self.examples, weights, histories, states, key, noise)
        settings = self.settings
        batch = self._draw(histories, key, serving=False)
        local = self._local(weights, batch, unobserved)
        user = self._fit(local, torch.from_numpy(states), settings.user_steps)
        if self.is_selective:
            batch = self._refined(weights, batch, histories, user, key, search, functions)
            local = self._local(weights, batch, unobserved)
            user = self._fit(local, user, settings.user_steps)
        losses = local.descend(user, settings.local_steps, settings.local_lr)
        kept = np.where(np.isfinite(user.numpy()).all(1, keepdims=True), user.numpy(), states)
        update = RawUpdate(local.change(user.numpy()), local.address)
        return Trained(update, kept, losses.numpy())

    def _examples(
        self, examples: ExampleNoise, weights: FloatArray, histories: Histories,
        states: FloatArray, key: int, noise: NoiseRoots | None,
    ) -> Trained:  # fmt: skip
        """Noisy local steps, device by device, since each has a noisy memory of its own."""
        if noise is None:
            raise UsageError(
                'privacy.local = "example": noise is drawn from a secret; hand over the devices\' '
                "roots"
            )
        settings, m = self.settings, len(histories.users)
        layout = self.recommender.layout
        schedule = ExampleSchedule(
            settings.loss, settings.negatives, settings.local_steps, settings.local_lr
        )
        changes, users = np.empty((m, layout.size), np.float32), np.empty_like(states)
        losses, deferred = np.zeros(m, np.float32), Deferred()
        for row, user in enumerate(histories.users.tolist()):
            items = histories.items[histories.indptr[row] : histories.indptr[row + 1]]
            given = digest(states[row]) + digest(items)
            steps = ExampleSteps(
                self.recommender, schedule, weights, states[row], user, key,
                (examples, noise(user, given)),
            )  # fmt: skip
            losses[row] = steps.run(items.astype(np.int64))
            changes[row], users[row] = steps.change(), steps.user
            deferred += steps.deferred
        return Trained(RawUpdate(changes, Address.whole(layout)), users, losses, deferred)

    def serve(
        self,
        weights: FloatArray,
        histories: Histories,
        key: int,
        unobserved: FloatArray | None = None,
        search: Search | None = None,
        functions: Functions | None = None,
    ) -> FloatArray:
        """Private states fitted from nothing to fixed items, shape ``(m, user_dim)``.

        It is how recommendations are made, for users seen in training and for others alike.
        """
        serving, steps = self.serving, self.settings.serve_steps
        batch = serving._draw(histories, key, serving=True)
        local = serving._local(weights, batch, unobserved)
        nothing = torch.zeros(len(histories.users), self.recommender.model.user_dim)
        user = self._fit(local, nothing, steps)
        if serving.is_selective:
            batch = serving._refined(weights, batch, histories, user, key, search, functions)
            user = self._fit(serving._local(weights, batch, unobserved), user, steps)
        return user.numpy()

    @property
    def is_selective(self) -> bool:
        """Whether devices select negatives by score, with functions of their own."""
        return self.budget is not None and self.budget.is_selective

    def _refined(
        self, weights: FloatArray, batch: Batch, histories: Histories, user: Tensor, key: int,
        search: Search | None, functions: Functions | None,
    ) -> Batch:  # fmt: skip
        """The batch with what the fitted user vectors select from the catalogue."""
        search, budget = search or self.search(weights), self.budget
        if search is None or budget is None:
            return batch
        queries = _queries(user.numpy(), search)
        return budget.refine(batch, histories, queries, search, functions, key)

    def _draw(self, histories: Histories, key: int, *, serving: bool) -> Batch:
        """Samples by chance; a budget's are popular in training alone, where it says so."""
        budget, sampler = self.budget, self.sampler
        if budget is None:
            return sampler.draw(histories, key)
        positives, present = sampler.positives(histories, key)
        drawn, logs, valid = budget.draw(histories, key, popular=not serving)
        items = np.concatenate((positives, drawn), axis=1)
        counts = np.concatenate((present, valid), axis=1).astype(np.float32)
        weights = np.concatenate((np.zeros(positives.shape, np.float32), logs), axis=1)
        first = representatives(items, budget.n_items)
        return Batch(items, counts, positives.shape[1], first, weights)

    def _local(self, weights: FloatArray, batch: Batch, unobserved: FloatArray | None) -> _Local:
        if unobserved is None:
            unobserved = self.unobserved(weights)
        return _Local(self.recommender, weights, batch, self.settings, unobserved)

    def _fit(self, local: _Local, user: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            user = user - self.settings.user_lr * local.newton(user, self.settings.user_l2)
        return user


class _Local:
    """The devices' copies of what their samples touch, and the change they make to it."""

    def __init__(
        self,
        recommender: Recommender,
        weights: FloatArray,
        batch: Batch,
        settings: Settings,
        unobserved: FloatArray | None,
    ) -> None:
        layout, self._model = recommender.layout, recommender.model
        self._loss, self._damped = LOSSES[settings.loss], settings.loss in DAMPED
        self._unobserved = None if unobserved is None else torch.from_numpy(unobserved)
        self._preconditioner: Tensor | None = None
        if settings.newton:
            self._preconditioner = _preconditioner(recommender, weights, settings)
        logs = None if batch.weights is None else torch.from_numpy(batch.weights)
        self._samples = Samples(torch.from_numpy(batch.valid), batch.positives, logs)
        self._first = None if batch.first is None else torch.from_numpy(batch.first)
        self._vectors = _Touched(recommender.vectors, layout.memory_of(weights), batch)
        self._biases = None
        if recommender.biases is not None:
            memory = layout.biases_of(weights)[:, None]
            self._biases = _Touched(recommender.biases, memory, batch)
        self._dense = torch.from_numpy(layout.dense_of(weights)).expand(len(batch.valid), -1)
        self._dense_change = torch.zeros(self._dense.shape)
        slots = self._biases.slots if self._biases else self._vectors.slots[:, :0]
        self.address = Address(self._vectors.slots, slots, layout)

    def newton(self, user: Tensor, l2: float) -> Tensor:
        """Newton step on the private state under the loss's curvature and an L2 penalty.

        The penalty is that of a Gaussian prior of precision ``l2`` on the vector; the bias has
        none.
        """
        scored, (_, gradient, curvature) = self._graded(user)
        jacobian = self._jacobian(scored)
        prior = torch.full((user.shape[1],), l2)
        prior[-1] = 0
        hessian = _weighted_gram(jacobian, curvature)
        hessian += torch.diag(prior + _RIDGE)
        slope = _pull_back(jacobian, gradient) + prior * user
        if self._unobserved is not None:
            hessian[:, :-1, :-1] += self._unobserved
            slope[:, :-1] += user[:, :-1] @ self._unobserved
        # Not finite gives a state, hence an update, that is not finite: it is zeroed when clipped.
        factor = torch.linalg.cholesky_ex(hessian)[0]
        step = torch.cholesky_solve(slope.unsqueeze(2), factor).squeeze(2)
        if not self._damped:
            return step
        # Padding and negatives that are in the history have neither; the loss does not see them.
        return step * _damping(jacobian, step, (curvature > 0) | (gradient != 0))

    def _jacobian(self, scored: Scored) -> Tensor:
        jacobian = scored.user_jacobian()
        if self._unobserved is not None:
            # Squares over all items would have the bias fit their common level, which ranks none.
            jacobian[..., -1] = 0
        return jacobian

    def descend(self, user: Tensor, steps: int, rate: float) -> Tensor:
        """Gradient steps of the summed loss on the shared parameters; gives the first mean loss."""
        first = torch.zeros(len(user))
        for step in range(steps):
            scored, (losses, gradient, _) = self._graded(user)
            if step == 0:
                first = losses / self._samples.valid.sum(1).clamp_min(1)
            gradient = self._merged(gradient)
            rows, dense = scored.shared_gradient(-rate * gradient)
            if self._preconditioner is not None:
                rows = rows @ self._preconditioner
            last = step == steps - 1
            self._vectors.move(rows, last=last)
            self._dense_change += dense
            if self._biases is not None:
                self._biases.move(-rate * gradient.unsqueeze(2), last=last)
        return first

    def _merged(self, gradient: Tensor) -> Tensor:
        """Gradient on the scores with that of equal items put together, so each changes once."""
        if self._first is None:
            return gradient
        return torch.zeros_like(gradient).scatter_add_(1, self._first, gradient)

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
        return scored, self._loss(scores, self._samples)


def _queries(user: FloatArray, search: Search) -> FloatArray:
    """What the devices search with: user vectors, and a 1 for the item's bias."""
    queries = user[:, : search.items.dim].copy()
    if search.items.biases is not None:
        queries[:, -1] = 1
    return queries


def _preconditioner(recommender: Recommender, weights: FloatArray, settings: Settings) -> Tensor:
    """``P`` of :mod:`privrec.models.losses`; zeros in the first round, which finds ``S``."""
    users, dim = recommender.layout.gram_of(weights), recommender.vectors.dim
    if not users.any():
        return torch.zeros(dim, dim)
    matrix = curvature(users, dim, settings.unobserved_weight, settings.item_l2)
    return torch.from_numpy(np.linalg.inv(matrix))


def _weighted_gram(jacobian: Tensor, weights: Tensor) -> Tensor:
    """``J^T diag(w) J`` of each device, shape ``(m, u, u)``; ``J`` may be shared."""
    if len(jacobian) > 1 or len(weights) == 1:
        return torch.bmm((jacobian * weights.unsqueeze(2)).transpose(1, 2), jacobian)
    shared, width = jacobian[0], jacobian.shape[2]
    products = (shared.unsqueeze(2) * shared.unsqueeze(1)).reshape(len(shared), -1)
    return (weights @ products).reshape(-1, width, width)


def _damping(jacobian: Tensor, step: Tensor, seen: Tensor) -> Tensor:
    """Share of a softmax's Newton step that is sure to descend, shape ``(m, 1)``.

    It is ``log(1 + b) / b`` where the step would spread the seen scores by ``b``: Sun & Tran-Dinh,
    "Generalized self-concordant functions" (Mathematical Programming 2019), theorem 2.
    """
    shifts = step @ jacobian[0].T if len(jacobian) == 1 else (jacobian @ step[:, :, None])[..., 0]
    highest = shifts.masked_fill(~seen, -torch.inf).amax(1, keepdim=True)
    lowest = shifts.masked_fill(~seen, torch.inf).amin(1, keepdim=True)
    spread = (highest - lowest).clamp_min(1e-6)
    return torch.log1p(spread) / spread


def _pull_back(jacobian: Tensor, upstream: Tensor) -> Tensor:
    if len(jacobian) == 1:
        return upstream @ jacobian[0]
    return torch.bmm(upstream.unsqueeze(1), jacobian).squeeze(1)


class _Touched:
    """The blocks of a memory that the samples of each device touch.

    Items that collide share a block here too: one of them owns it, and its copy is the one that
    changes, which keeps the update's norm the true one. When all devices look at the same items,
    they share the copy of the old values.
    """

    def __init__(self, table: Table, memory: FloatArray, batch: Batch) -> None:
        slots, signs = table.locate(batch.items)
        if table.scale != 1:
            signs = signs * np.float32(table.scale)
        self.slots = slots.reshape(len(slots), -1)
        self._shape = (*batch.items.shape, table.parts, table.block)
        self._signs = torch.from_numpy(signs).unsqueeze(3)
        self._owner = _block_owners(table, self.slots, batch)
        # Samples of one item come merged already; only items that collide are left to merge.
        self._merges = not table.injective
        self._blocks = torch.from_numpy(np.take(memory, self.slots, axis=0))
        self._rows: Tensor | None = None
        self._change: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """Item vectors (or biases) as the samples see them now, ``(m or 1, samples, dim)``."""
        if self._rows is None:
            blocks = self._blocks.reshape(-1, *self._shape[1:])
            self._rows = (blocks * self._signs).reshape(len(blocks), self._shape[1], -1)
        return self._rows

    @property
    def change(self) -> FloatArray:
        """Change of each named block, shape ``(m, k_blocks * block)``; zero but for its owner."""
        if self._change is None:
            return np.zeros((len(self.slots), self.slots.shape[1] * self._shape[3]), np.float32)
        return self._change.reshape(len(self._change), -1).numpy()

    def move(self, rows: Tensor, *, last: bool) -> None:
        """Add ``rows`` to the blocks.

        Args:
            rows: change of each sample's row, shape ``(m, samples, dim)``.
            last: whether nobody looks at :attr:`rows` again, so that they may stay as they are.
        """
        m, names, block = len(rows), self.slots.shape[1], self._shape[3]
        signed = (rows.reshape(m, *self._shape[1:]) * self._signs).reshape(m, names, block)
        if self._merges:
            signed = torch.from_numpy(merged(signed.numpy(), self._owner))
        self._change = signed if self._change is None else self._change + signed
        if not last:
            index = torch.from_numpy(flattened(self._owner, m))
            step = signed.reshape(-1, block)[index].reshape(m, names, block)
            self._blocks, self._rows = self._blocks + step, None


def _block_owners(table: Table, slots: NDArray[np.int64], batch: Batch) -> NDArray[np.int64]:
    """For each named block of a row, the place in that row that stands for it."""
    if not table.injective:
        return representatives(slots, table.slots)
    places = np.arange(batch.items.shape[1])[None] if batch.first is None else batch.first
    parts = places[:, :, None] * table.parts + np.arange(table.parts)
    return parts.reshape(len(places), -1)
