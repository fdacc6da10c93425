"""A Flower node as the secure sum knows it: its identity, whom it trusts, what it has answered.

An identity lasts: it is a file on the node, named in the node's own configuration, together with
what tells which other nodes are real. Everything else lives in ``context.state``, drawn afresh for
each run: the root of masks and noise, the one-time prekeys, the session of the round.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from privrec.errors import ReleaseRefused, UsageError
from privrec.randomness import ROOT_BYTES, SecretRoot
from privrec.secagg.keys import DeviceKey, Prekey, PrekeyBook, Verifier, statement
from privrec.secagg.roster import Anchor, EnrolmentKey, ListedDevices

STATE = "privrec.secure-sum"
_HEX_KEY, _HEX_CERTIFICATE = 64, 128


class Anyone:
    """A trust anchor that knows every device: it leaves it to the server who is one."""

    def __init__(self) -> None:
        self.verifier = Verifier()

    def knows(self, prekey: Prekey) -> bool:
        """Whether the prekey's identity is that of an enrolled device: always."""
        return True


def create_device_key(path: Path) -> str:
    """Draw a node's lasting identity and keep it at ``path``, readable by its owner alone.

    Returns:
        The public key in hexadecimal: a line of the roster, or what an enrolment key certifies.

    Raises:
        UsageError: when there is a key already, or it cannot be written.
    """
    return _device_key(SecretRoot.create(path)).public.hex()


def read_device_key(path: Path) -> DeviceKey:
    """The identity that :func:`create_device_key` keeps at ``path``.

    Raises:
        UsageError: when the file is missing, or others than its owner may read it.
        IntegrityError: when it is not what was written.
    """
    return _device_key(SecretRoot.load(path))


def anchor_of(roster: object, enrolment_key: object) -> Anchor | None:
    """What tells which devices are enrolled, from the two settings that may name it.

    Args:
        roster: path of a file with one identity a line, or None.
        enrolment_key: 64 hexadecimal digits, or the path of a file that holds them; or None.

    Raises:
        UsageError: when both are given, or one cannot be read.
        DataError: when the roster is malformed.
    """
    if roster is not None and enrolment_key is not None:
        raise UsageError("both roster and enrolment-key are given: keep the one that is in use")
    if roster is not None:
        return ListedDevices.read(Path(_text("roster", roster)))
    if enrolment_key is not None:
        return EnrolmentKey(_hexadecimal("enrolment-key", enrolment_key, _HEX_KEY))
    return None


@dataclass(frozen=True)
class SumDevice:
    """Who a node is in a run.

    Args:
        key: its identity.
        anchor: whom it believes about other nodes.
        certificate: of the enrolment key over the identity; empty without one.
        journal: the file in which it marks what it has answered; None for an identity that does
            not outlive the run.
    """

    key: DeviceKey
    anchor: Anchor
    certificate: bytes = b""
    journal: Path | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], root: SecretRoot, *, trust_server: bool) -> SumDevice:
        """The device that a node's configuration describes.

        Args:
            config: ``context.node_config``: ``device-key`` with ``roster``, or with
                ``enrolment-key`` and ``certificate``.
            root: the secret of this run, from which an identity comes where none is configured.
            trust_server: whether to go on without any anchor.

        Raises:
            UsageError: when the configuration is not complete, or this node is not enrolled.
        """
        anchor = anchor_of(config.get("roster"), config.get("enrolment-key"))
        if anchor is None:
            if not trust_server:
                raise UsageError(
                    "this node has no list of enrolled devices, so a server could make devices up "
                    "and take the masks of its update off; start the node with node-config "
                    "roster=PATH or enrolment-key=KEY, and device-key=PATH; for an experiment on "
                    "your own machine make the app's mod with SecureSumMod(trust_server=True)"
                )
            return cls(DeviceKey.derive(root, "device"), Anyone())
        if "device-key" not in config:
            raise UsageError(
                "node-config names enrolled devices and no device-key=PATH: without its own key "
                "this node is none of them"
            )
        path = Path(_text("device-key", config["device-key"]))
        certificate = config.get("certificate")
        signed = b"" if certificate is None else _hexadecimal(
            "certificate", certificate, _HEX_CERTIFICATE
        )  # fmt: skip
        device = cls(read_device_key(path), anchor, signed, path.with_suffix(".answered"))
        device._check_enrolled()
        return device

    def claim(self, stage: str, *what: bytes | int | str) -> None:
        """Mark an answer as given, on disk before it is; a node without a journal does not.

        The state of a Flower context may be set back, by a crash or by two messages that are
        worked on at once. An answer given twice could give an update away.

        Raises:
            ReleaseRefused: when it was given before.
        """
        if self.journal is None:
            return
        line = statement("answered", stage, *what).hex()
        descriptor = os.open(self.journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "r+", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = file.read()
            if line in before.splitlines():
                raise ReleaseRefused(
                    f"message {stage!r} of this round was answered before (see {self.journal}): "
                    "the node's state was set back, or the server asks twice; begin another round"
                )
            cut_off = before and not before.endswith("\n")
            file.write(("\n" if cut_off else "") + line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _check_enrolled(self) -> None:
        own = Prekey(self.key.public, self.certificate or bytes(64), 0, 0, b"", b"", b"")
        if not self.anchor.knows(own):
            raise UsageError(
                f"this node's own identity {self.key.public.hex()} is not enrolled: add it to the "
                "roster, or give the certificate that the enrolment key made for it"
            )


class RunState:
    """What a node keeps between two messages of a run; as secret as its root.

    Args:
        state: ``context.state``, which never leaves the node.
    """

    def __init__(self, state: RecordDict) -> None:
        if STATE not in state:
            state[STATE] = ConfigRecord({"root": secrets.token_bytes(ROOT_BYTES)})
        self._record: ConfigRecord = state[STATE]
        self.root = SecretRoot(self._record["root"])

    def get(self, name: str) -> bytes | None:
        """What was kept under a name, or None."""
        found: bytes | None = self._record.get(name)
        return found

    def keep(self, **values: bytes) -> None:
        """Keep values, none of them empty."""
        for name, value in values.items():
            self._record[name] = value

    def forget(self, *names: str) -> None:
        """Keep values no longer."""
        for name in names:
            self._record.pop(name, None)

    def book(self, device: SumDevice) -> PrekeyBook:
        """The one-time prekeys of this run; another run has another root, and so other prekeys."""
        return PrekeyBook(
            device.key,
            self.root,
            certificate=device.certificate,
            save=lambda state: self.keep(book=state),
            state=self.get("book"),
        )


def _device_key(root: SecretRoot) -> DeviceKey:
    return DeviceKey.derive(root, "flower device")


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name} = {value!r}: it must be text; put it into quotation marks")
    return value


def _hexadecimal(name: str, value: object, digits: int) -> bytes:
    """Bytes from digits, or from a file of digits."""
    text = _text(name, value)
    if len(text) != digits:
        try:
            text = Path(text).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{name} = {value!r}: neither {digits} hexadecimal digits nor a file that can be "
                f"read ({error})"
            ) from None
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if 2 * len(found) != digits:
        raise UsageError(f"{name} = {value!r}: it must hold {digits} hexadecimal digits")
    return found
