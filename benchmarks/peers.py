"""Other ways to run the same round: plain PyTorch, `torch.func.vmap`, and FedJAX.

A contestant does FedAvg's work on all clients of a case: a copy of the model for each client, one
epoch of SGD in shuffled batches, and the mean of what changed, weighted by the number of examples.
"""

import contextlib
import copy
import functools
import importlib
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch.nn.functional import cross_entropy

import fedjax_lite as fl
from benchmarks import cases
from benchmarks.cases import LEARNING_RATE, Case, Contestant, Work
from benchmarks.timing import interleaved

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INSTALL_FEDJAX = "pip install --no-deps fedjax==0.0.17 && pip install dm-haiku msgpack requests"
Client = tuple[torch.Tensor, torch.Tensor]


def torch_clients(data: fl.FederatedDataset) -> list[Client]:
    """Images, channels first, and labels of each client; the orders drawn after this are fixed."""
    torch.manual_seed(0)
    examples = [data[client_id] for client_id in data.client_ids]
    if DEVICE.type == "cuda":
        # JAX multiplies float32 matrices on tensor cores unless told otherwise.
        torch.set_float32_matmul_precision("high")
    return [
        (
            torch.tensor(client["x"]).permute(0, 3, 1, 2).contiguous().to(DEVICE),
            torch.tensor(client["y"]).long().to(DEVICE),
        )
        for client in examples
    ]


def train(
    server: torch.nn.Module, clients: Sequence[Client], batch_size: int
) -> tuple[list[torch.Tensor], int]:
    """The plain loop: the sum over clients of examples times delta, and the number of steps."""
    totals = [torch.zeros_like(p) for p in server.parameters()]
    num_steps = 0
    for x, y in clients:
        local = copy.deepcopy(server)
        optimizer = torch.optim.SGD(local.parameters(), lr=LEARNING_RATE)
        for rows in torch.randperm(len(y), device=y.device).split(batch_size):
            optimizer.zero_grad()
            cross_entropy(local(x[rows]), y[rows]).backward()
            optimizer.step()
            num_steps += 1
        with torch.no_grad():
            pairs = zip(totals, server.parameters(), local.parameters(), strict=True)
            for total, before, after in pairs:
                total += len(y) * (before - after)
    return totals, num_steps


def _contestant(case: Case, run: Callable[[], tuple[Sequence[torch.Tensor], int]]) -> Contestant:
    """A contestant from a function that returns the sum of the deltas and the number of steps."""

    def mean() -> tuple[list[torch.Tensor], int]:
        totals, num_steps = run()
        aggregate = [total / int(case.sizes.sum()) for total in totals]
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return aggregate, num_steps

    def work(result: tuple[list[torch.Tensor], int]) -> Work:
        aggregate, num_steps = result
        return Work(float(torch.cat([delta.flatten() for delta in aggregate]).norm()), num_steps)

    return Contestant(mean, work)


def torch_loop(case: Case, data: fl.FederatedDataset, params: Any, num_threads: int) -> Contestant:
    """The plain loop in this process."""
    server = cases.torch_model(case, params).to(DEVICE)
    clients = torch_clients(data)

    def run() -> tuple[list[torch.Tensor], int]:
        torch.set_num_threads(num_threads)
        return train(server, clients, case.batch_size)

    return _contestant(case, run)


@contextlib.contextmanager
def torch_processes(
    case: Case, data: fl.FederatedDataset, params: Any, num_processes: int
) -> Iterator[Contestant]:
    """The plain loop in several processes of one thread, each with its share of the clients.

    The processes start once and keep their clients. In each round they are sent the parameters
    and send back the sum of their deltas.
    """
    server, clients = cases.torch_model(case, params), torch_clients(data)
    spawn = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    processes = []
    longest_first = np.argsort(-case.sizes, kind="stable")
    for i in range(num_processes):
        ours, theirs = spawn.Pipe()
        share = [
            (clients[j][0].numpy(), clients[j][1].numpy()) for j in longest_first[i::num_processes]
        ]
        arguments = (theirs, case.torch_module(), share, case.batch_size)
        processes.append(spawn.Process(target=_serve, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()
        connections.append(ours)

    def run() -> tuple[list[torch.Tensor], int]:
        values = [p.detach().numpy() for p in server.parameters()]
        for connection in connections:
            connection.send(values)
        answers = [connection.recv() for connection in connections]
        parts, num_steps = zip(*answers, strict=True)
        return [torch.from_numpy(sum(part)) for part in zip(*parts, strict=True)], sum(num_steps)

    try:
        yield _contestant(case, run)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join()


def _serve(
    connection: Connection,
    module: torch.nn.Module,
    share: list[tuple[np.ndarray, np.ndarray]],
    batch_size: int,
) -> None:
    """A worker: trains its clients from the parameters that it is sent, until the pipe closes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clients = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in share]
    with contextlib.suppress(EOFError):
        while True:
            for parameter, value in zip(module.parameters(), connection.recv(), strict=True):
                parameter.data = torch.from_numpy(value)
            totals, num_steps = train(module, clients, batch_size)
            connection.send(([total.numpy() for total in totals], num_steps))


def torch_vmap(
    case: Case, data: fl.FederatedDataset, params: Any, num_threads: int
) -> Contestant | None:
    """`torch.func.vmap` over chunks of clients of one size, compiled, in the best size of chunk.

    Returns:
      The contestant, or `None`, with the reason on stderr, where `torch.compile` fails.
    """
    module = cases.torch_model(case, params).to(DEVICE)
    server = {name: p.detach() for name, p in module.named_parameters()}
    x, y = (torch.stack(feature) for feature in zip(*torch_clients(data), strict=True))
    num_clients, size = y.shape

    def loss(params: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(torch.func.functional_call(module, params, (x,)), y)

    def sgd(
        params: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        gradient = torch.func.grad(loss)(params, x[rows], y[rows])
        return {name: p - LEARNING_RATE * gradient[name] for name, p in params.items()}

    torch.compiler.reset()  # What other cases compiled counts against a limit.
    step = torch.compile(torch.func.vmap(sgd), dynamic=False)

    def run(chunk: int, threads: int) -> tuple[list[torch.Tensor], int]:
        torch.set_num_threads(threads)
        totals = [torch.zeros_like(p) for p in server.values()]
        num_steps = 0
        for first in range(0, num_clients, chunk):
            clients = slice(first, first + chunk)
            local = {name: p.expand(chunk, *p.shape).clone() for name, p in server.items()}
            order = torch.rand(chunk, size, device=DEVICE).argsort(1)
            for rows in order.split(case.batch_size, 1):
                local = step(local, x[clients], y[clients], rows)
                num_steps += chunk
            for total, before, after in zip(totals, server.values(), local.values(), strict=True):
                total += size * (before - after).sum(0)
        return totals, num_steps

    contestants = {
        f"chunks of {chunk}, threads: {threads}": _contestant(
            case, functools.partial(run, chunk, threads)
        )
        # A card is filled by all clients at once, and does not care for the host's threads.
        for chunk in ((num_clients,) if DEVICE.type == "cuda" else (5, 10, num_clients))
        for threads in ((1,) if DEVICE.type == "cuda" else sorted({1, num_threads}))
    }
    try:
        return contestants[_trial("torch.func.vmap", contestants)]
    except Exception as error:
        print(f"torch.func.vmap: left out, torch.compile failed: {error}", file=sys.stderr)
        return None


def _trial(what: str, contestants: dict[str, Contestant]) -> str:
    """The name of the fastest contestant in a short trial."""
    times = interleaved({name: contestant.run for name, contestant in contestants.items()}, 2)
    best = min(times, key=lambda name: times[name].fastest)
    print(f"{what}: {best}, the fastest of {len(times)} in a trial", file=sys.stderr)
    return best


@contextlib.contextmanager
def fedjax_process(case: Case) -> Iterator[Contestant | None]:
    """FedJAX as its users run it, in a process of its own without the flags of `configure_cpu`.

    It fills a client's last batch up with further examples of the client: it takes as many steps
    as the others, and all of them are full.

    Yields:
      The contestant, or `None`, with a line on stderr, where FedJAX is not installed.
    """
    if importlib.util.find_spec("fedjax") is None:
        print(f"FedJAX: left out, not installed; {INSTALL_FEDJAX}", file=sys.stderr)
        yield None
        return
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    arguments = (theirs, case, jax.device_count())
    process = spawn.Process(target=_serve_fedjax, args=arguments, daemon=True)
    flags = os.environ.pop("XLA_FLAGS", None)
    process.start()
    if flags is not None:
        os.environ["XLA_FLAGS"] = flags
    theirs.close()

    def ask(what: str) -> Any:
        ours.send(what)
        return ours.recv()

    try:
        yield Contestant(lambda: ask("run"), lambda _: ask("work"))
    finally:
        ours.close()
        process.join()


def _serve_fedjax(connection: Connection, case: Case, num_devices: int) -> None:
    """A worker: runs a round, or tells what the last one did, until the pipe closes."""
    jax.config.update("jax_num_cpu_devices", num_devices)
    contestant = _fedjax_round(case)
    result: Any = None
    with contextlib.suppress(EOFError):
        while True:
            if connection.recv() == "work":
                connection.send(contestant.work(result))
            else:
                result = jax.block_until_ready(contestant.run())
                connection.send(None)


def _fedjax_round(case: Case) -> Contestant:
    """FedJAX's own FedAvg, on the faster of its backends jit and pmap."""
    fedjax = _import_fedjax()
    data, params = cases.dataset(case), cases.initial_params(case)
    federated = fedjax.InMemoryFederatedData({i: data[i] for i in data.client_ids})
    key = jax.random.PRNGKey(0)  # FedJAX knows no typed keys.
    clients = [(client_id, client, key) for client_id, client in federated.clients()]
    batching = fedjax.ShuffleRepeatBatchHParams(batch_size=case.batch_size)
    num_steps = sum(
        sum(1 for _ in client.shuffle_repeat_batch(batching)) for _, client, _ in clients
    )

    model = case.model()

    def losses(params: Any, batch: Any, rng: jax.Array) -> jax.Array:
        mask = jnp.ones_like(batch["y"], bool)
        return model.loss(params, {}, {**batch, "mask": mask}, rng)[0]

    optimizers = fedjax.optimizers.sgd(LEARNING_RATE), fedjax.optimizers.sgd(1.0)

    def contestant(backend: Any) -> Contestant:
        with fedjax.for_each_client_backend(backend):
            algorithm = fedjax.algorithms.fed_avg.federated_averaging(
                fedjax.grad(losses), *optimizers, batching
            )
        state = algorithm.init(jax.device_put(params, jax.devices()[0]))

        def work(result: Any) -> Work:
            delta = jax.tree.map(np.subtract, params, jax.device_get(result[0].params))
            return Work(float(optax.tree.norm(delta)), num_steps)

        return Contestant(lambda: algorithm.apply(state, clients), work)

    contestants = {"jit": contestant("jit"), "pmap": contestant(_pmap_backend(fedjax))}
    return contestants[_trial("FedJAX", contestants)]


def _import_fedjax() -> Any:
    """FedJAX, with the functions that it expects of JAX and that are gone from it."""

    @functools.cache
    def sharding(*devices: jax.Device) -> jax.sharding.Sharding:
        return jax.pmap(lambda x: x, devices=devices)(np.zeros(len(devices))).sharding

    def device_put_sharded(shards: Sequence[Any], devices: Sequence[Any]) -> Any:
        stacked = jax.tree.map(lambda *x: np.stack(x), *shards)
        return jax.device_put(stacked, sharding(*devices))

    def device_put_replicated(tree: Any, devices: Sequence[Any]) -> Any:
        return device_put_sharded([tree] * len(devices), devices)

    gone = {
        "tree_map": jax.tree.map,
        "device_put_sharded": device_put_sharded,
        "device_put_replicated": device_put_replicated,
    }
    for name, replacement in gone.items():
        setattr(jax, name, replacement)
    return importlib.import_module("fedjax")


def _pmap_backend(fedjax: Any) -> Any:
    """FedJAX's pmap backend, for a `jax.pmap` whose shards keep the axis of devices."""
    for_each_client = importlib.import_module("fedjax.core.for_each_client")
    first = jax.jit(lambda tree: jax.tree.map(lambda x: x[0], tree))

    class Backend(fedjax.ForEachClientBackend):  # type: ignore[misc]
        def __call__(self, *functions: Callable[..., Any]) -> Callable[..., Any]:
            run = for_each_client.ForEachClientPmapBackend()(*functions)

            def squeezed(shared: Any, clients: Any) -> Iterator[Any]:
                for client_id, output, step_results in run(shared, clients):
                    yield client_id, first(output), step_results

            return squeezed

    return Backend()
