"""What benchmarks share: rows, claims, the table, the JSON file, the machine, processes, CPU time.

A benchmark is run as ``scenarios/benchmarks/NAME.py [--quick] [--json FILE]``. It prints a table
and writes ``{"rows": […], "claims": [{"name", "value", "target", "holds", …}], "machine"}``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
"""The repository: scenarios and tests lie below it."""

T = TypeVar("T")


@dataclass(frozen=True)
class Claim:
    """A statement that the benchmark checks; both of its sides were measured in this run.

    Args:
        name: Stable name, which issues and documents quote.
        value: What was measured, or None where this run did not measure it.
        target: What is promised.
        unit: What ``value`` counts, in words.
        sense: Whether ``value`` must be "at least" or "at most" ``target``.
    """

    name: str
    value: float | None
    target: float
    unit: str
    sense: Literal["at least", "at most"] = "at least"

    @property
    def holds(self) -> bool:
        """Whether the target is met; what was not measured does not hold."""
        if self.value is None:
            return False
        met = self.value >= self.target if self.sense == "at least" else self.value <= self.target
        return bool(met)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name}: not measured (target: {self.sense} {self.target:g})"
        verdict = "holds" if self.holds else "DOES NOT HOLD"
        value, rule = f"{self.value:.1f} {self.unit}", f"{self.sense} {self.target:g}"
        return f"{self.name}: {value}, target {rule}: {verdict}"


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, memory, system, and the versions of Python and of ``packages``.

    Args:
        packages: Distribution names; one that is not installed has the version None.
    """
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_at_start": round(os.getloadavg()[0], 2),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def document(
    rows: Sequence[Mapping[str, Any]], claims: Sequence[Claim], about: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON document of a benchmark."""
    return {
        "rows": [dict(row) for row in rows],
        "claims": [claim.to_json() for claim in claims],
        "machine": dict(about),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write the document, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def print_table(
    title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Print rows as a table on standard output.

    Args:
        title: What the table shows, with its unit.
        columns: Key of the row and heading of each column; numbers are set to the right.
        rows: The rows; a key that is absent or None leaves its cell empty.
    """
    table = Table(title=title, title_justify="left")
    for key, heading in columns:
        numeric = any(isinstance(row.get(key), int | float) for row in rows)
        table.add_column(heading, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key, _ in columns))
    console = Console()
    # A pipe has no width of its own; the default of 80 would cut headings.
    Console(width=None if console.is_terminal else 140).print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,.3f}" if isinstance(value, float) else f"{value}"


# --------------------------------------------------------------------------- processes, CPU meter


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """The value of a function that is called in a new interpreter."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


@dataclass(frozen=True)
class CpuMark:
    """CPU seconds, user and system, that a process tree has used so far.

    Args:
        total: Of the root, its living descendants, and all dead ones that were waited for.
        by_name: The same by the kernel's name of the process.
    """

    total: float
    by_name: Mapping[str, float]

    def since(self, earlier: CpuMark) -> CpuMark:
        """What was used between an earlier mark of the same tree and this one."""
        spent = {name: used - earlier.by_name.get(name, 0) for name, used in self.by_name.items()}
        return CpuMark(self.total - earlier.total, spent)


def cpu_of_tree(root: int | None = None) -> CpuMark:
    """CPU used so far by a process, all of its threads and everything it started.

    Read from Linux' ``/proc``, in steps of one clock tick (usually 10 ms) a process, and the same
    for both sides of a comparison. A process that left the tree (a daemon adopted by init) is
    missed, so a comparison should measure the peer no worse than itself.

    Args:
        root: Process id; this process when None.

    Raises:
        SystemExit: This system has no ``/proc``.
    """
    if sys.platform != "linux":
        raise SystemExit(
            f"error: the CPU meter reads /proc, which {sys.platform} lacks; a benchmark of "
            "processes needs Linux. Run it there."
        )
    table = {pid: (parent, name, used) for pid, parent, name, used in _processes()}
    members = _descendants({pid: row[0] for pid, row in table.items()}, root or os.getpid())
    by_name: Counter[str] = Counter()
    for pid in members:
        by_name[table[pid][1]] += table[pid][2]
    seconds = {name: ticks / os.sysconf("SC_CLK_TCK") for name, ticks in by_name.items()}
    return CpuMark(sum(seconds.values()), seconds)


def _descendants(parents: Mapping[int, int], root: int) -> set[int]:
    members, grown = {root}, {root}
    while grown:
        grown = {pid for pid, parent in parents.items() if parent in grown} - members
        members |= grown
    return members


def _processes() -> Iterator[tuple[int, int, str, int]]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            text = (entry / "stat").read_text("utf-8", errors="replace")
        except OSError:  # it ended between the listing and the reading
            continue
        # The name stands in parentheses and may itself hold spaces and parentheses.
        name = text[text.index("(") + 1 : text.rindex(")")]
        fields = text[text.rindex(")") + 2 :].split()
        # utime, stime, and cutime, cstime of children waited for: proc(5), fields 14 to 17.
        yield int(entry.name), int(fields[1]), name, sum(map(int, fields[11:15]))
