"""Records that a server's key signed, so that a file which was altered or exchanged shows.

A record is a JSON object: its facts, the public key, and an Ed25519 signature (RFC 8032) over what
kind of record it is and the one spelling of the facts. Heads of ledgers, checkpoints and results
are records, each of its own kind, so that none passes for another. Whoever can read the key can
make them all: it lies with the secrets, apart from what a run writes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privrec.errors import IntegrityError, UsageError
from privrec.privacy.ledger_index import REMEDY, canonical
from privrec.randomness import ROOT_BYTES, read_secret, write_secret

_ADDED = ("public_key", "signature")


def sign(kind: str, facts: Mapping[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """Return the record of some facts.

    Args:
        kind: what the record is, such as ``"ledger head"``.
        facts: plain, finite JSON values; the signature of an earlier record is left out.
        key: the server's.
    """
    facts = {name: value for name, value in facts.items() if name not in _ADDED}
    signature = key.sign(_message(kind, facts)).hex()
    return {**facts, "public_key": hexadecimal(key.public_key()), "signature": signature}


def verified(
    kind: str, record: Mapping[str, Any] | None, key: Ed25519PublicKey, path: Path
) -> dict[str, Any]:
    """Return the facts of a record after checking its signature.

    Args:
        kind: what the record must be.
        record: as it was read; None where there was no JSON object.
        key: the only key that is trusted; the one that the record names is not.
        path: of the file, for errors.

    Raises:
        IntegrityError: when ``key`` did not sign these facts as a record of this kind.
    """
    try:
        record = record or {}
        facts = {name: value for name, value in record.items() if name not in _ADDED}
        key.verify(bytes.fromhex(record["signature"]), _message(kind, facts))
        if record["public_key"] != hexadecimal(key):
            raise InvalidSignature
    except InvalidSignature:
        raise IntegrityError(f"{path}: not signed with the key of this run; {REMEDY}") from None
    except (KeyError, TypeError, ValueError, UsageError):
        raise IntegrityError(f"{path}: not a signed {kind.split()[-1]}; {REMEDY}") from None
    return facts


def _message(kind: str, facts: Mapping[str, Any]) -> bytes:
    return f"privrec {kind}, format 1\n".encode() + canonical(facts)


def hexadecimal(key: Ed25519PublicKey) -> str:
    """Return a public key in 64 hexadecimal digits."""
    return key.public_bytes_raw().hex()


def server_key(path: Path, *, new: bool = True) -> Ed25519PrivateKey:
    """Return the signing key at ``path``.

    Args:
        path: of the key, apart from everything that is shared.
        new: draw and keep one (mode 0600) where there is none; a key that is gone is otherwise
            never replaced by another.

    Raises:
        UsageError: when the file is gone, cannot be kept or read, or others than its owner may use
            it.
        IntegrityError: when the file is damaged.
    """
    if not path.exists():
        if not new:
            raise UsageError(
                f"{path}: the key that signs the ledger is gone, and no other may sign it; bring "
                "the file back, set PRIVREC_STATE to the folder that holds it, or start anew"
            )
        write_secret(path, os.urandom(ROOT_BYTES))
    return Ed25519PrivateKey.from_private_bytes(read_secret(path, ROOT_BYTES))
