"""Compare the golden runs with what is kept of them, or keep them anew.

    python tests/golden/freeze.py                 compare; lists what changed, exit status 1
    python tests/golden/freeze.py central texts   only these
    python tests/golden/freeze.py --write         keep what this tree gives, for every vector width

``--write`` keeps bits of the vector widths that this processor has and forgets those of others:
they would be of another tree. The commit that writes says why each changed field changed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "support"), str(TESTS / "flower")]

import golden  # noqa: E402  # found by the path above

WIDTHS = ("default", "avx2", "")
"""Values of ATEN_CPU_CAPABILITY; the last is the processor's own."""


def main() -> int:
    """Do as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help=", ".join(golden.RUNS))
    parser.add_argument("--write", action="store_true", help="rewrite golden.json")
    parser.add_argument("--print", nargs="+", metavar="PART", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.runs) - set(golden.RUNS):
        parser.error(f"no such runs: {', '.join(unknown)}")
    names = options.runs or list(golden.RUNS)
    if options.print:
        found = {
            name: {part: golden.measured(name, part) for part in options.print} for name in names
        }
        print(json.dumps({"arithmetic": golden.arithmetic(), "runs": found}))
        return 0
    return _write() if options.write else _compare(names)


def _compare(names: list[str]) -> int:
    kept, mine, differing = golden.kept(), golden.arithmetic(), 0
    for name in names:
        for part in golden.PARTS:
            expected, found = kept[name][part], golden.measured(name, part)
            if part == "bits" and mine not in expected:
                known = found in expected.values()
                lines = [] if known else [f"none are kept for the arithmetic {mine}"]
            else:
                lines = golden.changed(expected[mine] if part == "bits" else expected, found)
            differing += len(lines)
            print(
                f"{name}, {part}:", "\n    ".join(["", *lines]) if lines else "as kept", flush=True
            )
    return min(1, differing)


def _write() -> int:
    runs: dict[str, dict[str, Any]] = {name: {"bits": {}} for name in golden.RUNS}
    for width in WIDTHS:
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": width}
        if not width:
            del environment["ATEN_CPU_CAPABILITY"]
        parts = ("bits",) if width else golden.PARTS
        command = [sys.executable, __file__, "--print", *parts]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        answer = json.loads(done.stdout.splitlines()[-1])
        for name, found in answer["runs"].items():
            runs[name]["bits"][answer["arithmetic"]] = found.pop("bits")
            runs[name] = {**found, **runs[name]}
    golden.write(runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
