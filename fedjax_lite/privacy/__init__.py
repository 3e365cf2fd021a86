"""How much is told of a client: noise from epsilon, epsilon from noise, and audits of both.

Needs the extra `privacy`. The noise itself is added by transforms of the update pipeline.
"""

from fedjax_lite.privacy.accounting import Budget, Ledger, budget, calibrate, epsilon, ledger
from fedjax_lite.privacy.auditing import Audit, Scores, audit, canaries, canary_scores

__all__ = [
    "Audit",
    "Budget",
    "Ledger",
    "Scores",
    "audit",
    "budget",
    "calibrate",
    "canaries",
    "canary_scores",
    "epsilon",
    "ledger",
]


def __dir__() -> list[str]:
    return __all__
