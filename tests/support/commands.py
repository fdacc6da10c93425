"""Commands as tests call them, in this process."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from privrec.cli.main import main


def call(*words: str | Path) -> Result:
    """Return what a command ended with."""
    return CliRunner().invoke(main, [str(word) for word in words])


def done(*words: str | Path) -> Result:
    """Return what a command printed, which must not fail."""
    result = call(*words)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result
