"""A run as it goes on, on a terminal, in a notebook or in a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, TYPE_CHECKING

from privrec.run.record import (
    Observer,
    Record,
    Result,
    RunInfo,
    duration_text,
    headline_metric,
    metric_name,
    opening_words,
    spent_text,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_AFTER = "last round done; measuring what was learned"
HIDDEN_LINES = 20
"""Lines of a run that hides its cohorts, beside those of the first and of evaluated rounds."""


class ConsoleObserver(Observer):
    """A run on the console: a bar on a terminal, else a line now and then, for logs and pipes.

    A line is written for the first round, the last, each evaluated one, and otherwise when
    ``every_s`` seconds have passed since the last line. Where ε rests on hidden cohorts, neither
    shows a cohort's realised size (the bar has the expected one), and for lines, which end up in
    logs, time decides nothing and is not told: one is written after each twentieth of the rounds.

    Args:
        stream: standard error when None, so that standard output stays a result.
        every_s: seconds between lines, >= 0, by ``clock``, which only grows.
        console: a terminal to draw the bar on, instead of what ``stream`` is found to be.
    """

    def __init__(
        self,
        stream: IO[str] | None = None,
        *,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        console: Console | None = None,
    ) -> None:
        from rich.console import Console

        self._stream: IO[str] | None = sys.stderr if stream is None else stream
        self._every_s = every_s
        self._clock = clock
        self._bar: Progress | None = None
        # What only passes for a terminal (FORCE_COLOR, a notebook) keeps what is drawn on it.
        found = Console(file=stream, stderr=stream is None)
        drawable = found.is_interactive and found.file.isatty()
        self._console = console or (found if drawable else None)

    def started(self, info: RunInfo) -> None:
        """Write the opening words, and draw the bar."""
        self._info, self._first = info, True
        self._metrics: Mapping[str, float] | None = None
        self._start = self._last = self._clock()
        if self._console is None:
            self._write(opening_words(info))
            return
        self._console.print(opening_words(info), highlight=False, markup=False)
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.MofNCompleteColumn(),
            progress.BarColumn(bar_width=8 if self._console.width < 100 else 24),
            progress.TextColumn("{task.fields[figures]}"),
            progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self._console,
        )
        self._bar.add_task("Round", total=info.rounds, completed=info.done, figures="")
        self._bar.start()

    def round(self, record: Record) -> None:
        """Move the bar and show the figures of the round, or write a line if one is due."""
        if self._bar is not None:
            self._metrics = record.metrics or self._metrics  # of the last evaluation
            cohort = "" if record.cohort is None else f"cohort {record.cohort:,}"
            if self._info.hides_cohorts:
                expected = self._info.expected_cohort
                cohort = "" if expected is None else f"cohort ≈{expected:,.0f}"
            figures = self._figures(record, cohort, self._metrics)
            what = "Round" if record.round < record.rounds else "Measuring"
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=record.round, description=what, figures=figures)
        elif self._console is None and self._due(record, now := self._clock()):
            self._first, self._last = False, now
            left = ""
            if not self._info.hides_cohorts and record.round < record.rounds:
                done = max(1, record.round - self._info.done)
                remaining = (now - self._start) / done * (record.rounds - record.round)
                left = f"{duration_text(remaining)} left" if remaining else ""
            figures = self._figures(record, "", record.metrics)
            head = f"round {record.round}/{record.rounds}"
            self._write(" · ".join(part for part in (head, figures, left) if part))
            if record.round >= record.rounds:
                self._write(_AFTER)

    def _due(self, record: Record, now: float) -> bool:
        if self._first or record.metrics or record.round >= record.rounds:
            return True
        if self._info.hides_cohorts:
            return record.round % math.ceil(record.rounds / HIDDEN_LINES) == 0
        return now - self._last >= self._every_s

    def _figures(self, record: Record, cohort: str, metrics: Mapping[str, float] | None) -> str:
        name = headline_metric(metrics or {})
        parts = (
            spent_text(self._info, record),
            cohort,
            "" if record.loss is None else f"loss {record.loss:.4f}",
            f"{metric_name(name)} {(metrics or {})[name]:.3f}" if name else "",
        )
        return " · ".join(part for part in parts if part)

    def _write(self, line: str) -> None:
        if self._stream is None:  # Python has no standard error where it was closed
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with suppress(OSError, ValueError):  # a run goes on unseen: a full disk, a closed pipe
            line = line.encode(encoding, "replace").decode(encoding)
            print(line, file=self._stream, flush=True)

    def finished(self, result: Result) -> None:
        self.close()

    def close(self) -> None:
        """Stop drawing and leave the last state on the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
