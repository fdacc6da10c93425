"""Run the kept list of mutants: small faults of privacy, each of which some test must notice.

In the area ``flower`` are faults that users of Flower met: what ended as success and released
nothing, words that helped nobody, work that grew too fast.

``mutants.toml`` has a table for each, named by its area and its fault: the file, the text that
stands in it exactly once, what takes its place, and the tests that must fail then::

    python tests/mutants/mutate.py                  # all, one after the other
    python tests/mutants/mutate.py -k charge -n 4   # some, in four processes

Mutants are made in copies of the tree. Before them, the tests that they name must pass unmutated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import cache_from_source
from pathlib import Path
from queue import SimpleQueue

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEAD, SURVIVED, ERROR = "dead", "SURVIVED", "ERROR"
SERVER = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Mutant:
    """One fault, and the tests that must notice it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, source: str) -> str:
        """The source with the fault.

        Raises:
            ValueError: when its text does not stand there exactly once.
        """
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"its text stands {count} times in {self.file}, and must once")
        return source.replace(self.old, self.new)


def mutants() -> list[Mutant]:
    """The kept list."""
    listed = tomllib.loads((HERE / "mutants.toml").read_text("utf-8"))
    return [Mutant(name, **{**fields, "tests": tuple(fields["tests"])})
            for name, fields in listed.items()]  # fmt: skip


@contextmanager
def copies(count: int) -> Iterator[SimpleQueue[Path]]:
    """Copies of the tree, to be taken and put back by workers."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    SERVER.set_forkserver_preload(["pydantic", "pytest", "scipy.stats", "torch"])
    free: SimpleQueue[Path] = SimpleQueue()
    skip = shutil.ignore_patterns(".*", "__pycache__", "_build", "runs", "shared")
    with tempfile.TemporaryDirectory() as place:
        for number in range(count):
            free.put(shutil.copytree(ROOT, Path(place) / str(number), ignore=skip))
        yield free


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of pytest in a copy of the tree, in a process of its own."""
    output = tree.parent / f"{tree.name}.txt"
    process = SERVER.Process(target=_pytest, args=(tree, output, tests))
    process.start()
    process.join()
    return process.exitcode or 0, output.read_text("utf-8", errors="replace")


def _pytest(tree: Path, output: Path, tests: Sequence[str]) -> None:
    """Run in a fork of a process that has imported what is slow to import and is never mutated."""
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    sys.dont_write_bytecode = False
    os.environ["PYTHONPATH"] = str(tree)
    os.environ["PRIVREC_STATE"] = tempfile.mkdtemp(dir=tree.parent)
    sys.path[:0] = [str(tree)]
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], [Unshrunk()]))


class Unshrunk:
    """A plugin that lets Hypothesis stop at the first example that fails."""

    def pytest_configure(self) -> None:
        from hypothesis import Phase, settings  # once pytest has come to rewrite it

        settings.register_profile("mutants", phases=(Phase.explicit, Phase.generate))
        settings.load_profile("mutants")


def verdict(mutant: Mutant, free: SimpleQueue[Path]) -> tuple[str, str]:
    """Whether a mutant died, and what to say about it."""
    tree, began = free.get(), time.perf_counter()
    file = tree / mutant.file
    source = file.read_text("utf-8")
    try:
        file.write_text(mutant.applied(source), "utf-8")
        code, output = run_tests(tree, mutant.tests)
    except ValueError as error:
        return ERROR, str(error)
    finally:
        file.write_text(source, "utf-8")
        Path(cache_from_source(file)).unlink(missing_ok=True)  # it may be of the same second
        free.put(tree)
    seconds = time.perf_counter() - began
    killer = re.search(r"^(?:FAILED|ERROR) (\S+::\S+)", output, re.MULTILINE)
    if code == 0:
        return SURVIVED, f"{seconds:.0f} s"
    if code == 1 and killer:
        return DEAD, f"{seconds:.0f} s, {killer[1]}"
    return ERROR, f"pytest ended with {code}:\n{output[-2000:]}"  # no test was run, for one thing


def main() -> int:
    """Run the chosen mutants; 0 when all died."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-k", metavar="REGEX", default="", help="names to run; all by default")
    parser.add_argument("-n", metavar="N", type=int, default=1, help="processes; 1 by default")
    options = parser.parse_args()
    chosen = [mutant for mutant in mutants() if re.search(options.k, mutant.name)]
    began, found = time.perf_counter(), []
    with copies(options.n) as free, ThreadPoolExecutor(options.n) as pool:
        tree = free.get()
        code, output = run_tests(tree, sorted({test for each in chosen for test in each.tests}))
        free.put(tree)
        if code:
            print(output, "these tests must pass without a mutant", sep="\n")
            return 2
        for mutant, (ended, text) in zip(
            chosen, pool.map(lambda each: verdict(each, free), chosen), strict=True
        ):
            found.append(ended)
            print(f"{ended:8}  {mutant.name}  ({text})", flush=True)
    counts = ", ".join(f"{found.count(each)} {each}" for each in (DEAD, SURVIVED, ERROR))
    print(f"{len(found)} mutants: {counts}; {time.perf_counter() - began:.0f} s")
    return 0 if found.count(DEAD) == len(found) > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
