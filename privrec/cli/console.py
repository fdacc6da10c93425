"""A run on the console: plain lines for logs and pipes, a progress bar on a terminal.

Where ε rests on hidden cohorts, neither shows a cohort's realised size, and plain lines, which end
up in logs, tell no duration either.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import IO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from privrec.run.record import Observer, Record, Result, RunInfo
from privrec.run.wording import (
    duration_text,
    headline_metric,
    metric_name,
    opening_words,
    spent_text,
)

HIDDEN_LINES = 20
"""Lines of a run that hides its cohorts, beside those of the first and of evaluated rounds."""


class PlainObserver(Observer):
    """A line now and then, for logs and pipes.

    A line is written for the first round, the last, each evaluated one, and otherwise when
    ``every_s`` seconds have passed since the last line. In a run that hides its cohorts time
    decides nothing and is not told: a line is written after each twentieth of the rounds.

    Args:
        stream: Where lines go; standard error when None, so that standard output stays a result.
        every_s: Seconds between lines, >= 0.
        clock: Seconds that only grow; a test gives its own.
    """

    def __init__(
        self,
        stream: IO[str] | None = None,
        *,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream: IO[str] | None = sys.stderr if stream is None else stream
        self._every_s = every_s
        self._clock = clock
        self._info: RunInfo | None = None
        self._start = self._last = clock()
        self._first = True

    def started(self, info: RunInfo) -> None:
        """Write the opening words."""
        self._info = info
        self._start = self._last = self._clock()
        self._first = True
        self._write(opening_words(info))

    def round(self, record: Record) -> None:
        """Write a line if one is due."""
        info = self._info or RunInfo(name="", rounds=record.rounds)
        now = self._clock()
        if not self._due(info, record, now):
            return
        self._first, self._last = False, now
        self._write(" · ".join(part for part in self._parts(info, record, now) if part))

    def _due(self, info: RunInfo, record: Record, now: float) -> bool:
        if self._first or record.metrics or record.round >= record.rounds:
            return True
        if info.hides_cohorts:
            return record.round % math.ceil(record.rounds / HIDDEN_LINES) == 0
        return now - self._last >= self._every_s

    def _parts(self, info: RunInfo, record: Record, now: float) -> Iterator[str]:
        yield f"round {record.round}/{record.rounds}"
        yield spent_text(info, record)
        yield _loss_text(record)
        yield _metric_text(record.metrics)
        left = _seconds_left(info, record, now - self._start)
        yield f"{duration_text(left)} left" if left and not info.hides_cohorts else ""

    def _write(self, line: str) -> None:
        if self._stream is None:  # Python has no standard error where it was closed
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with suppress(OSError, ValueError):  # a run goes on unseen: a full disk, a closed pipe
            line = line.encode(encoding, "replace").decode(encoding)
            print(line, file=self._stream, flush=True)


def _seconds_left(info: RunInfo, record: Record, elapsed: float) -> float:
    done = max(1, record.round - info.done)
    return elapsed / done * (record.rounds - record.round)


class _FigureColumn(ProgressColumn):
    """One figure of the last round, in a column that vanishes while it is empty."""

    max_refresh = None

    def __init__(self, field: str, style: str = "") -> None:
        super().__init__()
        self._field = field
        self._style = style

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get(self._field, "")), style=self._style, no_wrap=True)


class ProgressObserver(Observer):
    """A progress bar on a terminal: round, ε spent of budget, cohort, loss, HR@10 and the ETA.

    HR@10 stays on the line from the round in which it was last evaluated. The cohort is the
    realised size, or the expected one in a run that hides its cohorts.

    Args:
        console: Where to draw; standard error when None.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._info: RunInfo | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._metrics: Mapping[str, float] | None = None

    def started(self, info: RunInfo) -> None:
        """Write the opening words and draw the bar."""
        self._info = info
        self._metrics = None
        self._console.print(opening_words(info), highlight=False, soft_wrap=True)
        self._progress = self._bar()
        self._task = self._progress.add_task("Round", total=info.rounds, completed=info.done)
        self._progress.start()

    def _bar(self) -> Progress:
        narrow = self._console.width < 100
        return Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=8 if narrow else 24),
            _FigureColumn("spent", "bold"),
            _FigureColumn("cohort"),
            _FigureColumn("loss"),
            _FigureColumn("metric"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self._console,
            transient=False,
        )

    def round(self, record: Record) -> None:
        """Move the bar and show the figures of the round."""
        if self._progress is None or self._info is None:
            return
        self._metrics = record.metrics or self._metrics
        self._progress.update(
            self._task,
            completed=record.round,
            spent=spent_text(self._info, record),
            cohort=_cohort_text(self._info, record),
            loss=_loss_text(record),
            metric=_metric_text(self._metrics),
        )

    def finished(self, result: Result) -> None:
        """Leave the finished bar on the terminal."""
        self.close()

    def close(self) -> None:
        """Stop drawing and leave the last state on the terminal."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def console_observer(stream: IO[str] | None = None) -> Observer:
    """The observer that suits a stream: a bar on a terminal, else plain lines.

    What only passes for a terminal (``FORCE_COLOR``, a notebook) keeps what is drawn on it, so it
    gets lines.

    Args:
        stream: Where it writes; standard error when None.
    """
    console = Console(file=stream, stderr=stream is None)
    drawable = console.is_interactive and console.file.isatty()
    return ProgressObserver(console) if drawable else PlainObserver(stream)


def _cohort_text(info: RunInfo, record: Record) -> str:
    if not info.hides_cohorts:
        return "" if record.cohort is None else f"cohort {record.cohort:,}"
    return "" if info.expected_cohort is None else f"cohort ≈{info.expected_cohort:,.0f}"


def _loss_text(record: Record) -> str:
    return "" if record.loss is None else f"loss {record.loss:.4f}"


def _metric_text(metrics: Mapping[str, float] | None) -> str:
    name = headline_metric(metrics or {})
    return f"{metric_name(name)} {(metrics or {})[name]:.3f}" if name else ""
