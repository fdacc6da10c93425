"""Probes of the noise: how much, of which law, in every band, and new every time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from privrec.audit.bench import Harness
from privrec.audit.judging import (
    ALPHA,
    CheckResult,
    count_p,
    distance_p,
    judged,
    of_many,
    product_p,
    seen_deviation,
    two_sided,
    variance_p,
)
from privrec.device.update import Round
from privrec.errors import ReleaseRefused
from privrec.privacy.events import Mechanism
from privrec.privacy.mechanism import Shares, noise_seeds

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Sketch = NDArray[np.int64]

DRAWS = 400_000
"""Coefficients of each band to look at, where that is not too dear: 0.9 % of σ is then seen."""
MOST_CENTRAL = 60_000_000
MOST_SHARES = 1_000_000_000
_A_SHARE = 8000  # coefficients that can be drawn in the time that opening a share takes
FEWEST_ROUNDS, MOST_ROUNDS, MOST_LISTED = 6, 600, 1000
_COLUMNS = 2048
_FAR = 3.5  # deviations; beyond lie 4.65e-4 of a Gaussian
_NARROW = 30.0  # deviation in steps below which laws of integers differ visibly


@dataclass(frozen=True)
class Transcript:
    """The noise of many releases in one band.

    Args:
        name: of the band, in words.
        sketch: integer noise at some of its coefficients, shape ``(releases, places)``.
        deviations: expected of each release, shape ``(releases,)``.
        squares: sum over the releases of the squared standardised noise, by coefficient.
        sums: the same, not squared.
        mechanism: its law.
    """

    name: str
    sketch: Sketch
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


def probe(bench: Harness) -> Iterator[CheckResult]:
    """All probes of the noise of a scenario that adds some."""
    tapes = list(_recorded(bench, list(_rounds(bench))))
    for tape in tapes:
        yield _variance(tape)
    yield _every_coefficient(tapes)
    yield _law("law of the noise", tapes)
    yield _between_rounds("independence between rounds", tapes)
    yield _within_rounds("independence within rounds", tapes)
    yield _repeated(bench)
    if bench.protection.shares is not None:
        listed = list(_shares(bench, bench.protection.shares))
        for tape in listed:
            yield _variance(tape)
        yield _law("law of a share", listed)
        yield _between_rounds("independence of shares", listed)
        yield _within_rounds("independence within shares", listed)


def _shares(bench: Harness, shares: Shares) -> Iterator[Transcript]:
    """What single devices add, in a few rounds each; far cheaper than sums, hence sharper."""
    count = min(MOST_LISTED, max(FEWEST_ROUNDS, -(-DRAWS // min(bench.sizes))))
    users = [p.user for p in bench.named(bench.some(-(-count // 2)))][: -(-count // 2)]
    drawn: list[list[Integers]] = [[] for _ in bench.sizes]
    for index in range(2):
        context = bench.round(index).context
        for user in users:
            seeds = noise_seeds(bench.simulation.root, len(drawn), *context, user)
            for number, seed in enumerate(seeds):
                drawn[number].append(shares.draw_band(number, seed).astype(np.int64))
    accounted = bench.event.noise_multiplier**2 * bench.protection.encoding.squared_bound
    for number, (band, parts) in enumerate(zip(shares.bands, drawn, strict=True)):
        deviation = math.sqrt(accounted / (band.least - band.colluders))
        name = f"a device's share, {_name(bench, number)}"
        yield _tape(bench, name, parts, np.full(len(parts), deviation))


def rounds_that_fit(bench: Harness, most_rounds: int = MOST_ROUNDS) -> int:
    """Releases to look at, from what they cost and what they show."""
    smallest, size = min(bench.sizes), sum(bench.sizes)
    shares = bench.protection.shares
    if shares is None:
        cost, most = size, MOST_CENTRAL
    else:
        cohort = bench.simulation.sampling_rate * bench.simulation.population
        kept = [band.least if shares.remove_excess else cohort for band in shares.bands]
        cost = sum(int(k) * (n + _A_SHARE) for k, n in zip(kept, bench.sizes, strict=True))
        most = MOST_SHARES
    wanted = max(-(-DRAWS // smallest), bench.scenario.train.rounds)
    return max(FEWEST_ROUNDS, min(wanted, most // max(1, cost), most_rounds))


def _rounds(bench: Harness) -> Iterator[Round]:
    """The planned rounds and more of them, further attempts of the first, and another run's."""
    for index in range(rounds_that_fit(bench)):
        yield bench.round(index)
    for index in range(2):
        yield bench.round(index, attempt=1)
        yield replace(bench.round(index), run_id="audit-other")


def _recorded(bench: Harness, rounds: Sequence[Round]) -> Iterator[Transcript]:
    noises = [noise for round in rounds if (noise := bench.released(round)) is not None]
    # The last one has another sum in the same round, which needs independent noise too.
    if bench.protection.shares is None and (other := bench.released(rounds[0], change=1)):
        noises.append(other)
    if not noises:
        raise ReleaseRefused(f"none of {len(rounds)} rounds ended with a release")
    for number in range(len(bench.sizes)):
        parts = [bench.band(noise.values, number) for noise in noises]
        deviations = np.array([noise.deviations[number] for noise in noises])
        yield _tape(bench, _name(bench, number), parts, deviations)


def _name(bench: Harness, number: int) -> str:
    bands = len(bench.sizes)
    return "the whole vector" if bands == 1 else f"band {number + 1} of {bands}"


def _tape(bench: Harness, name: str, parts: Sequence[Integers], deviations: Floats) -> Transcript:
    size = len(parts[0])
    places = _places(size)
    mechanism = bench.event.mechanism
    # Rounding a Gaussian adds its own twelfth of a step.
    spread = np.sqrt(deviations**2 + (1 / 12 if mechanism == "gaussian" else 0))
    squares, sums = np.zeros(size), np.zeros(size)
    for part, deviation in zip(parts, spread, strict=True):
        scaled = part / deviation
        squares += scaled**2
        sums += scaled
    sketch = np.array([part[places] for part in parts], np.int64)
    return Transcript(name, sketch, deviations, squares, sums, mechanism)


def _places(size: int) -> NDArray[np.int64]:
    """The first coefficients, and others all over the band."""
    if size <= _COLUMNS:
        return np.arange(size)
    spread = np.linspace(0, size - 1, _COLUMNS // 2).astype(np.int64)
    return np.unique(np.concatenate((np.arange(_COLUMNS // 2), spread)))


def _variance(tape: Transcript) -> CheckResult:
    releases = len(tape.sketch)
    draws = releases * len(tape.squares)
    mean = float(tape.squares.sum() / draws)
    by_release = (tape.standard**2).mean(axis=1)
    p_values = (
        float(variance_p(mean, draws)),
        of_many(variance_p(by_release, tape.sketch.shape[1])),
    )
    return judged(
        f"amount of noise, {tape.name}",
        of_many(np.array(p_values)),
        f"{math.sqrt(mean):.4f} σ over {draws:,} coefficients; the quietest of {releases:,} draws "
        f"{math.sqrt(by_release.min()):.3f} σ",
        f"1 σ as accounted ({tape.deviations[0]:,.6g} steps); {seen_deviation(draws):.2%} is seen",
    )


def _every_coefficient(tapes: Sequence[Transcript]) -> CheckResult:
    squares = np.concatenate([tape.squares for tape in tapes])
    sums = np.concatenate([tape.sums for tape in tapes])
    releases = len(tapes[0].sketch)
    p_values = (
        of_many(variance_p(squares / releases, releases)),
        of_many(two_sided(sums / math.sqrt(releases))),
        float(two_sided(sums.sum() / math.sqrt(releases * len(sums)))),
    )
    mean = sums.sum() / (releases * len(sums))
    return judged(
        "noise in every coefficient",
        of_many(np.array(p_values)),
        f"least {math.sqrt(squares.min() / releases):.3f} σ of {len(squares):,} coefficients over "
        f"{releases:,} releases; mean {mean:+.1e} σ",
        "none without noise, none shifted",
    )


def _law(probe: str, tapes: Sequence[Transcript]) -> CheckResult:
    """Distance of the distribution function from the accounted one, and the tails."""
    p_values, distances, far, draws, due = [], [], 0, 0, 0.0
    for tape in tapes:
        distance = _distance(tape)
        count = tape.sketch.size
        beyond = int(np.count_nonzero(np.abs(tape.standard) > _FAR))
        reach = float(np.floor(_FAR * tape.deviations.mean()))
        chance = float(2 * tape.below(np.array(-reach - 1), float(tape.deviations.mean())))
        p_values += [distance_p(distance, count), count_p(beyond, count, chance)]
        distances.append(distance)
        far, draws, due = far + beyond, draws + count, due + count * chance
    seen = math.sqrt(math.log(2 / ALPHA) / (2 * min(t.sketch.size for t in tapes)))
    return judged(
        probe,
        of_many(np.array(p_values)),
        f"{max(distances):.4f} from the accounted law at most (Kolmogorov); {far:,} of {draws:,} "
        f"beyond {_FAR} σ",
        f"below {seen:.4f}; about {due:,.0f} beyond",
    )


def _distance(tape: Transcript) -> float:
    """Kolmogorov's distance over all releases together, each in its own deviations."""
    levels = stats.norm.ppf(np.linspace(0, 1, 1026)[1:-1])
    found = np.zeros(len(levels))
    expected = np.zeros(len(levels))
    for row, deviation in zip(tape.sketch, tape.deviations, strict=True):
        at = np.floor(levels * deviation)
        found += np.searchsorted(np.sort(row), at, side="right")
        expected += len(row) * tape.below(at, float(deviation))
    return float(np.abs(found - expected).max() / tape.sketch.size)


def _between_rounds(probe: str, tapes: Sequence[Transcript]) -> CheckResult:
    """No two releases share noise, not even in part: by products, and by equal integers."""
    p_values, most = [], 0.0
    for tape in tapes:
        standard, terms = tape.standard, tape.sketch.shape[1]
        pairs = np.triu_indices(len(standard), 1)
        sums = (standard @ standard.T)[pairs]
        p_values.append(of_many(product_p(sums, terms)))
        most = max(most, float(np.abs(sums).max(initial=0) / terms) if terms > 1 else 0.0)
        p_values.append(_equal_p(tape))
    releases = len(tapes[0].sketch)
    return judged(
        probe,
        of_many(np.array(p_values)),
        f"largest correlation {most:.3f} in {releases * (releases - 1) // 2:,} pairs of "
        f"{releases:,} draws",
        "no two share noise",
    )


def _equal_p(tape: Transcript) -> float:
    """Of the number of places at which any two releases carry the same integer."""
    terms, releases = tape.sketch.shape[1], len(tape.sketch)
    smallest = 1.0
    for gap in range(1, releases):
        equal = np.count_nonzero(tape.sketch[gap:] == tape.sketch[:-gap], axis=1)
        both = np.hypot(tape.deviations[gap:], tape.deviations[:-gap])
        p_values = np.asarray(stats.binom.sf(equal - 1, terms, _coincidence(both)))
        smallest = min(smallest, float(p_values.min()))
    return min(1.0, smallest * releases * (releases - 1) / 2)


def _coincidence(deviation: Floats) -> Floats:
    """Probability that an integer Gaussian of that deviation is 0."""
    return np.asarray(stats.norm.cdf(0.5 / deviation) - stats.norm.cdf(-0.5 / deviation))


def _within_rounds(probe: str, tapes: Sequence[Transcript]) -> CheckResult:
    """No two coefficients share noise, within a band or between two."""
    p_values, pairs, most = [], 0, 0.0
    for tape in tapes:
        standard = tape.standard
        for lag in (1, 2, standard.shape[1] // 2):
            if 0 < lag < standard.shape[1]:
                products = standard[:, lag:] * standard[:, :-lag]
                p_values.append(float(product_p(products.sum(), products.size)))
                most, pairs = max(most, abs(float(products.mean()))), pairs + products.size
    for first, second in zip(tapes, tapes[1:], strict=False):
        width = min(first.sketch.shape[1], second.sketch.shape[1], _COLUMNS // 2)
        products = first.standard[:, :width] * second.standard[:, :width]
        p_values.append(float(product_p(products.sum(), products.size)))
        most, pairs = max(most, abs(float(products.mean()))), pairs + products.size
    return judged(
        probe,
        of_many(np.array(p_values)),
        f"largest correlation {most:.1e} over {pairs:,} pairs of coefficients",
        "none of neighbours, of the halves of a band, or of two bands",
    )


def _repeated(bench: Harness) -> CheckResult:
    """The same input gets the same noise, so that sending again is harmless."""
    first, again = bench.released(bench.round(0)), bench.released(bench.round(0))
    same = (first is None) == (again is None) and (
        first is None or again is None or np.array_equal(first.values, again.values)
    )
    return CheckResult(
        "same input, same noise", same, "identical" if same else "another draw", "identical"
    )
