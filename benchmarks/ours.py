"""A round of this package, and what it is held against: bare steps and the machine's peak."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import fedjax_lite as fl
from benchmarks.cases import LEARNING_RATE, Case, Contestant, Work
from fedjax_lite.xla.mesh import deal
from fedjax_lite.xla.rewrite import rewritten


def our_round(
    case: Case, data: fl.FederatedDataset, params: Any, num_devices: int, lanes: int | None
) -> tuple[Contestant, float]:
    """A round over all clients on so many devices, and its seconds of compilation."""
    mesh = fl.clients_mesh(num_devices)
    algorithm = fl.fed_avg(
        case.model(), optax.sgd(LEARNING_RATE), batch_size=case.batch_size, lanes=lanes, mesh=mesh
    )
    state = algorithm.init(params)
    cohort = fl.cohort(jax.random.key(1), data.resident(mesh), case.sizes.size)
    args = fl.replicate((jax.random.key(2), state, cohort), mesh)
    began = time.perf_counter()
    compiled = algorithm.round.lower(*args).compile()  # type: ignore[attr-defined]
    compile_s = time.perf_counter() - began

    def work(result: tuple[Any, fl.RoundInfo]) -> Work:
        _, info = result
        return Work(float(info.update_norm), int(info.clients["num_steps"].sum()))

    return Contestant(lambda: compiled(*args), work), compile_s


def lane_steps(case: Case, num_devices: int, lanes: int) -> int:
    """Steps that all lanes run, masked ones included: each lane as many as its wave's longest."""
    steps = np.append(case.steps, 0)  # The last one is that of slots without a client.
    table = np.asarray(deal(case.sizes, num_devices))
    return lanes * int(steps[table[:, ::lanes]].sum())


def batch_gradient(case: Case) -> Callable[..., Any]:
    """The gradient of the mean loss of a batch with respect to the parameters."""
    model = case.model()

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        batch = {"x": x, "y": y, "mask": jnp.ones_like(y, bool)}
        losses, _ = model.loss(params, {}, batch, jax.random.key(0))
        return losses.mean()

    return jax.grad(loss)


def bare(case: Case, params: Any) -> Callable[[], Any]:
    """SGD steps of the same size in one compiled loop on one device, and nothing else."""
    rows = 50 * case.batch_size
    x = jax.random.normal(jax.random.key(0), (rows, *case.image))
    y = jax.random.randint(jax.random.key(1), (rows,), 0, case.num_classes)
    gradient = batch_gradient(case)

    def step(i: jax.Array, params: Any, x: jax.Array, y: jax.Array) -> Any:
        start = (i % 50) * case.batch_size
        batch = (jax.lax.dynamic_slice_in_dim(z, start, case.batch_size) for z in (x, y))
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradient(params, *batch))

    rewrite = rewritten if jax.default_backend() == "cpu" else lambda step: step

    @jax.jit
    def loop(params: Any, x: jax.Array, y: jax.Array, num_steps: jax.Array) -> Any:
        body = rewrite(lambda i, params: step(i, params, x, y))
        return jax.lax.fori_loop(0, num_steps, body, params)

    args = jax.device_put((params, x, y, jnp.int32(case.steps.sum())), jax.devices()[0])
    return lambda: loop(*args)


def model_flops(case: Case, params: Any) -> float:
    """Floating-point operations of the gradients of all examples once, as XLA counts them.

    From the cost analysis of one step before XLA optimizes it: products and convolutions of the
    forward and the backward pass, each multiplication and each addition one operation.
    """
    x = jax.ShapeDtypeStruct((case.batch_size, *case.image), jnp.float32)
    y = jax.ShapeDtypeStruct((case.batch_size,), jnp.int32)
    # Compilers for other devices do not say.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        cost: Any = jax.jit(batch_gradient(case)).lower(params, x, y).cost_analysis()
    return cost["flops"] / case.batch_size * int(case.sizes.sum())


def matrix_product(num_devices: int) -> tuple[Callable[[], Any], float]:
    """A large float32 matrix product on each device at once, and its number of operations."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    mesh = fl.clients_mesh(num_devices)
    split = PartitionSpec("clients")
    a = jax.random.normal(jax.random.key(0), (num_devices, size, size))
    a = jax.device_put(a, NamedSharding(mesh, split))
    product = jax.jit(
        jax.shard_map(lambda a: (a[0] @ a[0])[None], mesh=mesh, in_specs=split, out_specs=split)
    )
    return lambda: product(a), 2.0 * num_devices * size**3
