"""The console: what commands share, and how they print.

Modules that count (numpy, rich, torch) are imported where they are needed, so that help answers at
once. Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from privrec.errors import Interrupted, PrivrecError, UsageError

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
        except click.NoSuchOption as error:
            key, near = _key_of(error), error.possibilities or ()
            meant = [f"-s {key}=VALUE"] if key else get_close_matches(error.option_name, near)
            said = f"No such option {error.option_name}."
            if meant:
                said += f" Did you mean {' or '.join(meant)}?"
            click.UsageError(said, error.ctx).show()
            code = error.exit_code
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except click.Abort:
            click.echo("interrupted; nothing after the last checkpoint is kept", err=True)
            code = 130
        except Interrupted as error:
            click.echo(f"interrupted: {error}", err=True)
            code = error.exit_code
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


def _key_of(error: click.NoSuchOption) -> str:
    """The key of a scenario that an unknown option names, where the command takes ``-s``."""
    if error.ctx is None or all(each.name != "settings" for each in error.ctx.command.params):
        return ""
    from privrec.scenario.keys import keys

    name = error.option_name.lstrip("-").replace("-", "_")
    found = {f"{key.table}.{key.name}" for key in keys() if key.table and key.name == name}
    return found.pop() if len(found) == 1 else ""


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


def terminal_width() -> int | None:
    """Columns of the terminal that standard output is; None where it is a file or a pipe."""
    from rich.console import Console

    return Console().width if sys.stdout is not None and sys.stdout.isatty() else None


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
        named = place == 0 and all(len(row[0]) <= 40 for row in cells)
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=named)
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
