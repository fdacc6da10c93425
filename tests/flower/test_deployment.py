"""A real SuperLink and real SuperNodes on loopback, as processes: minutes each."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra privrec[flower]")

from privrec.errors import PrivrecError
from privrec.flower.app import init
from privrec.flower.enrol import enroll
from privrec.privacy.ledger import Ledger
from privrec.report.build import build
from privrec.serving import recommend

pytestmark = pytest.mark.deployment
ML_100K = Path(__file__).resolve().parents[3] / "shared" / "data" / "ml-100k"
NODES = 4
SCENARIO = """
name = "deployed"
[data]
SOURCE
[model]
dim = 8
block = 8
[devices]
POPULATION
sampling_rate = 0.1
min_cohort = 20
[train]
rounds = 3
loss = "full_softmax"
user_steps = 2
server_optimizer = "fedavg"
server_lr = 20.0
[privacy]
noise = "distributed"
least_survivors = 0.4
clip_norm = 1.0
epsilon = 8.0
delta = 1e-4
"""


def scenario_text() -> str:
    source, population = 'source = "ml-100k"', "population = 943"
    if not ML_100K.is_dir():
        source = 'source = "synthetic"\nusers = 900\nitems = 400'
        population = "population = 900"
    return SCENARIO.replace("SOURCE", source).replace("POPULATION", population)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass
class Cluster:
    """A SuperLink and its SuperNodes; every process is ended by its own id."""

    folder: Path
    tls: tuple[str, ...] = ("--insecure",)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    env: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PRIVREC_STATE": str(self.folder / "state"),
            "OMP_NUM_THREADS": "1",
        }
        home = self.folder / "flwr"
        home.mkdir(parents=True)
        self.port, *self.node_ports = free_ports(1 + NODES)
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "loop"\n\n[superlink.loop]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )

    def start(self, name: str, *command: str, cwd: Path | None = None) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=log, start_new_session=True, cwd=cwd
            )

    def link(self, *more: str) -> None:
        self.start(
            "link", "flower-superlink", *self.tls, "--disable-runtime-dependency-installation",
            "--host", "127.0.0.1", "--port", str(self.port), *more,
        )  # fmt: skip
        self.wait_for(self.listens, 60)

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def node(self, number: int, config: str) -> None:
        self.start(
            f"node{number}", "flower-supernode", *self.tls, "--superlink",
            f"127.0.0.1:{self.port}", "--port", str(self.node_ports[number]), "--node-config",
            config,
        )  # fmt: skip

    def kill(self, name: str) -> None:
        """End a process and all that it started, at once."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, holds: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > until:
                logs = "\n".join(f"== {n}\n{self.log(n)[-3000:]}" for n in self.processes)
                pytest.fail(f"waited for {seconds} s in vain\n{logs}")
            time.sleep(0.5)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    if shutil.which("flower-superlink", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("Flower's commands are not in this environment")
    made = Cluster(tmp_path)
    monkeypatch.setenv("PRIVREC_STATE", made.env["PRIVREC_STATE"])
    yield made
    for name in list(made.processes):
        made.kill(name)


def app_of(folder: Path) -> Path:
    (folder / "deployed.toml").write_text(scenario_text())
    init(folder / "app", folder / "deployed.toml")
    return folder / "app"


def finished(out: Path) -> bool:
    return (out / "report.html").exists()


def rounds(out: Path) -> int:
    path = out / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(json.loads(line)["type"] == "round" for line in lines)


def partition(number: int) -> str:
    data = f' data="{ML_100K}"' if ML_100K.is_dir() else ""
    return f"partition-id={number} num-partitions={NODES}{data}"


def run_app(cluster: Cluster, app: Path, out: Path, *more: str) -> None:
    settings = {"timeout-s": "60", "wait-s": "150", **dict(each.split("=", 1) for each in more)}
    config = " ".join([f'out="{out}"', *(f"{name}={value}" for name, value in settings.items())])
    cluster.start("run", "flwr", "run", ".", "loop", "--stream", "--run-config", config, cwd=app)


def test_three_rounds_with_a_node_that_is_killed_in_the_midst(
    cluster: Cluster, tmp_path: Path
) -> None:
    app, out = app_of(tmp_path), tmp_path / "run"
    cluster.link()
    for number in range(NODES):
        cluster.node(number, partition(number))
    run_app(cluster, app, out)
    cluster.wait_for(lambda: rounds(out) >= 1, 300)
    cluster.kill("node2")
    cluster.wait_for(lambda: finished(out), 400)
    result = json.loads((out / "result.json").read_text())
    assert result["rounds"] == 3
    assert result["simulated"]
    with Ledger.open(out / "ledger.jsonl") as ledger:
        assert len(ledger.charges) >= 3
        assert all(charge.event.mechanism == "discrete_gaussian" for charge in ledger.charges)
    report = build(out)
    assert report.privacy.private
    assert report.privacy.adversaries[0].epsilon <= 8
    found = recommend(out, user="5", k=10, data_dir=ML_100K if ML_100K.is_dir() else None)
    assert len(found) == 10


def test_a_killed_superlink_is_started_again_and_the_run_goes_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    app, out = app_of(tmp_path), tmp_path / "run"
    keys = [tmp_path / f"keys{number}" for number in range(NODES)]
    population = 943 if ML_100K.is_dir() else 900
    for number, each in enumerate(keys):
        enroll(each, range(number, population, NODES), tmp_path / "roster", None)

    def begin() -> None:
        cluster.link()
        for number in range(NODES):
            trust = f' keys="{keys[number]}" roster="{tmp_path / "roster"}"'
            cluster.node(number, partition(number) + trust)
        run_app(cluster, app, out, f'roster="{tmp_path / "roster"}"')

    begin()
    cluster.wait_for(lambda: rounds(out) >= 1, 300)
    time.sleep(5)  # into the second round
    for name in list(cluster.processes):
        cluster.kill(name)
    assert not finished(out)
    begin()
    cluster.wait_for(lambda: finished(out), 400)
    assert json.loads((out / "result.json").read_text())["rounds"] == 3
    with Ledger.open(out / "ledger.jsonl") as ledger:
        charged = [(charge.round, charge.attempt) for charge in ledger.charges]
        assert charged == sorted(set(charged))
        assert {round for round, _ in charged} == {0, 1, 2}
        tags = [ledger.committed(*each) for each in charged]
        assert sum(tag is not None for tag in tags) >= 3
    report = build(out)
    assert report.privacy.charges == len(charged)


def test_errors_are_a_line_that_a_person_can_read(cluster: Cluster, tmp_path: Path) -> None:
    app = app_of(tmp_path)
    cluster.link()
    for number in range(NODES):
        cluster.node(number, partition(number) + ' roster="/nowhere/roster"')
    run_app(cluster, app, tmp_path / "run", "wait-s=20")
    cluster.wait_for(lambda: "no device registered" in cluster.log("run"), 120)
    assert "the roster file could not be read" in cluster.log("run")
    assert not (tmp_path / "run").exists()
    assert issubclass(PrivrecError, Exception)
