"""Which call of a model within a local step it is: for noise, which no two gradients may share."""

import contextlib
import contextvars
import itertools
from collections.abc import Iterator

_CALLS: contextvars.ContextVar["itertools.count[int] | None"] = contextvars.ContextVar(
    "calls of this step", default=None
)


@contextlib.contextmanager
def counting_calls() -> Iterator[None]:
    """Calls are counted from 0 in the block, which traces one local step."""
    token = _CALLS.set(itertools.count())
    try:
        yield
    finally:
        _CALLS.reset(token)


def next_call() -> int:
    """The number of this call; 0 outside of a local step."""
    calls = _CALLS.get()
    return 0 if calls is None else next(calls)
