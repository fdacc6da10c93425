"""Who a run is: its name, where its data lies, and where its secrets are kept."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

import privrec
from privrec.errors import IntegrityError, UsageError
from privrec.privacy.signed import server_key
from privrec.randomness import SecretRoot, state_dir
from privrec.scenario.load import Scenario
from privrec.storage import replace

_RUN_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
_KNOWN, _KEY, _FILE = "known-", "server.key", "run.json"


@dataclass(frozen=True)
class Identity:
    """Who a run is: its name, where its data lies, and its secrets, which are kept apart from it.

    Attributes:
        data: public facts of the data.
        data_dir: where it lies, if here.
        known_key: a noise key that others know, in hex.
    """

    run_id: str
    scenario: str
    scenario_hash: str
    privacy_hash: str
    data: dict[str, Any]
    data_dir: Path | None
    known_key: str | None
    simulated: bool = True

    @classmethod
    def new(
        cls,
        scenario: Scenario,
        described: dict[str, Any],
        data_dir: Path | None,
        known: bytes | None,
        *,
        simulated: bool = True,
    ) -> Identity:
        """Name a new run; with a key ``known`` to others, the name repeats as the run does."""
        run_id = secrets.token_hex(8) if known is None else f"{_KNOWN}{scenario.plan_hash()[:16]}"
        return cls(
            run_id,
            scenario.name,
            scenario.hash(),
            scenario.privacy_hash(),
            described,
            None if data_dir is None else data_dir.resolve(),
            None if known is None else known.hex(),
            simulated,
        )

    @classmethod
    def read(cls, out: Path) -> Identity:
        """Return who the run in ``out`` is.

        Raises:
            UsageError: when ``out`` is no run directory.
            IntegrityError: when ``run.json`` is not what was written.
        """
        path = out / _FILE
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            names = ("run_id", "scenario", "scenario_hash", "privacy_hash")
            place, key = stored["data_dir"], stored["unsafe_noise_key"]
            identity = cls(
                *(str(stored[name]) for name in names),
                data=dict(stored["data"]),
                data_dir=None if place is None else Path(place),
                known_key=None if key is None else bytes.fromhex(key).hex(),
                simulated=stored["simulated"] is True,
            )
            if not _RUN_ID.fullmatch(identity.run_id):
                raise ValueError(f"run_id {identity.run_id!r} is not one that privrec gives")
            if identity.to_json() | {"version": stored["version"]} != stored:
                raise ValueError("its entries contradict each other")
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(
                f"{out}: there is no run.json; name a directory that `privrec run` made"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path}: not what was written ({error!r}); restore it") from None
        return identity

    def write(self, out: Path) -> None:
        """Write ``run.json``, durable before this returns."""
        text = json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"
        replace(out / _FILE, text.encode())

    def to_json(self) -> dict[str, Any]:
        """What ``run.json`` holds."""
        return {
            "run_id": self.run_id,
            "scenario": self.scenario,
            "version": privrec.__version__,
            "simulated": self.simulated,
            "scenario_hash": self.scenario_hash,
            "privacy_hash": self.privacy_hash,
            "noise_known": self.known_key is not None,
            "unsafe_noise_key": self.known_key,
            "data": self.data,
            "data_dir": None if self.data_dir is None else str(self.data_dir),
        }

    def root(self, maker: str) -> SecretRoot:
        """The secret of one noise-maker: the injected one, the kept one, or a new one."""
        if self.known_key is not None:
            return SecretRoot.known(bytes.fromhex(self.known_key) + maker.encode())
        path = self.secrets_dir() / f"{maker}.root"
        return SecretRoot.load(path) if path.exists() else SecretRoot.create(path)

    def signing_key(self, *, new: bool = False) -> Ed25519PrivateKey:
        """The key that signs the ledger; one that is gone is never replaced by another."""
        return server_key(self.secrets_dir() / _KEY, new=new)

    def kept_head(self) -> Path | None:
        """Where this machine keeps the last signed head of the run's ledger.

        Runs of a known root share a name, may be repeated as often as one likes, and protect
        nobody: no head is kept of them.
        """
        return None if self.run_id.startswith(_KNOWN) else self.secrets_dir() / "head.json"

    def root_tag(self) -> str:
        """What tells the server's root from another one, and nothing of it."""
        return self.root("server").tag("identity").hex()

    def earlier_runs(self) -> int:
        """How many other runs on data of this description this machine's store knows of.

        It notes the run itself too. A run whose noise is known protects nobody and counts none, so
        that it repeats bit for bit.
        """
        mine = self.secrets_dir() / "data.json"
        described = json.dumps(self.data, sort_keys=True)
        mine.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace(mine, described.encode(), mode=0o600)
        if self.known_key is not None:
            return 0
        others = (path for path in mine.parent.parent.glob("*/data.json") if path != mine)
        return sum(path.read_text(encoding="utf-8") == described for path in others)

    @contextmanager
    def forgotten_unless(self, out: Path) -> Iterator[None]:
        """Remove the secrets of a start that made no ``out``; a known root may serve others."""
        try:
            yield
        except BaseException:
            if self.known_key is None and not (out / _FILE).exists():
                shutil.rmtree(self.secrets_dir(), ignore_errors=True)
            raise

    def secrets_dir(self) -> Path:
        """Where the run's roots and signing key are kept, apart from its directory."""
        return state_dir() / "runs" / self.run_id


def kept_key(run_id: str) -> Ed25519PublicKey | None:
    """The server's public key where this machine keeps the key of that run, else None.

    Raises:
        UsageError: The key is there, but others may read it.
        IntegrityError: The key is there, but damaged.
    """
    if not _RUN_ID.fullmatch(run_id):
        return None
    path = state_dir() / "runs" / run_id / _KEY
    return server_key(path).public_key() if path.exists() else None
