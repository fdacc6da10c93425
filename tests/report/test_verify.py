"""`report verify`: honest reports pass, and forgeries fail with the right reason.

The forger edits any file, recomputes every hash and renders the pages again, but has not the
server's key. The verifier has its public half.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import call
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from forging import chained, entries_of, head_of, signed_by
from pydantic import ValidationError
from safetensors.numpy import save_file

from privrec.errors import UsageError
from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.ledger import Ledger
from privrec.randomness import state_dir, write_secret
from privrec.report.build import build
from privrec.report.model import Report
from privrec.report.render import to_json, write
from privrec.report.verify import Verdict, public_key, verify
from privrec.storage import canonical

MakeRun = Callable[..., Path]
Content = dict[str, Any]
Forge = Callable[[Path], None]

SERVER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
FORGER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
BASE: dict[str, Any] = {"sigma": 3.0, "rate": 0.25, "budget": None, "retried": (3,)}


@pytest.fixture
def reported(a_run: MakeRun) -> Callable[..., Path]:
    def make(folder: str = "run", **settings: Any) -> Path:
        run = a_run(folder, **{**BASE, **settings})
        write(build(run), run)
        return run

    return make


def judged(run: Path) -> Verdict:
    return verify(run / "report.json", key=SERVER.public_key())


# --------------------------------------------------------------------------- honest reports


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rate": 1.0},
        {"noise": "none"},
        {"noise": "distributed"},
        {"noise": "distributed", "settings": {"privacy.remove_excess": False}},
        {"noise_known": True},
        {"tiers": True, "noise": "distributed"},
        {"simulated": False},
        {"compared": ("a", "b")},
        {"rounds": 5, "planned": 12},
    ],
    ids=str,
)
def test_an_honest_report_holds(reported: Callable[..., Path], settings: Content) -> None:
    verdict = judged(reported(**settings))
    assert verdict.mismatches == []
    assert verdict.anchored
    assert any("ε against both adversaries" in text for text in verdict.checked)
    assert any("report.html" in text for text in verdict.checked)


def test_the_kept_key_is_enough(reported: Callable[..., Path]) -> None:
    run = reported()
    write_secret(state_dir() / "runs" / "20260101-abc123" / "server.key", bytes(range(32)))
    write(build(run), run)  # names the key that it was checked with
    assert verify(run).holds


def test_without_a_key_nothing_is_verified_unless_asked(reported: Callable[..., Path]) -> None:
    run = reported()
    with pytest.raises(UsageError, match="no key to trust"):
        verify(run)
    verdict = verify(run, trust_named_key=True)
    assert verdict.holds
    assert not verdict.anchored


def test_a_key_comes_as_text_or_file(tmp_path: Path) -> None:
    text = SERVER.public_key().public_bytes_raw().hex()
    (tmp_path / "key").write_text(text + "\n")
    for given in (text, str(tmp_path / "key")):
        assert public_key(given).public_bytes_raw().hex() == text
    for given in ("", "ab", str(tmp_path / "none"), "x" * 64):
        with pytest.raises(UsageError, match="--key"):
            public_key(given)


def test_no_report_is_a_plain_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"report\.json"):
        verify(tmp_path, key=SERVER.public_key())


def test_the_released_model_is_the_one_that_the_ledger_ends_with(
    reported: Callable[..., Path],
) -> None:
    run = reported()
    save_file({"weights": np.ones(3, np.float32)}, run / "model.safetensors")
    assert [each.where for each in judged(run).mismatches] == ["model.safetensors"]


def test_what_the_operator_filled_in_is_left_to_them(reported: Callable[..., Path]) -> None:
    run = reported()
    draft = run / "report.registry.yaml"
    text = draft.read_text("utf-8")
    draft.write_text(
        text.replace("(the operator fills this in)", "The team of the shop", 1), "utf-8"
    )
    verdict = judged(run)
    assert verdict.mismatches == []
    assert any(each.startswith("report.registry.yaml") for each in verdict.checked)


def test_what_nobody_looked_at_is_named(reported: Callable[..., Path]) -> None:
    run = reported()
    for name in ("events.jsonl", "run.json", "model.json"):
        (run / name).write_text("{}")
    for name in ("report.registry.yaml", "scenario.toml"):
        (run / name).unlink()
    verdict = judged(run)
    assert verdict.mismatches == []
    assert "not looked at: events.jsonl, model.json, run.json" in verdict.unchecked
    assert "report.registry.yaml: it is not here" in verdict.unchecked
    assert "scenario.toml: it is not here" in verdict.unchecked


def test_without_its_file_an_audit_is_on_the_operators_word(reported: Callable[..., Path]) -> None:
    run = reported()
    audited(lower_bound=0.1)(run)
    (run / "audit.json").unlink()
    verdict = judged(run)
    assert verdict.holds
    assert any(each.startswith("audit.json: it is not here") for each in verdict.unchecked)
    assert any("audit" in each.title for each in verdict.word)


def test_a_page_alone_says_what_it_needs(reported: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copy(reported() / "report.html", tmp_path / "report.html")
    with pytest.raises(UsageError, match=r"report\.json: it is not here.*ledger\.head\.json"):
        verify(tmp_path / "report.html", key=SERVER.public_key())


def test_without_a_ledger_nothing_is_said_to_be_recomputed(reported: Callable[..., Path]) -> None:
    run = reported()
    (run / "ledger.jsonl").unlink()
    assert not any("ledger" in each for each in judged(run).checked)
    shown = call(
        "report", "verify", str(run), "--key", SERVER.public_key().public_bytes_raw().hex()
    )
    assert shown.exit_code == 4
    assert "Recomputed from the ledger" not in shown.output
    assert "report.html says what report.json says" in shown.output
    assert shown.output.index("Does not match") < shown.output.index("Agrees")


def test_a_reason_names_no_figure_of_the_forger_as_the_ledgers(
    reported: Callable[..., Path],
) -> None:
    run = reported()
    at("privacy.population", 900_000)(run)
    reasons = [each.reason for each in judged(run).mismatches]
    assert not [reason for reason in reasons if "ledger gives 900000" in reason], reasons


# --------------------------------------------------------------------------- forging tools


def edited(change: Callable[[Content], Any]) -> Forge:
    """Change ``report.json``, and write the pages from it, as far as it can be read."""

    def forge(run: Path) -> None:
        path = run / "report.json"
        content = json.loads(path.read_text("utf-8"))
        change(content)
        try:
            write(Report.model_validate_json(json.dumps(content)), run)
        except ValidationError:
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")

    return forge


def at(where: str, value: Any) -> Forge:
    """Set one field; ``value`` may be a function of the old one."""

    def change(content: Content) -> None:
        place: Any = content
        *path, last = [int(part) if part.isdigit() else part for part in where.split(".")]
        for part in path:
            place = place[part]
        place[last] = value(place[last]) if callable(value) else value

    return edited(change)


def relogged(change: Callable[[list[Content]], Any], sign: str = "old") -> Forge:
    """Change the ledger, mend its chain, adapt or sign the head, and report again if possible."""

    def forge(run: Path) -> None:
        entries = entries_of(run)
        entries = change(entries) or entries
        if sign == "own":
            entries[0]["body"]["public_key"] = FORGER.public_key().public_bytes_raw().hex()
        last = chained(run, entries)
        if sign == "own":
            signed_by(run, len(entries), last, FORGER)
        elif sign == "head":
            head = json.loads(head_of(run).read_text())
            head |= {"entries": len(entries), "last_hash": last}
            head_of(run).write_bytes(canonical(head) + b"\n")

    return forge


def charges(entries: list[Content]) -> list[Content]:
    return [entry for entry in entries if entry["kind"] == "charge"]


def every_charge(**changes: Any) -> Callable[[list[Content]], None]:
    def change(entries: list[Content]) -> None:
        for entry in charges(entries):
            entry["event"].update(changes)

    return change


def header(**changes: Any) -> Callable[[list[Content]], None]:
    return lambda entries: entries[0]["body"].update(changes)


def without(kind: str, place: int) -> Callable[[list[Content]], list[Content]]:
    def change(entries: list[Content]) -> list[Content]:
        gone = [entry for entry in entries if entry["kind"] == kind][place]
        return [entry for entry in entries if entry is not gone]

    return change


def scenario(key: str, value: Any) -> Callable[[list[Content]], None]:
    def change(entries: list[Content]) -> None:
        table, name = key.split(".")
        entries[0]["body"]["scenario"][table][name] = value

    return change


def merged(entries: list[Content]) -> list[Content]:
    """Two rounds become one of half the cost."""
    return without("charge", 0)(without("commit", 0)(entries))


def added(entries: list[Content]) -> list[Content]:
    end = entries.pop()
    more = {**charges(entries)[-1], "round": 12}
    return [*entries, more, end]


def twice_open(run: Path) -> None:
    """An earlier state of the ledger, with the head that the server signed for it then."""
    early = run.parent / "early"
    shutil.copytree(run, early)
    kept = entries_of(run)[:10]
    last = chained(early, kept)
    signed_by(early, len(kept), last, SERVER)  # as the server did at a checkpoint
    for name in ("ledger.jsonl", "ledger.head.json"):
        shutil.copy(early / name, run / name)


def weaker(run: Path) -> None:
    """The claim of a ledger with more noise, on this one."""
    counts = {RoundEvent("gaussian", 6.0, 0.25): 13}

    def change(content: Content) -> None:
        for adversary in content["privacy"]["adversaries"]:
            adversary["epsilon"] = epsilon(counts, 1e-5, adversary["name"])
        content["privacy"]["noise_multiplier"] = 6.0
        content["privacy"]["events"][0].update(noise_multiplier=6.0, accounted_multiplier=6.0)

    edited(change)(run)


def page(name: str, old: str, new: str) -> Forge:
    def forge(run: Path) -> None:
        text = (run / name).read_text("utf-8")
        assert re.search(old, text)
        (run / name).write_text(re.sub(old, new, text), "utf-8")

    return forge


def doubled_key(run: Path) -> None:
    path = run / "report.json"
    text = path.read_text("utf-8")
    assert '"scenario": "ml-1m-dp"' in text
    path.write_text(text.replace('"scenario"', '"scenario": "other",\n  "scenario"', 1), "utf-8")


def audited(**changes: Any) -> Forge:
    """An honest audit beside the run and in its report, which is then changed in the report."""

    def forge(run: Path) -> None:
        with Ledger.open(run / "ledger.jsonl", repair=False) as ledger:
            declared = ledger.header["version"], ledger.header["scenario_hash"]
        audit = {
            "version": declared[0], "scenario_hash": declared[1], "passed": True, "checks": [],
            "lower_bound": 2.5, "confidence": 0.95, "claimed": 8.0, "method": "Canaries.",
        }  # fmt: skip
        (run / "audit.json").write_text(json.dumps(audit), "utf-8")
        write(build(run), run)
        assert judged(run).holds
        edited(lambda content: content["audit"].update(changes))(run)

    return forge


def half(value: float) -> float:
    return round(value / 2, 4)


LOWER = r"ε is .* lower than the"
FIELD = "it says .* and the ledger gives"
ENTRIES = r"\d+ entries, and the ledger gives \d+"
NOT_SIGNED = "not the one that was signed|not signed with the key|belongs to the key"

FORGERIES: dict[str, tuple[Forge, str, str]] = {
    # ----- in the report
    "ε lowered": (at("privacy.adversaries.0.epsilon", half), r"adversaries\[0\].epsilon", LOWER),
    "ε, cohorts known, lowered": (
        at("privacy.adversaries.1.epsilon", half), r"adversaries\[1\].epsilon", LOWER,
    ),
    "ε lowered in the last digit": (
        at("privacy.adversaries.0.epsilon", lambda e: round(e - 1e-4, 4)), "epsilon", LOWER,
    ),
    "RDP lowered": (at("privacy.adversaries.0.epsilon_rdp", half), "epsilon_rdp", LOWER),
    "ε swapped": (
        edited(lambda c: c["privacy"]["adversaries"].reverse()), "privacy.adversaries", FIELD,
    ),
    "claim reworded": (
        at("claim", lambda t: t.replace("against recipients", "against everybody")), "claim", FIELD,
    ),
    "claim with another ε": (at("claim", lambda t: re.sub(r"\(\d", "(0", t)), "claim", FIELD),
    "claim not of a simulation": (
        at("claim", lambda t: t.replace("simulated ", "")), "claim", FIELD,
    ),
    "simulation hidden": (at("simulated", False), "simulated", FIELD),
    "deployment text": (at("deployment.text", "Deployed to real users."), "deployment.text", FIELD),
    "δ changed": (at("privacy.delta", 1e-7), "privacy.delta", FIELD),
    "population raised": (at("privacy.population", 10**6), "privacy.population", FIELD),
    "adjacency reworded": (
        at("definition.neighbours", "One interaction is removed."), "definition.neighbours", FIELD,
    ),
    "adjacency of another kind": (
        at("privacy.adjacency", "replace-one"), "privacy.adjacency", FIELD,
    ),
    "unit changed": (at("definition.unit", "example"), "definition.unit", FIELD),
    "contribution bound": (
        at("definition.contribution_bounds.1", "A user is in one round."),
        r"definition.contribution_bounds\[1\]", FIELD,
    ),
    "noise raised": (at("privacy.noise_multiplier", 9.0), "privacy.noise_multiplier", FIELD),
    "claim of another ledger": (weaker, r"adversaries\[\d\].epsilon", LOWER),
    "clip norm lowered": (at("privacy.clip_norm", 0.01), "privacy.clip_norm", FIELD),
    "clip norm in the mechanism": (at("mechanism.clip_norm", 0.01), "mechanism.clip_norm", FIELD),
    "noise of a band": (
        at("mechanism.bands.0.noise_std", lambda s: 2 * s), r"mechanism.bands\[0\]", FIELD,
    ),
    "sampling rate lowered": (at("privacy.sampling_rate", 0.01), "privacy.sampling_rate", FIELD),
    "sampling part": (at("sampling.rate", 0.01), "sampling.rate", FIELD),
    "realised cohorts": (at("sampling.realised", "Published."), "sampling.realised", FIELD),
    "events dropped": (at("privacy.events.0.count", 1), r"privacy.events\[0\].count", FIELD),
    "events emptied": (at("privacy.events", []), "privacy.events", ENTRIES),
    "charges dropped": (at("privacy.charges", 12), "privacy.charges", FIELD),
    "rounds dropped": (at("rounds", 6), "rounds", FIELD),
    "warnings removed": (at("warnings", []), "warnings", ENTRIES),
    "warning graded down": (
        at("warnings.0.grade", "negligible"), r"warnings\[0\].grade", FIELD,
    ),
    "operator's word removed": (
        edited(lambda c: c["operators_word"].pop(0)), "operators_word", ENTRIES,
    ),
    "trust": (at("privacy.trust", "Nobody is trusted."), "privacy.trust", FIELD),
    "ε against the operator": (
        at("trust_model.actors.1.epsilon", 0.5), r"trust_model.actors\[1\].epsilon", FIELD,
    ),
    "fallback removed": (
        edited(lambda c: c["trust_model"]["fallbacks"].pop()), "trust_model.fallbacks", ENTRIES,
    ),
    "not protected shortened": (
        edited(lambda c: c["scope"]["not_protected"].pop()), "scope.not_protected", ENTRIES,
    ),
    "outputs extended": (
        edited(lambda c: c["outputs"]["covered"].append("All metrics.")),
        "outputs.covered", ENTRIES,
    ),
    "why δ": (at("accounting.why_delta", "Usual."), "accounting.why_delta", FIELD),
    "δ(ε) curve": (
        at("accounting.curve.4.x", half), r"accounting.curve\[4\].x", FIELD,
    ),
    "RDP table": (at("accounting.renyi.2.server", half), r"accounting.renyi\[2\]", FIELD),
    "zCDP": (at("accounting.zcdp_server", half), "accounting.zcdp_server", FIELD),
    "lifetime budget invented": (
        at("accounting.lifetime", {
            "population": "p", "epsilon": 8.0, "delta": 1e-5, "against": "server",
            "runs_before": 0, "spent_before": 0.0, "reserved": 1.0,
        }), "accounting.lifetime", FIELD,
    ),
    "tuning denied": (
        at("outside_the_ledger.tuning", "None."), "outside_the_ledger.tuning", FIELD,
    ),
    "advantage lowered": (at("reading.advantage", half), "reading.advantage", FIELD),
    "trade-off raised": (at("reading.trade_off.3.y", 0.999), r"reading.trade_off\[3\].y", FIELD),
    "curve of ε lowered": (
        edited(lambda c: next(k for k in c["curves"] if k["key"] == "epsilon")["points"][-1].update(
            value=0.1)), r"curves\[\d\].points\[\d+\].value", FIELD,
    ),
    "curve of ε removed": (
        edited(lambda c: c.update(curves=[k for k in c["curves"] if k["note"]])), "curves", ENTRIES,
    ),
    "another run": (at("run_id", "20260101-other"), "run_id", FIELD),
    "another scenario": (at("scenario_hash", "0" * 64), "scenario_hash", FIELD),
    "another version": (at("version", "9.9"), "version", FIELD),
    "title": (at("title", "Certified"), "title", FIELD),
    "another ledger": (at("privacy.ledger_head", "0" * 64), "privacy.ledger_head", FIELD),
    "own key named": (
        at("privacy.ledger_key", FORGER.public_key().public_bytes_raw().hex()),
        "privacy.ledger_key", FIELD,
    ),
    "stamp of private data removed": (at("accuracy.note", "covered"), "accuracy.note", "schema"),
    "a part removed": (at("trust_model", None), "report", "schema"),
    "a field added": (at("privacy.certified", True), "privacy.certified", "schema"),
    "a validation score as a test score": (
        at("accuracy.holdout", "validation"), "accuracy.holdout", FIELD,
    ),
    "a few users as all": (at("accuracy.users", 10), "accuracy.users", FIELD),
    "users of the data": (at("data.users", 10**6), "data.users", FIELD),
    "bound of the audit": (audited(lower_bound=0.1), "audit", r"audit\.json"),
    "method of the audit": (audited(method="By hand."), "audit", r"audit\.json"),
    "a key twice": (doubled_key, "report.json", "not spelled as privrec writes it"),
    # ----- in the ledger
    "charge removed": (relogged(without("charge", 2)), "ledger", NOT_SIGNED + "|no entry"),
    "charge removed, head adapted": (
        relogged(without("charge", 4), "head"), "ledger", NOT_SIGNED + "|no entry",
    ),
    "second attempt removed": (
        relogged(lambda e: [x for x in e if x.get("attempt") != 1], "head"), "ledger", NOT_SIGNED,
    ),
    "charge added": (relogged(added), "ledger", NOT_SIGNED),
    "lines behind the end": (
        relogged(lambda e: [*e, {**charges(e)[-1], "round": 30}]), "ledger", "no entry that",
    ),
    "tail cut": (relogged(lambda e: e[:-5]), "ledger", "its end was cut away"),
    "tail cut, head adapted": (relogged(lambda e: e[:-5], "head"), "ledger", NOT_SIGNED),
    "end removed": (relogged(without("end", 0), "head"), "ledger", NOT_SIGNED),
    "older ledger with its own head": (twice_open, "ledger", "lacks the entry that ends a run"),
    "order changed": (
        relogged(lambda e: [e[0], e[3], e[4], e[1], e[2], *e[5:]], "head"), "ledger", NOT_SIGNED,
    ),
    "rounds merged": (relogged(merged, "head"), "ledger", NOT_SIGNED + "|no entry"),
    "σ raised once": (
        relogged(lambda e: charges(e)[0]["event"].update(noise_multiplier=9.0)), "ledger",
        NOT_SIGNED,
    ),
    "σ raised everywhere, head adapted": (
        relogged(every_charge(noise_multiplier=9.0), "head"), "ledger", NOT_SIGNED,
    ),
    "rate lowered everywhere": (
        relogged(every_charge(sampling_rate=0.01), "head"), "ledger", NOT_SIGNED,
    ),
    "δ of the header": (relogged(header(delta=0.1), "head"), "ledger", NOT_SIGNED),
    "population of the header": (relogged(header(population=10**6), "head"), "ledger", NOT_SIGNED),
    "adjacency of the header": (
        relogged(header(adjacency="replace-one"), "head"), "ledger", NOT_SIGNED,
    ),
    "unit of the header": (relogged(header(unit="example"), "head"), "ledger", NOT_SIGNED),
    "clip norm of the header": (
        relogged(scenario("privacy.clip_norm", 0.01), "head"), "ledger", NOT_SIGNED,
    ),
    "commit removed": (relogged(without("commit", 3), "head"), "ledger", NOT_SIGNED),
    "commit of something else": (
        relogged(lambda e: e[2].update(tag="00" * 32), "head"), "ledger", NOT_SIGNED,
    ),
    "another model at the end": (
        relogged(lambda e: e[-1].update(model="00" * 32), "head"), "ledger", NOT_SIGNED,
    ),
    "everything made anew with another key": (
        relogged(every_charge(noise_multiplier=9.0), "own"), "ledger", "belongs to the key",
    ),
    "another head": (
        lambda run: signed_by(run, 3, entries_of(run)[2]["hash"], FORGER), "ledger", NOT_SIGNED,
    ),
    "no head": (lambda run: head_of(run).unlink(), "ledger", "signed head could not be read"),
    "no ledger": (lambda run: (run / "ledger.jsonl").unlink(), "ledger", "the ledger is missing"),
    "a byte of the ledger": (
        lambda run: (run / "ledger.jsonl").write_text(
            (run / "ledger.jsonl").read_text()
            .replace('"sampling_rate":0.25', '"sampling_rate":0.2')
        ), "ledger", "was altered",
    ),
    # ----- in the pages
    "ε of the page": (
        page("report.html", r"<dd>\d+\.\d+</dd>", "<dd>0.10</dd>"), "report.html", "page",
    ),
    "claim of the page": (page("report.md", "recipients", "everybody"), "report.md", "page"),
    "warnings of the page": (
        page("report.html", r'<div class="notice.*?</div>', ""), "report.html", "page",
    ),
    "an overlay in a picture": (
        page("report.html", "</svg>", "<foreignObject><p>ε is 0.1</p></foreignObject></svg>"),
        "report.html", "page",
    ),
    "a style in a picture": (
        page("report.html", "</svg>", "<style>.notice { display: none }</style></svg>"),
        "report.html", "page",
    ),
    "a script in a picture": (
        page("report.html", "</svg>", "<script>document.body.remove()</script></svg>"),
        "report.html", "page",
    ),
    "a figure in a picture": (
        page("report.html", r"recipients</tspan>.*?ε = [\d.]+", "recipients ε = 0.10"),
        "report.html", "page",
    ),
    "a picture that is none": (
        page("report.md", "\n## Sampling", "<svg>ε is 0.1.</svg>\n## Sampling"),
        "report.md", "page",
    ),
    # ----- in the draft for a registry
    "ε of the draft": (
        page("report.registry.yaml", r'epsilon_recipients: "[\d.]+"', 'epsilon_recipients: "0.10"'),
        "report.registry.yaml", "page",
    ),
    "a key beside what was filled in": (
        page("report.registry.yaml", r"data_curator: .*", 'data_curator: "us"\nepsilon: "0.10"'),
        "report.registry.yaml", "page",
    ),
    "a text over the next lines": (
        page("report.registry.yaml", r"publication_date: .*", "publication_date: |"),
        "report.registry.yaml", "page",
    ),
    # ----- in what lies beside
    "scenario beside": (
        page("scenario.toml", r"clip_norm = [\d.]+", "clip_norm = 0.01"), "scenario.toml", "signed",
    ),
    "a comment in the scenario": (
        page("scenario.toml", "\\A", "# ε is 0.1\n"), "scenario.toml", "signed",
    ),
}  # fmt: skip


def test_there_are_enough_forgeries() -> None:
    assert len(FORGERIES) >= 40


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One honest report that every forger starts from."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("runs", Path(__file__).with_name("conftest.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run: Path = module.make_run(tmp_path_factory.mktemp("honest") / "run", **BASE)
    write(build(run), run)
    return run


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_fails_with_the_right_reason(template: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(template, run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    forge, where, reason = FORGERIES[name]
    forge(run)
    assert {path.name: path.read_bytes() for path in run.iterdir()} != before
    verdict = judged(run)
    assert not verdict.holds
    assert any(
        re.search(where, each.where) and re.search(reason, each.reason)
        for each in verdict.mismatches
    ), verdict.mismatches


@pytest.mark.parametrize(
    "name", [name for name, (_, where, _) in FORGERIES.items() if where == "ledger"]
)
def test_a_forged_ledger_is_refused_also_when_the_report_is_made_anew(
    template: Path, tmp_path: Path, name: str
) -> None:
    """The report of the forged ledger, if one can be made at all, does not hold either."""
    run = tmp_path / "run"
    shutil.copytree(template, run)
    FORGERIES[name][0](run)
    _report_anew(run)
    assert not judged(run).holds


def _report_anew(run: Path) -> None:
    """What a forger's own program would write: the report that the forged ledger leads to."""
    from privrec.report.derive import derive
    from privrec.report.facts import Facts
    from privrec.report.model import WORD

    old = Report.model_validate_json((run / "report.json").read_text("utf-8"))
    try:
        entries = entries_of(run)
        last = chained(run, entries)
        signed_by(run, len(entries), last, FORGER)
        own = FORGER.public_key().public_bytes_raw().hex()
        entries[0]["body"]["public_key"] = own
        last = chained(run, entries)
        signed_by(run, len(entries), last, FORGER)
        with Ledger.open(run / "ledger.jsonl", repair=False) as ledger:
            facts = Facts.of(ledger, run, FORGER.public_key())
        word: dict[str, Any] = {name: getattr(old, name) for name in WORD}
        word["curves"] = tuple(curve for curve in old.curves if curve.note)
        write(derive(facts, word), run)
    except Exception:  # a forger who fails has forged nothing new
        return


def test_what_is_recomputed_is_everything_but_the_operators_word() -> None:
    """Each field of a report is either derived from the ledger or named as the operator's word."""
    from privrec.report.model import WORD

    told = {*WORD, "curves"}
    constant = {"report_schema", "outside_the_guarantee"}
    derived = set(Report.model_fields) - told - constant
    assert "claim" in derived
    assert "privacy" in derived
    assert not derived & told


def test_edits_of_the_operators_word_alone_pass(reported: Callable[..., Path]) -> None:
    """The limit of verification, stated: what the run signed of its accuracy is believed."""
    run = reported()
    at("accuracy.metrics.0.value", 0.99)(run)
    assert [each.where for each in judged(run).mismatches] == ["accuracy"]
    (run / "result.json").unlink()
    verdict = judged(run)
    assert verdict.holds
    assert any(text.startswith("result.json") for text in verdict.unchecked)


def test_a_verdict_is_json(reported: Callable[..., Path]) -> None:
    run = reported()
    at("privacy.delta", 1e-9)(run)
    content = json.loads(json.dumps(judged(run).to_json()))
    assert content["holds"] is False
    assert content["mismatches"][0]["where"]
    assert to_json(build(run)) != (run / "report.json").read_text("utf-8")
