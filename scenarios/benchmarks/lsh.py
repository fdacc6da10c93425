"""Search on a device: hashing time, workspace, and recall of every selector at equal candidates.

Times are of one thread at the size of Amazon-670K (670,091 items of 128 numbers) from a memory 64
times smaller, beside dense SimHash on the full table, in one run. Recall is that of the exact top
ten, on Gaussian clusters and on weights learned behind a ReLU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import ROOT, Claim, document, machine, print_table, write_json
from _wide import DIM, Searched, clusters, isotropic, learned

from privrec.randomness import SecretRoot
from privrec.search.hashing import Buckets, Shape, Signs, draw, serial, signature
from privrec.search.index import SIGNATURE, Signatures, Sketch
from privrec.search.memory import CHUNK, ItemMemory
from privrec.search.select import Search, cheapest, select

ITEMS, COMPRESSION = 670_091, 64.0
TABLES = Shape(12, 20)
SHARES = (0.001, 0.01, 0.1)
SELECTORS: tuple[str, ...] = (
    "scan", "sketch", "hamming", "simhash", "block_sign", "pghash", "uniform", "auto",
)  # fmt: skip
EQUAL = 0.02
SHORTEST = 0.05
ROOT_SECRET = SecretRoot.known(b"a benchmark")


def timed(work: Callable[[], object]) -> float:
    """CPU seconds of one call, of several where one is too short to be measured."""
    calls, started = 0, time.process_time()
    while calls == 0 or time.process_time() - started < SHORTEST:
        work()
        calls += 1
    return (time.process_time() - started) / calls


def side_by_side(
    works: dict[str, Callable[[], object]], repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each work, taken in turn, so that a slow moment of the machine meets them all."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()  # libraries and the machine's memory are warm afterwards
    for _ in range(repetitions):
        for name, work in works.items():
            found[name].append(timed(work))
    return found


def ratio(found: dict[str, list[float]], above: str, below: str) -> float:
    """Median of the ratios of neighbouring runs."""
    return statistics.median(a / b for a, b in zip(found[above], found[below], strict=True))


def hashing(n: int, repetitions: int) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Times of hashing a catalogue, against dense SimHash and the bare matrix product."""
    searched = isotropic(n, COMPRESSION, 1)
    items, query = searched.items, searched.queries
    full = torch.from_numpy(np.concatenate([rows.copy() for _, rows in items.chunks()]))
    wide = {bits: torch.randn(DIM, bits) for bits in (16, 64, SIGNATURE)}
    out = torch.empty(CHUNK, SIGNATURE)

    def dense() -> None:
        bits = (torch.mm(full, wide[16]).numpy() > 0).reshape(-1)
        np.packbits(bits, bitorder="little").view(np.uint16)

    def floor() -> None:
        for start in range(0, n, CHUNK):
            rows = full[start : start + CHUNK]
            torch.mm(rows, wide[SIGNATURE], out=out[: len(rows)])

    def signs(bits: int) -> Callable[[], object]:
        return lambda: Signatures.of(items, _signs(bits))

    codes = Signatures.of(items, _signs(SIGNATURE))
    single = draw("simhash", DIM, Shape(16), ROOT_SECRET.stream("list"))
    works: dict[str, Callable[[], object]] = {
        "dense SimHash, 16 bits, full table": dense,
        "matrix product alone, 256 bits": floor,
        "from the memory, 16 bits": signs(16),
        "from the memory, 64 bits": signs(64),
        "from the memory, 256 bits": signs(SIGNATURE),
        "serial tables, K = 12, L = 20": lambda: list(
            serial(items, query, "simhash", TABLES, ROOT_SECRET.stream("serial"))
        ),
        "lists of one table, sorted": lambda: Buckets.of(items, single),
        "ranking one query, 256 bits": lambda: codes.one(query[0], n // 100),
    }
    found = side_by_side(works, repetitions)
    names = list(works)
    held = {names[0]: full.nbytes + 2 * n, names[4]: items.memory.nbytes + codes.words.nbytes}
    rows = [
        {
            "name": name,
            "ms": 1e3 * statistics.median(seconds),
            "over_dense16": ratio(found, name, names[0]),
            "resident_mb": held.get(name, items.memory.nbytes) / 1e6,
        }
        for name, seconds in found.items()
    ]
    claims = [
        Claim("bits256_over_floor", ratio(found, names[4], names[1]), 1.5, "times", "at most"),
        Claim("serial_over_dense16", ratio(found, names[5], names[0]), 12.0, "times", "at most"),
    ]
    return rows, claims


def _signs(bits: int) -> Signs:
    return signature(DIM, bits, ROOT_SECRET.stream("bits", bits))


def quality(searched: Searched) -> list[dict[str, Any]]:
    """Recall, time and room of every selector, one query at a time."""
    items = searched.items
    search = Search(items, Sketch.of(items))
    right, rows = [best(items, query[None]) for query in searched.queries], []
    for selector in SELECTORS:
        row: dict[str, Any] = {"name": f"{searched.name}: {selector}"}
        for share in SHARES:
            budget, seconds, chosen = max(1, round(share * items.items)), [], []
            for number, query in enumerate(searched.queries):
                started = time.perf_counter()
                chosen.append(select(selector, search, query[None], budget,
                                     ROOT_SECRET.stream(selector, number)))  # fmt: skip
                seconds.append(time.perf_counter() - started)
            hits = [np.isin(*pair).mean() for pair in zip(right, chosen, strict=True)]
            row[f"recall_{share:g}"] = float(np.mean(hits))
            row[f"found_{share:g}"] = statistics.mean(map(len, chosen)) / budget
        row["ms"] = 1e3 * statistics.median(seconds)
        tracemalloc.start()
        select(selector, search, searched.queries[:1], budget, ROOT_SECRET.stream("room"))
        row["workspace_mb"] = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        rows.append(row)
    rows += faiss_row(searched)
    return rows


def best(items: ItemMemory, queries: np.ndarray) -> np.ndarray:
    """The ten items that score highest, less what all items score, for some of the queries."""
    centre = queries @ items.centre
    scores = np.concatenate([(rows @ queries.T - centre).max(1) for _, rows in items.chunks()])
    return np.argpartition(-scores, 10)[:10]


def faiss_row(searched: Searched) -> list[dict[str, Any]]:
    """FAISS' binary index over the same signatures, where it is installed."""
    if find_spec("faiss") is None:
        return []
    import faiss  # type: ignore[import-not-found,unused-ignore]

    items, hashed = searched.items, _signs(SIGNATURE)
    signed = Signatures.of(items, hashed)
    index = faiss.IndexBinaryFlat(SIGNATURE)
    index.add(np.ascontiguousarray(signed.words.T).view(np.uint8))
    asked = hashed.signatures(searched.queries).view(np.uint8)
    full = items.rows(np.arange(items.items)) @ searched.queries.T
    row: dict[str, Any] = {"name": f"{searched.name}: FAISS IndexBinaryFlat"}
    for share in SHARES:
        started = time.perf_counter()
        found = index.search(asked, max(1, round(share * items.items)))[1]
        row["ms"] = 1e3 * (time.perf_counter() - started) / len(asked)
        best = np.argsort(-full, axis=0)[:10].T
        row[f"recall_{share:g}"] = float(
            np.mean([np.isin(b, f).mean() for b, f in zip(best, found, strict=True)])
        )
    return [row]


def automatic(cases: list[Searched], repetitions: int) -> tuple[list[dict[str, Any]], Claim]:
    """``auto`` against the fastest selector that finds as much."""
    rows, worst = [], 0.0
    for searched in cases:
        items = searched.items
        sketches = (None, Sketch.of(items))
        for count in (1, 16, 64):
            for sketch in sketches:
                search = Search(items, sketch)
                queries, budget = searched.queries[:count], max(10, items.items // 100)
                open_to = ("auto", "scan", "hamming", *(("sketch",) if sketch else ()))

                def work(name: str, s: Search = search, q: np.ndarray = queries, b: int = budget
                         ) -> Callable[[], np.ndarray]:  # fmt: skip
                    return lambda: select(name, s, q, b, ROOT_SECRET.stream(name))

                right = best(items, queries)
                recalls = {name: float(np.isin(right, work(name)()).mean()) for name in open_to}
                found = side_by_side({name: work(name) for name in open_to}, repetitions)
                equal = [name for name in open_to[1:] if recalls[name] >= recalls["auto"] - EQUAL]
                fastest = min(equal, key=lambda name: statistics.median(found[name]))
                over = ratio(found, "auto", fastest)
                worst = max(worst, over)
                rows.append({
                    "name": f"{searched.name}, {count} queries{', a sketch' if sketch else ''}",
                    "picked": cheapest(search, count),
                    "recall": recalls["auto"],
                    "ms": 1e3 * statistics.median(found["auto"]),
                    "best": fastest,
                    "over_best": over,
                })  # fmt: skip
    return rows, Claim("auto_over_best", worst, 1.3, "times", "at most")


WORKSPACE = """
import sys
sys.path.insert(0, sys.argv[1])
from lsh import ITEMS, TABLES, ROOT_SECRET
from dataclasses import replace
from _wide import isotropic
from privrec.workers import give_back_freed, peak_resident_bytes
from privrec.workers import reset_peak, resident_bytes
from privrec.search.hashing import serial
import torch
torch.set_num_threads(1)
searched = isotropic(ITEMS, 64.0, 1)
warm = isotropic(500, 1.0, 1)
shape = replace(TABLES, tables=int(sys.argv[2]))
list(serial(warm.items, warm.queries, "simhash", replace(shape, tables=1), ROOT_SECRET.stream("w")))
give_back_freed(); reset_peak(); before = resident_bytes()
for found in serial(searched.items, searched.queries, "simhash", shape, ROOT_SECRET.stream("m")):
    pass
print(peak_resident_bytes() - before)
"""


def workspace() -> tuple[list[dict[str, Any]], Claim]:
    """Peak memory of serial tables above the item memory, each in a process of its own."""
    rows = []
    for count in (1, 8, 20, 50):
        done = subprocess.run(
            [sys.executable, "-c", WORKSPACE, str(Path(__file__).parent), str(count)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        rows.append({"name": f"{count} tables", "workspace_mib": int(done.stdout) / 2**20})
    worst = max(row["workspace_mib"] for row in rows)
    return rows, Claim("serial_workspace_mib", worst, 32.0, "MiB", "at most")


SERVING = """
import sys, json, time
import numpy as np, torch
torch.set_num_threads(1)
from privrec.embedding.subspace import Subspace
from privrec.workers import give_back_freed, peak_resident_bytes
from privrec.workers import reset_peak, resident_bytes
from privrec.device.local import LocalModel
from privrec.device.tier import ModelView
from privrec.models.ncf import NCF
from privrec.run.recommend import answer

def made(n):
    table = Subspace.sized(n, 64, block=16, key=1, compression=64)
    view = ModelView.of(NCF.of("gmf", 64, ()), table, None)
    weights = np.random.default_rng(0).standard_normal(view.layout.size, dtype=np.float32)
    return LocalModel(view, weights)

selector, history = sys.argv[1], np.arange(0, 500, 10)
states = np.random.default_rng(1).standard_normal((int(sys.argv[2]), 65)).astype(np.float32)
answer(made(5000), states[0], 10, history, selector)
give_back_freed(); reset_peak(); before = resident_bytes()
model = made(1_000_000)
seconds, found = [], []
for state in states:
    started = time.process_time()
    found.append(answer(model, state, 10, history, selector)[0].tolist())
    seconds.append(time.process_time() - started)
peak, right = peak_resident_bytes() - before, 0
for state, chosen in zip(states, found):
    items = model.items
    scores = np.concatenate([rows @ state[:-1] for _, rows in items.chunks()])
    scores[history] = -np.inf
    right += chosen == np.argsort(-scores, kind="stable")[:10].tolist()
print(json.dumps([sorted(seconds)[len(seconds) // 2], peak, right / len(states)]))
"""


def serving() -> tuple[list[dict[str, Any]], list[Claim]]:
    """A recommendation among a million items, from the memory, in a process of its own."""
    rows = []
    for selector in ("scan", "hamming"):
        done = subprocess.run(
            [sys.executable, "-c", SERVING, selector, "9"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        seconds, peak, right = json.loads(done.stdout)
        rows.append({
            "name": f"recommend by {selector}, 1,000,000 items",
            "ms": 1e3 * seconds, "peak_mib": peak / 2**20, "equal_to_brute_force": right,
        })  # fmt: skip
    exact = rows[0]
    return rows, [
        Claim("recommend_ms", exact["ms"], 150.0, "ms", "at most"),
        Claim("recommend_mib", exact["peak_mib"], 64.0, "MiB", "at most"),
        Claim("recommend_exact", exact["equal_to_brute_force"], 1.0, "of the lists"),
    ]


def recall_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """What ranking finds on learned weights, and what the fold loses."""
    found = {row["name"]: row for row in rows}
    signed, sketch = found["learned: hamming"], found["learned: sketch"]
    return [
        Claim("recall_hamming_learned", signed["recall_0.1"], 0.98, "of the top ten"),
        Claim("recall_sketch_learned", sketch["recall_0.1"], 0.98, "of the top ten"),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, and write the JSON file where one is named."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    about = machine("numpy", "torch", "faiss-cpu")
    quick = options.quick
    n, repetitions = (60_000, 3) if quick else (ITEMS, options.repetitions)
    rows, claims = hashing(n, repetitions)
    _show(f"Hashing {n:,} items of {DIM} numbers, one thread", rows)
    trained = learned(5_000 if quick else 10_000, 60 if quick else 600, 64)
    grouped = clusters(5_000 if quick else 50_000, 64)
    few = 8 if quick else 32
    found = [
        row
        for searched in (grouped, trained)
        for row in quality(Searched(searched.name, searched.items, searched.queries[:few]))
    ]
    _show("Recall of the exact top ten at 0.1, 1 and 10 % of the items, one query", found)
    cases = [trained] if quick else [isotropic(ITEMS, COMPRESSION, 64), trained]
    picked, claim = automatic(cases, repetitions)
    _show("The automatic choice", picked)
    claims += [*recall_claims(found), claim]
    room: list[dict[str, Any]] = []
    if not quick:
        room, claim = workspace()
        claims.append(claim)
        _show("Workspace of serial tables above the memory", room)
        served, more = serving()
        claims += more
        _show("Serving from a memory 64 times smaller", served)
        room += served
    for claim in claims:
        print(claim)
    if options.json:
        write_json(options.json, document([*rows, *found, *picked, *room], claims, about))


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    print_table(title, [(key, key.replace("_", " ")) for key in rows[0]], rows)


def parser() -> argparse.ArgumentParser:
    """The benchmark's options."""
    made = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="example: lsh.py --quick --json lsh.json",
    )
    made.add_argument("--quick", action="store_true", help="a small catalogue, few repetitions")
    made.add_argument("--repetitions", type=int, default=7, metavar="N", help="runs of each work")
    made.add_argument("--json", type=Path, metavar="FILE", help="write rows, claims and machine")
    return made


if __name__ == "__main__":
    main()
