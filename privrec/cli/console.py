"""The console: what commands share, how they print, and a run as it goes on.

Modules that count (numpy, rich, torch) are imported where they are needed, so that help answers at
once. Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from privrec.errors import PrivrecError, UsageError
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

PATH = click.Path(path_type=Path)


# --------------------------------------------------------------------------- commands


class Commands(click.Group):
    """A group whose errors are one message and an exit code, and which suggests near names."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the program and exit with its code; errors of privrec show no traceback.

        What a stream cannot encode is replaced, as ε is in code page 1252.
        """
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            sys.exit(super().main(*args, **{**extra, "standalone_mode": False}) or 0)
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except click.Abort:
            code = _fail("interrupted; nothing after the last checkpoint is kept", 130)
        except PrivrecError as error:
            code = _fail(str(error), error.exit_code)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            remedy = "check that the path is right, writable and on a disk with room"
            code = _fail(f"{where}{error.strerror or error}; {remedy}", UsageError.exit_code)
        sys.exit(code)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which the commands are written, which is that of first use."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with the nearest command named where there is none of that name."""
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            near = get_close_matches(args[0], known, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]!r}?" if near else f"try {ctx.command_path} --help"
            raise UsageError(
                f"{args[0]!r} is no command of {ctx.command_path}; it has {', '.join(known)}; "
                f"{remedy}"
            )
        return super().resolve_command(ctx, args)


def _fail(message: str, code: int) -> int:
    with suppress(OSError):  # standard error may be closed; the exit code still tells
        click.echo(f"error: {message}", err=True)
    return code


def example(*lines: str) -> str:
    """The end of a command's help: how it is called."""
    heading = "Example:" if len(lines) == 1 else "Examples:"
    return "\b\n" + "\n".join([heading, *(f"  {line}" for line in lines)])


run_dir = click.argument("directory", metavar="DIR", type=PATH)
scenario_file = click.argument("scenario_file", metavar="SCENARIO", type=PATH)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
settings_option = click.option(
    *("-s", "--set", "settings"),
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Change a key of the scenario; an empty value removes it. May be repeated.",
)
data_option = click.option(
    *("--data", "data_dir"),
    type=PATH,
    envvar="PRIVREC_DATA",
    metavar="PATH",
    help="Where the data set lies: its folder, archive or file, or a folder above. "
    "[default: $PRIVREC_DATA]",
)


def check_run(directory: Path) -> None:
    """Refuse what is no run directory."""
    if (directory / "run.json").is_file():
        return
    found = "it has no run.json" if directory.is_dir() else "there is no such folder"
    raise UsageError(
        f"{directory}: {found}; a run directory is what `privrec run` or `privrec demo` left; name "
        "one of those"
    )


def check_data(data_dir: Path | None) -> None:
    """Refuse a ``--data`` that is not there; ``PRIVREC_DATA`` may be yet to be made."""
    source = click.get_current_context().get_parameter_source("data_dir")
    if source is ParameterSource.COMMANDLINE and data_dir is not None and not data_dir.exists():
        raise UsageError(
            f"--data {data_dir}: there is no such file or folder; it must hold the data set; "
            "correct the path, or see: privrec data list"
        )


# --------------------------------------------------------------------------- printing


@contextmanager
def shown() -> Iterator[None]:
    """Print what is already done and kept: a closed pipe or a full disk is no failure of it."""
    try:
        yield
        if sys.stdout is not None:  # as it is where it was closed
            sys.stdout.flush()
    except (OSError, SystemExit):  # rich ends the program when a pipe is closed
        # Python flushes what is left in the buffer on exit: let it go nowhere.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


def print_json(payload: object) -> None:
    """Print plain values as JSON, for programs; what is not finite becomes null, as JSON has it."""
    plain = json.loads(json.dumps(payload, default=str), parse_constant=lambda _: None)
    click.echo(json.dumps(plain, indent=2, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a title and rows under headings; columns of numbers are aligned to the right."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in r] for r in rows]
    table = Table(box=None)
    for place, name in enumerate(columns):
        right = all(_is_number(row[place]) for row in cells)
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(escape, row))
    console = Console(highlight=False)
    console.print(escape(title), style="bold")
    console.print(table)
    console.print()


def print_lines(lines: Iterable[str]) -> None:
    """Print sentences, wrapped at the width of the terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    for line in lines:
        console.print(line, markup=False)
    console.print()


def number_text(value: object) -> str:
    """A number for people, with thousands apart; None is ``unknown``."""
    if value is None:
        return "unknown"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e9):
        return f"{int(value):,}"
    return f"{value:.4g}"


def _is_number(text: str) -> bool:
    with suppress(ValueError):
        float(text.replace(",", ""))
        return True
    return text == "∞"


# --------------------------------------------------------------------------- a run as it goes on

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
        self._console.print(opening_words(info), highlight=False, soft_wrap=True)
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
            self._bar.update(self._bar.task_ids[0], completed=record.round, figures=figures)
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
