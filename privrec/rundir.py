"""The directory of a run: how it appears, what is saved in it, and that it is of one piece."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec import checkpoint
from privrec.checkpoint import Position
from privrec.declaration import declared
from privrec.errors import IntegrityError, UsageError
from privrec.identity import Identity
from privrec.privacy.ledger import Ledger
from privrec.privacy.population import Standing
from privrec.scenario import Scenario
from privrec.server.server import Server

CHECKPOINT = "checkpoint.safetensors"


def save(
    folder: Path,
    server: Server,
    states: Sequence[NDArray[np.float32]],
    identity: Identity,
    scenario: Scenario,
    ledger: Ledger,
    digest: str,
    wall_s: float = 0.0,
    cpu_s: float = 0.0,
) -> Position:
    """Seal the ledger, then replace the checkpoint by one that is bound to it.

    Args:
        folder: the run's directory.
        server: at its next round.
        states: private states of simulated devices, by tier; none where devices keep their own.
        identity: of the run.
        scenario: what is run.
        ledger: of the run.
        digest: of the data.
        wall_s: seconds that the run took so far.
        cpu_s: CPU seconds of its rounds so far.
    """
    ledger.seal()
    position = Position(
        identity.run_id,
        scenario.hash(),
        digest,
        server.index,
        ledger.entries,
        ledger.last_hash,
        wall_s,
        cpu_s,
    )
    moments = {f"moments.{name}": value for name, value in server.optimizer.moments.items()}
    own = {"weights": server.weights, "mean": server.mean}
    kept = {f"states.{i}": each for i, each in enumerate(states)}
    checkpoint.write(folder / CHECKPOINT, position, {**own, **kept, **moments})
    return position


def restore(
    server: Server,
    states: Sequence[NDArray[np.float32]],
    position: Position,
    arrays: dict[str, NDArray[np.float32]],
) -> None:
    """Put the server and the devices' states, in place, where a checkpoint has them."""
    server.index, server.weights, server.mean = (
        position.index,
        arrays["weights"].copy(),
        arrays["mean"].copy(),
    )
    for index, kept in enumerate(states):
        kept[...] = arrays[f"states.{index}"]
    for name, value in arrays.items():
        if name.startswith("moments."):
            server.optimizer.moments[name.removeprefix("moments.")] = value.copy()


def check_same(
    out: Path, position: Position, identity: Identity, scenario: Scenario, digest: str
) -> None:
    """Refuse a checkpoint of another run, scenario or data set.

    Raises:
        IntegrityError: when they differ.
    """
    expected = {
        "run": (position.run_id, identity.run_id),
        "scenario": (position.scenario_hash, scenario.hash()),
        "data": (position.data_digest, digest),
    }
    for noun, (found, wanted) in expected.items():
        if found != wanted:
            raise IntegrityError(
                f"{out / CHECKPOINT}: the checkpoint belongs to {noun} {found[:16]}, not "
                f"{wanted[:16]}; restore what the run was started with"
            )


def check_ledger(out: Path, ledger: Ledger, identity: Identity, position: Position) -> None:
    """Refuse a ledger that the checkpoint or ``run.json`` does not belong to.

    Raises:
        IntegrityError: when they do not fit together.
    """
    if not ledger.has(position.ledger_entries, position.ledger_hash):
        raise IntegrityError(
            f"{out / CHECKPOINT}: taken at entry {position.ledger_entries} of another ledger; "
            "restore the ledger that belongs to this run"
        )
    stored = identity.to_json()
    for key in ("run_id", "scenario_hash", "privacy_hash", "noise_known"):
        if stored[key] != ledger.header.get(key):
            raise IntegrityError(
                f"{out / 'run.json'}: its {key} is {stored[key]!r}, that of the signed ledger "
                f"{ledger.header.get(key)!r}; restore run.json as the run left it"
            )


def new_ledger(
    folder: Path, scenario: Scenario, identity: Identity, population: int,
    standing: Standing | None = None,
) -> Ledger:  # fmt: skip
    """The ledger of a new run, with a header that binds it to the run's identity and scenario.

    Args:
        folder: the run's directory.
        scenario: what is run.
        identity: name and secrets of the run.
        population: enrolled devices, public.
        standing: of the population that the run is tied to; by default the runs that this machine
            made before on the same data are counted.
    """
    header = {
        "run_id": identity.run_id,
        "scenario_hash": scenario.hash(),
        "privacy_hash": scenario.privacy_hash(),
        "delta": scenario.privacy.delta,
        "population": population,
        "noise_known": identity.known_key is not None,
        "noise_root": identity.root_tag(),
        **declared(
            scenario,
            items=identity.data["items"],
            users=population,
            simulated=identity.simulated,
            standing=standing or Standing(runs=identity.earlier_runs()),
        ),
    }
    return Ledger.create(
        folder / "ledger.jsonl", header=header, signing_key=identity.signing_key(new=True)
    )


def check_population(scenario: Scenario, users: int) -> None:
    """Refuse data of another size than the public number that was declared.

    Raises:
        UsageError: when the numbers differ.
    """
    declared = scenario.devices.population
    if declared is not None and declared != users:
        raise UsageError(
            f"devices.population = {declared}: the data has {users} users; declare that number, "
            "or leave the key out"
        )


def refuse_taken(out: Path) -> None:
    """Refuse an ``out`` that holds anything.

    Raises:
        UsageError: when it is not an empty or new directory.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out}: it exists and is not empty; name a new directory with --out, or go on with a "
            f"stopped run: privrec resume {out}"
        )


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that becomes ``out`` when all went well, else vanishes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file as a whole, durable before this returns."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    checkpoint.replace(path, text.encode())


def result(out: Path) -> dict[str, Any] | None:
    """What ``result.json`` holds, or None where the run is not finished."""
    path = out / "result.json"
    try:
        payload: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise IntegrityError(f"{path}: not what was written ({error}); restore it") from None
    return payload
