"""Whether a report says what its ledger says: everything recomputed, every difference named.

The verifier needs ``report.json``, the ledger with its signed head, and the server's public key,
got by another way than the files. It trusts nothing else: not the pages, not the other fields of
the report. Metrics and gaps must be those of the signed ``result.json``, where it is there. What no
ledger tells (:data:`privrec.report.model.WORD`) is taken as the report has it, and named as the
operator's word. Files of the run that are not looked at are named too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from privrec import __version__
from privrec.errors import DataError, IntegrityError, PrivrecError, UsageError
from privrec.privacy.ledger import head_path
from privrec.report.build import AUDIT, audit_of
from privrec.report.derive import derive
from privrec.report.facts import Account, Facts, read_account, read_facts
from privrec.report.model import TOLD, WORD, OperatorsWord, Report, Told
from privrec.report.render import OPEN, to_html, to_json, to_markdown, to_registry
from privrec.run.directory import LEDGER, SCENARIO, public_key_of
from privrec.run.record import adversary_text
from privrec.storage import parsed, verified

_DEPENDS_ON_VERIFIER = {"privacy.ledger_signature"}
MODEL = "model.safetensors"
_SHOWN = 120
_PAGES = {".html": to_html, ".md": to_markdown, ".registry.yaml": to_registry}
_FILLED_IN = r'[^"\\\n\r\x85\u2028\u2029]*'  # within the quotes that a draft leaves open


@dataclass(frozen=True)
class Mismatch:
    """One thing that does not match: where, and why it cannot be."""

    where: str
    reason: str


@dataclass
class Verdict:
    """What a verification found: what agrees, was not looked at, does not match, cannot be seen.

    ``anchored`` is whether the ledger was checked with a key from elsewhere than the files.
    """

    anchored: bool
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)
    word: Sequence[OperatorsWord] = ()

    def refute(self, where: str, reason: str) -> None:
        """Note that something does not match."""
        self.mismatches.append(Mismatch(where, reason))

    @property
    def holds(self) -> bool:
        """Whether everything that can be checked agrees."""
        return not self.mismatches

    def to_json(self) -> dict[str, Any]:
        """The verdict as an object of JSON."""
        return {
            "holds": self.holds,
            "anchored": self.anchored,
            "checked": self.checked,
            "unchecked": self.unchecked,
            "mismatches": [vars(each) for each in self.mismatches],
            "operators_word": [each.model_dump() for each in self.word],
        }


def public_key(text: str) -> Ed25519PublicKey:
    """The server's public key from its 64 hexadecimal digits, or from a file that holds them."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text.strip()):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            text = ""
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text.strip()))
    except ValueError:
        raise UsageError(
            "--key: it must be the server's Ed25519 public key in 64 hexadecimal digits, or a file "
            "that holds them; ask the operator of the server for it"
        ) from None


def verify(
    path: Path, *, key: Ed25519PublicKey | None = None, trust_named_key: bool = False
) -> Verdict:
    """Recompute a report from the ledger that lies beside it.

    Args:
        path: ``report.json``, a page beside it, or the directory that they lie in; or a ledger,
            which is looked at by itself where no report of it is there.
        key: the server's public key, got by another way; by default the one that this machine keeps
            for the run.
        trust_named_key: go on without such a key. Whoever made the files can then have made up all
            of them.

    Raises:
        UsageError: when there is no report, or no key to trust.
    """
    path = path / "report.json" if path.is_dir() else path
    if path.suffix == ".jsonl":
        named = (f"{path.stem}.report.json", *(["report.json"] if path.stem == "ledger" else []))
        beside = [path.with_name(name) for name in named if path.with_name(name).exists()]
        if not beside:
            return _verify_ledger(path, key, trust_named_key)
        path = beside[0]
    for ending in _PAGES:  # held to the JSON below, as every page beside it is
        path = path.with_name(re.sub(rf"{re.escape(ending)}$", ".json", path.name))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"{path}: it is not here, and no page is verified without it and the ledger. Ask for "
            "the report.json, ledger.jsonl and ledger.head.json of the run, and put them beside it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}; name the report.json of a finished run") from None
    content = _object(text)
    key = _trusted(path, key, content, trust_named_key)
    verdict = Verdict(anchored=key is not None)
    report = _report(text, content, verdict)
    facts: Facts | Account | None = None
    try:
        if content.get("told") is None:
            facts = read_facts(path.parent, key)
        else:
            stem = path.name.removesuffix(".report.json") if "." in path.stem else "ledger"
            told = Told.model_validate({}) if report is None else report.told
            facts = read_account(path.with_name(f"{stem}.jsonl"), key, told)
    except PrivrecError as error:
        verdict.refute("ledger", str(error))
    else:
        charges = f"{len(facts.ledger.charges):,} charges"
        verdict.checked.append(f"hash chain of the ledger and its signed head, {charges}")
    if report is not None:
        verdict.word = report.operators_word
        if facts is not None:
            _compare(report, facts, verdict)
            if isinstance(facts, Account):
                _check_told(path, report, facts, verdict)
            else:
                _check_word(report, facts, verdict)
                _check_audit(path.parent, report, facts, verdict)
                _check_result(path.parent, report, facts, verdict)
        _check_pages(path, report, verdict)
    if isinstance(facts, Facts):
        _check_model(path.parent, facts, verdict)
        _check_scenario(path, facts, verdict)
    return verdict


def _trusted(
    path: Path, key: Ed25519PublicKey | None, content: Mapping[str, Any], trust_named_key: bool
) -> Ed25519PublicKey | None:
    key = key or public_key_of(str(content.get("run_id", "")))
    if key is None and not trust_named_key:
        raise UsageError(
            f"{path}: no key to trust: the ledger names one, but whoever forged it would have "
            "named their own. Give the server's public key with --key (whoever ran it prints it by "
            "`privrec report key DIR`), or say --trust-named-key"
        )
    return key


def _verify_ledger(path: Path, key: Ed25519PublicKey | None, trust_named_key: bool) -> Verdict:
    """A ledger by itself: its chain and its signed head, and the ε that it comes to."""
    try:
        header = parsed(path.read_bytes().partition(b"\n")[0]) or {}
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; name a report or a ledger") from None
    body = header.get("body")
    key = _trusted(path, key, body if isinstance(body, dict) else {}, trust_named_key)
    verdict = Verdict(anchored=key is not None)
    try:
        account = read_account(path, key)
    except IntegrityError as error:
        verdict.refute("ledger", str(error))
        return verdict
    charges, delta = f"{len(account.ledger.charges):,} charges", account.delta
    for name, spent in (("recipients", account.epsilon), ("server", account.epsilon_server)):
        shown = "infinite" if spent is None else f"{spent:g}"
        against = adversary_text(name) if name == "server" else name
        verdict.checked.append(f"ε against {against} is {shown} at δ = {delta:g}")
    verdict.checked.append(f"hash chain of the ledger and its signed head, {charges}")
    verdict.unchecked.append(f"{path.stem}.report.json: it is not here, so nothing was compared")
    if account.ledger.ended is None:
        verdict.unchecked.append("whether this is the latest state of the ledger: it goes on")
    return verdict


def _object(text: str) -> Mapping[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _report(text: str, content: Mapping[str, Any], verdict: Verdict) -> Report | None:
    """The report, if it satisfies its schema; and that it is spelled as privrec spells it."""
    try:
        report = Report.model_validate_json(text)
    except ValidationError as error:
        for problem in error.errors()[:5]:
            place = ".".join(str(part) for part in problem["loc"]) or "report"
            verdict.refute(place, f"the report does not satisfy its schema: {problem['msg']}")
        return None
    if to_json(report) != text:
        verdict.refute("report.json", "it is not spelled as privrec writes it: it was edited")
    verdict.checked.append(f"schema {content['report_schema']}, canonical spelling")
    return report


def _compare(report: Report, facts: Facts | Account, verdict: Verdict) -> None:
    """Make the report again, with the operator's word as it stands, and name what differs."""
    word = {name: getattr(report, name) for name in (WORD if isinstance(facts, Facts) else TOLD)}
    if isinstance(facts, Facts):
        word["curves"] = tuple(curve for curve in report.curves if curve.note)
    try:
        again = derive(facts, word)
    except (DataError, ValidationError, UsageError) as error:
        verdict.refute("ledger", f"no report can be made of it: {error}")
        return
    said, wanted = report.model_dump(mode="json"), again.model_dump(mode="json")
    differences = list(_differences(said, wanted, ""))
    for where, found, expected in differences:
        verdict.refute(where, _reason(where, found, expected, report.version))
    if not differences:
        verdict.checked += [
            "ε against both adversaries, by PLD and by RDP, and every curve of it, recomputed from "
            "the ledger",
            "the claim and every other sentence, made again from what the ledger declares",
        ]


def _differences(found: Any, expected: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if where in _DEPENDS_ON_VERIFIER or found == expected:
        return
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in {**expected, **found}:
            inner = f"{where}.{name}" if where else name
            yield from _differences(found.get(name), expected.get(name), inner)
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for place, pair in enumerate(zip(found, expected, strict=True)):
            yield from _differences(*pair, f"{where}[{place}]")
    else:
        yield where, found, expected


def _reason(where: str, found: Any, expected: Any, version: str) -> str:
    if "epsilon" in where and isinstance(found, float) and isinstance(expected, float):
        side = "lower" if found < expected else "higher"
        return f"ε is {found:g}, {side} than the {expected:g} that the ledger gives"
    if isinstance(found, list) and isinstance(expected, list):
        return f"{len(found)} entries, and the ledger gives {len(expected)}"
    reason, here = f"it says {_short(found)}, and the ledger gives {_short(expected)}", __version__
    if version == here:
        return reason
    of = f"the report is of privrec {version}, this is {here}"
    return f"{reason} ({of}: verify it with that version)"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _check_told(path: Path, report: Report, account: Account, verdict: Verdict) -> None:
    """That the ledger's key signed what the operator told, of this state of the ledger."""
    if not account.told.model_dump(exclude_defaults=True):
        verdict.unchecked.append("facts of the operator: none were told")
        return
    key = account.ledger.public_key
    own = {"public_key": key.public_bytes_raw().hex(), "signature": report.told_signature}
    try:
        verified("facts", {**account.statement, **own}, key, path)
    except IntegrityError:
        reason = "the ledger's key did not sign these facts of the operator with this ledger"
        verdict.refute("told", reason)
    else:
        verdict.checked.append("signature of what the operator told")


def _check_word(report: Report, facts: Facts, verdict: Verdict) -> None:
    """What the operator's word must agree with, although the ledger does not tell it."""
    declared, scenario = facts.declared, facts.scenario
    told: dict[str, tuple[Any, Any]] = {
        "accuracy.holdout": (report.accuracy.holdout, scenario.data.holdout),
        "accuracy.users": (report.accuracy.users, scenario.run.eval_users),
        "data.users": (report.data.get("users"), facts.population),
        "model.coefficients": (report.model.get("coefficients"), declared.coefficients),
        "model.kind": (report.model.get("kind"), scenario.model.kind),
    }
    capacities = [tier.capacity for tier in report.tiers if tier.capacity]
    if capacities:
        told["tiers"] = (capacities, list(declared.capacities))
    for where, (found, expected) in told.items():
        if found is not None and found != expected:
            verdict.refute(where, _reason(where, found, expected, report.version))
    audit = report.audit
    if audit is not None:
        of = (audit.version, audit.scenario_hash)
        if of != (declared.version, scenario.hash()):
            verdict.refute("audit", "it is of another scenario or another version of privrec")
        if audit.passed != all(check.passed for check in audit.checks):
            verdict.refute("audit.passed", "a check failed, or none did")


def _check_audit(directory: Path, report: Report, facts: Facts, verdict: Verdict) -> None:
    """That an audit is the one that ``audit.json`` has, which nobody signed."""
    try:
        found = audit_of(directory, facts)
    except (PrivrecError, ValidationError) as error:
        verdict.refute(AUDIT, str(error))
        return
    if found is None and report.audit is not None:
        verdict.unchecked.append(f"{AUDIT}: it is not here, so the audit is as the report has it")
    elif found is not None and report.audit is None:
        verdict.unchecked.append(f"{AUDIT}: the report was written before it; write it again")
    elif found != report.audit:
        verdict.refute("audit", f"it is not what {AUDIT} says")
    elif found is not None:
        verdict.checked.append(f"the audit is that of {AUDIT}, which nobody signed")


def _check_result(directory: Path, report: Report, facts: Facts, verdict: Verdict) -> None:
    """That metrics and gaps are those of the result that the run signed."""
    path = directory / "result.json"
    try:
        result = _object(path.read_text(encoding="utf-8"))
        facts.check_result(result, path)
    except FileNotFoundError:
        verdict.unchecked.append(
            "result.json: it is not here, so metrics and gaps are not known to be those that the "
            "run signed"
        )
        return
    except (IntegrityError, OSError, UnicodeDecodeError) as error:
        verdict.refute("result.json", str(error))
        return
    metrics = {each.key: each.value for each in report.accuracy.metrics}
    for where, found, name in (("accuracy", metrics, "metrics"), ("gaps", report.gaps, "gaps")):
        if found != (expected := result.get(name) or {}):
            reason = f"it says {_short(found)}, and the signed result {_short(expected)}"
            verdict.refute(where, reason)
    verdict.checked.append("signature of result.json, and its metrics and gaps")


def _check_pages(report_path: Path, report: Report, verdict: Verdict) -> None:
    """That the pages beside say what ``report.json`` says, in their pictures too.

    The draft for a registry may have what it leaves open for the operator filled in.
    """
    for ending, render in _PAGES.items():
        path = report_path.with_suffix(ending)
        name = path.name
        if not path.exists():
            verdict.unchecked.append(f"{name}: it is not here")
            continue
        text, wanted = path.read_text(encoding="utf-8", errors="replace"), render(report)
        if render is to_registry:
            pattern = re.escape(wanted).replace(re.escape(OPEN), _FILLED_IN)
            agrees, but = bool(re.fullmatch(pattern, text)), ", but for what was filled in"
        else:
            agrees, but = text == wanted, ""
        if agrees:
            verdict.checked.append(f"{name} says what {report_path.name} says{but}")
        else:
            verdict.refute(name, f"the page says something else than {report_path.name} does")


def _check_scenario(report_path: Path, facts: Facts, verdict: Verdict) -> None:
    """That the scenario is the one that the ledger declares; names the files not looked at."""
    directory = report_path.parent
    path = directory / SCENARIO
    if not path.exists():
        verdict.unchecked.append(f"{SCENARIO}: it is not here")
    elif path.read_text(encoding="utf-8", errors="replace") == facts.scenario.to_toml():
        verdict.checked.append(f"{SCENARIO} is the one that the signed ledger declares")
    else:
        verdict.refute(SCENARIO, "it is not the one that the signed ledger declares")
    looked_at = {SCENARIO, AUDIT, "result.json", MODEL, LEDGER, head_path(directory / LEDGER).name}
    looked_at |= {report_path.name, *(report_path.with_suffix(each).name for each in _PAGES)}
    others = sorted({each.name for each in directory.iterdir()} - looked_at)
    if others:
        verdict.unchecked.append(f"not looked at: {', '.join(others)}")


def _check_model(directory: Path, facts: Facts, verdict: Verdict) -> None:
    path = directory / MODEL
    if not path.exists():
        verdict.unchecked.append(
            "model.safetensors: it is not here, so no model is known to be the one that the ledger "
            "ends with"
        )
        return
    try:
        weights = load_file(path)["weights"]
        found = hashlib.sha256(weights.tobytes()).digest()
    except (SafetensorError, KeyError, OSError, ValueError):
        found = b""
    if found == facts.ledger.ended:
        verdict.checked.append("the released model is the one that the ledger ends with")
    else:
        verdict.refute(MODEL, "it is not the model that the ledger ends with")
