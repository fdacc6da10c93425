"""The loop: what it promises about the order of things, what it leaves, and what it refuses."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import events_of

from privrec.device.update import Round
from privrec.errors import (
    BudgetError,
    DataError,
    Interrupted,
    PrivrecError,
    ReleaseRefused,
    UsageError,
)
from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.ledger import Ledger
from privrec.report.build import build
from privrec.report.render import write
from privrec.run import checkpoint, lifecycle
from privrec.run.checkpoint import Position, read
from privrec.run.directory import Identity
from privrec.run.loop import Loop
from privrec.run.record import Observer, Record, RunInfo, read_rounds
from privrec.run.simulation import Simulation
from privrec.scenario.load import Scenario
from privrec.server.server import Server

ROUNDS, RATE = 8, 0.4
TINY = f"""
name = "tiny"
title = "A tiny run"
[data]
users = 40
items = 30
clusters = 3
interactions_per_user = 8
[model]
dim = 4
block = 2
[devices]
population = 40
sampling_rate = {RATE}
[train]
rounds = {ROUNDS}
[privacy]
noise = "central"
clip_norm = 1.0
noise_multiplier = 1.0
[run]
eval_every = 3
checkpoint_every = 3
"""


def scenario(*changes: str) -> Scenario:
    return Scenario.from_toml(TINY, changes)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Secrets of the test's own, and no process that measures memory."""
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    monkeypatch.setattr("privrec.run.costs.peak_bytes", lambda *_: 4096)
    return tmp_path / "state"


def started(out: Path, *changes: str, key: bytes | None = None, **words: Any) -> dict[str, Any]:
    words.setdefault("observer", Observer())
    return lifecycle.start(scenario(*changes), out=out, unsafe_noise_key=key, **words).payload


def weights(out: Path) -> Any:
    return load_file(out / "model.safetensors")["weights"]


# --------------------------------------------------------------------------- order


class Trace:
    """What happens to each round, in order, and what lay on disk when it did."""

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out, self.told = out, list[str]()
        self.flushed = 0
        fsync = os.fsync

        def flush(descriptor: int) -> None:
            fsync(descriptor)
            if Path(f"/proc/self/fd/{descriptor}").readlink().name == "ledger.jsonl":
                self.flushed = os.fstat(descriptor).st_size

        monkeypatch.setattr(os, "fsync", flush)
        for owner, name in (
            (Simulation, "collect"), (Server, "release"), (Ledger, "commit"), (Server, "apply"),
        ):  # fmt: skip
            self.watch(owner, name, monkeypatch)

    def durable(self) -> str:
        """The kinds of the ledger's entries for the last round that are flushed to disk."""
        content = (self.out / "ledger.jsonl").read_bytes()[: self.flushed]
        entries = [json.loads(line) for line in content.splitlines()]
        last = max((e["round"] for e in entries if "round" in e), default=None)
        return "+".join(e["kind"] for e in entries if e.get("round") == last)

    def watch(self, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)

        def watched(*args: Any) -> Any:
            self.told.append(f"{name} [{self.durable()}]")
            return original(*args)

        monkeypatch.setattr(owner, name, watched)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names open files by /proc")
@pytest.mark.parametrize("noise", [(), ("privacy.noise=none", "privacy.noise_multiplier=")])
def test_charged_on_disk_before_collected_and_committed_on_disk_before_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: tuple[str, ...]
) -> None:
    trace = Trace(tmp_path / "run", monkeypatch)
    started(tmp_path / "run", *noise)
    assert trace.told == ROUNDS * [
        "collect [charge]",
        "release [charge]",
        "commit [charge]",
        "apply [charge+commit]",
    ]


def test_each_round_is_charged_with_the_event_that_runs(tmp_path: Path) -> None:
    started(tmp_path / "run", "privacy.noise_multiplier=1.5")
    with Ledger.open(tmp_path / "run" / "ledger.jsonl", repair=False) as ledger:
        charges = [(c.round, c.attempt, c.event) for c in ledger.charges]
        commits = [ledger.committed(round, 0) for round in range(ROUNDS)]
        header = ledger.header
    event = RoundEvent("gaussian", 1.5, RATE)
    assert charges == [(round, 0, event) for round in range(ROUNDS)]
    assert None not in commits
    assert len(set(commits)) == ROUNDS
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    assert header["run_id"] == identity["run_id"]
    assert header["population"] == 40
    assert (header["unit"], header["adjacency"]) == ("user", "zero-out")
    assert header["noise_known"] is identity["noise_known"] is False


def test_a_charge_that_cannot_be_written_stops_before_anything_is_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, collected = tmp_path / "run", []
    collect, fsync = Simulation.collect, os.fsync

    def counted(self: Simulation, round: Any, weights: Any) -> Any:
        collected.append(round.index)
        return collect(self, round, weights)

    def full(descriptor: int) -> None:
        fourth = (out / "ledger.jsonl").exists() and collected == [0, 1, 2, 3]
        if fourth and os.fstat(descriptor).st_size > committed[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    class Sizes(Observer):
        def round(self, record: Record) -> None:
            committed[0] = (out / "ledger.jsonl").stat().st_size

    committed = [1 << 30]
    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "collect", counted)
        patch.setattr(os, "fsync", full)
        with pytest.raises(ReleaseRefused, match="No space left"):
            started(out, observer=Sizes(), key=b"k")
    assert collected == [0, 1, 2, 3]
    lifecycle.resume(out, observer=Observer())
    started(tmp_path / "whole", key=b"k")
    assert np.array_equal(weights(out), weights(tmp_path / "whole"))


def test_a_budget_is_kept_and_reached(tmp_path: Path) -> None:
    for against in ("recipients", "server"):
        out = tmp_path / against
        budget = ("privacy.noise_multiplier=", "privacy.epsilon=6")
        payload = started(out, *budget, f"privacy.budget_against={against}")
        spent = payload["privacy"]["epsilon" if against == "recipients" else "epsilon_server"]
        assert 5.9 < spent <= 6
        assert (payload["privacy"]["budget"], payload["rounds"]) == (6, ROUNDS)


@pytest.mark.parametrize("index", [0, ROUNDS - 1])
def test_a_retry_that_would_exceed_the_budget_stops(
    tmp_path: Path, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect, lost = Simulation.collect, list[int]()

    def losing(self: Simulation, round: Round, weights: Any) -> Any:
        if round.index == index and not lost:
            lost.append(index)
            raise ReleaseRefused("lost")
        return collect(self, round, weights)

    monkeypatch.setattr(Simulation, "collect", losing)
    with pytest.raises(BudgetError, match=f"Stopped after {ROUNDS - 1} rounds"):
        started(tmp_path / "run", "privacy.noise_multiplier=", "privacy.epsilon=6")


# --------------------------------------------------------------------------- bits


def test_a_known_root_repeats_the_bits_and_another_does_not(tmp_path: Path) -> None:
    for name, key in (("a", b"k"), ("b", b"k"), ("c", b"l"), ("d", None), ("e", None)):
        started(tmp_path / name, key=key)
    found = {name: weights(tmp_path / name) for name in "abcde"}
    assert np.array_equal(found["a"], found["b"])
    names = "acde"
    for one, other in ((x, y) for x in names for y in names if x < y):
        assert not np.array_equal(found[one], found[other])


def test_a_known_root_is_stamped_and_no_epsilon_is_claimed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    privacy = started(out, key=b"k")["privacy"]
    assert (privacy["noise_known"], privacy["private"]) == (True, False)
    for name in ("epsilon", "epsilon_server", "epsilon_rdp", "epsilon_server_rdp"):
        assert privacy[name] is None
    assert all(record.epsilon is None for record in read_rounds(out / "events.jsonl"))
    assert json.loads((out / "run.json").read_text())["noise_known"] is True
    report = build(out)
    assert report.privacy.noise_known
    assert all(adversary.epsilon is None for adversary in report.privacy.adversaries)


def test_secrets_stay_out_of_the_run_directory(tmp_path: Path, state: Path) -> None:
    out = tmp_path / "run"
    started(out)
    kept = {path.name: path for path in state.rglob("*") if path.is_file()}
    assert set(kept) == {
        "server.root", "devices.root", "server.key", "data.json", "head.json", "head.lock",
    }  # fmt: skip
    assert all(path.stat().st_mode & 0o077 == 0 for path in kept.values())
    for file in out.iterdir():
        content = file.read_bytes()
        for secret in kept.values():
            if secret.stem == "head":
                continue  # a copy of what lies beside the ledger, and its lock
            raw = secret.read_bytes()[:32]
            assert raw not in content
            assert raw.hex().encode() not in content


# --------------------------------------------------------------------------- what it leaves


PRIVACY = {
    "private", "epsilon", "epsilon_server", "epsilon_rdp", "epsilon_server_rdp", "delta", "noise",
    "noise_multiplier", "clip_norm", "unit", "adjacency", "mechanism", "rounding_bound_ratio",
    "sampling", "sampling_rate", "population", "expected_cohort", "budget", "budget_against",
    "noise_known", "charges", "popularity", "epsilon_popularity", "examples",
}  # fmt: skip
COST = {
    "upload_bytes", "download_bytes", "device_peak_bytes", "cpu_s_per_device_round", "wall_s",
    "noise_deferred",
}  # fmt: skip
TIER = {
    "capacity", "share", "weight", "devices", "items", "dim", "upload_bytes", "download_bytes",
    "device_peak_bytes",
}  # fmt: skip
METRICS = {"hr@10", "ndcg@10", "full_hr@10", "full_ndcg@10", "full_recall@10"}


def test_the_result_has_what_the_issue_asks_for(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = started(out)
    assert json.loads((out / "result.json").read_text()) == result
    assert set(result) == {
        "scenario", "title", "simulated", "version", "run_id", "rounds", "planned_rounds",
        "holdout", "metrics", "intervals", "baselines", "metrics_note", "outside_the_guarantee",
        "privacy", "cost", "segments", "tiers", "model", "data", "gaps", "public_key", "signature",
    }  # fmt: skip
    assert result["scenario"] == "tiny"
    assert result["simulated"] is True
    assert result["rounds"] == result["planned_rounds"] == ROUNDS
    assert result["holdout"] == "test"
    assert result["metrics_note"] == "outside the guarantee"
    assert set(result["metrics"]) == set(result["intervals"]) == METRICS
    for name, value in result["metrics"].items():
        low, high = result["intervals"][name]
        assert 0 <= low <= value <= high <= 1
    cost = result["cost"]
    assert set(cost) == COST
    size = len(weights(out)) * 4
    assert (cost["upload_bytes"], cost["download_bytes"]) == (size, size)
    assert cost["device_peak_bytes"] == 4096
    (tier,) = result["tiers"]
    assert set(tier) == TIER | METRICS
    for name in ("upload_bytes", "download_bytes", "device_peak_bytes"):
        assert tier[name] == cost[name]
    assert (tier["capacity"], tier["share"], tier["weight"], tier["devices"]) == (1, 1, 1, 40)
    assert (tier["items"], tier["dim"]) == (30, 4)
    assert 0 < cost["cpu_s_per_device_round"] * ROUNDS * RATE * 40 < cost["wall_s"] * 4
    privacy = result["privacy"]
    assert set(privacy) == PRIVACY
    assert privacy["unit"] == "user"
    assert privacy["adjacency"] == "zero-out"
    assert privacy["charges"] == ROUNDS
    event = RoundEvent("gaussian", 1.0, RATE)
    assert privacy["epsilon"] == epsilon({event: ROUNDS}, 1e-5, "recipients")
    assert privacy["epsilon_server"] == epsilon({event: ROUNDS}, 1e-5, "server")
    assert privacy["epsilon"] < privacy["epsilon_server"]
    assert privacy["epsilon"] < privacy["epsilon_rdp"]
    assert privacy["epsilon_server"] < privacy["epsilon_server_rdp"]


def test_a_run_without_noise_promises_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    privacy = started(out, "privacy.noise=none", "privacy.noise_multiplier=")["privacy"]
    assert privacy["private"] is False
    assert privacy["epsilon"] is privacy["epsilon_server"] is None
    assert privacy["noise_multiplier"] == 0
    assert privacy["mechanism"] == "none"


def test_the_directory_holds_what_the_plan_lists(tmp_path: Path) -> None:
    out = tmp_path / "run"
    started(out)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "state"}
    assert {path.name for path in out.iterdir()} == {
        "scenario.toml", "run.json", "ledger.jsonl", "ledger.head.json", "events.jsonl",
        "catalogue.safetensors", "model.safetensors", "model.json", "result.json",
    }  # fmt: skip
    assert Scenario.from_toml((out / "scenario.toml").read_text()).hash() == scenario().hash()
    identity = json.loads((out / "run.json").read_text())
    assert identity["simulated"] is True
    assert identity["scenario_hash"] == scenario().hash()
    assert identity["privacy_hash"] == scenario().privacy_hash()


def test_events_tell_every_round_and_evaluate_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = started(out)
    events = events_of(out / "events.jsonl")
    assert [event["type"] for event in events] == ["start", *ROUNDS * ["round"], "end"]
    assert events[0]["simulated"] is True
    rounds = read_rounds(out / "events.jsonl")
    assert [record.round for record in rounds] == [*range(1, ROUNDS + 1)]
    assert [record.round for record in rounds if record.metrics] == [3, 6, ROUNDS]
    assert set(rounds[2].metrics or {}) == {"hr@10", "ndcg@10"}
    assert rounds[-1].metrics == result["metrics"]
    spent = [record.epsilon or math.nan for record in rounds]
    assert all(before < after for before, after in zip(spent, spent[1:], strict=False))
    assert spent[-1] == result["privacy"]["epsilon"]
    assert rounds[-1].epsilon_server == result["privacy"]["epsilon_server"]


class Watches(Observer):
    def __init__(self, on_round: Callable[[Record], None] = lambda _: None) -> None:
        self.infos: list[RunInfo] = []
        self.records: list[Record] = []
        self.results: list[Any] = []
        self.on_round = on_round

    def started(self, info: RunInfo) -> None:
        self.infos.append(info)

    def round(self, record: Record) -> None:
        self.records.append(record)
        self.on_round(record)

    def finished(self, result: Any) -> None:
        self.results.append(result)


def test_an_observer_is_told_everything_once(tmp_path: Path) -> None:
    observer = Watches()
    payload = started(tmp_path / "run", observer=observer)
    (info,) = observer.infos
    assert (info.name, info.rounds, info.done, info.population) == ("tiny", ROUNDS, 0, 40)
    assert info.private
    assert info.expected_cohort == 16
    assert [record.round for record in observer.records] == [*range(1, ROUNDS + 1)]
    sizes = [record.cohort for record in observer.records]  # live, for the operator
    assert all(isinstance(size, int) and 0 < size < 40 for size in sizes)
    assert len(set(sizes)) > 2
    (result,) = observer.results
    assert result.payload == payload


def numbers_in(value: Any) -> set[float]:
    if isinstance(value, dict):
        return set().union(*(numbers_in(inner) for inner in value.values()))
    if isinstance(value, list):
        return set().union(*(numbers_in(inner) for inner in value))
    return {value} if isinstance(value, int | float) else set()


def json_documents(path: Path) -> list[Any]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return [json.loads(path.read_text())] if path.suffix == ".json" else []


def test_realised_cohorts_and_their_traces_are_in_no_file(tmp_path: Path) -> None:
    """Amplification holds only while nobody learns them, also from how long a round took."""
    out, users = tmp_path / "run", 1303
    changes = (f"data.users={users}", f"devices.population={users}", "train.rounds=5")
    observer = Watches()
    started(out, *changes, key=b"k", observer=observer)  # the same files in every test run
    write(build(out), out)
    sizes = [record.cohort or 0 for record in observer.records]
    told = {*sizes, sum(sizes), users - min(sizes), min(sizes) / users, max(sizes) / users}
    assert len(sizes) == 5
    assert len(set(sizes)) > 2
    assert min(sizes) > 450
    files = sorted(path for path in out.iterdir() if path.is_file())
    assert len(files) == 13
    for path in files:
        for document in json_documents(path):
            assert not numbers_in(document) & told, path.name
            assert "cohort_size" not in json.dumps(document)
            text = json.dumps(document).replace('"engine": "cohort"', "")  # names the fast engine
            assert not re.search(r'"cohorts?"', text)
        if path.suffix in (".html", ".md", ".toml"):
            text = re.sub(r"(?s)<(svg|style)\b.*?</\1>", "", path.read_text())
            words = set(re.findall(r"(?<![\w.#])\d+(?![\w.])", text))
            told_by_plan = str(round(users * RATE))  # the expected cohort, which anybody knows
            assert not words & {str(size) for size in sizes} - {told_by_plan}, path.name
    for record in read_rounds(out / "events.jsonl"):
        assert record.cohort is None
        assert record.loss is None
        assert not record.wall_s
        assert not record.cpu_s
    cost = json.loads((out / "result.json").read_text())["cost"]
    for name in ("wall_s", "cpu_s_per_device_round"):
        assert cost[name] == float(f"{cost[name]:.1e}")


@pytest.mark.parametrize(
    "changes",
    [("devices.sampling=everybody",), ("privacy.noise=none", "privacy.noise_multiplier=")],
)
def test_rounds_are_timed_where_the_cohort_is_no_secret(
    changes: tuple[str, ...], tmp_path: Path
) -> None:
    started(tmp_path / "run", *changes)
    for record in read_rounds(tmp_path / "run" / "events.jsonl"):
        assert record.loss is not None
        assert record.wall_s > 0
        assert record.cpu_s > 0


def test_an_empty_cohort_is_released_as_noise_alone(tmp_path: Path) -> None:
    changes = ("devices.sampling_rate=0.0001", "train.server_optimizer=sgd", "train.server_lr=0.1")
    result = started(tmp_path / "run", *changes)
    assert result["rounds"] == result["privacy"]["charges"] == ROUNDS
    assert np.isfinite(weights(tmp_path / "run")).all()
    assert np.abs(weights(tmp_path / "run")).max() > 1


# --------------------------------------------------------------------------- stopping


def kept(out: Path) -> tuple[Position, dict[str, np.ndarray]]:
    return read(out / checkpoint.FILE, Identity.read(out).signing_key().public_key())


def test_checkpoints_are_taken_when_asked(tmp_path: Path) -> None:
    out, seen = tmp_path / "run", []
    observer = Watches(lambda _: seen.append(kept(out)[0].index))
    started(out, observer=observer)
    assert seen == [0, 0, 0, 3, 3, 3, 6, 6]


def test_control_c_finishes_the_round_and_the_second_one_does_not(tmp_path: Path) -> None:
    def interrupt(record: Record) -> None:
        if record.round == 4:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match=f"stopped after round 4 of {ROUNDS}.*privrec resume"):
        started(out, observer=Watches(interrupt))
    assert signal.getsignal(signal.SIGINT) == before
    assert kept(out)[0].index == 4
    assert not (out / "result.json").exists()

    def insist(record: Record) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        lifecycle.resume(out, observer=Watches(insist))
    assert signal.getsignal(signal.SIGINT) == before
    observer = Watches()
    assert lifecycle.resume(out, observer=observer).payload["rounds"] == ROUNDS
    assert observer.infos[0].done == 4


# --------------------------------------------------------------------------- refusals


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_taken_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = listing(tmp_path)
    for name in ("full", "file"):
        with pytest.raises(UsageError, match="not empty; name a new directory with --out"):
            started(tmp_path / name)
    assert listing(tmp_path) == before
    assert (tmp_path / "full" / "mine").read_text() == "mine"


def test_an_empty_directory_and_missing_parents_are_welcome(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "some" / "new" / "place"):
        started(out)
        assert (out / "result.json").is_file()


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        (("devices.population=41",), UsageError, "the data has 40 users"),
        (("data.source=table", "data.path=no.csv"), DataError, "no.csv"),
        (("data.source=ml-1m", "data.path=nowhere"), PrivrecError, "nowhere"),
        (
            ("privacy.scale_bits=20", "data.users=3000", "devices.population=3000",
             "devices.sampling=everybody"),
            UsageError,
            "3000",
        ),
    ],
    ids=["population", "table", "data set", "capacity"],
)  # fmt: skip
def test_a_start_that_is_refused_leaves_nothing(
    changes: tuple[str, ...], kind: type[Exception], says: str, tmp_path: Path
) -> None:
    if "data.source" in changes[0]:
        changes += ("data.users=", "data.items=", "data.clusters=", "data.interactions_per_user=")
    with pytest.raises(kind, match=says):
        started(tmp_path / "run", *changes)
    assert listing(tmp_path) <= {"state", "state/runs"}


@pytest.mark.parametrize("known", [None, b"k"], ids=["secret", "known"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_a_start_whose_disk_fails_at_any_write_leaves_nothing(
    known: bytes | None,
    there: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: Path,
) -> None:
    fsync, left, went_on = os.fsync, [0], []

    def failing(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    out = tmp_path / "outs" / "run"
    out.parent.mkdir()
    if there:
        out.mkdir()
    before = listing(out.parent)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        patch.setattr(Loop, "run", lambda loop, *_: went_on.append(loop.out))
        for number in range(1, 100):
            left[0] = number
            with pytest.raises((OSError, PrivrecError), match="Input/output error"):
                started(out, key=known)
            if (out / "run.json").exists():
                break  # it is whole: only the flush of its name failed
            assert listing(out.parent) == before
            if known is None:  # the key of a known root may serve other runs
                assert listing(state) <= {"runs"}
    assert number > 10
    assert not went_on
    assert lifecycle.resume(out, observer=Observer()).payload["rounds"] == ROUNDS


# --------------------------------------------------------------------------- tiers

MIXED = (
    "devices.tiers=[{capacity = 0.25, share = 0.5}, {capacity = 1.0, share = 0.2}, "
    "{capacity = 0.5, share = 0.3, weight = 0.5}]"
)
ALIKE = "devices.tiers=[{capacity = 1.0, share = 1.0}]"
NESTINGS = {
    "fold": (),
    "rows": ("devices.popularity=public",),
    "dims": ("devices.nesting=dims", "model.block=1"),
}


@pytest.mark.parametrize("engine", ["cohort", "device"])
@pytest.mark.parametrize("kind", ["gmf", "neumf"])
def test_one_tier_of_capacity_one_is_bit_for_bit_no_tiers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, engine: str
) -> None:
    """Weights, integers, ledger and figures, once the scenario's own hash is no part of draws."""
    for name in ("hash", "plan_hash"):
        monkeypatch.setattr(Scenario, name, lambda _: "0" * 64)
    sums: dict[str, list[Any]] = {"run": [], "tiers": []}
    collect = Simulation.collect
    for name, changes in (("run", ()), ("tiers", (ALIKE,))):

        def watched(self: Simulation, round: Any, weights: Any, name: str = name) -> Any:
            found = collect(self, round, weights)
            sums[name].append(found.total)
            return found

        monkeypatch.setattr(Simulation, "collect", watched)
        settings = (*changes, f"model.kind={kind}", f"run.engine={engine}")
        started(tmp_path / name, *settings, key=b"k")
    assert len(sums["run"]) == ROUNDS
    for one, two in zip(sums["run"], sums["tiers"], strict=True):
        assert one.any()
        assert np.array_equal(one, two)
    one, two = (tmp_path / name for name in ("run", "tiers"))
    assert np.array_equal(weights(one), weights(two))
    told = [
        [
            {**json.loads(line), "previous": None, "hash": None, "body": None}
            for line in (out / "ledger.jsonl").read_text().splitlines()
        ]
        for out in (one, two)
    ]
    for entry in (*told[0], *told[1]):
        entry.pop("tag", None)  # of the run's own key and name
    assert told[0] == told[1]
    first, second = (json.loads((out / "result.json").read_text()) for out in (one, two))
    for name in ("privacy", "tiers", "model", "baselines"):
        assert first[name] == second[name]
    for name in ("metrics", "intervals"):  # and what a user's own tier holds is everything
        own = {f"own_{metric}": first[name][metric] for metric in METRICS}
        assert {**first[name], **own} == second[name]


@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_run_of_mixed_capacities_tells_what_each_tier_gets(tmp_path: Path, nesting: str) -> None:
    out = tmp_path / "run"
    result = started(out, MIXED, *NESTINGS[nesting])
    tiers = result["tiers"]
    assert [tier["capacity"] for tier in tiers] == [1.0, 0.5, 0.25]
    assert [tier["weight"] for tier in tiers] == [1.0, 0.5, 1.0]
    assert [tier["devices"] for tier in tiers] == [8, 12, 20]
    sizes = [tier["upload_bytes"] for tier in tiers]
    assert sizes[0] == result["cost"]["upload_bytes"] == 4 * len(weights(out))
    assert sizes == sorted(sizes, reverse=True)
    if nesting != "dims":  # whose item biases are those of all dimensions
        assert sizes[2] <= sizes[0] / 4
    assert [tier["download_bytes"] for tier in tiers] == sizes
    assert [tier["items"] for tier in tiers] == ([30, 15, 7] if nesting == "rows" else [30] * 3)
    assert [tier["dim"] for tier in tiers] == ([4, 2, 1] if nesting == "dims" else [4] * 3)
    # Everybody's own metrics are the mean over users, each in its tier.
    for name in METRICS:
        shares = [tier["devices"] / 40 for tier in tiers]
        mean = sum(share * tier[name] for share, tier in zip(shares, tiers, strict=True))
        assert result["metrics"][f"own_{name}"] == pytest.approx(mean)
    assert any(result["metrics"][f"own_{name}"] != result["metrics"][name] for name in METRICS)
    assert result["privacy"]["expected_cohort"] == pytest.approx(40 * RATE)
    report = build(out)
    write(report, out)


def test_mixed_capacities_cost_no_more_privacy_than_one(tmp_path: Path) -> None:
    one, mixed = (started(tmp_path / str(i), *c) for i, c in enumerate(((), (MIXED,))))
    for name in ("epsilon", "epsilon_server", "charges", "noise_multiplier"):
        assert one["privacy"][name] == mixed["privacy"][name]


def test_devices_that_do_not_train_are_left_out_of_the_cohort(tmp_path: Path) -> None:
    idle = (
        "devices.tiers=[{capacity = 1.0, share = 0.5}, {capacity = 0.5, share = 0.5, weight = 0}]"
    )
    observer = Watches()
    result = started(tmp_path / "run", idle, "devices.sampling=everybody", observer=observer)
    assert [record.cohort for record in observer.records] == [20] * ROUNDS
    assert result["privacy"]["expected_cohort"] == 20
    assert set(result["tiers"][1]) == TIER | METRICS  # they are served all the same


@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_stopped_run_of_mixed_capacities_goes_on_bit_for_bit(
    tmp_path: Path, nesting: str
) -> None:
    settings = (MIXED, *NESTINGS[nesting])
    whole = started(tmp_path / "whole", *settings, key=b"k")

    def stop(record: Record) -> None:
        if record.round == 5:
            raise Interrupted("now")

    with pytest.raises(Interrupted):
        started(tmp_path / "run", *settings, key=b"k", observer=Watches(stop))
    assert {"states.0", "states.1", "states.2"} <= set(kept(tmp_path / "run")[1])
    resumed = lifecycle.resume(tmp_path / "run", observer=Observer()).payload
    assert np.array_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert resumed["metrics"] == whole["metrics"]


@pytest.mark.parametrize("nesting", NESTINGS)
def test_implicit_als_runs_and_resumes_in_every_nesting(tmp_path: Path, nesting: str) -> None:
    settings = (
        MIXED, *NESTINGS[nesting], "train.loss=ials", "model.item_bias=false", "train.local_lr=0.2",
    )  # fmt: skip
    whole = started(tmp_path / "whole", *settings, key=b"k")

    def stop(record: Record) -> None:
        if record.round == 4:
            raise Interrupted("now")

    with pytest.raises(Interrupted):
        started(tmp_path / "run", *settings, key=b"k", observer=Watches(stop))
    resumed = lifecycle.resume(tmp_path / "run", observer=Observer()).payload
    assert np.array_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert resumed["metrics"] == whole["metrics"]
    assert np.isfinite(weights(tmp_path / "run")).all()


def test_devices_that_hold_nothing_are_served_what_is_popular(tmp_path: Path) -> None:
    nothing = "devices.tiers=[{capacity = 1.0, share = 0.5}, {capacity = 0.0, share = 0.5}]"
    result = started(tmp_path / "run", nothing)
    whole, absent = result["tiers"]
    assert (absent["capacity"], absent["share"], absent["weight"], absent["devices"]) == (
        0, 0.5, 0, 20,
    )  # fmt: skip
    assert whole["devices"] == 20
    assert result["privacy"]["expected_cohort"] == pytest.approx(20 * RATE)
    for name in METRICS:
        assert result["metrics"][f"own_{name}"] == pytest.approx((whole[name] + absent[name]) / 2)
