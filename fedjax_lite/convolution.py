"""Convolutions that stay fast inside compiled loops."""

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

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


def canonical_convolutions(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, with every convolution in the form that XLA:CPU runs fast.

    XLA:CPU brings convolutions into its fast form, channels last, only where a program
    begins. In the body of a loop those of a gradient keep the layout that autodiff gave them
    and run about thirty times slower (jax-ml/jax issue 12868). This transposes the operands
    and the result of each convolution explicitly, which leaves the results as they are.

    It descends into what the function calls: `jit`, `custom_jvp`, `custom_vjp`, `remat`,
    `scan`, `while_loop` and `cond`. Custom derivatives are those of the function by then, and
    are lost: apply it after `jax.grad` and not before.

    Args:
      function: A function of pytrees of arrays.

    Returns:
      A function of the same arguments.

    >>> import jax, jax.numpy as jnp
    >>> conv = lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME")  # channels first
    >>> x, w = jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3))
    >>> bool((canonical_convolutions(conv)(x, w) == conv(x, w)).all())
    True
    """

    def canonical(*args: P.args, **kwargs: P.kwargs) -> T:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
        if not _has_convolution(closed.jaxpr):
            return function(*args, **kwargs)
        outputs = _evaluate(closed, jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return canonical


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    values = [v for value in params.values() for v in (value if type(value) is tuple else (value,))]
    return [v for v in values if isinstance(v, (jex_core.Jaxpr, jex_core.ClosedJaxpr))]


def _has_convolution_inside(eqn: Any) -> bool:
    inner = (getattr(inner, "jaxpr", inner) for inner in _inner_jaxprs(eqn.params))
    return any(map(_has_convolution, inner))


def _has_convolution(jaxpr: Any) -> bool:
    return any(
        eqn.primitive is primitives.conv_general_dilated_p or _has_convolution_inside(eqn)
        for eqn in jaxpr.eqns
    )


def _evaluate(closed: jex_core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr with its convolutions made canonical."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex_core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        outputs = _bind(eqn, [read(atom) for atom in eqn.invars])
        values |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bind(eqn: Any, inputs: list[Any]) -> list[Any]:
    params, name = dict(eqn.params), eqn.primitive.name
    if eqn.primitive is primitives.conv_general_dilated_p:
        return [_convolve(inputs[0], inputs[1], params)]
    if name in _CALLS and _has_convolution_inside(eqn):
        (inner,) = _inner_jaxprs(params)
        closed = (
            inner if isinstance(inner, jex_core.ClosedJaxpr) else jex_core.ClosedJaxpr(inner, ())
        )
        return _evaluate(closed, inputs)
    if name in _CONTROL_FLOW and _has_convolution_inside(eqn):
        params = {key: _rewritten(value) for key, value in params.items()}
    outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(params))
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _rewritten(value: Any) -> Any:
    """Closed jaxprs with canonical convolutions; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(_rewritten, value))
    if not isinstance(value, jex_core.ClosedJaxpr):
        return value
    return jax.make_jaxpr(lambda *args: _evaluate(value, args))(*value.in_avals)


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
