"""FedEx-LoRA: both factors of adapters are averaged, and the base takes what that leaves out."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from fedjax_lite import _validate
from fedjax_lite.algorithms import local, server
from fedjax_lite.algorithms.options import LocalOptions, complete, documented
from fedjax_lite.algorithms.report import num_bits
from fedjax_lite.algorithms.training import local_training
from fedjax_lite.base import (
    Cohort,
    FederatedAlgorithm,
    Message,
    RoundInfo,
    ServerState,
    UpdateTransform,
)
from fedjax_lite.engine.file_store import around_files
from fedjax_lite.models.model import Model
from fedjax_lite.updates.pipeline import chain, stateless, unmasked
from fedjax_lite.xla.cpu import Paced
from fedjax_lite.xla.precision import widen


@documented
def fed_ex_lora(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    *,
    weighting: server.Weighting = "uniform",
    **options: Unpack[LocalOptions],
) -> FederatedAlgorithm:
    r"""FedEx-LoRA: adapters whose products are averaged exactly, though both factors are trained.

    Clients train the adapters $A_i, B_i$ of `fl.lora` as in `fed_avg`. With means over clients by
    their weights, the server takes $\bar A$ and $\bar B$ for adapters, and adds to each kernel $W$
    that they adapt what these leave out,

    $$W \leftarrow W + \frac{\alpha}{r} \big( \overline{A B} - \bar A \bar B \big)
      = W + \frac{\alpha}{r} \, \overline{(A - \bar A) (B - \bar B)},$$

    so that the layer is the mean of the clients' layers. With one client, and where all have the
    same $A$ or the same $B$, nothing is left out: `fed_avg` on the adapters (FedIT).

    The sum over clients and ranks is one product of matrices, once a round: what clients send is
    kept side by side, the size of the adapters times that of the cohort.

    Source: Singhal et al. (2025), "FedEx-LoRA: Exact Aggregation for Federated and Efficient
    Fine-Tuning of Large Language Models".

    Args:
      model: A model of `fl.lora`.
      client_optimizer: As in `fed_avg`.
      weighting: The weight of a client in the means, as in `fed_avg`.
      **options: Those of `LocalOptions`. What leaves the client half of a `pipeline` is averaged,
        and its server half acts on the means alone: noise that is added there is not in the base. A
        `reducer` and a `max_staleness` are refused.

    Returns:
      A `FederatedAlgorithm`, as `fed_avg` does, whose rounds change `state.frozen`. `bits_down`
      has the kernels that are adapted, which change.

    Raises:
      ValueError: `model` has no two factors that are trained; an option is out of range, or one of
        those that are refused.
      TypeError: An option is unknown.

    >>> import jax, optax, fedjax_lite as fl
    >>> model = fl.lora(fl.models.mlp((64,), (32,), 10), rank=2)
    >>> algorithm = fed_ex_lora(model, optax.sgd(0.1), num_epochs=2)
    >>> population = fl.data.digits(num_clients=10, alpha=1.0)[0].resident()
    >>> before = algorithm.init(jax.random.key(0))
    >>> cohort = fl.cohort(jax.random.key(1), population, 5)
    >>> state, info = algorithm.round(jax.random.key(2), before, cohort)
    >>> changed = jax.tree.map(lambda x, y: bool((x != y).any()), state.frozen, before.frozen)
    >>> changed["base"]["Dense_0"]
    {'bias': False, 'kernel': True}
    """
    options = complete(fed_ex_lora, options)
    _validate.instance("model", model, Model, "fl.lora(model)")
    add_residual = model.add_residual
    if add_residual is None:
        raise ValueError(
            "model has no adapters of two factors that are trained; pass fl.lora(model, rank), and"
            " for other models fl.fed_avg, whose means are exact."
        )
    for name, given, neutral in (
        ("reducer", options["reducer"], None),
        ("max_staleness", options["max_staleness"], 0),
    ):
        if given != neutral:
            raise ValueError(
                f"{name} is {given!r}, and the base takes what the mean of adapters leaves out that"
                " are trained beside it; leave it out."
            )
    pipeline, reporting = options["pipeline"], _reporting()
    if pipeline is not None:
        _validate.instance("pipeline", pipeline, UpdateTransform)
        reporting = chain(pipeline, reporting)
    reported: LocalOptions = {**options, "pipeline": reporting}
    training = server.federated_algorithm(
        model,
        local_training(model, client_optimizer, weighting=weighting),
        optax.sgd(1.0),
        **reported,
    )

    def check(key: jax.Array, state: ServerState, cohort: Cohort) -> None:
        jax.eval_shape(lambda: training.round(key, state, cohort))

    @jax.jit
    def round(key: jax.Array, state: ServerState, cohort: Cohort) -> tuple[ServerState, RoundInfo]:
        after, info = training.round(key, state, cohort)
        clients = dict(info.clients)
        leaves, form = jax.tree.flatten(state.params)
        sent = [clients.pop(_name(i)) for i in range(len(leaves))]
        weights = clients["weight"] / jnp.where(info.skipped, 1, clients["weight"].sum())
        # What a client sends that is left out may be no number, by which zero is none.
        counts = weights != 0
        updates = [jnp.where(counts.reshape(-1, 1, 1), x, 0) for x in widen(sent)]
        frozen = add_residual(state.frozen, jax.tree.unflatten(form, updates), weights)
        both = zip(jax.tree.leaves(frozen), jax.tree.leaves(state.frozen), strict=True)
        bits = num_bits([new for new, old in both if new is not old])
        clients["bits_down"] += jnp.where(clients["bits_down"] > 0, bits, 0)
        return (
            dataclasses.replace(after, frozen=frozen),
            dataclasses.replace(info, clients=clients),
        )

    # Which arrays of the base are sent, too, is known of what comes of them.
    return training._replace(round=Paced(round, check, around_files), message_bits=None)


def _name(leaf: int) -> str:
    return f"sent_{leaf}"


def _reporting() -> UpdateTransform:
    """A transform that reports updates as they are sent."""

    def client(key: jax.Array, message: Message) -> Message:
        del key
        sent = {_name(i): x for i, x in enumerate(jax.tree.leaves(message.update))}
        return message._replace(metrics={**message.metrics, **sent})

    return stateless(client, lambda before: unmasked("fed_ex_lora", before))
