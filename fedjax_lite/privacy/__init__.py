"""How much is told of a client: noise from epsilon, epsilon from noise, and audits of both.

Needs the extra `privacy`. The noise itself is added by transforms of the update pipeline.
"""

from fedjax_lite.privacy.accounting import Budget, Ledger, budget, calibrate, epsilon, ledger

__all__ = ["Budget", "Ledger", "budget", "calibrate", "epsilon", "ledger"]


def __dir__() -> list[str]:
    return __all__
