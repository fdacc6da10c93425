"""What lies in a run's directory is believed as far as the run's key signed it, and no further."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import load_file, save_file

from privrec.device.update import digest
from privrec.errors import BudgetError, IntegrityError, PrivrecError, ReleaseRefused, UsageError
from privrec.privacy.events import epsilon
from privrec.privacy.ledger import Ledger
from privrec.privacy.population import PopulationCharge, create, read
from privrec.report.build import build
from privrec.report.facts import read_facts
from privrec.report.render import write
from privrec.report.verify import verify
from privrec.run import checkpoint, directory, lifecycle, plan
from privrec.run.directory import Identity
from privrec.run.privacy_plan import event_without_shares
from privrec.run.recommend import recommend
from privrec.run.record import Observer, Record
from privrec.scenario.load import Scenario, load
from privrec.storage import line_of, sign

ROUNDS = 5
TINY = f"""
name = "tiny"
[data]
users = 30
items = 20
clusters = 2
interactions_per_user = 6
[model]
dim = 4
block = 2
[devices]
population = 30
sampling_rate = 0.4
[train]
rounds = {ROUNDS}
[privacy]
noise = "central"
clip_norm = 1.0
noise_multiplier = 2.0
[run]
checkpoint_every = 2
footprint = false
"""
FORGER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


class Stop(BaseException):
    """Ends a run as a crash would."""


class Stops(Observer):
    def __init__(self, after: int) -> None:
        self.after = after

    def round(self, record: Record) -> None:
        if record.round == self.after:
            raise Stop


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def started(out: Path, after: int | None = None, *settings: str, **words: Any) -> Path:
    """A run, finished or killed after a round."""
    scenario = Scenario.from_toml(TINY, settings)
    if after is None:
        lifecycle.start(scenario, out=out, observer=Observer(), **words)
        return out
    with pytest.raises(Stop):
        lifecycle.start(scenario, out=out, observer=Stops(after), **words)
    return out


@pytest.fixture
def halfway(tmp_path: Path) -> Path:
    """Killed in its fourth round or later, after the checkpoint of its second."""
    return started(tmp_path / "run", 3)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return started(tmp_path / "run")


def resumed(out: Path) -> dict[str, Any]:
    return lifecycle.resume(out, observer=Observer()).payload


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(out: Path, kind: type[PrivrecError] = IntegrityError) -> str:
    before = snapshot(out.parent)
    with pytest.raises(kind) as caught:
        resumed(out)
    assert snapshot(out.parent) == before
    return str(caught.value)


def key_of(out: Path) -> Ed25519PrivateKey:
    return Identity.read(out).signing_key()


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --------------------------------------------------------------------------- another scenario


@pytest.mark.parametrize("whose", ["forger's", "run's own"])
@pytest.mark.parametrize(
    "setting", ["privacy.noise_multiplier=0.3", "train.rounds=50", "privacy.clip_norm=9.0"]
)
def test_another_scenario_is_never_charged(halfway: Path, whose: str, setting: str) -> None:
    """Scenario, run.json and checkpoint rewritten together, the last even with the run's key."""
    position, arrays = checkpoint.read(halfway / checkpoint.FILE, key_of(halfway).public_key())
    weaker = load(halfway / "scenario.toml", [setting])
    (halfway / "scenario.toml").write_text(weaker.to_toml())
    hashes = {"scenario_hash": weaker.hash(), "privacy_hash": weaker.privacy_hash()}
    for change in ({}, hashes):
        edit(halfway / "run.json", lambda stored, change=change: stored.update(change))
        key = FORGER if whose == "forger's" else key_of(halfway)
        checkpoint.write(halfway / checkpoint.FILE, position, arrays, key)
        assert "that of the signed ledger" in refused(halfway)


def test_a_replaced_weight_is_noticed(halfway: Path) -> None:
    place, mine = halfway / checkpoint.FILE, key_of(halfway).public_key()
    position, arrays = checkpoint.read(place, mine)
    arrays["weights"][3] += 1.0
    checkpoint.write(place, position, arrays, FORGER)
    assert "not signed with the key of this run" in refused(halfway)


@pytest.mark.parametrize("change", [{"ledger_hash": "0" * 64}, {"ledger_entries": 99}])
def test_a_checkpoint_that_was_taken_with_another_ledger_is_refused(
    halfway: Path, change: dict[str, Any]
) -> None:
    """As on a machine that was set back as a whole but for the run's directory."""
    place, key = halfway / checkpoint.FILE, key_of(halfway)
    position, arrays = checkpoint.read(place, key.public_key())
    checkpoint.write(place, replace(position, **change), arrays, key)
    assert "of another ledger" in refused(halfway)


def test_no_record_passes_for_one_of_another_kind(halfway: Path) -> None:
    """The very facts of a checkpoint, signed as a result, are none."""
    place, key = halfway / checkpoint.FILE, key_of(halfway)
    position, arrays = checkpoint.read(place, key.public_key())
    facts = {**vars(position), "digest": checkpoint._digest(arrays)}
    save_file(arrays, place, {"record": json.dumps(sign("result", facts, key))})
    assert "not signed with the key of this run" in refused(halfway)


def test_a_run_that_is_simulated_cannot_be_called_deployed(halfway: Path) -> None:
    edit(halfway / "run.json", lambda stored: stored.update(simulated=False))
    assert "its simulated is False" in refused(halfway)


# --------------------------------------------------------------------------- copies, set back


def test_an_older_copy_of_the_directory_is_refused(halfway: Path, tmp_path: Path) -> None:
    """What it lacks was released, and may not be released again with fresh noise."""
    backup = shutil.copytree(halfway, tmp_path / "backup")
    resumed(halfway)
    shutil.rmtree(halfway)
    shutil.copytree(backup, halfway)
    assert "were signed: its end was cut away" in refused(halfway)


def test_of_two_copies_only_one_goes_on(halfway: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(halfway, tmp_path / "other"))
    with pytest.raises(Stop):
        lifecycle.resume(halfway, observer=Stops(5))
    assert "were signed: its end was cut away" in refused(other)
    resumed(halfway)


def test_two_copies_never_run_at_once(halfway: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(halfway, tmp_path / "other"))
    identity, scenario = Identity.read(halfway), load(halfway / "scenario.toml")
    with directory.open_ledger(halfway, identity, scenario):
        assert "another process writes to this run" in refused(other, UsageError)
    resumed(other)


def test_the_head_that_this_machine_keeps_is_missed(halfway: Path) -> None:
    kept = Identity.read(halfway).kept_head()
    assert kept is not None
    content = kept.read_bytes()
    kept.unlink()
    assert str(kept) in refused(halfway)
    kept.write_bytes(content.replace(b'"entries":', b'"entries":1'))
    assert "not signed with the key of this run" in refused(halfway)


def test_an_older_checkpoint_with_the_ledger_of_today_costs_nothing(tmp_path: Path) -> None:
    out = started(tmp_path / "run", 1)
    old = (out / checkpoint.FILE).read_bytes()
    with pytest.raises(Stop):
        lifecycle.resume(out, observer=Stops(4))
    (out / checkpoint.FILE).write_bytes(old)
    assert resumed(out)["privacy"]["charges"] == ROUNDS


# --------------------------------------------------------------------------- results


@pytest.mark.parametrize("content", ["{}", "[]", "", '{"rounds": 5, "privacy": {"epsilon": 0.1}}'])
def test_a_stray_result_ends_nothing(halfway: Path, content: str) -> None:
    (halfway / "result.json").write_text(content)
    before = (halfway / checkpoint.FILE).read_bytes()
    with pytest.raises(Stop):
        lifecycle.resume(halfway, observer=Stops(3))
    assert (halfway / checkpoint.FILE).read_bytes() == before
    payload = resumed(halfway)
    assert payload["rounds"] == payload["privacy"]["charges"] == ROUNDS
    assert json.loads((halfway / "result.json").read_text()) == payload


def test_the_result_of_another_run_ends_nothing(halfway: Path, tmp_path: Path) -> None:
    other = started(tmp_path / "other")
    for name in ("result.json", "model.safetensors"):
        shutil.copy(other / name, halfway)
    assert resumed(halfway)["run_id"] == Identity.read(halfway).run_id


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["privacy"].update(epsilon=0.1),
        lambda r: r["metrics"].update({"hr@10": 0.99}),
        lambda r: r.update(simulated=False),
        lambda r: r.update(sign("result", {**r, "rounds": 99}, FORGER)),
        lambda r: r.clear(),
    ],
)
def test_an_altered_result_is_never_shown(finished: Path, change: Callable[..., object]) -> None:
    edit(finished / "result.json", change)
    assert "result.json: not" in refused(finished)


def test_metrics_are_reported_as_the_run_signed_them(finished: Path) -> None:
    """In a copy elsewhere too: the key that the ledger names is that of the result."""
    write(build(finished), finished)
    honest = (finished / "result.json").read_bytes()
    edit(finished / "result.json", lambda r: r["metrics"].update({"hr@10": 0.99}))
    with pytest.raises(IntegrityError, match=r"result\.json: not signed with the key of this run"):
        build(finished)
    assert [each.where for each in verify(finished).mismatches] == ["result.json"]
    (finished / "result.json").write_bytes(honest)
    edit(finished / "report.json", lambda r: r["gaps"].update(accuracy="lost"))
    assert "gaps" in [each.where for each in verify(finished).mismatches]


def test_an_end_that_is_not_signed_serves_no_model(halfway: Path) -> None:
    """A line that ends the run can be added without the key; what it names is not the model."""
    weights = checkpoint.read(halfway / checkpoint.FILE, key_of(halfway).public_key())[1]
    save_file({"weights": weights["weights"]}, halfway / "model.safetensors")
    last = json.loads((halfway / "ledger.jsonl").read_bytes().splitlines()[-1])
    end = {"kind": "end", "model": digest(weights["weights"]).hex(), "index": last["index"] + 1}
    with (halfway / "ledger.jsonl").open("ab") as file:
        file.write(line_of({**end, "previous": last["hash"]}))
    with pytest.raises(IntegrityError, match="not the model that the run's ledger ends with"):
        recommend(halfway, user="3", k=3)
    with pytest.raises(IntegrityError, match="entries, of which"):
        read_facts(halfway)


@pytest.mark.parametrize("name", ["scenario_hash", "privacy_hash"])
def test_a_header_that_contradicts_its_scenario_declares_nothing(finished: Path, name: str) -> None:
    with Ledger.open(finished / "ledger.jsonl", repair=False) as ledger:
        declared = ledger.header
    assert plan.read_header(declared, "ledger").scenario.hash() == declared["scenario_hash"]
    with pytest.raises(IntegrityError, match=f"the header's {name} is not that of the scenario"):
        plan.read_header({**declared, name: "0" * 64}, "ledger")


def test_epsilon_of_a_finished_run_is_that_of_its_ledger(finished: Path) -> None:
    shown = resumed(finished)["privacy"]
    with Ledger.open(finished / "ledger.jsonl", repair=False) as ledger:
        assert shown["epsilon"] == epsilon(ledger.counts, shown["delta"], "recipients")
        assert shown["charges"] == len(ledger.charges) == ROUNDS


def test_nothing_is_charged_after_the_end(finished: Path) -> None:
    identity, scenario = Identity.read(finished), load(finished / "scenario.toml")
    with directory.open_ledger(finished, identity, scenario) as ledger:
        (event,) = ledger.counts
        with pytest.raises(ReleaseRefused, match="the run has ended"):
            ledger.charge(event, ROUNDS, 0)
        assert len(ledger.charges) == ROUNDS


def test_a_finished_run_whose_ledger_lost_its_end_is_not_shown(finished: Path) -> None:
    lines = (finished / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (finished / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    assert "its end was cut away" in refused(finished)


def test_a_run_that_ended_is_finished_without_another_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here one that its budget stopped early, since it lost its root and paid for a round twice."""
    out = tmp_path / "run"
    limited = Scenario.from_toml(TINY.replace("noise_multiplier = 2.0", "epsilon = 8.0"))
    with pytest.raises(Stop):
        lifecycle.start(limited, out=out, observer=Stops(3))
    (Identity.read(out).secrets_dir() / "server.root").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(lifecycle.SimulatedLoop, "finish", killed)
        with pytest.raises(Stop):
            resumed(out)
    assert not (out / "result.json").exists()
    ledger = (out / "ledger.jsonl").read_bytes()
    payload = resumed(out)
    assert (payload["rounds"], payload["planned_rounds"]) == (4, ROUNDS)
    assert payload["privacy"]["charges"] == ROUNDS
    assert (out / "ledger.jsonl").read_bytes() == ledger
    assert resumed(out) == payload


def killed(*_: object) -> Any:
    raise Stop


# --------------------------------------------------------------------------- what a model is


def test_a_swapped_model_recommends_nothing_and_verifies_nothing(finished: Path) -> None:
    write(build(finished), finished)
    assert recommend(finished, user="3", k=3)
    assert verify(finished).holds
    weights = load_file(finished / "model.safetensors")["weights"]
    save_file({"weights": weights[::-1].copy()}, finished / "model.safetensors")
    with pytest.raises(IntegrityError, match="not the model that the run's ledger ends with"):
        recommend(finished, user="3", k=3)
    assert [each.where for each in verify(finished).mismatches] == ["model.safetensors"]


def test_a_model_is_not_served_as_another_scenario_has_it(finished: Path) -> None:
    other = load(finished / "scenario.toml", ["train.user_steps=7"])
    (finished / "scenario.toml").write_text(other.to_toml())
    with pytest.raises(IntegrityError, match="its scenario_hash is"):
        recommend(finished, user="3", k=3)


def test_what_was_not_checked_is_said(finished: Path) -> None:
    write(build(finished), finished)
    (never,) = verify(finished).unchecked
    assert never == "not looked at: catalogue.safetensors, events.jsonl, model.json, run.json"
    for name in ("model.safetensors", "report.md"):
        (finished / name).unlink()
    verdict = verify(finished)
    assert verdict.holds
    missing = [text.split(":")[0] for text in verdict.unchecked if text != never]
    assert missing == ["report.md", "model.safetensors"]
    assert verdict.to_json()["unchecked"] == verdict.unchecked


# --------------------------------------------------------------------------- rows and populations


def test_a_row_of_another_scenario_is_not_taken_for_this_one(
    tmp_path: Path, finished: Path
) -> None:
    row = '[[rows]]\nname = "more"\nset = { "train.local_lr" = 0.5 }\n'
    scenario = Scenario.from_toml(TINY + row)
    started(finished / "rows" / "0")
    result = lifecycle.resume(finished, observer=Observer())
    with pytest.raises(UsageError, match="a run of another scenario lies where this row belongs"):
        lifecycle.with_rows(result, scenario, data_dir=None, observer=Observer())


def readers() -> None:
    event = event_without_shares(Scenario.from_toml(TINY))
    limit = epsilon({event: 2 * ROUNDS}, 1e-5, "recipients")
    create("readers", epsilon=limit, delta=1e-5, against="recipients")


def test_a_settled_run_is_not_finished_again_from_a_backup(tmp_path: Path, state: Path) -> None:
    """Run directory and secrets restored, with fresh roots: only the population knows."""
    readers()
    out = started(tmp_path / "run", 1, population="readers")
    (secrets,) = (state / "runs").iterdir()
    backup = tmp_path / "backup"
    shutil.copytree(out, backup / "run")
    shutil.copytree(secrets, backup / "secrets")
    resumed(out)
    assert read("readers").settled == {Identity.read(out).run_id}
    shutil.rmtree(out)
    shutil.copytree(backup / "run", out)
    assert "its end was cut away" in refused(out)
    shutil.copytree(backup / "secrets", secrets, dirs_exist_ok=True)
    (secrets / "server.root").unlink()
    with pytest.raises(IntegrityError, match="what it charged is final; this is an older copy"):
        resumed(out)
    with Ledger.open(out / "ledger.jsonl", repair=False) as ledger:
        assert len(ledger.charges) == 1
    shutil.rmtree(out)
    assert started(out, population="readers")
    with pytest.raises(BudgetError):
        started(tmp_path / "third", population="readers")


def test_a_header_says_where_the_population_stood(tmp_path: Path) -> None:
    readers()
    out = started(tmp_path / "run", population="readers")
    with Ledger.open(out / "ledger.jsonl", repair=False) as ledger:
        standing = ledger.header["standing"]
    assert standing["entries"] == 2
    assert standing["last_hash"] == read("readers").hashes[1]
    # Runs that are tied to nothing count those that are tied to a population.
    started(tmp_path / "other")
    with Ledger.open(tmp_path / "other" / "ledger.jsonl", repair=False) as ledger:
        assert ledger.header["standing"]["runs"] == 1


def test_a_crash_before_the_result_leaves_nothing_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers()
    out = tmp_path / "run"

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "end", killed)
        with pytest.raises(Stop):
            lifecycle.start(
                Scenario.from_toml(TINY), out=out, observer=Observer(), population="readers"
            )
    for place in ((PopulationCharge, "settle"), (directory, "write_result")):
        with monkeypatch.context() as patch:
            patch.setattr(*place, killed)
            with pytest.raises(Stop):
                resumed(out)
    assert resumed(out)["privacy"]["charges"] == ROUNDS
    found = read("readers")
    assert found.settled == set(found.runs)
    assert sum(found.counts.values()) == ROUNDS


# --------------------------------------------------------------------------- where a run appears


def test_a_run_appears_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    for name, target in (("to-empty", "empty"), ("to-nothing", "nothing")):
        link = tmp_path / name
        link.symlink_to(tmp_path / "disk" / target)
        started(link)
        assert link.is_symlink()
        assert (tmp_path / "disk" / target / "result.json").is_file()
        assert resumed(link)["rounds"] == ROUNDS
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["empty", "nothing"]


def test_where_no_run_can_appear_is_a_plain_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="no run can be made there"):
        started(tmp_path / "file" / "run")
    monkeypatch.setattr(Path, "is_mount", lambda _: True)
    with pytest.raises(UsageError, match="a file system is mounted there"):
        started(tmp_path / "mounted")


def test_weights_of_a_checkpoint_are_those_that_were_saved(halfway: Path) -> None:
    """Else a test above could pass by a checkpoint that nothing reads."""
    _, arrays = checkpoint.read(halfway / checkpoint.FILE, key_of(halfway).public_key())
    resumed(halfway)
    weights = load_file(halfway / "model.safetensors")["weights"]
    assert arrays["weights"].shape == weights.shape
    assert not np.array_equal(arrays["weights"], weights)
