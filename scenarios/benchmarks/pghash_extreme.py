"""Selectors of output neurons on a small device: P@1 at equal budgets, and peak memory.

Invented examples of the shapes of Delicious-200K (205,443 labels, 75 each) and Amazon-670K
(670,091 labels, 5 each), words hashed down. Full-weight SimHash selects from, and trains, a layer
whose rows are all held; the device has the rows in a memory 16 times smaller and selects from that
by PGHash (c = 32), block signs or the sketch. Every row takes the same steps on the same examples.
Memory is that of a process of its own which trains a few steps, above the idle interpreter. With
``--all-rows`` the same selectors also run where all rows are held, which tells what the selector
costs apart from what the small memory does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from _bolt import AMAZON_670K, DELICIOUS_200K, precision
from _common import ROOT, Claim, document, machine, print_table, write_json

from privrec.data.corpus import Examples
from privrec.data.synthetic import Invented
from privrec.embedding.subspace import Subspace
from privrec.models.classifier import ExtremeClassifier
from privrec.models.sparse_output import RowAdam, SparseOutput
from privrec.randomness import SecretRoot, rng_for
from privrec.search.hashing import Shape
from privrec.search.index import Rebuild
from privrec.workers import (
    give_back_freed,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
)

DIM, BLOCK, FOLD, WORDS = 128, 16, 32, 1 << 13
SELECTED = 0.2
"""Share of what labels leave of the budget; few tables find too little to spend more on it."""
WORLDS = {"delicious-200k": DELICIOUS_200K, "amazon-670k": AMAZON_670K}
DEVICE: tuple[str, ...] = ("pghash", "block_sign", "sketch")
SMALL = Invented(4096, 6000, words=60, labels_each=8, clusters=128)
MIB = 2**20


def made(world: Invented, selector: str, compression: float, share: float
         ) -> ExtremeClassifier:  # fmt: skip
    """The model, with rows of its own for every label or in a smaller memory."""
    table = None
    if compression > 1:
        table = Subspace.sized(world.labels, DIM, block=BLOCK, key=7, compression=compression)
    layer = SparseOutput(
        world.labels, DIM, share=share, selector=selector, selected=SELECTED, table=table,
        init_std=0.02,
        shape=Shape(bits=9, tables=4, fold=FOLD, block=BLOCK), rebuild=Rebuild(every=50),
        root=SecretRoot.known(b"pghash extreme"),
    )  # fmt: skip
    return ExtremeClassifier(min(WORDS, world.features), layer)


def learn(model: ExtremeClassifier, train: Examples, batch: int, steps: int) -> float:
    """Train; the mean number of active neurons of a batch, over those of the layer."""
    optimizer, taken, active = RowAdam(model.parameters(), lr=5e-3), 0, 0
    while taken < steps:
        for part in train.batches(batch, rng_for(1, "steps", taken).permutation(len(train))):
            optimizer.zero_grad()
            hidden = model.words(part)
            labels = torch.from_numpy(part.padded_labels())
            chosen = model.output.active(hidden, labels)
            model.output.loss(hidden, labels, active=chosen).backward()
            optimizer.step()
            active, taken = active + len(chosen), taken + 1
            if taken == steps:
                break
    return active / (taken * model.output.n)


def judged(model: ExtremeClassifier, test: Examples) -> float:
    """P@1 by exact scores of all labels."""
    with torch.no_grad():
        best = [model.output(model.words(part)).argmax(1) for part in test.batches(64)]
    return precision(torch.cat(best).tolist(), test)


def row(name: str, world: Invented, selector: str, options: argparse.Namespace,
        compression: float, measure: bool = True) -> dict[str, Any]:  # fmt: skip
    """One selector: its precision, and the peak of its process."""
    words = min(WORDS, world.features)
    train = world.examples(options.examples).hashed(words)
    test = world.examples(options.tests, "test").hashed(words)
    model = made(world, selector, compression, options.share)
    active = learn(model, train, options.batch, options.steps)
    return {
        "name": f"{name}: {selector}, {'all rows' if compression == 1 else 'compressed'}",
        "p_at_1": judged(model, test), "active": active, "compression": compression,
        "peak_mib": peak(name, selector, compression, options) if measure else None,
    }  # fmt: skip


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import pghash_extreme
print(pghash_extreme.taken(sys.argv[2], sys.argv[3], *map(float, sys.argv[4:])))
"""


def peak(name: str, selector: str, compression: float, options: argparse.Namespace) -> float:
    """MiB that training takes, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), name, selector,
         str(compression), str(options.share), str(options.batch)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout) / MIB


def taken(name: str, selector: Any, compression: float, share: float, batch: float) -> int:
    """Bytes of this process's peak for three steps, above what was there before the model."""
    torch.set_num_threads(1)
    world = WORLDS.get(name, SMALL)
    few = int(batch)
    _train(SMALL, "uniform" if selector == "dense" else selector, 2.0, 0.5, 32)
    give_back_freed()
    reset_peak()
    before = resident_bytes()
    if selector == "dense":
        _dense(world, few)
    else:
        _train(world, selector, compression, share, few)
    return peak_resident_bytes() - before


def _train(world: Invented, selector: str, compression: float, share: float, batch: int
           ) -> None:  # fmt: skip
    train = world.examples(3 * batch).hashed(min(WORDS, world.features))
    learn(made(world, selector, compression, share), train, batch, 3)


def _dense(world: Invented, batch: int) -> None:
    """Full softmax over a dense layer and torch's own Adam."""
    words = min(WORDS, world.features)
    train = world.examples(3 * batch).hashed(words)
    below = ExtremeClassifier(words, SparseOutput(1, DIM)).words
    layer = torch.nn.Linear(DIM, world.labels)
    optimizers = [RowAdam(below.parameters()), torch.optim.Adam(layer.parameters(), fused=True)]
    for part in train.batches(batch):
        labels = torch.from_numpy(part.padded_labels())
        scores, real = layer(below(part)), labels >= 0
        own = torch.where(real, scores.gather(1, labels.clamp(min=0)), 0.0).sum(1) / real.sum(1)
        loss = (torch.logsumexp(scores, 1) - own).mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def measured(name: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Rows and claims of one shape."""
    world = WORLDS.get(name, SMALL)
    rows = [row(name, world, "simhash", options, 1.0)]
    rows += [row(name, world, selector, options, options.compression) for selector in DEVICE]
    if options.all_rows:
        rows += [row(name, world, each, options, 1.0, measure=False) for each in DEVICE]
    dense = {"name": f"{name}: dense layer", "peak_mib": peak(name, "dense", 1.0, options)}
    for each in rows:
        if each["peak_mib"] is not None:
            each["times_below_dense"] = dense["peak_mib"] / each["peak_mib"]
    device = rows[1 : 1 + len(DEVICE)]
    behind = max(rows[0]["p_at_1"] - each["p_at_1"] for each in device)
    least = min(each["times_below_dense"] for each in device)
    alone = [rows[0]["p_at_1"] - each["p_at_1"] for each in rows[1 + len(DEVICE) :]]
    return [*rows, dense], [
        Claim(f"selector_behind_{name}", max(alone, default=None), 0.02, "of P@1", "at most"),
        Claim(f"behind_simhash_{name}", behind, 0.02, "of P@1", "at most"),
        Claim(f"peak_below_dense_{name}", least, 8, "times"),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and write the JSON file where one is named."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    about = machine("numpy", "torch")
    if options.quick:
        options.examples, options.tests, options.steps, options.batch = 2000, 300, 100, 32
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    for name in ("small",) if options.quick else options.shapes:
        more = measured(name, options)
        rows, claims = rows + more[0], claims + more[1]
        keys = list(dict.fromkeys(key for row in rows for key in row))
        title = f"At most {100 * options.share:g} % of the labels active"
        print_table(title, [(key, key.replace("_", " ")) for key in keys], more[0])
    for claim in claims:
        print(claim, flush=True)
    if options.json:
        write_json(options.json, document(rows, claims, about))


def parser() -> argparse.ArgumentParser:
    """The benchmark's options."""
    made = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="example: pghash_extreme.py --quick --json pghash.json",
    )
    made.add_argument("--quick", action="store_true", help="6,000 labels, few examples")
    made.add_argument("--shapes", nargs="+", choices=list(WORLDS), default=list(WORLDS),
                      metavar="SHAPE", help="which data sets' shapes")  # fmt: skip
    made.add_argument("--share", type=float, default=0.03, help="of the labels active in a batch")
    made.add_argument("--compression", type=float, default=16.0, help="of the device's rows")
    made.add_argument("--examples", type=int, default=16_000, metavar="N", help="to learn from")
    made.add_argument("--tests", type=int, default=4000, metavar="N", help="to judge by")
    made.add_argument("--steps", type=int, default=1000, metavar="N", help="of every row")
    made.add_argument("--batch", type=int, default=32, metavar="N", help="examples of a step")
    made.add_argument("--all-rows", action="store_true", help="also select with all rows held")
    made.add_argument("--json", type=Path, metavar="FILE", help="write rows, claims and machine")
    return made


if __name__ == "__main__":
    main()
