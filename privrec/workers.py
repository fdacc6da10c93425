"""A simulation's work in several processes of one machine, for the same bits as in one.

Sums are of integers, so their order is free, and what is trained as one batch stays one batch. The
process that comes to it first takes it, and what it gives back is put in its place. A copied
process repeats no draw either: every stream of randomness is keyed by its purpose and opened where
used.

Beside it, the memory of a process as the system counts it.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

from privrec.errors import PrivrecError, UsageError

T = TypeVar("T")


class Take(Protocol):
    """Shares tasks out among processes that all name the same ones in the same order.

    Each task is given, with its number, to the one that comes to it first, and to no other;
    ``enumerate`` gives them all to one.
    """

    def __call__(self, tasks: Sequence[T], /) -> Iterable[tuple[int, T]]:
        """Yield those that are left when this process asks."""


def forked(workers: int, share: Callable[[Take], T]) -> list[T]:
    """Call ``share`` in so many processes, which share out what they take; one runs here.

    Processes are forked anew for each call: they see histories, states and weights as they stand,
    without a copy. What they change stays with them, what they return is handed over.

    Raises:
        UsageError: where the system cannot fork.
        PrivrecError: when a process ended without an answer.
        Exception: what a share raised.
    """
    if workers == 1:
        return [share(enumerate)]
    if "fork" not in multiprocessing.get_all_start_methods():
        raise UsageError(f"run.workers = {workers}: this system cannot fork processes; use 1")
    context, running = multiprocessing.get_context("fork"), []
    with tempfile.TemporaryFile() as place:
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe(duplex=False)
                work = share, _Line(place.fileno()), theirs
                process = context.Process(target=_work, args=work, daemon=True)
                process.start()
                theirs.close()  # or the end of the process would go unnoticed
                running.append((process, ours))
            return [_answer(process, ours) for process, ours in running]
        finally:
            for process, ours in running:
                ours.close()
                process.kill()
                process.join()


def cpu_s() -> float:
    """CPU seconds of this process and of the workers that have ended."""
    mine = time.process_time()
    return mine + sum(os.times()[2:4])  # those of children are known to a hundredth


class _Line:
    """Tasks in a line, whose head is the place in a file that all processes have open together.

    The system moves that place in one step, and no process can die while it holds a lock.
    """

    def __init__(self, place: int) -> None:
        self._place, self._ends, self._mine = place, 0, -1

    def __call__(self, tasks: Sequence[T], /) -> Iterator[tuple[int, T]]:
        begins = self._ends
        self._ends += len(tasks)
        while True:
            if self._mine < begins:  # what it took before is done: only now it takes another
                self._mine = os.lseek(self._place, 1, os.SEEK_CUR) - 1
            if self._mine >= self._ends:
                return
            number, self._mine = self._mine - begins, -1
            yield number, tasks[number]


def _work(share: Callable[[Take], Any], line: Take, theirs: Connection) -> None:
    # Ctrl-C goes to every process of the terminal; a round is ended by the one that began it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        theirs.send((share(line), None))
    except Exception as error:
        theirs.send((None, error))


def _answer(process: Any, ours: Connection) -> Any:
    try:
        answer, error = ours.recv()
    except EOFError:
        process.join()
        raise PrivrecError(
            f"worker process {process.pid} ended in mid-round (exit code {process.exitcode}), "
            "perhaps for want of memory; go on with privrec resume, with fewer --workers"
        ) from None
    if error is not None:
        raise error
    return answer


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
