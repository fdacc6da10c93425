"""Noise in cache-sized blocks from the secure generator, for many rows that each owe their own.

:class:`Normals` makes float32 deviates by Box-Muller on 32-bit uniforms of the keystream. A word
below 2^8, one in 16 million, is continued by 64 further bits, so that the tail reaches 11.5
deviations and is not cut where 32 bits end.

Floating point has a caveat that integers do not have: which floats a sum can take depends on what
the noise was added to (Mironov, "On significance of the least significant bits", 2012).
Source: Box & Muller (1958).
"""

from __future__ import annotations

import math
import os
import secrets
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privrec.errors import ReleaseRefused
from privrec.randomness import ROOT_BYTES, Name, SecretRoot, SecureStream

Values: TypeAlias = NDArray[Any]
"""A table of float32 or float64, shape ``(rows, width)``."""
Variances: TypeAlias = NDArray[np.float64]

_PAIRS = 1 << 16  # enough that the calls cost little, few enough for the cache
_RARE = 1 << 8
_SPARE = 1 << 35  # more than one draw takes; the next one opens another stream


class NoiseSource(Protocol):
    """What draws the noise that rows owe."""

    def begin(self, *context: Name) -> None:
        """Open the stream of one draw; another context gives independent noise."""

    def add(self, out: Values, variances: Variances) -> None:
        """Add to each row of ``out`` noise of its own variance, independent everywhere."""


class _Secure:
    """A root, the stream of the draw that is going on, and the process that both belong to."""

    def __init__(self, root: SecretRoot | None = None) -> None:
        self._root = root or SecretRoot(secrets.token_bytes(ROOT_BYTES))
        self._process = os.getpid()
        self._draws = 0
        self._goes_on = False
        self._stream: SecureStream | None = None

    @property
    def is_known(self) -> bool:
        """Whether others know the root, so that the noise protects nobody."""
        return self._root.is_known

    def begin(self, *context: Name) -> None:
        """Open the stream of one draw.

        Args:
            *context: what the draw is for; without any, the stream of the last draw without any
                goes on, since no byte of it is given out twice.

        Raises:
            ReleaseRefused: in a process that a fork made, since it would repeat its parent's draws.
        """
        if os.getpid() != self._process:
            raise ReleaseRefused(
                f"lazy noise of process {self._process} was asked for after a fork, in process "
                f"{os.getpid()}: both would draw the same; make the optimiser after the fork"
            )
        if (
            not context
            and self._goes_on
            and self._stream is not None
            and self._stream.left > _SPARE
        ):
            return
        self._draws += 1
        self._goes_on = not context
        self._stream = self._root.stream("lazy noise", *(context or (self._draws,)))

    def _open(self) -> SecureStream:
        if self._stream is None:
            raise ReleaseRefused("noise was asked for before its stream was opened: begin() first")
        return self._stream


class Normals(_Secure):
    """Normal deviates in float32, added to rows of a float table.

    Promise: the same root and context give the same noise for the same shapes, any other
    independent noise; a source refuses use after a fork.

    Args:
        root: the secret to draw from; one is drawn from the operating system when None.
    """

    def __init__(self, root: SecretRoot | None = None) -> None:
        super().__init__(root)
        self._make_buffers(_PAIRS)

    def add(self, out: Values, variances: Variances) -> None:
        """Add ``N(0, variances[i] I)`` to row ``i`` of ``out``.

        Args:
            out: float array of shape ``(rows, width)``, changed in place.
            variances: shape ``(rows,)``, at least 0; rounded up to float32.
        """
        half = -(-out.shape[1] // 2)
        step = max(1, _PAIRS // half)
        table = torch.from_numpy(out)
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            self._add_block(table[part], rounded_up(variances[part]))

    def _make_buffers(self, pairs: int) -> None:
        self._turn = torch.empty(pairs)
        self._bytes = np.empty(8 * pairs + 16, np.uint8)

    def _add_block(self, out: Tensor, variances: NDArray[np.float32]) -> None:
        rows, width = out.shape
        half = -(-width // 2)
        pairs = rows * half
        if pairs > len(self._turn):  # one very wide row
            self._make_buffers(pairs)
        stream = self._open()
        words = stream.uint32(2 * pairs, self._bytes)
        angle = torch.from_numpy(words[pairs:].view(np.float32)).view(rows, half)
        radius = _log_uniform(words[:pairs], stream).view(rows, half)
        radius.mul_(torch.from_numpy(variances).mul_(-2.0)[:, None]).sqrt_()
        angle.copy_(torch.from_numpy(words[pairs:].view(np.int32)).view(rows, half))
        angle.mul_(math.pi * 2.0**-31)
        turn = torch.cos(angle, out=self._turn[:pairs].view(rows, half))
        out[:, :half].addcmul_(radius, turn)
        rest = width - half
        out[:, half:].addcmul_(radius[:, :rest], angle.sin_()[:, :rest])


def rounded_up(variances: Variances) -> NDArray[np.float32]:
    """Variances in float32, never below what they were."""
    short = variances.astype(np.float32)
    step_up(short, short < variances)
    return short


def step_up(values: Values, where: NDArray[np.bool_]) -> None:
    """Put the next larger float in the place of some floats of at least 0."""
    bits = values.view(f"i{values.itemsize}")  # ordered as such floats are
    bits += where


def _log_uniform(words: NDArray[np.uint32], stream: SecureStream) -> Tensor:
    """``ln u`` of the uniform ``u`` that each word stands for, from -67 to 0, in their place."""
    rare = _continued(words, stream) if words.min() < _RARE else None
    # Floats take the places of words one by one: half the room, so that it all stays in the cache.
    out = torch.from_numpy(words.view(np.float32))
    out.copy_(torch.from_numpy(words)).mul_(2.0**-32)
    if rare is not None:
        places, uniforms = rare
        out[places] = uniforms
    return out.log_()


def _continued(words: NDArray[np.uint32], stream: SecureStream) -> tuple[NDArray[np.int64], Tensor]:
    """Places of the words that 32 bits are too few for, and their uniforms of 96."""
    rare = np.flatnonzero(words < _RARE)
    rest = (stream.uint64(len(rare)) + 0.5) * 2.0**-64
    return rare, torch.from_numpy(((words[rare] + rest) * 2.0**-32).astype(np.float32))
