"""What a run tells while it goes: records, the log, and who may watch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privrec.errors import DataError, ReleaseRefused
from privrec.run.record import (
    EventLog,
    Observer,
    Observers,
    Record,
    RunInfo,
    read_rounds,
)

INFO = RunInfo("ml-1m-dp", 20, title="Federated GMF", population=6040, budget=8.0)


def a_record(number: int, **values: Any) -> Record:
    defaults = {"epsilon": 1.2301, "epsilon_server": 9.0, "loss": 0.5, "cohort": 302}
    return Record(number, 20, **{**defaults, **values})


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
        read_rounds(path)


def test_a_round_without_a_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"type": "round", "loss": 1}\n')
    with pytest.raises(DataError, match="lacks its round"):
        read_rounds(path)


def test_an_absent_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no event log"):
        read_rounds(tmp_path / "events.jsonl")


def test_several_observers_are_called_in_order() -> None:
    calls: list[str] = []

    class Noted(Observer):
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
