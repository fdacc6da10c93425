"""Memory of this process as the system counts it: now, at its peak, and how to give it back."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path


def give_back_freed() -> None:
    """Return freed memory to the system, where the C library can.

    What an allocator keeps for later use would hide what is measured, or stay for good.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    """Count the peak from now on, where the system can; else it stays that of the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident_bytes() -> int:
    """Bytes of this process in main memory now; its peak where the system does not tell."""
    return _status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Most bytes of this process that were in main memory at a time, since :func:`reset_peak`."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return int(found[0]) * 1024 if found else None
