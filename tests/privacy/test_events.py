import json
import math
import random

import dp_accounting
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privrec.errors import UsageError
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


class TestEpsilon:
    def test_of_nothing_is_zero(self):
        assert epsilon([], 1e-5, "recipients") == 0
        assert epsilon({EVENT: 0}, 1e-5, "server") == 0

    @pytest.mark.parametrize("adversary", ["recipients", "server"])
    @pytest.mark.parametrize("accountant", ["pld", "rdp", "prv"])
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
        with pytest.raises(UsageError, match="accountant 'moments'.*pld, rdp, prv"):
            epsilon({EVENT: 1}, 1e-5, "server", "moments")  # type: ignore[arg-type]

    def test_negative_counts(self):
        with pytest.raises(UsageError, match="negative number of rounds"):
            epsilon({EVENT: -1}, 1e-5, "server")
