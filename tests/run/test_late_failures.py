"""Failures between the first charge and the written report: the ledger stands, the run goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from click.testing import CliRunner

from privrec.cli.main import main
from privrec.cli.report import write_report
from privrec.errors import DataError, IntegrityError, UsageError
from privrec.privacy import population
from privrec.privacy.ledger import Ledger
from privrec.run import lifecycle
from privrec.run.directory import Identity
from privrec.run.lifecycle import SimulatedLoop, with_rows
from privrec.run.record import Observer, Observers, Record, RunInfo
from privrec.scenario.load import Scenario

SCENARIO = """
name = "late"
[devices]
sampling_rate = 0.5
[data]
users = 60
items = 40
interactions_per_user = 6
[model]
dim = 4
block = 4
[train]
rounds = 2
[privacy]
noise = "central"
noise_multiplier = 1.0
clip_norm = 1.0
[run]
footprint = false
baselines = ["popularity"]
"""


class Injected(Exception):
    """The failure that is put in."""


class InjectedOSError(Injected, OSError):
    """One of the system, which is caught apart in places."""


class InjectedInterrupt(KeyboardInterrupt):
    """One that no ``except Exception`` catches."""


class _Calls:
    """Raises at the ``fatal``-th call of a function of privrec since the first charge."""

    def __init__(self, fatal: int | None = None, error: type[BaseException] = Injected) -> None:
        self.fatal, self.error, self.count, self.armed = fatal, error, 0, False
        self.hit = ""

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        name = str(frame.f_globals.get("__name__", ""))
        if event != "call" or not name.startswith("privrec."):
            return
        if not self.armed:
            self.armed = frame.f_code is Ledger.charge.__code__
            return
        self.count += 1
        if self.count == self.fatal:
            self.hit = f"{name}.{frame.f_code.co_qualname}"
            raise self.error(self.hit)


def _trained(out: Path, scenario: Scenario, calls: _Calls | None = None) -> dict[str, Any]:
    """The stretch under test: from the first round to the written report."""
    sys.setprofile(calls)
    try:
        if (out / "run.json").exists():
            result = lifecycle.resume(out, observer=Observer())
        else:
            result = lifecycle.start(scenario, out=out, observer=Observer())
        write_report(out)
    finally:
        sys.setprofile(None)
    return result.payload


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))


def _survives(tmp_path: Path, share: float, error: type[BaseException] = Injected) -> str:
    scenario = Scenario.from_toml(SCENARIO)
    for name in ("warm", "whole"):  # what is cached once is not called again
        whole = _Calls()
        payload = _trained(tmp_path / name, scenario, whole)
    calls, out = _Calls(1 + int(share * (whole.count - 1)), error), tmp_path / "hit"
    failed = False
    try:
        found = _trained(out, scenario, calls)
    except error:
        failed = True
    assert calls.hit, "the failure was never put in"
    with Ledger.open(out / "ledger.jsonl", repair=True) as ledger:
        charged = ledger.epsilon("recipients", scenario.privacy.delta)
        assert Identity.read(out).run_id == ledger.header["run_id"]
    if not failed and found.get("gaps"):
        assert "Injected" in (out / "report.md").read_text("utf-8"), calls.hit
    found = _trained(out, scenario)
    assert found["gaps"] == {}, calls.hit
    assert found["rounds"] == 2, calls.hit
    assert found["privacy"]["epsilon"] >= charged, calls.hit
    assert found["privacy"]["epsilon"] >= payload["privacy"]["epsilon"], calls.hit
    assert (out / "report.html").is_file()
    assert not (out / "checkpoint.safetensors").exists()
    return calls.hit


# A failure that is put into closing a file leaves it to the garbage collector, which says so.
leaves_files = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@leaves_files
@pytest.mark.parametrize("place", range(10))
def test_a_failure_after_the_first_charge_is_survived(tmp_path: Path, place: int) -> None:
    errors = (Injected, InjectedOSError, InjectedInterrupt)
    _survives(tmp_path, (place + 0.5) / 10, errors[place % 3])


@pytest.mark.slow
@leaves_files
@pytest.mark.parametrize("place", range(200))
def test_two_hundred_failures_are_survived(tmp_path: Path, place: int) -> None:
    _survives(tmp_path, place / 200)


def test_an_observer_that_cannot_be_opened_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run has its ledger by then; a tracking server that is away costs no budget."""

    class Away(Observer):
        closed = False

        def started(self, info: RunInfo) -> None:
            raise UsageError("no server answers")

        def round(self, record: Record) -> None:
            raise AssertionError("it was left out")

        def close(self) -> None:
            self.closed = True

    away = Away()
    result = lifecycle.start(
        Scenario.from_toml(SCENARIO), out=tmp_path / "run", observer=Observers(away)
    )
    assert result.payload["rounds"] == 2
    assert away.closed
    assert "Away failed (UsageError: no server answers)" in caplog.text


@pytest.mark.parametrize(
    ("module", "function", "gap"),
    [
        ("privrec.evaluate.metrics", "Evaluation.intervals", "intervals"),
        ("privrec.evaluate.metrics", "by_segment", "segments"),
        ("privrec.run.task", "Recommending.baseline", "baseline popularity"),
        ("privrec.run.task", "Recommending.cost", "costs of tier 1"),
        ("privrec.run.lifecycle", "SimulatedLoop.evaluate", "accuracy"),
    ],
)
def test_a_figure_that_cannot_be_had_is_a_stated_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, function: str, gap: str
) -> None:
    """The run is finished with its ε; when the cause is gone, resume fills the gap."""

    def fails(*_: Any, **__: Any) -> Any:
        raise Injected("user 42 liked item 7")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{function}", fails)
        found = _trained(out, Scenario.from_toml(SCENARIO))
    assert found["gaps"][gap] == "Injected"  # without the text, which may quote private data
    assert found["privacy"]["epsilon"] > 0
    for page in ("report.md", "report.html", "report.json"):
        text = (out / page).read_text("utf-8")
        assert gap in text
        assert "user 42" not in text
    again = lifecycle.resume(out, observer=Observer())
    assert again.payload["gaps"] == {}
    assert again.payload["metrics"]
    assert again.payload["privacy"] == found["privacy"]


def test_a_gap_of_one_seed_of_a_row_is_stated_and_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = '[[rows]]\nname = "more"\nset = { "train.local_lr" = 0.5 }\n'
    scenario = Scenario.from_toml(SCENARIO + "seeds = 2\n" + row)
    out, evaluate = tmp_path / "run", SimulatedLoop.evaluate

    def fails(self: SimulatedLoop, **words: Any) -> Any:
        if self.out.name == "0-1":
            raise Injected
        return evaluate(self, **words)

    result = lifecycle.start(scenario, out=out, observer=Observer())
    with monkeypatch.context() as patch:
        patch.setattr(SimulatedLoop, "evaluate", fails)
        result = with_rows(result, scenario, data_dir=None, observer=Observer())
    assert result.payload["gaps"]["rows/0-1: accuracy"] == "Injected"
    # A mean over the seed that was measured would pass for one over both.
    assert not [key for key in result.payload["rows"][0] if "@" in key]
    result = lifecycle.resume(out, observer=Observer())
    result = with_rows(result, scenario, data_dir=None, observer=Observer())
    assert result.payload["gaps"] == {}
    assert result.payload["rows"][0]["full_ndcg@10"] > 0
    assert not list(out.rglob("checkpoint.safetensors"))


@pytest.mark.parametrize(
    ("error", "code"), [(OSError(28, "No space left on device"), 2), (IntegrityError("cut"), 4)]
)
def test_a_settlement_that_fails_leaves_the_run_and_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    """What was set aside then counts as spent, and resume settles it."""

    def fails(*_: Any) -> None:
        raise error

    population.create("readers", epsilon=100.0, delta=1e-6, against="recipients")
    (tmp_path / "late.toml").write_text(SCENARIO, encoding="utf-8")
    out = tmp_path / "run"
    words = ["run", str(tmp_path / "late.toml"), "--out", str(out), "--population", "readers"]
    with monkeypatch.context() as patch:
        patch.setattr(population, "settle", fails)
        assert CliRunner().invoke(main, words).exit_code == code
    assert "settlement with the population" in (out / "report.md").read_text("utf-8")
    assert population.read("readers").settled == set()
    assert CliRunner().invoke(main, ["resume", str(out)]).exit_code == 0
    assert population.read("readers").settled == {Identity.read(out).run_id}
    assert "settlement" not in (out / "report.md").read_text("utf-8")


def _table(tmp_path: Path, rows: int, each: int) -> Path:
    path = tmp_path / "d.csv"
    lines = [f"{user},{(user + k) % 7}" for user in range(rows) for k in range(each)]
    path.write_text("\n".join(["user,item", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("each", "settings", "error", "says"),
    [
        (1, [], DataError, "no user holds out an item"),
        (3, ['run.baselines=["pure_svd"]', "model.dim=8"], UsageError, "lower model.dim"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_charge(
    tmp_path: Path, each: int, settings: list[str], error: type[Exception], says: str
) -> None:
    given = ["data.source=table", f"data.path={_table(tmp_path, 40, each)}", "data.users="]
    given += ["data.items=", "data.interactions_per_user=", *settings]
    with pytest.raises(error, match=says):
        lifecycle.start(
            Scenario.from_toml(SCENARIO, given), out=tmp_path / "out", observer=Observer()
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("noise", ["1e-4", "1e-20", "1e-160", "1e6"])
def test_noise_of_any_size_has_an_epsilon_and_a_report(tmp_path: Path, noise: str) -> None:
    scenario = Scenario.from_toml(SCENARIO, [f"privacy.noise_multiplier={noise}"])
    found = _trained(tmp_path / "run", scenario)
    epsilon = found["privacy"]["epsilon"]
    assert epsilon is None if noise == "1e-160" else epsilon >= 0
    assert found["gaps"] == {}
