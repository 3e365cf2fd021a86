"""The options that algorithms share: their types, defaults and descriptions, each written once."""

import difflib
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, TypeVar, get_args, get_type_hints

from jax.sharding import Mesh

from fedjax_lite.base import Client, Reducer, UpdateTransform

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class Option(NamedTuple):
    """What a type does not say of an option."""

    default: Any
    text: str


class _UpdateOptions(TypedDict, total=False):
    batch_size: Annotated[
        int | None,
        Option(
            None,
            "Examples in a local batch. By default 32, and for generated populations the size that"
            " they draw. The last batch of an epoch may be short: it is masked, never filled up.",
        ),
    ]
    pipeline: Annotated[
        UpdateTransform | None,
        Option(
            None,
            "What happens to the updates between clients and server, such as"
            " `fl.chain(fl.clip_by_norm(1.0), fl.quantize_uniform(256))`.",
        ),
    ]
    reducer: Annotated[
        Reducer | None,
        Option(
            None,
            "How the updates become one aggregate, such as `fl.coordinate_median()`; by default"
            " their weighted mean, `fl.weighted_mean()`.",
        ),
    ]
    on_nonfinite: Annotated[
        Literal["drop", "keep"],
        Option(
            "drop",
            "A client whose update has a norm that is not finite (or whose model state, statistics,"
            ' weight or output is not) is left out and counted (`"drop"`), or let through'
            ' (`"keep"`).',
        ),
    ]


class _StepOptions(TypedDict, total=False):
    num_epochs: Annotated[
        int | Callable[[Client], Any],
        Option(
            1,
            "How often a client runs through its examples; or a function of its `fl.Client` that"
            " returns so, by its id, its number of examples, or at random by its key.",
        ),
    ]
    num_steps: Annotated[
        int | Callable[[Client], Any] | None,
        Option(
            None,
            "Number of local steps, whatever the client's size, or a function as for `num_epochs`,"
            " which it replaces. A cohort's `max_steps` bounds either.",
        ),
    ]
    max_staleness: Annotated[
        int,
        Option(
            0,
            "How many rounds old the params may be that a client starts from, which a cohort's"
            " `staleness` says; the state keeps so many more versions of params and model state.",
        ),
    ]
    shuffle: Annotated[
        bool,
        Option(
            True,
            "A new order of a client's examples in each epoch, from the key of the round.",
        ),
    ]
    differentiable: Annotated[
        bool,
        Option(
            False,
            "Allow reverse-mode differentiation through rounds. Loops then have the length of the"
            " longest that could occur, `num_steps` or all examples of the population, and skip"
            " what exceeds a client's own; memory grows with the number of local steps. A client"
            " that is left out can still make gradients NaN.",
        ),
    ]


class _SpeedOptions(TypedDict, total=False):
    lanes: Annotated[
        int | None,
        Option(
            None,
            "Clients trained side by side on a device; changes the speed only. By default 1 on"
            " CPUs, elsewhere up to 64, as far as the device's memory goes.",
        ),
    ]
    mesh: Annotated[
        Mesh | None,
        Option(
            None,
            'Mesh with the axis `"clients"`; all devices by default, or the one that'
            " `jax.default_device` names. Changes the speed only.",
        ),
    ]
    rewrite_convolutions: Annotated[
        bool | None,
        Option(
            None,
            "Put the convolutions of a local step into the layout that is fast inside loops on a"
            " CPU, about thirty times faster, and its matrix products into forms that are;"
            " elsewhere, put convolutions as products with patches of the images. Changes the"
            " speed only. By default on CPUs, and on GPUs with several lanes.",
        ),
    ]


class RoundOptions(_UpdateOptions, _SpeedOptions, total=False):
    """Options of algorithms whose clients answer with one gradient."""


class LocalOptions(_UpdateOptions, _StepOptions, _SpeedOptions, total=False):
    """Options of algorithms whose clients train."""


class StoreOptions(_UpdateOptions, _StepOptions, _SpeedOptions, total=False):
    """Options of algorithms whose clients train, and may keep something between rounds."""

    memory_kind: Annotated[
        Literal["device", "pinned_host"],
        Option(
            "device",
            'Where the store lies: on the `"device"`, or in `"pinned_host"` memory, from which'
            " entries are copied when their clients train. Of several devices each has a copy of a"
            " small store; of one of 256 MiB or more the entries of its share of the clients, if"
            " the number of devices divides that of the clients.",
        ),
    ]


def documented(factory: F) -> F:
    """Has signature and docstring name each option in place of `**options: Unpack[...]`.

    It changes the factory itself: doctest would not look into a wrapper.
    """
    (kind,) = get_args(factory.__annotations__["options"])
    signature = inspect.signature(factory)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    texts = []
    for name, annotated in get_type_hints(kind, include_extras=True).items():
        annotation, option = get_args(annotated)
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=annotation
            )
        )
        texts.append(
            textwrap.fill(
                f"{name}: {option.text}",
                width=100,
                initial_indent=" " * 6,
                subsequent_indent=" " * 8,
                break_on_hyphens=False,
            )
        )
    factory.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    if factory.__doc__ is not None:
        item = re.compile(r"^ +\*\*options: .*\n", re.MULTILINE)
        factory.__doc__ = item.sub(lambda _: "\n".join(texts) + "\n", factory.__doc__)
    return factory


def complete(factory: Callable[..., Any], options: T) -> T:
    """The options that a documented factory was given, and the defaults of the others.

    Raises:
      TypeError: An option is not one of the factory's; it is named, and so is the factory.
    """
    given: dict[str, Any] = dict(options)  # type: ignore[call-overload]
    parameters = inspect.signature(factory).parameters
    for name in given:
        if name not in parameters:
            close = difflib.get_close_matches(name, parameters, n=1)
            known = ", ".join(p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY)
            remedy = f"did you mean {close[0]}?" if close else f"choose one of {known}."
            raise TypeError(f"{name} is no option of {factory.__name__}; {remedy}")
    (kind,) = get_args(factory.__annotations__["options"])
    defaults = {name: parameters[name].default for name in kind.__annotations__}
    return defaults | given  # type: ignore[return-value]
