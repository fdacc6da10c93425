"""The words of the report: the claim, who it is against, whom one must trust, and the warnings.

Kept apart from figures so that a reviewer can read every sentence privrec is able to print about
privacy in one file. Nothing here computes an ε.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from privrec.report.figures import delta_text
from privrec.report.model import Adversary, Notice
from privrec.run.wording import REVEALED, epsilon_text


@dataclass(frozen=True)
class Facts:
    """What the sentences depend on; names and units as in `model.Privacy`."""

    scenario: str
    simulated: bool
    noise: Literal["central", "distributed", "none"]
    noise_known: bool
    epsilon: float | None
    epsilon_server: float | None
    epsilon_rdp: float | None
    epsilon_server_rdp: float | None
    delta: float | None
    sampling: Literal["poisson", "everybody"]
    sampling_rate: float
    population: int | None
    budget: float | None
    budget_against: Literal["recipients", "server"]
    rounds: int
    planned_rounds: int
    charges: int
    holdout: Literal["test", "validation"]
    evaluations: int
    further_runs: int = 0
    runs_before: int = 0
    public_popularity: bool = False
    requested: bool = False
    texts: bool = False
    popularity_released: bool = False
    excess_removed: bool = True
    least_survivors: float = 0.67
    colluding_share: float = 0.05
    masked: bool = False
    missing: tuple[str, ...] = ()
    examples: bool = False

    @property
    def hides_cohorts(self) -> bool:
        """Whether ε against recipients rests on cohorts that they do not know."""
        shown = self.noise == "distributed" and not self.excess_removed
        return self.sampling == "poisson" and not shown

    @property
    def private(self) -> bool:
        """Whether a finite ε holds against anybody, and the report is whole."""
        finite = self.noise != "none" and not self.noise_known and self.epsilon is not None
        return finite and not self.missing


def claim(facts: Facts) -> str:
    """The guarantee as a sentence or two; without one it says so."""
    opening = _subject(facts)
    if facts.noise == "none":
        whole = "no guarantee at user level" if facts.examples else "no privacy guarantee"
        added = "to the sums" if facts.examples else "to what it released"
        return f"{opening} has {whole}: no noise was added {added}."
    if facts.missing and not facts.noise_known:
        return (
            f"{opening} makes no privacy claim: its files do not tell the parts of the report that "
            f"a claim needs ({', '.join(facts.missing)})."
        )
    if not facts.private:
        return f"{opening} has no privacy guarantee: its noise can be known (ε = ∞)."
    return f"{opening} is {_guarantee(facts)} {_server_sentence(facts)}"


def _subject(facts: Facts) -> str:
    kind = "This simulated training run" if facts.simulated else "This training run"
    users = f" over {facts.population:,} users" if facts.population else ""
    return f"{kind} of “{facts.scenario}” ({facts.rounds:,} rounds{users})"


def _guarantee(facts: Facts) -> str:
    spent = f"({epsilon_text(facts.epsilon)}, {delta_text(facts.delta)})-differentially private"
    unit = "at user level (neighbours differ in one user’s history being there or not)"
    if not facts.hides_cohorts:
        return f"{spent} {unit}, against recipients of the released models."
    return (
        f"{spent} {unit}, against recipients of the released models who do not know "
        "which users took part in which round."
    )


def _server_sentence(facts: Facts) -> str:
    known = epsilon_text(facts.epsilon_server)
    if facts.noise == "distributed":
        return _operator_sentence(facts, known)
    if facts.sampling == "everybody":
        return (
            "Everybody takes part in every round, so the same ε holds against somebody who knows "
            "every cohort."
        )
    return f"Against somebody who knows every cohort and sees every release, ε is {known}."


def _operator_sentence(facts: Facts, known: str) -> str:
    """Noise that devices add protects from whoever runs the server, where it is a deployment."""
    conditions = (
        f"at most {facts.colluding_share:.0%} of the devices collude with it and somebody else "
        "enrols them"
    )
    if not facts.simulated:
        return f"Against the server and its operator ε is {known}, if {conditions}."
    return (
        f"In a deployment with these settings ε against the server and its operator is {known}, if "
        f"{conditions}. No ε holds against the owner of the machine that simulated this run."
    )


def adversaries(facts: Facts) -> tuple[Adversary, ...]:
    """Both adversaries with their ε; without a guarantee both are infinite."""
    finite = facts.private
    return (
        Adversary(
            name="recipients",
            epsilon=facts.epsilon if finite else None,
            epsilon_rdp=facts.epsilon_rdp if finite else None,
            sees="Every released model, or anything computed from one.",
            assumes=_recipients_assume(facts),
            limits_run=facts.budget is not None and facts.budget_against == "recipients",
        ),
        Adversary(
            name="server",
            epsilon=facts.epsilon_server if finite else None,
            epsilon_rdp=facts.epsilon_server_rdp if finite else None,
            sees=_server_sees(facts),
            assumes=_server_assumes(facts),
            limits_run=facts.budget is not None and facts.budget_against == "server",
        ),
    )


def _server_sees(facts: Facts) -> str:
    if facts.noise == "distributed":
        return (
            "Every noisy sum, and with it every released model; who was in every cohort and who "
            f"dropped out; the noise of up to {facts.colluding_share:.0%} of a cohort’s devices."
        )
    return "Every released model, and who was in every cohort."


def _server_assumes(facts: Facts) -> str:
    if facts.noise == "distributed":
        return (
            f"At most {facts.colluding_share:.0%} of the devices expected in a round collude with "
            "it, and somebody other than the server enrols devices."
        )
    return "The sums before noise, and the noise root, stay inside the server."


def _recipients_assume(facts: Facts) -> str:
    hidden = "The sums before noise and the noise root stay inside the server"
    if facts.noise == "distributed":
        hidden = (
            f"At most {facts.colluding_share:.0%} of the devices expected in a round tell others "
            "their noise"
        )
    if facts.sampling == "everybody":
        return f"{hidden}. Nothing rests on sampling: everybody takes part."
    if not facts.hides_cohorts:
        return (
            f"{hidden}. Nothing rests on sampling: the variance of the noise tells how many took "
            "part, so no amplification is counted."
        )
    return (
        f"{hidden}. The cohorts, their sizes and who dropped out stay hidden too, since this ε is "
        "amplified by sampling. For the same reason this report holds no realised cohort size."
    )


def trust(facts: Facts) -> str:
    """Who must be trusted with what."""
    simulation = (
        "In this simulation every history lies on one machine: the figures say what a deployment "
        "with these settings would promise, not what this machine’s owner can see."
    )
    if facts.noise == "none":
        return f"No protection is claimed, so nobody’s honesty is relied on. {simulation}"
    if facts.noise == "distributed":
        return f"{_nobody(facts)} {simulation}" if facts.simulated else _nobody(facts)
    server = (
        "One server is trusted. It adds up the users’ clipped updates, adds the noise to the sum "
        "and only then releases the result. No ε here holds against the server’s own operator, "
        "who could read the sums before noise, or reveal the cohorts or the noise."
    )
    return f"{server} {simulation}" if facts.simulated else server


def _nobody(facts: Facts) -> str:
    masks = "" if facts.masked else " This simulation added the same integers without the masks."
    place = "Each device" if facts.masked else "In a deployment, each device"
    return (
        f"{place} bounds the size of its update, adds a share of the noise and masks the result. "
        "The server learns the noisy sum alone. Two things must hold: at most "
        f"{facts.colluding_share:.0%} of the devices tell the server their noise or leave it out, "
        f"and somebody other than the server enrols the devices.{masks}"
    )


def mechanism(facts: Facts) -> str:
    """The mechanism of one round, in words."""
    if facts.noise == "none":
        return "Sum of updates, without noise."
    if facts.noise == "distributed":
        return _shares(facts)
    return (
        "Gaussian mechanism on the integer sum: each user’s update is clipped in L2 norm and "
        "rounded to integers within an enforced bound; Gaussian noise, rounded on the same grid "
        "and drawn from a cryptographic generator, is added to every coordinate."
    )


def _shares(facts: Facts) -> str:
    rest = (
        "The noise of survivors beyond the fewest is taken off again by seeds that they reveal, so "
        "that the variance is the accounted one whoever drops out."
        if facts.excess_removed
        else "A round with more survivors carries more noise than is accounted."
    )
    return (
        "Sum of integers with noise in shares: each user’s update is clipped in L2 norm and "
        "rounded to integers within an enforced bound; every device adds discrete Gaussian noise "
        "from a cryptographic generator to every coordinate that it holds. Accounted are the "
        f"shares of the fewest survivors of each band, {facts.least_survivors:.0%} of the devices "
        f"expected there, less {facts.colluding_share:.0%} who may collude; with fewer survivors "
        f"nothing is released. {rest}"
    )


def warnings(facts: Facts) -> tuple[Notice, ...]:
    """Everything a reader must know before relying on the claim, the serious first."""
    found = [
        *_no_guarantee(facts),
        *_told(facts),
        *_weaknesses(facts),
        *_public_order(facts),
        *_further_runs(facts),
        *_earlier_runs(facts),
        *_stopped(facts),
        *_selection(facts),
    ]
    return tuple(sorted(found, key=lambda notice: notice.level != "serious"))


def _no_guarantee(facts: Facts) -> Iterator[Notice]:
    if facts.noise == "none" and facts.examples:
        yield Notice(
            level="serious",
            grade="critical",
            title="No guarantee at user level",
            text="Devices hide single interactions. What many interactions of a user show together "
            "is not hidden: no noise was added to the sums. Set privacy.noise for users as a "
            "whole.",
        )
    elif facts.noise == "none":
        yield Notice(
            level="serious",
            grade="critical",
            title="No privacy guarantee",
            text="No noise was added. The released model can reveal single users’ histories; "
            "do not release it outside the circle that may see the histories themselves.",
        )
    if facts.noise_known:
        yield Notice(
            level="serious",
            grade="critical",
            title="The noise is known: ε = ∞",
            text="The noise root was injected (unsafe_noise_key) to make the run reproducible. "
            "Whoever has that key can subtract the noise. Use such a run for comparisons alone.",
        )


def _told(facts: Facts) -> Iterator[Notice]:
    if facts.requested:
        yield Notice(
            level="serious",
            grade="critical",
            title="The server is told which words each device uses",
            text=f"Devices asked the server for output neurons. {REVEALED} Devices that select "
            'neurons themselves tell it nothing (train.scheme = "private").',
        )


def _weaknesses(facts: Facts) -> Iterator[Notice]:
    if not facts.private or facts.delta is None or facts.epsilon is None:
        return
    if facts.population and facts.delta >= 1 / facts.population:
        yield Notice(
            level="serious",
            grade="critical",
            title="δ is too large for this population",
            text=f"δ = {delta_text(facts.delta)} is not below 1/{facts.population:,}, one over the "
            "number of users: a mechanism that publishes one whole user would satisfy it. "
            f"Choose δ well below {1 / facts.population:.1g}.",
        )
    if facts.epsilon > 10:
        yield Notice(
            level="serious",
            grade="critical",
            title="ε is large",
            text=f"At ε = {epsilon_text(facts.epsilon)} the worst-case promise is weak: it lets "
            "the odds of a guess about one user grow by a factor of e to the ε. Rely on it only "
            "together with an empirical audit.",
        )
    yield from _amplification(facts)
    yield from _enrolment(facts)
    if facts.charges > facts.rounds:
        yield Notice(
            level="caution",
            grade="negligible",
            title="Some rounds were charged more than once",
            text=f"The ledger holds {facts.charges:,} charges for {facts.rounds:,} rounds: the "
            "run was interrupted after a charge and tried again. All charges are counted in ε.",
        )


def _public_order(facts: Facts) -> Iterator[Notice]:
    if facts.private and facts.public_popularity:
        yield Notice(
            level="serious",
            grade="critical",
            title="The order of the catalogue is outside the guarantee",
            text="Which items are popular was counted in the users’ own data without noise, and "
            "the operator declares it public (devices.popularity). ε covers the training alone; "
            "release the counts with noise where they are not public already.",
        )


def _amplification(facts: Facts) -> Iterator[Notice]:
    known, hidden = facts.epsilon_server, facts.epsilon
    if not facts.hides_cohorts or known is None or hidden is None or known <= 2 * hidden:
        return
    yield Notice(
        level="caution",
        grade="critical",
        title="The claim rests on secret cohorts",
        text=f"If it becomes known who took part in which round, ε = {epsilon_text(hidden)} no "
        f"longer holds, and ε = {epsilon_text(known)} does. Keep cohorts, their sizes and "
        "drop-outs, and logs that show them, with the operator.",
    )


def _enrolment(facts: Facts) -> Iterator[Notice]:
    if facts.noise == "distributed":
        yield Notice(
            level="caution",
            grade="critical",
            title="ε against the server rests on who enrols devices",
            text="A server that can enrol devices itself can surround one device with its own and "
            "learn that device’s update. Enrolment belongs to somebody else.",
        )


def _further_runs(facts: Facts) -> Iterator[Notice]:
    if facts.private and facts.further_runs:
        yield Notice(
            level="caution",
            grade="critical",
            title="Further runs used the same users",
            text=f"The settings compared took {facts.further_runs:,} further runs over the same "
            "users, each with a ledger and an ε of its own. Over several runs ε and δ add up: to "
            "whoever gets something from more than one of them, the sum applies.",
        )


def _earlier_runs(facts: Facts) -> Iterator[Notice]:
    if facts.private and facts.runs_before:
        yield Notice(
            level="caution",
            grade="critical",
            title="Earlier runs on this data are not in ε",
            text=f"The run store has {facts.runs_before:,} earlier runs on this data. If settings "
            "were chosen by them, or their models given away, ε of all of them adds up; tie runs "
            "to one budget with --population.",
        )


def _stopped(facts: Facts) -> Iterator[Notice]:
    if facts.rounds < facts.planned_rounds:
        yield Notice(
            level="caution",
            grade="negligible",
            title="The run stopped before its last round",
            text=f"{facts.rounds:,} of {facts.planned_rounds:,} planned rounds were finished; the "
            "next one would have spent more than the budget.",
        )


def _selection(facts: Facts) -> Iterator[Notice]:
    if facts.holdout == "test" and facts.evaluations > 1:
        yield Notice(
            level="caution",
            grade="theoretical",
            title="The test split was looked at during training",
            text="ε is not affected. Accuracy on the test split was computed "
            f"{facts.evaluations:,} times, so it looks better than it is if anything was chosen by "
            "it. Quote the last values only, and choose settings on a validation split "
            '(data.holdout = "validation").',
        )
    if facts.holdout == "validation":
        yield Notice(
            level="caution",
            grade="theoretical",
            title="Metrics are of a validation split",
            text="They serve for choosing settings. A setting chosen for its metric here looks "
            "better than it is; quote figures of the test split.",
        )
