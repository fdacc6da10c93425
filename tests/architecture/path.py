"""Count what one plain run executes: functions, files, and frames on two paths.

    python tests/architecture/path.py [SCENARIO [SETTING...]]

Prints JSON: `functions`, `files`, and the depth of every function by its file and name. A frame
counts where its code is of `privrec`; lambdas, comprehensions and bodies of classes do not.
"""

import contextlib
import inspect
import io
import json
import os
import sys
import tempfile
import threading
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = str(ROOT / "privrec") + os.sep


def _counts(code: CodeType) -> bool:
    is_function = bool(code.co_flags & inspect.CO_OPTIMIZED) and not code.co_name.startswith("<")
    return is_function and code.co_filename.startswith(PACKAGE)


def main(scenario: str = "scenarios/quickstart.toml", *settings: str) -> None:
    """Run `scenario` under a profiler and print its figures."""
    seen: dict[int, CodeType] = {}  # by identity: the hash of a code is one of all its parts
    depths: dict[str, int] = {}

    def profile(frame: FrameType, event: str, _: object) -> None:
        code, at, depth = frame.f_code, frame, 0
        if event != "call" or id(code) in seen:
            return
        seen[id(code)] = code
        if not _counts(code):
            return
        while at is not None:
            depth += _counts(at.f_code)
            at = at.f_back
        depths[f"{code.co_filename[len(PACKAGE) :]}:{code.co_qualname}"] = depth

    for heavy in ("torch", "scipy.stats"):  # whose own imports nobody counts
        import_module(heavy)
    from privrec.cli.main import main as command

    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["privrec", "run", str(ROOT / scenario), "--out", f"{folder}/run"]
        sys.argv += [word for setting in settings for word in ("-s", setting)]
        threading.setprofile(profile)
        sys.setprofile(profile)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                command()
        finally:
            sys.setprofile(None)
    files = {name.split(":")[0] for name in depths}
    figures = {"functions": len(depths), "files": len(files), "depths": depths}
    print(json.dumps(figures, indent=1, sort_keys=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
