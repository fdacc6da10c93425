"""Probes of the noise: how much, of which law, in every band, and new every time.

Those of lazy noise: whoever reads a row gets all the noise that it owes, and once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice, pairwise, product

import numpy as np
from scipy import stats

from privrec.audit.harness import (
    ALPHA,
    Floats,
    Harness,
    Integers,
    checked,
    count_p,
    distance_p,
    judged,
    of_many,
    product_p,
    seen_deviation,
    two_sided,
    variance_p,
)
from privrec.device.samples import Histories
from privrec.device.update import FIGURES, BoundedUpdate, Round, SideSum
from privrec.errors import ReleaseRefused
from privrec.privacy.events import Mechanism
from privrec.privacy.lazy import LazyMemory
from privrec.privacy.mechanism import Shares, noise_seeds
from privrec.privacy.pending import LinearStep, Normals
from privrec.randomness import SecretRoot
from privrec.report.model import Checked
from privrec.run.simulation import side_sum
from privrec.server.server import released_sum

DRAWS = 400_000
"""Coefficients of each band to look at, where that is not too dear: 0.9 % of σ is then seen."""
MOST_CENTRAL = 60_000_000
MOST_SHARES = 1_000_000_000
_A_SHARE = 8000  # coefficients that can be drawn in the time that opening a share takes
FEWEST_ROUNDS, MOST_ROUNDS, MOST_LISTED = 6, 600, 1000
_COLUMNS = 2048
_FAR = 3.5  # deviations; beyond lie 4.65e-4 of a Gaussian
_A_FEW = 100  # devices whose counts are looked at
_FOUND = (0.5, 1.0, 3.0, -3.0, math.inf, -math.inf, math.nan)  # figures that devices may come to
_MOST_SHORT = 300  # sums of a few figures, which cost as much as longer ones
_NARROW = 30.0  # deviation in steps below which laws of integers differ visibly


@dataclass(frozen=True)
class Transcript:
    """The noise of many releases in one band.

    ``sketch`` is integer noise at some of its coefficients, ``(releases, places)``; ``squares`` and
    ``sums`` are those of the standardised noise over all releases, by coefficient.
    """

    name: str
    sketch: Integers
    deviations: Floats
    squares: Floats
    sums: Floats
    mechanism: Mechanism

    @property
    def standard(self) -> Floats:
        """The sketch in expected deviations."""
        return self.sketch / self.deviations[:, None]

    def below(self, at: Floats, deviation: float) -> Floats:
        """Probability of at most ``at``, whole numbers, under the law that is accounted.

        Wide laws of integers are as good as the Gaussian up to the middle between two integers,
        which for the rounded Gaussian is exact.
        """
        if deviation > _NARROW or self.mechanism == "gaussian":
            return np.asarray(stats.norm.cdf((at + 0.5) / deviation))
        reach = math.ceil(12 * deviation) + 2
        masses = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * deviation**2))
        places = np.clip(at.astype(np.int64) + reach, 0, 2 * reach)
        return np.asarray(np.cumsum(masses)[places] / masses.sum())


def probe(harness: Harness) -> Iterator[Checked]:
    """All probes of the noise of a scenario that adds some."""
    transcripts = list(_recorded(harness))
    yield from map(_variance, transcripts)
    yield _every_coefficient(transcripts)
    yield _law("law of the noise", transcripts)
    yield _between_rounds("independence between rounds", transcripts)
    yield _within_rounds("independence within rounds", transcripts)
    yield _repeated(harness)
    if harness.plan.protection.shares is not None:
        listed = list(_shares(harness, harness.plan.protection.shares))
        yield from map(_variance, listed)
        yield _law("law of a share", listed)
        yield _between_rounds("independence of shares", listed)
        yield _within_rounds("independence within shares", listed)


def _shares(harness: Harness, shares: Shares) -> Iterator[Transcript]:
    """What single devices add, in a few rounds each; far cheaper than sums, hence sharper."""
    count = min(MOST_LISTED, max(FEWEST_ROUNDS, -(-DRAWS // min(harness.sizes))))
    each = -(-count // 2)
    users = [p.user for p in harness.named(harness.some(each))][:each]
    drawn: list[list[Integers]] = [[] for _ in harness.sizes]
    for index in range(2):
        context = harness.round(index).context
        for user in users:
            seeds = noise_seeds(harness.simulation.root, len(drawn), *context, user)
            for number, seed in enumerate(seeds):
                drawn[number].append(shares.draw_band(number, seed).astype(np.int64))
    accounted = harness.event.noise_multiplier**2 * harness.squared_sensitivity
    for number, (band, parts) in enumerate(zip(shares.bands, drawn, strict=True)):
        deviation = math.sqrt(accounted / (band.least - band.colluders))
        name = f"a device's share, {_name(harness, number)}"
        yield _transcript(harness, name, parts, np.full(len(parts), deviation))


def probe_order(harness: Harness) -> Iterator[Checked]:
    """The count that an order of items comes from: what a history moves, and the noise."""
    counting, root = harness.plan.counting, harness.simulation.root
    if counting is None:
        return
    items, users = counting.items, harness.plan.devices
    some, twice = min(users, _A_FEW), np.tile(np.arange(items, dtype=np.int32), 2)
    data = Histories(np.arange(some), 2 * items * np.arange(some + 1), np.tile(twice, some))
    most = min(harness.scenario.devices.popularity_items, items) * counting.step**2
    yield _moved(
        "what a history counts",
        most,
        counting.bounded(data, root, counting.round("audit", 0, "plan")),
        f"{some} devices that have all items twice",
        "so many items as count, once each",
    )
    nothing = Histories(np.arange(users), np.zeros(users + 1, int), twice[:0])

    def counted(round: Round, some: Integers) -> BoundedUpdate:
        return counting.bounded(nothing.select(some), root, round)

    rounds = (counting.round("audit", attempt, "plan") for attempt in count())
    yield _of_nothing("noise of the order of items", harness, counting, most, rounds, counted)


def probe_evaluation(harness: Harness) -> Iterator[Checked]:
    """The figures of the last model: what a user moves, whatever it finds, and the noise."""
    evaluating = harness.plan.evaluating
    if evaluating is None:
        return
    found, most = np.array([*product(_FOUND, repeat=len(FIGURES))]), len(FIGURES)
    found, most = found[(found > 0).any(axis=1)], most * evaluating.step**2
    yield _moved(
        "what a user's figures move",
        most,
        evaluating.bounded(found),
        f"{len(found)} devices that find 3, less than 0, or what is no number",
        "1 of each figure",
    )

    def nothing(_: Round, some: Integers) -> BoundedUpdate:
        return evaluating.bounded(np.zeros((len(some), evaluating.size)))

    model, attempts = [bytes(32)], range(_MOST_SHORT)
    rounds = (evaluating.round("audit", attempt, "plan", model) for attempt in attempts)
    yield _of_nothing("noise of the evaluation", harness, evaluating, most, rounds, nothing)


def _moved(probe: str, most: int, made: BoundedUpdate, who: str, limit: str) -> Checked:
    """That each device puts something into a sum beside the rounds, and no more than ``most``."""
    squares = [int((each.vector().astype(np.int64) ** 2).sum()) for each in made.rows()]
    return checked(
        probe,
        min(squares) > 0 and max(squares) <= most,
        f"a squared norm of at most {max(squares):,} steps, {who}",
        f"at most {most:,}: {limit}",
    )


def _of_nothing(
    probe: str,
    harness: Harness,
    wanted: SideSum,
    most: int,
    rounds: Iterator[Round],
    part: Callable[[Round, Integers], BoundedUpdate],
) -> Checked:
    """That a sum beside the rounds, of nothing, is the noise that its event is charged for."""
    shares, users, size = wanted.protection.shares, harness.plan.devices, wanted.size
    cost, drawn = 1 if shares is None else _A_SHARE * users, list[Integers]()
    attempts = max(FEWEST_ROUNDS, MOST_SHARES // (size * users + cost))
    for round in islice(rounds, min(-(-DRAWS // size), attempts)):
        bounded, enrolled = partial(part, round), harness.simulation.enrolled
        total = side_sum(wanted, round, np.arange(users), bounded, enrolled, "exact", 0.0)
        drawn.append(released_sum(round, total, wanted.bound, harness.root).total)
    squares = float(np.mean(np.square(np.array(drawn, np.float64))))
    expected = wanted.event.noise_multiplier**2 * most
    if shares is not None:
        (band,) = shares.bands
        left = band.least if shares.remove_excess else users
        expected *= left / (band.least - band.colluders)
    freedom = len(drawn) * size
    return judged(
        probe,
        float(variance_p(squares / expected, freedom)),
        f"{math.sqrt(squares / expected):.4f} of what is accounted, {len(drawn):,} sums",
        f"1; a deviation of {seen_deviation(freedom):.2%} is seen",
    )


def rounds_that_fit(harness: Harness, most_rounds: int = MOST_ROUNDS) -> int:
    """Releases to look at, from what they cost and what they show."""
    shares, cost, most = harness.plan.protection.shares, sum(harness.sizes), MOST_CENTRAL
    if shares is not None:
        cohort = harness.simulation.sampling_rate * harness.simulation.population
        kept = [band.least if shares.remove_excess else cohort for band in shares.bands]
        cost = sum(int(k) * (n + _A_SHARE) for k, n in zip(kept, harness.sizes, strict=True))
        most = MOST_SHARES
    wanted = max(-(-DRAWS // min(harness.sizes)), harness.scenario.train.rounds)
    return max(FEWEST_ROUNDS, min(wanted, most // max(1, cost), most_rounds))


def _recorded(harness: Harness) -> Iterator[Transcript]:
    """The planned rounds and more of them, further attempts of the first, and another run's."""
    rounds = [harness.round(index) for index in range(rounds_that_fit(harness))]
    for index in range(2):
        rounds.append(harness.round(index, attempt=1))
        rounds.append(replace(harness.round(index), run_id="audit-other"))
    noises = [noise for round in rounds if (noise := harness.released(round)) is not None]
    # The last one has another sum in the same round, which needs independent noise too.
    if harness.plan.protection.shares is None and (other := harness.released(rounds[0], change=1)):
        noises.append(other)
    if not noises:
        raise ReleaseRefused(f"none of {len(rounds)} rounds ended with a release")
    for number, band in enumerate(zip(*noises, strict=True)):
        parts, deviations = zip(*band, strict=True)
        yield _transcript(harness, _name(harness, number), parts, np.array(deviations))


def _name(harness: Harness, number: int) -> str:
    bands = len(harness.sizes)
    return "the whole vector" if bands == 1 else f"band {number + 1} of {bands}"


def _transcript(
    harness: Harness, name: str, parts: Sequence[Integers], deviations: Floats
) -> Transcript:
    size = len(parts[0])
    places = np.arange(min(size, _COLUMNS))
    if size > _COLUMNS:  # the first ones, and others all over the band
        spread_out = np.linspace(0, size - 1, _COLUMNS // 2).astype(np.int64)
        places = np.unique(np.concatenate((np.arange(_COLUMNS // 2), spread_out)))
    mechanism = harness.event.mechanism
    # Rounding a Gaussian adds its own twelfth of a step.
    spread = np.sqrt(deviations**2 + (1 / 12 if mechanism == "gaussian" else 0))
    squares, sums = np.zeros(size), np.zeros(size)
    for scaled in map(np.divide, parts, spread):
        squares += scaled**2
        sums += scaled
    sketch = np.array([part[places] for part in parts], np.int64)
    return Transcript(name, sketch, deviations, squares, sums, mechanism)


def _variance(transcript: Transcript) -> Checked:
    releases = len(transcript.sketch)
    draws = releases * len(transcript.squares)
    mean = float(transcript.squares.sum() / draws)
    by_release = (transcript.standard**2).mean(axis=1)
    single = of_many(variance_p(by_release, transcript.sketch.shape[1]))
    return judged(
        f"amount of noise, {transcript.name}",
        [float(variance_p(mean, draws)), single],
        f"{math.sqrt(mean):.4f} σ over {draws:,} coefficients; the quietest of {releases:,} draws "
        f"{math.sqrt(by_release.min()):.3f} σ",
        f"1 σ as accounted ({transcript.deviations[0]:,.6g} steps); "
        f"{seen_deviation(draws):.2%} is seen",
    )


def _every_coefficient(transcripts: Sequence[Transcript]) -> Checked:
    squares = np.concatenate([transcript.squares for transcript in transcripts])
    sums = np.concatenate([transcript.sums for transcript in transcripts])
    releases = len(transcripts[0].sketch)
    mean = sums.sum() / (releases * len(sums))
    return judged(
        "noise in every coefficient",
        [
            of_many(variance_p(squares / releases, releases)),
            of_many(two_sided(sums / math.sqrt(releases))),
            float(two_sided(sums.sum() / math.sqrt(releases * len(sums)))),
        ],
        f"least {math.sqrt(squares.min() / releases):.3f} σ of {len(squares):,} coefficients over "
        f"{releases:,} releases; mean {mean:+.1e} σ",
        "none without noise, none shifted",
    )


def _law(probe: str, transcripts: Sequence[Transcript]) -> Checked:
    """Distance of the distribution function from the accounted one, and the tails."""
    p_values, distances, far, draws, due = [], [], 0, 0, 0.0
    for transcript in transcripts:
        distance = _distance(transcript)
        count = transcript.sketch.size
        beyond = int(np.count_nonzero(np.abs(transcript.standard) > _FAR))
        deviation = float(transcript.deviations.mean())
        reach = math.floor(_FAR * deviation)
        chance = float(2 * transcript.below(np.array(-reach - 1), deviation))
        p_values += [distance_p(distance, count), float(count_p(beyond, count, chance))]
        distances.append(distance)
        far, draws, due = far + beyond, draws + count, due + count * chance
    seen = math.sqrt(math.log(2 / ALPHA) / (2 * min(t.sketch.size for t in transcripts)))
    return judged(
        probe,
        p_values,
        f"{max(distances):.4f} from the accounted law at most (Kolmogorov); {far:,} of {draws:,} "
        f"beyond {_FAR} σ",
        f"below {seen:.4f}; about {due:,.0f} beyond",
    )


def _distance(transcript: Transcript) -> float:
    """Kolmogorov's distance over all releases together, each in its own deviations."""
    levels = stats.norm.ppf(np.linspace(0, 1, 1026)[1:-1])
    excess = np.zeros(len(levels))
    for row, deviation in zip(transcript.sketch, transcript.deviations, strict=True):
        at = np.floor(levels * deviation)
        excess += np.searchsorted(np.sort(row), at, side="right")
        excess -= len(row) * transcript.below(at, float(deviation))
    return float(np.abs(excess).max() / transcript.sketch.size)


def _between_rounds(probe: str, transcripts: Sequence[Transcript]) -> Checked:
    """No two releases share noise, not even in part: by products, and by equal integers."""
    p_values, most = [], 0.0
    for transcript in transcripts:
        standard, terms = transcript.standard, transcript.sketch.shape[1]
        sums = (standard @ standard.T)[np.triu_indices(len(standard), 1)]
        p_values += [of_many(product_p(sums, terms)), _equal_p(transcript)]
        most = max(most, float(np.abs(sums).max(initial=0) / terms) if terms > 1 else 0.0)
    releases = len(transcripts[0].sketch)
    return judged(
        probe,
        p_values,
        f"largest correlation {most:.3f} in {releases * (releases - 1) // 2:,} pairs of "
        f"{releases:,} draws",
        "no two share noise",
    )


def _equal_p(transcript: Transcript) -> float:
    """Of the number of places at which any two releases carry the same integer."""
    terms, releases = transcript.sketch.shape[1], len(transcript.sketch)
    smallest = 1.0
    for gap in range(1, releases):
        equal = np.count_nonzero(transcript.sketch[gap:] == transcript.sketch[:-gap], axis=1)
        both = np.hypot(transcript.deviations[gap:], transcript.deviations[:-gap])
        # Probability that an integer Gaussian of that deviation is 0.
        chance = stats.norm.cdf(0.5 / both) - stats.norm.cdf(-0.5 / both)
        p_values = np.asarray(stats.binom.sf(equal - 1, terms, chance))
        smallest = float(np.minimum(smallest, p_values.min()))
    return float(np.minimum(1.0, smallest * releases * (releases - 1) / 2))


def _within_rounds(probe: str, transcripts: Sequence[Transcript]) -> Checked:
    """No two coefficients share noise, within a band or between two."""
    products = []
    for transcript in transcripts:
        standard = transcript.standard
        lags = [lag for lag in (1, 2, standard.shape[1] // 2) if 0 < lag < standard.shape[1]]
        products += [standard[:, lag:] * standard[:, :-lag] for lag in lags]
    for first, second in pairwise(transcript.standard for transcript in transcripts):
        width = min(first.shape[1], second.shape[1], _COLUMNS // 2)
        products.append(first[:, :width] * second[:, :width])
    most = max((abs(float(each.mean())) for each in products), default=0.0)
    return judged(
        probe,
        [float(product_p(each.sum(), each.size)) for each in products],
        f"largest correlation {most:.1e} over {sum(each.size for each in products):,} pairs of "
        "coefficients",
        "none of neighbours, of the halves of a band, or of two bands",
    )


def _repeated(harness: Harness) -> Checked:
    """The same input gets the same noise, so that sending again is harmless."""
    noises = (harness.released(harness.round(0)) or [] for _ in range(2))
    first, again = ([values.tolist() for values, _ in noise] for noise in noises)
    found = "identical" if first == again else "another draw"
    return checked("same input, same noise", first == again, found, "identical")


# -------------------------------------------------------------------------------------- lazy noise

ROWS, WIDTH = 6000, 32
_VARIANCES = (1.0, 4.0, 2.0, 3.0)
_READS: tuple[Callable[[LazyMemory], object], ...] = (
    lambda memory: memory[::2],
    lambda memory: memory.settled(),
    np.asarray,
    copy.copy,
)


def probe_lazy(root: SecretRoot) -> Iterator[Checked]:
    """Whoever reads a row of a lazy memory gets all the noise that it owes, and once."""
    yield _settled(LazyMemory(np.zeros((ROWS, WIDTH)), Normals(root)))
    yield _moving(root)


def _settled(memory: LazyMemory) -> Checked:
    """Each way to read gives the variance owed since the last one, independent of it, and all."""
    p_values, worst, left = [], 1.0, 0.0
    before, known = np.zeros((ROWS, WIDTH)), np.zeros((ROWS, WIDTH))
    for read, variance in zip(_READS, _VARIANCES, strict=True):
        memory.owe(variance)
        early = memory[: ROWS // 4].astype(np.float64)
        memory.owe(2 * variance)
        shown = np.asarray(read(memory), np.float64)
        # What is shown has been paid: a second look shows the same.
        again = np.asarray(read(memory), np.float64)
        left = max(left, float(np.abs(again - shown).max()))
        now = memory.settled().astype(np.float64)
        first, rest = slice(None, ROWS // 4), slice(ROWS // 4, None)
        steps = (
            (early - known[first], variance),
            (now[first] - early, 2 * variance),
            (now[rest] - known[rest], 3 * variance),
        )
        for change, owed in steps:
            ratio = float((change**2).mean() / owed)
            p_values.append(float(variance_p(ratio, change.size)))
            worst = max(worst, ratio, key=lambda each: abs(math.log(max(each, 1e-9))))
        increment = (now - known) / math.sqrt(3 * variance)
        p_values.append(float(product_p(np.array((increment * before).sum()), before.size)))
        before, known = increment, now
    return judged(
        "lazy noise settled before a read",
        p_values if left == 0 else 0.0,
        f"{math.sqrt(worst):.4f} of what was owed at worst, over {len(_READS)} ways to read; "
        f"{left:g} is left after a read",
        f"1, independent of all reads before; {seen_deviation(ROWS * WIDTH / 4):.1%} is seen",
    )


def _moving(root: SecretRoot) -> Checked:
    """With momentum and weight decay: the covariance is that of steps taken one by one."""
    update = LinearStep(0.1, momentum=0.8, weight_decay=0.05)
    memory = LazyMemory(np.zeros((ROWS, WIDTH)), Normals(root), moving=True)
    matrix, gain = update.matrix, update.gain
    covariance = np.zeros((2, 2))
    nothing = np.zeros(0, np.int64), np.zeros((0, WIDTH))
    for variance in _VARIANCES:
        memory.step(*nothing, variance, update)
        covariance = matrix @ covariance @ matrix.T + variance * np.outer(gain, gain)
    velocities = np.asarray(memory.velocities(), np.float64)
    values = memory.settled().astype(np.float64)
    slope = covariance[1, 0] / covariance[0, 0]
    squares = [(each**2).mean() for each in (values, velocities, velocities - slope * values)]
    # The last is what of the velocity the value does not tell.
    ratios = squares / np.append(np.diag(covariance), covariance[1, 1] - slope * covariance[1, 0])
    return judged(
        "lazy noise with momentum",
        variance_p(ratios, values.size),
        "value, velocity and what is left of it: "
        + ", ".join(f"{math.sqrt(each):.4f}" for each in ratios),
        f"1 each; {seen_deviation(values.size):.1%} is seen",
    )
