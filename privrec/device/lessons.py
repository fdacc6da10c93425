"""What a device learns from in one round: a window of its text, or some of its labelled examples.

A lesson knows which output neurons it cannot do without, its hidden vectors, and its loss over the
neurons that are active.

:class:`OutputBudget` says which output neurons a device trains, within a budget, and how many words
each stands for. The words of the device's own text are always active. Of the rest a part is public
(the most common words), a part is selected by hidden states of the device, and what is left is
drawn by chance from all others, each standing for as many of them as were not drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privrec.data.corpus import NO_LABEL, Examples, examples_in
from privrec.errors import UsageError
from privrec.models.extreme import WordBag
from privrec.models.next_word import NextWord, sampled_loss
from privrec.models.sparse_output import softmax_loss
from privrec.randomness import SecretRoot
from privrec.search.active import active_set

FloatArray = NDArray[np.float32]
Items = NDArray[np.int64]
Find = Callable[[FloatArray, int, Items], Items]
"""Neurons near to hidden states: queries, how many, which not; ascending, maybe fewer."""

QUERIES = 16
"""Hidden states that a device searches with: some of its positions, evenly spread."""

_BY_CHANCE = b"neurons by chance are the round's, and no secret"


@dataclass(frozen=True)
class OutputBudget:
    """How wide the output layer of a device is.

    Args:
        words: size of the vocabulary, ordered by how common the words are.
        share: of the neurons that are active, in (0, 1].
        selected: share of the budget that is selected by hidden states, in [0, 1].
        frequent: share of the budget that is the most common words, in [0, 1]; together at most 1.
    """

    words: int
    share: float = 1.0
    selected: float = 0.0
    frequent: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"share = {self.share}: must lie above 0 and at most 1; change it")
        parts = (self.selected, self.frequent, self.selected + self.frequent)
        if not all(0 <= part <= 1 for part in parts):
            raise UsageError(
                f"selected = {self.selected}, frequent = {self.frequent}: shares of a budget, "
                "together at most 1; lower one of them"
            )

    @property
    def budget(self) -> int:
        """Active neurons, exactly."""
        return max(1, round(self.share * self.words))

    def active(self, own: Items, queries: FloatArray, find: Find | None, key: int, user: int
    ) -> ActiveSet:  # fmt: skip
        """The active neurons of one device.

        Args:
            own: words of its text, ascending, at most :attr:`budget` of them.
            queries: its hidden states, shape ``(q, dim)``.
            find: who selects; None for nobody.
            key: the round's key, for the draw by chance.
            user: whose draw it is.
        """
        room = max(0, self.budget - len(own))
        common = self._common(own, round(self.frequent * room))
        wanted = min(round(self.selected * room), room - len(common))
        chosen = np.zeros(0, np.int64)
        if find is not None and wanted and np.isfinite(queries).all():
            chosen = find(queries, wanted, np.union1d(own, common))
        stream = SecretRoot.known(_BY_CHANCE).stream("neurons", key, user)
        found = active_set(own, np.concatenate((common, chosen)), self.budget, self.words, stream)
        items, logs = found.neurons.numpy(), found.log_weights.numpy()
        order = np.argsort(items)
        return ActiveSet(items[order], logs[order])

    def _common(self, own: Items, count: int) -> Items:
        """The ``count`` most common words that are not the device's own anyway."""
        first = np.arange(min(self.words, len(own) + count))
        return np.setdiff1d(first, own, assume_unique=True)[:count]


@dataclass(frozen=True)
class ActiveSet:
    """Neurons that take part, ascending without repeats, and the logarithms of their weights."""

    items: Items
    logs: FloatArray

    def places(self, words: NDArray[np.integer]) -> Items:
        """Where words lie among the neurons, of the shape of ``words``; all of them are active."""
        return np.searchsorted(self.items, words)


def spread(count: int, most: int = QUERIES) -> Items:
    """Positions of an even sample."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


Rows = Callable[[Items], Tensor]
"""Vectors of some words, of the shape of what names them and one dimension more."""

Network = NextWord | WordBag


@dataclass(frozen=True)
class ActiveRows:
    """Active output neurons: who they are, their vectors and their biases."""

    active: ActiveSet
    rows: Tensor
    biases: Tensor

    def read(self, words: Items) -> Tensor:
        """Vectors of some of them: :data:`Rows`."""
        return self.rows[torch.from_numpy(self.active.places(words))]


class TextBatch(Protocol):
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

    def loss(self, part: Items, hidden: Tensor, neurons: ActiveRows) -> Tensor:
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
        """See :attr:`TextBatch.own`: vectors are tied, so words that are read are neurons too."""
        return np.unique(np.concatenate((self.inputs.ravel(), self.targets.ravel())))

    @property
    def positions(self) -> int:
        """See :attr:`TextBatch.positions`."""
        return self.targets.size

    def __len__(self) -> int:
        return len(self.inputs)

    def hidden(self, part: Items, rows: Rows, dense: Tensor) -> Tensor:
        """See :meth:`TextBatch.hidden`."""
        return self.model.hidden(rows(self.inputs[part]), dense).flatten(0, 1)

    def loss(self, part: Items, hidden: Tensor, neurons: ActiveRows) -> Tensor:
        """See :meth:`TextBatch.loss`."""
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
            tokens: the device's examples, see :func:`privrec.data.corpus.dealt`.
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
        """See :attr:`TextBatch.own`."""
        return np.unique(self.examples.labels)

    @property
    def positions(self) -> int:
        """See :attr:`TextBatch.positions`."""
        return len(self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def hidden(self, part: Items, rows: Rows, dense: Tensor) -> Tensor:
        """See :meth:`TextBatch.hidden`; words that are read have rows of their own."""
        return self.model.hidden(self.examples.take(part), dense)

    def loss(self, part: Items, hidden: Tensor, neurons: ActiveRows) -> Tensor:
        """See :meth:`TextBatch.loss`."""
        labels = self.examples.take(part).padded_labels()
        real = labels != NO_LABEL
        places = neurons.active.places(np.where(real, labels, neurons.active.items[0]))
        scores = torch.addmm(
            neurons.biases + torch.from_numpy(neurons.active.logs), hidden, neurons.rows.T
        )
        return softmax_loss(scores, torch.from_numpy(places), torch.from_numpy(real))


def text_batch_of(
    model: Network, tokens: NDArray[np.int32], most: int | None, budget: int | None, draw: int
) -> TextBatch:
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
