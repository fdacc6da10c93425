"""What travels between the server app and the nodes: one message for all devices of a node.

A body is a msgpack map inside a Flower record. Devices are named by their identities, so that a
node that hosts hundreds answers for each of them in one message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
from flwr.app import ConfigRecord, Message, RecordDict

from privrec.device.update import Round
from privrec.errors import ReleaseRefused
from privrec.privacy.events import RoundEvent

REGISTER, SHARES, MASKED, CONFIRM, UNMASK = (
    "query.register", "train.shares", "train.masked", "train.confirm", "train.unmask",
)  # fmt: skip
EXCHANGES = (SHARES, MASKED, CONFIRM, UNMASK)
_RECORD, _BODY = "privrec", "body"
Body = dict[str, Any]


def pack(body: Mapping[str, Any]) -> RecordDict:
    """A body as the content of a Flower message."""
    packed: bytes = msgpack.packb(dict(body), use_bin_type=True)
    return RecordDict({_RECORD: ConfigRecord({_BODY: packed})})


def unpack(message: Message) -> Body:
    """The body of a Flower message.

    Raises:
        ReleaseRefused: when it has none.
    """
    try:
        body = msgpack.unpackb(
            message.content.config_records[_RECORD][_BODY], raw=False, strict_map_key=False
        )
    except (KeyError, TypeError, ValueError, msgpack.UnpackException) as error:
        raise ReleaseRefused(
            f"a message of type {message.metadata.message_type} without a body of privrec's "
            f"({type(error).__name__}); server and nodes must run the same version of the app"
        ) from None
    if type(body) is not dict:
        raise ReleaseRefused("a body that is no map; server and nodes must run the same version")
    return body


def summary(refused: Mapping[bytes, str]) -> str:
    """What devices refused, in a line: hundreds on a node would fill a log with the same words."""
    name, why = next(iter(refused.items()))
    others = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    return f"device {name.hex()[:16]}{others}: {why}"


def round_to_body(round: Round) -> Body:
    """A round as plain values."""
    return {
        "run_id": round.run_id,
        "index": round.index,
        "attempt": round.attempt,
        "event": round.event.to_json(),
        "plan_digest": round.plan_digest,
        "model": list(round.model_digests),
    }


def round_from_body(body: Mapping[str, Any]) -> Round:
    """The round that :func:`round_to_body` described.

    Raises:
        ReleaseRefused: when it is none.
    """
    try:
        digests = tuple(bytes(each) for each in body["model"])
        index, attempt = int(body["index"]), int(body["attempt"])
        event = RoundEvent.from_json(body["event"])
        return Round(str(body["run_id"]), index, attempt, event, str(body["plan_digest"]), digests)
    except (KeyError, TypeError, ValueError) as error:
        raise ReleaseRefused(f"a round that is none ({error!r}); nothing is answered") from None
