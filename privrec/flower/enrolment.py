"""Who is a device: a node's folder of keys, the roster of identities, and whom a node trusts.

The roster is what stands between devices and a server that makes some up. It is a file of public
keys, handed to every device by somebody other than the server; or each device's key is certified by
an enrolment office, whose public key the devices hold.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from privrec.errors import UsageError
from privrec.randomness import SecretRoot
from privrec.secagg.keys import KEY_BYTES, DeviceKey, Prekey, Verifier
from privrec.secagg.roster import Anchor, EnrolmentKey, ListedDevices, enrol
from privrec.storage import read_secret, replace, write_secret

ROOT, STATE = "device.root", "state"


class Anyone:
    """No trust anchor: whoever the server names is taken for a device.

    It is for simulated devices and experiments: a server can make up a cohort around a real one.
    """

    digest = bytes(32)

    def __init__(self) -> None:
        self.verifier = Verifier()

    def knows(self, prekey: Prekey) -> bool:
        """Always."""
        return True


def enroll(
    keys: Path, users: Sequence[int] = (0,), roster: Path | None = None, office: Path | None = None
) -> list[str]:
    """Make the keys of a node, and enrol its devices in a roster file or with an office's key.

    Args:
        keys: the node's new folder of secrets.
        users: numbers of the devices that it hosts.
        roster: a file of identities that these are added to.
        office: secret key of an enrolment office, made if there is none; its public key goes to
            a file beside it that ends in ``.pub``, certificates to what ``keys`` remembers.

    Returns:
        The identities, in hexadecimal.

    Raises:
        UsageError: when the node has keys already, or there is nowhere to enrol.
    """
    if (keys / ROOT).exists():
        raise UsageError(
            f"{keys}: this node has keys already, and another root would draw other noise for what "
            "it has protected; name a new folder"
        )
    if roster is None and office is None:
        raise UsageError("nowhere to enrol: give --roster FILE, or --office FILE")
    root = SecretRoot.create(keys / ROOT)
    identities = {user: DeviceKey.derive(root, "user", user).public for user in users}
    names = [identity.hex() for identity in identities.values()]
    if roster is not None:
        known = roster.read_text(encoding="utf-8") if roster.exists() else ""
        replace(roster, (known + "".join(f"{name}\n" for name in names)).encode())
    kept: dict[int, dict[str, bytes]] = {}  # nothing was asked of these devices yet
    if office is not None:
        if not office.exists():
            write_secret(office, secrets.token_bytes(KEY_BYTES))
        key = DeviceKey(read_secret(office, KEY_BYTES))
        replace(office.with_name(office.name + ".pub"), f"{key.public.hex()}\n".encode())
        kept = {user: {"certificate": enrol(key, own)} for user, own in identities.items()}
    replace(keys / STATE, msgpack.packb(kept), mode=0o600)
    return names


def anchor_of(config: Mapping[str, Any]) -> Anchor | None:
    """Return what tells which devices are enrolled; None where a configuration names nothing.

    Args:
        config: may have ``roster``, the path of a file with one identity a line; or
            ``enrolment-key``, an office's public key in hexadecimal, or the path of a file with it.

    Raises:
        UsageError: when both are given, or one cannot be read.
        DataError: when the roster is malformed.
    """
    roster, key = text_of(config, "roster"), text_of(config, "enrolment-key")
    if roster and key:
        raise UsageError("roster and enrolment-key are both given: keep the one that is in use")
    if roster:
        return ListedDevices.read(Path(roster))
    if not key:
        return None
    text = key
    if len(key) != 2 * KEY_BYTES:
        try:
            text = Path(key).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"enrolment-key = {key[:80]!r}: neither 64 hexadecimal digits nor a file that "
                f"can be read ({error})"
            ) from None
    if not re.fullmatch(f"[0-9a-fA-F]{{{2 * KEY_BYTES}}}", text):
        raise UsageError(f"enrolment-key = {key[:80]!r}: it must hold 64 hexadecimal digits")
    return EnrolmentKey(bytes.fromhex(text))


def text_of(config: Mapping[str, Any], name: str) -> str | None:
    """Return a setting of a Flower configuration that must be text; None when unset or empty."""
    value = config.get(name)
    if value is None or isinstance(value, str):
        return value or None
    raise UsageError(f"{name} = {value!r}: it must be text; put it into quotation marks")
