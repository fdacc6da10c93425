"""Local training: what one device, or a batch of devices, does in a round.

The device fits its private state (user vector and bias) with the items fixed, then takes gradient
steps on the item blocks, item biases and dense weights that its samples touch. The difference is
its update. Only the touched blocks are copied: nothing of the table's size, nor of the memory's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privrec.device.batch import Batch, Histories, Sampler
from privrec.device.update import Address, RawUpdate
from privrec.embedding.subspace import Subspace, add_rows
from privrec.models.layout import Layout
from privrec.models.losses import LOSSES
from privrec.models.ncf import NCF

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
    vectors: Subspace
    biases: Subspace | None
    layout: Layout


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of local training, those of the scenario's ``[train]`` table."""

    loss: str
    negatives: int
    max_samples: int | None
    user_steps: int
    user_lr: float
    user_l2: float
    local_steps: int
    local_lr: float


@dataclass(frozen=True)
class Trained:
    """What a batch of devices has after its local steps.

    Args:
        update: the change of the shared parameters; private until it is bounded.
        states: new private states, shape ``(m, user_dim)``; they stay on the devices.
        losses: summed loss of each device before its item step, shape ``(m,)``; private.
        samples: samples that counted, shape ``(m,)``; private.
    """

    update: RawUpdate
    states: FloatArray
    losses: FloatArray
    samples: FloatArray


@dataclass(frozen=True)
class Trainer:
    """Local training of one recommender with one set of hyper-parameters."""

    recommender: Recommender
    settings: Settings

    @property
    def sampler(self) -> Sampler:
        """How a device draws its samples."""
        n_items = self.recommender.vectors.items
        return Sampler(n_items, self.settings.negatives, self.settings.max_samples)

    def train(
        self, weights: FloatArray, histories: Histories, states: FloatArray, key: int
    ) -> Trained:
        """One round's training on ``m`` devices, each on its own copy of what it touches.

        Args:
            weights: the shared vector, float32 of ``layout.size``; not changed.
            histories: the devices' data.
            states: their private states, shape ``(m, user_dim)``.
            key: decides the samples, see :class:`~privrec.device.batch.Sampler`.
        """
        batch = self.sampler.draw(histories, key)
        local = _Local(self.recommender, weights, batch, self._loss)
        user = self._fit(local, torch.from_numpy(states), self.settings.user_steps)
        losses = local.descend(user, self.settings.local_steps, self.settings.local_lr)
        update = RawUpdate(local.change(), local.address)
        return Trained(update, user.numpy(), losses.numpy(), batch.valid.sum(1))

    def fit(
        self, weights: FloatArray, histories: Histories, states: FloatArray, key: int, steps: int
    ) -> FloatArray:
        """Private states fitted to fixed items in ``steps`` steps, shape ``(m, user_dim)``."""
        batch = self.sampler.draw(histories, key)
        local = _Local(self.recommender, weights, batch, self._loss)
        return self._fit(local, torch.from_numpy(states), steps).numpy()

    def _loss(self, scores: Tensor, valid: Tensor, positives: int) -> tuple[Tensor, Tensor]:
        return LOSSES[self.settings.loss](scores, valid, positives)

    def _fit(self, local: _Local, user: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            gradient = local.user_gradient(user)
            user = user - self.settings.user_lr * (gradient + self.settings.user_l2 * user)
        return user


class _Local:
    """The devices' copies of what their samples touch, and the change they make to it."""

    def __init__(
        self, recommender: Recommender, weights: FloatArray, batch: Batch, loss: Any
    ) -> None:
        layout, self._model, self._loss = recommender.layout, recommender.model, loss
        self._valid, self._positives = torch.from_numpy(batch.valid), batch.positives
        self._count = self._valid.sum(1, keepdim=True).clamp_min(1)
        self._vectors = _Touched(recommender.vectors, layout.memory_of(weights), batch.items)
        self._biases = None
        if recommender.biases is not None:
            memory = layout.biases_of(weights)[:, None]
            self._biases = _Touched(recommender.biases, memory, batch.items)
        self._dense = torch.from_numpy(layout.dense_of(weights)).expand(len(batch.items), -1)
        self._dense_change = torch.zeros(self._dense.shape)
        slots = self._biases.slots if self._biases else np.zeros((len(batch.items), 0), np.int64)
        self.address = Address(self._vectors.slots, slots, layout)

    def user_gradient(self, user: Tensor) -> Tensor:
        """Gradient of each device's mean loss on its private state."""
        scored = self._model.forward(user, self._vectors.rows, self._dense + self._dense_change)
        _, upstream = self._loss(self._with_bias(scored.values), self._valid, self._positives)
        return scored.user_gradient(upstream) / self._count

    def descend(self, user: Tensor, steps: int, rate: float) -> Tensor:
        """Gradient steps of the summed loss on the shared parameters; gives the first loss."""
        first = torch.zeros(len(user))
        for step in range(steps):
            scored = self._model.forward(user, self._vectors.rows, self._dense + self._dense_change)
            scores = self._with_bias(scored.values)
            losses, upstream = self._loss(scores, self._valid, self._positives)
            first = losses if step == 0 else first
            rows, dense = scored.shared_gradient(upstream)
            last = step == steps - 1
            self._vectors.move(rows, -rate, last=last)
            self._dense_change -= rate * dense
            if self._biases is not None:
                self._biases.move(upstream.unsqueeze(2), -rate, last=last)
        return first

    def change(self) -> FloatArray:
        """New minus old coefficients, in the order of :attr:`address`."""
        parts = [self._dense_change.numpy(), self._vectors.change]
        if self._biases is not None:
            parts.append(self._biases.change)
        return np.concatenate(parts, axis=1)

    def _with_bias(self, scores: Tensor) -> Tensor:
        return scores if self._biases is None else scores + self._biases.rows.squeeze(2)


class _Touched:
    """The blocks of a memory that the samples of each device touch.

    Samples that share a block (the same item twice, or items that collide) share it here too: its
    first namer's copy is the one that changes, which keeps the update's norm the true one.
    """

    def __init__(self, subspace: Subspace, memory: FloatArray, items: NDArray[np.int64]) -> None:
        m, self._subspace = len(items), subspace
        slots, signs = subspace.locate(items)
        self.slots = slots.reshape(m, -1)
        self._signs = torch.from_numpy(signs).unsqueeze(3)
        self._owner = _owners(self.slots, subspace.slots)
        self._blocks: FloatArray = np.take(memory, self.slots.ravel(), axis=0)
        self._change = np.zeros_like(self._blocks)
        self._rows: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """Item vectors (or biases) as the samples see them now, shape ``(m, samples, dim)``."""
        if self._rows is None:
            m, samples, parts, _ = self._signs.shape
            signed = torch.from_numpy(self._blocks).reshape(m, samples, parts, -1) * self._signs
            self._rows = signed.reshape(m, samples, -1)
        return self._rows

    @property
    def change(self) -> FloatArray:
        """Change of each named block, shape ``(m, k_blocks * block)``; zero but for its owner."""
        return self._change.reshape(len(self.slots), -1)

    def move(self, rows: Tensor, rate: float, *, last: bool) -> None:
        """Add ``rate * rows``, given by sample, to the blocks.

        Args:
            rows: change of each sample's row, shape ``(m, samples, dim)``.
            rate: factor of all of it.
            last: whether nobody looks at :attr:`rows` again, so that they may stay as they are.
        """
        block = self._subspace.block
        signed = (rows.reshape(*self._signs.shape[:3], block) * (self._signs * rate)).numpy()
        step = np.zeros_like(self._change)
        add_rows(step, self._owner, signed.reshape(-1, block))
        self._change += step
        if not last:
            self._blocks = self._blocks + step[self._owner]
            self._rows = None


def _owners(slots: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """For each named block, the position (over the whole batch) of the one that owns it.

    Writing every position into a table of slots and reading it back elects one namer of each slot,
    in time linear in the names.
    """
    m, names = slots.shape
    keys = (slots + np.arange(m)[:, None] * size).ravel()
    table = np.empty(m * size, np.int64)
    table[keys] = np.arange(m * names)
    return table[keys]
