"""Params that are not trained: given to models while a round or an evaluation is traced.

They exist once, as an argument of the program, whatever the lanes: a model reads them beside what a
client trains, and no algorithm needs to know of them.
"""

import contextlib
import contextvars
from collections.abc import Iterator

from fedjax_lite.base import PyTree

_GIVEN: contextvars.ContextVar[PyTree] = contextvars.ContextVar("frozen params", default=None)


@contextlib.contextmanager
def frozen_given(frozen: PyTree) -> Iterator[None]:
    """Models read these frozen params in the block."""
    token = _GIVEN.set(frozen)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def read_frozen() -> PyTree:
    """The frozen params of the state that is trained or evaluated.

    Raises:
      ValueError: Nothing is.
    """
    frozen = _GIVEN.get()
    if frozen is None:
        raise ValueError(
            "the model has frozen params, which are in the state; call it through an algorithm's"
            " round or fl.evaluate(model, state, examples), or call the model that it was made of"
            " with model.merge(state.params, state.frozen)."
        )
    return frozen
