"""Signals that end a run: Ctrl-C, SIGTERM and SIGHUP."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from fedjax_lite.runs.result import InterruptedTraining

# What a terminal sends on Ctrl-C, a scheduler such as SLURM at the end of a job's time, and a
# terminal that is closed. Windows has no SIGHUP.
_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in dir(signal)
]


def interrupted_by(came: signal.Signals) -> str:
    """What a signal has done, in words; Ctrl-C needs no name."""
    return "interrupted" if came is signal.SIGINT else f"interrupted by {came.name}"


def _raise(number: int, frame: FrameType | None) -> None:
    came = signal.Signals(number)
    raise InterruptedTraining(interrupted_by(came), came)


@contextlib.contextmanager
def signals_raised() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `InterruptedTraining`, unless they are ignored or handled."""
    with _handled(_raise, (signal.SIG_DFL,)):
        yield


@contextlib.contextmanager
def first_signal() -> Iterator[Callable[[], signal.Signals | None]]:
    """A function that tells which signal came, if any; the second one works as ever.

    Only in the main thread, which Python lets handle signals, and only for signals that nothing
    else handles.
    """
    came: list[signal.Signals] = []

    def receive(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number))
        restore()

    usual = (signal.SIG_DFL, signal.default_int_handler, _raise)
    with _handled(receive, usual) as restore:
        yield lambda: came[0] if came else None


@contextlib.contextmanager
def _handled(
    handler: Callable[[int, FrameType | None], None], usual: tuple[object, ...]
) -> Iterator[Callable[[], None]]:
    """Has a handler for the signals that are handled in one of the usual ways."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {number: usual_ for number, usual_ in before.items() if usual_ in usual}

    def restore() -> None:
        for number, usual_ in before.items():
            signal.signal(number, usual_)

    for number in before:
        signal.signal(number, handler)
    try:
        yield restore
    finally:
        restore()
