"""What is passed in another one's place is named, when a round is traced at the latest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import everyone, regression_dataset, regression_model

import fedjax_lite as fl

KEY, LEGACY = jax.random.key(0), np.zeros(2, np.uint32)
MODEL, SGD = regression_model(), optax.sgd(0.1)
OTHER_MODEL = fl.models.logistic((5,), 3)
FED_AVG = fl.fed_avg(MODEL, SGD)
ADAM = fl.fed_avg(MODEL, SGD, optax.adam(0.1))
PIPED = fl.fed_avg(MODEL, SGD, pipeline=fl.chain(fl.clip_by_norm(1.0)))
SCAFFOLD, APFL = fl.scaffold(MODEL, SGD), fl.apfl(MODEL, SGD)
OTHER = fl.fed_avg(OTHER_MODEL, SGD)


@functools.cache
def cohort(num_clients=10):
    return everyone(regression_dataset((3,) * num_clients).resident())


def state_of(algorithm):
    return jax.eval_shape(lambda: algorithm.init(KEY, num_clients=10))


def play(algorithm, key=KEY, state=None, clients=None):
    """A round that is traced, and neither compiled nor run."""
    state = state_of(algorithm) if state is None else state
    return jax.eval_shape(algorithm.round, key, state, cohort() if clients is None else clients)


def two_features():
    clients = {"a": {"x": np.zeros((1, 2), np.float32), "y": np.zeros(1, np.float32)}}
    return everyone(fl.FederatedDataset.from_clients(clients).resident())


@functools.cache
def generated():
    return fl.data.halfspace(num_clients=10, batch_size=2)


NO_KEY = "pass a typed key such as jax.random.key"
NO_OPTIMIZER = r"call it, as in optax.sgd\(0.1\)"
CALLS = {
    f"key is {shown}; {NO_KEY}": [
        lambda key=key: FED_AVG.round(key, FED_AVG.init({"w": jnp.ones(3), "b": 0.0}), cohort()),
        lambda key=key: fl.cohort(key, generated(), 2),
        lambda key=key: fl.cohort_of(generated(), [1], key=key),
        lambda key=key: fl.samplers.uniform(10, 2).select(key, 0),
        lambda key=key: fl.evaluate_clients(MODEL, state_of(FED_AVG), cohort(), key=key),
        lambda key=key: fl.evaluate_fine_tuned(
            MODEL, state_of(FED_AVG), cohort(), cohort(), SGD, key=key
        ),
    ]
    for key, shown in (
        (LEGACY, r"an array uint32\[2\]"),
        (np.int32(3), r"an array int32\[\]"),
        (7, r"(7, of type int|an array int32\[\])"),
    )
}


@pytest.mark.parametrize("message", CALLS)
def test_a_seed_or_a_legacy_key_is_no_key(message):
    for call in CALLS[message]:
        with pytest.raises(TypeError, match=message):
            call()


REMEDY = r"; pass a state of this algorithm's init and rounds, or algorithm.init\(state.params\)"
ADAM_STATE = r"\(ScaleByAdamState\(.*\), EmptyState\(\)\)"
SGD_STATE = r"\(EmptyState\(\), EmptyState\(\)\)"
DRAWN = "; pass a state of an algorithm that was built with this model"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FED_AVG.init(LEGACY), TypeError, "params has dtype uint32.* or a typed key such"),
        (lambda: FED_AVG.init(0), TypeError, "params is 0, of type int;.* or a typed key such"),
        (
            lambda: FED_AVG.init(jax.random.split(KEY)),
            ValueError,
            r"key_or_params has shape \(2,\), that of several keys; pass one",
        ),
        (lambda: play(FED_AVG, jax.random.split(KEY)), ValueError, r"key has shape \(2,\), that"),
        (
            lambda: FED_AVG.round("seed", {}, cohort()),
            TypeError,
            f"key is 'seed', of type str; {NO_KEY}",
        ),
        (
            lambda: FED_AVG.round(KEY, state_of(FED_AVG), regression_dataset((3,))),
            TypeError,
            r"cohort is of type FederatedDataset; pass a Cohort .*fl.cohort\(key, population, 10\)",
        ),
        (
            lambda: play(FED_AVG, state={"w": jnp.ones(3)}),
            TypeError,
            r"state is of type dict; pass a ServerState .*algorithm.init\(key\)",
        ),
        (
            lambda: play(ADAM, state=state_of(FED_AVG)),
            ValueError,
            f"state.opt_state is {SGD_STATE}, in place of {ADAM_STATE}{REMEDY}",
        ),
        (
            lambda: play(FED_AVG, state=state_of(ADAM)),
            ValueError,
            f"state.opt_state is {ADAM_STATE}, in place of {SGD_STATE}{REMEDY}",
        ),
        (
            lambda: play(PIPED, state=state_of(FED_AVG)),
            ValueError,
            rf"state.pipeline_state is \(\), in place of \(\(\),\){REMEDY}",
        ),
        (
            lambda: play(FED_AVG, state=state_of(APFL)),
            ValueError,
            rf"state.store, for one client, is Personal\(.*\), in place of \(\){REMEDY}",
        ),
        (
            lambda: play(APFL, state=state_of(FED_AVG)),
            ValueError,
            rf"state.store, for one client, is \(\), in place of Personal\(.*\){REMEDY}",
        ),
        (
            lambda: play(SCAFFOLD, clients=cohort(3)),
            ValueError,
            r"state.store\['b'\] has shape \(10,\), while the cohort .* 3 clients; give",
        ),
        (
            lambda: play(FED_AVG, state=state_of(OTHER)),
            ValueError,
            rf"params is .*'Dense_0'.*, in place of \{{'b': '\[\]', 'w': '\[3\]'\}}{DRAWN}",
        ),
        (
            lambda: fl.evaluate(MODEL, state_of(OTHER), regression_dataset((3,)).examples),
            ValueError,
            rf"params is .*'Dense_0'.*, in place of \{{'b': '\[\]', 'w': '\[3\]'\}}{DRAWN}",
        ),
        (
            lambda: fl.evaluate_clients(OTHER_MODEL, state_of(FED_AVG), cohort()),
            ValueError,
            rf"params is \{{'b': '\[\]', 'w': '\[3\]'\}}, in place of .*'Dense_0'.*{DRAWN}",
        ),
        (
            lambda: play(FED_AVG, clients=two_features()),
            TypeError,
            r"model failed on a batch of x float32\[1, 2\], y .*mask bool\[1\]: .*; pass clie",
        ),
        (
            lambda: play(OTHER),
            ValueError,
            r"model failed on a batch of x float32\[30, 3\], .*\(3, 3\).*; pass clients or exam",
        ),
    ],
)
def test_the_state_or_the_cohort_of_another_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def of(loss):
    return fl.fed_avg(fl.function_model(loss, lambda key: {"w": jnp.ones(3)}), SGD)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fl.fed_avg(MODEL, optax.sgd),
            TypeError,
            "client_optimizer is <function sgd.*call",
        ),
        (lambda: fl.fed_avg(MODEL, optax.clip), TypeError, f"client_opt.*{NO_OPTIMIZER}"),
        (lambda: fl.fed_avg(MODEL, SGD, optax.adam), TypeError, f"server_opt.*{NO_OPTIMIZER}"),
        (lambda: fl.fed_sgd(MODEL, optax.scale_by_adam), TypeError, f"server_opt.*{NO_OPTIMIZER}"),
        (
            lambda: fl.fed_avg(MODEL, SGD, lambda round: SGD),
            TypeError,
            r"server_optimizer is of type function; pass a GradientTransf.*optax.sgd\(schedule\)",
        ),
        (
            lambda: play(fl.fed_avg(MODEL, SGD, optax.sgd("0.1"))),
            TypeError,
            r"server_optimizer.update failed: .*; pass an optax transformation for these params",
        ),
        (
            lambda: play(fl.fed_avg(MODEL, optax.sgd("0.1"))),
            TypeError,
            r"client_optimizer.update failed: .*; pass an optax transformation for these params",
        ),
        (
            lambda: state_of(fl.fed_sgd(MODEL, optax.multi_transform({"a": SGD}, {"x": "a"}))),
            ValueError,
            r"server_optimizer.init failed: .*; pass an optax transformation for these params",
        ),
        (lambda: fl.fed_avg(FED_AVG, SGD), TypeError, "model is of type FederatedAlgorithm; pass"),
        (
            lambda: fl.train(MODEL, generated(), fl.samplers.uniform(10, 2), num_rounds=1, key=KEY),
            TypeError,
            "algorithm is of type Model; pass a FederatedAlgorithm .*fl.fed_avg",
        ),
        (
            lambda: fl.tune_lanes(lambda lanes: MODEL, KEY, state_of(FED_AVG), cohort()),
            TypeError,
            "what build returned is of type Model; pass a FederatedAlgorithm",
        ),
        (
            lambda: fl.sweep(
                lambda: MODEL, generated(), fl.samplers.uniform(10, 2), num_rounds=1, keys=[0, 1]
            ),
            TypeError,
            "keys is of type list; pass a typed key",
        ),
        *(
            (
                lambda name=name: fl.apfl(MODEL, SGD, **{name: "no"}),
                ValueError,
                f"{name} is 'no'; choose one of True, False",
            )
            for name in ("shuffle", "differentiable", "rewrite_convolutions", "layerwise")
        ),
        (
            lambda: fl.fed_avg(MODEL, SGD, measure_clients="no"),
            ValueError,
            "measure_clients is 'no'; choose one of True, False",
        ),
        (
            lambda: play(of(lambda params, batch: (batch["x"] @ params["w"], {}))),
            TypeError,
            r"what the loss of the model returned is of type tuple; return an array \[batch\]",
        ),
    ],
)
def test_what_an_algorithm_is_built_of_is_checked(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_of_large_trees_the_first_difference_is_named():
    model = fl.function_model(lambda params, batch: params["w0"], lambda key: params)
    params = {f"w{i}": np.zeros(i, np.float32) for i in range(20)}
    plain, adam = (fl.fed_sgd(model, optimizer) for optimizer in (SGD, optax.adam(0.1)))
    message = r"^state.opt_state\[0\].count is nothing, in place of \[\]; "
    with pytest.raises(ValueError, match=message):
        play(adam, state=state_of(plain))
