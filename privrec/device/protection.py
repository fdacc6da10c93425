"""What everybody agrees on about protecting an update: bounds, grid, ring and noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from privrec.device.round import Round
from privrec.models.layout import Layout, band_sizes
from privrec.privacy.shares import Shares
from privrec.secagg.keys import statement
from privrec.secagg.ring import Encoding, Ring
from privrec.secagg.roster import Terms
from privrec.secagg.rotation import Rotation

SMALL_RING_BITS = 16


@dataclass(frozen=True)
class Protection:
    """From a trained update to integers that may be summed, the same in every round of a run.

    Args:
        encoding: clip norm and grid, and with them the sensitivity of a sum.
        ring: in which sums are taken; the small one needs every update rotated.
        shares: the noise that each device adds itself, or None where it adds none.
        minimums: fewest survivors of each band, the band that all devices hold first; without
            them a sum of any number of devices is taken.
    """

    encoding: Encoding
    ring: Ring = field(default_factory=Ring)
    shares: Shares | None = None
    minimums: tuple[int, ...] = ()

    @property
    def removes_excess(self) -> bool:
        """Whether devices beyond a band's fewest give the seeds of their noise away."""
        return self.shares is not None and self.shares.remove_excess

    def rotation(self, round: Round, layouts: Sequence[Layout]) -> Rotation | None:
        """The public rotation of a round, of the bands that these tiers have; None for none.

        It depends on no update, and is another one in each attempt.
        """
        if self.ring.bits != SMALL_RING_BITS:
            return None
        seed = statement("rotation", round.run_id, round.index, round.attempt)
        return Rotation(band_sizes(layouts), seed)

    def terms(self, round: Round, layouts: Sequence[Layout]) -> Terms:
        """The terms of a round, as the server states them and as each device holds it to them.

        Args:
            round: the round.
            layouts: of all tiers, the strongest first.
        """
        return Terms(
            round.run_id,
            round.index,
            round.attempt,
            statement("plan", round.plan_digest, json.dumps(round.event.to_json(), sort_keys=True)),
            tuple(layout.size for layout in reversed(layouts)),
            self.minimums or (1,) * len(layouts),
            self.ring.bits,
            self.removes_excess,
        )
