"""The console: lines in a pipe, a bar on a terminal, and neither tells a hidden cohort."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from privrec.run.progress import ConsoleObserver
from privrec.run.record import Observers, Record, RunInfo

INFO = RunInfo("ml-1m-dp", 20, title="Federated GMF", population=6040, budget=8.0)
OPEN = replace(INFO, hides_cohorts=False)  # a run whose ε does not rest on hidden cohorts


def a_record(number: int, **values: Any) -> Record:
    defaults = {"epsilon": 1.2301, "epsilon_server": 9.0, "loss": 0.5, "cohort": 302}
    return Record(number, 20, **{**defaults, **values})


def plain_lines(rounds: list[Record], info: RunInfo = INFO, **settings: Any) -> list[str]:
    stream = io.StringIO()
    clock = iter(range(1000))
    with ConsoleObserver(stream, clock=lambda: float(next(clock)), **settings) as observer:
        observer.started(info)
        for record in rounds:
            observer.round(record)
    return stream.getvalue().splitlines()


def test_plain_lines_say_what_matters() -> None:
    first = plain_lines([a_record(1, metrics={"hr@10": 0.6881})], OPEN)[1]
    assert first == "round 1/20 · ε 1.24 of 8 · loss 0.5000 · HR@10 0.688 · 19 s left"


def test_plain_lines_never_show_a_cohort() -> None:
    assert not any("302" in line for line in plain_lines([a_record(n) for n in range(1, 21)]))


def test_plain_lines_come_now_and_then() -> None:
    rounds = [a_record(n, metrics={"hr@10": 0.5} if n == 12 else None) for n in range(1, 21)]
    shown = [line.split(" ")[1] for line in plain_lines(rounds, OPEN, every_s=7)[1:]]
    assert shown == ["1/20", "8/20", "12/20", "19/20", "20/20", "round"]


def test_what_follows_the_last_round_is_said() -> None:
    assert "measuring" in plain_lines([a_record(20)], OPEN)[-1]
    assert "measuring" not in plain_lines([a_record(19)], OPEN)[-1]
    console = terminal()
    with ConsoleObserver(console=console) as observer:
        observer.started(OPEN)
        observer.round(a_record(20))
    assert "Measuring" in drawn(console)


def test_the_opening_words_are_broken_between_words() -> None:
    console = terminal(40)
    with ConsoleObserver(console=console) as observer:
        observer.started(OPEN)
    lines = drawn(console).partition("\x1b")[0].splitlines()
    assert max(map(len, lines)) <= 40
    assert " ".join(line.strip() for line in lines).startswith("Simulated run: ml-1m-dp (Federated")


def test_plain_lines_tell_no_time_where_cohorts_are_hidden() -> None:
    rounds = [replace(a_record(n), rounds=100) for n in range(1, 101)]
    lines = plain_lines(rounds, every_s=7)
    assert lines == plain_lines(rounds, every_s=70)
    assert [line.split(" ")[1] for line in lines[1:4]] == ["1/100", "5/100", "10/100"]
    assert not any("left" in line for line in lines)


def test_time_left_counts_from_the_resume() -> None:
    resumed = RunInfo("a", 20, done=10, private=False, hides_cohorts=False)
    assert plain_lines([a_record(11)], resumed)[1].endswith("9.0 s left")


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def terminal(width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def drawn(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_shows_every_figure_on_one_line(width: int) -> None:
    console = terminal(width)
    with ConsoleObserver(console=console) as observer:
        observer.started(OPEN)
        observer.round(a_record(3, metrics={"hr@10": 0.61}))
        observer.round(a_record(4))
    last = drawn(console).splitlines()[-2].rpartition("\x1b[2K")[2]
    assert len(last) <= width
    for part in ("4/20", "ε 1.24 of 8", "cohort 302", "loss 0.5000", "HR@10 0.610"):
        assert part in last
    assert drawn(console).startswith("Simulated run: ml-1m-dp")


def test_the_bar_shows_the_expected_size_of_a_hidden_cohort() -> None:
    console = terminal()
    with ConsoleObserver(console=console) as observer:
        observer.started(replace(INFO, expected_cohort=604.0))
        observer.round(a_record(3, cohort=31337))
    assert "cohort ≈604" in drawn(console)
    assert "31337" not in drawn(console)


def test_the_bar_ends_with_the_run_and_twice_is_harmless(tmp_path: Path) -> None:
    console = terminal()
    observer = ConsoleObserver(console=console)
    observer.started(INFO)
    observer.round(a_record(20))
    observer.finished(SimpleNamespace(path=tmp_path, payload={}))
    observer.close()
    assert drawn(console).endswith("\x1b[?25h")


@pytest.mark.parametrize("error", [BrokenPipeError(), UnicodeEncodeError("ascii", "ε", 0, 1, "")])
def test_a_terminal_that_is_gone_costs_no_run(error: Exception) -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise error

    with Observers(ConsoleObserver(console=Console(file=Gone(), force_terminal=True))) as observer:
        observer.started(INFO)
        observer.round(a_record(1))


def draws(stream: io.StringIO) -> bool:
    """Whether a run on this stream has a bar, not lines."""
    with ConsoleObserver(stream) as observer:
        observer.started(INFO)
        observer.round(a_record(1))
    return "round 1/20" not in stream.getvalue()


def test_a_pipe_gets_plain_lines_and_a_terminal_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert not draws(io.StringIO())
    assert draws(Terminal())


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_INTERACTIVE"])
def test_a_log_that_wants_colours_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, "1")
    assert not draws(io.StringIO())
