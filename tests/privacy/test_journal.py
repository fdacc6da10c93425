"""A kill between any two writes: what was read stays as it was, and nothing is under-noised."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from privrec.errors import IntegrityError
from privrec.privacy.lazy.journal import Journal
from privrec.privacy.lazy.memory import LazyMemory
from privrec.privacy.lazy.pending import Update
from privrec.privacy.lazy.stream import Normals
from privrec.randomness import SecretRoot

ROOT = SecretRoot.known(b"journal")
PLACE = Path("table")
ROWS, WIDTH = 5, 400
POINTS = 10_000


class Killed(BaseException):
    pass


class Memory:
    """A disk in memory that loses power in a chosen write, in the middle of an append."""

    def __init__(self) -> None:
        self.files: dict[Path, bytes] = {}
        self.writes, self.last, self.rng = 0, None, np.random.default_rng(0)

    def append(self, path, content):
        if self._dies():
            kept = int(self.rng.integers(0, len(content) + 1))
            self.files[path] = self.files.get(path, b"") + content[:kept]
            raise Killed
        self.files[path] = self.files.get(path, b"") + content

    def cut(self, path, size):
        self._all_or_nothing(path, self.files[path][:size])

    def replace(self, path, content):
        self._all_or_nothing(path, content)

    def remove(self, path):
        self._all_or_nothing(path, None)

    def read(self, path):
        return self.files.get(path)

    def _all_or_nothing(self, path, content):
        dies = self._dies()
        if not dies or self.rng.integers(2):
            if content is None:
                self.files.pop(path, None)
            else:
                self.files[path] = content
        if dies:
            raise Killed

    def _dies(self):
        self.writes += 1
        return self.writes == self.last


class Intervals:
    """Draws a new direction for each name of a draw, and remembers which directions a name has.

    The name is what the secure source derives its key from: the same name gives the same noise.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[bytes, int], int] = {}

    def begin(self, *context):
        self.name, self.number = context, 0

    def unit(self):
        return 0.0

    def add(self, out, variances):
        for row in np.flatnonzero(variances):
            key = (*self.name, self.number)
            column = self.known.setdefault(key, len(self.known))
            assert column < out.shape[1]
            out[row, column] += np.sqrt(variances[row])
            self.number += 1


def act(memory, rng, observed, moving):
    """One random thing that a server may do, checked for what a reader of the table sees."""
    what = rng.integers(0, 10)
    if what < 4:
        rows = rng.integers(0, ROWS, int(rng.integers(0, 3)))
        update = Update(0.5, 0.9, 0.01) if moving else None
        gradients = np.zeros((len(rows), WIDTH))
        observed["uncertain"] += 1
        memory.step(rows, gradients, 1.0, update)
        observed["steps"] += 1
        observed["uncertain"] -= 1
        observed["shown"].clear()
    elif what < 9:
        rows = rng.integers(0, ROWS, int(rng.integers(1, 4)))
        for row, value in zip(rows, memory.settled(rows), strict=True):
            seen = observed["shown"].setdefault(int(row), value)
            assert np.array_equal(seen, value)
    else:
        memory.compact()


def crash_and_go_on(seed, *, moving=False):
    """A table that is killed several times; returns how many kills there were."""
    rng, disk, source = np.random.default_rng(seed), Memory(), Intervals()
    disk.rng = rng
    kills = 0
    observed = {"steps": 0, "uncertain": 0, "shown": {}}
    memory = LazyMemory(
        np.zeros((ROWS, WIDTH)), source, moving=moving, journal=Journal(PLACE, disk)
    )
    for _ in range(4):
        disk.last = disk.writes + int(rng.integers(1, 8))
        try:
            for _ in range(12):
                act(memory, rng, observed, moving)
        except Killed:
            kills += 1
        disk.last = None if rng.integers(4) else disk.writes + 1
        try:
            memory = LazyMemory.recover(PLACE, source, disk=disk)
        except Killed:
            kills, disk.last = kills + 1, None
            memory = LazyMemory.recover(PLACE, source, disk=disk)
        disk.last = None
        if observed["uncertain"]:
            # Whether the torn step was kept is for the disk to say; readings before it may differ.
            observed["shown"].clear()
        for row, value in list(observed["shown"].items()):
            assert np.array_equal(memory.settled(np.array([row]))[0], value), "seen with two values"
        if not moving:
            owed = (memory.settled() ** 2).sum(1)
            least, most = observed["steps"], observed["steps"] + observed["uncertain"]
            assert np.all(owed > least - 1e-6), "under-noised"
            assert np.all(owed < most + 1e-6)
            observed["steps"] = round(float(owed[0]))
        observed["uncertain"] = 0
    return kills


def test_hundreds_of_crash_points():
    kills = seed = 0
    while kills < 300:
        kills += crash_and_go_on(seed, moving=bool(seed % 4 == 3))
        seed += 1


@pytest.mark.slow
def test_ten_thousand_crash_points():
    kills, seed = 0, 10**6
    while kills < POINTS:
        kills += crash_and_go_on(seed, moving=bool(seed % 4 == 3))
        seed += 1


def assert_some_crash_shows():
    with pytest.raises(AssertionError):
        sum(map(crash_and_go_on, range(50)))


def test_noise_that_is_not_named_by_the_journal_is_seen_with_two_values(monkeypatch):
    def fresh(self, *context):
        self.name, self.number = (len(self.known),), 0

    monkeypatch.setattr(Intervals, "begin", fresh)
    assert_some_crash_shows()


def test_settling_before_writing_is_seen_with_two_values(monkeypatch):
    append = Journal.append

    def late(self, kind, content):
        if kind in (b"r", b"a"):
            return hashlib.sha256(content).digest()
        return append(self, kind, content)

    monkeypatch.setattr(Journal, "append", late)
    assert_some_crash_shows()


def test_forgetting_steps_is_under_noised(monkeypatch):
    append = Journal.append

    def late(self, kind, content):
        return b"" if kind == b"s" else append(self, kind, content)

    monkeypatch.setattr(Journal, "append", late)
    assert_some_crash_shows()


def history(memory, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        rows = rng.integers(0, 50, 7)
        memory.settle(rows)
        memory.step(rows, rng.normal(0, 1, (7, 3)).astype(np.float32), 1.0)


def test_on_real_files_with_real_noise(tmp_path):
    source = Normals(ROOT)
    memory = LazyMemory(np.zeros((50, 3), np.float32), source, journal=Journal(tmp_path))
    history(memory)
    shown = memory.settled(np.arange(25))
    again = LazyMemory.recover(tmp_path, Normals(ROOT))
    assert np.array_equal(again.settled(np.arange(25)), shown)
    assert np.array_equal(again.settled(), LazyMemory.recover(tmp_path, Normals(ROOT)).settled())
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    again.compact()
    assert len(list(tmp_path.iterdir())) == 1
    history(again, 1)
    assert np.array_equal(LazyMemory.recover(tmp_path, Normals(ROOT)).settled(), again.settled())


def test_each_entry_is_flushed_before_its_noise_is_drawn(tmp_path, monkeypatch):
    memory = LazyMemory(np.zeros((50, 3), np.float32), Normals(ROOT), journal=Journal(tmp_path))
    memory.owe(1.0)
    sizes, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda f: (fsync(f), sizes.append(os.fstat(f).st_size)))
    begin = Normals.begin

    def drawn(self, *context):
        (log,) = tmp_path.glob("journal-*")
        assert sizes[-1:] == [log.stat().st_size]
        begin(self, *context)

    monkeypatch.setattr(Normals, "begin", drawn)
    assert memory.settled(np.arange(3)).any()


def test_a_torn_tail_is_cut_and_written_over(tmp_path):
    memory = LazyMemory(np.zeros((50, 3), np.float32), Normals(ROOT), journal=Journal(tmp_path))
    history(memory)
    shown = memory.settled(np.arange(3))
    (log,) = tmp_path.glob("journal-*")
    whole = log.read_bytes()
    log.write_bytes(whole + b"r\x40torn")
    again = LazyMemory.recover(tmp_path, Normals(ROOT))
    assert log.read_bytes() == whole
    assert np.array_equal(again.settled(np.arange(3)), shown)


def test_other_updates_get_other_noise(tmp_path):
    tables = []
    for name in "ab":
        (tmp_path / name).mkdir()
        journal = Journal(tmp_path / name)
        tables.append(LazyMemory(np.zeros((4, 3), np.float32), Normals(ROOT), journal=journal))
    for table, gradient in zip(tables, (0.0, 1.0), strict=True):
        table.step(np.array([0]), np.full((1, 3), gradient, np.float32), 1.0)
    one, two = (table.settled() for table in tables)
    assert not np.any(one == two)


def test_tables_of_one_root_have_names(tmp_path):
    shown = []
    for name in "ab":
        (tmp_path / name).mkdir()
        journal = Journal(tmp_path / name, name=name)
        table = LazyMemory(np.zeros((4, 3), np.float32), Normals(ROOT), journal=journal)
        table.owe(1.0)
        shown.append(table.settled())
    assert not np.any(shown[0] == shown[1])


@pytest.mark.parametrize("which", ["snapshot", "journal-*"])
def test_an_altered_file_is_refused(tmp_path, which):
    memory = LazyMemory(np.zeros((50, 3), np.float32), Normals(ROOT), journal=Journal(tmp_path))
    history(memory)
    (path,) = tmp_path.glob(which)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="not what was written"):
        LazyMemory.recover(tmp_path, Normals(ROOT))


def test_a_missing_snapshot_is_refused(tmp_path):
    with pytest.raises(IntegrityError, match="never begun"):
        LazyMemory.recover(tmp_path, Normals(ROOT))
