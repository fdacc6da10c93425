"""A run may die at any moment: what was paid stays paid, and what goes on repeats its bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from small_runs import events_of

from privrec.cli.main import main
from privrec.errors import IntegrityError, PrivrecError, UsageError
from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.ledger import Ledger
from privrec.report.build import build
from privrec.run import checkpoint, lifecycle
from privrec.run.record import Observer, Record, read_rounds
from privrec.scenario.load import load
from privrec.storage import server_key

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, EVERY, RATE, NOISE = 6, 2, 0.4, 1.0
TINY = f"""
name = "tiny"
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
server_optimizer = "fedadam"
average = 0.5
[privacy]
noise = "central"
clip_norm = 1.0
noise_multiplier = {NOISE}
[run]
eval_every = 4
checkpoint_every = {EVERY}
"""
LIMITED = TINY.replace(f"noise_multiplier = {NOISE}", "epsilon = 8.0")
KEY = "6b6e6f776e"
KILLED = -signal.SIGKILL
SOURCES = ("server.root", "devices.root")


@dataclass(frozen=True)
class Done:
    """How one session ended, and the steps that it took."""

    code: int
    seconds: float
    steps: list[dict[str, Any]]

    @property
    def names(self) -> list[str]:
        return [step["step"] for step in self.steps if step["step"] not in ("release", "error")]

    @property
    def releases(self) -> list[dict[str, Any]]:
        return [step for step in self.steps if step["step"] == "release"]

    @property
    def error(self) -> str:
        return "".join(step["text"] for step in self.steps if step["step"] == "error")

    def place_of(self, name: str, number: int) -> int:
        """Where the ``number``-th step of that name is, counted as the server counts."""
        places = [place for place, found in enumerate(self.names, 1) if found == name]
        return places[number - 1]


@dataclass(frozen=True)
class World:
    """A run's directory and its secrets, which can be copied together at any moment."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "run"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def key(self) -> Ed25519PrivateKey:
        return server_key(self.secret("server.key"), new=False)

    @property
    def checkpoint(self) -> tuple[Path, Ed25519PublicKey]:
        return self.out / checkpoint.FILE, self.key.public_key()

    def secret(self, name: str) -> Path:
        (folder,) = (self.state / "runs").iterdir()
        return folder / name

    def copy(self, name: str) -> World:
        return World(Path(shutil.copytree(self.folder, self.folder.with_name(name))))

    def file(self, name: str) -> bytes:
        return (self.out / name).read_bytes()

    @property
    def result(self) -> dict[str, Any]:
        payload: dict[str, Any] = json.loads(self.file("result.json"))
        return payload

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file("ledger.jsonl").splitlines()]

    @property
    def told(self) -> list[dict[str, Any]]:
        """What the ledger's entries say, whatever key the run has."""
        return [{**e, "body": None, "hash": None, "previous": None} for e in self.entries]

    def charges(self) -> list[tuple[int, int]]:
        return [(e["round"], e["attempt"]) for e in self.entries if e["kind"] == "charge"]

    def commits(self) -> dict[tuple[int, int], str]:
        kept = [e for e in self.entries if e["kind"] == "commit"]
        assert len({(e["round"], e["attempt"]) for e in kept}) == len(kept)
        return {(e["round"], e["attempt"]): e["tag"] for e in kept}


class Sessions:
    """Begins and resumes runs in children of one warm process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.worlds = folder, 0
        self.scenario = self.written("tiny.toml", TINY)
        server = Path(__file__).with_name("crash_server.py")
        words = [sys.executable, str(server), str(self.scenario)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._read() == "ready\n"

    def written(self, name: str, text: str) -> Path:
        (self.folder / name).write_text(text)
        return self.folder / name

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def __call__(self, world: World, do: str, **command: Any) -> Done:
        steps = world.folder / "steps"
        steps.unlink(missing_ok=True)
        world.folder.mkdir(exist_ok=True)
        places = {"out": str(world.out), "state": str(world.state), "steps": str(steps)}
        command = {"do": do, "scenario": str(self.scenario), **places, **command}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self._read())
        taken = steps.read_text().splitlines() if steps.exists() else []
        return Done(answer["code"], answer["seconds"], [json.loads(line) for line in taken])

    def new_world(self) -> World:
        self.worlds += 1
        return World(self.folder / f"world-{self.worlds}")

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def sessions() -> Iterator[Sessions]:
    memory = Path("/dev/shm")  # flushing to disk is most of what a tiny run does
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        sessions = Sessions(Path(folder))
        yield sessions
        sessions.close()


@dataclass(frozen=True)
class Reference:
    """A run that nobody disturbed, and what it was like before its first round."""

    world: World
    whole: Done
    genesis: World | None = None


@pytest.fixture(scope="module")
def known(sessions: Sessions) -> Reference:
    """Its noise root is injected, so that every start of it repeats the same bits."""
    world = sessions.new_world()
    whole = sessions(world, "start", key=KEY)
    assert whole.code == 0, whole.error
    return Reference(world, whole)


@pytest.fixture(scope="module")
def secret(sessions: Sessions) -> Reference:
    """Its noise root is real, so only copies of one start can repeat its bits."""
    genesis = sessions.new_world()
    first = sessions(genesis, "start", at=1)
    assert first.code == KILLED
    shutil.rmtree(genesis.folder)
    rehearsal = sessions.new_world()
    place = sessions(rehearsal, "start").place_of("before Ledger.charge", 1)
    assert sessions(genesis, "start", at=place).code == KILLED
    assert {path.name for path in genesis.secret("server.root").parent.iterdir()} == {
        "server.root", "devices.root", "server.key", "data.json", "head.json", "head.lock",
    }  # fmt: skip
    world = genesis.copy("reference")
    whole = sessions(world, "resume")
    assert whole.code == 0, whole.error
    return Reference(world, whole, genesis)


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: no secrets but the test's, and no process that measures memory."""
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    monkeypatch.setattr("privrec.run.costs.peak_bytes", lambda *_: None)


def check_same(world: World, reference: Reference) -> None:
    """Weights and ledger are those of the undisturbed run, to the byte."""
    assert world.file("model.safetensors") == reference.world.file("model.safetensors")
    assert world.told == reference.world.told
    assert world.result["privacy"] == reference.world.result["privacy"]
    assert world.result["metrics"] == reference.world.result["metrics"]
    assert [record.round for record in read_rounds(world.out / "events.jsonl")] == [
        *range(1, ROUNDS + 1)
    ]


def check_honest(world: World, *taken: Done) -> None:
    """Everything that was ever released was paid for, and ε says no less."""
    released = {(one["round"], one["tag"]) for done in taken for one in done.releases}
    assert all(one["paid"] for done in taken for one in done.releases)
    commits, charges = world.commits(), world.charges()
    assert released <= {(round, tag) for (round, _), tag in commits.items()}
    assert set(commits) <= set(charges)
    assert len(set(charges)) == len(charges) >= len(released)
    privacy = world.result["privacy"]
    assert privacy["charges"] == len(charges)
    if privacy["private"]:
        event = RoundEvent("gaussian", privacy["noise_multiplier"], RATE)
        for adversary, name in (("recipients", "epsilon"), ("server", "epsilon_server")):
            least = epsilon({event: len(released)}, 1e-5, adversary)  # type: ignore[arg-type]
            assert privacy[name] >= least
            assert privacy[name] == epsilon({event: len(charges)}, 1e-5, adversary)  # type: ignore[arg-type]


def check_report(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(world.state))
    build(world.out)


# --------------------------------------------------------------------------- killed at every step


def steps_to_try(names: list[str], most: int | None) -> list[int]:
    """All steps, or of each name the first ones and the last ones."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names, 1):
        places.setdefault(name, []).append(place)
    kept = [p if most is None else {*p[: most - 1], p[-1]} for p in places.values()]
    return sorted(place for some in kept for place in some)


def begin_killed_and_go_on(sessions: Sessions, reference: Reference, at: int) -> None:
    world = sessions.new_world()
    killed = sessions(world, "start", key=KEY, at=at)
    assert killed.code == KILLED
    again = sessions(world, "resume" if world.out.exists() else "start", key=KEY)
    assert again.code == 0, f"step {at}, {killed.names[-1]}: {again.error}"
    check_same(world, reference)
    check_honest(world, killed, again)
    shutil.rmtree(world.folder)


def go_on_killed_and_go_on(sessions: Sessions, reference: Reference, at: int) -> None:
    assert reference.genesis is not None
    world = reference.genesis.copy(f"killed-{at}")
    killed = sessions(world, "resume", at=at)
    assert killed.code == KILLED
    again = sessions(world, "resume")
    assert again.code == 0, f"step {at}, {killed.names[-1]}: {again.error}"
    check_same(world, reference)
    check_honest(world, killed, again)
    shutil.rmtree(world.folder)


def test_killed_at_each_kind_of_step_with_a_known_root(
    sessions: Sessions, known: Reference
) -> None:
    places = steps_to_try(known.whole.names, 3)
    assert len(places) > 50
    for at in places:
        begin_killed_and_go_on(sessions, known, at)


def test_killed_at_each_kind_of_step_with_a_secret_root(
    sessions: Sessions, secret: Reference
) -> None:
    for at in steps_to_try(secret.whole.names, 2):
        go_on_killed_and_go_on(sessions, secret, at)


@pytest.mark.slow
def test_killed_at_every_single_step(
    sessions: Sessions, known: Reference, secret: Reference
) -> None:
    for at in range(1, len(known.whole.names) + 1):
        begin_killed_and_go_on(sessions, known, at)
    for at in range(1, len(secret.whole.names) + 1):
        go_on_killed_and_go_on(sessions, secret, at)


def test_the_steps_are_those_that_matter(known: Reference) -> None:
    """Else the tests above would pass by killing nothing of interest."""
    names = known.whole.names
    for step in ("Ledger.charge", "Simulation.collect", "Ledger.commit", "Server.apply"):
        for side in ("before", "after"):
            assert names.count(f"{side} {step}") == ROUNDS
    saves = 2 + ROUNDS // EVERY  # the first, those on the way, and the last
    assert names.count("before privrec.run.checkpoint.write") == saves
    header_and_end = 2
    assert names.count("within a ledger line") == header_and_end + 2 * ROUNDS
    assert names.count("before os.rename") == 1
    assert len(known.whole.releases) == ROUNDS


# --------------------------------------------------------------------------- killed at random


def test_killed_at_random_moments(
    sessions: Sessions, known: Reference, secret: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least 20 kills, over the whole life of a run, start and end included.

    Where a kill falls is up to the machine's load: so many more are made as it takes to reach
    five kinds of places.
    """
    rng, kills, lives, ends = random.Random(2), 0, 0, set()
    while kills < 24 or (len(ends) < 5 and kills < 120):
        reference, lives = (known, secret)[lives % 2], lives + 1
        genesis = reference.genesis
        world = sessions.new_world() if genesis is None else genesis.copy(f"random-{lives}")
        taken: list[Done] = []
        while True:
            do = "resume" if world.out.exists() else "start"
            longest = (1 + len(taken) / 10) * reference.whole.seconds  # so that every life ends
            patience = rng.uniform(0, 1.2) * longest
            taken.append(sessions(world, do, key=KEY, after_s=patience))
            if taken[-1].code != KILLED:
                break
            kills += 1
            ends.add(taken[-1].names[-1] if taken[-1].names else "before the first step")
        assert taken[-1].code == 0, taken[-1].error
        check_same(world, reference)
        check_honest(world, *taken)
        check_report(world, monkeypatch)
    assert kills >= 20
    assert len(ends) >= 5  # spread over a run's life


def test_killed_and_robbed_of_its_roots_again_and_again(
    sessions: Sessions, secret: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert secret.genesis is not None
    rng = random.Random(5)
    for number in range(3):
        world, taken = secret.genesis.copy(f"robbed-{number}"), []
        for _ in range(4):
            at = rng.randrange(1, len(secret.whole.names))
            taken.append(sessions(world, "resume", at=at))
            for name in rng.sample(SOURCES, rng.randrange(3)):
                world.secret(name).unlink(missing_ok=True)
        taken.append(sessions(world, "resume"))
        assert taken[-1].code == 0, taken[-1].error
        check_honest(world, *taken)
        check_report(world, monkeypatch)


# --------------------------------------------------------------------------- without the root


def killed_in_round(
    sessions: Sessions, reference: Reference, number: int, step: str, name: str
) -> tuple[World, Done]:
    """A copy of the run that died at a step of a round (counted from 1)."""
    assert reference.genesis is not None
    world = reference.genesis.copy(name)
    killed = sessions(world, "resume", at=reference.whole.place_of(step, number))
    assert killed.code == KILLED
    return world, killed


@pytest.mark.parametrize("lost", [SOURCES, SOURCES[:1], SOURCES[1:]], ids="+".join)
def test_without_its_roots_it_pays_again(
    sessions: Sessions, secret: Reference, lost: tuple[str, ...]
) -> None:
    name = "lost-" + "-".join(lost)
    world, killed = killed_in_round(sessions, secret, 4, "after Server.apply", name)
    before = world.commits()
    for source in lost:
        world.secret(source).unlink()
    again = sessions(world, "resume")
    assert again.code == 0, again.error
    # The checkpoint was taken after two rounds; the two after it were released, then lost.
    assert world.charges() == [(0, 0), (1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (4, 0), (5, 0)]
    after = world.commits()
    assert {key: after[key] for key in before} == before
    assert after[2, 0] != after[2, 1]
    assert after[3, 0] != after[3, 1]
    assert [one["tag"] for one in again.releases[:2]] == [after[2, 1], after[3, 1]]
    assert world.file("model.safetensors") != secret.world.file("model.safetensors")
    assert world.result["privacy"]["epsilon"] > secret.world.result["privacy"]["epsilon"]
    check_honest(world, killed, again)
    assert all(world.secret(source).exists() for source in SOURCES)


def test_what_was_charged_and_never_released_is_not_paid_twice(
    sessions: Sessions, secret: Reference
) -> None:
    world, killed = killed_in_round(sessions, secret, 3, "before Ledger.commit", "uncommitted")
    assert world.charges()[-1] == (2, 0)
    for source in SOURCES:
        world.secret(source).unlink()
    again = sessions(world, "resume")
    assert world.charges() == [(round, 0) for round in range(ROUNDS)]
    check_honest(world, killed, again)


def test_paying_again_halts_the_run_earlier(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = sessions.written("limited.toml", LIMITED)
    world = sessions.new_world()
    at = sessions(world, "start", scenario=str(scenario)).place_of("after Server.apply", 4)
    assert world.result["rounds"] == ROUNDS
    assert world.result["privacy"]["epsilon"] <= 8
    world = sessions.new_world()
    assert sessions(world, "start", scenario=str(scenario), at=at).code == KILLED
    for source in SOURCES:
        world.secret(source).unlink()
    monkeypatch.setenv("PRIVREC_STATE", str(world.state))
    ended = CliRunner().invoke(main, ["resume", str(world.out)])
    assert ended.exit_code == 3, ended.output
    assert "the budget is 8" in ended.stderr
    assert "Stopped after 4 rounds" in ended.stderr
    result = world.result
    assert (result["rounds"], result["planned_rounds"]) == (4, ROUNDS)
    assert result["privacy"]["charges"] == len(world.charges()) == ROUNDS
    assert 4 < result["privacy"]["epsilon"] <= 8
    for name in ("model.safetensors", "report.html", "report.json", "report.md"):
        assert (world.out / name).is_file()
    assert CliRunner().invoke(main, ["resume", str(world.out)]).exit_code == 0


def test_what_is_paid_is_finished_though_nothing_is_left(sessions: Sessions) -> None:
    """Repeated rounds cost nothing, so a budget that is spent to its end stops none of them."""
    scenario = str(sessions.written("limited.toml", LIMITED))
    place = sessions(sessions.new_world(), "start", scenario=scenario).place_of(
        "after Server.apply", ROUNDS
    )
    world = sessions.new_world()
    killed = sessions(world, "start", scenario=scenario, at=place)
    assert killed.code == KILLED
    assert len(world.charges()) == ROUNDS
    again = sessions(world, "resume")
    assert again.code == 0, again.error
    assert len(again.releases) == 2
    assert world.result["rounds"] == len(world.charges()) == ROUNDS
    check_honest(world, killed, again)


# --------------------------------------------------------------------------- real processes


def command(world: World, *words: str, grown_to: int, send: int = signal.SIGKILL) -> Any:
    """``python -m privrec`` in a real process, signalled when its ledger has so many lines."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PRIVREC_STATE": str(world.state)}
    process = subprocess.Popen(
        [sys.executable, "-m", "privrec", *words, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    ledger = world.out / "ledger.jsonl"
    while process.poll() is None:
        if ledger.exists() and ledger.read_bytes().count(b"\n") >= grown_to:
            process.send_signal(send)
            break
        time.sleep(0.001)
    out, err = process.communicate()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def test_real_processes_killed_and_interrupted(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = TINY.replace(f"rounds = {ROUNDS}", "rounds = 40")
    long = long[: long.index("[run]")] + "[run]\nfootprint = false\ncheckpoint_every = 5\n"
    scenario = sessions.written("long.toml", long)
    world = sessions.new_world()
    begun = command(world, "run", str(scenario), "--out", str(world.out), grown_to=20)
    assert begun.returncode == KILLED
    assert begun.stderr.startswith("Simulated run: tiny")
    undisturbed = world.copy("undisturbed")
    lines = len(world.entries)
    stopped = command(world, "resume", str(world.out), grown_to=lines + 15, send=signal.SIGINT)
    assert stopped.returncode == 130, stopped.stderr
    assert "interrupted: stopped after round" in stopped.stderr
    assert f"privrec resume {world.out}" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    position, _ = checkpoint.read(*world.checkpoint)
    assert f"stopped after round {position.index} of 40" in stopped.stderr
    monkeypatch.setenv("PRIVREC_STATE", str(world.state))
    ended = CliRunner().invoke(main, ["resume", str(world.out), "--json"])
    assert ended.exit_code == 0, ended.stderr
    assert (world.out / "report.html").is_file()
    assert json.loads(ended.stdout) == world.result
    assert sessions(undisturbed, "resume").code == 0
    assert world.file("model.safetensors") == undisturbed.file("model.safetensors")
    assert world.file("ledger.jsonl") == undisturbed.file("ledger.jsonl")


def test_an_interrupt_at_any_step_repeats_the_bits(sessions: Sessions, known: Reference) -> None:
    names = known.whole.names
    first = known.whole.place_of("before Simulation.collect", 1)
    last = known.whole.place_of("after Server.apply", ROUNDS)
    for at in range(first, last + 1, 9):
        world = sessions.new_world()
        stopped = sessions(world, "start", key=KEY, at=at, signal=signal.SIGINT)
        assert stopped.code == 130, f"step {at}, {names[at - 1]}"
        position, _ = checkpoint.read(*world.checkpoint)
        assert f"stopped after round {position.index} of {ROUNDS}" in stopped.error
        assert len(read_rounds(world.out / "events.jsonl")) == position.index
        assert sessions(world, "resume").code == 0
        check_same(world, known)


# --------------------------------------------------------------------------- damaged and exchanged


@pytest.fixture(scope="module")
def halfway(sessions: Sessions, secret: Reference) -> World:
    """A run that died in its fifth round, after the checkpoint of its fourth."""
    world, _ = killed_in_round(sessions, secret, 5, "after Ledger.commit", "halfway")
    return world


@pytest.fixture
def world(halfway: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(Path(shutil.copytree(halfway.folder, tmp_path / "world")))
    monkeypatch.setenv("PRIVREC_STATE", str(world.state))
    return world


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text()
    after = change(before)
    assert after != before
    path.write_text(after)


def snapshot(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def refused(world: World, kind: type[PrivrecError] = IntegrityError, **words: Any) -> str:
    """The message of a resume that is refused, and that changes no file and draws no secret."""
    before = snapshot(world.folder)
    with pytest.raises(kind) as caught:
        lifecycle.resume(world.out, observer=Observer(), **words)
    assert caught.value.exit_code == kind.exit_code
    assert snapshot(world.folder) == before
    return str(caught.value)


def resumed(world: World, reference: Reference) -> None:
    lifecycle.resume(world.out, observer=Observer())
    check_same(world, reference)


def test_a_cut_off_last_line_is_repaired(world: World, secret: Reference, tmp_path: Path) -> None:
    whole = world.file("ledger.jsonl")
    last = len(whole) - len(whole[:-1].rpartition(b"\n")[0]) - 1
    for cut in (0, 1, 2, last // 2, last - 1, last):
        copy = World(Path(shutil.copytree(world.folder, tmp_path / f"cut-{cut}")))
        (copy.out / "ledger.jsonl").write_bytes(whole[: len(whole) - cut])
        os.environ["PRIVREC_STATE"] = str(copy.state)
        resumed(copy, secret)
        notes = [e for e in events_of(copy.out / "events.jsonl") if e["type"] == "resume"]
        assert notes[-1]["noise_root_kept"]
        assert (notes[-1]["repaired"] is None) == (cut in (0, last))


@pytest.mark.parametrize("number", range(1, 12))
def test_an_altered_line_is_refused(world: World, number: int) -> None:
    path = world.out / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 11
    place = len(lines[number - 1]) // 3
    altered = bytearray(lines[number - 1])
    altered[place] ^= 1
    path.write_bytes(b"".join([*lines[: number - 1], bytes(altered), *lines[number:]]))
    message = refused(world)
    assert "ledger.jsonl" in message
    assert f"line {number}" in message
    assert CliRunner().invoke(main, ["resume", str(world.out)]).exit_code == 4


def test_a_noise_multiplier_that_was_altered_with_care_is_refused(world: World) -> None:
    """The chain made anew, the head's signature cannot be."""
    import hashlib

    lines = []
    previous = "0" * 64
    for entry in world.entries:
        entry.pop("hash")
        entry["previous"] = previous
        if entry["kind"] == "charge":
            entry["event"]["noise_multiplier"] = 9.0
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        previous = hashlib.sha256(text.encode()).hexdigest()
        entry["hash"] = previous
        lines.append(json.dumps(entry, sort_keys=True, separators=(",", ":")) + "\n")
    (world.out / "ledger.jsonl").write_text("".join(lines))
    assert "not the one that was signed" in refused(world)


def test_a_ledger_that_lost_whole_lines_is_refused(world: World) -> None:
    path = world.out / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]))
    assert "6 entries, but 9 were signed: its end was cut away" in refused(world)


def test_a_ledger_taken_back_with_its_own_head_is_refused(
    sessions: Sessions, secret: Reference, world: World
) -> None:
    earlier, _ = killed_in_round(sessions, secret, 3, "after Server.apply", "earlier")
    for name in ("ledger.jsonl", "ledger.head.json"):
        shutil.copy(earlier.out / name, world.out)
    assert "entries, but 9 were signed: its end was cut away" in refused(world)


def test_an_earlier_checkpoint_of_the_run_costs_nothing(
    sessions: Sessions, secret: Reference, world: World
) -> None:
    earlier, _ = killed_in_round(sessions, secret, 3, "after Server.apply", "earlier still")
    shutil.copy(earlier.out / checkpoint.FILE, world.out)
    resumed(world, secret)


@pytest.mark.parametrize("name", ["ledger.jsonl", "ledger.head.json", checkpoint.FILE])
def test_a_file_that_is_gone_is_missed(world: World, name: str) -> None:
    (world.out / name).unlink()
    kind = UsageError if name == "ledger.jsonl" else IntegrityError
    assert name in refused(world, kind)


def test_an_altered_head_is_refused(world: World) -> None:
    rewrite(world.out / "ledger.head.json", lambda text: text.replace('"entries":9', '"entries":8'))
    assert "not signed with the key of this run" in refused(world)


def test_an_altered_checkpoint_is_refused(world: World) -> None:
    path = world.out / checkpoint.FILE
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert "its content is not what was written" in refused(world)


def test_the_files_of_another_run_are_refused(sessions: Sessions, world: World) -> None:
    place = sessions(sessions.new_world(), "start").place_of("after Ledger.commit", 5)
    other = sessions.new_world()
    assert sessions(other, "start", at=place).code == KILLED
    mine = snapshot(world.out)
    for names, says in (
        ([checkpoint.FILE], "not signed with the key of this run"),
        (["ledger.jsonl"], "it belongs to the key"),
        (["ledger.head.json"], "not signed with the key of this run"),
        (["ledger.jsonl", "ledger.head.json"], "it belongs to the key"),
        (["run.json"], "server.key"),
    ):
        for name in names:
            shutil.copy(other.out / name, world.out)
        kind = UsageError if names == ["run.json"] else IntegrityError
        assert says in refused(world, kind)
        for name in names:
            (world.out / name).write_bytes(mine[name])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("noise_multiplier = 1.0", "noise_multiplier = 2.0"),
        ("rounds = 6", "rounds = 5"),
        ("clip_norm = 1.0", "clip_norm = 0.5"),
        ("average = 0.5", "average = 0.6"),
        ("checkpoint_every = 2", "checkpoint_every = 3"),
    ],
)
def test_an_altered_scenario_is_refused(world: World, before: str, after: str) -> None:
    rewrite(world.out / "scenario.toml", lambda text: text.replace(before, after))
    assert "scenario.toml: its scenario_hash is" in refused(world)


def test_a_scenario_that_is_gone_or_broken_is_refused(world: World) -> None:
    (world.out / "scenario.toml").write_text("rounds = [")
    assert "scenario.toml" in refused(world, UsageError)
    (world.out / "scenario.toml").unlink()
    assert "there is no such file" in refused(world, UsageError)


def test_a_comment_in_the_scenario_is_harmless(world: World, secret: Reference) -> None:
    rewrite(world.out / "scenario.toml", lambda text: "# mine\n" + text)
    resumed(world, secret)


def test_other_data_is_refused(tmp_path: Path) -> None:
    rows = [(user, item) for user in range(20) for item in range(user % 3, 12, 3)]
    table = tmp_path / "rows.csv"

    def write(pairs: list[tuple[int, int]]) -> None:
        text = "".join(f"{user},{item}\n" for user, item in pairs)
        table.write_text("user,item\n" + text)

    write(rows)
    text = TINY[TINY.index("[model]") :].replace("population = 40", "population = 20")
    (tmp_path / "table.toml").write_text(
        f'name = "table"\n[data]\nsource = "table"\npath = "{table}"\n{text}'
    )
    world = World(tmp_path)
    with pytest.raises(Stop):
        lifecycle.start(load(tmp_path / "table.toml"), out=world.out, observer=Stops(3))
    write([*rows[:-4], (19, 0), *rows[-3:]])
    assert "the checkpoint belongs to data" in refused(world)
    write(rows)
    assert lifecycle.resume(world.out, observer=Observer()).payload["rounds"] == ROUNDS


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("noise_known", True, "run.json"),
        ("unsafe_noise_key", "00", "run.json"),
        ("scenario_hash", "0" * 64, "its scenario_hash is"),
        ("privacy_hash", "0" * 64, "its privacy_hash is"),
        ("run_id", 5, "run.json"),
        ("data_dir", 5, "run.json"),
        ("unsafe_noise_key", "no hex", "run.json"),
    ],
)
def test_an_altered_run_json_is_refused(world: World, key: str, value: object, says: str) -> None:
    stored = json.loads(world.file("run.json"))
    (world.out / "run.json").write_text(json.dumps({**stored, key: value}))
    assert says in refused(world)


def test_a_known_root_cannot_be_denied(sessions: Sessions, known: Reference) -> None:
    """A run whose noise others know does not become private by a stroke of the pen."""
    world = sessions.new_world()
    at = known.whole.place_of("after Server.apply", 3)
    assert sessions(world, "start", key=KEY, at=at).code == KILLED
    stored = json.loads(world.file("run.json"))
    denied = {**stored, "noise_known": False, "unsafe_noise_key": None}
    (world.out / "run.json").write_text(json.dumps(denied))
    again = sessions(world, "resume")
    assert again.code == 4
    assert "its noise_known is False, that of the signed ledger True" in again.error
    assert not (world.out / "result.json").exists()


def test_a_lost_signing_key_is_never_replaced(world: World) -> None:
    for lost in (("server.key",), ("server.key", *SOURCES)):
        for name in lost:
            world.secret(name).unlink(missing_ok=True)
        message = refused(world, UsageError)
        assert "server.key" in message
        assert "PRIVREC_STATE" in message


def test_another_signing_key_is_refused(world: World) -> None:
    world.secret("server.key").unlink()
    server_key(world.secret("server.root").with_name("server.key"))
    assert "it belongs to the key" in refused(world)


def test_the_wrong_state_folder_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "elsewhere"))
    assert "server.key" in refused(world, UsageError)
    assert not (tmp_path / "elsewhere").exists()


def test_a_root_that_others_may_read_is_refused(world: World) -> None:
    world.secret("server.root").chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        lifecycle.resume(world.out, observer=Observer())


def test_a_run_that_another_process_works_on_is_left_alone(world: World) -> None:
    identity = json.loads(world.file("run.json"))["run_id"]
    key = server_key(world.state / "runs" / identity / "server.key")
    with Ledger.open(world.out / "ledger.jsonl", signing_key=key):
        assert "another process writes to this run" in refused(world, UsageError)


def test_a_broken_result_is_refused(world: World, secret: Reference) -> None:
    resumed(world, secret)
    (world.out / "result.json").write_text('{"rounds": ')
    assert "result.json" in refused(world)


def test_a_finished_run_keeps_no_private_states(
    sessions: Sessions, known: Reference, secret: Reference
) -> None:
    """Also when it dies between its result and the end."""
    assert checkpoint.FILE not in snapshot(known.world.out)
    world, _ = killed_in_round(sessions, secret, 1, "before os.unlink", "unlinking")
    assert "result.json" in snapshot(world.out)
    assert checkpoint.FILE in snapshot(world.out)
    assert sessions(world, "resume").code == 0
    assert checkpoint.FILE not in snapshot(world.out)


# --------------------------------------------------------------------------- in this process


class Stop(BaseException):
    """Ends a run as a crash would, right after a round."""


class Stops(Observer):
    def __init__(self, after: int) -> None:
        self.after = after

    def round(self, record: Record) -> None:
        if record.round == self.after:
            raise Stop


@pytest.mark.parametrize(
    "changes",
    [
        ("train.server_optimizer=sgd",),
        ("train.server_optimizer=fedavg", "train.average=0", "train.weight_decay=0.01"),
        ("run.engine=device", "train.loss=bpr"),
        ("model.kind=neumf", "model.hidden=[8, 4]", "model.dim=8"),
        ("train.local_steps=2", "train.user_steps=2", "train.max_samples=3"),
        ("devices.sampling=everybody", "train.schedule=cosine", "train.warmup_rounds=2"),
        ("privacy.noise=none", "privacy.noise_multiplier="),
    ],
    ids=str,
)
def test_every_kind_of_run_goes_on_as_if_nothing_had_happened(
    changes: tuple[str, ...], tmp_path: Path, sessions: Sessions
) -> None:
    scenario = load(sessions.scenario, changes)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    lifecycle.start(scenario, out=whole, observer=Observer(), unsafe_noise_key=b"k")
    with pytest.raises(Stop):
        lifecycle.start(scenario, out=broken, observer=Stops(3), unsafe_noise_key=b"k")
    for round in (3, 5, ROUNDS):
        with pytest.raises(Stop):
            lifecycle.resume(broken, observer=Stops(round))
    with pytest.raises(Stop):
        lifecycle.start(
            scenario, out=tmp_path / "late", observer=Stops(ROUNDS), unsafe_noise_key=b"k"
        )
    late, often = (
        checkpoint.read(tmp_path / name / checkpoint.FILE, World(tmp_path).key.public_key())
        for name in ("late", "broken")
    )
    assert late[0].index == often[0].index == 4
    assert set(late[1]) == set(often[1])
    assert all(np.array_equal(late[1][name], often[1][name]) for name in late[1])
    lifecycle.resume(broken, observer=Observer())
    for name in ("model.safetensors", "ledger.jsonl"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_devices_remember_their_vectors(tmp_path: Path, sessions: Sessions) -> None:
    """Without the devices' states a resumed run would train other updates."""
    scenario = load(sessions.scenario)
    with pytest.raises(Stop):
        lifecycle.start(scenario, out=tmp_path / "run", observer=Stops(3), unsafe_noise_key=b"k")
    _, arrays = checkpoint.read(*World(tmp_path).checkpoint)
    assert arrays["states.0"].shape == (40, 5)
    assert np.abs(arrays["states.0"]).sum(axis=1).astype(bool).sum() > 20


def test_seconds_of_all_sessions_count(tmp_path: Path, sessions: Sessions) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stop):
        lifecycle.start(load(sessions.scenario), out=out, observer=Stops(5), unsafe_noise_key=b"k")
    path, key = World(tmp_path).checkpoint
    position, arrays = checkpoint.read(path, key)
    assert position.index == 4
    assert position.cpu_s > 0
    assert 0 < position.wall_s < 60
    from dataclasses import replace

    later = replace(position, wall_s=1000.0, cpu_s=960.0)
    checkpoint.write(path, later, arrays, World(tmp_path).key)
    cost = lifecycle.resume(out, observer=Observer()).payload["cost"]
    assert 1000 <= cost["wall_s"] < 1100
    assert cost["cpu_s_per_device_round"] == pytest.approx(960 / (ROUNDS * RATE * 40), rel=0.06)


def test_a_finished_run_is_given_back_as_it_is(tmp_path: Path, sessions: Sessions) -> None:
    result = lifecycle.start(load(sessions.scenario), out=tmp_path / "run", observer=Observer())
    before = snapshot(tmp_path)
    assert lifecycle.resume(tmp_path / "run", observer=Observer()) == result
    assert snapshot(tmp_path) == before


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UsageError, match=r"there is no run\.json"):
            lifecycle.resume(place, observer=Observer())
