import warnings

import jax
import optax
import pytest
from processes import ended, start

import fedjax_lite as fl
from fedjax_lite.xla import cpu

LOOP = """
import os
os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=5"
import jax, optax
import fedjax_lite as fl
import warnings
warnings.simplefilter("error", fl.UnconfiguredCPUWarning)
fl.configure_cpu(2)
population = fl.data.halfspace(batch_size=1000)
algorithm = fl.fed_sgd(fl.models.halfspace_classifier(), optax.sgd(0.1))
state = algorithm.init(jax.random.key(0))
cohort = fl.cohort(jax.random.key(1), population, 20)
key = jax.random.key(2)
for _ in range(1000):
    state, info = algorithm.round(key, state, cohort)
fl.configure_cpu(2)
print(int(state.round))
"""

EVALUATIONS = """
import os
os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=5"
import jax, jax.numpy as jnp, optax
import fedjax_lite as fl
fl.configure_cpu(4)
model = fl.models.mlp(input_shape=(64,), hidden=(64,), num_classes=10)
state = fl.fed_sgd(model, optax.sgd(0.1)).init(jax.random.key(0))
examples = fl.replicate({"x": jnp.ones((20000, 64)), "y": jnp.zeros(20000, jnp.int32)})
results = [fl.evaluate(model, state, examples, batch_size=64) for _ in range(300)]
jax.block_until_ready(results)
print(len(results))
"""


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="virtual devices are a CPU's")
@pytest.mark.parametrize(("program", "calls"), [(LOOP, "1000"), (EVALUATIONS, "300")])
def test_calls_that_nobody_waits_for_do_not_come_to_a_standstill(program, calls, tmp_path):
    ended(start(tmp_path, exec, program, {}))
    out, err = ((tmp_path / name).read_text() for name in ("out", "err"))
    assert out.strip() == calls, err[-500:]


LOOPS = """
import os
os.environ["XLA_FLAGS"] = ""
import fedjax_lite as fl
fl.configure_cpu(1)
import jax, jax.numpy as jnp, numpy as np

def drawn(i, j):
    return jax.random.bits(jax.random.fold_in(jax.random.key(1), 100 * i + j), (3,), jnp.uint32)

@jax.jit
def total(outer, inner):
    def add(i, x):
        def add_some(j, x):
            return jax.lax.cond((i + j) % 3 != 0, lambda: x + drawn(i, j), lambda: x)
        return jax.lax.fori_loop(0, jnp.where(i % 2 == 0, inner, 0), add_some, x + drawn(i, 99))
    return jax.lax.fori_loop(0, outer, add, jnp.zeros(3, jnp.uint32))

pairs = [(i, 99) for i in range(5)]
pairs += [(i, j) for i in range(0, 5, 2) for j in range(4) if (i + j) % 3]
np.testing.assert_array_equal(total(5, 4), sum(np.asarray(drawn(*pair)) for pair in pairs))
"""


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the flags are a CPU's")
def test_loops_in_loops_over_few_numbers_are_right_with_the_flags(tmp_path):
    assert ended(start(tmp_path, exec, LOOPS, {})) == 0, (tmp_path / "err").read_text()


@pytest.fixture
def unconfigured(monkeypatch):
    """A process on a CPU in which nothing has been warned of."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    cpu.warn_if_unconfigured.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", fl.UnconfiguredCPUWarning)
        yield caught


def test_a_cpu_that_is_not_set_up_is_told_of_once_at_the_first_round(unconfigured):
    algorithm = fl.fed_sgd(fl.models.halfspace_classifier(), optax.sgd(0.1))
    state = jax.eval_shape(algorithm.init, jax.random.key(0))
    assert not unconfigured
    for size in (1, 2):  # Two programs, traced and not compiled.
        cohort = fl.cohort(jax.random.key(1), fl.data.halfspace(num_clients=3, batch_size=2), size)
        jax.eval_shape(algorithm.round, jax.random.key(2), state, cohort)
        (warning,) = unconfigured
    assert warning.category is fl.UnconfiguredCPUWarning
    assert "call fl.configure_cpu() at the start of the program" in str(warning.message)


@pytest.mark.parametrize(
    ("flags", "backend", "warned"),
    [
        ("", "cpu", True),
        ("--xla_cpu_prefer_vector_width=256", "cpu", True),
        (" ".join(f"{name}=0" for name in cpu._FLAGS), "cpu", False),
        ("", "gpu", False),
        ("", "tpu", False),
    ],
)
def test_flags_that_are_set_and_accelerators_need_no_warning(
    flags, backend, warned, unconfigured, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for _ in range(2):
        cpu.warn_if_unconfigured()
    assert len(unconfigured) == warned
