"""`privrec.Ledger` in loops that are not ours: events of dp-accounting, budgets, optimisers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting import NeighboringRelation
from dp_accounting.dp_event import (
    ComposedDpEvent,
    DiscreteLaplaceDpEvent,
    DpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    MixtureOfGaussiansDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    RandomizedResponseDpEvent,
    RepeatAndSelectDpEvent,
    SampledWithoutReplacementDpEvent,
    SampledWithReplacementDpEvent,
    SelfComposedDpEvent,
    SingleEpochTreeAggregationDpEvent,
    TruncatedSubsampledGaussianDpEvent,
    UnsupportedDpEvent,
    ZCDpEvent,
)
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from torch.utils.data import DataLoader, TensorDataset

from privrec import LazyDPSGD, Ledger
from privrec.errors import BudgetError, IntegrityError, PrivrecError, ReleaseRefused, UsageError
from privrec.optim.lazy_dpsgd import poisson_loader
from privrec.privacy import ledger as ledgers
from privrec.privacy.events import RoundEvent, epsilon

STEP = PoissonSampledDpEvent(0.05, GaussianDpEvent(1.1))
OTHERS: list[DpEvent] = [
    LaplaceDpEvent(2.0),
    DiscreteLaplaceDpEvent(1.0, 1),
    RandomizedResponseDpEvent(0.5, 3),
    PoissonSampledDpEvent(0.1, LaplaceDpEvent(2.0)),
    MixtureOfGaussiansDpEvent(10.0, [0.0, 1.0], [0.9, 0.1]),
    TruncatedSubsampledGaussianDpEvent(100, 0.1, 20, 4.0),
    SingleEpochTreeAggregationDpEvent(2.0, 4),
    RepeatAndSelectDpEvent(GaussianDpEvent(3.0), 1.0, 1.0),
    ZCDpEvent(0.1, 0.0),
]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def begun(tmp_path: Path, budget: float | None = None, **words: Any) -> Ledger:
    words = {"unit": "example", "adjacency": "add-or-remove", "delta": 1e-5, **words}
    return Ledger.create(tmp_path / "ledger.jsonl", budget=budget, **words)


def steps_of(step: Callable[[], Any]) -> int:
    """How often ``step`` works before the budget refuses it."""
    for done in range(1000):
        try:
            step()
        except BudgetError:
            return done
    raise AssertionError("no budget")


def read(tmp_path: Path) -> Ledger:
    return Ledger.open(tmp_path / "ledger.jsonl", repair=False)


# --------------------------------------------------------------------------- the loop


def test_a_charge_is_on_disk_before_it_returns(tmp_path: Path) -> None:
    with begun(tmp_path, 2.0) as ledger:
        for step in range(1, 4):
            assert ledger.charge(STEP)
            assert len(read(tmp_path).charges) == step
        spent = ledger.epsilon(), ledger.epsilon("server")
    found = read(tmp_path)
    assert found.signed == found.entries == 4
    assert (found.epsilon(), found.epsilon("server")) == spent
    event = RoundEvent("gaussian", 1.1, 0.05)
    assert spent == tuple(epsilon({event: 3}, 1e-5, each) for each in ("recipients", "server"))


@pytest.mark.parametrize("against", ["recipients", "server"])
def test_the_last_charge_is_the_last_that_the_budget_allows(tmp_path: Path, against: Any) -> None:
    event, budget = RoundEvent("gaussian", 4.0, 0.5), 4.0
    allowed = next(n for n in count(1) if epsilon({event: n + 1}, 1e-5, against) > budget)
    assert allowed > 9
    with begun(tmp_path, budget, against=against) as ledger:
        assert steps_of(lambda: ledger.charge(event)) == allowed == len(ledger.charges)
        with pytest.raises(BudgetError, match="nothing was charged"):
            ledger.charge(event)
        ledger.charge(RoundEvent("gaussian", 1e6))  # what costs nothing still fits
    assert len(read(tmp_path).charges) == allowed + 1


def test_other_events_are_held_to_the_same_budget(tmp_path: Path) -> None:
    with begun(tmp_path, 2.0) as ledger:
        for _ in range(3):
            ledger.charge(LaplaceDpEvent(2.0))  # 0.5 each
        with pytest.raises(BudgetError):
            ledger.charge(LaplaceDpEvent(0.5))
        with pytest.raises(BudgetError, match="inf"):
            ledger.charge(NonPrivateDpEvent())
        assert ledger.epsilon() == pytest.approx(1.5, abs=2e-3)


def test_a_composition_is_paid_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    quiet = PoissonSampledDpEvent(0.05, GaussianDpEvent(8.0))  # a loud one takes seconds to compose
    whole = ComposedDpEvent([SelfComposedDpEvent(quiet, 20), LaplaceDpEvent(4.0), NoOpDpEvent()])
    with begun(tmp_path, 1.0) as ledger:
        with pytest.raises(BudgetError):
            ledger.charge(SelfComposedDpEvent(whole, 10))
        assert ledger.entries == 1
    with Ledger.create(tmp_path / "second.jsonl", unit="example", delta=1e-5) as ledger:
        ledger.charge(whole)
        assert ledger.entries == 2
        parts = ledger.charges[0].event.parts
    assert parts[RoundEvent("gaussian", 8.0, 0.05)] == 20
    assert sum(parts.values()) == 21


def test_going_on_after_a_crash(tmp_path: Path) -> None:
    ledger = begun(tmp_path, 2.0)
    for _ in range(3):
        ledger.charge(STEP)
    while ledger._files:  # as the end of a process does
        ledger._files.pop().close()
    assert read(tmp_path).signed == 1
    with Ledger.resume(tmp_path / "ledger.jsonl") as again:
        again.charge(STEP)
        again.end()
    found = read(tmp_path)
    assert (len(found.charges), found.signed) == (4, found.entries)
    with (
        Ledger.resume(tmp_path / "ledger.jsonl") as ended,
        pytest.raises(ReleaseRefused, match="has ended"),
    ):
        ended.charge(STEP)


def test_the_end_of_many_charges_is_signed_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "_SEAL_EVERY", 4)
    with begun(tmp_path) as ledger:
        for _ in range(9):
            ledger.charge(STEP)
        assert read(tmp_path).signed == 9


def test_nothing_goes_on_elsewhere_or_from_an_old_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, head = tmp_path / "ledger.jsonl", tmp_path / "ledger.head.json"
    with begun(tmp_path) as ledger:
        ledger.charge(STEP)
    old = path.read_bytes(), head.read_bytes()
    with Ledger.resume(path) as ledger:
        ledger.charge(STEP)
    new = path.read_bytes(), head.read_bytes()
    for file, content in zip((path, head), old, strict=True):
        file.write_bytes(content)
    with pytest.raises(IntegrityError, match="its end was cut"):
        Ledger.resume(path)
    for file, content in zip((path, head), new, strict=True):
        file.write_bytes(content)
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "other"))
    with pytest.raises(UsageError, match="keeps no key"):
        Ledger.resume(path)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"unit": "A user"}, "unit"),
        ({"adjacency": "next door"}, "adjacency"),
        ({"delta": 1.5}, "delta"),
        ({"delta": None}, "delta"),
        ({"budget": -1.0}, "budget"),
        ({"budget": math.inf}, "budget"),
        ({"against": "nobody"}, "adversary"),
    ],
)
def test_what_makes_no_sense_begins_no_ledger(tmp_path: Path, words: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        begun(tmp_path, **words)
    assert not (tmp_path / "ledger.jsonl").exists()


# --------------------------------------------------------------------------- dp-accounting


@pytest.mark.parametrize("event", OTHERS, ids=lambda event: type(event).__name__)
def test_an_event_costs_what_dp_accounting_says(event: DpEvent) -> None:
    ours = RoundEvent.of(event)
    assert RoundEvent.from_json(ours.to_json()) == ours
    relation, counts = NeighboringRelation.REPLACE_SPECIAL, {ours: 3}
    bounds = []
    for accountant in (PLDAccountant(relation), RdpAccountant(neighboring_relation=relation)):
        if accountant.supports(event):
            for _ in range(3):
                accountant.compose(event)
            bounds.append(accountant.get_epsilon(1e-5))
    chosen = bounds[-1] if isinstance(event, RandomizedResponseDpEvent) else bounds[0]
    found = epsilon(counts, 1e-5, "recipients")
    assert found == pytest.approx(chosen, abs=2e-3)
    assert found >= chosen - 1e-9
    assert epsilon(counts, 1e-5, "server") >= found
    assert epsilon(counts, 1e-5, "recipients", "rdp") >= found


def test_known_figures_of_other_mechanisms() -> None:
    laplace = RoundEvent.of(LaplaceDpEvent(4.0))
    assert epsilon({laplace: 1}, 1e-10, "server") == pytest.approx(0.25, abs=1e-3)
    flipped = RoundEvent.of(RandomizedResponseDpEvent(0.5, 2))  # 3/4 against 1/4
    spent = [epsilon({flipped: n}, 1e-10, "server", adjacency="replace-one") for n in (1, 2)]
    assert spent == pytest.approx([math.log(3), 2 * math.log(3)], rel=0.02)


def test_gaussian_rounds_in_any_composition_are_our_own() -> None:
    event = SelfComposedDpEvent(ComposedDpEvent([STEP, SelfComposedDpEvent(STEP, 2)]), 5)
    ours = RoundEvent.of(event)
    assert ours.parts == {RoundEvent("gaussian", 1.1, 0.05): 15}
    assert RoundEvent.of(STEP) == RoundEvent("gaussian", 1.1, 0.05)
    for accountant in ("pld", "rdp"):
        plain = epsilon({RoundEvent("gaussian", 1.1, 0.05): 15}, 1e-5, "recipients", accountant)
        assert epsilon([ours], 1e-5, "recipients", accountant) == plain


def test_whoever_knows_the_sample_sees_through_it() -> None:
    def against_server(event: DpEvent, adjacency: Any = "zero-out") -> float:
        return epsilon([RoundEvent.of(event)], 1e-5, "server", adjacency=adjacency)

    plain = against_server(GaussianDpEvent(2.0))
    assert against_server(PoissonSampledDpEvent(0.1, GaussianDpEvent(2.0))) == plain
    sampled = PoissonSampledDpEvent(0.1, LaplaceDpEvent(2.0))
    assert against_server(sampled) == against_server(LaplaceDpEvent(2.0))
    mixture = MixtureOfGaussiansDpEvent(2.0, [0.0, 1.0], [0.9, 0.1])
    assert against_server(mixture) == pytest.approx(plain, abs=2e-3)
    drawn = SampledWithoutReplacementDpEvent(100, 10, GaussianDpEvent(2.0))
    assert against_server(drawn, "replace-one") >= plain


def test_a_replacement_counts_on_no_sampling() -> None:
    counts = {RoundEvent("gaussian", 1.1, 0.05): 10}
    whole = epsilon(counts, 1e-5, "server")
    assert epsilon(counts, 1e-5, "recipients", adjacency="replace-one") == whole
    assert epsilon(counts, 1e-5, "recipients", adjacency="add-or-remove") < whole / 4


@pytest.mark.parametrize(
    ("event", "adjacency"),
    [
        (SampledWithoutReplacementDpEvent(100, 10, GaussianDpEvent(2.0)), "add-or-remove"),
        (SampledWithReplacementDpEvent(100, 10, GaussianDpEvent(2.0)), "replace-one"),
        (RandomizedResponseDpEvent(0.5, 2), "add-or-remove"),
        (PoissonSampledDpEvent(0.1, LaplaceDpEvent(1.0)), "replace-one"),
        (UnsupportedDpEvent(), "zero-out"),
        (NoOpDpEvent(), "zero-out"),
        (GaussianDpEvent(-1.0), "zero-out"),
        (GaussianDpEvent(math.nan), "zero-out"),
        (LaplaceDpEvent(math.inf), "zero-out"),
        (PoissonSampledDpEvent(1.5, GaussianDpEvent(1.0)), "zero-out"),
        (SelfComposedDpEvent(LaplaceDpEvent(1.0), -1), "zero-out"),
        (SelfComposedDpEvent(LaplaceDpEvent(1.0), 1.5), "zero-out"),  # type: ignore[arg-type]
        ("gaussian", "zero-out"),
        (1.1, "zero-out"),
        (None, "zero-out"),
    ],
    ids=str,
)
def test_what_nobody_can_account_for_is_not_charged(
    tmp_path: Path, event: Any, adjacency: Any
) -> None:
    with begun(tmp_path, adjacency=adjacency) as ledger:
        with pytest.raises(UsageError):
            ledger.charge(event)
        assert ledger.entries == 1


# --------------------------------------------------------------------------- optimisers


def classified(model: Any, rows: torch.Tensor, target: torch.Tensor) -> None:
    logits = model(rows)[:, 0]
    torch.nn.functional.binary_cross_entropy_with_logits(logits, target).backward()


class Opacus:
    """A small model in Opacus' hands."""

    def __init__(self, noise_multiplier: float = 1.1, **words: Any) -> None:
        from opacus import PrivacyEngine  # seconds, in every process that only collects tests

        rows = torch.arange(2000.0).reshape(400, 5) / 2000
        loader = DataLoader(TensorDataset(rows, (rows[:, 0] > 0.5).float()), batch_size=40)
        plain = torch.nn.Linear(5, 1)
        self.engine = PrivacyEngine()
        self.model, self.optimizer, self.loader = self.engine.make_private(
            module=plain,
            optimizer=torch.optim.SGD(plain.parameters(), lr=0.5),
            data_loader=loader,
            noise_multiplier=noise_multiplier,
            max_grad_norm=1.0,
            **words,
        )

    def steps(self) -> Iterator[None]:
        while True:
            for rows, target in self.loader:
                self.optimizer.zero_grad()
                classified(self.model, rows, target)
                self.optimizer.step()
                yield

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().ravel() for p in self.model.parameters()]).clone()


def test_opacus_steps_are_charged_and_halt_at_the_budget(tmp_path: Path) -> None:
    torch.manual_seed(0)
    opacus = Opacus()
    with begun(tmp_path, 3.0) as ledger:
        ledger.attach(opacus.optimizer, sample_rate=0.1)
        steps, seen = opacus.steps(), list[torch.Tensor]()

        def step() -> None:
            seen.append(opacus.weights())
            next(steps)

        done = steps_of(step)
        assert len(ledger.charges) == done > 3
        assert torch.equal(opacus.weights(), seen[-1])
        assert not any(p.grad is not None and p.grad.any() for p in opacus.model.parameters())
        assert ledger.charges[0].event == RoundEvent("gaussian", 1.1, 0.1)
        (noise, rate, steps_of_engine), *_ = opacus.engine.accountant.history
        assert (noise, rate, steps_of_engine) == (1.1, 0.1, done)
        assert ledger.epsilon() <= 3.0
        assert ledger.epsilon() == pytest.approx(opacus.engine.get_epsilon(1e-5), rel=0.05)


def test_a_rate_below_the_engines_is_refused(tmp_path: Path) -> None:
    opacus = Opacus()
    with begun(tmp_path) as ledger:
        with pytest.raises(UsageError, match=r"PrivacyEngine counts 0\.1"):
            ledger.attach(opacus.optimizer, sample_rate=0.01)
        ledger.attach(opacus.optimizer, sample_rate=0.1)
        next(opacus.steps())
    assert [charge.expected_batch for charge in read(tmp_path).charges] == [40.0]


@pytest.mark.parametrize(
    ("poisson", "rate", "warned"), [(False, 0.1, 1), (False, 1, 0), (True, 0.1, 0)]
)
def test_batches_of_one_size_are_warned_of(
    tmp_path: Path, poisson: bool, rate: float, warned: int, recwarn: pytest.WarningsRecorder
) -> None:
    opacus = Opacus(poisson_sampling=poisson)
    with begun(tmp_path) as ledger:
        ledger.attach(opacus.optimizer, sample_rate=rate)
        steps = opacus.steps()
        for _ in range(40):
            next(steps)
    assert len([each for each in recwarn if "same size" in str(each.message)]) == warned


def test_the_charge_comes_before_the_model_moves(tmp_path: Path) -> None:
    opacus = Opacus()
    seen: list[tuple[int, bool]] = []
    with begun(tmp_path) as ledger:
        start = opacus.weights()
        opacus.optimizer.attach_step_hook(
            lambda _: seen.append(
                (len(read(tmp_path).charges), torch.equal(opacus.weights(), start))
            )
        )
        ledger.attach(opacus.optimizer, sample_rate=0.1)
        next(opacus.steps())
    assert seen == [(1, True)]


def test_a_ledger_that_cannot_be_written_stops_the_step(tmp_path: Path) -> None:
    opacus = Opacus()
    ledger = begun(tmp_path)
    ledger.attach(opacus.optimizer, sample_rate=0.1)
    ledger.close()
    start = opacus.weights()
    with pytest.raises(PrivrecError):
        next(opacus.steps())
    assert torch.equal(opacus.weights(), start)


def test_a_replaced_example_moves_the_sum_by_two_clip_norms(tmp_path: Path) -> None:
    opacus = Opacus(2.0)
    with begun(tmp_path, adjacency="replace-one") as ledger:
        ledger.attach(opacus.optimizer, sample_rate=0.1)
        next(opacus.steps())
        assert ledger.charges[0].event == RoundEvent("gaussian", 1.0)


def test_no_noise_is_charged_as_none(tmp_path: Path) -> None:
    opacus = Opacus(0.0)
    with begun(tmp_path, 100.0) as ledger:
        ledger.attach(opacus.optimizer, sample_rate=0.1)
        with pytest.raises(BudgetError, match="inf"):
            next(opacus.steps())


def test_lazy_steps_are_charged_before_their_noise(tmp_path: Path) -> None:
    items = torch.arange(1000).reshape(200, 5) % 50
    data = TensorDataset(items, (items[:, 0] % 2).float())
    model = torch.nn.Sequential(torch.nn.EmbeddingBag(50, 4), torch.nn.Linear(4, 1))
    optimizer = LazyDPSGD(
        model, lr=0.5, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=20
    )
    with begun(tmp_path, 4.0) as ledger:
        ledger.attach(optimizer, sample_rate=0.1)
        batches, seen = iter(poisson_loader(data, 0.1, steps=200)), list[Any]()

        def step() -> None:
            seen.append({name: each.clone() for name, each in model.state_dict().items()})
            classified(model, *next(batches))
            optimizer.step()

        assert steps_of(step) == len(ledger.charges) > 3
        assert ledger.charges[0].event == RoundEvent("gaussian", 1.0, 0.1)
        for name, each in model.state_dict().items():
            assert torch.equal(each, seen[-1][name])
    optimizer.close()


def test_an_optimiser_in_many_processes_is_refused(tmp_path: Path) -> None:
    class DistributedDPOptimizer:
        step_hook = None

    with begun(tmp_path) as ledger:
        with pytest.raises(UsageError, match="each process"):
            ledger.attach(DistributedDPOptimizer(), sample_rate=0.1)
        with pytest.raises(UsageError, match="sampling_rate"):
            ledger.attach(Opacus().optimizer, sample_rate=1.5)
