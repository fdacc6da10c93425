"""The public list of a run's items: what each row of the model stands for.

It is written, signed, before the first round, so that the model can be served without the data that
it was trained on. It holds no user and no history.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from privrec.data.interactions import position_of
from privrec.errors import IntegrityError
from privrec.run.checkpoint import read_signed, write_signed

CATALOGUE, _KIND = "catalogue.safetensors", "item catalogue"
Order = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The ``n`` items of a model, in the order of its rows.

    Attributes:
        ids: [n] the data set's own, int64 or objects that are str; none of words and labels, which
            may be private.
        titles: n titles, or None where the data has none.
        order: int64 [n], the place of each item in the data, or None where it is the same.
        features: float32 [n, q], public ones that devices weigh, or None.
    """

    ids: NDArray[Any]
    titles: Sequence[str] | None = None
    order: Order | None = None
    features: NDArray[np.float32] | None = None

    @property
    def size(self) -> int:
        """Number of items."""
        return int(self.ids.size)

    def write(self, folder: Path, key: Ed25519PrivateKey) -> None:
        """Write ``catalogue.safetensors``, signed; it is durable before this returns."""
        arrays: Arrays = {} if self.order is None else {"order": self.order}
        if self.features is not None:
            arrays["features"] = self.features
        if self.ids.dtype.kind == "i":
            arrays["ids"] = self.ids
        else:
            arrays |= _packed("ids", self.ids.tolist())
        if self.titles is not None:
            arrays |= _packed("titles", self.titles)
        write_signed(folder / CATALOGUE, _KIND, {}, arrays, key)

    @classmethod
    def read(cls, folder: Path, key: Ed25519PublicKey) -> Self:
        """Return the catalogue that the run with this key left in ``folder``.

        An IntegrityError says that it is gone, or not as the run wrote it.
        """
        _, arrays = read_signed(folder / CATALOGUE, _KIND, key)
        ids, titles = arrays.get("ids"), _unpacked("titles", arrays)
        if ids is None:
            ids = np.array(_unpacked("ids", arrays), object)
        if titles is not None and len(titles) != ids.size:
            raise IntegrityError(
                f"{folder / CATALOGUE}: {len(titles)} titles of {ids.size} items; restore the file"
            )
        features = arrays.get("features")
        if features is not None and (len(features) != ids.size or features.dtype != np.float32):
            raise IntegrityError(
                f"{folder / CATALOGUE}: features of {len(features)} items of {ids.size}; restore "
                "the file"
            )
        return cls(ids, titles, arrays.get("order"), features)

    @cached_property
    def rows(self) -> Mapping[str, int]:
        """The row of each item by its id, as text."""
        return {str(name): row for row, name in enumerate(self.ids.tolist())}

    def positions(self, names: Iterable[int | str]) -> Order:
        """Return the rows of items by their ids; UnknownIdError for one that is none."""
        wanted = [str(name) for name in names]
        for name in wanted:
            if name not in self.rows:
                position_of(name, self.ids, "item")
        return np.array([self.rows[name] for name in wanted], np.int64)


def write_order(folder: Path, order: Order, key: Ed25519PrivateKey) -> None:
    """Write what the server of a deployment knows of the items, which is their order."""
    Catalogue(np.empty(0, np.int64), order=order).write(folder, key)


def read_order(folder: Path, items: int, key: Ed25519PublicKey) -> Order:
    """Return the order of the run in ``folder``; an IntegrityError says that it is not its own."""
    order, rows = Catalogue.read(folder, key).order, np.arange(items)
    if order is None or order.dtype != np.int64 or not np.array_equal(np.sort(order), rows):
        raise IntegrityError(
            f"{folder / CATALOGUE}: no order of the {items} items of this data; use the data that "
            "the run was started with, or restore the file"
        )
    return order


def _packed(name: str, texts: Iterable[str]) -> Arrays:
    """Texts as arrays: their UTF-8, one after the other, and where each ends."""
    parts = [text.encode() for text in texts]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return {f"{name}.text": np.frombuffer(b"".join(parts), np.uint8), f"{name}.ends": ends}


def _unpacked(name: str, arrays: Mapping[str, NDArray[Any]]) -> list[str] | None:
    """Texts of such arrays; None where there are none of this name."""
    if f"{name}.ends" not in arrays:
        return None
    text, ends = arrays[f"{name}.text"].tobytes(), arrays[f"{name}.ends"].tolist()
    return [text[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]
