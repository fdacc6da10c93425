"""A checkpoint: everything that a run needs to go on, in one signed file of arrays; and its order.

What is in such a file becomes the model, or says which item a row of the model is, so it is signed
with the key that signs the run's ledger.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as packed

from privrec.errors import IntegrityError
from privrec.privacy.ledger import Ledger
from privrec.run.directory import CHECKPOINT, Identity
from privrec.server.server import Server
from privrec.storage import parsed, replace, sign, verified

Facts = Mapping[str, Any]
Arrays = Mapping[str, NDArray[Any]]
States = Sequence[NDArray[np.float32]]

FILE = CHECKPOINT
_KIND, _MOMENT = "checkpoint", "moments."


@dataclass(frozen=True)
class Position:
    """Where in its run a checkpoint was taken.

    ``index`` counts the rounds that were applied, and ``ledger_hash`` is that of the last entry of
    the ledger at that moment. Seconds are those of all sessions so far.
    """

    run_id: str
    data_digest: str
    index: int
    ledger_entries: int
    ledger_hash: str
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def check(self, ledger: Ledger, path: Path) -> None:
        """Raise an IntegrityError when the checkpoint at ``path`` is of another ledger."""
        if not ledger.has(self.ledger_entries, self.ledger_hash):
            raise IntegrityError(
                f"{path}: taken at entry {self.ledger_entries} of another ledger; "
                "restore the ledger that belongs to this run"
            )


def save(
    folder: Path,
    identity: Identity,
    ledger: Ledger,
    server: Server,
    states: States = (),
    data_digest: str = "",
    wall_s: float = 0.0,
    cpu_s: float = 0.0,
) -> Position:
    """Seal the ledger, then replace the checkpoint by one that is bound to it.

    ``states`` are the private ones of simulated devices, by tier; none where devices keep theirs.
    """
    ledger.seal()
    bound = server.index, ledger.entries, ledger.last_hash
    position = Position(identity.run_id, data_digest, *bound, wall_s, cpu_s)
    arrays = {"weights": server.weights, "mean": server.mean}
    arrays |= {f"states.{index}": each for index, each in enumerate(states)}
    arrays |= {f"{_MOMENT}{name}": each for name, each in server.optimizer.moments.items()}
    write(folder / FILE, position, arrays, identity.signing_key())
    return position


def restore(
    folder: Path, identity: Identity, server: Server, states: States = (), data_digest: str = ""
) -> Position:
    """Put the server and the devices' states, in place, where the checkpoint has them.

    An IntegrityError says that it was altered, or belongs to another run or data set.
    """
    path = folder / FILE
    position, arrays = read(path, identity.signing_key().public_key())
    for noun, found, wanted in (
        ("run", position.run_id, identity.run_id),
        ("data", position.data_digest, data_digest),
    ):
        if found != wanted:
            raise IntegrityError(
                f"{path}: the checkpoint belongs to {noun} {found[:16]}, not {wanted[:16]}; "
                "restore what the run was started with"
            )
    server.index = position.index
    server.weights, server.mean = arrays["weights"].copy(), arrays["mean"].copy()
    for index, each in enumerate(states):
        each[...] = arrays[f"states.{index}"]
    for name, value in arrays.items():
        if name.startswith(_MOMENT):
            server.optimizer.moments[name.removeprefix(_MOMENT)] = value.copy()
    return position


def write(path: Path, position: Position, arrays: Arrays, key: Ed25519PrivateKey) -> None:
    """Replace the checkpoint at ``path``, which its owner alone may read."""
    write_signed(path, _KIND, asdict(position), arrays, key, mode=0o600)


def read(path: Path, key: Ed25519PublicKey) -> tuple[Position, Arrays]:
    """Return the checkpoint at ``path``; see :func:`read_signed`."""
    facts, arrays = read_signed(path, _KIND, key)
    return Position(**facts), arrays


def write_signed(
    path: Path, kind: str, facts: Facts, arrays: Arrays, key: Ed25519PrivateKey, **mode: int
) -> None:
    """Replace a file of arrays and of facts that are signed as a record of this ``kind``.

    It is durable before this returns; for ``mode`` see :func:`privrec.storage.replace`.
    """
    record = sign(kind, {**facts, "digest": _digest(arrays)}, key)
    replace(path, packed(dict(arrays), metadata={"record": json.dumps(record)}), **mode)


def read_signed(path: Path, kind: str, key: Ed25519PublicKey) -> tuple[Facts, Arrays]:
    """Return the facts and arrays of :func:`write_signed`; an IntegrityError if not its own."""
    noun = kind.split()[-1]
    try:
        with safe_open(path, framework="numpy") as file:
            record = parsed(((file.metadata() or {}).get("record") or "").encode())
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise IntegrityError(
            f"{path}: there is no {noun}; it is written before the first round, so this is no run "
            "directory, or the file was removed. Start the run anew, or bring the file back"
        ) from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise IntegrityError(
            f"{path}: this is no {noun} ({error}); restore the file or start the run anew"
        ) from None
    facts = verified(kind, record, key, path)
    if facts.pop("digest") != _digest(arrays):
        raise IntegrityError(
            f"{path}: its content is not what was written; restore the file or start anew"
        )
    return facts, arrays


def _digest(arrays: Arrays) -> str:
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        total.update(np.ascontiguousarray(array).data.cast("B"))
    return total.hexdigest()
