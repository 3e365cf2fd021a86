"""Models of which a part is trained: some of their params, or adapters beside them."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.base import PyTree
from fedjax_lite.engine.frozen import read_frozen
from fedjax_lite.models.model import Model
from fedjax_lite.models.names import Names, matching, merge, names_of, split


def frozen(model: Model, names: Names) -> Model:
    """The model with some of its params frozen: they are as they are drawn, or given to `init`.

    Frozen params are neither trained nor averaged, sent, counted, clipped or kept with clients.
    They exist once, in `state.frozen`, however many clients train side by side.

    Args:
      model: The model, of whatever kind.
      names: Which params are frozen: a pattern, such as `"Dense_0/*"` or `"*/bias"`, several, or a
        function `name -> bool`. Names are the keys that lead to an array, joined by `/`.

    Returns:
      A `Model`. `algorithm.init` takes all params, or a key; `state.params` has `None` in place
      of those that are frozen, `model.merge(state.params, state.frozen)` all.

    Raises:
      ValueError: `model` has frozen params already. In `algorithm.init`: no name matches, or all.

    >>> import jax, jax.numpy as jnp, optax, fedjax_lite as fl
    >>> loss = lambda params, batch: (params["a"] * params["b"] - batch["x"]) ** 2 / 2
    >>> model = frozen(fl.function_model(loss), "a")
    >>> algorithm = fl.fed_avg(model, optax.sgd(0.25))
    >>> state = algorithm.init({"a": jnp.float32(2.0), "b": jnp.float32(1.0)})
    >>> dataset = fl.FederatedDataset.from_clients([{"x": [6.0]}])
    >>> cohort = fl.cohort_of(dataset.resident(), [0])
    >>> state, info = algorithm.round(jax.random.key(0), state, cohort)
    >>> float(state.params["b"]), float(state.frozen["a"]), int(info.clients["bits_up"][0])
    (3.0, 2.0, 32)
    """
    _refuse_second(model)
    matches = matching("names", names)

    def split_params(params: PyTree) -> tuple[PyTree, PyTree]:
        trained, kept = split(params, matches)
        if not jax.tree.leaves(trained) or not jax.tree.leaves(kept):
            which = "none" if jax.tree.leaves(trained) else "all"
            raise ValueError(
                f"names is {names!r}, which matches {which} of the params"
                f" {', '.join(names_of(params))}; freeze some of them."
            )
        return trained, kept

    def call(function: Callable[..., Any], trained: PyTree, *args: Any) -> Any:
        return function(merge(trained, read_frozen()), *args)

    return _called(model, call)._replace(split=split_params, merge=merge)


def _refuse_second(model: Model) -> None:
    _validate.instance("model", model, Model, "fl.linen_model(...)")
    if model.split is not None:
        raise ValueError(
            "model has frozen params already; name all of them in one call, of the model before."
        )


def _called(model: Model, call: Callable[..., Any]) -> Model:
    """The model whose functions are called by `call(function, params, ...)`."""

    def called(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(call, function)

    return model._replace(
        loss=called(model.loss),
        metrics=called(model.metrics),
        predict=None if model.predict is None else called(model.predict),
    )


def lora(
    model: Model,
    rank: int = 4,
    *,
    alpha: float | None = None,
    names: Names = "*",
    base: PyTree = None,
    train_a: bool = True,
) -> Model:
    r"""The model with its params frozen, and low-rank adapters on its dense layers trained.

    A layer with the kernel $W$, as a matrix from all of its inputs to all of its outputs, becomes

    $$y = x W + \frac{\alpha}{r} \, x A B, \qquad A \in R^{in \times r}, \;
    B \in R^{r \times out}.$$

    $A$ starts normal with variance $1 / in$, and $B$ at zero, so that training starts from the
    model as it is. $A B$ is never formed: a lane takes the memory of its adapters alone.

    Averaged one by one (FedIT), the means of clients' $A_i$ and $B_i$ have another product than the
    mean of the $A_i B_i$. With $A$ frozen, too, they have the same (FFA-LoRA), and
    `fl.fed_ex_lora` adds the difference to $W$.

    Sources: Hu et al. (2022), "LoRA: Low-Rank Adaptation of Large Language Models"; Zhang et al.
    (2024), "Towards Building the Federated GPT: Federated Instruction Tuning" (FedIT); Sun et al.
    (2024), "Improving LoRA in Privacy-preserving Federated Learning" (FFA-LoRA).

    Args:
      model: A model of a flax linen module, such as those of `fl.models`.
      rank: $r$.
      alpha: $\alpha$; that of the rank by default, so that the factor is 1.
      names: On which layers of `nn.Dense` and `nn.DenseGeneral`, as for `frozen`: names are those
        of modules, such as `"_Layer_0/Dense_0"`; all by default.
      base: The params to start from, such as trained ones; drawn by the model by default.
      train_a: Whether $A$ is trained; otherwise it is frozen as it is drawn.

    Returns:
      A `Model` whose params are `{"adapters": {name: {"a": ..., "b": ...}}, "base": ...}`, of which
      the base is frozen.

    Raises:
      ValueError: `rank` is below 1, `train_a` is no switch, or `model` has frozen params. In
        `algorithm.init`: no layer has such a name, or `base` is not of the form of the model's
        params.

    >>> import jax, optax, fedjax_lite as fl
    >>> model = lora(fl.models.mlp((8,), (16,), 4), rank=2)
    >>> state = fl.fed_avg(model, optax.sgd(0.1)).init(jax.random.key(0))
    >>> jax.tree.map(lambda x: x.shape, state.params["adapters"]["Dense_0"])
    {'a': (8, 2), 'b': (2, 16)}
    >>> sum(x.size for x in jax.tree.leaves(state.frozen)) == 9 * 16 + 17 * 4
    True
    """
    _refuse_second(model)
    rank = _validate.integer("rank", rank, minimum=1)
    _validate.choice("train_a", train_a, (True, False))
    scale = 1.0 if alpha is None else _validate.number("alpha", alpha) / rank
    matches = matching("names", names)

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        key_base, key_adapters = jax.random.split(key)
        sizes: dict[str, tuple[int, int]] = {}

        def measure(layer: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
            taken = _inputs(layer)
            sizes[_name(layer)] = (
                math.prod(x.shape[-taken:]),
                math.prod(y.shape[x.ndim - taken :]),
            )
            return y

        with nn.intercept_methods(functools.partial(_on_dense, measure)):
            params, model_state = model.init(key_base)
        chosen = [name for name in sizes if matches(name)]
        if not chosen:
            raise ValueError(
                f"names is {names!r}, and the dense layers of the model are"
                f" {', '.join(sizes) or 'none'}; choose some of these."
            )
        adapters = {}
        for name, own in zip(chosen, jax.random.split(key_adapters, len(chosen)), strict=True):
            inputs, outputs = sizes[name]
            a = jax.random.normal(own, (inputs, rank)) * inputs**-0.5
            adapters[name] = {"a": a, "b": jnp.zeros((rank, outputs))}
        if base is not None:
            _validate.same_form("base", base, params, "pass params of this model.")
        return {"adapters": adapters, "base": params if base is None else base}, model_state

    def is_frozen(name: str) -> bool:
        return name.startswith("base/") or (name.endswith("/a") and not train_a)

    def call(function: Callable[..., Any], trained: PyTree, *args: Any) -> Any:
        params = merge(trained, read_frozen())

        def add(layer: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
            own = params["adapters"].get(_name(layer))
            if own is None:
                return y
            flat = x.reshape(*x.shape[: x.ndim - _inputs(layer)], -1)
            low = flat @ own["a"].astype(y.dtype)
            return y + scale * (low @ own["b"].astype(y.dtype)).reshape(y.shape)

        with nn.intercept_methods(functools.partial(_on_dense, add)):
            return function(params["base"], *args)

    def add_residual(frozen: PyTree, updates: PyTree, weights: jax.Array) -> PyTree:
        def add(path: Any, x: jax.Array) -> jax.Array:
            layer, _, leaf = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")
            if leaf != "kernel" or layer not in updates["adapters"]:
                return x
            own = updates["adapters"][layer]
            p = weights[:, None, None]
            a, b = (own[name] - (p * own[name]).sum(0) for name in ("a", "b"))
            # One product, whose inner axis is that of all clients' ranks.
            residual = jnp.einsum("cir,cro->io", p * a, b, precision=jax.lax.Precision.HIGHEST)
            return x + (scale * residual).reshape(x.shape).astype(x.dtype)

        return {**frozen, "base": jax.tree_util.tree_map_with_path(add, frozen["base"])}

    return _called(model, call)._replace(
        init=init,
        split=lambda params: split(params, is_frozen),
        merge=merge,
        add_residual=add_residual if train_a else None,
    )


def _on_dense(
    function: Callable[[nn.Module, jax.Array, jax.Array], jax.Array],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: Any,
) -> Any:
    """What a method of a module returns; of a dense layer's call, what the function makes of it."""
    y = call(*args, **kwargs)
    is_dense = isinstance(context.module, (nn.Dense, nn.DenseGeneral))
    if not is_dense or context.method_name != "__call__":
        return y
    return function(context.module, args[0], y)


def _name(layer: nn.Module) -> str:
    return "/".join(layer.path)


def _inputs(layer: nn.Module) -> int:
    """How many of its input's last axes a dense layer takes."""
    axis = getattr(layer, "axis", -1)
    return 1 if isinstance(axis, int) else len(axis)
