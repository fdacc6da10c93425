"""Files that a crash leaves whole, secrets for their owner alone, and records that show changes.

:func:`replace` leaves the old file or the new one. A *secret* is written once, with a checksum.
A *chain* is a file of JSON lines: each is the canonical spelling of one entry (keys sorted, no
spaces) with its place (``index``), the hash of the entry before (``previous``) and its own
(``hash``), so that any other byte shows, and so does a line that was removed or moved. A *signed
record* is a JSON object with the public key and an Ed25519 signature (RFC 8032) over its kind and
the canonical spelling of its facts, so that no ledger head, checkpoint or result passes for another
kind. Whoever can read the key can make them all: it lies with the secrets, apart from a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privrec.errors import IntegrityError, UsageError

START = "0" * 64
"""What the first entry of a chain has for the hash of the one before."""
REMEDY = "bring back the original file, or start a new run"

_KEY_BYTES, _CHECK_BYTES = 32, 8
_ADDED = ("public_key", "signature")


def replace(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replace the file at ``path`` as a whole, durable before this returns.

    ``mode`` says who may use a new file, less what the process's umask forbids.
    """
    fresh = path.with_name(path.name + ".new")
    _write(fresh, content, os.O_TRUNC, mode)
    fresh.replace(path)
    sync_directory(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file by ``content`` as indented JSON for readers; see :func:`replace`."""
    replace(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def sync_directory(path: Path) -> None:
    """Flush a directory to disk, so that the names made in it survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes, flag: int, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flag, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_secret(path: Path, secret: bytes) -> None:
    """Keep a secret in a new file that its owner alone can read, durable before this returns.

    A crash leaves either the whole file (mode 0600) or none. Missing directories get mode 0700, and
    a ``path`` that exists is refused.
    """
    if path.exists():
        raise UsageError(
            f"{path}: a secret is kept here already and is never overwritten; "
            "load it, or choose another place"
        )
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        missing = [place for place in (path.parent, *path.parent.parents) if not place.exists()]
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for place in missing:
            sync_directory(place.parent)
        try:
            _write(draft, secret + _checksum(secret), os.O_EXCL, 0o600)
            os.link(draft, path)  # unlike a rename, it fails when another process took the name
        finally:
            draft.unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        raise UsageError(
            f"{path}: the secret could not be kept ({error.strerror}); make the directory "
            "writable, or set PRIVREC_STATE to one that is"
        ) from error


def read_secret(path: Path, size: int) -> bytes:
    """The secret of ``size`` bytes that :func:`write_secret` kept at ``path``."""
    try:
        mode, content = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path}: the secret could not be read ({error.strerror}); "
            "bring the file back, or set PRIVREC_STATE to the directory that holds it"
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(
            f"{path}: mode {stat.S_IMODE(mode):04o} lets others than the owner use this secret; "
            "run chmod 600 on it, and start a new run if somebody may have read it"
        )
    secret = content[:size]
    if content != secret + _checksum(secret) or len(secret) != size:
        raise IntegrityError(f"{path}: not a secret of {size} bytes as privrec writes it; {REMEDY}")
    return secret


def _checksum(secret: bytes) -> bytes:
    return hashlib.sha256(b"privrec secret" + secret).digest()[:_CHECK_BYTES]


def server_key(path: Path, *, new: bool = True) -> Ed25519PrivateKey:
    """The signing key at ``path``; with ``new`` one is drawn and kept where there is none."""
    if not path.exists():
        if not new:
            raise UsageError(
                f"{path}: the key that signs the ledger is gone, and no other may sign it; bring "
                "the file back, set PRIVREC_STATE to the folder that holds it, or start anew"
            )
        write_secret(path, os.urandom(_KEY_BYTES))
    return Ed25519PrivateKey.from_private_bytes(read_secret(path, _KEY_BYTES))


def parsed(text: bytes) -> dict[str, Any] | None:
    """The JSON object that ``text`` spells, or None when it spells none."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def canonical(values: Mapping[str, Any]) -> bytes:
    """The one spelling of ``values``, which are plain and finite, as JSON."""
    try:
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{dict(values)!r}: a ledger holds plain, finite JSON values") from error
    return text.encode()


def line_of(entry: Mapping[str, Any]) -> bytes:
    """The line of a chain that says ``entry``, with its own hash and its end."""
    own = hashlib.sha256(canonical(entry)).hexdigest()
    return canonical({**entry, "hash": own}) + b"\n"


def linked(path: Path, line: bytes, hashes: Sequence[str]) -> dict[str, Any]:
    """The entry of a line, which is to the byte the next one after those with ``hashes``.

    Anything but the one spelling of an entry with its own hash that follows the entry before is an
    IntegrityError; the message calls the chain ``path``.
    """
    number, entry = len(hashes) + 1, parsed(line) or {}
    try:
        body = {name: value for name, value in entry.items() if name != "hash"}
        is_itself = line_of(body) == line
    except UsageError:
        is_itself = False
    if not is_itself:
        raise IntegrityError(f"{path}: line {number} was altered; {REMEDY}")
    previous = hashes[-1] if hashes else START
    if entry.get("index") != number - 1 or entry.get("previous") != previous:
        raise IntegrityError(
            f"{path}: line {number} does not follow the one before, so lines were removed, added "
            f"or moved; {REMEDY}"
        )
    return entry


def sign(kind: str, facts: Mapping[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """The signed record of some facts, of a ``kind`` such as ``"ledger head"``.

    The signature of an earlier record among the facts is left out.
    """
    facts = {name: value for name, value in facts.items() if name not in _ADDED}
    signature = key.sign(_message(kind, facts)).hex()
    public = key.public_key().public_bytes_raw().hex()
    return {**facts, "public_key": public, "signature": signature}


def verified(
    kind: str, record: Mapping[str, Any] | None, key: Ed25519PublicKey, path: Path
) -> dict[str, Any]:
    """The facts of a record (None where there was no JSON object) after checking its signature.

    It is an IntegrityError when ``key``, which alone is trusted, did not sign these facts as a
    record of this kind; the message names ``path``.
    """
    try:
        record = record or {}
        facts = {name: value for name, value in record.items() if name not in _ADDED}
        key.verify(bytes.fromhex(record["signature"]), _message(kind, facts))
        if record["public_key"] != key.public_bytes_raw().hex():
            raise InvalidSignature
    except InvalidSignature:
        raise IntegrityError(f"{path}: not signed with the key of this run; {REMEDY}") from None
    except (KeyError, TypeError, ValueError, UsageError):
        raise IntegrityError(f"{path}: not a signed {kind.split()[-1]}; {REMEDY}") from None
    return facts


def _message(kind: str, facts: Mapping[str, Any]) -> bytes:
    return f"privrec {kind}, format 1\n".encode() + canonical(facts)
