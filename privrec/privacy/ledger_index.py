"""The entries of a ledger file: how a line is spelled, chained and checked, and what all add up to.

A line is the canonical JSON of one entry: keys sorted, no spaces, with its place (``index``), the
hash of the entry before (``previous``) and its own (``hash``). So there is exactly one spelling of
every ledger, and any other byte shows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privrec.errors import IntegrityError, UsageError
from privrec.privacy.events import RoundEvent

FORMAT = 1
START = "0" * 64
PREPARATION = -1
"""The round of what is released before the first one."""
EXAMPLE = "example"
"""The unit of what devices' own noise protects: one interaction, never added to a user's ε."""
REMEDY = "bring back the original file, or start a new run"


@dataclass(frozen=True)
class Charge:
    """One paid attempt at a round; round ``PREPARATION`` is what came before the first one."""

    round: int
    attempt: int
    event: RoundEvent


@dataclass
class Book:
    """What the entries read so far add up to.

    ``counts`` is of ``charges``, whose unit is a user; ``examples`` is of another unit, and nothing
    adds the two.
    """

    header: dict[str, Any] = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)
    charges: dict[tuple[int, int], Charge] = field(default_factory=dict)
    commits: dict[tuple[int, int], bytes] = field(default_factory=dict)
    counts: Counter[RoundEvent] = field(default_factory=Counter)
    examples: dict[tuple[int, int], Charge] = field(default_factory=dict)
    end: bytes | None = None


def read(path: Path, content: bytes) -> tuple[Book, int]:
    """The book of all whole lines, and where in ``content`` they end.

    Raises:
        IntegrityError: when a line is not to the byte the next entry of the chain, unless it is the
            last one and a crash can have cut it off.
    """
    book, end = Book(), 0
    known: dict[bytes, RoundEvent] = {}
    for line in content.splitlines(keepends=True):
        if _add_plain(book, line, known):
            end += len(line)
            continue
        last = end + len(line) == len(content)
        if last and _cut_off(line):
            break
        add(path, book, line.removesuffix(b"\n"))
        end += len(line)
    if not book.hashes:
        raise IntegrityError(f"{path}: it has no header line; {REMEDY}")
    return book, end


_HASH = rb'"hash":"([0-9a-f]{64})",'
_WHOLE = rb"(0|[1-9]\d{0,14})"
_CHAIN = b'"previous":"([0-9a-f]{64})","round":' + _WHOLE
_REST = b'"index":' + _WHOLE + b',"kind":"%s",' + _CHAIN
_ATTEMPT = b'{"attempt":' + _WHOLE + b","
_CHARGE = re.compile(_ATTEMPT + rb'"event":({[^{}]+}),' + _HASH + _REST % b"charge" + rb"}\n")
_COMMIT = re.compile(_ATTEMPT + _HASH + _REST % b"commit" + rb',"tag":"((?:[0-9a-f]{2})*)"}\n')


def _add_plain(book: Book, line: bytes, known: dict[bytes, RoundEvent]) -> bool:
    """Count a line that is to the byte an ordinary charge or commit; whether it was one.

    It decides what :func:`add` would decide, without taking JSON apart: a ledger can have a
    hundred thousand lines, and few kinds of event. Whatever is not ordinary is left to :func:`add`.

    Args:
        book: is counted in.
        line: with its end.
        known: events by their spelling, which was found to be the canonical one.
    """
    if book.end is not None or not book.hashes:
        return False
    if found := _CHARGE.fullmatch(line):
        attempt, spelled, own, index, previous, round = found.groups()
        event, tag = known.get(spelled) or _learnt(known, spelled), None
    elif found := _COMMIT.fullmatch(line):
        attempt, own, index, previous, round, tag = found.groups()
        event = None
    else:
        return False
    key, start = (int(round), int(attempt)), found.start(3 if event else 2) - len(b'"hash":"')
    body = line[:start] + line[start + len(b'"hash":"",') + 64 : -1]
    ordinary = (
        (event is not None or tag is not None)
        and (key in book.charges) == (event is None)
        and int(index) == len(book.hashes)
        and previous == book.hashes[-1].encode()
        and hashlib.sha256(body).hexdigest().encode() == own
    )
    if not ordinary:
        return False
    if event is not None:
        book.charges[key] = Charge(*key, event)
        book.counts[event] += 1
    else:
        book.commits[key] = bytes.fromhex((tag or b"").decode())
    book.hashes.append(own.decode())
    return True


def _learnt(known: dict[bytes, RoundEvent], spelled: bytes) -> RoundEvent | None:
    """The event of a spelling, if it is the canonical one; else None."""
    values = parsed(spelled)
    try:
        if values is None or canonical(values) != spelled:
            return None
        known[spelled] = RoundEvent.from_json(values)
    except UsageError:
        return None
    return known[spelled]


def _cut_off(line: bytes) -> bool:
    """Whether a crash can have left this last line: part of an entry, or blocks never written.

    Part of an entry is no JSON. A whole entry with other content is one that was altered.
    """
    return parsed(line) is None and (not line.endswith(b"\n") or b"\0" in line)


def add(path: Path, book: Book, line: bytes) -> None:
    """Count a line, given without its newline.

    Raises:
        IntegrityError: when it is not to the byte the next entry of the chain.
    """
    number = len(book.hashes) + 1
    entry = parsed(line)
    if entry is None or not _says_itself(entry, line):
        raise IntegrityError(f"{path}: line {number} was altered; {REMEDY}")
    previous = book.hashes[-1] if book.hashes else START
    if entry.get("index") != number - 1 or entry.get("previous") != previous:
        raise IntegrityError(
            f"{path}: line {number} does not follow the one before, so lines were removed, added "
            f"or moved; {REMEDY}"
        )
    try:
        _count(book, entry)
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise IntegrityError(
            f"{path}: line {number} is no entry that this version writes ({error}); {REMEDY}"
        ) from error
    book.hashes.append(entry["hash"])


def _says_itself(entry: Mapping[str, Any], line: bytes) -> bool:
    """Whether a line is the one spelling of its entry, with the right hash."""
    try:
        return line_of({name: entry[name] for name in entry if name != "hash"}) == line + b"\n"
    except UsageError:
        return False


def _count(book: Book, entry: Mapping[str, Any]) -> None:
    """Enter what a line says; raises whatever a line of another shape leads to."""
    if not book.hashes:
        book.header = _header(entry)
        return
    if book.end is not None:
        raise ValueError("an entry after the one that ends a run")
    if entry["kind"] == "end":
        book.end = bytes.fromhex(entry["model"])
        return
    key = (_index(entry["round"], PREPARATION), _index(entry["attempt"], 0))
    if entry["kind"] == "examples" and key not in book.examples | book.charges:
        if entry["unit"] != EXAMPLE:
            raise ValueError(f"a charge for the unit {entry['unit']!r}")
        book.examples[key] = Charge(*key, RoundEvent.from_json(entry["event"]))
    elif entry["kind"] == "commit" and key in book.charges:
        book.commits[key] = bytes.fromhex(entry["tag"])
    elif entry["kind"] == "charge" and key not in book.charges:
        charge = Charge(*key, RoundEvent.from_json(entry["event"]))
        book.charges[key] = charge
        book.counts[charge.event] += 1
    else:
        raise ValueError(f"{entry['kind']} of round {key[0]}, attempt {key[1]}")


def _index(value: object, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r}, where an index is wanted")
    return value


def _header(entry: Mapping[str, Any]) -> dict[str, Any]:
    body = dict(entry["body"])
    if entry["kind"] != "header" or body["format"] != FORMAT:
        raise ValueError(f"a header of format {body['format']}, and {FORMAT} is read here")
    return body


def parsed(line: bytes) -> dict[str, Any] | None:
    """The JSON object that ``line`` spells, or None when it spells none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def line_of(entry: Mapping[str, Any]) -> bytes:
    """An entry with its own hash, as the one line that says it."""
    own = hashlib.sha256(canonical(entry)).hexdigest()
    return canonical({**entry, "hash": own}) + b"\n"


def canonical(values: Mapping[str, Any]) -> bytes:
    """The one spelling of ``values`` as JSON.

    Raises:
        UsageError: when they are not plain, finite JSON values.
    """
    try:
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{dict(values)!r}: a ledger holds plain, finite JSON values") from error
    return text.encode()
