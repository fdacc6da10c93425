"""A checkpoint is whole or refused, its owner's alone, and replaced in one step."""

from __future__ import annotations

import os
import stat
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privrec.errors import IntegrityError
from privrec.run import checkpoint
from privrec.run.checkpoint import Position

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
POSITION = Position("run-1", "data", 3, 5, "ab" * 32)


def arrays_of(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "weights": rng.normal(size=11).astype(np.float32),
        "states": rng.normal(size=(4, 2)).astype(np.float32),
        "moment.first": np.array([np.nan, np.inf, -0.0, 1e-45], np.float32),
    }


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype
        and found[name].shape == expected[name].shape
        and found[name].tobytes() == expected[name].tobytes()
        for name in expected
    )


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.write(path, POSITION, arrays_of(), KEY)
    return path


def test_it_gives_back_every_bit(written: Path) -> None:
    position, arrays = checkpoint.read(written, KEY.public_key())
    assert position == POSITION
    assert same(arrays, arrays_of())


def test_the_new_one_takes_the_place_of_the_old(written: Path) -> None:
    later = replace(POSITION, index=4)
    checkpoint.write(written, later, arrays_of(1), KEY)
    position, arrays = checkpoint.read(written, KEY.public_key())
    assert position == later
    assert same(arrays, arrays_of(1))
    assert os.listdir(written.parent) == [written.name]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_its_owner_alone_may_read_it(tmp_path: Path, mask: int) -> None:
    path, before = tmp_path / "checkpoint", os.umask(mask)
    try:
        checkpoint.write(path, POSITION, arrays_of(), KEY)
        checkpoint.write(path, POSITION, arrays_of(1), KEY)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_no_altered_byte_goes_unnoticed(written: Path) -> None:
    """Each byte in turn, in every part of the file: lengths, header, position, arrays."""
    content = written.read_bytes()
    for place in range(len(content)):
        altered = bytearray(content)
        altered[place] ^= 0x01 if place % 2 else 0x80
        written.write_bytes(altered)
        try:
            position, arrays = checkpoint.read(written, KEY.public_key())
        except IntegrityError:
            continue
        # Only what says the same in other bytes, such as white space, may pass.
        assert position == POSITION, f"byte {place}"
        assert same(arrays, arrays_of()), f"byte {place}"


@pytest.mark.parametrize("field", [field.name for field in fields(Position)])
def test_an_altered_position_is_refused(written: Path, field: str) -> None:
    value = str(getattr(POSITION, field)).encode()
    name = f'\\"{field}\\": '.encode()
    content = written.read_bytes()
    at = content.index(value, content.index(name) + len(name))
    other = bytes([value[0] ^ 1])
    written.write_bytes(content[:at] + other + content[at + 1 :])
    with pytest.raises(IntegrityError, match="not signed with the key"):
        checkpoint.read(written, KEY.public_key())


def test_every_way_of_cutting_it_short_is_refused(written: Path) -> None:
    content = written.read_bytes()
    for length in range(0, len(content), 3):
        written.write_bytes(content[:length])
        with pytest.raises(IntegrityError, match="restore the file"):
            checkpoint.read(written, KEY.public_key())


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 100, b"PK\x03\x04", b"\xff" * 64])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="this is no checkpoint"):
        checkpoint.read(path, KEY.public_key())


def test_a_file_of_arrays_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "checkpoint"
    for metadata in (None, {"record": "{}"}, {"record": "[1]"}, {"record": "no json"}):
        save_file(arrays_of(), path, metadata)
        with pytest.raises(IntegrityError, match="not a signed checkpoint"):
            checkpoint.read(path, KEY.public_key())


def test_a_missing_one_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="there is no checkpoint.*Start the run anew"):
        checkpoint.read(tmp_path / "nothing", KEY.public_key())


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_one(
    written: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    class PowerLossError(Exception):
        pass

    def fail(*_: object) -> None:
        raise PowerLossError

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail) if moment == "fsync" else None
        patch.setattr(Path, "replace", fail)
        patch.setattr(os, "replace", fail)
        patch.setattr(os, "rename", fail)
        with pytest.raises(PowerLossError):
            checkpoint.write(written, replace(POSITION, index=4), arrays_of(1), KEY)
    position, arrays = checkpoint.read(written, KEY.public_key())
    assert position == POSITION
    assert same(arrays, arrays_of())
    # What was left is no bar.
    checkpoint.write(written, replace(POSITION, index=4), arrays_of(1), KEY)
    assert checkpoint.read(written, KEY.public_key())[0].index == 4
    assert os.listdir(written.parent) == [written.name]


def test_it_is_on_disk_before_it_takes_the_place_of_the_old(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    sync, move = os.fsync, Path.replace

    def noted_sync(descriptor: int) -> None:
        seen.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def noted_move(self: Path, target: Path) -> Path:
        seen.append("replace")
        return move(self, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_move)
    checkpoint.write(written, POSITION, arrays_of(1), KEY)
    assert seen == ["file", "replace", "directory"]
