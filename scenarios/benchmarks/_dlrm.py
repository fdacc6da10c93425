"""DLRM: dense features, many categories, and the products of their embeddings.

Source: Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation
Systems" (2019); the sizes of its networks are those of MLPerf's training benchmark.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privrec.errors import UsageError
from privrec.randomness import rng_for

MLPERF_BOTTOM = (512, 256, 128)
MLPERF_TOP = (1024, 1024, 512, 256)
DENSE, TABLES = 13, 26
"""Numbers of dense features and of categories in Criteo's click logs."""


class DLRM(nn.Module):
    """A click's logit from dense features and categories.

    Args:
        sizes: rows of each table.
        dense: number of dense features.
        bottom: widths of the network over dense features; the last one is that of embeddings.
        top: widths of the network over products, before its single output.
        weights: the tables to use in place, each of shape ``(rows, width)``, so that large ones
            need not be made twice; drawn when None.
        seed: of the first weights.

    Raises:
        UsageError: when there is no table, or no width.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        dense: int = DENSE,
        bottom: Sequence[int] = MLPERF_BOTTOM,
        top: Sequence[int] = MLPERF_TOP,
        weights: Sequence[Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not sizes or not bottom:
            raise UsageError("a DLRM without tables or without widths: it needs at least one each")
        width, rng = bottom[-1], rng_for(seed, "dlrm")
        made = weights or [_uniform(rng, (rows, width), rows) for rows in sizes]
        self.tables = nn.ModuleList(
            nn.EmbeddingBag.from_pretrained(table, freeze=False, mode="sum") for table in made
        )
        self.bottom = _network(rng, dense, bottom, last=nn.ReLU())
        vectors = len(sizes) + 1
        products = vectors * (vectors - 1) // 2
        self.top = _network(rng, width + products, (*top, 1))
        first, second = torch.tril_indices(vectors, vectors, -1)
        self.register_buffer("_pairs", first * vectors + second, persistent=False)

    def forward(self, dense: Tensor, categories: Tensor) -> Tensor:
        """Logits of shape ``(batch,)``.

        Args:
            dense: shape ``(batch, features)``.
            categories: rows of each table, shape ``(batch, tables, lookups)``.
        """
        x = self.bottom(dense)
        pooled = [table(categories[:, i]) for i, table in enumerate(self.tables)]
        vectors = torch.stack([x, *pooled], 1)
        products = (vectors @ vectors.mT).flatten(1).index_select(1, self.get_buffer("_pairs"))
        return torch.as_tensor(self.top(torch.cat([x, products], 1))[:, 0])


@dataclass(frozen=True)
class Clicks:
    """A seeded stream of the shape of Criteo's click logs, with something to learn.

    Each category has a hidden effect on the click, by a keyed hash, so that nothing of the size of
    a table is held. Categories follow Zipf's law or are uniform.

    Args:
        sizes: rows of each table.
        lookups: rows a table that an example has, at least 1.
        zipf: exponent of the popularity of rows, 0 for uniform.
        seed: of everything.
    """

    sizes: tuple[int, ...]
    lookups: int = 1
    zipf: float = 1.0
    seed: int = 0

    def batches(self, size: int, count: int, *, part: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """``count`` batches of dense features, categories and clicks; parts are independent."""
        rng = rng_for(self.seed, "clicks", part)
        slope = rng_for(self.seed, "slope").normal(0, 0.3, DENSE)
        for _ in range(count):
            dense = rng.standard_normal((size, DENSE)).astype(np.float32)
            rows = [self._rows(rng, n, (size, self.lookups)) for n in self.sizes]
            effects = sum(_effect(table, each, self.seed) for table, each in enumerate(rows))
            logit = dense @ slope + effects / np.sqrt(len(rows)) * 2
            clicks = rng.random(size) < 1 / (1 + np.exp(-logit))
            categories = torch.from_numpy(np.stack(rows, 1))
            yield torch.from_numpy(dense), categories, torch.from_numpy(clicks.astype(np.float32))

    def _rows(self, rng: np.random.Generator, n: int, shape: tuple[int, int]) -> NDArray[np.int64]:
        if not self.zipf:
            return np.asarray(rng.integers(0, n, shape))
        u = rng.random(shape)
        if self.zipf == 1:
            places = np.exp(u * np.log(n + 1)) - 1
        else:
            power = 1 - self.zipf
            places = (u * ((n + 1) ** power - 1) + 1) ** (1 / power) - 1
        return np.asarray(np.minimum(places, n - 1).astype(np.int64))


def _effect(table: int, rows: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """An effect in [-1, 1] for each row, the mean over an example's rows."""
    mixed = (rows.astype(np.uint64) + np.uint64(1 + table * 0x9E37 + seed)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    mixed ^= mixed >> np.uint64(29)
    return np.asarray(((mixed >> np.uint64(11)) * 2.0**-52 - 1).mean(1))


def _network(
    rng: np.random.Generator, inputs: int, widths: Sequence[int], last: nn.Module | None = None
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip((inputs, *widths), widths, strict=False):
        layer = nn.utils.skip_init(nn.Linear, before, after)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            layer.weight.copy_(_uniform(rng, (after, before), before))
            layer.bias.copy_(_uniform(rng, (after,), before))
        layers += [layer, nn.ReLU()]
    layers[-1:] = [last] if last is not None else []
    return nn.Sequential(*layers)


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], inputs: int) -> Tensor:
    """First weights within one over the root of the inputs, as PyTorch has them."""
    drawn = rng.random(shape, np.float32)
    return torch.from_numpy((2 * drawn - 1) * np.float32(inputs**-0.5))
