"""The directory of a run: how it appears, its ledger and its result; and that it is one piece."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from privrec import storage
from privrec.errors import IntegrityError, UsageError
from privrec.privacy import population as populations
from privrec.privacy.ledger import Ledger
from privrec.privacy.population import PopulationBalance
from privrec.run import checkpoint
from privrec.run.identity import Identity
from privrec.run.plan import Plan
from privrec.run.record import EventLog
from privrec.scenario.load import Scenario
from privrec.storage import parsed, sign, verified

LEDGER, EVENTS, SCENARIO = "ledger.jsonl", "events.jsonl", "scenario.toml"


@contextmanager
def beginning(
    out: Path, plan: Plan, identity: Identity, population: str | None = None
) -> Iterator[tuple[Path, Ledger]]:
    """Make a run's directory, which appears as a whole when the caller has put its checkpoint in.

    Until then it is a hidden folder beside ``out``; where ``out`` is a link, the run appears where
    it leads. When anything fails, folder and secrets are gone again.

    Without a ``population`` that the run is tied to, the runs that this machine made before on the
    same data are counted.

    Yields:
        The hidden folder and the run's ledger, which is open and stays so for the rounds.

    Raises:
        UsageError: when nothing can be made there.
        BudgetError: when another run has meanwhile reserved what this one would need.
    """
    ledger = None
    try:
        with identity.forgotten_unless(out), _appearing(out) as folder:
            identity.write(folder)
            storage.replace(folder / SCENARIO, plan.scenario.to_toml().encode())
            earlier = identity.earlier_runs()  # it notes this run too, for those that come after
            standing = PopulationBalance(runs=earlier)
            if population is not None:
                standing = populations.reserve(population, identity.run_id, plan.charges)
            header = {
                "run_id": identity.run_id,
                "scenario_hash": plan.scenario.hash(),
                "privacy_hash": plan.scenario.privacy_hash(),
                "delta": plan.scenario.privacy.delta,
                "population": plan.users,
                "noise_known": identity.known_key is not None,
                "noise_root": identity.root_tag(),
                **plan.header(simulated=identity.simulated, standing=standing),
            }
            key, kept = identity.signing_key(new=True), identity.kept_head()
            path = folder / LEDGER
            ledger = Ledger.create(path, header=header, signing_key=key, kept=kept)
            yield folder, ledger
            with EventLog(folder / EVENTS) as events:
                events.append("start", run_id=identity.run_id, simulated=identity.simulated)
        ledger.path = out / LEDGER
        storage.sync_directory(out.parent)
    except BaseException:
        if ledger is not None:
            ledger.close()
        raise


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that becomes ``out`` when all went well, else vanishes."""
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


def open_ledger(
    out: Path, identity: Identity, scenario: Scenario, *, repair: bool = True
) -> Ledger:
    """Return the ledger of the run in ``out``.

    With ``repair`` it is opened for writing, which one process does at a time.

    Raises:
        IntegrityError: when the ledger was altered or set back, or ``run.json`` and the scenario
            are not what its signed header declares.
        UsageError: when it or the key that signs it is gone, or another process writes to it.
    """
    path, key = out / LEDGER, identity.signing_key()
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
    said = {"run.json": {key: stored[key] for key in bound}, SCENARIO: hashes}
    for name, values in said.items():
        for key, value in values.items():
            if value != ledger.header.get(key):
                raise IntegrityError(
                    f"{out / name}: its {key} is {value!r}, that of the signed ledger "
                    f"{ledger.header.get(key)!r}; restore {name} as the run left it"
                )


def population_of(out: Path) -> str | None:
    """Return the name of the population that the run in ``out`` is tied to, or None."""
    with Ledger.open(out / LEDGER, repair=False) as ledger:
        name = ledger.header.get("standing", {}).get("population")
    return name if isinstance(name, str) else None


def write_result(out: Path, payload: dict[str, Any], identity: Identity) -> dict[str, Any]:
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
        (out / checkpoint.FILE).unlink(missing_ok=True)
    return record


def read_result(out: Path, identity: Identity, scenario: Scenario) -> dict[str, Any] | None:
    """Return what :func:`write_result` wrote, or None where there is still something to do.

    Before the signed ledger says that the run has ended, no file passes for its result, and nothing
    is removed. A result that is not what the run signed is made again while its checkpoint is here.

    Raises:
        IntegrityError: when a file was altered, or belongs to another run.
        UsageError: when the ledger or the key that signs it is gone.
    """
    with open_ledger(out, identity, scenario, repair=False) as ledger:
        if ledger.ended is None or ledger.signed < ledger.entries:
            return None
    path, remains = out / "result.json", (out / checkpoint.FILE).exists()
    try:
        record = parsed(path.read_bytes())
        verified("result", record, identity.signing_key().public_key(), path)
    except FileNotFoundError:
        return None
    except IntegrityError:
        if remains:
            return None
        raise
    if record is None or (record.get("gaps") and remains):
        return None
    if remains:  # a medium that is read only refuses to remove nothing as well
        (out / checkpoint.FILE).unlink()
    return record
