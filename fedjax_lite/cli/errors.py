"""What ends a command early."""

import contextlib
import signal
from collections.abc import Iterator


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
def usage_errors() -> Iterator[None]:
    """Has a `ValueError`, or a file that is missing, end the command in one line."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from None
