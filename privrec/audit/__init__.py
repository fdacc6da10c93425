"""The audit: what this build does with a scenario, measured against what is accounted for it.

It drives the parts that a run drives, on stand-in histories, so it touches no data and costs no
budget. Most of it looks from inside, since black boxes hide ordinary mistakes: a third too little
noise goes unseen by the best attack, and 1 % is seen by counting.
"""

from __future__ import annotations

from privrec.audit.examine import audit

__all__ = ["audit"]
