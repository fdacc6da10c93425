"""A dense PyTorch output layer against a sparse one: training to equal precision, and one query.

Invented examples of the shape of Amazon-670K: 670,091 labels in clusters, by Zipf's law; a hidden
layer of 128. Each side has the step size that is best on a validation part after ``--trial-s``
seconds of training. The dense side takes ``--epochs`` with the full softmax; the sparse side sees
the same batches, in as many epochs as it takes to reach the dense side's P@1. It then learns on,
from further examples, and single queries of that trained layer are answered both ways in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from _bolt import AMAZON_670K, Dense, Sparse, distinct, epochs, queries
from _common import Claim, document, machine, print_table, write_json

from privrec.data.corpus import Examples
from privrec.data.synthetic import Invented

DIM, SHARE, BATCH = 128, 0.01, 256
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
LOOK = 25
"""Sparse steps between two looks at its precision, which cost no training time."""


Side = TypeVar("Side", Dense, Sparse)


def tuned(
    make: Callable[[float], Side], train: Examples, validation: Examples, trial_s: float
) -> Side:
    """A new side of the best of :data:`RATES`, by P@1 on the validation part after some seconds."""
    found = {}
    for rate in RATES:
        side = make(rate)
        batches = epochs(train, BATCH, 100)
        while side.trained.seconds < trial_s:
            side.step(next(batches))
        found[rate] = side.trained.evaluate(validation)
        del side  # a dense layer with Adam's state is large: one at a time
    best = max(RATES, key=found.__getitem__)
    tried = ", ".join(f"{rate:g} {value:.4f}" for rate, value in found.items())
    chosen = make(best)
    print(f"{type(chosen).__name__}: P@1 by step size on validation: {tried}", flush=True)
    return chosen


def trained(
    world: Invented, parts: tuple[Examples, Examples, Examples], share: float, passes: int,
    trial_s: float,
) -> tuple[Dense, Sparse]:  # fmt: skip
    """Both sides, the sparse one as soon as it is no worse."""
    train, validation, test = parts
    size = world.features, world.labels, DIM
    dense = tuned(lambda rate: Dense(*size, rate), train, validation, trial_s)
    for part in epochs(train, BATCH, passes):
        dense.step(part)
    aim = dense.trained.evaluate(test)
    print(f"dense: P@1 {aim:.4f} after {dense.trained.seconds:.0f} s", flush=True)
    sparse = tuned(lambda rate: Sparse(*size, rate, share), train, validation, trial_s)
    for part in epochs(train, BATCH, 100):
        sparse.step(part)
        if sparse.trained.steps % LOOK == 0 and sparse.trained.evaluate(test) >= aim:
            break
    found = sparse.trained
    print(f"sparse: P@1 {found.reached:.4f} after {found.seconds:.0f} s", flush=True)
    return dense, sparse


def warm() -> None:
    """A step of both sides, so that what torch loads on its first one is in nobody's time."""
    world = Invented(100, 200, words=5, clusters=10)
    for side in (Dense(100, 200, 8, RATES[0]), Sparse(100, 200, 8, RATES[0], 0.5)):
        side.step(world.examples(8))


def measured(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Rows and claims."""
    world = Invented(5000, 20_000, words=40, labels_each=3, clusters=256)
    world = world if options.quick else AMAZON_670K
    train = world.examples(2 * BATCH if options.quick else options.examples)
    validation, test = (
        world.examples(300 if options.quick else 1000, part) for part in ("validation", "test")
    )
    share, trial_s = (0.05, 0.5) if options.quick else (SHARE, options.trial_s)
    dense, sparse = trained(world, (train, validation, test), share, options.epochs, trial_s)
    sides = {"dense PyTorch": dense.trained, "sparse": sparse.trained}
    rows = [
        {"name": f"training, {name}", "rate": side.rate, "train_s": side.seconds,
         "steps": side.steps,
         "active": active, "p_at_1": side.reached}
        for (name, side), active in zip(
            sides.items(), (world.labels, sparse.layer.budget), strict=True
        )
    ]  # fmt: skip
    reached = sparse.trained.reached >= dense.trained.reached
    ratio = dense.trained.seconds / sparse.trained.seconds if reached else None
    del dense
    further = world.examples(4 * BATCH if options.quick else options.further, "further")
    for part in epochs(further, BATCH, 1 if options.quick else 4):
        sparse.step(part)
    precise = sparse.trained.evaluate(test)
    with torch.no_grad():
        hidden = sparse.trained.words(world.examples(options.queries, "queries"))
    started = time.perf_counter()
    sparse.layer.reindex()
    indexed = time.perf_counter() - started
    whole, few, agree = queries(sparse, hidden)
    share = statistics.mean(agree)
    different = distinct(sparse, hidden)
    rows += [
        {"name": "query, dense PyTorch", "query_ms": 1e3 * statistics.median(whole),
         "p_at_1": precise, "top1_share": 1.0, "distinct_best": different},
        {"name": "query, sparse", "query_ms": 1e3 * statistics.median(few), "top1_share": share,
         "index_s": indexed, "index_mb": sparse.layer.index().nbytes / 1e6},
    ]  # fmt: skip
    return rows, [
        Claim("inference_ratio", statistics.median(whole) / statistics.median(few), 10, "times"),
        Claim("top1_share", share, 0.95, "of the queries"),
        Claim("training_ratio", ratio, 3, "times"),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and write the JSON file where one is named."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    about = machine("numpy", "torch")
    warm()
    rows, claims = measured(options)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    title = "A wide output on one core: one dense epoch, and a query"
    print_table(title, [(key, key.replace("_", " ")) for key in keys], rows)
    for claim in claims:
        print(claim)
    if options.json:
        write_json(options.json, document(rows, claims, about))


def parser() -> argparse.ArgumentParser:
    """The benchmark's options."""
    made = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="example: bolt.py --quick --json bolt.json",
    )
    made.add_argument("--quick", action="store_true", help="20,000 labels, few examples")
    made.add_argument("--examples", type=int, default=12_800, metavar="N", help="of one epoch")
    made.add_argument("--epochs", type=int, default=1, metavar="N", help="of the dense side")
    made.add_argument("--trial-s", type=float, default=60, metavar="S", help="of each step size")
    made.add_argument("--further", type=int, default=50_000, metavar="N", help="before queries")
    made.add_argument("--queries", type=int, default=1000, metavar="N", help="one at a time")
    made.add_argument("--json", type=Path, metavar="FILE", help="write rows, claims and machine")
    return made


if __name__ == "__main__":
    main()
