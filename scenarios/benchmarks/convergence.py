"""Does federated averaging in a random subspace converge as 1/T where theory says so?

Devices with private user vectors that stay fixed fit the items of a compressed subspace, collisions
and all, to their own histories by squared error: a strongly convex problem in the memory, whose
optimum a linear system gives. Devices differ in everything (nothing is i.i.d.), take several local
steps, and take part by their own coins. With step sizes that fall as one over the round, the
squared distance from the optimum must fall as 1/T; with constant ones it must not.
Source: Li et al., "On the Convergence of FedAvg on Non-IID Data" (ICLR 2020), theorem 2.

It runs the library's own devices, integers, sum and server.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Claim, document, machine, print_table, write_json

from privrec.device.device import Cohort, Settings
from privrec.device.recommender import RecommenderLearner
from privrec.device.samples import Histories
from privrec.device.tier import Federation, ModelView, Tier
from privrec.device.update import Protection
from privrec.embedding.nested import nested
from privrec.embedding.subspace import Subspace
from privrec.models.layout import packed_size
from privrec.models.ncf import NCF
from privrec.privacy.events import RoundEvent
from privrec.randomness import SecretRoot
from privrec.run.simulation import Enrolled, Simulation
from privrec.secagg.client import Policy
from privrec.secagg.ring import Encoding
from privrec.server.optimizer import FedAvg, Schedule
from privrec.server.server import Completion, RoundPlan, Server

ITEMS, DIM, BLOCK, COMPRESSION = 32, 4, 2, 2.0
USERS, HISTORY, RATE, LOCAL_STEPS = 120, 20, 0.5, 3
TOLERANCE = 0.15

Course = Callable[[Schedule, int], float]


@dataclass(frozen=True)
class Problem:
    """Devices with fixed user vectors, and the optimum of their mean squared error.

    Args:
        table: the compressed subspace.
        histories: of each device.
        states: user vectors and biases of zero, shape ``(USERS, DIM + 1)``.
        optimum: of the memory, shape ``(slots, BLOCK)``.
        smallest: least eigenvalue of the mean Hessian, above 0.
        largest: largest one of any device's.
    """

    table: Subspace
    histories: Histories
    states: np.ndarray
    optimum: np.ndarray
    smallest: float
    largest: float

    @classmethod
    def drawn(cls, seed: int) -> Problem:
        """A problem in which every device has a taste and items of its own."""
        rng = np.random.default_rng(seed)
        table = Subspace.sized(ITEMS, DIM, block=BLOCK, key=seed, compression=COMPRESSION)
        items = np.concatenate([rng.permutation(ITEMS)[:HISTORY] for _ in range(USERS)])
        histories = Histories(
            np.arange(USERS), np.arange(USERS + 1) * HISTORY, items.astype(np.int32)
        )
        states = np.zeros((USERS, DIM + 1), np.float32)
        tastes = rng.normal(size=(USERS, DIM)) + 0.3
        states[:, :DIM] = tastes / np.linalg.norm(tastes, axis=1, keepdims=True)
        parts = [_device(table, histories, states, user) for user in range(USERS)]
        hessians, slopes = zip(*parts, strict=True)
        mean = np.mean(hessians, axis=0)
        # Blocks that no item is hashed to stay at zero: the problem is one of the others.
        used = np.diag(mean) > 0
        optimum = np.zeros(table.size)
        optimum[used] = np.linalg.solve(mean[np.ix_(used, used)], np.mean(slopes, axis=0)[used])
        largest = max(float(np.linalg.eigvalsh(each)[-1]) for each in hessians)
        smallest = float(np.linalg.eigvalsh(mean[np.ix_(used, used)])[0])
        return cls(table, histories, states, optimum.reshape(-1, BLOCK), smallest, largest)


def _device(
    table: Subspace, histories: Histories, states: np.ndarray, user: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hessian and right side of ``½ Σ (u·T_i - 1)²`` of one device, in the memory."""
    mine = histories.select(np.array([user])).items
    rows, vector = np.zeros((len(mine), table.size)), states[None, user, :DIM].astype(np.float64)
    for row, item in zip(rows, mine, strict=True):
        table.scatter_add(row.reshape(table.slots, BLOCK), np.array([item]), vector)
    return rows.T @ rows, rows.sum(0)


def errors(seed: int, rounds: int, course: Course) -> np.ndarray:
    """Squared distance from the optimum after each round, shape ``(rounds,)``."""
    problem = Problem.drawn(seed)
    # Theorem 2 counts local steps: the n-th one is 2 / (μ (γ + n)). Its γ = 8 L / μ is the worst
    # case's; 1 / μ of a local step's largest curvature is enough for steps that are safe.
    gamma = 2 * problem.largest / problem.smallest
    schedule = Schedule("inverse", rounds, 0)
    server, simulation = _federation(problem, seed)
    first = 2 / (problem.smallest * LOCAL_STEPS)
    learner, found = simulation.cohorts[0].learner, np.empty(rounds)
    for t in range(rounds):
        # The schedule starts γ rounds in, where its first step is safe.
        local_lr = first * course(schedule, t + int(gamma / LOCAL_STEPS))
        simulation.cohorts[0].learner = replace(
            learner, settings=replace(learner.settings, local_lr=local_lr)
        )
        round = server.next_round(0)
        aggregate = simulation.collect(round, server.weights)
        server.apply(server.release(round, aggregate, SecretRoot.known(b"server")))
        memory = server.plan.federation.layout.memory_of(server.weights)
        found[t] = np.square(memory - problem.optimum).sum()
    return found


def _federation(problem: Problem, seed: int) -> tuple[Server, Simulation]:
    table = problem.table
    view = ModelView.of(NCF.of("gmf", DIM, ()), table, None, packed_size(DIM))
    settings = Settings(
        loss="ials", negatives=0, unobserved_weight=1e-9, item_l2=1e-9, newton=False,
        max_samples=None, user_steps=0, user_lr=1.0, user_l2=1.0, serve_steps=1, serve_negatives=1,
        local_steps=LOCAL_STEPS, local_lr=1.0,
    )  # fmt: skip
    chain = nested(table, [0])
    federation = Federation((Tier(0, 1.0, 1.0, 1.0, view, chain, None),))
    learner = RecommenderLearner(view, settings)
    cohort = Cohort(learner, problem.histories, problem.states.copy())
    protection = Protection(Encoding(64.0, view.layout.size, scale_bits=20))
    event = RoundEvent("none", 0.0, RATE)
    plan = RoundPlan("convergence", "", event, protection, federation, RATE * USERS, 0.0)
    weights = np.zeros(view.layout.size, np.float32)
    completion = Completion(federation, None, "sum")
    server = Server(plan, weights, completion, FedAvg(1.0, Schedule("constant", 1, 0)))
    enrolled = Enrolled(SecretRoot.known(b"devices"), Policy())
    return server, Simulation(federation, (cohort,), USERS, protection, enrolled, seed, RATE)


def inverse(schedule: Schedule, t: int) -> float:
    """Steps as theory wants them."""
    return schedule.factor(t)


def constant(schedule: Schedule, t: int) -> float:
    """Steps that never get smaller: the error stays where their noise holds it."""
    return schedule.factor(40 + 0 * t)


def square(schedule: Schedule, t: int) -> float:
    """Steps that get small too soon: the error stays where it was then."""
    return schedule.factor(t) ** 2


COURSES: dict[str, Course] = {"inverse": inverse, "constant": constant, "inverse square": square}


def slope(found: np.ndarray) -> float:
    """Slope of the error over the rounds, both as logarithms, in the last decade of rounds."""
    rounds = np.arange(1, len(found) + 1)
    late = rounds > len(found) / 10
    return float(np.polyfit(np.log(rounds[late]), np.log(found[late]), 1)[0])


def measured(course: Course, rounds: int, seeds: int) -> np.ndarray:
    """Mean error over seeds after each round."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return np.mean([errors(seed, rounds, course) for seed in range(seeds)], axis=0)
    finally:
        torch.set_num_threads(before)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and write the JSON file where one is named."""
    options = parser().parse_args(arguments)
    about = machine()
    rounds, seeds = (1000, 6) if options.quick else (2000, 8)
    rows = [_row(name, measured(course, rounds, seeds)) for name, course in COURSES.items()]
    claims = [
        Claim("slope_off_minus_one", abs(rows[0]["slope"] + 1), TOLERANCE, "off -1", "at most"),
        Claim("slope_of_constant_steps", rows[1]["slope"], -0.5, "slope"),
        Claim("slope_of_too_small_steps", rows[2]["slope"], -0.5, "slope"),
    ]
    columns = [(key, key) for key in rows[0]]
    print_table(f"Squared distance from the optimum, mean of {seeds} seeds", columns, rows)
    for claim in claims:
        print(claim)
    if options.json:
        write_json(options.json, document(rows, claims, about))


def _row(name: str, found: np.ndarray) -> dict[str, Any]:
    """The error at a few rounds beside the 1/T line through the first of them, and the slope."""
    rounds = len(found)
    marks = [rounds // 10, rounds // 4, rounds // 2, rounds]
    row: dict[str, Any] = {"name": name}
    for mark in marks:
        row[f"round {mark}"] = float(found[mark - 1])
        row[f"1/T at {mark}"] = float(found[marks[0] - 1] * marks[0] / mark)
    return {**row, "slope": slope(found)}


def parser() -> argparse.ArgumentParser:
    """The benchmark's options."""
    made = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="example: convergence.py --quick --json convergence.json",
    )
    made.add_argument("--quick", action="store_true", help="fewer rounds and seeds")
    made.add_argument("--json", type=Path, metavar="FILE", help="write rows, claims and machine")
    return made


if __name__ == "__main__":
    main()
