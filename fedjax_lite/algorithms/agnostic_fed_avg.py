"""AgnosticFedAvg: the domain with the largest loss comes to weigh most."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.algorithms import local, server
from fedjax_lite.algorithms.options import StoreOptions, complete, documented
from fedjax_lite.algorithms.training import local_training
from fedjax_lite.algorithms.two_passes import summing, two_passes
from fedjax_lite.base import Batch, Client, FederatedAlgorithm, PyTree, ServerState
from fedjax_lite.models.model import Model


class DomainSums(NamedTuple):
    """What clients send of their losses at the params that the round began with.

    Attributes:
      losses: Sums of the losses of each domain, `[domains]`.
      counts: Examples of each domain, `[domains]`.
    """

    losses: jax.Array
    counts: jax.Array


class AgnosticState(NamedTuple):
    r"""What the server keeps, in `state.opt_state`.

    Attributes:
      inner: State of the server optimizer.
      domain_weights: $\lambda$, `[domains]`.
      window: Examples of each domain in the last rounds, `[window_size, domains]`, the newest last.
      sums: What the clients of the last round sent.
    """

    inner: PyTree
    domain_weights: jax.Array
    window: jax.Array
    sums: DomainSums


@documented
def agnostic_fed_avg(
    model: Model,
    client_optimizer: local.ClientOptimizer,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    num_domains: int,
    domain_learning_rate: ArrayLike,
    feature: str | None = None,
    window_size: int = 1,
    **options: Unpack[StoreOptions],
) -> FederatedAlgorithm:
    r"""AgnosticFedAvg: FedAvg for the mixture of domains that is worst for the params.

    It looks for $\min_w \max_\lambda \sum_d \lambda_d L_d(w)$, with $L_d$ the mean loss of the
    examples of domain $d$, and $\lambda$ weights that add up to one, equal at first. In a round on
    params $w$, with $N_d$ the mean number of examples of the domain in the last `window_size`
    rounds, $\alpha_d = \lambda_d / N_d$, and $N_d^i$ the examples of client $i$, that client

    - computes $\beta^i = \sum_d \alpha_d N_d^i$, and the sums of its losses at $w$ by domain,
    - trains from $w$ on: a batch has the loss $\frac{1}{\beta^i} \sum_e \alpha_{d(e)} \ell_e(w_i)$
      over its examples $e$, which for all examples of the client is a weighted mean. A step is so
      as many times shorter than in `fed_avg` at the same rate as an epoch has batches.

    The server steps along the mean of the deltas with weights $\beta^i$, and

    $$\lambda_d \leftarrow \lambda_d \exp(\gamma L_d(w)) \,/\, \textstyle\sum_{d'} \lambda_{d'}
      \exp(\gamma L_{d'}(w)),$$

    with a loss of 0 for domains that no client of the round has. Before the first round, and where
    no client has had the domain for so long, $N_d = 1$; in FedJAX, a domain that comes back makes
    that a division by zero.

    Sources: Mohri et al. (2019), "Agnostic Federated Learning", in which each client is a domain;
    Ro et al. (2021), "Communication-Efficient Agnostic Federated Averaging".

    Args:
      model: The model.
      client_optimizer: As in `fed_avg`.
      server_optimizer: Any optax transformation; `optax.sgd(1.0)` by default.
      num_domains: Number of domains.
      domain_learning_rate: $\gamma$, not negative; may be traced.
      feature: Name of the feature that holds the domain of each example, an integer from 0 to
        `num_domains - 1`; a client with another number is left out. By default clients are the
        domains, and `num_domains` is the number of clients in the population.
      window_size: How many rounds $N_d$ is the mean of.
      **options: Those of `StoreOptions`.

    Returns:
      A `FederatedAlgorithm`, whose `init` needs `num_clients`. `state.opt_state.domain_weights` is
      $\lambda$; `state.store` holds the $N_d^i$, `[clients, domains]`. The `loss` of clients is not
      weighted. A round takes the time of one more epoch without gradients.

    Raises:
      ValueError: An option is out of range.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> model = fl.function_model(lambda w, batch: (w - batch["x"]) ** 2 / 2)
    >>> algorithm = agnostic_fed_avg(
    ...     model, optax.sgd(1.0), num_domains=2, domain_learning_rate=0.5, feature="domain"
    ... )
    >>> dataset = fl.FederatedDataset.from_clients(
    ...     [{"x": [2.0, 2.0], "domain": [0, 0]}, {"x": [4.0, 2.0], "domain": [1, 0]}]
    ... )
    >>> state = algorithm.init(jnp.float32(0.0), num_clients=2)
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(1), state, everyone)
    >>> float(state.params)  # Examples weigh alike at first.
    2.5
    >>> [sums.tolist() for sums in state.opt_state.sums]
    [[6.0, 8.0], [3.0, 1.0]]
    >>> [round(float(x), 4) for x in state.opt_state.domain_weights]  # exp(2 / 2) to exp(8 / 2).
    [0.0474, 0.9526]
    """
    options = complete(agnostic_fed_avg, options)
    num_domains = _validate.integer("num_domains", num_domains, minimum=1)
    rate = _validate.number("domain_learning_rate", domain_learning_rate)
    window_size = _validate.integer("window_size", window_size, minimum=1)
    optimizer = local.resolve_optimizer(client_optimizer)
    inner = server.resolve_server_optimizer(server_optimizer)

    def domains_of(client: Client, batch: Batch) -> jax.Array:
        if feature is None:
            return jnp.full(batch["mask"].shape, client.id)
        with _validate.reading(batch):
            domains = batch[feature]
        # The number of domains marks what is none: it adds to no sum.
        return jnp.where((domains >= 0) & (domains < num_domains), domains, num_domains)

    def alpha_of(shared: ServerState) -> jax.Array:
        counts = shared.opt_state.window.mean(0)
        return shared.opt_state.domain_weights / jnp.where(counts == 0, 1, counts)

    def zeros() -> DomainSums:
        return DomainSums(jnp.zeros(num_domains), jnp.zeros(num_domains))

    def sums_of(shared: ServerState, client: Client, batch: Batch, key: jax.Array) -> DomainSums:
        losses, _ = local.losses_of(model, shared.params, shared.model_state, batch, key)
        domains, (none, _) = domains_of(client, batch), zeros()
        return DomainSums(none.at[domains].add(losses), none.at[domains].add(batch["mask"]))

    measuring = summing(zeros, sums_of, lambda sums: {"entry": sums.counts, "statistics": sums})
    training = local_training(
        model,
        client_optimizer,
        finish=lambda result, shared, client, trained: result._replace(
            weight=jnp.vdot(alpha_of(shared), client.entry)
        ),
        entry=lambda shared: zeros().counts,
    )

    def client_step(
        shared: ServerState, client: Client, trained: local.LocalState, batch: Batch, key: jax.Array
    ) -> local.LocalState:
        alpha = alpha_of(shared)
        beta = jnp.vdot(alpha, client.entry)
        domains = domains_of(client, batch)
        # Of what is no domain, not a number: the client is left out, and counted.
        weights = alpha.at[domains].get(mode="fill", fill_value=jnp.nan)
        weights /= jnp.where(beta == 0, 1, beta)

        def weighted_loss(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
            losses, model_state = local.losses_of(model, params, trained.model_state, batch, key)
            return jnp.vdot(weights, losses), (losses.sum(), model_state)

        gradient, aux = jax.grad(weighted_loss, has_aux=True)(trained.params)
        return local.descend(optimizer(shared), trained, gradient, aux, batch)

    def init(params: PyTree) -> AgnosticState:
        ones, equal = jnp.ones((window_size, num_domains)), jnp.zeros(num_domains) + 1 / num_domains
        return AgnosticState(inner.init(params), equal, ones, zeros())

    def update(
        updates: PyTree, state: AgnosticState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, AgnosticState]:
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        losses = state.sums.losses / jnp.maximum(state.sums.counts, 1)
        return updates, state._replace(
            inner=inner_state,
            domain_weights=jax.nn.softmax(jnp.log(state.domain_weights) + rate * losses),
            window=jnp.concatenate([state.window[1:], state.sums.counts[None]]),
        )

    return two_passes(
        model,
        measuring._replace(entry=training.entry),
        training._replace(step=client_step),
        optax.GradientTransformationExtraArgs(init, update),
        options,
        keep=lambda state, mean, sums: state._replace(sums=sums),
        sent=lambda state: state.sums,
        broadcast=lambda state: (state.params, state.model_state, alpha_of(state)),
    )
