"""The one seam between the server and the devices."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privrec.device.round import Round
from privrec.device.update import Aggregate


class Transport(Protocol):
    """Carries a round to the devices and brings back their sum."""

    def collect(self, round: Round, weights: NDArray[np.float32]) -> Aggregate:
        """The sum of the bounded updates of the round's cohort, and nothing per device.

        Asked for the same round again (also another attempt at it), it starts from the same private
        states as the first time.
        """
        ...
