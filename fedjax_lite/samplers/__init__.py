"""Ways to choose the clients of a round.

A sampler is a pure function of (key, round): whichever round is asked for, in whatever order,
inside `jit`, `scan` and `vmap` or outside, it answers the same. There is no state to carry, so
that a run resumes at any round, and the cohorts of a run are known before it starts.

>>> import jax, fedjax_lite as fl
>>> population = fl.data.halfspace(num_clients=1000, batch_size=4)
>>> sampler = fl.samplers.poisson(population.num_clients, rate=0.01)
>>> key_cohorts, key_sizes = jax.random.split(jax.random.key(0))
>>> for r in range(3):
...     selection = sampler.select(key_cohorts, r)
...     key_round = jax.random.fold_in(key_sizes, r)
...     cohort = fl.cohort_of(population, selection.client_ids, key=key_round)
>>> cohort.capacity == sampler.capacity
True

A client that is drawn twice in one round (with replacement) fills two slots. It trains with the
same keys in both and sends the same update twice: each draw counts, as in an average over
independent draws. Where clients keep something between rounds, draw without replacement.
"""

from fedjax_lite.samplers._select import Sampler, Selection
from fedjax_lite.samplers.asynchronous import Schedule, fed_buff
from fedjax_lite.samplers.by_chance import poisson, uniform
from fedjax_lite.samplers.by_turn import cyclic, everyone, minimise_reuse, round_robin, sequential
from fedjax_lite.samplers.by_weight import importance, weighted
from fedjax_lite.samplers.stragglers import (
    available,
    by_day_and_night,
    dropping_out,
    over_selected,
    timed,
    timed_out,
)

__all__ = [
    "Sampler",
    "Schedule",
    "Selection",
    "available",
    "by_day_and_night",
    "cyclic",
    "dropping_out",
    "everyone",
    "fed_buff",
    "importance",
    "minimise_reuse",
    "over_selected",
    "poisson",
    "round_robin",
    "sequential",
    "timed",
    "timed_out",
    "uniform",
    "weighted",
]


def __dir__() -> list[str]:
    return __all__
