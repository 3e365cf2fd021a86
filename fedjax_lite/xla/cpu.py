"""What it takes to run rounds fast, and to their end, on a CPU."""

import collections
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

from fedjax_lite import _validate

_FLAGS = {
    # A loop over small arrays becomes one function, not one thread-pool task per operation. Beside
    # --xla_cpu_copy_insertion_use_region_analysis=true, which saves copies, loops in such loops
    # come out wrong.
    "--xla_backend_extra_options": "xla_cpu_small_while_loop_byte_threshold=1000000",
    # AVX-512 where there is AVX-512; XLA stops at 256 bits on its own.
    "--xla_cpu_prefer_vector_width": "512",
    # Small matrix products and reductions by YNNPACK, but not convolutions: as XLA's own, a step of
    # the EMNIST CNN takes 17.5 ms on a core and not 20.2.
    "--xla_cpu_experimental_ynn_fusion_type": "individual_dot,reduce",
    # A device may have to wait for another one's clients longer than the 40 seconds after which
    # XLA takes them for stuck, and aborts.
    "--xla_cpu_collective_call_terminate_timeout_seconds": "86400",
}
_MAX_AHEAD = 2
_QUICK: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # Later ones know no such option, and refuse it.
    _QUICK["xla_cpu_use_fusion_emitters"] = False
_MAX_QUICK_SIZE = 2**24  # Entries, beyond which drawing them takes longer than compiling.
F = TypeVar("F", bound=Callable[..., Any])


class UnconfiguredCPUWarning(UserWarning):
    """Rounds run on a CPU that `configure_cpu` has not prepared; said once in a process.

    >>> import warnings, fedjax_lite as fl
    >>> warnings.filterwarnings("ignore", category=fl.UnconfiguredCPUWarning)
    """


def configure_cpu(num_devices: int | None = None) -> None:
    """Prepares JAX for simulations on a CPU: one virtual device per core, and XLA flags.

    XLA splits each large operation over the cores, which a client's small steps do not gain
    by; a device per core trains different clients instead. Call it before anything is
    computed. It changes nothing on machines whose default backend is not the CPU, and XLA
    flags that are already set in the environment variable `XLA_FLAGS` stay as they are.

    A loop that calls functions of its own around `round`, under `jax.jit`, must wait for a result
    now and then: XLA comes to a standstill, and aborts, once 32 computations with sums over
    virtual devices are queued. `round` and evaluations by themselves keep to two.

    Called again with the same number of devices, it does nothing.

    Args:
      num_devices: Number of virtual devices; the number of usable cores by default.

    Raises:
      ValueError: `num_devices` is not positive.
      RuntimeError: JAX has already computed something, so that it is too late.
    """
    if num_devices is None:
        usable = getattr(os, "sched_getaffinity", None)
        num_devices = len(usable(0)) if usable else os.cpu_count() or 1
    num_devices = _validate.integer("num_devices", num_devices, minimum=1)
    missing = _missing_flags()
    current = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    if not missing and current == num_devices:
        return  # JAX would refuse, also what changes nothing: a notebook's first cell, run again.
    jax.config.update("jax_num_cpu_devices", num_devices)
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *missing]).strip()


def _missing_flags() -> list[str]:
    """The flags that are not in the environment, neither with our values nor with others."""
    flags = os.environ.get("XLA_FLAGS", "")
    return [f"{name}={value}" for name, value in _FLAGS.items() if name not in flags]


@functools.cache
def warn_if_unconfigured() -> None:
    """Says, once in a process, that rounds on this CPU could be faster."""
    if _missing_flags() and jax.default_backend() == "cpu":
        warnings.warn(
            "JAX is not set up for simulations on this CPU, and rounds take two to five times as"
            " long as they could; call fl.configure_cpu() at the start of the program, before"
            " anything is computed.",
            UnconfiguredCPUWarning,
            stacklevel=2,
        )


class Paced:
    """A jitted function that is never called more than twice ahead of virtual CPU devices.

    XLA:CPU runs at most 32 computations at a time on a device. The next one waits in a thread of
    the pool in which they run, and if those have to wait for each other, for ever. More threads
    would help as well, and take a dense model 1.45 times as long.

    Where JAX cannot take an argument for an array, `check` is called with all of them, to name it.
    `around(function)` is what is called, if what is done before and after it cannot be compiled.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        check: Callable[..., None] | None = None,
        around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
    ) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._call = around(function)
        self._check = check
        self._ahead: collections.deque[jax.Array] = collections.deque()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = self._call(*args, **kwargs)
        except TypeError:
            if self._check is not None:
                self._check(*args, **kwargs)
            raise
        done = jax.tree.leaves(result)[-1]  # Of a round's info: the next one may donate the state.
        if not isinstance(done, jax.core.Tracer):
            devices = done.sharding.device_set
            if len(devices) > 1 and next(iter(devices)).platform == "cpu":
                self._ahead.append(done)
            if len(self._ahead) > _MAX_AHEAD:
                self._ahead.popleft().block_until_ready()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


def jit_once(function: F) -> F:
    """`jax.jit` of a function that runs once in a process, or not much oftener.

    On a CPU it is compiled without optimization: drawing 200,000 params takes 0.2 seconds to
    compile and not 1.0, and then 0.02 and not 0.004. A function that JAX cannot trace, since it
    computes with NumPy, runs as it is.
    """
    plain, quick = jax.jit(function), jax.jit(function, compiler_options=_QUICK)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        leaves = [*jax.tree.leaves(args), jax.device_put(0)]  # The latter is traced in a program.
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return function(*args)  # Options of the compiler belong to the program around it.
        try:
            shapes = jax.eval_shape(plain, *args)
        except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
            return function(*args)
        size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        is_quick = jax.default_backend() == "cpu" and size <= _MAX_QUICK_SIZE
        return (quick if is_quick else plain)(*args)

    return cast(F, call)
