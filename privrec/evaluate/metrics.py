"""How good a ranking is: HR@k, NDCG@k and Recall@k, per user, with bootstrap intervals.

Two protocols. ``sampled``: the held-out item among 99 items that the user has not seen (He et al.,
"Neural Collaborative Filtering", WWW 2017). ``full``: the held-out items among the whole catalogue
less what the user trained on (He et al., "LightGCN", SIGIR 2020). Ties and scores that are not
numbers count against the held-out item, so a constant model earns nothing.

Segments split the same figures by activity of the user and popularity of the item, since a mean
over users hides whom noise hurts: light users and rare items lose first. Baselines are recommenders
that are trained where all histories lie in one place, without privacy or devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg, sparse
from scipy.sparse.linalg import svds

from privrec.data.interactions import Interactions, ItemLists, Split
from privrec.errors import DataError, UsageError
from privrec.randomness import rng_for
from privrec.workers import forked

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]
Protocols = Sequence[Literal["sampled", "full"]]

NEGATIVES = 99
_SPARE = 64  # candidates drawn beyond twice what is needed, so that few users need a second draw
_BLOCK = 1024  # users whose negatives come from one generator, whatever the chunk
_CELLS = 1 << 22  # resampled users held at a time
_SCORES = 1 << 24  # scores of users over the whole catalogue held at a time
_ABSENT = -1


Scores = Callable[[NDArray[np.integer], NDArray[np.integer] | None], NDArray[np.floating]]
"""A recommender as the metrics see it: from users ``(m,)`` and candidates ``(m, c)``, or None for
the whole catalogue, to scores of the candidates' shape; larger is better."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics of each of the ``m`` users, or texts, that were measured.

    Attributes:
        values: ``hr@k`` and ``ndcg@k`` of the sampled protocol, ``full_hr@k``, ``full_ndcg@k`` and
            ``full_recall@k`` of full ranking; of texts the sum over their positions.
        sizes: positions of each text; None where each user counts once.
        losses: summed negative log-likelihood of each text, or None.
    """

    users: Int64Array
    values: Mapping[str, Float64Array]
    sizes: Int64Array | None = None
    losses: Float64Array | None = None

    @classmethod
    def nobody(cls) -> Evaluation:
        """Return the evaluation of no users, which has no metrics."""
        return cls(np.empty(0, np.int64), {})

    def summary(self) -> dict[str, float]:
        """Return the mean of each metric, in [0, 1], and the perplexity where losses are known."""
        if self.sizes is None:
            return {name: float(values.mean()) for name, values in self.values.items()}
        size = max(1, int(self.sizes.sum()))
        found = {name: float(values.sum() / size) for name, values in self.values.items()}
        if self.losses is not None:
            found["perplexity"] = float(np.exp(min(50.0, self.losses.sum() / size)))
        return found

    def intervals(
        self, seed: int, *, level: float = 0.95, draws: int = 1000
    ) -> dict[str, tuple[float, float]]:
        """Return percentile bootstrap intervals of the means, users resampled with replacement.

        With the coverage ``level`` they tell how much depends on who was measured; the spread over
        training runs is another matter.
        """
        if not self.users.size:
            return {}
        rng, size = rng_for(seed, "metrics", "bootstrap"), self.users.size
        sizes = np.ones(size, np.int64) if self.sizes is None else self.sizes
        table, means = np.stack(list(self.values.values()), axis=1), []
        step = max(1, _CELLS // size)
        for at in range(0, draws, step):
            rows = min(step, draws - at)
            chosen = rng.integers(0, size, (rows, size)) + np.arange(rows)[:, None] * size
            counts = np.bincount(chosen.ravel(), minlength=rows * size).reshape(rows, size)
            means.append(counts @ table / np.maximum(1, counts @ sizes)[:, None])
        edge = (1.0 - level) / 2
        low, high = np.quantile(np.concatenate(means), [edge, 1.0 - edge], axis=0)
        return {name: (float(low[at]), float(high[at])) for at, name in enumerate(self.values)}


def evaluate(
    scores: Scores,
    split: Split,
    *,
    seed: int,
    k: Sequence[int] = (10,),
    protocols: Protocols = ("sampled", "full"),
    chunk: int = 512,
    users: NDArray[np.integer] | None = None,
    workers: int = 1,
) -> Evaluation:
    """Measure a recommender on what a split holds out.

    The sampled protocol uses the published candidates of a split that has them, without those
    that are items of the user; otherwise 99 distinct items, uniform among those in neither the
    user's training nor held-out items (fewer where there are not so many). Its metrics are left
    out when some user holds out several items. The negatives of a user depend on the seed and
    that user alone, not on ``chunk``, the most users scored at a time, or ``users``.

    Args:
        k: lengths of the list.
        users: positions, or None for all; those without held-out items are skipped, and DataError
            is raised when nobody is left.
        workers: processes that score them, for the same figures.
    """
    measured = holding_out(split.heldout, users)
    sampled = _Candidates(split, seed) if "sampled" in protocols and split.heldout.single else None
    step = max(1, min(chunk, _SCORES // split.train.n_items))

    def measure(at: int) -> dict[str, Float64Array]:
        part, values = measured[at : at + step], dict[str, Float64Array]()
        if sampled is not None:
            values |= _sampled(scores, sampled, part, k)
        if "full" in protocols:
            values |= _full(scores, split, part, k)
        return values

    starts = range(0, measured.size, step)
    shares = forked(workers, lambda take: {n: measure(at) for n, at in take(starts)})
    found = [part for _, part in sorted(chain.from_iterable(map(dict.items, shares)))]
    together = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    return Evaluation(measured, together)


def holding_out(heldout: ItemLists, users: NDArray[np.integer] | None) -> Int64Array:
    """Return those among some users, or all, who hold out an item; :class:`DataError` for none."""
    chosen = np.arange(heldout.counts.size) if users is None else np.asarray(users, np.int64)
    found = chosen[heldout.counts[chosen] > 0]
    if not found.size:
        raise DataError(
            "no user holds out an item: metrics need a user with at least two different items; "
            "use data that has such users"
        )
    return found


def some(users: Int64Array, most: int, seed: int) -> Int64Array:
    """Return at most so many of the users, ascending, each as likely as any."""
    if most >= users.size:
        return users
    return np.sort(rng_for(seed, "metrics", "users").choice(users, most, replace=False))


def _sampled(
    scores: Scores, candidates: _Candidates, users: Int64Array, k: Sequence[int]
) -> dict[str, Float64Array]:
    items = candidates.of(users)
    present = items != _ABSENT
    given = np.asarray(scores(users, np.where(present, items, items[:, :1])))
    target, others = given[:, :1], given[:, 1:]
    # "not below" rather than "at least": a comparison with NaN is false, and counts against.
    better = (~(others < target) & present[:, 1:]).sum(axis=1)
    gain = 1.0 / np.log2(better + 2.0)
    return {f"hr@{size}": (better < size).astype(np.float64) for size in k} | {
        f"ndcg@{size}": np.where(better < size, gain, 0.0) for size in k
    }


def _full(
    scores: Scores, split: Split, users: Int64Array, k: Sequence[int]
) -> dict[str, Float64Array]:
    wanted = rows, _ = split.heldout.rows_of(users)
    table = np.array(scores(users, None), dtype=np.float32, order="C")
    most = max(k)
    better = _better(table, split.train.rows_of(users), wanted, most)
    counts = np.bincount(rows, minlength=users.size)
    ideal = np.cumsum(1.0 / np.log2(np.arange(most) + 2.0))  # all held-out items come first
    found: dict[str, Float64Array] = {}
    for size in k:
        hits = better < size
        total = np.bincount(rows, hits, users.size)
        gains = np.bincount(rows, hits / np.log2(better + 2.0), users.size)
        found[f"full_hr@{size}"] = (total > 0).astype(np.float64)
        found[f"full_ndcg@{size}"] = gains / ideal[np.minimum(counts, size) - 1]
        found[f"full_recall@{size}"] = total / counts
    return found


Places = tuple[NDArray[np.integer], NDArray[np.integer]]
"""Items of some users: for each its user's place among them, and it."""


def _better(table: Float32Array, seen: Places, wanted: Places, most: int) -> NDArray[np.integer]:
    """How many other items score at least as much as each wanted one, cut at ``most``.

    In the table of scores, items that were seen get minus infinity, and no numbers infinity.
    """
    scored = table[wanted]
    scored[np.isnan(scored)] = -np.inf
    table[np.isnan(table)] = np.inf
    table[seen] = -np.inf
    best = torch.topk(torch.from_numpy(table), min(most + 1, table.shape[1]), sorted=False).values
    above = (best.numpy()[wanted[0]] >= scored[:, None]).sum(axis=1)
    return np.where(np.isneginf(scored), most, np.maximum(above - 1, 0))


def figures(table: Float32Array, seen: Places, wanted: Places, k: int) -> Float64Array:
    """Return loss, hits and count of each user, shape ``(m, 3)``, each in [0, 1].

    They are means over what the user holds out, by scores ``(m, n)`` of all items: cross-entropy
    in the softmax over what the user has not trained on, over :func:`largest_loss`, where it is
    cut; and the share among the ``k`` best. The count is 1, or 0 of who holds out nothing.
    """
    (rows, targets), users = wanted, len(table)
    hits = _better(table, seen, wanted, k) < k
    logs = torch.logsumexp(torch.from_numpy(table), 1).numpy()
    with np.errstate(invalid="ignore"):
        losses = (logs[rows] - table[rows, targets]) / largest_loss(table.shape[1])
    losses = np.nan_to_num(losses, nan=1.0, posinf=1.0, neginf=1.0).clip(0, 1)
    counts = np.bincount(rows, minlength=users)
    sums = [np.bincount(rows, each, users) for each in (losses, hits)]
    return np.stack([*(each / np.maximum(1, counts) for each in sums), counts > 0], axis=1)


def largest_loss(items: int) -> float:
    """Return where the cross-entropy of a user is cut: twice that of a guess among all items."""
    return 2 * math.log(max(2, items))


class _Candidates:
    """The held-out item, of which there is at most one, and the negatives of each user."""

    def __init__(self, split: Split, seed: int) -> None:
        self._split, self._seed = split, seed

    def of(self, users: Int64Array) -> Int64Array:
        """int64 [m, 100]: the held-out item first; -1 where there is no candidate."""
        target = self._split.heldout.items[self._split.heldout.indptr[users]].astype(np.int64)
        if self._split.negatives is not None:
            negatives = self._split.negatives[users].astype(np.int64)
            own = self._known(users, np.maximum(negatives, 0), target)
            negatives[own] = _ABSENT
        else:
            negatives = np.empty((users.size, NEGATIVES), np.int64)
            for block in np.unique(users // _BLOCK).tolist():
                here = users // _BLOCK == block
                negatives[here] = self._drawn(block, users[here])
        return np.concatenate([target[:, None], negatives], axis=1)

    def _known(self, users: Int64Array, items: Int64Array, target: Int64Array) -> NDArray[np.bool_]:
        """Whether items [m, c] are no negatives of their user."""
        seen = self._split.train.contains(users[:, None], items)
        return np.asarray(seen | (items == target[:, None]))

    def _drawn(self, block: int, users: Int64Array) -> NDArray[np.int32]:
        """Negatives of users of a block: the first 99 good ones of a long uniform sequence."""
        rng = rng_for(self._seed, "metrics", "negatives", block)
        train, lists = self._split.train, self._split.heldout
        everybody = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, train.n_users))
        target = np.full(users.size, _ABSENT, np.int64)
        has = lists.counts[users] > 0
        target[has] = lists.items[lists.indptr[users[has]]]
        items = rng.integers(0, train.n_items, (everybody.size, 2 * NEGATIVES + _SPARE))
        items = items[users - everybody[0]]
        good = ~self._known(users, items, target) & ~_repeated(items)
        place = np.cumsum(good, axis=1)
        enough = place[:, -1] >= NEGATIVES
        chosen = np.empty((users.size, NEGATIVES), np.int32)
        chosen[enough] = items[enough][(good & (place <= NEGATIVES))[enough]].reshape(-1, NEGATIVES)
        short = np.flatnonzero(~enough)
        if short.size and users.size < everybody.size:
            # What is drawn for them follows in the block's order, whoever is asked for.
            return np.asarray(self._drawn(block, everybody)[users - everybody[0]], np.int32)
        step = max(1, _CELLS // train.n_items)
        for at in range(0, short.size, step):
            part = short[at : at + step]
            chosen[part] = self._draw_exactly(rng, users[part], target[part])
        return chosen

    def _draw_exactly(
        self, rng: np.random.Generator, users: Int64Array, target: Int64Array
    ) -> Int64Array:
        """Negatives of users who have seen much of the catalogue; -1 when it runs out."""
        n_items = self._split.train.n_items
        items = np.broadcast_to(np.arange(n_items), (users.size, n_items))
        keys = rng.random(items.shape)
        keys[self._known(users, items, target)] = np.inf
        order = np.argsort(keys, axis=1)[:, :NEGATIVES]
        order[np.isinf(np.take_along_axis(keys, order, axis=1))] = _ABSENT
        short = NEGATIVES - order.shape[1]
        return np.pad(order, ((0, 0), (0, short)), constant_values=_ABSENT)


def _repeated(items: Int64Array) -> NDArray[np.bool_]:
    """Marks every value of a row that occurred earlier in it."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    again = np.zeros(items.shape, np.bool_)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    marks = np.empty_like(again)
    np.put_along_axis(marks, order, again, axis=1)
    return marks


FEWEST = 20
"""A segment of fewer users is left out: its mean would tell of single ones."""
HEAD = 0.8
"""Share of all interactions that the popular items have between them."""


def by_segment(evaluated: Evaluation, split: Split) -> list[dict[str, Any]]:
    """Return metrics of light, medium and heavy users, and of users who hold out popular items.

    Activity is cut at the terciles of the measured users' history lengths. An item is popular when
    it is one of the most frequent that have :data:`HEAD` of the interactions together; a user goes
    by the first item held out. They come from private data without noise.
    """
    if not evaluated.users.size:
        return []
    lengths = np.diff(split.train.indptr)[evaluated.users]
    low, high = np.quantile(lengths, [1 / 3, 2 / 3])
    counts = split.train.item_counts()
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    head = np.zeros(counts.size, np.bool_)
    head[order[before < HEAD * counts.sum()]] = True
    popular = head[split.heldout.items[split.heldout.indptr[evaluated.users]]]
    segments = (
        ("activity", f"light, up to {low:.0f} items", lengths <= low),
        ("activity", "medium", (lengths > low) & (lengths <= high)),
        ("activity", f"heavy, above {high:.0f} items", lengths > high),
        ("item popularity", "a popular item held out", popular),
        ("item popularity", "a rare item held out", ~popular),
    )
    return [
        {
            "by": by,
            "name": name,
            "share": round(float(chosen.mean()), 2),
            "metrics": {key: float(each[chosen].mean()) for key, each in evaluated.values.items()},
        }
        for by, name, chosen in segments
        if chosen.sum() >= FEWEST
    ]


# --------------------------------------------------------------------------- baselines

EASE_USERS = 12_000
"""Most users that EASE is solved for; it needs a matrix of their square."""
EASE_L2 = 300.0
"""Ridge penalty of EASE, in the middle of what its paper reports for catalogues of many sizes."""


def check(name: str, train: Interactions, *, dim: int) -> None:
    """Raise UsageError for a baseline that so many users, items or dimensions do not allow."""
    if name == "pure_svd" and dim >= min(train.n_users, train.n_items):
        raise UsageError(
            f"pure_svd of {dim} factors: {train.n_users} users and {train.n_items} items have no "
            "more; lower model.dim or leave it out of run.baselines"
        )
    if name == "ease" and train.n_users > EASE_USERS:
        raise UsageError(
            f"ease with {train.n_users} users: it is solved for at most {EASE_USERS}; "
            "leave it out of run.baselines"
        )


def scores_of(name: str, train: Interactions, *, dim: int, seed: int) -> Scores:
    """Train the baseline ``"popularity"``, ``"pure_svd"`` or ``"ease"``; see :func:`check`."""
    check(name, train, dim=dim)
    if name == "popularity":
        return popularity_scores(train)
    return pure_svd(train, dim, seed) if name == "pure_svd" else ease(train)


def popularity_scores(train: Interactions) -> Scores:
    """Rank items by how many users have them; position tells equally popular ones apart."""
    counts = train.item_counts()
    ranks = np.empty(counts.size, np.float32)
    ranks[np.argsort(counts, kind="stable")] = np.arange(counts.size)
    return by_users(lambda users: np.broadcast_to(ranks, (len(users), ranks.size)))


def pure_svd(train: Interactions, dim: int, seed: int) -> Scores:
    """Truncate the SVD of the 0/1 matrix (Cremonesi, Koren & Turrin, RecSys 2010)."""
    start = rng_for(seed, "baselines", "pure_svd").normal(size=min(train.n_users, train.n_items))
    left, values, right = svds(_matrix(train), k=dim, v0=start)
    return by_users(lambda users: (left * values)[users] @ right)


def ease(train: Interactions) -> Scores:
    """Solve EASE, the closed-form linear autoencoder (Steck, WWW 2019), by way of the users.

    With ``K = (X Xᵀ + λI)^-1``, ``X (XᵀX + λI)^-1 = K X``; so a catalogue of any size will do where
    users are few.
    """
    matrix = _matrix(train)
    kernel = (matrix @ matrix.T).toarray() + EASE_L2 * np.eye(train.n_users)
    inverse = linalg.inv(kernel, overwrite_a=True, check_finite=False)
    diagonal = (1 - matrix.multiply(inverse @ matrix).sum(axis=0)) / EASE_L2
    scale = np.asarray(diagonal).ravel()
    return by_users(lambda users: matrix[users].toarray() - (inverse[users] @ matrix) / scale)


def by_users(table: Callable[[NDArray[np.integer]], NDArray[np.floating]]) -> Scores:
    """Scores of what is asked, from those of the whole catalogue."""

    def scores(users: NDArray[np.integer], candidates: NDArray[np.integer] | None) -> Float32Array:
        found = table(users)
        if candidates is not None:
            found = np.take_along_axis(found, candidates, axis=1)
        return found.astype(np.float32, copy=False)

    return scores


def _matrix(train: Interactions) -> sparse.csr_array:
    ones = np.ones(train.size)
    return sparse.csr_array((ones, train.items, train.indptr), shape=(train.n_users, train.n_items))
