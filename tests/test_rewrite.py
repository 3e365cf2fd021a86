import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import everyone

import fedjax_lite as fl
from fedjax_lite.engine import execution
from fedjax_lite.xla.rewrite import rewritten

NCHW, HWNC = ("NCHW", "OIHW", "NCHW"), ("HWNC", "OHWI", "CNHW")
CASES = {
    "plain": {},
    "channels_first": {"dimension_numbers": NCHW},
    "mixed_layouts": {"dimension_numbers": HWNC},
    "strides": {"window_strides": (2, 3), "dimension_numbers": NCHW},
    "padding": {"padding": ((1, 2), (0, 3)), "dimension_numbers": NCHW},
    "dilation": {"rhs_dilation": (2, 1), "dimension_numbers": NCHW},
    "transposed": {"lhs_dilation": (2, 2), "padding": ((2, 2), (2, 2)), "dimension_numbers": NCHW},
    "groups": {"feature_group_count": 2, "dimension_numbers": NCHW},
}


def layout(x, order, spec):
    """`x`, whose axes are named by `order`, with the axes of `spec`."""
    return np.transpose(x, [order.index(axis) for axis in spec])


def normal(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def gradients(case):
    """A function of image and kernel that returns a convolution and both its gradients."""
    case = {"window_strides": (1, 1), "padding": "VALID", **CASES[case]}
    lhs_spec, rhs_spec, out_spec = case.pop("dimension_numbers", ("NHWC", "HWIO", "NHWC"))
    image = normal(0, (3, 9, 8, 4))
    inputs = 4 // case.get("feature_group_count", 1)
    kernel = normal(1, (3, 2, inputs, 6))
    conv = functools.partial(
        jax.lax.conv_general_dilated, dimension_numbers=(lhs_spec, rhs_spec, out_spec), **case
    )

    def function(image, kernel):
        out, pull = jax.vjp(conv, image, kernel)
        return out, pull(jnp.cos(out))

    return function, layout(image, "NHWC", lhs_spec), layout(kernel, "HWIO", rhs_spec)


def assert_same(function, *args):
    expected = jax.jit(function)(*args)
    actual = jax.jit(rewritten(function))(*args)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5), actual, expected
    )


def equations(name, function, *args):
    """The equations of one primitive that a function runs, at any depth."""
    found = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == name:
                found.append(eqn)
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def convolutions(function, *args):
    """The dimension numbers of all convolutions that a function runs, at any depth."""
    found = equations("conv_general_dilated", function, *args)
    return [eqn.params["dimension_numbers"] for eqn in found]


def is_canonical(numbers):
    last = len(numbers.lhs_spec) - 1
    channels_last = (0, last, *range(1, last))
    return numbers.lhs_spec == numbers.out_spec == channels_last and numbers.rhs_spec == (
        last,
        last - 1,
        *range(last - 1),
    )


@pytest.mark.parametrize("case", CASES)
def test_convolutions_and_their_gradients_are_the_same(case):
    function, image, kernel = gradients(case)
    assert_same(function, image, kernel)
    found = convolutions(rewritten(function), image, kernel)
    assert len(found) == 3
    assert all(map(is_canonical, found))


@pytest.mark.parametrize("case", CASES)
def test_patches_of_convolutions_and_of_their_gradients_are_the_same(case):
    function, image, kernel = gradients(case)
    clients = [np.stack([x, -x, x / 2]) for x in (image, kernel)]
    mapped = jax.vmap(rewritten(function, convolutions="patches"))
    actual, expected = (jax.jit(f)(*clients) for f in (mapped, jax.vmap(function)))
    chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=2e-5)
    assert len(convolutions(mapped, *clients)) == (3 if case == "groups" else 0)


def test_kernels_of_many_places_stay_convolutions():
    def function(x, kernel):
        return jax.lax.conv(x, kernel, (1, 1), "VALID")

    patches = rewritten(function, convolutions="patches")
    assert len(convolutions(patches, jnp.ones((1, 1, 20, 20)), jnp.ones((1, 1, 9, 9)))) == 1
    assert len(convolutions(patches, jnp.ones((1, 1, 15, 15)), jnp.ones((1, 1, 9, 9)))) == 0


@pytest.mark.parametrize("dimensions", [1, 3])
def test_other_numbers_of_dimensions(dimensions):
    image = normal(0, (2, 3, *(7, 6, 5)[:dimensions]))
    kernel = normal(1, (4, 3, *(3, 2, 2)[:dimensions]))
    conv = lambda x, w: jax.lax.conv(x, w, (1,) * dimensions, "SAME")
    function = lambda x, w: jax.value_and_grad(lambda x, w: (conv(x, w) ** 2).sum(), (0, 1))(x, w)
    assert_same(function, image, kernel)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.ConvTranspose(3, (2, 2), strides=(2, 2))(x)
        return nn.Dense(2)(x.reshape(x.shape[0], -1))


def loss_gradient(module, x):
    params = jax.jit(module.init)(jax.random.key(0), x)
    return params, lambda p: jax.grad(lambda p: (module.apply(p, x) ** 2).mean())(p)


@jax.custom_vjp
def scaled(x, w):
    return jax.lax.conv(x, w, (1, 1), "SAME")


scaled.defvjp(
    lambda x, w: (scaled(x, w), (x, w)),
    lambda res, g: jax.tree.map(
        lambda t: 3 * t, jax.vjp(lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME"), *res)[1](g)
    ),
)


def test_descends_into_everything_that_calls():
    x = normal(0, (2, 8, 8, 3))
    params, gradient = loss_gradient(ConvNet(), x)
    step = lambda p: jax.tree.map(lambda a, b: a - 0.1 * b, p, gradient(p))
    image, kernel = np.ones((1, 3, 6, 6), np.float32), normal(2, (3, 3, 3, 3))
    conv = lambda x: jax.lax.conv(x, kernel, (1, 1), "SAME")
    functions = {
        "jit": (jax.jit(step), params),
        "remat": (jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(conv(x)))(x).sum()), image),
        "scan": (lambda p: jax.lax.scan(lambda p, _: (step(p), None), p, length=3)[0], params),
        "fori_loop": (lambda p: jax.lax.fori_loop(0, 3, lambda _, p: step(p), p), params),
        "while": (
            lambda x: jax.lax.while_loop(lambda x: x.sum() < 1e3, lambda x: conv(x) ** 2 + 1, x),
            image,
        ),
        "cond": (lambda x: jax.lax.cond(x.sum() > 0, conv, jnp.cos, x), image),
        "custom_vjp": (jax.grad(lambda x: (scaled(x, kernel) ** 2).sum()), image),
        "vmap": (jax.vmap(step), jax.tree.map(lambda a: np.stack([a, 2 * a]), params)),
    }
    for name, (function, argument) in functions.items():
        before = convolutions(function, argument)
        after = convolutions(rewritten(function), argument)
        assert len(after) == len(before) > 0, name
        assert all(map(is_canonical, after)), name
        assert_same(function, argument)


def left_operands(function, *args):
    """The shapes of what stands on the left in each product that a function runs."""
    return [eqn.invars[0].aval.shape for eqn in equations("dot_general", function, *args)]


@pytest.mark.parametrize("rows", [(20,), (2, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_times_a_transposed_kernel_become_kernel_times_rows(rows, dtype):
    x = normal(0, (*rows, 96), dtype)
    kernel = (normal(1, (96, 128)) / 10).astype(dtype)
    precision = (jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT)
    layer = lambda x, kernel: jnp.tanh(jnp.matmul(x, kernel, precision=precision))
    function = lambda x, kernel: jax.grad(lambda x: layer(x, kernel).sum(dtype="float32"))(x)
    products = lambda function: equations("dot_general", function, x, kernel)
    forward, before = products(function)
    _, after = products(rewritten(function))
    assert before.invars[1].aval.shape == after.invars[0].aval.shape == kernel.shape
    assert before.params["precision"] == after.params["precision"][::-1] == precision
    assert forward.invars[0].aval.shape == x.shape
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    expected = np.asarray(jax.jit(function)(x, kernel), np.float32)
    actual = np.asarray(jax.jit(rewritten(function))(x, kernel), np.float32)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 24])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_of_a_kernel_becomes_a_sum_of_outer_products(num_rows, dtype):
    x = normal(0, (num_rows, 96), dtype)
    kernel = (normal(1, (96, 128)) / 10).astype(dtype)
    loss = lambda kernel: jnp.tanh(jnp.matmul(x, kernel)).sum(dtype="float32")
    function = lambda kernel: kernel - 0.1 * jax.grad(loss)(kernel)
    assert left_operands(function, kernel) == [x.shape, (num_rows, 128)]
    assert left_operands(rewritten(function), kernel) == [x.shape]
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    expected = np.asarray(jax.jit(function)(kernel), np.float32)
    actual = jax.jit(rewritten(function))(kernel)
    assert actual.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(actual, np.float32), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    ("lhs", "rhs", "axes"),
    [
        ((20, 8), (16, 8), (1, 1)),  # A small kernel.
        ((200, 96), (128, 96), (1, 1)),  # More rows than the kernel has.
        ((4, 20, 96), (4, 128, 96), (2, 2)),  # A batch of products.
        ((20, 96), (96, 128), (1, 0)),  # A kernel that is not transposed.
        ((20, 8), (20, 16), (0, 0)),  # The gradient of a small kernel,
        ((25, 96), (25, 128), (0, 0)),  # that of many rows,
        ((20, 96), (20, 4, 128), (0, 0)),  # that of a kernel with more axes.
        ((5,), (5, 96, 128), (0, 0)),  # A weighted sum of kernels.
        ((5, 96, 128), (5,), (0, 0)),
    ],
)
def test_leaves_alone_products_that_gain_nothing(lhs, rhs, axes):
    batch = tuple(range(len(lhs) - 2)) if lhs[0] == rhs[0] == 4 else ()
    numbers = (((axes[0],), (axes[1],)), (batch, batch))
    function = lambda x, y: jax.lax.dot_general(x, y, numbers)
    assert left_operands(rewritten(function), jnp.ones(lhs), jnp.ones(rhs)) == [lhs]


def test_products_of_other_kinds_and_on_demand():
    function = lambda x, y: jax.lax.dot_general(x, y, (((0,), (0,)), ((), ())))
    x, y = jnp.ones((20, 96)), jnp.ones((20, 128))
    assert left_operands(rewritten(function), x, y) == []
    assert left_operands(rewritten(function, products=False), x, y) == [x.shape]
    for dtype in (jnp.int32, jnp.float8_e4m3fn):
        others = x.astype(dtype), y.astype(dtype)
        assert left_operands(rewritten(function), *others) == [x.shape]
    assert rewritten(lambda x: jax.lax.dot_general(x, x, (((), ()), ((), ()))))(2.0) == 4


def test_works_on_what_it_closes_over_while_tracing():
    kernel = normal(2, (3, 3, 3, 3))

    def outer(x, scale):
        return rewritten(lambda x: jax.lax.conv(x, scale * kernel, (1, 1), "SAME"))(x)

    x = jnp.ones((1, 3, 6, 6))
    expected = jax.lax.conv(x, 2 * kernel, (1, 1), "SAME")
    np.testing.assert_allclose(jax.jit(outer)(x, 2.0), expected, rtol=1e-6)


def test_leaves_alone_what_has_nothing_to_rewrite():
    function = lambda x: {"y": jnp.sin(x)}
    assert rewritten(function)(jnp.ones(3))["y"].shape == (3,)


def with_and_without(model, shape, draw_label, lanes, rewrites=(True, False)):
    """A round of two clients, rewritten and as it is, each with its arguments."""
    mesh, rng = fl.clients_mesh(1), np.random.default_rng(0)
    clients = {
        i: {"x": rng.normal(size=(n, *shape)), "y": draw_label(rng, n)}
        for i, n in enumerate((3, 5))
    }
    cohort = everyone(fl.FederatedDataset.from_clients(clients).resident(mesh))
    options = {"batch_size": 2, "lanes": lanes, "mesh": mesh}
    for rewrite in rewrites:
        algorithm = fl.fed_avg(model, optax.sgd(0.1), rewrite_convolutions=rewrite, **options)
        state = algorithm.init(jax.random.key(0))
        yield algorithm.round, jax.random.key(1), state, cohort


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_round_is_the_same_with_and_without(lanes):
    squared = lambda predictions, batch: (predictions[:, 0] - batch["y"]) ** 2
    model = fl.linen_model(ConvNet(), jnp.zeros((1, 6, 6, 3)), squared)
    both = with_and_without(model, (6, 6, 3), lambda rng, n: rng.normal(size=n), lanes)
    params = []
    for rewrite, (round, *args) in zip((True, False), both, strict=True):
        assert all(map(is_canonical, convolutions(round, *args))) == rewrite
        params.append(round(*args)[0].params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *params)


@pytest.mark.parametrize("lanes", [1, 2])
def test_on_a_gpu_clients_side_by_side_multiply_patches(lanes, monkeypatch):
    squared = lambda predictions, batch: (predictions[:, 0] - batch["y"]) ** 2
    model = fl.linen_model(ConvNet(), jnp.zeros((1, 6, 6, 3)), squared)
    draw = lambda rng, n: rng.normal(size=n)
    monkeypatch.setattr(execution, "_platform", lambda execution: "gpu")
    rounds = with_and_without(model, (6, 6, 3), draw, lanes, rewrites=(None, True, False))
    found, params = [], []
    for round, *args in rounds:
        found.append(len(convolutions(round, *args)))
        params.append(round(*args)[0].params)
    assert found[1] == 0 < found[2]
    assert found[0] == found[1 if lanes > 1 else 2]
    for others in params[1:]:
        chex.assert_trees_all_close(params[0], others, rtol=1e-4, atol=1e-5)


def convolve(x, kernel):
    return jax.lax.conv(x, kernel, (1, 1), "SAME")


@jax.custom_vjp
def binary_convolution(x, kernel):
    """Its derivative is that of the convolution with the signs; that of the signs is zero."""
    return convolve(x, jnp.sign(kernel))


binary_convolution.defvjp(
    lambda x, kernel: (binary_convolution(x, kernel), (x, jnp.sign(kernel))),
    lambda operands, gradient: jax.vjp(convolve, *operands)[1](gradient),
)


@pytest.mark.parametrize("rewrite", [True, False])
def test_custom_derivatives_are_kept(rewrite):
    clients = {0: {"x": np.random.default_rng(0).normal(size=(6, 1, 4, 4))}}
    dataset = fl.FederatedDataset.from_clients(clients)
    loss = lambda kernel, batch: (binary_convolution(batch["x"], kernel) ** 2).mean((1, 2, 3))
    model = fl.function_model(loss)
    algorithm = fl.fed_avg(
        model,
        optax.sgd(0.1),
        batch_size=6,
        differentiable=True,
        mesh=fl.clients_mesh(1),
        rewrite_convolutions=rewrite,
    )
    cohort = everyone(dataset.resident(fl.clients_mesh(1)))

    def evaluated(kernel):
        state = algorithm.init(kernel)
        options = {"batch_size": 4, "mesh": fl.clients_mesh(1), "rewrite_convolutions": rewrite}
        return fl.evaluate(model, state, dataset.examples, **options)["loss"]

    def trained(kernel):  # At the params before the only step.
        return algorithm.round(jax.random.key(0), algorithm.init(kernel), cohort)[1].loss

    kernel = normal(0, (2, 1, 3, 3))
    x = dataset.examples["x"].astype(np.float32)
    expected = jax.jit(jax.grad(lambda kernel: loss(kernel, {"x": x}).mean()))(kernel)
    assert jnp.abs(expected).max() > 0.1
    for function in (evaluated, trained):
        gradient = jax.jit(jax.grad(function))(kernel)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_what_a_context_set_is_kept():
    def function(key, x):
        return jax.random.bits(key, (3,)), convolve(x, jnp.ones((1, 1, 3, 3)))

    args = jax.random.key(0), jnp.ones((1, 1, 4, 4))
    with jax.threefry_partitionable(False):
        traced = jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(function)(*args))
    np.testing.assert_array_equal(rewritten(traced)(*args)[0], traced(*args)[0])


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_round_multiplies_the_same_with_and_without(lanes):
    model = fl.models.mlp((100,), (100,), 10)
    both = with_and_without(model, (100,), lambda rng, n: rng.integers(0, 10, n), lanes)
    params, num_products = [], []
    for round, *args in both:
        params.append(round(*args)[0].params)
        num_products.append(len(left_operands(round, *args)))
    # Those of several lanes are batched, and stay products.
    assert (num_products[0] < num_products[1]) == (lanes == 1 and jax.default_backend() == "cpu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *params)
