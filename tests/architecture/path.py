"""Count what one plain run executes: functions, files, and frames on two paths.

    python tests/architecture/path.py [SCENARIO]

A frame counts where its code is of `privrec`; comprehensions, lambdas and class bodies do not.
"""

import inspect
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = str(ROOT / "privrec") + os.sep


def _own(code: CodeType) -> bool:
    function = code.co_flags & inspect.CO_OPTIMIZED  # a module's and a class's body are not
    named = not code.co_name.startswith("<")
    return bool(function and named and code.co_filename.startswith(PACKAGE))


def main(scenario: str = "scenarios/quickstart.toml") -> None:
    """Run `scenario` under a profiler and print its figures as JSON."""
    seen: set[CodeType] = set()
    depths: dict[str, int] = {}

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or code in seen or not _own(code):
            return
        seen.add(code)
        depth, at = 0, frame
        while at is not None:
            depth += _own(at.f_code)
            at = at.f_back
        depths[f"{code.co_filename[len(PACKAGE) :]}:{code.co_qualname}"] = depth

    from privrec.cli.main import main as command

    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["privrec", "run", str(ROOT / scenario), "--out", f"{folder}/run"]
        sys.stdout = open(os.devnull, "w")
        threading.setprofile(profile)
        sys.setprofile(profile)
        try:
            command()
        except SystemExit:
            pass
        finally:
            sys.setprofile(None)
            sys.stdout = sys.__stdout__
    files = Counter(name.split(":")[0] for name in depths)
    print(
        json.dumps(
            {
                "functions": len(depths),
                "files": len(files),
                "charge": {k: v for k, v in depths.items() if k.endswith("Ledger.charge")},
                "train": {k: v for k, v in depths.items() if k.endswith("Learner.train")},
            }
        )
    )
    if os.environ.get("EACH"):
        for name, depth in sorted(depths.items()):
            print(depth, name)


if __name__ == "__main__":
    main(*sys.argv[1:])
