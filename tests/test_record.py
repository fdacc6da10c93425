"""What a run tells while it goes: the log, the console, the tracking services."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from privrec.errors import DataError, ReleaseRefused, UsageError
from privrec.record import (
    EventLog,
    MLflowSink,
    NullObserver,
    Observers,
    PlainObserver,
    ProgressObserver,
    Record,
    RunInfo,
    TensorBoardSink,
    console_observer,
    duration_text,
    epsilon_text,
    headline_metric,
    metric_name,
    opening_words,
    read_events,
    read_rounds,
    spent_text,
)

INFO = RunInfo("ml-1m-dp", 20, title="Federated GMF", population=6040, budget=8.0)


def a_record(number: int, **values: Any) -> Record:
    defaults = {"epsilon": 1.2301, "epsilon_server": 9.0, "loss": 0.5, "cohort": 302}
    return Record(number, 20, **{**defaults, **values})


# --------------------------------------------------------------------------- the log


def test_rounds_come_back_as_written_but_for_the_cohort(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append("start", rounds=20)
        log.round(a_record(1, metrics={"hr@10": 0.5}, wall_s=0.3, cpu_s=0.2, attempt=2))
    assert read_rounds(tmp_path / "events.jsonl") == [
        a_record(1, metrics={"hr@10": 0.5}, wall_s=0.3, cpu_s=0.2, attempt=2, cohort=None)
    ]


def test_each_line_is_on_file_before_the_next(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.round(a_record(1))
    assert len(read_rounds(tmp_path / "events.jsonl")) == 1
    log.close()
    log.close()


def test_no_line_holds_a_cohort(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.round(a_record(1, cohort=31337))
    text = (tmp_path / "events.jsonl").read_text()
    assert "31337" not in text
    assert "cohort" not in text


@pytest.mark.parametrize("name", ["cohort", "cohort_size", "cohorts"])
def test_an_event_with_a_cohort_is_refused(tmp_path: Path, name: str) -> None:
    with EventLog(tmp_path / "events.jsonl") as log, pytest.raises(ReleaseRefused, match=name):
        log.append("end", **{name: 302})
    assert (tmp_path / "events.jsonl").read_text() == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null(tmp_path: Path, value: float) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.round(a_record(1, loss=value, epsilon=value, metrics={"hr@10": value}))
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert event["loss"] is None
    assert event["epsilon"] is None
    assert event["metrics"] == {"hr@10": None}


def test_the_later_line_of_a_round_wins(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        for number, loss in [(1, 0.9), (2, 0.8), (3, 0.7)]:
            log.round(a_record(number, loss=loss))
        log.append("resume", round=2)
        log.round(a_record(2, loss=0.85, attempt=1))
    losses = [(record.round, record.loss) for record in read_rounds(tmp_path / "events.jsonl")]
    assert losses == [(1, 0.9), (2, 0.85), (3, 0.7)]


@given(cut=st.integers(min_value=1, max_value=60))
def test_a_line_cut_off_by_a_crash_is_lost_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    with EventLog(path) as log:
        log.round(a_record(1))
        log.round(a_record(2))
    path.write_bytes(path.read_bytes()[:-1][:-cut])
    assert [record.round for record in read_rounds(path)] == [1]
    with EventLog(path) as log:
        log.round(a_record(2))
    assert [record.round for record in read_rounds(path)] == [1, 2]


def test_a_damaged_line_within_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"type": "start"}\nnot json\n{"type": "end"}\n')
    with pytest.raises(DataError, match="line 2.*not json.*not a JSON object"):
        read_events(path)


def test_a_round_without_a_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"type": "round", "loss": 1}\n')
    with pytest.raises(DataError, match="lacks its round"):
        read_rounds(path)


def test_an_absent_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no event log"):
        read_events(tmp_path / "events.jsonl")


# --------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.24, "1.24"), (1.240001, "1.25"), (7.999, "8.00"), (0.0, "0.00"), (1e-9, "0.01")],
)
def test_epsilon_is_rounded_up(value: float, text: str) -> None:
    assert epsilon_text(value) == text


@given(st.floats(min_value=0, max_value=1e6))
def test_a_printed_epsilon_is_never_below_the_true_one(value: float) -> None:
    assert value <= float(epsilon_text(value)) < value + 0.0101


@pytest.mark.parametrize("value", [None, math.inf])
def test_no_epsilon_is_infinite(value: float | None) -> None:
    assert epsilon_text(value) == "∞"


def test_a_simulated_run_says_so_first() -> None:
    assert opening_words(INFO).startswith("Simulated run: ml-1m-dp")
    assert "at most ε = 8 against the recipients" in opening_words(INFO)


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (RunInfo("a", 1, private=False), "no privacy guarantee"),
        (RunInfo("a", 1, noise_known=True, budget=8), "no privacy guarantee"),
        (RunInfo("a", 1), "without a limit"),
        (RunInfo("a", 9, done=4), "going on after round 4"),
    ],
)
def test_the_opening_promises_no_more_than_holds(info: RunInfo, words: str) -> None:
    assert words in opening_words(info)


def test_spent_is_against_the_adversary_of_the_budget() -> None:
    server = RunInfo("a", 1, budget=20.0, budget_against="server")
    assert spent_text(INFO, a_record(1)) == "ε 1.24 of 8"
    assert spent_text(server, a_record(1)) == "ε 9.00 of 20"
    assert spent_text(RunInfo("a", 1, private=False), a_record(1)) == "no privacy"
    assert spent_text(RunInfo("a", 1, noise_known=True), a_record(1)) == "ε ∞ (noise known)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_names_of_metrics() -> None:
    assert metric_name("full_ndcg@20") == "NDCG@20, full ranking"
    assert headline_metric({"ndcg@10": 1.0, "full_hr@10": 1.0, "hr@10": 1.0}) == "hr@10"
    assert headline_metric({"full_ndcg@10": 1.0, "full_hr@10": 1.0}) == "full_hr@10"
    assert headline_metric({}) is None


# --------------------------------------------------------------------------- the console


def plain_lines(rounds: list[Record], info: RunInfo = INFO, **settings: Any) -> list[str]:
    stream = io.StringIO()
    clock = iter(range(1000))
    with PlainObserver(stream, clock=lambda: float(next(clock)), **settings) as observer:
        observer.started(info)
        for record in rounds:
            observer.round(record)
    return stream.getvalue().splitlines()


def test_plain_lines_say_what_matters() -> None:
    first = plain_lines([a_record(1, metrics={"hr@10": 0.6881})])[1]
    assert first == "round 1/20 · ε 1.24 of 8 · loss 0.5000 · HR@10 0.688 · 19 s left"


def test_plain_lines_never_show_a_cohort() -> None:
    assert not any("302" in line for line in plain_lines([a_record(n) for n in range(1, 21)]))


def test_plain_lines_come_now_and_then() -> None:
    rounds = [a_record(n, metrics={"hr@10": 0.5} if n == 12 else None) for n in range(1, 21)]
    shown = [line.split(" ")[1] for line in plain_lines(rounds, every_s=7)[1:]]
    assert shown == ["1/20", "8/20", "12/20", "19/20", "20/20"]


def test_time_left_counts_from_the_resume() -> None:
    resumed = RunInfo("a", 20, done=10, private=False)
    assert plain_lines([a_record(11)], resumed)[1].endswith("9.0 s left")


def terminal(width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def drawn(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_shows_every_figure_on_one_line(width: int) -> None:
    console = terminal(width)
    with ProgressObserver(console) as observer:
        observer.started(INFO)
        observer.round(a_record(3, metrics={"hr@10": 0.61}))
        observer.round(a_record(4))
    last = drawn(console).splitlines()[-2].rpartition("\x1b[2K")[2]
    assert len(last) <= width
    for part in ("4/20", "ε 1.24 of 8", "cohort 302", "loss 0.5000", "HR@10 0.610"):
        assert part in last
    assert drawn(console).startswith("Simulated run: ml-1m-dp")


def test_the_bar_ends_with_the_run_and_twice_is_harmless(tmp_path: Path) -> None:
    console = terminal()
    observer = ProgressObserver(console)
    observer.started(INFO)
    observer.round(a_record(20))
    observer.finished(SimpleNamespace(path=tmp_path, payload={}))
    observer.close()
    assert drawn(console).endswith("\x1b[?25h")


def test_a_pipe_gets_plain_lines_and_a_terminal_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(console_observer(io.StringIO()), PlainObserver)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(console_observer(io.StringIO()), ProgressObserver)


def test_several_observers_are_called_in_order() -> None:
    calls: list[str] = []

    class Noted(NullObserver):
        def __init__(self, name: str) -> None:
            self.name = name

        def round(self, record: Record) -> None:
            calls.append(f"{self.name}{record.round}")

        def close(self) -> None:
            calls.append(f"{self.name} closed")

    with Observers(Noted("a"), Noted("b")) as both:
        both.started(INFO)
        both.round(a_record(1))
    assert calls == ["a1", "b1", "a closed", "b closed"]


# --------------------------------------------------------------------------- tracking services


class Recorder:
    """Notes every call made on it, as a stand-in for a tracking service."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *values, **named: self.calls.append((name, values, named))


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda log_dir: recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return recorder


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "mlflow", recorder)  # type: ignore[arg-type]
    return recorder


def test_tensorboard_gets_stamped_scalars_and_no_cohort(writer: Recorder, tmp_path: Path) -> None:
    with TensorBoardSink(tmp_path) as sink:
        sink.started(INFO)
        sink.round(a_record(3, metrics={"hr@10": 0.6}))
    scalars = {values[0]: values[1:] for name, values, _ in writer.calls if name == "add_scalar"}
    assert scalars == {
        "outside the guarantee/loss": (0.5, 3),
        "outside the guarantee/hr_at_10": (0.6, 3),
        "epsilon/recipients": (1.2301, 3),
        "epsilon/server": (9.0, 3),
    }
    assert writer.calls[-1][0] == "close"


def test_mlflow_gets_public_settings_scalars_and_the_end(mlflow: Recorder, tmp_path: Path) -> None:
    with MLflowSink("ncf", tracking_uri="file:runs") as sink:
        sink.started(INFO)
        sink.round(a_record(3, loss=math.nan, epsilon=None))
        sink.finished(SimpleNamespace(path=tmp_path, payload={}))
    called = {name: (values, named) for name, values, named in mlflow.calls}
    assert called["log_metrics"] == (({"epsilon/server": 9.0},), {"step": 3})
    assert called["log_params"][0][0]["budget"] == 8.0
    assert [named for name, _, named in mlflow.calls if name == "end_run"] == [
        {"status": "FINISHED"}
    ]
    assert "302" not in repr(mlflow.calls).replace("1.2301", "")


def test_mlflow_marks_a_run_that_did_not_finish(mlflow: Recorder) -> None:
    with MLflowSink() as sink:
        sink.started(INFO)
    assert mlflow.calls[-1] == ("end_run", (), {"status": "FAILED"})


def test_an_mlflow_that_refuses_is_reported_in_plain_words(mlflow: Recorder) -> None:
    class MlflowException(Exception):
        pass

    def refuse(**_: Any) -> None:
        raise MlflowException("unsupported URI 'x'\nmore")

    vars(mlflow).update(
        start_run=refuse, exceptions=SimpleNamespace(MlflowException=MlflowException)
    )
    with pytest.raises(UsageError, match="unsupported URI 'x' Name"):
        MLflowSink().started(INFO)


@pytest.mark.parametrize(
    ("module", "make"),
    [("mlflow", MLflowSink), ("torch.utils.tensorboard", lambda: TensorBoardSink(Path("x")))],
)
def test_a_missing_service_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, make: Any
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"privrec\[track\]"):
        make()
