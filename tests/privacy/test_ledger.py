import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from privrec.errors import IntegrityError, ReleaseRefused, UsageError
from privrec.privacy import events
from privrec.privacy import ledger as module
from privrec.privacy.events import RoundEvent
from privrec.privacy.ledger import Charge, Ledger, head_path
from privrec.storage import START, line_of, server_key, sign

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\1")
EVENT = RoundEvent("gaussian", 1.2, 0.05)
OTHER = RoundEvent("gaussian", 2.5, 0.1)
HEADER = {"run_id": "r1", "delta": 1e-5, "privacy_hash": "abc"}
TAG = b"t" * 32


def create(directory):
    return Ledger.create(directory / "ledger.jsonl", header=HEADER, signing_key=KEY)


def reopen(directory, **options):
    options.setdefault("signing_key", KEY)
    return Ledger.open(directory / "ledger.jsonl", **options)


@pytest.fixture
def written(tmp_path):
    """A directory with a ledger of three charges and a commit, not sealed after its header."""
    with create(tmp_path) as ledger:
        ledger.charge(EVENT, 0, 0)
        ledger.commit(0, 0, TAG)
        ledger.charge(EVENT, 1, 0)
        ledger.charge(OTHER, 1, 1)
    return tmp_path


def change(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


class TestEntries:
    def test_are_found_again(self, written):
        with reopen(written) as ledger:
            assert ledger.charges == [Charge(0, 0, EVENT), Charge(1, 0, EVENT), Charge(1, 1, OTHER)]
            assert ledger.counts == {EVENT: 2, OTHER: 1}
            assert ledger.attempts(0) == 1
            assert ledger.attempts(1) == 2
            assert ledger.attempts(2) == 0
            assert ledger.committed(0, 0) == TAG
            assert ledger.committed(1, 0) is None
            assert ledger.entries == 5
            assert ledger.repaired is None

    def test_go_on_after_reopening(self, written):
        with reopen(written) as ledger:
            ledger.charge(EVENT, 2, 0)
            ledger.seal()
        with reopen(written) as ledger:
            assert ledger.counts == {EVENT: 3, OTHER: 1}

    def test_header_says_what_is_claimed(self, written):
        with reopen(written) as ledger:
            own = {"format": 1, "unit": "user", "adjacency": "zero-out"}
            key = {"public_key": KEY.public_key().public_bytes_raw().hex()}
            assert ledger.header == {**HEADER, **own, **key}

    def test_lines_are_json_and_chained(self, written):
        lines = (written / "ledger.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        assert [entry["index"] for entry in entries] == [0, 1, 2, 3, 4]
        assert [entry["previous"] for entry in entries[1:]] == [e["hash"] for e in entries[:-1]]
        kinds = ["header", "charge", "commit", "charge", "charge"]
        assert [entry["kind"] for entry in entries] == kinds

    def test_position_for_a_checkpoint(self, written):
        with reopen(written) as ledger:
            entries, last_hash = ledger.entries, ledger.last_hash
            ledger.charge(EVENT, 2, 0)
            assert ledger.has(entries, last_hash)
            assert not ledger.has(entries - 1, last_hash)
            assert not ledger.has(0, last_hash)
            assert not ledger.has(99, last_hash)


class TestCharge:
    def test_again_costs_nothing(self, written):
        with reopen(written) as ledger:
            size = ledger.path.stat().st_size
            assert not ledger.charge(OTHER, 1, 1)
            assert ledger.path.stat().st_size == size
            assert ledger.charge(OTHER, 1, 2)
            assert ledger.counts == {EVENT: 2, OTHER: 2}

    def test_again_with_another_event_is_refused(self, written):
        with reopen(written) as ledger, pytest.raises(IntegrityError, match="was charged as"):
            ledger.charge(EVENT, 1, 1)

    @pytest.mark.parametrize(("round", "attempt"), [(0, 2), (2, 1), (2, -1), (-1, 1), (-2, 0)])
    def test_gaps_are_refused(self, written, round, attempt):
        with reopen(written) as ledger:
            with pytest.raises(IntegrityError, match="the next one is attempt"):
                ledger.charge(EVENT, round, attempt)
            assert len(ledger.charges) == 3

    def test_a_run_that_has_ended_charges_nothing_new(self, written):
        with reopen(written) as ledger:
            ledger.end(b"m" * 32)
            before = (written / "ledger.jsonl").read_bytes()
            assert not ledger.charge(OTHER, 1, 1)
            with pytest.raises(ReleaseRefused, match="has ended"):
                ledger.charge(EVENT, 2, 0)
        assert (written / "ledger.jsonl").read_bytes() == before

    def test_what_comes_before_the_first_round_is_charged_and_counted_too(self, tmp_path):
        with create(tmp_path) as ledger:
            assert ledger.charge(OTHER, -1, 0)
            assert not ledger.charge(OTHER, -1, 0)
            assert ledger.charge(EVENT, 0, 0)
            ledger.commit(-1, 0, b"t" * 32)
        with reopen(tmp_path) as ledger:
            assert ledger.counts == {EVENT: 1, OTHER: 1}
            assert ledger.committed(-1, 0) == b"t" * 32
            assert [charge.round for charge in ledger.charges] == [-1, 0]

    def test_is_on_disk_and_flushed_before_it_returns(self, tmp_path, monkeypatch):
        flushed, fsync = [], os.fsync
        with create(tmp_path) as ledger:
            identity = ledger.path.stat().st_ino

            def spy(descriptor):
                fsync(descriptor)
                if os.fstat(descriptor).st_ino == identity:
                    flushed.append(ledger.path.read_bytes())

            monkeypatch.setattr(os, "fsync", spy)
            ledger.charge(EVENT, 0, 0)
            assert len(flushed) == 1
            assert json.loads(flushed[-1].splitlines()[-1])["kind"] == "charge"
            ledger.commit(0, 0, TAG)
            assert len(flushed) == 2
            assert json.loads(flushed[-1].splitlines()[-1])["tag"] == TAG.hex()
            assert flushed[-1] == ledger.path.read_bytes()

    def test_full_disk_refuses_the_release(self, tmp_path, monkeypatch):
        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        with create(tmp_path) as ledger:
            ledger.charge(EVENT, 0, 0)
            monkeypatch.setattr(os, "fsync", full)
            with pytest.raises(ReleaseRefused, match="No space left"):
                ledger.charge(EVENT, 1, 0)
            assert ledger.counts == {EVENT: 1}
            monkeypatch.undo()
            # Whether the line arrived is unknown until it is read again.
            with pytest.raises(ReleaseRefused, match="not open for writing"):
                ledger.charge(EVENT, 1, 0)
        with reopen(tmp_path) as ledger:
            assert ledger.counts[EVENT] >= 1

    def test_short_writes_are_completed(self, tmp_path, monkeypatch):
        class Slow(module.FileIO):
            def write(self, content):
                return super().write(bytes(content[:7]))

        monkeypatch.setattr(module, "FileIO", Slow)
        with create(tmp_path) as ledger:
            ledger.charge(EVENT, 0, 0)
        monkeypatch.undo()
        with reopen(tmp_path) as ledger:
            assert ledger.counts == {EVENT: 1}
            assert ledger.repaired is None

    def test_closed_ledger_charges_nothing(self, tmp_path):
        ledger = create(tmp_path)
        ledger.close()
        with pytest.raises(ReleaseRefused, match="not open for writing"):
            ledger.charge(EVENT, 0, 0)


class TestCommit:
    def test_before_the_charge_is_refused(self, written):
        with reopen(written) as ledger, pytest.raises(ReleaseRefused, match="was not charged"):
            ledger.commit(1, 2, TAG)

    def test_of_something_else_is_refused(self, written):
        with reopen(written) as ledger:
            with pytest.raises(ReleaseRefused, match="released something else"):
                ledger.commit(0, 0, b"u" * 32)
            assert ledger.committed(0, 0) == TAG

    def test_again_is_harmless(self, written):
        with reopen(written) as ledger:
            ledger.commit(0, 0, TAG)
            assert ledger.entries == 5


class TestEpsilon:
    @pytest.mark.parametrize("adversary", ["recipients", "server"])
    @pytest.mark.parametrize("accountant", ["pld", "rdp"])
    def test_is_that_of_all_charges(self, written, adversary, accountant):
        with reopen(written, repair=False) as ledger:
            expected = events.epsilon({EVENT: 2, OTHER: 1}, 1e-5, adversary, accountant)
            assert ledger.epsilon(adversary, 1e-5, accountant) == expected

    def test_of_no_charge_is_zero(self, tmp_path):
        with create(tmp_path) as ledger:
            assert ledger.epsilon("recipients", 1e-5) == 0

    def test_dry_run_charges_nothing(self, written):
        with reopen(written) as ledger:
            after = ledger.epsilon_after(OTHER, delta=1e-5, adversary="server")
            assert after == events.epsilon({EVENT: 2, OTHER: 2}, 1e-5, "server")
            assert len(ledger.charges) == 3

    def test_budget(self, written):
        with reopen(written) as ledger:
            arguments = {"delta": 1e-5, "adversary": "recipients"}
            after = ledger.epsilon_after(EVENT, **arguments)
            assert after > ledger.epsilon(**arguments)
            nothing = RoundEvent("none", 0, 0.05)
            assert ledger.epsilon_after(nothing, **arguments) == float("inf")


class TestAlteration:
    def refused(self, directory, match, **options):
        before = (directory / "ledger.jsonl").read_bytes()
        with pytest.raises(IntegrityError, match=match):
            reopen(directory, **options)
        assert (directory / "ledger.jsonl").read_bytes() == before

    @pytest.mark.parametrize(
        ("old", "new", "line"),
        [
            (b'"noise_multiplier":1.2', b'"noise_multiplier":9.2', 2),
            (b'"noise_multiplier":2.5', b'"noise_multiplier":9.5', 5),
            (b'"delta":1e-05', b'"delta":1e-02', 1),
            (b'"tag":"74', b'"tag":"75', 3),
            (b'"round":1', b'"round":01', 4),
            (b'"index":3', b'"index": 3', 4),
            (b'"index":4', b'"index":NaN', 5),
            (b'{"attempt":1', b'{"attempt":1,"attempt":1', 5),
            (b'{"attempt":1', b'"attempt":1', 5),
            (b"\n", b"\n\n", 2),
            (b"\n", b"\r\n", 1),
        ],
    )
    def test_of_a_line_is_refused(self, written, old, new, line):
        change(written / "ledger.jsonl", old, new)
        self.refused(written, f"line {line} was altered")

    def test_is_refused_without_the_last_newline_too(self, written):
        # An editor that strips it must not turn an alteration into a crash that is repaired.
        change(written / "ledger.jsonl", b'"noise_multiplier":2.5', b'"noise_multiplier":9.5')
        path = written / "ledger.jsonl"
        path.write_bytes(path.read_bytes().rstrip(b"\n"))
        self.refused(written, "line 5 was altered")

    @pytest.mark.parametrize("place", [1, 2, 3])
    def test_removed_line(self, written, place):
        path = written / "ledger.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:place] + lines[place + 1 :]))
        self.refused(written, f"line {place + 1} does not follow")

    def test_swapped_and_repeated_lines(self, written):
        path = written / "ledger.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:3], lines[4], lines[3]]))
        self.refused(written, "line 4 does not follow")
        path.write_bytes(b"".join([*lines, lines[4]]))
        self.refused(written, "line 6 does not follow")

    @pytest.mark.parametrize("cut", [0, 1, 2])
    def test_end_cut_away_after_sealing(self, written, cut):
        with reopen(written) as ledger:
            ledger.seal()
        path = written / "ledger.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[: -1 - cut]) + lines[-1 - cut][:20])
        self.refused(written, "5 were signed: its end was cut away")

    def forge(self, written, entries):
        """Lines that say what they like, with a chain that is right."""
        path, previous = written / "ledger.jsonl", START
        lines = []
        for index, entry in enumerate(entries):
            lines.append(line_of({**entry, "index": index, "previous": previous}))
            previous = json.loads(lines[-1])["hash"]
        path.write_bytes(b"".join(lines))

    def entries(self, written):
        lines = (written / "ledger.jsonl").read_bytes().splitlines()
        named = {"index", "previous", "hash"}
        return [{k: v for k, v in json.loads(x).items() if k not in named} for x in lines]

    def test_rewritten_chain_after_sealing(self, written):
        with reopen(written) as ledger:
            ledger.seal()
        entries = self.entries(written)
        entries[1]["event"]["noise_multiplier"] = 100.0
        self.forge(written, entries)
        self.refused(written, "line 5 is not the one that was signed")

    def test_line_with_a_right_hash_of_its_own(self, written):
        path = written / "ledger.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        entry = json.loads(lines[1])
        entry["event"]["noise_multiplier"] = 100.0
        lines[1] = line_of({name: entry[name] for name in entry if name != "hash"})
        path.write_bytes(b"".join(lines))
        self.refused(written, "line 3 does not follow")

    @pytest.mark.parametrize(
        "entry",
        [
            {"kind": "charge", "round": 0, "attempt": 0, "event": EVENT.to_json()},
            {"kind": "commit", "round": 9, "attempt": 0, "tag": "00"},
            {"kind": "commit", "round": 1, "attempt": 0, "tag": "xx"},
            {"kind": "commit", "round": 1, "attempt": 0},
            {"kind": "charge", "round": 2, "attempt": 0, "event": {}},
            {"kind": "charge", "round": 2, "attempt": 0, "event": 3},
            {"kind": "charge", "round": "x", "attempt": 0, "event": EVENT.to_json()},
            {"kind": "refund", "round": 1, "attempt": 0},
            {"kind": "header", "body": {}},
            {},
        ],
    )
    def test_entry_of_another_shape(self, written, entry):
        self.forge(written, [*self.entries(written), entry])
        self.refused(written, "line 6 is no entry that this version writes")

    @pytest.mark.parametrize("change", [{"body": {}}, {"body": 3}, {"kind": "charge"}])
    def test_header_of_another_shape(self, written, change):
        header, *rest = self.entries(written)
        self.forge(written, [{**header, **change}, *rest])
        self.refused(written, "line 1 is no entry")

    def test_newer_format(self, written):
        header, *rest = self.entries(written)
        header["body"]["format"] = 2
        self.forge(written, [header, *rest])
        self.refused(written, "a header of format 2, and 1 is read here")

    def test_replaced_as_a_whole_by_another_key(self, written, tmp_path_factory):
        other = tmp_path_factory.mktemp("other")
        with Ledger.create(other / "ledger.jsonl", header=HEADER, signing_key=OTHER_KEY):
            pass
        for name in ("ledger.jsonl", "ledger.head.json"):
            (written / name).write_bytes((other / name).read_bytes())
        self.refused(written, "it belongs to the key")
        self.refused(
            written, "it belongs to the key", signing_key=None, public_key=KEY.public_key()
        )
        # Without the key, only the file's own word is there to be checked.
        assert reopen(written, signing_key=None, repair=False).entries == 1

    def test_header_without_key(self, written):
        header, *rest = self.entries(written)
        header["body"]["public_key"] = "zz"
        self.forge(written, [header, *rest])
        self.refused(written, "names no key", signing_key=None)

    @pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"{", b"\xff", b'{"entries":1}'])
    def test_head_that_is_none(self, written, content):
        head_path(written / "ledger.jsonl").write_bytes(content)
        self.refused(written, "not a signed head")

    def test_head_missing(self, written):
        head_path(written / "ledger.jsonl").unlink()
        self.refused(written, "the signed head could not be read")

    @pytest.mark.parametrize("name", ["entries", "last_hash", "signature"])
    def test_head_altered(self, written, name):
        path = head_path(written / "ledger.jsonl")
        head = json.loads(path.read_bytes())
        other = {"entries": 0, "last_hash": "0" * 64, "signature": head["signature"][::-1]}
        path.write_text(json.dumps({**head, name: other[name]}))
        self.refused(written, "not signed with the key")

    def test_head_of_an_entry_that_cannot_be(self, written):
        path = head_path(written / "ledger.jsonl")
        claim = {"format": 1, "entries": 0, "last_hash": "0" * 64}
        path.write_text(json.dumps(sign("ledger head", claim, KEY)))
        self.refused(written, "is not the one that was signed")

    @pytest.mark.parametrize("content", [b"", b"\n", b"{", b"\x00" * 50, b"[" * 100_000])
    def test_file_without_header(self, written, content):
        (written / "ledger.jsonl").write_bytes(content)
        self.refused(written, "no header line|line 1 was altered")

    @settings(max_examples=60)
    @given(st.data())
    def test_of_any_byte_after_sealing(self, data):
        with tempfile.TemporaryDirectory() as name, create(Path(name)) as ledger:
            for index in range(3):
                ledger.charge(EVENT, index, 0)
            ledger.seal()
            ledger.close()
            content = bytearray(ledger.path.read_bytes())
            place = data.draw(st.integers(0, len(content) - 1))
            content[place] = data.draw(st.integers(0, 255).filter(lambda b: b != content[place]))
            ledger.path.write_bytes(content)
            with pytest.raises(IntegrityError):
                reopen(Path(name))


class TestCrash:
    def test_cut_off_line_is_removed(self, written):
        path = written / "ledger.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole + b'{"attempt":0,"eve')
        with reopen(written) as ledger:
            assert "17 bytes that a crash cut off was removed" in ledger.repaired
            assert path.read_bytes() == whole
            ledger.charge(EVENT, 2, 0)
        with reopen(written) as ledger:
            assert ledger.counts == {EVENT: 3, OTHER: 1}
            assert ledger.repaired is None

    def test_missing_newline_is_added(self, written):
        path = written / "ledger.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with reopen(written) as ledger:
            assert ledger.repaired == "the missing end of the last line was added"
            assert path.read_bytes() == whole
            assert ledger.counts == {EVENT: 2, OTHER: 1}
            ledger.charge(EVENT, 2, 0)
        assert reopen(written, repair=False).counts == {EVENT: 3, OTHER: 1}

    @pytest.mark.parametrize("tail", [b"\0" * 90, b'{"attempt":0' + b"\0" * 60 + b"}\n"])
    def test_blocks_that_were_never_written(self, written, tail):
        path = written / "ledger.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole + tail)
        with reopen(written) as ledger:
            assert ledger.repaired is not None
            assert path.read_bytes() == whole

    def test_reading_leaves_the_file_alone(self, written):
        path = written / "ledger.jsonl"
        path.write_bytes(path.read_bytes() + b'{"atte')
        cut = path.read_bytes()
        ledger = reopen(written, repair=False)
        assert ledger.counts == {EVENT: 2, OTHER: 1}
        assert ledger.repaired is not None
        assert path.read_bytes() == cut
        with pytest.raises(ReleaseRefused):
            ledger.charge(EVENT, 2, 0)

    @settings(max_examples=60)
    @given(st.data())
    def test_at_any_byte_shows_all_that_was_acknowledged(self, data):
        """Write at random, cut anywhere after the last seal, open, go on, and open again."""
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            path = directory / "ledger.jsonl"
            acknowledged = []  # (bytes of the file by then, charge), in order
            with create(directory) as ledger:
                sealed = path.stat().st_size
                for _ in range(data.draw(st.integers(0, 8))):
                    index = data.draw(st.integers(0, 3))
                    event = data.draw(st.sampled_from([EVENT, OTHER]))
                    charge = Charge(index, ledger.attempts(index), event)
                    ledger.charge(event, charge.round, charge.attempt)
                    acknowledged.append((path.stat().st_size, charge))
                    if data.draw(st.booleans()):
                        ledger.commit(charge.round, charge.attempt, TAG)
                    if data.draw(st.integers(0, 4)) == 0:
                        ledger.seal()
                        sealed = path.stat().st_size
            cut = data.draw(st.integers(sealed, path.stat().st_size))
            with path.open("rb+") as file:
                file.truncate(cut)
            paid = [charge for size, charge in acknowledged if size <= cut]
            with reopen(directory) as ledger:
                # One more when the cut took nothing of its line but the end of it.
                assert ledger.charges[: len(paid)] == paid
                assert len(ledger.charges) <= len(paid) + (cut + 1 in dict(acknowledged))
                ledger.charge(EVENT, 9, 0)
                found = ledger.charges
            with reopen(directory) as ledger:
                assert ledger.charges == found
                assert ledger.repaired is None

    def test_killed_while_it_writes(self, tmp_path):
        code = """
            import sys
            from pathlib import Path
            from privrec.privacy.events import RoundEvent
            from privrec.privacy.ledger import Ledger
            from privrec.storage import server_key
            directory = Path(sys.argv[1])
            key = server_key(directory / "key")
            path = directory / "ledger.jsonl"
            if path.exists():
                ledger = Ledger.open(path, signing_key=key)
            else:
                ledger = Ledger.create(path, header={}, signing_key=key)
            while True:
                index = len(ledger.charges)
                ledger.charge(RoundEvent("gaussian", 1.0), index, 0)
                print(index, flush=True)
                ledger.commit(index, 0, b"tag")
                ledger.seal()
        """
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
        for kill in range(5):
            with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                lines = [process.stdout.readline() for _ in range(3 + 2 * kill)]
                process.send_signal(signal.SIGKILL)
                lines += process.stdout.readlines()
            shown = [int(line) for line in lines if line.endswith(b"\n")]
            key = server_key(tmp_path / "key")
            with Ledger.open(tmp_path / "ledger.jsonl", signing_key=key) as ledger:
                assert len(shown) >= 3
                assert shown[-1] < len(ledger.charges) <= shown[-1] + 2


class TestFiles:
    def test_creating_flushes_the_directory(self, tmp_path, monkeypatch):
        flushed, fsync = [], os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda fd: (flushed.append(os.fstat(fd).st_ino), fsync(fd))
        )
        create(tmp_path).close()
        assert flushed[0] == (tmp_path / "ledger.jsonl").stat().st_ino
        assert flushed[1] == (tmp_path / "ledger.head.json").stat().st_ino
        assert flushed[2] == tmp_path.stat().st_ino

    def test_sealing_replaces_the_head_as_a_whole(self, written, monkeypatch):
        with reopen(written) as ledger:
            before = head_path(ledger.path).read_bytes()
            replace = Path.replace

            def crash(self, target):
                assert head_path(ledger.path).read_bytes() == before
                raise OSError(errno.EIO, "Input/output error")

            monkeypatch.setattr(Path, "replace", crash)
            with pytest.raises(ReleaseRefused, match="Input/output error"):
                ledger.seal()
            assert head_path(ledger.path).read_bytes() == before
            monkeypatch.setattr(Path, "replace", replace)
            ledger.seal()
            assert json.loads(head_path(ledger.path).read_bytes())["entries"] == 5

    def test_never_overwrites(self, written):
        with pytest.raises(UsageError, match="a new ledger cannot be made here"):
            create(written)
        assert reopen(written, repair=False).entries == 5

    def test_no_directory(self, tmp_path):
        with pytest.raises(UsageError, match="cannot be made here"):
            create(tmp_path / "missing")

    @pytest.mark.parametrize("repair", [True, False])
    def test_no_ledger(self, tmp_path, repair):
        with pytest.raises((UsageError, IntegrityError), match=r"ledger\..*No such file"):
            reopen(tmp_path, repair=repair)

    def test_one_writer_at_a_time(self, written):
        with reopen(written) as ledger:
            with pytest.raises(UsageError, match="another process writes"):
                reopen(written)
            assert reopen(written, repair=False).entries == ledger.entries
        with reopen(written):
            pass

    def test_a_refused_ledger_is_let_go(self, written):
        change(written / "ledger.jsonl", b'"round":1', b'"round":2')
        for _ in range(2):
            with pytest.raises(IntegrityError):
                reopen(written)

    def test_sealing_needs_the_key(self, written):
        ledger = reopen(written, signing_key=None)
        with ledger, pytest.raises(UsageError, match="needs the signing key"):
            ledger.seal()
        with pytest.raises(UsageError, match="opened for writing"):
            reopen(written, repair=False).seal()

    @pytest.mark.parametrize("name", ["unit", "adjacency", "format", "public_key"])
    def test_header_cannot_set_what_is_added(self, tmp_path, name):
        with Ledger.create(tmp_path / "l", header={name: "x"}, signing_key=KEY) as ledger:
            assert ledger.header[name] != "x"

    @pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
    def test_header_holds_plain_values(self, tmp_path, value):
        with pytest.raises(UsageError, match="plain, finite JSON values"):
            Ledger.create(tmp_path / "l", header={"x": value}, signing_key=KEY)
        assert not list(tmp_path.iterdir())

    def test_a_full_disk_at_the_start_lets_the_file_go(self, tmp_path, monkeypatch):
        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ReleaseRefused, match="No space left"):
            create(tmp_path)


class TestServerKey:
    def test_is_made_once(self, tmp_path):
        path = tmp_path / "runs" / "r1" / "key"
        first = server_key(path)
        assert path.stat().st_mode & 0o777 == 0o600
        assert server_key(path).private_bytes_raw() == first.private_bytes_raw()
        assert server_key(tmp_path / "other").private_bytes_raw() != first.private_bytes_raw()

    def test_lax_permissions(self, tmp_path):
        server_key(tmp_path / "key")
        (tmp_path / "key").chmod(0o644)
        with pytest.raises(UsageError, match="chmod 600"):
            server_key(tmp_path / "key")

    def test_damage(self, tmp_path):
        server_key(tmp_path / "key")
        (tmp_path / "key").write_bytes(b"x" * 40)
        with pytest.raises(IntegrityError):
            server_key(tmp_path / "key")


class TestExamples:
    """Charges of another unit, which nothing adds to those of users."""

    def test_they_are_found_again_and_never_added(self, tmp_path):
        with create(tmp_path) as ledger:
            for round in range(3):
                assert ledger.charge(EVENT, round, 0, OTHER)
            ledger.seal()
        lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
        kinds = [json.loads(line)["kind"] for line in lines]
        assert kinds == ["header", *["examples", "charge"] * 3]
        with reopen(tmp_path) as ledger:
            assert ledger.counts == {EVENT: 3}
            assert ledger.examples == {OTHER: 3}
            assert ledger.epsilon("server", 1e-5) == events.epsilon({EVENT: 3}, 1e-5, "server")
            spent = events.epsilon(ledger.examples, 1e-6, "server")
            # Sampling of devices amplifies nothing at this level.
            assert spent == events.epsilon({RoundEvent("gaussian", 2.5): 3}, 1e-6, "server")

    def test_a_repeated_charge_is_one(self, tmp_path):
        with create(tmp_path) as ledger:
            ledger.charge(EVENT, 0, 0, OTHER)
            assert not ledger.charge(EVENT, 0, 0, OTHER)
            assert ledger.examples == {OTHER: 1}
            for other in (EVENT, None):
                with pytest.raises(IntegrityError, match="at example level"):
                    ledger.charge(EVENT, 0, 0, other)

    def test_they_are_not_added_to_a_charge(self, tmp_path):
        with create(tmp_path) as ledger:
            ledger.charge(EVENT, 0, 0)
            with pytest.raises(IntegrityError, match="at example level"):
                ledger.charge(EVENT, 0, 0, OTHER)

    def test_a_crash_between_the_two_entries_counts_nothing_twice(self, tmp_path):
        with create(tmp_path) as ledger:
            ledger.charge(EVENT, 0, 0, OTHER)
        path = tmp_path / "ledger.jsonl"
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
        with reopen(tmp_path) as ledger:
            assert (ledger.entries, ledger.attempts(0)) == (2, 0)
            assert not ledger.counts
            assert not ledger.examples
            for other in (EVENT, None):
                with pytest.raises(IntegrityError, match="at example level"):
                    ledger.charge(EVENT, 0, 0, other)
            assert ledger.charge(EVENT, 0, 0, OTHER)
            assert ledger.examples == {OTHER: 1}
        with reopen(tmp_path) as ledger:
            assert ledger.entries == 3
            assert ledger.examples == {OTHER: 1}

    def test_an_ended_run_takes_none(self, tmp_path):
        with create(tmp_path) as ledger:
            ledger.end(b"m")
            with pytest.raises(ReleaseRefused, match="ended"):
                ledger.charge(EVENT, 0, 0, OTHER)

    def test_an_altered_entry_shows(self, tmp_path):
        with create(tmp_path) as ledger:
            ledger.charge(EVENT, 0, 0, OTHER)
        change(tmp_path / "ledger.jsonl", b'"unit":"example"', b'"unit":"users__"')
        with pytest.raises(IntegrityError, match="altered"):
            reopen(tmp_path)
