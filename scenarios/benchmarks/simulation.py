"""CPU of one simulated device-round: privrec training GMF, against Flower's Ray doing nothing.

    python scenarios/benchmarks/simulation.py [--quick] [--json FILE] [--data DIR]

Both sides run in this one call, taking turns, each repetition in a fresh process; the figure of a
row is the median of its repetitions. A repetition is one run whose CPU time (user and system, of
the process and everything it started) is read at the end of an early round and of a late one; the
difference over the device-rounds in between is the cost in steady state, without start-up.

* privrec: `scenarios/ml-1m.toml` with fewer rounds, through `privrec.run.lifecycle`, everything
  that a round does included: plan, charge on disk, local training, clipping, encoding, the sum, the
  server's step, records and checkpoints. Evaluation lies outside the marks.
* Flower: `_flower_echo.py`, an app that returns the vector it was sent, of as many bytes as a
  privrec upload, on Flower's Ray backend with two actors of one CPU, without dashboard,
  telemetry and logging. 20, 50 and 100 SuperNodes cost the same within the noise, 300 up to twice
  as much (its in-memory link state is searched for every node); the default is 50.

The claim compares with the cheapest Flower row at the same vector size that uses documented
settings only. Without MovieLens-1M (`--data`, `PRIVREC_DATA`) privrec trains on synthetic data of
its shape, and the row says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import _flower_echo as flower
from _common import (
    ROOT,
    Claim,
    CpuMark,
    document,
    in_fresh_process,
    machine,
    print_table,
    write_json,
)

if TYPE_CHECKING:
    from privrec.scenario.load import Scenario

SCENARIO = ROOT / "scenarios" / "ml-1m.toml"
TARGET_RATIO = 25.0
TINY_VALUES = 16
SHAPE = ("data.items=3706", "data.interactions_per_user=164")
USERS = {False: 6040, True: 1000}
"""Synthetic users, by whether the run is quick; the expected cohort is the same."""
PACKAGES = ("privrec", "torch", "numpy", "flwr", "ray")
COLUMNS = (
    ("name", "what"),
    ("vector_bytes", "vector, bytes"),
    ("device_rounds", "device-rounds"),
    ("cpu_ms", "CPU ms per device-round"),
    ("low_ms", "lowest"),
    ("high_ms", "highest"),
    ("wall_ms", "wall ms"),
    ("ratio", "times privrec"),
)


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Args:
        repetitions: Repetitions of each row.
        rounds: Rounds of a privrec run; its last is outside the marks (evaluation follows it).
        warm: Rounds before the first mark, on both sides.
        echo_rounds: Rounds of a Flower run after ``warm``.
        supernodes: SuperNodes of a Flower run.
        data: Folder of MovieLens-1M, or None for synthetic data.
        peer: Whether to measure Flower at all.
        quick: Whether synthetic data, where there is no other, is small.
    """

    repetitions: int
    rounds: int
    warm: int
    echo_rounds: int
    supernodes: int
    data: Path | None
    peer: bool
    quick: bool


@dataclass(frozen=True)
class Sample:
    """One repetition: the steady part of one run."""

    wall_s: float
    cpu: CpuMark
    device_rounds: int
    vector_bytes: int

    @property
    def cpu_s(self) -> float:
        """CPU seconds per device-round."""
        return self.cpu.total / self.device_rounds


# --------------------------------------------------------------------------- the two sides


def scenario_of(settings: Settings) -> Scenario:
    """The scenario for a benchmark: short, not evaluated meanwhile, and on data that is there."""
    from privrec.scenario.load import load

    # Checkpoints ten times as often as in a real run, so that some fall between the marks.
    changes = [f"train.rounds={settings.rounds}", "run.eval_every=0", "run.checkpoint_every=10"]
    if settings.data is None:
        users = USERS[settings.quick]
        rate = load(SCENARIO).devices.sampling_rate * USERS[False] / users
        changes += ["data.source=synthetic", f"data.users={users}", *SHAPE]
        changes += [f"devices.population={users}", f"devices.sampling_rate={min(1.0, rate)}"]
    return load(SCENARIO, changes)


def privrec_sample(settings: Settings) -> Sample:
    """One run of privrec, measured; to be called in a process of its own."""
    from privrec.run import lifecycle
    from privrec.run.record import Observer, Record

    class Meter(Observer):
        """Tells the meter of each round's end, and counts devices between the two marks."""

        def __init__(self) -> None:
            self.marks = flower.Marks(settings.warm, settings.rounds - 1)
            self.device_rounds = 0

        def round(self, record: Record) -> None:
            self.marks.end_of(record.round)
            if self.marks.first < record.round <= self.marks.last:
                self.device_rounds += record.cohort or 0

    meter = Meter()
    with tempfile.TemporaryDirectory(prefix="privrec") as folder:
        os.environ["PRIVREC_STATE"] = str(Path(folder) / "state")
        out = Path(folder) / "run"
        result = lifecycle.start(
            scenario_of(settings), out=out, data_dir=settings.data, observer=meter
        )
    wall, cpu = meter.marks.spent
    return Sample(wall, cpu, meter.device_rounds, int(result.payload["cost"]["upload_bytes"]))


def flower_sample(spec: flower.EchoSpec) -> Sample:
    """One Flower simulation, measured; to be called in a process of its own."""
    wall, cpu, device_rounds = flower.measure(spec)
    return Sample(wall, cpu, device_rounds, 4 * spec.values)


def flower_rows(settings: Settings, values: int) -> dict[str, flower.EchoSpec]:
    """Name and simulation of each Flower row."""
    plain = flower.EchoSpec(
        values=values,
        supernodes=settings.supernodes,
        rounds=settings.warm + settings.echo_rounds,
        warm=settings.warm,
    )
    return {
        "Flower Ray, echo, no average": replace(plain, average=False),
        "Flower Ray, echo, FedAvg": plain,
        "Flower Ray, echo, FedAvg, tiny vector": replace(plain, values=TINY_VALUES),
        "Flower Ray, echo, FedAvg, private Ray limits": replace(plain, inline=True),
    }


# --------------------------------------------------------------------------- rows and claim


def measure(settings: Settings) -> dict[str, list[Sample]]:
    """The samples of every row, the sides taking turns."""
    ours = "privrec, GMF d=32, " + ("ML-1M" if settings.data else "synthetic of ML-1M's shape")
    samples: dict[str, list[Sample]] = {ours: []}
    for repetition in range(settings.repetitions):
        note(f"repetition {repetition + 1} of {settings.repetitions}: {ours}")
        sample = in_fresh_process(privrec_sample, settings)
        samples[ours].append(sample)
        peers = flower_rows(settings, sample.vector_bytes // 4) if settings.peer else {}
        for name, spec in peers.items():
            note(f"repetition {repetition + 1} of {settings.repetitions}: {name}")
            samples.setdefault(name, []).append(in_fresh_process(flower_sample, spec))
    return samples


def note(text: str) -> None:
    """A line on standard error, so that standard output is the table alone."""
    print(text, file=sys.stderr, flush=True)


def as_row(name: str, samples: list[Sample], reference_s: float) -> dict[str, Any]:
    """The row of one name: medians over its repetitions, and every repetition's figure."""
    costs = [sample.cpu_s for sample in samples]
    parts = sorted({part for sample in samples for part in sample.cpu.by_name})
    return {
        "name": name,
        "vector_bytes": samples[0].vector_bytes,
        "repetitions": len(samples),
        "device_rounds": sum(sample.device_rounds for sample in samples),
        "cpu_s_per_device_round": median(costs),
        "cpu_s_per_device_round_each": costs,
        "cpu_s_per_device_round_by_process": {
            part: median(s.cpu.by_name.get(part, 0.0) / s.device_rounds for s in samples)
            for part in parts
        },
        "wall_s_per_device_round": median(s.wall_s / s.device_rounds for s in samples),
        "times_privrec": median(costs) / reference_s,
    }


def claim(rows: list[dict[str, Any]]) -> Claim:
    """Against the cheapest Flower row of the same vector size and documented settings."""
    ours, *peers = rows
    equal = [
        row["times_privrec"]
        for row in peers
        if row["vector_bytes"] == ours["vector_bytes"] and "private Ray limits" not in row["name"]
    ]
    return Claim(
        name="cpu_ratio_vs_flower_ray",
        value=min(equal, default=None),
        target=TARGET_RATIO,
        unit="times the CPU seconds per device-round of privrec",
    )


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as the table shows it, in milliseconds."""
    costs = row["cpu_s_per_device_round_each"]
    return {
        **row,
        "vector_bytes": f"{row['vector_bytes']:,}",
        "cpu_ms": 1e3 * row["cpu_s_per_device_round"],
        "low_ms": 1e3 * min(costs),
        "high_ms": 1e3 * max(costs),
        "wall_ms": 1e3 * row["wall_s_per_device_round"],
        "ratio": row["times_privrec"],
    }


# --------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and write the JSON file where one is named."""
    options = parser().parse_args(arguments)
    settings = settings_from(options)
    about = machine(*PACKAGES) | {"flower": flower_about(settings)}
    samples = measure(settings)
    reference = median(sample.cpu_s for sample in next(iter(samples.values())))
    rows = [as_row(name, found, reference) for name, found in samples.items()]
    checked = claim(rows)
    print_table("CPU of one device-round, steady state", COLUMNS, [shown(row) for row in rows])
    print(checked)
    if options.json:
        write_json(options.json, document(rows, [checked], about))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description="CPU seconds of one simulated device-round: privrec against Flower's Ray.",
        epilog="example: simulation.py --data ml-1m --json simulation.json",
    )
    made.add_argument("--quick", action="store_true", help="one short repetition of each row")
    made.add_argument("--json", type=Path, metavar="FILE", help="write rows, claims and machine")
    made.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of MovieLens-1M; default $PRIVREC_DATA"
    )
    made.add_argument(
        "--repetitions", type=int, metavar="N", help="repetitions of each row; default 3"
    )
    made.add_argument("--supernodes", type=int, metavar="N", default=50, help="default 50")
    made.add_argument("--no-flower", action="store_true", help="measure privrec alone; no claim")
    return made


def settings_from(options: argparse.Namespace) -> Settings:
    """What the options ask for; what cannot be done ends the program with status 2."""
    problem = _problem(options)
    if problem:
        parser().error(problem)
    repetitions = options.repetitions or (1 if options.quick else 3)
    data = options.data or (Path(found) if (found := os.environ.get("PRIVREC_DATA")) else None)
    rounds, echo_rounds = (8, 6) if options.quick else (66, 40)
    peer = not options.no_flower
    return Settings(
        repetitions, rounds, 4, echo_rounds, options.supernodes, data, peer, options.quick
    )


def _problem(options: argparse.Namespace) -> str | None:
    if options.repetitions is not None and options.repetitions < 1:
        return f"--repetitions is {options.repetitions}; it is at least 1."
    if options.supernodes < 2:
        return f"--supernodes is {options.supernodes}; Flower's FedAvg wants at least 2."
    if options.data is not None and not options.data.is_dir():
        return f"--data is {options.data}, which is no folder; name the one that holds ml-1m."
    if not options.no_flower and not flower.available():
        return (
            "flwr[simulation] is not installed, and the benchmark runs both sides in one "
            "environment. Install it with pip install 'flwr[simulation]', or measure privrec "
            "alone with --no-flower."
        )
    return None


def flower_about(settings: Settings) -> dict[str, Any] | None:
    """Flower's configuration, for the JSON file; None where it is not measured."""
    if not settings.peer:
        return None
    return {
        "backend": "ray",
        "actors": flower.ACTORS,
        "supernodes": settings.supernodes,
        "client_resources": {"num_cpus": 1, "num_gpus": 0},
        "private_ray_limits": flower.INLINE_MESSAGES,
    }


if __name__ == "__main__":
    main()
