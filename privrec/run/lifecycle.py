"""Runs whose devices are simulated: from a scenario to a directory with model, ledger and result.

A run begins, goes on after an interrupt, and is followed by the rows of its scenario, each of which
is a run of its own with other settings, below the first one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from privrec.data import Split
from privrec.device.update import Evaluating, Round
from privrec.errors import BudgetError, UsageError
from privrec.evaluate.metrics import Evaluation
from privrec.privacy import population as populations
from privrec.privacy.events import epsilon
from privrec.privacy.ledger import Ledger
from privrec.run import checkpoint, costs, directory, summary
from privrec.run.directory import Identity
from privrec.run.loop import Loop, one_thread
from privrec.run.parties import server_of
from privrec.run.plan import Plan
from privrec.run.privacy_plan import (
    beside_without_shares,
    charges_of,
    event_without_shares,
    known_catalogue,
    known_items,
)
from privrec.run.progress import ConsoleObserver
from privrec.run.record import EventLog, Observer, Result
from privrec.run.simulation import Simulation
from privrec.run.task import Recommending, Task, load_task
from privrec.scenario.load import Row, Scenario, load

ROWS = "rows/"


def start(
    scenario: Scenario,
    *,
    out: str | PathLike[str],
    data_dir: str | PathLike[str] | None = None,
    split: Split | None = None,
    observer: Observer | None = None,
    unsafe_noise_key: bytes | None = None,
    population: str | None = None,
) -> Result:
    """Run a scenario from its beginning.

    Everything that can be refused is refused before ``out`` exists; ``out`` appears whole, with its
    ledger and first checkpoint.

    Args:
        data_dir: where the data lies, before the scenario's own path.
        split: the data itself, of a recommender, instead of what the scenario names.
        observer: hears of each round; None: the console's, on standard error.
        unsafe_noise_key: a noise root that others know, for runs that must repeat bit for bit. The
            run then protects nobody and says so.
        population: name of the ledger that the run is tied to (:mod:`privrec.privacy.population`).

    Raises:
        UsageError: when ``out`` is taken or the scenario cannot be run on this data.
        DataError: when the data is malformed.
        BudgetError: when the lifetime budget of the population does not allow the run, which then
            touches no data; or when its own ran out early, and it is finished as far as it came.
        Interrupted: on Ctrl-C, after a checkpoint.
    """
    out, place = Path(out), None if data_dir is None else Path(data_dir)
    directory.refuse_taken(out)
    if population is not None:
        check_lifetime(population, scenario, known=unsafe_noise_key is not None)
    task = load_task(scenario, place) if split is None else Recommending(scenario, split)
    task.check()
    plan, described = task.plan, task.split.describe()
    identity = Identity.new(scenario, described, place or _own_place(scenario), unsafe_noise_key)
    with directory.beginning(out, plan, identity, population) as (folder, ledger):
        task.number(folder, ledger, identity)
        plan = task.plan
        devices, server = task.simulate(identity.root("devices")), server_of(plan, identity.run_id)
        position = checkpoint.save(folder, identity, ledger, server, devices.states, task.digest)
    with ledger, EventLog(out / directory.EVENTS) as events, one_thread(), shown(observer) as eye:
        loop = SimulatedLoop(out, plan, identity, server, devices, eye, ledger, events, task)
        return loop.run(position)


def resume(
    out: str | PathLike[str],
    *,
    data_dir: str | PathLike[str] | None = None,
    observer: Observer | None = None,
    workers: int | None = None,
) -> Result:
    """Go on with a run from its last checkpoint, or give the result of a finished one.

    With the noise root the run repeats its bits: rounds that were charged and lost are made again
    at no cost. Without it, or where a repeated round would release anything else, a new attempt is
    charged and gets fresh noise. ``workers`` are as many processes as this machine gives it,
    unless as many as the scenario says. For the rest see :func:`start`.

    Raises:
        UsageError: when ``out`` is no run directory, its devices are at nodes of Flower, or the key
            that signs its ledger is gone.
        BudgetError: when the run had ended at its budget before one round released a sum.
        IntegrityError: when ledger, checkpoint and data do not belong together or were altered.
    """
    out, place = Path(out), None if data_dir is None else Path(data_dir)
    identity, scenario = Identity.read(out), load(out / directory.SCENARIO)
    if workers is not None:
        run = scenario.run.model_copy(update={"workers": workers})
        scenario = scenario.model_copy(update={"run": run})
    # What cannot go on is refused before a fresh root is drawn for it.
    if (payload := directory.read_result(out, identity, scenario)) is not None:
        return Result(out, payload)
    if identity.deployed:
        raise UsageError(
            f"{out}: the devices of this run are at nodes of Flower, so it is gone on with there: "
            f"{directory.going_on(out)}"
        )
    task = load_task(scenario, place or identity.data_dir)
    task.restore_numbers(out, identity.signing_key().public_key())
    plan = task.plan
    devices, server = task.simulate(identity.root("devices")), server_of(plan, identity.run_id)
    position = checkpoint.restore(out, identity, server, devices.states, task.digest)
    ledger = directory.open_ledger(out, identity, scenario)
    with ledger, EventLog(out / directory.EVENTS) as events, one_thread(), shown(observer) as eye:
        loop = SimulatedLoop(out, plan, identity, server, devices, eye, ledger, events, task)
        return loop.run(position, resumed=True)


def _own_place(scenario: Scenario) -> Path | None:
    """Where the scenario's own path leads, for whoever works in another directory later."""
    own: str | None = getattr(scenario.data, "path", None)
    return Path(own) if own is not None and Path(own).exists() else None


def shown(observer: Observer | None) -> AbstractContextManager[Observer]:
    """Return an observer, or the console's own, which is closed in the end."""
    return ConsoleObserver() if observer is None else nullcontext(observer)


def check_lifetime(population: str, scenario: Scenario, *, known: bool = False) -> None:
    """Refuse a run that its population's lifetime budget does not allow, before data is touched.

    Where the sizes are not public before the data is read, shares of noise are taken for the
    Gaussian noise that they come near to; a run reserves what they are.
    """
    if known:
        raise UsageError(
            f"population {population!r}: noise that others know protects nobody, so no limit "
            "holds; leave out unsafe_noise_key or --population"
        )
    tied = populations.read(population)
    items, users = known_items(scenario), scenario.population()
    if items is not None and users is not None:
        plan = Plan.of(scenario, items, users, catalogue=known_catalogue(scenario))
        event, beside = plan.event, plan.beside
    else:
        event, beside = event_without_shares(scenario), beside_without_shares(scenario)
    after = epsilon(tied.counts + charges_of(scenario, event, beside), tied.delta, tied.against)
    if after > tied.epsilon:
        raise BudgetError(
            f"population {population!r}: this run would bring its lifetime ε to {after:.4f}, and "
            f"the limit is {tied.epsilon:g} ({len(tied.runs)} runs spent {tied.spent():.4f}); "
            "nothing was read or charged. Plan fewer rounds or more noise"
        )


@dataclass
class SimulatedLoop(Loop):
    """A run whose devices are here, so that what they get can be measured."""

    transport: Simulation
    task: Task[Any]
    evaluated: Evaluation | None = field(default=None, init=False)

    @property
    def checkpoint_every(self) -> int:
        return self.plan.scenario.run.checkpoint_every

    @property
    def stops_at_once(self) -> bool:
        return False

    def save(self) -> None:
        mine = self.transport.states, self.task.digest, self.wall_s, self.cpu_s
        checkpoint.save(self.out, self.identity, self.ledger, self.server, *mine)

    def accuracy(self) -> dict[str, float] | None:
        every, index = self.plan.scenario.run.eval_every, self.server.index
        if index == self.plan.scenario.train.rounds:
            # Another try is made at the end, where the gap would be stated as the whole run's.
            self.evaluated = self.evaluate()
            return self.evaluated.summary()
        if every == 0 or index % every:
            return None
        return self.evaluate(whole=False).summary()

    def summed_figures(self, evaluating: Evaluating, round: Round) -> NDArray[np.int64]:
        parts = self.transport, evaluating, round, self.server.released
        return self.task.summed_figures(*parts)

    def evaluate(self, *, whole: bool = True) -> Evaluation:
        """Measure the released weights; see :meth:`Task.evaluate`."""
        return self.task.evaluate(self.transport, self.server.released, whole=whole)

    def payload(self) -> dict[str, Any]:
        task, plan, devices, run = self.task, self.plan, self.transport, self.plan.scenario.run
        weights = self.server.released
        whole = self.evaluated or self.attempt("accuracy", self.evaluate) or Evaluation.nobody()
        by_tier = partial(task.evaluate_tiers, devices, weights, whole)
        nobody = (Evaluation.nobody(),) * (len(plan.federation.tiers) + 1)
        own = self.attempt("accuracy by tier", by_tier) or nobody
        measured = [whole, summary.together(own)] if plan.scenario.devices.tiers else [whole]
        tiers = []
        for tier, mine in zip(plan.federation.tiers, own, strict=False):
            measure = partial(task.cost, devices, tier, weights)
            facts = self.attempt(f"costs of tier {tier.index + 1}", measure)
            tiers.append({**(facts or costs.of_tier(plan, tier)), **mine.summary()})
        if absent := plan.federation.absent:
            idle = {"capacity": 0.0, "share": absent, "weight": 0.0}
            tiers.append({**idle, "devices": len(devices.absent), **own[-1].summary()})
        baselines = {
            name: self.attempt(f"baseline {name}", partial(task.baseline, name))
            for name in run.baselines
        }
        intervals = self.attempt("intervals", lambda: [m.intervals(run.seed) for m in measured])
        metrics, ends = self.summed()
        clocks = {"wall_s": self.wall_s, "cpu_s": self.cpu_s}
        payload = {
            **summary.result_of(plan, self.server, self.ledger, self.identity, tiers, **clocks),
            "holdout": task.split.holdout,
            "metrics": metrics | {k: v for each in measured for k, v in each.summary().items()},
            "intervals": ends | {k: [*ab] for each in intervals or () for k, ab in each.items()},
            "baselines": {name: each for name, each in baselines.items() if each},
            **{k: self.attempt(k, make) or [] for k, make in task.particulars(whole).items()},
        }
        payload["cost"]["noise_deferred"] = devices.deferred.share
        outside = ("metrics", "intervals", "baselines", "segments", "data", "cost", "tiers")
        return payload | {"outside_the_guarantee": [name for name in outside if name in payload]}


# --------------------------------------------------------------------------- rows


def with_rows(
    result: Result, scenario: Scenario, *, data_dir: Path | None, observer: Observer
) -> Result:
    """Return the result of a run after its scenario's rows, if any, were run as well.

    Row ``i`` is a complete run in ``rows/i`` of the run's directory, with a ledger of its own; with
    ``run.seeds`` above 1 further ones follow in ``rows/i-1`` and so on. What was begun before is
    resumed, what has gaps is tried again, and what is finished is not run again. ``result.json``
    gains ``rows``: name, changed settings, metrics, ε and costs of each; over several seeds, means
    and their 95 % intervals. Its ``gaps`` gain those of the rows.

    Raises:
        BudgetError, DataError, Interrupted, UsageError: as :func:`start`.
    """
    stated = result.payload["gaps"]
    gaps = {what: why for what, why in stated.items() if not what.startswith(ROWS)}
    if not scenario.rows or ("rows" in result.payload and gaps == stated):
        return result
    identity = Identity.read(result.path)
    if identity.deployed:  # rows are simulated, and would stand beside what nodes trained
        return result
    place = data_dir or identity.data_dir
    with Ledger.open(result.path / directory.LEDGER, repair=False) as ledger:
        # Rows are further runs over the same users.
        population = ledger.header.get("standing", {}).get("population")
    rows = []
    for index, (row, (name, variant)) in enumerate(
        zip(scenario.rows, scenario.variants.items(), strict=True)
    ):
        payloads = []
        for seed in range(variant.run.seeds):
            once = {"title": name, "run.seeds": 1, "run.baselines": ["popularity"]}
            if seed:  # what no seed changes is measured once
                once |= {"run.seed": variant.run.seed + seed, "run.footprint": False}
            folder = f"{ROWS}{index}-{seed}" if seed else f"{ROWS}{index}"
            settled, out = variant.with_settings(once), result.path / folder
            found = _finished(settled, out, place, observer, population).payload
            payloads.append(found)
            gaps |= {f"{folder}: {what}": why for what, why in found["gaps"].items()}
        rows.append(_row(row, payloads))
    payload = {**result.payload, "rows": rows, "gaps": gaps}
    return replace(result, payload=directory.write_result(result.path, payload, identity))


def _finished(
    variant: Scenario, out: Path, data_dir: Path | None, observer: Observer, population: str | None
) -> Result:
    if (out / "run.json").is_file():
        if Identity.read(out).scenario_hash != variant.hash():
            raise UsageError(
                f"{out}: a run of another scenario lies where this row belongs; move it away"
            )
        return resume(out, data_dir=data_dir, observer=observer)
    return start(variant, out=out, data_dir=data_dir, observer=observer, population=population)


def _row(row: Row, payloads: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Facts of a row: of the first seed, but for metrics, which are means over all."""
    first = payloads[0]
    stated = ("epsilon", "epsilon_server", "epsilon_popularity", "noise_multiplier")
    privacy = {key: first["privacy"].get(key) for key in stated}
    values = _measured([payload["metrics"] for payload in payloads])
    means = {key: float(np.mean(each)) for key, each in values.items()}
    facts = {"name": row.name, **row.set, **privacy, **means, **first["cost"], "tiers": []}
    for seeds in zip(*(payload["tiers"] for payload in payloads), strict=True):
        found = {key: each for key, each in _measured(seeds).items() if "@" in key}
        kept = {key: value for key, value in seeds[0].items() if "@" not in key}
        facts["tiers"].append(kept | {key: float(np.mean(each)) for key, each in found.items()})
    if len(payloads) > 1:
        facts["seeds"] = [payload["run_id"] for payload in payloads]
        facts["intervals"] = {}
        for key, each in values.items():  # Student's, of the mean over seeds
            reach = stats.t.ppf(0.975, len(each) - 1) * stats.sem(each)
            facts["intervals"][key] = [means[key] - float(reach), means[key] + float(reach)]
    return facts


def _measured(seeds: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Values by seed of what every seed has: a mean over the others would be of other runs.

    Metrics of full ranking have their short names too where there is no other protocol.
    """
    named = [
        {k.replace("full_", ""): each for k, each in seed.items() if "full_" in k} | dict(seed)
        for seed in seeds
    ]
    return {
        key: [each[key] for each in named] for key in named[0] if all(key in each for each in named)
    }
