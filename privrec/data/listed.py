"""Files that list one id a line: a history, a catalogue of items, a vocabulary of words."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from privrec.data.problems import BLANKS, bad_file, shown
from privrec.errors import DataError

_RULE = "it must be a text file of ids, one a line"


def read_ids(path: Path) -> list[str]:
    """The ids in a file, in their order; blanks around them and empty lines do not count.

    Args:
        path: UTF-8; a byte-order mark does no harm.

    Raises:
        DataError: when the file cannot be read, is not UTF-8 or lists nothing.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        found = f"it could not be read ({error.strerror})"
        raise bad_file(str(path), found, _RULE, "correct the path") from None
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is not UTF-8"
        raise bad_file(str(path), found, _RULE, "save it as UTF-8") from None
    # Only line feeds: str.splitlines would cut an id at a vertical tab or a line separator.
    found_ids = [entry for line in text.split("\n") if (entry := line.strip(BLANKS))]
    if not found_ids:
        raise _nothing(path)
    return found_ids


def read_catalogue(path: Path) -> dict[str, int]:
    """The place of each item in a file that lists a whole catalogue in its order.

    Raises:
        DataError: as :func:`read_ids` does, or when an item stands there twice: all that follow
            would have another place than in the model.
    """
    places: dict[str, int] = {}
    for name in read_ids(path):
        if name in places:
            rule, remedy = "a catalogue has each item once", "use the server's own list"
            raise bad_file(str(path), f"item {shown(name)} again", rule, remedy)
        places[name] = len(places)
    return places


def read_history(path: Path, catalogue: Container[str]) -> list[str]:
    """The items that a file lists.

    A line that begins with ``#`` is a comment unless the catalogue has an item of that name. Other
    lines are items, whether the catalogue has them or not.

    Raises:
        DataError: as :func:`read_ids` does.
    """
    found = [name for name in read_ids(path) if name[0] != "#" or name in catalogue]
    if not found:
        raise _nothing(path)
    return found


def _nothing(path: Path) -> DataError:
    remedy = "write item ids into it, one a line"
    return bad_file(str(path), "it names no item", "at least one is needed", remedy)
