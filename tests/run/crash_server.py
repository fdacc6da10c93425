"""Runs in children of one warm process, which die at any moment or at any step.

A script, not a test: it reads one JSON command a line and answers with one. A child begins or
resumes a run, notes every step that matters to a crash in a file, and sends itself a signal at the
step it was told, or gets one after so many seconds. Forking a process that has loaded everything
makes a kill cost a fraction of a second.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from privrec.errors import PrivrecError
from privrec.privacy import ledger
from privrec.randomness import SecretRoot
from privrec.run import checkpoint, costs, lifecycle, summary
from privrec.run.record import EventLog, Observer
from privrec.run.simulation import Simulation
from privrec.scenario.load import load
from privrec.server.server import Server

Command = dict[str, Any]

# Everything between two of these leaves the same files behind.
STEPS: list[tuple[Any, str]] = [
    (ledger.Ledger, "create"),
    (ledger.Ledger, "charge"),
    (ledger.Ledger, "commit"),
    (ledger.Ledger, "seal"),
    (Simulation, "collect"),
    (Server, "apply"),
    (EventLog, "append"),
    (SecretRoot, "create"),
    (checkpoint, "write"),
    (summary, "write_model"),
    (os, "fdopen"),  # after it, the file is there and empty
    (os, "fsync"),
    (os, "replace"),
    (os, "rename"),
    (os, "unlink"),
    (os, "mkdir"),
]


class Steps:
    """Counts steps, notes them where a kill cannot take them back, and stops at one of them."""

    def __init__(self, command: Command) -> None:
        self.at, self.signal = command.get("at"), command.get("signal", signal.SIGKILL)
        self.file = os.open(command["steps"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.count = 0

    def note(self, name: str, **facts: Any) -> None:
        os.write(self.file, (json.dumps({"step": name, **facts}) + "\n").encode())

    def pass_by(self, name: str, last_act: Callable[[], object] = lambda: None) -> None:
        self.note(name)
        self.count += 1
        if self.count == self.at:
            if self.signal == signal.SIGKILL:
                last_act()
            os.kill(os.getpid(), self.signal)

    def watch(self, owner: Any, name: str) -> None:
        original = vars(owner)[name]
        bare = original.__func__ if isinstance(original, classmethod) else original
        label = f"{getattr(owner, '__name__', owner)}.{name}"

        @functools.wraps(bare)
        def watched(*args: Any, **words: Any) -> Any:
            self.pass_by(f"before {label}")
            result = bare(*args, **words)
            self.pass_by(f"after {label}")
            return result

        setattr(owner, name, classmethod(watched) if bare is not original else watched)

    def tear_ledger_lines(self) -> None:
        """A step in the midst of every line of the ledger."""
        whole = ledger.Ledger._write

        def torn(of: ledger.Ledger, content: bytes) -> None:
            half = content[: len(content) // 2]
            self.pass_by("within a ledger line", lambda: whole(of, half))
            whole(of, content)

        ledger.Ledger._write = torn  # type: ignore[method-assign]

    def note_releases(self, out: Path) -> None:
        """What is applied, and whether the ledger on disk has its charge and its commit."""
        apply = Server.apply

        def noted(server: Server, release: Any) -> None:
            lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
            commits = [line for line in lines if line.get("tag") == release.tag.hex()]
            paid = [(c["round"], c["attempt"]) for c in lines if c["kind"] == "charge"]
            keys = [(line["round"], line["attempt"]) for line in commits]
            found = len(keys) == 1 and keys[0][0] == server.index and keys[0] in paid
            self.note("release", round=server.index, tag=release.tag.hex(), paid=found)
            apply(server, release)

        Server.apply = noted  # type: ignore[method-assign]


def work(command: Command) -> int:
    """Begin or resume the run; the exit code is the command line's."""
    os.environ["PRIVREC_STATE"] = command["state"]
    steps, out = Steps(command), Path(command["out"])
    steps.note_releases(out)
    for owner, name in STEPS:
        steps.watch(owner, name)
    steps.tear_ledger_lines()
    try:
        if command["do"] == "start":
            key = command.get("key")
            known = None if key is None else bytes.fromhex(key)
            scenario = load(command["scenario"])
            lifecycle.start(scenario, out=out, observer=Observer(), unsafe_noise_key=known)
        else:
            lifecycle.resume(out, observer=Observer())
    except PrivrecError as error:
        steps.note("error", text=str(error))
        return error.exit_code
    return 0


def child(command: Command) -> None:
    """Never returns."""
    code = 70
    try:
        code = work(command)
    except BaseException as error:
        print(f"{command}: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def killed_or_done(pid: int, after_s: float | None) -> int:
    """The exit code of a child, or minus the signal that ended it."""
    end = None if after_s is None else time.monotonic() + after_s
    while end is not None and time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    if end is not None:
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def warm_up(scenario: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        os.environ["PRIVREC_STATE"] = f"{place}/state"
        lifecycle.start(load(scenario), out=Path(place, "run"), observer=Observer())


def main() -> None:
    costs.peak_bytes = lambda *_: None  # it starts a process of its own, for seconds
    warm_up(sys.argv[1])
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(command)
        code = killed_or_done(pid, command.get("after_s"))
        print(json.dumps({"code": code, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    main()
