"""Published ways to recommend privately, beside privrec's, at the same ε on MovieLens 1M.

    python scenarios/benchmarks/private_peers.py [--quick] [--only NAME] [--json FILE] [--data DIR]

Each holds all histories in one place and adds Gaussian noise there, at user level (one history
replaced by none) and δ = 1e-5, which is less than the federation of docs/accuracy.md has to add.

- *popularity*: each user ``x / sqrt(n)``, summed.
- *Gram*: popularity, then the sum of ``y yᵀ`` over the popular items, ``y`` the user's centred and
  scaled to 1; of its eigenvalues those above the edge of the noise are kept and shrunk, and
  a user is scored by the projection of the own history. Dwork et al., "Analyze Gauss" (STOC 2014).
- *alternating minimisation*: popularity, then a few steps in which users solve for their vectors,
  cut to the norm 1, and items for theirs from noisy sums of ``w u uᵀ`` and ``w u``, with weights
  ``w`` by the popularity of items, ``Σ w² = 1`` for each user, and from a noisy sum of ``u uᵀ``.
  Chien et al., "Private alternating least squares" (ICML 2021), algorithm 1, and Krichene et al.,
  "Multi-task differential privacy under distribution skew" (ICML 2023), for the weights.

Settings are the best by HR@10 on the validation split, at each ε anew, of those in ``GRIDS``; the
search costs nothing that is accounted, here as there. With times of interactions users are then
scored by histories whose k-th last item counts ``k ** -recency``, of ``RECENCY`` the best. The
table has the test split. `--quick` takes invented data, one ε and one setting.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from _common import document, machine, print_table, write_json
from numpy.typing import NDArray
from scipy.optimize import brentq

from privrec.data import Split, load
from privrec.evaluate import metrics
from privrec.privacy import accountant
from privrec.scenario.load import Scenario

Floats = NDArray[Any]
DELTA = 1e-5
EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0)
POPULARITY = 0.05  # of the squared strength, where more is released after it
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "popularity": {},
    "Gram": {"head": (1000, 2000), "popular": (0.001, 0.002, 0.005, 0.01, 0.02)},
    "alternating minimisation": {
        "dim": (4, 8, 16), "steps": (1, 2, 3), "head": (1000, 2000), "unobserved": (1.0,),
        "power": (0.1, 0.25),
    },
}  # fmt: skip
RECENCY = (0.0, 0.5, 1.0)
COLUMNS = (
    ("name", "what"),
    ("epsilon", "ε"),
    ("hr@10", "HR@10"),
    ("ndcg@10", "NDCG@10"),
    ("full_ndcg@10", "NDCG@10, full"),
    ("settings", "settings"),
)


def noise_multiplier(epsilon: float) -> float:
    """Standard deviation over sensitivity of one Gaussian release that costs ``epsilon``."""
    strength = brentq(lambda mu: accountant.gaussian(mu, DELTA) - epsilon, 1e-3, 1e3)
    return float(1 / strength)


class Histories:
    """Users' histories as a dense matrix, as they are ``served`` too, and noise by a seed."""

    def __init__(self, split: Split, seed: int, recency: float) -> None:
        train = split.train
        self.liked = np.zeros((train.n_users, train.n_items), np.float32)
        self.liked[train.users, train.items] = 1
        ages = train.indptr[train.users + 1] - np.arange(train.size)
        self.served = self.liked.copy()
        self.served[train.users, train.items] = ages.astype(np.float32) ** -recency
        self._rng = np.random.default_rng(seed)

    def noisy(self, total: Floats, deviation: float) -> Floats:
        return np.asarray(total + deviation * self._rng.standard_normal(total.shape), np.float32)

    def counts(self, deviation: float) -> Floats:
        """Noisy sums of ``x / sqrt(n)``, 1 at least."""
        lengths = self.liked.sum(1, keepdims=True)
        return np.maximum(self.noisy((self.liked / np.sqrt(lengths)).sum(0), deviation), 1)


def popularity(data: Histories, sigma: float) -> Floats:
    counts = data.counts(sigma)
    return np.broadcast_to(counts, data.liked.shape)


def gram(data: Histories, sigma: float, *, head: float, popular: float) -> Floats:
    counts = data.counts(sigma / math.sqrt(POPULARITY))
    sigma /= math.sqrt(1 - POPULARITY)
    mean, top = counts / len(data.liked), np.argsort(-counts)[: int(head)]
    scale = (100 * mean[top]) ** -0.15

    def centred(liked: Floats) -> Floats:
        own = scale * (liked[:, top] / np.sqrt(liked.sum(1, keepdims=True)) - mean[top])
        return np.asarray(own / np.linalg.norm(own, axis=1, keepdims=True))

    own, served = centred(data.liked), centred(data.served)
    upper = np.triu(data.noisy(np.zeros((len(top), len(top))), sigma), 1) / math.sqrt(2)
    noise = upper + upper.T + np.diag(data.noisy(np.zeros(len(top)), sigma))
    values, vectors = np.linalg.eigh((own.T @ own).astype(np.float64) + noise)
    kept = values > sigma * math.sqrt(2 * len(top))
    values, vectors = values[kept], vectors[:, kept]
    spread = len(top) * sigma**2
    signal = (values + np.sqrt(values**2 - 2 * spread)) / 2
    weights = signal / (signal + 5) * np.sqrt(1 - spread / (2 * signal**2))
    scores = np.tile(popular * np.log(counts), (len(own), 1))
    scores[:, top] += (served @ vectors * weights) @ vectors.T / scale
    return scores


def alternating(
    data: Histories, sigma: float, *, dim: float, steps: float, head: float, unobserved: float,
    power: float,
) -> Floats:  # fmt: skip
    counts = data.counts(sigma / math.sqrt(POPULARITY))
    # Every step releases three sums; shares of the squared strength say how loud each is.
    sigma *= math.sqrt(steps / (1 - POPULARITY))
    curved, shared, sloped = 0.3, 0.05, 0.65
    top, d = np.argsort(-counts)[: int(head)], int(dim)
    liked = data.liked[:, top]
    weights = liked * counts[top] ** -power
    weights /= np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), 1e-9)
    usual = float(weights.sum() / liked.sum())
    one, other = np.triu_indices(d)
    root2 = np.where(one == other, 1, math.sqrt(2)).astype(np.float32)

    def packed(rows: Floats) -> Floats:
        return np.asarray(rows[:, one] * rows[:, other] * root2)

    def unpacked(sums: Floats) -> Floats:
        full = np.zeros((len(sums), d, d), np.float32)
        full[:, one, other] = full[:, other, one] = sums / root2
        return full

    def positive(matrices: Floats) -> Floats:
        values, vectors = np.linalg.eigh(matrices)
        return np.asarray((vectors * np.maximum(values, 0)[:, None]) @ vectors.swapaxes(1, 2))

    def solved(items: Floats, liked: Floats) -> Floats:
        left = unpacked(liked @ packed(items)) + unobserved * (items.T @ items) + np.eye(d)
        return np.asarray(np.linalg.solve(left, (liked @ items)[:, :, None])[:, :, 0], np.float32)

    items = data.noisy(np.zeros((len(top), d)), 1 / math.sqrt(d))
    for _ in range(int(steps)):
        users = solved(items, liked)
        users /= np.maximum(np.linalg.norm(users, axis=1, keepdims=True), 1e-9)
        products = packed(users)
        own = data.noisy(weights.T @ products, sigma / math.sqrt(curved))
        slopes = data.noisy(weights.T @ users, sigma / math.sqrt(sloped))
        all_users = data.noisy(products.sum(0, keepdims=True), sigma / math.sqrt(shared))
        prior = unobserved * positive(unpacked(all_users)) + 10 * np.eye(d)
        left = positive(unpacked(own)) + usual * prior
        items = np.linalg.solve(left, slopes[:, :, None])[:, :, 0].astype(np.float32)
    scores = np.zeros(data.liked.shape, np.float32)
    scores[:, top] = solved(items, data.served[:, top]) @ items.T
    return scores


WAYS = {"popularity": popularity, "Gram": gram, "alternating minimisation": alternating}


def measured(
    name: str, split: Split, epsilon: float, settings: Mapping[str, float], recency: float = 0.0
) -> dict[str, float]:
    data = Histories(split, 0, recency)
    scores = WAYS[name](data, noise_multiplier(epsilon), **settings)
    return metrics.evaluate(metrics.by_users(lambda users: scores[users]), split, seed=0).summary()


def rows_of(
    splits: Mapping[str, Split], name: str, epsilons: tuple[float, ...], *, quick: bool
) -> Iterator[dict[str, Any]]:
    grid = [dict(zip(GRIDS[name], each, strict=True)) for each in product(*GRIDS[name].values())]
    for epsilon in epsilons:
        tried = [
            (measured(name, splits["validation"], epsilon, each)["hr@10"], each)
            for each in (grid[:1] if quick else grid)
        ]
        _, settings = max(tried, key=lambda pair: pair[0])
        timed = splits["validation"].train.times is not None and not quick
        later = [
            (measured(name, splits["validation"], epsilon, settings, recency)["hr@10"], recency)
            for recency in (RECENCY if timed else RECENCY[:1])
        ]
        _, recency = max(later, key=lambda pair: pair[0])
        told = " ".join(f"{key}={value:g}" for key, value in settings.items())
        told += f" recency={recency:g}" if recency else ""
        found = measured(name, splits["test"], epsilon, settings, recency)
        yield {"name": name, "epsilon": epsilon, **found, "settings": told}
        print(f"{name}, ε = {epsilon:g}: HR@10 {found['hr@10']:.4f} ({told})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="invented data, one setting each")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where MovieLens lies")
    parser.add_argument("--only", default="", metavar="NAME", help="rows whose name has this")
    options = parser.parse_args()
    source = ["data.source=ml-1m"]
    if options.quick:
        source = ["data.source=synthetic", "data.users=200", "data.items=120"]
    splits = {}
    for holdout in ("validation", "test"):
        text = 'name = "private-peers"\n[privacy]\nnoise = "none"\n'
        config = Scenario.from_toml(text, [*source, f"data.holdout={holdout}"]).data
        splits[holdout] = load(config, data_dir=options.data)
    rows = [
        row
        for name in WAYS
        if options.only in name
        for row in rows_of(
            splits, name, EPSILONS[3:4] if options.quick else EPSILONS, quick=options.quick
        )
    ]
    print_table("invented" if options.quick else "MovieLens 1M, test split", COLUMNS, rows)
    if options.json:
        write_json(options.json, document(rows, [], machine("privrec", "numpy", "scipy")))


if __name__ == "__main__":
    main()
