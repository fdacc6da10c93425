"""Networks behind a wide output: next words, and labels of examples; and their batches of a round.

:class:`NextWord` is a small causal Transformer over tied word vectors. A word's vector is read at
the input and is its neuron at the output, so a device that trains with few output neurons needs no
other rows. The network between them is dense and small. Source of its sizes: Xu et al., "Adaptive
sparse federated learning in large output spaces via hashing" (2022): vectors and attention 96 wide,
a feed-forward layer of 1,536, 20 tokens. The normalisation comes before each part, which needs no
warm-up: Xiong et al., "On layer normalization in the Transformer architecture" (ICML 2020).

:class:`WordBag` is one hidden layer over a sparse bag of words, which has rows of its own for them.
Source: Chen et al., "SLIDE" (MLSys 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag, layer_norm, scaled_dot_product_attention

from privrec.data.corpus import Examples, examples_in
from privrec.scenario.schema import Model

FloatArray = NDArray[np.float32]
Items = NDArray[np.int64]
Rows = Callable[[Items], Tensor]
"""Maps word ids of shape ``(*s)`` to vectors ``(*s, dim)``."""

_EPS = 1e-5


@dataclass(frozen=True)
class NextWord:
    """The network between word vectors and hidden states.

    ``dim`` is a multiple of ``heads``; ``context`` is the most words that a prediction looks back
    at, itself included.
    """

    dim: int = 96
    heads: int = 8
    ffn: int = 1536
    layers: int = 1
    context: int = 20

    @classmethod
    def configured(cls, config: Model, dim: int) -> NextWord:
        """The network that ``[model]`` describes, over word vectors of length ``dim``."""
        return cls(dim, config.heads, config.ffn, config.layers, config.context)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the dense weights: positions, the layers, and the last normalisation."""
        d, f = self.dim, self.ffn
        attention = ((d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,))
        feed = ((d,), (d,), (d, f), (f,), (f, d), (d,))
        return ((self.context, d), *((*attention, *feed) * self.layers), (d,), (d,))

    @property
    def dense(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def shortest(self) -> int:
        """Output neurons that one sequence may need: all of its words may differ."""
        return self.context + 1

    def batch(
        self, tokens: NDArray[np.int32], most: int | None, budget: int | None, draw: int
    ) -> Sequences:
        """As many sequences of a text of at least two words as fit the budget; one at least.

        They begin at the place that ``draw`` decides, and have at most ``most`` words in all, of
        which at most ``budget`` are different; None, any number.
        """
        longest = len(tokens) - 1
        t = min(self.context, longest)
        count = (longest if most is None else min(longest, max(t, most))) // t
        start = draw % (len(tokens) - count * t)
        piece = tokens[start : start + count * t + 1].astype(np.int64)
        if budget is not None:
            count = min(count, (_fitting(piece, budget) - 1) // t)
        inputs = piece[: count * t].reshape(count, t)
        return Sequences(self, inputs, piece[1 : count * t + 1].reshape(count, t))

    def initial_dense(self, rng: np.random.Generator) -> FloatArray:
        """Glorot-uniform matrices, small positions, and zeros elsewhere, as one vector."""
        parts = [rng.normal(0, 0.1, self.shapes[0]).ravel()]
        for shape in self.shapes[1:]:
            limit = np.sqrt(6 / sum(shape)) if len(shape) == 2 else 0.0
            parts.append(rng.uniform(-limit, limit, shape).ravel())
        return np.concatenate(parts).astype(np.float32)

    def hidden(self, words: Tensor, dense: Tensor) -> Tensor:
        """Normalised states ``(s, t, dim)`` after each word, which have seen it and those before.

        ``words`` are the vectors of sequences, of that shape with ``t`` up to ``context``.
        """
        parts = torch.split(dense, [math.prod(shape) for shape in self.shapes])
        first, *rest = (part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True))
        state = words * self.dim**0.5 + first[: words.shape[1]]
        for at in range(0, len(rest) - 2, 12):
            state = self._attend(state, rest[at : at + 6])
            state = self._feed_forward(state, rest[at + 6 : at + 12])
        return self._normal(state, *rest[-2:])

    def _attend(self, state: Tensor, weights: Sequence[Tensor]) -> Tensor:
        gain, shift, attend, attend_bias, merge, merge_bias = weights
        s, t, d = state.shape
        normal = self._normal(state, gain, shift)
        mixed = (normal @ attend + attend_bias).reshape(s, t, 3, self.heads, -1)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        return state + seen.transpose(1, 2).reshape(s, t, d) @ merge + merge_bias

    def _feed_forward(self, state: Tensor, weights: Sequence[Tensor]) -> Tensor:
        gain, shift, widen, widen_bias, narrow, narrow_bias = weights
        wide = torch.relu(self._normal(state, gain, shift) @ widen + widen_bias)
        return state + wide @ narrow + narrow_bias

    def _normal(self, state: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        """Gains are kept less 1, so that zeros are a neutral start."""
        return layer_norm(state, (self.dim,), 1 + gain, shift, _EPS)


@dataclass(frozen=True)
class Sequences:
    """Sequences of a text and the words that follow each of theirs, ``(s, t)`` both."""

    model: NextWord
    inputs: Items
    following: Items

    @property
    def own(self) -> Items:
        """Neurons that have to be active: words that are read too, since vectors are tied."""
        return np.unique(np.concatenate((self.inputs.ravel(), self.following.ravel())))

    def __len__(self) -> int:
        return len(self.inputs)

    def hidden(self, part: Items, rows: Rows, dense: Tensor) -> Tensor:
        """States after each word of some of the sequences, shape ``(p, dim)``."""
        return self.model.hidden(rows(self.inputs[part]), dense).flatten(0, 1)

    def targets(self, part: Items) -> Items:
        """The word that follows each of theirs, shape ``(p,)``."""
        return self.following[part].ravel()


@dataclass(frozen=True)
class WordBag:
    """A bag of words hashed to ``features`` rows, which lie with a bias in one flat vector."""

    features: int
    dim: int

    @classmethod
    def configured(cls, config: Model, dim: int) -> WordBag:
        """The network that ``[model]`` describes, with hidden vectors of length ``dim``."""
        return cls(config.features, dim)

    @property
    def dense(self) -> int:
        return (self.features + 1) * self.dim

    @property
    def shortest(self) -> int:
        """Output neurons that one example needs: its commonest label."""
        return 1

    def batch(
        self, tokens: NDArray[np.int32], most: int | None, budget: int | None, draw: int
    ) -> Bags:
        """As many examples of :func:`privrec.data.corpus.dealt` as fit the budget of labels.

        They begin at the place that ``draw`` decides, and are ``most`` at most; None, any number.
        One that alone has more labels keeps its commonest ones.
        """
        every = examples_in(tokens)
        count = len(every) if most is None else min(most, len(every))
        first = draw % (len(every) - count + 1)
        some = every.take(np.arange(first, first + count))
        some = some if budget is None else _within(some, budget)
        return Bags(self, some.hashed(self.features))

    def initial_dense(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Gaussian rows and a bias of zeros, as one vector."""
        weights = rng.standard_normal(self.dense, np.float32) * np.float32(self.dim**-0.5)
        weights[-self.dim :] = 0
        return weights

    def hidden(self, examples: Examples, dense: Tensor) -> Tensor:
        """Hidden vectors, shape ``(m, dim)``, of examples hashed to :attr:`features` words."""
        rows = dense[: -self.dim].view(self.features, self.dim)
        return bag_of_words(examples, rows, dense[-self.dim :])


def bag_of_words(examples: Examples, rows: Tensor, bias: Tensor, *, sparse: bool = False) -> Tensor:
    """Hidden vectors ``relu(Σ value · row + bias)`` of the words of examples, ``(m, dim)``.

    ``sparse`` is the gradient of ``rows``.
    """
    starts = torch.from_numpy(np.concatenate(([0], examples.ends[:-1])))
    words, values = torch.from_numpy(examples.features), torch.from_numpy(examples.values)
    summed = embedding_bag(
        words, rows, starts, mode="sum", sparse=sparse, per_sample_weights=values
    )
    return torch.relu(summed + bias)


@dataclass(frozen=True)
class Bags:
    """Labelled examples, with words hashed down to the model's vocabulary."""

    model: WordBag
    examples: Examples

    @property
    def own(self) -> Items:
        """Neurons that have to be active: those of the labels."""
        return np.unique(self.examples.labels)

    def __len__(self) -> int:
        return len(self.examples)

    def hidden(self, part: Items, rows: Rows, dense: Tensor) -> Tensor:
        """Hidden vectors of some of the examples, shape ``(p, dim)``."""
        return self.model.hidden(self.examples.take(part), dense)

    def targets(self, part: Items) -> Items:
        """Their labels, shape ``(p, labels)``, filled up by -1."""
        return self.examples.take(part).padded_labels()


WordNetwork: TypeAlias = NextWord | WordBag
WordBatch: TypeAlias = Sequences | Bags
"""A device's data of one round."""


def _within(examples: Examples, budget: int) -> Examples:
    """Examples from the start whose labels fit the budget: one at least, if with fewer labels."""
    fits = _fitting(examples.labels, budget)
    count = max(1, int(np.searchsorted(examples.label_ends, fits, side="right")))
    some = examples.take(np.arange(min(count, len(examples))))
    own = np.unique(some.labels)
    if len(own) <= budget:
        return some
    # Labels are numbered by how common they are, and this is one example alone.
    kept = some.labels[np.isin(some.labels, own[:budget])]
    return replace(some, labels=kept, label_ends=np.array([len(kept)]))


def _fitting(words: Items, budget: int) -> int:
    """How many words from the start have at most ``budget`` different ones among them."""
    _, first = np.unique(words, return_index=True)
    different = np.cumsum(np.bincount(first, minlength=len(words)))
    return int(np.searchsorted(different, budget, side="right"))
