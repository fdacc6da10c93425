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

from privrec import storage
from privrec.errors import IntegrityError, UsageError
from privrec.privacy.ledger import Ledger
from privrec.privacy.population import PopulationBalance
from privrec.run import checkpoint
from privrec.run.checkpoint import Position
from privrec.run.header import ledger_header
from privrec.run.identity import Identity
from privrec.scenario.load import Scenario
from privrec.server.server import Server
from privrec.storage import parsed, sign, verified

CHECKPOINT = "checkpoint.safetensors"


def save(
    folder: Path,
    server: Server,
    states: Sequence[NDArray[np.float32]],
    identity: Identity,
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
        ledger: of the run.
        digest: of the data.
        wall_s: seconds that the run took so far.
        cpu_s: CPU seconds of its rounds so far.
    """
    ledger.seal()
    position = Position(
        identity.run_id,
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
    arrays = {**own, **kept, **moments}
    checkpoint.write(folder / CHECKPOINT, position, arrays, identity.signing_key())
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


def check_same(out: Path, position: Position, identity: Identity, digest: str) -> None:
    """Refuse a checkpoint of another run or data set.

    Raises:
        IntegrityError: when they differ.
    """
    expected = {
        "run": (position.run_id, identity.run_id),
        "data": (position.data_digest, digest),
    }
    for noun, (found, wanted) in expected.items():
        if found != wanted:
            raise IntegrityError(
                f"{out / CHECKPOINT}: the checkpoint belongs to {noun} {found[:16]}, not "
                f"{wanted[:16]}; restore what the run was started with"
            )


def open_ledger(
    out: Path, identity: Identity, scenario: Scenario, *, repair: bool = True
) -> Ledger:
    """Return the ledger of the run in ``out``, which ``run.json`` and the scenario belong to.

    Args:
        out: the run's directory.
        identity: as ``run.json`` has it.
        scenario: as it would be run.
        repair: open it for writing, which one process does at a time.

    Raises:
        IntegrityError: when the ledger was altered or set back, or the others are not what its
            signed header declares.
        UsageError: when it or the key that signs it is gone, or another process writes to it.
    """
    path, key = out / "ledger.jsonl", identity.signing_key()
    ledger = Ledger.open(path, signing_key=key, kept=identity.kept_head(), repair=repair)
    try:
        check_header(out, ledger, scenario, identity)
    except BaseException:
        ledger.close()
        raise
    return ledger


def check_header(out: Path, ledger: Ledger, scenario: Scenario, identity: Identity) -> None:
    """Refuse a scenario or ``run.json`` other than the signed header of the ledger declares.

    Raises:
        IntegrityError: when they differ.
    """
    hashes = {"scenario_hash": scenario.hash(), "privacy_hash": scenario.privacy_hash()}
    bound = ("run_id", "scenario_hash", "privacy_hash", "noise_known", "simulated")
    stored = identity.to_json()
    said = {"run.json": {key: stored[key] for key in bound}, "scenario.toml": hashes}
    for name, values in said.items():
        for key, value in values.items():
            if value != ledger.header.get(key):
                raise IntegrityError(
                    f"{out / name}: its {key} is {value!r}, that of the signed ledger "
                    f"{ledger.header.get(key)!r}; restore {name} as the run left it"
                )


def check_position(out: Path, ledger: Ledger, position: Position) -> None:
    """Refuse a checkpoint that was taken with another ledger.

    Raises:
        IntegrityError: when it was.
    """
    if not ledger.has(position.ledger_entries, position.ledger_hash):
        raise IntegrityError(
            f"{out / CHECKPOINT}: taken at entry {position.ledger_entries} of another ledger; "
            "restore the ledger that belongs to this run"
        )


def new_ledger(
    folder: Path, scenario: Scenario, identity: Identity, population: int,
    standing: PopulationBalance | None = None,
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
    earlier = identity.earlier_runs()  # it notes this run too, for those that come after
    header = {
        "run_id": identity.run_id,
        "scenario_hash": scenario.hash(),
        "privacy_hash": scenario.privacy_hash(),
        "delta": scenario.privacy.delta,
        "population": population,
        "noise_known": identity.known_key is not None,
        "noise_root": identity.root_tag(),
        **ledger_header(
            scenario,
            items=identity.data["items"],
            users=population,
            simulated=identity.simulated,
            standing=standing or PopulationBalance(runs=earlier),
        ),
    }
    key, kept = identity.signing_key(new=True), identity.kept_head()
    return Ledger.create(folder / "ledger.jsonl", header=header, signing_key=key, kept=kept)


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
    """Refuse an ``out`` that holds anything, or that no directory can take the place of.

    Raises:
        UsageError: when it is not an empty or new directory, or a mount point.
    """
    if out.is_mount():
        raise UsageError(
            f"{out}: a file system is mounted there, and a run's directory appears as a whole in "
            "place of an empty one; name a new directory in it"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out}: it exists and is not empty; name a new directory with --out, or go on with a "
            f"stopped run: privrec resume {out}"
        )


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that becomes ``out`` when all went well, else vanishes.

    Where ``out`` is a link, the run appears where it leads.

    Raises:
        UsageError: when nothing can be made there.
    """
    out = out.resolve()
    folder = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UsageError(
            f"{out}: no run can be made there ({error.strerror}); name another directory"
        ) from None
    try:
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def leave(out: Path, payload: dict[str, Any], identity: Identity) -> dict[str, Any]:
    """Write ``result.json``, signed, and then remove the checkpoint of the run that has ended.

    The checkpoint holds what devices keep to themselves; a finished run has no more need of it,
    unless it has gaps that ``resume`` can try to fill.

    Returns:
        The content of the file.
    """
    plain = json.loads(json.dumps(payload, allow_nan=False))
    record = sign("result", plain, identity.signing_key())
    storage.write_json(out / "result.json", record)
    if not record.get("gaps"):
        (out / CHECKPOINT).unlink(missing_ok=True)
    return record


def left(out: Path, identity: Identity, scenario: Scenario) -> dict[str, Any] | None:
    """Return what :func:`leave` wrote, or None where there is still something to do.

    Before the signed ledger says that the run has ended, no file passes for its result, and nothing
    is removed. A result that is not what the run signed is made again while its checkpoint is here.

    Raises:
        IntegrityError: when a file was altered, or belongs to another run.
        UsageError: when the ledger or the key that signs it is gone.
    """
    with open_ledger(out, identity, scenario, repair=False) as ledger:
        if ledger.ended is None or ledger.signed < ledger.entries:
            return None
    path = out / "result.json"
    try:
        record = parsed(path.read_bytes())
        verified("result", record, identity.signing_key().public_key(), path)
    except FileNotFoundError:
        return None
    except IntegrityError:
        if (out / CHECKPOINT).exists():
            return None
        raise
    if record is None or (record.get("gaps") and (out / CHECKPOINT).exists()):
        return None
    if (out / CHECKPOINT).exists():  # a medium that is read only refuses to remove nothing as well
        (out / CHECKPOINT).unlink()
    return record
