"""Convolutions and products in the forms that stay fast inside compiled loops on a CPU."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jax.extend.core import primitives

P = ParamSpec("P")
T = TypeVar("T")

# What is evaluated in place, and what is kept with its jaxprs rewritten. Anything else that
# holds a jaxpr (a kernel, a shard_map) stays as it is.
_CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
}
_CONTROL_FLOW = {"scan", "while", "cond"}
_LARGE_KERNEL = 2**13


def rewritten(
    function: Callable[P, T], *, convolutions: bool = True, products: bool = True
) -> Callable[P, T]:
    """The same function, with its convolutions and products in the forms that XLA:CPU runs fast.

    XLA:CPU brings convolutions into its fast form, channels last, only where a program
    begins. In the body of a loop those of a gradient keep the layout that autodiff gave them
    and run about thirty times slower (jax-ml/jax issue 12868). This transposes the operands
    and the result of each convolution explicitly, which leaves the results as they are.

    The gradient of a dense layer multiplies a few rows with a transposed kernel, which XLA:CPU
    copies into another layout first. The other way round, kernel times rows, it is the rows that
    are copied: a third of the time for 20 rows and a kernel of 200 x 200.

    It descends into what the function calls: `jit`, `custom_jvp`, `custom_vjp`, `remat`,
    `scan`, `while_loop` and `cond`. Custom derivatives are those of the function by then, and
    are lost: apply it after `jax.grad` and not before.

    Args:
      function: A function of pytrees of arrays.
      convolutions: Whether to rewrite convolutions.
      products: Whether to rewrite products.

    Returns:
      A function of the same arguments.

    >>> import jax, jax.numpy as jnp
    >>> conv = lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME")  # channels first
    >>> x, w = jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3))
    >>> bool((rewritten(conv)(x, w) == conv(x, w)).all())
    True
    """
    rules = {
        **({primitives.conv_general_dilated_p: _CONVOLUTION} if convolutions else {}),
        **({primitives.dot_general_p: _PRODUCT} if products else {}),
    }

    def after(*args: P.args, **kwargs: P.kwargs) -> T:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
        if not _applies(rules, closed.jaxpr):
            return function(*args, **kwargs)
        outputs = _evaluate(rules, closed, jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return after if rules else function


class _Rule(NamedTuple):
    """How equations of one primitive are rewritten, and which of them."""

    applies: Callable[[Any], bool]
    evaluate: Callable[[jax.Array, jax.Array, dict[str, Any]], jax.Array]


_Rules = Mapping[jex_core.Primitive, _Rule]


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    values = [v for value in params.values() for v in (value if type(value) is tuple else (value,))]
    return [v for v in values if isinstance(v, (jex_core.Jaxpr, jex_core.ClosedJaxpr))]


def _applies_inside(rules: _Rules, eqn: Any) -> bool:
    inner = (getattr(inner, "jaxpr", inner) for inner in _inner_jaxprs(eqn.params))
    return any(_applies(rules, jaxpr) for jaxpr in inner)


def _applies(rules: _Rules, jaxpr: Any) -> bool:
    return any(
        (eqn.primitive in rules and rules[eqn.primitive].applies(eqn))
        or _applies_inside(rules, eqn)
        for eqn in jaxpr.eqns
    )


def _evaluate(rules: _Rules, closed: jex_core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr, rewritten."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex_core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        outputs = _bind(rules, eqn, [read(atom) for atom in eqn.invars])
        values |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bind(rules: _Rules, eqn: Any, inputs: list[Any]) -> list[Any]:
    params, name = dict(eqn.params), eqn.primitive.name
    if eqn.primitive in rules and rules[eqn.primitive].applies(eqn):
        lhs, rhs = inputs
        return [rules[eqn.primitive].evaluate(lhs, rhs, params)]
    if name in _CALLS and _applies_inside(rules, eqn):
        (inner,) = _inner_jaxprs(params)
        closed = (
            inner if isinstance(inner, jex_core.ClosedJaxpr) else jex_core.ClosedJaxpr(inner, ())
        )
        return _evaluate(rules, closed, inputs)
    if name in _CONTROL_FLOW and _applies_inside(rules, eqn):
        params = {key: _with_rules(rules, value) for key, value in params.items()}
    outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(params))
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _with_rules(rules: _Rules, value: Any) -> Any:
    """Closed jaxprs rewritten; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_with_rules(rules, item) for item in value)
    if not isinstance(value, jex_core.ClosedJaxpr):
        return value
    return jax.make_jaxpr(lambda *args: _evaluate(rules, value, args))(*value.in_avals)


def _convolve(lhs: jax.Array, rhs: jax.Array, params: dict[str, Any]) -> jax.Array:
    """One convolution, on operands in the layouts N...C and ...IO."""
    numbers = params["dimension_numbers"]
    batch, features, *space = numbers.lhs_spec
    out_features, in_features, *window = numbers.rhs_spec
    last = lhs.ndim - 1
    channels_last = (0, last, *range(1, last))
    out = primitives.conv_general_dilated_p.bind(
        jnp.transpose(lhs, (batch, *space, features)),
        jnp.transpose(rhs, (*window, in_features, out_features)),
        **{
            **params,
            "dimension_numbers": jax.lax.ConvDimensionNumbers(
                channels_last, (last, last - 1, *range(last - 1)), channels_last
            ),
        },
    )
    # Axis i of the canonical result belongs at out_spec's place for it.
    batch, features, *space = numbers.out_spec
    order = [0] * out.ndim
    for axis, place in enumerate((batch, *space, features)):
        order[place] = axis
    return jnp.transpose(out, order)


def _multiplies_with_transposed_kernel(eqn: Any) -> bool:
    rows, kernel = (atom.aval for atom in eqn.invars)
    sharding = eqn.params["out_sharding"]
    return (
        eqn.params["dimension_numbers"] == (((rows.ndim - 1,), (1,)), ((), ()))
        and kernel.ndim == 2
        and kernel.size >= max(_LARGE_KERNEL, rows.size)
        and (sharding is None or not any(sharding.spec))
    )


def _multiply(rows: jax.Array, kernel: jax.Array, params: dict[str, Any]) -> jax.Array:
    """Rows `[..., n]` times the transpose of a kernel `[m, n]`, as kernel times rows."""
    precision = params["precision"]
    swapped = {
        **params,
        "dimension_numbers": (((1,), (rows.ndim - 1,)), ((), ())),
        "precision": precision[::-1] if isinstance(precision, tuple) else precision,
        "out_sharding": None,
    }
    out = primitives.dot_general_p.bind(kernel, rows, **swapped)
    # Without the barrier, XLA would take product and transpose for what they come from.
    return jnp.moveaxis(jax.lax.optimization_barrier(out), 0, -1)


_CONVOLUTION = _Rule(lambda eqn: True, _convolve)
_PRODUCT = _Rule(_multiplies_with_transposed_kernel, _multiply)
