"""Recommenders and a secure sum in Flower; the only room that imports ``flwr``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from privrec.errors import ReleaseRefused, UsageError
from privrec.privacy.events import RoundEvent
from privrec.privacy.ledger import Ledger

_FIXED = {f"DifferentialPrivacy{side}SideFixedClipping" for side in ("Server", "Client")}


def attach(ledger: Ledger, strategy: Any) -> None:
    """Charge each round of one of Flower's own DP strategies before its model is released.

    Promise: what is charged bounds what the round's model reveals of one node, if nodes that clip
    do so. Nothing is released of a round that lacks replies, as that would have too little noise
    for its mean, nor of one that cannot be paid for. No amplification is counted, since Flower
    draws cohorts of a fixed size. Metrics of the nodes have no noise, and are not charged.

    Args:
        strategy: ``DifferentialPrivacyServerSideFixedClipping`` or the client-side one, of
            ``flwr.serverapp.strategy``, around one that averages as FedAvg does.

    Raises:
        UsageError: for any other strategy. In a round, ReleaseRefused where nodes do not count
            alike, and as :meth:`~privrec.privacy.ledger.Ledger.charge`.
    """
    from flwr.serverapp.strategy import FedAvg

    kind, inner = type(strategy), getattr(strategy, "strategy", None)
    if kind.__name__ not in _FIXED or not kind.__module__.startswith("flwr.serverapp."):
        raise UsageError(
            f"{kind.__name__}: attach takes {' or '.join(sorted(_FIXED))} of "
            "flwr.serverapp.strategy; of other strategies charge each round's event by yourself, "
            "before the model is released"
        )
    if not isinstance(inner, FedAvg) or type(inner).aggregate_train is not FedAvg.aggregate_train:
        raise UsageError(
            f"{type(inner).__name__}: it makes more of the nodes' models than their mean, so the "
            "noise is not for what one node moves; put the DP strategy around FedAvg"
        )
    release = strategy.aggregate_train

    def aggregate_train(server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
        answered = list(replies)
        whole = [reply for reply in answered if not reply.has_error()]
        if len(whole) < max(len(answered), strategy.num_sampled_clients):
            return None, None
        weights = {
            metrics.get(inner.weighted_by_key)
            for reply in whole
            for metrics in reply.content.metric_records.values()
        }
        if len(weights) != 1 or not (weight := weights.pop()) or not weight > 0:
            raise ReleaseRefused(
                f"round {server_round}: the nodes' {inner.weighted_by_key!r} differ, so the mean "
                "lets one node count for more than the noise hides; let every node report the same"
            )
        noise = float(strategy.noise_multiplier)
        # A cohort of fixed size takes another node in the place of one that is not there.
        alike = ledger.adjacency == "zero-out"
        event = RoundEvent("gaussian", noise if alike else noise / 2) if noise else None
        ledger.charge(event or RoundEvent("none", 0.0))
        return release(server_round, answered)  # type: ignore[no-any-return]

    strategy.aggregate_train = aggregate_train
