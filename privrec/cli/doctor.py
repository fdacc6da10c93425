"""What a machine offers to privrec: one finding for each thing that a run needs."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

Level = Literal["ok", "note", "fail"]

OLDEST_PYTHON = (3, 11)
SLOW_AES_GB_S = 0.5
_AES_BYTES = 1 << 25


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        level: ``ok``; ``note`` for what a run can do without; ``fail`` for what it cannot.
        detail: What was found.
        remedy: What to do about it; empty when nothing is.
    """

    name: str
    level: Level
    detail: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return asdict(self)


def examine(data_dir: Path | None = None) -> list[Finding]:
    """Every finding about this machine, in reading order.

    Args:
        data_dir: Where data sets are looked for, besides the download folder.
    """
    return [_guarded(check) for check in _CHECKS] + [*_packages(), _data(data_dir)]


def found_data(data_dir: Path | None = None) -> dict[str, str]:
    """Where each MovieLens set was found, by name; sets that are not here are left out.

    Args:
        data_dir: A folder to look in first: a data set's own, or one above.
    """
    from privrec.data.catalogue import ARCHIVES
    from privrec.data.fetch import cache_dir

    roots = [root for root in (data_dir, cache_dir()) if root is not None]
    found: dict[str, str] = {}
    for name, archive in ARCHIVES.items():
        for root in roots:
            places = [root] if root.name in archive.folders else []
            places += [root / folder for folder in archive.folders]
            places += [root / f"{folder}.zip" for folder in archive.folders]
            here = next((place for place in places if place.exists()), None)
            if here is not None:
                found.setdefault(name, str(here))
    return found


def _guarded(check: Callable[[], Finding]) -> Finding:
    """What ``check`` found; anything that it raises is a failure to be shown, not to die of."""
    try:
        return check()
    except Exception as error:
        name = check.__name__.strip("_").replace("_", " ")
        return Finding(name, "fail", f"{type(error).__name__}: {error}", "reinstall privrec")


def _python() -> Finding:
    found = platform.python_version()
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding("python", "fail", found, "install Python 3.11 or newer")
    return Finding("python", "ok", f"{found} on {platform.system()} {platform.machine()}")


def _threads() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    import torch

    used = torch.get_num_threads()
    detail = f"{used} used by torch, {cores} cores usable"
    if cores and used > cores:
        return Finding("threads", "note", detail, f"set OMP_NUM_THREADS={cores}")
    return Finding("threads", "ok", detail)


def _secure_generator() -> Finding:
    from privrec.randomness import SecretRoot

    first = SecretRoot(os.urandom(32)).stream("doctor").bytes(32)
    second = SecretRoot(os.urandom(32)).stream("doctor").bytes(32)
    if first == second:
        remedy = "do not run privrec with noise on this machine"
        return Finding("secure generator", "fail", "two roots gave the same bytes", remedy)
    return Finding("secure generator", "ok", "operating system entropy, AES-CTR keystream")


def _aes_speed() -> Finding:
    from privrec.randomness import SecretRoot

    stream = SecretRoot(os.urandom(32)).stream("doctor")
    stream.bytes(_AES_BYTES)
    start = time.perf_counter()
    stream.bytes(_AES_BYTES)
    speed = _AES_BYTES / (time.perf_counter() - start) / 1e9
    detail = f"{speed:.1f} GB/s"
    if speed < SLOW_AES_GB_S:
        return Finding("AES speed", "note", detail, "noise will be slow: use a CPU with AES-NI")
    return Finding("AES speed", "ok", detail)


def _state_directory() -> Finding:
    from privrec.randomness import state_dir

    directory = state_dir()
    remedy = "set PRIVREC_STATE to a folder of your own on a local disk"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=directory) as probe:
            probe.write(b"privrec")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        detail = f"{directory} cannot be written: {error.strerror}"
        return Finding("state directory", "fail", detail, remedy)
    return Finding("state directory", "ok", f"{directory} is writable; noise roots are kept there")


_CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _threads,
    _secure_generator,
    _aes_speed,
    _state_directory,
)


def _packages() -> Iterator[Finding]:
    """One finding for the packages that are needed and one for each extra."""
    wanted = _requirements()
    missing = [name for name in wanted.pop("", []) if _version(name) is None]
    if missing:
        yield Finding("packages", "fail", f"missing: {', '.join(missing)}", "reinstall privrec")
    else:
        yield Finding("packages", "ok", ", ".join(f"{n} {_version(n)}" for n in _SHOWN))
    for extra, names in wanted.items():
        absent = [name for name in names if _version(name) is None]
        if absent:
            remedy = f"pip install 'privrec[{extra}]' if you want it"
            yield Finding(f"extra {extra}", "note", f"missing: {', '.join(absent)}", remedy)
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(names))


_SHOWN = ("torch", "numpy", "scipy", "cryptography", "dp-accounting")
_EXTRAS_OF_USERS = ("data", "track", "flower")


def _requirements() -> dict[str, list[str]]:
    """Names of required packages by extra; those that every run needs under the empty name."""
    found: dict[str, list[str]] = {"": []}
    for line in _declared():
        name = _leading_name(line)
        extra = line.partition("extra ==")[2].strip(" '\"")
        if not extra or extra in _EXTRAS_OF_USERS:
            found.setdefault(extra, []).append(name)
    return found


def _declared() -> list[str]:
    try:
        return requires("privrec") or []
    except PackageNotFoundError:  # run from a source tree that is not installed
        return list(_SHOWN)


def _leading_name(requirement: str) -> str:
    for position, character in enumerate(requirement):
        if not (character.isalnum() or character in "-_."):
            return requirement[:position]
    return requirement


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _data(data_dir: Path | None) -> Finding:
    found = found_data(data_dir)
    if found:
        return Finding(
            "data", "ok", ", ".join(f"{name} in {place}" for name, place in found.items())
        )
    remedy = "privrec data fetch ml-1m, or set PRIVREC_DATA; synthetic data needs nothing"
    return Finding("data", "note", "no MovieLens set was found", remedy)
