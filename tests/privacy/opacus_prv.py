"""The accountant of Opacus, by other mathematics than ours."""

import warnings

from privrec.privacy.accountant import Composition


def prv(rounds: Composition, delta: float) -> float:
    """ε by privacy random variables (Gopi et al. 2021), good to 0.01."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus warns while it is imported, about its own parts
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [
            (part.noise_multiplier, part.sampling_rate, part.count) for part in rounds
        ]
        return float(accountant.get_epsilon(delta))
