import json
import math
import random

import dp_accounting
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privrec.errors import UsageError
from privrec.privacy import accountant, discrete
from privrec.privacy.discrete import Grid
from privrec.privacy.events import RoundEvent, epsilon

EVENT = RoundEvent("gaussian", 1.2, 0.05)
NONE = RoundEvent("none", 0.0, 0.05)


class TestRoundEvent:
    @given(st.floats(1e-6, 1e6), st.floats(1e-9, 1.0))
    def test_json_and_back(self, sigma, rate):
        event = RoundEvent("gaussian", sigma, rate)
        assert RoundEvent.from_json(json.loads(json.dumps(event.to_json()))) == event

    def test_json_is_flat(self):
        expected = {"mechanism": "none", "noise_multiplier": 0.0, "sampling_rate": 0.05}
        assert NONE.to_json() == expected
        assert RoundEvent.from_json(expected) == NONE

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("laplace", 1.0, 0.1), "mechanism 'laplace'"),
            (("gaussian", 0.0, 0.1), "noise_multiplier 0.0: it must be above 0"),
            (("gaussian", -1.0, 0.1), "noise_multiplier -1.0"),
            (("gaussian", math.inf, 0.1), "noise_multiplier inf"),
            (("gaussian", math.nan, 0.1), "noise_multiplier nan"),
            (("none", 1.0, 0.1), "with mechanism 'none'"),
            (("gaussian", 1.0, 0.0), "sampling_rate 0.0"),
            (("gaussian", 1.0, 1.1), "sampling_rate 1.1"),
            (("gaussian", 1.0, math.nan), "sampling_rate nan"),
        ],
    )
    def test_values_outside_their_range(self, arguments, message):
        with pytest.raises(UsageError, match=message):
            RoundEvent(*arguments)

    @pytest.mark.parametrize(
        "values",
        [
            {},
            {"mechanism": "none", "noise_multiplier": 0.0},
            {**EVENT.to_json(), "extra": 1},
            {**EVENT.to_json(), "noise_multiplier": "1.2"},
            {**EVENT.to_json(), "noise_multiplier": True},
            {**EVENT.to_json(), "sampling_rate": None},
        ],
    )
    def test_malformed_json(self, values):
        with pytest.raises(UsageError):
            RoundEvent.from_json(values)

    def test_dp_event_depends_on_the_adversary(self):
        gaussian = dp_accounting.GaussianDpEvent(1.2)
        assert EVENT.dp_event("server") == gaussian
        assert EVENT.dp_event("recipients") == dp_accounting.PoissonSampledDpEvent(0.05, gaussian)
        assert RoundEvent("gaussian", 1.2).dp_event("recipients") == gaussian
        assert isinstance(NONE.dp_event("server"), dp_accounting.NonPrivateDpEvent)

    def test_unknown_adversary(self):
        with pytest.raises(UsageError, match="adversary 'nobody'"):
            EVENT.dp_event("nobody")  # type: ignore[arg-type]


GRID = Grid(squared_sensitivity=10**6, dimension=1000, shares=10, excess_removed=True)
SHOWN = Grid(squared_sensitivity=10**6, dimension=1000, shares=10, excess_removed=False)


class TestDistributed:
    EVENT = RoundEvent("discrete_gaussian", 1.2, 0.05, GRID)

    @pytest.mark.parametrize("grid", [GRID, SHOWN])
    def test_json_and_back(self, grid):
        event = RoundEvent("discrete_gaussian", 1.2, 0.05, grid)
        assert RoundEvent.from_json(json.loads(json.dumps(event.to_json()))) == event

    def test_json_is_flat(self):
        assert self.EVENT.to_json() == {
            "mechanism": "discrete_gaussian",
            "noise_multiplier": 1.2,
            "sampling_rate": 0.05,
            "squared_sensitivity": 10**6,
            "dimension": 1000,
            "shares": 10,
            "excess_removed": True,
            "small_cohort_delta": 0.0,
        }

    @pytest.mark.parametrize(
        "change",
        [
            {"shares": 10.0},
            {"shares": 0},
            {"dimension": "many"},
            {"excess_removed": 1},
            {"extra": 1},
            {"mechanism": "gaussian"},
            {"noise_multiplier": 1e-3},
        ],
    )
    def test_malformed_json(self, change):
        with pytest.raises(UsageError):
            RoundEvent.from_json({**self.EVENT.to_json(), **change})
        values = self.EVENT.to_json()
        del values["shares"]
        with pytest.raises(UsageError, match="exactly"):
            RoundEvent.from_json(values)

    def test_a_grid_goes_with_shares_and_with_nothing_else(self):
        for mechanism, multiplier in (("gaussian", 1.0), ("none", 0.0)):
            with pytest.raises(UsageError, match="only noise in shares has one"):
                RoundEvent(mechanism, multiplier, 1.0, GRID)
        with pytest.raises(
            UsageError, match="grid None: only noise in shares has one, and it must"
        ):
            RoundEvent("discrete_gaussian", 1.0)

    def test_epsilon_is_hardly_more_than_that_of_the_gaussian(self):
        for adversary in ("recipients", "server"):
            found = epsilon({self.EVENT: 200}, 1e-5, adversary)
            gaussian = epsilon({EVENT: 200}, 1e-5, adversary)
            assert gaussian <= found < gaussian * 1.001 + 1e-3

    def test_the_other_accountant_agrees_as_for_the_gaussian(self):
        found = epsilon({self.EVENT: 5}, 1e-5, "recipients", "rdp")
        gaussian = epsilon({EVENT: 5}, 1e-5, "recipients", "rdp")
        assert found == pytest.approx(gaussian, rel=2e-3)

    def test_noise_that_shows_the_cohort_amplifies_against_nobody(self):
        shown = RoundEvent("discrete_gaussian", 1.2, 0.05, SHOWN)
        assert shown.rate_against("recipients") == 1
        assert not shown.hides_cohorts
        assert self.EVENT.rate_against("recipients") == 0.05
        assert self.EVENT.hides_cohorts
        server = epsilon({shown: 20}, 1e-5, "server")
        assert epsilon({shown: 20}, 1e-5, "recipients") == server
        assert epsilon({self.EVENT: 20}, 1e-5, "recipients") < server / 10

    def test_slack_adds_up_over_rounds_and_is_paid(self):
        narrow = RoundEvent("discrete_gaussian", 0.0195, 1.0, Grid(10**6, 1, 100, True))
        assert 0 < narrow.slack.log_ratio < 1e-10
        assert narrow.slack.variation == 100 * 2.0**-236
        assert EVENT.slack.log_ratio == EVENT.slack.variation == 0
        wide = RoundEvent("discrete_gaussian", 1000.0, 1.0, GRID)
        assert epsilon({wide: 1}, 1e-5, "server") > 0

    @pytest.mark.parametrize("count", [1, 7])
    def test_slack_enters_epsilon_and_delta(self, count, monkeypatch):
        monkeypatch.setattr(discrete, "LARGEST_LOG_RATIO", 1.0)
        event = RoundEvent("discrete_gaussian", 0.6, 1.0, Grid(100, 20, 45, True))
        log_ratio = event.slack.log_ratio
        assert 1e-3 < log_ratio < 0.1
        bare = accountant.gaussian(
            math.sqrt(count / (0.36 - 0.03)), 1e-5 * 0.999 * math.exp(-count * log_ratio)
        )
        found = epsilon({event: count}, 1e-5, "server")
        assert found == pytest.approx(bare + 2 * count * log_ratio, abs=1.1e-4)

    def test_the_samplers_are_counted_by_round(self, monkeypatch):
        monkeypatch.setattr(discrete, "SLACK", 1e-15)
        event = RoundEvent("discrete_gaussian", 40.0, 1.0, Grid(10**6, 10, 10, True))
        # (1 + exp(ε)) 1e-13 a round against 1e-8 / 1000
        assert epsilon({event: 10}, 1e-8, "server") < math.inf
        assert epsilon({event: 60}, 1e-8, "server") == math.inf

    def test_dp_event_is_the_gaussian_that_it_amounts_to(self):
        coarse = RoundEvent("discrete_gaussian", 1.0, 1.0, Grid(400, 4, 2, True))
        expected = dp_accounting.GaussianDpEvent(math.sqrt(1 - 3 / 400))
        assert coarse.dp_event("server") == expected

    def test_no_claim_where_the_samplers_would_count(self):
        assert epsilon({RoundEvent("discrete_gaussian", 1.0, 1.0, GRID): 80}, 1e-5, "server") < 100
        far = {RoundEvent("discrete_gaussian", 1.0, 1.0, GRID): 300}
        assert epsilon(far, 1e-5, "server") == math.inf


class TestEpsilon:
    def test_of_nothing_is_zero(self):
        assert epsilon([], 1e-5, "recipients") == 0
        assert epsilon({EVENT: 0}, 1e-5, "server") == 0

    @pytest.mark.parametrize("adversary", ["recipients", "server"])
    @pytest.mark.parametrize("accountant", ["pld", "rdp"])
    def test_without_noise_is_infinite(self, adversary, accountant):
        assert epsilon({EVENT: 3, NONE: 1}, 1e-5, adversary, accountant) == math.inf

    def test_one_by_one_as_counted(self):
        other = RoundEvent("gaussian", 3.0, 0.2)
        listed = [EVENT] * 7 + [other] * 5
        random.Random(1).shuffle(listed)
        assert epsilon(listed, 1e-5, "recipients") == epsilon(
            {other: 5, EVENT: 7}, 1e-5, "recipients"
        )

    def test_the_server_sees_through_sampling(self):
        sampled, everybody = {EVENT: 20}, {RoundEvent("gaussian", 1.2): 20}
        assert epsilon(sampled, 1e-5, "server") == epsilon(everybody, 1e-5, "server")
        assert epsilon(everybody, 1e-5, "server") == epsilon(everybody, 1e-5, "recipients")
        assert epsilon(sampled, 1e-5, "recipients") < epsilon(sampled, 1e-5, "server") / 10

    def test_events_that_look_alike_to_the_server_add_up(self):
        mixed = {RoundEvent("gaussian", 2.0, 0.1): 4, RoundEvent("gaussian", 2.0, 0.3): 6}
        assert epsilon(mixed, 1e-5, "server") == epsilon(
            {RoundEvent("gaussian", 2.0): 10}, 1e-5, "server"
        )

    def test_is_rounded_up(self):
        from privrec.privacy import accountant

        exact = accountant.pld((accountant.Rounds(1.2, 0.05, 10),), 1e-5)
        shown = epsilon({EVENT: 10}, 1e-5, "recipients")
        assert exact <= shown < exact + 1e-4
        assert round(shown, 4) == shown

    def test_grows_and_falls_as_it_should(self):
        def at(sigma, rate, count, delta):
            return epsilon({RoundEvent("gaussian", sigma, rate): count}, delta, "recipients")

        base = at(1.2, 0.05, 100, 1e-5)
        assert at(1.2, 0.05, 101, 1e-5) > base
        assert at(1.2, 0.06, 100, 1e-5) > base
        assert at(1.1, 0.05, 100, 1e-5) > base
        assert at(1.2, 0.05, 100, 1e-6) > base

    @pytest.mark.parametrize("delta", [0.0, -1e-5, 1.0, 2.0, 1e-11, math.nan])
    def test_delta_outside_its_range(self, delta):
        with pytest.raises(UsageError, match="delta"):
            epsilon({EVENT: 1}, delta, "recipients")

    def test_unknown_names(self):
        with pytest.raises(UsageError, match="adversary 'world'"):
            epsilon({EVENT: 1}, 1e-5, "world")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="accountant 'moments'.*pld, rdp"):
            epsilon({EVENT: 1}, 1e-5, "server", "moments")  # type: ignore[arg-type]

    def test_negative_counts(self):
        with pytest.raises(UsageError, match="negative number of rounds"):
            epsilon({EVENT: -1}, 1e-5, "server")


@pytest.mark.parametrize("account", ["pld", "rdp"])
@pytest.mark.parametrize("rate", [1.0, 0.1, 1e-6])
@pytest.mark.parametrize("count", [1, 10**5])  # 10^6 takes seconds where grids are finest
def test_epsilon_at_the_extremes(account, rate, count):
    multipliers = (1e-300, 1e-160, 1e-20, 1e-3, 1e9, 1e100, 1e300)
    for delta in (1e-10, 1e-6, 0.5):
        by_adversary = {
            adversary: [
                epsilon({RoundEvent("gaussian", sigma, rate): count}, delta, adversary, account)
                for sigma in multipliers
            ]
            for adversary in ("recipients", "server")
        }
        for found in by_adversary.values():
            assert found == sorted(found, reverse=True)
            assert found[:2] == [math.inf, math.inf]
            assert all(math.isfinite(each) for each in found[2:])
            assert 0 <= found[-1] == found[-3]
        # By so little noise everybody sampled once is as good as known, and sampling hides nothing.
        assert by_adversary["recipients"][:4] == by_adversary["server"][:4]
        one = epsilon({RoundEvent("gaussian", 1e-3): 1}, delta, "server")
        assert by_adversary["recipients"][3] >= one > 4e5
        pairs = zip(by_adversary["recipients"], by_adversary["server"], strict=True)
        assert all(ours <= theirs for ours, theirs in pairs)
