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
import mmap
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from privrec.errors import PrivrecError, UsageError

S = TypeVar("S", bound=np.generic)
T = TypeVar("T")


class Take(Protocol):
    """Shares tasks out among processes that all name the same ones in the same order.

    Each task is given, with its number, to the one that comes to it first, and to no other;
    ``enumerate`` gives them all to one.
    """

    def __call__(self, tasks: Sequence[T], /) -> Iterable[tuple[int, T]]:
        """Yield those that are left when this process asks."""


class Workers(Generic[T]):
    """Processes that are forked once and, whenever they are asked, share out what they take.

    They see histories as they stood then, without a copy; what changes later and they are to see,
    or change together, must lie in :func:`shared` memory. They end with this object or this
    process, whichever is first, and after an error.

    Raises:
        UsageError: where the system cannot fork.
    """

    answered_s: ClassVar[float] = 0.0
    """CPU seconds that all workers of this process have needed for their answers."""

    def __init__(self, workers: int, answer: Callable[..., T]) -> None:
        if "fork" not in multiprocessing.get_all_start_methods():
            raise UsageError(f"run.workers = {workers}: this system cannot fork processes; use 1")
        context, self._place = multiprocessing.get_context("fork"), tempfile.TemporaryFile()
        self._running: list[tuple[Any, Connection]] = []
        self.close = weakref.finalize(self, _end, self._place, self._running)
        for _ in range(workers):
            ours, theirs = context.Pipe()
            others = [*(mine for _, mine in self._running), ours]
            work = answer, self._place.fileno(), theirs, others
            process = context.Process(target=_work, args=work, daemon=True)
            process.start()
            theirs.close()  # or the end of the process would go unnoticed
            self._running.append((process, ours))

    def ask(self, *question: Any) -> list[T]:
        """Return what ``answer(take, *question)`` returns in each process.

        Raises:
            PrivrecError: when a process ended without an answer.
            Exception: what an answer raised.
        """
        os.lseek(self._place.fileno(), 0, os.SEEK_SET)
        try:
            for _, ours in self._running:
                with contextlib.suppress(BrokenPipeError):  # it has ended, which is told below
                    ours.send(question)
            return [_answer(process, ours) for process, ours in self._running]
        except BaseException:
            self.close()  # others may answer yet, and would be taken to answer the next question
            raise


def forked(workers: int, share: Callable[[Take], T]) -> list[T]:
    """Call ``share`` in so many processes, which share out what they take; one runs here.

    They are forked for this call alone, and see everything as it stands. What they change stays
    with them, what they return is handed over. Errors are those of :class:`Workers`.
    """
    if workers == 1:
        return [share(enumerate)]
    made = Workers(workers, share)
    try:
        return made.ask()
    finally:
        made.close()


def shared(array: NDArray[S]) -> NDArray[S]:
    """A copy of an array that processes forked hereafter see, and change, together."""
    place = mmap.mmap(-1, max(1, array.nbytes))
    found = np.frombuffer(place, array.dtype, array.size).reshape(array.shape)
    found[...] = array
    return found


def cpu_s() -> float:
    """CPU seconds of this process and of what its workers answered."""
    return time.process_time() + Workers.answered_s


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


def _work(
    answer: Callable[..., Any], place: int, theirs: Connection, others: Sequence[Connection]
) -> None:
    # Ctrl-C goes to every process of the terminal; a round is ended by the one that began it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for each in others:  # or the end of the one that asks would go unnoticed
        each.close()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            question, began = theirs.recv(), time.process_time()
            try:
                found, error = answer(_Line(place), *question), None
            except Exception as raised:
                found, error = None, raised
            theirs.send((found, error, time.process_time() - began))


def _answer(process: Any, ours: Connection) -> Any:
    try:
        answer, error, cpu_s = ours.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        raise PrivrecError(
            f"worker process {process.pid} ended in mid-round (exit code {process.exitcode}), "
            "perhaps for want of memory; go on with privrec resume, with fewer --workers"
        ) from None
    Workers.answered_s += cpu_s
    if error is not None:
        raise error
    return answer


def _end(place: BinaryIO, running: Sequence[tuple[Any, Connection]]) -> None:
    for process, ours in running:
        ours.close()
        process.kill()
        process.join()
    place.close()


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
