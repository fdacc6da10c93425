"""What a device learns from in one round: a window of its text, or some of its labelled examples.

A lesson knows which output neurons it cannot do without, its hidden vectors, and its loss over the
neurons that are active. Which those are is decided elsewhere (:mod:`privrec.device.neurons`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privrec.data.extreme import NO_LABEL, Examples
from privrec.data.labels import examples_in
from privrec.device.neurons import Active
from privrec.models.extreme import WordBag
from privrec.models.next_word import NextWord, sampled_loss
from privrec.models.sparse_output import softmax_loss

Items = NDArray[np.int64]
Rows = Callable[[Items], Tensor]
"""Vectors of some words, of the shape of what names them and one dimension more."""

Network = NextWord | WordBag


@dataclass(frozen=True)
class Neurons:
    """Active output neurons: who they are, their vectors and their biases."""

    active: Active
    rows: Tensor
    biases: Tensor

    def read(self, words: Items) -> Tensor:
        """Vectors of some of them: :data:`Rows`."""
        return self.rows[torch.from_numpy(self.active.places(words))]


class Lesson(Protocol):
    """A device's data of one round."""

    @property
    def own(self) -> Items:
        """Neurons that have to be active, ascending."""
        ...

    @property
    def positions(self) -> int:
        """Predictions that are made in all."""
        ...

    def __len__(self) -> int: ...

    def hidden(self, part: Items, rows: Rows, dense: Tensor) -> Tensor:
        """Hidden vectors of a part of the lesson, shape ``(p, dim)``.

        Args:
            part: which of its pieces.
            rows: vectors of words that it reads.
            dense: dense weights.
        """
        ...

    def loss(self, part: Items, hidden: Tensor, neurons: Neurons) -> Tensor:
        """Mean loss of that part over the active neurons."""
        ...


@dataclass(frozen=True)
class Sequences:
    """Sequences of a text and the words that follow each of theirs, ``(s, t)`` both."""

    model: NextWord
    inputs: Items
    targets: Items

    @classmethod
    def of(
        cls, model: NextWord, text: NDArray[np.int32], most: int | None, budget: int | None,
        draw: int,
    ) -> Sequences:  # fmt: skip
        """A window of a text, from a random place.

        As many sequences as have no more different words than neurons may be active.

        Args:
            model: whose context is the length of a sequence.
            text: at least two words.
            most: words of the window; None for the whole text.
            budget: neurons that may be active; None for all.
            draw: decides the place.
        """
        t = min(model.context, len(text) - 1)
        wanted = len(text) - 1 if most is None else min(len(text) - 1, max(t, most))
        count = wanted // t
        start = draw % (len(text) - count * t)
        piece = text[start : start + count * t + 1].astype(np.int64)
        if budget is not None:
            count = min(count, _fitting(piece, t, budget))
        inputs = piece[: count * t].reshape(count, t)
        return cls(model, inputs, piece[1 : count * t + 1].reshape(count, t))

    @property
    def own(self) -> Items:
        """See :attr:`Lesson.own`: vectors are tied, so words that are read are neurons too."""
        return np.unique(np.concatenate((self.inputs.ravel(), self.targets.ravel())))

    @property
    def positions(self) -> int:
        """See :attr:`Lesson.positions`."""
        return self.targets.size

    def __len__(self) -> int:
        return len(self.inputs)

    def hidden(self, part: Items, rows: Rows, dense: Tensor) -> Tensor:
        """See :meth:`Lesson.hidden`."""
        return self.model.hidden(rows(self.inputs[part]), dense).flatten(0, 1)

    def loss(self, part: Items, hidden: Tensor, neurons: Neurons) -> Tensor:
        """See :meth:`Lesson.loss`."""
        wanted = torch.from_numpy(neurons.active.places(self.targets[part])).flatten()
        logs = torch.from_numpy(neurons.active.logs)
        return sampled_loss(hidden, neurons.rows, neurons.biases, logs, wanted)


@dataclass(frozen=True)
class Bags:
    """Labelled examples, with words hashed down to the model's vocabulary."""

    model: WordBag
    examples: Examples

    @classmethod
    def of(
        cls, model: WordBag, tokens: NDArray[np.int32], most: int | None, budget: int | None,
        draw: int,
    ) -> Bags:  # fmt: skip
        """Examples of a device, from a random one on.

        As many as have no more different labels than neurons may be active. An example that alone
        has more keeps its commonest ones.

        Args:
            model: whose vocabulary words are hashed to.
            tokens: the device's examples, see :mod:`privrec.data.labels`.
            most: examples; None for all.
            budget: neurons that may be active; None for all.
            draw: decides the first one.
        """
        every = examples_in(tokens)
        count = len(every) if most is None else min(most, len(every))
        first = draw % (len(every) - count + 1)
        some = every.take(np.arange(first, first + count))
        if budget is not None:
            some = _within(some, budget)
        return cls(model, some.hashed(model.features))

    @property
    def own(self) -> Items:
        """See :attr:`Lesson.own`."""
        return np.unique(self.examples.labels)

    @property
    def positions(self) -> int:
        """See :attr:`Lesson.positions`."""
        return len(self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def hidden(self, part: Items, rows: Rows, dense: Tensor) -> Tensor:
        """See :meth:`Lesson.hidden`; words that are read have rows of their own."""
        return self.model.hidden(self.examples.take(part), dense)

    def loss(self, part: Items, hidden: Tensor, neurons: Neurons) -> Tensor:
        """See :meth:`Lesson.loss`."""
        labels = self.examples.take(part).padded_labels()
        real = labels != NO_LABEL
        places = neurons.active.places(np.where(real, labels, neurons.active.items[0]))
        scores = torch.addmm(
            neurons.biases + torch.from_numpy(neurons.active.logs), hidden, neurons.rows.T
        )
        return softmax_loss(scores, torch.from_numpy(places), torch.from_numpy(real))


def lesson_of(
    model: Network, tokens: NDArray[np.int32], most: int | None, budget: int | None, draw: int
) -> Lesson:
    """A device's lesson; see :meth:`Sequences.of` and :meth:`Bags.of`."""
    if isinstance(model, NextWord):
        return Sequences.of(model, tokens, most, budget, draw)
    return Bags.of(model, tokens, most, budget, draw)


def _fitting(piece: Items, t: int, budget: int) -> int:
    """Sequences from the start whose words fit the budget: one at least."""
    fits = int(np.searchsorted(_new(piece), budget, side="right"))
    return (fits - 1) // t


def _within(examples: Examples, budget: int) -> Examples:
    """Examples from the start whose labels fit the budget: one at least, if with fewer labels."""
    fits = int(np.searchsorted(_new(examples.labels), budget, side="right"))
    count = max(1, int(np.searchsorted(examples.label_ends, fits, side="right")))
    some = examples.take(np.arange(min(count, len(examples))))
    own = np.unique(some.labels)
    if len(own) <= budget:
        return some
    # Labels are numbered by how common they are, and this is one example alone.
    kept = some.labels[np.isin(some.labels, own[:budget])]
    return replace(some, labels=kept, label_ends=np.array([len(kept)]))


def _new(words: Items) -> Items:
    """How many different words there are up to each one, itself included."""
    _, first = np.unique(words, return_index=True)
    return np.cumsum(np.bincount(first, minlength=len(words)))
