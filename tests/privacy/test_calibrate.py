import math

import pytest

from privrec.errors import UsageError
from privrec.privacy.events import RoundEvent, epsilon, epsilon_by_round, noise_multiplier_for

TARGETS = [
    (8.0, 1e-5, 0.1, 400, "recipients"),
    (8.0, 1e-5, 0.1, 400, "server"),
    (1.0, 1e-6, 0.02, 1000, "recipients"),
    (0.05, 1e-5, 0.3, 20, "server"),
    (8.0, 1e-5, 1.0, 3, "recipients"),
    (90.0, 1e-5, 0.5, 20, "recipients"),
]


def multiplier_for(goal, delta, rate, rounds, adversary):
    def event_of(sigma):
        return RoundEvent("gaussian", sigma, rate)

    return noise_multiplier_for(goal, delta, event_of, rounds, adversary)


def reached(sigma, delta, rate, rounds, adversary):
    return epsilon({RoundEvent("gaussian", sigma, rate): rounds}, delta, adversary)


@pytest.mark.parametrize("target", TARGETS)
def test_is_the_smallest_of_four_digits(target):
    goal, *rest = target
    sigma = multiplier_for(*target)
    assert float(f"{sigma:.3e}") == sigma
    step = 10.0 ** (math.floor(math.log10(sigma)) - 3)
    assert reached(sigma, *rest) <= goal
    assert reached(sigma - step, *rest) > goal


def test_known_figure():
    # Three rounds with everybody at ε = 8 cost the same against both adversaries.
    against = [multiplier_for(8.0, 1e-5, 1.0, 3, who) for who in ("recipients", "server")]
    assert against == [1.04, 1.04]


def test_least_noise_when_the_target_is_loose():
    assert multiplier_for(1e7, 1e-5, 1.0, 1, "server") == 0.01


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ((0.0, 1e-5, 0.1, 10, "recipients"), "epsilon 0.0: it must be finite and at least 0.0001"),
        ((-1.0, 1e-5, 0.1, 10, "recipients"), "epsilon -1.0"),
        ((1e-5, 1e-5, 0.1, 10, "recipients"), "epsilon 1e-05"),
        ((math.inf, 1e-5, 0.1, 10, "recipients"), 'noise = "none"'),
        ((math.nan, 1e-5, 0.1, 10, "recipients"), "epsilon nan"),
        ((8.0, 0.0, 0.1, 10, "recipients"), "delta 0.0"),
        ((8.0, 1.0, 0.1, 10, "recipients"), "delta 1.0"),
        ((8.0, 1e-5, 0.0, 10, "recipients"), "sampling_rate 0.0"),
        ((8.0, 1e-5, 1.5, 10, "recipients"), "sampling_rate 1.5"),
        ((8.0, 1e-5, 0.1, 0, "recipients"), "0 rounds"),
        ((8.0, 1e-5, 0.1, 10, "world"), "adversary 'world'"),
        ((1e-4, 1e-10, 1.0, 10**9, "server"), "not met even by a noise multiplier of 1e"),
    ],
)
def test_what_cannot_be(target, message):
    with pytest.raises(UsageError, match=message):
        multiplier_for(*target)


def test_noise_that_cannot_be_accounted_does_not_hold():
    def picky(sigma):
        if sigma < 3:
            raise UsageError("too narrow")
        return RoundEvent("gaussian", sigma, 1.0)

    assert noise_multiplier_for(8.0, 1e-5, picky, 3, "server") == 3.0


class TestPlan:
    EVENT = RoundEvent("gaussian", 1.2, 0.05)

    def test_gives_what_the_rounds_will_cost(self):
        planned = epsilon_by_round(self.EVENT, 300, 1e-5, 7)
        assert len(planned) == 7
        assert (planned[0][0], planned[-1][0]) == (1, 300)
        for after, recipients, server in planned:
            assert recipients == epsilon({self.EVENT: after}, 1e-5, "recipients")
            assert server == epsilon({self.EVENT: after}, 1e-5, "server")

    @pytest.mark.parametrize(("rounds", "points", "after"), [(1, 100, (1,)), (3, 9, (1, 2, 3))])
    def test_few_rounds(self, rounds, points, after):
        planned = epsilon_by_round(self.EVENT, rounds, 1e-5, points)
        assert tuple(each for each, *_ in planned) == after

    def test_every_round_when_there_is_room(self):
        planned = epsilon_by_round(self.EVENT, 50, 1e-5, 100)
        assert [after for after, *_ in planned] == list(range(1, 51))

    def test_without_noise(self):
        planned = epsilon_by_round(RoundEvent("none", 0.0, 0.1), 5, 1e-5, 100)
        assert {spent for _, *both in planned for spent in both} == {math.inf}

    def test_no_rounds(self):
        with pytest.raises(UsageError, match="0 rounds"):
            epsilon_by_round(self.EVENT, 0, 1e-5, 100)
