"""How time, memory and bytes grow: with users, items, capacity, cohort, hash bits and workers.

    python scenarios/benchmarks/scale.py [--quick] [--json FILE] [--plot FILE]
    python scenarios/benchmarks/scale.py --read FILE --plot FILE

Every point is `scenarios/million.toml` with other sizes, in a process of its own: data are
invented, devices set up, and two rounds made, of which the second is measured. Seconds are CPU
seconds, user and system; with several workers also those of the clock. Peak memory is that of the
whole process; growth is that of what lies above the idle one with all libraries. A device's own
memory is measured as in every report.

What hash bits cost is measured on one device: 20 tables over a million items, one after another.

Growth is the slope of the last two points of a sweep on doubly logarithmic axes: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from _common import ROOT, Claim, document, in_fresh_process, machine, print_table, write_json

SCENARIO = ROOT / "scenarios" / "million.toml"
MIB = 2**20
TABLES = 20
LINEAR = 1.15
"""Largest growth that is taken for linear: points are measured once."""
LONG = 1.0
"""Seconds from which on the claim looks at a growth: a shorter work outgrows caches meanwhile."""
PACKAGES = ("privrec", "numpy", "torch")
COLUMNS = (
    ("sweep", "sweep"),
    ("shown", "at"),
    ("generate_s", "data, s"),
    ("setup_s", "devices, s"),
    ("round_s", "round, s"),
    ("noise_s", "of it noise"),
    ("wall_s", "clock, s"),
    ("peak_mib", "peak, MiB"),
    ("above_mib", "above idle"),
    ("upload_mib", "up, MiB"),
    ("device_mib", "device, MiB"),
)
SEARCH = (("bits", "bits"), ("search_ms", "search, ms"), ("found", "items found"))
GROWING = ("users", "items", "capacity", "cohort")
MEASURED = ("generate_s", "setup_s", "round_s", "above_mib", "upload_mib", "device_mib")

Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One simulation, or with ``bits`` one device's search of a million items.

    Three quarters of the devices have the ``capacity``, the others the whole memory; ``least`` is
    ``privacy.least_survivors``, which small cohorts need lower. A ``device`` is measured too.
    """

    sweep: str
    users: int = 100_000
    items: int = 100_000
    cohort: int = 1000
    capacity: float = 1.0
    workers: int = 1
    bits: int = 0
    least: float = 0.67
    device: bool = False

    @property
    def at(self) -> float:
        """Where the point lies in its sweep."""
        return float(getattr(self, self.sweep, self.items))

    @property
    def settings(self) -> list[str]:
        """What it changes of the scenario."""
        tiers = f"[{{capacity = 1.0, share = 0.25}}, {{capacity = {self.capacity}, share = 0.75}}]"
        return [
            f"data.users={self.users}",
            f"data.items={self.items}",
            f"devices.population={self.users}",
            f"devices.sampling_rate={self.cohort / self.users}",
            f"devices.tiers={tiers if self.capacity < 1 else '[]'}",
            f"train.budget={100 / self.items}",
            "privacy.epsilon=",
            "privacy.noise_multiplier=0.5",
            f"privacy.least_survivors={self.least}",
            f"run.workers={self.workers}",
        ]


def sweep(name: str, values: Sequence[float], **others: Any) -> list[Point]:
    """The points of one sweep."""
    return [replace(Point(name, **others), **{name: value}) for value in values]


MILLION = Point("million", users=10**6, items=10**6, device=True)
CAPACITIES = (1.0, 1 / 4, 1 / 16, 1 / 64)
FULL = [
    MILLION,
    *sweep("users", (10**3, 10**4, 10**5, 10**6), cohort=500),
    *sweep("items", (10**4, 10**5, 10**6, 10**7), device=True),
    *sweep("cohort", (100, 1000, 10_000), least=0.3),
    *sweep("capacity", CAPACITIES, least=0.3, device=True),
    *sweep("bits", (4, 8, 12, 16)),
    *sweep("workers", (1, 2), cohort=10_000),
]
QUICK = [
    *sweep("users", (1000, 4000), items=2000, cohort=400, least=0.3),
    *sweep("items", (1000, 10_000), users=2000, cohort=400, least=0.3),
    *sweep("bits", (8,)),
]


# --------------------------------------------------------------------------- one point


def measured(point: Point) -> Row:
    """Measure one point; to be called in a process of its own."""
    found = searched(point) if point.bits else simulated(point)
    name, at = f"{point.sweep} {point.at:g}", point.at
    return {
        "name": name,
        "at": at,
        "shown": f"{at:,.0f}" if at >= 1 else f"{at:g}",
        **asdict(point),
        **found,
    }


def simulated(point: Point) -> Row:
    """CPU seconds, bytes and memory of a simulation, from its data to its second round."""
    import torch

    from privrec.randomness import SecretRoot
    from privrec.run.costs import longest, of_tier, peak_bytes
    from privrec.run.parties import server_of
    from privrec.run.task import load_task
    from privrec.scenario.load import load
    from privrec.workers import cpu_s, peak_resident_bytes, resident_bytes

    torch.set_num_threads(1)
    root = SecretRoot.known(b"a benchmark")
    scenario, idle = load(SCENARIO, point.settings), resident_bytes()
    laps = [cpu_s()]
    task = load_task(scenario, None)
    laps.append(cpu_s())
    plan = task.plan
    devices, server = task.simulate(root), server_of(plan, "scale")
    laps.append(cpu_s())
    for _ in range(2):
        laps, began = [*laps[:3], cpu_s()], time.perf_counter()
        made = server.next_round(0)
        server.apply(server.release(made, devices.collect(made, server.weights), root))
    wall, used, peak = time.perf_counter() - began, cpu_s() - laps[3], peak_resident_bytes()
    weakest = plan.federation.tiers[-1]
    public, room = of_tier(plan, weakest), None
    if point.device:
        held = plan.federation.prefix(server.weights, weakest)
        room = peak_bytes(plan, weakest, held, longest(devices.cohorts[weakest.index]))
    shares = plan.protection.shares
    assert shares is not None
    noise = 0.0
    for number, band in enumerate(shares.bands):
        before = cpu_s()
        shares.draw_band(number, bytes(32))
        noise += (cpu_s() - before) * band.least
    return {
        "interactions": task.split.train.size,
        "coefficients": plan.federation.layout.size,
        "generate_s": laps[1] - laps[0],
        "setup_s": laps[2] - laps[1],
        "round_s": used,
        "noise_s": noise,
        "wall_s": wall if point.workers > 1 or point.sweep == "workers" else None,
        "peak_mib": peak / MIB,
        "above_mib": (peak - idle) / MIB,
        "upload_mib": public["upload_bytes"] / MIB,
        "device_mib": None if room is None else room / MIB,
    }


def searched(point: Point) -> Row:
    """CPU time of one device's tables of so many bits, and how many items they find."""
    import numpy as np
    import torch

    from privrec.embedding.subspace import Subspace
    from privrec.randomness import SecretRoot
    from privrec.search.hashing import Shape, serial
    from privrec.search.memory import ItemMemory

    torch.set_num_threads(1)
    rng, root = np.random.default_rng(0), SecretRoot.known(b"a benchmark")
    table = Subspace.sized(10**6, 64, block=16, key=1, compression=64.0)
    memory = rng.normal(size=(table.slots, table.block)).astype(np.float32)
    items, query = ItemMemory(table, memory), rng.normal(size=(1, 64)).astype(np.float32)
    shape = Shape(point.bits, TABLES)
    found, began = set[int](), time.process_time()
    for each in serial(items, query, "simhash", shape, root.stream("serial")):
        found.update(np.asarray(each).ravel().tolist())
    return {"search_ms": 1e3 * (time.process_time() - began), "found": len(found)}


# --------------------------------------------------------------------------- growth and claims


def in_sweep(rows: Sequence[Row], name: str) -> list[Row]:
    """The points of a sweep, by where they lie in it."""
    return sorted((row for row in rows if row["sweep"] == name), key=lambda row: float(row["at"]))


def sizes_of(rows: Sequence[Row]) -> list[Row]:
    """The simulations among the points."""
    return [row for row in rows if not row["bits"]]


def growths(rows: Sequence[Row]) -> list[Row]:
    """The slopes at the end of each sweep of sizes, by what was measured."""
    found = []
    for name in GROWING:
        for a, b in list(pairwise(in_sweep(rows, name)))[-1:]:
            step = math.log(b["at"] / a["at"])
            slopes = {k: math.log(b[k] / a[k]) / step for k in MEASURED if a.get(k) and b.get(k)}
            found.append({"name": f"growth with {name}", "by": name, **slopes})
    return found


def claims_of(rows: Sequence[Row], growth: Sequence[Row]) -> list[Claim]:
    """What issue and documentation quote."""
    million = next(iter(in_sweep(rows, "million")), {})
    peak = million.get("peak_mib")
    steepest = max(
        (
            each[key]
            for each in growth
            for key in MEASURED
            if key in each and (key[-2:] != "_s" or in_sweep(rows, each["by"])[-1][key] >= LONG)
        ),
        default=None,
    )
    seconds, most = "CPU seconds at a million users and items", "at most"
    return [
        Claim("million_generate_s", million.get("generate_s"), 120, seconds, most),
        Claim("million_round_s", million.get("round_s"), 60, seconds, most),
        Claim("million_peak_gib", peak and peak / 1024, 6, "GiB of the whole process", most),
        Claim("steepest_growth", steepest, LINEAR, "power of the size", most),
    ]


# --------------------------------------------------------------------------- the picture

PANEL = (210, 170)
LEFT, BOTTOM, TOP, RIGHT = 34, 34, 36, 12
INK = {
    "generate_s": ("#0b6e4f", "data"),
    "setup_s": ("#8a6d00", "devices set up"),
    "round_s": ("#1f4e9c", "a round"),
    "above_mib": ("#1f4e9c", "the simulation"),
    "device_mib": ("#a3341c", "a device"),
    "upload_mib": ("#0b6e4f", "an upload"),
}
LINES = (
    ("CPU seconds", ("generate_s", "setup_s", "round_s")),
    ("MiB", ("above_mib", "device_mib", "upload_mib")),
)


def picture(rows: Sequence[Row]) -> str:
    """Seconds above, MiB below, by the sizes of each sweep; all axes are logarithmic."""
    width, height = PANEL
    body = []
    for down, (unit, keys) in enumerate(LINES):
        for across, name in enumerate(GROWING):
            place = f"translate({across * width},{down * height})"
            parts = "".join(panel(in_sweep(rows, name), name, unit, keys))
            body.append(f'<g transform="{place}">{parts}</g>')
    size = f"0 0 {width * len(GROWING)} {height * len(LINES)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-size="9" '
        'font-family="sans-serif"><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(body)}</svg>\n"
    )


def panel(points: Sequence[Row], name: str, unit: str, keys: Sequence[str]) -> Iterator[str]:
    """One panel, its lines named above it in their colours."""
    width, height = PANEL
    lines = {k: [(p["at"], p[k]) for p in points if p.get(k)] for k in keys}
    values = [y for line in lines.values() for _, y in line]
    if not values:
        return
    across = Axis.over([p["at"] for p in points], LEFT, width - RIGHT)
    up = Axis.over(values, height - BOTTOM, TOP)
    yield text(LEFT, 12, f"{unit}, by {name}", "#000")
    named = "".join(
        f'<tspan fill="{INK[key][0]}">{INK[key][1]}  </tspan>' for key in keys if lines[key]
    )
    yield text(LEFT, 25, named, "#000")
    for power in up.powers():
        y = up(10.0**power)
        yield line_of([(LEFT, y), (width - RIGHT, y)], "#ddd", 0.6)
        yield text(LEFT - 3, y + 3, shown(power), "#555", "end")
    for power in across.powers():
        yield text(across(10.0**power), height - BOTTOM + 13, shown(power), "#555", "middle")
    for key, line in lines.items():
        places = [(across(x), up(y)) for x, y in line]
        ink, _ = INK[key]
        yield line_of(places, ink, 1.6)
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{ink}"/>' for x, y in places)


@dataclass(frozen=True)
class Axis:
    """Logarithms of values from ``low`` to ``high`` at places from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> Axis:
        """The axis that whole powers of ten bound."""
        low, high = math.log10(min(values)), math.log10(max(values))
        return cls(
            math.floor(low + 1e-9), max(math.ceil(high - 1e-9), math.floor(low) + 1), start, end
        )

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def powers(self) -> range:
        """Powers of ten within it."""
        return range(round(self.low), round(self.high) + 1)


def shown(power: int) -> str:
    """A power of ten, as an axis has it."""
    return f"{10.0**power:g}" if -3 <= power < 4 else f"1e{power}"


def line_of(points: Sequence[tuple[float, float]], ink: str, width: float) -> str:
    """A line through points."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{ink}" stroke-width="{width}"/>'


def text(x: float, y: float, words: str, ink: str, anchor: str = "start") -> str:
    """A text."""
    place = f'x="{x:.1f}" y="{y:.1f}" fill="{ink}" text-anchor="{anchor}"'
    return f'<text {place} xml:space="preserve">{words}</text>'


# --------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> None:
    """Measure, or read what was measured; print, and write what is asked for."""
    options = parser().parse_args(arguments)
    if options.read:
        content = json.loads(options.read.read_text("utf-8"))
        rows = [row for row in content["rows"] if "sweep" in row]
    else:
        about, rows = machine(*PACKAGES), []
        for point in QUICK if options.quick else FULL:
            print(f"{point.sweep} {point.at:g}", file=sys.stderr, flush=True)
            rows.append(in_fresh_process(measured, point))
    growth = growths(rows)
    checked = claims_of(rows, growth)
    print_table("Simulation of two rounds, a process a point", COLUMNS, sizes_of(rows))
    print_table(f"{TABLES} tables of a device over a million items", SEARCH, in_sweep(rows, "bits"))
    heads = [
        ("by", "growth with"),
        *((key, heading) for key, heading in COLUMNS if key in MEASURED),
    ]
    print_table("Slopes of the last two points; 1 is linear", heads, growth)
    for claim in checked:
        print(claim)
    if options.json and not options.read:
        write_json(options.json, document([*rows, *growth], checked, about))
    if options.plot:
        options.plot.write_text(picture(rows), encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description="How time, memory and bytes grow with users, items, capacity and cohorts.",
        epilog="example: scale.py --json scale.json --plot docs/scale.svg (about ten minutes)",
    )
    made.add_argument("--quick", action="store_true", help="small sizes only")
    made.add_argument("--json", type=Path, metavar="FILE", help="write rows, claims and machine")
    made.add_argument("--read", type=Path, metavar="FILE", help="take the rows of such a file")
    made.add_argument("--plot", type=Path, metavar="FILE", help="draw the sweeps, as SVG")
    return made


if __name__ == "__main__":
    main()
