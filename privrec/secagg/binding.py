"""Everything that is derived for one attempt at one round, bound to all that was agreed on.

Two devices that were told different things (another roster, configuration, run, round, attempt or
model) derive different keys: their masks do not cancel, their shares do not open, and their
signatures do not count for each other. A server gains nothing by telling them different things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from privrec.secagg.graph import Graph
from privrec.secagg.keys import derive, statement
from privrec.secagg.masks import MASK_KEY_BYTES
from privrec.secagg.messages import PLEDGE_BYTES, SHARE_MARK_BYTES
from privrec.secagg.roster import Call


@dataclass(frozen=True)
class Binding:
    """Keys, commitments and statements of one attempt.

    Args:
        context: digest of all that was agreed on before the model.
    """

    context: bytes

    @classmethod
    def of(cls, call: Call, graph: Graph) -> Binding:
        """The binding to a call and to the constants of the protocol."""
        return cls(statement("context", call.digest, graph.complete_up_to, graph.degree))

    def sealing_key(self, agreed: bytes, sender: int, receiver: int) -> bytes:
        """The AES-GCM key of the one message from a device to another; 32 bytes.

        Args:
            agreed: what their sealing keys agree on.
            sender: device number.
            receiver: device number.
        """
        return derive(agreed, "sealing", self.context, sender, receiver)

    def pair_key(self, agreed: bytes, root: bytes, one: int, other: int) -> bytes:
        """The key of the mask between two devices, the same for both; 16 bytes.

        Args:
            agreed: what their masking keys agree on.
            root: of the model, see :func:`model_root`.
            one: device number.
            other: device number.
        """
        low, high = sorted((one, other))
        return derive(agreed, "pair mask", self.context, root, low, high)[:MASK_KEY_BYTES]

    def self_key(self, seed: bytes, root: bytes) -> bytes:
        """The key of a device's own mask; 16 bytes."""
        return derive(seed, "self mask", self.context, root)[:MASK_KEY_BYTES]

    def pledge(self, agreed: bytes, root: bytes, sender: int, receiver: int) -> bytes:
        """What one device sends to another that drew it, once it is masked with it; 16 bytes.

        Args:
            agreed: what their sealing keys agree on.
            root: of the model.
            sender: device number.
            receiver: device number.
        """
        return derive(agreed, "pledge", self.context, root, sender, receiver)[:PLEDGE_BYTES]

    def seed_mark(self, kind: int, dealer: int, seed: bytes) -> bytes:
        """A commitment to a seed; 32 bytes, which hide it since it is random."""
        return statement("seed mark", self.context, kind, dealer, seed)

    def share_mark(self, kind: int, dealer: int, holder: int, share: bytes) -> bytes:
        """A commitment to one share; 16 bytes, which hide it since it is random.

        A holder that alters its share would need a second preimage of 128 bits. A dealer could make
        two shares of one mark, and could as well deal wrong ones.
        """
        stated = statement("share mark", self.context, kind, dealer, holder, share)
        return stated[:SHARE_MARK_BYTES]

    def confirmation(self, survivors: bytes, root: bytes) -> bytes:
        """What devices sign when they confirm the survivors (a bitmap) and the model they saw."""
        return statement("confirmation", self.context, root, survivors)


def model_root(digests: Sequence[bytes]) -> bytes:
    """What stands for the model: a digest over those of its bands.

    Args:
        digests: 32 bytes for each band, the band that all devices hold first.
    """
    return statement("model", *digests)
