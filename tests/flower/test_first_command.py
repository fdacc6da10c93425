"""The first commands, as pages print them, in environments made as pages say: minutes.

Blocks are pasted into a shell whose home is empty. Only ports are changed, so that nothing that
runs here already is in their way. A package registry on this machine notes what it is asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from docs_pages import ROOT, fences

yaml = pytest.importorskip("yaml", reason="it comes with the extra privrec[flower]")

pytestmark = pytest.mark.deployment
INSTALL, FIRST, LOOPBACK, CERTIFICATES, SECURED = (
    fence.text
    for fence in fences((ROOT / "docs" / "flower.md").read_text("utf-8"))
    if "deployment" in fence.words
)
README = [f.text for f in fences((ROOT / "README.md").read_text("utf-8")) if "install" in f.words]
OURS = re.compile("PYTHON|PRIVREC|FLWR|VIRTUAL_ENV|UV_")
LONG = 1800
LOOP = "127.0.0.1"


def checkout(folder: Path) -> Path:
    """A copy of the tree, as a clone of it would be."""
    listing = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module", params=["pinned", "newest"])
def environment(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    """The ``bin`` of an environment that the README's line and the page's one extra made.

    With the flwr of constraints.txt, or with the newest that the registry has.
    """
    clone = checkout(tmp_path_factory.mktemp("clone"))
    newest = "pip install -q --upgrade 'flwr[simulation]'" if request.param == "newest" else ""
    lines = "\n".join([*README, INSTALL, newest])
    env = {name: value for name, value in os.environ.items() if not OURS.match(name)}
    env["PRIVREC_STATE"] = str(tmp_path_factory.mktemp("state"))
    made = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", lines],
        cwd=clone, env=env, capture_output=True, text=True, timeout=LONG,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return clone / ".venv" / "bin"


class Registry(BaseHTTPRequestHandler):
    """A package registry that has nothing, and notes what it is asked for."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        """Not to the test's output."""


@dataclass
class Terminal:
    """A shell in a folder, with a home that is empty; every process is ended by its own id."""

    folder: Path
    bin: Path
    registry: str
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.home, self.work = self.folder / "home", self.folder / "work"
        self.home.mkdir()
        self.work.mkdir()
        self.ports = free_ports()
        self.env = {
            **{name: value for name, value in os.environ.items() if not OURS.match(name)},
            "HOME": str(self.home),
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "UV_DEFAULT_INDEX": self.registry,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(self.ports + 6),
            "FLWR_LOCAL_CONTROL_API_PORT": str(self.ports + 7),
        }

    def paste(self, text: str) -> str:
        """Run a block of a page to its end; what it printed."""
        for port, ours in ((8000, 0), (8443, 0), (9094, 1), (9194, 1)):
            text = text.replace(str(port), str(self.ports + ours))
        with (self.work / "screen").open("w+b") as screen:
            shell = self.begin(["bash", "-c", text], screen)
            try:
                shell.wait(LONG)
            finally:
                self.end(shell)
            screen.seek(0)
            return screen.read().decode(errors="replace")

    def begin(self, command: Sequence[str], screen: Any, **more: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command, cwd=self.work, env={**self.env, **more}, stdout=screen, stderr=screen,
            start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def call(self, *command: str) -> str:
        """A command that succeeds; what it printed."""
        done = subprocess.run(
            command, cwd=self.work, env=self.env, capture_output=True, text=True, timeout=LONG
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def close(self) -> None:
        for process in self.started:
            self.end(process)
        # The SuperLink that `flwr run` leaves behind, told by the log in this home.
        listed = subprocess.run(
            ["ps", "-axwwo", "pid=,args="], capture_output=True, text=True
        ).stdout
        for line in listed.splitlines():
            if "flower-superlink" in line and str(self.home) in line:
                os.kill(int(line.split()[0]), signal.SIGTERM)

    def check(self, out: Path, rounds: int) -> None:
        """A run that was finished, and that its report's verifier finds in order."""
        said = self.call("privrec", "report", "verify", str(out))
        result = json.loads((out / "result.json").read_text())
        assert result["rounds"] == rounds, said
        assert result["metrics"].keys() == {"summed_hr@10", "summed_loss"}
        page = (out / "report.md").read_text("utf-8")
        assert "alone they cost ε = 2.00" in " ".join(page.split())


def free_ports(count: int = 8) -> int:
    """The first of some ports in a row that nobody listens on."""
    for first in range(9400, 9600, count):
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no ports are free")


@pytest.fixture
def terminal(environment: Path, tmp_path: Path) -> Iterator[Terminal]:
    asked: list[str] = []
    handler = type("Noting", (Registry,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as registry:
        threading.Thread(target=registry.serve_forever, daemon=True).start()
        made = Terminal(tmp_path, environment, f"http://127.0.0.1:{registry.server_port}/simple")
        try:
            yield made
        finally:
            made.close()
            registry.shutdown()
    assert asked == [], "an app is run without asking a registry for anything"


def one_round(app: Path) -> None:
    """What is not about rounds has one."""
    scenario = app / "recommender" / "scenario.toml"
    scenario.write_text(scenario.read_text().replace("rounds = 3", "rounds = 1"))


def test_the_first_command_and_the_next_end_in_a_verified_report(terminal: Terminal) -> None:
    said = terminal.paste(FIRST)
    print(said)
    assert "First," not in said  # nothing is missing
    terminal.check(terminal.home / "privrec-runs" / "my-app", 3)
    found = json.loads(terminal.call("privrec", "doctor", "--json"))
    levels = {finding["name"]: finding["level"] for finding in found}
    assert levels["extra flower"] == levels["local SuperLink"] == "ok"


def test_the_loopback_block_is_pasted_whole_and_again(terminal: Terminal) -> None:
    terminal.call("privrec", "flower", "init", "my-app")
    print(terminal.paste(LOOPBACK))
    out = terminal.home / "privrec-runs" / "loopback"
    terminal.check(out, 3)
    shutil.rmtree(out)
    one_round(terminal.work / "my-app")
    print(terminal.paste(LOOPBACK))
    terminal.check(out, 1)


def test_the_secured_blocks_end_in_a_verified_report(terminal: Terminal) -> None:
    terminal.call("privrec", "flower", "init", "my-app")
    one_round(terminal.work / "my-app")
    print(terminal.paste(CERTIFICATES))
    said = terminal.paste(SECURED)
    print(said)
    assert said.count("registered successfully") == 4
    assert "120 of 120 devices registered" in said
    terminal.check(terminal.home / "privrec-runs" / "secured", 1)


def composed(terminal: Terminal) -> dict[str, Path]:
    """Start every service of the compose file as a process; the folder of each one's /state."""
    services = yaml.safe_load((ROOT / "docs" / "compose.yaml").read_text("utf-8"))["services"]
    states = {}
    for number, (name, service) in enumerate(services.items()):
        states[name] = state = terminal.folder / name
        state.mkdir()
        assert service["volumes"] == [f"{name}:/state"]

        def here(text: str, state: Path = state, number: int = number) -> str:
            ports = text.replace("superlink:8000", f"{LOOP}:8000").replace("0.0.0.0", LOOP)  # noqa: S104
            ports = ports.replace("8000", str(terminal.ports))
            return ports.replace("9094", str(terminal.ports + number)).replace("/state", str(state))

        env = {key: here(value) for key, value in service["environment"].items()}
        with (state / "log").open("wb") as log:
            terminal.begin(shlex.split(here(service["command"])), log, **env)
    return states


def statuses(terminal: Terminal) -> dict[str, str]:
    runs = json.loads(terminal.call("flwr", "list", "loop", "--format", "json"))["runs"]
    return {str(run["run-id"]): run["status"] for run in runs}


def test_the_services_of_the_compose_file_and_the_commands_that_watch_them(
    terminal: Terminal,
) -> None:
    terminal.call("privrec", "flower", "init", "my-app")
    one_round(terminal.work / "my-app")
    entry = LOOPBACK.partition("flower-superlink")[0]
    terminal.paste(entry)
    states = composed(terminal)
    assert len(states) == 5
    terminal.paste("for _ in {1..60}; do flwr list loop >/dev/null 2>&1 && break; sleep 1; done")
    assert not statuses(terminal)

    def begun(name: str) -> str:
        out = states["superlink"] / name
        words = ("flwr", "run", "my-app", "loop", "--run-config", f'out="{out}"')
        return str(json.loads(terminal.call(*words, "--format", "json"))["run-id"])

    run = begun("run")
    log = terminal.call("flwr", "log", run, "loop")
    assert "120 of 120 devices registered" in log
    assert statuses(terminal)[run] == "finished:completed"
    terminal.env["PRIVREC_STATE"] = str(states["superlink"] / "privrec")
    terminal.check(states["superlink"] / "run", 1)
    nodes = json.loads(terminal.call("flwr", "supernode", "list", "loop", "--format", "json"))
    assert len(nodes["nodes"]) == 4

    second = begun("stopped")
    until = time.monotonic() + 60
    while not statuses(terminal)[second].startswith("running"):
        assert time.monotonic() < until
        time.sleep(1)
    terminal.call("flwr", "stop", second, "loop")
    assert statuses(terminal)[second] == "finished:stopped"

    terminal.call("flwr", "build", "--app", "my-app")
    (bundle,) = terminal.work.glob("*.fab")
    with zipfile.ZipFile(bundle) as opened:
        assert "recommender/scenario.toml" in opened.namelist()
        assert b"dependencies = []" in opened.read("pyproject.toml")
