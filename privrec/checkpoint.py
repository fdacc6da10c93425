"""A checkpoint: everything that a run needs to go on, in one file that is replaced as a whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from privrec.errors import IntegrityError
from privrec.randomness import sync_directory

Arrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Position:
    """Where in its run a checkpoint was taken.

    Args:
        run_id: the run.
        scenario_hash: of the scenario that it runs.
        data_digest: of the interactions it trains on.
        index: rounds that were applied.
        ledger_entries: entries of the ledger at that moment.
        ledger_hash: hash of the last of them.
        wall_s: seconds that the run took so far, over all its sessions.
        cpu_s: CPU seconds of its rounds so far.
    """

    run_id: str
    scenario_hash: str
    data_digest: str
    index: int
    ledger_entries: int
    ledger_hash: str
    wall_s: float = 0.0
    cpu_s: float = 0.0


def write(path: Path, position: Position, arrays: Arrays) -> None:
    """Replace the checkpoint at ``path``, durable before this returns.

    It holds the simulated devices' private states, so its owner alone may read it.
    """
    place = json.dumps(asdict(position))
    content = {"position": place, "digest": _digest(place, arrays)}
    replace(path, save(dict(arrays), metadata=content), mode=0o600)


def replace(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replace the file at ``path`` as a whole, durable before this returns.

    A crash at any moment leaves the old one or the new one, whole.

    Args:
        path: the file.
        content: all that it will hold.
        mode: who may use a new file, less what the process's umask forbids.
    """
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    sync_directory(path.parent)


def read(path: Path) -> tuple[Position, dict[str, NDArray[np.float32]]]:
    """The checkpoint at ``path``.

    Raises:
        IntegrityError: when there is none, or it is not what :func:`write` wrote.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        position = Position(**json.loads(metadata["position"]))
    except FileNotFoundError:
        raise IntegrityError(
            f"{path}: there is no checkpoint; it is written before the first round, so this is no "
            "run directory, or the file was removed. Start the run anew"
        ) from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise IntegrityError(
            f"{path}: not a checkpoint ({error}); restore the file or start the run anew"
        ) from None
    if metadata.get("digest") != _digest(metadata["position"], arrays):
        raise IntegrityError(
            f"{path}: its content is not what was written; restore the file or start anew"
        )
    return position, arrays


def _digest(place: str, arrays: Arrays) -> str:
    total = hashlib.sha256(place.encode())
    for name in sorted(arrays):
        total.update(f"{name}{arrays[name].shape}".encode())
        total.update(np.ascontiguousarray(arrays[name]).data.cast("B"))
    return total.hexdigest()
