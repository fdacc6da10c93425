import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from privrec import randomness
from privrec.errors import IntegrityError, ReleaseRefused, UsageError
from privrec.randomness import (
    SecretRoot,
    SecureStream,
    read_secret,
    rng_for,
    state_dir,
    write_secret,
)

KEY = bytes(range(32))
NAMES = st.lists(st.one_of(st.text(max_size=4), st.binary(max_size=4), st.integers(-300, 300)))


def run(code: str) -> str:
    arguments = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


class TestRngFor:
    def test_same_names_repeat(self):
        first = rng_for(7, "cohort", 12).random(5)
        assert np.array_equal(first, rng_for(7, "cohort", 12).random(5))

    def test_is_pinned(self):
        # Changing these changes every run that anybody has reported.
        assert rng_for(0, "cohort", 1).integers(0, 1000, 4).tolist() == [551, 315, 668, 101]

    @pytest.mark.parametrize(
        "other",
        [
            (8, "cohort", 12),
            (7, "cohort", 13),
            (7, "cohort", "12"),
            (7, "cohort1", 2),
            (7, "cohort12"),
            (7, "cohort", 12, ""),
            (7, b"cohort", 12),
            (7, 12, "cohort"),
        ],
    )
    def test_other_names_differ(self, other):
        assert not np.array_equal(rng_for(7, "cohort", 12).random(5), rng_for(*other).random(5))

    def test_numpy_integers_are_integers(self):
        assert rng_for(1, np.int32(5)).random() == rng_for(1, 5).random()

    def test_floats_are_refused(self):
        with pytest.raises(TypeError):
            rng_for(1, 0.5)  # type: ignore[arg-type]

    @given(NAMES, NAMES)
    def test_encoding_is_unambiguous(self, one, two):
        def typed(names):
            return [(type(name), name) for name in names]

        encode = randomness._encode
        assert (encode("x", tuple(one)) == encode("x", tuple(two))) == (typed(one) == typed(two))


class TestSecretRoot:
    def test_stream_is_hkdf_then_aes_ctr(self):
        info = b"".join(
            mark + len(text).to_bytes(8, "little") + text
            for mark, text in [(b"s", b"stream"), (b"s", b"noise"), (b"i", b"3"), (b"b", b"\x01")]
        )
        salt = b"privrec secret root, version 1"
        key = HKDF(SHA256(), 32, salt=salt, info=info).derive(KEY)
        expected = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(100))
        assert SecretRoot.known(KEY).stream("noise", 3, b"\x01").bytes(100) == expected

    def test_is_pinned(self):
        # A resumed run of an earlier version must draw the same noise again.
        root = SecretRoot.known(KEY)
        assert root.stream("noise", "run", 1, 0).bytes(8).hex() == "a14ceaab7b03d326"
        assert root.tag("release", b"sum").hex()[:16] == "8c41d7e499a373a4"

    def test_same_context_same_bytes(self):
        root = SecretRoot.known(KEY)
        assert root.stream("noise", 1).bytes(64) == root.stream("noise", 1).bytes(64)

    def test_every_part_of_the_context_counts(self):
        root, other = SecretRoot.known(KEY), SecretRoot.known(KEY[::-1])
        contexts = [(), (1,), (2,), ("1",), (b"1",), (1, 0), (0, 1), (1, "x"), (1, b"x")]
        draws = [root.stream("noise", *context).bytes(32) for context in contexts]
        draws += [root.stream("rounding", 1).bytes(32), other.stream("noise", 1).bytes(32)]
        draws += [root.tag("noise", *context) for context in contexts]
        assert len(set(draws)) == len(draws)

    def test_create_then_load(self, tmp_path):
        path = tmp_path / "runs" / "x" / "root"
        made = SecretRoot.create(path)
        assert made.tag("t") == SecretRoot.load(path).tag("t")
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert os.listdir(path.parent) == ["root"]
        assert not made.is_known
        assert not SecretRoot.load(path).is_known

    def test_two_roots_differ(self, tmp_path):
        one, two = SecretRoot.create(tmp_path / "1"), SecretRoot.create(tmp_path / "2")
        assert one.tag("t") != two.tag("t")

    def test_create_never_overwrites(self, tmp_path):
        tag = SecretRoot.create(tmp_path / "root").tag("t")
        with pytest.raises(UsageError, match="never overwritten"):
            SecretRoot.create(tmp_path / "root")
        assert SecretRoot.load(tmp_path / "root").tag("t") == tag
        assert os.listdir(tmp_path) == ["root"]

    def test_create_flushes_file_and_directory(self, tmp_path, monkeypatch):
        flushed, fsync = [], os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.fstat(fd)), fsync(fd)))
        SecretRoot.create(tmp_path / "run" / "root")
        places = [tmp_path, tmp_path / "run" / "root", tmp_path / "run"]
        assert [entry.st_ino for entry in flushed] == [place.stat().st_ino for place in places]
        assert flushed[1].st_size == 40

    def test_create_loses_a_race(self, tmp_path, monkeypatch):
        # Another process makes the file after this one has looked.
        tag = SecretRoot.create(tmp_path / "root").tag("t")
        monkeypatch.setattr(Path, "exists", lambda path: path == tmp_path)
        with pytest.raises(UsageError, match="File exists"):
            SecretRoot.create(tmp_path / "root")
        monkeypatch.undo()
        assert SecretRoot.load(tmp_path / "root").tag("t") == tag
        assert os.listdir(tmp_path) == ["root"]

    def test_create_in_a_place_that_cannot_be(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match="PRIVREC_STATE"):
            SecretRoot.create(tmp_path / "file" / "root")

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
    def test_lax_permissions_are_refused(self, tmp_path, mode):
        SecretRoot.create(tmp_path / "root")
        (tmp_path / "root").chmod(mode)
        with pytest.raises(UsageError, match="chmod 600"):
            SecretRoot.load(tmp_path / "root")

    def test_missing_is_refused(self, tmp_path):
        with pytest.raises(UsageError, match="could not be read"):
            SecretRoot.load(tmp_path / "root")

    @pytest.mark.parametrize(
        "damage", [lambda c: c[:-1], lambda c: c + b"x", lambda c: bytes([c[0] ^ 1]) + c[1:]]
    )
    def test_damage_is_refused(self, tmp_path, damage):
        path = tmp_path / "root"
        SecretRoot.create(path)
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(IntegrityError, match="not a secret of 32 bytes"):
            SecretRoot.load(path)

    def test_known_says_so(self):
        assert SecretRoot.known(b"any").is_known

    def test_empty_key_is_refused(self):
        with pytest.raises(UsageError, match="0 bytes"):
            SecretRoot.known(b"")

    def test_does_not_show_itself(self):
        root = SecretRoot.known(b"secret-key")
        assert repr(root) == "SecretRoot(known)"
        with pytest.raises(TypeError, match="never pickled"):
            pickle.dumps(root)

    def test_any_secret_size(self, tmp_path):
        write_secret(tmp_path / "s", b"abc")
        assert read_secret(tmp_path / "s", 3) == b"abc"
        with pytest.raises(IntegrityError):
            read_secret(tmp_path / "s", 2)


class TestSecureStream:
    def test_goes_on_where_it_stopped(self):
        whole = SecureStream(KEY).bytes(300_000)
        parts = SecureStream(KEY)
        assert parts.bytes(5) + parts.bytes(0) + parts.bytes(200_000) + parts.bytes(99_995) == whole

    def test_never_repeats(self):
        blocks = SecureStream(KEY).uint64(200_000)
        assert len(np.unique(blocks)) == len(blocks)

    @pytest.mark.parametrize("bits", [16, 32, 64])
    def test_words_are_the_bytes(self, bits):
        words = getattr(SecureStream(KEY), f"uint{bits}")(1000)
        assert words.dtype == np.dtype(f"uint{bits}")
        raw = SecureStream(KEY).bytes(1000 * bits // 8)
        assert words.tolist() == np.frombuffer(raw, f"<u{bits // 8}").tolist()

    def test_words_can_be_written_to(self):
        words = SecureStream(KEY).uint16(3)
        words[0] = 1
        assert words[0] == 1

    @pytest.mark.parametrize("size", [0, 1, 2, 3, 8191, 8192, 8193, 20_001])
    def test_normal_of_any_size(self, size):
        deviates = SecureStream(KEY).normal(size)
        assert deviates.shape == (size,)
        assert np.isfinite(deviates).all()

    def test_normal_in_parts_is_the_same(self):
        stream = SecureStream(KEY)
        parts = np.concatenate([stream.normal(8192), stream.normal(16384)])
        assert np.array_equal(parts, SecureStream(KEY).normal(24576))

    @pytest.mark.parametrize(
        ("word", "radius"), [(0, 9.49259), (1 << 20, 7.81006), (2**64 - 1, 0.0), (1 << 63, 1.17741)]
    )
    def test_normal_reaches_far(self, monkeypatch, word, radius):
        # An angle of the same word turns the radius; both parts together give it back.
        stream = SecureStream(KEY)
        monkeypatch.setattr(stream, "uint64", lambda size: np.full(size, word, dtype=np.uint64))
        assert np.hypot(*stream.normal(2)) == pytest.approx(radius, abs=1e-4)

    def test_limit(self, monkeypatch):
        monkeypatch.setattr(randomness, "STREAM_LIMIT", 100)
        stream = SecureStream(KEY)
        stream.bytes(60)
        with pytest.raises(ReleaseRefused, match="40 of 100 left"):
            stream.bytes(41)
        assert len(stream.bytes(40)) == 40

    def test_negative_size_is_refused(self):
        with pytest.raises(ReleaseRefused):
            SecureStream(KEY).bytes(-1)

    def test_refused_after_a_fork(self):
        printed = run("""
            import os
            from privrec.errors import ReleaseRefused
            from privrec.randomness import SecretRoot
            root = SecretRoot.known(b"x")
            stream = root.stream("noise")
            stream.bytes(1)
            if os.fork() == 0:
                try:
                    stream.bytes(1)
                except ReleaseRefused as error:
                    print("refused" if "after a fork" in str(error) else error, flush=True)
                print(len(root.stream("child").bytes(2)), flush=True)
                os._exit(0)
            os.wait()
            print(len(stream.bytes(1)))
        """)
        assert printed.split() == ["refused", "2", "1"]


class TestStateDir:
    def test_order(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("XDG_STATE_HOME", raising=False)
        monkeypatch.delenv("PRIVREC_STATE", raising=False)
        assert state_dir() == tmp_path / ".local" / "state" / "privrec"
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
        assert state_dir() == tmp_path / "xdg" / "privrec"
        monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "own"))
        assert state_dir() == tmp_path / "own"


def test_import_is_light():
    heavy = run("""
        import sys
        import privrec.randomness, privrec.privacy.ledger, privrec.privacy.events
        heavy = {"torch", "scipy", "dp_accounting", "opacus"}
        print(sorted(heavy & set(sys.modules)))
    """)
    assert heavy.strip() == "[]"
