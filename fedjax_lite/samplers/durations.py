"""How long clients take: distributions of simulated seconds, and the time that messages travel.

Of one that is `per_example`, what it gives is multiplied with the client's number of examples. If
it is `persistent`, a client takes as long in every round, as a slow device does; else it is drawn
anew.

>>> import jax, jax.numpy as jnp
>>> slow_and_fast = log_normal(1.0, persistent=True)
>>> keys = jax.random.split(jax.random.key(0), 2)
>>> seconds = [slow_and_fast.seconds(key, jnp.int32(7), jnp.int32(20)) for key in keys]
>>> bool(seconds[0] == seconds[1])
True
"""

import csv
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.base import FederatedAlgorithm
from fedjax_lite.xla import random

_PERSISTENT = 0x5EC0  # The seed of what a client draws once and for all.


__all__ = [
    "Durations",
    "constant",
    "exponential",
    "from_file",
    "half_normal",
    "log_normal",
    "normal",
    "of_devices",
    "uniform_between",
    "with_network",
]


def __dir__() -> list[str]:
    return __all__


class Durations(NamedTuple):
    """How long clients take.

    Attributes:
      seconds: `seconds(key, client_id, num_examples) -> seconds`, not negative, float32 scalar, for
        one client that trains with a typed key of its own; a pure function.
    """

    seconds: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def constant(seconds: float = 1.0, *, per_example: bool = False) -> Durations:
    """The same for all clients, or for all examples.

    Args:
      seconds: How long, positive.
      per_example: See the module.

    Raises:
      ValueError: `seconds` is not positive.
    """
    seconds = _validate.number("seconds", seconds, positive=True)
    return _drawn(lambda key: jnp.full((), seconds, jnp.float32), per_example, persistent=False)


def uniform_between(
    least: float, most: float, *, per_example: bool = False, persistent: bool = False
) -> Durations:
    """Uniform between two bounds.

    Args:
      least: The lower bound, not negative.
      most: The upper bound, above `least`.
      per_example: See the module.
      persistent: See the module.

    Raises:
      ValueError: A bound is out of range.
    """
    least, most = _validate.number("least", least), _validate.number("most", most)
    if not least < most:
        raise ValueError(f"most is {most}, beside least {least}; choose a number above it.")
    return _drawn(
        lambda key: jax.random.uniform(key, (), jnp.float32, least, most), per_example, persistent
    )


def exponential(
    mean: float = 1.0, *, per_example: bool = False, persistent: bool = False
) -> Durations:
    """Exponential.

    Args:
      mean: The mean, positive.
      per_example: See the module.
      persistent: See the module.

    Raises:
      ValueError: `mean` is not positive.
    """
    mean = _validate.number("mean", mean, positive=True)
    return _drawn(
        lambda key: mean * jax.random.exponential(key, (), jnp.float32), per_example, persistent
    )


def normal(
    mean: float, std: float, *, per_example: bool = False, persistent: bool = False
) -> Durations:
    """Normal, and zero where that is negative.

    Args:
      mean: The mean, not negative, of the normal distribution.
      std: Its standard deviation, positive.
      per_example: See the module.
      persistent: See the module.

    Raises:
      ValueError: A number is out of range.
    """
    mean, std = _validate.number("mean", mean), _validate.number("std", std, positive=True)

    def draw(key: jax.Array) -> jax.Array:
        return jnp.maximum(mean + std * jax.random.normal(key, (), jnp.float32), 0)

    return _drawn(draw, per_example, persistent)


def half_normal(
    std: float, least: float = 0.0, *, per_example: bool = False, persistent: bool = False
) -> Durations:
    r"""$t_{min} + |z|$ with $z$ normal of mean zero.

    Source: Nguyen et al. (2022), "Federated Learning with Buffered Asynchronous Aggregation", whose
    devices are of this kind.

    Args:
      std: The standard deviation of $z$, positive.
      least: $t_{min}$, not negative.
      per_example: See the module.
      persistent: See the module.

    Raises:
      ValueError: A number is out of range.
    """
    std, least = _validate.number("std", std, positive=True), _validate.number("least", least)

    def draw(key: jax.Array) -> jax.Array:
        return least + std * jnp.abs(jax.random.normal(key, (), jnp.float32))

    return _drawn(draw, per_example, persistent)


def log_normal(
    sigma: float, median: float = 1.0, *, per_example: bool = False, persistent: bool = False
) -> Durations:
    r"""$m \, e^{\sigma z}$ with $z$ standard normal.

    Args:
      sigma: $\sigma$, not negative.
      median: The median $m$, positive.
      per_example: See the module.
      persistent: See the module.

    Raises:
      ValueError: A number is out of range.
    """
    sigma = _validate.number("sigma", sigma)
    median = _validate.number("median", median, positive=True)

    def draw(key: jax.Array) -> jax.Array:
        return median * jnp.exp(sigma * jax.random.normal(key, (), jnp.float32))

    return _drawn(draw, per_example, persistent)


def with_network(
    durations: Durations,
    *,
    upload: ArrayLike | None = None,
    download: ArrayLike | None = None,
    algorithm: FederatedAlgorithm | None = None,
    bytes_up: float | None = None,
    bytes_down: float | None = None,
) -> Durations:
    r"""Training, and the travel of messages: $t + b_\downarrow / d_i + b_\uparrow / u_i$.

    How large these are follows from the algorithm, its model and its pipeline, also before it is
    known how stale its params may be:

        build = functools.partial(fl.fed_avg, model, optax.sgd(0.1), pipeline=fl.drive())
        durations = fl.durations.with_network(computing, upload=1e5, algorithm=build())
        sampler = fl.samplers.fed_buff(..., durations=durations)
        algorithm = build(max_staleness=sampler.max_staleness)

    What is encoded in a size that depends on values, as by `fl.qsgd(..., encoding="elias")` and
    `fl.power_sgd`, counts as it is without. On the command line, the algorithm is filled in.

    Args:
      durations: How long clients take to train, $t$.
      upload: $u_i$, bytes a second, positive, a number or `[clients]`; without limit by default.
      download: $d_i$, likewise.
      algorithm: What says how large messages are, of a model that draws its params.
      bytes_up: $b_\uparrow$, what a client sends in a round, if it is not that of the algorithm.
      bytes_down: $b_\downarrow$, what it is sent, likewise.

    Raises:
      ValueError: An argument is out of range, or it is not known how large messages are.

    >>> import optax, fedjax_lite as fl
    >>> model = fl.models.logistic((3,), 2)
    >>> algorithm = fl.fed_avg(model, optax.sgd(0.1), pipeline=fl.half_precision())
    >>> computing = constant(5.0)
    >>> device = with_network(computing, upload=1.0, download=8.0, algorithm=algorithm)
    >>> float(device.seconds(jax.random.key(0), jnp.int32(1), jnp.int32(10)))  # 5 + 32 / 8 + 16 / 1
    25.0
    """
    _validate.instance("durations", durations, Durations, "fl.durations.log_normal(1.0)")
    rates = _rates("download", download), _rates("upload", upload)
    travel: Any = 0.0
    for way, (name, size) in enumerate((("bytes_down", bytes_down), ("bytes_up", bytes_up))):
        if size is None and np.isinf(rates[way]).all():
            continue
        if size is None:
            if algorithm is None or algorithm.message_bits is None:
                raise ValueError(
                    f"{name} is None, and no algorithm says how large messages are; pass algorithm="
                    f" one that does, or {name}= as a number."
                )
            size = algorithm.message_bits(jax.random.key(0))[way] / 8
        travel = travel + _validate.number(name, size) / rates[way]
    travel = np.asarray(travel, np.float32)

    def seconds(key: jax.Array, client_id: jax.Array, num_examples: jax.Array) -> jax.Array:
        own = jnp.asarray(travel)[client_id] if travel.ndim else travel
        return durations.seconds(key, client_id, num_examples) + own

    return Durations(seconds)


def of_devices(
    seconds_per_example: ArrayLike,
    *,
    upload: ArrayLike | None = None,
    download: ArrayLike | None = None,
    algorithm: FederatedAlgorithm | None = None,
    bytes_up: float | None = None,
    bytes_down: float | None = None,
) -> Durations:
    r"""As a trace of devices has them: $n_i c_i + b_\downarrow / d_i + b_\uparrow / u_i$.

    Args:
      seconds_per_example: $c_i$, `[clients]`, not negative, for all epochs of a round.
      upload: As in `with_network`.
      download: As in `with_network`.
      algorithm: As in `with_network`.
      bytes_up: As in `with_network`.
      bytes_down: As in `with_network`.

    Raises:
      ValueError: An argument is out of range, or it is not known how large messages are.

    >>> import jax, jax.numpy as jnp
    >>> devices = of_devices([0.5, 2.0], upload=100.0, bytes_up=300.0)
    >>> float(devices.seconds(jax.random.key(0), jnp.int32(1), jnp.int32(10)))
    23.0
    """
    each = np.asarray(seconds_per_example, np.float64)
    if each.ndim != 1 or each.size == 0 or not (np.isfinite(each) & (each >= 0)).all():
        raise ValueError(
            f"seconds_per_example has shape {each.shape}; pass a finite number from 0 for each"
            " client, [clients]."
        )
    for name, rates in (("upload", upload), ("download", download)):
        if rates is not None and np.shape(rates) not in ((), each.shape):
            raise ValueError(
                f"{name} has shape {np.shape(rates)}; pass a positive number, or one for each of"
                f" the {each.size} clients."
            )
    compute = np.float32(each)

    def seconds(key: jax.Array, client_id: jax.Array, num_examples: jax.Array) -> jax.Array:
        del key
        return jnp.asarray(compute)[client_id] * num_examples

    return with_network(
        Durations(seconds),
        upload=upload,
        download=download,
        algorithm=algorithm,
        bytes_up=bytes_up,
        bytes_down=bytes_down,
    )


def from_file(
    path: str | PathLike[str],
    client_ids: Sequence[Any] | None = None,
    *,
    algorithm: FederatedAlgorithm | None = None,
    bytes_up: float | None = None,
    bytes_down: float | None = None,
) -> Durations:
    r"""Those of a trace of devices in a CSV file, as `of_devices` takes them.

    It has a line for each client, in any order, and the columns `client_id` and
    `seconds_per_example`; `upload` and `download`, bytes a second, where connections count.

    Args:
      path: The file.
      client_ids: The clients of the population in its order, such as `dataset.client_ids`, whose
        lines are looked for; by default 0, 1, 2 and so on, as many as there are lines.
      algorithm: As in `with_network`.
      bytes_up: As in `with_network`.
      bytes_down: As in `with_network`.

    Raises:
      ValueError: A column or a client is missing, a client has two lines, a number is out of range,
        or it is not known how large messages are.
      OSError: The file cannot be read.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "devices.csv"
    >>> _ = path.write_text("client_id,seconds_per_example\nb,2.0\na,0.5\n")
    >>> devices = from_file(path, ["a", "b"])
    >>> float(devices.seconds(jax.random.key(0), jnp.int32(1), jnp.int32(10)))
    20.0
    """
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("client_id", "seconds_per_example"):
        if not rows or name not in rows[0]:
            raise ValueError(f"path is {str(path)!r}, which has no column {name!r}; add it.")
    by_client = {row["client_id"]: row for row in rows}
    if len(by_client) < len(rows):
        raise ValueError(
            f"path is {str(path)!r}, with several lines of a client; keep one of each."
        )
    wanted = [str(one) for one in (range(len(rows)) if client_ids is None else client_ids)]
    if missing := [one for one in wanted if one not in by_client]:
        raise ValueError(
            f"path is {str(path)!r}, without {len(missing)} of {len(wanted)} clients, such as"
            f" {missing[0]!r}; add their lines, or pass client_ids=, as the file has them."
        )

    def column(name: str) -> ArrayLike:
        values = [by_client[one].get(name) or "inf" for one in wanted]
        try:
            return np.array(values, np.float64)
        except ValueError as error:
            raise ValueError(f"path is {str(path)!r}, in whose column {name!r} {error}.") from None

    return of_devices(
        column("seconds_per_example"),
        upload=column("upload"),
        download=column("download"),
        algorithm=algorithm,
        bytes_up=bytes_up,
        bytes_down=bytes_down,
    )


def _rates(name: str, rates: ArrayLike | None) -> np.ndarray:
    """Bytes a second, a number or `[clients]`."""
    rates = np.asarray(np.inf if rates is None else rates, np.float64)
    if rates.ndim > 1 or not rates.size or not (rates > 0).all():
        raise ValueError(
            f"{name} has shape {rates.shape}, and is at least {rates.min(initial=np.inf):g}; pass a"
            " positive number of bytes a second, or one for each client."
        )
    return rates


def _drawn(
    draw: Callable[[jax.Array], jax.Array], per_example: bool, persistent: bool
) -> Durations:
    """`draw(key)`, by the client's own key if it is persistent."""
    _validate.choice("per_example", per_example, (True, False))
    _validate.choice("persistent", persistent, (True, False))

    def seconds(key: jax.Array, client_id: jax.Array, num_examples: jax.Array) -> jax.Array:
        if persistent:
            key = random.fold_in_pair(jax.random.key(_PERSISTENT), 0, client_id)
        drawn = draw(key)
        return drawn * num_examples if per_example else drawn

    return Durations(seconds)
