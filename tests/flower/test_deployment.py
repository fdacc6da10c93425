"""A real SuperLink and real SuperNodes on loopback, as processes: minutes each."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import ipaddress
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
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

pytest.importorskip("flwr", reason="needs the extra privrec[flower]")

from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from privrec.errors import PrivrecError
from privrec.flower.app import init
from privrec.flower.enrolment import enroll
from privrec.privacy.ledger import PREPARATION, Ledger
from privrec.report.build import build
from privrec.run.recommend import recommend

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


WHOLE = """
name = "whole"
[data]
users = 240
items = 320
clusters = 4
interactions_per_user = 20
[model]
dim = 16
block = 16
init_std = 0.02
[devices]
population = 240
sampling = "everybody"
popularity = "released"
popularity_epsilon = 0.5
tiers = [
    { capacity = 1.0, share = 0.25 },
    { capacity = 0.5, share = 0.25 },
    { capacity = 0.25, share = 0.25 },
    { capacity = 0.125, share = 0.25 },
]
[train]
rounds = 3
loss = "full_softmax"
rank_power = 0.3
selector = "pghash"
selected = 0.5
budget = 0.25
serve_budget = 1.0
serve_steps = 8
user_steps = 2
user_l2 = 1.0
server_optimizer = "fedavg"
server_lr = 36.0
[privacy]
noise = "distributed"
least_survivors = 0.6
spare_attempts = 3
clip_norm = 1.0
epsilon = 8.0
delta = 1e-4
"""
"""What ``scenarios/whole.toml`` has, smaller. Graphs are sparse too, so that the attempt in which a
quarter of the devices is lost may end without a sum; the next one is among those that are left."""


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
    link_options: tuple[str, ...] = ("--insecure",)
    node_options: tuple[str, ...] = ("--insecure",)
    address: str = "insecure = true"
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
        self.configure()

    def configure(self) -> None:
        """Where ``flwr`` finds the SuperLink, and whether it speaks TLS to it."""
        (self.folder / "flwr" / "config.toml").write_text(
            '[superlink]\ndefault = "loop"\n\n[superlink.loop]\n'
            f'address = "127.0.0.1:{self.port}"\n{self.address}\n'
        )

    def call(self, *command: str) -> str:
        """A command that ends by itself, and what it printed."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, name: str, *command: str, cwd: Path | None = None) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=log, start_new_session=True, cwd=cwd
            )

    def link(self, *more: str) -> None:
        self.start(
            "link", "flower-superlink", *self.link_options, "--host", "127.0.0.1", "--port",
            str(self.port), *more,
        )  # fmt: skip
        self.wait_for(self.listens, 60)

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def node(self, number: int, config: str, *more: str) -> None:
        self.start(
            f"node{number}", "flower-supernode", *self.node_options, *more, "--superlink",
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
    settings = {"timeout-s": "150", "wait-s": "150", **dict(each.split("=", 1) for each in more)}
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
    cluster.wait_for(lambda: rounds(out) >= 1, 900)
    cluster.kill("node2")
    cluster.wait_for(lambda: finished(out), 1200)
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


def test_the_whole_system_with_a_node_that_is_killed_in_mid_round(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "whole.toml").write_text(WHOLE)
    init(tmp_path / "app", tmp_path / "whole.toml")
    out = tmp_path / "run"
    cluster.link()
    for number in range(NODES):
        cluster.node(number, f"partition-id={number} num-partitions={NODES}")
    run_app(cluster, tmp_path / "app", out, "timeout-s=180")
    cluster.wait_for((out / "catalogue.safetensors").exists, 900)
    cluster.wait_for(lambda: rounds(out) >= 1, 900)
    time.sleep(5)  # into the second round
    cluster.kill("node3")
    cluster.wait_for(lambda: finished(out), 1800)
    assert json.loads((out / "result.json").read_text())["rounds"] == 3
    with Ledger.open(out / "ledger.jsonl") as ledger:
        assert ledger.charges[0].round == PREPARATION
        assert {charge.event.mechanism for charge in ledger.charges} == {"discrete_gaussian"}
        assert {charge.round for charge in ledger.charges} == {PREPARATION, 0, 1, 2}
    cluster.call("privrec", "report", "verify", str(out))
    report = build(out)
    assert report.privacy.private
    assert all(each.epsilon and each.epsilon <= 8 for each in report.privacy.adversaries)
    assert len(recommend(out, user="5", k=10)) == 10


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
    cluster.wait_for(lambda: rounds(out) >= 1, 900)
    time.sleep(5)  # into the second round
    for name in list(cluster.processes):
        cluster.kill(name)
    assert not finished(out)
    begin()
    cluster.wait_for(lambda: finished(out), 1200)
    assert json.loads((out / "result.json").read_text())["rounds"] == 3
    with Ledger.open(out / "ledger.jsonl") as ledger:
        charged = [(charge.round, charge.attempt) for charge in ledger.charges]
        assert charged == sorted(set(charged))
        assert {round for round, _ in charged} == {0, 1, 2}
        tags = [ledger.committed(*each) for each in charged]
        assert sum(tag is not None for tag in tags) >= 3
    report = build(out)
    assert report.privacy.charges == len(charged)


def quickstart_of(folder: Path) -> Path:
    """The app of Flower's layout that lies beside this file, with the network that tests share."""
    here = Path(__file__).parent
    app = shutil.copytree(here / "quickstart", folder / "quickstart")
    shutil.copy(here.parent / "support" / "quickstart_task.py", app / "quickstart" / "model.py")
    return app


def test_a_quickstart_is_plain_fedavg_with_a_supernode_killed_in_each_round(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model after each round is FedAvg's mean over those whose update came before they died."""
    app, out, roster = quickstart_of(tmp_path), tmp_path / "models", tmp_path / "roster"
    watched = tmp_path / "watched"
    out.mkdir()
    watched.mkdir()

    def begin(part: int) -> None:
        own = f'keys="{tmp_path}/keys{part}" roster="{roster}" watched="{watched}"'
        cluster.node(part, f"partition-id={part} num-partitions={NODES} {own}")

    cluster.link()
    for part in range(NODES):
        enroll(tmp_path / f"keys{part}", roster=roster)
        begin(part)
    killed = {1: (2, "masked"), 2: (0, "confirm"), 3: (1, "shares")}
    config = f'out="{out}" roster="{roster}" num-nodes={NODES} num-server-rounds={len(killed)}'
    (watched / "halt-2-masked").touch()  # the first, before anything runs
    cluster.start("run", "flwr", "run", ".", "loop", "--stream", "--run-config", config, cwd=app)
    for round, (part, stage) in killed.items():
        cluster.wait_for((watched / f"halted-{part}-{stage}").exists, 600)
        cluster.kill(f"node{part}")
        (watched / f"halt-{part}-{stage}").unlink()
        cluster.wait_for((out / f"{round}.pt").exists, 600)
        if round + 1 in killed:
            following = killed[round + 1]
            (watched / f"halt-{following[0]}-{following[1]}").touch()
            begin(part)
    monkeypatch.syspath_prepend(str(app))
    task, rate = importlib.import_module("quickstart.task"), 0.03
    for round, (part, stage) in killed.items():
        before, after = (torch.load(out / f"{r}.pt") for r in (round - 1, round))
        counted = [each for each in range(NODES) if each != part or stage in ("confirm", "unmask")]
        replies = []
        for each in counted:
            new, loss, examples = task.trained(before, each, round, rate)
            metrics = MetricRecord({"train_loss": loss, "num-examples": examples})
            replies.append(RecordDict({"arrays": ArrayRecord(new), "metrics": metrics}))
        plain = aggregate_arrayrecords(replies, "num-examples").to_torch_state_dict()
        apart = max((plain[name] - after[name]).abs().max().item() for name in plain)
        moved = max((before[name] - after[name]).abs().max().item() for name in plain)
        print(f"round {round}: {len(counted)} of {NODES} in it, {apart:.1e} from plain FedAvg")
        assert apart <= 1e-5 < 1e-3 < moved
    assert "updates are longer" not in cluster.log("run")


def certified(folder: Path) -> dict[str, Path]:
    """A certificate authority, and a certificate for this machine, as PEM files."""
    now, one = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "link")}
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")])
    paths = {}
    for name, key in keys.items():
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - one)
            .not_valid_after(now + one)
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
        )
        if name == "link":
            here = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            made = made.add_extension(x509.SubjectAlternativeName(here), critical=False)
        paths[name] = folder / f"{name}.crt"
        certificate = made.sign(keys["ca"], hashes.SHA256())
        paths[name].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths["key"] = folder / "link.key"
    paths["key"].write_bytes(
        keys["link"].private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths


def node_key(path: Path) -> Path:
    """A SuperNode's key for Flower's own authentication; the public half ends in ``.pub``."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    path.with_suffix(".pub").write_bytes(public)
    return path


def test_a_run_that_is_stopped_in_mid_round_goes_on_and_loses_no_round(
    cluster: Cluster, tmp_path: Path
) -> None:
    app, out, population = app_of(tmp_path), tmp_path / "run", 943 if ML_100K.is_dir() else 900
    cluster.link()
    for number in range(NODES):
        keys, roster = tmp_path / f"keys{number}", tmp_path / "roster"
        enroll(keys, range(number, population, NODES), roster, None)
    for number in range(NODES):
        trust = f' keys="{tmp_path}/keys{number}" roster="{tmp_path}/roster"'
        cluster.node(number, partition(number) + trust)
    settings = f'roster="{tmp_path}/roster"', 'set="privacy.spare_attempts=2"', "timeout-s=150"
    run_app(cluster, app, out, *settings)
    cluster.wait_for(lambda: rounds(out) >= 1, 600)
    time.sleep(8)  # into the second round
    (run,) = json.loads(cluster.call("flwr", "list", "loop", "--format", "json"))["runs"]
    cluster.call("flwr", "stop", str(run["run-id"]), "loop")
    cluster.processes["run"].wait(timeout=60)
    resumed = subprocess.run(
        ["privrec", "resume", str(out)],
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert resumed.returncode == 2
    assert f"flwr run, with out={out} in its run-config" in " ".join(resumed.stderr.split())
    run_app(cluster, app, out, *settings)
    cluster.wait_for(lambda: finished(out), 900)
    assert json.loads((out / "result.json").read_text())["rounds"] == 3
    report = build(out)
    assert report.privacy.charges >= 4  # the stopped attempt, which is charged
    assert report.privacy.adversaries[0].epsilon <= 8


def test_tls_authentication_and_enrolment_together(cluster: Cluster, tmp_path: Path) -> None:
    """A node that Flower lets in is still none of the devices, unless these are enrolled."""
    app, out, paths = app_of(tmp_path), tmp_path / "run", certified(tmp_path)
    cluster.link_options = (
        "--ssl-ca-certfile", str(paths["ca"]), "--ssl-certfile", str(paths["link"]),
        "--ssl-keyfile", str(paths["key"]), "--enable-supernode-auth",
    )  # fmt: skip
    cluster.node_options = ("--root-certificates", str(paths["ca"]))
    cluster.address = f'root-certificates = "{paths["ca"]}"'
    cluster.configure()
    cluster.link()
    population = 943 if ML_100K.is_dir() else 900
    roster, elsewhere = tmp_path / "roster", tmp_path / "elsewhere"
    for number in range(NODES):
        enrolled = elsewhere if number == 3 else roster
        enroll(tmp_path / f"keys{number}", range(number, population, NODES), enrolled, None)
        key = node_key(tmp_path / f"node{number}")
        if number != 2:
            cluster.call("flwr", "supernode", "register", str(key.with_suffix(".pub")), "loop")
        config = f'{partition(number)} keys="{tmp_path}/keys{number}" roster="{roster}"'
        cluster.node(number, config, "--auth-supernode-private-key", str(key))
    # Half of the devices are there: with fewer survivors asked for, no cohort is too small.
    changes = "train.rounds=1;devices.sampling_rate=0.2;privacy.least_survivors=0.3"
    settings = f'roster="{roster}"', f'set="{changes}"'
    run_app(cluster, app, out, *settings)
    cluster.wait_for(lambda: finished(out), 1200)
    log = cluster.log("run")
    assert "no enrolled device signed this prekey" in log  # those of node 3
    assert "472 of 943" in log or not ML_100K.is_dir()  # nor node 2's, which Flower kept out
    assert json.loads((out / "result.json").read_text())["rounds"] == 1


def test_errors_are_a_line_that_a_person_can_read(cluster: Cluster, tmp_path: Path) -> None:
    app = app_of(tmp_path)
    cluster.link()
    for number in range(NODES):
        cluster.node(number, partition(number) + ' roster="/nowhere/roster"')
    run_app(cluster, app, tmp_path / "run", "wait-s=20")
    cluster.wait_for(lambda: "no device registered" in cluster.log("run"), 600)
    assert "the roster file could not be read" in cluster.log("run")
    assert not (tmp_path / "run").exists()
    assert issubclass(PrivrecError, Exception)
