import subprocess
import sys

import jax
import pytest

LOOP = """
import os
os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=5"
import jax, optax
import fedjax_lite as fl
fl.configure_cpu(2)
population = fl.data.halfspace(batch_size=1000)
algorithm = fl.fed_sgd(fl.models.halfspace_classifier(), optax.sgd(0.1))
state = algorithm.init(jax.random.key(0))
cohort = fl.cohort(jax.random.key(1), population, 20)
key = jax.random.key(2)
for _ in range(1000):
    state, info = algorithm.round(key, state, cohort)
print(int(state.round))
"""


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="virtual devices are a CPU's")
def test_rounds_that_nobody_waits_for_do_not_come_to_a_standstill():
    run = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True)
    assert run.stdout.strip() == "1000", run.stderr[-500:]
