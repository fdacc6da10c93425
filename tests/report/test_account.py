"""Reports of training that is not ours: Opacus, a composition of dp-accounting, a secure sum.

A forger edits any file, mends every hash and renders the pages again, and has not the ledger's key.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call, done
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from dp_accounting.dp_event import (
    ComposedDpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from forging import chained, entries_of, head_of, signed_by
from pydantic import ValidationError
from torch.utils.data import DataLoader, TensorDataset

from privrec import LazyDPSGD, Ledger
from privrec.errors import IntegrityError, UsageError
from privrec.randomness import kept_key
from privrec.report.build import build_account
from privrec.report.model import Report, json_schema
from privrec.report.render import to_html, to_json, to_markdown, verification, write
from privrec.report.verify import Verdict, verify
from privrec.storage import sign

Content = dict[str, Any]
Forge = Callable[[Path], None]
FORGER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
FACTS = """
name = "A test"
operator = "A \\"team\\""
population = 2000
clip_norm = 1.0
releases = ["The model."]
runs_before = 0
tuning = "None."
"""


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(autouse=True)
def no_kept_keys(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of this module's ledgers are kept, and no others."""
    monkeypatch.setenv("PRIVREC_STATE", str(state))


def with_opacus(path: Path) -> None:
    from opacus import PrivacyEngine  # seconds, in every process that only collects tests

    rows = torch.arange(2000.0).reshape(400, 5) / 2000
    loader = DataLoader(TensorDataset(rows, (rows[:, 0] > 0.5).float()), batch_size=40)
    plain = torch.nn.Linear(5, 1)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=plain, optimizer=torch.optim.SGD(plain.parameters(), lr=0.5), data_loader=loader,
        noise_multiplier=1.5, max_grad_norm=1.0,
    )  # fmt: skip
    with Ledger.create(
        path, unit="example", adjacency="add-or-remove", delta=1e-5, budget=6.0
    ) as ledger:
        ledger.attach(optimizer, sample_rate=1 / len(loader))
        for batch, target in loader:
            optimizer.zero_grad()
            logits = model(batch)[:, 0]
            torch.nn.functional.binary_cross_entropy_with_logits(logits, target).backward()
            optimizer.step()
        ledger.end()


def with_dp_accounting(path: Path) -> None:
    step = PoissonSampledDpEvent(0.05, GaussianDpEvent(4.0))
    whole = ComposedDpEvent([SelfComposedDpEvent(step, 10), LaplaceDpEvent(5.0)])
    with Ledger.create(path, unit="household", delta=1e-5) as ledger:
        ledger.charge(whole)
        ledger.end()


def with_a_loop(path: Path) -> None:
    with Ledger.create(path, unit="ride", adjacency="replace-one", delta=1e-5) as ledger:
        for _ in range(4):
            ledger.charge(GaussianDpEvent(6.0))
        ledger.end()


MADE = {"opacus": with_opacus, "dp": with_dp_accounting, "loop": with_a_loop}


@pytest.fixture(scope="module")
def honest(state: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind of training, with its ledger and a report of it."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRIVREC_STATE", str(state))
        for name, make in MADE.items():
            folder = folders[name] = tmp_path_factory.mktemp(name)
            (folder / "facts.toml").write_text(FACTS)
            make(folder / "led.jsonl")
            write(build_account(folder / "led.jsonl", folder / "facts.toml"), folder)
    return folders


def judged(folder: Path) -> Verdict:
    return verify(folder / "led.report.json")


def reported(folder: Path) -> Report:
    return Report.model_validate_json((folder / "led.report.json").read_text("utf-8"))


# --------------------------------------------------------------------------- honest reports


@pytest.mark.parametrize("name", MADE)
def test_an_honest_report_holds(honest: dict[str, Path], name: str) -> None:
    verdict = judged(honest[name])
    assert verdict.mismatches == []
    assert verdict.anchored
    assert "signature of what the operator told" in verdict.checked
    report = reported(honest[name])
    with Ledger.open(honest[name] / "led.jsonl", repair=False) as ledger:
        spent = [ledger.epsilon(each) for each in ("recipients", "server")]  # type: ignore[arg-type]
    assert [each.epsilon for each in report.privacy.adversaries] == spent
    assert report.privacy.private
    assert f"{report.privacy.unit} level" in report.claim
    assert report.warnings[0].title == "Accounted, and not trained, by privrec"
    assert "randomness" in report.warnings[1].text
    assert "Not known" in report.mechanism.randomness  # type: ignore[union-attr]
    assert 'A "team"' in report.privacy.trust


def test_a_report_satisfies_the_schema(honest: dict[str, Path]) -> None:
    import jsonschema

    for folder in honest.values():
        text = (folder / "led.report.json").read_text("utf-8")
        jsonschema.validate(json.loads(text), json_schema())
        for page in ("led.report.html", "led.report.md"):
            shown = (folder / page).read_text("utf-8")
            assert "simulated" not in shown.lower().replace("simulated or deployed", "")
            assert "a example" not in shown


def test_the_printed_check_gives_the_same(
    honest: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert verification(reported(honest["dp"])) is None
    for name in ("opacus", "loop"):
        report = reported(honest[name])
        exec(verification(report) or "", {})  # noqa: S102
        found = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
        said = [each.epsilon for each in report.privacy.adversaries]
        assert found == pytest.approx(said, rel=0.02)


def test_the_ledger_names_its_report_and_stands_by_itself(
    honest: dict[str, Path], tmp_path: Path
) -> None:
    assert verify(honest["loop"] / "led.jsonl").holds
    for name in ("led.jsonl", "led.head.json"):
        shutil.copy(honest["loop"] / name, tmp_path)
    alone = verify(tmp_path / "led.jsonl")
    assert alone.holds
    assert any("ε against recipients is" in text for text in alone.checked)
    entries = entries_of(tmp_path / "led.jsonl")
    chained(tmp_path / "led.jsonl", [entries[0], *entries[2:]])
    assert not verify(tmp_path / "led.jsonl").holds
    with pytest.raises(UsageError, match="name a report or a ledger"):
        verify(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("left_out", "lacks"),
    [
        ("population", ("sampling", "accounting")),
        ("clip_norm", ("mechanism",)),
        ("releases", ("outputs",)),
        ("tuning", ("outside_the_ledger",)),
    ],
)
def test_without_its_facts_there_is_no_claim(
    honest: dict[str, Path], tmp_path: Path, left_out: str, lacks: tuple[str, ...]
) -> None:
    lines = [line for line in FACTS.splitlines() if not line.startswith(left_out)]
    (tmp_path / "facts.toml").write_text("\n".join(lines))
    report = build_account(honest["loop"] / "led.jsonl", tmp_path / "facts.toml")
    assert report.missing == lacks
    assert not report.privacy.private
    assert all(each.epsilon is None for each in report.privacy.adversaries)
    assert "makes no privacy claim" in report.claim
    assert "What was charged comes to ε =" in report.claim


def test_without_facts_all_is_not_known(honest: dict[str, Path], tmp_path: Path) -> None:
    for name in ("led.jsonl", "led.head.json"):
        shutil.copy(honest["opacus"] / name, tmp_path)
    write(build_account(tmp_path / "led.jsonl"), tmp_path)
    assert judged(tmp_path).holds
    assert "facts of the operator: none were told" in judged(tmp_path).unchecked
    assert not reported(tmp_path).privacy.private


@pytest.mark.parametrize(("rate", "warned"), [(0.05, False), (0.005, True), (1.0, False)])
def test_a_rate_too_low_for_the_batches_is_warned_of(
    tmp_path: Path, rate: float, warned: bool
) -> None:
    optimizer = LazyDPSGD(
        torch.nn.Linear(2, 1), lr=0.1, noise_multiplier=2.0, max_grad_norm=1.0,
        expected_batch_size=100,
    )  # fmt: skip
    with Ledger.create(tmp_path / "led.jsonl", unit="example", delta=1e-5) as ledger:
        ledger.attach(optimizer, sample_rate=rate)
        optimizer.step()
        ledger.end()
    optimizer.close()
    (tmp_path / "facts.toml").write_text(FACTS)
    report = build_account(tmp_path / "led.jsonl", tmp_path / "facts.toml")
    found = [each for each in report.warnings if "too low" in each.title]
    assert bool(found) == warned
    if warned:
        assert "which is 10 of 2,000 examples, and the training expected 100" in found[0].text
        write(report, tmp_path)
        edited(lambda content: content["warnings"].pop(1))(tmp_path)
        assert not judged(tmp_path).holds


def test_no_noise_is_no_guarantee(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "led.jsonl", delta=1e-5) as ledger:
        ledger.charge(NonPrivateDpEvent())
        ledger.end()
    (tmp_path / "facts.toml").write_text(FACTS)
    report = build_account(tmp_path / "led.jsonl", tmp_path / "facts.toml")
    assert "has no privacy guarantee" in report.claim
    assert report.warnings[0].title == "No privacy guarantee"
    assert report.privacy.noise == "none"


def test_a_ledger_that_goes_on_says_so_and_its_old_state_is_known_here(tmp_path: Path) -> None:
    path, files = tmp_path / "led.jsonl", ("led.jsonl", "led.head.json")
    with Ledger.create(path, delta=1e-5) as ledger:
        ledger.charge(GaussianDpEvent(5.0))
    old = {name: (tmp_path / name).read_bytes() for name in files}
    write(build_account(path), tmp_path)
    assert "The ledger goes on" in [each.title for each in reported(tmp_path).warnings]
    assert judged(tmp_path).holds
    with Ledger.resume(path) as ledger:
        ledger.charge(GaussianDpEvent(5.0))
    assert not judged(tmp_path).holds  # the report is of less
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    assert "its end was cut away" in judged(tmp_path).mismatches[0].reason
    with pytest.raises(IntegrityError):
        build_account(path)


def test_facts_are_signed_where_the_key_is(
    honest: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, facts = honest["loop"] / "led.jsonl", honest["loop"] / "facts.toml"
    with Ledger.open(path, repair=False) as ledger:
        key = kept_key(ledger.header["run_id"])
    assert key is not None
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path))
    with pytest.raises(UsageError, match="does not keep"):
        build_account(path, facts)
    with pytest.raises(UsageError, match="no key to trust"):
        judged(honest["loop"])
    assert verify(honest["loop"] / "led.report.json", key=key.public_key()).holds
    assert verify(honest["loop"] / "led.report.json", trust_named_key=True).holds


@pytest.mark.parametrize(
    "text", ["epsilon = 1.0", "population = 0", "name = ", 'clip_norm = "big"', "population = 1.5"]
)
def test_facts_that_make_no_sense_are_refused(
    honest: dict[str, Path], tmp_path: Path, text: str
) -> None:
    (tmp_path / "facts.toml").write_text(text)
    with pytest.raises(UsageError, match=r"facts\.toml"):
        build_account(honest["loop"] / "led.jsonl", tmp_path / "facts.toml")


def test_the_key_of_a_ledger_is_printed(
    honest: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = honest["opacus"] / "led.jsonl"
    key = done("report", "key", ledger).stdout.strip()
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path))
    done("report", "verify", ledger, "--key", key)
    assert "does not keep its key" in call("report", "key", ledger).stderr


def test_the_command_line_writes_and_verifies(honest: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(honest["dp"], folder)
    (folder / "led.report.html").unlink()
    for words in (
        ["write", str(folder / "led.jsonl"), "--facts", str(folder / "facts.toml")],
        [str(folder / "led.jsonl"), "--facts", str(folder / "facts.toml")],
        ["verify", str(folder / "led.report.json")],
        ["verify", str(folder / "led.jsonl")],
    ):
        done("report", *words)
    assert (folder / "led.report.html").exists()


# --------------------------------------------------------------------------- forgeries


def edited(change: Callable[[Content], Any]) -> Forge:
    """Change the report, and write the pages from it."""

    def forge(folder: Path) -> None:
        content = json.loads((folder / "led.report.json").read_text("utf-8"))
        change(content)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / "led.report.json").write_text(text, "utf-8")
        try:
            report = Report.model_validate_json(text)
        except ValidationError:
            return
        pages = {"json": to_json, "html": to_html, "md": to_markdown}
        for ending, text_of in pages.items():
            (folder / f"led.report.{ending}").write_text(text_of(report), "utf-8")

    return forge


def told(**changes: Any) -> Forge:
    """Other facts, with every sentence that follows from them, and the old signature or none."""

    def forge(folder: Path) -> None:
        from privrec.report.derive import derive
        from privrec.report.facts import read_account

        old = reported(folder)
        assert old.told is not None
        signature = changes.get("signature", old.told_signature)
        facts = {name: value for name, value in changes.items() if name != "signature"}
        new = old.told.model_copy(update=facts)
        account = read_account(folder / "led.jsonl", told=new)
        account = read_account(folder / "led.jsonl", account.ledger.public_key, new)
        if signature == "forged":
            signature = sign("facts", account.statement, FORGER)["signature"]
        write(derive(account, {"told": new, "told_signature": signature}), folder)

    return forge


def relogged(change: Callable[[list[Content]], Any], sign_by: str = "head") -> Forge:
    """Change the ledger, mend its chain, and adapt the head or sign it with another key."""

    def forge(folder: Path) -> None:
        path = folder / "led.jsonl"
        entries = entries_of(path)
        entries = change(entries) or entries
        if sign_by == "own":
            entries[0]["body"]["public_key"] = FORGER.public_key().public_bytes_raw().hex()
        last = chained(path, entries)
        if sign_by == "own":
            signed_by(path, len(entries), last, FORGER)
        else:
            head = json.loads(head_of(path).read_text())
            head |= {"entries": len(entries), "last_hash": last}
            head_of(path).write_text(json.dumps(head))
        try:
            write(build_account(path), folder)
        except Exception:  # a forger who fails has forged nothing more
            return

    return forge


def less_noise_charged(entries: list[Content]) -> None:
    for entry in entries:
        if entry["kind"] == "charge":
            entry["event"] = {"mechanism": "gaussian", "noise_multiplier": 50.0, "sampling_rate": 1}


def page(folder: Path) -> None:
    text = (folder / "led.report.html").read_text("utf-8")
    (folder / "led.report.html").write_text(text.replace("<dd>", "<dd>0.", 1), "utf-8")


def another_ledger(folder: Path) -> None:
    """A report of a cheaper ledger that its own key signed, beside this one."""
    other = folder / "other"
    other.mkdir()
    (other / "facts.toml").write_text(FACTS)
    with Ledger.create(other / "led.jsonl", unit="example", delta=1e-5) as ledger:
        ledger.charge(GaussianDpEvent(50.0))
        ledger.end()
    write(build_account(other / "led.jsonl", other / "facts.toml"), folder)
    shutil.rmtree(other)


def older_state(folder: Path) -> None:
    """The first charges alone, with a head that the key signed for them then, and their report."""
    path = folder / "led.jsonl"
    with Ledger.open(path, repair=False) as ledger:
        key = kept_key(ledger.header["run_id"])
    assert key is not None
    entries = entries_of(path)[:2]
    signed_by(path, len(entries), chained(path, entries), key)


FORGERIES: dict[str, Forge] = {
    # ----- the report
    "ε lowered": edited(lambda c: c["privacy"]["adversaries"][0].update(epsilon=0.1)),
    "ε, samples known, lowered": edited(
        lambda c: c["privacy"]["adversaries"][1].update(epsilon=0.1)
    ),
    "claim reworded": edited(lambda c: c.update(claim="It is private.")),
    "unit changed": edited(lambda c: c["privacy"].update(unit="user")),
    "adjacency changed": edited(lambda c: c["privacy"].update(adjacency="replace-one")),
    "δ changed": edited(lambda c: c["privacy"].update(delta=1e-9)),
    "budget invented": edited(lambda c: c["privacy"].update(budget=1.0)),
    "warning removed": edited(lambda c: c["warnings"].pop(0)),
    "events dropped": edited(lambda c: c["privacy"]["events"].clear()),
    "curve lowered": edited(lambda c: c["curves"][0]["points"][-1].update(value=0.01)),
    "accuracy invented": edited(
        lambda c: c["accuracy"].update(
            holdout="test",
            metrics=[{"key": "hr@10", "name": "HR@10", "protocol": "all", "value": 0.9, "low": None,
                      "high": None, "baselines": {}}],
        )
    ),
    "said to be of a run": edited(lambda c: c.update(told=None, told_signature=None)),
    "page": page,
    # ----- what the operator told
    "population raised": told(population=10**6),
    "clip norm lowered": told(clip_norm=0.01),
    "generator invented": told(randomness="AES-256 in counter mode."),
    "facts signed with another key": told(runs_before=3, signature="forged"),
    "facts not signed": told(population=10**6, signature=None),
    # ----- the ledger
    "charge removed": relogged(lambda e: [e[0], *e[2:]]),
    "noise raised": relogged(less_noise_charged),
    "δ of the header": relogged(lambda e: e[0]["body"].update(delta=1e-3)),
    "unit of the header": relogged(lambda e: e[0]["body"].update(unit="node")),
    "budget of the header": relogged(lambda e: e[0]["body"].update(budget=1.0)),
    "end removed": relogged(lambda e: e[:-1]),
    "made anew with another key": relogged(less_noise_charged, "own"),
    "an older state": older_state,
    "the report of another ledger": another_ledger,
    "no head": lambda folder: head_of(folder / "led.jsonl").unlink(),
    "no ledger": lambda folder: (folder / "led.jsonl").unlink(),
}  # fmt: skip


@pytest.mark.parametrize("training", ["opacus", "dp"])
@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_refused(
    honest: dict[str, Path], tmp_path: Path, name: str, training: str
) -> None:
    with Ledger.open(honest[training] / "led.jsonl", repair=False) as ledger:
        key = ledger.public_key  # which a reviewer has from elsewhere
    folder = tmp_path / "forged"
    shutil.copytree(honest[training], folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    FORGERIES[name](folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} != before
    verdict = verify(folder / "led.report.json", key=key)
    assert not verdict.holds


def test_the_word_of_a_report_is_spelled_one_way(honest: dict[str, Path]) -> None:
    for folder in honest.values():
        again = build_account(folder / "led.jsonl", folder / "facts.toml")
        assert to_json(again) == (folder / "led.report.json").read_text("utf-8")
