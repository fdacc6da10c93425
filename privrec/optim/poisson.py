"""Poisson batches, which the accounting of DP-SGD assumes: each example is in at a fixed rate."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from privrec.errors import UsageError
from privrec.randomness import ROOT_BYTES, SecretRoot

_WORD = 2**32


class PoissonSampler(Sampler[list[int]]):
    """Batches of examples that are each in with probability ``rate``, independently.

    Promise: coins come from the secure generator; the rate is never above the one given (it is
    rounded down to a multiple of 2^-32). Batches may be empty, and must be stepped on all the same.

    Args:
        examples: how many there are, at least 1.
        rate: above 0, at most 1.
        steps: batches in one pass over the sampler, at least 1.
        root: the secret to draw from; one is drawn from the operating system when None.

    Raises:
        UsageError: when a value is outside its range.
    """

    def __init__(
        self, examples: int, rate: float, steps: int, root: SecretRoot | None = None
    ) -> None:
        if not (examples >= 1 and 0 < rate <= 1 and steps >= 1):
            raise UsageError(
                f"{steps} Poisson batches at rate {rate} of {examples} examples: there must be at "
                "least one of each, and the rate above 0 and at most 1"
            )
        self._examples, self._steps, self._below = examples, steps, int(rate * _WORD)
        self._root = root or SecretRoot(secrets.token_bytes(ROOT_BYTES))
        self._drawn = 0

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self._steps):
            self._drawn += 1
            coins = self._root.stream("poisson batch", self._drawn).uint32(self._examples)
            yield np.flatnonzero(coins.astype(np.int64) < self._below).tolist()


def poisson_loader(
    dataset: Dataset[Any], rate: float, steps: int, *, root: SecretRoot | None = None
) -> DataLoader[Any]:
    """A loader of Poisson batches of a map-style data set.

    An empty batch has the structure of a full one, with tensors of length 0 and lists without
    texts. ``rate``, ``steps`` and ``root`` are those of :class:`PoissonSampler`.

    Args:
        dataset: with a length and at least one example, of what ``default_collate`` takes.

    Raises:
        UsageError: when a value is outside its range, or examples cannot be put into a batch.
    """
    if not isinstance(dataset, Sized):
        raise UsageError(
            f"Poisson batches of {type(dataset).__name__}: each example has a coin of its own, "
            "which needs a data set with a length and an index"
        )
    sampler = PoissonSampler(len(dataset), rate, steps, root)
    first = [dataset[0]]
    try:
        default_collate(first)
    except (TypeError, RuntimeError) as error:
        raise UsageError(
            f"examples that cannot be put into a batch: {error} Make each of tensors, numbers, "
            "texts, and tuples, lists or mappings of those"
        ) from error

    def made(examples: list[Any]) -> Any:
        return default_collate(examples) if examples else collate(first, collate_fn_map=_EMPTY)

    return DataLoader(dataset, batch_sampler=sampler, collate_fn=made)


def _emptied(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(batch: Any, **options: Any) -> Any:
        return make(batch, **options)[:0]

    return made


_EMPTY = {kind: _emptied(make) for kind, make in default_collate_fn_map.items()}
