"""The directory of a run: whose it is, how it appears, its ledger and its result, as one piece."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import privrec
from privrec import randomness, storage
from privrec.errors import BudgetError, IntegrityError, PrivrecError, UsageError
from privrec.privacy import population as populations
from privrec.privacy.ledger import Ledger
from privrec.privacy.population import PopulationBalance
from privrec.randomness import KEPT, KEY, SecretRoot, state_dir
from privrec.run.plan import Plan
from privrec.run.privacy_plan import charges_of
from privrec.run.record import EventLog
from privrec.scenario.load import Scenario
from privrec.storage import parsed, sign, verified

Facts = Mapping[str, Any]
LEDGER, EVENTS, SCENARIO = "ledger.jsonl", "events.jsonl", "scenario.toml"
CHECKPOINT = "checkpoint.safetensors"
_RUN_ID = r"^[A-Za-z0-9-]{1,64}$"
_KNOWN, _FILE = "known-", "run.json"

BOUND = ("run_id", "simulated", "scenario_hash", "privacy_hash", "noise_known")
"""What the signed header of the ledger repeats of ``run.json``, so that nobody alters it later."""


class Identity(BaseModel):
    """Who a run is, as ``run.json`` says it; its secrets are kept apart from its directory.

    ``data`` are public facts of the data, ``unsafe_noise_key`` is a noise key that others know.
    A run that is ``deployed`` has its devices at nodes of Flower, simulated ones or real.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    run_id: str = Field(pattern=_RUN_ID)
    scenario: str
    version: str
    simulated: bool
    deployed: bool
    scenario_hash: str
    privacy_hash: str
    noise_known: bool
    unsafe_noise_key: str | None = Field(pattern="^([0-9a-f]{2})*$")
    data: dict[str, Any]
    data_dir: Path | None

    @classmethod
    def new(
        cls,
        scenario: Scenario,
        described: dict[str, Any],
        data_dir: Path | None,
        known: bytes | None,
        *,
        simulated: bool = True,
        deployed: bool = False,
    ) -> Identity:
        """Name a new run; with a key ``known`` to others, the name repeats as the run does."""
        return cls(
            run_id=secrets.token_hex(8) if known is None else _KNOWN + scenario.plan_hash()[:16],
            scenario=scenario.name,
            version=privrec.__version__,
            simulated=simulated,
            deployed=deployed,
            scenario_hash=scenario.hash(),
            privacy_hash=scenario.privacy_hash(),
            noise_known=known is not None,
            unsafe_noise_key=None if known is None else known.hex(),
            data=described,
            data_dir=data_dir and data_dir.resolve(),
        )

    @classmethod
    def read(cls, out: Path) -> Identity:
        """Return who the run in ``out`` is."""
        path = out / _FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(
                f"{out}: there is no run.json; name a directory that `privrec run` made"
            ) from None
        except ValidationError as error:
            found = "; ".join(f"{each['loc']}: {each['msg']}" for each in error.errors())
            raise IntegrityError(f"{path}: not what was written ({found}); restore it") from None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.noise_known != (self.unsafe_noise_key is not None):
            raise ValueError("noise_known and unsafe_noise_key contradict each other")
        return self

    @property
    def bound(self) -> dict[str, Any]:
        """The :data:`BOUND` facts."""
        return self.model_dump(include=set(BOUND))

    def root(self, maker: str) -> SecretRoot:
        """Return the secret of one noise-maker: the injected one, the kept one, or a new one."""
        if self.unsafe_noise_key is not None:
            return SecretRoot.known(bytes.fromhex(self.unsafe_noise_key) + maker.encode())
        path = self.secrets_dir() / f"{maker}.root"
        return SecretRoot.load(path) if path.exists() else SecretRoot.create(path)

    def signing_key(self, *, new: bool = False) -> Ed25519PrivateKey:
        """Return the key that signs the ledger; one that is gone is never replaced by another."""
        return storage.server_key(self.secrets_dir() / KEY, new=new)

    def kept_head(self) -> Path | None:
        """Return where this machine keeps the last signed head of the run's ledger.

        None is kept of runs of a known root, which share a name and protect nobody.
        """
        return None if self.run_id.startswith(_KNOWN) else self.secrets_dir() / KEPT

    def root_tag(self) -> str:
        """Return what tells the server's root from another one, and nothing of it."""
        return self.root("server").tag("identity").hex()

    def earlier_runs(self) -> int:
        """Count the other runs on such data that this machine knows of, and note this one too.

        A run whose noise is known protects nobody and counts none: it repeats bit for bit.
        """
        mine = self.secrets_dir() / "data.json"
        described = json.dumps(self.data, sort_keys=True)
        mine.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        storage.replace(mine, described.encode(), mode=0o600)
        if self.noise_known:
            return 0
        others = (path for path in mine.parent.parent.glob("*/data.json") if path != mine)
        return sum(path.read_text(encoding="utf-8") == described for path in others)

    def secrets_dir(self) -> Path:
        """Return where the run's roots and signing key are kept, apart from its directory."""
        return state_dir() / "runs" / self.run_id


def public_key_of(run_id: str) -> Ed25519PublicKey | None:
    """Return the server's public key where this machine keeps the key of that run, else None."""
    key = randomness.kept_key(run_id)
    return None if key is None else key.public_key()


# --------------------------------------------------------------------------- the directory


@contextmanager
def beginning(
    out: Path, plan: Plan, identity: Identity, population: str | None = None
) -> Iterator[tuple[Path, Ledger]]:
    """Make a run's directory, which appears as a whole when the caller has put its checkpoint in.

    Yields the hidden folder beside ``out`` that it is until then, and the run's ledger, which stays
    open for the rounds. When anything fails, folder and secrets are gone again: also when another
    run has meanwhile reserved what this one needs of its ``population`` (BudgetError). Without a
    population, the runs that this machine made before on the same data are counted.
    """
    ledger = None
    try:
        with _appearing(out) as folder:
            storage.write_json(folder / _FILE, identity.model_dump(mode="json"))
            storage.replace(folder / SCENARIO, plan.scenario.to_toml().encode())
            earlier = identity.earlier_runs()  # it notes this run too, for those that come after
            standing = PopulationBalance(runs=earlier)
            if population is not None:
                charges = charges_of(plan.scenario, plan.event, plan.beside)
                standing = populations.reserve(population, identity.run_id, charges)
            header = {
                **identity.bound,
                "delta": plan.scenario.privacy.delta,
                "population": plan.users,
                "noise_root": identity.root_tag(),
                **plan.header(standing),
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
        # A known root may serve other runs of its name.
        if not identity.noise_known and not (out / _FILE).exists():
            shutil.rmtree(identity.secrets_dir(), ignore_errors=True)
        raise


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that becomes ``out`` when all went well, else vanishes."""
    out = out.resolve()  # where ``out`` is a link, the run appears where it leads
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
    """Raise a UsageError unless ``out`` is new, or an empty directory that can be replaced."""
    if out.is_mount():
        raise UsageError(
            f"{out}: a file system is mounted there, and a run's directory appears as a whole in "
            "place of an empty one; name a new directory in it"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out}: it exists and is not empty; name a new directory with --out, an app's in its "
            f"run-config, or go on with a stopped run: {going_on(out)}"
        )


def going_on(out: Path) -> str:
    """Say how the run in ``out`` is gone on with, which is where its devices are."""
    try:
        deployed = Identity.read(out).deployed
    except PrivrecError:
        deployed = False
    return f"flwr run, with out={out} in its run-config" if deployed else f"privrec resume {out}"


def open_ledger(
    out: Path, identity: Identity, scenario: Scenario, *, repair: bool = True
) -> Ledger:
    """Return the ledger of the run in ``out``, with ``repair`` open for writing.

    An IntegrityError says that it was altered or set back, or that ``run.json`` or the scenario
    is not what its signed header declares.
    """
    path, key = out / LEDGER, identity.signing_key()
    ledger = Ledger.open(path, signing_key=key, kept=identity.kept_head(), repair=repair)
    try:
        check_header(out, ledger.header, scenario, identity.bound)
    except BaseException:
        ledger.close()
        raise
    return ledger


def check_header(
    out: Path, header: Facts, scenario: Scenario, bound: Facts, result: Facts | None = None
) -> None:
    """Raise an IntegrityError unless the signed header declares what the files beside it say.

    ``bound`` are the facts of ``run.json``, and ``result`` those of ``result.json``, if any.
    """
    hashes = {"scenario_hash": scenario.hash(), "privacy_hash": scenario.privacy_hash()}
    said = {_FILE: bound, "result.json": result or {}, SCENARIO: hashes}
    for name, values in said.items():
        for key, value in values.items():
            if value != header.get(key):
                raise IntegrityError(
                    f"{out / name}: its {key} is {value!r}, that of the signed ledger "
                    f"{header.get(key)!r}; the files of a directory belong to one run. Restore "
                    f"{name} as the run left it"
                )


def write_result(out: Path, payload: dict[str, Any], identity: Identity) -> dict[str, Any]:
    """Write ``result.json``, signed; then remove the checkpoint of the run that has ended.

    It holds what devices keep to themselves, and is needed no more unless there are gaps that
    ``resume`` can try to fill. Returns the content of the file.
    """
    plain = json.loads(json.dumps(payload, allow_nan=False))
    record = sign("result", plain, identity.signing_key())
    storage.write_json(out / "result.json", record)
    if not record.get("gaps"):
        (out / CHECKPOINT).unlink(missing_ok=True)
    return record


def read_result(out: Path, identity: Identity, scenario: Scenario) -> dict[str, Any] | None:
    """Return what :func:`write_result` wrote, or None where there is still something to do.

    Before the signed ledger says that the run has ended, no file passes for its result, and nothing
    is removed. A result that is not what the run signed is made again while its checkpoint is here;
    without one, it is an IntegrityError. A BudgetError says that the budget had ended the run
    before any round released a sum: that is no result.
    """
    with open_ledger(out, identity, scenario, repair=False) as ledger:
        if ledger.ended is None or ledger.signed < ledger.entries:
            return None
    path, remains = out / "result.json", (out / CHECKPOINT).exists()
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
    if not record["rounds"]:
        raise BudgetError(
            f"{out}: this run ended at its budget before one round released a sum, so it has no "
            "trained model, and cannot go on; start a new one with more privacy.spare_attempts"
        )
    if remains:  # a medium that is read only refuses to remove nothing as well
        (out / CHECKPOINT).unlink()
    return record
