"""DP-SGD on embedding tables: what a step costs, by the share of rows that it touches.

Every way to noise a table is run in turn on the same table, the same batches and one core. Figures
are CPU milliseconds; claims are ratios of medians of one run.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Claim, document, machine, print_table, write_json
from _dlrm import DLRM, MLPERF_BOTTOM, MLPERF_TOP, TABLES, Clicks
from _lazy_ways import BATCH, PRIVATE, SparseSGD, Way, batches, medians
from torch.nn.functional import binary_cross_entropy_with_logits

from privrec.optim.lazy_dpsgd import LazyDPSGD

WIDTH = 64
SGD, OURS = "sparse SGD", "settle on read"
SLOW = ("as Opacus", "LazyDP's baseline", "cache-blocked eager")
# Rows, lookups an example, and whether access follows Zipf's law.
QUICK = ((100_000, 20, False), (1_000_000, 1, False))
FULL = (
    (100_000, 1, False),
    (100_000, 20, False),
    (100_000, 50, False),
    (100_000, 100, False),
    (1_000_000, 1, False),
    (1_000_000, 4, False),
    (1_000_000, 20, False),
    (1_000_000, 20, True),
    (10_000_000, 1, False),
    (10_000_000, 20, False),
)
MOST_FOR_OPACUS = 2_000_000  # it holds three more tables
DLRM_GB = 12


def update_row(rows: int, lookups: int, zipf: bool) -> dict[str, Any]:
    """The update of one table, all ways in turn."""
    table = torch.zeros(rows, WIDTH)  # by PyTorch's allocator, as embeddings have it
    data = batches(rows, lookups, WIDTH, 12, zipf=zipf)
    ways: dict[str, Way] = {SGD: SparseSGD(table)}
    for name, way in PRIVATE.items():
        if name != "as Opacus" or rows <= MOST_FOR_OPACUS:
            ways[name] = way(table)
    slow = 3 if rows >= 10_000_000 else 5
    rounds = {name: slow if name in SLOW else 25 for name in ways}
    touched = float(np.mean([len(np.unique(b.rows.numpy())) for b in data])) / rows
    access = "zipf" if zipf else "uniform"
    head = {"part": "update", "rows": rows, "lookups": lookups, "access": access}
    return {**head, "touched": touched, **medians(ways, data, rounds)}


def update_claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """What is promised of the update of one table."""

    def over(row: dict[str, Any], peer: str) -> float:
        return float(row[OURS] / row[peer])

    def at(count: int, peer: str) -> float | None:
        found = [r for r in rows if (r["rows"], r["lookups"]) == (count, 1) and peer in r]
        return 1 / over(found[0], peer) if found else None

    def worst(peer: str, least: float, most: float) -> float | None:
        found = [over(r, peer) for r in rows if least <= r["touched"] <= most]
        return max(found) if found else None

    others = [name for name in PRIVATE if name != OURS]
    best = max(r[OURS] / min(r[name] for name in others if name in r) for r in rows)
    claims = [
        ("vs_lazydp_baseline_1e6", at(10**6, "LazyDP's baseline"), 119, "times", "at least"),
        ("vs_lazydp_baseline_1e7", at(10**7, "LazyDP's baseline"), 119, "times", "at least"),
        ("vs_opacus_1e6", at(10**6, "as Opacus"), 400, "times", "at least"),
        ("over_best_any", best, 1.1, "of the best peer", "at most"),
        ("over_lazydp_any", worst("LazyDP's algorithm", 0, 1), 1, "of LazyDP's", "at most"),
        ("over_sparse_sgd_1pct", worst(SGD, 0, 0.01), 2, "of sparse SGD", "at most"),
        ("over_sparse_sgd_4pct", worst(SGD, 0.03, 0.05), 2.5, "of sparse SGD", "at most"),
    ]
    return [Claim(*claim) for claim in claims]  # type: ignore[arg-type]


class Training:
    """One DLRM with its optimiser, and one whole training step."""

    def __init__(self, rows: int, noise: float, bottom: Sequence[int], top: Sequence[int]) -> None:
        # Tables as a program would load them. They are zeros, which take no memory until they are
        # moved into that of the optimiser, so that no second copy of them is ever there.
        made = [np.zeros((rows, bottom[-1]), np.float32) for _ in range(TABLES)]
        tables = [torch.from_numpy(table) for table in made]
        self.model = model = DLRM([rows] * TABLES, bottom=bottom, top=top, weights=tables)
        self.spare = torch.zeros(rows, bottom[-1])
        self.optimizer = LazyDPSGD(
            model, lr=0.1, noise_multiplier=noise, max_grad_norm=1.0, expected_batch_size=BATCH
        )

    def step(self, batch: Sequence[torch.Tensor]) -> None:
        dense, categories, clicks = batch
        loss = binary_cross_entropy_with_logits(self.model(dense, categories), clicks)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def eager_step(self, batch: Sequence[torch.Tensor]) -> None:
        """The same step, with the noise of LazyDP's baseline: dense, for each table.

        It goes into one spare table, since no guarded one is written to; memory costs the same.
        """
        self.step(batch)
        for _ in range(TABLES):
            self.spare.add_(torch.normal(0.0, 1 / BATCH, self.spare.shape), alpha=-0.1)


def dlrm_row(name: str, bottom: Sequence[int], top: Sequence[int], gb: float) -> dict[str, Any]:
    """A whole training step: private, without any noise, and with eager noise.

    With MLPerf's networks two models of half the size take turns, since their ratio is close to 1.
    Else one model of the whole size takes all steps, after its debts are settled.
    """
    gc.collect()  # models and their optimisers point at each other, and the tables are large
    turns = name == "MLPerf"
    rows = int(gb / (1 + turns) * 1e9 / 4 / bottom[-1] / TABLES)
    data = list(Clicks((rows,) * TABLES, zipf=0).batches(BATCH, 6))
    private = Training(rows, 1.0, bottom, top)
    clipped = Training(rows, 0.0, bottom, top) if turns else private
    first = {OURS: (private.step, 9)}
    then = {"clipped, no noise": (clipped.step, 9), "LazyDP's baseline": (clipped.eager_step, 2)}
    if turns:
        spent = timed({**first, **then}, data)
    else:
        spent = timed(first, data)
        private.optimizer.settle()
        private.optimizer.noise_multiplier = 0.0
        spent |= timed(then, data)
    head = {"part": f"DLRM, {name}", "rows": rows * TABLES, "lookups": 1, "access": "uniform"}
    return {**head, "width": bottom[-1], "gb": gb / (1 + turns), **spent}


def timed(
    steps: dict[str, tuple[Callable[..., None], int]], data: Sequence[Any]
) -> dict[str, float]:
    """Median CPU milliseconds of steps that take turns; the first of each is not counted."""
    spent: dict[str, list[float]] = {key: [] for key in steps}
    for turn in range(1 + max(rounds for _, rounds in steps.values())):
        for key, (step, rounds) in steps.items():
            if turn > rounds:
                continue
            start = time.process_time()
            step(data[turn % len(data)])
            if turn:
                spent[key].append((time.process_time() - start) * 1000)
    return {key: float(np.median(times)) for key, times in spent.items()}


def dlrm_claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """What is promised of whole training steps."""

    def ratio(name: str, above: str, below: str) -> float | None:
        found = [row for row in rows if row["part"] == f"DLRM, {name}"]
        return float(found[0][above] / found[0][below]) if found else None

    small = ratio("small", "LazyDP's baseline", OURS)
    mlperf = ratio("MLPerf", OURS, "clipped, no noise")
    return [
        Claim("dlrm_over_no_noise", mlperf, 1.2, "of the clipped step", "at most"),
        Claim("dlrm_vs_lazydp_baseline", small, 119, "times", "at least"),
    ]


def auc_rows(seeds: int, steps: int = 150) -> list[dict[str, Any]]:
    """AUC of lazy and eager noise on clicks that can be learned, one row a seed."""
    made = []
    for seed in range(seeds):
        clicks = Clicks((400,) * 8, zipf=1, seed=seed)
        row: dict[str, Any] = {"part": "AUC", "seed": seed}
        for name in ("lazy", "eager"):
            model = DLRM((400,) * 8, bottom=(16,), top=(32,), seed=seed)
            optimizer = LazyDPSGD(
                model, lr=1.0, noise_multiplier=8.0, max_grad_norm=1.0, expected_batch_size=512
            )
            for dense, categories, target in clicks.batches(512, steps):
                logits = model(dense, categories)
                binary_cross_entropy_with_logits(logits, target).backward()
                optimizer.step()
                if name == "eager":
                    optimizer.settle()
            (test,) = clicks.batches(8192, 1, part=1)
            with torch.no_grad():
                row[name] = auc(model(test[0], test[1]).numpy(), test[2].numpy())
        made.append(row)
    return made


def auc(scores: np.ndarray, clicks: np.ndarray) -> float:
    """Area under the ROC curve, by ranks."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = np.arange(1, len(scores) + 1)
    hits = clicks > 0
    positives, negatives = hits.sum(), (~hits).sum()
    return float((ranks[hits].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auc_claim(rows: Sequence[dict[str, Any]]) -> Claim:
    """The mean difference over the seeds, in its own standard errors."""
    value = None
    if len(rows) > 2:
        gaps = np.array([row["lazy"] - row["eager"] for row in rows])
        value = float(abs(gaps.mean()) / (gaps.std(ddof=1) / np.sqrt(len(gaps))))
    return Claim("auc_lazy_is_eager", value, 3, "standard errors apart", "at most")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, and write the JSON file where one is named."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    about = machine("torch", "numpy", "opacus")
    parts = options.parts
    updates, trained, accuracies = [], [], []
    if "update" in parts:
        updates = [update_row(*each) for each in (QUICK if options.quick else FULL)]
    if "dlrm" in parts and not options.quick:
        trained.append(dlrm_row("MLPerf", MLPERF_BOTTOM, MLPERF_TOP, options.gb))
        trained.append(dlrm_row("small", (64,), (64,), options.gb))
    if "auc" in parts:
        accuracies = auc_rows(2 if options.quick else 10)
    for title, rows in (
        (f"Update of one table, CPU ms a step of {BATCH} examples, d = {WIDTH}", updates),
        (f"Whole DLRM step, CPU ms, {TABLES} tables", trained),
        ("AUC of a DLRM under DP-SGD", accuracies),
    ):
        if rows:
            print_table(title, [(key, key) for key in max(rows, key=len)], rows)
    claims = update_claims(updates) if updates else []
    claims += [*dlrm_claims(trained), auc_claim(accuracies)]
    for claim in claims:
        print(claim)
    if options.json:
        write_json(options.json, document([*updates, *trained, *accuracies], claims, about))


def parser() -> argparse.ArgumentParser:
    """The benchmark's options."""
    made = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="example: lazy_noise.py --quick --json lazy.json",
    )
    made.add_argument("--quick", action="store_true", help="two small tables, two seeds")
    made.add_argument(
        "--parts", nargs="+", default=["update", "dlrm", "auc"], choices=["update", "dlrm", "auc"],
        metavar="PART", help="of update, dlrm and auc; all by default",
    )  # fmt: skip
    made.add_argument("--gb", type=float, default=DLRM_GB, help="memory for the tables of DLRM")
    made.add_argument("--json", type=Path, metavar="FILE", help="write rows, claims and machine")
    return made


if __name__ == "__main__":
    main()
