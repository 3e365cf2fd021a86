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

from fedjax_lite.samplers._select import Sampler as Sampler
from fedjax_lite.samplers._select import Selection as Selection
from fedjax_lite.samplers.by_chance import poisson as poisson
from fedjax_lite.samplers.by_chance import uniform as uniform
from fedjax_lite.samplers.by_turn import cyclic as cyclic
from fedjax_lite.samplers.by_turn import everyone as everyone
from fedjax_lite.samplers.by_turn import minimise_reuse as minimise_reuse
from fedjax_lite.samplers.by_turn import round_robin as round_robin
from fedjax_lite.samplers.by_turn import sequential as sequential
from fedjax_lite.samplers.by_weight import importance as importance
from fedjax_lite.samplers.by_weight import weighted as weighted
