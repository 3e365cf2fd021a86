"""What a run tells of a client: epsilon, by the law of its sampler and the noise of its pipeline.

| sampler                          | accountant   | adjacency           |
|----------------------------------|--------------|---------------------|
| `poisson`                        | `pld`        | `add_or_remove_one` |
| `poisson` with a slot for all    | `pld`, `rdp` | `add_or_remove_one` |
| `uniform`                        | `rdp`        | `replace_one`       |
| `everyone`                       | `pld`, `rdp` | `add_or_remove_one` |
| `sequential`, `round_robin`,     | `pld`, `rdp` | `replace_special`   |
| `minimise_reuse`                 |              |                     |
| `cyclic` with `rate`             | as `poisson` | `replace_special`   |
| `cyclic` with `cohort_size`      | `rdp`        | `replace_one`       |

Neighbouring populations differ by one client that is there or not, by what one client has, or, with
`replace_special`, by whether one client has anything. All others are refused, with the reason.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fedjax_lite import _validate
from fedjax_lite._extras import require
from fedjax_lite.base import FederatedAlgorithm
from fedjax_lite.samplers import Sampler

_ACCOUNTANTS = (None, "pld", "rdp")
_TOLERANCE = 1e-4  # Of a calibrated noise multiplier, relative.
_REFUSED = {
    None: "nothing is known of its draws; choose fl.samplers.poisson",
    "with_replacement": (
        "a client that is drawn twice counts twice, which no accountant covers; choose"
        " fl.samplers.poisson, or uniform without replacement"
    ),
    "importance": (
        "who is likely to take part depends on what all others have; choose fl.samplers.poisson"
    ),
    "weighted": (
        "who is likely to take part depends on what all others have; choose fl.samplers.poisson"
    ),
}


class Ledger(NamedTuple):
    """What has been spent after any number of rounds.

    Attributes:
      epsilon: `epsilon(num_rounds)`; 0 after none, and infinite without noise.
      noise_multiplier: Standard deviation of the noise on the aggregate, by what the update of one
        client can change there at most.
      delta: The delta that epsilon holds for.
      accountant: `"pld"` or `"rdp"`.
      adjacency: How the populations differ that cannot be told apart: `"add_or_remove_one"`,
        `"replace_one"` or `"replace_special"`, all of one client.
    """

    epsilon: Callable[[int], float]
    noise_multiplier: float
    delta: float
    accountant: str
    adjacency: str


def ledger(
    noise_multiplier: float, delta: float, sampler: Sampler, *, accountant: str | None = None
) -> Ledger:
    r"""What rounds with Gaussian noise tell of one client, at most.

    In each round the noise of standard deviation $z S$ is drawn anew and added to the aggregate,
    which the update of one client changes by $S$ in L2 norm at most. Everything that is made of the
    noisy aggregates is covered, params and checkpoints among it; nothing else is.

    What is known of one round is computed once. The `"pld"` accountant composes distributions of
    the privacy loss and is the tighter one, at tens of milliseconds for each number of rounds
    asked for; `"rdp"` adds up Rényi divergences, at a millisecond. Both are upper bounds.

    Where cohorts are of fixed size, others take the place of a client that leaves: neighbouring
    populations have the same number of clients, of which one is another, so that the aggregate
    changes by $2 S$, and the noise multiplier counts for half.

    Sources: Abadi et al. (2016), "Deep Learning with Differential Privacy"; Mironov et al. (2019),
    "Rényi Differential Privacy of the Sampled Gaussian Mechanism"; Wang et al. (2019), "Subsampled
    Rényi Differential Privacy and Analytical Moments Accountant"; Doroshenko et al. (2022),
    "Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions"; where there
    are fewer slots than clients, Ganesh (2025), "Tighter Privacy Analysis for Truncated Poisson
    Sampling".

    Args:
      noise_multiplier: $z$, not negative.
      delta: Between 0 and 1; well below one over the size of the population.
      sampler: Who takes part. Its key and those of the run are secret.
      accountant: `"pld"` or `"rdp"`; by default the former, where it covers the sampler.

    Returns:
      A `Ledger`.

    Raises:
      ValueError: The sampler is of a law that the accountant does not cover, or a number is out of
        range.
      ImportError: dp-accounting is missing.

    >>> import fedjax_lite as fl
    >>> spent = ledger(1.0, 1e-5, fl.samplers.everyone(100))
    >>> spent.adjacency, [round(spent.epsilon(r), 2) for r in (0, 1, 4)]
    ('add_or_remove_one', [0.0, 4.38, 10.0])
    """
    _validate.instance("sampler", sampler, Sampler, "fl.samplers.poisson(1000, 0.01)")
    noise_multiplier = float(_validate.number("noise_multiplier", noise_multiplier))
    _check_delta(delta)
    accountant, adjacency = _covered(sampler, accountant)
    spent = _spent(noise_multiplier, float(delta), sampler, accountant, adjacency)
    return Ledger(spent, noise_multiplier, float(delta), accountant, adjacency)


def epsilon(
    noise_multiplier: float,
    delta: float,
    num_rounds: int,
    sampler: Sampler,
    *,
    accountant: str | None = None,
) -> float:
    """What a number of rounds spends; see `ledger`.

    Args:
      noise_multiplier: As for `ledger`.
      delta: As for `ledger`.
      num_rounds: How many rounds there are.
      sampler: As for `ledger`.
      accountant: As for `ledger`.

    Raises:
      ValueError: As for `ledger`.

    >>> import fedjax_lite as fl
    >>> round(epsilon(0.8, 1e-6, 100, fl.samplers.poisson(10_000, 0.01)), 1)
    2.0
    """
    num_rounds = _validate.integer("num_rounds", num_rounds, minimum=0)
    return ledger(noise_multiplier, delta, sampler, accountant=accountant).epsilon(num_rounds)


def calibrate(
    epsilon: float,
    delta: float,
    num_rounds: int,
    sampler: Sampler,
    *,
    accountant: str | None = None,
) -> float:
    """The least noise multiplier with which rounds spend no more than `epsilon`; see `ledger`.

    Args:
      epsilon: What may be spent, positive.
      delta: As for `ledger`.
      num_rounds: How many rounds there will be.
      sampler: Who takes part.
      accountant: As for `ledger`.

    Returns:
      It, or up to a few ten-thousandths more.

    Raises:
      ValueError: As for `ledger`.

    >>> import fedjax_lite as fl
    >>> sampler = fl.samplers.poisson(1_000, 0.1)
    >>> noise_multiplier = calibrate(3.0, 1e-5, 10, sampler)
    >>> 2.99 < ledger(noise_multiplier, 1e-5, sampler).epsilon(10) <= 3
    True
    """
    _check_epsilon(epsilon)
    num_rounds = _validate.integer("num_rounds", num_rounds, minimum=1)

    @functools.cache
    def excess(log_multiplier: float) -> float:
        spent = ledger(math.exp(log_multiplier), delta, sampler, accountant=accountant)
        return math.log(max(spent.epsilon(num_rounds), 1e-12) / epsilon)

    # Epsilon falls as the noise grows.
    step = math.log(2) if excess(0.0) > 0 else -math.log(2)
    near = 0.0
    while excess(near + step) * step > 0:
        near += step
    optimize = require("scipy.optimize", "privacy")
    root = optimize.brentq(excess, *sorted((near, near + step)), xtol=_TOLERANCE)
    return math.exp(root + _TOLERANCE)


class Budget(NamedTuple):
    """What a run is to be accounted for; see `budget`."""

    delta: float
    epsilon: float | None = None
    accountant: str | None = None


def budget(delta: float, epsilon: float | None = None, *, accountant: str | None = None) -> Budget:
    """What a run may spend, as an argument of `fl.train`.

    Its records then have epsilon, by the noise of the algorithm's pipeline and the law of the
    sampler; a run that these do not cover is refused.

    Args:
      delta: As for `ledger`.
      epsilon: The most that all rounds may spend; more is refused. In settings of experiments and
        on the command line, a `noise_multiplier` that is left out of the updates, as in
        `gaussian_noise()`, is the least one that keeps to it. By default there is no bound.
      accountant: As for `ledger`.

    Raises:
      ValueError: A number is out of range.
    """
    _check_delta(delta)
    if epsilon is not None:
        _check_epsilon(epsilon)
    _validate.choice("accountant", accountant, _ACCOUNTANTS)
    return Budget(delta, epsilon, accountant)


def ledger_of(
    budget: Budget, algorithm: FederatedAlgorithm, sampler: Sampler, num_rounds: int
) -> Ledger:
    """The ledger of a run.

    Args:
      budget: What it may spend.
      algorithm: Whose pipeline adds the noise.
      sampler: Who takes part.
      num_rounds: Rounds of the whole run.

    Raises:
      ValueError: The algorithm adds no noise, or none that is accounted for; the sampler is not
        covered; the rounds spend more than they may.
    """
    _validate.instance("privacy", budget, Budget, "fl.privacy.budget(delta=1e-6)")
    known = None if algorithm.guarantees is None else algorithm.guarantees()
    if known is None or known.noise_multiplier is None:
        raise ValueError(
            "privacy is to be accounted of an algorithm whose pipeline adds no noise of a known"
            " multiplier, or that of a simulated cohort; end it with"
            " fl.gaussian_noise(noise_multiplier)."
        )
    if sampler.min_separation < known.min_separation:
        raise ValueError(
            f"sampler has clients whose rounds lie {sampler.min_separation} apart, and the noise of"
            f" the pipeline covers those that lie {known.min_separation} apart; choose"
            f" fl.samplers.cyclic(num_clients, num_groups={known.min_separation}, ...)."
        )
    spent = ledger(known.noise_multiplier, budget.delta, sampler, accountant=budget.accountant)
    if budget.epsilon is not None and spent.epsilon(num_rounds) > budget.epsilon:
        least = calibrate(
            budget.epsilon, budget.delta, num_rounds, sampler, accountant=budget.accountant
        )
        raise ValueError(
            f"privacy allows an epsilon of {budget.epsilon:g}, and {num_rounds} rounds with a"
            f" noise_multiplier of {spent.noise_multiplier:g} spend"
            f" {spent.epsilon(num_rounds):g}; choose {least:.4g}, or fewer rounds."
        )
    return spent


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; choose a number between 0 and 1, such as 1e-6.")


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon}; choose a positive number.")


def _covered(sampler: Sampler, accountant: str | None) -> tuple[str, str]:
    """The accountant of a sampler, and between which populations it accounts."""
    scheme = sampler.scheme
    reason = _REFUSED.get(scheme)
    if reason is None and sampler.rate is None:
        reason = "its cohort size varies from round to round; choose a fixed one"
    if reason is not None:
        of = "without a scheme" if scheme is None else f"of the scheme {scheme!r}"
        raise ValueError(f"sampler is one {of}, for which there is no epsilon: {reason}.")
    _validate.choice("accountant", accountant, _ACCOUNTANTS)
    if scheme == "without_replacement":
        if accountant == "pld":
            raise ValueError(
                "accountant is 'pld', which does not cover cohorts of fixed size; choose 'rdp', or"
                " fl.samplers.poisson."
            )
        return "rdp", "replace_one"
    if scheme == "poisson" and accountant == "rdp" and sampler.capacity < _largest_group(sampler):
        raise ValueError(
            f"accountant is 'rdp', which does not cover more clients than the {sampler.capacity}"
            " slots of sampler; choose 'pld', or a capacity for all clients."
        )
    # Who would be in which group, and when, depends on how many clients there are.
    adjacency = "add_or_remove_one" if sampler.num_groups == 1 else "replace_special"
    return accountant or "pld", adjacency


def _largest_group(sampler: Sampler) -> int:
    return -(-sampler.num_clients // sampler.num_groups)


def _spent(
    noise_multiplier: float, delta: float, sampler: Sampler, accountant: str, adjacency: str
) -> Callable[[int], float]:
    """Epsilon by the number of rounds."""
    one: Any = None

    @functools.cache
    def epsilon(num_rounds: int) -> float:
        nonlocal one
        # In as many of them a client may take part; the others tell nothing of it.
        count = -(-num_rounds // sampler.num_groups)
        if count == 0 or noise_multiplier == 0:
            return math.inf if count else 0.0
        if one is None:
            of_accountant = _loss if accountant == "pld" else _divergences
            one = of_accountant(noise_multiplier, sampler, adjacency)
        return float(one(count, delta))

    return epsilon


def _loss(
    noise_multiplier: float, sampler: Sampler, adjacency: str
) -> Callable[[int, float], float]:
    """Epsilon by the number of rounds that a client may take part in, and delta."""
    dp_accounting = require("dp_accounting", "privacy")
    distributions = dp_accounting.pld.privacy_loss_distribution
    relation = dp_accounting.NeighboringRelation[adjacency.upper()]
    rate = sampler.rate
    assert rate is not None  # It is covered.
    # The loss where the noise is 8 standard deviations off: what is further out is as good as
    # never seen. A hundred steps up to there make epsilon a thousandth too large at most.
    exponent = 8 / noise_multiplier + 1 / (2 * noise_multiplier**2)
    largest = np.logaddexp(np.log(rate) + exponent, np.log1p(-rate) if rate < 1 else -np.inf)
    step = float(np.clip(1e-3, largest / 5_000, largest / 100))
    if rate == 1 or step > 100:
        # Of those drawn by chance with hardly any noise, without regard to chance, and as if each
        # could put another one out of its slot: epsilon is in the hundreds of thousands anyhow.
        own = noise_multiplier if rate == 1 else noise_multiplier / 2

        @np.errstate(divide="ignore")  # It takes the logarithm of a difference that may be none.
        def together(count: int, delta: float) -> float:
            return dp_accounting.get_epsilon_gaussian(own / math.sqrt(count), delta)

        return together
    loss = distributions.from_truncated_subsampled_gaussian_mechanism(
        _largest_group(sampler),
        rate,
        sampler.capacity,
        noise_multiplier,
        value_discretization_interval=step,
        neighboring_relation=relation,
    )
    return lambda count, delta: loss.self_compose(count).get_epsilon_for_delta(delta)


def _divergences(
    noise_multiplier: float, sampler: Sampler, adjacency: str
) -> Callable[[int, float], float]:
    """The same by Rényi divergences, which add up."""
    dp_accounting = require("dp_accounting", "privacy")
    rdp = dp_accounting.rdp
    event = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sampler.scheme == "without_replacement":
        group = sampler.num_clients // sampler.num_groups
        halved = dp_accounting.GaussianDpEvent(noise_multiplier / 2)
        assert sampler.rate is not None
        size = round(sampler.rate * group)
        event = dp_accounting.SampledWithoutReplacementDpEvent(group, size, halved)
    elif sampler.scheme == "poisson":
        event = dp_accounting.PoissonSampledDpEvent(sampler.rate, event)
    relation = dp_accounting.NeighboringRelation[adjacency.upper()]
    of_one = rdp.RdpAccountant(neighboring_relation=relation).compose(event)
    orders, divergences = of_one.orders, of_one.rdp
    return lambda count, delta: rdp.compute_epsilon(orders, count * divergences, delta)[0]
