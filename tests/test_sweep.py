import functools

import jax
import numpy as np
import optax
import pytest
from problems import regression_dataset, regression_model

import fedjax_lite as fl


def build(rate):
    return fl.fed_avg(regression_model(), optax.sgd(rate), optax.adam(0.1), batch_size=3)


build_once = functools.cache(build)


@functools.cache
def problem():
    """What all train, compiled once."""
    dataset, model = regression_dataset(), regression_model()
    everyone = fl.cohort_of(dataset.resident(), np.arange(10))

    def evaluate(state):
        of_clients = fl.evaluate_clients(model, state, everyone)
        return {"all": fl.evaluate(model, state, dataset.examples), "pooled": of_clients.pooled}

    return {
        "population": dataset.resident(),
        "sampler": fl.samplers.poisson(10, 0.4),
        "evaluate": evaluate,
        "eval_every": 3,
    }


def setting(num_rounds):
    return {**problem(), "num_rounds": num_rounds}


@pytest.mark.parametrize(("num_rounds", "lanes"), [(0, None), (2, 1), (6, 3), (7, None)])
def test_a_sweep_is_as_many_runs(num_rounds, lanes):
    seeds, rates = np.repeat([0, 1], 2), np.tile([0.05, 0.2], 2)
    keys = jax.vmap(jax.random.key)(seeds)
    numbers = {"rate": rates}
    result = fl.sweep(build, keys=keys, numbers=numbers, lanes=lanes, **setting(num_rounds))
    for i, history in enumerate(result.histories):
        one = fl.train(build_once(rates[i].item()), key=keys[i], **setting(num_rounds))
        for ours, theirs in zip(history, one.history, strict=True):
            assert [row["round"] for row in ours] == [row["round"] for row in theirs]
            for mine, their in zip(ours, theirs, strict=True):
                assert their.keys() - mine.keys() <= {"seconds", "bytes_up", "bytes_down"}
                for name in mine:
                    np.testing.assert_allclose(mine[name], their[name], rtol=1e-5, atol=1e-6)
        params = jax.tree.map(lambda x, i=i: x[i], result.states.params)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            params,
            one.state.params,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": jax.random.key(0)}, r"keys has shape \(\) beside"),
        ({"numbers": {"rate": [0.1]}}, r"rate has shape \(1,\) beside keys of shape \(2,\)"),
        ({"num_rounds": -1}, "num_rounds is -1"),
        ({"eval_every": 0}, "eval_every is 0"),
    ],
)
def test_refuses(options, message):
    keys = jax.random.split(jax.random.key(0), 2)
    arguments = {"keys": keys, "numbers": {"rate": [0.1, 0.2]}, **setting(2), **options}
    with pytest.raises(ValueError, match=message):
        fl.sweep(build, **arguments)


def test_numbers_are_checked_as_where_an_algorithm_is_built():
    model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2)
    with pytest.raises(ValueError, match="mu is -1"):
        fl.sweep(
            lambda mu: fl.fed_prox(model, optax.sgd(0.1), mu=mu),
            fl.FederatedDataset.from_clients({"a": {"x": [1.0]}}).resident(),
            fl.samplers.uniform(1, 1),
            2,
            keys=jax.random.split(jax.random.key(0), 3),
            numbers={"mu": [0.1, -1.0, 0.1]},
        )
