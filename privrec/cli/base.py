"""What the groups of commands share: errors as exit codes, and examples in the help."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from privrec.errors import PrivrecError, UsageError

OS_ERROR_REMEDY = "check that the path is right, writable and on a disk with room"


class Commands(click.Group):
    """A group whose errors are one message and an exit code, and which suggests near names."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what privrec raises on purpose is printed without a traceback."""
        try:
            return super().invoke(ctx)
        except PrivrecError as error:
            _fail(ctx, str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail(ctx, "interrupted; nothing after the last checkpoint is kept", 130)
        except BrokenPipeError:
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(ctx, f"{where}{error.strerror or error}; {OS_ERROR_REMEDY}", UsageError.exit_code)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; what a stream cannot encode is replaced, as ε is in code page 1252."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        return super().main(*args, **kwargs)

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


def _fail(ctx: click.Context, message: str, code: int) -> None:
    with suppress(OSError):  # standard error may be closed; the exit code still tells
        click.echo(f"error: {message}", err=True)
    ctx.exit(code)


@contextmanager
def shown() -> Iterator[None]:
    """Print what is already done and kept: a closed pipe or a full disk is no failure of it."""
    try:
        yield
        if sys.stdout is not None:  # as it is where it was closed
            sys.stdout.flush()
    except (OSError, SystemExit):  # rich ends the program when a pipe is closed
        _silence()


def _silence() -> None:
    """Send what is left in the buffer of standard output nowhere; Python flushes it on exit."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def example(*lines: str) -> str:
    """The end of a command's help: how it is called."""
    heading = "Example:" if len(lines) == 1 else "Examples:"
    return "\b\n" + "\n".join([heading, *(f"  {line}" for line in lines)])


run_dir = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")


def check_run(directory: Path) -> None:
    """Refuse what is no run directory.

    Raises:
        UsageError: If it does not exist or holds no run.
    """
    if (directory / "run.json").is_file():
        return
    found = "it has no run.json" if directory.is_dir() else "there is no such folder"
    raise UsageError(
        f"{directory}: {found}; a run directory is what `privrec run` or `privrec demo` left; name "
        "one of those"
    )


def print_json(payload: object) -> None:
    """Print plain values as JSON, for programs; what is not finite becomes null, as JSON has it."""
    plain = json.loads(json.dumps(payload, default=str), parse_constant=lambda _: None)
    click.echo(json.dumps(plain, indent=2, ensure_ascii=False))
