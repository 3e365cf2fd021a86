"""What ends a command early."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax

from fedjax_lite.runs.interrupts import first_signal, interrupted_by
from fedjax_lite.runs.result import InterruptedTraining
from fedjax_lite.xla import hosts


class UsageError(Exception):
    """The user can mend it: told in one line, exit code 2."""


class LostProcessError(Exception):
    """Another process of the run has ended, or cannot be reached."""


class InterruptedRunError(Exception):
    """A signal came after something was recorded: Ctrl-C, SIGTERM or SIGHUP.

    Attributes:
      exit_code: What a shell gives a process that the signal ends, 130, 143 or 129.
    """

    def __init__(self, message: str, interrupt: KeyboardInterrupt) -> None:
        super().__init__(message)
        self.exit_code = exit_code(interrupt)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """That of a shell for a process that a signal ends."""
    return 128 + getattr(interrupt, "signal", signal.SIGINT)


@contextlib.contextmanager
def finishing(goes_on: str) -> Iterator[Callable[[], None]]:
    """A signal ends the command where the function is called that this yields, or at the end.

    So what is in progress is finished and recorded before; a second signal ends it at once.

    Args:
      goes_on: What to tell the user of how to go on.

    Raises:
      InterruptedRunError: A signal came.
    """
    try:
        with first_signal() as came:

            def end_if_signalled() -> None:
                number = int(came() or 0)
                if jax.process_count() > 1:  # All end after the same.
                    number = hosts.told(hosts.tell(0.0, number))[1]
                if number:
                    first = signal.Signals(number)
                    raise InterruptedTraining(interrupted_by(first), first)

            yield end_if_signalled
            end_if_signalled()
    except KeyboardInterrupt as interrupt:
        told = str(interrupt) or "interrupted"
        raise InterruptedRunError(f"{told}; {goes_on}", interrupt) from None


@contextlib.contextmanager
def usage_errors(told: Callable[[str], str] = str) -> Iterator[None]:
    """Has a `ValueError`, or a file that is missing, end the command in one line.

    Args:
      told: Makes it of the message.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(told(str(error))) from None
