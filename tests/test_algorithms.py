"""One battery for all algorithms: what the package promises of every one of them."""

import collections
import dataclasses
import functools
import re
from pathlib import Path

import chex
import jax
import numpy as np
import optax
import pytest
from problems import SIZES, everyone, regression_dataset, regression_model

import fedjax_lite as fl


def slopes(params, model_state, batch):
    return batch["x"] * params["w"]


ALGORITHMS = {
    "fed_sgd": lambda model, **kw: fl.fed_sgd(model, optax.sgd(0.3), **kw),
    "fed_sgd_uniform": lambda model, **kw: fl.fed_sgd(
        model, optax.adam(0.2), weighting="uniform", batch_size=2, **kw
    ),
    "fed_sgd_sum": lambda model, **kw: fl.fed_sgd(
        model, optax.sgd(0.02), reduction="sum", batch_size=4, **kw
    ),
    "fed_avg": lambda model, **kw: fl.fed_avg(model, optax.sgd(0.1), batch_size=3, **kw),
    "fed_avg_epochs": lambda model, **kw: fl.fed_avg(
        model, optax.sgd(0.05, momentum=0.9), optax.adam(0.2), batch_size=4, num_epochs=2, **kw
    ),
    "fed_avg_steps": lambda model, **kw: fl.fed_avg(
        model, optax.adam(0.05), batch_size=5, num_steps=3, weighting="uniform", **kw
    ),
    "fed_avg_kept": lambda model, **kw: fl.fed_avg(
        model, optax.adam(0.05), batch_size=4, num_epochs=2, keep_optimizer_state=True, **kw
    ),
    "fed_avg_personal": lambda model, **kw: fl.fed_avg(
        model, optax.sgd(0.1), batch_size=3, personal="b", **kw
    ),
    "fed_prox": lambda model, **kw: fl.fed_prox(
        model, optax.sgd(0.05, momentum=0.9), mu=0.1, batch_size=4, num_epochs=2, **kw
    ),
    "scaffold": lambda model, **kw: fl.scaffold(
        model, optax.sgd(0.05), batch_size=4, num_epochs=2, **kw
    ),
    "scaffold_option_1": lambda model, **kw: fl.scaffold(
        model, optax.sgd(0.05), option=1, weighting="examples", batch_size=4, **kw
    ),
    "fed_nova": lambda model, **kw: fl.fed_nova(
        model, optax.sgd(0.02, momentum=0.9), batch_size=4, num_epochs=2, mu=0.1, **kw
    ),
    "fed_dyn": lambda model, **kw: fl.fed_dyn(
        model, optax.sgd(0.1), alpha=1.0, batch_size=4, num_epochs=2, **kw
    ),
    "mime": lambda model, **kw: fl.mime(
        model, optax.sgd(0.02, momentum=0.9), batch_size=4, num_epochs=2, **kw
    ),
    "mime_lite": lambda model, **kw: fl.mime_lite(
        model, optax.adam(0.02), weighting="examples", batch_size=4, **kw
    ),
    "fed_exp": lambda model, **kw: fl.fed_exp(model, optax.sgd(0.05), batch_size=4, **kw),
    "q_fed_avg": lambda model, **kw: fl.q_fed_avg(
        model, optax.sgd(0.1), q=0.5, lipschitz=5.0, batch_size=4, num_epochs=2, **kw
    ),
    "agnostic_fed_avg": lambda model, **kw: fl.agnostic_fed_avg(
        model, optax.sgd(0.1), num_domains=10, domain_learning_rate=0.1, window_size=5, **kw
    ),
    "ada_fed_prox": lambda model, **kw: fl.ada_fed_prox(
        model, optax.sgd(0.1), mu=0.2, patience=1, batch_size=4, **kw
    ),
    "fed_shuffle": lambda model, **kw: fl.fed_shuffle(
        model, optax.sgd(0.2), batch_size=4, num_epochs=2, **kw
    ),
    "apfl": lambda model, **kw: fl.apfl(model, optax.sgd(0.05), batch_size=4, **kw),
    "ditto": lambda model, **kw: fl.ditto(model, optax.sgd(0.05), mu=0.5, batch_size=4, **kw),
    "p_fed_me": lambda model, **kw: fl.p_fed_me(
        model, optax.sgd(0.1), mu=2.0, learning_rate=0.2, num_inner_steps=2, batch_size=4, **kw
    ),
    "per_fed_avg": lambda model, **kw: fl.per_fed_avg(
        model, optax.sgd(0.1), alpha=0.05, first_order=False, batch_size=4, **kw
    ),
    "fed_rep": lambda model, **kw: fl.fed_rep(
        model, optax.sgd(0.1), personal="b", num_head_epochs=1, batch_size=4, num_epochs=2, **kw
    ),
    "moon": lambda model, **kw: fl.moon(
        model, optax.sgd(0.1), mu=0.05, features=slopes, batch_size=4, **kw
    ),
    "fed_ntd": lambda model, **kw: fl.fed_ntd(
        model, optax.sgd(0.1), beta=0.05, logits=slopes, batch_size=4, **kw
    ),
    "fed_sam": lambda model, **kw: fl.fed_sam(model, optax.sgd(0.1), rho=0.02, batch_size=4, **kw),
    "ifca": lambda model, **kw: fl.ifca(
        model, optax.sgd(0.1), optax.adam(0.2), num_clusters=2, batch_size=4, **kw
    ),
    "pipeline": lambda model, **kw: fl.fed_avg(
        model,
        optax.sgd(0.1),
        batch_size=3,
        pipeline=fl.chain(fl.clip_by_norm(0.5), fl.quantize_uniform()),
        **kw,
    ),
    "feedback": lambda model, **kw: fl.fed_avg(
        model,
        optax.sgd(0.1),
        batch_size=3,
        pipeline=fl.chain(
            fl.downlink(fl.quantize_uniform(2**16)), fl.error_feedback(fl.quantize_uniform(16))
        ),
        **kw,
    ),
    "modular_sum": lambda model, **kw: fl.fed_avg(
        model,
        optax.sgd(0.1),
        batch_size=3,
        pipeline=fl.chain(fl.clip_by_norm(1.0), fl.fixed_point(1.0, 10.0, rounding="nearest")),
        reducer=fl.modular_sum(),
        **kw,
    ),
    "median": lambda model, **kw: fl.fed_avg(
        model, optax.sgd(0.1), batch_size=3, reducer=fl.coordinate_median(), **kw
    ),
}
# What is more the runner's work than the algorithm's is tested of these.
FEW = ("fed_sgd", "fed_avg", "scaffold", "median", "modular_sum")
# Algorithm by algorithm, whose tests share compiled rounds.
each_algorithm = pytest.mark.parametrize("name", ALGORITHMS, scope="module")
# Other options of what is in the table already, for the tests of what a round computes.
VARIANTS = {"fed_sgd_uniform", "fed_sgd_sum", "fed_avg_epochs", "fed_avg_steps"}
VARIANTS |= {"scaffold_option_1", "mime_lite", "pipeline"}
each_kind = pytest.mark.parametrize(
    "name", [name for name in ALGORITHMS if name not in VARIANTS], scope="module"
)
eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


MODEL = regression_model()


@functools.cache
def one_device():
    return fl.clients_mesh(1)


@functools.cache
def resident(num_devices=1):
    return regression_dataset().resident(fl.clients_mesh(num_devices))


def build(name, model=MODEL, **options):
    return ALGORITHMS[name](model, **{"mesh": one_device(), **options})


@functools.cache
def built(name, **options):
    """Built once: tests with as many slots for clients share one compiled round."""
    return build(name, **options)


def one_round(name, cohort=None, algorithm=None, **options):
    algorithm = algorithm or built(name, **options)
    cohort = everyone(resident()) if cohort is None else cohort
    state = algorithm.init(jax.random.key(0), num_clients=10)
    return algorithm.round(jax.random.key(1), state, cohort)


@functools.cache
def reference(name):
    return jax.device_get(one_round(name))


def assert_same_round(actual, desired, tolerance=1e-5):
    chex.assert_trees_all_close(
        jax.device_get(actual), jax.device_get(desired), rtol=tolerance, atol=tolerance
    )


@functools.cache
def cohorts_of_six():
    """Keys and cohorts of a hundred rounds."""
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(2), r)) for r in range(100)]
    return [(key, fl.cohort(own, resident(), 6, capacity=10)) for own, key in keys]


@each_algorithm
def test_converges(name):
    algorithm = built(name)
    state = algorithm.init(jax.random.key(0), num_clients=10)
    # The server's model, if it has a whole one, and one only.
    has_one = getattr(state.params["b"], "shape", None) == ()
    client_model = None if has_one else algorithm.client_model

    def loss():
        options = {"client_model": client_model, "mesh": one_device()}
        return fl.evaluate_clients(MODEL, state, everyone(resident()), **options).pooled["loss"]

    before = loss()
    for key, cohort in cohorts_of_six():
        state, _ = algorithm.round(key, state, cohort)
    after = loss()
    assert after < 0.05 * before  # the noise alone is 0.1 ** 2 / 2 = 0.005
    assert state.round == 100


@functools.cache
def on_four_devices(name):
    """The algorithm, and how often the loss of its model has been traced."""
    traces = collections.Counter()

    def loss(*args):
        traces["loss"] += 1
        return MODEL.loss(*args)

    # Each device has two waves of two lanes, and slots of no client.
    return build(name, MODEL._replace(loss=loss), mesh=fl.clients_mesh(4), lanes=2), traces


@functools.cache
def cohorts_of_other_sizes():
    """On four devices. The table of rows keeps its length; who owns them, and how many take part,
    varies."""
    rng = np.random.default_rng(0)
    cohorts = []
    for _ in range(12):
        sizes = rng.multinomial(49, rng.dirichlet(np.ones(10)))
        population = regression_dataset(sizes).resident(fl.clients_mesh(4))
        order = rng.permutation(10)[: rng.integers(1, 11)]
        cohorts.append(everyone(population, order, capacity=10))
    return cohorts


@each_kind
@eight_devices
def test_devices_change_nothing_and_compile_once_whatever_the_cohort(name):
    algorithm, traces = on_four_devices(name)
    assert_same_round(one_round(name, everyone(resident(4)), algorithm), reference(name))
    before = traces["loss"], algorithm.round._cache_size()
    state = algorithm.init(jax.random.key(0), num_clients=10)
    for r, cohort in enumerate(cohorts_of_other_sizes()):
        state, _ = algorithm.round(jax.random.key(r), state, cohort)
    assert (traces["loss"], algorithm.round._cache_size()) == before


@each_algorithm
def test_state_keeps_its_structure_shapes_and_dtypes(name):
    algorithm = built(name)
    before = algorithm.init(jax.random.key(0), num_clients=10)
    after, info = reference(name)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    chex.assert_shape(list(info.clients.values()), (10,))


COSTS = {
    name: costs
    for name, *costs in re.findall(
        r"^\| \[`fl\.(\w+)`.* \| (.*) \| \N{MULTIPLICATION SIGN}([^|,]*)(.*) \|$",
        (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text(),
        re.MULTILINE,
    )
}


@each_algorithm
def test_clients_keep_and_send_what_the_documentation_says(name):
    if name not in COSTS:
        pytest.skip("another form of one that is there")
    keeps, times, more = COSTS[name]
    state, info = reference(name)
    assert (keeps == "—") == (not jax.tree.leaves(state.store))
    numbers = sum(x.size for x in jax.tree.leaves(state.params)) // (2 if name == "ifca" else 1)
    expected = 2 * numbers * eval(times, {"k": 2})
    if "$s$" in more:
        expected += sum(x.size for x in jax.tree.leaves(state.opt_state.base))
    if "3 numbers a domain" in more:
        expected += 3 * 10
    bits = info.clients["bits_down"] + info.clients["bits_up"]
    known = built(name).message_bits(jax.random.key(0))
    assert list(known) == [info.clients["bits_down"].max(), info.clients["bits_up"].max()]
    # Beside these, up to three scalars that the server sums, or sends.
    np.testing.assert_allclose(bits[3] / 32, expected, atol=3)


@pytest.mark.parametrize("name", FEW, scope="module")
@pytest.mark.parametrize(("lanes", "capacity"), [(3, 10), (64, 16)])
def test_lanes_change_nothing(name, lanes, capacity):
    """Fewer than clients, or more; nor do empty slots."""
    state, info = one_round(name, everyone(resident(), capacity=capacity), lanes=lanes)
    clients = jax.tree.map(lambda x: np.asarray(x)[:10], info.clients)
    assert_same_round((state, dataclasses.replace(info, clients=clients)), reference(name))


def test_lanes_change_nothing_for_large_params():
    model = fl.function_model(
        lambda w, batch: ((batch["x"] @ w).mean(1) - batch["y"]) ** 2,
        lambda key: jax.random.normal(key, (3, 30_000)),  # One lane copies nothing of that size.
    )
    algorithms = (build("fed_avg", model, lanes=lanes) for lanes in (1, 3))
    assert_same_round(*(one_round("fed_avg", algorithm=algorithm) for algorithm in algorithms))


@each_kind
@eight_devices
def test_devices_without_a_client_change_nothing(name):
    few = lambda population: everyone(population, [3, 0, 1], capacity=10)
    spread = one_round(name, few(resident(4)), on_four_devices(name)[0])
    assert_same_round(spread, one_round(name, few(resident())))


@each_algorithm
def test_order_of_clients_changes_nothing(name):
    order = np.random.default_rng(0).permutation(10)
    state, info = reference(name)
    shuffled_state, shuffled_info = one_round(name, everyone(resident(), order))
    assert_same_round(shuffled_state, state)
    assert_same_round(
        shuffled_info.clients, jax.tree.map(lambda x: np.asarray(x)[order], info.clients)
    )


@each_kind
def test_padding_weighs_nothing_even_if_it_is_nan(name):
    algorithm, num_devices = built(name, lanes=3), 1
    if jax.device_count() >= 8:
        (algorithm, _), num_devices = on_four_devices(name), 4
    # Client 3 takes no part and is nothing but NaN; its neighbours' short batches reach into it.
    order = [i for i in range(10) if i != 3]
    own = np.repeat(np.arange(10), SIZES)[:, None] == 3
    poison = lambda x: np.where(own if x.ndim > 1 else own[:, 0], np.nan, x)
    poisoned = regression_dataset().map(lambda examples: jax.tree.map(poison, examples))
    poisoned = poisoned.resident(fl.clients_mesh(num_devices))
    population = resident(num_devices)
    expected = one_round(name, everyone(population, order, capacity=10), algorithm)
    actual = one_round(name, everyone(poisoned, order, capacity=10), algorithm)
    chex.assert_trees_all_equal(jax.device_get(actual), jax.device_get(expected))
    assert_same_round(expected, one_round(name, everyone(resident(), order, capacity=10)))


@each_kind
def test_scans_over_rounds_side_by_side_equal_loops(name):
    """And lanes change nothing, of which loops have one."""
    algorithm, in_lanes, population = built(name), built(name, lanes=3), resident()
    if name in FEW and jax.device_count() >= 4:
        (algorithm, _), population = on_four_devices(name), resident(4)
        in_lanes = algorithm
    cohort = everyone(population)

    def step(algorithm, state, key):
        if name not in FEW:
            return algorithm.round(key, state, cohort)
        key_cohort, key_round = jax.random.split(key)
        size = jax.random.randint(key_cohort, (), 3, 9)
        drawn = fl.cohort(key_cohort, population, size, capacity=10)
        return algorithm.round(key_round, state, drawn)

    def begin(key):
        key_init, key_rounds = jax.random.split(key)
        return algorithm.init(key_init, num_clients=10), jax.random.split(key_rounds, 3)

    def scan(state, keys):
        return jax.lax.scan(functools.partial(step, in_lanes), state, keys)

    keys = jax.random.split(jax.random.key(9), 3)
    if name in FEW:  # What comes before the rounds may be in the program, too.
        scanned = jax.jit(jax.vmap(lambda key: scan(*begin(key))))(keys)
    else:
        scanned = jax.jit(jax.vmap(scan))(*jax.vmap(begin)(keys))
    looped = []
    for key in keys:
        state, own_keys = begin(key)
        infos = []
        for key_step in own_keys:
            state, info = step(algorithm, state, key_step)
            infos.append(jax.device_get(info))
        looped.append((jax.device_get(state), jax.tree.map(lambda *xs: np.stack(xs), *infos)))
    assert_same_round(scanned, jax.tree.map(lambda *xs: np.stack(xs), *looped))


@each_kind
def test_same_seed_same_bits(name):
    algorithm = build(name) if name in FEW else built(name)
    again = one_round(name, algorithm=algorithm)
    chex.assert_trees_all_equal(jax.device_get(again), reference(name))


@each_algorithm
def test_a_cohort_without_examples_is_skipped(name):
    algorithm = built(name)
    state = algorithm.init(jax.random.key(0), num_clients=10)
    nobody = everyone(resident(), [1], capacity=10)
    after, info = algorithm.round(jax.random.key(1), state, nobody)
    assert info.skipped
    assert info.num_clients == info.num_empty == 1
    assert after.round == 1
    before = jax.device_get((state.params, state.opt_state))
    chex.assert_trees_all_equal(jax.device_get((after.params, after.opt_state)), before)
    assert np.isnan(info.loss)
    # There is nothing to take the mean of.
    chex.assert_tree_all_finite(jax.device_get(dataclasses.replace(info, loss=0.0, metrics={})))


@each_algorithm
def test_a_client_that_is_not_finite_is_left_out_and_counted(name):
    dataset = regression_dataset()
    dataset.examples["y"][dataset.offsets[3]] = np.inf
    population = dataset.resident(one_device())
    others = [i for i in range(10) if i != 3]
    after, info = one_round(name, everyone(population))
    expected, expected_info = one_round(name, everyone(population, others, capacity=10))
    assert_same_round(after, expected)
    assert info.num_nonfinite == 1
    assert info.clients["nonfinite"].tolist() == [i == 3 for i in range(10)]
    assert info.clients["weight"][3] == 0
    np.testing.assert_allclose(info.loss, expected_info.loss, rtol=1e-5)
    if name not in FEW:
        return
    kept, _ = one_round(name, everyone(population), on_nonfinite="keep")
    # A median does not see one client, and an integer is no infinity.
    assert np.isfinite(kept.params["w"]).all() == (name in ("median", "modular_sum"))


@pytest.mark.parametrize("name", ["fed_sgd", "fed_avg", "scaffold", "mime", "apfl", "pipeline"])
def test_memory_does_not_grow_with_the_cohort(name):
    num_clients = 2000
    dataset = fl.FederatedDataset.from_rows(
        {"x": np.ones((num_clients, 3), np.float32), "y": np.ones(num_clients, np.float32)},
        np.arange(num_clients)[:, None],
    )
    population = dataset.resident(one_device())
    model = fl.function_model(
        lambda w, batch: ((batch["x"] @ w).mean(1) - batch["y"]) ** 2,
        lambda key: jax.random.normal(key, (3, 100)),
    )
    algorithm, key = build(name, model), jax.random.key(0)
    state = jax.eval_shape(lambda: algorithm.init(key, num_clients=num_clients))
    compiled = algorithm.round.lower(key, state, everyone(population)).compile()
    # The list of clients is a few words for each, with no copy of the 1.2 kB of params.
    assert compiled.memory_analysis().temp_size_in_bytes < 100 * num_clients
