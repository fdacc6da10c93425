"""A source of noise whose draws are unit vectors, so that products of readings are covariances.

Each row that noise is drawn for gets a direction of its own, which no other draw ever has. What a
row shows is then the list of its coefficients in independent standard deviates, and the scalar
product of two readings is, exactly, their covariance under the law that the code really follows.
"""

from __future__ import annotations

import numpy as np


class Basis:
    def __init__(self, width: int) -> None:
        self.width, self.used = width, 0

    def add(self, out, variances):
        assert len(out) == len(variances)
        for row in np.flatnonzero(variances):
            assert self.used < self.width, "the test needs a wider table"
            out[row, self.used] += np.sqrt(variances[row])
            self.used += 1


class Silent(Basis):
    """No noise at all: what is left are values and gradients."""

    def add(self, out, variances):
        pass
