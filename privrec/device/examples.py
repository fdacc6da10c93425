"""DP-SGD on the device: noise between its own local steps, so that no single example shows.

User vector, item memory, item biases and dense weights are one parameter vector. An example is an
item of the history with negatives of its own, drawn over all items by the round's key and the item,
whatever else the history holds. Each example is in one of the round's steps, by a keyed hash of the
item alone. Its gradient on all parameters together is clipped to half of ``clip_norm``, so that
removing or changing one example moves the sums of all steps of a round together by at most
``clip_norm`` in L2: a change moves two halves. Every step adds ``N(0, (noise_multiplier *
clip_norm)^2)`` to every coefficient of the sum, and the whole round is one Gaussian mechanism of
that noise multiplier.

A step touches few blocks of the memory, and nobody reads the others before the upload: their noise
is owed (:mod:`privrec.privacy.lazy`) and settled at the end. A user vector fitted to the
history without noise would undo all of it, so there is none: the vector starts from the round's
key, takes the same noisy steps, and what it is after a round is an output like any other.

All of this holds against whoever sees a device's upload. :mod:`privrec.device.example_shares` hides
examples from whoever sees sums alone, for far less noise.
Source: Abadi et al., "Deep learning with differential privacy" (CCS 2016).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privrec.device.device import Deferred, Settings
from privrec.device.local import LocalModel, Located
from privrec.device.samples import Items, uniform
from privrec.embedding.subspace import UInt64Array, splitmix64
from privrec.embedding.table import Table, distinct, merged, representatives
from privrec.models.losses import Samples, loss_of
from privrec.models.ncf import NCF
from privrec.privacy.lazy import LazyMemory
from privrec.privacy.pending import Normals
from privrec.randomness import SecretRoot

FloatArray = NDArray[np.float32]

_TURN, _START = np.uint64(0x7E57_0001), np.uint64(0x57A7_0002)
_SLACK = np.float32(1 - 1e-6)  # a float32 norm is off by less than this


@dataclass(frozen=True)
class ExampleNoise:
    """Protection of single examples: removing or changing one moves all sums by ``clip_norm``.

    ``noise_multiplier`` is the standard deviation of the noise in each coefficient over that.
    """

    clip_norm: float
    noise_multiplier: float


@dataclass(frozen=True)
class Gradients:
    """Gradients of ``e`` examples, one row each: on the private state, dense weights, and memory.

    ``blocks``, ``(e, names, block)``, are those of the blocks that the examples name; a block that
    one names twice has its gradient in one place. ``biases`` are likewise, or have no columns.
    """

    user: Tensor
    dense: Tensor
    blocks: FloatArray
    biases: FloatArray
    losses: Tensor


def started(states: FloatArray, keys: UInt64Array) -> FloatArray:
    """A copy of private states ``(m, state_dim)``, where those of zeros start from their key.

    They start at a norm of about 1 and without bias, whatever the history.
    """
    states = states.astype(np.float32)
    width = states.shape[1] - 1
    words = splitmix64((keys ^ _START)[:, None], np.arange(width)).astype(np.float64)
    new = ~states.any(axis=1)
    states[new, :-1] = ((words * 2.0**-64 - 0.5) * np.sqrt(12 / max(1, width)))[new]
    return states


def turns_of(keys: UInt64Array, items: Items, steps: int) -> NDArray[np.uint64]:
    """The step of each item, by its device's key and nothing else of the history."""
    return (splitmix64(keys ^ _TURN, items) >> np.uint64(33)) % np.uint64(steps)


def gradients_of(
    network: NCF,
    loss: str,
    samples: Items,
    states: Tensor,
    dense: Tensor,
    vectors: Part,
    biases: Part | None,
) -> Gradients:
    """Gradients of examples that are nobody else's: an item and its negatives, ``(e, 1 + k)``.

    ``states`` are ``(e, user_dim)`` and ``dense`` weights ``(dense,)``; nothing is clipped yet.
    """
    e, k = samples.shape
    scored = network.forward(states, vectors.rows(samples), dense.expand(e, -1))
    scores = scored.values
    if biases is not None:
        scores = scores + biases.rows(samples).squeeze(2)
    losses, upstream, _ = loss_of(loss).grade(scores, Samples(torch.ones(e, k), 1))
    own = torch.bmm(upstream.unsqueeze(1), scored.user_jacobian().expand(e, -1, -1)).squeeze(1)
    moved, weights = scored.shared_gradient(upstream)
    named = np.zeros((e, 0, 1), np.float32)
    if biases is not None:
        named = biases.gradients(upstream.unsqueeze(2))
    return Gradients(own, weights, vectors.gradients(moved), named, losses)


class ExampleSteps:
    """One device's parameters during a round of noisy steps.

    Args:
        model: what it starts from; not changed.
        settings: of a loss that sums over examples, ``"bce"`` or ``"bpr"``.
        state: private state, shape ``(user_dim,)``; zeros for one that has none yet.
        user: names public draws, with the round's ``key``.
        root: what noise is drawn from.

    Attributes:
        state: the private state, with all the noise of the steps so far.
    """

    def __init__(
        self,
        model: LocalModel[NCF],
        settings: Settings,
        bound: ExampleNoise,
        state: FloatArray,
        user: int,
        key: int,
        root: SecretRoot,
    ) -> None:
        self.model, self.bound, self._settings = model, bound, settings
        self._keys = splitmix64(key, np.array([user]))
        (self.state,) = started(state[None], self._keys)
        self._dense = model.dense.copy()
        self.vectors = _NoisyPart(model.view.vectors, model.memory, _own(root, "blocks"))
        self.biases = None
        if model.view.biases is not None:
            self.biases = _NoisyPart(model.view.biases, model.bias_memory, _own(root, "biases"))
        self._eager = _own(root, "rest")

    def turns(self, items: Items) -> list[Items]:
        """The history by step: each distinct item is in one, whatever the others are."""
        mine = distinct(items).astype(np.int64)
        steps = self._settings.local_steps
        turn = turns_of(self._keys, mine, steps)
        return [mine[turn == step] for step in range(steps)]

    def run(self, items: Items) -> float:
        """All steps of a round; gives the mean loss of the examples before their own step."""
        losses = [self.step(turn) for turn in self.turns(items)]
        return float(torch.cat(losses).mean()) if sum(map(len, losses)) else 0.0

    def step(self, items: Items) -> Tensor:
        """One noisy step on the examples of these items; gives their losses."""
        clipped, rate = self.gradients(items), self._settings.local_lr
        std = rate * self.bound.noise_multiplier * self.bound.clip_norm
        self.vectors.step(clipped.blocks, rate, std**2)
        if self.biases is not None:
            self.biases.step(clipped.biases, rate, std**2)
        for value, gradient in ((self.state, clipped.user), (self._dense, clipped.dense)):
            value -= rate * gradient.sum(0).numpy()
            if len(value):
                self._eager.add(value[None], np.array([std**2]))
        return clipped.losses

    def gradients(self, items: Items) -> Gradients:
        """Gradients of the examples of distinct items, clipped as one vector each; no noise yet."""
        if not len(items):  # such a step names no block, and has its noise like any other
            for part in filter(None, (self.vectors, self.biases)):
                part.rows(items[:, None])
            user, dense = torch.zeros(0, len(self.state)), torch.zeros(0, len(self._dense))
            nothing = np.zeros((0, 0, 1), np.float32)
            return Gradients(user, dense, nothing, nothing, torch.zeros(0))
        samples = np.concatenate((items[:, None], self.negatives(items)), axis=1)
        user, dense = torch.from_numpy(self.state), torch.from_numpy(self._dense)
        network, loss = self.model.view.network, self._settings.loss
        states = user.expand(len(samples), -1)
        return self._clipped(
            gradients_of(network, loss, samples, states, dense, self.vectors, self.biases)
        )

    def change(self) -> FloatArray:
        """New minus old coefficients of the shared vector, with all their noise: settled."""
        parts = [self._dense, self.vectors.memory.settled().ravel()]
        if self.biases is not None:
            parts.append(self.biases.memory.settled().ravel())
        return np.asarray(np.concatenate(parts) - self.model.weights)

    @property
    def deferred(self) -> Deferred:
        """Of the memory blocks so far; call it after :meth:`change`."""
        memory = self.vectors.memory
        return Deferred(memory.drawn, memory.shape[0] * self._settings.local_steps)

    def negatives(self, items: Items) -> Items:
        """Over all items, the history's own included, shape ``(e, negatives)``."""
        n_items = self.model.view.vectors.items
        return uniform(self._keys, items, self._settings.negatives, n_items)

    def _clipped(self, raw: Gradients) -> Gradients:
        e = len(raw.user)
        flat = (raw.user, raw.dense, *(torch.from_numpy(p) for p in (raw.blocks, raw.biases)))
        squares = sum((p.flatten(1).square().sum(1) for p in flat), torch.zeros(e))
        norms = squares.sqrt()
        factors = (self.bound.clip_norm / 2 * float(_SLACK) / norms.clamp_min(1e-30)).clamp_max(1.0)
        kept = torch.isfinite(norms)

        def scaled(part: Tensor) -> Tensor:
            shape = (e,) + (1,) * (part.ndim - 1)
            return torch.where(kept.reshape(shape), part * factors.reshape(shape), 0.0)

        user, dense, blocks, biases = (scaled(part) for part in flat)
        losses = torch.where(torch.isfinite(raw.losses), raw.losses, 0.0)
        return Gradients(user, dense, blocks.numpy(), biases.numpy(), losses)


class Part(ABC):
    """Vectors or biases in a memory, and the blocks of it that the examples of a step name."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.located = Located(table, np.zeros((0, 1), np.int64))

    @abstractmethod
    def read(self, slots: Items) -> FloatArray:
        """Blocks ``(e, names, block)`` as they are now."""

    def rows(self, samples: Items) -> Tensor:
        """Rows of the table as they are now, shape ``(e, k, dim)``."""
        self.located = Located(self._table, samples)
        return self.located.read(torch.from_numpy(self.read(self.located.slots)))

    def gradients(self, rows: Tensor) -> FloatArray:
        """Gradients on the blocks, those of one block put together within each example."""
        blocks = self.located.spread(rows).numpy()
        return merged(blocks, representatives(self.located.slots, self._table.slots))


class _NoisyPart(Part):
    """A memory under lazy noise, which is read settled."""

    def __init__(self, table: Table, values: FloatArray, source: Normals) -> None:
        super().__init__(table)
        self.memory = LazyMemory(values.copy(), source)

    def read(self, slots: Items) -> FloatArray:
        blocks = self.memory.settled(slots.ravel())
        return np.asarray(blocks.reshape(*slots.shape, self._table.block), np.float32)

    def step(self, blocks: FloatArray, rate: float, variance: float) -> None:
        """Descend, and let every block owe the noise of the step."""
        moves = (np.float32(-rate) * blocks).reshape(-1, self._table.block)
        self.memory.step(self.located.slots.ravel(), moves, variance)


def _own(root: SecretRoot, part: str) -> Normals:
    return Normals(SecretRoot(root.tag("example noise", part), is_known=root.is_known))
