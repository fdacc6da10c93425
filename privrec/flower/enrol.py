"""Who is a device: a node's secret root, the roster of identities, and trust in either.

The roster is what stands between devices and a server that makes some up. It is a file of public
keys, handed to every device by somebody other than the server; or each device's key is certified by
an enrolment office, whose public key the devices hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from privrec.errors import DataError, UsageError
from privrec.randomness import SecretRoot
from privrec.secagg.keys import KEY_BYTES, SIGNATURE_BYTES, DeviceKey, Prekey, Verifier
from privrec.secagg.roster import Anchor, EnrolmentKey, ListedDevices, enrol
from privrec.storage import read_secret, replace, write_secret

ROOT, CERTIFICATES, STATE = "device.root", "certificates", "state"
EMPTY = b""
"""State of a node whose devices were never asked for anything."""


class ServersWord:
    """No trust anchor: whoever the server names is taken for a device.

    It is for devices that are simulated. A server can make up a cohort around a real one.
    """

    def __init__(self) -> None:
        self.verifier = Verifier()

    def knows(self, prekey: Prekey) -> bool:
        """Always."""
        return True


def enroll(keys: Path, users: Sequence[int], roster: Path | None, office: Path | None) -> list[str]:
    """Make the keys of a node, and enrol its devices in a roster file or with an office's key.

    Args:
        keys: the node's new folder of secrets.
        users: numbers of the devices that it hosts.
        roster: a file of identities that these are added to.
        office: secret key of an enrolment office, made if there is none; certificates go to
            ``keys``, the public key to a file beside it that ends in ``.pub``.

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
    replace(keys / STATE, EMPTY, mode=0o600)
    identities = [DeviceKey.derive(root, "user", user).public for user in users]
    names = [identity.hex() for identity in identities]
    if roster is not None:
        known = roster.read_text(encoding="utf-8") if roster.exists() else ""
        replace(roster, (known + "".join(f"{name}\n" for name in names)).encode())
    if office is not None:
        key = DeviceKey(_office_seed(office))
        lines = (
            f"{user} {enrol(key, identity).hex()}\n"
            for user, identity in zip(users, identities, strict=True)
        )
        replace(keys / CERTIFICATES, "".join(lines).encode())
    return names


def anchor_of(roster: str | None, enrolment_key: str | None, *, simulated: bool) -> Anchor:
    """Whom the devices of a node trust about other devices.

    Args:
        roster: path of a roster file, or
        enrolment_key: an office's public key in hexadecimal, or the path of a file with it.
        simulated: whether the devices are those of a data set, which may go without.

    Raises:
        UsageError: when both are given, or neither for devices with histories of their own.
        DataError: when a file is malformed.
    """
    if roster and enrolment_key:
        raise UsageError("roster and enrolment-key are both given: devices trust one of them")
    if roster:
        return ListedDevices.read(Path(roster))
    if enrolment_key:
        return EnrolmentKey(_public_key(enrolment_key))
    if simulated:
        return ServersWord()
    raise UsageError(
        "this node has a history of its own and no trust anchor: a server could surround it with "
        "devices that it made up; add roster=FILE or enrolment-key=HEX to its --node-config"
    )


def certificates_of(keys: Path) -> dict[int, bytes]:
    """Certificates of a node's devices, by user; none where a roster is used.

    Raises:
        DataError: when the file is malformed.
    """
    path, found = keys / CERTIFICATES, {}
    if not path.exists():
        return {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        user, _, text = line.partition(" ")
        try:
            found[int(user)] = bytes.fromhex(text)
        except ValueError:
            found[-1] = b""
        if len(found.get(int(user) if user.isdigit() else -1, b"")) != SIGNATURE_BYTES:
            raise DataError(f"{path}:{number}: {line[:40]!r} is no user and certificate")
    return found


def _office_seed(path: Path) -> bytes:
    if not path.exists():
        import secrets

        write_secret(path, secrets.token_bytes(KEY_BYTES))
    seed = read_secret(path, KEY_BYTES)
    public = DeviceKey(seed).public.hex()
    replace(path.with_name(path.name + ".pub"), f"{public}\n".encode())
    return seed


def _public_key(text: str) -> bytes:
    path = Path(text)
    if path.is_file():
        text = path.read_text(encoding="utf-8").strip()
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise DataError(
            f"enrolment-key {text[:80]!r}: it must be 64 hexadecimal digits, or a file with them"
        )
    return key
