"""The Flower side of `secure_sum.py`: one round of SecAgg+ from Flower's public pieces.

Flower's mod and workflow are tied to its legacy driver, so the pieces that they are made of (key
pairs, Shamir's sharing, symmetric encryption, the seeded generator, vector arithmetic) are called
here in the same order and number. Vectors are integers from the start, on both sides: clipping and
quantisation are left out, as are messages and their serialisation, but for that of the vector.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np

MODULUS = 2**32


def available() -> bool:
    """Whether Flower with its SecAgg+ is installed."""
    return find_spec("flwr") is not None


class Peer:
    """One device, and what it costs.

    Args:
        number: its place in the round.
    """

    def __init__(self, number: int) -> None:
        from flwr.supercore.primitives import asymmetric

        self.number = number
        self.cpu = 0.0
        start = time.process_time()
        pairs = [asymmetric.generate_key_pairs() for _ in range(2)]
        self.secret = [asymmetric.private_key_to_bytes(pair[0]) for pair in pairs]
        self.public = [asymmetric.public_key_to_bytes(pair[1]) for pair in pairs]
        self.seed = os.urandom(32)
        self.held: dict[int, tuple[bytes, bytes]] = {}
        self.keys: dict[int, bytes] = {}
        self.cpu += time.process_time() - start

    def share(self, peers: Sequence[Peer], threshold: int) -> dict[int, bytes]:
        """Shares of its seed and mask key, encrypted to each of the others."""
        from flwr.common.secure_aggregation.crypto.shamir import create_shares
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt
        from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat

        start = time.process_time()
        seeds = create_shares(self.seed, threshold, len(peers))
        keys = create_shares(self.secret[0], threshold, len(peers))
        sent = {}
        for peer, seed, key in zip(peers, seeds, keys, strict=True):
            if peer.number == self.number:
                self.held[self.number] = (seed, key)
                continue
            self.keys[peer.number] = agreed(self.secret[1], peer.public[1])
            plain = share_keys_plaintext_concat(self.number, peer.number, seed, key)
            sent[peer.number] = encrypt(self.keys[peer.number], plain)
        self.cpu += time.process_time() - start
        return sent

    def mask(self, received: dict[int, bytes], peers: Sequence[Peer], vector: Any) -> list[bytes]:
        """Its vector under all masks, as bytes."""
        from flwr.common import ndarray_to_bytes
        from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt
        from flwr.common.secure_aggregation.secaggplus_utils import (
            pseudo_rand_gen,
            share_keys_plaintext_separate,
        )

        start = time.process_time()
        for source, sealed in received.items():
            _, _, seed, key = share_keys_plaintext_separate(decrypt(self.keys[source], sealed))
            self.held[source] = (seed, key)
        masked = [vector]
        shapes = [vector.shape]
        own = pseudo_rand_gen(self.seed, MODULUS, shapes)
        masked = arithmetic.parameters_addition(masked, own)
        for source in received:
            key = agreed(self.secret[0], peers[source].public[0])
            mask = pseudo_rand_gen(key, MODULUS, shapes)
            change = arithmetic.parameters_addition
            if self.number < source:
                change = arithmetic.parameters_subtraction
            masked = change(masked, mask)
        sent = [ndarray_to_bytes(part) for part in arithmetic.parameters_mod(masked, MODULUS)]
        self.cpu += time.process_time() - start
        return sent

    def unmask(self, survivors: Sequence[int], dropped: Sequence[int]) -> dict[int, bytes]:
        """One share of each other device."""
        start = time.process_time()
        shares = {number: self.held[number][0] for number in survivors}
        shares |= {number: self.held[number][1] for number in dropped}
        self.cpu += time.process_time() - start
        return shares


@dataclass
class Round:
    """Peers that have dealt their shares; one dealing serves vectors of any length."""

    peers: list[Peer]
    threshold: int
    inbox: dict[int, dict[int, bytes]] = field(default_factory=dict)


def dealt(devices: int, threshold: int) -> Round:
    """A round up to the masked vectors."""
    peers = [Peer(number) for number in range(devices)]
    begun = Round(peers, threshold, {number: {} for number in range(devices)})
    for peer in peers:
        for receiver, sealed in peer.share(peers, threshold).items():
            begun.inbox[receiver][peer.number] = sealed
    return begun


def finished(begun: Round, length: int, dropped: int) -> tuple[list[float], float, int]:
    """CPU seconds of each surviving client in the whole round, of the server, and upload bytes.

    Raises:
        SystemExit: when the sum is wrong, so that the comparison would be worth nothing.
    """
    vector = np.arange(length, dtype=np.int64) % 1000
    before = [peer.cpu for peer in begun.peers]
    survivors, gone = range(dropped, len(begun.peers)), range(dropped)
    uploads = {n: begun.peers[n].mask(begun.inbox[n], begun.peers, vector) for n in survivors}
    opened: dict[int, list[bytes]] = {peer.number: [] for peer in begun.peers}
    for number in survivors:
        for owner, share in begun.peers[number].unmask(survivors, gone).items():
            opened[owner].append(share)
    start = time.process_time()
    total = sum_of(begun, uploads, opened, set(survivors))
    server = time.process_time() - start
    if not np.array_equal(total, vector * len(survivors)):
        raise SystemExit("error: the sum of Flower's pieces is wrong; are they put together right?")
    cpu = [begun.peers[n].cpu for n in survivors]
    for peer, earlier in zip(begun.peers, before, strict=True):
        peer.cpu = earlier  # the next length starts from the same dealing
    return cpu, server, sum(map(len, uploads[dropped]))


def sum_of(
    begun: Round,
    uploads: dict[int, list[bytes]],
    opened: dict[int, list[bytes]],
    survivors: set[int],
) -> Any:
    """What the server does: add up, reconstruct, take the masks off."""
    from flwr.common import bytes_to_ndarray
    from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    total: list[Any] = []
    for upload in uploads.values():
        parts = [bytes_to_ndarray(part) for part in upload]
        total = arithmetic.parameters_addition(total, parts) if total else parts
    shapes = arithmetic.get_parameters_shape(total)
    for number, shares in opened.items():
        secret = combine_shares(shares)  # of all that came, as the workflow does
        if number in survivors:
            own = pseudo_rand_gen(secret, MODULUS, shapes)
            total = arithmetic.parameters_subtraction(total, own)
            continue
        for other in begun.peers:
            # Masks between two that dropped out are drawn too, and cancel.
            if other.number != number:
                mask = pseudo_rand_gen(agreed(secret, other.public[0]), MODULUS, shapes)
                change = arithmetic.parameters_addition
                if other.number > number:
                    change = arithmetic.parameters_subtraction
                total = change(total, mask)
    return arithmetic.parameters_mod(total, MODULUS)[0]


def agreed(private: bytes, public: bytes) -> bytes:
    """What two devices share, from serialised keys, as Flower keeps them."""
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
    from flwr.supercore.primitives import asymmetric

    return generate_shared_key(
        asymmetric.bytes_to_private_key(private), asymmetric.bytes_to_public_key(public)
    )
