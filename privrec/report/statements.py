"""The parts of a report that are sentences, each from facts of the run.

With :mod:`privrec.report.claims` this is every sentence about privacy that privrec can print. A
snapshot test holds the sentences, another one that each fact in them is that of the run.
"""

from __future__ import annotations

from collections.abc import Iterator

from privrec.report.claims import Facts
from privrec.report.model import (
    Actor,
    Definition,
    Deployment,
    Fallback,
    OperatorsWord,
    Outputs,
    OutsideTheLedger,
    Scope,
    TrustModel,
)
from privrec.run.header import LedgerHeader
from privrec.run.wording import epsilon_text


def scope(facts: Facts) -> Scope:
    """Whose data is protected, and what is not."""
    protects = (
        "Nobody’s data is protected: no noise that stays secret was added."
        if not facts.private
        else "The whole history of each enrolled user, and everything that the user’s device sends "
        "because of it, in all rounds together."
    )
    return Scope(
        protects=protects,
        not_protected=(
            "That somebody is enrolled, which capacity (tier) their device has, and when it takes "
            "part.",
            "What the population does: a habit that most users share can be learnt, also about "
            "somebody whose history was never used.",
            "Groups, such as a family with like histories: for k users together ε is k times as "
            "large, and δ grows too.",
            "A person with several accounts: each is protected by itself, together they are less.",
            "Recommendations, which are made from a user’s own history for that user’s eyes.",
        ),
    )


def trust_model(facts: Facts) -> TrustModel:
    """Actors, collusion, drop-outs, and what is left when an assumption fails."""
    if not facts.private:
        kind = "nobody is relied on"
    else:
        kind = "devices" if facts.noise == "distributed" else "trusted server"
    return TrustModel(
        kind=kind,  # type: ignore[arg-type]  # one of the three words
        actors=tuple(_actors(facts)),
        collusion=_collusion(facts),
        drop_outs=_drop_outs(facts),
        fallbacks=tuple(_fallbacks(facts)),
    )


def _actors(facts: Facts) -> Iterator[Actor]:
    finite, hidden = facts.private, facts.epsilon
    distributed = facts.noise == "distributed"
    known = facts.epsilon_server if finite else None
    yield Actor(
        name="recipients of the models",
        sees="Every released model.",
        trusted_with="Nothing.",
        epsilon=hidden if finite else None,
    )
    yield Actor(
        name="the server and its operator",
        sees="Noisy sums, cohorts and drop-outs."
        if distributed
        else "Every sum before its noise, the noise, and every cohort.",
        trusted_with=_operator_trusted(facts),
        epsilon=known if distributed else None,
    )
    yield Actor(
        name="the other devices",
        sees="The models that they are sent.",
        trusted_with=f"To add their noise and keep it secret; up to {facts.colluding_share:.0%} of "
        "those expected in a round may fail."
        if distributed
        else "Nothing about privacy; they can spoil the model.",
        epsilon=hidden if finite else None,
    )
    if distributed:
        yield Actor(
            name="whoever enrols devices",
            sees="Who is enrolled.",
            trusted_with="Not to be the server, and to enrol one device for each user.",
            epsilon=known,
        )


def _operator_trusted(facts: Facts) -> str:
    if not facts.private:
        return "With everything: no protection is claimed."
    if facts.noise == "distributed":
        kept = ", and with keeping the cohorts from recipients" if facts.hides_cohorts else ""
        return (
            "In a deployment, not with histories or single updates; with keeping the service "
            f"running{kept}, and not with enrolling devices."
        )
    secrecy = ", to keep the cohorts from recipients" if facts.hides_cohorts else ""
    return (
        "To add the noise, to keep the sums and the noise to itself"
        f"{secrecy} and to sample as declared."
    )


def _collusion(facts: Facts) -> str:
    if not facts.private:
        return "No protection is claimed that collusion could break."
    if facts.noise == "distributed":
        return (
            f"Up to {facts.colluding_share:.0%} of the devices expected in a round may tell the "
            "server their noise, or leave it out: their shares are not counted. With more of them "
            "less noise is secret, and ε is larger than printed. A third or more, together with "
            "the server, can also take off the masks of others."
        )
    return (
        "Devices that work together learn what recipients learn. A server that works with anybody "
        "can tell them the sums before noise: then no ε holds."
    )


def _drop_outs(facts: Facts) -> str:
    if facts.noise == "distributed":
        rest = (
            "Where more devices finish than that, the surplus of noise is taken off by seeds that "
            "they reveal for it; ε does not count on that noise."
            if facts.excess_removed
            else "More survivors carry more noise, which shows how many there were."
        )
        return (
            f"A round with fewer than {facts.least_survivors:.0%} of the devices expected in a "
            f"band releases nothing and still counts towards ε. {rest}"
        )
    if not facts.private:
        return "Whoever drops out is not in the sum."
    return (
        "Whoever drops out is not in the sum; the noise is the server’s and does not depend on "
        "it. An empty round releases noise alone."
    )


def _fallbacks(facts: Facts) -> Iterator[Fallback]:
    if not facts.private:
        return
    if facts.hides_cohorts:
        yield Fallback(
            when="Cohorts, their sizes or drop-outs become known to recipients",
            epsilon=facts.epsilon_server,
            means=f"ε = {epsilon_text(facts.epsilon_server)} instead of "
            f"{epsilon_text(facts.epsilon)}: sampling then hides nothing.",
        )
    if facts.noise == "distributed":
        yield Fallback(
            when=f"More than {facts.colluding_share:.0%} of an expected cohort collude with the "
            "server",
            epsilon=None,
            means="Less secret noise than is accounted: the ε of this report no longer holds.",
        )
        yield Fallback(
            when="The server lies about who dropped out, or sends devices different models",
            epsilon=facts.epsilon_server,
            means="It can spoil or stop a round. Devices compare what they were told before they "
            "unmask, so that it gets no sum of fewer devices and less noise than are accounted.",
        )
        yield Fallback(
            when="The server enrols devices itself",
            epsilon=None,
            means="It can surround one device with its own and learn that device’s update: no ε "
            "holds against it.",
        )
        return
    yield Fallback(
        when="The server lies: it keeps the sums, leaves out the noise or does not sample",
        epsilon=None,
        means="No ε holds. Nothing in this report can show that it did not.",
    )
    yield Fallback(
        when="The noise root is copied",
        epsilon=None,
        means="Whoever has it can subtract the noise: no ε holds against them.",
    )


def definition(facts: Facts, declaration: LedgerHeader) -> Definition:
    """The statement that ε and δ are about."""
    scenario = declaration.scenario
    cap = getattr(scenario.data, "max_history", None)
    bounds = [
        f"One user’s update has an L2 norm of at most {scenario.privacy.clip_norm:g} in a round, "
        "over all coefficients together."
        if scenario.privacy.clip_norm
        else "One user’s update is bounded by the range of its integers alone.",
        f"A user can be in each of the {facts.planned_rounds:,} planned rounds.",
        f"A history is cut to its {cap:,} most recent interactions."
        if cap
        else "The length of a history is not bounded, and need not be: the update is.",
    ]
    if scenario.devices.popularity == "released":
        bounds.append(
            f"At most {scenario.devices.popularity_items:,} items of a user count towards the "
            "popularity order."
        )
    return Definition(
        unit="user",
        adjacency="zero-out",
        neighbours="Two data sets are neighbours when one user’s history in the one is replaced "
        "by none in the other. Who is enrolled is the same in both.",
        contribution_bounds=tuple(bounds),
        data_domain=_domain(facts),
        unprotected_quantities=(
            "enrolment",
            "the tier of a device",
            "participation and timing, towards the server",
            *(("the order of the catalogue by popularity",) if facts.public_popularity else ()),
        ),
    )


def _domain(facts: Facts) -> str:
    if facts.texts:
        return (
            "Texts, or labelled examples, over a public vocabulary, those of one user id together. "
            "The words, the number of users and the scenario are public."
        )
    return (
        "Histories of interactions with items of a public catalogue, one history a user id. The "
        "catalogue, the number of users and the scenario are public."
    )


def outputs(facts: Facts) -> Outputs:
    """What may be released under the claim."""
    if not facts.private:
        covered: tuple[str, ...] = ("Nothing: there is no claim.",)
    else:
        covered = (
            f"All {facts.rounds:,} released models together, one after each round.",
            "Anything computed from them without looking at the data again.",
        )
        if facts.popularity_released:
            covered = (*covered, "The popularity order of the catalogue, which was charged.")
    return Outputs(
        covered=covered,
        not_covered=(
            "Metrics, losses, costs and facts of the data in this report: computed without noise.",
            "Checkpoints of an unfinished run, which hold user vectors.",
            "Recommendations shown to anybody but the user.",
            "Other runs over the same users, which have ledgers of their own.",
        ),
    )


def outside_the_ledger(facts: Facts, declaration: LedgerHeader) -> OutsideTheLedger:
    """What no charge tells."""
    scenario, standing = declaration.scenario, declaration.standing
    return OutsideTheLedger(
        runs_before=standing.runs,
        tuning=_tuning(facts, declaration),
        preprocessing="Reading, splitting and cutting histories looks at each user alone"
        + (
            "; items are ordered by counts of the users’ own data, declared public."
            if facts.public_popularity
            else " and releases nothing."
        ),
        early_stopping="No round is skipped or chosen for its metric: the run ends after "
        f"{scenario.train.rounds:,} planned rounds or where its budget ends.",
        pre_training="None: weights start from public randomness.",
    )


def _tuning(facts: Facts, declaration: LedgerHeader) -> str:
    standing = declaration.standing
    if standing.population is not None:
        return (
            f"{standing.runs:,} runs came before in the ledger of the population "
            f"“{standing.population}”, tuning included, and are charged to its lifetime budget."
        )
    rows = (
        f" The scenario compares settings in {facts.further_runs:,} further runs, none of which "
        "is in this ε."
        if facts.further_runs
        else ""
    )
    if standing.runs == 0:
        return (
            "Not known. This machine recorded no earlier run on this data; runs elsewhere are not "
            "seen, and how the settings were chosen is not recorded. If they were chosen by "
            f"looking at these histories, that is not in ε.{rows}"
        )
    return (
        f"The run store of this machine has {standing.runs:,} earlier runs on this data. They are "
        "not charged here: if settings were chosen by them, ε of all of them adds "
        f"up.{rows}"
    )


def deployment(facts: Facts) -> Deployment:
    """Whether it is real, and whether as many users as are accounted for."""
    users = f"{facts.population:,} users" if facts.population else "an unknown number of users"
    text = (
        f"Simulated: {users} are records of a data set on one machine, and exactly as many are "
        "accounted for. A deployment over fewer users has the same ε with less accuracy; δ is to "
        "be compared with one over its own number."
        if facts.simulated
        else f"Deployed: {users} are declared as enrolled, and sampling is accounted for them. "
        f"{_fewer(facts)} Several identities of one person do raise that person’s ε."
    )
    return Deployment(simulated=facts.simulated, accounted_population=facts.population, text=text)


def _fewer(facts: Facts) -> str:
    if facts.noise == "distributed" and facts.sampling == "poisson":
        return (
            "With fewer real devices rounds would end more often without a release, and that costs "
            "more of δ than is counted."
        )
    return "Fewer real devices make no difference to ε."


def operator_statement(facts: Facts) -> tuple[OperatorsWord, ...]:
    """What no verifier can see from the files, so that it rests on the operator’s word."""
    found = [
        (
            "That cohorts were sampled as declared",
            "Who took part is kept from everybody; a cohort of fixed size, or one chosen by hand, "
            "would leave the same files.",
        )
        if facts.sampling == "poisson"
        else (
            "That everybody was asked in every round",
            "Leaving users out costs them nothing; the model is then of fewer users.",
        ),
        (
            "That the noise was added, secret, and not drawn from a copied root",
            "The ledger fixes what was released. It cannot show that nobody knew the noise.",
        ),
        (
            "That clients run this code",
            "Clipping is done on devices; in a deployment, nobody else can check it. The norm of "
            "a sum is looked at, not that of an update.",
        )
        if not facts.simulated
        else (
            "That this code ran unchanged",
            "The version is named, not proven. The part “Audit of this build” says what was "
            "looked at, if anything.",
        ),
        (
            "That tuning and other runs were recorded",
            "Runs on another machine, or whose store was deleted, are in no count.",
        ),
        (
            "That each enrolled user is a real and different person",
            "Invented users make sampling look rarer than it was, and δ small for the number of "
            "people."
            if facts.sampling == "poisson"
            else "Invented users make δ look small for the number of people.",
        ),
        (
            "Accuracy, costs and facts of the data",
            "They come from private data that no verifier has.",
        ),
        (
            "That no older copy of the run was continued elsewhere",
            "A ledger shows what was done to itself, not that another one exists.",
        ),
    ]
    return tuple(OperatorsWord(title=title, text=text) for title, text in found)
