"""Local training of a wide output, of next words or labels: only active output neurons change.

One device at a time: its hidden states and the scores of its neurons are matrices large enough to
keep a core busy. What is trained is the memory of the touched rows, whatever table they lie in, and
the dense weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privrec.data.corpus import UNKNOWN_ID
from privrec.device.device import Draws, Learner, Settings, Trained
from privrec.device.samples import ActiveSet, Find, Histories, Items, OutputBudget, chosen_by
from privrec.device.tier import LocalModel, Located, ModelView
from privrec.device.update import Address, RawUpdate
from privrec.embedding.subspace import splitmix64
from privrec.embedding.table import Table
from privrec.errors import UsageError
from privrec.models.losses import loss_of, sampled_loss
from privrec.models.words import WordBatch, WordNetwork
from privrec.search.memory import ItemMemory

FloatArray = NDArray[np.float32]

QUERIES = 16
"""Hidden states that a device searches with: some of its positions, evenly spread."""

_WINDOW = 0x77_1D_0E


class RowServer(Protocol):
    """A server that hashes its output columns and hands out neurons by bucket, as a device sees it.

    It takes part in the scheme ``"requested"`` alone, in which it learns what each device asks.
    """

    def hashed(self, items: ItemMemory, key: int) -> RowTables:
        """Hash all columns of an output layer for the round of a key, by public functions.

        Asked again for the same, it gives the same tables.
        """
        ...


class RowTables(Protocol):
    """The server's tables of one round."""

    def codes(self, queries: FloatArray) -> list[NDArray[np.uint16]]:
        """The device's half: buckets of its hidden states, each once, for every table."""
        ...

    def neurons(self, buckets: list[NDArray[np.uint16]], wanted: int, named: Items) -> Items:
        """The server's half: neurons in the asked buckets beside the named ones, ascending."""
        ...


@dataclass(frozen=True)
class WordLearner(Learner):
    """Local training of a network over a wide output, with one set of hyper-parameters.

    Devices keep no private state between rounds: theirs is a zero.

    Args:
        view: what is trained.
        settings: how.
        served: the server's tables, where devices ask for neurons; None where they select alone.

    Raises:
        UsageError: when the smallest piece of data may have more words than may be active.
    """

    view: ModelView[WordNetwork]
    settings: Settings
    served: RowServer | None = None

    def __post_init__(self) -> None:
        output, shortest = self.output, self.view.model.shortest
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
            find = self._finder(model, user, draws)
            queries = self._queries(model, batch)
        active = self.output.active(batch.own, queries, find, draws.key, user)

        vectors = _Touched(self.view.vectors, model.memory, active.items)
        biases = _Touched(cast(Table, self.view.biases), model.bias_memory, active.items)
        dense = torch.from_numpy(model.dense).clone().requires_grad_()
        logs, first = torch.from_numpy(active.logs), 0.0
        pieces = np.arange(len(batch))
        for number, part in enumerate(
            np.array_split(pieces, min(self.settings.local_steps, len(batch)))
        ):
            rows, shifts = vectors.rows(), biases.rows()[:, 0]
            hidden = batch.hidden(part, partial(_read, rows, active), dense)
            targets = batch.targets(part)
            places = np.where(targets < 0, targets, active.places(targets))
            loss = sampled_loss(hidden, rows, shifts, logs, torch.from_numpy(places))
            loss.backward()  # type: ignore[no-untyped-call]
            for each in (dense, vectors.blocks, biases.blocks):
                _step(each, self.settings.local_lr)
            first = first if number else float(loss.detach())

        change = dense.detach().numpy() - model.dense
        values = np.concatenate((change, vectors.change(), biases.change()))[None]
        address = Address(vectors.named, biases.named, self.view.layout)
        return Trained(RawUpdate(values, address), states, np.array([first], np.float32))

    def batch(self, tokens: NDArray[np.int32], user: int, key: int) -> WordBatch:
        """What a device learns from in a round.

        Args:
            tokens: its data: a text in reading order, or examples.
            user: whose it is; names the draw.
            key: the round's key.
        """
        output = self.output
        budget = output.size if output.size < output.words else None
        draw = int(splitmix64(key ^ _WINDOW, np.array([user]))[0] >> np.uint64(33))
        return self.view.model.batch(tokens, self.settings.max_samples, budget, draw)

    def _finder(self, model: LocalModel[WordNetwork], user: int, draws: Draws) -> Find:
        """Who selects neurons: the device, by functions of its own, or the server that it asks."""
        if self.served is None:
            selector = self.settings.selector
            search = model.search(selector, self.settings.config)
            return chosen_by(selector, search, draws.functions(user))
        tables = self.served.hashed(model.items, draws.key)
        return lambda queries, count, exclude: tables.neurons(tables.codes(queries), count, exclude)

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


def _read(rows: Tensor, active: ActiveSet, words: Items) -> Tensor:
    """Vectors of words that are active."""
    return rows[torch.from_numpy(active.places(words))]


def spread(count: int, most: int = QUERIES) -> Items:
    """Positions of an even sample."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


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
        changed: FloatArray = self.blocks.detach().numpy() - self._before
        return changed.ravel()


def _step(values: Tensor, rate: float) -> None:
    with torch.no_grad():
        if values.grad is not None:
            values -= rate * values.grad
            values.grad = None
