"""Local training of a wide output, of next words or labels: only active output neurons change.

One device at a time: its hidden states and the scores of its neurons are matrices large enough to
keep a core busy. What is trained is the memory of the touched rows, whatever table they lie in, and
the dense weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privrec.data.corpus import UNKNOWN_ID
from privrec.device.device import Draws, Learner, Settings, Trained
from privrec.device.local import LocalModel, Located
from privrec.device.samples import Find, Histories, Items, chosen_by
from privrec.device.tier import ModelView
from privrec.device.update import Address, RawUpdate
from privrec.embedding.subspace import splitmix64
from privrec.embedding.table import Table
from privrec.errors import UsageError
from privrec.models.losses import loss_of, sampled_loss
from privrec.models.words import WordBatch, WordNetwork
from privrec.randomness import SecretRoot
from privrec.search.memory import ItemMemory, evenly
from privrec.search.select import active_set

FloatArray = NDArray[np.float32]

QUERIES = 16
"""Hidden states that a device searches with: some of its positions, evenly spread."""

_WINDOW = 0x77_1D_0E
_BY_CHANCE = b"neurons by chance are the round's, and no secret"

Ask = Callable[[ItemMemory, int], Find]
"""How to ask the server for neurons, by the output columns and the key of a round.

It is part of the scheme ``"requested"`` alone, in which the server learns what each device asks.
"""


@dataclass(frozen=True)
class OutputBudget:
    """How wide the output layer of a device is, and which neurons it trains.

    The words of the device's own data are always active. Of the rest the share ``frequent`` is
    public (the most common words), the share ``selected`` is selected by the device's hidden
    states, and what is left is drawn by chance from all others. What is drawn by chance carries the
    logarithm of how many it stands for in a softmax over all; every other neuron stands for itself.

    Of ``words``, ordered by how common they are, the part ``share`` is active.
    """

    words: int
    share: float = 1.0
    selected: float = 0.0
    frequent: float = 0.0

    @property
    def size(self) -> int:
        """Active neurons, exactly."""
        return max(1, round(self.share * self.words))

    def active(
        self, own: Items, queries: FloatArray, find: Find | None, key: int, user: int
    ) -> tuple[Items, FloatArray]:
        """The active neurons of one device, ascending without repeats, and their log weights.

        ``own`` are the words of its data, ascending, at most :attr:`size` of them; ``queries`` are
        its hidden states, ``(q, dim)``; ``key`` and ``user`` name the draw by chance.
        """
        room = max(0, self.size - len(own))
        public = round(self.frequent * room)
        common = np.setdiff1d(np.arange(min(self.words, len(own) + public)), own)[:public]
        wanted = min(round(self.selected * room), room - len(common))
        chosen = np.zeros(0, np.int64)
        if find is not None and wanted and np.isfinite(queries).all():
            chosen = find(queries, wanted, np.union1d(own, common))
        stream = SecretRoot.known(_BY_CHANCE).stream("neurons", key, user)
        found = active_set(own, np.concatenate((common, chosen)), self.size, self.words, stream)
        order = torch.argsort(found.neurons)
        return found.neurons[order].numpy(), found.log_weights[order].numpy()


@dataclass(frozen=True)
class WordLearner(Learner):
    """Local training of a network over a wide output, with one set of hyper-parameters.

    Devices keep no private state between rounds: theirs is a zero. Without ``ask`` they select
    neurons alone. UsageError when the smallest piece of data may have more words than are active.
    """

    view: ModelView[WordNetwork]
    settings: Settings
    ask: Ask | None = None

    def __post_init__(self) -> None:
        output, shortest = self.output, self.view.network.shortest
        if output.size < min(shortest, output.words):
            raise UsageError(
                f"train.budget: {output.size} of {output.words} neurons, and {shortest} words of a "
                "text may all differ; raise it, or lower model.context"
            )

    @property
    def state_dim(self) -> int:
        """See the class."""
        return 1

    @cached_property
    def output(self) -> OutputBudget:
        """How many neurons are active, and which."""
        settings, words = self.settings, self.view.vectors.items
        if loss_of(settings.loss).whole_catalogue:
            return OutputBudget(words)
        selected = 0.0 if settings.selector == "uniform" else settings.selected
        return OutputBudget(words, settings.budget, selected, settings.frequent)

    def held(self, data: Histories) -> Histories:
        """The data with words and labels unknown that the tier does not hold."""
        known = data.items < self.view.vectors.items
        return data if known.all() else replace(data, items=np.where(known, data.items, UNKNOWN_ID))

    def batches(self, lengths: Items) -> Iterator[Items]:
        """Each device by itself."""
        return iter(np.arange(len(lengths))[:, None])

    def train(
        self, model: LocalModel[WordNetwork], data: Histories, states: FloatArray, draws: Draws
    ) -> Trained:
        """See :meth:`Learner.train`; of one device, and without noise between its steps."""
        (user,) = data.users.tolist()
        batch = self.batch(data.of(0), user, draws.key)
        queries, find = np.zeros((1, 0), np.float32), None
        if self.output.selected:
            if self.ask is not None:
                find = self.ask(model.items, draws.key)
            else:  # by functions of its own
                selector = self.settings.selector
                search = model.search(selector, self.settings.config)
                find = chosen_by(selector, search, draws.functions(user))
            queries = self._queries(model, batch)
        active, logs = self.output.active(batch.own, queries, find, draws.key, user)

        vectors = _Touched(self.view.vectors, model.memory, active)
        biases = _Touched(cast(Table, self.view.biases), model.bias_memory, active)
        dense = torch.from_numpy(model.dense).clone().requires_grad_()
        weights, first = torch.from_numpy(logs), 0.0
        steps = min(self.settings.local_steps, len(batch))
        for number, part in enumerate(np.array_split(np.arange(len(batch)), steps)):
            rows, shifts = vectors.rows(), biases.rows()[:, 0]
            hidden = batch.hidden(part, partial(_read, rows, active), dense)
            targets = batch.targets(part)
            places = np.where(targets < 0, targets, np.searchsorted(active, targets))
            loss = sampled_loss(hidden, rows, shifts, weights, torch.from_numpy(places))
            loss.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                for values in (dense, vectors.blocks, biases.blocks):
                    if values.grad is not None:
                        values -= self.settings.local_lr * values.grad
                        values.grad = None
            first = first if number else float(loss.detach())

        change = dense.detach().numpy() - model.dense
        changes = np.concatenate((change, vectors.change(), biases.change()))[None]
        address = Address(vectors.named, biases.named, self.view.layout)
        return Trained(RawUpdate(changes, address), states, np.array([first], np.float32))

    def batch(self, tokens: NDArray[np.int32], user: int, key: int) -> WordBatch:
        """What a device learns from in a round: of a text in reading order, or of examples."""
        output = self.output
        budget = output.size if output.size < output.words else None
        draw = int(splitmix64(key ^ _WINDOW, np.array([user]))[0] >> np.uint64(33))
        return self.view.network.batch(tokens, self.settings.max_samples, budget, draw)

    def _queries(self, model: LocalModel[WordNetwork], batch: WordBatch) -> FloatArray:
        """Some hidden states at the start of the round, each with a 1 for the neuron's bias."""
        with torch.no_grad():
            hidden = batch.hidden(
                spread(len(batch)),
                lambda words: torch.from_numpy(model.rows(words)),
                torch.from_numpy(model.dense),
            ).numpy()
        hidden = hidden[spread(len(hidden))]
        return np.concatenate((hidden, np.ones((len(hidden), 1), np.float32)), axis=1)


def _read(rows: Tensor, active: Items, words: Items) -> Tensor:
    """Vectors of words that are active."""
    return rows[torch.from_numpy(np.searchsorted(active, words))]


def spread(count: int, most: int = QUERIES) -> Items:
    """Positions of an even sample."""
    return evenly(count, min(count, most))


class _Touched(Located):
    """The memory blocks behind some rows of a table, each once, as trainable numbers."""

    def __init__(self, table: Table, memory: FloatArray, items: Items) -> None:
        super().__init__(table, items[None])
        named, place = np.unique(self.slots, return_inverse=True)
        self.named, place = named[None], place.ravel()
        self._before, self._place = memory[named], torch.from_numpy(place)
        ordered = len(place) == len(named) and bool((np.diff(place) > 0).all())
        self._plain = ordered and bool((self._signs == 1).all())
        self.blocks = torch.from_numpy(self._before.copy()).requires_grad_()

    def rows(self) -> Tensor:
        """The rows as they are now, shape ``(items, dim)``."""
        if self._plain:
            return self.blocks.reshape(self._shape)
        return self.read(self.blocks[self._place][None])[0]

    def change(self) -> FloatArray:
        """New blocks minus old ones, in the order of ``named``, flat."""
        return np.ravel(self.blocks.detach().numpy() - self._before)
