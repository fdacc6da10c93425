"""Catalogues to search: Gaussian clusters, and weights learned behind a ReLU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable
from privrec.search.memory import ItemMemory

DIM = 128


@dataclass(frozen=True)
class Searched:
    """A catalogue and queries to it."""

    name: str
    items: ItemMemory
    queries: np.ndarray


def isotropic(n: int, compression: float, queries: int) -> Searched:
    """A random memory, as small as that of a weak device."""
    table, rng = Subspace.sized(n, DIM, block=32, key=1, compression=compression), _rng(1)
    memory = rng.standard_normal((table.slots, 32), dtype=np.float32)
    return Searched(
        "random", ItemMemory(table, memory), rng.standard_normal((queries, DIM), dtype=np.float32)
    )


def clusters(n: int, queries: int, groups: int = 200) -> Searched:
    """Items around random centres; a query lies around one too."""
    rng = _rng(2)
    centres = rng.standard_normal((groups, DIM), dtype=np.float32)

    def drawn(count: int) -> np.ndarray:
        near = centres[rng.integers(0, groups, count)]
        return near + 0.7 * rng.standard_normal((count, DIM), dtype=np.float32)

    table = PlainTable.of(n, DIM, block=32)
    return Searched("clusters", ItemMemory(table, drawn(n).reshape(-1, 32)), drawn(queries))


def learned(n: int, steps: int, queries: int, compression: float = 1.0) -> Searched:
    """A wide output layer in a hashed memory, trained on planted classes.

    Inputs are noisy and sparse codes of their labels; one hidden layer with a ReLU, softmax over
    all outputs. Queries are activations of inputs that were not trained on.
    """
    rng, generator = _rng(3), torch.Generator().manual_seed(3)
    table = Subspace.sized(n, DIM, block=32, key=1, compression=compression)
    slots, signs = (torch.from_numpy(part) for part in table.locate(np.arange(n)))
    words, latent = 512, 16
    topics = torch.from_numpy(rng.standard_normal((latent, words)).astype(np.float32))
    tastes = torch.from_numpy(rng.standard_normal((n, latent)).astype(np.float32))
    popular = torch.from_numpy(1.0 / np.arange(1, n + 1)).float().pow(0.5)

    def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.multinomial(popular, count, replacement=True, generator=generator)
        noise = torch.randn(count, words, generator=generator) / 2
        return torch.relu(tastes[labels] @ topics / latent**0.5 + noise - 1), labels

    hidden = torch.nn.Parameter(torch.randn(words, DIM, generator=generator) / words**0.5)
    memory = torch.nn.Parameter(torch.randn(table.slots, 32, generator=generator) * 0.01)
    optimizer = torch.optim.Adam([hidden, memory], lr=3e-3)
    for _ in range(steps):
        inputs, labels = batch(256)
        rows = (memory[slots] * signs[..., None]).reshape(n, DIM)
        loss = torch.nn.functional.cross_entropy(torch.relu(inputs @ hidden) @ rows.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        asked = torch.relu(batch(queries)[0] @ hidden).numpy()
    return Searched("learned", ItemMemory(table, memory.detach().numpy()), asked)


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
