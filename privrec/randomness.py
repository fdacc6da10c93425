"""Two kinds of randomness as two types: named simulation seeds, and the secure generator.

:func:`rng_for` decides everything that is not secret. :class:`SecretRoot` and the
:class:`SecureStream` that it opens decide keys, noise and stochastic rounding. Nothing converts one
into the other, so a type checker sees when a secret draw is asked of a seedable generator.

A root is drawn from the operating system once and kept readable by its owner alone, under
:func:`state_dir`: never in a run's output directory and never in a checkpoint. Every draw has its
own key, derived from the root and a description of what the draw is for. The same description gives
the same bytes (sending again is harmless), any other description gives independent ones.
Sources: RFC 5869 (HKDF), NIST SP 800-38A (CTR mode), Box & Muller (1958).
"""

from __future__ import annotations

import hashlib
import hmac
import operator
import os
import re
import secrets
from pathlib import Path
from typing import NoReturn, SupportsIndex, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from privrec.errors import ReleaseRefused, UsageError
from privrec.storage import read_secret, server_key, write_secret

ROOT_BYTES = 32
STREAM_LIMIT = 2**36
_EXTRACT_SALT = b"privrec secret root, version 1"
_ZEROS = memoryview(bytes(1 << 16))
_CIPHER_TAIL = 15  # update_into asks for a block less one byte more than it writes
_PAIRS = 1 << 12  # Box-Muller pairs at a time: all buffers together stay in the level-2 cache

Bytes: TypeAlias = bytes
Name: TypeAlias = str | bytes | SupportsIndex


def state_dir() -> Path:
    """The directory that keeps roots and signing keys, apart from everything that is shared.

    It is ``$PRIVREC_STATE``, else ``$XDG_STATE_HOME/privrec``, else ``~/.local/state/privrec``.
    """
    if own := os.environ.get("PRIVREC_STATE"):
        return Path(own).absolute()
    if shared := os.environ.get("XDG_STATE_HOME"):
        return Path(shared) / "privrec"
    return Path.home() / ".local" / "state" / "privrec"


KEY, KEPT = "server.key", "head.json"
"""Where a ledger's signing key lies among its secrets, and the last head that was signed."""


def secrets_of(run_id: str) -> Path | None:
    """Where this machine keeps the signing key of a ledger, and its last head; None if nowhere."""
    if not re.fullmatch("[A-Za-z0-9-]{1,64}", run_id):
        return None
    places = (state_dir() / room / run_id for room in ("runs", "flower"))
    return next((place for place in places if (place / KEY).exists()), None)


def kept_key(run_id: str) -> Ed25519PrivateKey | None:
    """The signing key of a ledger where this machine keeps it, else None."""
    folder = secrets_of(run_id)
    return None if folder is None else server_key(folder / KEY, new=False)


def rng_for(seed: int, *names: Name) -> np.random.Generator:
    """A simulation generator for one purpose, such as ``"cohort", 12``; for nothing secret.

    Promise: the same seed and names give the same generator on every platform; any other path of
    names, also one that merely joins to the same text, gives an independent one.
    """
    digest = hashlib.sha256(_encode("simulation", (seed, *names))).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


class SecretRoot:
    """The one secret of a noise-maker, from which every key of a run is derived.

    Promise: it shows itself in no ``repr`` and refuses to be pickled; two different descriptions
    never share a stream or a tag. ``is_known`` says that others know it, so that its noise protects
    nobody and ε is infinite.
    """

    def __init__(self, key: bytes, *, is_known: bool = False) -> None:
        if not key:
            raise UsageError("a noise root of 0 bytes: it needs at least one; leave it out to draw")
        self._extracted = hmac.digest(_EXTRACT_SALT, key, "sha256")
        self.is_known = is_known

    @classmethod
    def create(cls, path: Path) -> SecretRoot:
        """Draw a root and keep it at ``path``, see :func:`~privrec.storage.write_secret`.

        A second root there is refused: it would draw another noise for what the first protected.
        """
        key = secrets.token_bytes(ROOT_BYTES)
        write_secret(path, key)
        return cls(key)

    @classmethod
    def load(cls, path: Path) -> SecretRoot:
        """The root kept at ``path``; see :func:`~privrec.storage.read_secret`."""
        return cls(read_secret(path, ROOT_BYTES))

    @classmethod
    def known(cls, key: bytes) -> SecretRoot:
        """A root that is no secret: runs that use it repeat bit for bit and protect nobody."""
        return cls(key, is_known=True)

    def stream(self, purpose: str, *context: Name) -> SecureStream:
        """The secure generator of one draw, at its beginning: asked for twice, it repeats itself.

        ``context`` is everything the draw may depend on: run, round, attempt, device, hashes of the
        plan, the model and the integer input.
        """
        return SecureStream(self._expand("stream", purpose, context))

    def tag(self, purpose: str, *context: Name) -> bytes:
        """32 bytes that commit to ``context``, and that only a holder of the root can make."""
        return self._expand("tag", purpose, context)

    def _expand(self, kind: str, purpose: str, context: tuple[Name, ...]) -> bytes:
        info = _encode(kind, (purpose, *context))
        return hmac.digest(self._extracted, info + b"\x01", "sha256")

    def __repr__(self) -> str:
        return f"SecretRoot({'known' if self.is_known else 'secret'})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SecretRoot is never pickled: hand over the path that it is kept at")


class SecureStream:
    """The AES-256-CTR keystream of one key, as bytes, words and normal deviates.

    Promise: the stream is a function of the key, which is used for nothing else, and of what was
    read before; no byte is given out twice; a copy that a fork made is refused, since it would
    repeat what its parent draws.
    """

    def __init__(self, key: bytes) -> None:
        self._keystream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
        self.left = STREAM_LIMIT  # bytes that this stream will still give
        self._process = os.getpid()

    def bytes(self, n: int) -> Bytes:
        """The next ``n`` bytes."""
        return self._next(n).tobytes()

    def uint16(self, size: int) -> NDArray[np.uint16]:
        """The next ``size`` uniform 16-bit words."""
        return self._next(2 * size).view("<u2").astype(np.uint16, copy=False)

    def uint32(self, size: int, buffer: NDArray[np.uint8] | None = None) -> NDArray[np.uint32]:
        """The next ``size`` uniform 32-bit words.

        A loop of draws needs no new memory with a ``buffer`` of at least ``4 * size + 15`` bytes.
        """
        return self._next(4 * size, buffer).view("<u4").astype(np.uint32, copy=False)

    def uint64(self, size: int) -> NDArray[np.uint64]:
        """The next ``size`` uniform 64-bit words."""
        return self._next(8 * size).view("<u8").astype(np.uint64, copy=False)

    def normal(self, size: int) -> NDArray[np.float64]:
        """The next ``size`` standard normal deviates, by Box-Muller on 64-bit uniforms.

        The tail reaches 9.49 standard deviations; beyond lies a probability of 3e-21. 16 bytes of
        the stream make two deviates, whatever parts they are asked for in beyond 8,192.
        """
        deviates = np.empty(size)
        for start in range(0, size, 2 * _PAIRS):
            self._box_muller(deviates[start : start + 2 * _PAIRS])
        return deviates

    def _box_muller(self, out: NDArray[np.float64]) -> None:
        pairs = -(-len(out) // 2)
        words = self.uint64(2 * pairs)
        # Small uniforms keep all their 64 bits as floats, which is what the far tail is made of.
        radius = words[:pairs].astype(np.float64)
        radius += 0.5
        radius *= 2.0**-64
        angle = (words[pairs:] >> np.uint64(11)) * (2 * np.pi * 2.0**-53)
        np.log(radius, out=radius)
        radius *= -2.0
        np.sqrt(radius, out=radius)
        rest = len(out) - pairs
        np.multiply(radius, np.cos(angle), out=out[:pairs])
        np.multiply(radius[:rest], np.sin(angle[:rest]), out=out[pairs:])

    def _next(self, n: int, buffer: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        if os.getpid() != self._process:
            raise ReleaseRefused(
                f"a secure stream of process {self._process} was used after a fork, in process "
                f"{os.getpid()}: both would draw the same bytes; open the stream after the fork"
            )
        if n < 0 or n > self.left:
            raise ReleaseRefused(
                f"{n} bytes of a secure stream that has {self.left} of {STREAM_LIMIT} left: one "
                "key gives no more; open a stream with another context for each part of the draw"
            )
        if buffer is None:
            buffer = np.empty(n + _CIPHER_TAIL, dtype=np.uint8)
        for start in range(0, n, len(_ZEROS)):
            self._keystream.update_into(_ZEROS[: n - start], buffer.data[start:])
        self.left -= n
        return buffer[:n]


def _encode(kind: str, names: tuple[Name, ...]) -> bytes:
    """Names as bytes that no other list of names has: each with its type and its length."""
    encoded = b""
    for name in (kind, *names):
        if isinstance(name, str):
            mark, text = b"s", name.encode()
        elif isinstance(name, bytes):
            mark, text = b"b", name
        else:
            mark, text = b"i", str(operator.index(name)).encode()
        encoded += mark + len(text).to_bytes(8, "little") + text
    return encoded
