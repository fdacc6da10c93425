"""Integer noise from the secure generator, for the server of ``noise = "central"``."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from privrec.errors import UsageError
from privrec.randomness import SecureStream

LARGEST_SIGMA = 2.0**40
_BLOCK = 1 << 16


def rounded_gaussian(stream: SecureStream, sigma: float, size: int) -> NDArray[np.int64]:
    """Gaussian noise rounded on the integer grid, one independent draw a coefficient.

    Promise: added to an integer sum of L2 sensitivity ``B``, it gives exactly what the Gaussian
    mechanism of noise multiplier ``sigma / B`` gives, rounded. Rounding commutes with adding an
    integer, so it is post-processing and the accounting of the Gaussian holds unchanged; a rounded
    output also has no float artefacts from which the sum could be read.

    Args:
        stream: the secure stream of this draw; it is read by 16 bytes for every two coefficients.
        sigma: standard deviation before rounding, in integer steps, above 0 and at most 2^40.
        size: number of coefficients.

    Returns:
        int64 of shape ``(size,)``, of variance ``sigma² + 1/12`` for ``sigma`` above 1.

    Raises:
        UsageError: when ``sigma`` is outside its range.
    """
    if not (math.isfinite(sigma) and 0 < sigma <= LARGEST_SIGMA):
        raise UsageError(
            f"noise of standard deviation {sigma} steps: it must be above 0 and at most 2^40; "
            "check privacy.noise_multiplier and privacy.scale_bits"
        )
    noise = np.empty(size, dtype=np.int64)
    for start in range(0, size, _BLOCK):
        part = noise[start : start + _BLOCK]
        deviates = stream.normal(len(part))
        deviates *= sigma
        np.rint(deviates, out=deviates)
        part[:] = deviates
    return noise
