"""The adaptive server optimizers against Algorithm 2 of Reddi et al. (2021), written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lite as fl
from fedjax_lite import server_optimizers

ETA, B1, B2, TAU = 0.3, 0.8, 0.95, 0.2


def second(name, v, squared):
    return {
        "fed_adagrad": v + squared,
        "fed_adam": B2 * v + (1 - B2) * squared,
        "fed_yogi": v - (1 - B2) * squared * np.sign(v - squared),
    }[name]


def by_hand(name, w, deltas):
    """The paper's deltas point the other way, client minus server."""
    m, v = np.zeros_like(w), np.full_like(w, TAU**2)
    for delta in deltas:
        m = B1 * m + (1 - B1) * -delta
        v = second(name, v, delta**2)
        w = w + ETA * m / (np.sqrt(v) + TAU)
    return w


def optimizer_of(name, rate=ETA, **options):
    given = {"b1": B1, "tau": TAU, **({} if name == "fed_adagrad" else {"b2": B2}), **options}
    return getattr(server_optimizers, name)(rate, **given)


def after(optimizer, w, deltas):
    params = {"w": jnp.asarray(w)}
    state = optimizer.init(params)
    for delta in deltas:
        updates, state = optimizer.update({"w": jnp.asarray(delta)}, state, params)
        params = optax.apply_updates(params, updates)
    return params["w"]


NAMES = ["fed_adagrad", "fed_adam", "fed_yogi"]


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_the_paper(name):
    rng = np.random.default_rng(0)
    w, deltas = rng.normal(size=5), rng.normal(size=(7, 5))
    with jax.enable_x64(True):
        found = after(optimizer_of(name), w, deltas)
        # The rate may be a schedule, and numbers may be traced.
        scheduled = after(optimizer_of(name, optax.constant_schedule(ETA)), w, deltas)
        traced = jax.jit(lambda rate, tau: after(optimizer_of(name, rate, tau=tau), w, deltas))
        np.testing.assert_allclose(found, by_hand(name, w, deltas), rtol=1e-12)
        np.testing.assert_allclose(scheduled, found, rtol=1e-12)
        np.testing.assert_allclose(traced(ETA, TAU), found, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_and_shapes_stay(name):
    optimizer = optimizer_of(name)
    params = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.float32(1.0)}
    state = optimizer.init(params)
    updates, later = optimizer.update(params, state, params)
    form = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert form(later) == form(state)
    assert form(optax.apply_updates(params, updates)) == form(params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, "b1 is 1"),
        ({"b1": -0.1}, r"b1 is -0\.1; choose a number between 0 and 1"),
        ({"tau": 0.0}, r"tau is 0\.0; choose a number above 0"),
        ({"tau": float("nan")}, "tau is nan"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    for name in NAMES:
        with pytest.raises(ValueError, match=message):
            optimizer_of(name, **options)
    with pytest.raises(ValueError, match="b2 is 2"):
        fl.server_optimizers.fed_adam(1.0, b2=2.0)
