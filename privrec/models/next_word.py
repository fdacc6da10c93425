"""Next-word prediction: a small causal Transformer over tied word vectors.

A word's vector is read at the input and is its neuron at the output, so a device that trains with
few output neurons needs no other rows. The network between them is dense and small.
Source of its sizes: Xu et al., "Adaptive sparse federated learning in large output spaces via
hashing" (2022): vectors and attention 96 wide, a feed-forward layer of 1,536, 20 tokens. The
normalisation comes before each part (Xiong et al., "On layer normalization in the Transformer
architecture", ICML 2020), for which no warm-up is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, layer_norm, scaled_dot_product_attention

FloatArray = NDArray[np.float32]
_EPS = 1e-5


class Layer(NamedTuple):
    """Weights of one layer; gains are kept less 1, so that zeros are a neutral start."""

    gain: Tensor
    shift: Tensor
    attend: Tensor
    attend_bias: Tensor
    merge: Tensor
    merge_bias: Tensor
    second_gain: Tensor
    second_shift: Tensor
    widen: Tensor
    widen_bias: Tensor
    narrow: Tensor
    narrow_bias: Tensor


@dataclass(frozen=True)
class NextWord:
    """The network between word vectors and hidden states.

    Args:
        dim: length of a word vector, a multiple of ``heads``.
        heads: of the attention.
        ffn: width of the feed-forward layer.
        layers: of the Transformer.
        context: most words that a prediction looks back at, itself included.
    """

    dim: int = 96
    heads: int = 8
    ffn: int = 1536
    layers: int = 1
    context: int = 20

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the dense weights: positions, the layers, and the last normalisation."""
        d, f = self.dim, self.ffn
        attention: tuple[tuple[int, ...], ...] = (
            (d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)
        )  # fmt: skip
        layer = (*attention, (d,), (d,), (d, f), (f,), (f, d), (d,))
        return ((self.context, d), *(layer * self.layers), (d,), (d,))

    @property
    def dense(self) -> int:
        """Number of dense weights."""
        return sum(int(np.prod(shape)) for shape in self.shapes)

    @property
    def shortest(self) -> int:
        """Output neurons that the smallest piece of training has to have: all its words differ."""
        return self.context + 1

    def initial_dense(self, rng: np.random.Generator) -> FloatArray:
        """Glorot-uniform matrices, small positions, and zeros elsewhere, as one vector."""
        parts = [rng.normal(0, 0.1, self.shapes[0]).ravel()]
        for shape in self.shapes[1:]:
            limit = np.sqrt(6 / sum(shape)) if len(shape) == 2 else 0.0
            parts.append(rng.uniform(-limit, limit, shape).ravel())
        return np.concatenate(parts).astype(np.float32)

    def hidden(self, words: Tensor, dense: Tensor) -> Tensor:
        """Hidden states after each word, normalised.

        Args:
            words: word vectors of sequences, shape ``(s, t, dim)`` with ``t`` up to ``context``.
            dense: dense weights, shape ``(dense,)``.

        Returns:
            Shape ``(s, t, dim)``; position ``i`` has seen words ``0`` to ``i`` alone.
        """
        first, *rest = self._parts(dense)
        state = words * self.dim**0.5 + first[: words.shape[1]]
        for start in range(0, len(rest) - 2, len(Layer._fields)):
            state = self._layer(state, Layer(*rest[start : start + len(Layer._fields)]))
        return self._normal(state, *rest[-2:])

    def multiply_adds(self, tokens: int) -> int:
        """Multiply-adds of :meth:`hidden` for so many tokens in sequences of full length."""
        d, attended = self.dim, (self.context + 1) / 2
        layer = 4 * d * d + 2 * d * self.ffn + 2 * d * attended
        return round(tokens * self.layers * layer)

    def _layer(self, state: Tensor, layer: Layer) -> Tensor:
        s, t, d = state.shape
        normal = self._normal(state, layer.gain, layer.shift)
        mixed = (normal @ layer.attend + layer.attend_bias).reshape(s, t, 3, self.heads, -1)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        state = state + seen.transpose(1, 2).reshape(s, t, d) @ layer.merge + layer.merge_bias
        normal = self._normal(state, layer.second_gain, layer.second_shift)
        wide = torch.relu(normal @ layer.widen + layer.widen_bias)
        return state + wide @ layer.narrow + layer.narrow_bias

    def _normal(self, state: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return layer_norm(state, (self.dim,), 1 + gain, shift, _EPS)

    def _parts(self, dense: Tensor) -> list[Tensor]:
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        parts = torch.split(dense, sizes)
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]


def sampled_loss(
    hidden: Tensor, rows: Tensor, biases: Tensor, logs: Tensor, targets: Tensor
) -> Tensor:
    """Mean cross-entropy over the active neurons, each of which stands for one or more words.

    With all words active and no weights it is the full softmax. Where each neuron stands for
    ``w`` words, the sum over words in the softmax is estimated without bias (Bengio & Senécal,
    "Adaptive importance sampling to accelerate training of a neural probabilistic language
    model", 2008).

    Args:
        hidden: shape ``(p, dim)``.
        rows: vectors of the active neurons, shape ``(k, dim)``.
        biases: theirs, shape ``(k,)``.
        logs: logarithms of how many words each stands for, shape ``(k,)``; 0 for every target.
        targets: place of each position's next word among the neurons, shape ``(p,)``.
    """
    return cross_entropy(torch.addmm(biases + logs, hidden, rows.T), targets)
