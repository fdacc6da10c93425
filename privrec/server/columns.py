"""The server's half of adaptive sparse training by request: tables over its output columns.

Each round the server hashes every output neuron by functions that it publishes. A device hashes its
hidden states by the same functions, sends the buckets that they fall into and the words of its
text, and gets those neurons. So the server learns the words of each device's text by name and the
directions of its hidden states: no noise on a sum undoes that.
Source: Xu et al., "Adaptive sparse federated learning in large output spaces via hashing" (2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privrec.device.samples import Find
from privrec.randomness import SecretRoot
from privrec.search.hashing import Buckets, Shape, Signs, projection
from privrec.search.memory import ItemMemory

FloatArray = NDArray[np.float32]
Items = NDArray[np.int64]
Codes = NDArray[np.uint16]

TABLES = 8
_LOAD = 48  # neurons in a bucket, about: what the hidden states of a device share brings enough
_MOST_BITS = 16
_PUBLIC = b"output columns are hashed by functions that everybody knows"


@dataclass
class ServerView:
    """Counts of what the server has seen of devices so far.

    They named ``words``, of their text and common ones, and were handed ``neurons`` beside.
    """

    requests: int = 0
    buckets: int = 0
    words: int = 0
    neurons: int = 0


def shape_of(neurons: int) -> Shape:
    """Return the bits of a code: buckets hold a few dozen neurons."""
    bits = round(np.log2(max(2.0, neurons / _LOAD)))
    return Shape(min(_MOST_BITS, max(1, bits)))


@dataclass
class ColumnServer:
    """A server that hashes its columns anew each round, once for all devices, into ``tables``."""

    tables: int = TABLES
    sight: ServerView = field(default_factory=ServerView)
    _last: tuple[ItemMemory, int, Columns] | None = field(default=None, init=False)

    def hashed(self, items: ItemMemory, key: int) -> Columns:
        """Hash all columns for the round of a key; asked again for the same, give the same."""
        if self._last is not None and self._last[0] is items and self._last[1] == key:
            return self._last[2]
        shape = shape_of(items.items)
        stream = SecretRoot.known(_PUBLIC).stream("columns", key)
        drawn = [projection("simhash", items.dim, shape, stream) for _ in range(self.tables)]
        tables = tuple(Buckets.of(items, Signs(each, shape)) for each in drawn)
        columns = Columns(tables, items.items, self.sight)
        self._last = items, key, columns
        return columns

    def ask(self, items: ItemMemory, key: int) -> Find:
        """What a device selects neurons by in the round of a key: both halves of a request."""
        columns = self.hashed(items, key)
        return lambda queries, count, named: columns.neurons(columns.codes(queries), count, named)


@dataclass(frozen=True)
class Columns:
    """The tables of one round; what the server sees of requests is counted in ``sight``."""

    tables: tuple[Buckets, ...]
    neurons_held: int
    sight: ServerView

    def codes(self, queries: FloatArray) -> list[Codes]:
        """The device's half: buckets of its hidden states, each once, for every table."""
        return [np.unique(table.hashed.codes(queries)[:, 0]) for table in self.tables]

    def neurons(self, buckets: Sequence[Codes], wanted: int, named: Items) -> Items:
        """The server's half: neurons in the asked buckets beside the named ones, ascending.

        Those in the most buckets are wanted first; of equally many, the more common words.
        """
        hits = np.zeros(self.neurons_held, np.int32)
        for table, codes in zip(self.tables, buckets, strict=True):
            for found in table.lists(codes):
                hits[found] += 1
        hits[named] = 0
        found = np.flatnonzero(hits)
        if len(found) > wanted:
            found = np.sort(found[np.argsort(-hits[found], kind="stable")[:wanted]])
        self.sight.requests += 1
        self.sight.buckets += sum(map(len, buckets))
        self.sight.words += len(named)
        self.sight.neurons += len(found)
        return found
