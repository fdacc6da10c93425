"""DP-SGD on the device with noise in shares: no single example shows in what is summed.

Where a secure sum shows nothing of one upload, no device need add the whole noise to its own. What
is read only as a sum carries shares of the noise; what the device itself goes on from carries all
of it. As in :mod:`privrec.device.examples`, an example is an item with negatives by key and item
alone, is in one of the round's steps, and is clipped as one vector over user vector and shared
parameters. Gradients are of the **released** weights in every step, so that nobody reads shared
parameters before the sum, and all of their noise is deferred to it; only the user vector moves.

**One example.** Its gradient is clipped and rounded to integers ``q`` of ``|q| <= reach``, checked
in exact arithmetic; what is longer or not finite counts as none. So the rounding depends on the
example alone, and sums are exact. A device's sum is clamped, coefficient by coefficient, to what
the ring has room for, which moves no two sums further apart.

**One round.** In step ``j`` the user vector moves by the sum ``u_j`` of that step's user parts plus
the device's own ``N(0, (zB)² I)``, rounded, where ``B = 2 reach``. The shared parts of all steps
are added up as ``f``, and to the sum over devices the shares that stay secret add the variance
``(zB)²`` or more (:mod:`privrec.privacy.discrete`). Let the adversary have the device's noisy user
vectors, in their order, and then the sum; it sees less. Given what came before, removing an example
moves one ``u_j`` by ``a`` and ``f`` by ``b``, and ``|a|² + |b|² <= reach²``. Changing one moves
``u_j`` by ``a``, ``u_k`` by ``a'`` and ``f`` by ``b - b'``, and ``|a|² + |a'|² + |b - b'|² <=
2 (|a|² + |b|²) + 2 (|a'|² + |b'|²) <= B²`` (in the same step, likewise). Gaussian mechanisms chosen
one after the other, of shifts whose squares add up to at most ``B²`` whatever comes out, are no
less private than a single one of sensitivity ``B`` (Smith & Thakurta, "Fully adaptive composition
for Gaussian differential privacy", 2022). So the round is a Gaussian mechanism of noise multiplier
``z``, within what shares are off.

**All rounds.** The next round's weights and the user vector are functions of these outputs, and so
rounds compose as adaptive mechanisms do. Other devices depend on the example through released
models alone. **Not covered**: whoever sees one device's upload without its mask, or its user
vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from privrec.device.device import Deferred, Draws, Settings, Trained
from privrec.device.examples import Gradients, Part, gradients_of, started, turns_of
from privrec.device.local import LocalModel
from privrec.device.samples import Histories, Items, uniform
from privrec.device.update import Address, SummedExamples, digest
from privrec.embedding.subspace import splitmix64
from privrec.embedding.table import Table, add_rows, distinct
from privrec.models.ncf import NCF
from privrec.privacy.mechanism import rounded_gaussian

FloatArray = NDArray[np.float32]
Integers = NDArray[np.int64]

_SLACK = 1 - 1e-6  # a float32 norm is off by less than this


@dataclass(frozen=True)
class ExampleShares:
    """Protection of single examples in sums: each is integers of an L2 norm of at most ``reach``.

    A unit of a parameter has ``scale`` steps. ``noise_multiplier`` is the standard deviation of the
    noise in each coefficient over ``2 reach``, which is what changing an example moves all sums by.
    """

    reach: int
    scale: float
    noise_multiplier: float

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on a step of a user vector, in steps of its grid."""
        return self.noise_multiplier * 2 * self.reach


class ExampleSums:
    """Sums of ``m`` devices' examples in a round, and the user vectors that move meanwhile.

    Attributes:
        states: private states ``(m, state_dim)``, with all the noise of the steps so far.
    """

    def __init__(
        self,
        model: LocalModel[NCF],
        settings: Settings,
        bound: ExampleShares,
        data: Histories,
        states: FloatArray,
        draws: Draws,
    ) -> None:
        self._model, self._settings, self._bound = model, settings, bound
        self._keys = splitmix64(draws.key, data.users)
        self._roots = [
            draws.noise(user, digest(states[row]) + digest(data.of(row)))
            for row, user in enumerate(data.users.tolist())
        ]
        self.states = started(states, self._keys)
        view, m = model.view, len(data.users)
        self._vectors = _Released(view.vectors, model.memory)
        self._biases = None
        if view.biases is not None:
            self._biases = _Released(view.biases, model.bias_memory)
        # Each of a device's distinct items is an example.
        named = np.repeat(np.arange(m), data.lengths) * view.vectors.items + data.items
        self.rows, self.items = np.divmod(distinct(named), view.vectors.items)
        self.turns = turns_of(self._keys[self.rows], self.items, settings.local_steps)
        layout = view.layout
        self._head = np.zeros((m, layout.head), np.int64)
        self._blocks = np.zeros((m * layout.slots, layout.block), np.int64)
        self._named = np.zeros((m * layout.bias_slots, 1), np.int64)
        self._losses = np.zeros(len(self.items), np.float32)

    def run(self) -> Trained:
        """Take all steps of a round."""
        steps, layout, m = self._settings.local_steps, self._model.view.layout, len(self.states)
        for number in range(steps):
            self.step(number)
        found = np.bincount(self.rows, self._losses, minlength=m)
        losses = found / np.maximum(1, np.bincount(self.rows, minlength=m))
        update = SummedExamples(self.shared(), Address.whole(layout))
        blocks = m * layout.slots
        return Trained(
            update, self.states, losses.astype(np.float32), Deferred(blocks, blocks * steps)
        )

    def step(self, number: int) -> None:
        """Move the user vectors by one step's examples and their noise, and add up the rest."""
        bound, width = self._bound, self.states.shape[1]
        moved = self.add(np.flatnonzero(self.turns == number))
        for row, root in enumerate(self._roots):
            stream = root.stream("user vector of examples", number)
            moved[row] += rounded_gaussian(stream, bound.deviation, width)
        self.states -= (moved / bound.scale).astype(np.float32)

    def add(self, places: Items) -> Integers:
        """Add up the shared parts of some examples; gives the sums of their user parts, ``(m, u)``.

        Nothing has noise yet.
        """
        rows, view, width = self.rows[places], self._model.view, self.states.shape[1]
        own = np.zeros((len(self.states), width), np.int64)
        if not len(places):
            return own
        raw, layout = self._gradients(places), view.layout
        self._losses[places] = np.nan_to_num(raw.losses.numpy(), posinf=0.0, neginf=0.0)
        integers, parts = self.bounded(raw), (width, raw.dense.shape[1], raw.blocks[0].size)
        user, dense, blocks, biases = np.split(integers, np.cumsum(parts), axis=1)
        add_rows(own, rows, user)
        if layout.dense:
            self._head[:, : layout.dense] += _summed(rows, dense, len(own))
        for part, target, values in (
            (self._vectors, self._blocks, blocks),
            (self._biases, self._named, biases),
        ):
            if part is not None:
                slots = part.located.slots + rows[:, None] * (len(target) // len(own))
                add_rows(target, slots.ravel(), values.reshape(-1, target.shape[1]))
        return own

    def bounded(self, raw: Gradients) -> Integers:
        """Each example as integers of an L2 norm of at most ``reach``, one row each."""
        bound = self._bound
        flat = torch.cat(
            (
                raw.user,
                raw.dense,
                *(torch.from_numpy(each).flatten(1) for each in (raw.blocks, raw.biases)),
            ),
            dim=1,
        )
        flat *= self._settings.local_lr * bound.scale
        norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        # Rounding to the nearest adds at most half a step to each coefficient.
        room = bound.reach * _SLACK - flat.shape[1] ** 0.5 / 2
        flat *= (room / norms.clamp_min(1e-30)).clamp_max(1.0)
        rounded = flat.round_().to(torch.float64)
        # Sums of squares of such integers are exact in float64, and NaN is within no bound.
        kept = rounded.square().sum(1, keepdim=True) <= bound.reach**2
        return torch.where(kept, rounded, 0.0).numpy().astype(np.int64)

    def shared(self) -> Integers:
        """The change that the examples so far ask of the shared vector, ``(m, size)``."""
        m = len(self.states)
        parts = (self._head, self._blocks.reshape(m, -1), self._named.reshape(m, -1))
        return -np.concatenate(parts, axis=1)

    def _gradients(self, places: Items) -> Gradients:
        rows, items, settings = self.rows[places], self.items[places], self._settings
        n_items = self._model.view.vectors.items
        negatives = uniform(self._keys[rows], items, settings.negatives, n_items)
        samples = np.concatenate((items[:, None], negatives), axis=1)
        states, dense = torch.from_numpy(self.states[rows]), torch.from_numpy(self._model.dense)
        network = self._model.view.network
        return gradients_of(
            network, settings.loss, samples, states, dense, self._vectors, self._biases
        )


class _Released(Part):
    """A memory as it was released, in every step of a round."""

    def __init__(self, table: Table, memory: FloatArray) -> None:
        super().__init__(table)
        self._memory = memory

    def read(self, slots: Items) -> FloatArray:
        return np.take(self._memory, slots, axis=0)


def _summed(rows: Items, values: Integers, m: int) -> Integers:
    total = np.zeros((m, values.shape[1]), np.int64)
    add_rows(total, rows, values)
    return total
