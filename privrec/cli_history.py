"""The file of liked items that ``privrec recommend`` reads."""

from __future__ import annotations

from pathlib import Path

from privrec.errors import DataError


def read_history(path: Path) -> list[str]:
    """Item ids, one a line; blank lines and what follows a # are skipped.

    Raises:
        DataError: If the file is missing, is not text, or has a line of several words, or no id.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(
            f"--history {path}: {error.strerror}; it must be a text file of item ids, one a line; "
            "correct the path"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"--history {path}: byte {error.start} is not UTF-8; it must be a text file of item "
            "ids, one a line; save it as UTF-8"
        ) from None
    ids = [line.partition("#")[0].strip() for line in lines]
    found = [entry for entry in ids if entry]
    if not found:
        raise DataError(
            f"--history {path}: it names no item; at least one is needed to fit a user vector; "
            "write item ids into it, one a line"
        )
    return found
