"""A secure sum for any Flower app: a mod on the nodes, and a strategy around the app's own.

The strategy asks for a round's training as the app's own strategy would have it asked for, and
gives that strategy one reply, which holds the mean. In between are the exchanges of
:mod:`privrec.secagg`: shares before the training, survivors and unmasking after it.
"""

from __future__ import annotations

import math
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from numpy.typing import NDArray

from privrec import __version__
from privrec.errors import BudgetError, IntegrityError, ReleaseRefused, UsageError
from privrec.flower import plan as plans
from privrec.flower.enrolment import Anyone, anchor_of, enroll
from privrec.flower.exchange import CONFIRM, LOG, MASKED, SHARES, UNMASK, Member, Registry
from privrec.flower.mod import SecureSumMod
from privrec.flower.plan import SumPlan, plan_of
from privrec.privacy.events import RoundEvent, check_delta, noise_multiplier_for
from privrec.privacy.ledger import Ledger
from privrec.randomness import SecretRoot, state_dir
from privrec.secagg.keys import statement
from privrec.secagg.roster import Terms
from privrec.secagg.server import ServerSession
from privrec.storage import server_key

__all__ = ["SecureSum", "SecureSumMod", "enroll"]

_PREKEYS = 32  # deposited at a contact, so that one round in 32 has an exchange more
_UP = 1 + 2.0**-14
_ONE_BY_ONE = re.compile(
    "Bulyan|FedMedian|FedTrimmedAvg|FedXgb.*|Krum|MultiKrum|QFedAvg|DifferentialPrivacy.*"
)
"""Flower's strategies that look at each reply by itself, which is what nobody shall."""


@dataclass(frozen=True)
class _Open:
    """A round between the training that was asked for, in ``sent`` for one, and its end."""

    registry: Registry
    session: ServerSession
    plan: SumPlan
    terms: Terms
    sent: Message
    epsilon: float | None


@dataclass(eq=False)
class SecureSum(Strategy):  # type: ignore[misc]  # flwr is not there when types are checked
    """A strategy that gives another one the mean of all updates, and no update.

    Promise: a round gives the exact weighted mean over all nodes that answered up to the end, each
    clipped and rounded to the grid, with the noise that was charged; or nothing, and then the model
    stays as it was and the log says why. Weights need not be whole numbers: they are rounded to the
    finest power of two whose multiples can be summed, and the log counts nodes whose weight is cut,
    changed by more than 1 % or left out. With noise every attempt at a round, and every evaluation,
    is charged to the ledger before any node is asked.

    Args:
        strategy: the app's own, whose averaging is used: FedAvg, FedProx, FedAdam and their like,
            which see the replies only by their mean.
        clip_norm: largest L2 norm of a node's update. Without noise it is no more than the range of
            the integers: choose it above what updates have.
        max_examples: most examples that a node counts with; None, and noise without
            ``noisy_weights``, let every node count as one. Rounding, or noise, grows with its ratio
            to what nodes have, so set it to about the largest node, and to 1 for weights that add
            up to one.
        noisy_weights: with noise, whether nodes count with their examples all the same. Their sum
            is then a coefficient more, within the sensitivity, and has noise like all others.
        metrics: name and largest magnitude of each training metric whose mean is wanted; all other
            metrics stay on the nodes. Not with noise.
        noise_multiplier: noise over the sensitivity of the sum, made by the nodes.
        epsilon: largest ε against the server at ``delta``. The noise is calibrated for it where
            ``noise_multiplier`` is not given; a round that would exceed it is not started.
        rounds: attempts at rounds that ``epsilon`` is for; by default one for each round of
            :meth:`start`. An attempt that ends without a sum is charged too, so ask for more than
            rounds where none of these shall be lost.
        ledger: path of the ledger, needed with noise; one that is there is gone on with.
        colluding_share: part of a round's nodes that is assumed to tell the server their noise.
        remove_excess: whether survivors beyond the fewest take their noise off again.
        roster: path of a file with the identities of enrolled nodes, one a line; prekeys of others
            are not taken. Nodes check for themselves.
        enrolment_key: the key that certifies nodes, in place of a roster.
        evaluate_metrics: name and largest magnitude of each metric of the nodes' evaluation whose
            mean is wanted. They are a secure sum of their own after each round's training, with
            the same noise multiplier and an event of its own, which ``epsilon`` covers.
        evaluate_in_clear: whether evaluation is asked for, whose replies the server reads.
        timeout: seconds to wait for an exchange; by default that of :meth:`start`.

    Raises:
        UsageError: when settings contradict each other, or the strategy needs single replies.
    """

    strategy: Strategy
    _: KW_ONLY
    clip_norm: float
    max_examples: int | None = 10_000
    noisy_weights: bool = False
    metrics: Mapping[str, float] | None = None
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    rounds: int | None = None
    ledger: str | Path | None = None
    colluding_share: float = 0.05
    remove_excess: bool = True
    roster: str | Path | None = None
    enrolment_key: str | None = None
    evaluate_metrics: Mapping[str, float] | None = None
    evaluate_in_clear: bool = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        _check_interface(self.strategy)
        for kind in type(self.strategy).mro():
            flowers = kind.__module__.startswith("flwr.")
            if kind is SecureSum or (flowers and _ONE_BY_ONE.fullmatch(kind.__name__)):
                raise UsageError(
                    f"{kind.__name__} looks at each node's update by itself, and a secure sum "
                    "hides them: wrap a strategy that averages, such as FedAvg, FedProx or FedAdam"
                )
        most, noise_multiplier = self.max_examples, self.noise_multiplier
        noisy = noise_multiplier is not None or self.epsilon is not None
        if noisy != (self.ledger is not None):
            raise UsageError(
                "noise and its ledger go together: give ledger=PATH with noise_multiplier or "
                "epsilon, and none of them for a sum without noise"
            )
        if most is not None and (type(most) is not int or most < 1):
            raise UsageError(
                f"max_examples {most!r}: it must be a whole number of at least 1, or None for "
                "nodes that count alike"
            )
        if self.noisy_weights and not (noisy and most):
            raise UsageError("noisy_weights are for sums with noise: give max_examples and epsilon")
        if noise_multiplier is not None and noise_multiplier <= 0:
            raise UsageError(f"noise_multiplier {noise_multiplier}: it must be above 0")
        check_delta(self.delta)
        self._budget: SumBudget | None = None
        if self.ledger is not None:
            budget = math.inf if self.epsilon is None else self.epsilon
            self._budget = SumBudget(Path(self.ledger), self.delta, budget)
        self._given: dict[str, Any] = {
            "colluding_share": self.colluding_share,
            "remove_excess": self.remove_excess,
            "max_examples": 0 if noisy and not self.noisy_weights else most or 0,
            "weighted_by": getattr(self.strategy, "weighted_by_key", "num-examples"),
            "metrics": tuple((self.metrics or {}).items()),
        }
        self._evaluated = tuple((self.evaluate_metrics or {}).items())
        if self._evaluated and self.evaluate_in_clear:
            raise UsageError(
                "evaluate_metrics are summed under masks, and evaluate_in_clear is set: choose one"
            )
        self._kinds = (False, True) if self._evaluated else (False,)
        for evaluates in self._kinds:
            self._planned(evaluates, 3, 1, noise_multiplier or float(noisy))
        trust = {"roster": self.roster and str(self.roster), "enrolment-key": self.enrolment_key}
        self._anchor = anchor_of(trust) or Anyone()
        self._timeout_s = self.timeout
        self._run: str | None = None
        self._attempts: Counter[int] = Counter()
        self._registry: Registry | None = None
        self._open: _Open | None = None
        self._failed: ReleaseRefused | BudgetError | None = None
        self._released = self._measured = 0
        self._is_started = False
        self._is_wrapped = False

    # ------------------------------------------------------------------ Flower's own interface

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        **options: Any,
    ) -> Result:
        """Run the rounds; arguments and result are those of Flower's ``Strategy.start``.

        Raises:
            ReleaseRefused: when not one round gave a model; ``initial_arrays`` are what they were.
            BudgetError: when that is so since the budget does not reach for another round.
        """
        self._timeout_s = self.timeout or timeout
        self.rounds = self.rounds or num_rounds
        self._registry = self._failed = None  # this grid may have other nodes
        self._released = self._measured = 0
        if self._budget is None:
            self._run = None
            self._attempts.clear()
        self._is_started = True
        try:
            result = super().start(grid, initial_arrays, num_rounds, timeout, **options)
        finally:
            self._is_started = False
        if num_rounds < 1:
            result.arrays = initial_arrays
        if not result.arrays:
            raise self._without_model()
        if self._released < num_rounds:
            said = "secure sum: %d of %d rounds released a sum; the model is that of these"
            LOG.warning(said, self._released, num_rounds)
        if self._evaluated and (n := self._measured) < num_rounds:
            LOG.warning("secure sum: %d of %d evaluations released metrics", n, num_rounds)
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the app's own training messages, each with what its node needs to mask its reply.

        There are none when the round cannot be, for which the log gives the reason.
        """
        if self._is_wrapped:
            raise UsageError(
                "a strategy around SecureSum, such as Flower's DifferentialPrivacy wrappers, would "
                "get masked integers for updates: make SecureSum the outermost and start it "
                "itself; for noise give it epsilon or noise_multiplier, and a ledger"
            )
        messages = self.strategy.configure_train(server_round, arrays, config, grid)
        return self._asking(server_round, list(messages), grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return what the app's own strategy makes of the mean; nothing when there is no sum."""
        open, mean = self._ended(server_round, replies)
        if open is None or mean is None:
            return None, None
        self._released += 1
        arrays, metrics = self.strategy.aggregate_train(server_round, [mean])
        sent = open.sent.content
        return arrays and plans.with_others_of(arrays, sent), _with_epsilon(metrics, open)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the app's own messages: for a secure sum, in clear where allowed, else none."""
        if self._evaluated or self.evaluate_in_clear:
            asked = list(self.strategy.configure_evaluate(server_round, arrays, config, grid))
            return self._asking(server_round, asked, grid, True) if self._evaluated else asked
        if server_round == 1:
            LOG.info(
                "secure sum: nodes are not asked to evaluate, since each reply would be in clear; "
                "name evaluate_metrics or training metrics, evaluate on the server, or set "
                "evaluate_in_clear"
            )
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return what the app's own strategy makes of the mean, or of replies in clear."""
        if self.evaluate_in_clear:
            answers = list(replies)
            return self.strategy.aggregate_evaluate(server_round, answers) if answers else None
        open, mean = self._ended(server_round, replies)
        if open is None or mean is None:
            return None
        self._measured += 1
        return _with_epsilon(self.strategy.aggregate_evaluate(server_round, [mean]), open)

    def summary(self) -> None:
        """Log the settings, then those of the app's own strategy.

        Flower asks the strategy that is started, and each asks the one that it is around.
        """
        self._is_wrapped = not self._is_started
        multiplier = self.noise_multiplier or "from epsilon"
        noise = f"multiplier {multiplier}, ledger {self.ledger}" if self.ledger else "none"
        LOG.info("\t├──> Secure sum: clip norm %g, noise: %s", self.clip_norm, noise)
        self.strategy.summary()

    # ------------------------------------------------------------------ before the training

    def _asking(
        self, server_round: int, messages: list[Message], grid: Grid, evaluates: bool = False
    ) -> list[Message]:
        """The app's own messages, of a sum that has begun; none when it cannot be."""
        self._open = None
        try:
            return self._begin(server_round, messages, grid, evaluates) if messages else []
        except (ReleaseRefused, BudgetError) as error:
            self._give_up(server_round, error, evaluates)
            return []

    def _begin(
        self, server_round: int, messages: Sequence[Message], grid: Grid, evaluates: bool
    ) -> list[Message]:
        asked = {(id(m.content), m.metadata.message_type): m.content for m in messages}
        digests = {plans.content_digest(content, kind) for (_, kind), content in asked.items()}
        if len(digests) > 1:
            raise UsageError(
                "the strategy sends nodes different models or settings: a secure sum needs all to "
                "see the same, or a server could set one node apart; send all of them the settings "
                "of all, in one ConfigRecord by node id, where each finds its own"
            )
        registry = self._registry
        if registry is None or registry.grid is not grid:
            registry = self._registry = Registry(grid, self._anchor, _PREKEYS)
        registry.timeout_s = self._timeout_s
        registry.like = {message.metadata.dst_node_id: message for message in messages}
        registry.refused.clear()
        called = _called(registry)
        if self._run is None:
            self._run = secrets.token_hex(8) if self._budget is None else self._budget.begin()
        size = plans.size_of(plans.arrays_of(messages[0].content, "a message"))
        plan, attempt, epsilon = self._charged(server_round - 1, evaluates, len(called), size)
        terms = plan.terms(self._run, server_round - 1, attempt)
        prekeys = [member.prekeys.pop(0) for member in called]
        session = ServerSession(terms, prekeys, self._anchor)
        session.publish(list(digests))
        answered = registry.exchange(SHARES, session, plan=plan.pack())
        for member in called:
            if member.name not in answered:
                # Its prekeys may be those of a state that it lost: it is asked for new ones.
                member.prekeys.clear()
        session.advance()
        self._open = _Open(registry, session, plan, terms, messages[0], epsilon)
        return registry.asking(MASKED, session)

    def _planned(self, evaluates: bool, nodes: int, size: int, noise: float = 0.0) -> SumPlan:
        """The plan of a round's sum over so many nodes, of updates or of an evaluation."""
        if not evaluates:
            return plan_of(nodes, size, self.clip_norm, noise, **self._given)
        count = len(self._evaluated)
        given = {**self._given, "metrics": (), "evaluated": self._evaluated}
        # The norm of metrics that are 1 each, and what a norm in float32 is off by.
        return plan_of(nodes, count, math.sqrt(count) * _UP, noise, **given)

    def _charged(
        self, round: int, evaluates: bool, nodes: int, size: int
    ) -> tuple[SumPlan, int, float | None]:
        """The sum's plan, its attempt, and ε after it; paid for before anybody is asked."""
        if self._budget is None:
            self._attempts[round] += 1
            plan = self._planned(evaluates, nodes, size)
            return plan, self._attempts[round] - 1, None
        if self.noise_multiplier is None:
            epsilon, delta, rounds = self._budget.epsilon, self.delta, self.rounds or 1

            def events(noise: float) -> list[RoundEvent]:
                return [self._planned(kind, nodes, size, noise).event for kind in self._kinds]

            self.noise_multiplier = noise_multiplier_for(epsilon, delta, events, rounds, "server")
            said = "secure sum: noise multiplier %g meets epsilon with %d attempts at rounds"
            LOG.info(said, self.noise_multiplier, rounds)
        plan = self._planned(evaluates, nodes, size, self.noise_multiplier)
        return plan, *self._budget.charge(round, plan.event)

    # ------------------------------------------------------------------ after the training

    def _ended(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[_Open | None, Message | None]:
        """The sum that was open, and the reply that stands for all, if there is a sum."""
        open, self._open = self._open, None
        if open is None:
            return None, None
        try:
            return open, self._end(open, replies)
        except ReleaseRefused as error:
            self._give_up(server_round, error, bool(open.plan.evaluated))
            return open, None

    def _end(self, open: _Open, replies: Iterable[Message]) -> Message:
        """The reply that stands for all: the model moved by the mean update, or mean metrics."""
        session, plan = open.session, open.plan
        open.registry.take(session, replies)
        session.advance()
        for stage in (CONFIRM, UNMASK):
            open.registry.exchange(stage, session)
            session.advance()
        result = session.result
        for identity, fault in result.faults.items():
            LOG.warning("secure sum: device %s %s", identity.hex()[:16], fault)
        total = result.total.astype(np.int64)
        if plan.shares is not None and plan.remove_excess:
            total -= plan.shares.excess(result.excess)
        survivors = len(result.survivors[0])
        LOG.info("secure sum: %d of %d nodes are in it", survivors, len(open.registry.like))
        if self._budget is not None:
            self._budget.commit(open.terms.round, open.terms.attempt, total)
            spent = "secure sum: epsilon %g at delta %g against the server, for a whole node"
            LOG.info(spent, open.epsilon, self.delta)
        return _mean(open, total, survivors)

    def _without_model(self) -> ReleaseRefused | BudgetError:
        idle = "made no model of the mean" if self._released else "asked no node to train"
        error = self._failed or ReleaseRefused(f"{type(self.strategy).__name__} {idle}")
        return type(error)(f"no round gave a model: {error}")

    def _give_up(
        self, server_round: int, error: ReleaseRefused | BudgetError, evaluates: bool
    ) -> None:
        if evaluates:
            LOG.error("secure sum: the evaluation of round %d has no sum: %s", server_round, error)
            return
        said = "secure sum: round %d releases nothing, and the model stays as it was: %s"
        LOG.error(said, server_round, error)
        registry = self._registry
        if isinstance(error, ReleaseRefused) and registry is not None and registry.refused:
            node, why = min(registry.refused.items())
            error = ReleaseRefused(
                f"{error}; {len(registry.refused)} of {len(registry.like)} nodes answered with an "
                f"error, node {node}: {why}"
            )
        self._failed = error


def _check_interface(strategy: Any) -> None:
    """Refuse what is no strategy of Flower's Message API."""
    if isinstance(strategy, type):
        name = strategy.__name__
        raise UsageError(
            f"the class {name}, where a strategy is needed: give an instance: "
            f"SecureSum({name}(), ...)"
        )
    kind = type(strategy)
    if hasattr(strategy, "configure_fit"):
        raise UsageError(
            f"{kind.__name__} of {kind.__module__}: a strategy of Flower's legacy interface; "
            "import it from flwr.serverapp.strategy"
        )
    if not hasattr(strategy, "configure_train"):
        raise UsageError(
            f"the strategy is {strategy!r}: give one of flwr.serverapp.strategy, such as FedAvg()"
        )


def _called(registry: Registry) -> list[Member]:
    """A device of each node that is asked and gave prekeys, of which one is left."""

    def ready() -> dict[int, Member]:
        return {member.node: member for member in registry.members.values() if member.prekeys}

    known = ready()
    registry.greet(node for node in registry.like if node not in known)
    known = ready()
    called = [known[node] for node in registry.like if node in known]
    if len(called) < 2:
        raise ReleaseRefused(
            f"{len(called)} of {len(registry.like)} nodes gave prekeys: a sum of one hides nobody"
        )
    return called


def _with_epsilon(metrics: MetricRecord | None, open: _Open) -> MetricRecord | None:
    """What a sum gave, with ε after it where it was charged."""
    if open.epsilon is None:
        return metrics
    metrics = MetricRecord() if metrics is None else metrics
    metrics["epsilon"] = open.epsilon
    return metrics


def _mean(open: _Open, total: NDArray[np.int64], survivors: int) -> Message:
    plan = open.plan
    weight, shares, metrics = float(survivors), float(survivors), {}
    if plan.noise_multiplier and plan.max_examples:
        unit = plans.WEIGHT * plan.clip_norm
        shares = float(plan.encoding.decode(total[plan.size :])[0]) / unit
        noise, weight = plan.deviation(survivors) / unit, shares * plan.max_examples
        if shares <= 2 * noise:
            raise ReleaseRefused(
                f"numbers of examples add up to {weight:.4g}, with noise of "
                f"{noise * plan.max_examples:.4g}: they give no mean; lower max_examples"
            )
    elif len(total) > plan.size:
        tail = total[plan.size :]
        weight = float(tail[0]) / 2**plan.weight_bits
        if weight <= 0:
            raise ReleaseRefused("the nodes have no examples at all: there is no mean")
        shares = weight / (plan.max_examples or 1)
        metrics = plans.mean_metrics(plan, tail)
        clipped = "updates are longer than clip_norm, or not finite"
        cut = "nodes have more examples than max_examples"
        odd = (
            f"nodes gave a {plan.weighted_by} that is negative or not finite, and are left out of "
            f"the mean, or one that steps of 2^-{plan.weight_bits} change by more than 1 %; lower "
            "max_examples to about the largest"
        )
        for count, said in zip(tail[1:].tolist(), (clipped, cut, odd), strict=False):
            if count:
                LOG.warning("secure sum: %d of %d %s", count, survivors, said)
    change = plan.encoding.decode(total[: plan.size], shares)
    for (metric, most), value in zip(plan.evaluated, change.tolist(), strict=False):
        metrics[metric] = most * value
    record = MetricRecord({plan.weighted_by: weight, **metrics})
    if plan.evaluated:
        return Message(RecordDict({"metrics": record}), reply_to=open.sent)
    content = RecordDict({**plans.moved(open.sent.content, change), "metrics": record})
    return Message(content, reply_to=open.sent)


@dataclass
class SumBudget:
    """The write-ahead ledger of one population of nodes, over one run or several.

    ε is against the server, which knows who takes part: nobody's sampling is counted on. Its
    ``run`` is the id in every secure sum.
    """

    path: Path
    delta: float
    epsilon: float
    run: str = ""

    def begin(self) -> str:
        """Begin the ledger, or check the one that is there; return its run."""
        if self.path.exists():
            with Ledger.open(self.path, repair=False) as ledger:
                delta, self.run = ledger.header["delta"], str(ledger.header["run_id"])
            if delta != self.delta:
                raise IntegrityError(
                    f"{self.path}: it is about delta = {delta}, not {self.delta}; go on with the "
                    "same, or begin another ledger for other nodes"
                )
            self._opened().close()
        else:
            self.run = secrets.token_hex(8)
            unit = "one node: all that one Flower node trains on"
            header = {"run_id": self.run, "delta": self.delta, "version": __version__, "note": unit}
            key, kept = server_key(self._secret("server.key")), self._secret("head.json")
            SecretRoot.create(self._secret("server.root"))
            ledger = Ledger.create(
                self.path, unit="node", header=header, signing_key=key, kept=kept
            )
            ledger.close()
        return self.run

    def charge(self, round: int, event: RoundEvent) -> tuple[int, float]:
        """Pay for another attempt at a round, on disk before this returns; which one, and ε of all.

        One that would exceed ``epsilon`` is refused, and not charged.
        """
        with self._opened() as ledger:
            spent = ledger.epsilon_after(event, delta=self.delta, adversary="server")
            if spent > self.epsilon:
                raise BudgetError(
                    f"round {round + 1} would bring epsilon to {spent:g} at delta {self.delta:g}, "
                    f"above the {self.epsilon:g} that was set; it is not started, and what was "
                    "released before stays within the budget"
                )
            attempt = ledger.attempts(round)
            ledger.charge(event, round, attempt)
            ledger.seal()
            return attempt, spent

    def commit(self, round: int, attempt: int, total: NDArray[np.int64]) -> None:
        """Say on disk what a round releases, before it is released."""
        with self._opened() as ledger:
            root = SecretRoot.load(self._secret("server.root"))
            released = statement("flower release", total.astype("<i8").tobytes())
            ledger.commit(round, attempt, root.tag("release", round, attempt, released))
            ledger.seal()

    def _opened(self) -> Ledger:
        key = server_key(self._secret("server.key"), new=False)
        return Ledger.open(self.path, signing_key=key, kept=self._secret("head.json"))

    def _secret(self, name: str) -> Path:
        return state_dir() / "flower" / self.run / name
