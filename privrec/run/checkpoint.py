"""A checkpoint: everything that a run needs to go on, in one file that is replaced as a whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from privrec.errors import IntegrityError
from privrec.storage import parsed, replace, sign, verified

Arrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Position:
    """Where in its run a checkpoint was taken.

    Args:
        run_id: the run.
        data_digest: of the interactions it trains on.
        index: rounds that were applied.
        ledger_entries: entries of the ledger at that moment.
        ledger_hash: hash of the last of them.
        wall_s: seconds that the run took so far, over all its sessions.
        cpu_s: CPU seconds of its rounds so far.
    """

    run_id: str
    data_digest: str
    index: int
    ledger_entries: int
    ledger_hash: str
    wall_s: float = 0.0
    cpu_s: float = 0.0


def write(path: Path, position: Position, arrays: Arrays, key: Ed25519PrivateKey) -> None:
    """Replace the checkpoint at ``path``, durable before this returns.

    It holds the simulated devices' private states, so its owner alone may read it; and what is in
    it becomes the model, so the run's key signs it.

    Args:
        path: the file.
        position: where the run is.
        arrays: what it goes on with.
        key: that signs the run's ledger.
    """
    record = sign("checkpoint", {**asdict(position), "digest": _digest(arrays)}, key)
    replace(path, save(dict(arrays), metadata={"record": json.dumps(record)}), mode=0o600)


def read(path: Path, key: Ed25519PublicKey) -> tuple[Position, dict[str, NDArray[np.float32]]]:
    """Return the checkpoint at ``path``.

    Raises:
        IntegrityError: when there is none, or it is not what :func:`write` wrote with this key.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            record = parsed(((file.metadata() or {}).get("record") or "").encode())
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise IntegrityError(
            f"{path}: there is no checkpoint; it is written before the first round, so this is no "
            "run directory, or the file was removed. Start the run anew"
        ) from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise IntegrityError(
            f"{path}: not a checkpoint ({error}); restore the file or start the run anew"
        ) from None
    facts = verified("checkpoint", record, key, path)
    if facts.pop("digest") != _digest(arrays):
        raise IntegrityError(
            f"{path}: its content is not what was written; restore the file or start anew"
        )
    return Position(**facts), arrays


def _digest(arrays: Arrays) -> str:
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        total.update(np.ascontiguousarray(array).data.cast("B"))
    return total.hexdigest()
