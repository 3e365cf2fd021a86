"""A mixture of Gaussians by federated expectation maximisation."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.algorithms import server
from fedjax_lite.algorithms.k_means import adding_up
from fedjax_lite.algorithms.options import RoundOptions, complete, documented
from fedjax_lite.base import (
    Batch,
    Client,
    ClientResult,
    ClientUpdate,
    FederatedAlgorithm,
    PyTree,
    ServerState,
)
from fedjax_lite.models.clusters import Mixture, form_of, log_joint, points
from fedjax_lite.models.model import Model


class _Sums(NamedTuple):
    moments: Mixture
    loss: jax.Array


@documented
def gaussian_mixture(
    model: Model,
    *,
    min_variance: ArrayLike = 0.0,
    **options: Unpack[RoundOptions],
) -> FederatedAlgorithm:
    r"""Gaussian mixture: a round is a step of expectation maximisation on the examples of a cohort.

    With weights $\pi_j$, centers $\mu_j$ and covariances $\Sigma_j$, clients send sums over their
    examples of the responsibilities

    $$r_j(x) = \pi_j N(x; \mu_j, \Sigma_j) \,/\, \textstyle\sum_k \pi_k N(x; \mu_k, \Sigma_k),$$

    of $r_j(x) (x - \mu_j)$ and of $r_j(x) (x - \mu_j) (x - \mu_j)^T$. Of their totals $R_j$, $S_j$
    and $T_j$, the server makes

    $$\pi_j \leftarrow R_j / \textstyle\sum_k R_k, \quad \mu_j \leftarrow \mu_j + S_j / R_j, \quad
      \Sigma_j \leftarrow T_j / R_j - S_j S_j^T / R_j^2 .$$

    All examples weigh the same. A component without responsibility stays, and weighs zero.

    Moments are those about the old centers, for the sake of rounding. pfl-research has those about
    zero, diagonal covariances with variances of at least 0.01 of the variance of the mixture, and
    drops components that weigh less than 0.01.

    Source: Dempster et al. (1977), "Maximum Likelihood from Incomplete Data via the EM Algorithm".

    Args:
      model: `fl.models.gaussians(input_shape, num_components)`.
      min_variance: Least variance, not negative, of covariances that are diagonal; may be traced.
        With 0, a component that has come down to one example makes densities infinite, and no
        client contributes any more.
      **options: Those of `RoundOptions`. A `pipeline` acts on the sums; a `reducer` is refused.

    Returns:
      A `FederatedAlgorithm`, whose `init` takes a key or params, and whose `state.params` are a
      dict of `weights` `[components]`, `centers` `[components, features]` and `covariances`,
      `[components, features, features]` or, where they are diagonal, their diagonals `[components,
      features]`. `loss` is the mean of $-\log \sum_j \pi_j N(x; \mu_j, \Sigma_j)$ at those that
      the round began with.

    Raises:
      ValueError: `model` is another one, or `min_variance` negative; a `reducer` is given; another
        option is out of range; in `init`, params are of another form than those of the model; in a
        round, examples have another number of features.
      TypeError: An option is unknown.

    >>> import jax, jax.numpy as jnp, fedjax_lite as fl
    >>> algorithm = gaussian_mixture(fl.models.gaussians((1,), 2))
    >>> far_apart = {
    ...     "weights": jnp.array([0.5, 0.5]),
    ...     "centers": jnp.array([[0.0], [100.0]]),
    ...     "covariances": jnp.array([[1.0], [1.0]]),
    ... }
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [[1.0], [96.0]]}, {"x": [[3.0], [2.0]]}])
    >>> everyone = fl.cohort_of(dataset.resident(), [0, 1])
    >>> state, info = algorithm.round(jax.random.key(0), algorithm.init(far_apart), everyone)
    >>> state.params["weights"].tolist(), state.params["centers"].tolist()
    ([0.75, 0.25], [[2.0], [96.0]])
    >>> round(float(state.params["covariances"][0, 0]), 4)  # The variance of 1, 3 and 2.
    0.6667
    """
    options = complete(gaussian_mixture, options)
    names = dict.fromkeys(("weights", "centers", "covariances"), 0)
    form = form_of(model, names, "fl.models.gaussians(input_shape, num_components)")
    min_variance = _validate.number("min_variance", min_variance)

    def client_init(shared: ServerState, client: Client) -> _Sums:
        del client
        return _Sums(optax.tree.zeros_like(shared.params), jnp.zeros(()))

    def client_step(
        shared: ServerState, client: Client, sums: _Sums, batch: Batch, key: jax.Array
    ) -> _Sums:
        del client, key
        mixture = shared.params
        x = points(batch, mixture["centers"].shape[1])
        joint = log_joint(mixture, x)
        marginal = jax.nn.logsumexp(joint, axis=-1)
        mask = batch["mask"]
        r = jnp.where(mask[:, None], jnp.exp(joint - marginal[:, None]), 0)
        moves = x[:, None] - mixture["centers"]
        second = "bk,bkf,bkf->kf" if mixture["covariances"].ndim == 2 else "bk,bkf,bkg->kfg"
        moments = {
            "weights": r.sum(0),
            "centers": jnp.einsum("bk,bkf->kf", r, moves),
            "covariances": jnp.einsum(second, r, moves, moves),
        }
        return _Sums(
            optax.tree.add(sums.moments, moments), sums.loss - jnp.where(mask, marginal, 0).sum()
        )

    def client_final(shared: ServerState, client: Client, sums: _Sums) -> ClientResult:
        del shared
        mean = sums.loss / jnp.maximum(client.num_examples, 1)
        return ClientResult(sums.moments, 1.0, {"loss": mean})

    def init(mixture: PyTree) -> tuple[()]:
        remedy = "pass algorithm.init a key, or params of that form."
        _validate.same_form("params", mixture, form, remedy, dtypes=False)
        return ()

    def maximise(
        moments: Mixture, state: tuple[()], mixture: Mixture, **extra_args: Any
    ) -> tuple[Mixture, tuple[()]]:
        del extra_args
        total = moments["weights"]
        means = jax.tree.map(
            lambda x: jax.vmap(jnp.divide)(x, jnp.where(total == 0, 1, total)), moments
        )
        move = means["centers"]
        if mixture["covariances"].ndim == 2:
            covariances = jnp.maximum(means["covariances"] - move**2, min_variance)
        else:
            covariances = means["covariances"] - move[:, :, None] * move[:, None]
        steps = {"centers": move, "covariances": covariances - mixture["covariances"]}
        keep = jax.vmap(lambda total, x: jnp.where(total > 0, x, 0))
        steps = jax.tree.map(lambda x: keep(total, x), steps)
        return {**steps, "weights": total / total.sum() - mixture["weights"]}, state

    options["reducer"] = adding_up(options["reducer"])
    return server.federated_algorithm(
        model,
        ClientUpdate(client_init, client_step, client_final),
        optax.GradientTransformationExtraArgs(init, maximise),
        shuffle=False,
        **options,
    )
