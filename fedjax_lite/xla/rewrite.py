"""Convolutions and products in the forms that are fast where clients train."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jax.extend.core import primitives

P = ParamSpec("P")
T = TypeVar("T")

# What is evaluated in place, and what is kept with its jaxprs rewritten, custom derivatives as they
# are. Anything else that holds a jaxpr (a kernel, a shard_map) stays as it is.
_CALLS = {"jit", "closed_call", "remat2"}
_KEPT = {"scan", "while", "cond", "custom_jvp_call", "custom_vjp_call"}
# Measured with AVX-512: smaller kernels gain nothing, and more rows overflow the registers.
_LARGE_KERNEL = 2**13
_FEW_ROWS = 24
# A patch is put together of as many slices; each is compiled, and a copy of the images in memory.
_MOST_SLICES = 64


def rewritten(
    function: Callable[P, T],
    *,
    convolutions: Literal["channels_last", "patches"] | None = "channels_last",
    products: bool = True,
) -> Callable[P, T]:
    """The same function, with its convolutions and products in forms that run fast.

    XLA:CPU brings convolutions into its fast form, channels last, only where a program
    begins. In the body of a loop those of a gradient keep the layout that autodiff gave them
    and run about thirty times slower (jax-ml/jax issue 12868). This transposes the operands
    and the result of each convolution explicitly, which leaves the results as they are.

    `vmap` over clients that each have a kernel of their own makes grouped convolutions, which
    cuDNN runs group by group. Of the patches of the images, a convolution is one product, and
    `vmap` makes a batched product of it. Apply this before `vmap`.

    The gradient of a dense layer has two products with the few rows of a batch. Rows times a
    transposed kernel becomes kernel times rows: XLA:CPU copies what stands on the right into
    another layout first. The gradient of the kernel becomes a sum of outer products, for up to 24
    rows: XLA fuses it with the update of the kernel, and the gradient is never written to memory.

    It descends into what the function calls: `jit`, `custom_jvp`, `custom_vjp`, `remat`,
    `scan`, `while_loop` and `cond`. Derivatives are not rewritten: apply it after `jax.grad`.

    The result is jitted, so that it is traced once, however often it is called.

    Args:
      function: A function of pytrees of arrays.
      convolutions: The form of convolutions, which `None` leaves as they are. As `"patches"`, those
        in groups, and those of more than 64 places in the kernel and in the result, stay.
      products: Whether to rewrite products.

    Returns:
      A function of the same arguments.

    >>> import jax, jax.numpy as jnp
    >>> conv = lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME")  # channels first
    >>> x, w = jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3))
    >>> bool((rewritten(conv)(x, w) == conv(x, w)).all())
    True
    """
    rules = (_CONVOLUTIONS[convolutions] if convolutions else ()) + (_PRODUCTS if products else ())

    def after(*args: P.args, **kwargs: P.kwargs) -> T:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
        outputs = _evaluate(rules, closed, jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return jax.jit(after if rules else function)


class _Rule(NamedTuple):
    """Which equations are rewritten, and how: from their two operands and their parameters."""

    applies: Callable[[Any], bool]
    evaluate: Callable[[jax.Array, jax.Array, dict[str, Any]], jax.Array]


def _find(rules: Sequence[_Rule], eqn: Any) -> _Rule | None:
    return next((rule for rule in rules if rule.applies(eqn)), None)


def inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    values = [v for value in params.values() for v in (value if type(value) is tuple else (value,))]
    return [v for v in values if isinstance(v, (jex_core.Jaxpr, jex_core.ClosedJaxpr))]


def _applies_inside(rules: Sequence[_Rule], eqn: Any) -> bool:
    inner = inner_jaxprs(eqn.params)
    return any(_applies(rules, getattr(jaxpr, "jaxpr", jaxpr)) for jaxpr in inner)


def _applies(rules: Sequence[_Rule], jaxpr: Any) -> bool:
    return any(_find(rules, eqn) or _applies_inside(rules, eqn) for eqn in jaxpr.eqns)


def _evaluate(
    rules: Sequence[_Rule], closed: jex_core.ClosedJaxpr, args: Sequence[Any]
) -> list[Any]:
    """Evaluates a jaxpr, rewritten."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex_core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        with eqn.ctx.manager:
            outputs = _bind(rules, eqn, [read(atom) for atom in eqn.invars])
        values |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bind(rules: Sequence[_Rule], eqn: Any, inputs: list[Any]) -> list[Any]:
    params, name = dict(eqn.params), eqn.primitive.name
    if rule := _find(rules, eqn):
        lhs, rhs = inputs
        return [rule.evaluate(lhs, rhs, params)]
    if name in _CALLS and _applies_inside(rules, eqn):
        (inner,) = inner_jaxprs(params)
        closed = (
            inner if isinstance(inner, jex_core.ClosedJaxpr) else jex_core.ClosedJaxpr(inner, ())
        )
        return _evaluate(rules, closed, inputs)
    if name in _KEPT and _applies_inside(rules, eqn):
        params = {key: _with_rules(rules, value) for key, value in params.items()}
    outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(params))
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _with_rules(rules: Sequence[_Rule], value: Any) -> Any:
    """Closed jaxprs rewritten; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_with_rules(rules, item) for item in value)
    if not isinstance(value, jex_core.ClosedJaxpr):
        return value
    return jax.make_jaxpr(lambda *args: _evaluate(rules, value, args))(*value.in_avals)


def _is_convolution(eqn: Any) -> bool:
    return eqn.primitive is primitives.conv_general_dilated_p


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
    return _from_channels_last(out, numbers)


def _from_channels_last(out: jax.Array, numbers: jax.lax.ConvDimensionNumbers) -> jax.Array:
    """The result N...C of a convolution in the layout that is due."""
    batch, features, *space = numbers.out_spec
    order = [0] * out.ndim
    for axis, place in enumerate((batch, *space, features)):
        order[place] = axis
    return jnp.transpose(out, order)


def _sizes(aval: Any, spec: Sequence[int]) -> list[int]:
    """The sizes of the spatial axes."""
    return [aval.shape[axis] for axis in spec[2:]]


def _has_few_patches(eqn: Any) -> bool:
    if not _is_convolution(eqn):
        return False
    numbers, rhs, out = eqn.params["dimension_numbers"], eqn.invars[1].aval, eqn.outvars[0].aval
    window, space = _sizes(rhs, numbers.rhs_spec), _sizes(out, numbers.out_spec)
    whole = eqn.params["feature_group_count"] == eqn.params["batch_group_count"] == 1
    return whole and 0 < min(math.prod(window), math.prod(space)) <= _MOST_SLICES


def _multiply_patches(lhs: jax.Array, rhs: jax.Array, params: dict[str, Any]) -> jax.Array:
    """A convolution as one product.

    Patches are slices of the images, one for each place in the kernel. Or one for each place in the
    result if those are fewer: the gradient of a kernel is a convolution whose kernel is as large as
    the images and whose result is as large as a kernel.
    """
    numbers = params["dimension_numbers"]
    batch, features, *space = numbers.lhs_spec
    out_features, in_features, *places = numbers.rhs_spec
    strides, steps = params["window_strides"], params["rhs_dilation"]
    window = _sizes(rhs, numbers.rhs_spec)
    padding: list[tuple[int, int, int]] = [(0, 0, 0)] * lhs.ndim
    for axis, (low, high), dilation in zip(
        space, params["padding"], params["lhs_dilation"], strict=True
    ):
        padding[axis] = (low, high, dilation - 1)
    lhs = jax.lax.pad(lhs, jnp.zeros((), lhs.dtype), padding)
    out_space = [
        (size - (width - 1) * step - 1) // stride + 1
        for size, width, step, stride in zip(
            _sizes(lhs, numbers.lhs_spec), window, steps, strides, strict=True
        )
    ]
    multiply = functools.partial(
        jax.lax.dot_general,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    last = lhs.ndim - 1
    if math.prod(window) <= math.prod(out_space):
        images = jnp.transpose(lhs, (batch, *space, features))
        patches = _slices(images, window, steps, out_space, strides)
        kernel = jnp.transpose(rhs, (*places, in_features, out_features))
        kernel = kernel.reshape(-1, kernel.shape[-1])
        return _from_channels_last(multiply(patches, kernel, (((last,), (0,)), ((), ()))), numbers)
    images = jnp.transpose(lhs, (features, *space, batch))
    patches = _slices(images, out_space, strides, window, steps)
    kernel = jnp.transpose(rhs, (in_features, *places, out_features))
    summed = tuple(range(last))
    out = multiply(patches, kernel, ((summed, summed), ((), ())))
    out = out.reshape(*out_space, lhs.shape[batch], -1)
    return _from_channels_last(jnp.moveaxis(out, -2, 0), numbers)


def _slices(
    images: jax.Array,
    starts: Sequence[int],
    apart: Sequence[int],
    sizes: Sequence[int],
    strides: Sequence[int],
) -> jax.Array:
    """Slices of the inner axes that start at so many places, side by side along the last one."""
    slices = []
    for start in itertools.product(*map(range, starts)):
        first = [0, *(i * step for i, step in zip(start, apart, strict=True)), 0]
        reach = [(size - 1) * stride + 1 for size, stride in zip(sizes, strides, strict=True)]
        ends = [
            i + n for i, n in zip(first, (images.shape[0], *reach, images.shape[-1]), strict=True)
        ]
        slices.append(jax.lax.slice(images, first, ends, (1, *strides, 1)))
    return jnp.concatenate(slices, -1)


def _summed_axes(eqn: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The axes over which a product sums, if it is one of floats, not batched and not split."""
    if eqn.primitive is not primitives.dot_general_p:
        return None
    axes, batch = eqn.params["dimension_numbers"]
    sharding = eqn.params["out_sharding"]
    plain = (
        batch == ((), ())
        and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
        and eqn.outvars[0].aval.dtype.itemsize > 1  # Formats of 8 bits do not mix with others.
        and (sharding is None or not any(sharding.spec))
    )
    return axes if plain else None


def _has_transposed_kernel(eqn: Any) -> bool:
    axes = _summed_axes(eqn)
    if axes is None:
        return False
    rows, kernel = (atom.aval for atom in eqn.invars)
    large = kernel.size >= max(_LARGE_KERNEL, rows.size)
    return axes == ((rows.ndim - 1,), (1,)) and kernel.ndim == 2 and large


def _kernel_times_rows(rows: jax.Array, kernel: jax.Array, params: dict[str, Any]) -> jax.Array:
    """Rows `[..., n]` times the transpose of a kernel `[m, n]`."""
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


def _is_kernel_gradient(eqn: Any) -> bool:
    if _summed_axes(eqn) != ((0,), (0,)):
        return False
    lhs, rhs = (atom.aval for atom in eqn.invars)
    large = eqn.outvars[0].aval.size >= _LARGE_KERNEL
    return lhs.ndim == rhs.ndim == 2 and large and 0 < lhs.shape[0] <= _FEW_ROWS


def _sum_of_outer_products(lhs: jax.Array, rhs: jax.Array, params: dict[str, Any]) -> jax.Array:
    """The transpose of `[rows, m]` times `[rows, n]`."""
    dtype = params["preferred_element_type"] or jnp.result_type(lhs, rhs)
    wide = jnp.promote_types(dtype, jnp.float32)
    # Without the barrier, XLA would take the rows from what both operands are computed from.
    lhs, rhs = jax.lax.optimization_barrier((lhs, rhs))
    lhs, rhs = lhs.astype(wide), rhs.astype(wide)
    shape = (1, rhs.shape[1], lhs.shape[1])

    def outer(i: int) -> jax.Array:
        x, y = (jax.lax.slice_in_dim(rows, i, i + 1) for rows in (lhs, rhs))
        # Transposed, as the gradient of a kernel is by autodiff: it transposes the sum once more.
        # By `jax.numpy`, it would be twice as many operations to compile.
        broadcast = jax.lax.broadcast_in_dim
        return jax.lax.mul(broadcast(y, shape, (0, 1)), broadcast(x, shape, (0, 2)))

    terms = [outer(i) for i in range(lhs.shape[0])]
    # Several sums side by side: in a single one, each addition would wait for the one before.
    sums = [functools.reduce(jax.lax.add, terms[i::4]) for i in range(min(4, len(terms)))]
    return functools.reduce(jax.lax.add, sums)[0].T.astype(dtype)


_CONVOLUTIONS = {
    "channels_last": (_Rule(_is_convolution, _convolve),),
    "patches": (_Rule(_has_few_patches, _multiply_patches),),
}
_PRODUCTS = (
    _Rule(_has_transposed_kernel, _kernel_times_rows),
    _Rule(_is_kernel_gradient, _sum_of_outer_products),
)
