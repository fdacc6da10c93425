"""Local training of a wide output: a device's lesson, its active neurons, the change they ask.

One device at a time: its hidden states and the scores of its neurons are matrices large enough to
keep a core busy. What is trained is the memory of the touched rows, whatever table they lie in, and
the dense weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privrec.data.text import UNKNOWN_ID
from privrec.device.batch import Histories
from privrec.device.examples import NoiseRoots
from privrec.device.lessons import (
    ActiveRows,
    ActiveSet,
    Find,
    Network,
    OutputBudget,
    TextBatch,
    spread,
    text_batch_of,
)
from privrec.device.negatives import Functions
from privrec.device.train import Trained
from privrec.device.update import Address, RawUpdate
from privrec.embedding.hashing import splitmix64
from privrec.embedding.table import Table
from privrec.errors import UsageError
from privrec.models.layout import Layout
from privrec.search.index import Sketch
from privrec.search.memory import ItemMemory
from privrec.search.select import Search, Selector, select

FloatArray = NDArray[np.float32]
Items = NDArray[np.int64]

_WINDOW = 0x77_1D_0E


@dataclass(frozen=True)
class WideModel:
    """The shared parameters' meaning: a network whose output neurons lie in a table.

    Args:
        model: the network; of the next-word model, words are read from the same table.
        vectors: where the neurons' vectors lie.
        biases: where the biases of output neurons lie.
        layout: sections of the shared vector.
    """

    model: Network
    vectors: Table
    biases: Table
    layout: Layout

    def searched(self, weights: FloatArray) -> ItemMemory:
        """The neurons as a device searches them.

        Args:
            weights: the shared vector in memory form.
        """
        biases = self.biases, self.layout.biases_of(weights)[:, None]
        return ItemMemory(self.vectors, self.layout.memory_of(weights), biases)


@dataclass(frozen=True)
class LocalSettings:
    """Hyper-parameters of local training.

    Args:
        most: words of a text, or examples, of a device in a round at most; None for all.
        steps: gradient steps, each on a part of them.
        rate: step size.
        selector: how neurons are selected, one of :mod:`privrec.search.select`.
    """

    most: int | None
    steps: int
    rate: float
    selector: Selector | None = None


@dataclass(frozen=True)
class WordTrainer:
    """Local training of one language with one set of hyper-parameters.

    Args:
        language: what is trained.
        output: how many of its neurons, and which.
        practice: how.
    """

    language: WideModel
    output: OutputBudget
    practice: LocalSettings

    def __post_init__(self) -> None:
        budget, shortest = self.output.budget, self.language.model.shortest
        if budget < min(shortest, self.output.words):
            raise UsageError(
                f"train.budget: {budget} of {self.output.words} neurons, and {shortest} words of a "
                "text may all differ; raise it, or lower model.context"
            )

    def train(
        self, weights: FloatArray, text: NDArray[np.int32], user: int, key: int, find: Find | None
    ) -> tuple[RawUpdate, float]:
        """One round on one device.

        Args:
            weights: the shared vector in memory form; not changed.
            text: the device's tokens: a text in reading order, or examples.
            user: whose they are; names its draws.
            key: the round's key, for the window and the neurons drawn by chance.
            find: who selects neurons; None for nobody.

        Returns:
            The change of the shared vector, and the mean loss before it.
        """
        lesson = self.lesson(text, user, key)
        local = _Local(self.language, weights)
        queries = np.zeros((1, self.language.vectors.dim + 1), np.float32)
        if find is not None and self.output.selected:
            queries = self._queries(local, lesson)
        active = self.output.active(lesson.own, queries, find, key, user)
        return local.descend(active, lesson, self.practice)

    def lesson(self, text: NDArray[np.int32], user: int, key: int) -> TextBatch:
        """What the device learns from in a round; arguments as of :meth:`train`."""
        output = self.output
        budget = output.budget if output.budget < output.words else None
        draw = int(splitmix64(key ^ _WINDOW, np.array([user]))[0] >> np.uint64(33))
        return text_batch_of(self.language.model, text, self.practice.most, budget, draw)

    def finder(self, search: Search, functions: Functions | None, user: int) -> Find:
        """The device's own selection from its own memory, by functions of its own.

        Raises:
            UsageError: when there are no secret streams.
        """
        selector = self.practice.selector
        if functions is None or selector is None:
            raise UsageError(
                f'train.selector = "{selector}": hash functions are drawn from a secret; hand '
                "over the devices' streams"
            )
        stream = functions(user)

        def find(queries: FloatArray, wanted: int, without: Items) -> Items:
            return select(selector, search, queries, wanted, stream, exclude=without).items

        return find

    def _queries(self, local: _Local, lesson: TextBatch) -> FloatArray:
        with torch.no_grad():
            hidden = local.hidden(lesson, spread(len(lesson))).numpy()
        hidden = hidden[spread(len(hidden))]
        return np.concatenate((hidden, np.ones((len(hidden), 1), np.float32)), axis=1)


class _Local:
    """A device's copy of the shared vector, of which it changes what its neurons touch."""

    def __init__(self, language: WideModel, weights: FloatArray) -> None:
        self._language, layout = language, language.layout
        self._memory, self._bias_memory = layout.memory_of(weights), layout.biases_of(weights)
        self._dense = torch.from_numpy(layout.dense_of(weights))

    def hidden(self, lesson: TextBatch, part: Items) -> Tensor:
        """Hidden vectors at the start of the round."""
        vectors, memory = self._language.vectors, self._memory
        return lesson.hidden(
            part, lambda words: torch.from_numpy(vectors.gather(memory, words)), self._dense
        )

    def descend(
        self, active: ActiveSet, lesson: TextBatch, practice: LocalSettings
    ) -> tuple[RawUpdate, float]:
        """Gradient steps on parts of the lesson; the change, and the first step's loss."""
        language = self._language
        vectors = _Touched(language.vectors, self._memory, active.items)
        biases = _Touched(language.biases, self._bias_memory[:, None], active.items)
        dense = self._dense.clone().requires_grad_()
        parts = np.array_split(np.arange(len(lesson)), min(practice.steps, len(lesson)))
        first = 0.0
        for number, part in enumerate(parts):
            neurons = ActiveRows(active, vectors.rows(), biases.rows()[:, 0])
            hidden = lesson.hidden(part, neurons.read, dense)
            loss = lesson.loss(part, hidden, neurons)
            loss.backward()  # type: ignore[no-untyped-call]
            for each in (dense, vectors.blocks, biases.blocks):
                _step(each, practice.rate)
            first = first if number else float(loss.detach())
        change = (dense.detach() - self._dense).numpy()
        values = np.concatenate((change, vectors.change(), biases.change()))[None]
        address = Address(vectors.slots[None], biases.slots[None], language.layout)
        return RawUpdate(values, address), first


class _Touched:
    """The memory blocks behind some rows of a table, each once, as trainable numbers."""

    def __init__(self, table: Table, memory: FloatArray, items: Items) -> None:
        located, signs = table.locate(items)
        self.slots, place = np.unique(located, return_inverse=True)
        self._before = memory[self.slots]
        self._shape = (len(items), table.dim)
        self._place = torch.from_numpy(place.reshape(-1))
        self._signs = torch.from_numpy(signs.reshape(-1, 1) * np.float32(table.scale))
        ordered = len(self._place) == len(self.slots) and bool((np.diff(place.ravel()) > 0).all())
        self._plain = ordered and bool((self._signs == 1).all())
        self.blocks = torch.from_numpy(self._before.copy()).requires_grad_()

    def rows(self) -> Tensor:
        """The rows as they are now, shape ``(items, dim)``."""
        if self._plain:
            return self.blocks.reshape(self._shape)
        return (self.blocks[self._place] * self._signs).reshape(self._shape)

    def change(self) -> FloatArray:
        """New blocks minus old ones, in the order of :attr:`slots`, flat."""
        changed: FloatArray = self.blocks.detach().numpy() - self._before
        return changed.ravel()


def _step(values: Tensor, rate: float) -> None:
    with torch.no_grad():
        if values.grad is not None:
            values -= rate * values.grad
            values.grad = None


class RowServer(Protocol):
    """A server that hashes its output columns and hands out neurons by bucket, as a device sees it.

    It takes part in the scheme ``"requested"`` alone, in which it learns what each device asks.
    """

    def hashed(self, items: ItemMemory, key: int) -> RowTables:
        """Hash all columns for one round, by functions that everybody knows.

        Args:
            items: the output layer.
            key: the round's key.
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


@dataclass
class TextCohort:
    """Simulated devices with texts or examples, of one tier, as a simulation asks for learners.

    Args:
        trainer: local training.
        histories: their tokens, in ascending order of their users.
        served: the server's tables, where devices ask for neurons; None where they select alone.
        states: devices keep nothing between rounds, so zeros: shape ``(devices, 1)``.
    """

    trainer: WordTrainer
    histories: Histories
    served: RowServer | None = None
    states: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        self.states = np.zeros((len(self.histories.users), 1), np.float32)

    @property
    def users(self) -> Items:
        """Whose devices they are, ascending."""
        return self.histories.users

    def train(
        self, weights: FloatArray, rows: Items, key: int, functions: Functions | None = None,
        noise: NoiseRoots | None = None,
    ) -> Iterator[tuple[Items, Trained]]:  # fmt: skip
        """See :meth:`privrec.device.cohort.Learners.train`; texts have no noise between steps."""
        if not len(rows):
            return
        trainer, finders = self.trainer, self._finders(weights, key, functions)
        for row in rows:
            text, user = self._text(int(row)), int(self.users[row])
            update, loss = trainer.train(weights, text, user, key, finders(user))
            yield row[None], Trained(update, self.states[row[None]], np.array([loss], np.float32))

    def _finders(
        self, weights: FloatArray, key: int, functions: Functions | None
    ) -> Callable[[int], Find | None]:
        """Who selects neurons for each user."""
        if self.trainer.practice.selector in (None, "uniform") or not self.trainer.output.selected:
            return lambda user: None
        items = self.trainer.language.searched(weights)
        if self.served is not None:
            find = asked_of(self.served.hashed(items, key))
            return lambda user: find
        sketch = Sketch.of(items) if self.trainer.practice.selector == "sketch" else None
        search = Search(items.unfolded(), sketch)
        return lambda user: self.trainer.finder(search, functions, user)

    def _text(self, row: int) -> NDArray[np.int32]:
        """A device's tokens; words and labels that its tier does not hold are unknown to it."""
        histories = self.histories
        tokens = histories.items[histories.indptr[row] : histories.indptr[row + 1]]
        return np.where(tokens < self.trainer.language.vectors.items, tokens, UNKNOWN_ID)


def asked_of(tables: RowTables) -> Find:
    """A device's selection by asking: it names buckets and words, and gets neurons."""

    def find(queries: FloatArray, wanted: int, without: Items) -> Items:
        return tables.neurons(tables.codes(queries), wanted, without)

    return find
