"""From a run directory to a report: every ε from the ledger, and nothing that does not agree."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from privrec.errors import DataError, IntegrityError, PrivrecError, UsageError
from privrec.privacy.events import RoundEvent, epsilon
from privrec.randomness import state_dir, write_secret
from privrec.report.build import build
from privrec.report.render import to_html, to_markdown
from privrec.report.words import thinned

MakeRun = Callable[..., Path]


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_both_epsilons_come_from_the_ledger(a_run: MakeRun) -> None:
    report = build(a_run(rounds=12, sigma=1.1, rate=0.05))
    counts = {RoundEvent("gaussian", 1.1, 0.05): 12}
    assert report.adversary("recipients").epsilon == epsilon(counts, 1e-5, "recipients")
    assert report.adversary("server").epsilon == epsilon(counts, 1e-5, "server")
    assert report.adversary("server").epsilon_rdp == epsilon(counts, 1e-5, "server", "rdp")


def test_rdp_is_on_the_right_side(a_run: MakeRun) -> None:
    for adversary in build(a_run()).privacy.adversaries:
        assert adversary.epsilon is not None
        assert adversary.epsilon_rdp is not None
        assert adversary.epsilon_rdp >= adversary.epsilon


def test_every_charge_counts_also_a_repeated_one(a_run: MakeRun) -> None:
    once, twice = build(a_run("once")), build(a_run("twice", retried=(3, 7)))
    assert twice.privacy.charges == 14
    assert (twice.adversary("server").epsilon or 0) > (once.adversary("server").epsilon or 0)
    assert [event.count for event in twice.privacy.events] == [14]


@pytest.mark.parametrize(
    ("key", "factor"),
    [("epsilon", 0.99), ("epsilon", 1.01), ("epsilon_server", 0.9), ("epsilon_server", 0)],
)
def test_a_claim_that_the_ledger_does_not_bear_out_is_refused(
    a_run: MakeRun, key: str, factor: float
) -> None:
    run = a_run()
    edit(run / "result.json", lambda r: r["privacy"].update({key: r["privacy"][key] * factor}))
    with pytest.raises(IntegrityError, match=f"privacy.{key} is .* the ledger gives"):
        build(run)


@pytest.mark.parametrize("value", [None, "8"])
def test_an_epsilon_that_is_no_number_is_refused(a_run: MakeRun, value: Any) -> None:
    run = a_run()
    edit(run / "result.json", lambda r: r["privacy"].update(epsilon=value))
    with pytest.raises(IntegrityError, match=r"privacy\.epsilon"):
        build(run)


def test_a_finite_claim_over_a_noiseless_ledger_is_refused(a_run: MakeRun) -> None:
    run = a_run(noise="none")
    edit(run / "result.json", lambda r: r["privacy"].update(epsilon=1.0))
    with pytest.raises(IntegrityError, match="the ledger gives infinite"):
        build(run)


@pytest.mark.parametrize("files", [("run.json",), ("result.json",), ("run.json", "result.json")])
def test_the_stamp_of_known_noise_cannot_be_edited_off(
    a_run: MakeRun, files: tuple[str, ...]
) -> None:
    known, secret = a_run("known", noise_known=True), a_run("secret")
    for name in files:
        if name == "run.json":
            edit(known / name, lambda r: r.update(noise_known=False))
        else:
            (known / name).write_text((secret / name).read_text())
    with pytest.raises(IntegrityError, match="noise_known"):
        build(known)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("delta", 0.2),
        ("population", 10**9),
        ("sampling", "everybody"),
        ("sampling_rate", 1.0),
        ("noise", "none"),
        ("noise_known", True),
        ("noise_multiplier", 9.0),
        ("clip_norm", 0.01),
        ("budget", None),
        ("budget_against", "server"),
    ],
)
def test_what_the_claim_depends_on_is_the_ledgers(a_run: MakeRun, key: str, value: Any) -> None:
    run = a_run()
    edit(run / "result.json", lambda r: r["privacy"].update({key: value}))
    with pytest.raises(IntegrityError, match=rf"privacy\.{key} is"):
        build(run)


def test_an_edited_claim_with_an_epsilon_to_match_is_refused(a_run: MakeRun) -> None:
    run = a_run()
    counts = {RoundEvent("gaussian", 1.1, 0.05): 12}
    weaker = {"delta": 0.2, "sampling": "everybody"} | {
        key: epsilon(counts, 0.2, adversary)  # type: ignore[arg-type]
        for key, adversary in (("epsilon", "recipients"), ("epsilon_server", "server"))
    }
    edit(run / "result.json", lambda r: r["privacy"].update(weaker))
    with pytest.raises(IntegrityError, match="the ledger gives"):
        build(run)


def test_a_sampled_run_never_claims_that_everybody_took_part(a_run: MakeRun) -> None:
    assert build(a_run("sampled", rate=0.5)).privacy.sampling == "poisson"
    assert build(a_run("all", rate=1.0)).privacy.sampling == "everybody"


@pytest.mark.parametrize("old", ["delta = 1e-05", "epsilon = 8.0", "clip_norm = 0.5", "dim = 32"])
def test_an_edited_scenario_is_refused(a_run: MakeRun, old: str) -> None:
    path = a_run() / "scenario.toml"
    text = path.read_text()
    assert old in text
    path.write_text(
        text.replace(old, f"{old.split(' = ')[0]} = {'16' if 'dim' in old else '0.25'}")
    )
    with pytest.raises(IntegrityError, match=r"scenario\.toml: its scenario_hash"):
        build(path.parent)


@pytest.mark.parametrize(
    "charged", [RoundEvent("gaussian", 1.1, 0.5), RoundEvent("none", 0.0, 0.05)]
)
def test_charges_that_the_scenario_does_not_plan_are_refused(
    a_run: MakeRun, charged: RoundEvent
) -> None:
    with pytest.raises(IntegrityError, match="a round was charged as"):
        build(a_run(charged=charged))


def test_planned_rounds_are_those_of_the_scenario(a_run: MakeRun) -> None:
    titles = [notice.title for notice in build(a_run(rounds=5, planned=12)).warnings]
    assert "The run stopped before its last round" in titles


def test_further_runs_are_announced(a_run: MakeRun) -> None:
    warnings = build(a_run(compared=("strict", "loose"))).warnings
    notices = {notice.title: notice.text for notice in warnings}
    assert "2 further runs" in notices["Further runs used the same users"]


def test_figures_from_private_data_are_named(a_run: MakeRun) -> None:
    report = build(a_run())
    assert report.outside_the_guarantee == (
        "accuracy", "segments", "cost", "tiers", "data", "rows",
    )  # fmt: skip
    assert report.cost.note == "outside the guarantee"


def test_hidden_charges_are_noticed(a_run: MakeRun) -> None:
    run = a_run()
    edit(run / "result.json", lambda r: r["privacy"].update(charges=11))
    with pytest.raises(IntegrityError, match=r"privacy\.charges is 11, the ledger gives 12"):
        build(run)


def test_an_altered_ledger_is_refused(a_run: MakeRun) -> None:
    run = a_run()
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    (run / "ledger.jsonl").write_text("".join(lines).replace("1.1", "9.1"))
    with pytest.raises(IntegrityError):
        build(run)


def test_a_shortened_ledger_is_refused(a_run: MakeRun) -> None:
    run = a_run()
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    (run / "ledger.jsonl").write_text("".join(lines[:-2]))
    with pytest.raises(IntegrityError):
        build(run)


def test_a_missing_ledger_is_refused(a_run: MakeRun) -> None:
    run = a_run()
    (run / "ledger.jsonl").unlink()
    with pytest.raises(IntegrityError, match="the ledger is missing"):
        build(run)


@pytest.mark.parametrize("key", ["run_id", "scenario_hash", "privacy_hash"])
def test_a_ledger_of_another_run_is_refused(a_run: MakeRun, key: str) -> None:
    run = a_run()
    edit(run / "run.json", lambda r: r.update({key: "another"}))
    if key == "run_id":
        edit(run / "result.json", lambda r: r.update(run_id="another"))
    with pytest.raises(IntegrityError, match=rf"run\.json: its {key}"):
        build(run)


def test_a_result_of_another_run_is_refused(a_run: MakeRun) -> None:
    run = a_run()
    edit(run / "result.json", lambda r: r.update(run_id="another"))
    with pytest.raises(IntegrityError, match=r"result\.json: its run_id"):
        build(run)


def test_the_head_is_checked_with_the_key_that_is_given(a_run: MakeRun) -> None:
    run, key = a_run(), Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    assert build(run).privacy.ledger_signature == "key named in the ledger"
    assert build(run, public_key=key.public_key()).privacy.ledger_signature == "server key"
    with pytest.raises(IntegrityError):
        build(run, public_key=Ed25519PrivateKey.generate().public_key())


def test_the_key_that_this_machine_keeps_is_used(a_run: MakeRun) -> None:
    run = a_run()
    kept = state_dir() / "runs" / "20260101-abc123" / "server.key"
    write_secret(kept, bytes(range(32)))
    assert build(run).privacy.ledger_signature == "server key"


def test_a_ledger_signed_by_another_key_than_the_kept_one_is_refused(a_run: MakeRun) -> None:
    write_secret(state_dir() / "runs" / "20260101-abc123" / "server.key", bytes(32))
    with pytest.raises(IntegrityError, match="key"):
        build(a_run())


def test_a_report_changes_nothing_it_reads(a_run: MakeRun) -> None:
    run = a_run()
    before = {path: path.read_bytes() for path in run.iterdir()}
    build(run)
    assert {path: path.read_bytes() for path in run.iterdir()} == before


# --------------------------------------------------------------------------- curves


def test_the_epsilon_curve_ends_at_the_claim_and_never_falls(a_run: MakeRun) -> None:
    report = build(a_run(rounds=60, retried=(5,)))
    (curve,) = (curve for curve in report.curves if curve.key == "epsilon")
    values = [point.value for point in curve.points]
    assert values == sorted(values)
    assert (curve.points[0].round, curve.points[-1].round) == (1, 60)
    assert values[-1] == report.adversary("recipients").epsilon


def test_losses_and_metrics_are_stamped(a_run: MakeRun) -> None:
    report = build(a_run())
    assert {c.key: c.note for c in report.curves} == {
        "loss": "outside the guarantee",
        "hr@10": "outside the guarantee",
        "epsilon": "",
        "epsilon_server": "",
    }
    assert report.accuracy.note == "outside the guarantee"


RANKED = {f"{own}{full}{stem}@10": bool(full) for own in ("", "own_") for full in ("", "full_")
          for stem in ("hr", "ndcg", "recall")}  # fmt: skip


def test_every_metric_says_what_the_held_out_item_was_ranked_among(a_run: MakeRun) -> None:
    values = {key: number / 100 for number, key in enumerate(RANKED)}
    report = build(a_run(extra={"metrics": values}))
    for metric in report.accuracy.metrics:
        among = "all items" if RANKED[metric.key] else "99 items"
        assert metric.protocol.startswith(among), metric.key
        assert "full ranking" not in metric.name
        assert ("own tier" in metric.name) == metric.key.startswith("own_")


@pytest.mark.parametrize("recall", [0.125, 0.25])
def test_a_recall_that_repeats_the_hit_rate_is_kept_but_not_shown(
    a_run: MakeRun, recall: float
) -> None:
    metrics = {"hr@10": 0.5, "full_hr@10": 0.25, "full_recall@10": recall}
    report = build(a_run(extra={"metrics": metrics, "segments": []}))
    assert {each.key: each.value for each in report.accuracy.metrics} == metrics
    for text in (to_html(report), to_markdown(report)):
        assert ("Recall@10" in text) == (recall != 0.25)


@pytest.mark.parametrize("simple", [0.4, 0.6])
def test_the_headline_stands_beside_popularity(a_run: MakeRun, simple: float) -> None:
    metrics, baselines = {"hr@10": 0.5}, {"popularity": {"hr@10": simple}}
    page = to_html(build(a_run(extra={"metrics": metrics, "baselines": baselines})))
    claim = page.partition("The claim")[2].partition("</section>")[0]
    assert f"popularity {simple:.3f}" in claim
    assert ("Below popularity" in claim) == (simple > 0.5)


@given(st.integers(0, 500), st.integers(2, 60))
def test_thinning_keeps_the_ends_and_the_order(size: int, most: int) -> None:
    kept = thinned(range(size), most)
    assert len(kept) == min(size, most)
    assert kept == sorted(set(kept))
    if size:
        assert (kept[0], kept[-1]) == (0, size - 1)


# --------------------------------------------------------------------------- what is left out


def test_no_field_holds_a_realised_cohort(a_run: MakeRun) -> None:
    text = build(a_run(rounds=12)).model_dump_json()
    for size in range(301, 313):  # what the fixture's rounds would have drawn
        assert f":{size}," not in text
    assert "wall_s" in text
    assert text.count("wall_s") == 1  # of the whole run: a round's time tells its cohort


@pytest.mark.parametrize("key", ["data", "model"])
def test_a_result_that_names_a_cohort_is_refused(a_run: MakeRun, key: str) -> None:
    run = a_run(extra={key: {"rounds": {"cohort": 302}}})
    with pytest.raises(DataError, match="realised cohort size"):
        build(run)


# --------------------------------------------------------------------------- malformed directories


def _unfinished(run: Path) -> None:
    (run / "result.json").unlink()


def _no_run(run: Path) -> None:
    (run / "run.json").unlink()


def _no_directory(run: Path) -> None:
    for path in run.iterdir():
        path.unlink()
    run.rmdir()


def _broken(name: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).write_text("{[")

    return damage


def _a_list(run: Path) -> None:
    (run / "result.json").write_text("[]")


def _no_metrics(run: Path) -> None:
    edit(run / "result.json", lambda r: r.pop("metrics"))


def _wrong_unit(run: Path) -> None:
    edit(run / "result.json", lambda r: r["privacy"].update(unit="example"))


def _text_for_bytes(run: Path) -> None:
    edit(run / "result.json", lambda r: r["cost"].update(upload_bytes="many"))


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (_unfinished, UsageError, "not finished.*privrec resume"),
        (_no_run, UsageError, "no run.json.*name one"),
        (_no_directory, UsageError, "no run.json"),
        (_broken("run.json"), DataError, "not JSON"),
        (_broken("result.json"), DataError, "not JSON"),
        (_broken("scenario.toml"), DataError, "not TOML"),
        (_broken("ledger.jsonl"), IntegrityError, "ledger"),
        (_a_list, DataError, "holds list, not an object"),
        (_no_metrics, DataError, "'metrics' is None"),
        (_wrong_unit, DataError, "privacy.*unit|unit is 'example'"),
        (_text_for_bytes, DataError, "upload_bytes is 'many'"),
    ],
)
def test_a_malformed_directory_gets_a_plain_error(
    a_run: MakeRun, damage: Callable[[Path], None], error: type[PrivrecError], words: str
) -> None:
    run = a_run()
    damage(run)
    with pytest.raises(error, match=words):
        build(run)


# --------------------------------------------------------------------------- long runs


@pytest.mark.slow
def test_a_hundred_thousand_rounds_are_reported_in_seconds(
    a_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured are seconds of this process, which do not depend on what else the machine does."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # the run is made here only to be read
        run = a_run(rounds=100_000, sigma=8.0, rate=0.01, budget=None, eval_every=5000)
    build(a_run("small"))  # libraries are loaded
    start = time.process_time()
    report = build(run)
    assert time.process_time() - start < 5
    assert report.privacy.charges == 100_000
    assert [event.count for event in report.privacy.events] == [100_000]
