"""Neural collaborative filtering: GMF, MLP and NeuMF as one family.

NeuMF adds a dot product over one part of the vectors to a small network over the other; GMF and MLP
are its two limits. The output weights of GMF are absorbed by the user vector, which is private and
free to be anything, so GMF has no dense weights at all.
Source: He et al., "Neural Collaborative Filtering" (WWW 2017).

Every tensor has a leading device dimension ``m``: one device is ``m = 1`` and a cohort is many,
with each device's own copy of what it trains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privrec.scenario.schema import Model


@dataclass(frozen=True)
class NCF:
    """A scorer of items for users: ``score = <u, v> + network(u', v') + user bias``.

    ``dot`` is the length of the part of the vectors that enters the dot product, ``tower`` of the
    part that enters the network, with hidden layers of these widths. The last ``features`` numbers
    of ``dot`` are public, and never change.
    """

    dot: int
    tower: int
    hidden: tuple[int, ...]
    features: int = 0

    @classmethod
    def of(cls, kind: str, dim: int, hidden: tuple[int, ...]) -> NCF:
        """The model named ``kind`` over item vectors of length ``dim``."""
        if kind == "gmf":
            return cls(dim, 0, ())
        if kind == "mlp":
            return cls(0, dim, hidden)
        return cls(dim // 2, dim - dim // 2, hidden)

    @classmethod
    def configured(cls, config: Model, dim: int) -> NCF:
        """The network that ``[model]`` describes."""
        return cls.of(config.kind, dim, tuple(getattr(config, "hidden", ())))

    def featured(self, features: int) -> NCF:
        """A GMF over item vectors that so many features follow."""
        return replace(self, dot=self.dot + features, features=features)

    @property
    def dim(self) -> int:
        """Length of an item vector."""
        return self.dot + self.tower

    @property
    def user_dim(self) -> int:
        """Length of a user's private state: its vector, then its bias."""
        return self.dim + 1

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the dense weights: weight and bias of each layer, then the output weights."""
        if not self.tower:
            return ()
        widths = (2 * self.tower, *self.hidden)
        layers = [shape for a, b in pairwise(widths) for shape in ((a, b), (b,))]
        return (*layers, (widths[-1],))

    @property
    def dense(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def initial_dense(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Glorot-uniform weights and zero biases, as a vector of :attr:`dense` numbers."""
        parts = []
        for position, shape in enumerate(self.shapes):
            is_output = position == len(self.shapes) - 1
            fan = shape[0] + (1 if is_output else shape[-1])
            limit = np.sqrt(6 / fan) if len(shape) == 2 or is_output else 0.0
            parts.append(rng.uniform(-limit, limit, shape).ravel())
        return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)

    def forward(self, user: Tensor, rows: Tensor, dense: Tensor) -> Scored:
        """Scores ``(m, k)`` of candidates, without item biases, and the gradients of training.

        Users' private states are ``(m, user_dim)``, item vectors ``(m, k, dim)``, or with a 1 for
        ``m`` when all see the same, and dense weights ``(m, dense)``.
        """
        if self.tower:
            return _NetworkScored(self, user, rows, dense)
        return Scored(user, rows, self.dot - self.features)

    def rank(self, user: Tensor, table: Tensor, dense: Tensor) -> Tensor:
        """Scores ``(m, k)`` of items ``(k, dim)`` for users ``(m, user_dim)``, without biases."""
        scores = user[:, : self.dot] @ table[:, : self.dot].T + user[:, -1:]
        if self.tower:
            own, items = user[:, self.dot : -1], table[None, :, self.dot :]
            scores += self.network(own[:, None], items, dense[None])
        return scores

    def feature_scores(self, user: Tensor, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """The part of scores that public features ``(k, features)`` give, ``(m, k)``."""
        weights = user[:, self.dot - self.features : self.dot].numpy()
        return np.asarray(weights @ features.T, np.float32)

    def network(self, user: Tensor, rows: Tensor, dense: Tensor) -> Tensor:
        """The tower's output ``(m, k)`` for parts of users ``(m, 1 or k, tower)`` and of items.

        The latter are ``(m or 1, k, tower)``, and dense weights ``(m or 1, dense)``.
        """
        parts = torch.split(dense, [math.prod(shape) for shape in self.shapes], dim=1)
        weights = [p.reshape(-1, *shape) for p, shape in zip(parts, self.shapes, strict=True)]
        first, bias = weights[0], weights[1]
        own = user @ first[:, : self.tower] + bias[:, None, :]
        x = torch.relu(rows @ first[:, self.tower :] + own)
        for weight, bias in zip(weights[2:-1:2], weights[3:-1:2], strict=True):
            x = torch.relu(x @ weight + bias[:, None, :])
        return (x * weights[-1][:, None, :]).sum(-1)


class Scored:
    """Scores of candidates, ``values``, and, on demand, what training needs of them.

    Here those of GMF, whose gradients are outer products, so that nothing needs recording.
    """

    def __init__(self, user: Tensor, rows: Tensor, learned: int) -> None:
        self._vector, self._rows, self._learned = user[:, :-1], rows, learned
        if len(rows) == 1:
            products = self._vector @ rows[0].T
        else:
            products = torch.bmm(rows, self._vector.unsqueeze(2)).squeeze(2)
        self.values = products + user[:, -1:]

    def user_jacobian(self) -> Tensor:
        """Derivative of each score by the private state, shape ``(m or 1, k, user_dim)``."""
        return torch.nn.functional.pad(self._rows, (0, 1), value=1.0)

    def shared_gradient(self, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients on what is learned of item vectors ``(m, k, learned)`` and on dense weights.

        The latter are ``(m, dense)``.
        """
        dense = upstream.new_empty((len(upstream), 0))
        return upstream.unsqueeze(2) * self._vector[:, None, : self._learned], dense


class _NetworkScored(Scored):
    """MLP and NeuMF: gradients by automatic differentiation over each device's own weights."""

    def __init__(self, model: NCF, user: Tensor, rows: Tensor, dense: Tensor) -> None:
        m, k = len(user), rows.shape[1]
        # A copy of the user for each sample, so that one backward pass gives the whole Jacobian.
        copies = user[:, None].expand(m, k, -1), rows.expand(m, k, -1), dense.expand(m, -1)
        with torch.enable_grad():
            self._inputs = [copy.detach().clone().requires_grad_() for copy in copies]
            own, items, weights = self._inputs
            dots = (own[..., : model.dot] * items[..., : model.dot]).sum(-1) + own[..., -1]
            tower = model.network(own[..., model.dot : -1], items[..., model.dot :], weights)
            self._recorded = dots + tower
        self.values = self._recorded.detach()

    def user_jacobian(self) -> Tensor:
        ones = torch.ones_like(self._recorded)
        return torch.autograd.grad(self._recorded, self._inputs[0], ones, retain_graph=True)[0]

    def shared_gradient(self, upstream: Tensor) -> tuple[Tensor, Tensor]:
        rows, dense = torch.autograd.grad(self._recorded, self._inputs[1:], upstream)
        return rows, dense
