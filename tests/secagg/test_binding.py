"""What is derived for a round depends on everything that it is said to be bound to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from secagg_rounds import Cohort, terms

from privrec.secagg.keys import Binding, Prekey, model_root
from privrec.secagg.messages import MASKING, NOISE, SEED
from privrec.secagg.roster import Call
from privrec.secagg.sharing import Graph

ONE, TWO = Binding(bytes(32)), Binding(bytes(31) + b"\x01")
A, B = b"a" * 32, b"b" * 32

# Each list: values that must all differ.
DIFFERENT: dict[str, Callable[[], list[bytes]]] = {
    "sealing": lambda: [
        ONE.sealing_key(A, 1, 2),
        TWO.sealing_key(A, 1, 2),
        ONE.sealing_key(B, 1, 2),
        ONE.sealing_key(A, 2, 1),  # one key for each direction: both use the same nonce
        ONE.sealing_key(A, 1, 3),
    ],
    "pair mask": lambda: [
        ONE.pair_key(A, A, 1, 2),
        TWO.pair_key(A, A, 1, 2),
        ONE.pair_key(B, A, 1, 2),
        ONE.pair_key(A, B, 1, 2),
        ONE.pair_key(A, A, 1, 3),
        ONE.self_key(A, A),
    ],
    "self mask": lambda: [
        ONE.self_key(A, A),
        TWO.self_key(A, A),
        ONE.self_key(B, A),
        ONE.self_key(A, B),
    ],
    "seed mark": lambda: [
        ONE.seed_commitment(SEED, 1, A),
        TWO.seed_commitment(SEED, 1, A),
        ONE.seed_commitment(NOISE, 1, A),
        ONE.seed_commitment(SEED, 2, A),
        ONE.seed_commitment(SEED, 1, B),
    ],
    "share mark": lambda: [
        ONE.share_commitment(SEED, 1, 2, A),
        TWO.share_commitment(SEED, 1, 2, A),
        ONE.share_commitment(MASKING, 1, 2, A),
        ONE.share_commitment(SEED, 2, 1, A),
        ONE.share_commitment(SEED, 1, 3, A),
        ONE.share_commitment(SEED, 1, 2, B),
    ],
    "confirmation": lambda: [
        ONE.confirmation(b"\x07", A),
        TWO.confirmation(b"\x07", A),
        ONE.confirmation(b"\x06", A),
        ONE.confirmation(b"\x07", B),
    ],
    "model": lambda: [
        model_root([A]),
        model_root([B]),
        model_root([A, A]),
        model_root([A + B]),
        model_root([A, B]),
        model_root([B, A]),
    ],
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_input_counts(name: str) -> None:
    values = DIFFERENT[name]()
    assert len(set(values)) == len(values)
    assert values == DIFFERENT[name]()


def test_both_of_a_pair_draw_the_same_mask() -> None:
    assert ONE.pair_key(A, B, 1, 2) == ONE.pair_key(A, B, 2, 1)


def test_the_context_covers_the_call_and_the_constants_of_the_protocol() -> None:
    cohort = Cohort((0,) * 4)
    prekeys = [Prekey.unpack(record) for record in cohort.prekeys()]
    calls = [Call.of(terms((5,), round=index), prekeys) for index in range(2)]
    graphs = [Graph(), Graph(complete_up_to=199), Graph(degree=99)]
    contexts = {Binding.of(call.digest, graph).context for call in calls for graph in graphs}
    assert len(contexts) == 6
